//! A disk behind that lacks blocks: what is missing is fetched from a point at the receiver, when it is touched
//! and in the background.
//!
//! It stands between the engine and the image. What touches nothing missing goes straight through; the rest
//! waits until its blocks are there, or overwrites them. What is done in which order is the [`Hydrator`]'s to say,
//! whose steps are carried out here; what outlives the agent is in the [`HydrationFile`].
//!
//! Invariants: every step that was taken ends, and its end is told. Behind an NBD server, which may end with this agent
//! and take with it what it was not told to flush, the image is flushed before the journal says anything: what is
//! present there is stable. When [`stop`](HydratingDisk::stop) has returned nothing of this writes the image.

mod fetch;
mod pieces;
mod status;

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    path::PathBuf,
    rc::Rc,
    sync::Arc,
};

use backtide_export::Extent;
use backtide_hydration::{FetchId, HydrationFile, Hydrator, Refusal, RequestId, Step, Wish};
use backtide_io_filter::{Change, IoFailure, LocalData, LocalOp};
use backtide_tracking::DirtyBitmap;
use backtide_units::{BlockCount, BlockRange, ByteRange, DiskName};
use rustix::io::Errno;
use tokio::{
    sync::{Mutex, Notify, oneshot},
    task::spawn_local,
};

use super::{
    image_disk::{EXTENTS_MAX, blocking},
    local::{Began, EIO, Purpose, failure},
    medium::Medium,
    nbd_disk::NbdDisk,
    source::PointSource,
};
pub(crate) use fetch::{owner, rewinding};
use pieces::Pieces;
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
    hydrator: RefCell<Hydrator>,
    requests: RefCell<BTreeMap<RequestId, Ongoing>>,
    /// What was fetched, until it is known what of it is wanted.
    fetched: RefCell<BTreeMap<FetchId, Pieces>>,
    /// Something has ended: whoever waits looks again.
    changed: Notify,
    /// Nothing is missing any more, and no file says so: the image is the disk.
    complete: Cell<bool>,
    /// The disk is given up.
    stopped: Cell<bool>,
    /// What writes the image or the hydration file now, beside the changes of guests.
    storing: Cell<usize>,
    /// Bytes a second that are fetched without being asked for; 0: no limit.
    rate_max: Cell<u64>,
    /// What keeps blocks from being fetched.
    trouble: RefCell<Option<String>>,
    /// It is that the receiver does not give the point.
    refused: Cell<bool>,
    /// What came last could not be stored, or not be noted.
    unstored: Cell<bool>,
    /// Locked by who has the point held or released, so that nothing holds it after the release.
    holding: Mutex<()>,
    progress: RefCell<Progress>,
}

/// A request that the [`Hydrator`] has.
struct Ongoing {
    /// What the image has to do for it, as long as that is not done; nothing of it is stable by itself.
    op: Option<LocalOp>,
    /// What came of that.
    data: LocalData,
    /// Whoever asks has a guest told of what failed before and nobody was told: it is a flush, and none of our own.
    hears: bool,
    reply: oneshot::Sender<Result<LocalData, IoFailure>>,
}

