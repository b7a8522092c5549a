//! From what a person asks for to an LSN: marks, times, durations, flush points.

mod common;

use std::sync::Arc;

use backtide_recovery::{DiskLog, Entry, LogOptions, PassReason, PointError, Snapshot, TimedLsn};
use backtide_storage::MemoryStorage;
use backtide_units::{ByteCount, ByteOffset, ByteRange, CaptureTime, Lsn};
use common::{cache, directory, identity};

const SECOND: u64 = 1_000_000;

fn second(number: u64) -> CaptureTime {
    CaptureTime(number * SECOND)
}

/// One record a second with LSN = second; an outage from 20 to 40, before it if asked for a pass at 21
/// that misses nothing, and another behind all with a record after it; a mark at 10; flushes at 5 and 50.
fn story(sealed_every: u64, quiet_pass: bool) -> Snapshot {
    let storage = Arc::new(MemoryStorage::new());
    let options = LogOptions { segment_bytes_max: ByteCount(4096), ..LogOptions::default() };
    let mut log = DiskLog::create(storage, directory(), identity(), options, &cache()).expect("create");
    let mut put = |entry: Entry| {
        let seq = log.append(entry).expect("append");
        if seq.0.is_multiple_of(sealed_every) {
            log.seal().expect("seal");
        }
    };
    let range = ByteRange::between(ByteOffset(0), ByteOffset(4096));
    let record = |n: u64| Entry::Zero { lsn: Lsn(n), time: second(n), range, trim: false };
    let begin = |t: u64, gap: u64| Entry::PassBegin {
        at: Lsn(t),
        gap_from: Lsn(gap),
        time: second(t),
        reason: PassReason { code: 1, text: "the link was down".to_owned() },
    };
    let end =
        |t: u64| Entry::PassEnd { at: Lsn(t), valid_from: Some(Lsn(t)), time: CaptureTime(t * SECOND + 5) };
    put(begin(1, 0));
    put(end(1));
    for n in 2..=20 {
        put(record(n));
        if n == 5 {
            put(Entry::Flush { lsn: Lsn(5), time: second(5) });
        }
        if n == 10 {
            put(Entry::Mark { lsn: Lsn(10), time: second(10), label: "before".to_owned() });
        }
    }
    if quiet_pass {
        put(begin(21, 20));
        put(end(21));
    }
    put(begin(40, if quiet_pass { 21 } else { 20 }));
    put(end(40));
    for n in 45..=60 {
        put(record(n));
        if n == 50 {
            put(Entry::Flush { lsn: Lsn(50), time: second(50) });
        }
    }
    if quiet_pass {
        put(begin(61, 60));
        put(end(61));
        put(record(65));
    }
    log.snapshot().expect("snapshot")
}

fn each(check: impl Fn(&Snapshot)) {
    for sealed_every in [1, 7, 1000] {
        check(&story(sealed_every, false));
    }
}

fn resolve(snapshot: &Snapshot, text: &str) -> Result<Lsn, PointError> {
    snapshot.resolve(&text.parse().expect("a point"), second(70))
}

#[test]
fn a_time_is_the_last_record_at_or_before_it() {
    each(|snapshot| {
        let found = |time: CaptureTime| snapshot.point_at(time).expect("a point");
        assert_eq!(found(second(7)), Lsn(7));
        assert_eq!(found(CaptureTime(7 * SECOND + SECOND - 1)), Lsn(7));
        assert_eq!(found(second(20)), Lsn(20));
        assert_eq!(found(second(40)), Lsn(40), "a resync point is found by its time");
        assert_eq!(found(second(44)), Lsn(40));
        assert_eq!(found(second(1000)), Lsn(60));
    });
}

#[test]
fn a_time_in_the_outage_is_refused_with_the_hole() {
    each(|snapshot| {
        for time in [CaptureTime(20 * SECOND + 1), second(30), CaptureTime(40 * SECOND - 1)] {
            let error = snapshot.point_at(time).expect_err("in the hole");
            let text = error.to_string();
            assert!(matches!(error, PointError::InHole { .. }), "{text}");
            assert!(text.contains("because the link was down"), "{text}");
            assert!(text.contains("lsn:20") && text.contains("lsn:40"), "{text}");
        }
    });
}

