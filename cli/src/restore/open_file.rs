//! What files and block devices have in common as targets: reading and writing at a place, on the
//! runtime's threads for what blocks; around the page cache where that can be.

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use backtide_units::ByteRange;
use bytes::Bytes;
use rustix::fs::{Advice, fadvise};

use crate::{
    ending::{Failure, io_failure},
    restore::direct::Direct,
};

/// An open file or device, with the name people know it by.
#[derive(Clone)]
pub(super) struct OpenFile {
    file: Arc<File>,
    direct: Option<Arc<Direct>>,
    path: PathBuf,
}

impl OpenFile {
    pub(super) fn new(file: File, path: &Path) -> Self {
        let direct = Direct::of(&file).map(Arc::new);
        Self { file: Arc::new(file), direct, path: path.to_owned() }
    }

    /// Whether what was written can be read from the device at once.
    pub(super) fn is_direct(&self) -> bool {
        self.direct.as_ref().is_some_and(|direct| direct.is_told())
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) async fn write(&self, range: ByteRange, data: Bytes) -> Result<(), Failure> {
        let direct = self.direct.clone();
        let write = move |file: &File| match direct {
            Some(direct) => direct.write(file, range, &data),
            None => file.write_all_at(&data, range.start().0),
        };
        self.blocking("write", write).await
    }

    pub(super) async fn read(&self, range: ByteRange) -> Result<Bytes, Failure> {
        let direct = self.direct.clone();
        let read = move |file: &File| match direct {
            Some(direct) => Ok(direct.read(range)?.freeze()),
            None => {
                let mut data = vec![0; range.count().0 as usize];
                file.read_exact_at(&mut data, range.start().0)?;
                Ok(data.into())
            }
        };
        self.blocking("read", read).await
    }

    pub(super) async fn sync(&self) -> Result<(), Failure> {
        let sync = |file: &File| {
            file.sync_all()?;
            // What is read back to verify shall come from the disk, not from memory. It is advice:
            // where it is not taken, the comparison is still made.
            let _ = fadvise(file, 0, None, Advice::DontNeed);
            Ok(())
        };
        self.blocking("sync", sync).await
    }

    /// Runs what blocks; `what` is for the error.
    pub(super) async fn blocking<T: Send + 'static>(
        &self,
        what: &'static str,
        work: impl FnOnce(&File) -> io::Result<T> + Send + 'static,
    ) -> Result<T, Failure> {
        let (file, path) = (Arc::clone(&self.file), self.path.clone());
        let failed = |error: io::Error| io_failure(format_args!("{what} {}", path.display()), &error);
        match tokio::task::spawn_blocking(move || work(&file)).await {
            Ok(result) => result.map_err(failed),
            // Only a panic of the work or the runtime's end.
            Err(error) => Err(failed(io::Error::other(error))),
        }
    }
}
