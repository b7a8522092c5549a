//! A mounted point with an overlay as a writable NBD export.
//!
//! Runs on the mounts' thread, which never waits for the overlay's storage: other threads read and write there. What a
//! change needs of the point is fetched before, so that nobody has the overlay in hand while he waits for the receiver,
//! and whoever changes whole blocks needs no receiver.
//!
//! All connections share the overlay: a flush on one covers what was answered on all. Requests in flight together have
//! no order, as NBD has it.

use std::{
    cell::{Cell, RefCell},
    rc::Rc,
    sync::Arc,
};

use backtide_control::{ApiError, ErrorCode};
use backtide_export::{Command, Export, ExportInfo, Extent, NbdError, Reply};
use backtide_overlay::{Base, BaseError, Kind, Overlay, OverlayError, OverlayUse};
use backtide_tracking::DirtyBitmap;
use backtide_units::{BLOCK_SIZE, ByteCount, ByteRange};
use bytes::Bytes;
use tokio::{sync::Semaphore, task::spawn_blocking};

use super::{
    export::{EXTENTS_MAX, STATUS_BYTES_MAX, fetch_text, split},
    map::within_a_window,
    overlays::Opened,
    reader::Reader,
};
use crate::disk::source::FetchError;

/// Threads that read one overlay at once, at most ...
const READS: usize = 4;
/// ... and that change it: one writes while another one syncs.
const CHANGES: usize = 2;

/// What a request hears that comes too late.
const ENDED: &str = "the mount has ended";

/// The overlay of a mount in use.
pub(super) struct Written {
    overlay: Arc<Overlay>,
    /// As it was when nobody wrote.
    usage: Cell<OverlayUse>,
    /// What is wrong with it.
    problem: RefCell<Option<String>>,
    reads: Semaphore,
    changes: Semaphore,
}

/// A point with an overlay.
#[derive(Clone)]
pub(super) struct WritableExport {
    info: ExportInfo,
    reader: Rc<Reader>,
    written: Rc<Written>,
}

/// Why a request fails.
enum Failed {
    Overlay(OverlayError),
    Point(FetchError),
    /// The thread that was to do it panicked: a sentence.
    Thread(String),
}

/// What of the point was fetched for a change: whole blocks.
struct Fetched(Vec<(ByteRange, Bytes)>);

impl Base for Fetched {
    fn read(&self, range: ByteRange) -> Result<Bytes, BaseError> {
        let found = self.0.iter().find(|(part, _)| *part == range);
        found.map(|(_, bytes)| bytes.clone()).ok_or_else(|| format!("{range} was not fetched").into())
    }
}

impl Written {
    pub(super) fn new((overlay, usage): Opened) -> Self {
        let usage = Cell::new(usage);
        let (reads, changes) = (Semaphore::new(READS), Semaphore::new(CHANGES));
        Self { overlay, usage, problem: RefCell::default(), reads, changes }
    }

    /// What it takes: now, or when something was written last.
    pub(super) fn usage(&self) -> OverlayUse {
        if let Some(usage) = self.overlay.usage_at_once() {
            self.usage.set(usage);
        }
        self.usage.get()
    }

    /// What is wrong with it.
    pub(super) fn problem(&self) -> Option<String> {
        self.problem.borrow().clone()
    }

    /// The mount ends: from here on nothing is changed any more, also by a request that waits for the receiver still,
    /// and what was written is durable.
    ///
    /// # Errors
    /// A sentence, when it cannot be made so: who did not flush was promised nothing.
    pub(super) async fn end(&self, mount: &str) -> Result<(), String> {
        let all = u32::try_from(CHANGES).expect("a few");
        let _turns = self.changes.acquire_many(all).await.map_err(|_| ENDED.to_owned())?;
        self.changes.close();
        let overlay = Arc::clone(&self.overlay);
        let flushed = spawn_blocking(move || overlay.flush()).await;
        let flushed = flushed.map_err(|error| Failed::Thread(error.to_string()));
        flushed.and_then(|flushed| flushed.map_err(Failed::Overlay)).map_err(|failed| {
            let why = failed.text();
            tracing::warn!(mount, why, "cannot flush the overlay of a mount");
            why
        })
    }

