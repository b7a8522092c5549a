//! A raw image or block device as the disk behind.
//!
//! Through the page cache, what needs no waiting is done at once on the disk's own thread: it costs less
//! than handing it over, by whatever engine. Of a long write it is a piece at a time: between them the
//! thread reads on what its clients send, which is why the next one is there when this one ends. Everything else goes to the engine: an io_uring, or the
//! blocking pool where that is forbidden. What only the pool can do (zeroes; parts of a device's
//! block, which are read, changed and written back) goes there with either.

use std::{cell::Cell, io, sync::Arc, time::Instant};

use backtide_export::{BlockSizes, Extent};
use backtide_io_filter::{Change, IoFailure, LocalData, LocalOp, Prepared, ReadUse};
use backtide_storage::{ImageFile, RingOp, Wrote};
use backtide_units::{ByteOffset, ByteRange};
use bytes::{Buf, Bytes};

use super::{
    at_once::{AtOnce, SLOW_FLUSH, SLOW_WRITE},
    local::{Began, Purpose, failure},
    ring::RingDisk,
};
use crate::config::IoEngine;

/// The filter's reads out of the page cache that are longer are handed over, in bytes.
const LONG_COPY: u64 = 64 << 10;

/// Longer writes into the page cache are done in pieces of this size, in bytes: about as much as a client's
/// socket holds meanwhile.
const PIECE_BYTES: usize = 256 << 10;

/// As much may have changed for a flush to be a matter of the device's speed alone, in bytes.
const LITTLE: u64 = 1 << 20;

/// A raw image or block device on its disk's thread.
pub(crate) struct ImageDisk {
    image: Arc<ImageFile>,
    /// None: the pool does everything.
    ring: Option<RingDisk>,
    /// Why there is no ring.
    why: Option<String>,
    writes: AtOnce,
    flushes: AtOnce,
    /// What changed since the last flush began, in bytes.
    unflushed: Cell<u64>,
}

/// Why an image cannot be served.
#[derive(Debug, thiserror::Error)]
pub(crate) enum EngineError {
    #[error("io_uring cannot be used: {0}")]
    Ring(#[source] io::Error),
}

impl ImageDisk {
    /// On the thread that will use it, within its runtime.
    pub(crate) fn new(image: Arc<ImageFile>, engine: IoEngine) -> Result<Self, EngineError> {
        let (ring, why) = match engine {
            IoEngine::Threads => (None, Some("asked for by the agent's configuration".to_owned())),
            IoEngine::Auto | IoEngine::IoUring => match RingDisk::new(Arc::clone(&image)) {
                Ok(ring) => (Some(ring), None),
                Err(error) if engine == IoEngine::IoUring => return Err(EngineError::Ring(error)),
                Err(error) => (None, Some(format!("io_uring cannot be used: {error}"))),
            },
        };
        Ok(Self {
            image,
            ring,
            why,
            writes: AtOnce::new(SLOW_WRITE),
            flushes: AtOnce::new(SLOW_FLUSH),
            unflushed: Cell::new(0),
        })
    }

    pub(crate) fn image(&self) -> &Arc<ImageFile> {
        &self.image
    }

    pub(crate) fn ring(&self) -> Option<&RingDisk> {
        self.ring.as_ref()
    }

    /// How what may wait for a device is done, and why not by io_uring.
    pub(crate) fn engine(&self) -> (&'static str, Option<&str>) {
        (if self.ring.is_some() { "io_uring" } else { "pread" }, self.why.as_deref())
    }

    pub(crate) fn block_sizes(&self) -> BlockSizes {
        let ours = BlockSizes::default();
        let minimum = self.image.alignment().map_or(ours.minimum, |alignment| alignment.block);
        BlockSizes { minimum, preferred: minimum.max(ours.preferred), ..ours }
    }

    /// Whether a flush would probably be done sooner on this thread than elsewhere.
    pub(crate) fn flushes_at_once(&self) -> bool {
        let stuck = |now| self.ring.as_ref().is_some_and(|ring| ring.is_stuck(now));
        self.unflushed.get() <= LITTLE && self.flushes.is_allowed(Instant::now, stuck)
    }

    /// A flush on this thread.
    pub(crate) fn flush_here(&self) -> Result<LocalData, IoFailure> {
        self.unflushed.set(0);
        let began = Instant::now();
        let flushed = self.image.sync();
        self.flushes.took(began, Instant::now());
        flushed.map(|()| LocalData::Changed).map_err(failure)
    }

