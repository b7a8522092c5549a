use std::{
    io,
    path::{Path, PathBuf},
};

use backtide_hydration::{Header, Kind};
use backtide_storage::{ImageFile, MemoryStorage, RealStorage, Storage};
use backtide_units::{ByteCount, ByteOffset, CaptureTime, DiskId, Epoch, HistoryId, Lsn};
use bytes::Bytes;
use tokio::task::{JoinHandle, LocalSet, spawn_local};
use uuid::Uuid;

use super::*;
use crate::{
    config::IoEngine,
    disk::{image_disk::ImageDisk, source::fake::FakeSource},
};

pub(super) const BLOCK: u64 = 4096;
pub(super) const BLOCKS: u64 = 600;
/// The last block is a short one.
pub(super) const SIZE: u64 = BLOCKS * BLOCK - 512;
pub(super) const FILE: &str = "vm1.hydration";

/// A disk whose every block is missing, but the first ten; a directory it lies in.
struct Bench {
    directory: tempfile::TempDir,
    source: Rc<FakeSource>,
    disk: Rc<HydratingDisk>,
}

/// What the point holds: some blocks of zeroes among others.
pub(super) fn at_point() -> Vec<u8> {
    (0..SIZE).map(|at| if at / BLOCK % 7 == 3 { 0 } else { (at / BLOCK % 200) as u8 + 1 }).collect()
}

pub(super) fn boot() -> Uuid {
    Uuid::from_bytes([1; 16])
}

pub(super) fn bytes(range: std::ops::Range<u64>) -> ByteRange {
    ByteRange::between(ByteOffset(range.start), ByteOffset(range.end))
}

pub(super) fn write(range: std::ops::Range<u64>, byte: u8) -> LocalOp {
    let data = Bytes::from(vec![byte; (range.end - range.start) as usize]);
    LocalOp::Change(Change::Write { range: bytes(range), data, fua: false })
}

/// Of a disk that lacks all but the first ten blocks.
pub(super) fn header() -> Header {
    Header {
        disk: DiskId::random(),
        kind: Kind::Rewind,
        boot: boot(),
        epoch: Epoch(1),
        inode: 0,
        before: Lsn(50),
        total: BlockCount(BLOCKS - 10),
        compare: false,
        source: backtide_hydration::SourcePoint {
            receiver: "unix:/run/receiver.sock".to_owned(),
            disk: DiskId::random(),
            name: "vm1".parse().unwrap(),
            history: HistoryId::random(),
            lsn: Lsn(40),
            time: CaptureTime(7),
            size: ByteCount(SIZE),
        },
    }
}

impl Bench {
    fn new() -> Self {
        let mut image = vec![255; SIZE as usize];
        image[..10 * BLOCK as usize].copy_from_slice(&at_point()[..10 * BLOCK as usize]);
        Self::of(&image, header())
    }

    /// With this in the image.
    fn of(image: &[u8], header: Header) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let storage = Arc::new(RealStorage::open(directory.path()).unwrap());
        let missing = DirtyBitmap::of((10..BLOCKS).into());
        let file = HydrationFile::create(storage, Path::new(FILE), header, missing).unwrap();
        Self::noted_in(directory, image, file)
    }

    fn noted_in(directory: tempfile::TempDir, image: &[u8], file: HydrationFile) -> Self {
        std::fs::write(directory.path().join("vm1.img"), image).unwrap();
        let source = Rc::new(FakeSource::new(at_point()));
        let disk = Self::disk(directory.path(), &source, file);
        Self { directory, source, disk }
    }

    fn disk(directory: &Path, source: &Rc<FakeSource>, file: HydrationFile) -> Rc<HydratingDisk> {
        let path = directory.join("vm1.img");
        let image = Arc::new(ImageFile::open(&path).unwrap());
        let medium = Medium::Image(Box::new(ImageDisk::new(image, IoEngine::Threads).unwrap()));
        let source = Rc::clone(source) as Rc<dyn PointSource>;
        HydratingDisk::new("vm1".parse().unwrap(), medium, Some(path), file, source)
    }

    fn file(&self) -> PathBuf {
        self.directory.path().join(FILE)
    }

    /// The same disk as the next agent finds it in the same boot.
    async fn again(self) -> Self {
        let Self { directory, source, disk } = self;
        disk.stop().await;
        raw(&disk).unlock().unwrap();
        drop(disk);
        let storage = Arc::new(RealStorage::open(directory.path()).unwrap());
        let file = HydrationFile::open(storage, Path::new(FILE), boot()).unwrap().unwrap();
        let disk = Self::disk(directory.path(), &source, file);
        Self { directory, source, disk }
    }

    fn start(&self, op: LocalOp) -> JoinHandle<Result<LocalData, IoFailure>> {
        let disk = Rc::clone(&self.disk);
        spawn_local(async move { disk.run(op).await })
    }

    async fn read(&self, range: std::ops::Range<u64>) -> Result<Bytes, IoFailure> {
        match self.disk.run(LocalOp::Read(bytes(range))).await? {
            LocalData::Read(data) => Ok(data),
            LocalData::Changed | LocalData::Prepared(_) => unreachable!("a read brings bytes"),
        }
    }

    /// Everything that is there, once nothing is missing.
    async fn hydrated(&self) -> Vec<u8> {
        Rc::clone(&self.disk).hydrate().await;
        assert!(!self.file().exists() && self.disk.status().is_none());
        std::fs::read(self.directory.path().join("vm1.img")).unwrap()
    }
}

