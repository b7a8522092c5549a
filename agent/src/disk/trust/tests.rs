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

#[test]
fn the_boot_of_the_host_is_read_once() {
    let known = OnceLock::new();
    let id = Uuid::from_u128(7);
    assert_eq!(known_once(&known, || Err(io::ErrorKind::Other.into())), Uuid::nil());
    assert_eq!(known_once(&known, || Ok(format!("{id}\n"))), id);
    assert_eq!(known_once(&known, || Err(io::ErrorKind::Other.into())), id);
    assert!(!boot_id().is_nil());
}

/// When the agent was last alive.
const ALIVE: u64 = 1_700_000_000;

/// Written so many seconds from then.
fn stamp(seconds: i64) -> ImageStamp {
    let modified_ns = ALIVE.saturating_add_signed(seconds) * 1_000_000_000;
    ImageStamp { size: SIZE, modified_ns, inode: 12, data: Vec::new() }
}

/// The agent saw the image as written ten seconds before its last sign of life.
fn alive() -> SignOfLife {
    let image = Some(seen(&stamp(-10)));
    let at = CaptureTime(ALIVE * 1_000_000);
    SignOfLife { at, boot: boot_id(), image, captured: at }
}

fn left(record: &DiskRecord, clean: bool) -> Loaded {
    let saved = SavedTracking {
        history: record.history,
        last_lsn: Lsn(5),
        dirty: DirtyBitmap::of((3..5).into()),
        ..SavedTracking::unknown(record.uuid)
    };
    let snapshot = Snapshot::first(saved, clean, false);
    Loaded { snapshot, hot: DirtyBitmap::of((8..12).into()), clean, alive: Some(alive()) }
}

/// The same of what tells no time, as a device does.
fn left_of_a_device(record: &DiskRecord, clean: bool) -> Loaded {
    let alive = Some(SignOfLife { image: None, ..alive() });
    Loaded { alive, ..left(record, clean) }
}

fn is_lost(resume: &Resume, why: Reason) -> bool {
    matches!(resume, Resume::Lost { reason, last_lsn: Lsn(78), .. } if *reason == why)
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
    let shrunk = resume(&record, Ok(Some(good)), Some(&stamp(0)), ByteCount(1 << 19));
    assert!(is_lost(&shrunk, Reason::Resized));
}

#[test]
fn a_device_is_believed_after_the_end_of_the_agent_and_not_after_a_detach() {
    let record = DiskRecord { image_at_detach: None, ..record() };
    let good = left_of_a_device(&record, true);
    let detached = resume(&record, Ok(Some(good.clone())), None, SIZE);
    assert!(is_lost(&detached, Reason::BitmapUntrusted));
    let stopped = DiskRecord { stopped: true, ..record.clone() };
    let resumed = resume(&stopped, Ok(Some(good.clone())), None, SIZE);
    assert_eq!(resumed, Resume::Clean(good.snapshot.saved.clone()));
    let crashed = DiskRecord { attached: true, ..record };
    for displaced in [stopped, crashed] {
        let displaced = DiskRecord { image_displaced: true, ..displaced };
        for clean in [true, false] {
            let left = left_of_a_device(&displaced, clean);
            let resumed = resume(&displaced, Ok(Some(left)), None, SIZE);
            assert!(is_lost(&resumed, Reason::BitmapUntrusted), "{resumed:?}");
        }
    }
}

#[test]
fn what_was_written_past_the_agent_is_not_believed() {
    let past = |record: DiskRecord| DiskRecord { written_past_agent: true, ..record };
    let detached = past(record());
    let stopped = past(DiskRecord { image_at_detach: None, stopped: true, ..record() });
    let crashed = past(DiskRecord { image_at_detach: None, attached: true, ..record() });
    let cases = [
        (&detached, left(&detached, true), Some(stamp(0))),
        (&stopped, left_of_a_device(&stopped, true), None),
        (&crashed, left(&crashed, false), Some(stamp(2))),
        (&crashed, left_of_a_device(&crashed, false), None),
    ];
    for (record, left, stamp) in cases {
        let resumed = resume(record, Ok(Some(left)), stamp.as_ref(), SIZE);
        assert!(is_lost(&resumed, Reason::WrittenPastAgent), "{resumed:?}");
    }
}

#[test]
fn a_device_in_the_place_of_a_file_is_not_believed() {
    let untrusted = |record: &DiskRecord, loaded: Loaded| {
        let resumed = resume(record, Ok(Some(loaded)), None, SIZE);
        assert!(is_lost(&resumed, Reason::BitmapUntrusted), "{resumed:?}");
    };
    let stopped = DiskRecord { stopped: true, ..record() };
    untrusted(&stopped, left_of_a_device(&stopped, true));
    let crashed = DiskRecord { image_at_detach: None, attached: true, ..record() };
    untrusted(&crashed, left(&crashed, false));
}

