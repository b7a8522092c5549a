//! The driver around a [`Session`]: one task per agent, on the thread that owns its disk.
//!
//! One read brings many frames; all of them go into the log, then one commit is asked for and one
//! acknowledgement sent. Bounded: it does not read while the disk has too much that is not durable,
//! while too many compares are being answered, or while the agent does not take what it is sent.

use std::{
    collections::VecDeque,
    io,
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use backtide_protocol::{
    CloseCode, Closed, CompareResult, Decoder, Hello, Message, Ping, ProtocolError, Sequenced, encode,
};
use backtide_recovery::LogError;
use backtide_units::CaptureTime;
use bytes::{Buf, BytesMut};
use tokio::{
    io::{AsyncReadExt, AsyncWrite, AsyncWriteExt},
    task::JoinHandle,
};

use crate::{
    accept::Arrival,
    admit::drain,
    asking::Asking,
    disk::{Disk, chain},
    disks::closed,
    ingest::{AskDisk, Ingest, Wakeup},
    pool::GivenUp,
    session::{ConnectionId, Effect, Session, another_version},
    socket::Duplex,
};

/// Compares being answered; above it nothing more is read.
const COMPARES_MAX: usize = 8;

/// Bytes waiting to be taken by the agent; above it nothing more is read.
const OUTPUT_BYTES_MAX: usize = 256 * 1024;

/// Bytes that are read while the log of a connection's disk is being opened again; above it nothing more is.
const WAITING_BYTES_MAX: usize = 256 * 1024;

/// How long a connection that is being closed waits for the agent to take the reason.
const CLOSE_GRACE: Duration = Duration::from_secs(2);

struct Connection {
    id: ConnectionId,
    ingest: Rc<Ingest>,
    session: Session,
    decoder: Decoder,
    /// Frames sent so far.
    sent: u64,
    output: BytesMut,
    /// Of what was written some may not be out.
    unflushed: bool,
    compares: VecDeque<Answering>,
    /// What the agent was asked.
    asking: Asking,
    /// Set at the end: compares under way stop and queued ones do nothing, for other agents wait
    /// for the same threads.
    unwanted: Arc<AtomicBool>,
    ending: bool,
}

type Answering = JoinHandle<Result<Result<Option<CompareResult>, LogError>, GivenUp>>;

impl Drop for Connection {
    fn drop(&mut self) {
        self.unwanted.store(true, Ordering::Relaxed);
    }
}

/// What woke the connection.
enum Event {
    Read(io::Result<usize>),
    Written(io::Result<usize>),
    Flushed(io::Result<()>),
    Compared(Result<CompareResult, String>),
    Woken,
    /// Time to be heard.
    Beat,
}

/// Serves one agent until the connection ends.
pub(crate) async fn run(ingest: Rc<Ingest>, arrival: Arrival, wakeup: Rc<Wakeup>) {
    let Arrival { id, socket, decoder, first, rights, _permit } = arrival;
    let _entry = Entry { id, ingest: Rc::clone(&ingest) };
    let mut connection = Connection {
        id,
        ingest: Rc::clone(&ingest),
        session: Session::with_rights(id, rights),
        decoder,
        sent: 0,
        output: BytesMut::new(),
        compares: VecDeque::new(),
        asking: Asking::default(),
        unflushed: false,
        unwanted: Arc::default(),
        ending: false,
    };
    let result = match socket.attach() {
        Ok(stream) => connection.serve(stream.split(), first, &wakeup).await,
        Err(error) => Err(error),
    };
    if let Err(error) = result {
        tracing::info!(connection = id.0, %error, "connection lost");
    }
    connection.session.lost(&mut ingest.disks.borrow_mut());
}

/// The connection's place among those of its thread; left however its task ends.
struct Entry {
    id: ConnectionId,
    ingest: Rc<Ingest>,
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.ingest.forget(self.id);
    }
}

impl Connection {
    /// Waits until the disk of a hello is listed and its log open again, if that failed; false when nobody waits for that any
    /// more. What does it goes on all the same. For a hello that may not have the disk nothing is done.
    async fn prepare(&mut self, hello: &Hello, duplex: &mut Duplex, wakeup: &Wakeup) -> io::Result<bool> {
        let (ingest, disk) = (Rc::clone(&self.ingest), hello.disk);
        let listed = async move { ingest.list_again(disk).await };
        if self.may_greet(hello) && !self.wait_for(listed, duplex, wakeup).await? {
            return Ok(false);
        }
        // Only now its name may be known.
        let (ingest, hello_again) = (Rc::clone(&self.ingest), hello.clone());
        let reopened = async move { ingest.prepare(&hello_again).await };
        Ok(!self.may_greet(hello) || self.wait_for(reopened, duplex, wakeup).await?)
    }

