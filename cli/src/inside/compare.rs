//! Two volumes, or one at two points, compared file by file.
//!
//! Both trees are walked side by side. Files that look the same are the same, unless blocks changed where their
//! bytes are: then the bytes are compared. Where a library reads the volume (ext2/3/4) nobody tells where bytes are, and the
//! look has to do.

use std::{cmp::Ordering, collections::HashSet};

use backtide_control::{ApiError, ErrorCode};
use backtide_filesystems::FileId;
use backtide_units::{ByteCount, ByteRange};
use serde::Serialize;

use super::{Entry, Kind, Volume};
use crate::ending::Failure;

/// What is read at once.
const PIECE: usize = 256 << 10;

/// Directories within directories; no file system that is well has more.
const DEPTH_MAX: usize = 512;

/// Differences that are listed; more are counted.
const LISTED_MAX: usize = 1 << 20;

/// How a file differs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Change {
    /// It is at the later point only.
    Added,
    /// It is at the earlier point only.
    Removed,
    /// It is at both, and not the same.
    Changed,
}

/// A file that differs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Difference {
    /// Its path on the volume.
    pub(crate) path: String,
    /// How it differs.
    pub(crate) change: Change,
    /// What it is, or was.
    pub(crate) kind: Kind,
    /// How long it is, or was.
    pub(crate) size: ByteCount,
    /// What of it changed: kind, size, modified, mode, owner, target, content.
    pub(crate) what: Vec<&'static str>,
}

/// All files that differ.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Differences {
    /// Them, in the order of a walk.
    pub(crate) files: Vec<Difference>,
    /// How many were added.
    pub(crate) added: u64,
    /// How many were removed.
    pub(crate) removed: u64,
    /// How many changed.
    pub(crate) changed: u64,
    /// How many of these are not listed.
    pub(crate) omitted: u64,
}

/// The two sides of a comparison.
pub(crate) struct Sides<'volumes> {
    /// At the earlier point.
    pub(crate) from: &'volumes Volume,
    /// At the later point.
    pub(crate) to: &'volumes Volume,
    /// Whether blocks of the later one's volume changed here.
    pub(crate) is_changed: &'volumes dyn Fn(ByteRange) -> bool,
}

/// Compares all files of both sides.
///
/// # Errors
/// When a directory cannot be read, or file bytes that have to be.
pub(crate) fn compare(sides: &Sides<'_>) -> Result<Differences, Failure> {
    let mut walk = Walk { sides, seen: [HashSet::new(), HashSet::new()], found: Differences::default() };
    let (from, to) = (sides.from.look("/")?, sides.to.look("/")?);
    walk.directory(Some(&from), Some(&to), "", 0)?;
    Ok(walk.found)
}

struct Walk<'sides> {
    sides: &'sides Sides<'sides>,
    /// Directories that were entered: a tree has each once.
    seen: [HashSet<FileId>; 2],
    found: Differences,
}

