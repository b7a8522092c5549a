//! Accepting, also while descriptors are short.
//!
//! A process that may open nothing more cannot accept either, and it has better uses for its last descriptors than one
//! client more: the records of its disks, streams to receivers, clients that are there. So accepting leaves some.
//!
//! Invariants: what is short for a moment ends no accepting and costs no busy loop; a connection that exists is hurt by one
//! that comes only where its owner says that it gives way; an outage is one line of the log, however long it is.

use std::{fmt::Display, io, os::fd::RawFd, pin::pin, time::Duration};

use rustix::process::{Resource, getrlimit};
use tokio::sync::Notify;

use crate::Outage;

/// How long accepting rests after an error that is not about one connection, and after a client that there was no room
/// for.
const PAUSE: Duration = Duration::from_millis(100);

/// How long the one that somebody gave way to has for its handshake before it may have to give way itself.
const HEAD_START: Duration = Duration::from_millis(10);

/// Accepting takes none of so many last descriptors, ...
const RESERVE: u64 = 64;
/// ... or of this part of all, where that is less.
const RESERVE_PART: u64 = 8;

/// Told when one door finds no connection of its own that gives way.
static SHORT: Notify = Notify::const_new();

/// Where clients come in.
#[derive(Debug)]
pub struct Door {
    /// What of, for the log.
    whose: String,
    /// Of descriptors.
    outage: Outage,
}

/// How near the limit of open files this process is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Room {
    Enough,
    /// One client may come where another leaves.
    Little,
    None,
}

impl Door {
    /// Of `whose` clients, such as `the NBD clients of URI`.
    pub fn new(whose: impl Display) -> Self {
        Self { whose: whose.to_string(), outage: Outage::default() }
    }

    /// What `accept` gives. Meanwhile `give_way` ends a connection that nobody needs as often as descriptors are short at
    /// another door, which has none.
    pub async fn accepted<T>(
        accept: impl Future<Output = io::Result<T>>,
        give_way: impl Fn() -> bool,
    ) -> io::Result<T> {
        let mut accept = pin!(accept);
        loop {
            tokio::select! {
                biased;
                accepted = &mut accept => return accepted,
                () = SHORT.notified() => give_way(),
            };
        }
    }

    /// What was `accepted`, with its descriptor, if it is a client that there is room for; else nobody, after a rest. When
    /// descriptors are short, `give_way` ends a connection that nobody needs, and says whether there was one.
    pub async fn admit<T>(
        &mut self,
        accepted: io::Result<(T, RawFd)>,
        give_way: impl FnOnce() -> bool,
    ) -> Option<T> {
        match accepted {
            Ok((client, descriptor)) => match self.room(descriptor) {
                Room::Enough => return Some(client),
                Room::Little => {
                    self.say(&"few open files are left");
                    if !give_way() {
                        SHORT.notify_waiters();
                    }
                    tokio::time::sleep(HEAD_START).await;
                    return Some(client);
                }
                Room::None => {
                    self.say(&"hardly any open files are left");
                    drop(client);
                    give_way();
                    SHORT.notify_waiters();
                }
            },
            // About a client that went away before it was accepted: the next may be waiting.
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => return None,
            Err(error) => {
                self.say(&error);
                give_way();
                SHORT.notify_waiters();
            }
        }
        tokio::time::sleep(PAUSE).await;
        None
    }

    /// Whether there is room for a client with this descriptor.
    fn room(&self, descriptor: RawFd) -> Room {
        let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
        let below = limit.saturating_sub(u64::try_from(descriptor).unwrap_or(0).saturating_add(1));
        // The system gives out the lowest that is free: as long as it is low there are not many above it, unless some were
        // a moment ago.
        if room_of(limit, below) == Room::Enough && !self.outage.lasts() {
            return Room::Enough;
        }
        // It is itself one of those that are counted.
        let Ok(open) = std::fs::read_dir("/proc/self/fd") else { return Room::None };
        let count = u64::try_from(open.count()).unwrap_or(u64::MAX);
        room_of(limit, limit.saturating_add(1).saturating_sub(count))
    }

