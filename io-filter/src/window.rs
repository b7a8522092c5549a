//! The retained window: everything on its way to the receiver, in stream order, until it is
//! durable there.
//!
//! Records keep their payload (they are sent again when the stream is lost); drained blocks keep
//! only their place once they are sent (they return to the passive bitmap instead). With a spill,
//! records may leave memory for a while: see [`spilled`].

use std::collections::VecDeque;

use backtide_protocol::{Message, Record, RecordBody};
use backtide_tracking::DirtyBitmap;
use backtide_units::{BlockRange, ByteCount, ByteRange, CaptureTime, Lsn};

pub(crate) mod spilled;

use self::spilled::Spilled;

/// Accounts for what an item costs beside its payload.
const ITEM_BYTES: u64 = 192;

/// So much of passes and questions may have been sent and not be durable: what is left of each is small, and nothing else bounds
/// their number while a receiver's device stands still.
const PLACES_MAX: usize = 32 * 1024;

/// Something the receiver has to make durable.
#[derive(Clone, Debug)]
pub(crate) enum Item {
    /// A message that has not been sent, or could be sent again.
    Kept(Message),
    /// Drained blocks that were sent; their content is gone.
    DataSent(ByteRange),
}

#[derive(Clone, Debug)]
struct Entry {
    item: Item,
    /// The frame it went out as on this connection.
    seq: Option<u64>,
    cost: u64,
}

/// See the module's description.
#[derive(Clone, Debug)]
pub(crate) struct Window {
    entries: VecDeque<Entry>,
    /// How many entries at the front have been sent on this connection.
    sent: usize,
    /// How many entries at the front the receiver has in memory.
    received: usize,
    /// What records, marks and flushes cost; limited by the window's limit.
    retained_bytes: u64,
    /// What unsent drained data costs; limited by the resync buffer's limit.
    data_bytes: u64,
    /// Everything at or below it has left the window, or never was in it.
    base: Lsn,
    /// Where the log stands after what has been sent on this connection.
    sent_end: Lsn,
    /// Where the log stands after all entries: the next record's `previous`.
    log_end: Lsn,
    /// What was sent and is not acknowledged costs so much.
    in_flight_bytes: u64,
    /// How much of passes and questions was sent on this connection and is not durable.
    places: usize,
    /// Nothing that brings the log above it is sent or spilled: see [`Filter::lsns_reserved`](crate::Filter::lsns_reserved).
    reserved: Lsn,
    pub(crate) spill: Spilled,
}

/// More than that is worth a write to the stream of its own.
const LITTLE_ENTRIES: usize = 32;
const LITTLE_BYTES: u64 = 128 << 10;

/// What an acknowledgement took out of the window.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Acknowledged {
    /// A record.
    Record(Lsn, ByteCount),
    /// Drained blocks.
    Data(ByteCount),
    /// Drained blocks that are zeroes.
    Zeroes(ByteCount),
    /// The beginning of a pass.
    PassBegin(Lsn),
    /// The end of a pass.
    PassEnd(Lsn, Option<Lsn>),
    /// The name of a moment.
    Mark(Lsn, String),
    /// Something without consequences.
    Other,
}

impl Window {
    /// An empty window of a log that stands at `base`.
    pub(crate) fn new(base: Lsn) -> Self {
        Self {
            entries: VecDeque::new(),
            sent: 0,
            received: 0,
            retained_bytes: 0,
            data_bytes: 0,
            base,
            sent_end: base,
            log_end: base,
            in_flight_bytes: 0,
            places: 0,
            reserved: Lsn(u64::MAX),
            spill: Spilled::default(),
        }
    }

    /// The log stands at `base`, and nothing is retained.
    pub(crate) fn restart_at(&mut self, base: Lsn) {
        self.spill.forget();
        let (spill, reserved) = (std::mem::take(&mut self.spill), self.reserved);
        *self = Self { spill, reserved, ..Self::new(base) };
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.entries.is_empty() && !self.spill.has_gap()
    }

    pub(crate) fn retained_bytes(&self) -> ByteCount {
        ByteCount(self.retained_bytes)
    }

    /// Whether more of a pass may be read, or asked about: else the receiver is to make durable first what it has.
    pub(crate) fn has_places(&self) -> bool {
        self.places < PLACES_MAX
    }

    pub(crate) fn data_bytes(&self) -> ByteCount {
        ByteCount(self.data_bytes)
    }

