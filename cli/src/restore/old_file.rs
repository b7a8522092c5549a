//! An old copy as a target: a file that exists, changed in place where it differs from the point.
//!
//! It holds neither the old nor the new content while that goes on, and says so in no way: whoever
//! asks for it knows. It is locked meanwhile, so that two restores never write to one file.

use std::{
    fs::{File, Metadata},
    io,
    path::Path,
};

use backtide_control::{ApiError, ErrorCode};
use backtide_export::Extent;
use backtide_units::{ByteCount, ByteRange};

use crate::{
    ending::{Failure, io_failure},
    restore::{device, file::allocated, leftovers, open_file::OpenFile},
};

/// An open old copy.
#[derive(Clone)]
pub(crate) struct OldFile {
    file: OpenFile,
    size: ByteCount,
}

impl OldFile {
    /// Opens the file; it is not changed by that.
    pub(crate) fn open(path: &Path, found: &Metadata, size: ByteCount) -> Result<Self, Failure> {
        let failed = |error: io::Error| io_failure(format_args!("open {}", path.display()), &error);
        assert!(found.is_file(), "devices are targets of their own");
        let file = File::options().read(true).write(true).open(path).map_err(failed)?;
        if leftovers::hold(&file).is_err() {
            let message = format!("{} is locked: something else writes to it", path.display());
            return Err(ApiError::new(ErrorCode::Locked, message).into());
        }
        Ok(Self { file: OpenFile::new(file, path), size })
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        self.file.path()
    }

    pub(super) fn content(&self) -> &OpenFile {
        &self.file
    }

    /// Gives it the point's size.
    pub(super) async fn prepare(&self) -> Result<(), Failure> {
        let size = self.size;
        self.file.blocking("resize", move |file| file.set_len(size.0)).await
    }

    pub(super) async fn zero(&self, range: ByteRange) -> Result<(), Failure> {
        self.file.blocking("zero", move |file| device::zero(file, range)).await
    }

    pub(super) async fn extents(&self, range: ByteRange) -> Result<Vec<Extent>, Failure> {
        self.file.blocking("look for data in", move |file| allocated(file, range)).await
    }
}
