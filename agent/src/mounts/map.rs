//! What is known of a mounted point block by block: which blocks hold data, or which changed since another point.
//!
//! The whole of it would be as large as the disk, and would have to be there before the first byte is read. So it is
//! asked for in windows, as they are touched, and those that were not used for long make room (second chance).
//!
//! Here is only what is known; [`Reader`](super::reader::Reader) asks.
//!
//! Invariant: a window that is not known is taken for nothing.

use std::{
    cell::{Cell, RefCell},
    collections::{HashMap, VecDeque},
    rc::Rc,
};

use backtide_tracking::DirtyBitmap;
use backtide_units::{BlockRange, ByteCount, ByteOffset, ByteRange, Lsn};
use tokio::sync::Notify;

/// Bytes of a window: one question. A multiple of everything that is looked at as one.
pub(super) const WINDOW: u64 = 4 << 30;

/// The most that the windows of one map take, about: 64 of them at their densest.
const MEMORY_MAX: ByteCount = ByteCount(8 << 20);

/// What a window takes beside its blocks.
const WINDOW_MEMORY: u64 = 256;

/// Which blocks a map has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Of {
    /// Those that may hold anything but zeroes.
    Data,
    /// Those that changed since this point.
    Changed(Lsn),
}

/// Windows of one kind of blocks.
pub(super) struct Map {
    pub(super) of: Of,
    size: ByteCount,
    known: RefCell<Known>,
    /// Windows that somebody asks for; who waits hears of the end.
    asked: RefCell<HashMap<u64, Rc<Notify>>>,
}

#[derive(Default)]
struct Known {
    windows: HashMap<u64, Window>,
    /// Each of them, the one that is looked at first when room is needed at the front.
    queue: VecDeque<u64>,
    memory: u64,
}

struct Window {
    blocks: Rc<DirtyBitmap>,
    memory: u64,
    /// Since it was looked at for room.
    used: Cell<bool>,
}

/// How things are with a window.
pub(super) enum Told {
    Known(Rc<DirtyBitmap>),
    /// Somebody asks for it.
    Asked(Rc<Notify>),
    Unknown,
}

/// A window that is being asked for. It is so no longer when this ends, however that is.
pub(super) struct Asking<'map> {
    map: &'map Map,
    window: u64,
}

impl Drop for Asking<'_> {
    fn drop(&mut self) {
        if let Some(over) = self.map.asked.borrow_mut().remove(&self.window) {
            over.notify_waiters();
        }
    }
}

impl Map {
    /// Nothing is known yet of a disk of `size` bytes.
    pub(super) fn new(of: Of, size: ByteCount) -> Self {
        Self { of, size, known: RefCell::default(), asked: RefCell::default() }
    }

    /// The bytes of the window that has `at`.
    pub(super) fn window_at(&self, at: ByteOffset) -> ByteRange {
        let start = at.0 / WINDOW * WINDOW;
        ByteRange::between(ByteOffset(start), ByteOffset(start.saturating_add(WINDOW).min(self.size.0)))
    }

    /// The window that has `at`.
    pub(super) fn look(&self, at: ByteOffset) -> Told {
        let window = at.0 / WINDOW;
        if let Some(known) = self.known.borrow().windows.get(&window) {
            known.used.set(true);
            return Told::Known(Rc::clone(&known.blocks));
        }
        self.asked.borrow().get(&window).map_or(Told::Unknown, |over| Told::Asked(Rc::clone(over)))
    }

    /// Whether `range`, which lies in one window, is known to have none of the blocks.
    pub(super) fn is_without(&self, range: ByteRange) -> bool {
        let known = self.known.borrow();
        known.windows.get(&(range.start().0 / WINDOW)).is_some_and(|window| {
            window.used.set(true);
            !window.blocks.touches(BlockRange::touched_by(range))
        })
    }

    /// Whether anybody asks for any window.
    pub(super) fn is_asked(&self) -> bool {
        !self.asked.borrow().is_empty()
    }

    /// Somebody asks for the window that has `at`, which nobody else does.
    pub(super) fn ask(&self, at: ByteOffset) -> Asking<'_> {
        let window = at.0 / WINDOW;
        let before = self.asked.borrow_mut().insert(window, Rc::default());
        assert!(before.is_none(), "a window is asked for by one at a time");
        Asking { map: self, window }
    }
}

impl Asking<'_> {
    /// The blocks of the window.
    pub(super) fn blocks(&self) -> BlockRange {
        BlockRange::touched_by(self.map.window_at(ByteOffset(self.window * WINDOW)))
    }

    /// Which these are was told.
    pub(super) fn learned(&self, mut blocks: DirtyBitmap) -> Rc<DirtyBitmap> {
        blocks.keep_only(self.blocks());
        let blocks = Rc::new(blocks);
        self.map.known.borrow_mut().insert(self.window, Rc::clone(&blocks));
        blocks
    }

    /// Nobody will ever tell: every block may be one of them.
    pub(super) fn cannot_be_told(&self) -> Rc<DirtyBitmap> {
        self.learned(DirtyBitmap::of(self.blocks()))
    }
}

