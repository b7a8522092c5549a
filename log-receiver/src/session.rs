//! One agent's connection as a state machine without I/O: messages in, effects out.
//!
//! It stands between the stream's decoder and the disk's log. Drive it like this, in a daemon
//! (`connection.rs`) or in a simulation, on the thread that owns the [`Disks`]:
//!
//! 1. For each message that has arrived: [`Session::handle`]. Entries go into the disk's log at once.
//! 2. After each batch of messages: [`Session::end_batch`], and when that says so [`Session::settle`]. It yields
//!    the acknowledgement `received`, which may as well come along with the next `durable`.
//! 3. While [`Disk::ticket`](crate::Disk::ticket) of [`Session::disk`] yields one: sync it wherever
//!    blocking is fine, hand the outcome to [`Disk::synced`](crate::Disk::synced), then call
//!    [`Session::settle`] again. It yields the Welcome, or the acknowledgement `durable`.
//! 4. When the connection is gone: [`Session::lost`].
//!
//! Invariants:
//! - nothing is answered from a claim, and nothing acknowledged as durable, before the log is
//!   durable so far;
//! - only the connection that claimed the disk last appends to its log: one that was replaced closes
//!   itself with its next message, whether or not anybody has told it;
//! - after [`Effect::End`] a session has no further effects.

mod checks;

use std::collections::VecDeque;

use backtide_protocol::{
    CloseCode, Closed, Compare, Hello, Message, PROTOCOL_VERSION, Ping, Reading, Sequenced, Welcome,
};
use backtide_segment::{Entry, Seq};
use backtide_tls::Rights;
use backtide_units::{ByteCount, CaptureTime, DiskId, LogPosition, Lsn};

use crate::{
    asking::Recalled,
    compare::CompareJob,
    disk::Disk,
    disks::{Claim, Disks, closed, refusal},
    entries,
};

/// Names a connection among all connections of a receiver's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConnectionId(pub u64);

/// As much of a peer's text goes into the log.
const SHOWN_MAX: usize = 1024;

/// Told to a connection that finds out by itself that it lost its disk.
const REPLACED: &str = "another connection has this disk now";

/// One agent's connection.
pub struct Session {
    connection: ConnectionId,
    /// The disks its agent may claim.
    rights: Rights,
    state: State,
}

/// What the driver has to do.
pub enum Effect {
    /// Send this to the agent, after everything before it.
    Send(Message),
    /// Answer this where blocking is fine and send the result; results in the order of the jobs.
    Compare(CompareJob),
    /// The agent has answered a [`Reading::Fetch`] of the driver.
    Recalled(Recalled),
    /// Call [`Session::close`] of that connection: it lost its disk to this one.
    CloseOther(ConnectionId, Closed),
    /// Close the connection when what was sent before is out. The last effect of a session.
    End,
}

/// ```text
/// AwaitHello ──hello accepted──▶ AwaitClaim ──claim durable: Welcome──▶ Streaming
///     │                              │                                     │
///     └──── refused, invalid, closed, replaced, store failed, lost ────────┴──▶ Ended
/// ```
enum State {
    /// Nothing came yet. Accepts Hello and Close.
    AwaitHello,
    /// The claim is in the log, not yet durable. Accepts Close.
    AwaitClaim {
        /// What was claimed.
        claim: Claim,
        /// The hello's frame.
        frame: u64,
    },
    /// Accepts everything an agent may send but Hello.
    Streaming(Streaming),
    /// Accepts nothing: what still arrives is dropped.
    Ended,
}

/// Numbers of frames, counted from the hello.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Frames {
    received: u64,
    durable: u64,
}

struct Streaming {
    disk: DiskId,
    /// How far the stream is handled, and durable with everything before.
    reached: Frames,
    /// As the last acknowledgement said.
    acked: Frames,
    /// What the agent asked to hear of.
    asked: Frames,
    /// Frames that become durable with an entry, in order; one per batch.
    waiting: VecDeque<(Seq, u64)>,
}

impl Session {
    /// For a connection that was just accepted, of an agent that may speak for every disk.
    pub fn new(connection: ConnectionId) -> Self {
        Self::with_rights(connection, Rights::all())
    }

    /// The same of an agent that may speak for these disks.
    pub fn with_rights(connection: ConnectionId, rights: Rights) -> Self {
        Self { connection, rights, state: State::AwaitHello }
    }

    /// The disk this connection has claimed; none before its hello and after its end.
    pub fn disk(&self) -> Option<DiskId> {
        match &self.state {
            State::AwaitHello | State::Ended => None,
            State::AwaitClaim { claim, .. } => Some(claim.disk),
            State::Streaming(streaming) => Some(streaming.disk),
        }
    }