    fn note_unflushed(&self, op: &LocalOp) {
        match op {
            LocalOp::Change(Change::Write { range, .. } | Change::Zero { range, .. }) => {
                self.unflushed.set(self.unflushed.get().saturating_add(range.count().0));
            }
            LocalOp::Change(Change::Flush) | LocalOp::Settle => self.unflushed.set(0),
            LocalOp::Read(_) => {}
        }
    }

    /// Does it, or begins it; gives back what has to be [`run`](Self::run).
    pub(crate) fn begin(&self, op: LocalOp, purpose: Purpose) -> Began {
        self.note_unflushed(&op);
        if self.is_long_read(&op, &purpose) || self.is_long_write(&op) {
            return Began::Later(op, purpose);
        }
        if let Some(result) = self.try_now(&op) {
            return Began::Ended(result.map_err(failure), purpose);
        }
        let Some(ring) = &self.ring else { return Began::Later(op, purpose) };
        let wanted = match &op {
            LocalOp::Read(range) => RingOp::Read(*range),
            LocalOp::Change(Change::Write { range, data, fua }) => {
                RingOp::Write { range: *range, data: data.clone(), stable: *fua }
            }
            LocalOp::Change(Change::Flush) | LocalOp::Settle => RingOp::Sync,
            LocalOp::Change(Change::Zero { .. }) => return Began::Later(op, purpose),
        };
        match ring.push(wanted, purpose) {
            Ok(()) => Began::UnderWay,
            Err(purpose) => Began::Later(op, purpose),
        }
    }

    /// A read that another thread does. A resync reads whole runs of blocks. Copying one out of the page cache, which either engine would
    /// do on this thread, makes the guest wait: another processor can do it.
    fn is_long_read(&self, op: &LocalOp, purpose: &Purpose) -> bool {
        let LocalOp::Read(range) = op else { return false };
        match purpose {
            Purpose::Filter(_) => self.image.alignment().is_none() && range.count().0 > LONG_COPY,
            Purpose::Reader(..) => false,
        }
    }

    /// A long write that [`run`](Self::run) does on this thread, little by little.
    fn is_long_write(&self, op: &LocalOp) -> bool {
        match op {
            LocalOp::Change(Change::Write { data, fua, .. }) => {
                !fua && data.len() > PIECE_BYTES && self.image.alignment().is_none() && self.writes_at_once()
            }
            LocalOp::Read(_) | LocalOp::Change(Change::Zero { .. } | Change::Flush) | LocalOp::Settle => {
                false
            }
        }
    }

    /// Whether a write to the page cache is done on this thread.
    fn writes_at_once(&self) -> bool {
        let stuck = |now| self.ring.as_ref().is_some_and(|ring| ring.is_stuck(now));
        self.writes.is_allowed(Instant::now, stuck)
    }

    /// What needs no waiting.
    fn try_now(&self, op: &LocalOp) -> Option<io::Result<LocalData>> {
        if self.image.alignment().is_some() {
            return None;
        }
        match op {
            LocalOp::Read(range) => {
                self.image.try_read(*range).transpose().map(|read| read.map(LocalData::Read))
            }
            LocalOp::Change(Change::Write { range, data, fua: false }) => self.try_write_now(*range, data),
            LocalOp::Change(_) | LocalOp::Settle => None,
        }
    }

    fn try_write_now(&self, range: ByteRange, data: &Bytes) -> Option<io::Result<LocalData>> {
        if !self.writes_at_once() {
            return None;
        }
        let wrote = match self.image.try_write(range.start(), data) {
            Ok(Wrote::All) => Ok(()),
            Ok(Wrote::WouldWait) => return None,
            Ok(Wrote::CannotTell) => {
                let began = Instant::now();
                let wrote = self.image.write_at(range.start(), data);
                self.writes.took(began, Instant::now());
                wrote
            }
            Err(error) => Err(error),
        };
        Some(wrote.map(|()| LocalData::Changed))
    }

    /// Does it, waiting as long as it takes.
    pub(crate) async fn run(&self, op: LocalOp) -> Result<LocalData, IoFailure> {
        let rest = match op {
            LocalOp::Change(Change::Write { range, data, fua: false }) if data.len() > PIECE_BYTES => {
                match self.write_pieces(range, data).await.map_err(failure)? {
                    None => return Ok(LocalData::Changed),
                    Some(rest) => rest,
                }
            }
            op => op,
        };
        let image = Arc::clone(&self.image);
        blocking(move || on_image(&image, rest)).await.map_err(failure)
    }

