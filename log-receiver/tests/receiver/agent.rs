//! An agent reduced to the protocol: it sends what the test says and reads what comes.

use std::path::Path;

use backtide_log_receiver::Receiver;
use backtide_protocol::{
    Closed, Data, Decoder, Hello, Message, PROTOCOL_VERSION, Record, RecordBody, Tracking, Welcome, encode,
};
use backtide_units::{ByteCount, ByteOffset, ByteRange, CaptureTime, DiskId, Epoch, Lsn, Reason};
use bytes::Bytes;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
};
use uuid::Uuid;

pub(crate) const DISK_BYTES: u64 = 4 << 20;

/// One connection to a receiver.
pub(crate) struct Agent {
    stream: UnixStream,
    decoder: Decoder,
    pub(crate) sent: u64,
}

impl Agent {
    pub(crate) async fn connect(receiver: &Receiver) -> Self {
        Self::connect_to(receiver.stream_addresses()[0].socket_path().unwrap()).await
    }

    pub(crate) async fn connect_to(path: &Path) -> Self {
        let stream = UnixStream::connect(path).await.unwrap();
        Self { stream, decoder: Decoder::new(), sent: 0 }
    }

    /// Connects, says hello and is welcomed.
    pub(crate) async fn welcomed(receiver: &Receiver, hello: Hello) -> (Self, Welcome) {
        let mut agent = Self::connect(receiver).await;
        agent.send(&Message::Hello(hello)).await;
        match agent.next().await {
            Some(Message::Welcome(welcome)) => (agent, welcome),
            other => panic!("expected a welcome, found {other:?}"),
        }
    }

    /// Connects, says hello and is refused.
    pub(crate) async fn refused(receiver: &Receiver, hello: Hello) -> Closed {
        let mut agent = Self::connect(receiver).await;
        agent.send(&Message::Hello(hello)).await;
        agent.closed().await
    }

    pub(crate) async fn send(&mut self, message: &Message) {
        self.sent += 1;
        let (header, payload) = encode(self.sent, message);
        self.stream.write_all(&header).await.unwrap();
        self.stream.write_all(&payload).await.unwrap();
    }

    pub(crate) async fn send_raw(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.unwrap();
    }

    /// The next message; none at the end of the stream.
    pub(crate) async fn next(&mut self) -> Option<Message> {
        loop {
            if let Some(next) = self.decoder.next_message().unwrap() {
                return Some(next.message);
            }
            if self.stream.read_buf(self.decoder.buffer()).await.unwrap() == 0 {
                return None;
            }
        }
    }

    /// Reads on until the receiver closes; gives the reason, after which the stream must end.
    pub(crate) async fn closed(&mut self) -> Closed {
        loop {
            match self.next().await {
                Some(Message::Close(closed)) => {
                    assert_eq!(self.next().await, None, "nothing comes after a close");
                    return closed;
                }
                Some(Message::Ack { .. } | Message::Ping(_)) => {}
                other => panic!("expected a close, found {other:?}"),
            }
        }
    }

    /// Reads acknowledgements until everything sent is durable. They never go back, and what is
    /// durable was received.
    pub(crate) async fn all_durable(&mut self) {
        let mut last = (0, 0);
        while last.1 < self.sent {
            match self.next().await {
                Some(Message::Ack { received, durable, .. }) => {
                    assert!(received >= last.0 && durable >= last.1 && durable <= received);
                    last = (received, durable);
                }
                Some(Message::Ping(_)) => {}
                other => panic!("expected an acknowledgement, found {other:?}"),
            }
        }
    }

    /// The first pass: the disk is empty at `at`, which is the first point.
    pub(crate) async fn first_pass(&mut self, at: u64) {
        self.send(&pass_begin(at, 0, Reason::FirstAttach)).await;
        self.send(&pass_end(at)).await;
    }
}

pub(crate) fn hello(number: u128, name: &str) -> Hello {
    Hello {
        version: PROTOCOL_VERSION,
        disk: DiskId(Uuid::from_u128(number)),
        name: name.parse().unwrap(),
        size: ByteCount(DISK_BYTES),
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

/// Captured at second `lsn` of 1970.
pub(crate) fn time(lsn: u64) -> CaptureTime {
    CaptureTime(lsn * 1_000_000)
}

fn range(offset: u64, count: u64) -> ByteRange {
    ByteRange::new(ByteOffset(offset), ByteCount(count)).unwrap()
}

pub(crate) fn write(lsn: u64, offset: u64, bytes: Vec<u8>) -> Message {
    let range = range(offset, bytes.len() as u64);
    let body = RecordBody::Write(Data::capture(Bytes::from(bytes)));
    Message::Record(Record { lsn: Lsn(lsn), previous: Lsn(lsn - 1), time: time(lsn), range, body })
}

pub(crate) fn trim(lsn: u64, offset: u64, count: u64) -> Message {
    let range = range(offset, count);
    Message::Record(Record {
        lsn: Lsn(lsn),
        previous: Lsn(lsn - 1),
        time: time(lsn),
        range,
        body: RecordBody::Trim,
    })
}

pub(crate) fn pass_begin(at: u64, gap_from: u64, reason: Reason) -> Message {
    Message::PassBegin { at: Lsn(at), gap_from: Lsn(gap_from), time: time(at), reason }
}

pub(crate) fn pass_data(at: u64, offset: u64, bytes: Vec<u8>) -> Message {
    let range = range(offset, bytes.len() as u64);
    Message::PassData { at: Lsn(at), range, data: Data::capture(Bytes::from(bytes)) }
}

pub(crate) fn pass_end(at: u64) -> Message {
    Message::PassEnd { at: Lsn(at), valid_from: Some(Lsn(at)), time: time(at) }
}

pub(crate) fn mark(lsn: u64, label: &str) -> Message {
    Message::Mark { lsn: Lsn(lsn), time: time(lsn), label: label.to_owned() }
}