    /// Whether somebody waits for what was received to become durable, so that nothing is gained by
    /// gathering more.
    pub fn wants_commit(&self) -> bool {
        match &self.state {
            State::AwaitClaim { .. } => true,
            State::Streaming(streaming) => streaming.asked.durable > streaming.acked.durable,
            State::AwaitHello | State::Ended => false,
        }
    }

    /// A batch of messages has been taken. Whether the agent waits to hear of it before it is durable.
    pub fn end_batch(&mut self, disks: &Disks) -> bool {
        match &mut self.state {
            State::AwaitClaim { .. } => true,
            State::Streaming(streaming) => {
                if let Some(disk) = disks.get(streaming.disk) {
                    streaming.note(disk);
                }
                streaming.asked.received > streaming.acked.received
            }
            State::AwaitHello | State::Ended => false,
        }
    }

    /// Takes the agent's next message; `now` is the receiver's clock.
    pub fn handle(&mut self, disks: &mut Disks, message: Sequenced, now: CaptureTime) -> Vec<Effect> {
        if matches!(self.state, State::Ended) {
            return Vec::new();
        }
        let Sequenced { seq: frame, message } = message;
        if let Message::Close(closed) = message {
            tracing::info!(connection = self.connection.0, disk = ?self.disk(), code = ?closed.code, message = shown(&closed.message), "the agent closed the connection");
            self.end(disks);
            return vec![Effect::End];
        }
        let outcome = match &mut self.state {
            State::AwaitHello => match message {
                Message::Hello(hello) => return self.greet(disks, &hello, frame, now),
                other => Err(unexpected("hello as the first frame", &other)),
            },
            State::AwaitClaim { .. } => Err(unexpected("no frame before the welcome", &message)),
            State::Streaming(streaming) => {
                streaming.reached.received = frame;
                match disks.get_mut(streaming.disk) {
                    Some(disk) if disk.owner() == Some(self.connection) => match disk.failure() {
                        // Not the message is wrong, though nothing can be checked against the log.
                        Some(failure) => Err(closed(CloseCode::Store, &failure.why)),
                        None => streaming.take(disks, message, now),
                    },
                    Some(_) | None => Err(closed(CloseCode::Busy, REPLACED)),
                }
            }
            State::Ended => Ok(None),
        };
        match outcome {
            Ok(effect) => effect.into_iter().collect(),
            Err(closed) => self.close(disks, closed),
        }
    }

    /// What is due, after a batch of messages and after a sync: at most one acknowledgement, or the
    /// Welcome, or the end when the store failed.
    pub fn settle(&mut self, disks: &mut Disks) -> Vec<Effect> {
        let Some(disk) = self.disk().and_then(|disk| disks.get(disk)) else { return Vec::new() };
        if disk.owner() != Some(self.connection) {
            // Its log may have been opened again since: what is durable there says nothing here.
            let closed = closed(CloseCode::Busy, REPLACED);
            return self.close(disks, closed);
        }
        if let Some(failure) = disk.failure() {
            let closed = closed(CloseCode::Store, &failure.why);
            return self.close(disks, closed);
        }
        let sent = match &mut self.state {
            State::AwaitClaim { claim, frame } if disk.durable().seq >= claim.through => {
                let (claim, frame) = (claim.clone(), *frame);
                self.state = State::Streaming(Streaming::after(&claim, frame));
                Some(Message::Welcome(welcome(disk, &claim)))
            }
            State::Streaming(streaming) => streaming.acknowledge(disk),
            State::AwaitClaim { .. } | State::AwaitHello | State::Ended => None,
        };
        sent.map(Effect::Send).into_iter().collect()
    }

    /// Ends the connection from this side: replaced, shut down, undecodable bytes, a failed compare.
    pub fn close(&mut self, disks: &mut Disks, closed: Closed) -> Vec<Effect> {
        if matches!(self.state, State::Ended) {
            return Vec::new();
        }
        log_close(self.connection, self.disk(), &closed);
        self.end(disks);
        vec![Effect::Send(Message::Close(closed)), Effect::End]
    }

    /// The connection is gone.
    pub fn lost(&mut self, disks: &mut Disks) {
        self.end(disks);
    }

    /// Whether a hello is understood, and is of a disk that its agent may have.
    pub(crate) fn may_greet(&self, disks: &Disks, hello: &Hello) -> bool {
        hello.version == PROTOCOL_VERSION && self.check_rights(disks, hello).is_ok()
    }