#[test]
fn a_time_after_a_pass_that_missed_nothing_is_in_the_outage_behind_it() {
    for sealed_every in [1, 7, 1000] {
        let snapshot = story(sealed_every, true);
        let found = |time: CaptureTime| snapshot.point_at(time).expect("a point");
        assert_eq!(found(second(21)), Lsn(21));
        assert_eq!(snapshot.time_of(Lsn(21)).expect("readable"), Some(second(21)));
        assert_eq!(found(CaptureTime(21 * SECOND - 1)), Lsn(20));
        for time in [CaptureTime(21 * SECOND + 1), second(30), CaptureTime(40 * SECOND - 1)] {
            let error = snapshot.point_at(time).expect_err("in the hole");
            assert!(matches!(error, PointError::InHole { .. }), "{error}");
            let newest = snapshot.newest_point_by(time).expect("readable").expect("a point");
            assert_eq!(newest.lsn, Lsn(21));
        }
    }
}

/// Writes under way when a pass froze belong to its T, and have no other time.
#[test]
fn a_time_after_a_pass_within_an_interval_has_what_the_pass_brought() {
    for sealed_every in [1, 7, 1000] {
        let snapshot = story(sealed_every, true);
        let found = |time: CaptureTime| snapshot.point_at(time).expect("a point");
        assert_eq!(
            [found(CaptureTime(61 * SECOND - 1)), found(second(61)), found(second(64))],
            [60, 61, 61].map(Lsn)
        );
        assert_eq!(found(second(65)), Lsn(65));
        assert_eq!(snapshot.time_of(Lsn(63)).expect("readable"), Some(second(61)));
    }
}

#[test]
fn a_time_before_the_first_point_is_outside() {
    each(|snapshot| {
        let error = snapshot.point_at(CaptureTime(5)).expect_err("outside");
        assert!(matches!(error, PointError::Outside { .. }), "{error}");
        assert!(error.to_string().contains("after is lsn:1 "), "{error}");
    });
}

#[test]
fn every_form_of_a_point_is_resolved() {
    each(|snapshot| {
        assert_eq!(resolve(snapshot, "latest").expect("a point"), Lsn(60));
        assert_eq!(resolve(snapshot, "lsn:3").expect("a point"), Lsn(3));
        assert_eq!(resolve(snapshot, "mark:before").expect("a point"), Lsn(10));
        assert_eq!(resolve(snapshot, "-15s").expect("a point"), Lsn(55));
        assert_eq!(resolve(snapshot, "1970-01-01T00:00:09.999999999Z").expect("a point"), Lsn(9));
        assert!(matches!(resolve(snapshot, "-35s"), Err(PointError::InHole { .. })));
        assert!(matches!(resolve(snapshot, "lsn:30"), Err(PointError::InHole { .. })));
        assert!(matches!(resolve(snapshot, "lsn:61"), Err(PointError::Outside { .. })));
        assert!(matches!(resolve(snapshot, "mark:other"), Err(PointError::UnknownMark { .. })));
    });
}

/// Clocks differ a little; what has not come yet is nothing to go back to.
#[test]
fn a_time_in_the_future_is_refused_with_the_latest_point() {
    each(|snapshot| {
        assert_eq!(resolve(snapshot, "1970-01-01T00:01:12Z").expect("a little ahead"), Lsn(60));
        let error = resolve(snapshot, "1970-01-01T00:01:12.000001Z").expect_err("in the future");
        let text = error.to_string();
        assert!(text.contains("it is 1970-01-01T00:01:10Z now, and the latest point is lsn:60"), "{text}");
        // A receiver whose clock is behind that of the disk's host.
        let early = snapshot.resolve(&"1970-01-01T00:01:00Z".parse().expect("a point"), second(3));
        assert_eq!(early.expect("a point"), Lsn(60));
    });
}

#[test]
fn flush_points_come_newest_first() {
    each(|snapshot| {
        let at = |n: u64| TimedLsn { lsn: Lsn(n), time: second(n) };
        assert_eq!(snapshot.flush_points(Lsn::MAX, 10).expect("flushes"), [at(50), at(5)]);
        assert_eq!(snapshot.flush_points(Lsn(49), 10).expect("flushes"), [at(5)]);
        assert_eq!(snapshot.flush_points(Lsn::MAX, 1).expect("flushes"), [at(50)]);
        assert_eq!(snapshot.timeline().flushes(), (2, Some(at(50))));
    });
}

#[test]
fn a_point_has_the_time_of_its_record() {
    each(|snapshot| {
        assert_eq!(snapshot.time_of(Lsn(12)).expect("readable"), Some(second(12)));
        assert_eq!(snapshot.time_of(Lsn(43)).expect("readable"), Some(second(40)), "of the pass before it");
        assert_eq!(snapshot.time_of(Lsn(40)).expect("readable"), Some(second(40)), "that of a pass");
        assert_eq!(snapshot.time_of(Lsn(0)).expect("readable"), None);
    });
}