    /// Does `work` on a thread that may wait for storage.
    async fn on<T: Send + 'static>(
        &self,
        turns: &Semaphore,
        work: impl FnOnce(&Overlay) -> Result<T, OverlayError> + Send + 'static,
    ) -> Result<T, Failed> {
        let Ok(_turn) = turns.acquire().await else { return Err(Failed::Thread(ENDED.to_owned())) };
        let overlay = Arc::clone(&self.overlay);
        let done = spawn_blocking(move || work(&overlay)).await;
        done.map_err(|error| Failed::Thread(error.to_string()))?.map_err(Failed::Overlay)
    }

    fn note(&self, why: &str) {
        self.problem.replace(Some(why.to_owned()));
    }
}

impl Failed {
    fn text(&self) -> String {
        match self {
            Self::Overlay(error) => ApiError::from_error(ErrorCode::Failed, error).message,
            Self::Point(error) => fetch_text(error),
            Self::Thread(why) => why.clone(),
        }
    }
}

impl WritableExport {
    pub(super) fn new(info: ExportInfo, reader: Rc<Reader>, written: Rc<Written>) -> Self {
        Self { info, reader, written }
    }

    /// Answers `reply` with what `work` comes to.
    fn answer<T: 'static>(
        &self,
        reply: Reply,
        work: impl Future<Output = Result<T, Failed>> + 'static,
        complete: impl FnOnce(Reply, T) + 'static,
    ) {
        let this = self.clone();
        tokio::task::spawn_local(async move {
            match work.await {
                Ok(value) => complete(reply, value),
                Err(failed) => this.fail(reply, &failed),
            }
        });
    }

    fn fail(&self, reply: Reply, failed: &Failed) {
        let (mount, why) = (&self.info.name, failed.text());
        match failed {
            Failed::Overlay(OverlayError::Full { .. } | OverlayError::NoRoom(_)) => {
                tracing::warn!(mount, why, "a mount's overlay takes no more");
                return reply.fail_with(NbdError::NoSpace, &why);
            }
            Failed::Overlay(_) => self.written.note(&why),
            Failed::Point(_) | Failed::Thread(_) => {}
        }
        tracing::error!(mount, why, "a request to a mount that can be written failed");
        reply.fail_with(NbdError::Io, &why);
    }

    async fn read(self, range: ByteRange) -> Result<Bytes, Failed> {
        let partly = self.written.on(&self.written.reads, move |overlay| overlay.read_partly(range)).await?;
        let fetched = self.fetch(partly.below()).await?;
        Ok(partly.complete(fetched.0.into_iter().map(|(_, bytes)| bytes).collect()))
    }

    async fn fetch(&self, parts: &[ByteRange]) -> Result<Fetched, Failed> {
        let mut fetched = Vec::with_capacity(parts.len());
        for part in parts {
            fetched.push((*part, self.reader.read(*part).await.map_err(Failed::Point)?));
        }
        Ok(Fetched(fetched))
    }

    /// Changes `range`, and makes it durable when the client asks for that.
    fn change(
        &self,
        range: ByteRange,
        fua: bool,
        reply: Reply,
        work: impl FnOnce(&Overlay, &Fetched) -> Result<(), OverlayError> + Send + 'static,
    ) {
        let this = self.clone();
        let change = async move {
            let Self { written, .. } = &this;
            let size = this.reader.size();
            let is_whole = |at: u64| at.is_multiple_of(BLOCK_SIZE) || at == size.0;
            let below = if is_whole(range.start().0) && is_whole(range.end().0) {
                Fetched(Vec::new())
            } else {
                let edges = written.on(&written.reads, move |overlay| Ok(overlay.edges(range))).await?;
                this.fetch(&edges).await?
            };
            let work = move |overlay: &Overlay| {
                work(overlay, &below)?;
                if fua { overlay.flush() } else { Ok(()) }
            };
            written.on(&written.changes, work).await
        };
        self.answer(reply, change, |reply, ()| reply.done());
    }

    async fn status(self, range: ByteRange, extents_max: usize) -> Result<Vec<Extent>, Failed> {
        let range = within_a_window(range, STATUS_BYTES_MAX);
        let layers = self.written.on(&self.written.reads, move |overlay| Ok(overlay.extents(range))).await?;
        let data = match layers.iter().any(|(_, kind)| *kind == Kind::Below) {
            true => self.reader.told_of(range.start()).await.map_err(Failed::Point)?.0,
            false => Rc::default(),
        };
        Ok(extents(&layers, &data, self.reader.size(), extents_max))
    }
}

