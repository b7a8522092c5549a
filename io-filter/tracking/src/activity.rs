//! The activity log in memory: which extents may differ from what the newest durable snapshot says,
//! and what has to be written before a change may touch another one.
//!
//! Without I/O: [`ActivityLog::enter`] says which record a change waits for,
//! [`ActivityLog::next_record`] what to write, and [`ActivityLog::record_done`] that it is durable.
//!
//! **Why nothing is forgotten.** Snapshot N says, as of its capture: the blocks that may differ
//! (the filter's business), and the extents that stay hot, among them every one in which a change
//! was under way. A block that may differ now and is not in it was changed since, by a change that
//! was submitted after the capture; so its extent was hot at the capture and is listed, or it was
//! cold, and the change waited for a record with a sequence number that the snapshot does not
//! cover. Extents go cold by being left out of a snapshot, and count as cold from its capture on,
//! not from when it is durable: what is logged meanwhile holds for the old snapshot and for the new.

use std::collections::{BTreeMap, VecDeque};

use backtide_units::{BlockRange, ByteCount};

use crate::{
    extents::{ActivityLimits, ExtentRun, runs_of},
    record::{LogRecord, RUNS_MAX},
};

/// A record's place in the log: 1, 2, 3, ...
pub type Sequence = u64;

/// Extents logged ahead of a sequential writer, which then never waits.
const AHEAD: u32 = 8;

/// A change of more extents than this is kept as one.
const WIDE: u32 = 256;

/// What an extent's being hot costs in a snapshot or record, for weighing one against the other.
const SECTOR_BYTES: u64 = 4096;

#[derive(Clone, Debug)]
struct Hot {
    /// The record that says so; 0 when none has to.
    sequence: Sequence,
    /// Changes under way.
    users: u32,
    /// When it was used last, in changes.
    used: u64,
    /// Logged ahead of a writer and not reached yet.
    ahead: bool,
}

/// A change of very many extents.
#[derive(Clone, Debug)]
struct Wide {
    run: ExtentRun,
    under_way: bool,
}

/// What a snapshot says of the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Captured {
    /// Which snapshot this is.
    pub generation: u64,
    /// Records from here on come on top of it.
    pub log_from: Sequence,
    /// The extents that stay hot.
    pub hot: Vec<ExtentRun>,
}

/// See the module's description.
#[derive(Clone, Debug)]
pub struct ActivityLog {
    limits: ActivityLimits,
    /// Extents of the disk.
    extents: u32,
    hot: BTreeMap<u32, Hot>,
    wide: Vec<Wide>,
    /// Changes so far.
    clock: u64,
    /// The clock at the last capture that let idle extents go.
    idle_before: u64,
    /// Records to be written, the last one still growing.
    queued: VecDeque<LogRecord>,
    writing: bool,
    issued: Sequence,
    durable: Sequence,
    generation: u64,
    /// The durable snapshot's `log_from`, and whether it says that everything may differ.
    base: (Sequence, bool),
    /// The same of the one being written.
    capturing: Option<(Sequence, bool)>,
    /// What the last snapshot cost.
    snapshot_bytes: u64,
}

impl ActivityLog {
    /// The log of a disk of `size` whose file was just made with snapshot 1; `everything` is what
    /// that says.
    pub fn new(limits: ActivityLimits, size: ByteCount, everything: bool) -> Self {
        Self {
            extents: limits.extents_of(size),
            limits,
            hot: BTreeMap::new(),
            wide: Vec::new(),
            clock: 0,
            idle_before: 0,
            queued: VecDeque::new(),
            writing: false,
            issued: 0,
            durable: 0,
            generation: 1,
            base: (1, everything),
            capturing: None,
            snapshot_bytes: 0,
        }
    }

