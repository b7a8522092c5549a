use backtide_tracking::{ActivityLimits, ExtentRun, LogRecord};
use backtide_units::{BlockCount, ByteCount, HistoryId};
use uuid::Uuid;

use super::*;
use crate::{
    activity::tests::{at, filter_with, write},
    event::{LocalData, RequestId},
};

const FULL: IoFailure = IoFailure { errno: 28 };
const READ_ONLY: IoFailure = IoFailure { errno: 30 };

/// An operation that the filter asked for.
#[derive(Debug)]
enum Asked {
    Record(IoId, LogRecord),
    Snapshot(IoId, Snapshot),
    Remove(IoId),
    Make(IoId, Snapshot),
}

/// A disk in sync with nothing changed, and what it asks for.
struct Disk {
    filter: Filter,
    now: u64,
    asked: Vec<Asked>,
    /// Changes that are asked of the local disk.
    local: Vec<IoId>,
    answers: Vec<bool>,
    alarms: Vec<String>,
}

impl Disk {
    fn new() -> Self {
        let limits = ActivityLimits { extent: BlockCount(4), ..ActivityLimits::default() };
        let filter = filter_with(Some(HistoryId(Uuid::from_u128(7))), limits);
        let (asked, local, answers) = (Vec::new(), Vec::new(), Vec::new());
        Self { filter, now: 1, asked, local, answers, alarms: Vec::new() }
    }

    fn hear(&mut self) {
        while let Some(effect) = self.filter.next_effect() {
            match effect {
                Effect::Tracking(io, TrackingOp::Record(record)) => {
                    self.asked.push(Asked::Record(io, record))
                }
                Effect::Tracking(io, TrackingOp::Snapshot(snapshot)) => {
                    self.asked.push(Asked::Snapshot(io, *snapshot));
                }
                Effect::Tracking(io, TrackingOp::Discard) => self.asked.push(Asked::Remove(io)),
                Effect::Tracking(io, TrackingOp::Begin(snapshot)) => {
                    self.asked.push(Asked::Make(io, *snapshot))
                }
                Effect::Local(io, _) => self.local.push(io),
                Effect::Complete { result, .. } => self.answers.push(result.is_ok()),
                Effect::Alarm(text) => self.alarms.push(text),
                Effect::Spill(..)
                | Effect::Scan(_)
                | Effect::Transition { .. }
                | Effect::Disconnect { .. }
                | Effect::ReadFailed { .. } => {}
            }
        }
    }

    fn write(&mut self, block: u64) {
        self.filter.submit(at(self.now), RequestId(block), write(block));
        self.hear();
    }

    /// The oldest change that was asked of the local disk has happened.
    fn changed(&mut self) {
        let io = self.local.remove(0);
        self.filter.local_done(at(self.now), io, Ok(LocalData::Changed));
        self.hear();
    }

    /// The only operation of the tracking file under way.
    fn only(&mut self) -> Asked {
        assert_eq!(self.asked.len(), 1, "{:?}", self.asked);
        self.asked.remove(0)
    }

    fn ends(&mut self, io: IoId, result: Result<(), IoFailure>) {
        self.filter.tracking_done(at(self.now), io, result.map(|()| ByteCount(512)));
        self.hear();
    }

    fn only_record(&mut self) -> (IoId, LogRecord) {
        match self.only() {
            Asked::Record(io, record) => (io, record),
            other => panic!("{other:?} is no record"),
        }
    }

    fn only_remove(&mut self) -> IoId {
        match self.only() {
            Asked::Remove(io) => io,
            other => panic!("{other:?} is no removal"),
        }
    }

    fn only_make(&mut self) -> (IoId, Snapshot) {
        match self.only() {
            Asked::Make(io, snapshot) => (io, snapshot),
            other => panic!("{other:?} makes no file"),
        }
    }

    fn only_snapshot(&mut self) -> (IoId, Snapshot) {
        match self.only() {
            Asked::Snapshot(io, snapshot) => (io, snapshot),
            other => panic!("{other:?} is no snapshot"),
        }
    }

    /// A write fails for want of room, and the file is removed.
    fn gone() -> Self {
        let mut disk = Self::new();
        disk.write(3);
        let (io, _) = disk.only_record();
        disk.ends(io, Err(FULL));
        let removal = disk.only_remove();
        assert_eq!(disk.local, [], "not before the file is gone");
        disk.ends(removal, Ok(()));
        disk
    }

    /// When the filter wants to be told the time; that comes.
    fn at_the_deadline(&mut self) -> u64 {
        let due = self.filter.next_deadline().expect("something is due").as_millis();
        let before = std::mem::replace(&mut self.now, u64::try_from(due).unwrap());
        self.filter.tick(at(self.now));
        self.hear();
        self.now - before
    }

    fn tells(&self) -> (Option<Untracked>, bool) {
        let status = self.filter.status();
        (status.untracked, status.hot_extents.is_some())
    }
}

fn told(failure: IoFailure, stays: bool) -> (Option<Untracked>, bool) {
    (Some(Untracked { failure, stays }), false)
}

