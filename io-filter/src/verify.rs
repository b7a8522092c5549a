//! Comparing the whole disk with the receiver while the guest goes on.
//!
//! Each run is compared at the LSN of the moment it is read, under the guard, when no change of it is
//! under way: so nothing needs to be copied before a write, and a change in flight is never a
//! difference. Where the disk holds no data, and nothing was changed since that was found out, the
//! receiver is told of zeroes without a read: a sparse disk takes as long as its data.
//!
//! While the guest is faster than the stream the disk is not in sync, and nothing can be compared: the verify waits for
//! that, and goes on where it was.

use std::collections::BTreeMap;

use backtide_protocol::{Compare, CompareItem, CompareResult, Content, Message};
use backtide_tracking::DirtyBitmap;
use backtide_units::{BlockCount, BlockIndex, BlockRange, ByteCount, ByteRange, Lsn, Reason};

use crate::{
    capture::{Ongoing, Queued},
    compare::{ZEROES_RUN_MAX, is_answer},
    differing::Differing,
    event::{Effect, IoFailure, IoId, LocalData, LocalOp, Now},
    filter::{Filter, Mode},
    mutant::Mutant,
};

/// Why a verify did not come to a result.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum VerifyError {
    /// Only a disk in sync can be compared.
    #[error("only a disk in sync and connected can be verified")]
    NotInSync,
    /// One is running.
    #[error("a verify of this disk is running")]
    Running,
    /// The disk was paused on the way, its receiver is away, or somebody writes the disk past the agent.
    #[error("the disk was paused, lost its receiver, or was written past its agent during the verify")]
    Interrupted,
    /// Somebody asked for its end.
    #[error("the verify was cancelled")]
    Cancelled,
    /// The local disk could not be read.
    #[error("cannot read bytes {range} of the local disk: errno {errno}")]
    Read {
        /// Where.
        range: String,
        /// What the operating system said.
        errno: i32,
    },
}

/// What a verify found.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct VerifyReport {
    /// Bytes compared so far.
    pub compared: ByteCount,
    /// Bytes to compare in all.
    pub total: ByteCount,
    /// Every run was compared at a point in `from..=to`.
    pub from: Lsn,
    /// See `from`.
    pub to: Lsn,
    /// The blocks of the chunks, of at most 64 KiB, in which disk and receiver differ.
    pub differing: Differing,
}

impl VerifyReport {
    /// All stretches that differ, in order; of a disk of `size`.
    pub fn differing_ranges(&self, size: ByteCount) -> impl Iterator<Item = ByteRange> {
        let all = BlockRange::whole_disk(size);
        self.differing.blocks().runs(all, all.count()).map(move |run| run.bytes(size))
    }
}

/// A run that a verify reads or waits to read; of an interrupted one, it is let go.
#[derive(Clone, Copy, Debug)]
pub(crate) struct VerifyRun {
    job: u64,
    blocks: BlockRange,
}

impl VerifyRun {
    pub(crate) fn blocks(self) -> BlockRange {
        self.blocks
    }
}

/// A verify under way, or its result.
#[derive(Clone, Debug)]
pub(crate) struct VerifyJob {
    number: u64,
    report: VerifyReport,
    /// Which blocks hold data is being found out.
    scan: Option<IoId>,
    /// Blocks that have to be read: they held data at the scan, or were changed since it began.
    data: DirtyBitmap,
    cursor: BlockIndex,
    /// Blocks the receiver does not have zeroes for, where the disk holds no data.
    again: DirtyBitmap,
    /// Long stretches that held no data when the receiver was asked, which did not answer before the disk left sync.
    holes: DirtyBitmap,
    /// Blocks whose read gave way to the guest: they are read one by one.
    careful: DirtyBitmap,
    /// Reads and turns at the guard under way.
    busy: usize,
    pending: BTreeMap<u64, Vec<CompareItem>>,
    /// Whether what differs is sent anew at the end.
    repair: bool,
    result: Option<Result<(), VerifyError>>,
}

/// What a verify does next.
enum Next {
    Read(BlockRange),
    Zeroes(BlockRange),
    Nothing,
}

impl VerifyJob {
    /// A change of these blocks begins: nobody knows any more that they hold no data.
    pub(crate) fn note_change(&mut self, blocks: BlockRange) {
        if self.result.is_none() {
            self.data.insert(blocks);
        }
    }

