//! Which store an overlay is served by: a copy of a store has the records of the original.
//!
//! Where an overlay is served is often a path that whoever wrote it down still has, such as a machine that is to boot there. So a
//! receiver serves again what its own store has served, and leaves the rest to the store that has. A store is itself when it is where
//! it was, or when it is the same directory under another name: one that was moved to another file system, or whose machine
//! was started since it was moved, looks like a copy.

use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use backtide_export::{NbdAddress, NbdUri};
use serde::{Deserialize, Serialize, Serializer};

/// A store's place.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct StorePlace {
    /// Its directory, without links.
    #[serde(serialize_with = "as_text")]
    pub(crate) path: PathBuf,
    device: u64,
    inode: u64,
}

/// One that is no text is not known by its path, but by what follows.
fn as_text<S: Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&path.to_string_lossy())
}

impl StorePlace {
    /// Of the store in a directory.
    ///
    /// # Errors
    /// The file system's.
    pub(crate) fn of(store: &Path) -> io::Result<Self> {
        let metadata = fs::metadata(store)?;
        Ok(Self { path: fs::canonicalize(store)?, device: metadata.dev(), inode: metadata.ino() })
    }

    /// Whether `other` is the same store.
    pub(crate) fn is(&self, other: &Self) -> bool {
        self.path == other.path || (self.device, self.inode) == (other.device, other.inode)
    }

    /// Where something is served now that was served at `uri` when this store was called `before`: a socket in its own directory
    /// went with it.
    pub(crate) fn moved_from(&self, before: &Self, uri: &str) -> String {
        let Ok(NbdUri { address: NbdAddress::Unix(path), export, tls }) = uri.parse() else {
            return uri.to_owned();
        };
        match path.strip_prefix(&before.path) {
            Ok(inside) => {
                NbdUri { address: NbdAddress::Unix(self.path.join(inside)), export, tls }.to_string()
            }
            Err(_) => uri.to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{ffi::OsStr, os::unix::ffi::OsStrExt};

    use super::*;

    #[test]
    fn a_store_whose_path_is_no_text_is_known_again() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(OsStr::from_bytes(b"store-\xff"));
        fs::create_dir(&path).unwrap();
        let place = StorePlace::of(&path).unwrap();
        let noted = serde_json::to_string(&place).unwrap();
        assert!(serde_json::from_str::<StorePlace>(&noted).unwrap().is(&place), "{noted}");
    }

    #[test]
    fn a_store_that_was_renamed_is_itself_and_a_copy_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let [one, two] = ["one", "two"].map(|name| directory.path().join(name));
        fs::create_dir(&one).unwrap();
        let original = StorePlace::of(&one).unwrap();
        fs::create_dir(&two).unwrap();
        assert!(!StorePlace::of(&two).unwrap().is(&original));
        fs::remove_dir(&two).unwrap();
        fs::rename(&one, &two).unwrap();
        let renamed = StorePlace::of(&two).unwrap();
        assert!(renamed.is(&original) && renamed.path != original.path);
        let own =
            |place: &StorePlace| format!("nbd+unix:///vm1-1?socket={}/run/vm1-1.sock", place.path.display());
        assert_eq!(renamed.moved_from(&original, &own(&original)), own(&renamed));
        for other in ["nbd+unix:///vm1-1?socket=/run/vm1.sock", "nbd://localhost:10809/vm1-1"] {
            assert_eq!(renamed.moved_from(&original, other), other);
        }
        // Another directory in its place is taken for it: the one that was there has gone.
        fs::create_dir(&one).unwrap();
        assert!(StorePlace::of(&one).unwrap().is(&original));
    }
}