    fn greet(&mut self, disks: &mut Disks, hello: &Hello, frame: u64, now: CaptureTime) -> Vec<Effect> {
        if hello.version != PROTOCOL_VERSION {
            return self.close(disks, another_version(hello.version));
        }
        if let Err(why) = self.check_rights(disks, hello) {
            return self.close(disks, closed(CloseCode::Denied, why));
        }
        match disks.claim(self.connection, hello, now) {
            Ok(claim) => {
                tracing::info!(connection = self.connection.0, disk = %hello.disk, name = %hello.name, epoch = %hello.epoch, state = ?claim.state, "disk claimed");
                let replaced = claim.replaced.clone();
                self.state = State::AwaitClaim { claim, frame };
                replaced.map(|(other, closed)| Effect::CloseOther(other, closed)).into_iter().collect()
            }
            Err(closed) => self.close(disks, closed),
        }
    }

    /// A disk is what it is called here as well as what its agent calls it: who may speak for one name
    /// gets no other disk by it.
    fn check_rights(&self, disks: &Disks, hello: &Hello) -> Result<(), String> {
        self.rights.check(&hello.name)?;
        match disks.name_of(hello.disk) {
            Some(name) => self.rights.check(&name),
            None => Ok(()),
        }
    }

    fn end(&mut self, disks: &mut Disks) {
        if let Some(disk) = self.disk().and_then(|disk| disks.get_mut(disk)) {
            disk.release(self.connection);
        }
        self.state = State::Ended;
    }
}

/// What an agent is told that speaks another version than this receiver.
pub(crate) fn another_version(found: u32) -> Closed {
    let why = format!(
        "the agent speaks version {found} of the stream, this receiver version {PROTOCOL_VERSION}: upgrade the older one"
    );
    closed(CloseCode::Version, why)
}

impl Streaming {
    fn after(claim: &Claim, frame: u64) -> Self {
        // The Welcome acknowledges the hello by itself.
        let reached = Frames { received: frame, durable: frame };
        let (disk, waiting) = (claim.disk, VecDeque::new());
        Self { disk, reached, acked: reached, asked: reached, waiting }
    }

    fn take(
        &mut self,
        disks: &mut Disks,
        message: Message,
        now: CaptureTime,
    ) -> Result<Option<Effect>, Closed> {
        let (entry, payload) = match message {
            Message::Record(mut record) => {
                self.check_record(disks, &record)?;
                record.time = self.in_order(disks, record.time);
                let entry = entries::record(record);
                let payload = payload_of(&entry);
                (entry, payload)
            }
            Message::PassData { at, range, data } => {
                self.check_range(disks, range)?;
                (entries::pass_data(at, range, &data), ByteCount::of(data.bytes()))
            }
            Message::Flush { lsn, time } => {
                self.check_reached(disks, "flush", lsn)?;
                if self.has_flush(disks, lsn) {
                    return Ok(None);
                }
                (Entry::Flush { lsn, time }, ByteCount::ZERO)
            }
            Message::Unchanged { lsn, time } => {
                self.check_reached(disks, "unchanged", lsn)?;
                let time = self.in_order(disks, time);
                (Entry::Unchanged { lsn, time }, ByteCount::ZERO)
            }
            Message::PassBegin { at, gap_from, time, reason } => {
                let time = self.in_order(disks, time);
                let entry = entries::pass_begin(at, gap_from, time, reason);
                return self.disk(disks).append_of_pass(entry, now).map(|()| None).map_err(refusal);
            }
            Message::PassEnd { at, valid_from, time } => {
                // The disk is in sync, or the next pass begins, when it is durable.
                self.asked.durable = self.reached.received;
                let entry = Entry::PassEnd { at, valid_from, time };
                return self.disk(disks).append_of_pass(entry, now).map(|()| None).map_err(refusal);
            }
            Message::Mark { lsn, time, label } => {
                self.check_reached(disks, "mark", lsn)?;
                if self.has_mark(disks, lsn, &label) {
                    return Ok(None);
                }
                (Entry::Mark { lsn, time, label }, ByteCount::ZERO)
            }
            Message::Compare(question) => return self.compare(disks, question).map(Some),
            Message::Reading(reading @ (Reading::Piece { .. } | Reading::Failed { .. })) => {
                return Ok(Recalled::of(reading).map(Effect::Recalled));
            }
            Message::Hasten { durable } => {
                let frame = self.reached.received;
                self.asked =
                    Frames { received: frame, durable: if durable { frame } else { self.asked.durable } };
                return Ok(None);
            }
            Message::Ping(Ping { sent, heard: Some(heard) }) => {
                if let (Some(came), Some(sent)) = (self.disk(disks).came_mut(), sent) {
                    came.saw_clock(heard, sent, now);
                }
                return Ok(None);
            }
            Message::Ping(_) => {
                // Whoever asks whether this side is alive does not wait for the next sync.
                self.asked.received = self.reached.received;
                return Ok(None);
            }
            other @ (Message::Hello(_)
            | Message::Welcome(_)
            | Message::CompareResult(_)
            | Message::Ack { .. }
            | Message::Reading(_)
            | Message::Close(_)) => return Err(unexpected("a record, pass, mark, compare or ping", &other)),
        };
        if !payload.is_zero() {
            disks.check_space(payload).map_err(|why| closed(CloseCode::Store, why))?;
        }
        self.disk(disks).append(entry, payload).map(|_| None).map_err(refusal)
    }