    /// Writes a piece at a time, as long as that needs no waiting; what is left then.
    async fn write_pieces(&self, range: ByteRange, mut data: Bytes) -> io::Result<Option<LocalOp>> {
        let mut rest = range;
        while !data.is_empty() {
            let piece = data.slice(..data.len().min(PIECE_BYTES));
            let end = ByteOffset(rest.start().0 + piece.len() as u64);
            let Some(wrote) = self.try_write_now(ByteRange::between(rest.start(), end), &piece) else {
                return Ok(Some(LocalOp::Change(Change::Write { range: rest, data, fua: false })));
            };
            wrote?;
            rest = ByteRange::between(end, rest.end());
            data.advance(piece.len());
            tokio::task::yield_now().await;
        }
        Ok(None)
    }

    /// Reads on the blocking pool, and prepares there what it is read for.
    pub(crate) async fn read_for(&self, wanted: ReadUse, range: ByteRange) -> Result<LocalData, IoFailure> {
        let image = Arc::clone(&self.image);
        let read = blocking(move || Ok(Prepared::new(wanted, range, image.read(range)?))).await;
        read.map(LocalData::Prepared).map_err(failure)
    }

    pub(crate) async fn extents(&self, range: ByteRange, one: bool) -> Result<Vec<Extent>, IoFailure> {
        let image = Arc::clone(&self.image);
        blocking(move || image_extents(&image, range, one)).await.map_err(failure)
    }

    /// The stretches of `range` that may hold data.
    pub(crate) async fn allocated(&self, range: ByteRange) -> Result<Vec<ByteRange>, IoFailure> {
        let image = Arc::clone(&self.image);
        blocking(move || image.allocated(range)).await.map_err(failure)
    }
}

fn on_image(image: &ImageFile, op: LocalOp) -> io::Result<LocalData> {
    match op {
        LocalOp::Read(range) => return image.read(range).map(LocalData::Read),
        LocalOp::Change(Change::Write { range, data, fua: true }) => {
            image.write_stable(range.start(), &data)?
        }
        LocalOp::Change(Change::Write { range, data, fua: false }) => image.write_at(range.start(), &data)?,
        LocalOp::Change(Change::Zero { range, trim, fua }) => {
            image.zero(range, trim)?;
            if fua {
                image.sync()?;
            }
        }
        LocalOp::Change(Change::Flush) | LocalOp::Settle => image.sync()?,
    }
    Ok(LocalData::Changed)
}

fn image_extents(image: &ImageFile, range: ByteRange, one: bool) -> io::Result<Vec<Extent>> {
    let mut extents = Vec::new();
    let mut rest = range;
    while let Some((extent, is_data)) = image.first_extent(rest)? {
        let length = extent.count();
        extents.push(if is_data { Extent::data(length) } else { Extent::hole(length) });
        rest = ByteRange::between(extent.end(), range.end());
        if one || extents.len() >= EXTENTS_MAX {
            break;
        }
    }
    Ok(extents)
}

/// The longest answer to a block status request.
pub(super) const EXTENTS_MAX: usize = 4096;

/// Runs on the blocking pool of this thread's runtime.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
}

#[cfg(test)]
mod tests {
    use std::{path::PathBuf, time::Duration};

    use super::*;
    use backtide_io_filter::IoId;

    fn disk(directory: &tempfile::TempDir, engine: IoEngine) -> (PathBuf, ImageDisk) {
        let path = directory.path().join("vm1.img");
        std::fs::File::create(&path).unwrap().set_len(1 << 20).unwrap();
        let image = ImageFile::open(&path).unwrap();
        (path, ImageDisk::new(Arc::new(image), engine).unwrap())
    }

    fn write(start: u64, data: &'static [u8]) -> LocalOp {
        let range = ByteRange::between(ByteOffset(start), ByteOffset(start + data.len() as u64));
        LocalOp::Change(Change::Write { range, data: Bytes::from_static(data), fua: false })
    }

    /// Does it by whatever way the disk chooses: how it ended, and whether that was at once.
    async fn done(disk: &ImageDisk, op: LocalOp) -> (Result<LocalData, IoFailure>, bool) {
        match disk.begin(op, Purpose::Filter(IoId(7))) {
            Began::Ended(result, _) => (result, true),
            Began::Later(op, _) => (disk.run(op).await, false),
            Began::UnderWay => {
                let ring = disk.ring().expect("what is under way is in the ring");
                let mut completed = Vec::new();
                while completed.is_empty() {
                    ring.due().await;
                    ring.turn(&mut completed).unwrap();
                }
                let result = completed.remove(0).result.map_err(failure);
                (result.map(|read| read.map_or(LocalData::Changed, LocalData::Read)), false)
            }
        }
    }