    pub(crate) fn base(&self) -> Lsn {
        self.base
    }

    pub(crate) fn log_end(&self) -> Lsn {
        self.log_end
    }

    pub(crate) fn sent_end(&self) -> Lsn {
        self.sent_end
    }

    /// Whether so much is out that no more may be sent soon.
    pub(crate) fn is_held_back(&self) -> bool {
        self.spill.in_flight_max.is_some_and(|limit| self.in_flight_bytes >= limit / 2)
    }

    /// Whether there is something that can be sent now.
    pub(crate) fn has_unsent(&self) -> bool {
        let end = if self.spill.has_gap() { self.spill.written() } else { self.entries.len() };
        self.sent < end
            && !self.is_held(self.sent)
            && self.spill.in_flight_max.is_none_or(|limit| self.in_flight_bytes < limit)
    }

    /// Whether what has not been sent is a few changes and flushes of the guest and no more.
    pub(crate) fn has_little_unsent(&self) -> bool {
        let unsent = self.entries.len() - self.sent;
        let is_guests =
            |entry: &Entry| matches!(&entry.item, Item::Kept(Message::Record(_) | Message::Flush { .. }));
        unsent <= LITTLE_ENTRIES
            && !self.spill.has_gap()
            && self.entries.range(self.sent..).all(is_guests)
            && self.entries.range(self.sent..).map(|entry| entry.cost).sum::<u64>() <= LITTLE_BYTES
    }

    /// Whether frames are out that may still be acknowledged, or could be sent if there were room.
    pub(crate) fn awaits(&self) -> bool {
        !self.is_empty() && (self.sent > 0 || !self.is_held(0))
    }

    /// LSNs up to here may leave.
    pub(crate) fn reserve(&mut self, bound: Lsn) {
        self.reserved = bound;
    }

    /// Whether the LSN after this one may not leave yet.
    pub(crate) fn is_reserve_used(&self, last: Lsn) -> bool {
        last >= self.reserved
    }

    /// Whether the entry at this position may not leave yet.
    fn is_held(&self, position: usize) -> bool {
        self.entries.get(position).is_some_and(|entry| match &entry.item {
            Item::Kept(Message::Record(Record { lsn: at, .. }) | Message::PassBegin { at, .. }) => {
                *at > self.reserved
            }
            // Nothing else brings the log further.
            Item::Kept(_) | Item::DataSent(_) => false,
        })
    }

    /// How many records there are, for the lag.
    pub(crate) fn records(&self) -> u64 {
        let in_memory =
            self.entries.iter().filter(|entry| matches!(entry.item, Item::Kept(Message::Record(_)))).count();
        in_memory as u64 + self.spill.records(self.base)
    }

    /// When the oldest record was captured.
    pub(crate) fn oldest_time(&self) -> Option<CaptureTime> {
        let time = |entry: &Entry| match &entry.item {
            Item::Kept(Message::Record(record)) => Some(record.time),
            Item::Kept(_) | Item::DataSent(_) => None,
        };
        let before_gap = self.entries.iter().take(self.spill.written()).find_map(time);
        before_gap.or_else(|| self.spill.time(self.base)).or_else(|| self.entries.iter().find_map(time))
    }

    /// Appends a message to the stream.
    pub(crate) fn push(&mut self, message: Message) {
        match &message {
            Message::Record(record) => {
                assert!(
                    record.lsn > self.log_end && record.previous == self.log_end,
                    "records are appended in order"
                );
                self.log_end = record.lsn;
            }
            Message::PassBegin { at, .. } => {
                assert!(*at > self.log_end, "a pass freezes above the log's end");
                self.log_end = *at;
            }
            _ => {}
        }
        let cost = item_cost(&message);
        match &message {
            Message::PassData { .. } => self.data_bytes += cost,
            _ => self.retained_bytes += cost,
        }
        self.entries.push_back(Entry { item: Item::Kept(message), seq: None, cost });
    }

