//! The fold that makes a [`Timeline`]: entry by entry while the log grows, step by step from footers
//! when it is opened. Both ways give the same timeline.
//!
//! ```text
//!                     PassBegin                    PassEnd(valid_from)
//!   in sync ───────────────────────▶ pass open ──────────────────────────▶ in sync
//!   last interval ends at covered    hole open     hole closed, new interval [valid_from, covered]
//!                                    │  ▲  ▲ │
//!                                    │  └──┘ PassBegin: the open pass is aborted
//!                       PassEnd(None)▼  │ PassBegin
//!                                   out of sync, hole still open
//! ```
//! A log begins out of sync. Records only ever extend `covered`; they become points while in sync.

use backtide_segment::{
    AttachFacts, DISK_SIZE_MAX, Entry, PAYLOAD_MAX, PassContent, PassReason, RecordRun, Step, TEXT_MAX,
};
use backtide_units::{ByteCount, ByteRange, CaptureTime, Lsn, Reason};

use crate::{
    Attached, Hole, INTERVALS_MAX, Interval, InvalidEntry, Mark, OpenPass, TimedLsn, Timeline,
    timeline::drop_oldest,
};

impl Timeline {
    /// Whether `entry` may come now.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn check(&self, entry: &Entry) -> Result<(), InvalidEntry> {
        match entry {
            Entry::Write { lsn, range, payload, .. } => {
                self.check_record(*lsn)?;
                check_range(*range)?;
                check_payload(*range, ByteCount::of(payload))
            }
            Entry::Zero { lsn, range, .. } => {
                self.check_record(*lsn)?;
                check_range(*range)
            }
            Entry::PassBegin { at, gap_from, reason, .. } => {
                check_text(&reason.text)?;
                self.check_pass_begin(*at, *gap_from)
            }
            Entry::PassData { at, range, content } => {
                self.check_pass(*at)?;
                check_range(*range)?;
                match content {
                    PassContent::Bytes { payload, .. } => check_payload(*range, ByteCount::of(payload)),
                    PassContent::Zeroes => Ok(()),
                }
            }
            Entry::PassEnd { at, valid_from, .. } => {
                self.check_pass(*at)?;
                self.check_valid_from(*at, *valid_from)
            }
            Entry::Mark { label, .. } => check_text(label),
            Entry::Attach { epoch, size, .. } => {
                if let Some(seen) = self.attached.as_ref().filter(|seen| seen.epoch > *epoch) {
                    return Err(InvalidEntry::StaleEpoch { found: epoch.0, seen: seen.epoch.0 });
                }
                check_size(*size)
            }
            Entry::Flush { .. } | Entry::Unchanged { .. } => Ok(()),
        }
    }

    /// Takes an entry that [`Timeline::check`] has passed.
    pub fn fold(&mut self, entry: &Entry) {
        match entry {
            Entry::Write { lsn, time, .. } | Entry::Zero { lsn, time, .. } => {
                self.records += 1;
                self.reach(TimedLsn { lsn: *lsn, time: *time });
            }
            Entry::Flush { lsn, time } => {
                self.flushes += 1;
                self.last_flush = Some(TimedLsn { lsn: *lsn, time: *time });
            }
            Entry::Unchanged { lsn, time } => self.unchanged_until(TimedLsn { lsn: *lsn, time: *time }),
            Entry::PassBegin { at, time, reason, .. } => self.begin_pass(*at, *time, reason),
            Entry::PassData { .. } => {}
            Entry::PassEnd { at, valid_from, .. } => self.end_pass(*at, *valid_from),
            Entry::Mark { lsn, time, label } => {
                self.see(*lsn);
                self.note_mark(Mark { label: label.clone(), at: TimedLsn { lsn: *lsn, time: *time } });
            }
            Entry::Attach { epoch, attach, next_lsn, size, name, time, facts } => {
                self.note_epoch(*epoch, facts.before);
                self.note_facts(facts);
                self.see(Lsn(next_lsn.0.saturating_sub(1)));
                self.note_size(*next_lsn, *size);
                let (epoch, attach, size, time) = (*epoch, *attach, *size, *time);
                self.attached = Some(Attached { epoch, attach, name: name.clone(), size, time });
            }
        }
    }

    /// Takes a step of a footer: the same as folding each of its entries.
    ///
    /// # Errors
    /// When it cannot follow: the footer is not of this log.
    pub fn fold_step(&mut self, step: &Step) -> Result<(), InvalidEntry> {
        match step {
            Step::Run(run) => self.fold_run(run),
            Step::Control(entry) => {
                self.check(entry)?;
                self.fold(entry);
                Ok(())
            }
        }
    }

    fn fold_run(&mut self, run: &RecordRun) -> Result<(), InvalidEntry> {
        let timed = |(lsn, time): (Lsn, CaptureTime)| TimedLsn { lsn, time };
        if run.records > 0 {
            self.check_record(run.first.0)?;
            self.records = self.records.saturating_add(run.records);
            self.reach(timed(run.last));
        }
        if run.flushes > 0 {
            self.flushes = self.flushes.saturating_add(run.flushes);
            self.last_flush = Some(timed(run.last_flush));
        }
        self.unchanged_until(timed(run.unchanged));
        Ok(())
    }

    fn reach(&mut self, at: TimedLsn) {
        self.see(at.lsn);
        self.last = at;
        if self.in_interval {
            let interval = self.intervals.last_mut().expect("in sync means an interval that grows");
            interval.to = at;
        }
    }

    /// While in sync, the last point is the disk's content for as long as nothing was captured since: a hole behind it
    /// begins only then. Of any other LSN, or out of sync, this says nothing about points. (Nor does a flush: a record that
    /// was captured before its end may have become a dirty block since.)
    fn unchanged_until(&mut self, at: TimedLsn) {
        if self.in_interval && at.lsn == self.last.lsn && at.time > self.last.time {
            self.reach(at);
        }
    }

    fn note_facts(&mut self, facts: &AttachFacts) {
        if facts.ack > 0 {
            self.ack = facts.ack;
        }
        if facts.origin.is_some() {
            self.origin.clone_from(&facts.origin);
        }
    }

    pub(crate) fn see(&mut self, lsn: Lsn) {
        self.highest = self.highest.max(lsn);
    }

    fn begin_pass(&mut self, at: Lsn, time: CaptureTime, reason: &PassReason) {
        self.in_interval = false;
        match self.holes.last_mut().filter(|hole| hole.to.is_none()) {
            Some(hole) => {
                hole.passes += 1;
                // What was lost is more than what the hole began with.
                if gravity(reason) > gravity(&hole.reason) {
                    hole.reason = reason.clone();
                }
            }
            None => {
                self.holes.push(Hole { from: self.latest(), to: None, reason: reason.clone(), passes: 1 });
            }
        }
        self.open_pass = Some(OpenPass { at, time });
        self.reach(TimedLsn { lsn: at, time });
    }

    fn end_pass(&mut self, at: Lsn, valid_from: Option<Lsn>) {
        let pass = self.open_pass.take().expect("checked: this pass is open");
        let Some(valid_from) = valid_from else { return };
        // The time of a point after T is not in the entry; it is not after that of the last record.
        let time = if valid_from == at { pass.time } else { self.last.time };
        let from = TimedLsn { lsn: valid_from, time };
        let mut hole = self.holes.pop().expect("an open pass means an open hole");
        let seam = hole.from.is_some_and(|last| last.lsn.0.checked_add(1) == Some(valid_from.0));
        if seam {
            let interval = self.intervals.last_mut().expect("a hole after a point means an interval");
            interval.to = self.last;
            self.seams.push(from);
            drop_oldest(&mut self.seams, INTERVALS_MAX);
        } else {
            self.intervals.push(Interval { from, to: self.last });
            self.keep_intervals();
            // What lies before the first point of all is no hole in anything.
            if hole.from.is_some() {
                hole.to = Some(from);
                self.holes.push(hole);
            }
        }
        self.in_interval = true;
    }

    fn check_record(&self, lsn: Lsn) -> Result<(), InvalidEntry> {
        let covered = self.covered();
        if lsn > covered { Ok(()) } else { Err(InvalidEntry::NotAbove { found: lsn, covered }) }
    }

    fn check_pass_begin(&self, at: Lsn, gap_from: Lsn) -> Result<(), InvalidEntry> {
        let covered = self.covered();
        if at <= covered || at <= gap_from {
            return Err(InvalidEntry::PassNotAbove { at, gap_from, covered });
        }
        if gap_from > covered {
            return Err(InvalidEntry::GapAhead { gap_from, covered });
        }
        Ok(())
    }

    fn check_pass(&self, at: Lsn) -> Result<(), InvalidEntry> {
        let open = self.open_pass.map(|pass| pass.at);
        if open == Some(at) { Ok(()) } else { Err(InvalidEntry::NotThisPass { found: at, open }) }
    }

    fn check_valid_from(&self, at: Lsn, valid_from: Option<Lsn>) -> Result<(), InvalidEntry> {
        let covered = self.covered();
        match valid_from {
            Some(valid_from) if valid_from < at || valid_from > covered => {
                Err(InvalidEntry::ValidFromOutside { at, valid_from, covered })
            }
            Some(_) | None => Ok(()),
        }
    }
}

