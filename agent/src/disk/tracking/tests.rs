//! A state directory that is full for a while, under a disk with a guest.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use backtide_agent_api::DiskStatus;
use backtide_io_filter::{IoFailure, Resume};
use backtide_storage::{MemoryStorage, RealStorage};
use backtide_tracking::{DirtyBitmap, ExtentRun, Loaded, LogRecord, SavedTracking};
use backtide_units::{BlockCount, BlockRange, ByteOffset, CaptureTime, HistoryId};
use uuid::Uuid;

use super::*;
use crate::{
    disk::{tests::Started, trust},
    record::{DiskRecord, ImageStamp},
};

const SIZE: ByteCount = ByteCount(1 << 20);
const EXTENT: BlockCount = BlockCount(16);

/// The state directory, and the image.
struct State {
    storage: MemoryStorage,
    image: PathBuf,
}

impl State {
    fn new(directory: &Path) -> Self {
        let image = directory.join("vm1.img");
        std::fs::File::create(&image).unwrap().set_len(SIZE.0).unwrap();
        Self { storage: MemoryStorage::new(), image }
    }

    fn records(&self) -> Records {
        Records::new(Arc::new(self.storage.clone()))
    }

    fn loaded(&self) -> Option<Loaded> {
        self.records().load_tracking(&"vm1".parse().unwrap()).unwrap()
    }

    /// Also when something of it is removed. What is there already may be written again, but not now.
    fn is_full(&self) {
        self.storage.set_capacity(Some(ByteCount(1)));
        self.storage.fail_write_after(0);
    }

    fn has_room(&self) {
        self.storage.set_capacity(None);
    }

    /// A disk that was detached in sync, and what it has left.
    fn detached(&self, record: DiskRecord) -> DiskRecord {
        let image_at_detach = ImageStamp::of(&self.image);
        let history = Some(HistoryId(Uuid::from_u128(5)));
        let record = DiskRecord { history, size: SIZE, image_at_detach, ..record };
        let saved = SavedTracking { history, ..SavedTracking::unknown(record.uuid) };
        let (limits, snapshot) = (ActivityLimits::default(), Snapshot::first(saved, true, false));
        self.records().create_tracking(&record.name, limits, SIZE, &snapshot).unwrap();
        record
    }

    /// That is attached again.
    async fn attached(&self) -> Started {
        let set = |settings: &mut backtide_io_filter::Settings| {
            (settings.activity.extent, settings.activity.anew) = (EXTENT, Duration::from_millis(20));
        };
        let directory = self.image.parent().unwrap();
        Started::kept_in(self.records(), directory, |record| self.detached(record), set).await
    }

    /// What would be compared if the agent was killed now; none when everything.
    fn after_a_crash(&self) -> Option<DirtyBitmap> {
        let records = self.records();
        let record = records.load(&"vm1".parse().unwrap()).unwrap().unwrap();
        let left = records.load_tracking(&record.name);
        match trust::resume(&record, left, ImageStamp::of(&self.image).as_ref(), SIZE) {
            Resume::Crashed { candidates, .. } => Some(candidates),
            Resume::Lost { .. } => None,
            other => panic!("it was killed: {other:?}"),
        }
    }
}

