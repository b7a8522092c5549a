//! The task of one stream that reads a point: sends questions, puts answers together from their parts.
//!
//! Invariants: no more questions are out than the receiver takes, so that neither side waits for the other to
//! read; an answer that does not fit its question ends the stream; whoever asked and has no answer when the stream
//! ends is told by its end.

use std::{collections::BTreeMap, io, time::Duration};

use backtide_protocol::{
    Blocks, Compare, CompareItem, CompareResult, Decoder, FailureCode, Message, ReadFailure, Reading,
    collect_part, encode,
};
use backtide_units::{ByteCount, ByteOffset, ByteRange, Lsn};
use roaring::RoaringTreemap;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    sync::{mpsc, oneshot},
    time::Instant,
};

use super::{FetchError, Piece};

/// Questions that are out at once: as many as a receiver takes.
const OUT_MAX: usize = 16;

/// A receiver that owes answers and is silent for this long is given up.
const SILENCE_MAX: Duration = Duration::from_secs(30);

/// What is wanted of the point.
#[derive(Clone, Debug)]
pub(super) enum Question {
    Fetch(ByteRange),
    /// At this point.
    Compare(Lsn, Vec<CompareItem>),
    Blocks {
        which: Blocks,
        size: ByteCount,
    },
    Hold(String),
    Release(String),
}

/// A question and where its answer goes.
pub(super) struct Asked {
    pub(super) question: Question,
    pub(super) answer: oneshot::Sender<Result<Answer, FetchError>>,
}

/// What came of a question.
#[derive(Debug)]
pub(super) enum Answer {
    Pieces(Vec<(ByteRange, Piece)>),
    Blocks(RoaringTreemap),
    /// Positions of what was compared.
    Differing(Vec<u32>),
    Done,
}

/// A question that is out, with what came of it so far.
struct Out {
    asked: Asked,
    /// Of a fetch: how far the pieces have come.
    at: ByteOffset,
    pieces: Vec<(ByteRange, Piece)>,
    blocks: RoaringTreemap,
}

/// Works on one stream until it is lost, or nobody can ask any more.
pub(super) async fn work(
    mut reader: impl AsyncRead + Unpin,
    mut writer: impl AsyncWrite + Unpin,
    mut decoder: Decoder,
    mut inbox: mpsc::Receiver<Asked>,
) {
    let mut out: BTreeMap<u64, Out> = BTreeMap::new();
    let (mut next_id, mut sent, mut heard) = (1, 1, Instant::now());
    let lost = loop {
        match take_all(&mut decoder, &mut out) {
            Ok(()) => {}
            Err(why) => break why,
        }
        let owed = !out.is_empty();
        tokio::select! {
            asked = inbox.recv(), if out.len() < OUT_MAX => {
                // Nobody can ask any more; those who did have gone too.
                let Some(asked) = asked else { return };
                if asked.answer.is_closed() {
                    continue;
                }
                let message = asked.question.message(next_id);
                if !owed {
                    heard = Instant::now();
                }
                out.insert(next_id, Out::new(asked));
                (next_id, sent) = (next_id + 1, sent + 1);
                if let Err(error) = send(&mut writer, sent, &message).await {
                    break error.to_string();
                }
            }
            read = reader.read_buf(decoder.buffer()) => match read {
                Ok(0) => break ended().to_string(),
                Ok(_) => heard = Instant::now(),
                Err(error) => break error.to_string(),
            },
            () = tokio::time::sleep_until(heard + SILENCE_MAX), if owed => {
                break format!("the receiver has not answered for {} s", SILENCE_MAX.as_secs());
            }
        }
    };
    tracing::debug!(why = lost, questions = out.len(), "a stream that reads a point was lost");
    for (_, out) in out {
        let why = format!("the stream to the receiver was lost: {lost}");
        // Whoever asked may have gone.
        let _ = out.asked.answer.send(Err(FetchError::Unreachable(why)));
    }
}

/// The receiver closed without a word.
pub(super) fn ended() -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, "the receiver closed the connection")
}

async fn send(writer: &mut (impl AsyncWrite + Unpin), seq: u64, message: &Message) -> io::Result<()> {
    let (header, payload) = encode(seq, message);
    let written = async {
        writer.write_all(&header).await?;
        writer.write_all(&payload).await?;
        writer.flush().await
    };
    // A receiver that takes no questions is as good as one that gives no answers.
    let late = |_| io::Error::from(io::ErrorKind::TimedOut);
    tokio::time::timeout(SILENCE_MAX, written).await.map_err(late)?
}

/// Takes what has wholly arrived; what ends the stream is an error.
fn take_all(decoder: &mut Decoder, out: &mut BTreeMap<u64, Out>) -> Result<(), String> {
    while let Some(message) = decoder.next_message().map_err(|error| error.to_string())? {
        match message.message {
            Message::Reading(reading) => take(reading, out)?,
            Message::CompareResult(result) => take_compared(result, out)?,
            Message::Ping(_) => {}
            Message::Close(closed) => return Err(closed.message),
            Message::Hello(_)
            | Message::Welcome(_)
            | Message::Record(_)
            | Message::Flush { .. }
            | Message::Unchanged { .. }
            | Message::PassBegin { .. }
            | Message::PassData { .. }
            | Message::PassEnd { .. }
            | Message::Mark { .. }
            | Message::Compare(_)
            | Message::Ack { .. }
            | Message::Hasten { .. } => return Err(strange(message.message.name())),
        }
    }
    Ok(())
}

