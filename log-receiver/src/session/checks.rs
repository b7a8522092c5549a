//! What a message of a claimed disk must fit: the log as it stands, and the disk.

use backtide_protocol::{CloseCode, Closed, Record};
use backtide_units::{ByteRange, CaptureTime, Lsn};

use super::Streaming;
use crate::disks::{Disks, closed};

impl Streaming {
    /// A record continues the log exactly where it stands: the agent's `previous` proves that
    /// nothing between was lost. Whether its LSN is above that is the log's own check.
    pub(super) fn check_record(&self, disks: &mut Disks, record: &Record) -> Result<(), Closed> {
        let covered = self.covered(disks);
        if record.previous != covered {
            let why = format!(
                "expected a record that follows LSN {covered}, found LSN {} following {}: something is missing",
                record.lsn, record.previous
            );
            return Err(closed(CloseCode::Invalid, why));
        }
        self.check_range(disks, record.range)
    }

    /// The time of what comes next in the log. Agents never go back; should one do, it takes no history with it: a
    /// ladder goes by the times in the log, and must not find the newest record to be older than the first.
    pub(super) fn in_order(&self, disks: &mut Disks, time: CaptureTime) -> CaptureTime {
        let last = self.disk(disks).timeline().and_then(|timeline| timeline.last_time());
        time.max(last.unwrap_or_default()).min(CaptureTime::PLAUSIBLE_MAX)
    }

    pub(super) fn check_range(&self, disks: &mut Disks, range: ByteRange) -> Result<(), Closed> {
        let size = self.disk(disks).size();
        if range.end().0 <= size.0 {
            return Ok(());
        }
        let why = format!("bytes {range} lie beyond the end of the disk at {size}");
        Err(closed(CloseCode::Invalid, why))
    }

    pub(super) fn check_reached(&self, disks: &mut Disks, what: &str, lsn: Lsn) -> Result<(), Closed> {
        let covered = self.covered(disks);
        if lsn <= covered {
            return Ok(());
        }
        let why = format!("a {what} at LSN {lsn}, but the log has only reached {covered}");
        Err(closed(CloseCode::Invalid, why))
    }

    pub(super) fn covered(&self, disks: &mut Disks) -> Lsn {
        self.disk(disks).timeline().map_or(Lsn::ZERO, |timeline| timeline.covered())
    }

    /// A mark is sent again after a reconnect: the same label at the same LSN changes nothing. The
    /// same label at another LSN is a new mark, and the newest of a label is the one that counts.
    pub(super) fn has_mark(&self, disks: &mut Disks, lsn: Lsn, label: &str) -> bool {
        let marks = self.disk(disks).timeline().map_or(&[][..], |timeline| timeline.marks());
        let newest = marks.iter().rev().find(|mark| mark.label == label);
        newest.is_some_and(|mark| mark.at.lsn == lsn)
    }

    /// So is a flush. Each is about more than the one before it.
    pub(super) fn has_flush(&self, disks: &mut Disks, lsn: Lsn) -> bool {
        let newest = self.disk(disks).timeline().and_then(|timeline| timeline.flushes().1);
        newest.is_some_and(|newest| newest.lsn >= lsn)
    }
}