    fn may_greet(&self, hello: &Hello) -> bool {
        self.session.may_greet(&self.ingest.disks.borrow(), hello)
    }

    async fn wait_for(
        &mut self,
        work: impl Future<Output = ()> + 'static,
        duplex: &mut Duplex,
        wakeup: &Wakeup,
    ) -> io::Result<bool> {
        let mut prepared = tokio::task::spawn_local(work);
        loop {
            // Nothing is decoded meanwhile, so nothing but this bounds what comes. Whoever has sent more and hangs up is
            // noticed when the log is open.
            let may_read = self.decoder.buffer().len() < WAITING_BYTES_MAX;
            tokio::select! {
                biased;
                // Should it have panicked, the claim says why there is no log.
                _ = &mut prepared => return Ok(true),
                () = wakeup.notify.notified() => {
                    if wakeup.close.borrow().is_some() {
                        return Ok(false);
                    }
                }
                read = duplex.reader.read_buf(self.decoder.buffer()), if may_read => {
                    if read? == 0 {
                        return Ok(false);
                    }
                }
            }
        }
    }

    async fn serve(&mut self, mut duplex: Duplex, first: Sequenced, wakeup: &Wakeup) -> io::Result<()> {
        if let Message::Hello(hello) = &first.message
            && !self.prepare(hello, &mut duplex, wakeup).await?
        {
            return Ok(());
        }
        self.take(first, self.ingest.now());
        self.take_decoded();
        // The first beat is due after an interval of silence: one at once may be a little late, and meet a
        // record that has just come.
        let interval = self.ingest.ping_interval;
        let mut beat = tokio::time::interval_at(tokio::time::Instant::now() + interval, interval);
        beat.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        while !self.ending {
            let may_read = self.may_read();
            let event = tokio::select! {
                biased;
                () = wakeup.notify.notified() => Event::Woken,
                event = put_out(&mut *duplex.writer, &self.output), if !self.output.is_empty() || self.unflushed => event,
                result = answer(&mut self.compares), if !self.compares.is_empty() => Event::Compared(result),
                _ = beat.tick() => Event::Beat,
                read = duplex.reader.read_buf(self.decoder.buffer()), if may_read => Event::Read(read),
            };
            match event {
                Event::Read(read) => {
                    if read? == 0 {
                        tracing::info!(connection = self.id.0, "the agent went away without a word");
                        return Ok(());
                    }
                    self.take_decoded();
                }
                // A slow sync or comparison is no silence; nor is this more than one frame not taken.
                Event::Beat => {
                    if self.asking.may_ask && self.output.is_empty() {
                        self.send_clock();
                    }
                }
                Event::Written(written) => {
                    self.output.advance(written?);
                    self.unflushed = duplex.buffered;
                }
                Event::Flushed(flushed) => {
                    flushed?;
                    self.unflushed = false;
                }
                Event::Compared(Ok(result)) => {
                    self.send(&Message::CompareResult(result));
                    self.take_decoded();
                }
                Event::Compared(Err(why)) => self.close(closed(CloseCode::Store, why)),
                Event::Woken => {
                    let close = wakeup.close.borrow_mut().take();
                    match close {
                        Some(closed) => self.close(closed),
                        None => {
                            let questions = wakeup.questions.take();
                            questions.into_iter().for_each(|question| self.ask(question));
                            self.settle();
                        }
                    }
                }
            }
        }
        // The disk is free from now on: the agent may come back while this one still reads.
        let last_words = async {
            duplex.writer.write_all(&self.output).await?;
            duplex.writer.shutdown().await?;
            drain(&mut duplex.reader).await;
            Ok(())
        };
        tokio::time::timeout(CLOSE_GRACE, last_words).await.unwrap_or(Ok(()))
    }

    /// Whether there is room for what the agent sends next.
    fn may_read(&self) -> bool {
        let disks = self.ingest.disks.borrow();
        let undurable = self.session.disk().and_then(|disk| disks.get(disk)).map(Disk::undurable_bytes);
        undurable.is_none_or(|bytes| bytes < self.ingest.undurable_bytes_max)
            && self.compares.len() < COMPARES_MAX
            && self.output.len() < OUTPUT_BYTES_MAX
    }

