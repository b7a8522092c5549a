//! The small files of a store for people: what each says, and whether it is what was written.

use std::{io, path::Path};

use backtide_recovery::LogError;
use backtide_storage::{Storage, read_file};
use backtide_units::ByteCount;

use crate::{
    sealed_json::{self, SealedError},
    store_file,
    watermark::{self, Lost, Watermark},
};

/// How the mark beside a log begins that says how far it is durable.
pub const DURABLE_MAGIC: [u8; 8] = *watermark::MAGIC;

/// No JSON of a store is longer.
const JSON_BYTES_MAX: ByteCount = ByteCount(256 << 20);

/// Writes a readable listing of any JSON file of a store; damage is a line of the listing. Whether there is none.
///
/// # Errors
/// Of reading the file and of writing to `out`.
pub fn inspect_json(storage: &dyn Storage, path: &Path, out: &mut dyn io::Write) -> io::Result<bool> {
    let name = storage.display(path);
    writeln!(out, "{}", name.display())?;
    let bytes = read_file(storage, path, JSON_BYTES_MAX)?;
    // Its seal is a field, for it is older than the others'.
    let is_store = path.file_name().is_some_and(|name| name == store_file::FILE);
    if is_store || sealed_json::first_word(&bytes).as_deref() == Some(store_file::MAGIC) {
        return match store_file::parse(&name, &bytes) {
            Ok(store) => {
                writeln!(out, "store {}, version {}", store.0, store_file::STORE_VERSION).map(|()| true)
            }
            Err(error) => writeln!(out, "{error}").map(|()| false),
        };
    }
    match sealed_json::open_any(&bytes) {
        Ok((magic, version, content)) => {
            writeln!(out, "{magic}, version {version}")?;
            let text = serde_json::to_string_pretty(&content).map_err(io::Error::other)?;
            writeln!(out, "{text}").map(|()| true)
        }
        Err(why) => {
            let damaged = SealedError::Damaged { file: name.display().to_string(), why };
            writeln!(out, "{damaged}").map(|()| false)
        }
    }
}

/// The same of the mark beside a log that says how far it is durable.
///
/// # Errors
/// As [`inspect_json`].
pub fn inspect_durable(storage: &dyn Storage, path: &Path, out: &mut dyn io::Write) -> io::Result<bool> {
    let name = storage.display(path);
    writeln!(out, "{}", name.display())?;
    let found = Watermark::at(storage, path).map_err(|error| match error {
        LogError::Io { source, .. } => source,
        newer => io::Error::other(newer),
    });
    let Some((history, noted)) = found? else {
        return writeln!(out, "{} is damaged: it holds no mark", name.display()).map(|()| false);
    };
    writeln!(out, "the log of history {history}")?;
    writeln!(out, "durable up to entry {}, lsn {}", noted.durable.seq, noted.durable.lsn)?;
    if let Some(Lost { through, is_compared, in_doubt }) = noted.lost {
        let (seq, lsn) = (through.seq, through.lsn);
        let since =
            if is_compared { "everything is being compared since" } else { "nothing was compared since" };
        match in_doubt {
            true => writeln!(out, "what stands up to entry {seq}, lsn {lsn} is in doubt, and {since}")?,
            false => writeln!(
                out,
                "it was durable up to entry {seq}, lsn {lsn} once: that end is lost, and {since}"
            )?,
        }
    }
    Ok(true)
}
