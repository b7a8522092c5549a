//! A way to a receiver that lets so many bytes a second through.

use std::{
    io::{Read, Write},
    net::Shutdown,
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

/// A socket in front of another one. It serves until the test's process ends.
pub struct SlowLink {
    rate: Arc<AtomicU64>,
}

/// As much is let through at once.
const PIECE_BYTES: usize = 16 << 10;

impl SlowLink {
    /// Listens at `socket`, and connects each client with `target`; as fast as it goes, at first.
    pub fn before(socket: &Path, target: PathBuf) -> Self {
        let listener = UnixListener::bind(socket).expect("listen");
        let rate = Arc::new(AtomicU64::new(u64::MAX));
        let of_thread = Arc::clone(&rate);
        std::thread::spawn(move || {
            for client in listener.incoming() {
                let client = client.expect("a client");
                // One that is refused hears it by its end.
                let Ok(server) = UnixStream::connect(&target) else { continue };
                let back = (server.try_clone().expect("a socket"), client.try_clone().expect("a socket"));
                let rate = Arc::clone(&of_thread);
                std::thread::spawn(move || pass_on(client, server, &rate));
                std::thread::spawn(move || pass_on(back.0, back.1, &AtomicU64::new(u64::MAX)));
            }
        });
        Self { rate }
    }

    /// Lets so many bytes a second through from now on, towards the receiver.
    pub fn let_through(&self, bytes_per_second: u64) {
        self.rate.store(bytes_per_second, Ordering::SeqCst);
    }
}

/// Until either side has ended; then both have.
fn pass_on(mut from: UnixStream, mut to: UnixStream, rate: &AtomicU64) {
    let mut buffer = vec![0; PIECE_BYTES];
    let mut free_at = Instant::now();
    while let Ok(read @ 1..) = from.read(&mut buffer) {
        let rate = rate.load(Ordering::SeqCst);
        if rate < u64::MAX {
            // Being slow is what it is for.
            std::thread::sleep(free_at.saturating_duration_since(Instant::now()));
            let takes = Duration::from_micros(read as u64 * 1_000_000 / rate);
            free_at = free_at.max(Instant::now()) + takes;
        }
        if to.write_all(&buffer[..read]).is_err() {
            break;
        }
    }
    // Whichever has gone already needs no telling.
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}