#[test]
fn after_a_crash_what_may_differ_is_compared_and_nothing_else() {
    let record = DiskRecord { image_at_detach: None, attached: true, ..record() };
    let mut expected = DirtyBitmap::of((3..5).into());
    expected.insert((8..12).into());
    let (then, later) = (stamp(-10), stamp(2));
    let (file, device) = (left(&record, false), left_of_a_device(&record, false));
    for (left, stamp) in [(&file, Some(&then)), (&file, Some(&later)), (&device, None)] {
        match resume(&record, Ok(Some(left.clone())), stamp, SIZE) {
            Resume::Crashed { candidates, last_lsn: Lsn(78), .. } => assert_eq!(candidates, expected),
            other => panic!("expected a crash, found {other:?}"),
        }
    }
}

#[test]
fn an_image_written_after_the_agent_died_is_compared_whole() {
    let record = DiskRecord { image_at_detach: None, ..record() };
    let loaded = left(&record, false);
    let untrusted = |loaded: &Loaded, stamp: Option<ImageStamp>| {
        let resumed = resume(&record, Ok(Some(loaded.clone())), stamp.as_ref(), SIZE);
        assert!(is_lost(&resumed, Reason::BitmapUntrusted), "{resumed:?}");
    };
    untrusted(&loaded, Some(stamp(600)));
    // An older copy put in its place, and another file.
    untrusted(&loaded, Some(stamp(-11)));
    untrusted(&loaded, Some(ImageStamp { inode: 13, ..stamp(-10) }));
    untrusted(&Loaded { alive: None, ..loaded.clone() }, Some(stamp(-10)));
    // A device that was detached, though that could not be saved.
    untrusted(&loaded, None);
}

#[test]
fn an_image_whose_data_file_was_written_or_replaced_is_compared_whole() {
    let with = |inode: u64, seconds: i64| ImageStamp {
        data: vec![ImageStamp { inode, ..stamp(seconds) }],
        ..stamp(-1000)
    };
    let was = with(20, -10);
    let detached = DiskRecord { image_at_detach: Some(was.clone()), ..record() };
    let crashed = DiskRecord { image_at_detach: None, attached: true, ..record() };
    let alive = SignOfLife { image: Some(super::seen(&was)), ..alive() };
    let (clean, killed) = (left(&detached, true), Loaded { alive: Some(alive), ..left(&crashed, false) });
    let resumed = |record, loaded: &Loaded, now| resume(record, Ok(Some(loaded.clone())), Some(&now), SIZE);
    assert!(matches!(resumed(&detached, &clean, was.clone()), Resume::Clean(_)));
    assert!(matches!(resumed(&crashed, &killed, was), Resume::Crashed { .. }));
    // By the agent's guest, before it died.
    assert!(matches!(resumed(&crashed, &killed, with(20, 2)), Resume::Crashed { .. }));
    for (now, why) in [(with(20, 600), "written"), (with(21, -10), "replaced"), (stamp(-1000), "not known")] {
        let (clean, killed) = (resumed(&detached, &clean, now.clone()), resumed(&crashed, &killed, now));
        assert!(is_lost(&clean, Reason::BitmapUntrusted), "{why}: {clean:?}");
        assert!(is_lost(&killed, Reason::BitmapUntrusted), "{why}: {killed:?}");
    }
}

#[test]
fn an_image_written_since_the_host_came_up_again_is_compared_whole() {
    let record = DiskRecord { image_at_detach: None, attached: true, ..record() };
    let booted = booted_at().expect("the system tells when it was booted").0;
    // The host was away for a few seconds only, and is up again for a few.
    let seen = ImageStamp { modified_ns: (booted - 8_000_000) * 1000, ..stamp(0) };
    let alive = SignOfLife {
        at: CaptureTime(booted - 7_000_000),
        boot: Uuid::from_bytes([1; 16]),
        image: Some(super::seen(&seen)),
        captured: CaptureTime(booted - 7_000_000),
    };
    let loaded = Loaded { alive: Some(alive), ..left(&record, false) };
    for (written, is_ours) in [(booted - 5_000_000, true), (booted + 5_000_000, false)] {
        let stamp = ImageStamp { modified_ns: written * 1000, ..stamp(0) };
        let resumed = resume(&record, Ok(Some(loaded.clone())), Some(&stamp), SIZE);
        assert_eq!(matches!(resumed, Resume::Crashed { .. }), is_ours, "{resumed:?}");
        assert_eq!(is_lost(&resumed, Reason::BitmapUntrusted), !is_ours, "{resumed:?}");
    }
}

