//! A raw image or block device as the disk behind.
//!
//! Through the page cache, what needs no waiting is done at once on the disk's own thread: it costs less
//! than handing it over, by whatever engine. Everything else goes to the engine: an io_uring, or the
//! blocking pool where that is forbidden. What only the pool can do (zeroes; parts of a device's
//! block, which are read, changed and written back) goes there with either.

use std::{io, sync::Arc, time::Instant};

use backtide_export::{BlockSizes, Extent};
use backtide_io_filter::{Change, IoFailure, LocalData, LocalOp, Prepared};
use backtide_storage::{ImageFile, RingOp, Wrote};
use backtide_units::ByteRange;
use bytes::Bytes;

use super::{
    local::{Began, Purpose, failure},
    pace::Pace,
    ring::RingDisk,
};
use crate::config::IoEngine;

/// The filter's reads out of the page cache that are longer are handed over, in bytes.
const LONG_COPY: u64 = 64 << 10;

/// A raw image or block device on its disk's thread.
pub(crate) struct ImageDisk {
    image: Arc<ImageFile>,
    /// None: the pool does everything.
    ring: Option<RingDisk>,
    /// Why there is no ring.
    why: Option<String>,
    pace: Pace,
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
        Ok(Self { image, ring, why, pace: Pace::default() })
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

    /// Does it, or begins it; gives back what has to be [`run`](Self::run).
    pub(crate) fn begin(&self, op: LocalOp, purpose: Purpose) -> Began {
        if self.is_long_copy(&op, &purpose) {
            return Began::Later(op, purpose);
        }
        if let Some(result) = self.at_once(&op) {
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

    /// A resync reads whole runs of blocks. Copying one out of the page cache, which either engine would
    /// do on this thread, makes the guest wait: another processor can do it.
    fn is_long_copy(&self, op: &LocalOp, purpose: &Purpose) -> bool {
        let LocalOp::Read(range) = op else { return false };
        match purpose {
            Purpose::Filter(_) => self.image.alignment().is_none() && range.count().0 > LONG_COPY,
            Purpose::Reader(..) => false,
        }
    }

    /// What needs no waiting.
    fn at_once(&self, op: &LocalOp) -> Option<io::Result<LocalData>> {
        if self.image.alignment().is_some() {
            return None;
        }
        match op {
            LocalOp::Read(range) => {
                self.image.try_read(*range).transpose().map(|read| read.map(LocalData::Read))
            }
            LocalOp::Change(Change::Write { range, data, fua: false }) => self.write_at_once(*range, data),
            LocalOp::Change(_) | LocalOp::Settle => None,
        }
    }

    fn write_at_once(&self, range: ByteRange, data: &Bytes) -> Option<io::Result<LocalData>> {
        let handed_over = self.ring.as_ref().is_some_and(RingDisk::is_busy);
        if !self.pace.is_at_once(handed_over, Instant::now) {
            return None;
        }
        let wrote = match self.image.try_write(range.start(), data) {
            Ok(Wrote::All) => Ok(()),
            Ok(Wrote::WouldWait) => return None,
            Ok(Wrote::CannotTell) => {
                let began = Instant::now();
                let wrote = self.image.write_at(range.start(), data);
                self.pace.took(began, Instant::now());
                wrote
            }
            Err(error) => Err(error),
        };
        Some(wrote.map(|()| LocalData::Changed))
    }

    /// Does it on the blocking pool, waiting as long as it takes.
    pub(crate) async fn run(&self, op: LocalOp) -> Result<LocalData, IoFailure> {
        let image = Arc::clone(&self.image);
        blocking(move || on_image(&image, op)).await.map_err(failure)
    }

    /// Reads on the blocking pool, and prepares there what a pass sends.
    pub(crate) async fn read_for_a_pass(&self, range: ByteRange) -> Result<LocalData, IoFailure> {
        let image = Arc::clone(&self.image);
        let read = blocking(move || image.read(range).map(Prepared::new)).await;
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
const EXTENTS_MAX: usize = 4096;

/// Runs on the blocking pool of this thread's runtime.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
}

#[cfg(test)]
mod tests {
    use std::{path::PathBuf, time::Duration};

    use backtide_io_filter::IoId;
    use backtide_units::ByteOffset;

    use super::*;

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
            disk.pace.took(began, began + Duration::from_secs(3600));
            let (result, at_once) = done(&disk, write(4096, &[2; 4096])).await;
            assert_eq!((result, at_once), (Ok(LocalData::Changed), false));
            let content = std::fs::read(&path).unwrap();
            assert!(content[..4096] == [1; 4096] && content[4096..8192] == [2; 4096]);
        }
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