    #[tokio::test]
    async fn writes_are_handed_over_while_the_page_cache_makes_them_wait() {
        for engine in [IoEngine::Auto, IoEngine::Threads] {
            let directory = tempfile::tempdir().unwrap();
            let (path, disk) = disk(&directory, engine);
            let (result, _) = done(&disk, write(0, &[1; 4096])).await;
            assert_eq!(result, Ok(LocalData::Changed));
            let began = Instant::now();
            disk.writes.took(began, began + Duration::from_secs(3600));
            let (result, at_once) = done(&disk, write(4096, &[2; 4096])).await;
            assert_eq!((result, at_once), (Ok(LocalData::Changed), false));
            let content = std::fs::read(&path).unwrap();
            assert!(content[..4096] == [1; 4096] && content[4096..8192] == [2; 4096]);
        }
    }

    /// What a long write begins with, and how it looks when it is done.
    fn long(disk: &ImageDisk) -> LocalOp {
        let data: Vec<u8> = (0..1 << 20).map(|at: u32| (at >> 14) as u8 + 1).collect();
        let range = ByteRange::between(ByteOffset(0), ByteOffset(disk.image().size().0));
        LocalOp::Change(Change::Write { range, data: data.into(), fua: false })
    }

    fn is_written(path: &PathBuf) -> bool {
        let content = std::fs::read(path).unwrap();
        content.len() == 1 << 20 && content.iter().enumerate().all(|(at, &byte)| byte == (at >> 14) as u8 + 1)
    }

    #[tokio::test]
    async fn others_have_their_turn_between_the_pieces_of_a_long_write() {
        let directory = tempfile::tempdir().unwrap();
        let (path, disk) = disk(&directory, IoEngine::Auto);
        let turns = std::cell::Cell::new(0);
        let others = async {
            loop {
                turns.set(turns.get() + 1);
                tokio::task::yield_now().await;
            }
        };
        tokio::select! {
            biased;
            (result, at_once) = done(&disk, long(&disk)) => {
                assert_eq!((result, at_once), (Ok(LocalData::Changed), false));
            }
            () = others => unreachable!("they never end"),
        }
        assert!(turns.get() >= 1, "all of it was written at once");
        assert!(is_written(&path));
    }

    #[tokio::test]
    async fn the_rest_of_a_long_write_is_handed_over_when_a_piece_was_slow() {
        for engine in [IoEngine::Auto, IoEngine::Threads] {
            let directory = tempfile::tempdir().unwrap();
            let (path, disk) = disk(&directory, engine);
            let slow = async {
                let began = Instant::now();
                disk.writes.took(began, began + Duration::from_secs(3600));
            };
            let ((result, _), ()) = tokio::join!(done(&disk, long(&disk)), slow);
            assert_eq!(result, Ok(LocalData::Changed));
            assert!(is_written(&path));
            assert!(!disk.writes_at_once(), "it was the slow piece that ended it");
        }
    }

    #[tokio::test]
    async fn only_flushes_of_little_on_a_fast_device_are_done_at_once() {
        let directory = tempfile::tempdir().unwrap();
        let (_, disk) = disk(&directory, IoEngine::Auto);
        assert!(disk.flushes_at_once());
        assert!(done(&disk, write(0, &[1; 4096])).await.0.is_ok());
        assert!(disk.flushes_at_once());
        assert!(done(&disk, long(&disk)).await.0.is_ok());
        assert!(!disk.flushes_at_once(), "there is more to write than a moment's");
        assert!(done(&disk, LocalOp::Change(Change::Flush)).await.0.is_ok());
        assert!(disk.flushes_at_once());
        assert_eq!(disk.flush_here(), Ok(LocalData::Changed));
        let began = Instant::now();
        disk.flushes.took(began, began + Duration::from_secs(3600));
        assert!(!disk.flushes_at_once(), "the last one was slow");
    }

    #[tokio::test]
    async fn what_the_image_has_lost_is_an_error_by_either_engine() {
        for engine in [IoEngine::Auto, IoEngine::Threads] {
            let directory = tempfile::tempdir().unwrap();
            let (path, disk) = disk(&directory, engine);
            std::fs::File::options().write(true).open(&path).unwrap().set_len(4096).unwrap();
            let lost = ByteRange::between(ByteOffset(0), ByteOffset(8192));
            let (result, _) = done(&disk, LocalOp::Read(lost)).await;
            assert_eq!(result, Err(IoFailure { errno: 5 }));
            let (result, _) = done(&disk, write((1 << 20) - 1, &[1; 2])).await;
            assert_eq!(result, Err(IoFailure { errno: 5 }), "beyond the end");
        }
    }
}
