//! A connection that reads a point: answers an agent's questions from a view that it holds.
//!
//! Runs beside the control API, off the threads that take records; what blocks goes to the readers' pool. The
//! view is a snapshot, and as long as the connection has it nothing of it is removed.
//!
//! Invariants: so many questions are open at most, of which a few are worked on and one for blocks; nothing
//! more is read from the agent meanwhile, so an agent that does not take its answers costs no more than those;
//! every question gets one end, and damage is such an end, never data.

use std::{
    collections::{BTreeSet, VecDeque},
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use backtide_protocol::reading::FETCH_BYTES_MAX;
use backtide_protocol::{
    Blocks, CloseCode, Closed, Compare, Decoder, FailureCode, Message, Ping, ReadFailure, Reading, encode,
};
use backtide_units::ByteRange;
use bytes::{Buf, Bytes};
use tokio::{
    io::{AsyncReadExt, AsyncWrite, AsyncWriteExt},
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    task::JoinSet,
    time::{Instant, MissedTickBehavior},
};

use crate::{
    admit::{Admitted, drain},
    connection::undecodable,
    disks::closed,
    open_point::OpenedPoint,
    service::Service,
    session::ConnectionId,
    socket::Duplex,
};

/// Questions open at once; the agent may send more, which wait where they are.
const QUESTIONS_MAX: usize = 16;

/// Of those so many are worked on at once: other connections want the readers' pool too.
const WORKING_MAX: usize = 4;

/// How long a connection that is being closed waits for the agent to take the reason.
const CLOSE_GRACE: Duration = Duration::from_secs(2);

/// How often an agent that waits for an answer hears that there is somebody.
const PING_INTERVAL: Duration = Duration::from_secs(5);

/// What an agent is told when the receiver ends.
const ENDING: &str = "the receiver is shutting down";

/// One agent that reads a point.
pub(crate) struct PointReader {
    id: ConnectionId,
    service: Arc<Service>,
    point: Arc<OpenedPoint>,
    decoder: Decoder,
    sent: u64,
    /// Ids of questions whose end is not in `answers` or out yet.
    open: BTreeSet<u64>,
    working: JoinSet<Answer>,
    work: Arc<Semaphore>,
    /// One question for blocks at a time: its answer is as large as the disk's bitmap.
    blocks: Arc<Semaphore>,
    answers: VecDeque<Answer>,
    /// Frames on their way, header and payload apart.
    output: VecDeque<Bytes>,
    /// Of what was written some may not be out.
    unflushed: bool,
    /// Set at the end: work that nobody waits for stops.
    unwanted: Arc<AtomicBool>,
}

/// The answer to one question, which is put out part by part.
struct Answer {
    id: u64,
    parts: VecDeque<Message>,
    _blocks: Option<OwnedSemaphorePermit>,
}

enum Event {
    Read(io::Result<usize>),
    Written(io::Result<usize>),
    Flushed(io::Result<()>),
    Worked(Option<Answer>),
    Beat,
    Ending,
}

/// Serves an agent whose first message asks for a point, until the connection ends.
pub(crate) async fn run(
    id: ConnectionId,
    service: Arc<Service>,
    admitted: Admitted,
    mut ending: watch::Receiver<bool>,
) {
    let Admitted { stream, decoder, first, rights } = admitted;
    let mut duplex = stream.split();
    let opened = match first.message {
        Message::Reading(Reading::Open(open)) => service.open_point(&open, &rights).await,
        other => Err(closed(CloseCode::Invalid, format!("expected open-point, found {}", other.name()))),
    };
    let result = match opened {
        Ok(point) => {
            let mut reader = PointReader::new(id, service, point, decoder);
            tracing::info!(connection = id.0, disk = %reader.point.disk.uuid, lsn = %reader.point.at.lsn, reader = reader.point.reader, "an agent reads a point");
            reader.send(&Message::Reading(Reading::Opened(reader.point.describe())));
            reader.serve(&mut duplex, &mut ending).await
        }
        Err(why) => {
            tracing::warn!(connection = id.0, code = ?why.code, message = why.message, "no point for an agent");
            say_last(&mut duplex, 1, why).await
        }
    };
    if let Err(error) = result {
        tracing::info!(connection = id.0, %error, "connection lost");
    }
}

impl PointReader {
    fn new(id: ConnectionId, service: Arc<Service>, point: OpenedPoint, decoder: Decoder) -> Self {
        Self {
            id,
            service,
            point: Arc::new(point),
            decoder,
            sent: 0,
            open: BTreeSet::new(),
            working: JoinSet::new(),
            work: Arc::new(Semaphore::new(WORKING_MAX)),
            blocks: Arc::new(Semaphore::new(1)),
            answers: VecDeque::new(),
            output: VecDeque::new(),
            unflushed: false,
            unwanted: Arc::default(),
        }
    }

    async fn serve(&mut self, duplex: &mut Duplex, ending: &mut watch::Receiver<bool>) -> io::Result<()> {
        let mut beat = tokio::time::interval_at(Instant::now() + PING_INTERVAL, PING_INTERVAL);
        beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let end = loop {
            if let Err(why) = self.take_decoded() {
                break why;
            }
            self.put_next();
            let may_read = self.open.len() < QUESTIONS_MAX;
            let event = tokio::select! {
                biased;
                // It fails only when the receiver was dropped, which is an end too.
                _ = ending.wait_for(|ending| *ending) => Event::Ending,
                event = put_out(&mut *duplex.writer, &self.output), if !self.output.is_empty() || self.unflushed => event,
                Some(worked) = self.working.join_next() => Event::Worked(worked.ok()),
                _ = beat.tick() => Event::Beat,
                read = duplex.reader.read_buf(self.decoder.buffer()), if may_read => Event::Read(read),
            };
            match event {
                Event::Read(read) => {
                    if read? == 0 {
                        tracing::debug!(connection = self.id.0, "the agent has read what it wanted");
                        return Ok(());
                    }
                }
                Event::Written(written) => {
                    self.written(written?);
                    self.unflushed = duplex.buffered;
                }
                Event::Flushed(flushed) => {
                    flushed?;
                    self.unflushed = false;
                }
                Event::Worked(Some(answer)) => self.answers.push_back(answer),
                // It panicked, so nobody knows which question it was.
                Event::Worked(None) => break closed(CloseCode::Store, "reading the point failed"),
                Event::Beat => {
                    if !self.open.is_empty() && self.output.is_empty() {
                        self.send(&Message::Ping(Ping::default()));
                    }
                }
                Event::Ending => break closed(CloseCode::Bye, ENDING),
            }
        };
        tracing::info!(connection = self.id.0, code = ?end.code, message = end.message, "connection closed");
        // A frame that is partly out has to be whole before another one follows.
        let rest: Vec<Bytes> = self.output.drain(..).collect();
        let sent = self.sent;
        let last_words = async {
            for bytes in rest {
                duplex.writer.write_all(&bytes).await?;
            }
            say_last(duplex, sent + 1, end).await
        };
        tokio::time::timeout(CLOSE_GRACE, last_words).await.unwrap_or(Ok(()))
    }

    fn take_decoded(&mut self) -> Result<(), Closed> {
        while self.open.len() < QUESTIONS_MAX {
            match self.decoder.next_message() {
                Ok(Some(message)) => self.take(message.message)?,
                Ok(None) => break,
                Err(error) => return Err(undecodable(&error)),
            }
        }
        Ok(())
    }

    fn take(&mut self, message: Message) -> Result<(), Closed> {
        let reading = match message {
            Message::Reading(reading) => reading,
            Message::Ping(_) => {
                // Who has something to take hears enough; a peer that takes nothing shall not pile them up.
                if self.output.is_empty() {
                    self.send(&Message::Ping(Ping::default()));
                }
                return Ok(());
            }
            Message::Compare(question) => return self.compare(question),
            Message::Close(_) => return Err(closed(CloseCode::Bye, "the agent has read what it wanted")),
            Message::Hello(_)
            | Message::Welcome(_)
            | Message::Record(_)
            | Message::Flush { .. }
            | Message::Unchanged { .. }
            | Message::PassBegin { .. }
            | Message::PassData { .. }
            | Message::PassEnd { .. }
            | Message::Mark { .. }
            | Message::CompareResult(_)
            | Message::Ack { .. }
            | Message::Hasten { .. } => return Err(unexpected(message.name())),
        };
        match reading {
            Reading::Fetch { id, range } => self.fetch(id, range),
            Reading::AskBlocks { id, which } => self.ask_blocks(id, which),
            Reading::Hold { id, owner } => self.hold(id, owner, true),
            Reading::Release { id, owner } => self.hold(id, owner, false),
            Reading::Open(_)
            | Reading::Opened(_)
            | Reading::Piece { .. }
            | Reading::Blocks { .. }
            | Reading::Answered { .. }
            | Reading::Failed { .. } => Err(unexpected(reading.name())),
        }
    }

    fn begin(&mut self, id: u64) -> Result<(), Closed> {
        if self.open.insert(id) {
            return Ok(());
        }
        Err(closed(CloseCode::Invalid, format!("question {id} is open already")))
    }

    fn fetch(&mut self, id: u64, range: ByteRange) -> Result<(), Closed> {
        self.begin(id)?;
        let (point, work, service) = self.shared();
        self.working.spawn(async move {
            let _permit = work.acquire().await;
            let read = service.readers.run(move || point.pieces(id, range)).await;
            let parts = read.unwrap_or_else(|given_up| Err(failed(given_up.to_string())));
            answer(id, parts, None)
        });
        Ok(())
    }

    fn compare(&mut self, question: Compare) -> Result<(), Closed> {
        let (id, bytes) = (question.id, question.items.iter().map(|item| item.range.count().0));
        if bytes.fold(0, u64::saturating_add) > FETCH_BYTES_MAX || question.at != self.point.at.lsn {
            let why =
                format!("question {id} is about more than {FETCH_BYTES_MAX} bytes, or about another point");
            return Err(closed(CloseCode::Invalid, why));
        }
        self.begin(id)?;
        let (point, work, service) = self.shared();
        let unwanted = Arc::clone(&self.unwanted);
        self.working.spawn(async move {
            let _permit = work.acquire().await;
            let look = move || point.compare(question, &|| !unwanted.load(Ordering::Relaxed));
            let compared = service.readers.run(look).await;
            match compared.unwrap_or_else(|given_up| Err(failed(given_up.to_string()))) {
                Ok(result) => {
                    Answer { id, parts: VecDeque::from([Message::CompareResult(result)]), _blocks: None }
                }
                Err(failure) => answer(id, Err(failure), None),
            }
        });
        Ok(())
    }

    fn ask_blocks(&mut self, id: u64, which: Blocks) -> Result<(), Closed> {
        self.begin(id)?;
        let (point, work, service) = self.shared();
        let (one, unwanted) = (Arc::clone(&self.blocks), Arc::clone(&self.unwanted));
        self.working.spawn(async move {
            // Held until the answer is out; it is never closed.
            let alone = one.acquire_owned().await.ok();
            let _permit = work.acquire().await;
            let look = move || point.blocks(which, &|| !unwanted.load(Ordering::Relaxed));
            let read = service.readers.run(look).await;
            let blocks = read.unwrap_or_else(|given_up| Err(failed(given_up.to_string())));
            let parts = blocks.map(|blocks| Reading::parts(id, &blocks).collect());
            answer(id, parts, alone)
        });
        Ok(())
    }

    fn hold(&mut self, id: u64, owner: String, hold: bool) -> Result<(), Closed> {
        self.begin(id)?;
        let (point, _, service) = self.shared();
        self.working.spawn(async move {
            let done = match hold {
                true => service.hold_point(&point, owner).await,
                false => service.release_point(&point, owner).await,
            };
            answer(id, done.map(|()| VecDeque::new()), None)
        });
        Ok(())
    }

    fn shared(&self) -> (Arc<OpenedPoint>, Arc<Semaphore>, Arc<Service>) {
        (Arc::clone(&self.point), Arc::clone(&self.work), Arc::clone(&self.service))
    }

    /// The next part of an answer, once what was said before is out: so little is in memory twice.
    fn put_next(&mut self) {
        while self.output.is_empty()
            && let Some(answer) = self.answers.front_mut()
        {
            match answer.parts.pop_front() {
                Some(part) => self.send(&part),
                None => {
                    let id = answer.id;
                    self.answers.pop_front();
                    self.open.remove(&id);
                }
            }
        }
    }

    fn send(&mut self, message: &Message) {
        self.sent += 1;
        let (header, payload) = encode(self.sent, message);
        self.output.push_back(Bytes::copy_from_slice(&header));
        if !payload.is_empty() {
            self.output.push_back(payload);
        }
    }

    fn written(&mut self, mut bytes: usize) {
        while let Some(front) = self.output.front_mut() {
            if bytes < front.len() {
                front.advance(bytes);
                return;
            }
            bytes -= front.len();
            self.output.pop_front();
        }
    }
}

impl Drop for PointReader {
    fn drop(&mut self) {
        self.unwanted.store(true, Ordering::Relaxed);
    }
}

/// Parts and the end that belongs to them.
fn answer(
    id: u64,
    parts: Result<VecDeque<Reading>, ReadFailure>,
    blocks: Option<OwnedSemaphorePermit>,
) -> Answer {
    let parts = match parts {
        Ok(parts) => parts.into_iter().chain([Reading::Answered { id }]).map(Message::Reading).collect(),
        Err(failure) => VecDeque::from([Message::Reading(Reading::Failed { id, failure })]),
    };
    Answer { id, parts, _blocks: blocks }
}

pub(crate) fn failed(message: String) -> ReadFailure {
    ReadFailure { code: FailureCode::Failed, message }
}

fn unexpected(found: &str) -> Closed {
    closed(CloseCode::Invalid, format!("expected a question about the point, found {found}"))
}

/// Writes some of `output` or, when all of it was, sees that it goes out. Safe to drop and call again.
async fn put_out(writer: &mut (dyn AsyncWrite + Send + Unpin), output: &VecDeque<Bytes>) -> Event {
    if output.is_empty() {
        return Event::Flushed(writer.flush().await);
    }
    let slices: Vec<io::IoSlice<'_>> = output.iter().map(|bytes| io::IoSlice::new(bytes)).collect();
    Event::Written(match writer.write_vectored(&slices).await {
        Ok(0) => Err(io::ErrorKind::WriteZero.into()),
        written => written,
    })
}

/// Tells the agent why it ends, as frame `seq`.
async fn say_last(duplex: &mut Duplex, seq: u64, why: Closed) -> io::Result<()> {
    let (header, payload) = encode(seq, &Message::Close(why));
    let said = async {
        duplex.writer.write_all(&header).await?;
        duplex.writer.write_all(&payload).await?;
        duplex.writer.shutdown().await?;
        drain(&mut duplex.reader).await;
        Ok(())
    };
    tokio::time::timeout(CLOSE_GRACE, said).await.unwrap_or(Ok(()))
}