#[test]
fn the_first_point_after_a_time_is_a_record_or_the_end_of_a_hole() {
    each(|snapshot| {
        let after = |time: CaptureTime| {
            let found = snapshot.first_point_after(time).expect("a readable log");
            found.map(|point| (point.lsn.0, point.time))
        };
        assert_eq!(after(CaptureTime(0)), Some((1, second(1))), "the first pass");
        assert_eq!(after(second(1)), Some((2, second(2))));
        assert_eq!(after(second(7)), Some((8, second(8))));
        assert_eq!(after(CaptureTime(7 * SECOND + 1)), Some((8, second(8))));
        assert_eq!(after(second(20)), Some((40, second(40))), "behind the hole");
        assert_eq!(after(second(30)), Some((40, second(40))));
        assert_eq!(after(second(40)), Some((45, second(45))));
        assert_eq!(after(second(59)), Some((60, second(60))));
        assert_eq!(after(second(60)), None);
    });
}

#[test]
fn the_density_counts_every_change_in_its_part_of_the_time() {
    for parts in [1, 2, 7, 60, 1000] {
        each(|snapshot| {
            let density = snapshot.density(parts).expect("a readable log").expect("there are records");
            assert_eq!((density.from, density.to), (second(2), second(60)));
            let mut expected = vec![0; parts];
            for n in (2..=20).chain(45..=60) {
                let span = 58 * SECOND + 1;
                expected[((n - 2) * SECOND * parts as u64 / span) as usize] += 1;
            }
            let counted: Vec<u64> = density.parts.iter().map(|part| part.changes).collect();
            assert_eq!(counted, expected, "{parts} parts");
            assert!(parts > 60 || density.parts.iter().any(|part| part.bytes.0 > 0), "{density:?}");
        });
    }
}

#[test]
fn while_an_idle_disk_says_that_nothing_changed_there_is_no_hole() {
    for sealed_every in [1, 2, 1000] {
        let storage = Arc::new(MemoryStorage::new());
        let mut log =
            DiskLog::create(storage.clone(), directory(), identity(), LogOptions::default(), &cache())
                .expect("create");
        let mut put = |entry: Entry| {
            let seq = log.append(entry).expect("append");
            if seq.0.is_multiple_of(sealed_every) {
                log.seal().expect("seal");
            }
        };
        let range = ByteRange::between(ByteOffset(0), ByteOffset(4096));
        let record = |n: u64| Entry::Zero { lsn: Lsn(n), time: second(n), range, trim: false };
        let unchanged = |lsn: u64, at: u64| Entry::Unchanged { lsn: Lsn(lsn), time: second(at) };
        let reason = || PassReason { code: 1, text: "the agent crashed".to_owned() };
        let begin = |t: u64| Entry::PassBegin {
            at: Lsn(t),
            gap_from: Lsn(2),
            time: second(t * 10),
            reason: reason(),
        };
        let end = |t: u64| Entry::PassEnd { at: Lsn(t), valid_from: Some(Lsn(t)), time: second(t * 10) };
        put(Entry::PassBegin { at: Lsn(1), gap_from: Lsn(0), time: second(1), reason: reason() });
        // Out of sync it says nothing about points.
        put(unchanged(1, 1));
        put(end(1));
        put(record(2));
        put(unchanged(2, 5));
        put(unchanged(2, 9));
        // Not about the newest record, or earlier than what is known: nothing new.
        put(unchanged(1, 30));
        put(unchanged(2, 7));
        put(begin(4));
        put(unchanged(4, 50));
        put(end(4));
        let asked = |snapshot: &Snapshot, time: u64| snapshot.point_at(second(time)).ok();
        let check = |snapshot: &Snapshot| {
            assert_eq!([2, 4, 9].map(|time| asked(snapshot, time)), [Some(Lsn(2)); 3]);
            assert_eq!([10, 39].map(|time| asked(snapshot, time)), [None; 2]);
            assert_eq!(asked(snapshot, 40), Some(Lsn(4)));
            assert_eq!(snapshot.time_of(Lsn(2)).expect("readable"), Some(second(2)), "of the write");
            assert_eq!(snapshot.time_of(Lsn(3)).expect("readable"), Some(second(2)), "of the write");
            let hole = &snapshot.timeline().holes()[0];
            assert_eq!(hole.from, Some(TimedLsn { lsn: Lsn(2), time: second(9) }));
        };
        check(&log.snapshot().expect("snapshot"));
        log.seal().expect("seal");
        drop(log);
        let (mut log, _) =
            DiskLog::open(storage, directory(), LogOptions::default(), &cache()).expect("open");
        check(&log.snapshot().expect("snapshot"));
    }
}