    fn is_through(&self, end: BlockIndex) -> bool {
        let left_over = [&self.again, &self.holes, &self.careful];
        self.scan.is_none() && self.cursor >= end && left_over.iter().all(|blocks| blocks.is_empty())
    }

    /// What was asked is not answered any more.
    fn ask_anew(&mut self) {
        for item in std::mem::take(&mut self.pending).into_values().flatten() {
            let blocks = BlockRange::touched_by(item.range);
            if is_long_hole(&item) {
                self.holes.insert(blocks)
            } else {
                self.again.insert(blocks)
            };
        }
    }

    /// The next hole that is one still.
    fn take_hole(&mut self, end: BlockIndex) -> Option<BlockRange> {
        while let Some(run) = self.holes.next_run(BlockIndex(0), end, ZEROES_RUN_MAX) {
            let data = self.data.next_run(run.start(), run.end(), run.count());
            let hole = BlockRange::between(run.start(), data.map_or(run.end(), BlockRange::start));
            if let Some(data) = data {
                self.holes.remove(data);
                self.again.insert(data);
            }
            if !hole.is_empty() {
                self.holes.remove(hole);
                return Some(hole);
            }
        }
        None
    }

    /// The next run, taken.
    fn take_next(&mut self, end: BlockIndex, may_read: bool) -> Next {
        let (start, chunk) = (BlockIndex(0), VERIFY_RUN_BLOCKS_MAX);
        let left_over = [(&mut self.careful, BlockCount(1)), (&mut self.again, chunk)];
        for (blocks, limit) in left_over.into_iter().filter(|_| may_read) {
            if let Some(run) = blocks.next_run(start, end, limit) {
                blocks.remove(run);
                return Next::Read(run);
            }
        }
        if let Some(hole) = self.take_hole(end) {
            return Next::Zeroes(hole);
        }
        if self.cursor >= end {
            return Next::Nothing;
        }
        let data = self.data.next_run(self.cursor, end, BlockCount(1)).map_or(end, BlockRange::start);
        let hole = data.0.min(self.cursor.0 + ZEROES_RUN_MAX.0) - self.cursor.0;
        let next = if hole >= chunk.0 || data == end {
            Next::Zeroes(BlockRange::from(self.cursor.0..self.cursor.0 + hole))
        } else if may_read {
            let stop = (self.cursor.0 / chunk.0 + 1) * chunk.0;
            Next::Read(BlockRange::from(self.cursor.0..stop.min(end.0)))
        } else {
            return Next::Nothing;
        };
        if let Next::Read(run) | Next::Zeroes(run) = &next {
            self.cursor = run.end();
        }
        next
    }
}

/// The longest run a verify reads: changes of it wait as long as that takes, and as long as the
/// run waits for its turn.
const VERIFY_RUN_BLOCKS_MAX: BlockCount = BlockCount(16);

/// Verify reads under way at once, those that wait for their turn included.
const VERIFY_READS_MAX: usize = 4;

/// Questions of a verify under way at once.
const VERIFY_PENDING_MAX: usize = 64;

/// Whether it was asked of a stretch without data that is longer than what is read at once.
fn is_long_hole(item: &CompareItem) -> bool {
    item.content == Content::Zeroes && BlockRange::touched_by(item.range).count() > VERIFY_RUN_BLOCKS_MAX
}

impl Filter {
    /// Compares the whole disk with the receiver while the guest goes on: each run at the LSN of the
    /// moment it is read, when no change of it is under way. So nothing needs to be copied before a
    /// write, and a change in flight is never a difference. With `repair` what differs is sent anew
    /// when all is compared: the local disk is what the guest has.
    ///
    /// # Errors
    /// When the disk is not in sync, or a verify is running.
    pub fn start_verify(&mut self, now: Now, repair: bool) -> Result<(), VerifyError> {
        self.observe(now);
        if self.is_verifying() {
            return Err(VerifyError::Running);
        }
        if self.mode != Mode::Sync || !self.is_connected() {
            return Err(VerifyError::NotInSync);
        }
        let lsn = self.window.log_end();
        let report = VerifyReport {
            total: self.settings.size,
            from: lsn,
            to: lsn,
            differing: Differing::within(self.bounded_bitmap()),
            ..VerifyReport::default()
        };
        let io = self.take_io_id();
        let mut data = self.bounded_bitmap();
        for ongoing in self.ongoing.values() {
            if let Ongoing::Change(change) = ongoing {
                data.insert(change.blocks());
            }
        }
        self.effects.push_back(Effect::Scan(io));
        self.verify = Some(VerifyJob {
            number: self.take_compare_id(),
            report,
            scan: Some(io),
            data,
            cursor: BlockIndex(0),
            again: DirtyBitmap::new(),
            holes: DirtyBitmap::new(),
            careful: DirtyBitmap::new(),
            busy: 0,
            pending: BTreeMap::new(),
            repair,
            result: None,
        });
        self.pump();
        Ok(())
    }

