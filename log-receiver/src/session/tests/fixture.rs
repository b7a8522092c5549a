//! A receiver without I/O: disks over a storage in memory, and agents that are function calls.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use backtide_protocol::{
    CloseCode, Data, Hello, Message, PROTOCOL_VERSION, Record, RecordBody, Sequenced, Tracking, Welcome,
};
use backtide_recovery::{LogCache, LogOptions};
use backtide_storage::MemoryStorage;
use backtide_units::{ByteCount, ByteOffset, ByteRange, CaptureTime, DiskId, Epoch, HistoryId, Lsn, Reason};
use bytes::Bytes;
use uuid::Uuid;

use crate::{ConnectionId, Disks, Effect, Findings, Forgotten, Names, Session, Shelf, StoreWatch};

pub(super) const SIZE: ByteCount = ByteCount(1 << 20);
pub(super) const TIME: CaptureTime = CaptureTime(1_000_000);

/// The receiver's side.
pub(super) struct Bench {
    pub(super) storage: MemoryStorage,
    pub(super) disks: Disks,
    log: LogOptions,
    connections: u64,
}

/// One connection.
pub(super) struct Peer {
    pub(super) session: Session,
    pub(super) id: ConnectionId,
    sent: u64,
}

/// An effect, to compare with.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Seen {
    Welcome(Welcome),
    Ack { received: u64, durable: u64 },
    Close(CloseCode, String),
    Compare,
    Recalled(u64),
    CloseOther(ConnectionId, CloseCode),
    End,
}

impl Bench {
    pub(super) fn new() -> Self {
        Self::with(LogOptions::default())
    }

    /// With these limits of each log.
    pub(super) fn with(log: LogOptions) -> Self {
        let storage = MemoryStorage::new();
        let disks = open(&storage, log);
        Self { storage, disks, log, connections: 0 }
    }

    /// The process ends and starts again; nothing written is lost.
    pub(super) fn restart(&mut self) {
        self.storage.kill_handles();
        self.disks = open(&self.storage, self.log);
    }

    pub(super) fn connect(&mut self) -> Peer {
        self.connections += 1;
        let id = ConnectionId(self.connections);
        Peer { session: Session::new(id), id, sent: 0 }
    }

    /// A connection that has been welcomed.
    pub(super) fn welcomed(&mut self, hello: Hello) -> (Peer, Welcome) {
        let mut peer = self.connect();
        let disk = hello.disk;
        peer.send(self, Message::Hello(hello));
        self.commit(disk);
        match peer.settle(self).as_slice() {
            [Seen::Welcome(welcome)] => (peer, welcome.clone()),
            other => panic!("expected a welcome, found {other:?}"),
        }
    }

    /// What a hello is refused with.
    pub(super) fn refused(&mut self, hello: Hello) -> (CloseCode, String) {
        let mut peer = self.connect();
        peer.refused(self, Message::Hello(hello))
    }

    /// Syncs whatever is due.
    pub(super) fn commit(&mut self, disk: DiskId) {
        let Some(disk) = self.disks.get_mut(disk) else { return };
        while let Some(ticket) = disk.ticket() {
            let outcome = ticket.sync();
            disk.synced(outcome);
        }
    }
}

fn open(storage: &MemoryStorage, log: LogOptions) -> Disks {
    let histories = AtomicU64::new(1);
    let shelf = Shelf {
        storage: Arc::new(storage.clone()),
        log,
        cache: LogCache::new(Default::default()),
        names: Arc::new(Names::new()),
        forgotten: Forgotten::load(Arc::new(storage.clone())).expect("the store can be listed"),
        space_floor: ByteCount(64 * 1024),
        disks_max: 3,
        watch: StoreWatch::default(),
        findings: Findings::open(Arc::new(storage.clone())),
        new_history: Arc::new(move || {
            HistoryId(Uuid::from_u128(histories.fetch_add(1, Ordering::Relaxed).into()))
        }),
    };
    let disks = shelf.list().unwrap();
    Disks::open(shelf, disks)
}

impl Peer {
    /// Sends one message and says what the receiver does at once.
    pub(super) fn send(&mut self, bench: &mut Bench, message: Message) -> Vec<Seen> {
        seen(self.effects(bench, message))
    }

