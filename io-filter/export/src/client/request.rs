//! The disk a server offers: requests are checked, split to what the server takes, and put
//! together again.

use std::{sync::Arc, time::Duration};

use backtide_nbd::client::Session;
use backtide_nbd::{
    BlockSizes, Command, CommandKind, Extent, NbdError, NbdUri, ReplyStyle, TransmissionFlags,
};
use backtide_units::{ByteCount, ByteOffset, ByteRange};
use bytes::{Bytes, BytesMut};
use tokio::sync::oneshot;

use super::{
    connect,
    gather::Answer,
    link::{Bounds, Link, Outcome},
};
use crate::{ClientError, alive::Patience, tls::ClientFiles};

/// The longest request without payload where lengths are 32 bits on the wire, or where the server
/// does not like longer ones.
const LONGEST: u64 = 1 << 30;

/// How to use a server.
#[derive(Clone, Copy, Debug)]
pub struct ClientOptions {
    /// How long connecting and the handshake may take. Default 10 s.
    pub connect_timeout: Duration,
    /// How long the host of a server over TCP may acknowledge nothing of what it is sent or asked while requests wait, until
    /// the connection is given up. A server that takes nothing more, on a host that says so, is not. Default 20 s.
    pub host_silence: Duration,
    /// Requests in flight. Default 128.
    pub requests: usize,
    /// Bytes of reads and writes in flight. Default 64 MiB.
    pub bytes: ByteCount,
}

impl Default for ClientOptions {
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_secs(10),
            host_silence: Patience::WITH_SERVERS.after(),
            requests: 128,
            bytes: ByteCount(64 << 20),
        }
    }
}

/// How to write zeroes.
#[derive(Clone, Copy, Debug, Default)]
pub struct ZeroOptions {
    /// Answer only when durable.
    pub fua: bool,
    /// The range must stay allocated.
    pub no_hole: bool,
    /// Fail with ENOTSUP rather than be slow.
    pub fast: bool,
}

/// A disk behind an NBD server. Clones share the connection; when the last is dropped, it ends
/// in good order. Any number of requests may wait at once.
///
/// When the connection is lost every request fails, those in flight included; whether those
/// were carried out is not known. It counts as lost too when the server says that it is shutting down: what is in flight
/// then is waited for, and fails that way only where the server says so of it or closes.
#[derive(Clone, Debug)]
pub struct Client {
    owner: Arc<Owner>,
    session: Session,
}

#[derive(Debug)]
struct Owner {
    link: Arc<Link>,
    _files: Option<ClientFiles>,
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.link.leave();
    }
}

impl Client {
    /// Connects to `uri` with the default options.
    ///
    /// # Errors
    /// When the server cannot be reached, refuses the export, or does not answer in time.
    pub async fn connect(uri: &NbdUri) -> Result<Self, ClientError> {
        Self::connect_with(uri, ClientOptions::default()).await
    }

    /// Connects to `uri`.
    ///
    /// # Errors
    /// As [`connect`](Self::connect).
    pub async fn connect_with(uri: &NbdUri, options: ClientOptions) -> Result<Self, ClientError> {
        let mut connected = connect::open(uri, &options).await?;
        let files = connected.files.take();
        let session = connected.session;
        let bounds = Bounds { requests: options.requests, bytes: options.bytes.0 };
        let link = Link::start(connected, bounds);
        Ok(Self { owner: Arc::new(Owner { link, _files: files }), session })
    }

    /// The disk's size.
    pub fn size(&self) -> ByteCount {
        self.session.size
    }

    /// What the server can do.
    pub fn flags(&self) -> TransmissionFlags {
        self.session.flags
    }

    /// The server's block sizes; writes have to be multiples of the minimum.
    pub fn block_sizes(&self) -> BlockSizes {
        self.session.block_sizes
    }

    /// Whether the server tells which parts are allocated.
    pub fn has_block_status(&self) -> bool {
        self.session.base_allocation.is_some()
    }

    /// Why the connection ended, or takes no more requests, if that is so.
    pub fn lost(&self) -> Option<ClientError> {
        self.owner.link.ended()
    }

    /// Ends the connection now, for all clones: what is not answered fails, and what the server has not got yet never gets
    /// there. What it has got it may still carry out.
    pub fn give_up(&self) {
        self.owner.link.give_up(ClientError::Closed);
    }

