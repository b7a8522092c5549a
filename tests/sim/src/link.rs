//! The link: connections that carry bytes in order, late, slowly, and break.
//!
//! The fault model is TCP's: what arrives is a prefix of what was sent. When a connection breaks,
//! each side notices in its own time, perhaps long after a new one was made; what was on its way
//! may still arrive, frames may be cut in the middle.

use std::collections::VecDeque;

use backtide_log_receiver::{ConnectionId, Session};
use backtide_protocol::{CloseCode, Decoder, Message, encode};
use backtide_units::Lsn;
use bytes::Bytes;

use crate::{
    plan::Plan,
    world::{Event, World},
};

/// What all connections have in common.
#[derive(Clone, Copy, Debug)]
pub struct Link {
    pub(crate) up: bool,
    /// Bytes a second, each way.
    pub(crate) bandwidth: u64,
    pub(crate) latency_us: u64,
}

/// One direction of a connection.
#[derive(Debug, Default)]
pub struct Lane {
    /// On their way; `None` is the end.
    chunks: VecDeque<Option<Bytes>>,
    /// When the wire has sent everything.
    pub(crate) free_at: u64,
    arrives_at: u64,
}

/// One connection, seen from both sides.
pub struct Connection {
    /// The agent's incarnation.
    life: u64,
    /// The receiver's side; none when it is gone there.
    pub(crate) session: Option<Session>,
    pub(crate) welcomed: bool,
    agent_side: bool,
    /// Nothing new arrives any more, on neither side.
    cut: bool,
    pub(crate) up: Lane,
    pub(crate) down: Lane,
    up_decoder: Decoder,
    down_decoder: Decoder,
    down_seq: u64,
    /// The LSN that each frame brings the log to.
    frames: VecDeque<(u64, Lsn)>,
    pub(crate) room_awaited: bool,
}

impl Link {
    pub(crate) fn new(plan: &Plan) -> Self {
        Self { up: true, bandwidth: plan.bandwidth, latency_us: plan.latency_us }
    }
}

impl Lane {
    /// Puts bytes on the way; says when they arrive.
    fn send(&mut self, chunk: Option<Bytes>, now: u64, link: &Link, jitter: u64) -> u64 {
        let bytes = chunk.as_ref().map_or(0, |bytes| bytes.len() as u64);
        self.free_at = self.free_at.max(now) + bytes * 1_000_000 / link.bandwidth;
        self.arrives_at = self.arrives_at.max(self.free_at + jitter);
        self.chunks.push_back(chunk);
        self.arrives_at
    }
}

impl Connection {
    pub(crate) fn note_sent(&mut self, seq: u64, message: &Message) {
        match message {
            Message::Record(record) => self.frames.push_back((seq, record.lsn)),
            Message::PassBegin { at, .. } => self.frames.push_back((seq, *at)),
            _ => {}
        }
    }

    /// The highest LSN in frames up to `seq`, which are forgotten.
    fn brought_by(&mut self, seq: u64) -> Lsn {
        let mut highest = Lsn::ZERO;
        while let Some((_, lsn)) = self.frames.pop_front_if(|(frame, _)| *frame <= seq) {
            highest = highest.max(lsn);
        }
        highest
    }
}

impl World {
    pub(crate) fn try_to_connect(&mut self, life: u64) {
        if self.agent.as_ref().is_none_or(|agent| agent.life != life) {
            return;
        }
        let pause = if self.calm { 20_000 } else { self.plan.outage_us.min(200_000) };
        self.within(pause, Event::Connect(life));
        let Some(agent) = &self.agent else { return };
        let wants = agent.connection.is_none() && agent.filter.wants_connection();
        if !wants || !self.link.up || self.receiver.disks.is_none() {
            return;
        }
        let hello = agent.filter.hello();
        self.receiver.connections += 1;
        let id = self.receiver.connections;
        self.trace.note(self.now, "connect", &[id, hello.epoch.0]);
        self.trace.say(self.now, || format!("{hello:?}"));
        let connection = Connection {
            life,
            session: Some(Session::new(ConnectionId(id))),
            welcomed: false,
            agent_side: true,
            cut: false,
            up: Lane::default(),
            down: Lane::default(),
            up_decoder: Decoder::new(),
            down_decoder: Decoder::new(),
            down_seq: 0,
            frames: VecDeque::new(),
            room_awaited: false,
        };
        self.connections.insert(id, connection);
        let agent = self.agent.as_mut().expect("seen above");
        (agent.connection, agent.refused) = (Some(id), false);
        let (header, payload) = encode(1, &Message::Hello(hello));
        self.transmit_up(id, &[&header[..], &payload].concat());
    }

