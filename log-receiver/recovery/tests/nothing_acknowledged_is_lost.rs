//! The power fails at every operation of a log's life; what a ticket has made durable is there again,
//! and every point that the recovered log offers equals the model.

mod common;

use std::sync::Arc;

use backtide_recovery::{AppendError, DiskLog, LogError, Seq, Unreadable, salvage};
use backtide_storage::{MemoryStorage, Storage};
use backtide_units::{ByteCount, Lsn};
use common::{Agent, SayOnPanic, directory, seeds};

/// Runs an agent until something fails; gives what was acknowledged.
fn run(agent: &mut Agent, steps: u64) -> Result<(), AppendError> {
    agent.attach()?;
    for _ in 0..steps {
        agent.step()?;
    }
    Ok(())
}

fn recover_and_check(agent: &mut Agent, acknowledged: Seq, promised: &[Lsn]) {
    let recovered = agent.reopen().expect("a log survives a power cut");
    assert!(recovered.damaged_entries.is_empty(), "{recovered:?}");
    assert!(
        agent.log.appended() >= acknowledged,
        "entry {acknowledged} was acknowledged, {} is the last: {recovered:?}",
        agent.log.appended()
    );
    for lsn in promised {
        assert!(agent.log.timeline().offers(*lsn), "{lsn} was a point before the power cut");
    }
    agent.model.check_some(&mut agent.log, 2);
    check_catalog(agent);
}

/// What is saved of the catalog is what the entries give: nothing is rebuilt, and who reads the entries without it finds the same.
/// On a copy, for the power may fail while this goes on.
fn check_catalog(agent: &Agent) {
    let storage: Arc<dyn Storage> = Arc::new(agent.storage.copy());
    let (mut log, _) =
        DiskLog::open(Arc::clone(&storage), directory(), agent.options, &common::cache()).expect("open");
    assert_eq!(log.timeline(), agent.log.timeline(), "the same at every start");
    let snapshot = log.snapshot().expect("snapshot");
    let rebuilt = snapshot.rebuild_footers(&mut |_| true).expect("no failure");
    assert_eq!(rebuilt, Vec::<String>::new(), "footers are what the entries give");
    let seq = |_| Seq(0);
    let left = salvage(&storage, directory(), &common::cache(), None, None, seq, Unreadable::IsDamage);
    let left = left.expect("salvage");
    assert_eq!(left.damage, Vec::<String>::new());
    let (left, all) = (left.snapshot.timeline(), log.timeline());
    assert_eq!((left.intervals(), left.holes(), left.marks()), (all.intervals(), all.holes(), all.marks()));
}

/// Cuts the power at operation `cut` of a history, twice: also while it goes on after the recovery.
fn crash_at(seed: u64, steps: u64, cut: u64, shares_syncs: bool) {
    let storage = MemoryStorage::new();
    storage.share_syncs(shares_syncs);
    let mut agent = Agent::new(seed, storage.clone()).expect("create");
    storage.cut_power_after(cut);
    let ended = run(&mut agent, steps);
    assert!(ended.is_err() || !storage.is_off());
    let (acknowledged, promised) = (agent.log.durable().seq, agent.promised.clone());
    storage.crash(seed ^ cut);
    recover_and_check(&mut agent, acknowledged, &promised);
    // Recovery itself is cut short, and begins again.
    let changes = storage.counts().changes;
    storage.crash(seed.wrapping_add(cut));
    recover_and_check(&mut agent, acknowledged, &promised);
    let recovery = storage.counts().changes - changes;
    storage.cut_power_after(cut % recovery.max(1));
    assert!(agent.reopen().is_err());
    storage.crash(cut);
    recover_and_check(&mut agent, acknowledged, &promised);
    // The log goes on as any other.
    agent.restart().expect("attach");
    agent.settle().expect("settle");
    for _ in 0..10 {
        agent.step().expect("step");
    }
    agent.sync().expect("sync");
    let (acknowledged, promised) = (agent.log.durable().seq, agent.promised.clone());
    storage.crash(seed.wrapping_mul(31).wrapping_add(cut));
    recover_and_check(&mut agent, acknowledged, &promised);
}

#[test]
fn a_power_cut_at_every_operation_loses_nothing_acknowledged() {
    crash_everywhere(2, false);
}

#[test]
fn nor_does_it_where_a_sync_of_the_whole_tree_is_what_acknowledges() {
    crash_everywhere(1, true);
}

fn crash_everywhere(count: u64, shares_syncs: bool) {
    for seed in seeds(count) {
        let storage = MemoryStorage::new();
        storage.share_syncs(shares_syncs);
        let mut agent = Agent::new(seed, storage.clone()).expect("create");
        let before = storage.counts().changes;
        run(&mut agent, 45).expect("no fault yet");
        let changes = storage.counts().changes - before;
        for cut in 0..=changes {
            let _say = SayOnPanic(format!("SEED={seed}, the power cut at operation {cut}"));
            crash_at(seed, 45, cut, shares_syncs);
        }
    }
}