fn raw(disk: &HydratingDisk) -> &ImageFile {
    match disk.medium() {
        Medium::Image(image) => image.image(),
        Medium::Nbd(_) => unreachable!("these lie on a file"),
    }
}

fn failed(errno: i32) -> Result<Bytes, IoFailure> {
    Err(IoFailure { errno })
}

#[tokio::test]
async fn a_read_brings_what_is_missing_around_it_once() {
    LocalSet::new()
        .run_until(async {
            let bench = Bench::new();
            let content = at_point();
            let near = 40 * BLOCK + 5..41 * BLOCK + 9;
            let (one, other) = tokio::join!(bench.read(near.clone()), bench.read(near.clone()));
            assert_eq!(one.unwrap(), content[near.start as usize..near.end as usize]);
            assert_eq!(other.unwrap(), content[near.start as usize..near.end as usize]);
            assert_eq!(bench.source.asked(), [bytes(32 * BLOCK..48 * BLOCK)]);
            assert_eq!(bench.read(0..BLOCK).await.unwrap(), content[..BLOCK as usize]);
            assert_eq!(bench.source.asked().len(), 1);
            assert_eq!(bench.disk.status().unwrap().missing_bytes, BlockCount(BLOCKS - 26).bytes());
        })
        .await;
}

#[tokio::test]
async fn a_write_counts_and_not_what_was_fetched_meanwhile() {
    LocalSet::new()
        .run_until(async {
            let bench = Bench::new();
            bench.source.close();
            let read = bench.start(LocalOp::Read(bytes(20 * BLOCK..21 * BLOCK)));
            bench.source.until_asked(1).await;
            // All of one block, which the fetch is about, and the next one in part.
            let whole = bench.disk.run(write(20 * BLOCK..21 * BLOCK, 77)).await;
            assert_eq!(whole, Ok(LocalData::Changed), "without the receiver");
            assert_eq!(read.await.unwrap(), Ok(LocalData::Read(Bytes::from(vec![77; BLOCK as usize]))));
            let part = bench.start(write(21 * BLOCK + 100..22 * BLOCK, 78));
            bench.source.open();
            part.await.unwrap().unwrap();
            let bench = bench.again().await;
            let mut expected = at_point();
            expected[20 * BLOCK as usize..21 * BLOCK as usize].fill(77);
            expected[21 * BLOCK as usize + 100..22 * BLOCK as usize].fill(78);
            assert_eq!(bench.read(20 * BLOCK..22 * BLOCK).await.unwrap(), expected[81920..90112]);
            assert!(bench.hydrated().await == expected);
        })
        .await;
}

#[tokio::test]
async fn what_the_image_holds_already_is_not_fetched() {
    LocalSet::new()
        .run_until(async {
            let mut image = at_point();
            for block in [100, 333, 334, 599] {
                image[(block * BLOCK) as usize + 17] ^= 1;
            }
            let bench = Bench::of(&image, Header { compare: true, ..header() });
            let content = at_point();
            assert_eq!(bench.read(20 * BLOCK..21 * BLOCK).await.unwrap(), content[81920..86016]);
            assert!(bench.source.asked().is_empty());
            // A guest's write counts, and not what was there.
            bench.disk.run(write(50 * BLOCK..51 * BLOCK, 77)).await.unwrap();
            let mut expected = content;
            expected[50 * BLOCK as usize..51 * BLOCK as usize].fill(77);
            assert!(bench.hydrated().await == expected);
            let chunk = 64 * 1024;
            let mut asked = bench.source.asked();
            asked.sort_by_key(|range| range.start());
            let chunks = [6 * chunk..7 * chunk, 20 * chunk..21 * chunk, 37 * chunk..SIZE];
            assert_eq!(asked, chunks.map(bytes));
        })
        .await;
}

