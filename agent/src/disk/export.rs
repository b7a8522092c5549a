//! The disk as NBD clients see it: reads go to the disk behind, changes through the filter.

use std::{cell::OnceCell, rc::Rc};

use backtide_export::{Command, Export, ExportInfo, ExportSummary, Exports, NbdError, Reply};
use backtide_io_filter::Change;
use backtide_units::ByteRange;

use super::{engine::Engine, refused::refuse};

/// The export of one disk.
pub(crate) struct DiskExport {
    engine: Rc<Engine>,
    info: ExportInfo,
    /// Whether zeroes that keep their space, and those that need not, are made fast; known from the
    /// first request on that asks.
    fast_zeroes: [OnceCell<bool>; 2],
}

/// The exports of one disk's sockets: itself, by its name and as the default.
pub(crate) struct OneExport(pub(crate) Rc<DiskExport>);

impl DiskExport {
    pub(crate) fn new(engine: Rc<Engine>) -> Rc<Self> {
        let (name, size) = engine.look(|filter| (filter.settings().name.clone(), filter.settings().size));
        let mut info = ExportInfo::new(name.as_str(), size);
        info.description = "protected by backtide".to_owned();
        info.block_sizes = engine.local.block_sizes();
        info.serves_any_range = engine.local.serves_any_range();
        // Promised is only that one that would be slow fails at once.
        info.fast_zero = true;
        Rc::new(Self { engine, info, fast_zeroes: Default::default() })
    }

    /// Refused before the filter sees it: nothing was tried, so nothing is known to differ.
    fn zeroes_fast(&self, may_unmap: bool) -> bool {
        *self.fast_zeroes[usize::from(may_unmap)].get_or_init(|| self.engine.local.zeroes_fast(may_unmap))
    }

    fn block_status(&self, range: ByteRange, one: bool, reply: Reply) {
        let engine = Rc::clone(&self.engine);
        tokio::task::spawn_local(async move {
            match engine.local.extents(range, one).await {
                Ok(extents) => reply.extents(&extents),
                Err(failure) => refuse(reply, failure),
            }
        });
    }
}

impl Export for DiskExport {
    fn info(&self) -> ExportInfo {
        self.info.clone()
    }

    fn submit(&self, command: Command, reply: Reply) {
        let range = command.range();
        match command {
            Command::Read { .. } => self.engine.read(range, reply),
            Command::Write { data, fua, .. } => self.engine.submit(Change::Write { range, data, fua }, reply),
            Command::Trim { fua, .. } => self.engine.submit(Change::Zero { range, trim: true, fua }, reply),
            Command::WriteZeroes { fast: true, no_hole, .. } if !self.zeroes_fast(!no_hole) => {
                reply.fail_with(NbdError::NotSupported, "zeroes are not made fast here");
            }
            Command::WriteZeroes { fua, no_hole, .. } => {
                self.engine.submit(Change::Zero { range, trim: !no_hole, fua }, reply);
            }
            Command::Flush => self.engine.submit(Change::Flush, reply),
            Command::Cache { .. } => {
                self.engine.local.read_ahead(range);
                reply.done();
            }
            Command::BlockStatus { one, .. } => self.block_status(range, one, reply),
        }
    }
}

impl Exports for OneExport {
    fn find(&self, name: &str) -> Option<Rc<dyn Export>> {
        (name.is_empty() || name == self.0.info.name).then(|| Rc::clone(&self.0) as Rc<dyn Export>)
    }

    fn list(&self) -> Vec<ExportSummary> {
        vec![ExportSummary { name: self.0.info.name.clone(), description: self.0.info.description.clone() }]
    }
}
