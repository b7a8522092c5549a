//! Writing anew what a store has lost, while no receiver has it open.
//!
//! ```text
//!   all that follows from the logs ─▶ written anew where it is not what they give
//!   a log that opens               ─▶ damaged places are mended from whatever else has the bytes
//!   one that the receiver refuses  ─▶ lost headers are written again; then it opens, or it is cut where it is lost
//! ```
//! A log that is cut keeps every point it had: what stood behind the lost place gave none, for nobody knows which blocks are
//! missing there. It is put aside, not removed. Whoever attached the disk last, and how far LSNs had come, is noted
//! durably before, so that no stale agent gets the disk and no LSN comes a second time; then that the log was cut, which
//! keeps it out of use whatever happens next; only then it is cut. So a repair that dies half way is ended by the next.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use backtide_receiver_api::{DiskCheck, StoreCheck};
use backtide_recovery::{
    DiskLog, Durable, FoundBase, LogError, LogIdentity, Salvage, SegmentId, Seq, settle_base,
};
use backtide_storage::{RealStorage, Storage};
use backtide_units::{ByteCount, DiskId, HistoryId};
use uuid::Uuid;

use crate::{
    Forgotten, Shelf, StoreFileError,
    cut::Cut,
    disk::chain,
    disks::DISKS,
    findings,
    memo::{self, Memo},
    past::newest,
    retention, scrub, shortfalls,
    store_file::{lock_store, read_store, write_store},
    watermark::{Noted, Watermark},
};

use super::{check_store, disks_of, note, reading, told_anyway};

/// Where parts of logs are put that were cut off, by disk.
pub(crate) const CUT_DIR: &str = "cut";

/// How much a repair may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repair {
    /// Writes anew what follows from the rest: headers, footers, the bases of logs, the files beside them, `store.json`.
    Rebuild,
    /// That, and mends what is damaged from wherever else the bytes are, and cuts logs where something is lost.
    Everything,
}

/// What was done to one disk.
#[derive(Default)]
struct Done {
    mended: Vec<String>,
    cut: Vec<String>,
    /// Why no more was.
    errors: Vec<String>,
    /// The log that a receiver has in use: it tells nothing of itself but that its end is lost.
    in_use: Option<u32>,
}

/// Repairs the store at `path`, then checks it: the report says what was done, and what is damaged still. `progress` is
/// told the bytes read so far, of which there are twice as many as the store has.
///
/// # Errors
/// As [`super::fsck`]; what was done until then is done.
pub fn repair(
    path: &Path,
    what: Repair,
    progress: &mut dyn FnMut(ByteCount),
) -> Result<StoreCheck, StoreFileError> {
    let io = |what, path: PathBuf| move |source| StoreFileError::Io { what, path, source };
    // Opening a storage would make its directory, and locking a store makes a file in it.
    if let Err(error) = fs::metadata(path.join(DISKS)) {
        fs::metadata(path).map_err(io("open the store", path.to_owned()))?;
        if error.kind() == io::ErrorKind::NotFound && !path.join("store.json").exists() {
            return Err(StoreFileError::NoStore { path: path.to_owned(), has_disks: false });
        }
    }
    let _held = lock_store(path)?;
    let storage: Arc<dyn Storage> =
        Arc::new(RealStorage::open(path).map_err(io("open the store", path.to_owned()))?);
    repair_store(path, &storage, what, progress)
}

/// Makes `retention.json` anew in the store at `path`, where that is damaged or lost: every ladder, kept point and lock of it
/// is forgotten. Gives a sentence; none when the file says all that, and nothing was done.
///
/// # Errors
/// As [`super::fsck`].
pub fn forget_retention(path: &Path) -> Result<Option<String>, StoreFileError> {
    let io = |what, path: PathBuf| move |source| StoreFileError::Io { what, path, source };
    fs::metadata(path).map_err(io("open the store", path.to_owned()))?;
    let _held = lock_store(path)?;
    let storage: Arc<dyn Storage> =
        Arc::new(RealStorage::open(path).map_err(io("open the store", path.to_owned()))?);
    read_store(&storage)?;
    let Some(damage) = retention::damage_of(&*storage) else { return Ok(None) };
    let file = storage.display(Path::new(retention::FILE));
    retention::write_anew(&*storage).map_err(io("write", file))?;
    Ok(Some(format!("{damage}: it is made anew, and every ladder, kept point and lock is forgotten")))
}

