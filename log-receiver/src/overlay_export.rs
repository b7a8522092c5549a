//! A point of a disk with an overlay as a writable NBD export.
//!
//! Runs on the mounts' thread. Reads go to the readers' pool, everything that writes to a pool of its
//! own, so that a sync holds up no reader. All connections of the mount share the overlay: a flush on one
//! covers what was answered on all. Requests in flight together have no order, as NBD has it.

use std::sync::Arc;

use backtide_export::{Command, Export, ExportInfo, Extent, NbdError, Reply};
use backtide_overlay::{Base, BaseError, Kind, Overlay, OverlayError};
use backtide_recovery::{Allocation, LogError, View};
use backtide_units::{BlockRange, ByteCount, ByteRange};
use bytes::Bytes;

use crate::{
    disk::chain,
    overlays::Overlays,
    point_export::{EXTENTS_MAX, Reading, STATUS_BYTES_MAX},
    pool::Pool,
};

/// A point with an overlay.
pub(crate) struct OverlayExport {
    info: ExportInfo,
    layers: Layers,
    reading: Reading,
    writers: Pool,
    overlays: Overlays,
    /// What the overlay is called.
    id: String,
}

/// The overlay and the point below.
#[derive(Clone)]
struct Layers {
    overlay: Arc<Overlay>,
    view: View,
}

struct Below<'view>(&'view View);

impl Base for Below<'_> {
    fn read(&self, range: ByteRange) -> Result<Bytes, BaseError> {
        self.0.read(range).map_err(Into::into)
    }
}

impl OverlayExport {
    /// The overlay `id` of `overlays` over `view`.
    pub(crate) fn new(
        info: ExportInfo,
        view: View,
        overlay: Arc<Overlay>,
        reading: Reading,
        writers: Pool,
        (overlays, id): (Overlays, String),
    ) -> Self {
        Self { info, layers: Layers { overlay, view }, reading, writers, overlays, id }
    }

    /// Answers `reply` with what `work` yields on a pool.
    fn answer<T: Send + 'static>(
        &self,
        pool: &Pool,
        range: ByteRange,
        reply: Reply,
        work: impl FnOnce(Layers) -> Result<T, OverlayError> + Send + 'static,
        complete: impl FnOnce(Reply, T) + 'static,
    ) {
        let (pool, layers) = (pool.clone(), self.layers.clone());
        let (findings, point) = (self.reading.findings.clone(), self.reading.point.clone());
        let below = self.layers.view.clone();
        let (overlays, id) = (self.overlays.clone(), self.id.clone());
        tokio::task::spawn_local(async move {
            let error = match pool.run(move || work(layers)).await {
                Ok(Ok(value)) => return complete(reply, value),
                Ok(Err(error)) => error,
                Err(_) => return reply.fail_with(NbdError::Shutdown, "the receiver is shutting down"),
            };
            let mut why = chain(&error);
            match &error {
                OverlayError::Full { .. } | OverlayError::NoRoom(_) => {
                    tracing::warn!(mount = id, why, "a mount's overlay takes no more");
                    return reply.fail_with(NbdError::NoSpace, &why);
                }
                OverlayError::Base(error) => {
                    if let Some(LogError::Damaged { .. }) = error.downcast_ref() {
                        let place = why.clone();
                        // Noting it writes a file. A receiver that ends while this waits notes nothing.
                        let read = BlockRange::touched_by(range).bytes(below.disk_size());
                        let noted = pool.run(move || findings.note_of_read(&place, &below, read)).await;
                        why = noted.unwrap_or(why);
                    }
                    why = format!("cannot read {point}: {why}");
                }
                OverlayError::Io { .. }
                | OverlayError::Damaged { .. }
                | OverlayError::UnknownVersion { .. }
                | OverlayError::Poisoned(_) => overlays.note(&id, &why),
            }
            tracing::error!(mount = id, why, "a request to a mount's overlay failed");
            reply.fail_with(NbdError::Io, &why);
        });
    }

    /// Writes, and makes it durable when the client asks for that.
    fn change(
        &self,
        range: ByteRange,
        fua: bool,
        reply: Reply,
        work: impl FnOnce(&Overlay, &Below<'_>) -> Result<(), OverlayError> + Send + 'static,
    ) {
        let work = move |Layers { overlay, view }: Layers| {
            work(&overlay, &Below(&view))?;
            if fua { overlay.flush() } else { Ok(()) }
        };
        self.answer(&self.writers, range, reply, work, |reply, ()| reply.done());
    }
}

impl Export for OverlayExport {
    fn info(&self) -> ExportInfo {
        self.info.clone()
    }

    fn submit(&self, command: Command, reply: Reply) {
        let range = command.range();
        match command {
            Command::Read { .. } => self.answer(
                &self.reading.readers,
                range,
                reply,
                move |layers| layers.overlay.read(range, &Below(&layers.view)),
                Reply::data,
            ),
            Command::Write { data, fua, .. } => {
                self.change(range, fua, reply, move |overlay, below| {
                    overlay.write(range.start(), &data, below)
                });
            }
            Command::Trim { fua, .. } => {
                self.change(range, fua, reply, move |overlay, below| overlay.zero(range, false, below));
            }
            Command::WriteZeroes { fua, no_hole, .. } => {
                self.change(range, fua, reply, move |overlay, below| overlay.zero(range, no_hole, below));
            }
            Command::Flush => self.change(range, true, reply, |_, _| Ok(())),
            // Reading ahead is the kernel's work.
            Command::Cache { .. } => reply.done(),
            Command::BlockStatus { one, .. } => self.answer(
                &self.reading.readers,
                range,
                reply,
                move |layers| status(&layers, range, if one { 1 } else { EXTENTS_MAX }),
                |reply, extents| reply.extents(&extents),
            ),
        }
    }
}

/// The first extents of `range`, neighbors of one kind joined.
fn status(layers: &Layers, range: ByteRange, extents_max: usize) -> Result<Vec<Extent>, OverlayError> {
    let count = ByteCount(range.count().0.min(STATUS_BYTES_MAX));
    let range = ByteRange::new(range.start(), count).expect("a part of a range is a range");
    let mut extents: Vec<Extent> = Vec::new();
    'all: for (part, kind) in layers.overlay.extents(range) {
        let below = match kind {
            Kind::Data => vec![(part, Allocation::Data)],
            Kind::Zero => vec![(part, Allocation::Zero)],
            Kind::Below => layers.view.extents(part).map_err(|error| OverlayError::Base(error.into()))?,
        };
        for (part, allocation) in below {
            let next = match allocation {
                Allocation::Data => Extent::data(part.count()),
                Allocation::Zero => Extent::hole(part.count()),
            };
            if !next.append_to(&mut extents, extents_max) {
                break 'all;
            }
        }
    }
    Ok(extents)
}
