use std::{path::Path, sync::Arc};

use backtide_hydration::{Header, Kind, SourcePoint};
use backtide_storage::RealStorage;
use backtide_tracking::{SavedTracking, Snapshot};
use backtide_units::{BlockCount, BlockIndex, CaptureTime, HistoryId, Lsn};

use super::*;
use crate::{
    disk::{
        open::{self, Behind},
        source::{Remote, Sources},
        trust,
    },
    record::{ImageStamp, Records},
};

const PIECES: u64 = 3;
const SIZE: ByteCount = ByteCount(PIECES * CACHED_AS_ONE);

/// What the agent that had the disk last has left of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Left {
    /// All blocks are known.
    Known,
    /// After a flush that failed the one block may be on the device or not.
    InDoubt,
    /// The same of a disk that has grown since.
    InDoubtAndGrown,
    /// The same of a disk that somebody else may have changed since.
    InDoubtAndTouched,
    /// The same of a disk of which nothing else is known.
    InDoubtAndUnknown,
    /// The detach's own flush has failed.
    NotFlushed,
    /// It lacks the one block, unless the image holds it: it has come back.
    ComparedWithThePoint,
    /// It lacks the one block, whatever the image holds.
    Lacking,
}

/// The one block: in the middle of the 64 KiB at the beginning of the second piece.
fn block() -> BlockRange {
    let index = (CACHED_AS_ONE + (32 << 10)) / BlockCount(1).bytes().0;
    BlockRange::between(BlockIndex(index), BlockIndex(index + 1))
}

fn hydration(record: &DiskRecord, inode: u64, compare: bool) -> Header {
    let source = SourcePoint {
        receiver: record.receiver.to_string(),
        disk: record.uuid,
        name: record.name.clone(),
        history: record.history.unwrap(),
        lsn: Lsn(40),
        time: CaptureTime(7),
        size: SIZE,
    };
    Header {
        disk: record.uuid,
        kind: Kind::Failover,
        boot: trust::boot_id(),
        epoch: record.epoch,
        inode,
        before: Lsn::ZERO,
        total: BlockCount(1),
        compare,
        source,
    }
}

/// Writes down what was left of the disk, whose image is at `path`.
fn leave(left: Left, records: &Records, path: &Path) -> DiskRecord {
    let receiver = "unix:/run/r.sock".parse().unwrap();
    let record = DiskRecord::new("vm1".parse().unwrap(), path.display().to_string(), receiver);
    let stamp = ImageStamp::of(path).unwrap();
    let inode = stamp.inode;
    let touched = ImageStamp { modified_ns: stamp.modified_ns - 1, ..stamp.clone() };
    let record = DiskRecord {
        history: Some(HistoryId::random()),
        size: if left == Left::InDoubtAndGrown { ByteCount(SIZE.0 - CACHED_AS_ONE) } else { SIZE },
        image_at_detach: Some(if left == Left::InDoubtAndTouched { touched } else { stamp }),
        flush_failed: left == Left::NotFlushed,
        ..record
    };
    let known = SavedTracking { history: record.history, ..SavedTracking::unknown(record.uuid) };
    let in_doubt = SavedTracking { dirty: DirtyBitmap::of(block()), ..known.clone() };
    let snapshot = match left {
        Left::InDoubt | Left::InDoubtAndGrown | Left::InDoubtAndTouched => {
            Snapshot::first(in_doubt, true, false)
        }
        // What is known to differ is not in doubt.
        Left::Known => Snapshot::first(SavedTracking { compare: false, ..in_doubt }, true, false),
        Left::InDoubtAndUnknown => Snapshot::first(in_doubt, false, true),
        Left::NotFlushed => Snapshot::first(SavedTracking::unknown(record.uuid), false, true),
        Left::ComparedWithThePoint | Left::Lacking => Snapshot::first(known, true, false),
    };
    let limits = open::activity_limits(&record, record.size);
    records.create_tracking(&record.name, limits, record.size, &snapshot).unwrap();
    if matches!(left, Left::ComparedWithThePoint | Left::Lacking) {
        let header = hydration(&record, inode, left == Left::ComparedWithThePoint);
        records.create_hydration(&record.name, header, DirtyBitmap::of(block())).unwrap();
    }
    record
}

/// Whether these 4 KiB of an image that was just written and synced are in the page cache still, after its disk was opened.
async fn is_cached(left: Left, at: u64) -> bool {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.raw");
    std::fs::File::create(&path).unwrap().set_len(SIZE.0).unwrap();
    let image = ImageFile::open(&path).unwrap();
    for piece in 0..PIECES {
        image.write_at(ByteOffset(piece * CACHED_AS_ONE), &[7; 64 << 10]).unwrap();
    }
    image.sync().unwrap();
    image.unlock().unwrap();
    drop(image);
    let records = Records::new(Arc::new(RealStorage::open(&directory.path().join("records")).unwrap()));
    let record = leave(left, &records, &path);
    let sources: Arc<dyn Sources> = Arc::new(Remote);
    let (behind, stamp) = (path.display().to_string(), ImageStamp::of(&path));
    let (_, opened) = open::open(&records, record, &behind, stamp, &sources).await.unwrap();
    let Behind::Image(image) = opened.behind else { panic!("it is a file") };
    let range = ByteRange::new(ByteOffset(at), ByteCount(4096)).unwrap();
    image.try_read(range).unwrap().is_some()
}

/// The same of many attempts: a page that something else of the kernel looks at for that moment stays.
async fn stays_cached(left: Left, at: u64) -> bool {
    for _ in 0..20 {
        if !is_cached(left, at).await {
            return false;
        }
    }
    true
}

/// Where nothing is behind the page cache nothing can be let go.
fn is_in_memory() -> bool {
    rustix::fs::statfs(std::env::temp_dir()).unwrap().f_type == 0x0102_1994
}

#[tokio::test]
async fn what_is_in_doubt_is_read_from_the_device_whatever_becomes_of_what_was_left() {
    let at = CACHED_AS_ONE + (32 << 10);
    for left in [
        Left::InDoubt,
        Left::InDoubtAndGrown,
        Left::InDoubtAndTouched,
        Left::InDoubtAndUnknown,
        Left::NotFlushed,
        Left::ComparedWithThePoint,
    ] {
        assert_eq!(stays_cached(left, at).await, is_in_memory(), "{left:?}");
    }
    for left in [Left::Known, Left::Lacking] {
        assert!(is_cached(left, at).await, "{left:?}: nobody compares it");
    }
}

#[tokio::test]
async fn it_is_read_with_all_that_the_page_cache_may_keep_with_it_and_no_more() {
    // A look of its own for each: one may read ahead what the next looks for.
    for at in [CACHED_AS_ONE, CACHED_AS_ONE + (60 << 10)] {
        assert_eq!(stays_cached(Left::InDoubt, at).await, is_in_memory(), "{at}");
    }
    for at in [60 << 10, 2 * CACHED_AS_ONE] {
        assert!(is_cached(Left::InDoubt, at).await, "{at}: of another piece");
        assert_eq!(stays_cached(Left::NotFlushed, at).await, is_in_memory(), "{at}: all of it is in doubt");
    }
}