#[tokio::test]
async fn what_is_damaged_at_the_receiver_is_an_error_though_the_image_might_hold_it() {
    LocalSet::new()
        .run_until(async {
            let bench = Bench::of(&at_point(), Header { compare: true, ..header() });
            bench.source.damage((300..301).into());
            assert_eq!(bench.read(300 * BLOCK..301 * BLOCK).await, failed(EIO));
            let content = at_point();
            let near = bench.read(301 * BLOCK..302 * BLOCK).await.unwrap();
            assert_eq!(near, content[301 * BLOCK as usize..302 * BLOCK as usize]);
        })
        .await;
}

#[tokio::test]
async fn a_receiver_that_is_away_is_waited_for_and_a_disk_given_up_waits_no_longer() {
    LocalSet::new()
        .run_until(async {
            let bench = Bench::new();
            bench.source.set_away(true);
            let read = bench.start(LocalOp::Read(bytes(100 * BLOCK..101 * BLOCK)));
            bench.source.until_asked(2).await;
            let trouble = bench.disk.status().unwrap().trouble;
            assert_eq!(trouble.as_deref(), Some("the receiver is away"));
            bench.source.set_away(false);
            assert!(matches!(read.await.unwrap(), Ok(LocalData::Read(_))));
            assert_eq!(bench.disk.status().unwrap().trouble, None);
            bench.source.close();
            let asked = bench.source.asked().len();
            let read = bench.start(LocalOp::Read(bytes(200 * BLOCK..201 * BLOCK)));
            let hydrating = spawn_local(Rc::clone(&bench.disk).hydrate());
            bench.source.until_asked(asked + 1).await;
            bench.disk.stop().await;
            assert_eq!(read.await.unwrap(), Err(IoFailure { errno: ESHUTDOWN }));
            hydrating.await.unwrap();
            assert!(bench.file().exists());
        })
        .await;
}

#[tokio::test]
async fn a_receiver_that_is_away_after_it_refused_is_waited_for() {
    LocalSet::new()
        .run_until(async {
            let bench = Bench::new();
            bench.source.set_refuses(true);
            let read = bench.start(LocalOp::Read(bytes(100 * BLOCK..101 * BLOCK)));
            bench.source.until_asked(2).await;
            assert!(bench.disk.status().unwrap().stuck);
            bench.source.set_away(true);
            let asked = bench.source.asked().len();
            bench.source.until_asked(asked + 2).await;
            assert!(!bench.disk.status().unwrap().stuck);
            bench.source.set_away(false);
            bench.source.set_refuses(false);
            assert!(matches!(read.await.unwrap(), Ok(LocalData::Read(_))));
        })
        .await;
}

#[tokio::test]
async fn the_point_is_held_while_blocks_are_missing_and_by_nobody_then() {
    LocalSet::new()
        .run_until(async {
            let bench = Bench::new();
            bench.source.close();
            bench.source.set_away(true);
            let hydrating = spawn_local(Rc::clone(&bench.disk).hydrate());
            bench.source.until_asked(1).await;
            assert!(bench.source.owners().is_empty(), "nobody is there to be asked");
            bench.source.set_away(false);
            bench.source.until_held().await;
            let header = bench.disk.file.header();
            let owner = owner(header.disk, header.epoch);
            assert_eq!(bench.source.owners().into_iter().collect::<Vec<_>>(), [owner]);
            bench.source.open();
            hydrating.await.unwrap();
            assert!(bench.source.owners().is_empty(), "nothing is missing any more");
        })
        .await;
}

