//! The overlays of a store: made for writable mounts, kept until they are discarded.
//!
//! One table for the receiver: which there are, which are in use, and what is wrong with one. Invariants:
//! an overlay in use is open once, whoever uses it; files without a record that nothing was written to, or whose discard has
//! begun, are from a crash and removed; other files without a record, and a record that cannot be read, are left alone, and told.

pub(crate) mod record;
mod serving;
pub(crate) mod store_place;

use std::{
    collections::BTreeMap,
    io::{self, ErrorKind},
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
};

use backtide_overlay::{Existing, Overlay, OverlayError, OverlayFiles, OverlayOptions, remove};
use backtide_receiver_api::{ApiError, ErrorCode, KeptOverlay, OverlayCheck};
use backtide_storage::Storage;
use backtide_units::{ByteCount, CaptureTime, DiskId, Lsn};

use crate::disk::chain;
use record::{DIR, Record};
use store_place::StorePlace;

/// The overlays of a store. Clones share it.
#[derive(Clone)]
pub(crate) struct Overlays {
    storage: Arc<dyn Storage>,
    options: OverlayOptions,
    overlays_max: usize,
    /// Where the store is; none of one in memory.
    place: Option<StorePlace>,
    table: Arc<Mutex<BTreeMap<String, Known>>>,
    /// Held while one is opened or removed, which may take its time; the table never is.
    opening: Arc<Mutex<()>>,
}

/// An overlay that there is.
struct Known {
    /// What its record says; or what is wrong with that.
    record: Result<Record, String>,
    open: Weak<Overlay>,
    /// What is wrong with it.
    problem: Option<String>,
    /// It is to be served and could not be.
    waits: bool,
}

impl Overlays {
    /// The overlays of a store.
    ///
    /// # Errors
    /// The file system's.
    pub(crate) fn load(
        storage: Arc<dyn Storage>,
        options: OverlayOptions,
        overlays_max: usize,
        place: Option<StorePlace>,
    ) -> io::Result<Self> {
        let (table, opening) = (Arc::default(), Arc::default());
        let this = Self { storage, options, overlays_max, place, table, opening };
        this.storage.create_dir(Path::new(DIR))?;
        this.storage.sync_dir(Path::new(""))?;
        let names = this.storage.list(Path::new(DIR))?;
        let mut table = this.table();
        for id in record::ids(&*this.storage, &names) {
            let id = &id;
            let record = record::read(&*this.storage, id);
            if let Err(why) = &record {
                tracing::error!(overlay = id, why, "an overlay cannot be used");
            }
            let problem = record.as_ref().err().cloned();
            table.insert(id.to_owned(), Known { record, open: Weak::new(), problem, waits: false });
        }
        // What says that a discard had begun goes last.
        for endings in [&[".map.new", ".map", ".data", ".json.new"][..], &[record::GOING]] {
            let left = |name: &&String| {
                let id = endings.iter().find_map(|ending| name.strip_suffix(ending));
                id.is_some_and(|id| !table.contains_key(id))
            };
            for name in names.iter().filter(left) {
                tracing::info!(name, "removing what a crash left of an overlay");
                this.storage.remove(&Path::new(DIR).join(name))?;
            }
            this.storage.sync_dir(Path::new(DIR))?;
        }
        drop(table);
        Ok(this)
    }