    fn disk<'a>(&self, disks: &'a mut Disks) -> &'a mut Disk {
        disks.get_mut(self.disk).expect("a claimed disk is not forgotten")
    }

    fn compare(&self, disks: &mut Disks, question: Compare) -> Result<Effect, Closed> {
        for item in &question.items {
            self.check_range(disks, item.range)?;
        }
        let snapshot =
            self.disk(disks).snapshot().map_err(|failure| closed(CloseCode::Store, failure.why))?;
        let view = snapshot.newest_view(question.at);
        Ok(Effect::Compare(CompareJob::new(question, view)))
    }

    /// Notes the entry with which the last frame becomes durable.
    fn note(&mut self, disk: &Disk) {
        let noted = self.waiting.back().map_or(self.reached.durable, |(_, frame)| *frame);
        if self.reached.received > noted {
            self.waiting.push_back((disk.appended(), self.reached.received));
        }
    }

    /// The acknowledgement that is due, if one is.
    fn acknowledge(&mut self, disk: &Disk) -> Option<Message> {
        self.note(disk);
        let durable = disk.durable().seq;
        while let Some(&(seq, frame)) = self.waiting.front()
            && seq <= durable
        {
            self.reached.durable = frame;
            self.waiting.pop_front();
        }
        if self.reached == self.acked {
            return None;
        }
        self.acked = self.reached;
        let Frames { received, durable: through } = self.reached;
        Some(Message::Ack { received, durable: through, position: LogPosition(durable.0) })
    }
}

/// Everything it says is durable: the log was synced through the claim, which is its last entry.
fn welcome(disk: &Disk, claim: &Claim) -> Welcome {
    let timeline = disk.timeline().expect("the log is open: it just became durable");
    Welcome {
        version: PROTOCOL_VERSION,
        history: claim.history,
        state: claim.state,
        durable: timeline.covered(),
        highest: disk.highest_lsn(),
        // Also after a pass that ended without a point: records could follow, points could not.
        last_time: timeline.last_time(),
        last_attach: claim.last_attach,
        // The claim's own entry would hide that one is missing that was acknowledged before.
        position: LogPosition(claim.before.0),
        in_pass: timeline.open_pass().is_some() || (!timeline.in_sync() && timeline.covered() > Lsn::ZERO),
    }
}

fn payload_of(entry: &Entry) -> ByteCount {
    match entry {
        Entry::Write { payload, .. } => ByteCount::of(payload),
        Entry::Zero { .. }
        | Entry::Flush { .. }
        | Entry::Unchanged { .. }
        | Entry::PassBegin { .. }
        | Entry::PassData { .. }
        | Entry::PassEnd { .. }
        | Entry::Mark { .. }
        | Entry::Attach { .. } => ByteCount::ZERO,
    }
}

/// As much as is logged of a text that a peer can choose.
fn shown(text: &str) -> &str {
    &text[..text.floor_char_boundary(SHOWN_MAX)]
}

/// An end that belongs to ordinary life is no warning.
fn log_close(connection: ConnectionId, disk: Option<DiskId>, closed: &Closed) {
    let (connection, code, message) = (connection.0, closed.code, shown(&closed.message));
    match code {
        CloseCode::Bye | CloseCode::Busy | CloseCode::Fenced => {
            tracing::info!(connection, ?disk, ?code, message, "connection closed");
        }
        CloseCode::Version
        | CloseCode::Invalid
        | CloseCode::Store
        | CloseCode::Refused
        | CloseCode::Denied => {
            tracing::warn!(connection, ?disk, ?code, message, "connection closed");
        }
    }
}

fn unexpected(expected: &str, found: &Message) -> Closed {
    closed(CloseCode::Invalid, format!("expected {expected}, found {}", found.name()))
}

#[cfg(test)]
mod tests;