impl HydratingDisk {
    pub(crate) fn new(
        name: DiskName,
        medium: Medium,
        noted: Option<PathBuf>,
        file: HydrationFile,
        source: Rc<dyn PointSource>,
    ) -> Rc<Self> {
        let hydrator = Hydrator::new(medium.size(), file.missing(), file.header().compare);
        let progress = Progress::new(hydrator.missing().blocks().count());
        Rc::new(Self {
            name,
            medium,
            noted,
            file: Arc::new(file),
            source,
            hydrator: RefCell::new(hydrator),
            requests: RefCell::default(),
            fetched: RefCell::default(),
            changed: Notify::new(),
            complete: Cell::new(false),
            stopped: Cell::new(false),
            storing: Cell::new(0),
            rate_max: Cell::new(0),
            trouble: RefCell::default(),
            refused: Cell::new(false),
            unstored: Cell::new(false),
            holding: Mutex::default(),
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
    pub(crate) fn goes_through(&self, op: &LocalOp) -> bool {
        self.complete.get() || !self.hydrator.borrow().needs_care(wish_of(op))
    }

    /// Does it, waiting as long as it takes.
    pub(crate) async fn run(self: &Rc<Self>, op: LocalOp) -> Result<LocalData, IoFailure> {
        if self.goes_through(&op) {
            return self.medium.run(op).await;
        }
        let hears = matches!(op, LocalOp::Change(Change::Flush) | LocalOp::Settle);
        self.submit(op, hears).await
    }

    /// Makes everything stable that was done, and nobody asked for that: what a guest has to hear is kept for its next
    /// flush.
    async fn settle_unasked(self: &Rc<Self>) -> Result<(), IoFailure> {
        self.submit(LocalOp::Settle, false).await.map(drop)
    }

    async fn submit(self: &Rc<Self>, op: LocalOp, hears: bool) -> Result<LocalData, IoFailure> {
        let (reply, answer) = oneshot::channel();
        let id = self.hydrator.borrow_mut().submit(wish_of(&op));
        let ongoing = Ongoing { op: Some(unstable(op)), data: LocalData::Changed, hears, reply };
        self.requests.borrow_mut().insert(id, ongoing);
        self.carry_out();
        answer.await.expect("every request is answered")
    }

    fn carry_out(self: &Rc<Self>) {
        loop {
            let step = self.hydrator.borrow_mut().next_step();
            let Some(step) = step else { break };
            match step {
                Step::Image(id) => drop(spawn_local(Rc::clone(self).do_on_image(id))),
                Step::Note(id, blocks) => drop(spawn_local(Rc::clone(self).note(id, blocks))),
                Step::Settle(id) => {
                    self.storing.set(self.storing.get() + 1);
                    spawn_local(Rc::clone(self).settle(id));
                }
                Step::Fetch(id, blocks) => drop(spawn_local(Rc::clone(self).fetch(id, blocks))),
                Step::Store(id, runs) => {
                    let pieces = self.fetched.borrow_mut().remove(&id).expect("it was fetched just now");
                    self.storing.set(self.storing.get() + 1);
                    spawn_local(Rc::clone(self).store(id, runs, pieces));
                }
                Step::Answer(id, result) => self.answer(id, result),
            }
        }
        self.changed.notify_waiters();
    }

    async fn do_on_image(self: Rc<Self>, id: RequestId) {
        let op = self.requests.borrow_mut().get_mut(&id).and_then(|ongoing| ongoing.op.take());
        let op = op.expect("the image does it once");
        let overwrites = self.hydrator.borrow().overwrites_missing(id);
        let done = match (&self.medium, op) {
            (Medium::Nbd(disk), LocalOp::Change(change)) if overwrites => {
                self.change_stably(disk, vec![change]).await.map(|()| LocalData::Changed)
            }
            (medium, op) => medium.run(op).await,
        };
        let result = done.map(|data| {
            if let Some(ongoing) = self.requests.borrow_mut().get_mut(&id) {
                ongoing.data = data;
            }
        });
        self.tell(|hydrator| hydrator.image_done(id, result.map_err(refusal)));
    }

    async fn note(self: Rc<Self>, id: RequestId, blocks: Vec<BlockRange>) {
        let file = Arc::clone(&self.file);
        let noted = blocking(move || file.present(&blocks)).await.map_err(failure);
        self.tell(|hydrator| hydrator.noted(id, noted.map_err(refusal)));
    }

    async fn settle(self: Rc<Self>, id: RequestId) {
        let hears = self.requests.borrow().get(&id).is_some_and(|ongoing| ongoing.hears);
        let settled = self.settle_all(hears).await;
        self.storing.set(self.storing.get() - 1);
        self.tell(|hydrator| hydrator.settled(id, settled.map_err(refusal)));
    }

    async fn settle_all(&self, hears: bool) -> Result<(), IoFailure> {
        let file = Arc::clone(&self.file);
        match &self.medium {
            Medium::Image(image) => {
                let image = Arc::clone(image.image());
                blocking(move || file.settle(|| image.sync())).await.map_err(failure)
            }
            Medium::Nbd(disk) => {
                let flushed = match hears {
                    true => disk.run(LocalOp::Change(Change::Flush)).await.map(drop),
                    false => disk.flush_unasked().await,
                };
                if let Err(failure) = flushed {
                    self.distrust_image().await;
                    return Err(failure);
                }
                // Whatever the journal calls present was flushed before.
                blocking(move || file.settle(|| Ok(()))).await.map_err(failure)
            }
        }
    }

    /// Behind a server nothing is called present before it is stable.
    async fn change_stably(&self, disk: &NbdDisk, changes: Vec<Change>) -> Result<(), IoFailure> {
        let changed = disk.change_stably(changes).await;
        if changed.is_err() {
            self.distrust_image().await;
        }
        changed
    }

    /// The next attach does not believe what the image shows of missing blocks.
    async fn distrust_image(&self) {
        let file = Arc::clone(&self.file);
        if let Err(error) = blocking(move || file.stop_comparing()).await {
            tracing::error!(disk = %self.name, %error, "the image has refused to keep something, and that cannot be noted for the next attach");
        }
    }

    /// Tells the hydrator something about a request, and does what follows.
    fn tell(self: &Rc<Self>, end: impl FnOnce(&mut Hydrator)) {
        self.brought(BlockCount(0), end);
        self.carry_out();
    }

    fn answer(&self, id: RequestId, result: Result<(), Refusal>) {
        let ongoing = self.requests.borrow_mut().remove(&id).expect("a request is answered once");
        let result = match result {
            Ok(()) => Ok(ongoing.data),
            Err(Refusal::Damaged(_)) => Err(IoFailure { errno: EIO }),
            Err(Refusal::Stopped) => Err(IoFailure { errno: ESHUTDOWN }),
            Err(Refusal::Failed { errno }) => Err(IoFailure { errno }),
        };
        // Whoever asked may have gone.
        let _ = ongoing.reply.send(result);
    }

    /// Ends everything that waits for the receiver, with an error, and waits for what writes the image.
    pub(crate) async fn stop(self: &Rc<Self>) {
        self.stopped.set(true);
        self.hydrator.borrow_mut().stop();
        self.carry_out();
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
        let max = if one { 1 } else { EXTENTS_MAX };
        let mut extents = Vec::with_capacity(found.len());
        let mut at = range.start();
        for extent in found {
            let Some(stretch) = ByteRange::new(at, extent.length).filter(|_| extents.len() < max) else {
                break;
            };
            at = stretch.end();
            if !extent.zero {
                extents.push(Extent::data(stretch.count()));
            } else {
                self.split_hole(stretch, &missing, &mut extents, max);
            }
        }
        extents.truncate(max);
        Ok(extents)
    }

    /// Goes no further once there are `max` extents, or a few more.
    fn split_hole(&self, hole: ByteRange, missing: &DirtyBitmap, extents: &mut Vec<Extent>, max: usize) {
        let size = self.medium.size();
        let mut at = hole.start();
        for run in missing.runs(BlockRange::touched_by(hole), BlockCount(u64::MAX)) {
            let Some(data) = run.bytes(size).intersection(hole) else { continue };
            if data.start() > at {
                extents.push(Extent::hole(ByteRange::between(at, data.start()).count()));
            }
            extents.push(Extent::data(data.count()));
            at = data.end();
            if extents.len() >= max {
                return;
            }
        }
        if at < hole.end() {
            extents.push(Extent::hole(ByteRange::between(at, hole.end()).count()));
        }
    }

    /// The blocks that may hold data: missing ones among them.
    pub(crate) fn missing_blocks(&self) -> DirtyBitmap {
        self.hydrator.borrow().missing().blocks().clone()
    }

    pub(crate) fn read_ahead(&self, range: ByteRange) {
        if !self.hydrator.borrow().missing().touches(range) {
            self.medium.read_ahead(range);
        }
    }
}

fn wish_of(op: &LocalOp) -> Wish {
    match op {
        LocalOp::Read(range) => Wish::Read(*range),
        LocalOp::Change(Change::Write { range, fua, .. } | Change::Zero { range, fua, .. }) => {
            Wish::Change { range: *range, stable: *fua }
        }
        LocalOp::Change(Change::Flush) | LocalOp::Settle => Wish::Flush,
    }
}

/// What is left of it for the image when somebody else makes it stable.
fn unstable(op: LocalOp) -> LocalOp {
    match op {
        LocalOp::Change(Change::Write { range, data, .. }) => {
            LocalOp::Change(Change::Write { range, data, fua: false })
        }
        LocalOp::Change(Change::Zero { range, trim, .. }) => {
            LocalOp::Change(Change::Zero { range, trim, fua: false })
        }
        LocalOp::Read(_) | LocalOp::Change(Change::Flush) | LocalOp::Settle => op,
    }
}

fn refusal(failure: IoFailure) -> Refusal {
    Refusal::Failed { errno: failure.errno }
}

#[cfg(test)]
mod server_tests;
#[cfg(test)]
mod tests;
