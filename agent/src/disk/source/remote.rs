//! A point at a log receiver, read over a stream of its own.
//!
//! Connects when something is asked, and again when that is after the stream was lost; any number of questions
//! may be asked, a part of which is out at once. Whoever asks gets one answer: when the stream is lost that is
//! an error, and he asks again. A point that is held is held again first of all.

use std::{cell::RefCell, collections::BTreeSet, rc::Rc, time::Duration};

use backtide_hydration::SourcePoint;
use backtide_protocol::{
    Blocks, CloseCode, Closed, CompareItem, Decoder, Message, OpenPoint, PROTOCOL_VERSION, PointOpened,
    Reading, encode,
};
use backtide_tracking::DirtyBitmap;
use backtide_units::{BlockIndex, BlockRange, ByteRange, DiskId, Epoch, HistoryId, LogPosition, Lsn};
use roaring::RoaringTreemap;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    sync::{Mutex, mpsc, oneshot},
};

use super::{
    FetchError, Fetching, Piece, PointSource,
    asking::{self, Answer, Asked, Question},
};
use crate::disk::{
    dial::{Dialer, Duplex},
    stream::StreamError,
};

/// How long connecting and opening the point may take.
const OPEN_TIME: Duration = Duration::from_secs(20);

/// Questions that wait for their turn; who asks more waits.
const WAITING_MAX: usize = 64;

/// The longest payload a receiver has reason to send: a piece, or a bitmap of blocks.
const PAYLOAD_MAX: u64 = 1 << 20;

/// As much of what a receiver says is shown.
const SHOWN_MAX: usize = 1024;

/// Which point is wanted: as much as is known of it.
struct Wanted {
    disk: DiskId,
    history: Option<HistoryId>,
    lsn: Option<Lsn>,
}

/// Opens streams to one point.
struct Way {
    dialer: Dialer,
    wanted: Wanted,
}

/// A point that is read over a stream.
struct RemotePoint {
    way: Way,
    point: SourcePoint,
    /// Where questions go, while there is a stream; locked while one is made.
    stream: Mutex<Option<mpsc::Sender<Asked>>>,
    /// Who needs the point kept: on each new stream that is asked for again, for meanwhile somebody may have released it.
    owners: RefCell<BTreeSet<String>>,
}

/// A point that is known; nobody is asked before something is wanted of it.
pub(crate) fn remote(point: SourcePoint, dialer: Dialer) -> Rc<dyn PointSource> {
    let wanted = Wanted { disk: point.disk, history: Some(point.history), lsn: Some(point.lsn) };
    let stream = Mutex::default();
    Rc::new(RemotePoint { way: Way { dialer, wanted }, point, stream, owners: RefCell::default() })
}

/// Finds a point of which the receiver knows more: by default of the disk's present history, the latest.
///
/// # Errors
/// See [`FetchError`].
pub(crate) async fn find_point(
    dialer: Dialer,
    disk: DiskId,
    history: Option<HistoryId>,
    lsn: Option<Lsn>,
) -> Result<Rc<dyn PointSource>, FetchError> {
    let mut way = Way { dialer, wanted: Wanted { disk, history, lsn } };
    let (opened, questions) = way.open().await?;
    let PointOpened { disk, name, size, lsn, time, history, version: _, latest: _ } = opened;
    // A latest point is that one from now on.
    way.wanted = Wanted { disk, history: Some(history), lsn: Some(lsn) };
    let receiver = way.dialer.address().to_string();
    let point = SourcePoint { receiver, disk, name, history, lsn, time, size };
    let stream = Mutex::new(Some(questions));
    Ok(Rc::new(RemotePoint { way, point, stream, owners: RefCell::default() }))
}

impl Way {
    /// A stream on which the point is open, and the task that works on it.
    async fn open(&self) -> Result<(PointOpened, mpsc::Sender<Asked>), FetchError> {
        let silent = || unreachable(&StreamError::Silent { address: self.dialer.address().clone() });
        let opened = tokio::time::timeout(OPEN_TIME, self.shake_hands()).await.map_err(|_| silent())?;
        let (opened, socket, decoder) = opened.map_err(|error| self.failure(error))?;
        let (questions, inbox) = mpsc::channel(WAITING_MAX);
        let (reader, writer) = tokio::io::split(socket);
        tokio::task::spawn_local(asking::work(reader, writer, decoder, inbox));
        Ok((opened, questions))
    }

