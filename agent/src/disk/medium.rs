//! What a disk lies on: a raw image, a block device, or any NBD server. By itself it is the disk, or it lacks blocks
//! of it (`hydrating.rs`).

use backtide_export::{BlockSizes, Extent};
use backtide_io_filter::{IoFailure, LocalData, LocalOp};
use backtide_tracking::DirtyBitmap;
use backtide_units::{BlockRange, ByteCount, ByteOffset, ByteRange};

use super::{
    image_disk::{EXTENTS_MAX, ImageDisk},
    local::{Began, Purpose},
    nbd_disk::NbdDisk,
    ring::RingDisk,
};

/// What a disk lies on.
pub(crate) enum Medium {
    /// A raw file or block device.
    Image(Box<ImageDisk>),
    /// An NBD server.
    Nbd(NbdDisk),
}

impl Medium {
    /// How local I/O is done, and why not by io_uring.
    pub(crate) fn engine(&self) -> (&'static str, Option<&str>) {
        match self {
            Self::Image(image) => image.engine(),
            Self::Nbd(_) => ("nbd", None),
        }
    }

    /// What brings back operations that are under way.
    pub(crate) fn ring(&self) -> Option<&RingDisk> {
        match self {
            Self::Image(image) => image.ring(),
            Self::Nbd(_) => None,
        }
    }

    pub(crate) fn size(&self) -> ByteCount {
        match self {
            Self::Image(image) => image.image().size(),
            Self::Nbd(disk) => disk.size(),
        }
    }

    /// The block sizes its clients are told; longer requests than the disk behind takes are split on
    /// their way to it.
    pub(crate) fn block_sizes(&self) -> BlockSizes {
        let ours = BlockSizes::default();
        match self {
            Self::Image(image) => image.block_sizes(),
            Self::Nbd(disk) => {
                let BlockSizes { minimum, preferred, .. } = disk.block_sizes();
                BlockSizes { minimum, preferred: preferred.max(ours.preferred), ..ours }
            }
        }
    }

    /// Whether clients are served that do not keep to its block sizes.
    pub(crate) fn serves_any_range(&self) -> bool {
        match self {
            Self::Image(_) => true,
            Self::Nbd(_) => false,
        }
    }

    /// What keeps it from being used at this moment, if anything is known to.
    pub(crate) fn trouble(&self) -> Option<String> {
        match self {
            Self::Image(_) => None,
            Self::Nbd(disk) => disk.trouble(),
        }
    }

    /// Does what can be done without waiting, begins what comes back by itself, and gives the rest back.
    pub(crate) fn begin(&self, op: LocalOp, purpose: Purpose) -> Began {
        match self {
            Self::Image(image) => image.begin(op, purpose),
            Self::Nbd(_) => Began::Later(op, purpose),
        }
    }

    /// Does it, waiting as long as it takes.
    pub(crate) async fn run(&self, op: LocalOp) -> Result<LocalData, IoFailure> {
        match self {
            Self::Image(image) => image.run(op).await,
            Self::Nbd(disk) => disk.run(op).await,
        }
    }

    /// The stretches of `range`, from its start: as many as one answer may have, or only the first.
    pub(crate) async fn extents(&self, range: ByteRange, one: bool) -> Result<Vec<Extent>, IoFailure> {
        match self {
            Self::Image(image) => image.extents(range, one).await,
            Self::Nbd(disk) => disk.extents(range, if one { 1 } else { EXTENTS_MAX }).await,
        }
    }

    /// Whether zeroes are made without writing them; never promised for a disk behind an NBD server.
    pub(crate) fn zeroes_fast(&self, may_unmap: bool) -> bool {
        match self {
            Self::Image(image) => image.image().zeroes_fast(may_unmap),
            Self::Nbd(_) => false,
        }
    }

    pub(crate) fn read_ahead(&self, range: ByteRange) {
        match self {
            Self::Image(image) => image.image().read_ahead(range),
            Self::Nbd(_) => {}
        }
    }

    /// Keeps so much more memory for reads and writes while nobody uses it.
    pub(crate) fn keep_buffers(&self, more: ByteCount) {
        match self {
            Self::Image(image) => image.image().buffers().keep_beyond(more),
            Self::Nbd(_) => {}
        }
    }

    /// The blocks that may hold data.
    pub(crate) async fn allocated(&self) -> Result<DirtyBitmap, IoFailure> {
        let whole = ByteRange::between(ByteOffset::ZERO, ByteOffset(self.size().0));
        match self {
            Self::Image(image) => {
                let mut blocks = DirtyBitmap::new();
                for extent in image.allocated(whole).await? {
                    blocks.insert(BlockRange::touched_by(extent));
                }
                Ok(blocks)
            }
            Self::Nbd(disk) => disk.allocated(whole).await,
        }
    }
}