    /// Reads `length` bytes at `offset`, however aligned.
    ///
    /// # Errors
    /// When the range is not inside the disk, the server refuses, or the connection is lost.
    pub async fn read(&self, offset: ByteOffset, length: ByteCount) -> Result<Bytes, ClientError> {
        let wanted = self.inside(offset, length)?;
        let range = self.aligned_around(wanted);
        let mut answers = Vec::new();
        for piece in self.payload_pieces(range) {
            let (offset, length) = (piece.start(), piece.count());
            answers.push((piece, self.send(Command::Read { offset, length, one_chunk: false }).await?));
        }
        let mut parts = Vec::with_capacity(answers.len());
        for (piece, answer) in answers {
            match self.wait(CommandKind::Read, piece, answer).await? {
                Answer::Data(data) => parts.push(data),
                Answer::Done | Answer::Extents(_) | Answer::Refused(..) => {
                    unreachable!("a read is answered with data")
                }
            }
        }
        let whole = joined(parts);
        let skip = (wanted.start().0 - range.start().0) as usize;
        Ok(whole.slice(skip..skip + length.0 as usize))
    }

    /// Writes `data` at `offset`; with `fua` it is durable afterwards.
    ///
    /// # Errors
    /// As [`read`](Self::read), and when the range is no multiple of the server's block size.
    /// After an error the range may hold the old bytes, the new ones, or some of each.
    pub async fn write(&self, offset: ByteOffset, data: Bytes, fua: bool) -> Result<(), ClientError> {
        let range = self.writable(offset, ByteCount::of(&data))?;
        let on_the_wire = fua && self.flags().fua();
        let mut answers = Vec::new();
        for piece in self.payload_pieces(range) {
            let start = (piece.start().0 - range.start().0) as usize;
            let data = data.slice(start..start + piece.count().0 as usize);
            let write = Command::Write { offset: piece.start(), data, fua: on_the_wire };
            answers.push((piece, self.send(write).await?));
        }
        self.wait_all(CommandKind::Write, answers).await?;
        self.flush_instead(fua).await
    }

    /// Makes every write that was answered durable. Does nothing when the server has no flush.
    ///
    /// # Errors
    /// When the server refuses, or the connection is lost.
    pub async fn flush(&self) -> Result<(), ClientError> {
        if !self.flags().flush() {
            return Ok(());
        }
        let answer = self.send(Command::Flush).await?;
        self.wait(CommandKind::Flush, ByteRange::default(), answer).await.map(drop)
    }

    /// Discards a range. What it reads as afterwards is the server's to choose.
    ///
    /// # Errors
    /// As [`write`](Self::write), and when the server has no trim.
    pub async fn trim(&self, offset: ByteOffset, length: ByteCount, fua: bool) -> Result<(), ClientError> {
        if !self.flags().trim() {
            return Err(ClientError::NotOffered(CommandKind::Trim));
        }
        let range = self.writable(offset, length)?;
        let on_the_wire = fua && self.flags().fua();
        let trim = |piece: ByteRange| Command::Trim {
            offset: piece.start(),
            length: piece.count(),
            fua: on_the_wire,
        };
        self.each_piece(CommandKind::Trim, range, trim).await?;
        self.flush_instead(fua).await
    }

