//! What readers of all disks share: index blocks, open files and what payloads are checked by, all bounded.
//!
//! A piece of a payload (64 KiB) is checked as a whole, so a small read costs a read of all of it. From then on the
//! checksums of its parts (4 KiB) are kept, so that the next small read of it costs no more than it wants: the bytes
//! themselves are the page cache's to keep. So are the checksum tables of long payloads. What was compressed is kept as it is
//! when it is not, so that small reads of one batch decompress it once.
//!
//! Loading happens outside the lock; two readers may then load the same block, and one copy is kept.

use std::{
    collections::BTreeSet,
    path::PathBuf,
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use backtide_images::{Images, ImagesLimits, Recent};
use backtide_segment::{Body, EntryParts, Guide, IndexBlock, PartSums, Position, SegmentFile};
use backtide_storage::Storage;
use backtide_units::{ByteCount, ByteOffset};
use bytes::Bytes;
use roaring::RoaringTreemap;

use crate::{LogError, open_extents::OpenExtents, origin::Origins};

/// What is kept beside the bytes of a value weighs about this much.
const OVERHEAD: usize = 192;

/// Memory for checksums of parts of payloads of all disks, beside what the limits say: those of about 4 GiB.
const SUM_BYTES_MAX: usize = 16 << 20;

/// Memory for checksum tables of all disks, beside what the limits say.
const TABLE_BYTES_MAX: usize = 4 << 20;

/// Memory for what was decompressed last, of all disks, beside what the limits say.
const FRAME_BYTES_MAX: usize = 16 << 20;

/// A bounded cache of index blocks, open segment files, (16 MiB of) checksums of payloads and (16 MiB of) what was
/// decompressed. Clones share it.
#[derive(Clone)]
pub struct LogCache {
    shared: Arc<Shared>,
}

/// Limits of a [`LogCache`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheLimits {
    /// Memory for index blocks. Default 64 MiB.
    pub index_bytes_max: ByteCount,
    /// Sealed segment files kept open. Default 256.
    pub open_files_max: usize,
    /// Extents in the indexes of segments that are still written, of all logs together; beyond it segments are sealed
    /// early. Each takes about 48 bytes. Default 2,097,152.
    pub open_extents_max: u64,
    /// No image is mended where that would leave less than this free on the store's file system. Default 0.
    pub free_bytes_min: ByteCount,
}

/// Names a segment among all segments that share a cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct SegmentKey(u64);

/// Names a piece of a payload: the entry by its position, and the piece's number in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct PieceKey {
    pub(crate) segment: SegmentKey,
    pub(crate) entry: Position,
    pub(crate) piece: usize,
}

/// Names a frame of a batch: its body by where it stands, and the frame's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct FrameKey {
    pub(crate) segment: SegmentKey,
    pub(crate) body: ByteOffset,
    pub(crate) number: usize,
}

/// Names a part of a segment's index.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum PartName {
    Block(u32),
    Guide,
    Buckets,
}

/// A part of an index.
#[derive(Clone)]
pub(crate) enum IndexPart {
    Block(IndexBlock),
    Guide(Arc<Guide>),
    Buckets(Arc<RoaringTreemap>),
}

struct Shared {
    limits: CacheLimits,
    next_key: AtomicU64,
    parts: Mutex<Recent<(SegmentKey, PartName), IndexPart>>,
    files: Mutex<Recent<SegmentKey, SegmentFile>>,
    entries: Mutex<Recent<(SegmentKey, Position), EntryParts>>,
    sums: Mutex<Recent<PieceKey, PartSums>>,
    bodies: Mutex<Recent<(SegmentKey, ByteOffset), Body>>,
    frames: Mutex<Recent<FrameKey, Bytes>>,
    origins: Origins,
    images: OnceLock<Images>,
    open_extents: OpenExtents,
}

impl LogCache {
    /// An empty cache.
    pub fn new(limits: CacheLimits) -> Self {
        let bytes = limits.index_bytes_max.as_usize().unwrap_or(usize::MAX);
        Self {
            shared: Arc::new(Shared {
                limits,
                next_key: AtomicU64::new(0),
                parts: Mutex::new(Recent::new(bytes)),
                files: Mutex::new(Recent::new(limits.open_files_max.max(1))),
                entries: Mutex::new(Recent::new(TABLE_BYTES_MAX)),
                sums: Mutex::new(Recent::new(SUM_BYTES_MAX)),
                bodies: Mutex::new(Recent::new(TABLE_BYTES_MAX)),
                frames: Mutex::new(Recent::new(FRAME_BYTES_MAX)),
                origins: Origins::default(),
                images: OnceLock::new(),
                open_extents: OpenExtents::new(limits.open_extents_max),
            }),
        }
    }

    /// Its limits.
    pub fn limits(&self) -> CacheLimits {
        self.shared.limits
    }

    /// Extents in the indexes of segments that are still written, of all logs together.
    pub fn open_extents(&self) -> u64 {
        self.shared.open_extents.all()
    }

    pub(crate) fn open_indexes(&self) -> &OpenExtents {
        &self.shared.open_extents
    }

    /// Bytes of index parts in memory now.
    pub fn index_bytes(&self) -> ByteCount {
        ByteCount(self.shared.parts.lock().unwrap_or_else(PoisonError::into_inner).weight() as u64)
    }

