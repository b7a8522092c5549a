//! Bringing missing blocks: comparisons with what the image may hold of them, fetches, what becomes of those that fail, and whoever fetches everything.
//!
//! A receiver that is away is tried again, with growing pauses, until the disk is given up: what waits for it
//! waits. What the receiver has lost is found out block by block, and is an error of those blocks from then on.

use std::{
    cell::Cell,
    collections::BTreeSet,
    io,
    num::NonZeroU64,
    pin::Pin,
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use backtide_hydration::{FetchId, HydrationFile, Kind};
use backtide_io_filter::{Change, IoFailure, LocalData, LocalOp, chunk_items};
use backtide_storage::KillPoint;
use backtide_units::{BlockCount, BlockIndex, BlockRange, ByteRange, DiskId, Epoch};

use super::{
    FAILURES_MAX, HydratingDisk,
    pieces::{Pieces, fetched, in_blocks, is_all, write},
};
use crate::disk::{
    image_disk::blocking, incomplete::remove_note, local::failure, medium::Medium, source::FetchError,
};

/// Pauses between attempts to reach the source, doubling.
const RETRY_FIRST: Duration = Duration::from_millis(100);
const RETRY_LAST: Duration = Duration::from_secs(5);

/// Fetches under way that nobody has asked for, and their blocks. What is scattered takes many small ones.
const AHEAD_MAX: Ahead = Ahead { fetches: 16, blocks: 1024 };

/// The same while somebody waits for another.
const AHEAD_MAX_BESIDE_GUEST: Ahead = Ahead { fetches: 2, blocks: 256 };

/// What is fetched without being asked for.
#[derive(Clone, Copy, Default)]
struct Ahead {
    fetches: u64,
    blocks: u64,
}

impl Ahead {
    fn is_below(self, most: Self) -> bool {
        self.fetches < most.fetches && self.blocks < most.blocks
    }
}

/// How long what could not be stored is left alone by whoever fetches everything.
const STORE_RETRY: Duration = Duration::from_secs(5);

/// For whom the receiver keeps a point that a disk lacks blocks of.
/// Another attach, on another host, does not hold and release in its name; who comes later takes its place.
pub(crate) fn owner(disk: DiskId, epoch: Epoch) -> String {
    format!("missing blocks of disk {disk} (attach {epoch})")
}

/// The same while a disk that lacks blocks of another point is being set to this one.
pub(crate) fn rewinding(disk: DiskId, epoch: Epoch) -> String {
    format!("a rewind of disk {disk} (attach {epoch})")
}

/// So many runs are fetched between two flushes: a journal is begun anew at one, when it has become long.
const RUNS_BETWEEN_FLUSHES: u64 = 4096;

/// How long the last step of a hydration waits for the receiver, which may as well hear of it later.
const RELEASE_TIME: Duration = Duration::from_secs(2);

impl HydratingDisk {
    /// Begins to fetch blocks that nobody fetches yet.
    pub(super) fn start_fetch(self: &Rc<Self>, blocks: BlockRange) {
        let id = self.missing.borrow_mut().begin_fetch(blocks);
        tokio::task::spawn_local(Rc::clone(self).fetch(id, blocks));
    }

    /// A future in a box, for it may need others of its kind.
    fn fetch(self: Rc<Self>, id: FetchId, blocks: BlockRange) -> Pin<Box<dyn Future<Output = ()>>> {
        Box::pin(async move {
            match self.bring(blocks).await {
                Some(Ok(pieces)) => self.store(id, blocks, pieces).await,
                Some(Err(why)) => self.narrow(id, blocks, &why).await,
                None => drop(self.missing.borrow_mut().end_fetch(id, false)),
            }
            self.changed.notify_waiters();
        })
    }

    /// What the source has, or why it has not; none when the disk is given up.
    async fn bring(&self, blocks: BlockRange) -> Option<Result<Pieces, String>> {
        let range = blocks.bytes(self.medium.size());
        let mut pause = RETRY_FIRST;
        loop {
            let fetched = tokio::select! {
                biased;
                () = self.until_stopped() => return None,
                fetched = self.fetch_differing(range) => fetched,
            };
            let why = match fetched {
                Ok(pieces) if is_all(&pieces, range) => {
                    self.is_well();
                    return Some(Ok(pieces));
                }
                Ok(_) => "the receiver's answer is not what was asked for".to_owned(),
                Err(FetchError::Damaged(why)) => return Some(Err(why)),
                Err(FetchError::Unreachable(why)) => why,
                Err(FetchError::Refused(why)) => {
                    if !self.refused.replace(true) {
                        tracing::error!(disk = %self.name, why, "the receiver does not give missing blocks: they wait for a person");
                    }
                    why
                }
            };
            self.is_troubled(&why);
            tokio::select! {
                biased;
                () = self.until_stopped() => return None,
                () = tokio::time::sleep(pause) => {}
            }
            pause = (pause * 2).min(RETRY_LAST);
        }
    }

    /// Fetches what the image does not hold; all of it, unless it may hold some.
    async fn fetch_differing(&self, range: ByteRange) -> Result<Pieces, FetchError> {
        let is_doubted = self.doubted.borrow().touches(BlockRange::touched_by(range));
        let compared = match self.file.header().compare && !is_doubted {
            true => self.medium.run(LocalOp::Read(range)).await.ok(),
            false => None,
        };
        let mut pieces = Pieces::new();
        let Some(LocalData::Read(bytes)) = compared else {
            self.fetch_into(range, &mut pieces).await?;
            return Ok(pieces);
        };
        let items: Vec<_> = chunk_items(range, &bytes).into_iter().map(|(item, _)| item).collect();
        let ranges: Vec<ByteRange> = items.iter().map(|item| item.range).collect();
        let differing: BTreeSet<u32> = self.source.differing(items).await?.into_iter().collect();
        let mut wanted: Option<ByteRange> = None;
        for (position, chunk) in (0..).zip(ranges) {
            if differing.contains(&position) {
                let start = wanted.map_or(chunk.start(), ByteRange::start);
                wanted = Some(ByteRange::between(start, chunk.end()));
                continue;
            }
            if let Some(wanted) = wanted.take() {
                self.fetch_into(wanted, &mut pieces).await?;
            }
            pieces.push((chunk, None));
        }
        if let Some(wanted) = wanted {
            self.fetch_into(wanted, &mut pieces).await?;
        }
        Ok(pieces)
    }

    async fn fetch_into(&self, range: ByteRange, pieces: &mut Pieces) -> Result<(), FetchError> {
        let fetched = self.source.fetch(range).await?;
        pieces.extend(fetched.into_iter().map(|(of, piece)| (of, Some(piece))));
        Ok(())
    }

    async fn until_stopped(&self) {
        loop {
            let changed = self.changed.notified();
            if self.stopped.get() {
                return;
            }
            changed.await;
        }
    }

    /// Fetches half and half what cannot be fetched whole, down to the block that is lost.
    async fn narrow(self: &Rc<Self>, id: FetchId, blocks: BlockRange, why: &str) {
        self.missing.borrow_mut().end_fetch(id, false);
        if blocks.count() == BlockCount(1) {
            let (disk, offset) = (&self.name, blocks.start().start());
            tracing::error!(%disk, %offset, why, "a missing block is damaged at the receiver: it can only be overwritten");
            self.missing.borrow_mut().is_damaged(blocks.start());
            return;
        }
        let middle = BlockIndex(blocks.start().0 + blocks.count().0 / 2);
        for half in [BlockRange::between(blocks.start(), middle), BlockRange::between(middle, blocks.end())] {
            let id = self.missing.borrow_mut().begin_fetch(half);
            Rc::clone(self).fetch(id, half).await;
        }
    }

    async fn store(&self, id: FetchId, blocks: BlockRange, pieces: Pieces) {
        // What was compared need not be what the image holds now: all of it is fetched.
        let is_doubted = self.doubted.borrow().touches(blocks);
        let is_stale = is_doubted && pieces.iter().any(|(_, piece)| piece.is_none());
        // No await from here to the count: a stop waits for it, or it is seen here.
        if self.stopped.get() || is_stale {
            drop(self.missing.borrow_mut().end_fetch(id, false));
            return;
        }
        let wanted = self.missing.borrow_mut().end_fetch(id, true);
        if wanted.is_empty() {
            return;
        }
        self.storing.set(self.storing.get() + 1);
        let came = fetched(&wanted, &pieces, self.medium.size());
        let stored = self.put(wanted, pieces).await;
        let before = self.missing.borrow().blocks().count();
        self.missing.borrow_mut().end_store(id, stored.is_ok());
        self.has_brought(before, came);
        if let Err(error) = stored {
            self.is_troubled(&format!("what was fetched cannot be stored: {error}"));
            self.doubted.borrow_mut().insert(blocks);
            self.has_failed(blocks, failure(error));
        }
        self.storing.set(self.storing.get() - 1);
    }

    /// Has the blocks on the image, then in the journal.
    async fn put(&self, wanted: Vec<BlockRange>, pieces: Pieces) -> io::Result<()> {
        let file = Arc::clone(&self.file);
        let size = self.medium.size();
        match &self.medium {
            Medium::Image(image) => {
                let image = Arc::clone(image.image());
                let put = move || {
                    for run in &wanted {
                        write(&image, run.bytes(size), &pieces)?;
                    }
                    note(&file, &wanted)
                };
                blocking(put).await
            }
            Medium::Nbd(disk) => {
                let changes: Vec<Change> =
                    wanted.iter().flat_map(|run| in_blocks(run.bytes(size), size, &pieces)).collect();
                // What it holds already was stable before this disk began to use it: what this disk wrote and is not
                // sure of was not compared.
                if !changes.is_empty() {
                    let stable = disk.change_stably(changes).await;
                    stable.map_err(|failure| io::Error::from_raw_os_error(failure.errno))?;
                }
                blocking(move || note(&file, &wanted)).await
            }
        }
    }

    fn has_failed(&self, blocks: BlockRange, failure: IoFailure) {
        let number = self.failure_count.get();
        self.failure_count.set(number + 1);
        let mut failures = self.failures.borrow_mut();
        failures.push_back((number, blocks, failure));
        if failures.len() > FAILURES_MAX {
            failures.pop_front();
        }
    }

    fn is_troubled(&self, why: &str) {
        let mut trouble = self.trouble.borrow_mut();
        if trouble.as_deref() != Some(why) {
            tracing::warn!(disk = %self.name, why, "missing blocks cannot be brought: will try again");
            *trouble = Some(why.to_owned());
        }
    }

    fn is_well(&self) {
        self.refused.set(false);
        if self.trouble.take().is_some() {
            tracing::info!(disk = %self.name, "missing blocks can be brought again");
        }
    }

    /// Fetches everything, piece by piece, then makes the image the disk.
    pub(crate) async fn hydrate(self: Rc<Self>) {
        let mut from = BlockIndex(0);
        let mut failures = self.failure_count.get();
        let mut runs = 0_u64;
        let ahead = Rc::new(Cell::new(Ahead::default()));
        while !self.stopped.get() && !self.complete.get() {
            let changed = self.changed.notified();
            let most = if self.waiting.get() > 0 { AHEAD_MAX_BESIDE_GUEST } else { AHEAD_MAX };
            if failures != self.failure_count.get() {
                failures = self.failure_count.get();
                self.pause(STORE_RETRY).await;
                continue;
            }
            let next = {
                let missing = self.missing.borrow();
                missing.next_unfetched(from).or_else(|| missing.next_unfetched(BlockIndex(0)))
            };
            match next {
                Some(run) if ahead.get().is_below(most) => {
                    from = run.end();
                    let (Ahead { fetches, blocks }, count) = (ahead.get(), run.count().0);
                    ahead.set(Ahead { fetches: fetches + 1, blocks: blocks + count });
                    let id = self.missing.borrow_mut().begin_fetch(run);
                    let (disk, ahead) = (Rc::clone(&self), Rc::clone(&ahead));
                    tokio::task::spawn_local(async move {
                        Rc::clone(&disk).fetch(id, run).await;
                        let Ahead { fetches, blocks } = ahead.get();
                        ahead.set(Ahead { fetches: fetches - 1, blocks: blocks - count });
                        disk.changed.notify_waiters();
                    });
                    self.keep_pace(run.count()).await;
                    runs += 1;
                    if runs.is_multiple_of(RUNS_BETWEEN_FLUSHES) {
                        // A failure is one of every flush that follows.
                        let _ = self.flush().await;
                    }
                }
                None if self.missing.borrow().is_empty() => self.finish().await,
                Some(_) | None => changed.await,
            }
        }
    }

    /// The receiver need not keep the point any longer.
    async fn release(&self) {
        let owner = owner(self.file.header().disk, self.file.header().epoch);
        let mut pause = RETRY_FIRST;
        while !self.stopped.get() {
            let released = tokio::select! {
                released = self.give_up_point() => released,
                () = self.until_stopped() => break,
            };
            match released {
                Ok(()) => return,
                Err(FetchError::Unreachable(_)) => self.pause(pause).await,
                Err(FetchError::Damaged(why) | FetchError::Refused(why)) => {
                    tracing::warn!(disk = %self.name, why, "the receiver does not release the point");
                    return;
                }
            }
            pause = (pause * 2).min(RETRY_LAST);
        }
        tracing::warn!(disk = %self.name, owner, "the receiver was not told that the point is needed no more: release it there");
    }

    async fn keep_pace(&self, blocks: BlockCount) {
        let began = Instant::now();
        while !self.stopped.get() {
            let changed = self.changed.notified();
            // It may change meanwhile.
            let Some(limit) = NonZeroU64::new(self.rate_max.get()) else { return };
            let takes = Duration::from_secs_f64(blocks.bytes().0 as f64 / limit.get() as f64);
            let Some(left) = takes.checked_sub(began.elapsed()) else { return };
            tokio::select! {
                () = tokio::time::sleep(left) => {}
                () = changed => {}
            }
        }
    }

    async fn pause(&self, time: Duration) {
        tokio::select! {
            () = tokio::time::sleep(time) => {}
            () = self.until_stopped() => {}
        }
    }

    /// Nothing is missing: when that is durable the image is the disk.
    async fn finish(&self) {
        // Who dies after it asks for the release again.
        let released = self.flush().await.is_ok() && self.release_once().await;
        // No await from here to the count, as in `store`.
        if self.stopped.get() {
            return;
        }
        self.storing.set(self.storing.get() + 1);
        let finished = self.make_whole().await;
        self.storing.set(self.storing.get() - 1);
        self.changed.notify_waiters();
        match finished {
            Ok(()) => {
                self.complete.set(true);
                tracing::info!(disk = %self.name, "nothing is missing any more: the image is the disk");
                if !released {
                    self.release().await;
                }
            }
            Err(error) => {
                self.is_troubled(&format!("that nothing is missing cannot be made durable: {error}"));
                self.pause(STORE_RETRY).await;
            }
        }
    }

    /// Removes what says that the disk lacks blocks, once it is durable that it does not.
    async fn make_whole(&self) -> io::Result<()> {
        let (file, noted) = (Arc::clone(&self.file), self.noted.clone());
        let image = match &self.medium {
            Medium::Image(image) => Some(Arc::clone(image.image())),
            // Whatever the journal calls present was flushed before, and that is all of it.
            Medium::Nbd(_) => None,
        };
        let finish = move || {
            let sync = || image.map_or(Ok(()), |image| image.sync());
            // While the file is there the next attach writes the note again.
            file.finish(sync, || noted.map_or(Ok(()), |noted| remove_note(&noted)))?;
            KillPoint::HydrationFinished.reached();
            Ok(())
        };
        blocking(finish).await
    }

    /// Tells the receiver, if it is there, that it need not keep the point any longer.
    async fn release_once(&self) -> bool {
        tokio::select! {
            released = tokio::time::timeout(RELEASE_TIME, self.give_up_point()) => {
                matches!(released, Ok(Ok(())))
            }
            () = self.until_stopped() => false,
        }
    }

    /// In every name in which the receiver may keep this point for the disk.
    async fn give_up_point(&self) -> Result<(), FetchError> {
        let (disk, epoch) = (self.file.header().disk, self.file.header().epoch);
        self.source.release(&owner(disk, epoch)).await?;
        match self.file.header().kind {
            Kind::Rewind => self.source.release(&rewinding(disk, epoch)).await,
            Kind::Origin | Kind::Failover => Ok(()),
        }
    }
}

/// The blocks are on the image: says so.
fn note(file: &HydrationFile, blocks: &[BlockRange]) -> io::Result<()> {
    KillPoint::HydrationStored.reached();
    file.present(blocks)?;
    KillPoint::HydrationNoted.reached();
    Ok(())
}