    /// Bytes to the receiver; sometimes in two parts.
    pub(crate) fn transmit_up(&mut self, id: u64, bytes: &[u8]) {
        let at = if self.random.one_in(4) { self.random.below(bytes.len() as u64) as usize } else { 0 };
        let (first, second) = bytes.split_at(at);
        for part in [first, second].into_iter().filter(|part| !part.is_empty()) {
            self.transmit(id, Some(Bytes::copy_from_slice(part)), true);
        }
    }

    /// A message to the agent.
    pub(crate) fn transmit_down(&mut self, id: u64, message: &Message) {
        let connection = self.connections.get_mut(&id).expect("somebody sends on it");
        connection.down_seq += 1;
        let (header, payload) = encode(connection.down_seq, message);
        self.transmit(id, Some([&header[..], &payload].concat().into()), false);
    }

    pub(crate) fn transmit(&mut self, id: u64, chunk: Option<Bytes>, up: bool) {
        let jitter = self.random.between(self.link.latency_us / 2, self.link.latency_us);
        let connection = self.connections.get_mut(&id).expect("somebody sends on it");
        if connection.cut {
            return;
        }
        let lane = if up { &mut connection.up } else { &mut connection.down };
        let arrives_at = lane.send(chunk, self.now, &self.link, jitter);
        let event = if up { Event::Up(id) } else { Event::Down(id) };
        self.after(arrives_at - self.now, event);
    }

