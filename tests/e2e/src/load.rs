//! A guest that writes one request after the other through the `nbd` crate, and remembers the order.

use std::{
    io::{self, BufReader, BufWriter, Read, Seek, SeekFrom, Write as _},
    os::unix::net::UnixStream,
    sync::{Arc, Condvar, Mutex},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use crate::{Model, Write, fill};

/// A guest that writes at random places until it is stopped or its connection breaks.
///
/// With one request at a time the order of acknowledgement is the order of the LSNs.
pub struct Load {
    thread: JoinHandle<Written>,
    shared: Arc<Shared>,
}

/// What a load has done.
#[derive(Debug)]
pub struct Written {
    /// The size of the disk in bytes.
    pub size: u64,
    /// Acknowledged writes, oldest first.
    pub writes: Vec<Write>,
    /// The write that was under way when the connection broke, if one was.
    pub unanswered: Option<Write>,
    /// Why the connection broke, if it did.
    pub broken: Option<io::Error>,
    /// The longest that a write or flush took.
    pub slowest: Duration,
}

impl Written {
    /// The disk after each of these writes, when it was zeroes before.
    pub fn model(&self) -> Model {
        Model::of_zeroes(self.size, self.writes.clone())
    }
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    acknowledged: u64,
    stop: bool,
    ended: bool,
}

/// Every so many writes there is a flush.
const FLUSH_EVERY: u64 = 50;

/// The longest write, in sectors.
const SECTORS_MAX: u64 = 64;

const SECTOR: u64 = 512;

impl Load {
    /// Begins to write to the export at `uri`, which is on a unix socket.
    pub fn start(uri: &str, seed: u64) -> Self {
        Self::of(Guest::connect(uri), seed)
    }

    /// The same when it may be that nobody serves it.
    pub fn try_start(uri: &str, seed: u64) -> Option<Self> {
        Guest::try_connect(uri).ok().map(|guest| Self::of(guest, seed))
    }

    fn of(mut guest: Guest, seed: u64) -> Self {
        let shared = Arc::new(Shared::default());
        let of_thread = Arc::clone(&shared);
        let thread = std::thread::spawn(move || {
            let written = guest.write_until_stopped(seed, &of_thread);
            of_thread.state.lock().expect("no panic").ended = true;
            of_thread.changed.notify_all();
            written
        });
        Self { thread, shared }
    }

    /// Waits until `more` writes have been acknowledged from now on.
    pub fn goes_on(&self, more: u64) {
        assert!(self.goes_on_or_breaks(more), "the guest's connection broke");
    }

    /// Waits for so many writes or for the end of its connection; whether it still has one.
    pub fn goes_on_or_breaks(&self, more: u64) -> bool {
        let state = self.shared.state.lock().expect("no panic");
        let target = state.acknowledged + more;
        let pending = |state: &mut State| state.acknowledged < target && !state.ended;
        let state = self.shared.changed.wait_while(state, pending).expect("no panic");
        state.acknowledged >= target
    }

    /// Stops it, whether or not its connection has broken.
    pub fn end(self) -> Written {
        self.shared.state.lock().expect("no panic").stop = true;
        self.thread.join().expect("the guest does not panic")
    }

    /// Stops it; no request may have failed.
    pub fn stop(self) -> Written {
        self.shared.state.lock().expect("no panic").stop = true;
        let written = self.thread.join().expect("the guest does not panic");
        assert!(written.broken.is_none(), "the guest's connection broke: {:?}", written.broken);
        written
    }

    /// Waits for the end of its connection, which someone else has broken.
    pub fn broken(self) -> Written {
        let written = self.thread.join().expect("the guest does not panic");
        assert!(written.broken.is_some(), "the guest's connection did not break");
        written
    }
}

/// A guest that writes as a [`Load`] does, and connects again whenever its connection breaks.
pub struct Returning {
    thread: JoinHandle<Vec<Written>>,
    shared: Arc<Shared>,
}

impl Returning {
    /// Begins to write to the export at `uri`, which is on a unix socket. Its first connection has the seed `first`, each
    /// other one the next.
    pub fn start(uri: &str, first: u64) -> Self {
        let shared = Arc::new(Shared::default());
        let (of_thread, uri) = (Arc::clone(&shared), uri.to_owned());
        let thread = std::thread::spawn(move || {
            let mut lives = Vec::new();
            for seed in first.. {
                let mut guest = loop {
                    if of_thread.state.lock().expect("no panic").stop {
                        return lives;
                    }
                    match Guest::try_connect(&uri) {
                        Ok(guest) => break guest,
                        Err(_) => std::thread::yield_now(),
                    }
                };
                lives.push(guest.write_until_stopped(seed, &of_thread));
            }
            unreachable!("there are more seeds")
        });
        Self { thread, shared }
    }

    /// Waits until `more` writes have been acknowledged from now on, on whichever connection.
    pub fn goes_on(&self, more: u64) {
        let state = self.shared.state.lock().expect("no panic");
        let target = state.acknowledged + more;
        let pending = |state: &mut State| state.acknowledged < target;
        drop(self.shared.changed.wait_while(state, pending).expect("no panic"));
    }

    /// Stops it: what it has done on each of its connections, the last of which it has ended itself.
    pub fn stop(self) -> Vec<Written> {
        self.shared.state.lock().expect("no panic").stop = true;
        self.thread.join().expect("the guest does not panic")
    }
}

/// A connection of the `nbd` crate, which has one request under way at a time.
pub struct Guest {
    client: nbd::client::NbdClient<Buffered>,
    size: u64,
}

impl Guest {
    /// Connects to an export on a unix socket.
    pub fn connect(uri: &str) -> Self {
        Self::try_connect(uri).unwrap_or_else(|error| panic!("connect to {uri}: {error}"))
    }

    /// Writes and waits for the answer.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.client.seek(SeekFrom::Start(offset))?;
        self.client.write_all(data)
    }

    /// Reads as much as there is room for.
    pub fn read(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.client.seek(SeekFrom::Start(offset))?;
        self.client.read_exact(buffer)
    }

    /// Flushes and waits for the answer.
    pub fn flush(&mut self) -> io::Result<()> {
        self.client.flush()
    }

    /// The same as [`connect`](Self::connect) when it may be that nobody serves it.
    ///
    /// # Errors
    /// When nobody does, or whoever it is hangs up.
    pub fn try_connect(uri: &str) -> io::Result<Self> {
        let (export, socket) = uri
            .strip_prefix("nbd+unix:///")
            .and_then(|rest| rest.split_once("?socket="))
            .unwrap_or_else(|| panic!("{uri} is no URI of a unix socket"));
        let stream = UnixStream::connect(socket)?;
        let mut stream =
            Buffered { reader: BufReader::new(stream.try_clone()?), writer: BufWriter::new(stream) };
        let export = nbd::client::handshake(&mut stream, export.as_bytes())?;
        Ok(Self { size: export.size, client: nbd::client::NbdClient::new(stream, &export) })
    }

    fn write_until_stopped(&mut self, seed: u64, shared: &Shared) -> Written {
        let mut random = Random(seed);
        let mut written = Written {
            size: self.size,
            writes: Vec::new(),
            unanswered: None,
            broken: None,
            slowest: Duration::ZERO,
        };
        let mut buffer = Vec::new();
        for count in 1_u64.. {
            let sectors = 1 + random.below(SECTORS_MAX);
            let first = random.below(self.size / SECTOR - sectors);
            let write = Write { tag: (seed << 32) + count, offset: first * SECTOR, length: sectors * SECTOR };
            fill(&write, &mut buffer);
            let began = Instant::now();
            if let Err(error) = self.write(write.offset, &buffer) {
                (written.unanswered, written.broken) = (Some(write), Some(error));
                break;
            }
            written.writes.push(write);
            if count.is_multiple_of(FLUSH_EVERY)
                && let Err(error) = self.flush()
            {
                written.broken = Some(error);
                break;
            }
            written.slowest = written.slowest.max(began.elapsed());
            let mut state = shared.state.lock().expect("no panic");
            state.acknowledged += 1;
            shared.changed.notify_all();
            if state.stop {
                break;
            }
        }
        written
    }
}

/// Splitmix64: the same places for the same seed.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % bound
    }
}

/// The client reads and writes number by number, which wants buffers.
struct Buffered {
    reader: BufReader<UnixStream>,
    writer: BufWriter<UnixStream>,
}

impl Read for Buffered {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        // The client does not flush after all it says in a handshake.
        self.writer.flush()?;
        self.reader.read(buffer)
    }
}

impl io::Write for Buffered {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.writer.write(data)
    }

    fn flush(&mut self) -> io::Result<()> {
        // What the client flushes it follows with a read; before that it may have data to add.
        Ok(())
    }
}
