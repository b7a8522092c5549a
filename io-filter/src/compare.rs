//! Asking the receiver which blocks differ, so that only those travel: in a pass whose blocks are
//! mere candidates, and for the verify.

use std::{collections::VecDeque, time::Duration};

use backtide_protocol::{
    Compare, CompareItem, CompareResult, Content, Data, Message,
    message::{COMPARE_CHUNK_BYTES_MAX, COMPARE_ITEMS_MAX, COMPARE_ZEROES_BYTES_MAX},
};
use backtide_units::{BLOCK_SIZE, BlockCount, BlockIndex, BlockRange, ByteCount, ByteRange, Lsn, is_zeroes};
use bytes::Bytes;

use crate::{
    drain::{moved_bytes, pass_data},
    filter::Filter,
    pass::Phase,
};

/// A question of a pass the receiver has not answered.
#[derive(Clone, Debug)]
pub(crate) struct PendingCompare {
    /// The chunks, in the question's order, with their content at T; none for zeroes.
    chunks: Vec<(ByteRange, Option<Bytes>)>,
    /// Whether they are zeroes that nobody has read.
    of_holes: bool,
}

/// The longest stretch of zeroes in one item.
pub(crate) const ZEROES_RUN_MAX: BlockCount = BlockCount(COMPARE_ZEROES_BYTES_MAX / BLOCK_SIZE);

/// Zeroes are told of in such stretches at least, where they are.
const TELL_BLOCKS: u64 = 256;

/// Questions about zeroes under way at once.
const ZEROES_PENDING_MAX: usize = 8;

/// What a question takes in memory without its chunks, about, and each of them without its content.
const QUESTION_BYTES: u64 = 256;
const CHUNK_BYTES: u64 = (size_of::<(ByteRange, Option<Bytes>)>() + size_of::<CompareItem>()) as u64;

/// No change asks about zeroes while questions about them take so much.
const HOLE_BYTES_MAX: u64 = 4 << 20;

impl PendingCompare {
    /// What was asked about.
    pub(crate) fn ranges(&self) -> impl Iterator<Item = ByteRange> {
        self.chunks.iter().map(|(range, _)| *range)
    }

    /// What it takes in memory: here, and in the question until that is acknowledged.
    fn memory_bytes(&self) -> u64 {
        QUESTION_BYTES + self.chunks.len() as u64 * CHUNK_BYTES + self.held_bytes()
    }

    fn hole_bytes(&self) -> u64 {
        if self.of_holes { self.memory_bytes() } else { 0 }
    }

    fn held_bytes(&self) -> u64 {
        self.chunks.iter().map(|(_, bytes)| bytes.as_ref().map_or(0, |bytes| bytes.len() as u64)).sum()
    }
}

/// The items that describe the `bytes` of `range`, in chunks that do not cross multiples of the chunk size.
pub fn chunk_items(range: ByteRange, bytes: &[u8]) -> Vec<CompareItem> {
    let mut rest = bytes;
    range
        .split_at_multiples(ByteCount(COMPARE_CHUNK_BYTES_MAX))
        .map(|chunk| {
            let (bytes, behind) = rest.split_at(chunk_length(chunk));
            rest = behind;
            let content = match is_zeroes(bytes) {
                true => Content::Zeroes,
                false => Content::Hash(*blake3::hash(bytes).as_bytes()),
            };
            CompareItem { range: chunk, content }
        })
        .collect()
}

fn chunk_length(chunk: ByteRange) -> usize {
    chunk.count().as_usize().expect("a chunk is small")
}

impl Filter {
    /// The run's content at T was read: asks about it with the `items` that describe it, and holds it until
    /// the answer.
    pub(crate) fn ask_about(&mut self, run: BlockRange, bytes: &Bytes, items: Vec<CompareItem>) {
        // Chunks of a read that is kept whole need no memory of their own.
        let whole = items.iter().all(|item| item.content != Content::Zeroes);
        let pass = self.pass.as_mut().expect("only a pass compares");
        pass.active.remove(run);
        let mut chunks = Vec::with_capacity(items.len());
        let mut at = 0;
        for item in &items {
            let chunk = at..at + chunk_length(item.range);
            at = chunk.end;
            let held = (item.content != Content::Zeroes).then(|| own(&bytes.slice(chunk), whole));
            chunks.push((item.range, held));
        }
        debug_assert_eq!(at, bytes.len(), "the items describe the run");
        let pending = PendingCompare { chunks, of_holes: false };
        pass.moving += pending.held_bytes();
        self.ask(items, pending);
    }

    /// Asks about stretches of zeroes, a few at a time.
    pub(crate) fn ask_about_zeroes(&mut self) {
        let end = self.all_blocks().end();
        loop {
            let Some(pass) = self.pass.as_mut().filter(|pass| pass.phase == Phase::Draining) else { return };
            if pass.zeroes.is_empty()
                || pass.compares.len() >= ZEROES_PENDING_MAX
                || !self.window.has_places()
            {
                return;
            }
            let all = BlockRange::between(BlockIndex(0), end);
            let runs: Vec<BlockRange> =
                pass.zeroes.runs(all, ZEROES_RUN_MAX).take(COMPARE_ITEMS_MAX / 64).collect();
            self.ask_about_zero_runs(&runs);
        }
    }

