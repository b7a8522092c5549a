//! A way to a receiver that counts what comes back on it.

use std::{
    io::{Read, Write},
    net::Shutdown,
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

/// A socket in front of another one. It serves until the test's process ends.
pub struct Counting {
    bytes: Arc<AtomicU64>,
}

impl Counting {
    /// Listens at `socket`, and connects each client with `target`.
    pub fn before(socket: &Path, target: PathBuf) -> Self {
        let listener = UnixListener::bind(socket).expect("listen");
        let bytes = Arc::<AtomicU64>::default();
        let counted = Arc::clone(&bytes);
        std::thread::spawn(move || {
            for client in listener.incoming() {
                let client = client.expect("a client");
                // One that is refused hears it by its end.
                let Ok(server) = UnixStream::connect(&target) else { continue };
                let back = (server.try_clone().expect("a socket"), client.try_clone().expect("a socket"));
                std::thread::spawn(move || pass_on(client, server, &AtomicU64::new(0)));
                let counted = Arc::clone(&counted);
                std::thread::spawn(move || pass_on(back.0, back.1, &counted));
            }
        });
        Self { bytes }
    }

    /// How many bytes have come back so far.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::SeqCst)
    }
}

/// Until either side has ended; then both have.
fn pass_on(mut from: UnixStream, mut to: UnixStream, count: &AtomicU64) {
    let mut buffer = vec![0; 64 * 1024];
    while let Ok(read @ 1..) = from.read(&mut buffer) {
        count.fetch_add(read as u64, Ordering::SeqCst);
        if to.write_all(&buffer[..read]).is_err() {
            break;
        }
    }
    // Whichever has gone already needs no telling.
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}
