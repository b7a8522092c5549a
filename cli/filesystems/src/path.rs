//! From a path to the file it names.

use std::borrow::Cow;

use crate::{Error, FileId, FileSystem, Kind};

/// Symbolic links that one path may lead through, as Linux has it.
const LINKS_MAX: usize = 40;

/// The longest path, with what links put into it.
const LENGTH_MAX: usize = 64 << 10;

/// What a path has led to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// The file.
    pub id: FileId,
    /// Its name in the directory it was found in; empty for the root.
    pub name: Vec<u8>,
}

/// Finds what `path` names. Whether a symbolic link that it ends with is followed is the caller's choice.
///
/// # Errors
/// When there is no such file, or a directory on the way cannot be read.
pub fn find(volume: &dyn FileSystem, path: &str, follow_last: bool) -> Result<Found, Error> {
    let mut left: Vec<Vec<u8>> = Vec::new();
    push_parts(&mut left, path.as_bytes());
    // From the root down to where the walk is.
    let mut way: Vec<Found> = Vec::new();
    let mut links = 0;
    while let Some(part) = left.pop() {
        if part == b".." {
            way.pop();
            continue;
        }
        let here = way.last().map_or(volume.root(), |found| found.id);
        let names = names_of(volume, here, &way)?;
        let same = names.iter().find(|name| name.bytes == part);
        let found = same.or_else(|| names.iter().find(|name| volume.is_same_name(&name.bytes, &part)));
        let Some(found) = found else {
            let path = format!("{}/{}", text(&way).trim_end_matches('/'), lossy(&part));
            return Err(Error::NotFound { path });
        };
        let found = Found { id: found.id, name: found.bytes.clone() };
        let wanted = follow_last || !left.is_empty();
        if !wanted || volume.node(found.id)?.kind != Kind::Symlink {
            way.push(found);
            continue;
        }
        links += 1;
        let target = volume.link_target(found.id)?;
        let length: usize = left.iter().map(|part| part.len() + 1).sum::<usize>() + target.len();
        if links > LINKS_MAX || length > LENGTH_MAX {
            return Err(Error::TooManyLinks { path: path.to_owned(), limit: LINKS_MAX });
        }
        if target.first() == Some(&b'/') {
            way.clear();
        }
        push_parts(&mut left, &target);
    }
    Ok(way.pop().unwrap_or(Found { id: volume.root(), name: Vec::new() }))
}

/// Puts the parts of a path on top, the first one to be taken first.
fn push_parts(left: &mut Vec<Vec<u8>>, path: &[u8]) {
    let parts = path.split(|byte| *byte == b'/').filter(|part| !part.is_empty() && *part != b".");
    let parts: Vec<Vec<u8>> = parts.map(<[u8]>::to_vec).collect();
    left.extend(parts.into_iter().rev());
}

fn names_of(volume: &dyn FileSystem, id: FileId, way: &[Found]) -> Result<Vec<crate::Name>, Error> {
    match volume.node(id)?.kind {
        Kind::Directory => volume.names(id),
        Kind::File | Kind::Symlink | Kind::Special => Err(Error::NotADirectory { path: text(way) }),
    }
}

fn text(way: &[Found]) -> String {
    match way {
        [] => "/".to_owned(),
        way => way.iter().map(|found| format!("/{}", lossy(&found.name))).collect(),
    }
}

fn lossy(name: &[u8]) -> Cow<'_, str> {
    String::from_utf8_lossy(name)
}