#[test]
fn a_file_that_was_given_up_is_begun_anew_and_lists_what_is_being_changed_then() {
    let mut disk = Disk::gone();
    assert_eq!((disk.tells(), disk.local.len(), disk.alarms.len()), (told(FULL, false), 1, 1));
    // Nothing waits for a record, of another extent or of one whose record was lost.
    disk.write(20);
    disk.write(2);
    assert!(disk.asked.is_empty());
    assert_eq!(disk.local.len(), 3);
    assert_eq!(disk.at_the_deadline(), 5000);
    let (making, first) = disk.only_make();
    assert!(first.everything && first.generation == 1, "true whenever it comes into its place: {first:?}");
    // Nor does one that begins meanwhile.
    disk.write(40);
    assert!(disk.asked.is_empty());
    assert_eq!(disk.local.len(), 4);
    disk.ends(making, Ok(()));
    assert_eq!(disk.tells(), told(FULL, false), "a crash would mean a compare of everything still");
    let (io, second) = disk.only_snapshot();
    assert!(!second.everything && second.generation == 2 && second.log_from == 1, "{second:?}");
    let listed: Vec<ExtentRun> = [0, 5, 10].map(|first| ExtentRun { first, count: 1 }).into();
    assert_eq!(second.hot, listed, "all that are being changed");
    disk.ends(io, Ok(()));
    assert_eq!(disk.tells(), (None, true));
    (0..4).for_each(|_| disk.changed());
    assert_eq!((disk.answers.as_slice(), disk.alarms.len()), ([true; 4].as_slice(), 1));
    // From here on it is as it was.
    disk.write(60);
    let (io, record) = disk.only_record();
    assert_eq!((record.sequence, disk.local.len()), (1, 0));
    disk.ends(io, Ok(()));
    assert_eq!(disk.local.len(), 1);
}

/// Of a snapshot that lists extents it is not known yet whether it is there.
#[test]
fn a_cold_extent_waits_for_a_record_while_the_first_snapshot_that_knows_better_is_written() {
    let mut disk = Disk::gone();
    disk.at_the_deadline();
    let (making, _) = disk.only_make();
    disk.ends(making, Ok(()));
    let (snapshot, _) = disk.only_snapshot();
    let before = disk.local.len();
    disk.write(20);
    let (record, _) = disk.only_record();
    assert_eq!(disk.local.len(), before, "not before it is in the file");
    disk.ends(record, Ok(()));
    assert_eq!(disk.local.len(), before + 1);
    disk.ends(snapshot, Ok(()));
}

#[test]
fn a_file_is_not_begun_anew_while_something_is_under_way_to_the_old_one() {
    let mut disk = Disk::new();
    disk.write(3);
    let (lost, _) = disk.only_record();
    // A resync that compares everything has to be in the file.
    disk.filter.force_resync(at(2), crate::ResyncKind::Compare);
    disk.hear();
    let (late, _) = disk.only_snapshot();
    disk.ends(lost, Err(FULL));
    let removal = disk.only_remove();
    disk.ends(removal, Ok(()));
    assert_eq!(disk.filter.next_deadline(), None, "nothing is due before it has ended");
    disk.now = 60_000;
    disk.filter.tick(at(disk.now));
    disk.hear();
    assert!(disk.asked.is_empty());
    // However it ends: it was another file.
    disk.ends(late, Err(READ_ONLY));
    assert_eq!(disk.tells(), told(FULL, false));
    let (making, first) = disk.only_make();
    assert!(first.everything);
    disk.ends(making, Ok(()));
    // That is what there is to say of a disk that has to be compared whole.
    assert!(disk.asked.is_empty());
    assert_eq!(disk.tells(), (None, true));
}

#[test]
fn where_there_is_no_room_it_is_tried_less_and_less_often_and_nobody_waits() {
    let mut disk = Disk::gone();
    let mut pauses = Vec::new();
    for _ in 0..5 {
        pauses.push(disk.at_the_deadline());
        let (making, _) = disk.only_make();
        disk.write(8 + 8 * pauses.len() as u64);
        assert_eq!((disk.asked.len(), disk.local.len()), (0, 1 + pauses.len()));
        disk.ends(making, Err(READ_ONLY));
        assert_eq!(disk.tells(), told(READ_ONLY, false));
    }
    assert_eq!(pauses, [5000, 10_000, 20_000, 30_000, 30_000]);
    assert_eq!(disk.alarms.len(), 1, "it was told once: {:?}", disk.alarms);
    // One that fails again soon is not begun anew sooner, one that lasts is.
    for (lasts, pause) in [(29_000, 30_000), (30_000, 5000)] {
        disk.at_the_deadline();
        let (making, _) = disk.only_make();
        disk.ends(making, Ok(()));
        let (snapshot, _) = disk.only_snapshot();
        disk.now += lasts;
        disk.ends(snapshot, Err(FULL));
        let removal = disk.only_remove();
        disk.ends(removal, Ok(()));
        assert_eq!(disk.tells(), told(FULL, false));
        let due = disk.filter.next_deadline().expect("it is tried again").as_millis();
        assert_eq!(due, u128::from(disk.now + pause), "it lasted {lasts} ms");
    }
    assert_eq!(disk.alarms.len(), 1, "nothing was as it should be in between: {:?}", disk.alarms);
}

