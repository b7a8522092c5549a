//! A way to a receiver that counts what comes back on it, and can be slow.

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
pub struct Relay {
    there: Arc<Way>,
    back: Arc<Way>,
}

/// One direction of all connections.
struct Way {
    /// So many bytes a second go through, of each connection.
    rate: AtomicU64,
    /// So many have come.
    bytes: AtomicU64,
}

/// As much goes through at once.
const PIECE_BYTES: usize = 16 << 10;

/// As fast as it goes.
const UNLIMITED: u64 = u64::MAX;

impl Relay {
    /// Listens at `socket`, and connects each client with `target`; as fast as it goes, at first.
    pub fn before(socket: &Path, target: PathBuf) -> Self {
        let listener = UnixListener::bind(socket).expect("listen");
        let way = || Arc::new(Way { rate: AtomicU64::new(UNLIMITED), bytes: AtomicU64::new(0) });
        let relay = Self { there: way(), back: way() };
        let ways = [Arc::clone(&relay.there), Arc::clone(&relay.back)];
        std::thread::spawn(move || {
            for client in listener.incoming() {
                let client = client.expect("a client");
                // One that is refused hears it by its end.
                let Ok(server) = UnixStream::connect(&target) else { continue };
                let back = (server.try_clone().expect("a socket"), client.try_clone().expect("a socket"));
                for (way, (from, to)) in ways.iter().cloned().zip([(client, server), back]) {
                    std::thread::spawn(move || way.pass_on(from, to));
                }
            }
        });
        relay
    }

    /// Lets so many bytes a second through from now on, towards the receiver.
    pub fn let_through(&self, bytes_per_second: u64) {
        self.there.rate.store(bytes_per_second, Ordering::SeqCst);
    }

    /// How many bytes have come back so far.
    pub fn bytes_back(&self) -> u64 {
        self.back.bytes.load(Ordering::SeqCst)
    }
}

impl Way {
    /// Until either side has ended; then both have.
    fn pass_on(&self, mut from: UnixStream, mut to: UnixStream) {
        let mut buffer = vec![0; PIECE_BYTES];
        let mut free_at = Instant::now();
        while let Ok(read @ 1..) = from.read(&mut buffer) {
            self.bytes.fetch_add(read as u64, Ordering::SeqCst);
            let rate = self.rate.load(Ordering::SeqCst);
            if rate < UNLIMITED {
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
}
