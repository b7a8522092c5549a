//! A raw file as an export, served inline by pread and pwrite through the page cache: the
//! simplest real disk, for tests with foreign clients and for measuring the driver alone.

use std::{cell::RefCell, collections::VecDeque, fs::File, io, os::unix::fs::FileExt, path::Path, rc::Rc};

use backtide_export::{Command, Export, ExportInfo, ExportSummary, Exports, Extent, NbdError, Reply};
use backtide_units::{ByteCount, ByteRange};
use bytes::{Bytes, BytesMut};
use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek};

/// A raw file.
pub(crate) struct FileExport {
    file: File,
    info: ExportInfo,
    buffers: RefCell<Buffers>,
}

impl FileExport {
    /// Serves the file at `path` under `name`.
    pub(crate) fn open(name: &str, path: &Path, read_only: bool) -> io::Result<Rc<Self>> {
        let file = File::options().read(true).write(!read_only).open(path)?;
        let mut info = ExportInfo::new(name, ByteCount(file.metadata()?.len()));
        info.read_only = read_only;
        info.fast_zero = true;
        info.description = format!("the file {}", path.display());
        Ok(Rc::new(Self { file, info, buffers: RefCell::default() }))
    }

    fn run(&self, command: Command) -> io::Result<Answer> {
        let range = command.range();
        match command {
            Command::Read { offset, length, .. } => {
                let mut buffer = self.buffers.borrow_mut().take(length.0 as usize);
                self.file.read_exact_at(&mut buffer, offset.0)?;
                return Ok(Answer::Data(self.buffers.borrow_mut().lend(buffer)));
            }
            Command::Write { offset, data, fua } => {
                self.file.write_all_at(&data, offset.0)?;
                self.sync(fua)?;
            }
            Command::Flush => self.sync(true)?,
            Command::WriteZeroes { fua, no_hole, fast: true, .. } => {
                let how = if no_hole { FallocateFlags::ZERO_RANGE } else { FallocateFlags::PUNCH_HOLE };
                if !range.is_empty() {
                    // Where the file system cannot, the error says that it would not be fast.
                    let how = how | FallocateFlags::KEEP_SIZE;
                    fallocate(&self.file, how, range.start().0, range.count().0)?;
                }
                self.sync(fua)?;
            }
            Command::Trim { fua, .. } | Command::WriteZeroes { fua, no_hole: false, .. } => {
                self.zero(range, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE)?;
                self.sync(fua)?;
            }
            Command::WriteZeroes { fua, no_hole: true, .. } => {
                self.write_out_zeroes(range)?;
                self.sync(fua)?;
            }
            Command::Cache { .. } => {}
            Command::BlockStatus { .. } => return Ok(Answer::Extents(self.extents(range)?)),
        }
        Ok(Answer::Done)
    }

    fn sync(&self, wanted: bool) -> io::Result<()> {
        if wanted { self.file.sync_data() } else { Ok(()) }
    }

    fn zero(&self, range: ByteRange, how: FallocateFlags) -> io::Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        match fallocate(&self.file, how, range.start().0, range.count().0) {
            Err(rustix::io::Errno::OPNOTSUPP) => self.write_out_zeroes(range),
            done => Ok(done?),
        }
    }

    fn write_out_zeroes(&self, range: ByteRange) -> io::Result<()> {
        let zeroes = vec![0; 1 << 20];
        for piece in range.split_at_multiples(ByteCount(1 << 20)) {
            self.file.write_all_at(&zeroes[..piece.count().0 as usize], piece.start().0)?;
        }
        Ok(())
    }

    fn extents(&self, range: ByteRange) -> io::Result<Vec<Extent>> {
        let mut extents = Vec::new();
        let mut at = range.start().0;
        let end = range.end().0;
        while at < end {
            let data = match seek(&self.file, SeekFrom::Data(at)) {
                Err(rustix::io::Errno::NXIO) => end,
                found => found?.min(end),
            };
            if data > at {
                extents.push(Extent::hole(ByteCount(data - at)));
            }
            if data < end {
                let hole = seek(&self.file, SeekFrom::Hole(data))?.min(end);
                extents.push(Extent::data(ByteCount(hole - data)));
                at = hole;
            } else {
                at = end;
            }
        }
        Ok(extents)
    }
}

enum Answer {
    Done,
    Data(Bytes),
    Extents(Vec<Extent>),
}

impl Export for FileExport {
    fn info(&self) -> ExportInfo {
        self.info.clone()
    }

    fn submit(&self, command: Command, reply: Reply) {
        match self.run(command) {
            Ok(Answer::Done) => reply.done(),
            Ok(Answer::Data(data)) => reply.data(data),
            Ok(Answer::Extents(extents)) => reply.extents(&extents),
            Err(error) => reply.fail_with(NbdError::from(&error), &error.to_string()),
        }
    }
}

/// Read buffers that come back: a handle is kept on each one lent out, and when it is the last
/// one left, the buffer is used again without being zeroed.
#[derive(Default)]
struct Buffers {
    lent: VecDeque<Bytes>,
}

impl Buffers {
    fn take(&mut self, length: usize) -> BytesMut {
        if self.lent.front().is_some_and(|oldest| oldest.is_unique() && oldest.len() == length)
            && let Some(Ok(buffer)) = self.lent.pop_front().map(Bytes::try_into_mut)
        {
            return buffer;
        }
        BytesMut::zeroed(length)
    }

    fn lend(&mut self, buffer: BytesMut) -> Bytes {
        let buffer = buffer.freeze();
        if self.lent.len() >= 64 {
            self.lent.pop_front();
        }
        self.lent.push_back(buffer.clone());
        buffer
    }
}

/// Exports that never change; the first is the default.
pub(crate) struct Fixed(pub(crate) Vec<(String, Rc<dyn Export>)>);

impl Fixed {
    /// One export, under its own name and as the default.
    pub(crate) fn one(export: Rc<dyn Export>) -> Rc<Self> {
        Rc::new(Self(vec![(export.info().name, export)]))
    }
}

impl Exports for Fixed {
    fn find(&self, name: &str) -> Option<Rc<dyn Export>> {
        let mut exports = self.0.iter();
        let found = exports.find(|(own, _)| name.is_empty() || own == name);
        found.map(|(_, export)| Rc::clone(export))
    }

    fn list(&self) -> Vec<ExportSummary> {
        let summary = |(name, export): &(String, Rc<dyn Export>)| ExportSummary {
            name: name.clone(),
            description: export.info().description,
        };
        self.0.iter().map(summary).collect()
    }
}
