//! The part of the window that lies in the spill.
//!
//! The entries before position `written` are in the ring too; those that are in the ring only lie
//! between them and the rest:
//!
//! ```text
//!   entries[..written]      in the ring only        entries[written..]
//!   in memory and ring   ▸  frames next_load..   ▸  in memory only, the first of them being written
//! ```
//! So an entry is dropped from memory only when it is in the ring, sent only when everything before it
//! is in memory, and trimmed from the ring only when it leaves the window.

use backtide_protocol::{Message, Ping};
use backtide_spill::{Place, Ring, Slot, frame_bytes};
use backtide_tracking::DirtyBitmap;
use backtide_units::{ByteCount, CaptureTime, Lsn};

use super::{Entry, Item, Window, item_cost, mark_dirty};

/// Entries written at once, at most.
const BATCH_ENTRIES_MAX: usize = 1024;

/// See the module's description.
#[derive(Clone, Debug, Default)]
pub(crate) struct Spilled {
    /// None: there is no spill, and everything below is zero.
    ring: Option<Ring>,
    written: usize,
    /// What those entries cost.
    front_bytes: u64,
    next_load: u64,
    /// Where the log stands before the frame `next_load`, unless the window's base is higher.
    front_end: Lsn,
    writing: Option<Writing>,
    /// The first frame of the place being read, if what it brings is wanted still.
    reading: Option<u64>,
    /// No more is sent while so much waits for its acknowledgement.
    pub(super) in_flight_max: Option<u64>,
    /// A deliberate mistake, see [`crate::mutant`].
    pub(crate) forgets_blocks: bool,
}

#[derive(Clone, Debug)]
struct Writing {
    slot: Slot,
    entries: usize,
    bytes: ByteCount,
    /// So many of them have left the window meanwhile.
    left: usize,
    /// None of them is wanted any more.
    void: bool,
}

/// What goes to the spill next.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Batch {
    entries: usize,
    /// What it takes there.
    pub(crate) bytes: ByteCount,
    /// Where the log stands before it.
    pub(crate) base: Lsn,
}

impl Spilled {
    /// Whether something lies in the ring only.
    pub(super) fn has_gap(&self) -> bool {
        self.ring.as_ref().is_some_and(|ring| self.next_load < ring.next())
    }

    pub(super) fn written(&self) -> usize {
        self.written
    }

    /// Entries at the front that are in the ring, or on their way.
    pub(super) fn kept(&self) -> usize {
        let coming = self.writing.as_ref().filter(|writing| !writing.void);
        self.written + coming.map_or(0, |writing| writing.entries - writing.left)
    }

    /// The window's first entry has left it.
    pub(super) fn front_left(&mut self, cost: u64) {
        let Some(ring) = &mut self.ring else { return };
        if self.written > 0 {
            self.written -= 1;
            self.front_bytes -= cost;
            ring.trim(self.next_load - self.written as u64);
        } else if let Some(writing) = &mut self.writing {
            // Others may leave behind them.
            writing.left = writing.entries.min(writing.left + 1);
        }
    }

    /// Nothing of it is in the window any more.
    pub(super) fn forget(&mut self) {
        let Some(ring) = &mut self.ring else { return };
        ring.trim(ring.next());
        self.next_load = ring.next();
        (self.written, self.front_bytes, self.reading) = (0, 0, None);
        if let Some(writing) = &mut self.writing {
            writing.void = true;
        }
    }

    pub(super) fn mark(&self, dirty: &mut DirtyBitmap) {
        if let Some(ring) = self.ring.as_ref().filter(|ring| !ring.is_empty() && !self.forgets_blocks) {
            ring.mark(dirty);
        }
    }

    /// Whether the record is in the ring.
    pub(super) fn has_record(&self, lsn: Lsn) -> bool {
        self.ring.as_ref().is_some_and(|ring| ring.has_record(lsn))
    }

    /// Records that are in the ring only.
    pub(super) fn records(&self, base: Lsn) -> u64 {
        let ring = self.ring.as_ref().filter(|_| self.has_gap());
        ring.map_or(0, |ring| ring.records_above(self.front_end.max(base)))
    }

    /// When the first of those was captured.
    pub(super) fn time(&self, base: Lsn) -> Option<CaptureTime> {
        self.ring.as_ref().filter(|_| self.has_gap())?.time_above(self.front_end.max(base))
    }
}

impl Window {
    /// From now on there is a spill, with what is in the ring: it is the window's beginning.
    pub(crate) fn use_ring(&mut self, ring: Ring) {
        assert!(self.entries.is_empty(), "only at the attach");
        if !ring.is_empty() {
            (self.base, self.log_end) = (ring.base(), ring.end());
        }
        self.spill.next_load = ring.first();
        self.spill.front_end = ring.base();
        self.spill.ring = Some(ring);
    }

    /// The spill's ring, if there is a spill.
    pub(crate) fn ring(&self) -> Option<&Ring> {
        self.spill.ring.as_ref()
    }