    pub(super) fn effects(&mut self, bench: &mut Bench, message: Message) -> Vec<Effect> {
        self.sent += 1;
        let message = Sequenced { seq: self.sent, message };
        self.session.handle(&mut bench.disks, message, TIME)
    }

    pub(super) fn settle(&mut self, bench: &mut Bench) -> Vec<Seen> {
        seen(self.session.settle(&mut bench.disks))
    }

    /// Sends one message that must be taken without a word.
    pub(super) fn tell(&mut self, bench: &mut Bench, message: Message) {
        assert_eq!(self.send(bench, message), []);
    }

    /// Sends a message that must end the connection, and gives the reason.
    pub(super) fn refused(&mut self, bench: &mut Bench, message: Message) -> (CloseCode, String) {
        match self.send(bench, message).as_slice() {
            [Seen::Close(code, why), Seen::End] => (*code, why.clone()),
            other => panic!("expected a close, found {other:?}"),
        }
    }
}

pub(super) fn seen(effects: Vec<Effect>) -> Vec<Seen> {
    let seen = |effect| match effect {
        Effect::Send(Message::Welcome(welcome)) => Seen::Welcome(welcome),
        Effect::Send(Message::Ack { received, durable, .. }) => Seen::Ack { received, durable },
        Effect::Send(Message::Close(closed)) => Seen::Close(closed.code, closed.message),
        Effect::Send(other) => panic!("a receiver never sends {other:?} by itself"),
        Effect::Compare(_) => Seen::Compare,
        Effect::Recalled(recalled) => Seen::Recalled(recalled.id()),
        Effect::CloseOther(connection, closed) => Seen::CloseOther(connection, closed.code),
        Effect::End => Seen::End,
    };
    effects.into_iter().map(seen).collect()
}

pub(super) fn disk(number: u128) -> DiskId {
    DiskId(Uuid::from_u128(number))
}

/// The hello of an agent that was never here: disk 7, `vm1`, epoch 1.
pub(super) fn hello() -> Hello {
    Hello {
        version: PROTOCOL_VERSION,
        disk: disk(7),
        name: "vm1".parse().unwrap(),
        size: SIZE,
        epoch: Epoch(1),
        attach: Uuid::from_u128(1),
        history: None,
        tracking: Tracking::New,
        next_lsn: Lsn(1),
        acked_durable: Lsn::ZERO,
        ack: None,
        on_outage: None,
        origin: None,
    }
}

pub(super) fn range(start: u64, count: u64) -> ByteRange {
    ByteRange::new(ByteOffset(start), ByteCount(count)).unwrap()
}

pub(super) fn write(lsn: u64, previous: u64) -> Message {
    write_at(lsn, previous, 0, b"sixteen bytes!!!")
}

pub(super) fn write_at(lsn: u64, previous: u64, offset: u64, bytes: &'static [u8]) -> Message {
    Message::Record(Record {
        lsn: Lsn(lsn),
        previous: Lsn(previous),
        time: CaptureTime(lsn * 1000),
        range: range(offset, bytes.len() as u64),
        body: RecordBody::Write(Data::capture(Bytes::from_static(bytes))),
    })
}

pub(super) fn pass_begin(at: u64, gap_from: u64) -> Message {
    let time = CaptureTime(at * 1000);
    Message::PassBegin { at: Lsn(at), gap_from: Lsn(gap_from), time, reason: Reason::FirstAttach }
}

pub(super) fn pass_data(at: u64, offset: u64, bytes: &'static [u8]) -> Message {
    let data = Data::capture(Bytes::from_static(bytes));
    Message::PassData { at: Lsn(at), range: range(offset, bytes.len() as u64), data }
}

pub(super) fn pass_end(at: u64) -> Message {
    Message::PassEnd { at: Lsn(at), valid_from: Some(Lsn(at)), time: CaptureTime(at * 1000) }
}

pub(super) fn mark(lsn: u64, label: &str) -> Message {
    Message::Mark { lsn: Lsn(lsn), time: CaptureTime(lsn * 1000), label: label.to_owned() }
}

pub(super) fn flush(lsn: u64) -> Message {
    Message::Flush { lsn: Lsn(lsn), time: CaptureTime(lsn * 1000) }
}