    /// The file is gone, durably: a crash means that everything may differ, and nobody waits for a record. The one that is
    /// put in its place later, with snapshot 1, says so too, until a snapshot follows. Changes under way stay entered:
    /// that snapshot lists their extents.
    pub fn begin_anew(&mut self) {
        self.hot.retain(|_, hot| hot.users > 0);
        for hot in self.hot.values_mut() {
            (hot.sequence, hot.ahead) = (0, false);
        }
        self.wide.retain(|wide| wide.under_way);
        self.queued.clear();
        self.writing = false;
        (self.issued, self.durable, self.generation) = (0, 0, 1);
        (self.base, self.capturing, self.snapshot_bytes) = ((1, true), None, 0);
    }

    /// A change of these blocks wants to begin. It may when the record returned is durable; at once
    /// when there is none. [`leave`](Self::leave) when it has ended, however it did.
    pub fn enter(&mut self, blocks: BlockRange) -> Option<Sequence> {
        self.clock += 1;
        let run = self.limits.touched_by(blocks);
        if run.count > WIDE {
            self.wide.push(Wide { run, under_way: true });
            let sequence = self.log(run);
            return Some(sequence).filter(|sequence| *sequence > self.durable);
        }
        let mut needed = 0;
        for extent in run.first..run.end() {
            needed = needed.max(self.enter_one(extent));
        }
        Some(needed).filter(|needed| *needed > self.durable)
    }

    fn enter_one(&mut self, extent: u32) -> Sequence {
        let clock = self.clock;
        if let Some(hot) = self.hot.get_mut(&extent) {
            hot.users += 1;
            hot.used = clock;
            let sequence = hot.sequence;
            if std::mem::take(&mut hot.ahead) {
                self.log_ahead(extent);
            }
            return sequence;
        }
        let sequence = self.log(ExtentRun::of(extent));
        self.hot.insert(extent, Hot { sequence, users: 1, used: clock, ahead: false });
        if extent > 0 && self.hot.contains_key(&(extent - 1)) {
            self.log_ahead(extent);
        }
        sequence
    }

    /// A writer goes from extent to extent: the next ones are logged before it comes there.
    fn log_ahead(&mut self, extent: u32) {
        if extent.saturating_add(AHEAD / 2) < self.extents
            && self.hot.contains_key(&extent.saturating_add(AHEAD / 2))
        {
            return;
        }
        for next in extent.saturating_add(1)..self.extents.min(extent.saturating_add(AHEAD + 1)) {
            if !self.hot.contains_key(&next) {
                let sequence = self.log(ExtentRun::of(next));
                self.hot.insert(next, Hot { sequence, users: 0, used: self.clock, ahead: true });
            }
        }
    }

    /// The record that will say these extents are hot; 0 when none has to.
    fn log(&mut self, run: ExtentRun) -> Sequence {
        // Everything counts as hot, by the durable snapshot and by the one that may replace it.
        if self.base.1 && self.capturing.is_none_or(|(_, everything)| everything) {
            return 0;
        }
        match self.queued.back_mut() {
            Some(record) if record.runs.len() < RUNS_MAX => match record.runs.last_mut() {
                Some(last) if last.end() == run.first => last.count += run.count,
                Some(_) | None => record.runs.push(run),
            },
            Some(_) | None => {
                let sequence = self.issued + self.queued.len() as u64 + 1;
                self.queued.push_back(LogRecord { sequence, runs: vec![run] });
            }
        }
        self.issued + self.queued.len() as u64
    }

    /// A change that entered has ended.
    ///
    /// # Panics
    /// When it had not entered.
    pub fn leave(&mut self, blocks: BlockRange) {
        let run = self.limits.touched_by(blocks);
        if run.count > WIDE {
            let wide = self.wide.iter_mut().find(|wide| wide.run == run && wide.under_way);
            wide.expect("what leaves has entered").under_way = false;
            return;
        }
        for extent in run.first..run.end() {
            let hot = self.hot.get_mut(&extent).expect("what leaves has entered");
            hot.users = hot.users.checked_sub(1).expect("what leaves has entered");
        }
        if self.is_everything() && self.hot.len() as u64 > 2 * u64::from(self.limits.hot) {
            // No snapshot is going to say what is hot while everything is.
            self.hot.retain(|_, hot| hot.users > 0);
            self.wide.retain(|wide| wide.under_way);
        }
    }

