//! The spill's directory: the production files, in memory, and what a crash or a failure may leave of an operation
//! under way. A torn frame, of files being removed only the first: that and no more is told apart here, bytes are the
//! business of `tests/sim`.

use std::{
    fmt,
    hash::{Hash, Hasher},
    sync::Arc,
};

use backtide_io_filter::{IoId, SpillDone, SpillOp};
use backtide_protocol::Message;
use backtide_spill::{Recovered, RingLimits, SpillFiles};
use backtide_storage::MemoryStorage;
use backtide_units::{BlockRange, ByteCount, Lsn};

use crate::{actions::Part, agent::DISK, config::Config, content::disk_size, world::World};

/// See the module's description. A copy has files of its own.
#[derive(Default)]
pub(crate) struct SpillDirectory {
    storage: MemoryStorage,
}

impl Clone for SpillDirectory {
    fn clone(&self) -> Self {
        Self { storage: self.storage.copy() }
    }
}

impl fmt::Debug for SpillDirectory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.storage.files().into_iter().map(|(path, _)| path)).finish()
    }
}

impl Hash for SpillDirectory {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.storage.files().hash(state);
    }
}

impl SpillDirectory {
    fn files(&self, config: &Config) -> SpillFiles {
        SpillFiles::new(Arc::new(self.storage.clone()), DISK, ByteCount(config.spill_bytes))
    }

    fn recover(&self, config: &Config) -> Recovered {
        let end = BlockRange::whole_disk(disk_size(config.blocks)).end();
        let bytes = ByteCount(config.spill_bytes);
        let limits = RingLimits::new(bytes, ByteCount(config.window_bytes), ByteCount(1 << 20), end);
        self.files(config).recover(limits).expect("the directory can be listed")
    }

    /// Does so much of a write or a removal.
    fn change(&self, config: &Config, op: &SpillOp, part: Part) {
        let files = self.files(config);
        match (op, part) {
            (_, Part::Nothing) | (SpillOp::Read(_), _) => {}
            (SpillOp::Append(slot, messages), Part::Some) => {
                self.storage.fail_write_after(0);
                files.append(slot, messages).expect_err("it was told to fail");
            }
            (SpillOp::Append(slot, messages), Part::All) => {
                files.append(slot, messages).expect("nothing fails of itself");
            }
            (SpillOp::Remove(numbers), part) => {
                let count = if part == Part::Some { 1 } else { numbers.len() };
                files.remove(&numbers[..count]).expect("nothing fails of itself");
            }
        }
    }

    /// What a read brings; none for what is no read.
    fn read(&self, config: &Config, op: &SpillOp) -> Option<Vec<Message>> {
        let SpillOp::Read(place) = op else { return None };
        let back = self.files(config).read(place);
        assert!(back.failure.is_none(), "what was written can be read: {:?}", back.failure);
        Some(back.messages)
    }
}

impl World {
    /// Gives the new filter the spill, and what the last one left there.
    pub(crate) fn use_spill(&mut self, config: &Config) {
        if config.spill_bytes == 0 {
            return;
        }
        let recovered = self.spill.recover(config);
        assert!(
            recovered.ring.end() >= self.kept_to || recovered.ring.is_empty(),
            "LSN {} was in the spill",
            self.kept_to
        );
        self.filter.use_spill(recovered);
    }

    pub(crate) fn spill_ends(&mut self, config: &Config, io: IoId) {
        let op = self.spill_ops.remove(&io).expect("it is under way");
        self.spill.change(config, &op, Part::All);
        let read = self.spill.read(config, &op);
        let done = read.map_or(SpillDone::Durable, |messages| SpillDone::Read(messages, None));
        self.call(config, |filter, now| filter.spill_done(now, io, done));
        self.note_kept(&op);
    }

    /// It fails, and has done so much of what it was to do.
    pub(crate) fn spill_fails(&mut self, config: &Config, io: IoId, part: Part) {
        const WHY: &str = "the spill's device has failed";
        let op = self.spill_ops.remove(&io).expect("it is under way");
        self.spill_failed = true;
        self.spill.change(config, &op, part);
        let done = match self.spill.read(config, &op) {
            None => SpillDone::Failed(WHY.to_owned()),
            Some(mut messages) => {
                messages.truncate(if part == Part::Nothing { 0 } else { messages.len() / 2 });
                SpillDone::Read(messages, Some(WHY.to_owned()))
            }
        };
        self.call(config, |filter, now| filter.spill_done(now, io, done));
    }

    /// What a crash leaves of the operations under way.
    pub(crate) fn crash_spill(&mut self, config: &Config, part: Part) {
        for op in std::mem::take(&mut self.spill_ops).into_values() {
            self.spill.change(config, &op, part);
        }
    }

    /// Whether something is being written or removed.
    pub(crate) fn changes_spill(&self) -> bool {
        self.spill_ops.values().any(|op| !matches!(op, SpillOp::Read(_)))
    }

    /// Records that are durable in the spill are in the timeline in the end.
    fn note_kept(&mut self, op: &SpillOp) {
        let SpillOp::Append(_, messages) = op else { return };
        let last = messages.iter().rev().find_map(|message| match message {
            Message::Record(record) => Some(record.lsn),
            _ => None,
        });
        if self.filter.holds_spill() {
            self.kept_to = self.kept_to.max(last.unwrap_or(Lsn::ZERO));
        }
    }
}
