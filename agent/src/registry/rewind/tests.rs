//! What becomes of a hydration file that cannot be put in place.

use std::rc::Rc;

use backtide_storage::MemoryStorage;
use backtide_units::{ByteCount, CaptureTime, DiskId, HistoryId, LogPosition};

use super::{super::tests::registry, *};
use crate::disk::{
    Dialer,
    source::{Fetching, PointSource, Sources, fake::FakeSource},
};

fn header() -> Header {
    let disk = DiskId::random();
    let source = SourcePoint {
        receiver: "unix:/run/receiver.sock".to_owned(),
        disk,
        name: "vm1".parse().unwrap(),
        history: HistoryId::random(),
        lsn: Lsn(40),
        time: CaptureTime(7),
        size: ByteCount(1 << 20),
    };
    let (kind, boot, epoch, before) = (Kind::Rewind, trust::boot_id(), Epoch(1), Lsn(90));
    Header { disk, kind, boot, epoch, inode: 1, before, total: BlockCount(4), compare: false, source }
}

#[test]
fn a_file_that_failed_once_it_had_its_name_counts_and_one_that_failed_before_does_not() {
    let disk: DiskName = "vm1".parse().unwrap();
    let mut ends = Vec::new();
    for syncs in 0..3 {
        let storage = MemoryStorage::new();
        let records = Records::new(Arc::new(storage.clone()));
        storage.fail_sync_after(syncs);
        let made = have_hydration(&records, &disk, header(), DirtyBitmap::of((0..4).into()));
        let there = records.open_hydration(&disk, trust::boot_id()).unwrap();
        assert_eq!(made.is_ok(), there.is_some(), "{made:?}");
        ends.push(made.is_ok());
    }
    // The file's own sync, that of its name, and neither.
    assert_eq!(ends, [false, true, true]);
}

#[test]
fn a_disk_that_is_taken_meanwhile_is_not_set_back() {
    let receiver = "unix:/run/receiver.sock".parse().unwrap();
    let mut record = DiskRecord::new("vm1".parse().unwrap(), "/images/vm1.raw".to_owned(), receiver);
    record.epoch = Epoch(3);
    let goal = record.epoch;
    assert!(refuse_taken(&record, goal).is_ok());
    record.fence(Epoch(4));
    assert_eq!(refuse_taken(&record, goal).unwrap_err().code, ErrorCode::Fenced);
}

/// A receiver whose log of the disk goes so far only.
struct PutBack(Lsn, LogPosition);

impl PutBack {
    fn point(&self) -> Rc<dyn PointSource> {
        let source = FakeSource::new(vec![0; 1 << 20]);
        source.ends_at(self.0, self.1);
        Rc::new(source)
    }
}

impl Sources for PutBack {
    fn open(&self, _point: SourcePoint, _dialer: Dialer) -> Rc<dyn PointSource> {
        self.point()
    }

    fn find(
        &self,
        _dialer: Dialer,
        _disk: DiskId,
        _history: Option<HistoryId>,
        _lsn: Option<Lsn>,
    ) -> Fetching<'static, Rc<dyn PointSource>> {
        let point = self.point();
        Box::pin(async move { Ok(point) })
    }
}

#[tokio::test]
async fn a_receiver_that_has_less_than_it_had_when_the_disk_was_let_go_of_does_not_tell_what_differs() {
    let directory = tempfile::tempdir().unwrap();
    let receiver = "unix:/run/receiver.sock".parse().unwrap();
    let record = DiskRecord::new("vm1".parse().unwrap(), "/images/vm1.raw".to_owned(), receiver);
    let record = DiskRecord { size: ByteCount(1 << 20), ..record };
    let (history, keeper) = (HistoryId::random(), "rewind".to_owned());
    let goal = Goal { history, to: Lsn(40), force: false, keeper, epoch: record.epoch };
    let left = SavedTracking {
        last_lsn: Lsn(100),
        acked_durable: Lsn(100),
        acked_position: LogPosition(10),
        reason: None,
        ..SavedTracking::unknown(record.uuid)
    };
    for (end, is_all) in [
        (PutBack(Lsn(100), LogPosition(10)), true),
        (PutBack(Lsn(99), LogPosition(10)), false),
        // What a pass brought has no LSN of its own.
        (PutBack(Lsn(100), LogPosition(9)), false),
    ] {
        let mut registry = registry(directory.path());
        Arc::get_mut(&mut registry).unwrap().sources = Arc::new(end);
        for since in [Since::of(&left, false), Since::of(&left, true)] {
            let planned = registry.plan(&record, &goal, since, Some(&left)).await;
            assert_eq!(planned.is_ok(), is_all, "{since:?}");
        }
    }
}