    /// The next message to send, as frame `seq`.
    pub(crate) fn send(&mut self, seq: u64) -> Option<Message> {
        if !self.has_unsent() {
            return None;
        }
        let entry = self.entries.get_mut(self.sent)?;
        self.sent += 1;
        entry.seq = Some(seq);
        let Item::Kept(message) = &entry.item else { unreachable!("what was sent is before the cursor") };
        self.places += usize::from(takes_a_place(message));
        match message {
            Message::Record(Record { lsn: at, .. }) | Message::PassBegin { at, .. } => self.sent_end = *at,
            _ => {}
        }
        if let Message::PassData { range, data, .. } = message {
            if data.bytes().is_empty() {
                // Its cost is that of its place from now on, which is not limited.
                self.data_bytes -= std::mem::take(&mut entry.cost);
                return Some(message.clone());
            }
            let range = *range;
            let sent = std::mem::replace(&mut entry.item, Item::DataSent(range));
            self.data_bytes -= std::mem::take(&mut entry.cost);
            let Item::Kept(message) = sent else { unreachable!("matched above") };
            return Some(message);
        }
        self.in_flight_bytes += entry.cost;
        Some(message.clone())
    }

    /// Notes that the receiver has frames up to `seq` in memory; returns the last record's LSN
    /// among those that are news.
    pub(crate) fn received(&mut self, seq: u64) -> Option<Lsn> {
        let mut last = None;
        while let Some(entry) = self.entries.get(self.received) {
            if self.received >= self.sent || entry.seq.is_none_or(|sent_as| sent_as > seq) {
                break;
            }
            if let Item::Kept(Message::Record(record)) = &entry.item {
                last = Some(record.lsn);
            }
            self.received += 1;
        }
        last
    }

    /// Takes out the next entry if frame `seq` and all before are durable at the receiver.
    pub(crate) fn pop_durable(&mut self, seq: u64) -> Option<Acknowledged> {
        let front = self.entries.front()?;
        if self.sent == 0 || front.seq.is_none_or(|sent_as| sent_as > seq) {
            return None;
        }
        Some(self.pop_front())
    }

    /// Takes out records the receiver has had durable since an earlier connection.
    pub(crate) fn trim_to(&mut self, durable: Lsn) {
        assert_eq!(self.sent, 0, "only before anything is sent again");
        if self.holds_spill() {
            self.trim_spilled_to(durable);
            self.base = self.base.max(durable);
            self.sent_end = self.base;
            self.log_end = self.log_end.max(durable);
            return;
        }
        // What lies before a durable record is durable; of what follows it nobody knows.
        let is_durable = |entry: &Entry| matches!(&entry.item, Item::Kept(Message::Record(record)) if record.lsn <= durable);
        let mut before = self.entries.iter().rposition(is_durable).map_or(0, |last| last + 1);
        self.entries.retain(|entry| {
            let is_before = before > 0;
            before = before.saturating_sub(1);
            match &entry.item {
                Item::Kept(Message::Record(_) | Message::Flush { .. } | Message::Unchanged { .. }) => {
                    !is_before
                }
                Item::Kept(_) | Item::DataSent(_) => true,
            }
        });
        self.retained_bytes = self.entries.iter().map(|entry| entry.cost).sum();
        self.base = self.base.max(durable);
        self.sent_end = self.base;
        self.log_end = self.log_end.max(durable);
    }

    /// Whether the log at the receiver, standing at `durable`, can be continued from here.
    pub(crate) fn continues(&self, durable: Lsn) -> bool {
        let in_reach = self.base <= durable && durable <= self.log_end;
        in_reach
            && (durable == self.base
                || durable == self.log_end
                || self.has_record(durable)
                || self.spill.has_record(durable))
    }

    fn has_record(&self, lsn: Lsn) -> bool {
        self.entries
            .iter()
            .any(|entry| matches!(&entry.item, Item::Kept(Message::Record(record)) if record.lsn == lsn))
    }

    /// Whether a mark is in memory.
    pub(crate) fn has_mark(&self, lsn: Lsn, label: &str) -> bool {
        self.entries.iter().any(|entry| match &entry.item {
            Item::Kept(Message::Mark { lsn: at, label: known, .. }) => *at == lsn && known == label,
            Item::Kept(_) | Item::DataSent(_) => false,
        })
    }

    /// The stream is lost: everything left has to be sent again.
    pub(crate) fn rewind(&mut self) {
        self.sent = 0;
        self.received = 0;
        self.places = 0;
        self.in_flight_bytes = 0;
        self.sent_end = self.base;
        for entry in &mut self.entries {
            entry.seq = None;
        }
    }

    /// Gives up: every block of every entry becomes dirty, and the window is empty.
    pub(crate) fn abandon(&mut self, dirty: &mut DirtyBitmap) {
        self.mark_all_dirty(dirty);
        self.restart_at(self.base);
    }

