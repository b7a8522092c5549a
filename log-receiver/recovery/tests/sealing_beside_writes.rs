//! Segments are sealed and made by tickets, where blocking is fine, and not by who appends.

mod common;

use std::{path::PathBuf, sync::Arc};

use backtide_recovery::{DiskLog, LogOptions, SegmentId, Seq};
use backtide_storage::{MemoryStorage, OperationCounts, Storage};
use backtide_units::{ByteCount, ByteOffset, Lsn};

use common::{Agent, cache, directory};

/// An agent in sync whose segments hold about ten writes.
fn in_sync(storage: &MemoryStorage) -> Agent {
    let mut agent = Agent::new(11, storage.clone()).expect("create");
    agent.attach().expect("attach");
    agent.settle().expect("settle");
    agent.sync().expect("sync");
    agent
}

fn during(storage: &MemoryStorage, act: impl FnOnce()) -> OperationCounts {
    let before = storage.counts();
    act();
    let after = storage.counts();
    OperationCounts {
        changes: after.changes - before.changes,
        writes: after.writes - before.writes,
        syncs: after.syncs - before.syncs,
    }
}

fn segment_path(number: usize) -> PathBuf {
    directory().join("segments").join(format!("{number:016}.seg"))
}

/// Whether a segment's file ends with a trailer.
fn is_sealed(storage: &MemoryStorage, number: usize) -> bool {
    let file = storage.open(&segment_path(number)).expect("a segment");
    let length = file.len().expect("length").0;
    let mut magic = [0; 8];
    length > 144 && file.read_at(ByteOffset(length - 144), &mut magic).is_ok() && magic == *b"BKTDEND\n"
}

/// A segment holds about ten.
const WRITES_MAX: usize = 1000;

/// Writes until the log has one more segment; gives what the write that began it cost.
fn fill(agent: &mut Agent, storage: &MemoryStorage) -> OperationCounts {
    let segments = agent.log.segment_count();
    for _ in 0..WRITES_MAX {
        let cost = during(storage, || agent.write().expect("write"));
        if agent.log.segment_count() > segments {
            return cost;
        }
        agent.sync().expect("sync");
    }
    panic!("no segment was full after {WRITES_MAX} writes");
}

#[test]
fn a_full_segment_is_left_to_the_next_ticket() {
    let storage = MemoryStorage::new();
    let mut agent = in_sync(&storage);
    fill(&mut agent, &storage);
    agent.sync().expect("sync");
    for _ in 0..5 {
        let cost = fill(&mut agent, &storage);
        let full = agent.log.segment_count() - 1;
        assert!(!is_sealed(&storage, full), "whoever appends writes no footer");
        assert_eq!(cost.syncs, 0);
        let snapshot = agent.log.snapshot().expect("snapshot");
        agent.sync().expect("sync");
        assert!(is_sealed(&storage, full), "the ticket does");
        // Readers of before go on with the footer.
        agent.model.check_snapshot(&snapshot, 3);
        agent.model.check(&mut agent.log);
    }
}

#[test]
fn a_ticket_that_is_dropped_gives_its_work_back() {
    let storage = MemoryStorage::new();
    let mut agent = in_sync(&storage);
    fill(&mut agent, &storage);
    let full = agent.log.segment_count() - 1;
    let dropped = agent.log.ticket().expect("ticket").expect("something to sync");
    let beside = agent.log.ticket().expect("ticket").expect("something to sync");
    let _ = agent.log.synced(beside.sync()).expect("synced");
    assert!(!is_sealed(&storage, full), "the first ticket has that work");
    drop(dropped);
    agent.write().expect("write");
    agent.sync().expect("sync");
    assert!(is_sealed(&storage, full));
    // The outcome, too, can get lost after the work was done.
    fill(&mut agent, &storage);
    drop(agent.log.ticket().expect("ticket").expect("something to sync").sync());
    agent.write().expect("write");
    agent.sync().expect("sync");
    agent.model.check(&mut agent.log);
    agent.reopen().expect("open");
    agent.model.check(&mut agent.log);
}

#[test]
fn a_ticket_of_a_log_that_was_dropped_changes_no_file() {
    let storage = MemoryStorage::new();
    let mut agent = in_sync(&storage);
    fill(&mut agent, &storage);
    let late = agent.log.ticket().expect("ticket").expect("something to sync");
    let options = agent.options;
    drop(agent);
    let (log, _) = DiskLog::open(Arc::new(storage.clone()), directory(), options, &cache()).expect("open");
    let files = storage.files();
    assert!(late.sync().result().is_err());
    assert!(storage.files() == files, "they belong to the log that was opened again");
    assert!(log.durable().lsn > Lsn(0));
}

