//! A base that cannot be written everywhere: the log begins as before, also when it is opened again, or it is said that nobody
//! knows.

mod common;

use std::sync::Arc;

use backtide_recovery::{
    DiskLog, FoundBase, KeptPoint, LogCache, RebaseTicket, TimedLsn, Timeline, settle_closed,
};
use backtide_storage::{MemoryStorage, Storage};
use common::{Agent, cache, directory};

/// Writing a base takes some thirty changes of files.
const OPERATIONS_MAX: u64 = 200;

struct World {
    agent: Agent,
    cache: LogCache,
}

impl World {
    /// A log of some sealed segments that has had `bases` bases.
    fn new(bases: usize) -> Self {
        let mut agent = Agent::new(11, MemoryStorage::new()).expect("create");
        agent.attach().expect("attach");
        agent.settle().expect("settle");
        let mut world = Self { agent, cache: cache() };
        for _ in 0..bases {
            world.write();
            let rebased = world.ticket().write().expect("no fault").expect("the log is open");
            world.agent.log.rebased(rebased);
        }
        world.write();
        world
    }

    fn write(&mut self) {
        for _ in 0..3 {
            self.agent.write().expect("write");
            self.agent.log.seal().expect("seal");
            self.agent.flush_all();
        }
    }

    /// What lets the log begin at its newest sealed point, with nothing kept before.
    fn ticket(&mut self) -> RebaseTicket {
        let floor = self.agent.log.timeline().latest().expect("a point");
        self.agent.write().expect("write");
        self.agent.flush_all();
        let snapshot = self.agent.log.snapshot().expect("snapshot");
        let storage: Arc<dyn Storage> = Arc::new(self.agent.storage.clone());
        let mut writer = self.cache.images(&storage).write().expect("no fault");
        let root = snapshot.make_image(&mut writer, floor.lsn, None, &mut |_| true).expect("no fault");
        writer.finish().expect("no fault");
        let foldable = snapshot.foldable(floor.lsn).expect("sealed segments");
        let base = snapshot.rebase(&foldable, KeptPoint { at: floor, root }, Vec::new()).expect("no fault");
        self.agent.log.rebase(base).expect("it follows")
    }

    fn offered(&self) -> Timeline {
        self.agent.log.timeline().clone()
    }

    fn reopen(&mut self) {
        self.agent.storage.kill_handles();
        self.cache = cache();
        let storage: Arc<dyn Storage> = Arc::new(self.agent.storage.clone());
        let opened = DiskLog::open(storage, directory(), self.agent.options, &self.cache);
        self.agent.log = opened.expect("open").0;
    }

    fn is_settled(&self) -> bool {
        FoundBase::read(&self.agent.storage, directory()).expect("read").is_settled()
    }
}

#[derive(Clone, Copy, Debug)]
enum Fault {
    Write,
    Sync,
}

#[test]
fn a_base_that_is_not_written_everywhere_is_taken_back() {
    for bases in 0..3 {
        for fault in [Fault::Write, Fault::Sync] {
            let mut failed = 0;
            for nth in 0..OPERATIONS_MAX {
                let said = format!("{bases} bases before, {fault:?} {nth} fails");
                let mut world = World::new(bases);
                let ticket = world.ticket();
                let before = world.offered();
                match fault {
                    Fault::Write => world.agent.storage.fail_write_after(nth),
                    Fault::Sync => world.agent.storage.fail_sync_after(nth),
                }
                let Err(error) = ticket.write() else { break };
                failed += 1;
                assert!(error.doubt.is_none(), "{said}: {error:?}");
                assert!(world.is_settled(), "{said}");
                assert_eq!(world.offered(), before, "{said}");
                if nth % 2 == 0 {
                    world.agent.storage.crash(nth);
                }
                world.reopen();
                assert_eq!(world.offered(), before, "{said}: every point is there after a start");
                world.agent.model.check_some(&mut world.agent.log, 4);
                // And the next one is written.
                let rebased = world.ticket().write().expect("no fault").expect("the log is open");
                world.agent.log.rebased(rebased);
                world.reopen();
                world.agent.model.check_some(&mut world.agent.log, 4);
            }
            assert!((3..OPERATIONS_MAX).contains(&failed), "{fault:?}: {failed}");
        }
    }
}