/// Whether acknowledged changes are gone, and whether what is left of the log had an end that is known.
fn gravity(reason: &PassReason) -> u8 {
    match Reason::from_code(reason.code) {
        Some(Reason::Damaged) => 2,
        Some(Reason::ReceiverRolledBack) => 1,
        Some(_) | None => 0,
    }
}

fn check_range(range: ByteRange) -> Result<(), InvalidEntry> {
    if range.is_empty() {
        return Err(InvalidEntry::Range { range, why: "it is empty" });
    }
    if range.end().0 > DISK_SIZE_MAX.0 {
        return Err(InvalidEntry::Range { range, why: "it ends beyond 256 TiB" });
    }
    Ok(())
}

fn check_payload(range: ByteRange, payload: ByteCount) -> Result<(), InvalidEntry> {
    if payload != range.count() {
        return Err(InvalidEntry::Length { found: payload.0, expected: format!("{}", range.count()) });
    }
    if payload > PAYLOAD_MAX {
        return Err(InvalidEntry::Length { found: payload.0, expected: format!("at most {PAYLOAD_MAX}") });
    }
    Ok(())
}

fn check_text(text: &str) -> Result<(), InvalidEntry> {
    let length = ByteCount::of(text.as_bytes());
    if length > TEXT_MAX {
        return Err(InvalidEntry::Length { found: length.0, expected: format!("at most {TEXT_MAX}") });
    }
    Ok(())
}

fn check_size(size: ByteCount) -> Result<(), InvalidEntry> {
    if size > DISK_SIZE_MAX {
        return Err(InvalidEntry::Length {
            found: size.0,
            expected: format!("a disk of at most {DISK_SIZE_MAX}"),
        });
    }
    Ok(())
}
