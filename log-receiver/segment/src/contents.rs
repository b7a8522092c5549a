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
    /// Bytes of the disk that pass data covers.
    pub pass_bytes: u64,
}

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
            EntryKind::PassData => self.run().pass_bytes += header.length,
            EntryKind::PassBegin | EntryKind::PassEnd | EntryKind::Mark | EntryKind::Attach => {
                let control = control.expect("a control entry comes with its text");
                self.control_bytes += 128 + u64::from(header.payload_length);
                self.steps.push(Step::Control(control));
            }
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

    /// The index.
    pub fn index(&self) -> &OpenIndex {
        &self.index
    }

    /// The steps so far.
    pub fn steps(&self) -> &[Step] {
        &self.steps
    }

    /// Counts and bounds so far.
    pub fn stats(&self) -> &SegmentStats {
        &self.stats
    }

    /// More than the footer will take: space to keep free for it.
    pub fn footer_bytes_max(&self) -> ByteCount {
        // An extent takes 24 bytes (and its share of a block), up to 24 in the bucket bitmap when its
        // bucket stands alone, up to 48 in the block bitmap; a wide one 40, and some in the bitmaps.
        // A run lies between two control entries at most, each counted with room for one.
        let extents = self.index.count() as u64 * 112;
        ByteCount(16 * 1024 + extents + self.control_bytes * 2)
    }
}