impl Walk<'_> {
    fn add(&mut self, path: &str, change: Change, entry: &Entry, what: Vec<&'static str>) {
        let count = match change {
            Change::Added => &mut self.found.added,
            Change::Removed => &mut self.found.removed,
            Change::Changed => &mut self.found.changed,
        };
        *count += 1;
        if self.found.files.len() >= LISTED_MAX {
            self.found.omitted += 1;
            return;
        }
        let (path, kind, size) = (path.to_owned(), entry.kind, entry.size);
        self.found.files.push(Difference { path, change, kind, size, what });
    }

    fn entries(&mut self, side: usize, directory: &Entry, path: &str) -> Result<Vec<Entry>, Failure> {
        if directory.file_id().is_some_and(|id| !self.seen[side].insert(id)) {
            let why = format!("the directory {path}/ is in the tree more than once");
            return Err(ApiError::new(ErrorCode::Damaged, why).into());
        }
        let volume = if side == 0 { self.sides.from } else { self.sides.to };
        let mut entries = volume.list(directory)?;
        entries.sort_by(|a, b| a.raw_name.cmp(&b.raw_name));
        Ok(entries)
    }

    /// Compares what is in a directory; on a side where there is none, nothing is.
    fn directory(
        &mut self,
        from: Option<&Entry>,
        to: Option<&Entry>,
        path: &str,
        depth: usize,
    ) -> Result<(), Failure> {
        if depth > DEPTH_MAX {
            let why = format!("{path} is deeper than {DEPTH_MAX} directories");
            return Err(ApiError::new(ErrorCode::Refused, why).into());
        }
        let mut old = match from {
            Some(from) => self.entries(0, from, path)?,
            None => Vec::new(),
        };
        let mut new = match to {
            Some(to) => self.entries(1, to, path)?,
            None => Vec::new(),
        };
        old.reverse();
        new.reverse();
        loop {
            let order = match (old.last(), new.last()) {
                (None, None) => return Ok(()),
                (Some(_), None) => Ordering::Less,
                (None, Some(_)) => Ordering::Greater,
                (Some(old), Some(new)) => old.raw_name.cmp(&new.raw_name),
            };
            let before = if order == Ordering::Greater { None } else { old.pop() };
            let after = if order == Ordering::Less { None } else { new.pop() };
            let name = before.as_ref().or(after.as_ref()).map_or("", |entry| entry.name.as_str());
            let path = format!("{path}/{name}");
            self.file(before.as_ref(), after.as_ref(), &path)?;
            let directory =
                |entry: &Option<Entry>| entry.clone().filter(|entry| entry.kind == Kind::Directory);
            let (from, to) = (directory(&before), directory(&after));
            if from.is_some() || to.is_some() {
                self.directory(from.as_ref(), to.as_ref(), &path, depth + 1)?;
            }
        }
    }

    fn file(&mut self, from: Option<&Entry>, to: Option<&Entry>, path: &str) -> Result<(), Failure> {
        match (from, to) {
            (Some(from), Some(to)) => {
                let what = self.differences(from, to)?;
                if !what.is_empty() {
                    self.add(path, Change::Changed, to, what);
                }
            }
            (Some(from), None) => self.add(path, Change::Removed, from, Vec::new()),
            (None, Some(to)) => self.add(path, Change::Added, to, Vec::new()),
            (None, None) => {}
        }
        Ok(())
    }

    fn differences(&self, from: &Entry, to: &Entry) -> Result<Vec<&'static str>, Failure> {
        // The size of a directory is a matter of its blocks, and its names are compared one by one.
        let is_directory = from.kind == Kind::Directory && to.kind == Kind::Directory;
        let looks = [
            ("kind", from.kind != to.kind),
            ("size", from.size != to.size && !is_directory),
            ("modified", from.modified_ns != to.modified_ns && !is_directory),
            ("mode", from.mode != to.mode),
            ("owner", (from.uid, from.gid) != (to.uid, to.gid)),
            ("target", from.target != to.target),
        ];
        let mut what: Vec<_> = looks.iter().filter(|(_, differs)| *differs).map(|(name, _)| *name).collect();
        let are_files = from.kind == Kind::File && to.kind == Kind::File && from.size == to.size;
        if are_files && self.may_differ(to)? && self.bytes_differ(from, to)? {
            what.push("content");
        }
        Ok(what)
    }

    /// Whether blocks changed where the bytes of a file are.
    fn may_differ(&self, file: &Entry) -> Result<bool, Failure> {
        let Some(places) = self.sides.to.places(file)? else { return Ok(false) };
        Ok(places.into_iter().any(|range| (self.sides.is_changed)(range)))
    }

    fn bytes_differ(&self, from: &Entry, to: &Entry) -> Result<bool, Failure> {
        let (mut old, mut new) = (self.sides.from.open_file(from)?, self.sides.to.open_file(to)?);
        let (mut a, mut b) = (vec![0; PIECE], vec![0; PIECE]);
        loop {
            let (read, also) = (old.read(&mut a)?, new.read(&mut b)?);
            if a[..read] != b[..also] {
                return Ok(true);
            }
            if read == 0 {
                return Ok(false);
            }
        }
    }
}
