//! How much of the log stays in the page cache because it was written: the newest stretch, and no more.
//!
//! A log grows for as long as its disk is written, at the speed of the device during a resync, and hardly any of it is
//! read soon. Left in the page cache it would push out what guests and readers have there, and each new page has to be
//! found by the system first: in a virtual machine whose host has taken back what is not used, that costs more than
//! everything else which is done with the bytes. Let go of as it becomes durable, the same few pages take in all
//! that comes. What is read later is cached as any file is.
//!
//! Invariant: only advice about durable bytes; it is taken along by the ticket that makes them durable.

use std::{collections::VecDeque, sync::Arc};

use backtide_storage::StorageFile;
use backtide_units::{ByteCount, ByteOffset, ByteRange};

/// As much of a log stays: what a reader of the newest points wants, and some commits of a fast stream.
const KEPT: ByteCount = ByteCount(16 << 20);

/// Less is not worth a call.
const STEP_MIN: ByteCount = ByteCount(1 << 20);

/// The page cache keeps what was written at once in one piece of up to this size, and lets go of whole pieces only.
/// So advice begins this much before what is new in it.
const PIECE_MAX: u64 = 2 << 20;

/// What was appended and not let go of, in the order of the log.
#[derive(Default)]
pub(crate) struct Resident(VecDeque<Stretch>);

/// A part of one segment file.
struct Stretch {
    file: Arc<dyn StorageFile>,
    range: ByteRange,
}

/// What the page cache need not keep once a ticket has succeeded.
pub(crate) struct LetGo(Stretch);

impl Resident {
    /// Entries of `file`, the newest segment, reach to `end` now.
    pub(crate) fn grew(&mut self, file: Arc<dyn StorageFile>, end: ByteOffset) {
        match self.0.back_mut() {
            Some(newest) if Arc::ptr_eq(&newest.file, &file) => {
                newest.range = ByteRange::between(newest.range.start(), end);
            }
            Some(_) | None => {
                self.0.push_back(Stretch { file, range: ByteRange::between(ByteOffset(0), end) });
            }
        }
    }

    /// All but the newest, for the ticket that covers everything.
    pub(crate) fn take(&mut self) -> Vec<LetGo> {
        let resident: u64 = self.0.iter().map(|stretch| stretch.range.count().0).sum();
        let mut surplus = resident.saturating_sub(KEPT.0);
        let mut gone = Vec::new();
        while surplus >= STEP_MIN.0
            && let Some(oldest) = self.0.front_mut()
        {
            let (start, count) = (oldest.range.start(), oldest.range.count().0.min(surplus));
            let cut = ByteOffset(start.0 + count);
            let advised = ByteRange::between(ByteOffset(start.0.saturating_sub(PIECE_MAX)), cut);
            gone.push(LetGo(Stretch { file: Arc::clone(&oldest.file), range: advised }));
            oldest.range = ByteRange::between(cut, oldest.range.end());
            surplus -= count;
            if oldest.range.is_empty() {
                self.0.pop_front();
            }
        }
        gone
    }
}

impl LetGo {
    /// The bytes are durable.
    pub(crate) fn advise(&self) {
        self.0.file.let_go(self.0.range);
    }
}
