//! What a connection has asked its agent: bytes that are damaged here, and may be whole on the disk.

use std::{collections::BTreeMap, sync::mpsc::SyncSender};

use backtide_protocol::{Data, Message, Reading};
use backtide_units::{ByteCount, ByteRange};
use bytes::Bytes;

use crate::ingest::AskDisk;

/// Questions that an agent takes at once.
const QUESTIONS_MAX: usize = 4;

/// Bytes that it takes one about.
pub(crate) const ASKED_BYTES_MAX: ByteCount = ByteCount(64 << 10);

/// What an agent's disk has where it was asked: it counts only when it is what was looked for.
pub struct Recalled {
    id: u64,
    /// None when the agent could not read it.
    found: Option<(ByteRange, Data)>,
}

impl Recalled {
    /// The answer in a message of the agent; none when it has none.
    pub(crate) fn of(reading: Reading) -> Option<Self> {
        match reading {
            Reading::Piece { id, range, data } => Some(Self { id, found: Some((range, data)) }),
            Reading::Failed { id, .. } => Some(Self { id, found: None }),
            Reading::Open(_)
            | Reading::Opened(_)
            | Reading::Fetch { .. }
            | Reading::AskBlocks { .. }
            | Reading::Blocks { .. }
            | Reading::Hold { .. }
            | Reading::Release { .. }
            | Reading::Answered { .. } => None,
        }
    }

    /// The question's id.
    pub fn id(&self) -> u64 {
        self.id
    }
}

/// Questions of one connection without an answer. Dropped, they have none.
#[derive(Default)]
pub(crate) struct Asking {
    /// Nothing comes before the welcome.
    pub(crate) may_ask: bool,
    last: u64,
    open: BTreeMap<u64, (ByteRange, SyncSender<Bytes>)>,
}

impl Asking {
    /// The message that asks, if the agent takes it.
    pub(crate) fn ask(&mut self, question: AskDisk) -> Option<Message> {
        let AskDisk { range, answer, .. } = question;
        if !self.may_ask
            || self.open.len() >= QUESTIONS_MAX
            || range.is_empty()
            || range.count() > ASKED_BYTES_MAX
        {
            return None;
        }
        self.last += 1;
        self.open.insert(self.last, (range, answer));
        Some(Message::Reading(Reading::Fetch { id: self.last, range }))
    }

    /// An answer has come. One to something else than was asked is none.
    pub(crate) fn answered(&mut self, recalled: Recalled) {
        let Some((asked, answer)) = self.open.remove(&recalled.id) else { return };
        let Some((range, data)) = recalled.found.filter(|(range, _)| *range == asked) else { return };
        let bytes = match data.bytes() {
            zeroes if zeroes.is_empty() => vec![0; range.count().as_usize().expect("it is limited")].into(),
            bytes => bytes.clone(),
        };
        // Who asked may have given up.
        let _ = answer.try_send(bytes);
    }
}
