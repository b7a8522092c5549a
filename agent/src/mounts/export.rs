//! A mounted point as a read-only NBD export, and what writable ones have in common with it.

use std::rc::Rc;

use backtide_export::{
    Command, DirtyExtent, Export, ExportInfo, ExportSummary, Exports, Extent, NbdError, Reply,
};
use backtide_tracking::DirtyBitmap;
use backtide_units::{BlockRange, ByteCount, ByteOffset, ByteRange};

use super::{map::within_a_window, reader::Reader};
use crate::disk::source::FetchError;

/// One question for block status looks no further than this.
pub(super) const STATUS_BYTES_MAX: u64 = 1 << 30;

/// The most extents of one answer.
pub(super) const EXTENTS_MAX: usize = 4096;

/// A point.
pub(super) struct PointExport {
    info: ExportInfo,
    reader: Rc<Reader>,
}

/// The one export of a mount: under its name, and as the default.
pub(super) struct OneExport(pub(super) Rc<dyn Export>);

impl PointExport {
    pub(super) fn new(info: ExportInfo, reader: Rc<Reader>) -> Self {
        let info = ExportInfo { read_only: true, trim: false, write_zeroes: false, ..info };
        Self { info, reader }
    }

    fn read(&self, range: ByteRange, reply: Reply) {
        let (reader, name) = (Rc::clone(&self.reader), self.info.name.clone());
        tokio::task::spawn_local(async move {
            match reader.read(range).await {
                Ok(bytes) => reply.data(bytes),
                Err(error) => {
                    tracing::error!(mount = name, %range, why = %error, "cannot read a mounted point");
                    reply.fail_with(NbdError::Io, &fetch_text(&error));
                }
            }
        });
    }

    fn status(&self, range: ByteRange, one: bool, reply: Reply) {
        let extents_max = if one { 1 } else { EXTENTS_MAX };
        let range = within_a_window(range, STATUS_BYTES_MAX);
        let (reader, name) = (Rc::clone(&self.reader), self.info.name.clone());
        tokio::task::spawn_local(async move {
            match reader.told_of(range.start()).await {
                Ok((data, changed)) => {
                    let size = reader.size();
                    let extents: Vec<Extent> = split(&data, range, size, extents_max)
                        .map(|(length, data)| if data { Extent::data(length) } else { Extent::hole(length) })
                        .collect();
                    let Some(changed) = changed else { return reply.extents(&extents) };
                    let dirty: Vec<DirtyExtent> = split(&changed, range, size, extents_max)
                        .map(|(length, dirty)| DirtyExtent { length, dirty })
                        .collect();
                    reply.statuses(&extents, &dirty);
                }
                Err(error) => {
                    tracing::error!(mount = name, %range, why = %error, "cannot tell what a mounted point holds");
                    reply.fail_with(NbdError::Io, &fetch_text(&error));
                }
            }
        });
    }
}

/// Why a point cannot be read, for a client.
pub(super) fn fetch_text(error: &FetchError) -> String {
    match error {
        FetchError::Unreachable(why) => format!("the receiver cannot be read: {why}"),
        FetchError::Damaged(why) | FetchError::Refused(why) => why.clone(),
    }
}

/// The first `max` stretches of `range`, each in or not in `blocks`: they adjoin, and two that follow each other differ.
pub(super) fn split(
    blocks: &DirtyBitmap,
    range: ByteRange,
    size: ByteCount,
    max: usize,
) -> impl Iterator<Item = (ByteCount, bool)> {
    let mut at = range.start();
    let touched = BlockRange::touched_by(range);
    let runs = blocks.runs(touched, touched.count());
    let mut runs = runs.filter_map(move |run| run.bytes(size).intersection(range)).peekable();
    let next = move || {
        if at >= range.end() {
            return None;
        }
        let (end, within) = match runs.peek() {
            Some(run) if run.start() > at => (run.start(), false),
            Some(_) => (runs.next().map_or(range.end(), ByteRange::end), true),
            None => (range.end(), false),
        };
        let length = ByteCount(end.0 - at.0);
        at = ByteOffset(end.0);
        Some((length, within))
    };
    std::iter::from_fn(next).take(max)
}

impl Export for PointExport {
    fn info(&self) -> ExportInfo {
        self.info.clone()
    }

    fn submit(&self, command: Command, reply: Reply) {
        let range = command.range();
        match command {
            Command::Read { .. } => self.read(range, reply),
            Command::BlockStatus { one, .. } => self.status(range, one, reply),
            // Nothing is ever written, so everything is flushed; what is read ahead is the reader's choice.
            Command::Flush | Command::Cache { .. } => reply.done(),
            Command::Write { .. } | Command::Trim { .. } | Command::WriteZeroes { .. } => {
                reply.fail(NbdError::NotPermitted);
            }
        }
    }
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

#[cfg(test)]
mod tests {
    use backtide_units::BlockIndex;

    use super::*;

    #[test]
    fn stretches_adjoin_and_alternate() {
        let mut blocks = DirtyBitmap::new();
        for (start, end) in [(1, 3), (5, 6), (9, 10)] {
            blocks.insert(BlockRange::between(BlockIndex(start), BlockIndex(end)));
        }
        let size = ByteCount(9 * 4_096 + 512);
        let all = |start, end, max| {
            let range = ByteRange::between(ByteOffset(start), ByteOffset(end));
            split(&blocks, range, size, max).map(|(length, within)| (length.0, within)).collect::<Vec<_>>()
        };
        let whole =
            [(4_096, false), (8_192, true), (8_192, false), (4_096, true), (12_288, false), (512, true)];
        assert_eq!(all(0, size.0, 10), whole);
        assert_eq!(all(0, size.0, 2), whole[..2]);
        assert_eq!(all(5_000, 5_512, 10), [(512, true)]);
        assert_eq!(all(12_000, 13_000, 10), [(288, true), (712, false)]);
        assert_eq!(all(24_576, 28_672, 10), [(4_096, false)]);
    }
}
