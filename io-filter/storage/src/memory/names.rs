//! The directories: what is visible, and which changes of names are not durable yet.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    path::{Path, PathBuf},
};

use super::Random;

/// Index into the storage's files; never used twice.
type FileNumber = usize;

/// Paths to files. A rename between directories counts as a change of the target's directory.
#[derive(Default)]
pub(super) struct Names {
    visible: BTreeMap<PathBuf, FileNumber>,
    durable: BTreeMap<PathBuf, FileNumber>,
    directories: BTreeSet<PathBuf>,
    pending: Vec<(PathBuf, Change)>,
    /// Directories that were removed whole: what is below them goes for good with the name of each.
    removed: Vec<PathBuf>,
}

enum Change {
    Create(PathBuf, FileNumber),
    Rename(PathBuf, PathBuf),
    Remove(PathBuf),
}

fn parent(path: &Path) -> PathBuf {
    path.parent().unwrap_or(Path::new("")).to_owned()
}

impl Change {
    fn apply(&self, names: &mut BTreeMap<PathBuf, FileNumber>) {
        match self {
            Self::Create(path, file) => {
                names.insert(path.clone(), *file);
            }
            Self::Rename(from, to) => {
                if let Some(file) = names.remove(from) {
                    names.insert(to.clone(), file);
                }
            }
            Self::Remove(path) => {
                names.remove(path);
            }
        }
    }
}

impl Names {
    /// What is visible, as durable names of another tree.
    pub(super) fn copy(&self) -> Self {
        let visible = self.visible.clone();
        let directories = self.directories.clone();
        Self { durable: visible.clone(), visible, directories, ..Self::default() }
    }

    pub(super) fn find(&self, path: &Path) -> Option<FileNumber> {
        self.visible.get(path).copied()
    }

    /// Every file that has a name now.
    pub(super) fn all(&self) -> Vec<(PathBuf, FileNumber)> {
        self.visible.iter().map(|(path, file)| (path.clone(), *file)).collect()
    }

    pub(super) fn create(&mut self, path: &Path, file: FileNumber) -> io::Result<()> {
        if self.visible.contains_key(path) || self.directories.contains(path) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        self.require_dir(&parent(path))?;
        self.change(parent(path), Change::Create(path.to_owned(), file));
        Ok(())
    }

    pub(super) fn rename(&mut self, from: &Path, to: &Path) -> io::Result<()> {
        if !self.visible.contains_key(from) {
            return Err(io::ErrorKind::NotFound.into());
        }
        self.require_dir(&parent(to))?;
        self.change(parent(to), Change::Rename(from.to_owned(), to.to_owned()));
        Ok(())
    }

    pub(super) fn remove(&mut self, path: &Path) -> io::Result<()> {
        if !self.visible.contains_key(path) {
            return Err(io::ErrorKind::NotFound.into());
        }
        self.change(parent(path), Change::Remove(path.to_owned()));
        Ok(())
    }

    /// Some file below a directory.
    pub(super) fn first_below(&self, dir: &Path) -> Option<PathBuf> {
        self.visible.keys().find(|path| path.starts_with(dir)).cloned()
    }

    /// Nothing is below it any more, nor is it there itself.
    pub(super) fn tree_removed(&mut self, dir: &Path) {
        self.directories.retain(|directory| !directory.starts_with(dir));
        self.removed.push(dir.to_owned());
    }

    pub(super) fn create_dir(&mut self, dir: &Path) {
        for ancestor in dir.ancestors() {
            self.directories.insert(ancestor.to_owned());
        }
    }

    pub(super) fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        self.require_dir(dir)?;
        let here = self
            .visible
            .keys()
            .chain(&self.directories)
            .filter(|path| path.parent() == Some(dir) && !path.as_os_str().is_empty());
        let names = here.filter_map(|path| path.file_name()?.to_str().map(str::to_owned));
        Ok(names.collect::<BTreeSet<_>>().into_iter().collect())
    }

    pub(super) fn sync_all(&mut self) {
        for (_, change) in self.pending.drain(..) {
            change.apply(&mut self.durable);
        }
    }

    pub(super) fn sync(&mut self, dir: &Path) -> io::Result<()> {
        self.require_dir(dir)?;
        let removed: Vec<PathBuf> = self.removed.extract_if(.., |tree| tree.parent() == Some(dir)).collect();
        let is_synced =
            |changed: &Path| changed == dir || removed.iter().any(|tree| changed.starts_with(tree));
        let durable = &mut self.durable;
        self.pending.retain(|(changed, change)| {
            if is_synced(changed) {
                change.apply(durable);
            }
            !is_synced(changed)
        });
        Ok(())
    }

    pub(super) fn crash(&mut self, random: &mut Random) {
        let mut surviving = BTreeMap::new();
        for (dir, _) in &self.pending {
            *surviving.entry(dir.clone()).or_insert(0_usize) += 1;
        }
        for count in surviving.values_mut() {
            *count = random.up_to(*count);
        }
        for (dir, change) in self.pending.drain(..) {
            let left = surviving.get_mut(&dir).expect("counted above");
            if *left > 0 {
                *left -= 1;
                change.apply(&mut self.durable);
            }
        }
        self.visible = self.durable.clone();
        self.removed.clear();
        let parents = self.visible.keys().flat_map(|path| path.ancestors().skip(1));
        self.directories.extend(parents.map(Path::to_owned));
    }

    fn change(&mut self, dir: PathBuf, change: Change) {
        change.apply(&mut self.visible);
        self.pending.push((dir, change));
    }

    fn require_dir(&self, dir: &Path) -> io::Result<()> {
        if dir.as_os_str().is_empty() || self.directories.contains(dir) {
            return Ok(());
        }
        Err(io::ErrorKind::NotFound.into())
    }
}