#[test]
fn a_power_loss_may_take_the_last_times_with_it() {
    let record = DiskRecord { image_at_detach: None, attached: true, ..record() };
    let before = SignOfLife { boot: Uuid::from_bytes([1; 16]), ..alive() };
    let loaded = Loaded { alive: Some(before), ..left(&record, false) };
    for seconds in [-40, 30] {
        let resumed = resume(&record, Ok(Some(loaded.clone())), Some(&stamp(seconds)), SIZE);
        assert!(matches!(resumed, Resume::Crashed { .. }), "{seconds} s: {resumed:?}");
    }
    let resumed = resume(&record, Ok(Some(loaded)), Some(&stamp(3600)), SIZE);
    assert!(is_lost(&resumed, Reason::BitmapUntrusted));
}

#[test]
fn a_file_that_says_everything_or_is_of_another_history_means_everything() {
    let record = DiskRecord { image_at_detach: None, attached: true, ..record() };
    let mut loaded = left_of_a_device(&record, false);
    loaded.snapshot.everything = true;
    assert!(is_lost(&resume(&record, Ok(Some(loaded)), None, SIZE), Reason::AgentCrashed));
    let other = DiskRecord { history: Some(HistoryId::random()), ..record.clone() };
    let left = left_of_a_device(&record, false);
    assert!(is_lost(&resume(&other, Ok(Some(left)), None, SIZE), Reason::AgentCrashed));
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

#[test]
fn what_a_state_knows_of_ends_with_its_last_sign_of_life_and_a_clean_one_with_the_last_capture() {
    let last_time = CaptureTime(ALIVE * 1_000_000);
    let crashed = DiskRecord { image_at_detach: None, attached: true, last_time, ..record() };
    let until = |record: &DiskRecord, loaded: &Loaded| {
        known_until(record, Some(loaded)).map(|until| until.0 - last_time.0)
    };
    assert_eq!(until(&crashed, &left(&crashed, false)), Some(60_000_000));
    let clean = DiskRecord { last_time, ..record() };
    assert_eq!(until(&clean, &left(&clean, true)), Some(0));
    // Its last time is that of an attach before, which was killed, and no receiver was heard since.
    let early = DiskRecord { last_time_is_early: true, ..clean.clone() };
    assert_eq!(known_until(&early, Some(&left(&early, true))), None);
    // Nothing was ever captured, or nobody tells.
    assert_eq!(
        known_until(
            &DiskRecord { last_time: CaptureTime(0), ..crashed.clone() },
            Some(&left(&crashed, false))
        ),
        None
    );
    assert_eq!(known_until(&crashed, Some(&Loaded { alive: None, ..left(&crashed, false) })), None);
}

#[test]
fn a_state_that_was_fenced_is_not_trusted_by_whoever_takes_over() {
    let fenced = DiskRecord { fenced: true, ..record() };
    let resumed = resume(&fenced, Ok(Some(left(&fenced, true))), Some(&stamp(0)), SIZE);
    assert!(matches!(resumed, Resume::Clean(_)), "it sends nothing: {resumed:?}");
    let record = DiskRecord { take_over: true, ..fenced };
    let resumed = resume(&record, Ok(Some(left(&record, true))), Some(&stamp(0)), SIZE);
    assert!(is_lost(&resumed, Reason::AgentRolledBack));
}

#[test]
fn of_a_disk_that_has_grown_the_new_blocks_are_compared_and_what_was_known_before() {
    let grown = ByteCount((2 << 20) + 512);
    let clean = record();
    let mut expected = DirtyBitmap::of((3..5).into());
    // What is left of an activity log says nothing of a clean detach, and does no harm.
    expected.insert((8..12).into());
    expected.insert((256..513).into());
    match resume(&clean, Ok(Some(left(&clean, true))), Some(&stamp(0)), grown) {
        Resume::Crashed { reason: Reason::Resized, candidates, last_lsn: Lsn(5), .. } => {
            assert_eq!(candidates, expected);
        }
        other => panic!("{other:?}"),
    }
    let crashed = DiskRecord { image_at_detach: None, attached: true, ..record() };
    match resume(&crashed, Ok(Some(left_of_a_device(&crashed, false))), None, grown) {
        Resume::Crashed { reason: Reason::AgentCrashed, candidates, .. } => assert_eq!(candidates, expected),
        other => panic!("{other:?}"),
    }
    // The last block of before was not whole.
    assert_eq!(super::grown(ByteCount(4096 + 512), ByteCount(8192)), Some((1..2).into()));
}