    /// A change is about to end the zeroes of these blocks: the receiver is told of them first. Says whether the change may
    /// go ahead: there may be no room for that now. Of one that has waited its time the blocks are read for the pass after
    /// it, which gives no point at T then.
    pub(crate) fn tell_zeroes_before_change(&mut self, blocks: BlockRange, deadline: Duration) -> bool {
        let Some(pass) = self.pass.as_ref().filter(|pass| pass.phase == Phase::Draining) else { return true };
        if !pass.zeroes.touches(blocks) {
            return true;
        }
        // And of those around them: single blocks taken out would make the bitmap large.
        let (first, end) = (blocks.start().0 / TELL_BLOCKS, blocks.end().0.div_ceil(TELL_BLOCKS));
        let end = (end * TELL_BLOCKS).min(self.all_blocks().end().0);
        let blocks = BlockRange::between(BlockIndex(first * TELL_BLOCKS), BlockIndex(end));
        let runs: Vec<BlockRange> = pass.zeroes.runs(blocks, ZEROES_RUN_MAX).collect();
        let has_room = pass.hole_bytes < HOLE_BYTES_MAX && self.window.has_places();
        if has_room {
            for some in runs.chunks(COMPARE_ITEMS_MAX) {
                self.ask_about_zero_runs(some);
            }
        } else if pass.forfeited || deadline <= self.now.monotonic {
            self.forfeit();
            self.read_instead(&runs);
        } else {
            return false;
        }
        true
    }

    /// Blocks that were zeroes at T are drained as what they are by then.
    fn read_instead(&mut self, runs: &[BlockRange]) {
        let pass = self.pass.as_mut().expect("the caller has one");
        assert!(pass.forfeited, "they are not what they were at T");
        for run in runs {
            pass.zeroes.remove(*run);
            pass.active.insert(*run);
        }
        if pass.active.exceeds_bound() {
            // It may have taken more than those.
            pass.zeroes.subtract(&pass.active);
        }
    }

    fn ask_about_zero_runs(&mut self, runs: &[BlockRange]) {
        let size = self.settings.size;
        let pass = self.pass.as_mut().expect("the caller has one");
        for run in runs {
            pass.zeroes.remove(*run);
        }
        let ranges = || runs.iter().map(|run| run.bytes(size));
        let items = ranges().map(|range| CompareItem { range, content: Content::Zeroes }).collect();
        let chunks = ranges().map(|range| (range, None)).collect();
        self.ask(items, PendingCompare { chunks, of_holes: true });
    }

    fn ask(&mut self, items: Vec<CompareItem>, pending: PendingCompare) {
        let id = self.take_compare_id();
        let pass = self.pass.as_mut().expect("only a pass compares");
        pass.compare_bytes += pending.memory_bytes();
        pass.hole_bytes += pending.hole_bytes();
        pass.compares.insert(id, pending);
        let at = pass.at;
        self.window.push(Message::Compare(Compare { id, at, items }));
    }

    pub(crate) fn take_compare_id(&mut self) -> u64 {
        self.next_compare += 1;
        self.next_compare
    }

    /// The receiver's answer.
    pub(crate) fn compared(&mut self, result: CompareResult) {
        let asked = self.pass.as_ref().and_then(|pass| pass.compares.get(&result.id));
        let Some(asked) = asked.map(|pending| pending.chunks.len()) else {
            return self.verify_compared(result);
        };
        if !is_answer(&result.differing, asked) {
            // The question stays, and with it what it was about.
            return self.refuse_compared(result.id);
        }
        let pass = self.pass.as_mut().expect("its question was found");
        let pending = pass.compares.remove(&result.id).expect("its question was found");
        let at = pass.at;
        let mut differing: VecDeque<u32> = result.differing.into();
        let (held, memory, holes) = (pending.held_bytes(), pending.memory_bytes(), pending.hole_bytes());
        let (mut equal, mut moved) = (0, 0);
        for (index, (range, bytes)) in (0u32..).zip(pending.chunks) {
            if differing.front() == Some(&index) {
                differing.pop_front();
                let message = content_or_zeroes(at, range, bytes);
                moved += moved_bytes(&message);
                self.window.push(message);
            } else if bytes.is_some() {
                equal += range.count().0;
            }
        }
        let pass = self.pass.as_mut().expect("its question was found");
        pass.compare_bytes -= memory;
        pass.hole_bytes -= holes;
        pass.moving = pass.moving + moved - held;
        self.counters.resync_bytes_equal += equal;
        self.retry_copies();
    }

    /// Gives the connection up whose receiver answered so.
    pub(crate) fn refuse_compared(&mut self, id: u64) {
        let why = "names chunks out of order, or others than were asked about";
        self.refuse(format!("the receiver's answer {id} {why}"));
    }
}

/// Whether these are some of so many chunks that were asked about, in their order.
pub(crate) fn is_answer(differing: &[u32], asked: usize) -> bool {
    differing.is_sorted_by(|a, b| a < b) && differing.last().is_none_or(|last| (*last as usize) < asked)
}

/// The chunk, in memory of its own unless everything around it is kept too.
fn own(chunk: &Bytes, whole: bool) -> Bytes {
    if whole { chunk.clone() } else { Bytes::copy_from_slice(chunk) }
}

fn content_or_zeroes(at: Lsn, range: ByteRange, bytes: Option<Bytes>) -> Message {
    match bytes {
        Some(bytes) => pass_data(at, range, own(&bytes, false)),
        None => Message::PassData { at, range, data: Data::capture(Bytes::new()) },
    }
}