    /// Takes the messages that have wholly arrived, then commits and acknowledges them as one batch.
    /// It stops at too many compares, for a small frame can ask for much; their answers bring it back.
    fn take_decoded(&mut self) {
        // A session that ends in this batch forgets its disk; what came before the end counts.
        let disk = self.session.disk();
        while !self.ending && self.compares.len() < COMPARES_MAX {
            match self.decoder.next_message() {
                Ok(Some(message)) => self.take(message, self.ingest.now()),
                Ok(None) => break,
                Err(error) => self.close(undecodable(&error)),
            }
        }
        let answer = self.session.end_batch(&self.ingest.disks.borrow());
        let woken = match disk.or(self.session.disk()) {
            Some(disk) if self.session.wants_commit() => {
                self.ingest.commit(disk);
                false
            }
            Some(disk) => self.ingest.commit_soon(disk),
            None => false,
        };
        // An acknowledgement costs both sides: one that nobody waits for comes with the next sync.
        if answer || !woken {
            self.settle();
        }
    }

    fn take(&mut self, message: Sequenced, now: CaptureTime) {
        let effects = self.session.handle(&mut self.ingest.disks.borrow_mut(), message, now);
        self.carry_out(effects);
    }

    fn settle(&mut self) {
        let effects = self.session.settle(&mut self.ingest.disks.borrow_mut());
        self.carry_out(effects);
    }

    fn close(&mut self, closed: Closed) {
        let effects = self.session.close(&mut self.ingest.disks.borrow_mut(), closed);
        self.carry_out(effects);
    }

    fn carry_out(&mut self, effects: Vec<Effect>) {
        for effect in effects {
            match effect {
                Effect::Send(message) => {
                    self.send(&message);
                    if matches!(message, Message::Welcome(_)) {
                        self.send_clock();
                    }
                }
                Effect::Compare(job) => {
                    let readers = self.ingest.readers.clone();
                    let unwanted = Arc::clone(&self.unwanted);
                    let run = move || job.run_while(|| !unwanted.load(Ordering::Relaxed));
                    let answer = tokio::task::spawn_local(async move { readers.run(run).await });
                    self.compares.push_back(answer);
                }
                Effect::Recalled(recalled) => self.asking.answered(recalled),
                Effect::CloseOther(connection, closed) => self.ingest.close(connection, closed),
                Effect::End => {
                    self.ending = true;
                    self.unwanted.store(true, Ordering::Relaxed);
                }
            }
        }
    }

    fn ask(&mut self, question: AskDisk) {
        if let Some(message) = self.asking.ask(question) {
            self.send(&message);
        }
    }

    /// Says what this side's clock shows; the answer tells how the agent's differs.
    fn send_clock(&mut self) {
        self.send(&Message::Ping(Ping { sent: Some(self.ingest.now()), heard: None }));
    }

    fn send(&mut self, message: &Message) {
        self.sent += 1;
        self.asking.may_ask |= matches!(message, Message::Welcome(_));
        let (header, payload) = encode(self.sent, message);
        self.output.extend_from_slice(&header);
        self.output.extend_from_slice(&payload);
    }
}

/// Writes some of `output` or, when all of it was, sees that it goes out. Safe to drop and call again.
async fn put_out(writer: &mut (dyn AsyncWrite + Send + Unpin), output: &[u8]) -> Event {
    if output.is_empty() {
        Event::Flushed(writer.flush().await)
    } else {
        Event::Written(writer.write(output).await)
    }
}

/// The oldest question's answer. Safe to drop and call again: the answer stays in its handle.
async fn answer(compares: &mut VecDeque<Answering>) -> Result<CompareResult, String> {
    let Some(oldest) = compares.front_mut() else { return std::future::pending().await };
    let joined = oldest.await;
    compares.pop_front();
    match joined {
        Ok(Ok(Ok(Some(result)))) => Ok(result),
        Ok(Ok(Ok(None))) => Err("the connection has ended".to_owned()),
        Ok(Ok(Err(error))) => Err(chain(&error)),
        Ok(Err(given_up)) => Err(given_up.to_string()),
        Err(panicked) => Err(GivenUp::from(panicked).to_string()),
    }
}

/// What a peer is told whose bytes are no messages of this version.
pub(crate) fn undecodable(error: &ProtocolError) -> Closed {
    match error {
        ProtocolError::Version { found } => another_version(*found),
        ProtocolError::Magic { .. }
        | ProtocolError::HeaderChecksum { .. }
        | ProtocolError::PayloadChecksum { .. }
        | ProtocolError::UnknownType { .. }
        | ProtocolError::TooLarge { .. }
        | ProtocolError::Invalid { .. }
        | ProtocolError::Sequence { .. } => closed(CloseCode::Invalid, error.to_string()),
    }
}