impl Known {
    fn insert(&mut self, window: u64, blocks: Rc<DirtyBitmap>) {
        let memory = blocks.memory().0 + WINDOW_MEMORY;
        self.memory += memory;
        let before = self.windows.insert(window, Window { blocks, memory, used: Cell::new(false) });
        match before {
            Some(before) => self.memory -= before.memory,
            None => self.queue.push_back(window),
        }
        // One is kept whatever it takes: whoever asked for it looks at it.
        while self.memory > MEMORY_MAX.0 && self.windows.len() > 1 {
            let first = self.queue.pop_front().expect("each window is in the queue");
            let used = self.windows.get(&first).is_some_and(|window| window.used.take());
            if used || first == window {
                self.queue.push_back(first);
            } else if let Some(gone) = self.windows.remove(&first) {
                self.memory -= gone.memory;
            }
        }
    }
}

/// The end of the block status that one answer gives: no further than `most` bytes, and in one window.
pub(super) fn within_a_window(range: ByteRange, most: u64) -> ByteRange {
    let window_end = (range.start().0 / WINDOW + 1).saturating_mul(WINDOW);
    let end = range.end().0.min(range.start().0.saturating_add(most)).min(window_end);
    ByteRange::between(range.start(), ByteOffset(end))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(window: u64) -> ByteOffset {
        ByteOffset(window * WINDOW + 4096)
    }

    fn is_known(map: &Map, window: u64) -> bool {
        matches!(map.look(at(window)), Told::Known(_))
    }

    /// Every eighth block of a window: what takes the most memory.
    fn dense(window: u64) -> DirtyBitmap {
        let first = window * WINDOW / 4096;
        let mut blocks = DirtyBitmap::new();
        for block in (first..first + WINDOW / 4096).step_by(8) {
            blocks.insert(BlockRange::from(block..block + 1));
        }
        blocks
    }

    #[test]
    fn a_window_is_taken_for_nothing_before_it_was_told_and_ends_with_the_disk() {
        let map = Map::new(Of::Data, ByteCount(WINDOW + 10 * 4096 + 512));
        let last = ByteRange::between(ByteOffset(WINDOW), ByteOffset(WINDOW + 4096));
        assert!(!map.is_without(last) && !map.is_asked());
        let asking = map.ask(at(1));
        assert!(map.is_asked() && matches!(map.look(at(1)), Told::Asked(_)));
        assert!(matches!(map.look(at(0)), Told::Unknown));
        let first = WINDOW / 4096;
        assert_eq!(asking.blocks(), BlockRange::from(first..first + 11));
        // What was told of other windows counts for nothing.
        let mut told = DirtyBitmap::of(BlockRange::from(0..2));
        told.insert(BlockRange::from(first + 1..first + 30));
        let known = asking.learned(told);
        drop(asking);
        assert_eq!(*known, DirtyBitmap::of(BlockRange::from(first + 1..first + 11)));
        assert!(map.is_without(last) && !map.is_asked() && !is_known(&map, 0));
        assert!(!map.is_without(ByteRange::between(last.end(), ByteOffset(WINDOW + 8192))));
        let asking = map.ask(at(0));
        asking.cannot_be_told();
        drop(asking);
        assert!(!map.is_without(ByteRange::between(ByteOffset(0), ByteOffset(4096))), "it may be anything");
    }

    #[test]
    fn windows_take_no_more_than_their_bound_and_those_in_use_stay() {
        let map = Map::new(Of::Data, ByteCount(400 * WINDOW));
        for window in 0..100 {
            map.ask(at(window)).learned(dense(window));
            assert!(is_known(&map, 0), "{window}");
        }
        let known = map.known.borrow();
        assert!(known.memory <= MEMORY_MAX.0, "{}", known.memory);
        assert!((60..65).contains(&known.windows.len()), "{}", known.windows.len());
        assert_eq!(known.queue.len(), known.windows.len());
        let sum: u64 = known.windows.values().map(|window| window.memory).sum();
        assert_eq!(known.memory, sum);
    }

    #[test]
    fn one_answer_tells_of_one_window() {
        let range = |start, end| ByteRange::between(ByteOffset(start), ByteOffset(end));
        assert_eq!(within_a_window(range(0, 9 * WINDOW), 1 << 30), range(0, 1 << 30));
        assert_eq!(within_a_window(range(WINDOW - 10, 9 * WINDOW), 1 << 30), range(WINDOW - 10, WINDOW));
        assert_eq!(within_a_window(range(WINDOW, WINDOW + 7), 1 << 30), range(WINDOW, WINDOW + 7));
    }
}
