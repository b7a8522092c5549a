//! The receiver asks what the disk has somewhere: what is damaged there may be here.
//!
//! It takes what it gets only when that has the checksum it wants. So a read needs no turn at the guard, holds up no change,
//! and what a change overwrites meanwhile is no harm. Bounded: so many questions at once, each about little; a read whose asker is
//! gone counts until it ends, else streams that come and go would pile up reads of storage that stands still.

use backtide_protocol::{Data, FailureCode, Message, ReadFailure, Reading};
use backtide_units::{BlockRange, ByteCount, ByteRange, is_zeroes};
use bytes::Bytes;

use crate::{
    capture::Ongoing,
    event::{Effect, IoFailure, LocalData, LocalOp},
    filter::Filter,
};

/// Questions of the receiver that are not answered yet, and reads for them.
const RECALLS_MAX: usize = 4;

/// Bytes of one.
const RECALL_BYTES_MAX: ByteCount = ByteCount(64 << 10);

/// A question that is being answered.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Recall {
    id: u64,
    range: ByteRange,
    /// Whether the stream is still there on which it was asked.
    asker: bool,
}

impl Filter {
    pub(crate) fn asked_for(&mut self, id: u64, range: ByteRange) {
        let reads = self.ongoing.values().filter(|ongoing| matches!(ongoing, Ongoing::Recall(_))).count();
        let is_asked = |ongoing: &&Ongoing| matches!(ongoing, Ongoing::Recall(Recall { asker: true, .. }));
        let asked = self.ongoing.values().filter(is_asked).count();
        if asked + self.recalled.len() >= RECALLS_MAX || range.count() > RECALL_BYTES_MAX {
            return self.refuse(format!(
                "the receiver asks for more than {RECALLS_MAX} ranges of {RECALL_BYTES_MAX} bytes at once"
            ));
        }
        if reads >= RECALLS_MAX {
            // Not this stream's fault.
            let why = "the disk still reads what was asked on an earlier stream";
            return self.fail_recall(id, why.to_owned());
        }
        if range.end().0 > self.settings.size.0 {
            return self.fail_recall(id, format!("the disk has {} bytes", self.settings.size));
        }
        let io = self.take_io_id();
        self.ongoing.insert(io, Ongoing::Recall(Recall { id, range, asker: true }));
        let read = LocalOp::Read(BlockRange::touched_by(range).bytes(self.settings.size));
        self.effects.push_back(Effect::Local(io, read));
    }

    pub(crate) fn recall_done(&mut self, recall: Recall, result: Result<LocalData, IoFailure>) {
        let Recall { id, range, asker } = recall;
        if !asker {
            return;
        }
        let bytes = match result {
            Ok(read) => read.read(),
            Err(failure) => return self.fail_recall(id, failure.to_string()),
        };
        let read = BlockRange::touched_by(range).bytes(self.settings.size);
        let from = usize::try_from(range.start().0 - read.start().0).expect("less than a block");
        let bytes = &bytes[from..from + range.count().as_usize().expect("a small range")];
        let data = if is_zeroes(bytes) { Bytes::new() } else { Bytes::copy_from_slice(bytes) };
        let piece = Reading::Piece { id, range, data: Data::capture(data) };
        self.recalled.push_back(Message::Reading(piece));
    }

    fn fail_recall(&mut self, id: u64, message: String) {
        let failure = ReadFailure { code: FailureCode::Failed, message };
        self.recalled.push_back(Message::Reading(Reading::Failed { id, failure }));
    }

    /// Who asked is gone.
    pub(crate) fn forget_recalls(&mut self) {
        self.recalled.clear();
        for ongoing in self.ongoing.values_mut() {
            if let Ongoing::Recall(recall) = ongoing {
                recall.asker = false;
            }
        }
    }
}