    /// Whether the durable snapshot says that everything may differ, and no other is on its way.
    pub fn is_everything(&self) -> bool {
        self.base.1 && self.capturing.is_none()
    }

    /// The next record to be made durable, one at a time; none while there is none, while one is
    /// being written, or while its place is still needed.
    pub fn next_record(&mut self) -> Option<LogRecord> {
        let full = self.issued + 1 - self.base.0 >= u64::from(self.limits.sectors);
        if self.writing || full {
            return None;
        }
        let record = self.queued.pop_front()?;
        self.issued = record.sequence;
        self.writing = true;
        Some(record)
    }

    /// The record is durable; returns its sequence number: changes that waited for it may begin.
    pub fn record_done(&mut self) -> Sequence {
        assert!(std::mem::take(&mut self.writing), "a record is written");
        self.durable = self.issued;
        self.durable
    }

    /// Whether a snapshot is due: the log fills up, or more is hot than has to be compared after a
    /// crash. One that is larger is due later, as far as the log has room, so that snapshots do not
    /// cost many times what the log does.
    pub fn wants_snapshot(&self) -> bool {
        if self.capturing.is_some() {
            return false;
        }
        let hot = u64::from(self.limits.hot);
        let sectors = u64::from(self.limits.sectors);
        let last = self.snapshot_bytes / SECTOR_BYTES;
        let slack = (hot / 2).max(last);
        let logged = self.issued + self.queued.len() as u64 + 1 - self.base.0;
        let crowded = !self.base.1 && (self.hot.len() + self.wide.len()) as u64 > hot + slack.max(1);
        logged >= last.clamp(sectors / 4, sectors * 3 / 4).max(1) || crowded
    }

    /// Begins a snapshot: from here on exactly the extents it lists are hot. `everything`: it says
    /// that everything may differ. `idle`: extents that nobody used since the last such go, too.
    ///
    /// # Panics
    /// When one is under way.
    pub fn capture(&mut self, everything: bool, idle: bool) -> Captured {
        assert!(self.capturing.is_none(), "one snapshot at a time");
        let mut used: Vec<u64> = self.hot.values().map(|hot| hot.used).collect();
        used.sort_unstable_by(|one, other| other.cmp(one));
        let mut oldest = used.get(self.limits.hot as usize).map_or(0, |used| used + 1);
        if idle {
            oldest = oldest.max(self.idle_before + 1);
            self.idle_before = self.clock;
        }
        self.hot.retain(|_, hot| hot.users > 0 || hot.used >= oldest);
        self.wide.retain(|wide| wide.under_way);
        let mut hot = runs_of(self.hot.keys().copied());
        hot.extend(self.wide.iter().map(|wide| wide.run));
        let log_from = self.issued + 1;
        self.generation += 1;
        self.capturing = Some((log_from, everything));
        Captured { generation: self.generation, log_from, hot }
    }

    /// The snapshot is durable; it took so many bytes.
    pub fn snapshot_done(&mut self, bytes: ByteCount) {
        self.base = self.capturing.take().expect("a snapshot was under way");
        self.snapshot_bytes = bytes.0;
    }

    /// Whether idle extents could be let go by a snapshot.
    pub fn has_hot(&self) -> bool {
        !self.hot.is_empty() || !self.wide.is_empty()
    }

    /// How many extents are hot.
    pub fn hot_count(&self) -> u64 {
        let wide: u64 = self.wide.iter().map(|wide| u64::from(wide.run.count)).sum();
        self.hot.len() as u64 + wide
    }

    /// Whether a snapshot is under way.
    pub fn is_capturing(&self) -> bool {
        self.capturing.is_some()
    }
}

#[cfg(test)]
mod tests;
