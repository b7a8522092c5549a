//! A disk behind that lacks blocks: what is missing is fetched from a point at the receiver, when it is touched
//! and in the background.
//!
//! It stands between the engine and the image. What touches nothing missing goes straight through; the rest
//! waits until its blocks are there, or overwrites them. The rules are [`Missing`]'s, what outlives the
//! agent is in the [`HydrationFile`].
//!
//! Invariants: the order of `io-filter/hydration/FORMAT.md` - image, journal, answer; and image synced, journal
//! synced, flush answered. Behind an NBD server, which may end with this agent and take with it what it was not told to
//! flush, the image is flushed before the journal says anything: what is present there is stable. When
//! [`stop`](HydratingDisk::stop) has returned nothing of this writes the image.

mod fetch;
mod pieces;
mod status;

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    path::PathBuf,
    rc::Rc,
    sync::Arc,
};

use backtide_export::Extent;
use backtide_hydration::{ChangeId, HydrationFile, Missing, Need};
use backtide_io_filter::{Change, IoFailure, LocalData, LocalOp};
use backtide_tracking::DirtyBitmap;
use backtide_units::{BlockCount, BlockRange, ByteRange, DiskName};
use rustix::io::Errno;
use tokio::sync::Notify;

use super::{
    image_disk::blocking,
    local::{Began, EIO, Purpose, failure},
    medium::Medium,
    source::PointSource,
};
pub(crate) use fetch::{owner, rewinding};
use status::Progress;

/// What is answered when the disk is given up while something waits for the receiver.
const ESHUTDOWN: i32 = Errno::SHUTDOWN.raw_os_error();

/// An image some of whose blocks are still at the receiver.
pub(crate) struct HydratingDisk {
    name: DiskName,
    medium: Medium,
    /// The file beside which a note says that it lacks blocks; none where there can be no note.
    noted: Option<PathBuf>,
    file: Arc<HydrationFile>,
    source: Rc<dyn PointSource>,
    missing: RefCell<Missing>,
    /// Something has ended: whoever waits looks again.
    changed: Notify,
    /// Nothing is missing any more, and no file says so: the image is the disk.
    complete: Cell<bool>,
    /// The disk is given up.
    stopped: Cell<bool>,
    /// Requests that wait for a fetch.
    waiting: Cell<u64>,
    /// What writes the image or the hydration file now, beside the changes of guests.
    storing: Cell<usize>,
    /// Bytes a second that are fetched without being asked for; 0: no limit.
    rate_max: Cell<u64>,
    /// What could not be stored lately, with a number that counts up.
    failures: RefCell<VecDeque<(u64, BlockRange, IoFailure)>>,
    failure_count: Cell<u64>,
    /// Blocks that were written, and it is not sure that they are stable: what can be read of them may be lost when the
    /// server ends. So they are never compared with what they are to be: they are written again.
    doubted: RefCell<DirtyBitmap>,
    /// What keeps blocks from being fetched.
    trouble: RefCell<Option<String>>,
    /// It is that the receiver does not give the point.
    refused: Cell<bool>,
    progress: RefCell<Progress>,
}

/// As many failures are remembered for those who wait.
const FAILURES_MAX: usize = 64;

impl HydratingDisk {
    pub(crate) fn new(
        name: DiskName,
        medium: Medium,
        noted: Option<PathBuf>,
        file: HydrationFile,
        source: Rc<dyn PointSource>,
    ) -> Rc<Self> {
        let missing = Missing::new(medium.size(), file.missing());
        let progress = Progress::new(missing.blocks().count());
        Rc::new(Self {
            name,
            medium,
            noted,
            file: Arc::new(file),
            source,
            missing: RefCell::new(missing),
            changed: Notify::new(),
            complete: Cell::new(false),
            stopped: Cell::new(false),
            waiting: Cell::new(0),
            storing: Cell::new(0),
            rate_max: Cell::new(0),
            failures: RefCell::default(),
            failure_count: Cell::new(0),
            doubted: RefCell::default(),
            trouble: RefCell::default(),
            refused: Cell::new(false),
            progress: RefCell::new(progress),
        })
    }

