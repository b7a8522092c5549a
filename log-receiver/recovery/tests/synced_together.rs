//! Logs that are made durable by one sync of the storage's tree, and what becomes of them when it fails.

mod common;

use std::{path::Path, sync::Arc};

use backtide_recovery::{DiskLog, Entry, LogError, LogOptions, SyncTicket};
use backtide_storage::{MemoryStorage, Sharing, Storage};
use backtide_units::{ByteCount, CaptureTime, Epoch, Lsn};
use uuid::Uuid;

use common::{cache, identity};

const NAMES: [&str; 3] = ["a", "b", "c"];

fn attach(epoch: u64) -> Entry {
    Entry::Attach {
        epoch: Epoch(epoch),
        attach: Uuid::from_u128(epoch.into()),
        next_lsn: Lsn(epoch),
        size: ByteCount(1 << 20),
        name: "vm1".parse().expect("a name"),
        time: CaptureTime(epoch),
        facts: Default::default(),
    }
}

/// Logs of one storage with an entry each that is not durable.
fn logs(storage: &MemoryStorage) -> Vec<DiskLog> {
    let create = |name| {
        let options = LogOptions::default();
        let mut log =
            DiskLog::create(Arc::new(storage.clone()), Path::new(name), identity(), options, &cache())
                .expect("create");
        log.append(attach(1)).expect("append");
        log
    };
    NAMES.into_iter().map(create).collect()
}

fn tickets(logs: &mut [DiskLog]) -> Vec<SyncTicket> {
    logs.iter_mut().map(|log| log.ticket().expect("ticket").expect("something to sync")).collect()
}

fn reopened(storage: &MemoryStorage, name: &str) -> DiskLog {
    DiskLog::open(Arc::new(storage.clone()), Path::new(name), LogOptions::default(), &cache())
        .expect("open")
        .0
}

#[test]
fn one_sync_makes_all_of_them_durable() {
    for seed in 0..16 {
        let storage = MemoryStorage::new();
        storage.share_syncs(true);
        let mut logs = logs(&storage);
        let tickets = tickets(&mut logs);
        let before = storage.counts().syncs;
        let outcomes = SyncTicket::sync_together(&storage, tickets);
        assert_eq!(storage.counts().syncs, before + 2);
        assert_eq!(outcomes.iter().map(backtide_recovery::SyncOutcome::flushes).sum::<u32>(), 2);
        for (log, outcome) in logs.iter_mut().zip(outcomes) {
            assert_eq!(log.synced(outcome).expect("synced").seq, log.appended());
        }
        let appended = logs[0].appended();
        storage.crash(seed);
        for name in NAMES {
            assert_eq!(reopened(&storage, name).appended(), appended, "log {name}, seed {seed}");
        }
    }
}

#[test]
fn a_storage_that_cannot_syncs_each_of_them() {
    let storage = MemoryStorage::new();
    let mut logs = logs(&storage);
    let outcomes = SyncTicket::sync_together(&storage, tickets(&mut logs));
    for (log, outcome) in logs.iter_mut().zip(outcomes) {
        assert!(outcome.flushes() >= 1);
        assert_eq!(log.synced(outcome).expect("synced").seq, log.appended());
    }
}

#[test]
fn a_failure_is_told_by_every_log_that_it_may_have_hit_also_later() {
    let storage = MemoryStorage::new();
    storage.share_syncs(true);
    let mut logs = logs(&storage);
    let mut tickets = tickets(&mut logs);
    let later = tickets.pop().expect("one for each log");
    storage.fail_sync_after(0);
    let outcomes = SyncTicket::sync_together(&storage, tickets);
    for (log, outcome) in logs.iter_mut().zip(outcomes) {
        assert!(matches!(log.synced(outcome), Err(LogError::Io { .. })));
        assert!(log.is_poisoned());
    }
    // Its bytes were lost by a sync that others asked for.
    let outcome = SyncTicket::sync_together(&storage, vec![later]).remove(0);
    assert!(matches!(logs[2].synced(outcome), Err(LogError::Io { .. })));
    assert!(matches!(storage.shares_syncs(), Sharing::Never(_)), "it is not tried again");
}
