//! What a guest was told to be stable is stable on the disk behind: FLUSH and FUA are there before they are
//! answered, whatever is behind and however it is used, and a flush covers what was answered on other
//! connections.

use std::{
    path::Path,
    sync::{
        Mutex, MutexGuard,
        mpsc::{self, Sender},
    },
    thread,
};

use backtide_e2e::{
    Bench, Daemon, Disk, LoggedDisk,
    kernel_disk::{Served, cannot_mount},
    nbd_wire::Connection,
    skip,
};

const SIZE: u64 = 64 << 20;

const BLOCK: u64 = 4096;

/// How the agent has the disk.
struct Way {
    /// A file, by this cache mode and engine; otherwise an NBD server.
    file: Option<(&'static str, &'static str)>,
}

const BY_NBD: Way = Way { file: None };

const fn by_file(cache: &'static str, engine: &'static str) -> Way {
    Way { file: Some((cache, engine)) }
}

/// An agent with one disk, of which everything can be told that it was asked for.
struct Stage<'bench> {
    disk: Disk<'bench>,
    agent: Daemon,
    _receiver: Daemon,
    _file: Option<Served>,
    behind: LoggedDisk,
}

impl<'bench> Stage<'bench> {
    /// None where this machine has no such way.
    fn set(bench: &'bench Bench, way: &Way) -> Option<Self> {
        if let Some(why) = way.file.and_then(|_| cannot_mount()) {
            skip(why);
            return None;
        }
        let behind = LoggedDisk::start(bench, "behind", SIZE);
        let file = way.file.map(|_| Served::start(bench, "vm1.img", &behind.uri, SIZE));
        let receiver = bench.receiver();
        let (agent, disk) = match way.file {
            None => (bench.agent(), bench.attach("vm1", &behind.uri, &[])),
            Some((cache, engine)) => {
                let wanted = if engine == "pread" { "threads" } else { "auto" };
                let agent = bench.daemon(&["agent", "run", "--io-engine", wanted]);
                (agent, bench.attach("vm1", "vm1.img", &["--cache", cache]))
            }
        };
        disk.wait("sync");
        let status = disk.status();
        let (cache, engine) = way.file.unwrap_or(("writeback", "nbd"));
        if engine == "io_uring" && status["engine"] == "pread" {
            skip(&format!("io_uring is not to be had here: {}", status["engine_reason"]));
            return None;
        }
        assert_eq!((&status["engine"], &status["cache"]), (&engine.into(), &cache.into()), "{status}");
        Some(Self { disk, agent, _receiver: receiver, _file: file, behind })
    }

    fn assert_stable(&self, offset: u64, length: u64, what: &str) {
        let requests = self.behind.requests();
        assert!(requests.are_stable(offset, length), "{what} at {offset}: {requests:#?}");
    }
}

fn what_is_stable_is_told_after_it_is(way: &Way) {
    let bench = Bench::new();
    let Some(stage) = Stage::set(&bench, way) else { return };
    let mut guest = Connection::open(&stage.disk.uri());
    let data = vec![0x5a; 600 << 10];
    for round in 0..6 {
        let at = (8 + round) << 20;
        guest.write(at, &data[..4096], false).unwrap();
        let early = stage.behind.requests();
        assert!(!early.are_stable(at, BLOCK), "nobody has asked for that: {early:#?}");
        let flushes = early.flushes();
        guest.flush().unwrap();
        assert!(stage.behind.requests().flushes() > flushes, "a flush is a flush");
        stage.assert_stable(at, BLOCK, "a write before a flush");

        guest.write(at + BLOCK, &data[..4096], true).unwrap();
        stage.assert_stable(at + BLOCK, BLOCK, "a block written with FUA");
        // A part of a block, and more than is done at once.
        guest.write(at + 2 * BLOCK + 512, &data[..512], true).unwrap();
        stage.assert_stable(at + 2 * BLOCK + 512, 512, "a sector written with FUA");
        guest.write(at + 3 * BLOCK, &data, true).unwrap();
        stage.assert_stable(at + 3 * BLOCK, data.len() as u64, "a long write with FUA");
        let at = at + 3 * BLOCK + data.len() as u64;
        guest.write_zeroes(at, 2 * 4096, true).unwrap();
        stage.assert_stable(at, 2 * BLOCK, "zeroes with FUA");
        guest.write_zeroes(at + 2 * BLOCK, 4096, false).unwrap();
        guest.write(at + 3 * BLOCK, &data[..300 << 10], false).unwrap();
        guest.flush().unwrap();
        stage.assert_stable(at + 2 * BLOCK, BLOCK + (300 << 10), "zeroes and a long write before a flush");
    }
}

#[test]
fn a_flush_and_a_stable_write_reach_an_nbd_server_before_they_are_answered() {
    what_is_stable_is_told_after_it_is(&BY_NBD);
}

