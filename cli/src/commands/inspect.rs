//! `backtide inspect`: a file of the store in readable form.

use std::{io, path::PathBuf, sync::Arc};

use backtide_storage::{RealStorage, Storage};
use clap::Args;

use crate::{
    context::Context,
    ending::{Ending, Failure, failed, io_failure, wrong_usage},
};

/// `backtide inspect`
#[derive(Args, Debug)]
pub(crate) struct Inspect {
    /// A segment file of a receiver's store (*.seg); a receiver may be running on it
    file: PathBuf,
}

impl Inspect {
    /// Prints the listing. Damage is a line of it, not an error.
    pub(crate) fn run(self, context: &Context) -> Result<Ending, Failure> {
        let path =
            std::path::absolute(&self.file).map_err(|error| io_failure(self.file.display(), &error))?;
        if context.json() {
            return Err(wrong_usage("inspect prints for people only: the bytes are described in FORMAT.md"));
        }
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(wrong_usage(format!("{} is no file", path.display())));
        };
        let opened = RealStorage::open(parent)
            .map_err(|error| io_failure(format_args!("open {}", parent.display()), &error))?;
        let storage: Arc<dyn Storage> = Arc::new(opened);
        let mut out = io::BufWriter::new(io::stdout().lock());
        let listed = backtide_segment::inspect(storage.as_ref(), name.as_ref(), &mut out)
            .and_then(|()| io::Write::flush(&mut out));
        match listed {
            Ok(()) => Ok(Ending::Done),
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Err(Failure::ClosedPipe),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Err(io_failure(self.file.display(), &error))
            }
            Err(error) => Err(failed(format!("inspect {}: {error}", self.file.display()))),
        }
    }
}
