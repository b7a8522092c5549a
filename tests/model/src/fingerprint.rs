//! What tells states apart: a hash of 64 bits.
//!
//! The filter is hashed by its `Debug` form, so no field of it can be forgotten; the counters, which
//! nothing depends on, are left out. Its names for I/Os and tickets come from one counter and are only
//! ever compared: they count by their order, so that states which differ in them alone are one.
//!
//! Two states of a million have the same hash by chance once in 30 million walks.

use std::{
    cell::RefCell,
    fmt::Write,
    hash::{DefaultHasher, Hash, Hasher},
};

use backtide_io_filter::{IoId, SpillOp};
use backtide_protocol::{Compare, Content, Message};
use backtide_segment::Entry;
use backtide_units::ByteRange;

use crate::{
    content::{blocks_in, value_in},
    world::{Connection, World},
};

thread_local! {
    static TEXT: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Names of I/Os and tickets as the filter prints them.
const NAMES: [&str; 2] = ["IoId(", "Ticket("];

/// The parts of the filter's form that say nothing about what it is going to do.
const LEFT_OUT: [(&str, char); 2] = [("counters: Counters {", '}'), ("next_id: ", ',')];

impl World {
    /// See the module's description.
    pub(crate) fn fingerprint(&self) -> u64 {
        TEXT.with_borrow_mut(|text| {
            text.clear();
            write!(text, "{:?}", self.filter).expect("a string takes everything");
            self.hash_with(text)
        })
    }

    fn hash_with(&self, text: &str) -> u64 {
        let mut hasher = DefaultHasher::new();
        let mut ids: Vec<u64> = names(text).map(|(_, _, id)| id).collect();
        ids.extend(self.scans.keys().map(|io| io.0));
        ids.sort_unstable();
        ids.dedup();
        let rank = |id: u64| ids.binary_search(&id).expect("the filter knows it");
        let ranked = |io: &IoId| rank(io.0);
        hash_text(text, &rank, &mut hasher);
        for (io, inflight) in &self.inflight {
            // What is done is in the filter's form.
            (ranked(io), inflight.landed, inflight.frozen, &inflight.mark).hash(&mut hasher);
        }
        for (io, op) in &self.tracking_ops {
            (ranked(io), format!("{op:?}")).hash(&mut hasher);
        }
        for (io, op) in &self.spill_ops {
            (ranked(io), matches!(op, SpillOp::Read(_))).hash(&mut hasher);
        }
        (&self.spill, self.spill_failed, self.kept_to, self.detaching).hash(&mut hasher);
        for (io, early) in &self.scans {
            (ranked(io), early).hash(&mut hasher);
        }
        (self.left, self.now, self.epoch, self.paused, self.told).hash(&mut hasher);
        (format!("{:?}", self.file), self.file_failed).hash(&mut hasher);
        (&self.disk, &self.writers, &self.history).hash(&mut hasher);
        for connection in &self.connections {
            connection.digest(&mut hasher);
        }
        for entry in &self.receiver.log {
            digest_entry(entry, &mut hasher);
        }
        (self.rival, self.fenced, &self.past).hash(&mut hasher);
        // The timeline follows from the log.
        (self.receiver.durable, &self.receiver.promised).hash(&mut hasher);
        hasher.finish()
    }
}

/// The names in the text: where the number begins, where it ends, and the number.
fn names(text: &str) -> impl Iterator<Item = (usize, usize, u64)> {
    let bytes = text.as_bytes();
    let opens = (0..bytes.len()).filter(move |at| bytes[*at] == b'(');
    opens.filter_map(move |open| {
        let start = open + 1;
        let named = NAMES.iter().any(|name| bytes[..start].ends_with(name.as_bytes()));
        if !named {
            return None;
        }
        let end = start + bytes[start..].iter().position(|byte| !byte.is_ascii_digit())?;
        Some((start, end, text[start..end].parse().ok()?))
    })
}

fn hash_text(text: &str, rank: &impl Fn(u64) -> usize, hasher: &mut DefaultHasher) {
    let mut skip: Vec<(usize, usize)> = LEFT_OUT
        .iter()
        .map(|(start, end)| {
            let from = text.find(start).expect("the filter has it");
            let to = from + text[from..].find(*end).expect("it ends");
            (from, to)
        })
        .collect();
    skip.sort_unstable();
    let mut at = 0;
    let piece = |from: usize, to: usize, hasher: &mut DefaultHasher| {
        let mut from = from;
        for (start, end) in &skip {
            if *start >= from && *start < to {
                hasher.write(&text.as_bytes()[from..*start]);
                from = *end;
            }
        }
        if from < to {
            hasher.write(&text.as_bytes()[from..to]);
        }
    };
    for (start, end, id) in names(text) {
        piece(at, start, hasher);
        hasher.write_usize(rank(id));
        at = end;
    }
    piece(at, text.len(), hasher);
}

impl Connection {
    fn digest(&self, hasher: &mut DefaultHasher) {
        (self.agent_side, self.welcomed, self.owns, &self.session).hash(hasher);
        (self.up.len(), self.down.len(), self.jobs.len()).hash(hasher);
        for (frame, message) in &self.up {
            frame.hash(hasher);
            digest_message(message, hasher);
        }
        for message in &self.down {
            digest_message(message, hasher);
        }
        for result in &self.jobs {
            (result.id, &result.differing).hash(hasher);
        }
    }
}

fn digest_message(message: &Message, hasher: &mut DefaultHasher) {
    message.name().hash(hasher);
    match message {
        Message::Record(record) => {
            (record.lsn, record.previous).hash(hasher);
            let bytes = match &record.body {
                backtide_protocol::RecordBody::Write(data) => &data.bytes()[..],
                backtide_protocol::RecordBody::Zero | backtide_protocol::RecordBody::Trim => &[],
            };
            digest_content(record.range, bytes, hasher);
        }
        Message::PassData { at, range, data } => {
            at.hash(hasher);
            digest_content(*range, data.bytes(), hasher);
        }
        Message::Compare(Compare { id, at, items }) => {
            (id, at, items.len()).hash(hasher);
            for item in items {
                digest_range(item.range, hasher);
                match item.content {
                    Content::Hash(hash) => hash.hash(hasher),
                    Content::Zeroes => 0u8.hash(hasher),
                }
            }
        }
        // Small, and without bytes.
        other => format!("{other:?}").hash(hasher),
    }
}

fn digest_range(range: ByteRange, hasher: &mut DefaultHasher) {
    (range.start().0, range.count().0).hash(hasher);
}

fn digest_content(range: ByteRange, bytes: &[u8], hasher: &mut DefaultHasher) {
    digest_range(range, hasher);
    for block in blocks_in(range) {
        value_in(range, bytes, block).hash(hasher);
    }
}

fn digest_entry(entry: &Entry, hasher: &mut DefaultHasher) {
    use backtide_segment::PassContent;
    match entry {
        Entry::Write { lsn, range, payload, .. } => {
            (1u8, lsn).hash(hasher);
            digest_content(*range, payload, hasher);
        }
        Entry::PassData { at, range, content: PassContent::Bytes { payload, .. } } => {
            (2u8, at).hash(hasher);
            digest_content(*range, payload, hasher);
        }
        Entry::PassData { at, range, content: PassContent::Zeroes } => {
            (3u8, at).hash(hasher);
            digest_range(*range, hasher);
        }
        Entry::Zero { lsn, range, .. } => {
            (4u8, lsn).hash(hasher);
            digest_range(*range, hasher);
        }
        Entry::PassBegin { at, gap_from, .. } => (5u8, at, gap_from).hash(hasher),
        Entry::PassEnd { at, valid_from, .. } => (6u8, at, valid_from).hash(hasher),
        Entry::Flush { lsn, .. } | Entry::Unchanged { lsn, .. } | Entry::Mark { lsn, .. } => {
            (7u8, lsn).hash(hasher)
        }
        Entry::Attach { epoch, next_lsn, .. } => (8u8, epoch, next_lsn).hash(hasher),
    }
}
