//! What a segment holds beside payloads: its index, its statistics, and its steps.
//!
//! Steps are the entries as the timeline sees them: control entries one by one, and runs of records
//! between them summed up. They go into the footer, so that opening a log folds footers only.

use backtide_units::{ByteCount, CaptureTime, Lsn};

use crate::{Entry, EntryHeader, EntryKind, OpenIndex, Position, Seq};

/// What the timeline needs of a stretch of the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Records, flushes and pass data with no control entry between them.
    Run(RecordRun),
    /// One control entry: pass begin or end, mark, attach.
    Control(Entry),
}

/// Records between two control entries, summed up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RecordRun {
    /// How many guest writes and zeroes.
    pub records: u64,
    /// LSN and time of the first; meaningless without records.
    pub first: (Lsn, CaptureTime),
    /// LSN and time of the last; meaningless without records.
    pub last: (Lsn, CaptureTime),
    /// How many flushes.
    pub flushes: u64,
    /// LSN and time of the last flush; meaningless without flushes.
    pub last_flush: (Lsn, CaptureTime),
    /// The newest change, and when the disk was last known not to have changed since; LSN 0 when nothing said so.
    pub unchanged: (Lsn, CaptureTime),
    /// Bytes of the disk that pass data covers.
    pub pass_bytes: u64,
}

/// A stretch of a segment's entries, about 1 MiB of them: what a search for a record by its time or LSN needs
/// to read only one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stretch {
    /// Where its first entry stands.
    pub position: Position,
    /// The first entry.
    pub seq: Seq,
    /// Guest writes and zeroes.
    pub records: u32,
    /// Flushes.
    pub flushes: u32,
    /// The lowest LSN of a record, the highest there can be without one.
    pub lsn_min: Lsn,
    /// The earliest time of a record, the latest there can be without one.
    pub time_min: CaptureTime,
}

/// A stretch ends with the entry that reaches this length.
const STRETCH_BYTES: u32 = 1 << 20;

/// Counts and bounds of a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentStats {
    /// The number after the last entry's.
    pub next_seq: Seq,
    /// The lowest version of any extent; above `version_max` without extents.
    pub version_min: Lsn,
    /// The highest version of any extent.
    pub version_max: Lsn,
    /// The earliest record's time; above `time_max` without records.
    pub time_min: CaptureTime,
    /// The latest record's time.
    pub time_max: CaptureTime,
    /// Guest writes and zeroes.
    pub records: u64,
    /// Flushes.
    pub flushes: u64,
    /// Bytes of payload.
    pub payload_bytes: ByteCount,
    /// The highest entry that any entry or the header claims to have been durable.
    pub synced: Seq,
}

/// What a segment holds beside payloads, in memory while it is written.
#[derive(Clone, Debug)]
pub struct Contents {
    pub(crate) index: OpenIndex,
    pub(crate) steps: Vec<Step>,
    pub(crate) stats: SegmentStats,
    pub(crate) stretches: Vec<Stretch>,
    control_bytes: u64,
}

impl SegmentStats {
    /// Of a segment whose first entry is to be `first_seq`, created when `synced` was durable.
    pub(crate) fn new(first_seq: Seq, synced: Seq) -> Self {
        Self {
            next_seq: first_seq,
            version_min: Lsn::MAX,
            version_max: Lsn::ZERO,
            time_min: CaptureTime(u64::MAX),
            time_max: CaptureTime(0),
            records: 0,
            flushes: 0,
            payload_bytes: ByteCount::ZERO,
            synced,
        }
    }
}

impl Contents {
    /// Of a segment without entries.
    pub fn new(first_seq: Seq, synced: Seq) -> Self {
        Self {
            index: OpenIndex::default(),
            steps: Vec::new(),
            stats: SegmentStats::new(first_seq, synced),
            stretches: Vec::new(),
            control_bytes: 0,
        }
    }