#[test]
fn a_power_cut_while_a_log_is_created_leaves_none_or_an_empty_one() {
    let storage = MemoryStorage::new();
    Agent::new(1, storage.clone()).expect("create");
    let changes = storage.counts().changes;
    for cut in 0..changes {
        for seed in 0..8 {
            let storage = MemoryStorage::new();
            storage.cut_power_after(cut);
            assert!(Agent::new(1, storage.clone()).is_err(), "the power is cut at {cut} of {changes}");
            storage.crash(seed);
            let options = backtide_recovery::LogOptions::default();
            let opened = DiskLog::open(Arc::new(storage.clone()), directory(), options, &common::cache());
            match opened {
                Ok((log, _)) => assert_eq!(log.appended(), Seq(0)),
                Err(LogError::NoLog { .. }) => {
                    let mut agent = Agent::new(1, storage).expect("a leftover does no harm");
                    run(&mut agent, 10).expect("it is a log as any other");
                }
                Err(error) => panic!("cut at {cut}, seed {seed}: {error}"),
            }
        }
    }
}

#[test]
fn a_failed_write_or_sync_poisons_and_loses_nothing_acknowledged() {
    for seed in seeds(4) {
        for fault in 0..40 {
            let _say = SayOnPanic(format!("SEED={seed}, fault {fault}"));
            let storage = MemoryStorage::new();
            let mut agent = Agent::new(seed, storage.clone()).expect("create");
            storage.share_syncs(fault % 4 == 1);
            if fault % 2 == 0 {
                storage.fail_write_after(fault / 2);
            } else {
                storage.fail_sync_after(fault / 2);
            }
            if run(&mut agent, 80).is_ok() {
                continue;
            }
            assert!(
                matches!(agent.attach(), Err(AppendError::Log(LogError::Poisoned)))
                    || !agent.log.is_poisoned()
            );
            let (acknowledged, promised) = (agent.log.durable().seq, agent.promised.clone());
            // With and without losing what was not durable.
            if seed % 2 == 0 {
                storage.crash(seed ^ fault);
            }
            recover_and_check(&mut agent, acknowledged, &promised);
            // What is left is durable now, also what the failed sync had left as if it were.
            let acknowledged = agent.log.durable().seq;
            assert_eq!(acknowledged, agent.log.appended());
            storage.crash(seed.wrapping_mul(fault));
            recover_and_check(&mut agent, acknowledged, &promised);
        }
    }
}

#[test]
fn a_full_device_refuses_entries_and_the_log_goes_on_when_there_is_space() {
    for seed in seeds(12) {
        for capacity in [5_000, 100_000, 400_000, 900_000, 1_600_000] {
            let _say = SayOnPanic(format!("SEED={seed}, {capacity} bytes of space"));
            let storage = MemoryStorage::new();
            let mut agent = Agent::new(seed, storage.clone()).expect("create");
            storage.set_capacity(Some(ByteCount(storage.used().0 + capacity)));
            let Err(error) = run(&mut agent, 400) else { continue };
            assert!(matches!(error, AppendError::Log(LogError::Full { .. })), "{error}");
            assert!(!agent.log.is_poisoned());
            agent.model.check(&mut agent.log);
            agent.sync().expect("what was taken can be made durable");
            let (acknowledged, promised) = (agent.log.durable().seq, agent.promised.clone());
            assert_eq!(acknowledged, agent.log.appended());
            storage.crash(seed);
            recover_and_check(&mut agent, acknowledged, &promised);
            storage.set_capacity(None);
            agent.restart().expect("attach");
            agent.settle().expect("settle");
            agent.model.check(&mut agent.log);
        }
    }
}

#[test]
fn several_tickets_under_way_make_durable_what_each_says() {
    let storage = MemoryStorage::new();
    let mut agent = Agent::new(3, storage.clone()).expect("create");
    agent.attach().expect("attach");
    agent.settle().expect("settle");
    let first = agent.log.ticket().expect("ticket").expect("something to sync");
    agent.write().expect("write");
    agent.log.seal().expect("seal");
    agent.write().expect("write");
    let second = agent.log.ticket().expect("ticket").expect("something to sync");
    let through = (first.through(), second.through());
    assert!(through.0.seq < through.1.seq);
    let (first, second) = (first.sync(), second.sync());
    assert_eq!(agent.log.synced(second).expect("synced"), through.1);
    assert_eq!(agent.log.synced(first).expect("synced"), through.1, "an older outcome takes nothing back");
    // The segment that was full while the first was under way waits to be sealed.
    let third = agent.log.ticket().expect("ticket").expect("a footer to write");
    assert_eq!(agent.log.synced(third.sync()).expect("synced"), through.1);
    assert!(agent.log.ticket().expect("ticket").is_none(), "nothing is left to sync");
    storage.crash(9);
    let promised = [agent.log.timeline().latest().expect("a point").lsn];
    recover_and_check(&mut agent, through.1.seq, &promised);
}
