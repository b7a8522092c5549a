//! A pack for people: its chunks, and what is wrong with them.

use std::{io, path::Path};

use backtide_storage::Storage;

use crate::{
    ImageError,
    chunk::{ChunkRef, Kind},
    pack::Pack,
    store::number_of,
};

/// Writes a readable listing of one pack, one chunk a line; damage is a line of the listing. Whether there is none.
///
/// # Errors
/// Of opening the file and of writing to `out`; a version that this program does not know.
pub fn inspect(storage: &dyn Storage, path: &Path, out: &mut dyn io::Write) -> io::Result<bool> {
    let name = storage.display(path);
    writeln!(out, "{}", name.display())?;
    let number = path.file_name().and_then(|name| number_of(&name.to_string_lossy()));
    let Some(number) = number else {
        let why = "a pack is called 0000000000000001.pack and so on: what is in it has its number";
        return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
    };
    let pack = match Pack::open(storage.open(path)?, name, number) {
        Ok(pack) => pack,
        Err(error @ ImageError::Damaged { .. }) => return writeln!(out, "{error}").map(|()| false),
        Err(error) => return Err(io::Error::other(error)),
    };
    let mut whole = pack.broken().is_none();
    writeln!(out, "pack {number}, {} chunks, {} bytes of them", pack.lines().len(), pack.chunk_bytes())?;
    if let Some(broken) = pack.broken() {
        writeln!(out, "{broken}")?;
    }
    for line in pack.lines() {
        let name = ChunkRef { hash: line.hash, pack: number, ordinal: line.ordinal };
        let hash = blake3::Hash::from_bytes(line.hash).to_hex();
        write!(out, "{:>10}  #{} {}", line.offset, line.ordinal, &hash[..16])?;
        match pack.content(line, &name) {
            Ok((header, content)) => {
                let kind = match header.kind {
                    Kind::Data => "data".to_owned(),
                    Kind::Node(level) => format!("node of level {level}"),
                };
                writeln!(out, " {kind}, {} bytes", content.len())?;
            }
            Err(error) => {
                whole = false;
                writeln!(out, " DAMAGED: {error}")?;
            }
        }
    }
    Ok(whole)
}