    /// Gives up what is in no spill: those records' blocks become dirty, and the log ends before them.
    pub(crate) fn abandon_unspilled(&mut self, dirty: &mut DirtyBitmap) {
        self.rewind();
        if self.holds_spill() { self.abandon_unsent_records(dirty) } else { self.abandon(dirty) }
    }

    /// Gives up what has not been sent: those records' blocks become dirty, and the log ends before
    /// them. Drained data and marks at or below that end stay, and so does everything up to the
    /// begin of a pass, whose T lies above the records before it. What is in the spill stays.
    pub(crate) fn abandon_unsent_records(&mut self, dirty: &mut DirtyBitmap) {
        let begins = |entry: &Entry| matches!(entry.item, Item::Kept(Message::PassBegin { .. }));
        let after_begin = self.entries.iter().rposition(begins).map_or(0, |position| position + 1);
        let unsent = self.entries.split_off(self.sent.max(after_begin).max(self.spill.kept()));
        let first = unsent.iter().find_map(|entry| match &entry.item {
            Item::Kept(Message::Record(record)) => Some(record.previous),
            Item::Kept(_) | Item::DataSent(_) => None,
        });
        let Some(end) = first else {
            self.entries.extend(unsent);
            return;
        };
        for mut entry in unsent {
            if let Item::Kept(Message::PassEnd { valid_from, .. }) = &mut entry.item {
                // What was drained late holds changes whose records go: no point has them.
                *valid_from = valid_from.filter(|valid_from| *valid_from <= end);
            }
            let stays = match &entry.item {
                Item::Kept(Message::Record(_)) => false,
                Item::Kept(
                    Message::Flush { lsn, .. } | Message::Unchanged { lsn, .. } | Message::Mark { lsn, .. },
                ) => *lsn <= end,
                Item::Kept(_) | Item::DataSent(_) => true,
            };
            if stays {
                self.entries.push_back(entry);
            } else {
                mark_dirty(&entry.item, dirty);
                self.retained_bytes -= entry.cost;
            }
        }
        self.log_end = end;
    }

    /// Marks every block of every entry.
    pub(crate) fn mark_all_dirty(&self, dirty: &mut DirtyBitmap) {
        for entry in &self.entries {
            mark_dirty(&entry.item, dirty);
        }
        self.spill.mark(dirty);
    }

    fn pop_front(&mut self) -> Acknowledged {
        let entry = self.entries.pop_front().expect("the caller saw it");
        self.sent -= 1;
        self.received = self.received.saturating_sub(1);
        self.spill.front_left(entry.cost);
        if matches!(entry.item, Item::Kept(_)) {
            self.in_flight_bytes -= entry.cost;
        }
        match entry.item {
            Item::DataSent(range) => {
                self.places -= 1;
                Acknowledged::Data(range.count())
            }
            Item::Kept(message) => {
                self.retained_bytes -= entry.cost;
                self.places -= usize::from(takes_a_place(&message));
                match message {
                    Message::Record(record) => {
                        self.base = record.lsn;
                        Acknowledged::Record(record.lsn, record.range.count())
                    }
                    Message::PassData { range, .. } => Acknowledged::Zeroes(range.count()),
                    Message::PassBegin { at, .. } => {
                        self.base = at;
                        Acknowledged::PassBegin(at)
                    }
                    Message::PassEnd { at, valid_from, .. } => Acknowledged::PassEnd(at, valid_from),
                    Message::Mark { lsn, label, .. } => Acknowledged::Mark(lsn, label),
                    _ => Acknowledged::Other,
                }
            }
        }
    }
}

fn mark_dirty(item: &Item, dirty: &mut DirtyBitmap) {
    match item {
        Item::DataSent(range)
        | Item::Kept(Message::Record(Record { range, .. }) | Message::PassData { range, .. }) => {
            dirty.insert(BlockRange::touched_by(*range));
        }
        Item::Kept(_) => {}
    }
}

fn takes_a_place(message: &Message) -> bool {
    matches!(message, Message::PassData { .. } | Message::Compare(_))
}

fn item_cost(message: &Message) -> u64 {
    ITEM_BYTES + payload_bytes(message)
}

fn payload_bytes(message: &Message) -> u64 {
    match message {
        Message::Record(Record { body: RecordBody::Write(data), .. }) | Message::PassData { data, .. } => {
            data.bytes().len() as u64
        }
        Message::Mark { label, .. } => label.len() as u64,
        _ => 0,
    }
}

#[cfg(test)]
mod tests;
