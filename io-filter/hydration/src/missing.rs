//! Which blocks are missing, and the rules of what may be done meanwhile.
//!
//! ```text
//!           fetch            fetched            stored
//! missing ─────────▶ fetching ─────────▶ storing ─────────▶ present
//!    │                  │ a guest writes it: what is fetched does not count
//!    └──────────────────┴──▶ overwriting ──────────────────▶ present
//!                              │ the write failed
//!                              └──▶ missing
//! ```
//!
//! What was stored and could not be noted is missing, and shown: it is read from the image, and fetched again to be noted.
//! It is shown no longer when the image could not be made durable: then it may lose what it was given before.
//!
//! Invariants: a block is missing until its content is on the image *and* the journal says so, whoever brings
//! it. A block that is being stored is not written by a guest, and the other way round. Nothing is fetched
//! twice at a time.

use backtide_tracking::DirtyBitmap;
use backtide_units::{BlockCount, BlockIndex, BlockRange, ByteCount, ByteRange};

/// The longest fetch: 1 MiB.
const FETCH_BLOCKS_MAX: BlockCount = BlockCount(256);

/// At least so much around a touched block is fetched with it, where it is missing: 64 KiB.
const AROUND_BLOCKS: u64 = 16;

/// One fetch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FetchId(u64);

/// One change of a guest that overwrites missing blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChangeId(u64);

/// Why something cannot be done yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Need {
    /// These have to be fetched, if any; whatever is under way has to end. Then ask again.
    Wait(Vec<BlockRange>),
    /// The source has lost what this block held.
    Damaged(BlockIndex),
}

/// What is being stored of a fetch.
#[derive(Debug)]
struct Store {
    id: FetchId,
    blocks: Vec<BlockRange>,
    /// How many doubts there were when it began.
    doubts: u64,
}

/// What is missing of a disk.
#[derive(Debug)]
pub struct Missing {
    size: ByteCount,
    missing: DirtyBitmap,
    /// The source has no right content for these, which are missing.
    damaged: DirtyBitmap,
    /// The image holds these, which are missing since the journal does not say so.
    shown: DirtyBitmap,
    next: u64,
    fetching: Vec<(FetchId, BlockRange)>,
    storing: Vec<Store>,
    /// So often it was found out that the image may lose what it holds.
    doubts: u64,
    overwriting: Vec<(ChangeId, Vec<BlockRange>)>,
}

impl Missing {
    /// Of a disk of `size`.
    pub fn new(size: ByteCount, missing: DirtyBitmap) -> Self {
        Self {
            size,
            missing,
            damaged: DirtyBitmap::new(),
            shown: DirtyBitmap::new(),
            next: 0,
            fetching: Vec::new(),
            storing: Vec::new(),
            doubts: 0,
            overwriting: Vec::new(),
        }
    }

    /// The missing blocks.
    pub fn blocks(&self) -> &DirtyBitmap {
        &self.missing
    }

    /// Missing blocks that the source has lost.
    pub fn damaged(&self) -> &DirtyBitmap {
        &self.damaged
    }

    /// Whether nothing is missing.
    pub fn is_empty(&self) -> bool {
        self.missing.is_empty()
    }

    /// Whether something in `range` is missing. What touches nothing missing needs no rule.
    pub fn touches(&self, range: ByteRange) -> bool {
        !range.is_empty() && self.missing.touches(BlockRange::touched_by(range))
    }

    /// What reading `range` from the image needs first; nothing: it can be read.
    pub fn before_read(&self, range: ByteRange) -> Option<Need> {
        self.needed(BlockRange::touched_by(range))
    }

    /// A change of all of `range` may begin, or needs something first. What it covers wholly is missing
    /// until [`end_change`](Self::end_change).
    ///
    /// # Errors
    /// What it needs first.
    pub fn begin_change(&mut self, range: ByteRange) -> Result<ChangeId, Need> {
        let touched = BlockRange::touched_by(range);
        let covered = BlockRange::covered_by(range, self.size);
        let edges = if covered.is_empty() {
            [touched, BlockRange::default()]
        } else {
            [
                BlockRange::between(touched.start(), covered.start()),
                BlockRange::between(covered.end(), touched.end()),
            ]
        };
        let needs: Vec<Need> = edges.into_iter().filter_map(|edge| self.needed(edge)).collect();
        if let Some(damaged) = needs.iter().find(|need| matches!(need, Need::Damaged(_))) {
            return Err(damaged.clone());
        }
        let taken = self.stored_or_overwritten().any(|blocks| blocks.overlaps(touched));
        if taken || !needs.is_empty() {
            let fetch = needs.into_iter().flat_map(|need| match need {
                Need::Wait(fetch) => fetch,
                Need::Damaged(_) => Vec::new(),
            });
            return Err(Need::Wait(fetch.collect()));
        }
        let id = ChangeId(self.name());
        // At the edges it is what is shown: with the rest of it the block is present.
        let blocks = self.runs(touched);
        for run in &blocks {
            self.shown.remove(*run);
        }
        self.overwriting.push((id, blocks));
        Ok(id)
    }

    /// The missing blocks that a change overwrites, at its edges in part: the journal has to know them before the change is
    /// [ended](Self::end_change) well.
    pub fn overwritten(&self, id: ChangeId) -> &[BlockRange] {
        let found = self.overwriting.iter().find(|(other, _)| *other == id);
        &found.expect("the change was begun").1
    }

    /// A change has ended; `present`: it is on the image, and in the journal.
    pub fn end_change(&mut self, id: ChangeId, present: bool) {
        let index = self.overwriting.iter().position(|(other, _)| *other == id);
        let (_, blocks) = self.overwriting.swap_remove(index.expect("the change was begun"));
        if present {
            self.are_present(&blocks);
        }
    }

