//! One segment of a log as readers see it: open, with its index in memory, or sealed, with its index in
//! the file. It is sealed once, under the readers that have it, and never opened again.

use std::{
    ops::Range,
    path::PathBuf,
    sync::{Arc, OnceLock, PoisonError, RwLock},
};

use backtide_segment::{
    Bucket, Contents, EntryHeader, EntryParts, Extent, ExtentKey, IndexBlock, Position, SealedSegment,
    SegmentFile, SegmentHeader, SegmentStats,
};
use backtide_storage::Storage;
use backtide_units::{ByteOffset, ByteRange, Lsn};
use bytes::Bytes;
use roaring::RoaringTreemap;

use crate::{
    LogCache, LogError,
    cache::{IndexPart, PieceKey, SegmentKey},
};

/// Pieces of a payload read at once: 1 MiB.
const PIECES_AT_ONCE: usize = 16;

/// One segment, shared between the log and its views.
pub(crate) struct Segment {
    storage: Arc<dyn Storage>,
    path: PathBuf,
    header: SegmentHeader,
    cache: LogCache,
    key: SegmentKey,
    open: RwLock<Option<OpenSegment>>,
    sealed: OnceLock<SealedSegment>,
}

/// A segment that is still written.
pub(crate) struct OpenSegment {
    pub(crate) file: SegmentFile,
    pub(crate) contents: Contents,
    pub(crate) end: ByteOffset,
}

/// The 4 KiB blocks of the disk that a sealed segment touches.
pub(crate) struct Touched {
    pub(crate) blocks: RoaringTreemap,
    /// Extents that are not in the bitmap.
    pub(crate) wide: Arc<Vec<Extent>>,
}

impl Segment {
    pub(crate) fn new_open(
        storage: Arc<dyn Storage>,
        path: PathBuf,
        header: SegmentHeader,
        cache: &LogCache,
        open: OpenSegment,
    ) -> Self {
        let key = cache.new_key();
        let open = RwLock::new(Some(open));
        Self { storage, path, header, cache: cache.clone(), key, open, sealed: OnceLock::new() }
    }

    pub(crate) fn new_sealed(
        storage: Arc<dyn Storage>,
        path: PathBuf,
        header: SegmentHeader,
        cache: &LogCache,
        sealed: SealedSegment,
    ) -> Self {
        let key = cache.new_key();
        let sealed = OnceLock::from(sealed);
        Self { storage, path, header, cache: cache.clone(), key, open: RwLock::new(None), sealed }
    }

    pub(crate) fn header(&self) -> &SegmentHeader {
        &self.header
    }

