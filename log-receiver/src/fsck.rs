//! A store that no receiver has open, read against its checksums: every file, without changing any.

mod repair;

pub(crate) use repair::CUT_DIR;
pub use repair::{Repair, forget_retention, repair};

use std::{
    fs,
    io::ErrorKind,
    path::{Path, PathBuf},
    sync::Arc,
};

use backtide_receiver_api::{DiskCheck, ForgottenDisk, StoreCheck};
use backtide_recovery::{AskDisk, Checked, LogCache, LogOptions, Snapshot, damaged_place};
use backtide_storage::{RealStorage, Storage};
use backtide_units::{ByteCount, DiskId, DiskName, HistoryId};

use crate::{
    Forgotten, Names, Shelf, StoreFileError, StoreWatch, disk::chain, disks::DISKS, findings::Findings,
    forgotten, overlays, small_files, store_file::hold_store, touched::touched,
};

/// Checks the store at `path`. `progress` is told the bytes read so far.
///
/// # Errors
/// When there is no store, another process has it open, or it is of another version. Damage is no
/// error but what the report is for.
pub fn fsck(path: &Path, progress: &mut dyn FnMut(ByteCount)) -> Result<StoreCheck, StoreFileError> {
    let io = |what, path: PathBuf| move |source| StoreFileError::Io { what, path, source };
    // Opening a storage would make its directory.
    fs::metadata(path).map_err(io("open the store", path.to_owned()))?;
    let _held = hold_store(path)?;
    let storage: Arc<dyn Storage> =
        Arc::new(RealStorage::open(path).map_err(io("open the store", path.to_owned()))?);
    check_store(path, &storage, progress, &mut |_, _| {})
}

/// What one log of a disk says itself of its damage, whenever a receiver has it.
struct Own {
    log: u32,
    /// Of one that is out of use: all that reading it finds, short of what only a check reads.
    damage: Vec<String>,
    /// One that is in use says no more than that its end is lost.
    lost_end: Option<String>,
}

/// `found` is told of each disk what its logs say themselves.
fn check_store(
    path: &Path,
    storage: &Arc<dyn Storage>,
    progress: &mut dyn FnMut(ByteCount),
    found: &mut dyn FnMut(&DiskCheck, &[Own]),
) -> Result<StoreCheck, StoreFileError> {
    let io = |what, path: PathBuf| move |source| StoreFileError::Io { what, path, source };
    let mut damage = small_files::of_store(storage)?;
    let forgotten = Forgotten::load(Arc::clone(storage));
    let forgotten = forgotten.map_err(io("list", storage.display(Path::new(forgotten::DIR))))?;
    let going: Vec<ForgottenDisk> =
        forgotten.going().into_iter().map(|(disk, stone)| half_forgotten(disk, stone.name)).collect();
    let shelf = reading(storage, forgotten);
    let mut done = 0;
    let mut step = |bytes: ByteCount| {
        done += bytes.0;
        progress(ByteCount(done));
        true
    };
    let disks = disks_of(&shelf)?;
    let checked = disks.into_iter().filter_map(|disk| check_disk(&shelf, disk, &mut step));
    let mut disks: Vec<_> = checked.inspect(|(disk, own)| found(disk, own)).map(|(disk, _)| disk).collect();
    disks.sort_by(|a, b| (&a.name, a.uuid).cmp(&(&b.name, b.uuid)));
    // What was found until then is told all the same.
    let overlays = overlays::check_store(storage, &mut step).unwrap_or_else(|error| {
        let dir = storage.display(Path::new(overlays::record::DIR));
        damage.push(format!("cannot list {}, so no overlay of a mount was read: {error}", dir.display()));
        Vec::new()
    });
    let sound = damage.is_empty()
        && disks.iter().all(|disk| disk.sound)
        && overlays.iter().all(|overlay| overlay.sound);
    Ok(StoreCheck {
        store: path.display().to_string(),
        damage,
        repaired: Vec::new(),
        disks,
        overlays,
        forgotten: going,
        sound,
    })
}

/// The disks that have a directory and are not forgotten.
fn disks_of(shelf: &Shelf) -> Result<Vec<DiskId>, StoreFileError> {
    let names = match shelf.storage.list(Path::new(DISKS)) {
        Ok(names) => names,
        Err(error) if error.kind() == ErrorKind::NotFound => Vec::new(),
        Err(source) => {
            let path = shelf.storage.display(Path::new(DISKS));
            return Err(StoreFileError::Io { what: "list", path, source });
        }
    };
    let disks = names.iter().filter_map(|name| name.parse().ok()).map(DiskId);
    Ok(disks.filter(|disk| !shelf.forgotten.is_going(*disk)).collect())
}

/// A disk of which a receiver removes the rest when it starts.
fn half_forgotten(disk: DiskId, name: Option<DiskName>) -> ForgottenDisk {
    let uuid = disk.to_string().parse().expect("a UUID is a good name");
    ForgottenDisk { name: name.unwrap_or(uuid), uuid: disk, log_bytes: ByteCount::ZERO, overlays: Vec::new() }
}