    async fn shake_hands(&self) -> Result<(PointOpened, Box<dyn Duplex>, Decoder), StreamError> {
        let mut socket = self.dialer.connect().await?;
        let Wanted { disk, history, lsn } = &self.wanted;
        let open = OpenPoint {
            version: PROTOCOL_VERSION,
            disk: disk.to_string().parse().expect("a UUID is a good name"),
            history: *history,
            lsn: *lsn,
            reader: host(),
        };
        let (header, payload) = encode(1, &Message::Reading(Reading::Open(open)));
        socket.write_all(&header).await.map_err(StreamError::Lost)?;
        socket.write_all(&payload).await.map_err(StreamError::Lost)?;
        socket.flush().await.map_err(StreamError::Lost)?;
        let mut decoder = Decoder::limited(PAYLOAD_MAX);
        loop {
            if let Some(first) = decoder.next_message()? {
                return match first.message {
                    Message::Reading(Reading::Opened(opened)) => {
                        self.check(&opened)?;
                        Ok((opened, socket, decoder))
                    }
                    Message::Close(closed) => Err(StreamError::Closed(closed)),
                    other => Err(StreamError::Unexpected(format!(
                        "expected a point from the receiver, found {}",
                        other.name()
                    ))),
                };
            }
            match socket.read_buf(decoder.buffer()).await {
                Ok(0) => return Err(StreamError::Lost(asking::ended())),
                Ok(_) => {}
                Err(error) => return Err(StreamError::Lost(error)),
            }
        }
    }

    /// What was opened is what was asked for: anything else would be foreign bytes.
    fn check(&self, opened: &PointOpened) -> Result<(), StreamError> {
        let Wanted { disk, history, lsn } = &self.wanted;
        let same = opened.disk == *disk
            && history.is_none_or(|history| history == opened.history)
            && lsn.is_none_or(|lsn| lsn == opened.lsn);
        match same {
            true => Ok(()),
            false => Err(StreamError::Unexpected(format!(
                "asked for another point, the receiver opened LSN {} of disk {}",
                opened.lsn, opened.disk
            ))),
        }
    }

    fn failure(&self, error: StreamError) -> FetchError {
        match self.dialer.explained(error) {
            StreamError::Closed(Closed { code, message, .. }) => {
                let message = message.chars().take(SHOWN_MAX).collect();
                match code {
                    CloseCode::Refused | CloseCode::Denied | CloseCode::Version => {
                        FetchError::Refused(message)
                    }
                    CloseCode::Bye
                    | CloseCode::Fenced
                    | CloseCode::Invalid
                    | CloseCode::Store
                    | CloseCode::Busy => FetchError::Unreachable(message),
                }
            }
            other => unreachable(&other),
        }
    }
}

fn unreachable(error: &StreamError) -> FetchError {
    FetchError::Unreachable(error.to_string().chars().take(SHOWN_MAX).collect())
}

/// Who reads, for the receiver's people.
fn host() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let name: String = name.trim().chars().take(64).collect();
    format!("the agent on {}", if name.is_empty() { "a host" } else { &name })
}

impl RemotePoint {
    /// Asks, over a new stream when there is none or the old one turns out to be lost.
    async fn ask(&self, question: Question) -> Result<Answer, FetchError> {
        if let Some(questions) = self.known_stream().await
            && let Some(answer) = put(&questions, question.clone()).await
        {
            return answer;
        }
        let questions = self.new_stream().await?;
        put(&questions, question).await.unwrap_or_else(|| Err(lost()))
    }

    async fn known_stream(&self) -> Option<mpsc::Sender<Asked>> {
        self.stream.lock().await.clone()
    }

    /// One is made at a time, for all that need it.
    async fn new_stream(&self) -> Result<mpsc::Sender<Asked>, FetchError> {
        let mut stream = self.stream.lock().await;
        if let Some(questions) = stream.as_ref().filter(|questions| !questions.is_closed()) {
            return Ok(questions.clone());
        }
        *stream = None;
        let (opened, questions) = self.way.open().await?;
        if opened.size != self.point.size {
            let why =
                format!("the disk had {} bytes at that point, and {} now", self.point.size, opened.size);
            return Err(FetchError::Refused(why));
        }
        self.hold_again(&questions).await?;
        *stream = Some(questions.clone());
        Ok(questions)
    }

    /// Has the point kept again, before anything else is asked over a new stream.
    async fn hold_again(&self, questions: &mpsc::Sender<Asked>) -> Result<(), FetchError> {
        let owners = self.owners.borrow().clone();
        for owner in owners {
            match put(questions, Question::Hold(owner.clone())).await.unwrap_or_else(|| Err(lost())) {
                Ok(_) => {}
                Err(error @ FetchError::Unreachable(_)) => return Err(error),
                // This stream gives the point all the same.
                Err(FetchError::Damaged(why) | FetchError::Refused(why)) => {
                    tracing::warn!(owner, why, "the receiver does not keep a point that is needed");
                }
            }
        }
        Ok(())
    }

