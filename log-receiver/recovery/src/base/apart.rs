//! Bases of logs whose directory is away: only the copy elsewhere still names their images.

use std::{
    collections::BTreeSet,
    io,
    path::{Path, PathBuf},
};

use backtide_images::Root;
use backtide_storage::Storage;
use backtide_units::{ByteOffset, DiskId};

use super::{Copy, ELSEWHERE, flat, read_copy};
use crate::{LogError, recover::failed};

/// The copies of bases elsewhere, as they were listed.
pub struct Elsewhere(Vec<String>);

/// One whose log has no directory.
#[derive(Debug)]
pub struct Apart {
    /// Its file, as people know it.
    pub file: PathBuf,
    /// Whose log it is.
    pub disk: DiskId,
    /// The images that it names.
    pub roots: Vec<Root>,
}

impl Elsewhere {
    /// Lists them: before the logs, so that one that is new has a log there.
    ///
    /// # Errors
    /// The file system's.
    pub fn list(storage: &dyn Storage) -> Result<Self, LogError> {
        let names = match storage.list(Path::new(ELSEWHERE)) {
            Ok(names) => names,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(source) => {
                let dir = storage.display(Path::new(ELSEWHERE));
                return Err(failed(format!("list {}", dir.display()), source));
            }
        };
        Ok(Self(names.into_iter().filter(|name| name.ends_with(".base")).collect()))
    }

    /// Whether there is any of the logs in `dir` and in the directories below it.
    pub fn any_of(&self, dir: &Path) -> bool {
        let own = flat(dir);
        self.0.iter().any(|name| is_below(name, &own))
    }

    /// Those of no log in one of these directories, nor of a disk that is `going`.
    ///
    /// # Errors
    /// [`LogError::Damaged`] when one does not tell what it names, or as of reading a base.
    pub fn without(
        self,
        storage: &dyn Storage,
        logs: &[PathBuf],
        going: &[PathBuf],
    ) -> Result<Vec<Apart>, LogError> {
        let going: Vec<String> = going.iter().map(|dir| flat(dir)).collect();
        let known: BTreeSet<String> = logs.iter().map(|dir| format!("{}.base", flat(dir))).collect();
        let mut apart = Vec::new();
        for name in self.0 {
            if known.contains(&name) || going.iter().any(|dir| is_below(&name, dir)) {
                continue;
            }
            let path = Path::new(ELSEWHERE).join(name);
            let file = storage.display(&path);
            match read_copy(storage, &path)? {
                Copy::Whole(base) => {
                    apart.push(Apart { file, disk: base.identity.disk, roots: base.roots().collect() });
                }
                Copy::Damaged(what) => {
                    return Err(LogError::Damaged { file, offset: ByteOffset::ZERO, what });
                }
                Copy::Unreadable(error) => return Err(error),
                // Forgotten meanwhile.
                Copy::Missing => {}
            }
        }
        Ok(apart)
    }
}

/// Whether a file has this name of a directory, or of one below it.
pub(super) fn is_below(name: &str, dir: &str) -> bool {
    name.strip_prefix(dir).is_some_and(|rest| rest.starts_with('-') || rest.starts_with('.'))
}
