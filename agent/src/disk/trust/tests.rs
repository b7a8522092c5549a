//! Which leftovers are believed.

use backtide_tracking::{DirtyBitmap, SavedTracking, Snapshot};
use backtide_units::{DiskId, HistoryId};

use super::*;

const SIZE: ByteCount = ByteCount(1 << 20);

fn record() -> DiskRecord {
    let receiver = "unix:/r".parse().unwrap();
    let record = DiskRecord::new("vm1".parse().unwrap(), "/disk.raw".into(), receiver);
    DiskRecord {
        history: Some(HistoryId::random()),
        image_at_detach: Some(stamp(0)),
        lsn_bound: Lsn(77),
        size: SIZE,
        ..record
    }
}

/// Written so many seconds from now.
fn stamp(seconds: i64) -> ImageStamp {
    let us = alive_now().at.0 / 60_000_000 * 60_000_000;
    ImageStamp { size: SIZE, modified_ns: us.saturating_add_signed(seconds * 1_000_000) * 1000 }
}

fn left(record: &DiskRecord, clean: bool) -> Loaded {
    let saved = SavedTracking {
        history: record.history,
        last_lsn: Lsn(5),
        dirty: DirtyBitmap::of((3..5).into()),
        ..SavedTracking::unknown(record.uuid)
    };
    let snapshot = Snapshot::first(saved, clean, false);
    Loaded { snapshot, hot: DirtyBitmap::of((8..12).into()), clean, alive: Some(alive_now()) }
}

fn is_lost(resume: &Resume, why: Reason) -> bool {
    matches!(resume, Resume::Lost { reason, last_lsn: Lsn(77), .. } if *reason == why)
}

#[test]
fn a_clean_detach_is_believed_when_the_image_is_as_it_was_left() {
    let record = record();
    let good = left(&record, true);
    let resumed = resume(&record, Ok(Some(good.clone())), Some(&stamp(0)), SIZE);
    assert_eq!(resumed, Resume::Clean(good.snapshot.saved.clone()));
    let untrusted = |record: &DiskRecord, loaded: Loaded, stamp: Option<&ImageStamp>| {
        let resumed = resume(record, Ok(Some(loaded)), stamp, SIZE);
        assert!(is_lost(&resumed, Reason::BitmapUntrusted), "{resumed:?}");
    };
    untrusted(&record, good.clone(), Some(&stamp(1)));
    untrusted(&record, good.clone(), None);
    untrusted(&DiskRecord { uuid: DiskId::random(), ..record.clone() }, good.clone(), Some(&stamp(0)));
    untrusted(&DiskRecord { image_changed: true, ..record.clone() }, good.clone(), Some(&stamp(0)));
    let resized = resume(&record, Ok(Some(good)), Some(&stamp(0)), ByteCount(2 << 20));
    assert!(is_lost(&resized, Reason::Resized));
}

#[test]
fn a_device_is_believed_after_the_end_of_the_agent_and_not_after_a_detach() {
    let record = DiskRecord { image_at_detach: None, ..record() };
    let good = left(&record, true);
    let detached = resume(&record, Ok(Some(good.clone())), None, SIZE);
    assert!(is_lost(&detached, Reason::BitmapUntrusted));
    let stopped = resume(&DiskRecord { stopped: true, ..record }, Ok(Some(good.clone())), None, SIZE);
    assert_eq!(stopped, Resume::Clean(good.snapshot.saved));
}

#[test]
fn after_a_crash_what_may_differ_is_compared_and_nothing_else() {
    let record = DiskRecord { image_at_detach: None, ..record() };
    let mut expected = DirtyBitmap::of((3..5).into());
    expected.insert((8..12).into());
    let old = stamp(-3600);
    for stamp in [Some(&old), None] {
        match resume(&record, Ok(Some(left(&record, false))), stamp, SIZE) {
            Resume::Crashed { candidates, last_lsn: Lsn(77), .. } => assert_eq!(candidates, expected),
            other => panic!("expected a crash, found {other:?}"),
        }
    }
}

#[test]
fn an_image_written_after_the_agent_died_is_compared_whole() {
    let record = DiskRecord { image_at_detach: None, ..record() };
    let loaded = left(&record, false);
    let at = |seconds| Some(stamp(seconds));
    let resumed = resume(&record, Ok(Some(loaded.clone())), at(600).as_ref(), SIZE);
    assert!(is_lost(&resumed, Reason::BitmapUntrusted));
    let silent = Loaded { alive: None, ..loaded };
    let resumed = resume(&record, Ok(Some(silent)), at(-600).as_ref(), SIZE);
    assert!(is_lost(&resumed, Reason::BitmapUntrusted));
}

#[test]
fn a_file_that_says_everything_or_is_of_another_history_means_everything() {
    let record = DiskRecord { image_at_detach: None, ..record() };
    let mut loaded = left(&record, false);
    loaded.snapshot.everything = true;
    assert!(is_lost(&resume(&record, Ok(Some(loaded)), None, SIZE), Reason::AgentCrashed));
    let other = DiskRecord { history: Some(HistoryId::random()), ..record.clone() };
    assert!(is_lost(&resume(&other, Ok(Some(left(&record, false))), None, SIZE), Reason::AgentCrashed));
}

#[test]
fn no_tracking_file_means_a_crash_unless_the_disk_is_new() {
    let known = record();
    assert!(is_lost(&resume(&known, Ok(None), None, SIZE), Reason::AgentCrashed));
    let damaged = LoadError::Damaged { path: "vm1.tracking".into(), what: "cut".into() };
    assert!(is_lost(&resume(&known, Err(damaged), None, SIZE), Reason::BitmapUntrusted));
    let fresh = DiskRecord { history: None, lsn_bound: Lsn::ZERO, ..known };
    assert_eq!(resume(&fresh, Ok(None), None, SIZE), Resume::New);
}