    /// The last verify: what it found so far and, when it has ended, how.
    pub fn verify_state(&self) -> Option<(&VerifyReport, Option<&Result<(), VerifyError>>)> {
        self.verify.as_ref().map(|job| (&job.report, job.result.as_ref()))
    }

    /// Ends the verify that is running, if one is; what it found so far stays.
    pub fn cancel_verify(&mut self, now: Now) {
        self.observe(now);
        self.end_verify(VerifyError::Cancelled);
    }

    pub(crate) fn interrupt_verify(&mut self) {
        self.end_verify(VerifyError::Interrupted);
    }

    /// What waits for sync would wait for this to be read.
    pub(crate) fn verify_cannot_read(&mut self, range: ByteRange, failure: IoFailure) {
        self.end_verify(VerifyError::Read { range: range.to_string(), errno: failure.errno });
    }

    /// The receiver lacks changes from now on: a comparison would find differences that are none.
    pub(crate) fn suspend_verify(&mut self) {
        if let Some(job) = self.verify.as_mut().filter(|job| job.result.is_none()) {
            job.ask_anew();
        }
    }

    /// Whether a question asked now is answered, and what differs then is a difference. What goes to the spill first is not
    /// asked.
    fn can_compare(&self) -> bool {
        let in_sync = self.mode == Mode::Sync || self.is_mutant(Mutant::VerifyOutOfSync);
        in_sync && self.is_connected() && self.is_spill_idle()
    }

    fn end_verify(&mut self, why: VerifyError) {
        if let Some(job) = &mut self.verify
            && job.result.is_none()
        {
            job.result = Some(Err(why));
            job.pending.clear();
            job.scan = None;
            // Nothing of it is needed any more but what it found.
            for blocks in [&mut job.data, &mut job.again, &mut job.holes, &mut job.careful] {
                *blocks = DirtyBitmap::new();
            }
        }
    }

    /// The driver's scan was for a verify: which blocks hold data.
    pub(crate) fn take_verify_scan(&mut self, io: IoId, allocated: &DirtyBitmap) -> bool {
        let Some(job) = self.verify.as_mut().filter(|job| job.scan == Some(io)) else { return false };
        job.scan = None;
        job.data.union_with(allocated);
        true
    }

    /// Whether a verify would read now.
    pub(crate) fn has_to_verify(&self) -> bool {
        let end = self.all_blocks().end();
        self.verify.as_ref().filter(|_| self.can_compare()).is_some_and(|job| {
            let busy = job.busy >= VERIFY_READS_MAX || job.pending.len() >= VERIFY_PENDING_MAX;
            job.result.is_none() && job.scan.is_none() && !job.is_through(end) && !busy
        })
    }

    pub(crate) fn go_on_verifying(&mut self) {
        let end = self.all_blocks().end();
        loop {
            let held_back = self.pace.due(self.now.monotonic).is_some();
            let can_compare = self.can_compare() && self.window.has_places();
            let Some(job) = self.verify.as_mut().filter(|job| job.result.is_none()) else { return };
            if job.is_through(end) && job.busy == 0 && job.pending.is_empty() {
                job.result = Some(Ok(()));
                job.data = DirtyBitmap::new();
                return self.repair_if_asked();
            }
            if !can_compare || job.scan.is_some() || job.pending.len() >= VERIFY_PENDING_MAX {
                return;
            }
            let may_read = job.busy < VERIFY_READS_MAX && !held_back;
            match job.take_next(end, may_read) {
                Next::Read(blocks) => self.queue_for_verify(blocks),
                Next::Zeroes(blocks) => self.verify_zeroes(blocks),
                Next::Nothing => return,
            }
        }
    }

    fn queue_for_verify(&mut self, blocks: BlockRange) {
        let job = self.verify.as_mut().expect("the caller has one");
        job.busy += 1;
        let run = VerifyRun { job: job.number, blocks };
        let ticket = self.take_ticket();
        if self.guard.acquire(ticket, blocks) {
            self.read_for_verify(run);
        } else {
            self.queued.insert(ticket, Queued::Verify(run));
        }
    }