/// The first extents of `layers`, which adjoin, neighbors of one kind joined. `data` are the blocks below that may hold
/// anything but zeroes.
fn extents(
    layers: &[(ByteRange, Kind)],
    data: &DirtyBitmap,
    size: ByteCount,
    extents_max: usize,
) -> Vec<Extent> {
    let mut extents: Vec<Extent> = Vec::new();
    for (part, kind) in layers {
        let pieces: Vec<(ByteCount, bool)> = match kind {
            Kind::Below => split(data, *part, size, extents_max + 1).collect(),
            Kind::Data => vec![(part.count(), true)],
            Kind::Zero => vec![(part.count(), false)],
        };
        for (length, data) in pieces {
            let next = if data { Extent::data(length) } else { Extent::hole(length) };
            if !next.append_to(&mut extents, extents_max) {
                return extents;
            }
        }
    }
    extents
}

impl Export for WritableExport {
    fn info(&self) -> ExportInfo {
        self.info.clone()
    }

    fn submit(&self, command: Command, reply: Reply) {
        let range = command.range();
        match command {
            Command::Read { .. } => self.answer(reply, self.clone().read(range), Reply::data),
            Command::Write { data, fua, .. } => self
                .change(range, fua, reply, move |overlay, below| overlay.write(range.start(), &data, below)),
            Command::Trim { fua, .. } => {
                self.change(range, fua, reply, move |overlay, below| overlay.zero(range, false, below));
            }
            Command::WriteZeroes { fua, no_hole, .. } => {
                self.change(range, fua, reply, move |overlay, below| overlay.zero(range, no_hole, below));
            }
            Command::Flush => self.change(range, true, reply, |_, _| Ok(())),
            // What is read ahead is the reader's choice.
            Command::Cache { .. } => reply.done(),
            Command::BlockStatus { one, .. } => {
                let extents_max = if one { 1 } else { EXTENTS_MAX };
                let status = self.clone().status(range, extents_max);
                self.answer(reply, status, |reply, extents| reply.extents(&extents));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use backtide_units::{BlockIndex, BlockRange, ByteOffset};

    use super::*;

    #[test]
    fn what_was_written_lies_over_the_point_and_neighbors_are_joined() {
        let part = |from: u64, to: u64| {
            ByteRange::between(ByteOffset(from * BLOCK_SIZE), ByteOffset(to * BLOCK_SIZE))
        };
        let layers = [
            (part(0, 4), Kind::Below),
            (part(4, 6), Kind::Data),
            (part(6, 8), Kind::Zero),
            (part(8, 12), Kind::Below),
        ];
        let data = DirtyBitmap::of(BlockRange::between(BlockIndex(2), BlockIndex(9)));
        let told = |data: &DirtyBitmap, max| {
            let all = extents(&layers, data, ByteCount(12 * BLOCK_SIZE), max);
            all.iter().map(|extent| (extent.length.0 / BLOCK_SIZE, extent.zero)).collect::<Vec<_>>()
        };
        let whole = [(2, true), (4, false), (2, true), (1, false), (3, true)];
        assert_eq!(told(&data, 10), whole);
        for max in 1..5 {
            assert_eq!(told(&data, max), whole[..max]);
        }
        assert_eq!(told(&DirtyBitmap::new(), 10), [(4, true), (2, false), (6, true)]);
    }
}