async fn until(disk: &Started, reached: impl Fn(&DiskStatus) -> bool) -> DiskStatus {
    loop {
        let status = disk.handle.status().await.unwrap();
        if reached(&status) {
            return status;
        }
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_full_state_directory_costs_the_tracking_until_there_is_room_and_the_guest_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let state = State::new(directory.path());
    let disk = state.attached().await;
    let guest = disk.guest().await;
    let write = async |block: u64| {
        guest.write(ByteOffset(block * 4096), vec![0x11; 4096].into(), false).await.unwrap();
    };
    let status = disk.handle.status().await.unwrap();
    assert_eq!((status.untracked, status.dirty.hot_extents), (None, Some(0)));
    let mut written = Vec::new();
    // One may fail that renews the sign of life.
    for block in (3..).step_by(48) {
        state.is_full();
        write(block).await;
        written.push(block);
        if disk.handle.status().await.unwrap().untracked.is_some() {
            break;
        }
    }
    let is_full = |told: &String| told.contains("vm1.tracking cannot be written: No space left on device");
    let status = until(&disk, |status| status.untracked.as_ref().is_some_and(is_full)).await;
    assert_eq!(status.dirty.hot_extents, None);
    assert_eq!((state.loaded(), state.after_a_crash()), (None, None), "everything is compared");
    // That is to be found later, too.
    write(100).await;
    state.has_room();
    let status = until(&disk, |status| status.untracked.is_none()).await;
    assert!(status.dirty.hot_extents.is_some());
    write(200).await;
    let candidates = state.after_a_crash().expect("what differs is known again");
    written.extend([100, 200]);
    for first in written {
        let block: BlockRange = (first..first + 1).into();
        assert!(candidates.contains(block), "{first}: {candidates:?}");
    }
    assert!(!candidates.touches((240..256).into()), "not all of it: {candidates:?}");
    drop(guest);
    disk.end().await;
    assert!(state.loaded().unwrap().clean);
}

#[tokio::test]
async fn a_file_that_can_neither_be_written_nor_removed_is_the_trouble_by_which_writes_fail() {
    let directory = tempfile::tempdir().unwrap();
    let state = State::new(directory.path());
    let disk = state.attached().await;
    let guest = disk.guest().await;
    let write = async || guest.write(ByteOffset(3 * 4096), vec![0x11; 4096].into(), false).await;
    state.storage.cut_power_after(0);
    write().await.unwrap_err();
    let status = disk.handle.status().await.unwrap();
    let told = status.untracked.expect("it cannot be written");
    assert!(told.contains("vm1.tracking can neither be written nor removed: "), "{told}");
    assert_eq!(status.local_error, Some(told));
    state.storage.answer_again();
    write().await.unwrap();
    let status = until(&disk, |status| status.local_error.is_none()).await;
    assert!(status.untracked.is_none_or(|told| told.contains("costs a compare of the whole disk")));
    until(&disk, |status| status.untracked.is_none()).await;
    drop(guest);
    disk.end().await;
}

/// A file in whose place nothing else is.
fn tracking(records: Records, sign: SignOfLife) -> Rc<Tracking> {
    let disk = "vm1".parse().unwrap();
    let limits = ActivityLimits::default();
    let snapshot = Snapshot::first(SavedTracking::unknown(backtide_units::DiskId::random()), false, true);
    let file = records.create_tracking(&disk, limits, SIZE, &snapshot).unwrap();
    Tracking::new((file, sign), (limits, SIZE), records, disk, None).0
}

#[tokio::test]
async fn a_file_that_is_begun_anew_has_the_sign_of_life_and_room_for_what_comes_first() {
    let directory = tempfile::tempdir().unwrap();
    let state = State::new(directory.path());
    let sign = trust::alive_since(ImageStamp::of(&state.image).as_ref(), CaptureTime(1));
    let tracking = tracking(state.records(), sign);
    let later = SignOfLife { captured: CaptureTime(2), ..sign };
    tracking.renew(later).await.unwrap();
    let snapshot = state.loaded().unwrap().snapshot;
    tracking.carry_out(TrackingOp::Discard).await.unwrap();
    assert_eq!(state.loaded(), None);
    state.is_full();
    tracking.carry_out(TrackingOp::Begin(Box::new(snapshot.clone()))).await.unwrap_err();
    assert_eq!((state.loaded(), state.storage.files().len()), (None, 0), "nothing is left of it");
    state.has_room();
    tracking.carry_out(TrackingOp::Begin(Box::new(snapshot.clone()))).await.unwrap();
    assert_eq!(state.loaded().unwrap().alive, Some(later));
    let before = state.storage.counts().writes;
    let record = LogRecord { sequence: 1, runs: vec![ExtentRun { first: 0, count: 1 }] };
    tracking.carry_out(TrackingOp::Record(record)).await.unwrap();
    assert_eq!(state.storage.counts().writes - before, 1, "it makes no room for the next");
    let last = SignOfLife { captured: CaptureTime(3), ..later };
    tracking.renew(last).await.unwrap();
    let loaded = state.loaded().unwrap();
    assert_eq!((loaded.alive, loaded.hot.is_empty()), (Some(last), false), "all of it is in the new one");
}

#[test]
fn what_is_told_of_a_file_that_is_not_kept_names_it_and_the_way_out() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let records = Records::new(Arc::new(RealStorage::open(directory).unwrap()));
    let tracking = tracking(records, trust::alive_since(None, CaptureTime(1)));
    let told = |errno, stays| tracking.told(Untracked { failure: IoFailure { errno }, stays });
    let file = directory.join("vm1.tracking");
    let file = file.display();
    assert_eq!(
        told(28, false),
        format!(
            "the tracking file {file} cannot be written: No space left on device (os error 28): a crash of the agent costs a compare of the whole disk; make room there, and a new one is begun by itself"
        )
    );
    assert_eq!(
        told(30, true),
        format!(
            "the tracking file {file} can neither be written nor removed: Read-only file system (os error 30): writes to where nothing was written lately fail; have it written to again, and they succeed again"
        )
    );
}