    /// Makes a range read as zeroes; written out where the server has no better way, unless
    /// that was to be fast.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    pub async fn write_zeroes(
        &self,
        offset: ByteOffset,
        length: ByteCount,
        how: ZeroOptions,
    ) -> Result<(), ClientError> {
        let range = self.writable(offset, length)?;
        if how.fast && !self.flags().fast_zero() {
            return Err(ClientError::NotOffered(CommandKind::WriteZeroes));
        }
        if !self.flags().write_zeroes() {
            return self.write_out_zeroes(range, how.fua).await;
        }
        let fua = how.fua && self.flags().fua();
        let zero = |piece: ByteRange| Command::WriteZeroes {
            offset: piece.start(),
            length: piece.count(),
            fua,
            no_hole: how.no_hole,
            fast: how.fast,
        };
        self.each_piece(CommandKind::WriteZeroes, range, zero).await?;
        self.flush_instead(how.fua).await
    }

    /// Which parts of a range are allocated, covering it exactly. All of it is data when the
    /// server cannot tell.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub async fn block_status(
        &self,
        offset: ByteOffset,
        length: ByteCount,
    ) -> Result<Vec<Extent>, ClientError> {
        let wanted = self.inside(offset, length)?;
        if !self.has_block_status() || wanted.is_empty() {
            return Ok(vec![Extent::data(length)]);
        }
        let range = self.aligned_around(wanted);
        let mut extents = Vec::new();
        let mut at = range.start();
        while at < range.end() {
            for (part, extent) in self.ask_status(at, range.end(), false).await? {
                at = part.end();
                push_extent(&mut extents, wanted, part, extent, usize::MAX);
            }
        }
        Ok(extents)
    }

    /// The same of the beginning of a range, as far as the server's first answer goes and `extents_max` extents: one at
    /// least, of a range that is not empty.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub async fn first_block_status(
        &self,
        offset: ByteOffset,
        length: ByteCount,
        extents_max: usize,
    ) -> Result<Vec<Extent>, ClientError> {
        let wanted = self.inside(offset, length)?;
        if !self.has_block_status() || wanted.is_empty() {
            return Ok(vec![Extent::data(length)]);
        }
        let range = self.aligned_around(wanted);
        let mut extents = Vec::new();
        let mut at = range.start();
        // An answer may end before what is wanted begins.
        while extents.is_empty() && at < range.end() {
            for (part, extent) in self.ask_status(at, range.end(), extents_max == 1).await? {
                at = part.end();
                if !push_extent(&mut extents, wanted, part, extent, extents_max) {
                    break;
                }
            }
        }
        Ok(extents)
    }

    /// What the server answers to one request for what is between, each extent with its place. It may reach further.
    async fn ask_status(
        &self,
        from: ByteOffset,
        to: ByteOffset,
        one: bool,
    ) -> Result<impl Iterator<Item = (ByteRange, Extent)> + use<>, ClientError> {
        let length = ByteCount((to.0 - from.0).min(self.longest()));
        let answer = self.send(Command::BlockStatus { offset: from, length, one }).await?;
        let asked = ByteRange::between(from, ByteOffset(from.0 + length.0));
        match self.wait(CommandKind::BlockStatus, asked, answer).await? {
            Answer::Extents(found) => Ok(found.into_iter().scan(from, |at, extent| {
                let start = *at;
                *at = ByteOffset(start.0.saturating_add(extent.length.0));
                Some((ByteRange::between(start, *at), extent))
            })),
            Answer::Done | Answer::Data(_) | Answer::Refused(..) => {
                unreachable!("block status is answered with extents")
            }
        }
    }

    async fn write_out_zeroes(&self, range: ByteRange, fua: bool) -> Result<(), ClientError> {
        // In steps, so that a huge range takes no huge buffer.
        const STEP: ByteCount = ByteCount(1 << 20);
        let zeroes = Bytes::from(vec![0; STEP.0 as usize]);
        for piece in range.split_at_multiples(STEP) {
            let data = zeroes.slice(..piece.count().0 as usize);
            self.write(piece.start(), data, fua).await?;
        }
        Ok(())
    }

    async fn each_piece(
        &self,
        kind: CommandKind,
        range: ByteRange,
        command: impl Fn(ByteRange) -> Command,
    ) -> Result<(), ClientError> {
        if range.count().0 <= self.longest() {
            let whole = if range.is_empty() { None } else { Some(range) };
            let Err(error) = self.send_all(kind, whole, &command).await else { return Ok(()) };
            let too_long = error.as_nbd() == NbdError::Overflow && range.count().0 > LONGEST;
            if !too_long {
                return Err(error);
            }
        }
        self.send_all(kind, range.split_at_multiples(ByteCount(LONGEST)), &command).await
    }

    async fn send_all(
        &self,
        kind: CommandKind,
        pieces: impl IntoIterator<Item = ByteRange>,
        command: impl Fn(ByteRange) -> Command,
    ) -> Result<(), ClientError> {
        let mut answers = Vec::new();
        for piece in pieces {
            answers.push((piece, self.send(command(piece)).await?));
        }
        self.wait_all(kind, answers).await
    }

    /// The longest request without payload that can be sent.
    fn longest(&self) -> u64 {
        match self.session.style {
            ReplyStyle::Simple | ReplyStyle::Structured => LONGEST,
            ReplyStyle::Extended => u64::MAX,
        }
    }

    /// FUA by other means, for servers that have none.
    async fn flush_instead(&self, fua: bool) -> Result<(), ClientError> {
        if fua && !self.flags().fua() { self.flush().await } else { Ok(()) }
    }

    async fn send(&self, command: Command) -> Result<oneshot::Receiver<Outcome>, ClientError> {
        self.owner.link.send(command).await
    }

    async fn wait(
        &self,
        kind: CommandKind,
        range: ByteRange,
        answer: oneshot::Receiver<Outcome>,
    ) -> Result<Answer, ClientError> {
        // The task answers all; only a runtime that shuts down drops it before.
        match answer.await.unwrap_or(Err(ClientError::Closed))? {
            Answer::Refused(error, text) => Err(ClientError::Refused { kind, range, error, text }),
            answer @ (Answer::Done | Answer::Data(_) | Answer::Extents(_)) => Ok(answer),
        }
    }

    /// Waits for all of them, also after an error: nothing may be in flight when it is told.
    async fn wait_all(
        &self,
        kind: CommandKind,
        answers: Vec<(ByteRange, oneshot::Receiver<Outcome>)>,
    ) -> Result<(), ClientError> {
        let mut result = Ok(());
        for (piece, answer) in answers {
            let answered = self.wait(kind, piece, answer).await.map(drop);
            result = result.and(answered);
        }
        result
    }

    fn inside(&self, offset: ByteOffset, length: ByteCount) -> Result<ByteRange, ClientError> {
        let size = self.size();
        let range =
            ByteRange::new(offset, length).unwrap_or(ByteRange::between(offset, ByteOffset(u64::MAX)));
        if range.end().0 <= size.0 && range.count() == length {
            Ok(range)
        } else {
            Err(ClientError::OutOfRange { range, size })
        }
    }

    fn writable(&self, offset: ByteOffset, length: ByteCount) -> Result<ByteRange, ClientError> {
        let range = self.inside(offset, length)?;
        if self.flags().read_only() {
            let (kind, error) = (CommandKind::Write, NbdError::NotPermitted);
            let text = "the export is read-only".to_owned();
            return Err(ClientError::Refused { kind, range, error, text });
        }
        if self.aligned_around(range) == range {
            Ok(range)
        } else {
            let minimum = self.block_sizes().minimum;
            Err(ClientError::Misaligned { range, minimum })
        }
    }

    /// The whole blocks around `range`, cut at the end of the disk.
    fn aligned_around(&self, range: ByteRange) -> ByteRange {
        let block = u64::from(self.block_sizes().minimum);
        let start = range.start().0 / block * block;
        let end = range.end().0.next_multiple_of(block).min(self.size().0);
        ByteRange::between(ByteOffset(start), ByteOffset(end.max(start)))
    }

    /// Pieces no longer than the server takes. An empty range has none.
    fn payload_pieces(&self, range: ByteRange) -> impl Iterator<Item = ByteRange> + use<> {
        let longest = u64::from(self.block_sizes().maximum);
        let (mut at, end) = (range.start().0, range.end().0);
        std::iter::from_fn(move || {
            let next = end.min(at.saturating_add(longest));
            let piece = ByteRange::between(ByteOffset(at), ByteOffset(next));
            at = next;
            (!piece.is_empty()).then_some(piece)
        })
    }
}

fn joined(mut parts: Vec<Bytes>) -> Bytes {
    if parts.len() <= 1 {
        return parts.pop().unwrap_or_default();
    }
    let mut whole = BytesMut::with_capacity(parts.iter().map(Bytes::len).sum());
    for part in &parts {
        whole.extend_from_slice(part);
    }
    whole.freeze()
}

/// Appends the part of `found` inside `wanted`, joined to the last extent when they are alike. False when it is another
/// one and there are `max` already.
fn push_extent(
    extents: &mut Vec<Extent>,
    wanted: ByteRange,
    found: ByteRange,
    like: Extent,
    max: usize,
) -> bool {
    let part = wanted.intersection(found).filter(|part| !part.is_empty());
    part.is_none_or(|part| Extent { length: part.count(), ..like }.append_to(extents, max))
}