    /// Lets readers use the footer and gives the memory of the open index back.
    pub(crate) fn become_sealed(&self, sealed: SealedSegment) {
        let first = self.sealed.set(sealed).is_ok();
        assert!(first, "segment {} is sealed twice", self.header.id);
        *self.open.write().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Changes the open segment; only the log that owns it does.
    ///
    /// # Panics
    /// When it is sealed.
    pub(crate) fn with_open_mut<R>(&self, change: impl FnOnce(&mut OpenSegment) -> R) -> R {
        let mut open = self.open.write().unwrap_or_else(PoisonError::into_inner);
        change(open.as_mut().expect("only an open segment is written"))
    }

    /// Uses the open index, or the sealed one.
    fn with<R>(&self, open: impl FnOnce(&OpenSegment) -> R, sealed: impl FnOnce(&SealedSegment) -> R) -> R {
        if let Some(found) = self.sealed.get() {
            return sealed(found);
        }
        let guard = self.open.read().unwrap_or_else(PoisonError::into_inner);
        match guard.as_ref() {
            Some(found) => open(found),
            // Sealed between the two looks; it is set before the open index goes.
            None => sealed(self.sealed.get().expect("a segment is open or sealed")),
        }
    }

    pub(crate) fn stats(&self) -> SegmentStats {
        self.with(|open| *open.contents.stats(), |sealed| *sealed.stats())
    }

    /// Whether the bucket may have extents at or below `at` here, wide ones aside, and the highest
    /// version they can have.
    pub(crate) fn narrow_bound(&self, bucket: Bucket, at: Lsn) -> Option<Lsn> {
        let bound = |stats: &SegmentStats, has: bool| {
            (has && stats.version_min <= at).then(|| stats.version_max.min(at))
        };
        self.with(
            |open| bound(open.contents.stats(), open.contents.index().has(bucket)),
            |sealed| bound(sealed.stats(), sealed.has(bucket)),
        )
    }

    /// Up to `limit` extents of one bucket from `from` on, in key order; fewer only at the end.
    pub(crate) fn fetch(&self, from: ExtentKey, limit: usize) -> Result<Vec<Extent>, LogError> {
        self.with(
            |open| Ok(open.contents.index().fetch(from, limit)),
            |sealed| self.fetch_sealed(sealed, from, limit),
        )
    }

    fn fetch_sealed(
        &self,
        sealed: &SealedSegment,
        from: ExtentKey,
        limit: usize,
    ) -> Result<Vec<Extent>, LogError> {
        let mut extents = Vec::new();
        let mut number = sealed.block_of(from);
        while number < sealed.block_count() {
            let block = self.block(sealed, number)?;
            for place in block.lower_bound(from)..block.len() {
                let (key, extent) = block.get(place);
                if key.bucket() != from.bucket() || extents.len() == limit {
                    return Ok(extents);
                }
                extents.push(extent);
            }
            number += 1;
        }
        Ok(extents)
    }

    fn block(&self, sealed: &SealedSegment, number: u32) -> Result<IndexBlock, LogError> {
        let load = || Ok(IndexPart::Block(sealed.block(&self.file()?, number)?));
        match self.cache.part(self.key, Some(number), load)? {
            IndexPart::Block(block) => Ok(block),
            IndexPart::Wide(_) => unreachable!("block numbers name blocks"),
        }
    }

    /// The wide extents that overlap `range`, at or below `at`, in no order.
    pub(crate) fn wide(&self, range: ByteRange, at: Lsn) -> Result<Vec<Extent>, LogError> {
        let fitting = |all: &[Extent]| {
            let fits = |extent: &&Extent| extent.version <= at && extent.range.overlaps(range);
            all.iter().filter(fits).copied().collect::<Vec<_>>()
        };
        self.with(
            |open| Ok(fitting(open.contents.index().wide())),
            |sealed| {
                if sealed.wide_count() == 0 || sealed.stats().version_min > at {
                    return Ok(Vec::new());
                }
                Ok(fitting(&self.wide_sealed(sealed)?))
            },
        )
    }

    fn wide_sealed(&self, sealed: &SealedSegment) -> Result<Arc<Vec<Extent>>, LogError> {
        let load = || Ok(IndexPart::Wide(Arc::new(sealed.wide(&self.file()?)?)));
        match self.cache.part(self.key, None, load)? {
            IndexPart::Wide(extents) => Ok(extents),
            IndexPart::Block(_) => unreachable!("no block number names the wide extents"),
        }
    }

    /// Calls `visit` for every extent, wide ones too, in no order.
    pub(crate) fn each_extent(&self, mut visit: impl FnMut(&Extent)) -> Result<(), LogError> {
        self.with(
            |open| {
                let index = open.contents.index();
                for extent in index.extents().chain(index.wide().iter().copied()) {
                    visit(&extent);
                }
                Ok(())
            },
            // The visitor is used in one of the two only, but the compiler cannot know.
            |_| Ok::<(), LogError>(()),
        )?;
        if let Some(sealed) = self.sealed.get() {
            // Sealed during the walk above: every extent may come a second time, which is allowed for.
            for number in 0..sealed.block_count() {
                let block = self.block(sealed, number)?;
                for place in 0..block.len() {
                    visit(&block.get(place).1);
                }
            }
            for extent in self.wide_sealed(sealed)?.iter() {
                visit(extent);
            }
        }
        Ok(())
    }

    /// What it touches, when it is sealed.
    pub(crate) fn disk_blocks(&self) -> Result<Option<Touched>, LogError> {
        let Some(sealed) = self.sealed.get() else { return Ok(None) };
        let blocks = sealed.disk_blocks(&self.file()?)?;
        Ok(Some(Touched { blocks, wide: self.wide_sealed(sealed)? }))
    }

    /// Where the entries that are in the file end.
    pub(crate) fn entries_end(&self) -> ByteOffset {
        self.with(|open| open.end, SealedSegment::entries_end)
    }

    /// Calls `visit` for the header of each entry in the file, in order, until it says stop.
    pub(crate) fn each_header(&self, mut visit: impl FnMut(&EntryHeader) -> bool) -> Result<(), LogError> {
        let file = self.file()?;
        for item in file.headers(self.header, self.entries_end()) {
            let (header, _): (EntryHeader, Position) = item?;
            if !visit(&header) {
                break;
            }
        }
        Ok(())
    }

    /// Reads `wanted` parts of the disk (in order, apart from each other) from the entry of an extent and hands
    /// their bytes to `copy`, piece by piece; each was checked.
    pub(crate) fn read_entry(
        &self,
        extent: &Extent,
        wanted: &[ByteRange],
        mut copy: impl FnMut(ByteRange, &[u8]),
    ) -> Result<(), LogError> {
        let parts = self
            .cache
            .entry(self.key, extent.position, || Ok(self.file()?.parts(&self.header, extent)?))?;
        assert_eq!(parts.header().seq, extent.seq, "one entry stands at a position for ever");
        if let Some(part) = wanted.iter().find(|part| !parts.range().contains(**part)) {
            return Err(LogError::Damaged {
                file: self.storage.display(&self.path),
                offset: extent.position.offset(),
                what: format!("the index expects {part} in entry {}, it has {}", extent.seq, parts.range()),
            });
        }
        let mut pieces: Vec<usize> = wanted.iter().flat_map(|part| parts.pieces_of(*part)).collect();
        pieces.dedup();
        for run in pieces.chunk_by(|a, b| a + 1 == *b).flat_map(|run| run.chunks(PIECES_AT_ONCE)) {
            self.read_pieces(extent.position, &parts, run[0]..run[0] + run.len(), |piece, bytes| {
                let first = wanted.partition_point(|part| part.end() <= piece.start());
                let mut used = 0;
                for part in wanted[first..].iter().map_while(|part| part.intersection(piece)) {
                    let from = (part.start().0 - piece.start().0) as usize;
                    let length = (part.count().0) as usize;
                    copy(part, &bytes[from..from + length]);
                    used += length;
                }
                used == bytes.len()
            })?;
        }
        Ok(())
    }

    /// Hands consecutive pieces to `take`, which says whether it used all of one; others are kept.
    fn read_pieces(
        &self,
        entry: Position,
        parts: &EntryParts,
        pieces: Range<usize>,
        mut take: impl FnMut(ByteRange, &[u8]) -> bool,
    ) -> Result<(), LogError> {
        let key = |piece: usize| PieceKey { segment: self.key, entry, piece };
        let mut next = pieces.start;
        while next < pieces.end {
            if let Some(kept) = self.cache.piece(key(next)) {
                take(parts.piece(next), &kept);
                next += 1;
                continue;
            }
            let missing = (next + 1..pieces.end).find(|piece| self.cache.piece(key(*piece)).is_some());
            let run = next..missing.unwrap_or(pieces.end);
            next = run.end;
            let bytes = self.file()?.payload(parts, run.clone())?;
            let mut at = 0;
            for number in run {
                let piece = parts.piece(number);
                let end = at + piece.count().0 as usize;
                if !take(piece, &bytes[at..end]) {
                    self.cache.keep_piece(key(number), Bytes::copy_from_slice(&bytes[at..end]));
                }
                at = end;
            }
        }
        Ok(())
    }

    /// The file, opened when it is not.
    pub(crate) fn file(&self) -> Result<SegmentFile, LogError> {
        if self.sealed.get().is_none() {
            let guard = self.open.read().unwrap_or_else(PoisonError::into_inner);
            if let Some(open) = guard.as_ref() {
                return Ok(open.file.clone());
            }
        }
        self.cache.file(self.key, || {
            let name = self.storage.display(&self.path);
            match self.storage.open(&self.path) {
                Ok(file) => Ok(SegmentFile::new(file, name)),
                Err(source) => Err(LogError::Io { step: format!("open {}", name.display()), source }),
            }
        })
    }
}