    /// Nothing was changed there since it was seen to hold no data: these are zeroes at the log's end.
    fn verify_zeroes(&mut self, blocks: BlockRange) {
        let range = blocks.bytes(self.settings.size);
        self.ask_for_verify(vec![CompareItem { range, content: Content::Zeroes }]);
    }

    fn ask_for_verify(&mut self, items: Vec<CompareItem>) {
        let (id, at) = (self.take_compare_id(), self.window.log_end());
        let job = self.verify.as_mut().expect("the caller has one");
        job.pending.insert(id, items.clone());
        job.report.to = at;
        self.window.push(Message::Compare(Compare { id, at, items }));
    }

    fn repair_if_asked(&mut self) {
        let Some(job) = self.verify.as_ref().filter(|job| job.repair && !job.report.differing.is_empty())
        else {
            return;
        };
        self.passive.union_with(job.report.differing.blocks());
        // No change has made it known: an agent that dies before it is sent would leave nothing of it.
        self.activity.want_snapshot();
        // A scan under way is going to take them along.
        if self.mode == Mode::Sync && self.is_connected() && self.scanning.is_none() && self.lost.is_none() {
            self.begin_pass_when_possible(Reason::VerifyRepair);
        }
    }

    /// The run's turn has come; its verify may have been interrupted meanwhile, or be waiting.
    pub(crate) fn queued_verify_admitted(&mut self, run: VerifyRun) {
        if self.can_compare() && self.verify_of(run).is_some() {
            return self.read_for_verify(run);
        }
        self.put_off(run);
        self.release(run.blocks);
    }

    /// What was to be read, or was read in vain, has its turn when it can be compared.
    fn put_off(&mut self, run: VerifyRun) {
        if let Some(job) = self.verify_of(run) {
            job.busy -= 1;
            job.again.insert(run.blocks);
        }
    }

    fn read_for_verify(&mut self, run: VerifyRun) {
        let io = self.take_io_id();
        self.ongoing.insert(io, Ongoing::Verify(run));
        self.hold_for_read(io, run.blocks);
        let read = LocalOp::Read(run.blocks.bytes(self.settings.size));
        self.effects.push_back(Effect::Local(io, read));
    }

    /// Its read was given up for the guest's sake.
    pub(crate) fn verify_gave_way(&mut self, run: VerifyRun) {
        if let Some(job) = self.verify_of(run) {
            job.busy -= 1;
            job.careful.insert(run.blocks);
        }
    }

    /// Whether one is under way.
    pub(crate) fn is_verifying(&self) -> bool {
        self.verify.as_ref().is_some_and(|job| job.result.is_none())
    }

    fn verify_of(&mut self, run: VerifyRun) -> Option<&mut VerifyJob> {
        self.verify.as_mut().filter(|job| job.number == run.job && job.result.is_none())
    }

    /// The run's content and the log's end belong together: the guard kept changes out.
    pub(crate) fn verify_read_done(&mut self, run: VerifyRun, result: Result<LocalData, IoFailure>) {
        let range = run.blocks.bytes(self.settings.size);
        if result.is_ok() && !self.can_compare() {
            self.put_off(run);
        } else if let Some(job) = self.verify_of(run) {
            job.busy -= 1;
            match result {
                Ok(read) => {
                    let (_, items) = read.read_to_compare(range);
                    self.ask_for_verify(items);
                }
                Err(IoFailure { errno }) => {
                    job.result = Some(Err(VerifyError::Read { range: range.to_string(), errno }));
                }
            }
        }
        self.release(run.blocks);
    }

    pub(crate) fn verify_compared(&mut self, result: CompareResult) {
        // An answer to a question of before an interruption is of no use.
        let Some(job) = &mut self.verify else { return };
        let Some(items) = job.pending.remove(&result.id) else { return };
        if !is_answer(&result.differing, items.len()) {
            job.pending.insert(result.id, items);
            return self.refuse_compared(result.id);
        }
        job.report.compared.0 += items.iter().map(|item| item.range.count().0).sum::<u64>();
        for item in result.differing.iter().filter_map(|index| items.get(*index as usize)) {
            let blocks = BlockRange::touched_by(item.range);
            if is_long_hole(item) {
                // Somewhere in it: looked at in chunks.
                job.report.compared.0 -= item.range.count().0;
                job.again.insert(blocks);
            } else {
                job.report.differing.insert(blocks);
            }
        }
    }
}