    /// A fetch of `blocks` begins.
    pub fn begin_fetch(&mut self, blocks: BlockRange) -> FetchId {
        let id = FetchId(self.name());
        self.fetching.push((id, blocks));
        id
    }

    /// A fetch has ended. With its content, what is to be written to the image now; until
    /// [`end_store`](Self::end_store) no guest writes there.
    pub fn end_fetch(&mut self, id: FetchId, brought: bool) -> Vec<BlockRange> {
        let index = self.fetching.iter().position(|(other, _)| *other == id);
        let (_, blocks) = self.fetching.swap_remove(index.expect("the fetch was begun"));
        if !brought {
            return Vec::new();
        }
        let mut wanted = self.of_missing(blocks);
        // What a guest is writing or has written meanwhile is newer.
        for taken in self.stored_or_overwritten() {
            wanted.remove(taken);
        }
        let wanted: Vec<BlockRange> = wanted.runs(blocks, FETCH_BLOCKS_MAX).collect();
        if !wanted.is_empty() {
            self.storing.push(Store { id, blocks: wanted.clone(), doubts: self.doubts });
        }
        wanted
    }

    /// The blocks of a fetch are on the image, and in the journal, if `present`.
    pub fn end_store(&mut self, id: FetchId, present: bool) {
        let store = self.take_store(id);
        if present {
            self.are_present(&store.blocks);
        }
    }

    /// The blocks of a fetch are on the image, and the journal does not say so.
    pub fn end_unnoted(&mut self, id: FetchId) {
        let store = self.take_store(id);
        // Otherwise they may have been on it before it lost something.
        if store.doubts == self.doubts {
            for run in store.blocks {
                self.shown.insert(run);
            }
        }
    }

    /// The image could not be made durable: it may lose what it holds, and what of that is missing has to be brought again.
    pub fn doubt_image(&mut self) {
        self.doubts += 1;
        self.shown = DirtyBitmap::new();
    }

    fn take_store(&mut self, id: FetchId) -> Store {
        let index = self.storing.iter().position(|store| store.id == id);
        self.storing.swap_remove(index.expect("something was to be stored"))
    }

    /// The source has lost the content of a block.
    pub fn is_damaged(&mut self, block: BlockIndex) {
        if self.missing.touches(single(block)) {
            self.damaged.insert(single(block));
        }
    }

    /// The next run that nobody fetches yet, for whoever fetches everything, from `from` on.
    pub fn next_unfetched(&self, from: BlockIndex) -> Option<BlockRange> {
        let end = BlockRange::whole_disk(self.size).end();
        let mut from = from;
        loop {
            let run = self.missing.next_run(from, end, FETCH_BLOCKS_MAX)?;
            if let Some(free) = self.unfetched(run).into_iter().next() {
                return Some(free);
            }
            from = run.end();
        }
    }

    fn needed(&self, touched: BlockRange) -> Option<Need> {
        let mut lacking = self.of_missing(touched);
        lacking.subtract(&self.shown);
        if lacking.is_empty() {
            return None;
        }
        let lacking: Vec<BlockRange> = lacking.runs(touched, BlockCount(u64::MAX)).collect();
        let damaged = |run: &BlockRange| self.damaged.next_run(run.start(), run.end(), BlockCount(1));
        if let Some(damaged) = lacking.iter().find_map(damaged) {
            return Some(Need::Damaged(damaged.start()));
        }
        let mut fetch = DirtyBitmap::new();
        for run in lacking.iter().flat_map(|run| self.unfetched(*run)) {
            let start = run.start().0 / AROUND_BLOCKS * AROUND_BLOCKS;
            let around = BlockRange::from(start..run.end().0.next_multiple_of(AROUND_BLOCKS));
            for free in self.unfetched(around) {
                fetch.insert(free);
            }
        }
        fetch.subtract(&self.shown);
        Some(Need::Wait(fetch.runs(BlockRange::whole_disk(self.size), FETCH_BLOCKS_MAX).collect()))
    }

    /// Missing blocks of `range` that nobody brings and the source has.
    fn unfetched(&self, range: BlockRange) -> Vec<BlockRange> {
        let mut free = self.of_missing(range);
        free.subtract(&self.damaged);
        for (_, blocks) in &self.fetching {
            free.remove(*blocks);
        }
        for taken in self.stored_or_overwritten() {
            free.remove(taken);
        }
        free.runs(range, FETCH_BLOCKS_MAX).collect()
    }

    fn of_missing(&self, range: BlockRange) -> DirtyBitmap {
        let mut of = DirtyBitmap::new();
        for run in self.runs(range) {
            of.insert(run);
        }
        of
    }

    fn runs(&self, range: BlockRange) -> Vec<BlockRange> {
        self.missing.runs(range, BlockCount(u64::MAX)).collect()
    }

    fn stored_or_overwritten(&self) -> impl Iterator<Item = BlockRange> {
        let storing = self.storing.iter().flat_map(|store| &store.blocks);
        storing.chain(self.overwriting.iter().flat_map(|(_, blocks)| blocks)).copied()
    }

    fn are_present(&mut self, blocks: &[BlockRange]) {
        for run in blocks {
            self.missing.remove(*run);
            self.damaged.remove(*run);
            self.shown.remove(*run);
        }
    }

    fn name(&mut self) -> u64 {
        self.next += 1;
        self.next
    }
}

fn single(block: BlockIndex) -> BlockRange {
    BlockRange::between(block, BlockIndex(block.0 + 1))
}

#[cfg(test)]
mod tests;