    pub(crate) fn medium(&self) -> &Medium {
        &self.medium
    }

    /// Does what needs nothing that is missing, as far as that goes at once.
    pub(crate) fn begin(&self, op: LocalOp, purpose: Purpose) -> Began {
        match self.goes_through(&op) {
            true => self.medium.begin(op, purpose),
            false => Began::Later(op, purpose),
        }
    }

    /// What is stable is so by the hydration file too, as long as there is one.
    fn goes_through(&self, op: &LocalOp) -> bool {
        if self.complete.get() {
            return true;
        }
        match op {
            LocalOp::Read(range) => !self.missing.borrow().touches(*range),
            LocalOp::Change(Change::Write { range, fua, .. } | Change::Zero { range, fua, .. }) => {
                !fua && !self.missing.borrow().touches(*range)
            }
            LocalOp::Change(Change::Flush) | LocalOp::Settle => false,
        }
    }

    /// Does it, waiting as long as it takes.
    pub(crate) async fn run(self: &Rc<Self>, op: LocalOp) -> Result<LocalData, IoFailure> {
        if self.goes_through(&op) {
            return self.medium.run(op).await;
        }
        match op {
            LocalOp::Read(range) => {
                self.until_ready(range, |missing| missing.before_read(range).map_or(Ok(()), Err)).await?;
                self.medium.run(LocalOp::Read(range)).await
            }
            LocalOp::Change(Change::Write { range, data, fua }) => {
                let change = Change::Write { range, data, fua: false };
                self.change(range, change, fua).await
            }
            LocalOp::Change(Change::Zero { range, trim, fua }) => {
                self.change(range, Change::Zero { range, trim, fua: false }, fua).await
            }
            LocalOp::Change(Change::Flush) | LocalOp::Settle => self.flush().await,
        }
    }

    async fn change(
        self: &Rc<Self>,
        range: ByteRange,
        change: Change,
        fua: bool,
    ) -> Result<LocalData, IoFailure> {
        let id = self.until_ready(range, |missing| missing.begin_change(range)).await?;
        let changed = match self.overwrite(id, change).await {
            Ok(()) => self.note_change(id).await,
            Err(failure) => Err(failure),
        };
        let before = self.missing.borrow().blocks().count();
        self.missing.borrow_mut().end_change(id, changed.is_ok());
        if changed.is_err() {
            self.doubted.borrow_mut().insert(BlockRange::touched_by(range));
        }
        self.has_brought(before, BlockCount(0));
        self.changed.notify_waiters();
        changed?;
        match fua {
            true => self.flush().await,
            false => Ok(LocalData::Changed),
        }
    }

    async fn overwrite(&self, id: ChangeId, change: Change) -> Result<(), IoFailure> {
        let nothing_missing = self.missing.borrow().overwritten(id).is_empty();
        match &self.medium {
            Medium::Nbd(disk) if !nothing_missing => disk.change_stably([change]).await,
            medium @ (Medium::Image(_) | Medium::Nbd(_)) => {
                medium.run(LocalOp::Change(change)).await.map(drop)
            }
        }
    }

    async fn note_change(&self, id: ChangeId) -> Result<(), IoFailure> {
        let blocks = self.missing.borrow().overwritten(id).to_vec();
        if blocks.is_empty() {
            return Ok(());
        }
        let file = Arc::clone(&self.file);
        blocking(move || file.present(&blocks)).await.map_err(failure)
    }

    async fn flush(&self) -> Result<LocalData, IoFailure> {
        self.storing.set(self.storing.get() + 1);
        let settled = self.settle().await;
        self.storing.set(self.storing.get() - 1);
        if self.stopped.get() {
            self.changed.notify_waiters();
        }
        settled.map(|()| LocalData::Changed)
    }

