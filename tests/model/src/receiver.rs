//! The receiver: a list of entries, how many of them are durable, and the sessions' rules.
//!
//! The log's rules (which entry may follow, what is a point) are the production [`Timeline`]. The
//! session's are said again here in a few lines, because a production `Session` over its files cannot
//! be copied as cheaply as a walk needs; `lockstep` compares both, answer by answer. Which version of
//! a block a point has is the rule of DESIGN's layers: the newest at or below it, and of equal ones
//! the later entry.

use std::{collections::VecDeque, sync::Arc};

use backtide_log_receiver::entries;
use backtide_protocol::{
    CloseCode, Closed, Compare, CompareItem, CompareResult, Content, Hello, Message, PROTOCOL_VERSION,
    ReceiverState, Welcome,
};
use backtide_recovery::Timeline;
use backtide_segment::{Entry, PassContent, Seq};
use backtide_units::{CaptureTime, HistoryId, LogPosition, Lsn};
use uuid::Uuid;

use crate::content::{blocks_in, bytes_of, value_in};

/// The history of the one disk.
pub(crate) const HISTORY: HistoryId = HistoryId(Uuid::from_u128(1));

/// The receiver's clock.
pub(crate) const TIME: CaptureTime = CaptureTime(1_000_000);

/// Intervals, first to last point.
pub(crate) type Offers = Vec<(Lsn, Lsn)>;

/// See the module's description.
#[derive(Clone, Debug)]
pub(crate) struct Receiver {
    pub(crate) log: Vec<Arc<Entry>>,
    pub(crate) timeline: Timeline,
    /// How many entries survive whatever happens.
    pub(crate) durable: usize,
    /// Where the durable part of the log stands.
    pub(crate) durable_covered: Lsn,
    /// What was ever offered durably: it has to stay.
    pub(crate) promised: Offers,
}

/// The receiver's side of a connection.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Session {
    AwaitHello,
    AwaitClaim { before: usize, through: usize, frame: u64, known: bool, fresh: bool, last: Option<Uuid> },
    Streaming { received: u64, durable: u64, acked: (u64, u64), waiting: VecDeque<(usize, u64)> },
    Ended,
}

/// What a frame led to.
pub(crate) enum Taken {
    /// It is in the log, or had no need to be.
    Fine,
    /// A comparison was asked for; this is the answer.
    Compared(CompareResult),
    /// It was refused.
    Refused(CloseCode, String),
}

impl Receiver {
    pub(crate) fn new() -> Self {
        Self {
            log: Vec::new(),
            timeline: Timeline::default(),
            durable: 0,
            durable_covered: Lsn::ZERO,
            promised: Vec::new(),
        }
    }

    /// Claims the disk: the session that follows, or why not.
    pub(crate) fn claim(&mut self, hello: &Hello, frame: u64) -> Result<Session, CloseCode> {
        let attached = self.timeline.attached();
        let (fresh, last) = (attached.is_none(), attached.map(|seen| seen.attach));
        let stale = attached.is_some_and(|seen| {
            hello.epoch < seen.epoch || (hello.epoch == seen.epoch && hello.attach != seen.attach)
        });
        if stale {
            return Err(CloseCode::Fenced);
        }
        let before = self.log.len();
        if attached.is_none_or(|seen| seen.epoch != hello.epoch) {
            self.append(entries::attach(hello, Seq(before as u64), TIME)).map_err(|_| CloseCode::Invalid)?;
        }
        let known = hello.history == Some(HISTORY);
        Ok(Session::AwaitClaim { last, before, through: self.log.len(), frame, known, fresh })
    }

    /// Takes a frame of a session that has the disk.
    pub(crate) fn take(&mut self, message: Message) -> Taken {
        let covered = self.timeline.covered();
        let entry = match message {
            Message::Record(record) if record.previous != covered => {
                let why = format!("a record that follows {}, the log is at {covered}", record.previous);
                return Taken::Refused(CloseCode::Invalid, why);
            }
            Message::Record(record) => entries::record(record),
            Message::PassData { at, range, data } => entries::pass_data(at, range, &data),
            Message::Flush { lsn, .. } | Message::Unchanged { lsn, .. } | Message::Mark { lsn, .. }
                if lsn > covered =>
            {
                return Taken::Refused(CloseCode::Invalid, format!("LSN {lsn} beyond {covered}"));
            }
            Message::Flush { lsn, time } => Entry::Flush { lsn, time },
            Message::Unchanged { lsn, time } => Entry::Unchanged { lsn, time },
            Message::Mark { lsn, time, label } => Entry::Mark { lsn, time, label },
            Message::PassBegin { at, gap_from, time, reason } => {
                entries::pass_begin(at, gap_from, time, reason)
            }
            Message::PassEnd { at, valid_from, time } => Entry::PassEnd { at, valid_from, time },
            Message::Compare(question) => return Taken::Compared(self.compare(&question)),
            Message::Hasten { .. } | Message::Ping(_) => return Taken::Fine,
            other @ (Message::Hello(_)
            | Message::Welcome(_)
            | Message::CompareResult(_)
            | Message::Ack { .. }
            | Message::Reading(_)
            | Message::Close(_)) => {
                return Taken::Refused(CloseCode::Invalid, format!("an unexpected {}", other.name()));
            }
        };
        match self.append(entry) {
            Ok(()) => Taken::Fine,
            Err(why) => Taken::Refused(CloseCode::Invalid, why),
        }
    }

