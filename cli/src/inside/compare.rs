//! Two volumes, or one at two points, compared file by file.
//!
//! Both trees are walked side by side. Files that look the same are the same, unless blocks changed where their
//! bytes are: then the bytes are compared.

use std::{cmp::Ordering, collections::HashSet};

use backtide_control::{ApiError, ErrorCode};
use backtide_filesystems::{FileId, Place};
use backtide_units::{ByteCount, ByteRange};
use serde::Serialize;

use super::{Entry, Kind, Unreadable, Volume, hold_names};
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
    /// What could not be compared, as one side of it cannot be read.
    #[serde(flatten)]
    pub(crate) unreadable: Unreadable,
}

/// The two sides of a comparison.
pub(crate) struct Sides<'volumes> {
    /// At the earlier point.
    pub(crate) from: &'volumes Volume,
    /// At the later point.
    pub(crate) to: &'volumes Volume,
    /// Whether blocks of the later one's volume changed here.
    pub(crate) is_changed: &'volumes dyn Fn(ByteRange) -> bool,
    /// Whether the bytes of every file are compared.
    pub(crate) reads_all: bool,
}

/// Compares all files of both sides.
///
/// # Errors
/// When the root of either cannot be read; what else cannot is noted.
pub(crate) fn compare(sides: &Sides<'_>) -> Result<Differences, Failure> {
    let seen = [HashSet::new(), HashSet::new()];
    let mut walk = Walk { sides, seen, held: 0, found: Differences::default() };
    let (from, to) = (sides.from.look("/")?, sides.to.look("/")?);
    let entries = (walk.entries(0, Some(&from), "")?, walk.entries(1, Some(&to), "")?);
    walk.directory(entries, "", 0)?;
    Ok(walk.found)
}

struct Walk<'sides> {
    sides: &'sides Sides<'sides>,
    /// Directories that were entered: a tree has each once.
    seen: [HashSet<FileId>; 2],
    /// Names of directories that are being walked through.
    held: usize,
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

    /// What is in a directory that was not entered yet; nothing where there is none.
    fn entries(
        &mut self,
        side: usize,
        directory: Option<&Entry>,
        path: &str,
    ) -> Result<Vec<Entry>, ApiError> {
        let Some(directory) = directory else { return Ok(Vec::new()) };
        let volume = if side == 0 { self.sides.from } else { self.sides.to };
        if !self.seen[side].insert(directory.id) {
            let why = format!("the directory {path}/ is in the tree more than once");
            return Err(ApiError::new(ErrorCode::Damaged, why));
        }
        let mut entries = volume.list(directory)?;
        hold_names(&mut self.held, entries.len())?;
        entries.sort_by(|a, b| a.raw_name.cmp(&b.raw_name));
        Ok(entries)
    }

    /// Compares what is in a directory at either side.
    fn directory(
        &mut self,
        (mut old, mut new): (Vec<Entry>, Vec<Entry>),
        path: &str,
        depth: usize,
    ) -> Result<(), Failure> {
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
            self.file(before.as_ref(), after.as_ref(), &path);
            let directory =
                |entry: &Option<Entry>| entry.clone().filter(|entry| entry.kind == Kind::Directory);
            let (from, to) = (directory(&before), directory(&after));
            // What is a directory at one point and unreadable at the other may be one there, too.
            let is_unreadable =
                |entry: &Option<Entry>| entry.as_ref().is_some_and(|entry| entry.kind == Kind::Unreadable);
            if from.is_none() && to.is_none() || is_unreadable(&before) || is_unreadable(&after) {
                continue;
            }
            if depth >= DEPTH_MAX {
                let why = format!("it is deeper than {DEPTH_MAX} directories");
                self.found.unreadable.add(&path, &why);
                continue;
            }
            let held = self.held;
            let old = self.entries(0, from.as_ref(), &path);
            match old.and_then(|old| Ok((old, self.entries(1, to.as_ref(), &path)?))) {
                Ok(entries) => self.directory(entries, &path, depth + 1)?,
                // The names of one side alone would all be differences.
                Err(error) => self.found.unreadable.add_error(&path, &error),
            }
            self.held = held;
        }
    }

    fn file(&mut self, from: Option<&Entry>, to: Option<&Entry>, path: &str) {
        let unreadable = [from, to].into_iter().flatten().find_map(|entry| entry.error.as_deref());
        if let Some(why) = unreadable {
            self.found.unreadable.add(path, why);
        }
        match (from, to) {
            (Some(_), Some(_)) if unreadable.is_some() => {}
            (Some(from), Some(to)) => {
                let what = self.differences(from, to, path);
                if !what.is_empty() {
                    self.add(path, Change::Changed, to, what);
                }
            }
            (Some(from), None) => self.add(path, Change::Removed, from, Vec::new()),
            (None, Some(to)) => self.add(path, Change::Added, to, Vec::new()),
            (None, None) => {}
        }
    }

    fn differences(&mut self, from: &Entry, to: &Entry, path: &str) -> Vec<&'static str> {
        // The size of a directory is a matter of its blocks, and its names are compared one by one.
        let is_directory = from.kind == Kind::Directory && to.kind == Kind::Directory;
        let looks = [
            ("kind", from.kind != to.kind),
            ("size", from.size != to.size && !is_directory),
            ("modified", from.modified_ns != to.modified_ns && !is_directory),
            ("mode", from.mode != to.mode),
            ("owner", (from.uid, from.gid) != (to.uid, to.gid)),
            ("target", from.raw_target != to.raw_target),
        ];
        let mut what: Vec<_> = looks.iter().filter(|(_, differs)| *differs).map(|(name, _)| *name).collect();
        let are_files = from.kind == Kind::File && to.kind == Kind::File && from.size == to.size;
        let is_another = || Ok(are_files && self.may_differ(from, to)? && self.bytes_differ(from, to)?);
        match is_another() {
            Ok(true) => what.push("content"),
            Ok(false) => {}
            Err(error) => self.found.unreadable.add_error(path, &error),
        }
        what
    }

    /// Whether the bytes of a file are elsewhere than before, or other ones beside what is said of it, or
    /// blocks changed where they are.
    fn may_differ(&self, from: &Entry, to: &Entry) -> Result<bool, ApiError> {
        let now = self.sides.to.contents(to)?;
        let is_changed = |range: Option<ByteRange>| range.is_some_and(|range| (self.sides.is_changed)(range));
        let is_elsewhere = self.sides.from.contents(from)? != now;
        Ok(self.sides.reads_all
            || is_elsewhere
            || now.pieces().iter().any(|piece| match piece.place {
                Place::Volume(start) => is_changed(ByteRange::new(start, piece.length)),
                Place::Inline(_) => false,
            }))
    }

    fn bytes_differ(&self, from: &Entry, to: &Entry) -> Result<bool, ApiError> {
        let (mut old, mut new) = (self.sides.from.open_file(from)?, self.sides.to.open_file(to)?);
        let (mut a, mut b) = (vec![0; PIECE], vec![0; PIECE]);
        loop {
            // What is a hole on both sides is the same.
            let at = old.next_data().min(new.next_data());
            old.seek(at);
            new.seek(at);
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