#[test]
fn a_file_that_cannot_be_removed_refuses_cold_extents_until_it_can() {
    let mut disk = Disk::new();
    disk.write(3);
    let (record, _) = disk.only_record();
    disk.ends(record, Err(FULL));
    for round in 1..=3 {
        let removal = disk.only_remove();
        disk.ends(removal, Err(READ_ONLY));
        assert_eq!((disk.tells(), disk.alarms.len()), (told(READ_ONLY, true), 2));
        assert_eq!(
            (disk.answers.len(), disk.local.len()),
            (round, 0),
            "what is not in the file is not changed"
        );
        disk.write(4 * round as u64);
    }
    let removal = disk.only_remove();
    disk.ends(removal, Ok(()));
    assert_eq!((disk.tells(), disk.local.len()), (told(READ_ONLY, false), 1));
    assert_eq!(disk.answers, [false; 3]);
    // Nobody has to ask.
    disk.at_the_deadline();
    let (making, _) = disk.only_make();
    disk.ends(making, Ok(()));
    let (snapshot, said) = disk.only_snapshot();
    assert_eq!(said.hot, [ExtentRun { first: 3, count: 1 }], "what was refused is not being changed");
    disk.ends(snapshot, Ok(()));
    assert_eq!(disk.tells(), (None, true));
}

/// It would come into the place of what the detach leaves there.
#[test]
fn a_detach_waits_for_a_file_that_is_removed_or_made() {
    let mut disk = Disk::new();
    disk.write(3);
    let (record, _) = disk.only_record();
    disk.ends(record, Err(FULL));
    let removal = disk.only_remove();
    disk.ends(removal, Err(FULL));
    assert!(disk.filter.is_quiet());
    assert_eq!(disk.at_the_deadline(), 5000);
    let removal = disk.only_remove();
    assert!(!disk.filter.is_quiet(), "it is removed");
    disk.ends(removal, Ok(()));
    assert!(disk.filter.is_quiet());
    disk.at_the_deadline();
    let (making, _) = disk.only_make();
    assert!(!disk.filter.is_quiet(), "one is made");
    disk.ends(making, Err(FULL));
    assert!(disk.filter.is_quiet());
    disk.filter.detach(at(disk.now));
    assert_eq!(disk.filter.next_deadline(), None);
    disk.now += 60_000;
    disk.filter.tick(at(disk.now));
    disk.hear();
    assert!(disk.asked.is_empty());
}

/// What was under way to the file says nothing of the one that the detach has left in its place.
#[test]
fn what_fails_after_a_detach_removes_nothing() {
    let mut disk = Disk::new();
    disk.filter.force_resync(at(2), crate::ResyncKind::Compare);
    disk.hear();
    let (snapshot, _) = disk.only_snapshot();
    disk.filter.detach(at(3));
    disk.ends(snapshot, Err(FULL));
    assert!(disk.asked.is_empty() && disk.alarms.is_empty());
}

#[test]
fn only_what_the_drawing_shows_can_happen_to_the_file() {
    let (io, second) = (IoId(1), Duration::from_secs(1));
    let kept = File::Kept { since: second };
    let failed = |removal| File::Failed { removal, at: second };
    let gone = |making| File::Gone { making, at: second };
    let files = [kept, failed(None), failed(Some(io)), gone(None), gone(Some(io))];
    let events = [
        FileEvent::WriteFailed(FULL),
        FileEvent::Removing(io),
        FileEvent::Removed(Ok(())),
        FileEvent::Removed(Err(FULL)),
        FileEvent::Making(io),
        FileEvent::Made(Ok(())),
        FileEvent::Made(Err(FULL)),
    ];
    let to = |seconds| Duration::from_secs(seconds);
    let mut edges = Vec::new();
    for (from, file) in files.into_iter().enumerate() {
        for (number, event) in events.into_iter().enumerate() {
            let after = std::panic::catch_unwind(|| {
                let mut standing = Standing { file, ..Standing::new(to(5)) };
                standing.next(event, to(3));
                standing.file
            });
            edges.extend(after.ok().map(|after| (from, number, after)));
        }
    }
    let expected = [
        (0, 0, File::Failed { removal: None, at: to(3) }),
        (1, 0, failed(None)),
        (1, 1, failed(Some(io))),
        (2, 0, failed(Some(io))),
        (2, 2, File::Gone { making: None, at: to(8) }),
        (2, 3, File::Failed { removal: None, at: to(8) }),
        (3, 0, gone(None)),
        (3, 4, gone(Some(io))),
        (4, 0, gone(Some(io))),
        (4, 5, File::Kept { since: to(3) }),
        (4, 6, File::Gone { making: None, at: to(8) }),
    ];
    assert_eq!(edges, expected);
}
