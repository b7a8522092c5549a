//! The disk itself, as a place where what is damaged may be whole.

use std::{
    cell::Cell,
    sync::{
        Arc,
        mpsc::{RecvTimeoutError, sync_channel},
    },
    time::{Duration, Instant},
};

use backtide_units::{ByteRange, DiskId};
use bytes::Bytes;
use tokio::sync::mpsc;

use super::Shared;
use crate::{
    asking::ASKED_BYTES_MAX,
    ingest::{AskDisk, Task},
};

/// An agent that has not answered after this is not asked again by this scrub of its disk.
const ANSWER_MAX: Duration = Duration::from_secs(10);

/// It looks so often whether the scrub is called off meanwhile.
const LOOK: Duration = Duration::from_millis(100);

/// A disk whose agent may be asked what it has.
pub(super) struct AttachedDisk {
    shared: Arc<Shared>,
    owner: mpsc::Sender<Task>,
    disk: DiskId,
    silent: Cell<bool>,
}

impl AttachedDisk {
    pub(super) fn new(shared: Arc<Shared>, owner: mpsc::Sender<Task>, disk: DiskId) -> Self {
        Self { shared, owner, disk, silent: Cell::new(false) }
    }

    /// What the disk has in a range now; none when nobody tells. Blocks.
    pub(super) fn read(&self, range: ByteRange) -> Option<Bytes> {
        if self.silent.get() || range.count() > ASKED_BYTES_MAX {
            return None;
        }
        let (answer, answered) = sync_channel(1);
        let question = AskDisk { disk: self.disk, range, answer };
        self.owner.blocking_send(Task::AskDisk(question)).ok()?;
        let asked = Instant::now();
        while !self.shared.is_unwanted() && asked.elapsed() < ANSWER_MAX {
            match answered.recv_timeout(LOOK) {
                Ok(bytes) => return Some(bytes),
                Err(RecvTimeoutError::Disconnected) => return None,
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
        self.silent.set(true);
        None
    }
}
