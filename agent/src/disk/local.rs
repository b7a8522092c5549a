//! The disk behind the filter: a raw image, a block device, or any NBD server.
//!
//! Page-cache reads and writes are done at once on the disk's own thread: they cost less than
//! handing them over. What may wait for a device goes to the blocking pool.

use std::{io, rc::Rc, sync::Arc};

use backtide_export::{BlockSizes, Extent};
use backtide_io_filter::{Change, IoFailure, LocalData, LocalOp};
use backtide_storage::ImageFile;
use backtide_tracking::DirtyBitmap;
use backtide_units::{BlockRange, ByteCount, ByteOffset, ByteRange};
use bytes::Bytes;

use super::nbd_disk::NbdDisk;

/// The disk behind.
pub(crate) enum Local {
    /// A raw file or block device.
    Image(Arc<ImageFile>),
    /// An NBD server.
    Nbd(NbdDisk),
}

pub(super) const EIO: i32 = 5;

impl Local {
    pub(crate) fn engine(&self) -> &'static str {
        match self {
            Self::Image(_) => "pread",
            Self::Nbd(_) => "nbd",
        }
    }

    pub(crate) fn size(&self) -> ByteCount {
        match self {
            Self::Image(image) => image.size(),
            Self::Nbd(disk) => disk.size(),
        }
    }

    /// The block sizes its clients have to keep to; longer requests than the disk behind takes are
    /// split on their way to it.
    pub(crate) fn block_sizes(&self) -> BlockSizes {
        let ours = BlockSizes::default();
        match self {
            Self::Image(_) => ours,
            Self::Nbd(disk) => {
                let BlockSizes { minimum, preferred, .. } = disk.block_sizes();
                BlockSizes { minimum, preferred: preferred.max(ours.preferred), ..ours }
            }
        }
    }

    /// What keeps it from being used at this moment, if anything is known to.
    pub(crate) fn trouble(&self) -> Option<String> {
        match self {
            Self::Image(_) => None,
            Self::Nbd(disk) => disk.trouble(),
        }
    }

    /// Does what can be done without waiting; gives the rest back.
    pub(crate) fn try_now(&self, op: LocalOp) -> Result<Result<LocalData, IoFailure>, LocalOp> {
        match (self, op) {
            (Self::Image(image), LocalOp::Change(Change::Write { range, data, fua: false })) => {
                Ok(image.write_at(range.start(), &data).map(|()| LocalData::Changed).map_err(failure))
            }
            (_, op) => Err(op),
        }
    }

    /// Does it, waiting as long as it takes.
    pub(crate) async fn run(&self, op: LocalOp) -> Result<LocalData, IoFailure> {
        match self {
            Self::Image(image) => {
                let image = Arc::clone(image);
                blocking(move || on_image(&image, op)).await.map_err(failure)
            }
            Self::Nbd(disk) => disk.run(op).await,
        }
    }

    /// Reads from the page cache at once, where all of it is there.
    pub(crate) fn try_read(&self, range: ByteRange) -> Option<io::Result<Bytes>> {
        match self {
            Self::Image(image) => {
                let mut buffer = vec![0; usize::try_from(range.count().0).ok()?];
                match image.try_read(range.start(), &mut buffer) {
                    Ok(true) => Some(Ok(buffer.into())),
                    Ok(false) => None,
                    Err(error) => Some(Err(error)),
                }
            }
            Self::Nbd(_) => None,
        }
    }

    /// The stretches of `range`, from its start: all of it, or only the first.
    pub(crate) async fn extents(&self, range: ByteRange, one: bool) -> Result<Vec<Extent>, IoFailure> {
        match self {
            Self::Image(image) => {
                let image = Arc::clone(image);
                blocking(move || image_extents(&image, range, one)).await.map_err(failure)
            }
            Self::Nbd(disk) => disk.extents(range).await,
        }
    }

    pub(crate) fn read_ahead(&self, range: ByteRange) {
        if let Self::Image(image) = self {
            image.read_ahead(range);
        }
    }

    /// The blocks that may hold data.
    pub(crate) async fn allocated(&self) -> Result<DirtyBitmap, IoFailure> {
        let whole = ByteRange::between(ByteOffset::ZERO, ByteOffset(self.size().0));
        match self {
            Self::Image(image) => {
                let image = Arc::clone(image);
                blocking(move || {
                    let mut blocks = DirtyBitmap::new();
                    for extent in image.allocated(whole)? {
                        blocks.insert(BlockRange::touched_by(extent));
                    }
                    Ok(blocks)
                })
                .await
                .map_err(failure)
            }
            Self::Nbd(disk) => disk.allocated(whole).await,
        }
    }
}

fn on_image(image: &ImageFile, op: LocalOp) -> io::Result<LocalData> {
    let stable = match op {
        LocalOp::Read(range) => {
            let mut buffer = vec![0; usize::try_from(range.count().0).expect("a read is small")];
            image.read_at(range.start(), &mut buffer)?;
            return Ok(LocalData::Read(buffer.into()));
        }
        LocalOp::Change(Change::Write { range, data, fua }) => {
            image.write_at(range.start(), &data)?;
            fua
        }
        LocalOp::Change(Change::Zero { range, trim, fua }) => {
            image.zero(range, trim)?;
            fua
        }
        LocalOp::Change(Change::Flush) | LocalOp::Settle => true,
    };
    if stable {
        image.sync()?;
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

pub(crate) fn failure(error: io::Error) -> IoFailure {
    IoFailure { errno: error.raw_os_error().unwrap_or(EIO) }
}

/// A disk behind that its thread shares among its tasks.
pub(crate) type SharedLocal = Rc<Local>;
