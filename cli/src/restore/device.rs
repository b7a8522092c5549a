//! A block device as a target. It is opened exclusively: what is mounted is never overwritten, nor what an agent has
//! attached. It is locked as well, as images of all kinds are: so each tells who has it.

use std::{
    fs::File,
    io::{self, Seek, SeekFrom},
    os::unix::fs::FileExt,
    path::Path,
    sync::Arc,
};

use backtide_control::{ApiError, ErrorCode};
use backtide_units::{ByteCount, ByteRange};
use rustix::fs::{FallocateFlags, Mode, OFlags, fallocate, open};

use crate::{
    ending::{Failure, io_failure},
    restore::{held::Held, open_file::OpenFile, target::enough_room},
};

/// Zeroes are written in steps of this where the device has nothing better.
const ZERO_STEP: ByteCount = ByteCount(1 << 20);

/// An open block device.
#[derive(Clone)]
pub(crate) struct Device {
    file: OpenFile,
    _held: Arc<Held>,
}

impl Device {
    /// Opens the device for a point of `needed` bytes.
    pub(super) fn open(path: &Path, held: Held, needed: ByteCount) -> Result<Self, Failure> {
        let failed = |error: io::Error| io_failure(format_args!("open {}", path.display()), &error);
        // On a block device O_EXCL without O_CREAT means: fail when it is mounted or held.
        let flags = OFlags::RDWR | OFlags::EXCL | OFlags::CLOEXEC;
        let file = match open(path, flags, Mode::empty()) {
            Ok(file) => File::from(file),
            Err(rustix::io::Errno::BUSY) => {
                let message = format!("{} is in use: it is mounted, or something holds it", path.display());
                return Err(ApiError::new(ErrorCode::Busy, message).into());
            }
            Err(error) => return Err(failed(error.into())),
        };
        let size = (&file).seek(SeekFrom::End(0)).map_err(failed)?;
        enough_room(path.display(), ByteCount(size), needed)?;
        Ok(Self { file: OpenFile::new(file, path), _held: Arc::new(held) })
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        self.file.path()
    }

    /// Its content.
    pub(super) fn content(&self) -> &OpenFile {
        &self.file
    }

    pub(super) async fn zero(&self, range: ByteRange) -> Result<(), Failure> {
        self.file.blocking("zero", move |file| zero(file, range)).await
    }
}

/// Makes a range read as zeroes, by the device's own means if it has some.
pub(super) fn zero(file: &File, range: ByteRange) -> io::Result<()> {
    let (start, count) = (range.start().0, range.count().0);
    match fallocate(file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, start, count) {
        Ok(()) => return Ok(()),
        Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::INVAL | rustix::io::Errno::NODEV) => {}
        Err(error) => return Err(error.into()),
    }
    let zeroes = vec![0; ZERO_STEP.0 as usize];
    for step in range.split_at_multiples(ZERO_STEP) {
        file.write_all_at(&zeroes[..step.count().0 as usize], step.start().0)?;
    }
    Ok(())
}
