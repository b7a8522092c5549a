//! Changes that a disk behind has answered and may still lose: it was not told to flush since. When
//! its server ends and another takes its place, they are made again, so that nobody notices.
//!
//! Invariants: changes are in the order they were submitted, which for overlapping ones is the order
//! they take effect in; a change is here from before it is first sent until a flush that was sent
//! after its answer has succeeded, or until it has failed. One that a server refuses when it is made again has failed if
//! it was answered; otherwise whoever waits for it hears what comes of it.

use std::collections::VecDeque;

use backtide_io_filter::Change;
use bytes::Bytes;

/// With so many bytes a flush is due, so that the memory taken stays bounded...
const BYTES_DUE: u64 = 16 << 20;
/// ... or with so many changes.
const CHANGES_DUE: usize = 16 * 1024;
/// ... or with so many bytes of zeroes, which take no memory: another server may have to write them all out again.
const ZEROES_DUE: u64 = 1 << 30;

/// So many times of that are never exceeded: changes wait for the flush.
const FULL: u64 = 4;

/// Shorter payloads are copied: they may be slices of larger buffers.
const COPIED_BYTES_MAX: usize = 128 * 1024;

/// The changes of one disk.
#[derive(Debug, Default)]
pub(crate) struct Unflushed {
    entries: VecDeque<Entry>,
    next: u64,
    /// Counts answers.
    answers: u64,
    bytes: u64,
    zeroes: u64,
    /// Counts changes that have failed.
    failures: u64,
}

#[derive(Debug)]
struct Entry {
    id: ChangeId,
    change: Change,
    /// Which answer it got, once it has.
    answer: Option<u64>,
    /// A server was given it since it was last sent for whoever waits for it, and has refused it.
    refused: bool,
}

/// One of the changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct ChangeId(u64);

/// A flush on its way: what was answered before it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FlushMark(u64);

impl Unflushed {
    /// Before a change is sent.
    pub(crate) fn submit(&mut self, change: &Change) -> ChangeId {
        let id = ChangeId(self.next);
        self.next += 1;
        let change = match change {
            Change::Write { range, data, fua } if data.len() <= COPIED_BYTES_MAX => {
                Change::Write { range: *range, data: Bytes::copy_from_slice(data), fua: *fua }
            }
            change => change.clone(),
        };
        self.bytes += bytes_of(&change);
        self.zeroes += zeroes_of(&change);
        self.entries.push_back(Entry { id, change, answer: None, refused: false });
        id
    }

    /// Before a change is sent for whoever waits for it, also when that is not the first time.
    pub(crate) fn sent(&mut self, id: ChangeId) {
        if let Some(entry) = self.entry(id) {
            entry.refused = false;
        }
    }

    /// When it has succeeded.
    pub(crate) fn succeeded(&mut self, id: ChangeId) {
        self.answers += 1;
        let answer = Some(self.answers);
        if let Some(entry) = self.entry(id) {
            entry.answer = answer;
        }
    }

    /// When a server was given it that came in place of the last one, and has refused it.
    pub(crate) fn refused(&mut self, id: ChangeId) {
        if let Some(entry) = self.entry(id) {
            entry.refused = true;
        }
    }

    /// The changes that were answered and are not there: they have failed.
    pub(crate) fn forgotten(&mut self) -> Vec<Change> {
        let is_forgotten = |entry: &Entry| entry.refused && entry.answer.is_some();
        let forgotten: Vec<Change> = self
            .entries
            .iter()
            .filter(|entry| is_forgotten(entry))
            .map(|entry| entry.change.clone())
            .collect();
        self.failures += forgotten.len() as u64;
        if !forgotten.is_empty() {
            self.keep(|entry| !is_forgotten(entry));
        }
        forgotten
    }

    fn entry(&mut self, id: ChangeId) -> Option<&mut Entry> {
        let at = self.entries.binary_search_by_key(&id, |entry| entry.id).ok()?;
        Some(&mut self.entries[at])
    }

    /// When it has failed: nobody relies on it.
    pub(crate) fn failed(&mut self, id: ChangeId) {
        self.failures += 1;
        self.keep(|entry| entry.id != id);
    }

    /// How many have failed so far.
    pub(crate) fn failures(&self) -> u64 {
        self.failures
    }

    /// Before a flush is sent.
    pub(crate) fn flush(&self) -> FlushMark {
        FlushMark(self.answers)
    }

    /// When it has succeeded.
    pub(crate) fn flushed(&mut self, mark: FlushMark) {
        self.keep(|entry| entry.answer.is_none_or(|answer| answer > mark.0));
    }

