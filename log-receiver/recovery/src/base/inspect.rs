//! The base of a log for people.

use std::{io, path::Path};

use backtide_storage::{Storage, read_file};

use super::{FILE_BYTES_MAX, codec};
use crate::LogError;

/// Writes a readable listing of one base; damage is a line of the listing. Whether there is none.
///
/// # Errors
/// Of reading the file and of writing to `out`; a version that this program does not know.
pub fn inspect_base(storage: &dyn Storage, path: &Path, out: &mut dyn io::Write) -> io::Result<bool> {
    let name = storage.display(path);
    writeln!(out, "{}", name.display())?;
    let base = match codec::decode(&read_file(storage, path, FILE_BYTES_MAX)?, &name) {
        Ok(base) => base,
        Err(error @ LogError::Damaged { .. }) => return writeln!(out, "{error}").map(|()| false),
        Err(error) => return Err(io::Error::other(error)),
    };
    writeln!(
        out,
        "base {} of disk {}, history {}",
        base.generation, base.identity.disk, base.identity.history
    )?;
    match base.floor {
        Some(floor) => {
            writeln!(out, "the log begins with segment {}, entry {}", base.first_segment, base.first_seq)?;
            writeln!(out, "every point from {}", floor.at)?;
        }
        None => writeln!(out, "the log has ended, and no segment of it is read any more")?,
    }
    for kept in &base.kept {
        writeln!(out, "single point {}", kept.at)?;
    }
    let timeline = &base.timeline;
    let (intervals, holes, marks) = (timeline.intervals.len(), timeline.holes.len(), timeline.marks.len());
    writeln!(
        out,
        "before it: {intervals} intervals, {holes} holes, {marks} marks, {} records",
        timeline.records
    )
    .map(|()| true)
}
