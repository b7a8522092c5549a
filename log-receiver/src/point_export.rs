//! A point of a disk as a read-only NBD export.
//!
//! Runs on the mounts' thread; every read goes to the readers' pool ([`ReadQueue`]), so that one slow client holds
//! up neither other mounts nor ingest. The view is a snapshot: it reads the same however the log
//! grows on. Damage is answered with EIO and told in the log with its place, never with data.

use std::{rc::Rc, sync::Arc};

use backtide_export::{Command, Export, ExportInfo, ExportSummary, Exports, Extent, NbdError, Reply};
use backtide_recovery::{Allocation, LogError, View};
use backtide_units::{ByteCount, ByteRange};

use roaring::RoaringTreemap;

use crate::{changes::dirty_extents, disk::chain, findings::DiskFindings, pool::Pool, read_queue::ReadQueue};

/// One question for block status looks no further than this.
pub(crate) const STATUS_BYTES_MAX: u64 = 1 << 30;

/// The most extents of one answer.
pub(crate) const EXTENTS_MAX: usize = 4096;

/// A point of a disk.
pub(crate) struct PointExport {
    info: ExportInfo,
    view: View,
    reading: Rc<Reading>,
    reads: ReadQueue,
    /// The blocks that changed since another point.
    changed: Option<Arc<RoaringTreemap>>,
}

/// How a point is read.
pub(crate) struct Reading {
    /// Of the mount.
    pub(crate) name: String,
    /// The point, for people: the disk, LSN and time.
    pub(crate) point: String,
    pub(crate) readers: Pool,
    /// Where damage is noted that a read meets.
    pub(crate) findings: DiskFindings,
}

/// The one export of a mount: under its name, and as the default.
pub(crate) struct OneExport(pub(crate) Rc<dyn Export>);

impl PointExport {
    pub(crate) fn new(
        info: ExportInfo,
        view: View,
        reading: Reading,
        changed: Option<Arc<RoaringTreemap>>,
    ) -> Self {
        let info = ExportInfo { read_only: true, trim: false, write_zeroes: false, ..info };
        let reading = Rc::new(reading);
        let reads = ReadQueue::new(view.clone(), Rc::clone(&reading));
        Self { info, view, reading, reads, changed }
    }

    /// Answers `reply` with what `work` yields of a range on the readers' pool.
    fn answer<T: Send + 'static>(
        &self,
        range: ByteRange,
        reply: Reply,
        work: impl FnOnce(View) -> Result<T, LogError> + Send + 'static,
        complete: impl FnOnce(Reply, T) + 'static,
    ) {
        let (view, reading) = (self.view.clone(), Rc::clone(&self.reading));
        tokio::task::spawn_local(async move {
            let met = (view.clone(), range);
            match reading.readers.run(move || work(view)).await {
                Ok(Ok(value)) => complete(reply, value),
                Ok(Err(error)) => reading.refuse(reply, met, error).await,
                Err(_) => reply.fail_with(NbdError::Shutdown, "the receiver is shutting down"),
            }
        });
    }
}

impl Reading {
    /// Answers that a range of the point cannot be read, and tells why in the log; damage is noted, with the points that it
    /// touches.
    pub(crate) async fn refuse(&self, reply: Reply, (view, range): (View, ByteRange), error: LogError) {
        let mut why = chain(&error);
        if matches!(error, LogError::Damaged { .. }) {
            let (place, findings) = (why.clone(), self.findings.clone());
            // Noting it writes a file. A receiver that ends while this waits notes nothing.
            let noted = self.readers.run(move || findings.note_of_read(&place, &view, range)).await;
            why = noted.unwrap_or(why);
        }
        let why = format!("cannot read {}: {why}", self.point);
        tracing::error!(mount = self.name, why, "cannot read a mounted point");
        reply.fail_with(NbdError::Io, &why);
    }
}

impl Export for PointExport {
    fn info(&self) -> ExportInfo {
        self.info.clone()
    }

    fn submit(&self, command: Command, reply: Reply) {
        let range = command.range();
        match command {
            Command::Read { .. } => self.reads.push(range, reply),
            Command::BlockStatus { one, .. } => {
                let extents_max = if one { 1 } else { EXTENTS_MAX };
                let Some(changed) = self.changed.clone() else {
                    return self.answer(
                        range,
                        reply,
                        move |view| status(&view, range, extents_max),
                        |reply, extents| reply.extents(&extents),
                    );
                };
                let both = move |view: View| {
                    let dirty = dirty_extents(&changed, first_part(range), extents_max);
                    Ok((status(&view, range, extents_max)?, dirty))
                };
                self.answer(range, reply, both, |reply, (extents, dirty)| reply.statuses(&extents, &dirty));
            }
            // Nothing is ever written, so everything is flushed; reading ahead is the kernel's work.
            Command::Flush | Command::Cache { .. } => reply.done(),
            Command::Write { .. } | Command::Trim { .. } | Command::WriteZeroes { .. } => {
                reply.fail(NbdError::NotPermitted);
            }
        }
    }
}

/// The first extents of `range`, neighbors of one kind joined.
fn status(view: &View, range: ByteRange, extents_max: usize) -> Result<Vec<Extent>, LogError> {
    let range = first_part(range);
    let mut extents: Vec<Extent> = Vec::new();
    for (piece, allocation) in view.extents(range)? {
        let next = match allocation {
            Allocation::Data => Extent::data(piece.count()),
            Allocation::Zero => Extent::hole(piece.count()),
        };
        if !next.append_to(&mut extents, extents_max) {
            break;
        }
    }
    Ok(extents)
}

/// As much of `range` as one question looks at.
fn first_part(range: ByteRange) -> ByteRange {
    let count = ByteCount(range.count().0.min(STATUS_BYTES_MAX));
    ByteRange::new(range.start(), count).expect("a part of a range is a range")
}

impl Exports for OneExport {
    fn find(&self, name: &str) -> Option<Rc<dyn Export>> {
        (name.is_empty() || name == self.0.info().name).then(|| Rc::clone(&self.0))
    }

    fn list(&self) -> Vec<ExportSummary> {
        let ExportInfo { name, description, .. } = self.0.info();
        vec![ExportSummary { name, description }]
    }
}
