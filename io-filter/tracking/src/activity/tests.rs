//! What waits for which record, and what a snapshot leaves hot.

use backtide_units::BlockCount;

use super::*;

const SIZE: ByteCount = ByteCount(1 << 30);

fn limits(hot: u32, sectors: u32) -> ActivityLimits {
    ActivityLimits { extent: BlockCount(4), hot, sectors, ..ActivityLimits::default() }
}

fn log(hot: u32, sectors: u32) -> ActivityLog {
    ActivityLog::new(limits(hot, sectors), SIZE, false)
}

/// The blocks of one extent.
fn extent(index: u64) -> BlockRange {
    (index * 4..index * 4 + 1).into()
}

/// Writes whatever is queued.
fn write_all(log: &mut ActivityLog) -> Vec<LogRecord> {
    let mut written = Vec::new();
    while let Some(record) = log.next_record() {
        assert_eq!(log.record_done(), record.sequence);
        written.push(record);
    }
    written
}

#[test]
fn a_cold_extent_waits_for_one_record_and_a_hot_one_for_none() {
    let mut log = log(16, 64);
    assert_eq!(log.enter(extent(5)), Some(1));
    assert_eq!(log.enter(extent(5)), Some(1), "it is not durable yet");
    let record = log.next_record().unwrap();
    assert_eq!(record, LogRecord { sequence: 1, runs: vec![ExtentRun::of(5)] });
    assert_eq!(log.enter(extent(9)), Some(2), "what comes while a record is written is in the next");
    assert_eq!(log.enter(extent(20)), Some(2), "with all that comes meanwhile");
    assert!(log.next_record().is_none(), "one at a time");
    assert_eq!(log.record_done(), 1);
    assert_eq!(log.enter(extent(5)), None);
    assert_eq!(write_all(&mut log).len(), 1);
    assert_eq!(log.enter(extent(20)), None);
}

#[test]
fn what_a_snapshot_leaves_out_is_cold_from_its_capture_on() {
    let mut log = log(2, 64);
    for index in [10, 20, 30, 40] {
        log.enter(extent(index));
        if index != 10 {
            log.leave(extent(index));
        }
    }
    write_all(&mut log);
    let captured = log.capture(false, false);
    assert_eq!((captured.generation, captured.log_from), (2, 2));
    let kept: Vec<u32> = captured.hot.iter().map(|run| run.first).collect();
    assert_eq!(kept, [10, 30, 40], "the one in use, and the two used last");
    assert_eq!(log.enter(extent(20)), Some(2), "cold, though the snapshot is not durable");
    assert_eq!(log.enter(extent(30)), None);
    log.snapshot_done(ByteCount(100));
}

#[test]
fn idle_extents_go_with_the_second_idle_snapshot() {
    let mut log = log(16, 64);
    log.enter(extent(3));
    log.leave(extent(3));
    write_all(&mut log);
    assert_eq!(log.capture(false, true).hot, [ExtentRun::of(3)], "used since the last one");
    log.snapshot_done(ByteCount(100));
    assert_eq!(log.capture(false, true).hot, []);
    log.snapshot_done(ByteCount(100));
    assert!(!log.has_hot());
}

#[test]
fn while_everything_counts_as_hot_nothing_is_logged() {
    let mut log = ActivityLog::new(limits(2, 64), SIZE, true);
    assert_eq!(log.enter(extent(1)), None);
    let captured = log.capture(false, false);
    assert_eq!(captured.hot, [ExtentRun::of(1)], "it is in use");
    assert_eq!(log.enter(extent(9)), Some(1), "the new snapshot needs to be told");
    write_all(&mut log);
    log.snapshot_done(ByteCount(100));
    assert_eq!(log.enter(extent(1)), None);
    // And back: only a durable snapshot makes everything hot.
    log.capture(true, false);
    assert_eq!(log.enter(extent(50)), Some(2));
    write_all(&mut log);
    log.snapshot_done(ByteCount(100));
    assert_eq!(log.enter(extent(60)), None);
}

#[test]
fn no_record_takes_a_place_that_is_needed() {
    let mut log = log(1000, 4);
    for index in 0..20 {
        log.enter(extent(index * 100));
        write_all(&mut log);
    }
    assert!(log.wants_snapshot());
    assert!(log.next_record().is_none(), "the log is full");
    let captured = log.capture(false, false);
    assert!(log.next_record().is_none(), "still: the new snapshot is not durable");
    log.snapshot_done(ByteCount(100));
    let next = log.next_record().unwrap();
    assert_eq!(next.sequence, captured.log_from);
    assert_eq!(next.runs.len(), 16, "one record for all that waited");
}

#[test]
fn a_sequential_writer_waits_only_at_its_start() {
    let mut log = log(1000, 4096);
    let mut waits = 0;
    for index in 0..200 {
        waits += u32::from(log.enter(extent(index)).is_some());
        write_all(&mut log);
        log.leave(extent(index));
    }
    assert_eq!(waits, 2);
}

#[test]
fn a_change_of_very_many_extents_is_one_run() {
    let mut log = log(4, 64);
    let all: BlockRange = (0..4 * 10_000).into();
    assert_eq!(log.enter(all), Some(1));
    let record = log.next_record().unwrap();
    assert_eq!(record.runs, [ExtentRun { first: 0, count: 10_000 }]);
    log.record_done();
    assert_eq!(log.capture(false, false).hot, [ExtentRun { first: 0, count: 10_000 }]);
    log.snapshot_done(ByteCount(100));
    log.leave(all);
    assert_eq!(log.capture(false, false).hot, []);
}