    pub(crate) fn ring_mut(&mut self) -> Option<&mut Ring> {
        self.spill.ring.as_mut()
    }

    /// Whether the spill has something of the window, or is about to.
    pub(crate) fn holds_spill(&self) -> bool {
        self.ring().is_some_and(|ring| !ring.is_empty()) || self.spill.kept() > 0
    }

    /// Whether everything in the window is in the spill.
    pub(crate) fn is_all_spilled(&self) -> bool {
        self.ring().is_some() && self.spill.written == self.entries.len()
    }

    /// Whether what is to be spilled next may not leave yet.
    pub(crate) fn is_spill_held(&self) -> bool {
        self.is_held(self.spill.written)
    }

    /// Whether something lies in the spill only.
    pub(crate) fn has_gap(&self) -> bool {
        self.spill.has_gap()
    }

    /// What lies in the spill only.
    pub(crate) fn unread_bytes(&self) -> ByteCount {
        self.ring().map_or(ByteCount::ZERO, |ring| ring.bytes_from(self.spill.next_load))
    }

    /// What entries that are in memory and in the spill cost.
    pub(crate) fn front_bytes(&self) -> ByteCount {
        ByteCount(self.spill.front_bytes)
    }

    /// Bounds what is sent and not acknowledged.
    pub(crate) fn limit_in_flight(&mut self, bytes: Option<ByteCount>) {
        self.spill.in_flight_max = bytes.map(|bytes| bytes.0);
    }

    /// What goes to the spill next, up to so many bytes.
    pub(crate) fn next_batch(&self, limit: ByteCount) -> Option<Batch> {
        assert!(self.spill.writing.is_none(), "one batch at a time");
        let unwritten = self.entries.iter().enumerate().skip(self.spill.written).take(BATCH_ENTRIES_MAX);
        let (mut entries, mut bytes) = (0, 0);
        for (position, entry) in unwritten {
            if self.is_held(position) {
                break;
            }
            let size = frame_bytes(&spilled_form(&entry.item)).0;
            if entries > 0 && bytes + size > limit.0 {
                break;
            }
            entries += 1;
            bytes += size;
        }
        let first = self.entries.iter().skip(self.spill.written).find_map(|entry| record_lsns(&entry.item));
        let base = first.map_or(self.log_end, |(previous, _)| previous);
        (entries > 0).then_some(Batch { entries, bytes: ByteCount(bytes), base })
    }

    /// The batch is being written to this slot. Says whether a question is among it, which is dropped.
    pub(crate) fn write_batch(&mut self, batch: Batch, slot: Slot) -> (Vec<Message>, bool) {
        let range = self.spill.written..self.spill.written + batch.entries;
        let asks = |entry: &Entry| matches!(entry.item, Item::Kept(Message::Compare(_)));
        let asked = self.entries.range(range.clone()).any(asks);
        let messages = self.entries.range(range).map(|entry| spilled_form(&entry.item)).collect();
        let Batch { entries, bytes, .. } = batch;
        self.spill.writing = Some(Writing { slot, entries, bytes, left: 0, void: false });
        (messages, asked)
    }

    /// The batch is in the spill, or could not be written.
    pub(crate) fn batch_done(&mut self, messages: &[Message], done: bool) {
        let Writing { slot, entries, bytes, left, void } =
            self.spill.writing.take().expect("a batch is written once");
        let ring = self.spill.ring.as_mut().expect("it was written to the spill");
        if void || !done {
            return ring.append_failed(&slot, bytes);
        }
        let had_gap = self.spill.next_load < ring.next();
        ring.appended(&slot, messages);
        let stay = entries - left;
        if had_gap {
            assert_eq!(left, 0, "nothing leaves the window before what is in the ring");
            for entry in self.entries.drain(self.spill.written..self.spill.written + entries) {
                self.retained_bytes -= entry.cost;
            }
            return;
        }
        self.spill.next_load = ring.next();
        if left > 0 {
            ring.trim(slot.first + left as u64);
        }
        let new = self.entries.range(self.spill.written..self.spill.written + stay);
        self.spill.front_bytes += new.clone().map(|entry| entry.cost).sum::<u64>();
        let last = new.rev().find_map(|entry| record_lsns(&entry.item));
        self.spill.front_end = last.map_or(self.spill.front_end.max(ring.base()), |(_, lsn)| lsn);
        self.spill.written += stay;
    }

    /// Drops from memory what is in the spill and not sent, the newest first, until what is in both is
    /// down to this.
    pub(crate) fn shed(&mut self, limit: ByteCount) {
        let (written, mut from) = (self.spill.written, self.spill.written);
        let mut both = self.spill.front_bytes;
        while both > limit.0 && from > self.sent {
            from -= 1;
            both -= self.entries[from].cost;
        }
        if from == written {
            return;
        }
        let first = self.entries.range(from..written).find_map(|entry| record_lsns(&entry.item));
        if let Some((previous, _)) = first {
            self.spill.front_end = previous;
        }
        self.entries.drain(from..written);
        self.retained_bytes -= self.spill.front_bytes - both;
        self.spill.front_bytes = both;
        self.spill.next_load -= (written - from) as u64;
        self.spill.written = from;
        // What is being read may begin behind what is missing now.
        self.spill.reading = None;
    }