    /// Adds the next entry, which stands at `position`.
    /// `control` is the entry when it is a control entry; `None` otherwise.
    ///
    /// # Panics
    /// When it is not the next entry, or its kind and `control` do not fit.
    pub fn add(&mut self, header: &EntryHeader, position: Position, control: Option<Entry>) {
        assert_eq!(header.seq, self.stats.next_seq, "entries are added in order");
        self.stats.next_seq = header.seq.next();
        if let Some(synced) = header.synced {
            self.stats.synced = self.stats.synced.max(synced);
        }
        self.stats.payload_bytes.0 += u64::from(header.payload_length);
        if header.kind.is_data() {
            self.stats.version_min = self.stats.version_min.min(header.lsn);
            self.stats.version_max = self.stats.version_max.max(header.lsn);
            self.index.add(header, position);
        }
        self.stretch(header, position);
        let at = (header.lsn, header.time);
        match header.kind {
            EntryKind::Write | EntryKind::Zero => {
                self.stats.records += 1;
                self.stats.time_min = self.stats.time_min.min(header.time);
                self.stats.time_max = self.stats.time_max.max(header.time);
                let run = self.run();
                if run.records == 0 {
                    run.first = at;
                }
                run.last = at;
                run.records += 1;
            }
            EntryKind::Flush => {
                self.stats.flushes += 1;
                let run = self.run();
                run.flushes += 1;
                run.last_flush = at;
            }
            EntryKind::Unchanged => {
                let run = self.run();
                run.unchanged = run.unchanged.max(at);
            }
            EntryKind::PassData => {
                let run = self.run();
                run.pass_bytes = run.pass_bytes.saturating_add(header.length);
            }
            EntryKind::PassBegin | EntryKind::PassEnd | EntryKind::Mark | EntryKind::Attach => {
                let control = control.expect("a control entry comes with its text");
                self.control_bytes += 128 + u64::from(header.payload_length);
                self.steps.push(Step::Control(control));
            }
        }
    }

    fn stretch(&mut self, header: &EntryHeader, position: Position) {
        let full = |stretch: &Stretch| position.0 - stretch.position.0 >= STRETCH_BYTES;
        if self.stretches.last().is_none_or(full) {
            let (lsn_min, time_min) = (Lsn::MAX, CaptureTime(u64::MAX));
            let seq = header.seq;
            self.stretches.push(Stretch { position, seq, records: 0, flushes: 0, lsn_min, time_min });
        }
        let Some(stretch) = self.stretches.last_mut() else { unreachable!("a stretch was pushed") };
        stretch.flushes += u32::from(header.kind.is_flush());
        if header.kind.is_record() {
            stretch.records += 1;
            stretch.lsn_min = stretch.lsn_min.min(header.lsn);
            stretch.time_min = stretch.time_min.min(header.time);
        }
    }

    fn run(&mut self) -> &mut RecordRun {
        if !matches!(self.steps.last(), Some(Step::Run(_))) {
            self.steps.push(Step::Run(RecordRun::default()));
        }
        match self.steps.last_mut() {
            Some(Step::Run(run)) => run,
            Some(Step::Control(_)) | None => unreachable!("a run was pushed"),
        }
    }

    /// What the control entries will take of the footer, and about what they take of memory.
    pub fn control_bytes(&self) -> ByteCount {
        ByteCount(self.control_bytes)
    }

    /// The index.
    pub fn index(&self) -> &OpenIndex {
        &self.index
    }

    /// The steps so far.
    pub fn steps(&self) -> &[Step] {
        &self.steps
    }

    /// The stretches so far, in order; they adjoin.
    pub fn stretches(&self) -> &[Stretch] {
        &self.stretches
    }

    /// Counts and bounds so far.
    pub fn stats(&self) -> &SegmentStats {
        &self.stats
    }

    /// More than the footer will take: space to keep free for it.
    pub fn footer_bytes_max(&self) -> ByteCount {
        // An extent takes 24 bytes (and its share of a block), up to 24 in the bitmap of buckets when its
        // bucket stands alone, up to 48 in the bitmap of blocks. A stretch takes 40.
        // A run lies between two control entries at most, each counted with room for one.
        let extents = self.index.count() as u64 * 112;
        let stretches = (self.stretches.len() as u64 + 1) * 40;
        ByteCount(16 * 1024 + extents + stretches + self.control_bytes * 2)
    }
}
