//! Something made of files, made again when they change.
//!
//! Looked at when it is used: whoever renews a certificate has to tell nobody. What cannot be made
//! of new files (a certificate that has come before its key, for one) leaves the old in use, is
//! said once, and is tried again when a file changes again.

use std::{
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use crate::TlsError;

type Load<T> = Box<dyn Fn() -> Result<T, TlsError> + Send + Sync>;

/// What `load` made of some files, as new as they are.
pub struct Reloading<T> {
    files: Vec<PathBuf>,
    load: Load<T>,
    state: Mutex<State<T>>,
}

struct State<T> {
    current: Arc<T>,
    /// Of the files when they were last tried.
    stamps: Vec<Option<Stamp>>,
    /// Why what is there now is not in use.
    trouble: Option<String>,
}

/// Enough of a file's state to notice that it was replaced or written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    fn of(path: &Path) -> Option<Self> {
        let metadata = std::fs::metadata(path).ok()?;
        Some(Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        })
    }
}

impl<T> Reloading<T> {
    /// Loads for the first time.
    ///
    /// # Errors
    /// What `load` says.
    pub fn new(
        files: Vec<PathBuf>,
        load: impl Fn() -> Result<T, TlsError> + Send + Sync + 'static,
    ) -> Result<Self, TlsError> {
        // Stamps first: what changes while it is read is read again.
        let stamps = files.iter().map(|file| Stamp::of(file)).collect();
        let current = Arc::new(load()?);
        let state = Mutex::new(State { current, stamps, trouble: None });
        Ok(Self { files, load: Box::new(load), state })
    }

    /// As new as can be.
    pub fn current(&self) -> Arc<T> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let stamps: Vec<_> = self.files.iter().map(|file| Stamp::of(file)).collect();
        if stamps != state.stamps {
            state.stamps = stamps;
            match (self.load)() {
                Ok(new) => {
                    tracing::info!(files = ?self.files, "certificates were read again");
                    state.current = Arc::new(new);
                    state.trouble = None;
                }
                Err(error) => {
                    let why = error.chain();
                    tracing::warn!(
                        error = why,
                        "certificates have changed and cannot be used: the old ones stay in use"
                    );
                    state.trouble = Some(why);
                }
            }
        }
        Arc::clone(&state.current)
    }

    /// Why the files as they are now are not in use, when they are not.
    pub fn trouble(&self) -> Option<String> {
        self.current();
        self.state.lock().unwrap_or_else(PoisonError::into_inner).trouble.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_changes_is_read_again_and_what_is_broken_is_not_used() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("file");
        std::fs::write(&file, "one").unwrap();
        let read = file.clone();
        let load = move || match std::fs::read_to_string(&read) {
            Ok(text) if text != "broken" => Ok(text),
            Ok(_) | Err(_) => Err(TlsError::Empty { path: read.clone() }),
        };
        let reloading = Reloading::new(vec![file.clone()], load).unwrap();
        assert_eq!(*reloading.current(), "one");
        // Of another size or inode, so that no clock has to tick.
        std::fs::write(&file, "second").unwrap();
        let old = reloading.current();
        assert_eq!(*old, "second");
        std::fs::write(directory.path().join("new"), "broken").unwrap();
        std::fs::rename(directory.path().join("new"), &file).unwrap();
        assert_eq!(*reloading.current(), "second");
        assert!(reloading.trouble().unwrap().contains("holds no certificate"));
        std::fs::remove_file(&file).unwrap();
        assert_eq!(*reloading.current(), "second");
        std::fs::write(&file, "three").unwrap();
        assert_eq!(*reloading.current(), "three");
        assert_eq!(reloading.trouble(), None);
        assert_eq!(*old, "second", "who uses the old one keeps it");
    }
}