    pub(crate) fn reaches_receiver(&mut self, id: u64) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        let Some(Some(bytes)) = connection.up.chunks.pop_front() else { return };
        if connection.session.is_none() {
            return;
        }
        connection.up_decoder.buffer().extend_from_slice(&bytes);
        while let Some(connection) = self.connections.get_mut(&id)
            && connection.session.is_some()
        {
            let message = connection.up_decoder.next_message().expect("honest bytes are a stream");
            let Some(message) = message else { break };
            self.handle_at_receiver(id, message);
        }
        self.settle(id);
        self.commit();
    }

    pub(crate) fn reaches_agent(&mut self, id: u64) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        let Some(chunk) = connection.down.chunks.pop_front() else { return };
        if self.agent.as_ref().is_none_or(|agent| agent.connection != Some(id)) {
            return;
        }
        let Some(bytes) = chunk else { return self.lost_at_agent(id) };
        connection.down_decoder.buffer().extend_from_slice(&bytes);
        while let Some(connection) = self.connections.get_mut(&id)
            && self.agent.as_ref().is_some_and(|agent| agent.connection == Some(id))
        {
            let message = connection.down_decoder.next_message().expect("honest bytes are a stream");
            let Some(message) = message else { break };
            self.handle_at_agent(id, message.message);
        }
        self.detach_when_quiet();
    }

    fn handle_at_agent(&mut self, id: u64, message: Message) {
        self.trace.say(self.now, || format!("agent gets {}", brief(&message)));
        match message {
            Message::Welcome(welcome) => {
                self.connections.get_mut(&id).expect("it came on it").welcomed = true;
                let agent = self.agent.as_ref().expect("seen above");
                let behind = welcome.durable < agent.filter.hello().acked_durable;
                let noticed = self.stats.put_back_noticed;
                self.call(|filter, now| filter.connected(now, &welcome));
                assert!(
                    !behind || self.stats.put_back_noticed > noticed,
                    "acknowledged LSNs are gone, and nobody says so"
                );
                self.welcome_seen(id);
            }
            Message::Close(closed) => {
                let expected = matches!(closed.code, CloseCode::Store | CloseCode::Busy);
                assert!(expected, "the receiver closed: {closed:?}");
                self.agent.as_mut().expect("seen above").refused = closed.code == CloseCode::Store;
                self.lost_at_agent(id);
            }
            other => self.call(|filter, now| filter.receive(now, other)),
        }
    }

    /// What an acknowledgement of `frame` promises.
    pub(crate) fn acknowledged_lsn(&mut self, id: u64, frame: u64) -> Lsn {
        self.connections.get_mut(&id).map_or(Lsn::ZERO, |connection| connection.brought_by(frame))
    }

    /// What was received with `frame`.
    pub(crate) fn received_lsn(&self, id: u64, frame: u64) -> Lsn {
        let frames = self.connections.get(&id).map(|connection| connection.frames.iter());
        let received = frames.into_iter().flatten().take_while(|(seq, _)| *seq <= frame);
        received.map(|(_, lsn)| *lsn).max().unwrap_or(Lsn::ZERO)
    }

    /// The agent notices that its connection is gone.
    pub(crate) fn lost_at_agent(&mut self, id: u64) {
        if self.agent.as_ref().is_some_and(|agent| agent.connection == Some(id)) {
            self.trace.note(self.now, "lost at agent", &[id]);
            self.agent_gone(id);
            let agent = self.agent.as_mut().expect("it has it");
            agent.connection = None;
            let refused = agent.refused;
            self.call(|filter, now| {
                filter.receiver_refuses(now, refused);
                filter.disconnected(now);
            });
            self.detach_when_quiet();
        }
    }

    /// The agent's side is closed: a part of what was sent may still arrive.
    pub(crate) fn agent_gone(&mut self, id: u64) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        connection.agent_side = false;
        connection.cut = true;
        let all = connection.up.chunks.len() as u64;
        let arrives = if self.random.one_in(2) { all } else { self.random.below(all + 1) };
        connection.up.chunks.truncate(arrives as usize);
        self.within(self.plan.outage_us * 2, Event::LostAtReceiver(id));
    }

    pub(crate) fn lost_at_receiver(&mut self, id: u64) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        if let (Some(mut session), Some(disks)) = (connection.session.take(), &mut self.receiver.disks) {
            session.lost(disks);
        }
        if !connection.agent_side {
            self.connections.remove(&id);
        }
    }

    /// The network breaks: every connection is dead, and somebody will notice.
    pub(crate) fn cut_connections(&mut self) {
        let open: Vec<u64> = self.connections.keys().copied().collect();
        for id in open {
            let connection = self.connections.get_mut(&id).expect("listed above");
            connection.cut = true;
            let up = self.random.below(connection.up.chunks.len() as u64 + 1);
            let down = self.random.below(connection.down.chunks.len() as u64 + 1);
            connection.up.chunks.truncate(up as usize);
            connection.down.chunks.truncate(down as usize);
            self.within(self.plan.outage_us, Event::LostAtAgent(id));
            self.within(self.plan.outage_us * 2, Event::LostAtReceiver(id));
        }
    }

    /// The receiver's process is gone: its sides of all connections are.
    pub(crate) fn receiver_sides_gone(&mut self) {
        let open: Vec<u64> = self.connections.keys().copied().collect();
        for id in open {
            let connection = self.connections.get_mut(&id).expect("listed above");
            connection.session = None;
            let arrives = self.random.below(connection.down.chunks.len() as u64 + 1);
            connection.down.chunks.truncate(arrives as usize);
            connection.cut = true;
            self.within(self.plan.outage_us, Event::LostAtAgent(id));
        }
        self.connections.retain(|_, connection| connection.agent_side);
    }

    /// Whether the connection belongs to the agent that is alive.
    pub(crate) fn is_of_living_agent(&self, id: u64) -> bool {
        let life = self.connections.get(&id).map(|connection| connection.life);
        self.agent.as_ref().is_some_and(|agent| Some(agent.life) == life)
    }
}

/// A message in a few words.
pub(crate) fn brief(message: &Message) -> String {
    match message {
        Message::Record(record) => {
            format!("record {} after {} {}", record.lsn, record.previous, record.range)
        }
        Message::PassData { at, range, data } => {
            format!("data at {at} {range} ({} bytes)", data.bytes().len())
        }
        Message::Compare(question) => {
            let ranges: Vec<String> = question.items.iter().map(|item| item.range.to_string()).collect();
            format!("compare {} at {}: {}", question.id, question.at, ranges.join(" "))
        }
        other => format!("{other:?}"),
    }
}