    async fn settle(&self) -> Result<(), IoFailure> {
        let file = Arc::clone(&self.file);
        match &self.medium {
            Medium::Image(image) => {
                let image = Arc::clone(image.image());
                blocking(move || file.settle(|| image.sync())).await.map_err(failure)
            }
            Medium::Nbd(disk) => {
                disk.run(LocalOp::Change(Change::Flush)).await?;
                // Whatever the journal calls present was flushed before.
                blocking(move || file.settle(|| Ok(()))).await.map_err(failure)
            }
        }
    }

    /// Has fetched what is needed until `ready` says that nothing is.
    async fn until_ready<T>(
        self: &Rc<Self>,
        range: ByteRange,
        ready: impl Fn(&mut Missing) -> Result<T, Need>,
    ) -> Result<T, IoFailure> {
        let first = self.failure_count.get();
        loop {
            // Before the look, so that nothing is missed after it.
            let changed = self.changed.notified();
            let need = match ready(&mut self.missing.borrow_mut()) {
                Ok(ready) => return Ok(ready),
                Err(need) => need,
            };
            if self.stopped.get() {
                return Err(IoFailure { errno: ESHUTDOWN });
            }
            if let Some(failure) = self.failure_since(first, range) {
                return Err(failure);
            }
            match need {
                Need::Damaged(_) => return Err(IoFailure { errno: EIO }),
                Need::Wait(fetch) => fetch.into_iter().for_each(|blocks| self.start_fetch(blocks)),
            }
            self.waiting.set(self.waiting.get() + 1);
            changed.await;
            self.waiting.set(self.waiting.get() - 1);
        }
    }

    fn failure_since(&self, first: u64, range: ByteRange) -> Option<IoFailure> {
        let touched = BlockRange::touched_by(range);
        let failures = self.failures.borrow();
        let mut later =
            failures.iter().filter(|(number, blocks, _)| *number >= first && blocks.overlaps(touched));
        later.next().map(|(_, _, failure)| *failure)
    }

    /// Ends everything that waits for the receiver, with an error, and waits for what writes the image.
    pub(crate) async fn stop(&self) {
        self.stopped.set(true);
        self.changed.notify_waiters();
        loop {
            let changed = self.changed.notified();
            if self.storing.get() == 0 {
                return;
            }
            changed.await;
        }
    }

    /// Missing blocks are data, whatever the image has there.
    pub(crate) async fn extents(&self, range: ByteRange, one: bool) -> Result<Vec<Extent>, IoFailure> {
        // As of before the look: what is stored meanwhile may have been a hole at it.
        let missing = self.missing_blocks();
        let found = self.medium.extents(range, one).await?;
        let mut extents = Vec::with_capacity(found.len());
        let mut at = range.start();
        for extent in found {
            let Some(stretch) = ByteRange::new(at, extent.length) else { break };
            at = stretch.end();
            if !extent.zero {
                extents.push(Extent::data(stretch.count()));
            } else {
                self.split_hole(stretch, &missing, &mut extents);
            }
        }
        if one {
            extents.truncate(1);
        }
        Ok(extents)
    }

    fn split_hole(&self, hole: ByteRange, missing: &DirtyBitmap, extents: &mut Vec<Extent>) {
        let size = self.medium.size();
        let mut at = hole.start();
        for run in missing.runs(BlockRange::touched_by(hole), BlockCount(u64::MAX)) {
            let Some(data) = run.bytes(size).intersection(hole) else { continue };
            if data.start() > at {
                extents.push(Extent::hole(ByteRange::between(at, data.start()).count()));
            }
            extents.push(Extent::data(data.count()));
            at = data.end();
        }
        if at < hole.end() {
            extents.push(Extent::hole(ByteRange::between(at, hole.end()).count()));
        }
    }

    /// The blocks that may hold data: missing ones among them.
    pub(crate) fn missing_blocks(&self) -> DirtyBitmap {
        self.missing.borrow().blocks().clone()
    }

    pub(crate) fn read_ahead(&self, range: ByteRange) {
        if !self.missing.borrow().touches(range) {
            self.medium.read_ahead(range);
        }
    }
}

#[cfg(test)]
mod server_tests;
#[cfg(test)]
mod tests;