    fn append(&mut self, entry: Entry) -> Result<(), String> {
        self.timeline.check(&entry).map_err(|invalid| invalid.to_string())?;
        self.timeline.fold(&entry);
        self.log.push(Arc::new(entry));
        Ok(())
    }

    fn compare(&self, question: &Compare) -> CompareResult {
        let differs = |item: &CompareItem| match item.content {
            Content::Hash(hash) => {
                let bytes = bytes_of(item.range, |block| self.value(block, question.at, self.log.len()));
                *blake3::hash(&bytes).as_bytes() != hash
            }
            Content::Zeroes => {
                blocks_in(item.range).any(|block| self.value(block, question.at, self.log.len()) != 0)
            }
        };
        let items = (0u32..).zip(&question.items);
        let differing = items.filter(|(_, item)| differs(item)).map(|(index, _)| index).collect();
        CompareResult { id: question.id, differing }
    }

    /// The newest version of a block at or below `at`, in the first `entries` of the log.
    pub(crate) fn value(&self, block: u8, at: Lsn, entries: usize) -> u8 {
        let mut newest = (Lsn::ZERO, 0);
        for entry in &self.log[..entries] {
            let (version, range, bytes) = match &**entry {
                Entry::Write { lsn, range, payload, .. } => (*lsn, *range, &payload[..]),
                Entry::Zero { lsn, range, .. } => (*lsn, *range, &[][..]),
                Entry::PassData { at, range, content: PassContent::Bytes { payload, .. } } => {
                    (*at, *range, &payload[..])
                }
                Entry::PassData { at, range, content: PassContent::Zeroes } => (*at, *range, &[][..]),
                Entry::Flush { .. }
                | Entry::Unchanged { .. }
                | Entry::PassBegin { .. }
                | Entry::PassEnd { .. }
                | Entry::Mark { .. }
                | Entry::Attach { .. } => continue,
            };
            if version <= at && version >= newest.0 && blocks_in(range).any(|found| found == block) {
                newest = (version, value_in(range, bytes, block));
            }
        }
        newest.1
    }

    /// The intervals offered now.
    pub(crate) fn offers(&self) -> Offers {
        let intervals = self.timeline.intervals().iter();
        intervals.map(|interval| (interval.from.lsn, interval.to.lsn)).collect()
    }

    /// Everything becomes durable.
    pub(crate) fn sync(&mut self) {
        self.durable = self.log.len();
        self.durable_covered = self.timeline.covered();
        self.promised = self.offers();
    }

    /// Dies, and comes back with this much of the log.
    pub(crate) fn crash(&mut self, kept: usize) {
        assert!(kept >= self.durable, "what is durable stays");
        self.log.truncate(kept);
        self.timeline = Timeline::default();
        for entry in &self.log {
            self.timeline.check(entry).expect("it was in the log");
            self.timeline.fold(entry);
        }
        let promised = self.promised.clone();
        self.sync();
        for (from, to) in promised {
            let kept = self.promised.iter().any(|(first, last)| *first <= from && to <= *last);
            assert!(kept, "points {from} to {to} were offered durably, a crash leaves {:?}", self.promised);
        }
    }

    pub(crate) fn welcome(&self, before: usize, known: bool, fresh: bool, last: Option<Uuid>) -> Welcome {
        let state = match (fresh, known) {
            (true, _) => ReceiverState::New,
            (false, true) => ReceiverState::Known,
            (false, false) => ReceiverState::Foreign,
        };
        let (covered, timeline) = (self.timeline.covered(), &self.timeline);
        Welcome {
            version: PROTOCOL_VERSION,
            history: HISTORY,
            state,
            durable: covered,
            highest: timeline.highest_lsn(),
            last_time: timeline.last_time(),
            last_attach: last,
            position: LogPosition(before as u64),
            in_pass: timeline.open_pass().is_some() || (!timeline.in_sync() && covered > Lsn::ZERO),
        }
    }
}

impl Session {
    /// What a session that has the disk has to say now. Without `received`, only what is durable.
    pub(crate) fn settle(&mut self, receiver: &Receiver, received_too: bool) -> Option<Message> {
        match self {
            Self::AwaitClaim { before, through, frame, known, fresh, last }
                if receiver.durable >= *through =>
            {
                let welcome = receiver.welcome(*before, *known, *fresh, *last);
                let acked = (*frame, *frame);
                let waiting = VecDeque::new();
                *self = Self::Streaming { received: acked.0, durable: acked.0, acked, waiting };
                Some(Message::Welcome(welcome))
            }
            Self::Streaming { received, durable, acked, waiting } => {
                let noted = waiting.back().map_or(*durable, |(_, frame)| *frame);
                if *received > noted {
                    waiting.push_back((receiver.log.len(), *received));
                }
                while let Some((_, frame)) = waiting.pop_front_if(|(seq, _)| *seq <= receiver.durable) {
                    *durable = frame;
                }
                let due = (*received, *durable);
                if due == *acked || (!received_too && due.1 == acked.1) {
                    return None;
                }
                *acked = due;
                Some(Message::Ack {
                    received: due.0,
                    durable: due.1,
                    position: LogPosition(receiver.durable as u64),
                })
            }
            Self::AwaitHello | Self::AwaitClaim { .. } | Self::Ended => None,
        }
    }
}

/// The message that ends a connection.
pub(crate) fn close(code: CloseCode, why: &str) -> Message {
    Message::Close(Closed::new(code, why))
}