    async fn blocks(&self, which: Blocks) -> Result<DirtyBitmap, FetchError> {
        let size = self.point.size;
        match self.ask(Question::Blocks { which, size }).await? {
            Answer::Blocks(blocks) => Ok(bitmap(&blocks)),
            Answer::Pieces(_) | Answer::Differing(_) | Answer::Done => Err(mixed_up()),
        }
    }
}

/// What comes of a question; none when the stream is lost and it is worth to ask on another one.
async fn put(questions: &mpsc::Sender<Asked>, question: Question) -> Option<Result<Answer, FetchError>> {
    let (answer, answered) = oneshot::channel();
    questions.send(Asked { question, answer }).await.ok()?;
    answered.await.ok()
}

fn lost() -> FetchError {
    FetchError::Unreachable("the stream to the receiver was lost".to_owned())
}

fn mixed_up() -> FetchError {
    FetchError::Unreachable("the receiver answered something that was not asked".to_owned())
}

fn bitmap(blocks: &RoaringTreemap) -> DirtyBitmap {
    let mut bitmap = DirtyBitmap::new();
    for (high, part) in blocks.bitmaps() {
        let mut runs = part.iter();
        while let Some(run) = runs.next_range() {
            let whole = |low: u32| u64::from(high) << 32 | u64::from(low);
            let range =
                BlockRange::between(BlockIndex(whole(*run.start())), BlockIndex(whole(*run.end()) + 1));
            bitmap.insert(range);
        }
    }
    bitmap
}

impl PointSource for RemotePoint {
    fn point(&self) -> &SourcePoint {
        &self.point
    }

    fn fetch(&self, range: ByteRange) -> Fetching<'_, Vec<(ByteRange, Piece)>> {
        Box::pin(async move {
            match self.ask(Question::Fetch(range)).await? {
                Answer::Pieces(pieces) => Ok(pieces),
                Answer::Blocks(_) | Answer::Differing(_) | Answer::Done => Err(mixed_up()),
            }
        })
    }

    fn differing(&self, items: Vec<CompareItem>) -> Fetching<'_, Vec<u32>> {
        Box::pin(async move {
            match self.ask(Question::Compare(self.point.lsn, items)).await? {
                Answer::Differing(positions) => Ok(positions),
                Answer::Pieces(_) | Answer::Blocks(_) | Answer::Done => Err(mixed_up()),
            }
        })
    }

    fn changed(&self, since: Lsn) -> Fetching<'_, DirtyBitmap> {
        Box::pin(self.blocks(Blocks::Changed(since)))
    }

    fn after(&self, durable: Lsn, entries: LogPosition) -> Fetching<'_, DirtyBitmap> {
        Box::pin(self.blocks(Blocks::After { durable, entries }))
    }

    fn left(&self, epoch: Epoch, durable: Lsn, entries: LogPosition) -> Fetching<'_, DirtyBitmap> {
        Box::pin(self.blocks(Blocks::Left { epoch, durable, entries }))
    }

    fn damaged(&self, since: Option<Lsn>) -> Fetching<'_, DirtyBitmap> {
        Box::pin(self.blocks(Blocks::Damaged(since)))
    }

    fn data(&self) -> Fetching<'_, DirtyBitmap> {
        Box::pin(self.blocks(Blocks::Data))
    }

    fn data_in(&self, part: BlockRange) -> Fetching<'_, DirtyBitmap> {
        Box::pin(self.blocks(Blocks::DataIn(part)))
    }

    fn changed_in(&self, since: Lsn, part: BlockRange) -> Fetching<'_, DirtyBitmap> {
        Box::pin(self.blocks(Blocks::ChangedIn(since, part)))
    }

    fn hold(&self, owner: &str) -> Fetching<'_, ()> {
        let owner = owner.to_owned();
        Box::pin(async move {
            self.ask(Question::Hold(owner.clone())).await?;
            self.owners.borrow_mut().insert(owner);
            Ok(())
        })
    }

    fn release(&self, owner: &str) -> Fetching<'_, ()> {
        let owner = owner.to_owned();
        Box::pin(async move {
            self.owners.borrow_mut().remove(&owner);
            self.ask(Question::Release(owner)).await.map(drop)
        })
    }
}

#[cfg(test)]
mod tests;
