//! What a log keeps in memory has limits, and what lies beyond them is said; sizes belong to points.

mod common;

use std::{path::Path, sync::Arc};

use backtide_recovery::{
    CacheLimits, DiskLog, Entry, INTERVALS_MAX, LogCache, LogOptions, MARKS_MAX, PassReason, SegmentId,
    Timeline,
};
use backtide_storage::{MemoryStorage, Storage};
use backtide_units::{ByteCount, ByteOffset, ByteRange, CaptureTime, Epoch, Lsn};
use uuid::Uuid;

use common::{Agent, cache, directory, identity};

fn attach(epoch: u64, next_lsn: u64, size: u64) -> Entry {
    Entry::Attach {
        epoch: Epoch(epoch),
        attach: Uuid::from_u128(epoch.into()),
        next_lsn: Lsn(next_lsn),
        size: ByteCount(size),
        name: "vm1".parse().expect("a name"),
        time: CaptureTime(epoch),
        facts: Default::default(),
    }
}

fn pass(timeline: &mut Timeline, at: u64) {
    let (at, time) = (Lsn(at), CaptureTime(at));
    let reason = PassReason { code: 2, text: "away".to_owned() };
    let gap_from = timeline.covered();
    for entry in
        [Entry::PassBegin { at, gap_from, time, reason }, Entry::PassEnd { at, valid_from: Some(at), time }]
    {
        timeline.check(&entry).expect("it may come");
        timeline.fold(&entry);
    }
}

fn mark(lsn: u64) -> Entry {
    Entry::Mark { lsn: Lsn(lsn), time: CaptureTime(lsn), label: format!("m{lsn}") }
}

#[test]
fn a_point_has_the_size_that_the_disk_had_then() {
    let storage = MemoryStorage::new();
    let mut log =
        DiskLog::create(Arc::new(storage.clone()), directory(), identity(), LogOptions::default(), &cache())
            .expect("create");
    let zero = |lsn: u64, start: u64| Entry::Zero {
        lsn: Lsn(lsn),
        time: CaptureTime(lsn),
        range: ByteRange::new(ByteOffset(start), ByteCount(512)).expect("a range"),
        trim: false,
    };
    let (at, time) = (Lsn(1), CaptureTime(1));
    let reason = PassReason { code: 1, text: String::new() };
    for entry in [
        attach(1, 1, 1 << 20),
        Entry::PassBegin { at, gap_from: Lsn(0), time, reason },
        Entry::PassEnd { at, valid_from: Some(at), time },
        zero(2, 0),
        attach(2, 10, 4 << 20),
        zero(10, 2 << 20),
        attach(3, 20, 4 << 20),
        zero(21, 2 << 20),
    ] {
        log.append(entry).expect("append");
    }
    log.seal().expect("seal");
    let check = |log: &mut DiskLog| {
        for (lsn, mib) in [(1, 1), (2, 1), (10, 4), (21, 4)] {
            assert_eq!(log.view(Lsn(lsn)).expect("a point").disk_size(), ByteCount(mib << 20), "{lsn}");
        }
        assert_eq!(log.latest_view().expect("a view").disk_size(), ByteCount(4 << 20));
    };
    check(&mut log);
    log.ticket().expect("ticket").map(|ticket| log.synced(ticket.sync())).transpose().expect("synced");
    let (mut log, _) =
        DiskLog::open(Arc::new(storage), directory(), LogOptions::default(), &cache()).expect("open");
    check(&mut log);
}

/// A log at LSN 1 that takes writes.
fn log_of_writes(cache: &LogCache, name: &str) -> DiskLog {
    let storage = Arc::new(MemoryStorage::new());
    let mut log =
        DiskLog::create(storage, Path::new(name), identity(), LogOptions::default(), cache).expect("create");
    let (at, time) = (Lsn(1), CaptureTime(1));
    let reason = PassReason { code: 1, text: String::new() };
    for entry in [
        attach(1, 1, 1 << 30),
        Entry::PassBegin { at, gap_from: Lsn(0), time, reason },
        Entry::PassEnd { at, valid_from: Some(at), time },
    ] {
        log.append(entry).expect("append");
    }
    log
}

