//! What becomes of a hydration file that cannot be put in place.

use backtide_storage::MemoryStorage;
use backtide_units::{ByteCount, CaptureTime, DiskId, HistoryId};

use super::*;

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