    /// Whether it is time to flush without being asked to.
    pub(crate) fn is_due(&self) -> bool {
        self.bytes >= BYTES_DUE || self.zeroes >= ZEROES_DUE || self.entries.len() >= CHANGES_DUE
    }

    /// Whether a change has to wait for a flush.
    pub(crate) fn is_full(&self) -> bool {
        self.bytes >= BYTES_DUE * FULL || self.entries.len() as u64 >= CHANGES_DUE as u64 * FULL
    }

    /// What a new server has to be given, in this order.
    pub(crate) fn to_make_again(&self) -> Vec<(ChangeId, Change)> {
        self.entries.iter().map(|entry| (entry.id, entry.change.clone())).collect()
    }

    /// The same without their names.
    #[cfg(test)]
    pub(crate) fn changes(&self) -> Vec<Change> {
        self.entries.iter().map(|entry| entry.change.clone()).collect()
    }

    fn keep(&mut self, kept: impl Fn(&Entry) -> bool) {
        self.entries.retain(kept);
        self.bytes = self.entries.iter().map(|entry| bytes_of(&entry.change)).sum();
        self.zeroes = self.entries.iter().map(|entry| zeroes_of(&entry.change)).sum();
    }
}

fn bytes_of(change: &Change) -> u64 {
    match change {
        Change::Write { data, .. } => data.len() as u64,
        Change::Zero { .. } | Change::Flush => 0,
    }
}

fn zeroes_of(change: &Change) -> u64 {
    match change {
        Change::Zero { range, .. } => range.count().0,
        Change::Write { .. } | Change::Flush => 0,
    }
}

#[cfg(test)]
mod tests {
    use backtide_units::{ByteOffset, ByteRange};

    use super::*;

    fn write(at: u64, length: usize) -> Change {
        let range = ByteRange::between(ByteOffset(at), ByteOffset(at + length as u64));
        Change::Write { range, data: vec![7; length].into(), fua: false }
    }

    #[test]
    fn a_flush_covers_what_was_answered_before_it_was_sent() {
        let mut unflushed = Unflushed::default();
        let early = unflushed.submit(&write(0, 512));
        let late = unflushed.submit(&write(512, 512));
        let failed = unflushed.submit(&write(1024, 512));
        unflushed.succeeded(early);
        let mark = unflushed.flush();
        unflushed.succeeded(late);
        unflushed.failed(failed);
        unflushed.flushed(mark);
        assert_eq!(unflushed.changes(), [write(512, 512)], "its answer came while the flush was on its way");
        let mark = unflushed.flush();
        unflushed.flushed(mark);
        assert_eq!((unflushed.changes(), unflushed.bytes), (vec![], 0));
    }

    #[test]
    fn what_was_answered_is_forgotten_where_a_server_refused_it_since_it_was_sent() {
        let mut unflushed = Unflushed::default();
        let [before, after, again] = [0, 512, 1024].map(|at| unflushed.submit(&write(at, 512)));
        unflushed.succeeded(before);
        for id in [before, after, again] {
            unflushed.refused(id);
        }
        assert_eq!(unflushed.forgotten(), [write(0, 512)]);
        // The last server's answer comes late; the next is asked once more.
        unflushed.succeeded(after);
        unflushed.sent(again);
        unflushed.succeeded(again);
        assert_eq!(unflushed.forgotten(), [write(512, 512)]);
        assert_eq!((unflushed.changes(), unflushed.failures()), (vec![write(1024, 512)], 2));
    }

    #[test]
    fn a_flush_is_due_before_memory_grows() {
        let mut unflushed = Unflushed::default();
        while !unflushed.is_due() {
            unflushed.submit(&write(0, 1 << 20));
        }
        assert_eq!((unflushed.bytes, unflushed.is_full()), (BYTES_DUE, false));
        while !unflushed.is_full() {
            unflushed.submit(&write(0, 1 << 20));
        }
        assert_eq!(unflushed.bytes, BYTES_DUE * FULL);
    }

    #[test]
    fn a_flush_is_due_of_many_zeroes_and_no_change_waits_for_it() {
        let mut unflushed = Unflushed::default();
        let range = ByteRange::between(ByteOffset(0), ByteOffset(ZEROES_DUE / 2));
        let zero = Change::Zero { range, trim: true, fua: false };
        let first = unflushed.submit(&zero);
        assert!(!unflushed.is_due());
        for _ in 0..8 {
            unflushed.submit(&zero);
        }
        assert!(unflushed.is_due() && !unflushed.is_full());
        unflushed.succeeded(first);
        unflushed.flushed(unflushed.flush());
        assert_eq!(unflushed.zeroes, ZEROES_DUE * 4);
    }
}