#[tokio::test]
async fn what_the_receiver_has_lost_is_an_error_of_those_blocks_only() {
    LocalSet::new()
        .run_until(async {
            let bench = Bench::new();
            bench.source.damage((300..301).into());
            bench.source.damage((411..413).into());
            assert_eq!(bench.read(290 * BLOCK..310 * BLOCK).await, failed(EIO));
            let hydrating = spawn_local(Rc::clone(&bench.disk).hydrate());
            let mut expected = at_point();
            for block in (10..BLOCKS).filter(|block| ![300, 411, 412].contains(block)) {
                let at = block * BLOCK..((block + 1) * BLOCK).min(SIZE);
                let found = bench.read(at.clone()).await;
                assert_eq!(found.unwrap(), expected[at.start as usize..at.end as usize], "block {block}");
            }
            assert_eq!(bench.read(411 * BLOCK..412 * BLOCK).await, failed(EIO));
            let status = bench.disk.status().unwrap();
            assert_eq!(
                (status.missing_bytes, status.damaged_bytes),
                (ByteCount(3 * BLOCK), ByteCount(3 * BLOCK))
            );
            assert_eq!(status.trouble.as_deref(), Some("3 missing blocks are damaged at the receiver"));
            for block in [300, 411, 412] {
                let change =
                    Change::Zero { range: bytes(block * BLOCK..(block + 1) * BLOCK), trim: true, fua: true };
                bench.disk.run(LocalOp::Change(change)).await.unwrap();
                expected[(block * BLOCK) as usize..((block + 1) * BLOCK) as usize].fill(0);
            }
            hydrating.await.unwrap();
            assert!(bench.hydrated().await == expected);
        })
        .await;
}

#[tokio::test]
async fn missing_blocks_are_data() {
    LocalSet::new()
        .run_until(async {
            let bench = Bench::new();
            let zero = Change::Zero { range: bytes(0..20 * BLOCK), trim: true, fua: false };
            bench.disk.run(LocalOp::Change(zero)).await.unwrap();
            raw(&bench.disk).zero(bytes(20 * BLOCK..30 * BLOCK), true).unwrap();
            let extents = bench.disk.extents(bytes(10 * BLOCK + 5..25 * BLOCK + 7), false).await.unwrap();
            let hole = Extent::hole(ByteCount(10 * BLOCK - 5));
            assert_eq!(extents, [hole, Extent::data(ByteCount(5 * BLOCK + 7))]);
            let extents = bench.disk.extents(bytes(22 * BLOCK..24 * BLOCK), true).await.unwrap();
            assert_eq!(extents, [Extent::data(ByteCount(2 * BLOCK))]);
            assert_eq!(bench.disk.missing_blocks(), DirtyBitmap::of((20..BLOCKS).into()));
        })
        .await;
}

#[tokio::test(start_paused = true)]
async fn a_note_that_cannot_be_removed_is_no_failure_of_the_image() {
    LocalSet::new()
        .run_until(async {
            let bench = Bench::new();
            let note = bench.directory.path().join("vm1.img.backtide-incomplete");
            std::fs::create_dir(&note).unwrap();
            let hydrating = spawn_local(Rc::clone(&bench.disk).hydrate());
            while bench.disk.status().unwrap().trouble.is_none() {
                tokio::time::sleep(std::time::Duration::from_millis(1)).await;
            }
            assert!(bench.file().exists());
            assert_eq!(bench.disk.run(LocalOp::Change(Change::Flush)).await, Ok(LocalData::Changed));
            std::fs::remove_dir(&note).unwrap();
            hydrating.await.unwrap();
            assert!(!bench.file().exists() && bench.disk.status().is_none());
        })
        .await;
}

/// Of which nothing can be noted.
fn with_a_full_state_directory() -> (MemoryStorage, Bench) {
    let storage = MemoryStorage::new();
    let shared: Arc<dyn Storage> = Arc::new(storage.clone());
    let (path, missing) = (Path::new(FILE), DirtyBitmap::of((10..BLOCKS).into()));
    drop(HydrationFile::create(Arc::clone(&shared), path, header(), missing).unwrap());
    // After a power loss there was just enough for a file, and nothing that is noted has a place in it.
    storage.set_capacity(Some(ByteCount(storage.used().0 + 2048)));
    let other = Uuid::from_bytes([2; 16]);
    let file = HydrationFile::open(shared, path, other).unwrap().unwrap();
    storage.set_capacity(Some(storage.used()));
    let bench = Bench::noted_in(tempfile::tempdir().unwrap(), &vec![255; SIZE as usize], file);
    (storage, bench)
}

#[tokio::test]
async fn what_is_missing_is_an_error_once_the_image_could_not_be_synced() {
    LocalSet::new()
        .run_until(async {
            for (full, bench) in [(false, Bench::new()), (true, with_a_full_state_directory().1)] {
                let read = 40 * BLOCK..41 * BLOCK;
                let content = at_point();
                let found = bench.read(read.clone()).await.unwrap();
                assert_eq!(found, content[read.start as usize..read.end as usize]);
                let gone = || Err(io::Error::from_raw_os_error(EIO));
                bench.disk.file.settle(gone).unwrap_err();
                // A guest's flush is told so.
                bench.disk.run(LocalOp::Change(Change::Flush)).await.unwrap_err();
                bench.read(100 * BLOCK..101 * BLOCK).await.unwrap_err();
                if full {
                    bench.read(read).await.unwrap_err();
                }
            }
        })
        .await;
}