    fn table(&self) -> MutexGuard<'_, BTreeMap<String, Known>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether there is one called `id`.
    pub(crate) fn contains(&self, id: &str) -> bool {
        self.table().contains_key(id)
    }

    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        self.table().len()
    }

    /// The record of an overlay.
    ///
    /// # Errors
    /// When there is none, or it is damaged.
    pub(crate) fn record(&self, id: &str) -> Result<Record, ApiError> {
        match self.table().get(id).map(|known| known.record.clone()) {
            Some(Ok(record)) => Ok(record),
            Some(Err(why)) => Err(ApiError::new(ErrorCode::Damaged, why)),
            None => Err(ApiError::new(ErrorCode::NotFound, format!("there is no overlay {id:?}"))
                .with_hint("`backtide mount` lists the mounts and overlays there are")),
        }
    }

    /// The points of a disk that overlays lie above, mounted or kept: without them nothing in those can be read.
    pub(crate) fn points(&self, disk: DiskId) -> BTreeMap<Lsn, CaptureTime> {
        let table = self.table();
        let records = table.values().filter_map(|known| known.record.as_ref().ok());
        let records = records.filter(|record| record.disk.uuid == disk);
        records.map(|record| (record.lsn, record.time)).collect()
    }

    /// The overlays of a disk, mounted or kept.
    pub(crate) fn of_disk(&self, disk: DiskId) -> Vec<String> {
        let table = self.table();
        let is_of = |known: &Known| known.record.as_ref().is_ok_and(|record| record.disk.uuid == disk);
        table.iter().filter(|(_, known)| is_of(known)).map(|(id, _)| id.clone()).collect()
    }

    /// Why nobody knows which points overlays lie above.
    pub(crate) fn unreadable(&self) -> Option<String> {
        let table = self.table();
        table.iter().find_map(|(id, known)| {
            let why = known.record.as_ref().err()?;
            Some(format!(
                "nobody knows above which point overlay {id} lies ({why}): restore its record, or discard it"
            ))
        })
    }

    /// Makes an overlay.
    ///
    /// # Errors
    /// When there are as many as there may be; the store's.
    pub(crate) fn create(&self, record: Record) -> Result<Arc<Overlay>, ApiError> {
        let record = Record { store: self.place.clone(), ..record };
        let count = self.count();
        if count >= self.overlays_max {
            let why = format!("the receiver keeps its limit of {count} overlays");
            return Err(ApiError::new(ErrorCode::Busy, why)
                .with_hint("discard one: `backtide mount` lists them, `backtide unmount ID --discard`"));
        }
        (self.options.room)(ByteCount::ZERO).map_err(|why| ApiError::new(ErrorCode::Failed, why))?;
        let made = self.open_files(&record, Existing::Create);
        let written = made.and_then(|overlay| {
            record::write(&*self.storage, &record).map_err(|error| {
                let path = self.storage.display(&record::path(&record.id));
                ApiError::new(ErrorCode::Failed, format!("write {}: {error}", path.display()))
            })?;
            Ok(overlay)
        });
        match written {
            Ok(overlay) => {
                let open = Arc::downgrade(&overlay);
                let known = Known { open, problem: None, record: Ok(record.clone()), waits: false };
                self.table().insert(record.id, known);
                Ok(overlay)
            }
            Err(error) => {
                // What cannot be removed now is removed when the receiver starts.
                let _ = self.remove_files(&record.id);
                Err(error)
            }
        }
    }

    /// Opens an overlay; one that is in use is shared.
    ///
    /// # Errors
    /// When there is none; damage of it; the store's.
    pub(crate) fn open(&self, id: &str) -> Result<Arc<Overlay>, ApiError> {
        let record = self.record(id)?;
        let _one = self.opening.lock().unwrap_or_else(PoisonError::into_inner);
        let open = self.table().get(id).map(|known| known.open.upgrade());
        match open {
            Some(Some(open)) => return Ok(open),
            Some(None) => {}
            None => return Err(gone(id)),
        }
        let opened = self.open_files(&record, Existing::Open);
        let mut table = self.table();
        let Some(known) = table.get_mut(id) else { return Err(gone(id)) };
        known.problem = opened.as_ref().err().map(|error| error.message.clone());
        let overlay = opened?;
        known.open = Arc::downgrade(&overlay);
        Ok(overlay)
    }

    fn open_files(&self, record: &Record, existing: Existing) -> Result<Arc<Overlay>, ApiError> {
        let (storage, files) = (Arc::clone(&self.storage), files(&record.id));
        Overlay::open(storage, files, record.overlay, record.disk.size, self.options.clone(), existing)
            .map(Arc::new)
            .map_err(|error| api_error(&error))
    }

    /// Notes where an overlay is served, or that it is only kept.
    ///
    /// # Errors
    /// The store's; then it is as it was.
    pub(crate) fn serve_at(&self, id: &str, uri: Option<String>) -> Result<(), ApiError> {
        let store = self.place.clone().filter(|_| uri.is_some());
        let record = Record { uri, store, ..self.record(id)? };
        record::write(&*self.storage, &record).map_err(|error| {
            ApiError::new(ErrorCode::Failed, format!("write the overlay's record: {error}"))
        })?;
        if let Some(known) = self.table().get_mut(id) {
            known.record = Ok(record);
            known.waits = false;
        }
        Ok(())
    }

    /// Removes an overlay for good. One whose mount has `ended` just now may be held by requests in flight:
    /// they end with nothing changed.
    ///
    /// # Errors
    /// When there is none, or it is in use; the store's.
    pub(crate) fn discard(&self, id: &str, ended: bool) -> Result<(), ApiError> {
        let _one = self.opening.lock().unwrap_or_else(PoisonError::into_inner);
        let users = self.table().get(id).map(|known| known.open.strong_count());
        if users.ok_or_else(|| gone(id))? > 0 && !ended {
            return Err(ApiError::new(ErrorCode::Busy, format!("overlay {id} is in use")));
        }
        self.remove_files(id).map_err(|error| ApiError::new(ErrorCode::Failed, error))?;
        self.table().remove(id);
        Ok(())
    }

    /// The record goes first, durably, and leaves a name that says so until the files have gone: those of which nothing says that
    /// may be somebody's whose record was lost.
    fn remove_files(&self, id: &str) -> Result<(), String> {
        let io = |error: io::Error| format!("remove overlay {id}: {error}");
        let going = record::going(id);
        match self.storage.rename(&record::path(id), &going) {
            // Its record was lost, or was never written.
            Err(error) if error.kind() == ErrorKind::NotFound => {
                drop(self.storage.create_new(&going).or_else(|_| self.storage.open(&going)).map_err(io)?);
            }
            renamed => renamed.map_err(io)?,
        }
        self.storage.sync_dir(Path::new(DIR)).map_err(io)?;
        remove(&*self.storage, &files(id)).map_err(|error| chain(&error))?;
        self.storage.remove(&going).map_err(io)?;
        self.storage.sync_dir(Path::new(DIR)).map_err(io)
    }

    /// Notes what is wrong with an overlay.
    pub(crate) fn note(&self, id: &str, why: &str) {
        if let Some(known) = self.table().get_mut(id) {
            known.problem = Some(why.to_owned());
        }
    }

    /// Notes that what was written to a mount that has ended could not all be made durable, and says so.
    pub(crate) fn not_flushed(&self, id: &str, why: &str) -> ApiError {
        self.note(id, why);
        let why = format!("mount {id} has ended and is kept, but not all that was written is durable: {why}");
        ApiError::new(ErrorCode::Failed, why)
    }

    /// What is wrong with overlays: a sentence each.
    pub(crate) fn alarms(&self) -> Vec<String> {
        let table = self.table();
        let problem =
            |(id, known): (&String, &Known)| known.problem.as_ref().map(|why| format!("overlay {id}: {why}"));
        table.iter().filter_map(problem).collect()
    }

    /// What an overlay's files take, at most.
    pub(crate) fn file_bytes(&self, id: &str) -> ByteCount {
        let files = files(id);
        let length = |path| self.storage.open(path).and_then(|file| file.len()).unwrap_or_default().0;
        ByteCount(length(&files.map) + length(&files.data))
    }

    /// What all of them take, at most.
    pub(crate) fn all_file_bytes(&self) -> ByteCount {
        let ids: Vec<String> = self.table().keys().cloned().collect();
        ByteCount(ids.iter().map(|id| self.file_bytes(id).0).sum())
    }

    /// Those that are not served, `served` being those that are; looks at their files.
    pub(crate) fn kept(&self, served: &[String]) -> Vec<KeptOverlay> {
        let describe = |(id, known): (&String, &Known)| {
            let record = known.record.as_ref().ok();
            KeptOverlay {
                id: id.clone(),
                disk: record.map(|record| record.disk.clone()),
                lsn: record.map(|record| record.lsn),
                time: record.map(|record| record.time),
                created: record.map(|record| record.created),
                file_bytes: ByteCount::ZERO,
                problem: known.problem.clone(),
            }
        };
        let mut kept: Vec<_> =
            self.table().iter().filter(|(id, _)| !served.contains(id)).map(describe).collect();
        // The table is not held meanwhile.
        for overlay in &mut kept {
            overlay.file_bytes = self.file_bytes(&overlay.id);
        }
        kept
    }

    /// Reads what opening an overlay would write again: its record, and the map of one that is not in use. A sentence for each that
    /// is damaged.
    fn check_files(&self, record: &Record) -> Vec<String> {
        let mut damage = Vec::new();
        let _one = self.opening.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(users) = self.table().get(&record.id).map(|known| known.open.strong_count()) else {
            return damage;
        };
        damage.extend(record::read(&*self.storage, &record.id).err());
        if users == 0 {
            let files = files(&record.id);
            let read = backtide_overlay::check_map(&*self.storage, &files, record.overlay, record.disk.size);
            // What else it is, opening says.
            damage.extend(read.ok().flatten());
        }
        damage
    }

    /// Reads every overlay against its checksums. `step` is told the bytes read and says whether to go on.
    pub(crate) fn check(&self, step: &mut dyn FnMut(ByteCount) -> bool) -> Vec<OverlayCheck> {
        let ids: Vec<String> = self.table().keys().cloned().collect();
        let mut checks = Vec::new();
        for id in ids {
            let Ok(record) = self.record(&id) else {
                checks.extend(self.table().get(&id).map(|known| unreadable(&id, known.problem.clone())));
                continue;
            };
            let mut check = empty(&record);
            let before = self.check_files(&record);
            match self.open(&id) {
                Ok(overlay) => {
                    add(&mut check, overlay.check(step));
                    check.damage.splice(..0, before);
                }
                // Discarded meanwhile.
                Err(error) if error.code == ErrorCode::NotFound => continue,
                Err(error) => check.error = Some(error.message),
            }
            finish(&mut check);
            if let Some(why) = check.damage.first() {
                self.note(&id, why);
            }
            checks.push(check);
        }
        checks
    }
}