fn repair_store(
    path: &Path,
    storage: &Arc<dyn Storage>,
    what: Repair,
    progress: &mut dyn FnMut(ByteCount),
) -> Result<StoreCheck, StoreFileError> {
    let mut repaired = Vec::new();
    match read_store(storage) {
        Ok(_) => {}
        Err(StoreFileError::NoStore { .. } | StoreFileError::Damaged { .. }) => {
            let store = write_store(storage)?;
            repaired.push(format!("store.json is written anew: the store is {} from now on", store.0));
        }
        Err(error) => return Err(error),
    }
    // What they say is found again by the next scrub.
    let noted = [
        (findings::is_damaged(&**storage), findings::damage_of(&**storage), findings::FILE),
        (scrub::is_damaged(&**storage), scrub::damage_of(&**storage), scrub::FILE),
    ];
    for (is_damaged, damage, file) in noted {
        let Some(damage) = damage.filter(|_| is_damaged) else { continue };
        let removed = storage.remove(Path::new(file)).and_then(|()| storage.sync_dir(Path::new("")));
        removed.map_err(|source| StoreFileError::Io {
            what: "remove",
            path: storage.display(Path::new(file)),
            source,
        })?;
        repaired.push(format!("{damage}: it is removed, the next scrub makes it anew"));
    }
    let mut before = 0;
    let mut step = |bytes: ByteCount| {
        before += bytes.0;
        progress(ByteCount(before));
        true
    };
    let forgotten = Forgotten::load(Arc::clone(storage)).map_err(|source| StoreFileError::Io {
        what: "list",
        path: storage.display(Path::new(crate::forgotten::DIR)),
        source,
    })?;
    let shelf = reading(storage, forgotten);
    let mut done = Vec::new();
    for disk in disks_of(&shelf)? {
        done.push((disk, Work { shelf: &shelf, disk, what }.run(&mut step)));
    }
    // What was read is in memory as it was before: the check reads anew.
    let findings = shelf.findings.clone();
    drop(shelf);
    let report =
        check_store(path, storage, &mut |bytes| progress(ByteCount(before + bytes.0)), &mut |disk, own| {
            if what == Repair::Everything {
                let in_use = done.iter().find(|(id, _)| *id == disk.uuid).and_then(|(_, done)| done.in_use);
                note(&findings, disk, &told_anyway(own, in_use));
            }
        });
    // What was done is done, and is told whatever comes after it.
    let report = report.unwrap_or_else(|error| unchecked(path, &error));
    let mut disks = report.disks;
    for (disk, done) in done {
        let place = disks.iter().position(|report| report.uuid == disk);
        match place {
            Some(place) => add(&mut disks[place], done),
            None if done.is_nothing() => {}
            None => {
                let mut unread = DiskCheck::unread(disk);
                add(&mut unread, done);
                disks.push(DiskCheck { sound: false, ..unread });
            }
        }
    }
    let sound = report.sound && disks.iter().all(|disk| disk.error.is_none());
    Ok(StoreCheck { repaired, disks, sound, ..report })
}

impl Done {
    fn is_nothing(&self) -> bool {
        self.mended.is_empty() && self.cut.is_empty() && self.errors.is_empty()
    }
}

/// A store that could not be checked.
fn unchecked(path: &Path, error: &StoreFileError) -> StoreCheck {
    StoreCheck {
        store: path.display().to_string(),
        damage: vec![format!("the store was not checked after its repair: {}", chain(error))],
        repaired: Vec::new(),
        disks: Vec::new(),
        overlays: Vec::new(),
        forgotten: Vec::new(),
        sound: false,
    }
}

fn add(report: &mut DiskCheck, done: Done) {
    report.mended.extend(done.mended);
    report.cut.extend(done.cut);
    if report.error.is_none() {
        report.error = done.errors.into_iter().next();
    }
    report.sound &= report.error.is_none();
}

struct Work<'a> {
    shelf: &'a Shelf,
    disk: DiskId,
    what: Repair,
}