/// A shelf that only reads.
pub(crate) fn reading(storage: &Arc<dyn Storage>, forgotten: Forgotten) -> Shelf {
    Shelf {
        storage: Arc::clone(storage),
        log: LogOptions::default(),
        cache: LogCache::new(Default::default()),
        names: Arc::new(Names::new()),
        forgotten,
        space_floor: ByteCount::ZERO,
        disks_max: 0,
        watch: StoreWatch::default(),
        findings: Findings::open(Arc::clone(storage)),
        new_history: Arc::new(HistoryId::random),
    }
}

/// With what its logs say themselves. None for a directory in which no log was ever used.
fn check_disk(
    shelf: &Shelf,
    disk: DiskId,
    step: &mut dyn FnMut(ByteCount) -> bool,
) -> Option<(DiskCheck, Vec<Own>)> {
    let (mut report, mut own) = (DiskCheck::unread(disk), Vec::new());
    let numbers = match shelf.numbers(disk) {
        Ok(numbers) => numbers,
        Err(error) => return Some((DiskCheck { error: Some(chain(&error)), ..report }, own)),
    };
    let mut any = false;
    for number in numbers {
        let salvaged = match shelf.salvage(disk, number, None) {
            Err(backtide_recovery::LogError::NoLog { .. }) => continue,
            salvaged => salvaged,
        };
        any = true;
        let mut checked = Checked::default();
        let ended = salvaged.and_then(|salvaged| {
            let (damage, lost_end) = (salvaged.damage.clone(), shelf.lost_end_of(disk, number, &salvaged));
            own.push(Own { log: number, damage, lost_end });
            let attached = salvaged.snapshot.timeline().attached().map(|attached| attached.name.clone());
            let memo = shelf.memo(disk, number).map(|memo| memo.attached.name);
            report.name = attached.or(memo).or(report.name.take());
            salvaged.check_into(&mut checked, step)
        });
        // Its base was told of with the log.
        let beside = small_files::beside_log(&*shelf.storage, &Shelf::dir(disk, number), false);
        beside.into_iter().for_each(|why| checked.note(why));
        // What was found before an error is damage all the same.
        add(&mut report, checked);
        if let Err(error) = ended {
            report.error = Some(chain(&error));
        }
    }
    report.sound = report.damage.is_empty() && report.error.is_none();
    any.then_some((report, own))
}

/// What a receiver tells of a disk without having read it, whose log `in_use` opens, if that is one.
fn told_anyway(own: &[Own], in_use: Option<u32>) -> Vec<String> {
    let of_log = |own: &Own| match Some(own.log) == in_use {
        true => own.lost_end.iter().cloned().collect(),
        false => own.damage.clone(),
    };
    own.iter().flat_map(of_log).collect()
}

/// Notes what is damaged of a disk, as a scrub does, and what is so no longer: whatever is not told anyway, as `own` is.
fn note(findings: &Findings, disk: &DiskCheck, own: &[String]) {
    let findings = findings.of_life(disk.uuid);
    let noted = findings.known();
    let found: Vec<_> = disk.damage.iter().filter(|why| !own.contains(why)).collect();
    for why in &found {
        let touched = disk.touched.iter().find(|touched| touched.place == damaged_place(why));
        findings.note_anew(why, touched.cloned());
    }
    // Of places that were not all read, or have no name in the report, nobody knows.
    if disk.error.is_none() && disk.more_damage == 0 {
        let is_there = |noted: &String| found.iter().any(|why| damaged_place(why) == damaged_place(noted));
        let gone: Vec<_> = noted.into_iter().filter(|noted| !is_there(noted)).collect();
        findings.forget(&gone);
    }
}

/// Adds what was found in one log.
pub(crate) fn add(report: &mut DiskCheck, checked: Checked) {
    report.segments += checked.segments;
    report.entries += checked.entries;
    report.bytes.0 += checked.bytes.0;
    let new: Vec<_> = checked.damage.into_iter().filter(|place| !report.damage.contains(place)).collect();
    for place in &new {
        let place = damaged_place(place);
        report.touched.extend(checked.touched.get(place).map(|found| touched(place, found)));
    }
    report.damage.extend(new);
    report.more_damage += checked.more_damage;
    report.mended.extend(checked.mended);
}

/// A snapshot of a disk that is in use, checked; with `mends` what can be mended is, from what the disk itself has too.
pub(crate) fn check_snapshot(
    mut report: DiskCheck,
    snapshot: &Snapshot,
    mends: Option<AskDisk<'_>>,
    step: &mut dyn FnMut(ByteCount) -> bool,
) -> DiskCheck {
    let mut checked = Checked::default();
    let ended = snapshot.check_into(&mut checked, mends, step);
    // What was found before an error is damage all the same.
    add(&mut report, checked);
    if let Err(error) = ended {
        report.error = Some(chain(&error));
    }
    report.sound = report.damage.is_empty() && report.error.is_none();
    report
}