/// Nobody is in doubt after a start, so what it finds must be what every later one finds.
#[test]
fn what_a_start_finds_of_a_base_in_doubt_stays_after_a_power_cut() {
    for (bases, opened) in [(0, true), (0, false), (1, true), (1, false)] {
        let (mut ended, mut old, mut new) = (false, 0, 0);
        for cut in 0..OPERATIONS_MAX {
            let said =
                format!("{bases} bases before, nothing works from operation {cut} on, opened: {opened}");
            let mut world = World::new(bases);
            let ticket = world.ticket();
            let before = world.offered();
            world.agent.storage.cut_power_after(cut);
            let Err(error) = ticket.write() else {
                ended = true;
                break;
            };
            let doubt = error.doubt.unwrap_or_else(|| panic!("{said}: it may not be taken back"));
            // The process ends, the device works again and has lost nothing so far.
            world.agent.storage.answer_again();
            if opened {
                world.reopen();
            } else {
                world.agent.storage.kill_handles();
                settle_closed(&world.agent.storage, directory()).expect("no fault");
                world.agent.storage.crash(cut);
                world.reopen();
            }
            let found = world.offered();
            *(if found == before { &mut old } else { &mut new }) += 1;
            for interval in before.intervals().iter().filter(|interval| doubt.keeps(interval.from.lsn)) {
                assert!(found.offers(interval.from.lsn), "{said}");
            }
            world.agent.storage.crash(cut + 7);
            world.reopen();
            assert_eq!(world.offered(), found, "{said}");
            world.agent.model.check_some(&mut world.agent.log, 4);
        }
        assert!(ended && old > 2 && new > 2, "{bases} bases before: {old} old and {new} new");
    }
}

#[test]
fn what_could_not_be_taken_back_is_in_doubt_until_it_is_settled() {
    for bases in 0..2 {
        let mut ended = false;
        for cut in 0..OPERATIONS_MAX {
            let said = format!("{bases} bases before, nothing works from operation {cut} on");
            let mut world = World::new(bases);
            let floor = world.agent.log.timeline().latest().expect("a point");
            let oldest = world.agent.log.timeline().intervals()[0].from;
            let ticket = world.ticket();
            let before = world.offered();
            world.agent.storage.cut_power_after(cut);
            let Err(error) = ticket.write() else {
                ended = true;
                break;
            };
            let doubt = error.doubt.unwrap_or_else(|| panic!("{said}: it may not be taken back"));
            assert!(doubt.keeps(floor.lsn) && doubt.keeps(floor.lsn.next()), "{said}");
            assert!(!doubt.keeps(oldest.lsn), "{said}");
            world.agent.storage.crash(cut);
            if cut % 2 == 0 {
                // The device works again, and the log has the base of before.
                let settled = world.agent.log.settle().expect("it has not failed").write();
                assert!(settled.expect("no fault"), "{said}");
                assert!(world.is_settled(), "{said}");
                world.agent.storage.crash(!cut);
                world.reopen();
                assert_eq!(world.offered(), before, "{said}");
            } else {
                // A new process: either, and nothing else.
                world.reopen();
                let found = world.offered();
                let points = |point: TimedLsn| found.offers(point.lsn);
                assert!(found == before || (!points(oldest) && points(floor)), "{said}");
                assert!(world.is_settled(), "{said}");
            }
            world.agent.model.check_some(&mut world.agent.log, 4);
        }
        assert!(ended, "a base takes more than {OPERATIONS_MAX} operations");
    }
}