impl Work<'_> {
    fn run(&self, step: &mut dyn FnMut(ByteCount) -> bool) -> Done {
        let mut done = Done::default();
        let numbers = match self.shelf.numbers(self.disk) {
            Ok(numbers) => numbers,
            Err(error) => return Done { errors: vec![chain(&error)], ..done },
        };
        match shortfalls::remove_damaged(&*self.shelf.storage, &Shelf::dir(self.disk, 1)) {
            Ok(damage) => {
                done.mended.extend(damage.map(|why| format!("{why}: it is removed, with what it told")))
            }
            Err(error) => done.errors.push(format!("remove {}: {error}", shortfalls::FILE)),
        }
        for number in numbers {
            match self.log(number, &mut done, step) {
                Ok(is_open) => done.in_use = is_open.then_some(number),
                Err(LogError::NoLog { .. }) => {}
                // What cannot be mended is damage that the check tells of.
                Err(LogError::Damaged { .. }) => done.in_use = None,
                Err(error) => {
                    // What of it opens nobody knows.
                    done.in_use = Some(number);
                    done.errors.push(chain(&error));
                }
            }
        }
        done
    }

    /// Whether the log can be in use then.
    fn log(
        &self,
        number: u32,
        done: &mut Done,
        step: &mut dyn FnMut(ByteCount) -> bool,
    ) -> Result<bool, LogError> {
        let (shelf, dir) = (self.shelf, Shelf::dir(self.disk, number));
        let storage = &*shelf.storage;
        if FoundBase::read(storage, &dir)?.base.is_some_and(|base| base.is_ended()) {
            // What is left of it are images: there is nothing to open or to cut.
            done.mended.extend(settle_base(storage, &dir)?);
            return Ok(false);
        }
        if let Some(cut) = Cut::read(storage, &dir)? {
            done.mended.extend(settle_base(storage, &dir)?);
            if self.what == Repair::Rebuild {
                return Ok(false);
            }
            if let Some(damage) = Cut::damage_of(storage, &dir) {
                self.io("write", &dir, Cut { why: "a repair has cut it".to_owned() }.write(storage, &dir))?;
                done.mended.push(format!("{damage}: it is written again"));
            }
            if Watermark::unreadable_in(storage, &dir).is_some() {
                let salvaged = shelf.salvage_unnoted(self.disk, number)?;
                self.note_anew(number, salvaged.identity, Noted::whole(reached(&salvaged)), done)?;
            }
            return self.cut(number, cut, true, done).map(|()| false);
        }
        // Opening writes a base again that is not everywhere, once it has proved to be that of the log.
        let base = FoundBase::read(storage, &dir)?.damage;
        let unreadable = match self.what {
            Repair::Rebuild => false,
            Repair::Everything => Watermark::unreadable_in(storage, &dir).is_some(),
        };
        let open = || match unreadable {
            true => shelf.open_unnoted(self.disk, number),
            false => shelf.open(self.disk, number),
        };
        let salvage = || match unreadable {
            true => shelf.salvage_unnoted(self.disk, number),
            false => shelf.salvage_to_repair(self.disk, number),
        };
        // Nothing is cut that a receiver would use: what opens is not looked at any further.
        let opened = match open() {
            Err(error @ LogError::Damaged { .. }) => {
                let headers = salvage()?.mend_headers(storage, &dir)?;
                let any = !headers.is_empty();
                done.mended.extend(headers);
                if any { open() } else { Err(error) }
            }
            opened => opened,
        };
        if opened.is_ok() {
            done.mended.extend(base.iter().map(|damage| format!("{damage}: it is written again")));
        }
        match opened {
            Ok(log) => {
                if unreadable {
                    // Behind what was durable stands what only looks so: its agent has that, and sends it again.
                    self.note_anew(number, Some(log.identity()), Noted::in_doubt(log.durable()), done)?;
                }
                self.in_use(number, log, done, step).map(|()| true)
            }
            Err(LogError::Damaged { .. }) if self.what == Repair::Everything => {
                done.mended.extend(settle_base(storage, &dir)?);
                if unreadable {
                    let salvaged = shelf.salvage_unnoted(self.disk, number)?;
                    let mut end = reached(&salvaged);
                    if !self.is_without_segments(&dir)? {
                        // Something follows what can be read: with a mark below that it would be removed as a torn write.
                        end.seq = end.seq.max(Seq(salvaged.snapshot.through().0 + 1));
                    }
                    self.note_anew(number, salvaged.identity, Noted::whole(end), done)?;
                }
                let salvaged = shelf.salvage_to_repair(self.disk, number)?;
                // Without a base nobody knows that the first of what is left is not where the log begins.
                let nothing = salvaged.has_no_segment() && self.is_without_segments(&dir)?;
                let Some(why) = salvaged.damage.first().filter(|_| salvaged.can_be_cut() || nothing) else {
                    return Ok(false);
                };
                self.cut(number, Cut { why: why.clone() }, false, done).map(|()| false)
            }
            Err(error) => Err(error),
        }
    }

    /// Makes the mark of a log anew that the device cannot read: the log itself tells how far it goes, and its agent whether
    /// that is all. Where nobody knows which log that is, the new one is of none: it tells nothing, and can be read.
    fn note_anew(
        &self,
        number: u32,
        identity: Option<LogIdentity>,
        noted: Noted,
        done: &mut Done,
    ) -> Result<(), LogError> {
        let (shelf, dir) = (self.shelf, Shelf::dir(self.disk, number));
        // One that the device reads after all tells more.
        let Some(damage) = Watermark::unreadable_in(&*shelf.storage, &dir) else { return Ok(()) };
        let identity = identity.or(shelf.memo(self.disk, number).map(|memo| memo.identity));
        let history = identity.map_or(HistoryId(Uuid::nil()), |identity| identity.history);
        let written = Watermark::replace(&*shelf.storage, &dir, history, noted);
        self.io("write", &dir.join(crate::watermark::FILE), written)?;
        done.mended.push(format!(
            "{damage}: it is made anew, up to lsn:{}; how much was durable nobody knows but the disk's agent, which compares \
             everything when it comes back",
            noted.durable.lsn
        ));
        Ok(())
    }

    /// What is noted beside the log in a directory.
    fn noted(&self, dir: &Path, history: HistoryId) -> Result<Option<Noted>, LogError> {
        Watermark::find(&*self.shelf.storage, dir, history)
    }

    /// Mends what a log has that opens.
    fn in_use(
        &self,
        number: u32,
        mut log: DiskLog,
        done: &mut Done,
        step: &mut dyn FnMut(ByteCount) -> bool,
    ) -> Result<(), LogError> {
        let (shelf, dir) = (self.shelf, Shelf::dir(self.disk, number));
        let storage = &*shelf.storage;
        if let Some(attached) = log.timeline().attached()
            && memo::is_free(storage, &dir)
        {
            let memo = Memo { identity: log.identity(), attached: attached.clone() };
            self.io("write", &dir.join(memo::FILE), memo::write_durably(storage, &dir, &memo))?;
            done.mended.push(self.written_again(&dir.join(memo::FILE)));
        }
        if self.noted(&dir, log.identity().history)?.is_none() {
            done.mended.push(self.written_again(&dir.join(crate::watermark::FILE)));
        }
        let snapshot = log.snapshot()?;
        match self.what {
            Repair::Rebuild => done.mended.extend(snapshot.rebuild_footers(step)?),
            Repair::Everything => done.mended.extend(snapshot.check_and_mend(&|_| None, step)?.mended),
        }
        // Notes how far the log is durable where nothing tells, that its end is lost, or what could not be mended.
        shelf.mark(self.disk, number, &log).map(drop)
    }

    /// Cuts a log where it is lost, or ends that when it `was_cut`.
    fn cut(&self, number: u32, cut: Cut, was_cut: bool, done: &mut Done) -> Result<(), LogError> {
        let (shelf, dir) = (self.shelf, Shelf::dir(self.disk, number));
        let storage = &*shelf.storage;
        let salvaged = shelf.salvage_to_repair(self.disk, number)?;
        let memo = shelf.memo(self.disk, number);
        let identity = salvaged.identity.or(memo.as_ref().map(|memo| memo.identity));
        let timeline = salvaged.snapshot.timeline();
        let end = Durable { seq: salvaged.snapshot.through(), lsn: timeline.highest_lsn() };
        let settled = |identity: LogIdentity| matches!(self.noted(&dir, identity.history), Ok(Some(noted)) if noted == Noted::whole(end));
        // What is damaged of it still is not lost by cutting: it was done, and to the end.
        if was_cut && !salvaged.can_be_cut() && identity.is_none_or(settled) {
            return Ok(());
        }
        // A memo that is another program's, or that the device cannot read now, stays.
        let may_remember = memo.is_some() || memo::is_free(storage, &dir);
        if let Some(identity) = identity.filter(|_| may_remember)
            && let Some(attached) = newest(timeline.attached().cloned(), memo.map(|memo| memo.attached))
        {
            let memo = Memo { identity, attached };
            self.io("write", &dir.join(memo::FILE), memo::write_durably(storage, &dir, &memo))?;
        }
        // From here on no receiver opens it, whatever is lost on the way.
        self.io("write", &dir, cut.write(storage, &dir))?;
        if let Some(identity) = identity {
            // What is cut off may be all that tells how far LSNs had come. The mark itself does not go back before it is gone.
            let before = self.noted(&dir, identity.history)?;
            let seq = before.map_or(salvaged.reached(), |noted| noted.durable.seq.max(salvaged.reached()));
            let lost = before.and_then(|noted| noted.lost);
            let reached = Noted { durable: Durable { seq, lsn: end.lsn }, lost };
            let noted = Watermark::replace(storage, &dir, identity.history, reached);
            self.io("write", &dir.join(crate::watermark::FILE), noted)?;
        }
        let aside = Path::new(CUT_DIR).join(self.disk.to_string()).join(format!("log-{number}"));
        salvaged.cut(storage, &dir, &aside)?;
        // Also what a repair has put there that was interrupted.
        let put = self.put_aside(&aside)?;
        if let Some(identity) = identity {
            let noted = Watermark::replace(storage, &dir, identity.history, Noted::whole(end));
            self.io("write", &dir.join(crate::watermark::FILE), noted)?;
        }
        done.cut.push(self.lost(&salvaged, &cut, &put));
        Ok(())
    }

    fn lost(&self, salvaged: &Salvage, cut: &Cut, put: &[PathBuf]) -> String {
        let timeline = salvaged.snapshot.timeline();
        let points = match timeline.intervals().last() {
            Some(last) => format!("every point after {} up to lsn:{}", last.to, timeline.highest_lsn()),
            None => format!("every point up to lsn:{}", timeline.highest_lsn()),
        };
        let aside = match put {
            [] => "nothing was left of them".to_owned(),
            [file] => format!("what was left of them is in {}", file.display()),
            [file, ..] => {
                let directory = file.parent().unwrap_or(file);
                format!("what was left of them is in {}, {} files", directory.display(), put.len())
            }
        };
        format!("{points} is lost, since {}; {aside}, which nothing reads any more", cut.why)
    }

    /// What lies aside of a log.
    fn put_aside(&self, aside: &Path) -> Result<Vec<PathBuf>, LogError> {
        let mut names = match self.shelf.storage.list(aside) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            listed => self.io("list", aside, listed)?,
        };
        names.sort();
        Ok(names.into_iter().map(|name| self.shelf.storage.display(&aside.join(name))).collect())
    }

    fn is_without_segments(&self, dir: &Path) -> Result<bool, LogError> {
        let segments = dir.join("segments");
        match self.shelf.storage.list(&segments) {
            Ok(names) => Ok(!names.iter().any(|name| SegmentId::from_file_name(name).is_some())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(true),
            Err(source) => self.io("list", &segments, Err(source)),
        }
    }

    fn written_again(&self, path: &Path) -> String {
        format!("{} is written again", self.shelf.storage.display(path).display())
    }

    fn io<T>(&self, what: &str, path: &Path, result: io::Result<T>) -> Result<T, LogError> {
        let step = || format!("{what} {}", self.shelf.storage.display(path).display());
        result.map_err(|source| {
            if source.kind() == io::ErrorKind::StorageFull {
                LogError::Full { step: step(), source }
            } else {
                LogError::Io { step: step(), source }
            }
        })
    }
}

/// How far a log goes that nothing but itself tells of.
fn reached(salvaged: &Salvage) -> Durable {
    Durable { seq: salvaged.reached(), lsn: salvaged.snapshot.timeline().highest_lsn() }
}

#[cfg(test)]
mod tests;