#[test]
fn logs_share_the_memory_of_their_open_indexes() {
    let most = 3000;
    let cache = LogCache::new(CacheLimits { open_extents_max: most, ..CacheLimits::default() });
    let mut logs = ["a", "b"].map(|name| log_of_writes(&cache, name));
    let mut write = |log: usize, lsn: u64| {
        let range = ByteRange::new(ByteOffset(lsn * 512), ByteCount(512)).expect("a range");
        let entry = Entry::Zero { lsn: Lsn(lsn), time: CaptureTime(lsn), range, trim: false };
        let log: &mut DiskLog = &mut logs[log];
        log.append(entry).expect("append");
        log.ticket().expect("ticket").map(|ticket| log.synced(ticket.sync())).transpose().expect("synced");
        log.segment_count()
    };
    for lsn in 2..2502 {
        assert_eq!(write(0, lsn), 1, "alone a log may have all of it");
    }
    let segments: Vec<usize> = (2..2502).map(|lsn| write(1, lsn)).collect();
    assert_eq!(segments[1023], 1, "one with little is not sealed: {:?}", &segments[1000..1030]);
    assert!(segments[2499] >= 2, "together they may have {most}");
    assert!(cache.open_extents() <= most + 1024, "{}", cache.open_extents());
    let mut next = 2502;
    while cache.open_extents() <= most {
        write(1, next);
        next += 1;
        assert!(next < 10_000, "they may have {most}, and have {}", cache.open_extents());
    }
    assert_eq!(write(0, 2502), 2, "the one with the most is sealed when it is written again");
    drop(logs);
    assert_eq!(cache.open_extents(), 0);
}

#[test]
fn the_newest_marks_and_intervals_are_kept_and_the_others_counted() {
    let mut timeline = Timeline::default();
    let marks = MARKS_MAX as u64 * 2;
    for lsn in 1..=marks {
        timeline.fold(&mark(lsn));
    }
    let kept = timeline.marks().len();
    assert!((MARKS_MAX..MARKS_MAX + MARKS_MAX / 8).contains(&kept), "{kept}");
    assert_eq!(timeline.forgotten().marks + kept as u64, marks);
    assert_eq!(timeline.marks().last().expect("a mark").label, format!("m{marks}"));

    let mut timeline = Timeline::default();
    let passes = INTERVALS_MAX as u64 + INTERVALS_MAX as u64 / 2;
    for n in 1..=passes {
        pass(&mut timeline, n * 10);
    }
    let kept = timeline.intervals().len();
    assert!((INTERVALS_MAX..INTERVALS_MAX + INTERVALS_MAX / 8).contains(&kept), "{kept}");
    assert_eq!(timeline.forgotten().intervals + kept as u64, passes);
    assert_eq!(timeline.holes().len(), kept - 1, "one between each two");
    let first = timeline.intervals()[0].from.lsn;
    assert!(timeline.offers(first) && !timeline.offers(Lsn(10)));
    assert!(timeline.hole_at(Lsn(first.0 + 1)).is_some());
    assert!(timeline.refusal(Lsn(10), "lsn:10".to_owned()).to_string().contains("the nearest point after"));
}

#[test]
fn many_control_entries_fill_a_segment() {
    let mut agent = Agent::new(3, MemoryStorage::new()).expect("create");
    agent.options = LogOptions::default();
    agent.reopen().expect("open");
    agent.attach().expect("attach");
    agent.settle().expect("settle");
    let before = agent.log.segment_count();
    let long = "x".repeat(1000);
    for n in 0..5000 {
        let at = agent.log.timeline().covered();
        agent.log.append(Entry::Mark { lsn: at, time: CaptureTime(n), label: long.clone() }).expect("append");
    }
    assert!(agent.log.segment_count() > before, "5 MB of labels");
    agent.model.check(&mut agent.log);
}

#[test]
fn a_file_with_the_last_segment_number_is_not_of_the_log() {
    for name in ["0000004294967295.seg", "0000004294967294.seg", "0000000000000000.seg"] {
        let mut agent = Agent::new(4, MemoryStorage::new()).expect("create");
        agent.attach().expect("attach");
        agent.settle().expect("settle");
        agent.sync().expect("sync");
        let path = directory().join("segments").join(name);
        agent.storage.create_new(&path).expect("create").write_at(ByteOffset(0), &[0; 300]).expect("write");
        let recovered = agent.reopen().expect("open");
        agent.write().expect("write");
        agent.model.check(&mut agent.log);
        let removed = recovered.removed_segments;
        assert!(removed.is_empty() || removed == [SegmentId(u32::MAX - 1)], "{name}: {removed:?}");
    }
    assert_eq!(SegmentId::from_file_name("0000004294967295.seg"), None);
    assert!(Path::new(&SegmentId(u32::MAX - 1).file_name()).extension().is_some());
}
