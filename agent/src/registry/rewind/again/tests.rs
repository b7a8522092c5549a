//! A disk whose attach fails once it lacks blocks of the point.

use std::path::{Path, PathBuf};

use backtide_control::ErrorCode;
use backtide_hydration::{Header, Kind, SourcePoint};
use backtide_storage::MemoryStorage;
use backtide_tracking::DirtyBitmap;
use backtide_units::{BlockCount, ByteCount, CaptureTime, HistoryId, Lsn};

use super::{
    super::{
        super::{
            leave::end_unless_open,
            tests::{registry_on, request_for},
        },
        have_hydration,
    },
    *,
};
use crate::disk::{Leaving, trust};

const SIZE: u64 = 1 << 20;

/// Lets the n-th of something fail.
type Fault = fn(&MemoryStorage, u64);

/// A disk that was let go of and lacks blocks, and whose agent keeps what it knows in `storage`.
struct LetGo {
    directory: tempfile::TempDir,
    storage: MemoryStorage,
    registry: Arc<Registry>,
    name: DiskName,
}

impl LetGo {
    async fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let storage = MemoryStorage::new();
        let registry = registry_on(directory.path(), Arc::new(storage.clone()));
        let image = directory.path().join("vm1.img");
        std::fs::File::create(&image).unwrap().set_len(SIZE).unwrap();
        let name = registry.attach(request_for(&image)).await.unwrap().name;
        let attached = registry.disks.write().await.remove(&name).unwrap();
        let leaving = Leaving::SetBack { clients_max: Some(0) };
        let open = end_unless_open(name.clone(), attached, registry.records.clone(), leaving).await;
        assert!(open.is_none());
        Self { directory, storage, registry, name }
    }

    fn beside(&self, suffix: &str) -> PathBuf {
        self.directory.path().join(format!("vm1.img.backtide-incomplete{suffix}"))
    }

    /// As a rewind leaves it that is about to attach the disk again.
    fn made(&self, earlier: Option<(Header, DirtyBitmap, bool)>) -> Made {
        let records = &self.registry.records;
        let record = records.load(&self.name).unwrap().unwrap();
        let header = header(&record, self.directory.path(), 40);
        let reserved = disk::reserve_note(&record, &header).unwrap();
        have_hydration(records, &self.name, header.clone(), DirtyBitmap::of((0..4).into())).unwrap();
        let (from, changed, source) = (header.before, header.total, header.source.clone());
        let noted = Some(Noted { record, header, as_it_was: earlier, _reserved: reserved });
        Made { from, source, changed, noted }
    }

    async fn has_again(&self, made: Made) -> (Result<DiskStatus, ApiError>, bool) {
        let claim = self.registry.claim(&self.name).await.unwrap();
        let mut lacks = false;
        let again = self.registry.has_again(&claim, &self.name, Ok(made), &mut lacks).await;
        (again.map(|(_, disk)| disk), lacks)
    }

    fn lacked(&self) -> Option<(Header, DirtyBitmap)> {
        let file = self.registry.records.open_hydration(&self.name, trust::boot_id()).unwrap();
        file.map(|file| (file.header().clone(), file.missing()))
    }

    async fn is_served(&self) -> bool {
        self.registry.disks.read().await.contains_key(&self.name)
    }
}

fn header(record: &DiskRecord, directory: &Path, lsn: u64) -> Header {
    let source = SourcePoint {
        receiver: "unix:/run/nobody.sock".to_owned(),
        disk: record.uuid,
        name: record.name.clone(),
        history: HistoryId::random(),
        lsn: Lsn(lsn),
        time: CaptureTime(7),
        size: ByteCount(SIZE),
    };
    let inode = crate::record::ImageStamp::of(&directory.join("vm1.img")).unwrap().inode;
    let (disk, boot, epoch, before) = (record.uuid, trust::boot_id(), record.epoch, Lsn(90));
    let (kind, total, compare) = (Kind::Rewind, BlockCount(4), false);
    Header { disk, kind, boot, epoch, inode, before, total, compare, source }
}

