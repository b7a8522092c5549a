//! Notices that a store was moved, removed or replaced under the running receiver.
//!
//! Open files outlive their names: without this, entries would go on being acknowledged as durable in
//! files that nobody finds again. The lock file that the receiver holds must be the one at its path;
//! it is looked at after every sync and before every claim, which costs one system call.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use crate::space::Refusals;

/// A look at the place of a store, and at what it refuses. Clones share it; the default is for stores that
/// have no place.
#[derive(Clone, Debug, Default)]
pub struct StoreWatch {
    place: Option<Arc<Place>>,
    pub(crate) refusals: Refusals,
}

#[derive(Debug)]
struct Place {
    store: PathBuf,
    lock: PathBuf,
    identity: (u64, u64),
}

impl StoreWatch {
    /// Watches the store whose lock file is held.
    pub(crate) fn new(store: &Path, lock: &Path, held: &fs::File) -> std::io::Result<Self> {
        let metadata = held.metadata()?;
        let identity = (metadata.dev(), metadata.ino());
        let place = Place { store: store.to_owned(), lock: lock.to_owned(), identity };
        Ok(Self { place: Some(Arc::new(place)), refusals: Refusals::default() })
    }

    /// Whether the store is where it was when the receiver started.
    ///
    /// # Errors
    /// A sentence when it is not, with the way out.
    pub fn check(&self) -> Result<(), String> {
        let Some(place) = &self.place else { return Ok(()) };
        let why = match fs::metadata(&place.lock) {
            Ok(found) if (found.dev(), found.ino()) == place.identity => return Ok(()),
            Ok(_) => "another directory is there now".to_owned(),
            Err(error) => error.to_string(),
        };
        Err(format!(
            "the store {} was moved, removed or replaced while the receiver uses it ({why}): put it back, or start the receiver again",
            place.store.display()
        ))
    }
}
