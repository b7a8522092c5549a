//! Bringing missing blocks: comparisons with what the image may hold of them, fetches, what becomes of those that fail, and whoever fetches everything.
//!
//! A receiver that is away is tried again, with growing pauses, until the disk is given up: what waits for it
//! waits. What the receiver has lost is found out block by block, and is an error of those blocks from then on.

use std::{
    collections::BTreeSet,
    io,
    num::NonZeroU64,
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use backtide_hydration::{Ahead, FetchId, HydrationFile, Kind, StoreError};
use backtide_io_filter::{Change, IoFailure, LocalData, LocalOp, chunk_items};
use backtide_storage::KillPoint;
use backtide_units::{BlockCount, BlockRange, ByteRange, DiskId, Epoch};

use super::{
    HydratingDisk,
    pieces::{Pieces, fetched, in_blocks, is_all, is_compared, write},
    refusal,
};
use crate::disk::{
    image_disk::blocking, incomplete::remove_note, local::failure, medium::Medium, source::FetchError,
};

/// Pauses between attempts to reach the source, doubling.
const RETRY_FIRST: Duration = Duration::from_millis(100);
const RETRY_LAST: Duration = Duration::from_secs(5);

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
    pub(super) async fn fetch(self: Rc<Self>, id: FetchId, blocks: BlockRange) {
        match self.bring(blocks).await {
            Some(Ok(pieces)) => {
                let compared = is_compared(&pieces);
                self.fetched.borrow_mut().insert(id, pieces);
                self.hydrator.borrow_mut().fetched(id, compared);
            }
            Some(Err(why)) => {
                if let Some(block) = self.hydrator.borrow_mut().lost(id) {
                    let (disk, offset) = (&self.name, block.start());
                    tracing::error!(%disk, %offset, why, "a missing block is damaged at the receiver: it can only be overwritten");
                }
            }
            None => self.hydrator.borrow_mut().dropped(id),
        }
        self.carry_out();
        // Nothing of it was wanted.
        self.fetched.borrow_mut().remove(&id);
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
                Err(FetchError::Unreachable(why)) => {
                    // Whoever is away now refuses nothing, and may not when it is back.
                    self.refused.set(false);
                    why
                }
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
        let may_compare = self.hydrator.borrow().may_compare(BlockRange::touched_by(range));
        let compared = match may_compare {
            true => self.medium.run(LocalOp::Read(range)).await.ok(),
            false => None,
        };
        let mut pieces = Pieces::new();
        let Some(LocalData::Read(bytes)) = compared else {
            self.fetch_into(range, &mut pieces).await?;
            return Ok(pieces);
        };
        let items = chunk_items(range, &bytes);
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

    pub(super) async fn store(self: Rc<Self>, id: FetchId, runs: Vec<BlockRange>, pieces: Pieces) {
        let came = fetched(&runs, &pieces, self.medium.size());
        let stored = self.put(runs, pieces).await;
        let before = self.unstored.replace(stored.is_err());
        match &stored {
            Err(error) => self.is_troubled(&format!("what was fetched cannot be stored: {error}")),
            // When it came it was not known yet that it can be stored again.
            Ok(()) if before => self.is_well(),
            Ok(()) => {}
        }
        self.brought(came, |hydrator| match stored {
            Ok(()) => hydrator.stored(id, Ok(())),
            Err(StoreError::Image(error)) => hydrator.stored(id, Err(refusal(failure(error)))),
            Err(StoreError::Unnoted(_)) => hydrator.unnoted(id),
        });
        self.storing.set(self.storing.get() - 1);
        self.carry_out();
    }

    /// Has the blocks on the image, then in the journal.
    async fn put(&self, wanted: Vec<BlockRange>, pieces: Pieces) -> Result<(), StoreError> {
        let file = Arc::clone(&self.file);
        let (size, blocks) = (self.medium.size(), wanted.clone());
        match &self.medium {
            Medium::Image(image) => {
                let image = Arc::clone(image.image());
                let put = move || wanted.iter().try_for_each(|run| write(&image, run.bytes(size), &pieces));
                blocking(move || Ok(note(&file, &blocks, put))).await.map_err(StoreError::Image)?
            }
            Medium::Nbd(disk) => {
                let changes: Vec<Change> =
                    wanted.iter().flat_map(|run| in_blocks(run.bytes(size), size, &pieces)).collect();
                // What it holds already was stable before this disk began to use it: what this disk wrote and is not
                // sure of was not compared.
                if !changes.is_empty() {
                    let stable = self.change_stably(disk, changes).await;
                    let error = |failure: IoFailure| io::Error::from_raw_os_error(failure.errno);
                    stable.map_err(error).map_err(StoreError::Image)?;
                }
                let noted = move || Ok(note(&file, &blocks, || Ok(())));
                blocking(noted).await.map_err(StoreError::Image)?
            }
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
        // That it comes is no help where it cannot be stored.
        if self.unstored.get() {
            return;
        }
        if self.trouble.take().is_some() {
            tracing::info!(disk = %self.name, "missing blocks can be brought again");
        }
    }

    /// Has the receiver keep the point for as long as anything is missing: it was asked to when the hydration was planned, and
    /// somebody may have released it since.
    async fn keep_holding(&self) {
        let owner = owner(self.file.header().disk, self.file.header().epoch);
        let mut pause = RETRY_FIRST;
        loop {
            let asked = async {
                let _alone = self.holding.lock().await;
                // From here on it is to be released.
                if self.complete.get() || self.hydrator.borrow().missing().blocks().is_empty() {
                    return Ok(());
                }
                self.source.hold(&owner).await
            };
            let held = tokio::select! {
                biased;
                () = self.until_stopped() => return,
                held = asked => held,
            };
            match held {
                Ok(()) => return,
                Err(FetchError::Unreachable(_)) => self.pause(pause).await,
                Err(FetchError::Damaged(why) | FetchError::Refused(why)) => {
                    tracing::warn!(disk = %self.name, owner, why, "the receiver does not keep the point of which blocks are missing");
                    return;
                }
            }
            pause = (pause * 2).min(RETRY_LAST);
        }
    }

    /// Fetches everything, piece by piece, then makes the image the disk.
    pub(crate) async fn hydrate(self: Rc<Self>) {
        tokio::join!(self.keep_holding(), self.bring_everything());
    }

    async fn bring_everything(self: &Rc<Self>) {
        let mut failures = self.hydrator.borrow().store_failures();
        let mut runs = 0_u64;
        while !self.stopped.get() && !self.complete.get() {
            let changed = self.changed.notified();
            let failed = self.hydrator.borrow().store_failures();
            if failures != failed {
                failures = failed;
                self.pause(STORE_RETRY).await;
                continue;
            }
            let ahead = self.hydrator.borrow_mut().fetch_ahead();
            match ahead {
                Ahead::Begun(run) => {
                    self.carry_out();
                    self.keep_pace(run.count()).await;
                    runs += 1;
                    if runs.is_multiple_of(RUNS_BETWEEN_FLUSHES) {
                        // A failure is one of a flush that follows.
                        let _ = self.settle_unasked().await;
                    }
                }
                Ahead::Complete => self.finish().await,
                Ahead::Wait => changed.await,
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
    async fn finish(self: &Rc<Self>) {
        // Who dies after it asks for the release again.
        let released = self.settle_unasked().await.is_ok() && self.release_once().await;
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
        let _alone = self.holding.lock().await;
        let (disk, epoch) = (self.file.header().disk, self.file.header().epoch);
        self.source.release(&owner(disk, epoch)).await?;
        match self.file.header().kind {
            Kind::Rewind => self.source.release(&rewinding(disk, epoch)).await,
            Kind::Origin | Kind::Failover => Ok(()),
        }
    }
}

/// Has `write` bring the blocks on the image, and says so.
fn note(
    file: &HydrationFile,
    blocks: &[BlockRange],
    write: impl FnOnce() -> io::Result<()>,
) -> Result<(), StoreError> {
    file.store(blocks, || {
        write()?;
        KillPoint::HydrationStored.reached();
        Ok(())
    })?;
    KillPoint::HydrationNoted.reached();
    Ok(())
}