#[tokio::test]
async fn a_rewind_that_cannot_be_attached_does_not_happen_later() {
    let disk = LetGo::new().await;
    let made = disk.made(None);
    // In the place of the note, which was reserved, and no more.
    std::fs::remove_file(disk.beside(".new")).unwrap();
    std::fs::create_dir(disk.beside(".new")).unwrap();
    let (again, lacks) = disk.has_again(made).await;
    let error = again.unwrap_err();
    assert!(error.message.starts_with("disk vm1 is not set back, and as it was: cannot write "), "{error}");
    assert!(!lacks && disk.lacked().is_none() && !disk.beside("").exists());
    assert!(disk.is_served().await && disk.registry.failing().await.is_empty());
    disk.registry.shut_down().await;
}

/// With every write and every sync of the state directory that can fail.
#[tokio::test]
async fn whatever_fails_of_the_attach_a_rewind_that_failed_is_taken_back() {
    let faults: [(&str, Fault); 2] =
        [("write", MemoryStorage::fail_write_after), ("sync", MemoryStorage::fail_sync_after)];
    for (fault, fail) in faults {
        let mut failed = 0;
        for nth in 0..12 {
            let disk = LetGo::new().await;
            let made = disk.made(None);
            fail(&disk.storage, nth);
            let (again, lacks) = disk.has_again(made).await;
            let record = disk.registry.records.load(&disk.name).unwrap().unwrap();
            assert!(disk.is_served().await, "{fault} {nth}: {again:?}");
            assert!(!disk.beside(".new").exists());
            if let Ok(status) = &again {
                assert!(status.hydration.is_some() && lacks && disk.lacked().is_some());
                assert!(record.rewound.is_some() && disk.beside("").exists());
                disk.registry.shut_down().await;
                continue;
            }
            failed += 1;
            let error = again.unwrap_err();
            assert!(error.message.starts_with("disk vm1 is not set back, and as it was: "), "{error}");
            assert!(!lacks && disk.lacked().is_none(), "{fault} {nth}: {error}");
            assert!(record.rewound.is_none() && !disk.beside("").exists(), "{fault} {nth}: {error}");
            disk.registry.shut_down().await;
        }
        assert!((3..12).contains(&failed), "those of the attach: {fault} {failed}");
    }
}

#[tokio::test]
async fn what_cannot_be_taken_back_is_said_to_happen() {
    let disk = LetGo::new().await;
    let made = disk.made(None);
    disk.storage.cut_power_after(0);
    let (again, lacks) = disk.has_again(made).await;
    let error = again.unwrap_err();
    assert!(error.message.contains("disk vm1 cannot be attached"), "{error}");
    assert!(error.message.contains("IS SET BACK when it can be"), "{error}");
    disk.storage.answer_again();
    assert!(lacks && disk.lacked().is_some() && !disk.is_served().await);
    assert!(!disk.registry.restore().await.unwrap());
    let (_, handle) = disk.registry.find(&disk.name).await.unwrap();
    assert!(handle.status().await.unwrap().hydration.is_some());
    disk.registry.shut_down().await;
}

#[tokio::test]
async fn a_disk_that_lacked_blocks_before_lacks_the_same_ones_again() {
    for is_settled in [true, false] {
        let disk = LetGo::new().await;
        let record = disk.registry.records.load(&disk.name).unwrap().unwrap();
        let (earlier, missing) =
            (header(&record, disk.directory.path(), 20), DirtyBitmap::of((9..11).into()));
        let made = disk.made(Some((earlier.clone(), missing.clone(), is_settled)));
        disk.storage.fail_write_after(0);
        let (again, lacks) = disk.has_again(made).await;
        let error = again.unwrap_err();
        assert_eq!(error.code, ErrorCode::Failed, "{error}");
        assert_eq!(error.message.contains("is not set back, and as it was"), is_settled, "{error}");
        assert_eq!(lacks, !is_settled);
        let lacked = disk.lacked().unwrap();
        assert_eq!(lacked == (earlier, missing), is_settled, "{lacked:?}");
        disk.registry.shut_down().await;
    }
}