    fn say(&mut self, why: &dyn Display) {
        if self.outage.begins() {
            let limit = getrlimit(Resource::Nofile).current;
            tracing::warn!(
                limit,
                "not all of {} can be accepted: {why}; those that are there stay, new ones are tried again; raise the \
                 hard limit of open files (LimitNOFILE=, ulimit -Hn) if that lasts",
                self.whose
            );
        }
    }
}

fn room_of(limit: u64, left: u64) -> Room {
    let reserve = RESERVE.min(limit / RESERVE_PART);
    match left {
        left if left >= reserve => Room::Enough,
        left if left >= reserve / 2 => Room::Little,
        _ => Room::None,
    }
}

#[cfg(test)]
mod tests {
    use std::{cell::Cell, collections::VecDeque, fs::File, os::fd::AsRawFd, process::Command};

    use super::*;

    #[test]
    fn the_last_descriptors_are_for_others() {
        for (limit, left, expected) in [
            (1024, 1024, Room::Enough),
            (1024, 64, Room::Enough),
            (1024, 63, Room::Little),
            (1024, 32, Room::Little),
            (1024, 31, Room::None),
            (1024, 0, Room::None),
            (u64::MAX, 1 << 20, Room::Enough),
            (64, 8, Room::Enough),
            (64, 7, Room::Little),
            (64, 3, Room::None),
        ] {
            assert_eq!(room_of(limit, left), expected, "{left} of {limit}");
        }
    }

    fn opened() -> io::Result<(File, RawFd)> {
        let file = File::open("/dev/null")?;
        let descriptor = file.as_raw_fd();
        Ok((file, descriptor))
    }

    /// Makes the test play a process with a low limit.
    const PLAYED: &str = "BACKTIDE_TEST_IS_SHORT_OF_FILES";

    /// Opens files as a flood of clients, the first of which give way to the last.
    async fn flood() {
        let mut door = Door::new("the clients of a test");
        let clients = std::cell::RefCell::new(VecDeque::new());
        let gone = Cell::new(0);
        for _ in 0..200 {
            let give_way = || {
                let way = clients.borrow_mut().pop_front().is_some();
                gone.set(gone.get() + u32::from(way));
                way
            };
            let client = door.admit(opened(), give_way).await.expect("somebody gave way");
            clients.borrow_mut().push_back(client);
            // There is always something left for others.
            let others: Vec<_> = (0..4).map(|_| File::open("/dev/null").unwrap()).collect();
            drop(others);
        }
        assert!(gone.get() > 100, "{} had to go", gone.get());
        // Where nobody gives way a few more may come, and nobody else until there is room again.
        let mut more = Vec::new();
        while let Some(client) = door.admit(opened(), || false).await {
            more.push(client);
        }
        assert!((1..=4).contains(&more.len()), "{}", more.len());
        let another = Door::accepted(async { std::future::pending::<io::Result<()>>().await }, || {
            gone.set(0);
            true
        });
        // In this order: the other door waits already when this one finds nobody.
        let refused = tokio::select! {
            biased;
            _ = another => unreachable!(),
            refused = door.admit(opened(), || false) => refused,
        };
        assert!(refused.is_none() && gone.get() == 0, "another door was asked");
        drop(more);
        clients.borrow_mut().clear();
        assert!(door.admit(opened(), || false).await.is_some());
        let mut all = Vec::new();
        while let Ok(file) = File::open("/dev/null") {
            all.push(file);
        }
        assert!(door.admit(opened(), || false).await.is_none(), "an error is not the end");
        all.clear();
        assert!(door.admit(opened(), || false).await.is_some());
    }

    #[test]
    fn a_flood_takes_no_last_descriptor_and_ends_no_accepting() {
        if std::env::var_os(PLAYED).is_some() {
            let mut runtime = tokio::runtime::Builder::new_current_thread();
            let runtime = runtime.enable_time().start_paused(true).build().unwrap();
            return runtime.block_on(flood());
        }
        let script = "ulimit -n 64 && exec \"$0\" --exact door::tests::a_flood_takes_no_last_descriptor_and_ends_no_accepting";
        let mut played = Command::new("sh");
        let played = played.args(["-c", script]).arg(std::env::current_exe().unwrap()).env(PLAYED, "1");
        let ended = played.output().unwrap();
        assert!(ended.status.success(), "{ended:?}");
    }
}