/// Reads the overlays of a store that no receiver has open, without changing any.
///
/// # Errors
/// When nobody knows which there are.
pub(crate) fn check_store(
    storage: &Arc<dyn Storage>,
    step: &mut dyn FnMut(ByteCount) -> bool,
) -> io::Result<Vec<OverlayCheck>> {
    let names = match storage.list(Path::new(DIR)) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        names => names?,
    };
    let ids = record::ids(&**storage, &names).into_iter();
    let checks = ids.map(|id| match record::read(&**storage, &id) {
        Err(why) => unreadable(&id, Some(why)),
        Ok(record) => {
            let mut check = empty(&record);
            match backtide_overlay::check(storage, &files(&id), record.overlay, record.disk.size, step) {
                Ok(checked) => add(&mut check, checked),
                Err(error) => check.error = Some(chain(&error)),
            }
            finish(&mut check);
            check
        }
    });
    Ok(checks.collect())
}

fn files(id: &str) -> OverlayFiles {
    OverlayFiles::named(Path::new(DIR), id)
}

fn empty(record: &Record) -> OverlayCheck {
    OverlayCheck {
        id: record.id.clone(),
        disk: Some(record.disk.name.clone()),
        bytes: ByteCount::ZERO,
        damage: Vec::new(),
        more_damage: 0,
        error: None,
        sound: false,
    }
}

fn unreadable(id: &str, error: Option<String>) -> OverlayCheck {
    let (bytes, damage, more_damage) = (ByteCount::ZERO, Vec::new(), 0);
    OverlayCheck { id: id.to_owned(), disk: None, bytes, damage, more_damage, error, sound: false }
}

fn add(check: &mut OverlayCheck, checked: backtide_overlay::Checked) {
    check.bytes = checked.blocks.bytes();
    check.damage = checked.damage;
    check.more_damage = checked.more_damage;
}

fn finish(check: &mut OverlayCheck) {
    check.sound = check.damage.is_empty() && check.error.is_none();
}

fn gone(id: &str) -> ApiError {
    ApiError::new(ErrorCode::NotFound, format!("there is no overlay {id:?}"))
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
    ApiError::new(code, chain(error))
}