fn take(reading: Reading, out: &mut BTreeMap<u64, Out>) -> Result<(), String> {
    let name = reading.name();
    match reading {
        Reading::Piece { id, range, data } => {
            let piece = match data.bytes().is_empty() {
                true => Piece::Zeroes,
                false => Piece::Data(data.bytes().clone()),
            };
            out.get_mut(&id).ok_or_else(|| strange(name))?.add(range, piece)
        }
        Reading::Blocks { id, first, blocks } => {
            let out = out.get_mut(&id).ok_or_else(|| strange(name))?;
            let Question::Blocks { size, .. } = out.asked.question else { return Err(strange(name)) };
            collect_part(&mut out.blocks, first, &blocks, size);
            Ok(())
        }
        Reading::Answered { id } => out.remove(&id).ok_or_else(|| strange(name))?.finish(),
        Reading::Failed { id, failure } => {
            let out = out.remove(&id).ok_or_else(|| strange(name))?;
            // Whoever asked may have gone.
            let _ = out.asked.answer.send(Err(error_of(failure)));
            Ok(())
        }
        Reading::Open(_)
        | Reading::Opened(_)
        | Reading::Fetch { .. }
        | Reading::AskBlocks { .. }
        | Reading::Hold { .. }
        | Reading::Release { .. } => Err(strange(name)),
    }
}

fn take_compared(result: CompareResult, out: &mut BTreeMap<u64, Out>) -> Result<(), String> {
    let strange = || strange("compare-result");
    let Out { asked, .. } = out.remove(&result.id).ok_or_else(strange)?;
    let Question::Compare(_, items) = &asked.question else { return Err(strange()) };
    if result.differing.iter().any(|position| *position as usize >= items.len()) {
        return Err(strange());
    }
    // Whoever asked may have gone.
    let _ = asked.answer.send(Ok(Answer::Differing(result.differing)));
    Ok(())
}

fn error_of(failure: ReadFailure) -> FetchError {
    match failure.code {
        FailureCode::Damaged => FetchError::Damaged(failure.message),
        FailureCode::Gone | FailureCode::Invalid | FailureCode::Refused => {
            FetchError::Refused(failure.message)
        }
        FailureCode::Failed => FetchError::Unreachable(failure.message),
    }
}

fn strange(name: &str) -> String {
    format!("the receiver sent a {name} that does not belong to any question")
}

impl Question {
    fn message(&self, id: u64) -> Message {
        Message::Reading(match self {
            Self::Compare(at, items) => {
                return Message::Compare(Compare { id, at: *at, items: items.clone() });
            }
            Self::Fetch(range) => Reading::Fetch { id, range: *range },
            Self::Blocks { which, .. } => Reading::AskBlocks { id, which: *which },
            Self::Hold(owner) => Reading::Hold { id, owner: owner.clone() },
            Self::Release(owner) => Reading::Release { id, owner: owner.clone() },
        })
    }
}

impl Out {
    fn new(asked: Asked) -> Self {
        let at = match &asked.question {
            Question::Fetch(range) => range.start(),
            Question::Compare(..) | Question::Blocks { .. } | Question::Hold(_) | Question::Release(_) => {
                ByteOffset::ZERO
            }
        };
        Self { asked, at, pieces: Vec::new(), blocks: RoaringTreemap::new() }
    }

    /// Pieces follow one another from the beginning of what was asked for on.
    fn add(&mut self, range: ByteRange, piece: Piece) -> Result<(), String> {
        match &self.asked.question {
            Question::Fetch(asked) if range.start() == self.at && range.end() <= asked.end() => {
                self.at = range.end();
                self.pieces.push((range, piece));
                Ok(())
            }
            Question::Fetch(_)
            | Question::Compare(..)
            | Question::Blocks { .. }
            | Question::Hold(_)
            | Question::Release(_) => Err(strange("piece")),
        }
    }

    fn finish(self) -> Result<(), String> {
        let answer = match &self.asked.question {
            Question::Fetch(range) if self.at != range.end() => {
                let why = format!("the receiver gave bytes up to {} of {range}", self.at);
                let _ = self.asked.answer.send(Err(FetchError::Unreachable(why.clone())));
                return Err(why);
            }
            Question::Compare(..) => return Err(strange("answered")),
            Question::Fetch(_) => Answer::Pieces(self.pieces),
            Question::Blocks { .. } => Answer::Blocks(self.blocks),
            Question::Hold(_) | Question::Release(_) => Answer::Done,
        };
        // Whoever asked may have gone.
        let _ = self.asked.answer.send(Ok(answer));
        Ok(())
    }
}
