//! One segment of a log as readers see it: open, with its index in memory, or sealed, with its index in
//! the file. It is sealed once, under the readers that have it, and never opened again.

mod open;
#[cfg(test)]
mod tests;

use std::{
    ops::Range,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock},
};

use backtide_segment::{
    Body, Bucket, EntryHeader, EntryParts, Extent, ExtentKey, Guide, IndexBlock, Position, SealedSegment,
    SegmentFile, SegmentHeader, SegmentStats, Step, Stretch,
};
use backtide_storage::Storage;
use backtide_units::{ByteCount, ByteOffset, ByteRange, Lsn};
use roaring::RoaringTreemap;

use crate::{
    LogCache, LogError,
    cache::{IndexPart, PartName, PieceKey, SegmentKey},
};
pub(crate) use open::OpenSegment;

/// One segment, shared between the log and its views.
pub(crate) struct Segment {
    storage: Arc<dyn Storage>,
    path: PathBuf,
    header: SegmentHeader,
    cache: LogCache,
    key: SegmentKey,
    open: RwLock<Option<OpenSegment>>,
    /// Held by a writer that waits for `open` or has it. The lock alone prefers whoever comes again.
    turn: Mutex<()>,
    sealed: OnceLock<SealedSegment>,
}

/// What somebody who walks through an index asks for next.
pub(crate) enum Next {
    /// The next extent.
    On,
    /// The first from a key on, which lies behind this one.
    From(ExtentKey),
    /// Nothing more.
    End,
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
        let turn = Mutex::default();
        Self { storage, path, header, cache: cache.clone(), key, open, turn, sealed: OnceLock::new() }
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
        let (open, turn) = (RwLock::new(None), Mutex::default());
        Self { storage, path, header, cache: cache.clone(), key, open, turn, sealed }
    }

    pub(crate) fn header(&self) -> &SegmentHeader {
        &self.header
    }

    /// Lets readers use the footer and gives the memory of the open index back. Once is enough.
    pub(crate) fn become_sealed(&self, sealed: SealedSegment) {
        // Another one says the same: it was made of the same entries.
        let _ = self.sealed.set(sealed);
        let turn = self.turn();
        let open = self.open.write().unwrap_or_else(PoisonError::into_inner).take();
        drop(turn);
        // Readers go on while the memory is given back.
        drop(open);
    }

    fn turn(&self) -> MutexGuard<'_, ()> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks at the open segment; `None` when it is sealed.
    pub(crate) fn while_open<R>(&self, look: impl FnOnce(&OpenSegment) -> R) -> Option<R> {
        self.open.read().unwrap_or_else(PoisonError::into_inner).as_ref().map(look)
    }

    /// Changes the open segment; only the log that owns it does.
    ///
    /// # Panics
    /// When it is sealed.
    pub(crate) fn with_open_mut<R>(&self, change: impl FnOnce(&mut OpenSegment) -> R) -> R {
        let _turn = self.turn();
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

    /// The footer, when it has one.
    pub(crate) fn sealed(&self) -> Option<&SealedSegment> {
        self.sealed.get()
    }

    pub(crate) fn stats(&self) -> SegmentStats {
        self.with(|open| *open.contents.stats(), |sealed| *sealed.stats())
    }

    /// The highest version that an extent at or below `at` can have here; `None` when there is none.
    pub(crate) fn version_max_at(&self, at: Lsn) -> Option<Lsn> {
        let bound = |stats: &SegmentStats| {
            (stats.version_min <= at && stats.version_min <= stats.version_max)
                .then(|| stats.version_max.min(at))
        };
        self.with(|open| bound(open.contents.stats()), |sealed| bound(sealed.stats()))
    }

    /// Whether there may be extents in the buckets of a level that touch `range`.
    pub(crate) fn may_have(&self, level: u8, range: ByteRange) -> Result<bool, LogError> {
        self.with(
            |open| Ok(open.contents.index().has(level, range)),
            |sealed| {
                if range.is_empty() {
                    return Ok(false);
                }
                let last = ByteOffset(range.end().0 - 1);
                let first = Bucket::holding(range.start(), level).code();
                let buckets = self.buckets(sealed)?;
                let before = first.checked_sub(1).map_or(0, |before| buckets.rank(before));
                Ok(buckets.rank(Bucket::holding(last, level).code()) > before)
            },
        )
    }

    fn buckets(&self, sealed: &SealedSegment) -> Result<Arc<RoaringTreemap>, LogError> {
        let load = || Ok(IndexPart::Buckets(Arc::new(sealed.summary(&self.file()?)?.buckets)));
        match self.cache.part(self.key, PartName::Buckets, load)? {
            IndexPart::Buckets(buckets) => Ok(buckets),
            IndexPart::Guide(_) | IndexPart::Block(_) => unreachable!("a part has one kind"),
        }
    }

    fn guide(&self, sealed: &SealedSegment) -> Result<Arc<Guide>, LogError> {
        let load = || Ok(IndexPart::Guide(Arc::new(sealed.guide(&self.file()?)?)));
        match self.cache.part(self.key, PartName::Guide, load)? {
            IndexPart::Guide(guide) => Ok(guide),
            IndexPart::Buckets(_) | IndexPart::Block(_) => unreachable!("a part has one kind"),
        }
    }

    fn block(&self, sealed: &SealedSegment, number: u32) -> Result<IndexBlock, LogError> {
        let load = || Ok(IndexPart::Block(sealed.block(&self.file()?, &*self.guide(sealed)?, number)?));
        match self.cache.part(self.key, PartName::Block(number), load)? {
            IndexPart::Block(block) => Ok(block),
            IndexPart::Buckets(_) | IndexPart::Guide(_) => unreachable!("a part has one kind"),
        }
    }

    /// Up to `limit` extents of one bucket from `from` on, in key order; fewer only at the end.
    pub(crate) fn fetch(&self, from: ExtentKey, limit: usize) -> Result<Vec<(ExtentKey, Extent)>, LogError> {
        self.with(
            |open| Ok(open.contents.index().fetch(from, limit)),
            |sealed| {
                let mut extents = Vec::new();
                self.walk(sealed, from, |key, extent| {
                    let wanted = key.bucket() == from.bucket() && extents.len() < limit;
                    if wanted {
                        extents.push((key, extent));
                    }
                    wanted
                })?;
                Ok(extents)
            },
        )
    }

    /// Calls `visit` for the extents of a sealed segment from a key on, in order, until it says stop.
    fn walk(
        &self,
        sealed: &SealedSegment,
        from: ExtentKey,
        mut visit: impl FnMut(ExtentKey, Extent) -> bool,
    ) -> Result<(), LogError> {
        for number in self.guide(sealed)?.block_of(from)..sealed.block_count() {
            let block = self.block(sealed, number)?;
            for place in block.lower_bound(from)..block.len() {
                let (key, extent) = block.get(place);
                if !visit(key, extent) {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// Calls `visit` for extents from a key on, in order: for those that it asks for. What is written meanwhile may be among
    /// them or not; the writer waits for a piece of an open segment at the most.
    pub(crate) fn walk_on(
        &self,
        from: ExtentKey,
        visit: &mut dyn FnMut(ExtentKey, Extent) -> Next,
    ) -> Result<(), LogError> {
        let mut next = Some(from);
        while let Some(from) = next {
            next = match self.while_open(|open| open.walk_piece(from, visit)) {
                Some(next) => {
                    // Whoever wants to write does so before the next piece.
                    drop(self.turn());
                    next
                }
                None => {
                    let sealed = self.sealed.get().expect("a segment is open or sealed");
                    return self.walk_sealed_on(sealed, from, visit);
                }
            };
        }
        Ok(())
    }

    fn walk_sealed_on(
        &self,
        sealed: &SealedSegment,
        mut from: ExtentKey,
        visit: &mut dyn FnMut(ExtentKey, Extent) -> Next,
    ) -> Result<(), LogError> {
        let guide = self.guide(sealed)?;
        let mut number = guide.block_of(from);
        while number < sealed.block_count() {
            let block = self.block(sealed, number)?;
            let mut place = block.lower_bound(from);
            number += 1;
            while place < block.len() {
                let (key, extent) = block.get(place);
                place = match visit(key, extent) {
                    Next::On => place + 1,
                    Next::From(later) => {
                        from = later;
                        block.lower_bound(later)
                    }
                    Next::End => return Ok(()),
                };
            }
            // Blocks between have nothing that is asked for.
            number = number.max(guide.block_of(from));
        }
        Ok(())
    }

    /// Calls `visit` for every extent, in key order, as [`Segment::walk_on`].
    pub(crate) fn each_extent(&self, visit: &mut dyn FnMut(&Extent)) -> Result<(), LogError> {
        let first = ExtentKey::newest(Bucket::holding(ByteOffset::ZERO, 0), Lsn::MAX);
        self.walk_on(first, &mut |_, extent| {
            visit(&extent);
            Next::On
        })
    }

    /// The 4 KiB blocks that extents other than coarse ones touch, when it is sealed; coarse ones go to `visit`.
    pub(crate) fn disk_blocks(
        &self,
        visit: &mut dyn FnMut(&Extent),
    ) -> Result<Option<RoaringTreemap>, LogError> {
        let Some(sealed) = self.sealed.get() else { return Ok(None) };
        self.walk(sealed, ExtentKey::first_coarse(), |_, extent| {
            visit(&extent);
            true
        })?;
        Ok(Some(sealed.disk_blocks(&self.file()?)?))
    }

    /// Reads all that tells what it holds, and gives nothing of it.
    pub(crate) fn read_index(&self) -> Result<(), LogError> {
        self.steps()?;
        self.stretches()?;
        self.disk_blocks(&mut |_| ())?;
        self.each_extent(&mut |_| ())
    }

    /// Whether it is sealed.
    pub(crate) fn is_sealed(&self) -> bool {
        self.sealed.get().is_some()
    }

    /// Bytes of its file; of one that is written, of its entries.
    pub(crate) fn file_bytes(&self) -> ByteCount {
        self.with(|open| ByteCount(open.end.0), SealedSegment::length)
    }

    /// The steps of its summary, when it is sealed; of one that is written those that it has now.
    pub(crate) fn steps(&self) -> Result<Vec<Step>, LogError> {
        self.with(
            |open| Ok(open.contents.steps().to_vec()),
            |sealed| Ok(sealed.summary(&self.file()?)?.steps),
        )
    }

    /// How an error names its file.
    pub(crate) fn name(&self) -> PathBuf {
        self.storage.display(&self.path)
    }

    /// Where the entries that are in the file end.
    pub(crate) fn entries_end(&self) -> ByteOffset {
        self.with(|open| open.end, SealedSegment::entries_end)
    }

    /// The stretches of its entries, in order.
    pub(crate) fn stretches(&self) -> Result<Vec<Stretch>, LogError> {
        self.with(
            |open| Ok(open.contents.stretches().to_vec()),
            |sealed| Ok(self.guide(sealed)?.stretches().to_vec()),
        )
    }

    /// Calls `visit` for the header of each entry of a stretch that is in the file, in order, until it says
    /// stop. `next` is the stretch behind it.
    pub(crate) fn each_header(
        &self,
        stretch: &Stretch,
        next: Option<&Stretch>,
        mut visit: impl FnMut(&EntryHeader) -> bool,
    ) -> Result<(), LogError> {
        let file = self.file()?;
        for item in file.headers_of(self.header, stretch, next, self.entries_end()) {
            let (header, _): (EntryHeader, Position) = item?;
            if !visit(&header) {
                break;
            }
        }
        Ok(())
    }

    /// Reads parts of the disk (in order, apart from each other) from the entry at which their extents point into the
    /// `buffer` of the `range` they lie in; each byte was checked.
    ///
    /// # Panics
    /// When there are none.
    pub(crate) fn read_entry(
        &self,
        parts_of: &[(Extent, ByteRange)],
        range: ByteRange,
        buffer: &mut [u8],
    ) -> Result<(), LogError> {
        let (Extent { position, .. }, _) = parts_of[0];
        let file = self.file()?;
        let known = |at| self.cache.body(self.key, at);
        let load = || Ok(file.parts(&self.header, &parts_of[0].0, &known)?);
        let parts = self.cache.entry(self.key, position, load)?;
        self.check_extents(&parts, parts_of)?;
        for (_, part) in parts_of {
            let from = (part.start().0 - range.start().0) as usize;
            let into = &mut buffer[from..from + part.count().0 as usize];
            self.read_part(&file, position, &parts, *part, into)?;
        }
        Ok(())
    }

    /// Whole pieces are read right into the buffer; of others no more than is wanted, once they were checked.
    fn read_part(
        &self,
        file: &SegmentFile,
        entry: Position,
        parts: &EntryParts,
        part: ByteRange,
        mut buffer: &mut [u8],
    ) -> Result<(), LogError> {
        if let Some(body) = parts.body() {
            return self.read_batched(file, (parts, body), part, buffer);
        }
        let Range { start: mut next, end } = parts.pieces_of(part);
        while next < end {
            let whole = (next..end).take_while(|number| part.contains(parts.piece(*number))).count();
            let last = if whole > 0 { next + whole - 1 } else { next };
            let span = ByteRange::between(parts.piece(next).start(), parts.piece(last).end());
            let wanted = span.intersection(part).expect("the piece holds some of it");
            let (now, later) = buffer.split_at_mut(wanted.count().0 as usize);
            match whole {
                0 => self.read_inside(file, (entry, next), parts, wanted, now)?,
                _ => file.payload_into(parts, next..last + 1, now)?,
            }
            (next, buffer) = (last + 1, later);
        }
        Ok(())
    }

    /// Bytes of an entry in a batch.
    fn read_batched(
        &self,
        file: &SegmentFile,
        (parts, body): (&EntryParts, &Body),
        part: ByteRange,
        mut buffer: &mut [u8],
    ) -> Result<(), LogError> {
        for number in parts.pieces_of(part) {
            let frame = self.cache.frame(self.key, body, number, || Ok(file.frame(body, number)?))?;
            let bytes = file.piece_in(parts, number, &frame)?;
            let piece = parts.piece(number);
            let wanted = piece.intersection(part).expect("the piece holds some of it");
            let from = (wanted.start().0 - piece.start().0) as usize;
            let (now, later) = buffer.split_at_mut(wanted.count().0 as usize);
            now.copy_from_slice(&bytes[from..from + now.len()]);
            buffer = later;
        }
        Ok(())
    }

    /// Bytes of one piece of an entry.
    fn read_inside(
        &self,
        file: &SegmentFile,
        (entry, piece): (Position, usize),
        parts: &EntryParts,
        wanted: ByteRange,
        buffer: &mut [u8],
    ) -> Result<(), LogError> {
        let key = PieceKey { segment: self.key, entry, piece };
        if let Some(sums) = self.cache.sums(key) {
            return Ok(file.part(parts, piece, &sums, wanted, buffer)?);
        }
        let (bytes, sums) = file.piece(parts, piece)?;
        let from = (wanted.start().0 - parts.piece(piece).start().0) as usize;
        buffer.copy_from_slice(&bytes[from..from + buffer.len()]);
        if sums.count() > 1 {
            self.cache.keep_sums(key, sums);
        }
        Ok(())
    }

    /// An index may say anything, and only one of its extents was looked at when the entry was read.
    fn check_extents(&self, parts: &EntryParts, parts_of: &[(Extent, ByteRange)]) -> Result<(), LogError> {
        let header = parts.header();
        let fits = |(extent, part): &&(Extent, ByteRange)| {
            (extent.seq, extent.version) == (header.seq, header.lsn) && parts.range().contains(*part)
        };
        let Some((extent, part)) = parts_of.iter().find(|wanted| !fits(wanted)) else { return Ok(()) };
        Err(LogError::Damaged {
            file: self.storage.display(&self.path),
            offset: extent.position.offset(),
            what: format!(
                "the index expects {part} in entry {} at lsn {}, found entry {} at lsn {} with {}",
                extent.seq,
                extent.version,
                header.seq,
                header.lsn,
                parts.range()
            ),
        })
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
