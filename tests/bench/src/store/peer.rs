//! An agent reduced to its stream: one connection of one disk, whose writes are made up.

use std::{
    cell::Cell,
    collections::VecDeque,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use backtide_protocol::{
    Data, Decoder, Hello, Message, PROTOCOL_VERSION, Record, RecordBody, Tracking, encode,
};
use backtide_units::{ByteCount, ByteOffset, ByteRange, CaptureTime, DiskId, Epoch, Lsn, Reason};
use bytes::BytesMut;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
};
use uuid::Uuid;

/// Size of the disks that peers speak for.
pub(super) const DISK_BYTES: u64 = 1 << 30;

/// One disk's connection.
pub(super) struct Peer {
    reader: OwnedReadHalf,
    writer: OwnedWriteHalf,
    decoder: Decoder,
    sent: u64,
    durable: u64,
    writes: Writes,
    /// When frames were sent whose acknowledgement is measured.
    sent_at: VecDeque<(u64, Instant)>,
    /// How long those took to be durable that are.
    pub(super) took: Vec<Duration>,
}

/// The writes of a disk, one after the other.
struct Writes {
    lsn: u64,
    /// Where the next goes, as a place in a permutation of the disk.
    next: u64,
}

impl Writes {
    fn next(&mut self, data: &Data) -> Message {
        let length = ByteCount::of(data.bytes());
        let places = DISK_BYTES / length.0;
        // An odd factor makes a permutation of a power of two: places are far apart, none comes twice in a round.
        let place = self.next.wrapping_mul(0x9e37_79b1) % places;
        self.next += 1;
        self.lsn += 1;
        Message::Record(Record {
            lsn: Lsn(self.lsn),
            previous: Lsn(self.lsn - 1),
            time: CaptureTime(self.lsn),
            range: ByteRange::new(ByteOffset(place * length.0), length).expect("a place on the disk"),
            body: RecordBody::Write(data.clone()),
        })
    }
}

impl Peer {
    /// Connects the disk of this number and has its first pass taken, which is empty.
    pub(super) async fn attach(socket: &Path, number: usize) -> anyhow::Result<Self> {
        let (reader, writer) =
            UnixStream::connect(socket).await.context("connect to the receiver")?.into_split();
        let mut peer = Self {
            reader,
            writer,
            decoder: Decoder::new(),
            sent: 0,
            durable: 0,
            writes: Writes { lsn: 0, next: 0 },
            sent_at: VecDeque::new(),
            took: Vec::new(),
        };
        let hello = Hello {
            version: PROTOCOL_VERSION,
            disk: DiskId(Uuid::from_u128(number as u128 + 1)),
            name: format!("disk{number}").parse().context("a name")?,
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
        };
        peer.send(&[Message::Hello(hello)]).await?;
        let highest = peer.welcomed().await?;
        peer.writes.lsn = highest + 1;
        let (at, time) = (Lsn(highest + 1), CaptureTime(highest + 1));
        let begin = Message::PassBegin { at, gap_from: Lsn(highest), time, reason: Reason::FirstAttach };
        let end = Message::PassEnd { at, valid_from: Some(at), time };
        peer.send(&[begin, end]).await?;
        while peer.durable < peer.sent {
            peer.hear().await?;
        }
        Ok(peer)
    }

    async fn welcomed(&mut self) -> anyhow::Result<u64> {
        loop {
            if let Some(next) = self.decoder.next_message()? {
                match next.message {
                    Message::Welcome(welcome) => return Ok(welcome.highest.0),
                    other => bail!("expected a welcome, found {other:?}"),
                }
            }
            anyhow::ensure!(self.reader.read_buf(self.decoder.buffer()).await? > 0, "the receiver went away");
        }
    }

    /// A write that follows those before, somewhere on the disk.
    pub(super) fn write(&mut self, data: &Data) -> Message {
        self.writes.next(data)
    }

    /// Sends messages as one batch; how long the last takes to be durable is going to be measured.
    pub(super) async fn send_measured(&mut self, messages: &[Message]) -> anyhow::Result<()> {
        let last = self.sent + messages.len() as u64;
        self.sent_at.push_back((last, Instant::now()));
        self.send(messages).await
    }

    /// Sends messages as one batch.
    pub(super) async fn send(&mut self, messages: &[Message]) -> anyhow::Result<()> {
        let batch = batch_of(&mut self.sent, messages);
        self.writer.write_all(&batch).await.context("send to the receiver")
    }

    /// Writes as fast as the receiver takes them until then, and waits for all of it to be durable. Gives the number of
    /// writes.
    pub(super) async fn pump(&mut self, data: &Data, until: Instant) -> anyhow::Result<u64> {
        const BATCH_BYTES: u64 = 1 << 20;
        let Self { reader, writer, decoder, sent, durable, writes, .. } = self;
        let per_batch = (BATCH_BYTES / ByteCount::of(data.bytes()).0).max(1);
        let last = Cell::new(None);
        let write = async {
            let mut written = 0;
            while Instant::now() < until {
                let messages: Vec<Message> = (0..per_batch).map(|_| writes.next(data)).collect();
                writer.write_all(&batch_of(sent, &messages)).await.context("send to the receiver")?;
                written += per_batch;
            }
            // Known before it is asked for, so that the answer finds it.
            last.set(Some(*sent + 1));
            writer.write_all(&batch_of(sent, &[Message::Hasten { durable: true }])).await?;
            anyhow::Ok(written)
        };
        let read = async {
            while last.get().is_none_or(|last| *durable < last) {
                anyhow::ensure!(reader.read_buf(decoder.buffer()).await? > 0, "the receiver went away");
                while let Some(next) = decoder.next_message()? {
                    *durable = acknowledged(&next.message)?.unwrap_or(*durable);
                }
            }
            Ok(())
        };
        Ok(tokio::try_join!(write, read)?.0)
    }

    /// Frames that were sent and are not durable.
    pub(super) fn behind(&self) -> u64 {
        self.sent - self.durable
    }

    /// Waits for bytes and takes the acknowledgements in them. Safe to drop and call again.
    pub(super) async fn hear(&mut self) -> anyhow::Result<()> {
        anyhow::ensure!(self.reader.read_buf(self.decoder.buffer()).await? > 0, "the receiver went away");
        while let Some(next) = self.decoder.next_message()? {
            if let Some(durable) = acknowledged(&next.message)? {
                self.note_durable(durable);
            }
        }
        Ok(())
    }

    fn note_durable(&mut self, durable: u64) {
        self.durable = durable;
        while let Some(&(frame, sent)) = self.sent_at.front()
            && frame <= durable
        {
            self.took.push(sent.elapsed());
            self.sent_at.pop_front();
        }
    }
}

/// The frame up to which everything is durable, if a message says so.
fn acknowledged(message: &Message) -> anyhow::Result<Option<u64>> {
    match message {
        Message::Ack { durable, .. } => Ok(Some(*durable)),
        Message::Ping(_) => Ok(None),
        other => bail!("expected an acknowledgement, found {other:?}"),
    }
}

/// The frames of messages; `sent` counts them.
fn batch_of(sent: &mut u64, messages: &[Message]) -> BytesMut {
    let mut batch = BytesMut::new();
    for message in messages {
        *sent += 1;
        let (header, payload) = encode(*sent, message);
        batch.extend_from_slice(&header);
        batch.extend_from_slice(&payload);
    }
    batch
}
