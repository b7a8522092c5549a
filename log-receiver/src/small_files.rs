//! The small files of a store against their checksums, for `fsck` and for a scrub beside those who write them.
//!
//! What is replaced whole is read whole, as it was or as it is: so no writer makes it look damaged. What is written in place (the
//! mark of a log, 64 bytes) or is two files that follow each other (its base) is looked at again before it counts as damaged.

use std::{io, path::Path, sync::Arc, thread::sleep, time::Duration};

use backtide_recovery::{FoundBase, LogError};
use backtide_storage::Storage;
use backtide_units::DiskId;

use crate::{
    Shelf, StoreFileError, cut::Cut, disk::chain, findings, forgotten, memo, mount_numbers, retention, scrub,
    shortfalls, store_file::read_store, watermark::Watermark,
};

/// What was found damaged counts when it is the same so often ...
const LOOKS: usize = 3;

/// ... with so much time between.
const BETWEEN: Duration = Duration::from_millis(300);

/// What is wrong with the files of the store itself: a sentence each.
///
/// # Errors
/// Of `store.json` when it is missing, or cannot be read, or is of another version; of tombstones when they cannot be
/// listed.
pub(crate) fn of_store(storage: &Arc<dyn Storage>) -> Result<Vec<String>, StoreFileError> {
    let mut damage = Vec::new();
    match read_store(storage) {
        Ok(_) => {}
        Err(error @ StoreFileError::Damaged { .. }) => damage.push(error.to_string()),
        Err(error) => return Err(error),
    }
    let shared: &dyn Storage = &**storage;
    damage.extend(retention::damage_of(shared));
    damage.extend(findings::damage_of(shared));
    damage.extend(scrub::damage_of(shared));
    damage.extend(mount_numbers::damage_of(shared));
    let tombstones = forgotten::read_all(shared).map_err(|source| StoreFileError::Io {
        what: "list",
        path: storage.display(Path::new(forgotten::DIR)),
        source,
    })?;
    damage.extend(tombstones.into_iter().filter_map(Result::err));
    Ok(damage)
}

/// What is wrong with the files beside the segments of one log: a sentence each. Of its base only with `base`: whoever reads a
/// damaged log tells that already.
pub(crate) fn beside_log(storage: &dyn Storage, dir: &Path, base: bool) -> Vec<String> {
    let mut damage: Vec<_> = memo::damage_of(storage, dir).into_iter().collect();
    damage.extend(Cut::damage_of(storage, dir));
    damage.extend(shortfalls::damage_of(storage, dir));
    damage.extend(Watermark::damage_of(storage, dir));
    if base {
        damage.extend(of_base(storage, dir));
    }
    damage
}

/// The same of all logs of a disk that is in use: what stays so counts.
pub(crate) fn beside_logs_in_use(shelf: &Shelf, disk: DiskId) -> Vec<String> {
    let look = || -> Vec<String> {
        match shelf.numbers(disk) {
            Ok(numbers) => numbers
                .into_iter()
                .flat_map(|number| beside_log(&*shelf.storage, &Shelf::dir(disk, number), true))
                .collect(),
            // What nobody can look at is not sound.
            Err(error) => vec![chain(&error)],
        }
    };
    let mut damage = look();
    for _ in 1..LOOKS {
        if damage.is_empty() {
            break;
        }
        sleep(BETWEEN);
        let again = look();
        damage.retain(|why| again.contains(why));
    }
    damage
}

/// One that is written now has its second file under way: that is no damage.
fn of_base(storage: &dyn Storage, dir: &Path) -> Vec<String> {
    let names = match storage.list(dir) {
        Ok(names) => names,
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(error) => return vec![format!("list {}: {error}", storage.display(dir).display())],
    };
    if names.iter().any(|name| name.starts_with("base.") && name.ends_with(".new")) {
        return Vec::new();
    }
    match FoundBase::read(storage, dir) {
        Ok(found) => found.damage,
        // The file system's says nothing of what is in it.
        Err(error @ (LogError::Damaged { .. } | LogError::UnknownVersion { .. })) => vec![chain(&error)],
        Err(
            LogError::NoLog { .. }
            | LogError::LogExists { .. }
            | LogError::Poisoned
            | LogError::Full { .. }
            | LogError::Io { .. },
        ) => Vec::new(),
    }
}