#[test]
fn an_abandoned_log_waits_for_nobody_and_says_when_its_last_work_has_ended() {
    let storage = MemoryStorage::new();
    let mut agent = in_sync(&storage);
    fill(&mut agent, &storage);
    let outcome = agent.log.ticket().expect("ticket").expect("something to sync").sync();
    let late = agent.log.ticket().expect("ticket").expect("something to sync");
    let log = agent.log;
    let (work, mut taken) = (std::cell::RefCell::new(None), Some(log));
    // Work on the files is under way here: dropping the log would wait for it for ever.
    let under_way = outcome.while_owned(|| {
        let abandoned = taken.take().expect("once").abandon();
        let under_way = abandoned.is_under_way();
        *work.borrow_mut() = Some(abandoned);
        under_way
    });
    assert_eq!(under_way, Some(true));
    assert!(!work.into_inner().expect("it was abandoned").is_under_way());
    assert!(outcome.while_owned(|| ()).is_none(), "the files may be another log's");
    let files = storage.files();
    drop(late.sync());
    assert!(storage.files() == files);
}

#[test]
fn nothing_behind_a_segment_that_waits_is_claimed_durable() {
    let storage = MemoryStorage::new();
    let mut agent = in_sync(&storage);
    fill(&mut agent, &storage);
    // Its ticket takes long; others become durable meanwhile.
    let slow = agent.log.ticket().expect("ticket").expect("something to sync");
    for _ in 0..3 {
        agent.write().expect("write");
        agent.sync().expect("sync");
    }
    let promised = agent.log.timeline().latest().expect("a point").lsn;
    let acknowledged = agent.log.appended();
    // The footer reaches the device in part, as when the power goes: trailer and summary, not the index.
    let full = agent.log.segment_count() - 1;
    drop(slow.sync());
    let file = storage.open(&segment_path(full)).expect("a segment");
    let length = file.len().expect("length").0;
    let mut entries_end = [0; 8];
    file.read_exact_at(ByteOffset(length - 144 + 96), &mut entries_end).expect("read");
    let index = u64::from_le_bytes(entries_end);
    file.write_at(ByteOffset(index), &[0; 512]).expect("write");
    let recovered = agent.reopen().expect("open");
    assert!(recovered.resealed_segments.contains(&SegmentId(full as u32)), "{recovered:?}");
    assert!(agent.log.appended() >= acknowledged);
    assert!(agent.log.timeline().offers(promised));
    agent.model.check(&mut agent.log);
}

#[test]
fn nothing_behind_a_segment_sealed_on_the_spot_is_claimed_before_its_footer_is_durable() {
    let storage = MemoryStorage::new();
    let mut agent = in_sync(&storage);
    agent.log.seal().expect("seal");
    agent.write().expect("write");
    agent.sync().expect("sync");
    fill(&mut agent, &storage);
    // It has work to do, so the next segment that is full waits, and a ticket beside it has none.
    let busy = agent.log.ticket().expect("ticket").expect("something to sync");
    let waits = agent.log.segment_count();
    agent.log.seal().expect("seal");
    let last = agent.log.appended();
    agent.write().expect("write");
    let beside = agent.log.ticket().expect("ticket").expect("something to sync").sync();
    assert!(!is_sealed(&storage, waits), "the first ticket has the work");
    drop(busy);
    agent.log.seal().expect("seal");
    assert!(is_sealed(&storage, waits), "sealed on the spot");
    let durable = agent.log.synced(beside).expect("synced");
    assert!(durable.seq > last, "the entry behind it is durable, its footer is not");
    agent.write().expect("write");
    agent.log.snapshot().expect("it is in the file");
    let claimed = synced_of(&storage, agent.log.segment_count());
    assert!(claimed <= last, "{claimed} of {last}");
    agent.sync().expect("sync");
    agent.log.seal().expect("seal");
    agent.write().expect("write");
    assert!(synced_of(&storage, agent.log.segment_count()) > last, "and then it is");
}

/// What the header of a segment claims to be durable.
fn synced_of(storage: &MemoryStorage, number: usize) -> Seq {
    let path = segment_path(number);
    let file = storage.open(&path).expect("a segment");
    backtide_segment::SegmentFile::new(file, path).header().expect("a header").synced
}

#[test]
fn options_of_any_size_work() {
    for step in [0, 1, 1 << 40] {
        let storage = MemoryStorage::new();
        let mut agent = in_sync(&storage);
        agent.options = LogOptions { allocation_step: ByteCount(step), ..agent.options };
        agent.reopen().expect("open");
        for _ in 0..30 {
            agent.write().expect("write");
            agent.sync().expect("sync");
        }
        agent.model.check(&mut agent.log);
    }
}
