//! `backtide inspect`: a file of the store in readable form.

use std::{io, path::PathBuf};

use backtide_storage::RealStorage;
use clap::Args;
use serde::Serialize;

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

/// The JSON of the command. The lines are for people.
#[derive(Debug, Serialize)]
struct Listing {
    file: PathBuf,
    lines: Vec<String>,
}

impl Inspect {
    /// Prints the listing. Damage is a line of it, not an error.
    pub(crate) fn run(self, context: &Context) -> Result<Ending, Failure> {
        if !context.json() {
            let mut out = io::BufWriter::new(io::stdout().lock());
            return self.list(&mut out).map(|()| Ending::Done);
        }
        let mut text = Vec::new();
        self.list(&mut text)?;
        let lines = String::from_utf8_lossy(&text).lines().map(str::to_owned).collect();
        context.print(&Listing { file: self.file, lines }, String::new)?;
        Ok(Ending::Done)
    }

    fn list(&self, out: &mut dyn io::Write) -> Result<(), Failure> {
        let name = self.file.display();
        let path = std::path::absolute(&self.file).map_err(|error| io_failure(name, &error))?;
        let (Some(parent), Some(file)) = (path.parent(), path.file_name()) else {
            return Err(wrong_usage(format!("{} is no file", self.file.display())));
        };
        // Opening a storage makes its directory; looking at a file must not.
        let found = std::fs::metadata(&path).map_err(|error| io_failure(self.file.display(), &error))?;
        if !found.is_file() {
            return Err(wrong_usage(format!(
                "{} is no file: name a *.seg file of a store",
                self.file.display()
            )));
        }
        let storage = RealStorage::open(parent)
            .map_err(|error| io_failure(format_args!("open {}", parent.display()), &error))?;
        match backtide_segment::inspect(&storage, file.as_ref(), out).and_then(|()| out.flush()) {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Err(Failure::ClosedPipe),
            Err(error) => Err(failed(format!("inspect {}: {error}", self.file.display()))),
        }
    }
}
