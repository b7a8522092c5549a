//! What clients wrote to mounts of the agent: `overlays/ID.map` and `overlays/ID.data` in its state directory, in the
//! format of `backtide-overlay`. The mount's record says which overlay it has.
//!
//! Every call may wait for storage. Invariants: the files are there before a record names them, and go after it says that
//! the mount has ended; an overlay in use is open once, whoever uses it. So files without a record that nothing was written
//! to are from a crash, and are removed when the agent starts; where something was, the record is lost, and they stay.

use std::{
    collections::HashMap,
    io,
    path::Path,
    sync::{Arc, Mutex, PoisonError, Weak},
};

use backtide_control::{ApiError, ErrorCode};
use backtide_overlay::{
    Budget, Existing, Overlay, OverlayError, OverlayFiles, OverlayId, OverlayOptions, OverlayUse, remove,
};
use backtide_storage::Storage;
use backtide_units::ByteCount;

use super::{
    FREE_MIN,
    record::{self, MountRecord},
};
use crate::config::MountLimits;

const DIR: &str = "overlays";

/// The files of an overlay, longest ending first.
const ENDINGS: [&str; 3] = [".map.new", ".map", ".data"];

/// An overlay in use, and what it took when it was opened.
pub(super) type Opened = (Arc<Overlay>, OverlayUse);

/// The overlays of an agent. Clones share them.
#[derive(Clone)]
pub(super) struct Overlays {
    storage: Arc<dyn Storage>,
    options: OverlayOptions,
    /// By mount. Held while one is opened or removed.
    open: Arc<Mutex<HashMap<String, Weak<Overlay>>>>,
}

impl Overlays {
    /// Those in `storage`, without what a crash has left.
    ///
    /// # Errors
    /// The file system's.
    pub(super) fn load(storage: Arc<dyn Storage>, limits: &MountLimits) -> io::Result<Self> {
        storage.create_dir(Path::new(DIR))?;
        storage.sync_dir(Path::new(""))?;
        let records = storage.list(Path::new(""))?;
        for name in storage.list(Path::new(DIR))? {
            let id = ENDINGS.iter().find_map(|ending| name.strip_suffix(ending));
            // A record that cannot be read is one, too.
            let Some(id) = id.filter(|id| !records.contains(&record::file_name(id))) else { continue };
            if files(id).may_hold_something(&*storage) {
                let (record, kept) = (record::file_name(id), storage.display(&Path::new(DIR).join(&name)));
                tracing::error!(
                    file = %kept.display(),
                    "what clients wrote to mount {id} stays and cannot be mounted: its record {record} is missing in the state \
                     directory; put it back and start the agent again, or remove the file"
                );
                continue;
            }
            tracing::info!(name, "removing what a crash left of a mount's overlay");
            storage.remove(&Path::new(DIR).join(name))?;
        }
        let space = Arc::clone(&storage);
        let room = move |wanted: ByteCount| match space.free_space() {
            Ok(free) if free.0 < FREE_MIN.0 + wanted.0 => Err(format!(
                "the agent's state directory has {} bytes left, of which {FREE_MIN} stay free",
                free.0
            )),
            // It is asked again by the file system itself.
            Ok(_) | Err(_) => Ok(()),
        };
        let options = OverlayOptions {
            budget: Budget::new(limits.overlays_bytes),
            room: Arc::new(room),
            ..OverlayOptions::alone(limits.overlay_bytes)
        };
        Ok(Self { storage, options, open: Arc::default() })
    }

    /// Makes the overlay that `record` names.
    ///
    /// # Errors
    /// When there is no room for one; the file system's.
    pub(super) fn create(&self, record: &MountRecord) -> Result<Opened, ApiError> {
        (self.options.room)(ByteCount::ZERO).map_err(|why| ApiError::new(ErrorCode::Failed, why))?;
        self.open_as(record, Existing::Create)
    }

    /// Opens the overlay that `record` names; one that is in use is shared.
    ///
    /// # Errors
    /// Damage of it; the file system's.
    pub(super) fn open(&self, record: &MountRecord) -> Result<Opened, ApiError> {
        self.open_as(record, Existing::Open)
    }

    fn open_as(&self, record: &MountRecord, existing: Existing) -> Result<Opened, ApiError> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.retain(|_, overlay| overlay.strong_count() > 0);
        if let Some(overlay) = open.get(&record.id).and_then(Weak::upgrade) {
            let usage = overlay.usage();
            return Ok((overlay, usage));
        }
        let id = OverlayId(record.overlay.expect("a mount that can be written has an overlay"));
        let (storage, size) = (Arc::clone(&self.storage), record.point().size);
        let overlay = Overlay::open(storage, files(&record.id), id, size, self.options.clone(), existing)
            .map_err(|error| api_error(&error))?;
        let overlay = Arc::new(overlay);
        open.insert(record.id.clone(), Arc::downgrade(&overlay));
        let usage = overlay.usage();
        Ok((overlay, usage))
    }

    /// Removes the overlay of the mount `id` for good; one that is not there is fine. Requests in flight to one that was
    /// served just now end with nothing changed.
    ///
    /// # Errors
    /// The file system's.
    pub(super) fn remove(&self, id: &str) -> Result<(), ApiError> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.remove(id);
        remove(&*self.storage, &files(id)).map_err(|error| api_error(&error))
    }

    /// What the files of an overlay take, at most.
    pub(super) fn file_bytes(&self, id: &str) -> ByteCount {
        let files = files(id);
        let length = |path| self.storage.open(path).and_then(|file| file.len()).unwrap_or_default().0;
        ByteCount(length(&files.map) + length(&files.data))
    }
}

fn files(id: &str) -> OverlayFiles {
    OverlayFiles::named(Path::new(DIR), id)
}

fn api_error(error: &OverlayError) -> ApiError {
    let code = match error {
        OverlayError::Damaged { .. } => ErrorCode::Damaged,
        OverlayError::Full { .. } => ErrorCode::Busy,
        OverlayError::Io { .. }
        | OverlayError::UnknownVersion { .. }
        | OverlayError::NoRoom(_)
        | OverlayError::Poisoned(_)
        | OverlayError::Base(_) => ErrorCode::Failed,
    };
    ApiError::from_error(code, error)
}