    /// The next place to be read back; it is being read from now on.
    pub(crate) fn read_next(&mut self) -> Option<Place> {
        let place = self.spill.ring.as_ref().filter(|_| self.spill.has_gap())?;
        let place = place.place_of(self.spill.next_load)?;
        self.spill.reading = Some(place.first);
        Some(place)
    }

    /// The messages of a place, or its beginning.
    pub(crate) fn loaded(&mut self, place: &Place, messages: Vec<Message>) -> bool {
        if self.spill.reading.take() != Some(place.first) {
            return false;
        }
        let known = self.spill.next_load.saturating_sub(place.first);
        let mut messages = messages.into_iter().skip(usize::try_from(known).unwrap_or(usize::MAX));
        let mut fresh: Vec<Message> = messages.by_ref().collect();
        if self.spill.written == 0 {
            let gone =
                |message: &Message| matches!(message, Message::Record(record) if record.lsn <= self.base);
            let gone = fresh.iter().rposition(gone).map_or(0, |last| last + 1);
            fresh.drain(..gone);
            self.spill.next_load += gone as u64;
            let ring = self.spill.ring.as_mut().expect("it was read from the spill");
            ring.trim(self.spill.next_load);
        }
        let rest = self.entries.split_off(self.spill.written);
        for message in fresh {
            if let Message::Record(record) = &message {
                self.spill.front_end = record.lsn;
            }
            let cost = item_cost(&message);
            self.retained_bytes += cost;
            self.spill.front_bytes += cost;
            self.spill.next_load += 1;
            self.spill.written += 1;
            self.entries.push_back(Entry { item: Item::Kept(message), seq: None, cost });
        }
        self.entries.extend(rest);
        true
    }

    /// What is in the spill only cannot be read back: the log ends before it.
    pub(crate) fn cut_spill(&mut self, dirty: &mut DirtyBitmap) {
        let end = self.spill.front_end.max(self.base);
        self.spill.mark(dirty);
        let Some(ring) = &mut self.spill.ring else { return };
        ring.cut(self.spill.next_load, end);
        if let Some(writing) = &mut self.spill.writing {
            writing.void = true;
        }
        for entry in self.entries.drain(self.spill.written..) {
            mark_dirty(&entry.item, dirty);
            self.retained_bytes -= entry.cost;
        }
        self.spill.reading = None;
        self.log_end = end;
    }

    /// The receiver has everything up to `durable` since an earlier connection. What lies before a
    /// durable record is durable, whatever it is.
    pub(super) fn trim_spilled_to(&mut self, durable: Lsn) {
        loop {
            let gap = self.spill.has_gap();
            let end = if gap { self.spill.written } else { self.entries.len() };
            let beyond = gap && durable > self.spill.front_end;
            let is_durable = |entry: &Entry| record_lsns(&entry.item).is_some_and(|(_, lsn)| lsn <= durable);
            let count = if beyond {
                end
            } else {
                self.entries.range(..end).rposition(is_durable).map_or(0, |last| last + 1)
            };
            for _ in 0..count {
                let entry = self.entries.pop_front().expect("counted above");
                self.retained_bytes -= entry.cost;
                self.spill.front_left(entry.cost);
            }
            let Some(ring) = self.spill.ring.as_mut().filter(|_| beyond) else { return };
            ring.trim_before(durable);
            if durable > ring.end() {
                ring.trim(ring.next());
            }
            self.spill.next_load = self.spill.next_load.max(ring.first());
            self.spill.front_end = durable;
            self.spill.reading = None;
        }
    }

    /// A deliberate mistake: the ring loses what the receiver has in memory only.
    pub(crate) fn trim_received(&mut self) {
        let received = self.received.min(self.spill.written);
        if let Some(ring) = &mut self.spill.ring {
            ring.trim(self.spill.next_load - (self.spill.written - received) as u64);
        }
    }
}

/// As it is written: a question of a verify is of no use to anybody who reads it later.
fn spilled_form(item: &Item) -> Message {
    match item {
        Item::Kept(Message::Compare(_)) => Message::Ping(Ping::default()),
        Item::Kept(message) => message.clone(),
        Item::DataSent(_) => unreachable!("nothing is spilled during a pass"),
    }
}

/// Where the log stands before and after a record.
fn record_lsns(item: &Item) -> Option<(Lsn, Lsn)> {
    match item {
        Item::Kept(Message::Record(record)) => Some((record.previous, record.lsn)),
        Item::Kept(_) | Item::DataSent(_) => None,
    }
}