    /// The images of the store on `storage`, which is that of all logs with this cache.
    pub fn images(&self, storage: &Arc<dyn Storage>) -> Images {
        let free_bytes_min = self.shared.limits.free_bytes_min;
        let limits = ImagesLimits { free_bytes_min, ..ImagesLimits::default() };
        let new = || Images::new(Arc::clone(storage), limits);
        self.shared.images.get_or_init(new).clone()
    }

    pub(crate) fn origins(&self) -> &Origins {
        &self.shared.origins
    }

    /// Closes files by their names.
    pub(crate) fn forget_files(&self, names: &BTreeSet<PathBuf>) {
        let mut files = self.shared.files.lock().unwrap_or_else(PoisonError::into_inner);
        files.retain(|file: &SegmentFile| !names.contains(file.name()));
    }

    pub(crate) fn new_key(&self) -> SegmentKey {
        SegmentKey(self.shared.next_key.fetch_add(1, Ordering::Relaxed))
    }

    /// A part of a segment's index.
    pub(crate) fn part(
        &self,
        segment: SegmentKey,
        part: PartName,
        load: impl FnOnce() -> Result<IndexPart, LogError>,
    ) -> Result<IndexPart, LogError> {
        let parts = &self.shared.parts;
        if let Some(found) = parts.lock().unwrap_or_else(PoisonError::into_inner).get(&(segment, part)) {
            return Ok(found);
        }
        let loaded = load()?;
        let weight = match &loaded {
            IndexPart::Block(_) => 4096 + OVERHEAD,
            IndexPart::Guide(guide) => guide.weight() + OVERHEAD,
            IndexPart::Buckets(buckets) => buckets.serialized_size() * 2 + OVERHEAD,
        };
        parts.lock().unwrap_or_else(PoisonError::into_inner).put((segment, part), weight, loaded.clone());
        Ok(loaded)
    }

    /// An entry of several pieces, ready to be read from.
    pub(crate) fn entry(
        &self,
        segment: SegmentKey,
        position: Position,
        load: impl FnOnce() -> Result<EntryParts, LogError>,
    ) -> Result<EntryParts, LogError> {
        let entries = &self.shared.entries;
        if let Some(found) = entries.lock().unwrap_or_else(PoisonError::into_inner).get(&(segment, position))
        {
            return Ok(found);
        }
        let loaded = load()?;
        if loaded.count() > 1 {
            let weight = loaded.count() * size_of::<u32>() + OVERHEAD;
            let mut entries = entries.lock().unwrap_or_else(PoisonError::into_inner);
            entries.put((segment, position), weight, loaded.clone());
        }
        Ok(loaded)
    }

    /// The sums of a piece that was checked, if they were kept.
    pub(crate) fn sums(&self, key: PieceKey) -> Option<PartSums> {
        self.shared.sums.lock().unwrap_or_else(PoisonError::into_inner).get(&key)
    }

    /// Keeps the sums of a piece that was checked.
    pub(crate) fn keep_sums(&self, key: PieceKey, sums: PartSums) {
        let weight = sums.count() * size_of::<u32>() + OVERHEAD;
        self.shared.sums.lock().unwrap_or_else(PoisonError::into_inner).put(key, weight, sums);
    }

    /// The body of a batch, if it was kept.
    pub(crate) fn body(&self, segment: SegmentKey, at: ByteOffset) -> Option<Body> {
        self.shared.bodies.lock().unwrap_or_else(PoisonError::into_inner).get(&(segment, at))
    }

    /// What a frame of a batch holds, checked.
    pub(crate) fn frame(
        &self,
        segment: SegmentKey,
        body: &Body,
        number: usize,
        load: impl FnOnce() -> Result<Bytes, LogError>,
    ) -> Result<Bytes, LogError> {
        let (frames, bodies) = (&self.shared.frames, &self.shared.bodies);
        let key = FrameKey { segment, body: body.at(), number };
        if let Some(found) = frames.lock().unwrap_or_else(PoisonError::into_inner).get(&key) {
            return Ok(found);
        }
        let loaded = load()?;
        let weight = loaded.len() + OVERHEAD;
        frames.lock().unwrap_or_else(PoisonError::into_inner).put(key, weight, loaded.clone());
        let mut bodies = bodies.lock().unwrap_or_else(PoisonError::into_inner);
        bodies.put((segment, body.at()), body.weight() + OVERHEAD, body.clone());
        Ok(loaded)
    }

    pub(crate) fn file(
        &self,
        segment: SegmentKey,
        open: impl FnOnce() -> Result<SegmentFile, LogError>,
    ) -> Result<SegmentFile, LogError> {
        let files = &self.shared.files;
        if let Some(found) = files.lock().unwrap_or_else(PoisonError::into_inner).get(&segment) {
            return Ok(found);
        }
        let opened = open()?;
        files.lock().unwrap_or_else(PoisonError::into_inner).put(segment, 1, opened.clone());
        Ok(opened)
    }
}

impl Default for CacheLimits {
    fn default() -> Self {
        Self {
            index_bytes_max: ByteCount(64 << 20),
            open_files_max: 256,
            open_extents_max: 1 << 21,
            free_bytes_min: ByteCount::ZERO,
        }
    }
}
