//! The disk behind the filter, with all its blocks or without some.

use std::{io, rc::Rc};

use backtide_agent_api::HydrationStatus;
use backtide_export::{BlockSizes, Extent, Reply};
use backtide_io_filter::{IoFailure, IoId, LocalData, LocalOp, ReadUse, Watch};
use backtide_tracking::DirtyBitmap;
use backtide_units::{ByteCount, ByteRange};
use rustix::io::Errno;

pub(crate) use super::image_disk::blocking;
use super::{
    hydrating::HydratingDisk, image_disk::ImageDisk, medium::Medium, nbd_disk::NbdDisk, ring::RingDisk,
};

/// The disk behind.
pub(crate) enum Local {
    /// All of it is there.
    Whole(Medium),
    /// It lacks blocks.
    Hydrating(Rc<HydratingDisk>),
}

/// Whom an operation is for.
pub(crate) enum Purpose {
    /// The filter, by its name of it.
    Filter(IoId),
    /// A client that reads this range, watched for what reads of a resync add to its wait.
    Reader(ByteRange, Reply, Watch),
}

/// How far an operation got at once.
pub(crate) enum Began {
    /// It is done.
    Ended(Result<LocalData, IoFailure>, Purpose),
    /// The disk's ring has it and will bring it back.
    UnderWay,
    /// It has to be [`run`](Local::run).
    Later(LocalOp, Purpose),
}

pub(super) const EIO: i32 = Errno::IO.raw_os_error();

impl Local {
    pub(crate) fn medium(&self) -> &Medium {
        match self {
            Self::Whole(medium) => medium,
            Self::Hydrating(disk) => disk.medium(),
        }
    }

    /// How local I/O is done, and why not by io_uring.
    pub(crate) fn engine(&self) -> (&'static str, Option<&str>) {
        self.medium().engine()
    }

    /// What brings back operations that are under way.
    pub(crate) fn ring(&self) -> Option<&RingDisk> {
        self.medium().ring()
    }

    /// The server it is behind of, if it is behind one.
    pub(crate) fn behind_a_server(&self) -> Option<&NbdDisk> {
        match self.medium() {
            Medium::Image(_) => None,
            Medium::Nbd(disk) => Some(disk),
        }
    }

    pub(crate) fn size(&self) -> ByteCount {
        self.medium().size()
    }

    /// The block sizes its clients are told.
    pub(crate) fn block_sizes(&self) -> BlockSizes {
        self.medium().block_sizes()
    }

    /// Whether clients are served that do not keep to its block sizes.
    pub(crate) fn serves_any_range(&self) -> bool {
        self.medium().serves_any_range()
    }

    /// What keeps it from being used at this moment, if anything is known to.
    pub(crate) fn trouble(&self) -> Option<String> {
        let trouble = self.medium().trouble();
        match self {
            Self::Whole(_) => trouble,
            Self::Hydrating(disk) => trouble.or_else(|| disk.status()?.trouble),
        }
    }

    /// What it lacks; none where nothing is missing.
    pub(crate) fn hydration(&self) -> Option<HydrationStatus> {
        match self {
            Self::Whole(_) => None,
            Self::Hydrating(disk) => disk.status(),
        }
    }

    /// Limits what is fetched of missing blocks without being asked for, in bytes a second; zero for no
    /// limit.
    pub(crate) fn limit_hydration(&self, rate: ByteCount) {
        if let Self::Hydrating(disk) = self {
            disk.limit(rate);
        }
    }

    /// Begins to bring what is missing, for as long as this thread runs its tasks.
    pub(crate) fn hydrate(&self) {
        if let Self::Hydrating(disk) = self {
            tokio::task::spawn_local(Rc::clone(disk).hydrate());
        }
    }

    /// Ends what waits for a receiver, with an error, and what writes the disk by itself.
    pub(crate) async fn stop(&self) {
        if let Self::Hydrating(disk) = self {
            disk.stop().await;
        }
    }

    /// The image whose flush would probably be done sooner on this thread than elsewhere.
    pub(crate) fn flushes_at_once(&self) -> Option<&ImageDisk> {
        match self {
            Self::Whole(Medium::Image(image)) => Some(&**image).filter(|image| image.flushes_at_once()),
            Self::Whole(Medium::Nbd(_)) | Self::Hydrating(_) => None,
        }
    }

    /// Does what can be done without waiting, begins what comes back by itself, and gives the rest back.
    pub(crate) fn begin(&self, op: LocalOp, purpose: Purpose) -> Began {
        match self {
            Self::Whole(medium) => medium.begin(op, purpose),
            Self::Hydrating(disk) => disk.begin(op, purpose),
        }
    }

    /// Says so when a read is going to wait for the source of missing blocks.
    pub(crate) fn note_far_read(&self, op: &LocalOp, is_far: impl FnOnce()) {
        if let (Self::Hydrating(disk), LocalOp::Read(_)) = (self, op)
            && !disk.goes_through(op)
        {
            is_far();
        }
    }

    /// Does it, waiting as long as it takes.
    pub(crate) async fn run(&self, op: LocalOp) -> Result<LocalData, IoFailure> {
        match self {
            Self::Whole(medium) => medium.run(op).await,
            Self::Hydrating(disk) => disk.run(op).await,
        }
    }

    /// The same while a resync or a verify reads: what they need of a run is made where the run is read,
    /// where that is another thread.
    pub(crate) async fn run_for_filter(&self, op: LocalOp, wanted: ReadUse) -> Result<LocalData, IoFailure> {
        match (self, op) {
            (Self::Whole(Medium::Image(image)), LocalOp::Read(range)) => image.read_for(wanted, range).await,
            (Self::Whole(_) | Self::Hydrating(_), op) => self.run(op).await,
        }
    }

    /// The stretches of `range`, from its start: as many as one answer may have, or only the first.
    pub(crate) async fn extents(&self, range: ByteRange, one: bool) -> Result<Vec<Extent>, IoFailure> {
        match self {
            Self::Whole(medium) => medium.extents(range, one).await,
            Self::Hydrating(disk) => disk.extents(range, one).await,
        }
    }

    /// Whether zeroes are made without writing them; never promised for a disk behind an NBD server.
    pub(crate) fn zeroes_fast(&self, may_unmap: bool) -> bool {
        self.medium().zeroes_fast(may_unmap)
    }

    pub(crate) fn read_ahead(&self, range: ByteRange) {
        match self {
            Self::Whole(medium) => medium.read_ahead(range),
            Self::Hydrating(disk) => disk.read_ahead(range),
        }
    }

    /// The blocks that may hold data.
    pub(crate) async fn allocated(&self) -> Result<DirtyBitmap, IoFailure> {
        match self {
            Self::Whole(medium) => medium.allocated().await,
            Self::Hydrating(disk) => {
                // Before the look at the image, where blocks that come meanwhile are found.
                let missing = disk.missing_blocks();
                let mut blocks = disk.medium().allocated().await?;
                blocks.union_with(&missing);
                Ok(blocks)
            }
        }
    }
}

pub(crate) fn failure(error: io::Error) -> IoFailure {
    IoFailure { errno: error.raw_os_error().unwrap_or(EIO) }
}

/// A disk behind that its thread shares among its tasks.
pub(crate) type SharedLocal = Rc<Local>;