#[test]
fn a_flush_and_a_stable_write_reach_a_file_by_io_uring_through_the_page_cache() {
    what_is_stable_is_told_after_it_is(&by_file("writeback", "io_uring"));
}

#[test]
fn a_flush_and_a_stable_write_reach_a_file_by_io_uring_directly() {
    what_is_stable_is_told_after_it_is(&by_file("direct", "io_uring"));
}

#[test]
fn a_flush_and_a_stable_write_reach_a_file_by_threads_through_the_page_cache() {
    what_is_stable_is_told_after_it_is(&by_file("writeback", "pread"));
}

#[test]
fn a_flush_and_a_stable_write_reach_a_file_by_threads_directly() {
    what_is_stable_is_told_after_it_is(&by_file("direct", "pread"));
}

/// What the guest of several connections was told.
#[derive(Default)]
struct Told {
    /// Blocks whose write was answered, in the order in which the guest heard of it.
    answered: Vec<u64>,
    promises: Vec<Promise>,
}

/// What an answer says that some connection has got.
struct Promise {
    /// How long the disk's log was then: what comes later, comes too late.
    log: u64,
    what: Promised,
}

enum Promised {
    /// The flush was sent when so many writes had been answered, on whatever connection.
    First(usize),
    /// This block was written with FUA.
    Block(u64),
}

const CONNECTIONS: u64 = 4;

/// Writes that are answered before the power goes.
const ENOUGH: usize = 600;

/// A guest's connections share this.
struct Guests<'a> {
    told: Mutex<Told>,
    log: &'a Path,
    enough: Sender<()>,
}

impl Guests<'_> {
    fn told(&self) -> MutexGuard<'_, Told> {
        self.told.lock().expect("no panic")
    }

    fn promised(&self, what: Promised) {
        let log = std::fs::metadata(self.log).expect("a log").len();
        self.told().promises.push(Promise { log, what });
    }

    /// One connection, which writes its own part of the disk until it breaks.
    fn write_until_broken(&self, number: u64, mut connection: Connection) {
        let data = [number as u8 + 1; 4096];
        for count in 0..SIZE / BLOCK / CONNECTIONS {
            let block = number * (SIZE / BLOCK / CONNECTIONS) + count;
            let fua = count % 17 == 16;
            if connection.write(block * BLOCK, &data, fua).is_err() {
                return;
            }
            if fua {
                self.promised(Promised::Block(block));
            }
            let before = {
                let mut told = self.told();
                told.answered.push(block);
                told.answered.len()
            };
            if before == ENOUGH {
                self.enough.send(()).expect("somebody waits");
            }
            // One of the connections never flushes: the others do it for all.
            if number > 0 && count % (3 * number) == 0 {
                if connection.flush().is_err() {
                    return;
                }
                self.promised(Promised::First(before));
            }
        }
        panic!("the disk was too small for this test");
    }
}

/// Whatever an answer promised was true when it was given, had the disk lost its power then; and is so when it has.
fn a_flush_covers_all_connections(way: &Way) {
    let bench = Bench::new();
    let Some(mut stage) = Stage::set(&bench, way) else { return };
    let (uri, log) = (stage.disk.uri(), stage.behind.log().to_owned());
    let (enough, is_enough) = mpsc::channel();
    let guests = Guests { told: Mutex::default(), log: &log, enough };
    thread::scope(|scope| {
        for number in 0..CONNECTIONS {
            let (guests, connection) = (&guests, Connection::open(&uri));
            scope.spawn(move || guests.write_until_broken(number, connection));
        }
        is_enough.recv().expect("a guest that writes");
        stage.agent.kill();
        stage.behind.kill();
    });
    let Told { answered, promises } = guests.told.into_inner().expect("no panic");
    assert!(promises.len() > 100, "{} promises", promises.len());
    for (nth, promise) in promises.iter().enumerate() {
        let until = if nth + 1 == promises.len() { u64::MAX } else { promise.log };
        let stable = stage.behind.requests_until(until).stable();
        let blocks = match promise.what {
            Promised::First(count) => &answered[..count],
            Promised::Block(ref block) => std::slice::from_ref(block),
        };
        for block in blocks {
            let at = block * BLOCK;
            let next = stable.partition_point(|(from, _)| *from <= at);
            let is_there = next > 0 && stable[next - 1].1 >= at + BLOCK;
            assert!(is_there, "promise {nth} of {}: block {block} would be lost", promises.len());
        }
    }
}

#[test]
fn a_flush_covers_what_was_answered_on_other_connections_behind_an_nbd_server() {
    a_flush_covers_all_connections(&BY_NBD);
}

#[test]
fn a_flush_covers_what_was_answered_on_other_connections_by_io_uring() {
    a_flush_covers_all_connections(&by_file("writeback", "io_uring"));
}

#[test]
fn a_flush_covers_what_was_answered_on_other_connections_by_threads_directly() {
    a_flush_covers_all_connections(&by_file("direct", "pread"));
}