#[tokio::test(start_paused = true)]
async fn a_full_state_directory_fails_no_read_and_no_flush_and_no_write_of_what_was_not_noted_is_answered() {
    LocalSet::new()
        .run_until(async {
            let (storage, bench) = with_a_full_state_directory();
            let mut expected = at_point();
            let full = IoFailure { errno: Errno::NOSPC.raw_os_error() };
            let right = async |range: std::ops::Range<u64>| {
                let found = bench.read(range.clone()).await.unwrap();
                assert_eq!(found, at_point()[range.start as usize..range.end as usize]);
            };
            right(40 * BLOCK + 5..41 * BLOCK + 9).await;
            right(47 * BLOCK..48 * BLOCK).await;
            assert_eq!(bench.source.asked(), [bytes(32 * BLOCK..48 * BLOCK)], "once");
            for range in [40 * BLOCK + 5..41 * BLOCK, 50 * BLOCK..51 * BLOCK] {
                assert_eq!(bench.disk.run(write(range.clone(), 77)).await, Err(full));
                right(range).await;
            }
            assert_eq!(bench.disk.run(LocalOp::Change(Change::Flush)).await, Ok(LocalData::Changed));
            let status = bench.disk.status().unwrap();
            assert_eq!(status.missing_bytes, BlockCount(BLOCKS - 10).bytes());
            assert!(
                status
                    .trouble
                    .unwrap()
                    .starts_with("what was fetched cannot be stored: it cannot be noted: ")
            );
            storage.set_capacity(None);
            right(100 * BLOCK..101 * BLOCK).await;
            assert_eq!(bench.disk.status().unwrap().trouble, None);
            for range in [40 * BLOCK + 5..41 * BLOCK, 50 * BLOCK..51 * BLOCK] {
                bench.disk.run(write(range.clone(), 77)).await.unwrap();
                expected[range.start as usize..range.end as usize].fill(77);
            }
            let image = bench.hydrated().await;
            assert!(image[10 * BLOCK as usize..] == expected[10 * BLOCK as usize..]);
        })
        .await;
}

/// Guests write and read everywhere, each in its own stripe, while everything is fetched.
#[tokio::test]
async fn a_disk_in_use_becomes_the_point_under_what_was_written() {
    LocalSet::new()
        .run_until(async {
            let bench = Bench::new();
            let hydrating = spawn_local(Rc::clone(&bench.disk).hydrate());
            let mut guests = Vec::new();
            for guest in 0..8_u64 {
                let disk = Rc::clone(&bench.disk);
                guests.push(spawn_local(async move {
                    let mut expected = at_point();
                    let mut seed = guest + 1;
                    for turn in 0..60_u8 {
                        seed = seed
                            .wrapping_mul(6_364_136_223_846_793_005)
                            .wrapping_add(1_442_695_040_888_963_407);
                        let stripe = guest * 75 * BLOCK..((guest + 1) * 75 * BLOCK).min(SIZE);
                        let start = stripe.start + (seed >> 33) % (stripe.end - stripe.start);
                        let range = start..(start + (seed >> 20) % 20_000 + 1).min(stripe.end);
                        let place = range.start as usize..range.end as usize;
                        if turn % 3 == 0 {
                            let found = disk.run(LocalOp::Read(bytes(range))).await;
                            let right = Bytes::copy_from_slice(&expected[place]);
                            assert_eq!(found, Ok(LocalData::Read(right)));
                        } else {
                            disk.run(write(range, turn)).await.unwrap();
                            expected[place].fill(turn);
                        }
                        if turn % 16 == 5 {
                            disk.run(LocalOp::Change(Change::Flush)).await.unwrap();
                        }
                    }
                    expected
                }));
            }
            let mut expected = at_point();
            for (guest, done) in (0..).zip(guests) {
                let stripe =
                    guest * 75 * BLOCK as usize..((guest + 1) * 75 * BLOCK as usize).min(SIZE as usize);
                expected[stripe.clone()].copy_from_slice(&done.await.unwrap()[stripe]);
            }
            hydrating.await.unwrap();
            assert!(bench.hydrated().await == expected);
        })
        .await;
}
