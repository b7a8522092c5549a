//! The logs of one disk in its directory: the one in use, and those that were damaged before it.
//!
//! ```text
//! STORE/disks/<uuid>/segments/*.seg         the first log
//! STORE/disks/<uuid>/log-2/segments/*.seg   the log that began when the first was found damaged
//! STORE/disks/<uuid>/log-3/...              and so on; the last one is in use
//! ```
//! Nothing is appended to a damaged log any more: what it still gives back stays until it is old (`past.rs`), and everything that
//! comes goes into a new log with a history of its own. So it is with one that a repair has cut (`cut.rs`).

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use backtide_recovery::{
    DiskLog, FoundBase, LogError, LogIdentity, Salvage, Seq, Touched, Unreadable, damaged_place, salvage,
};
use backtide_units::{ByteOffset, DiskId, HistoryId};

use crate::{
    cut::Cut,
    disk::{Disk, Failure, Wanted, chain},
    disks::{DISKS, Shelf},
    log_mark::{LogMark, Loss},
    memo::{self, Memo},
    past::Past,
    touched::touched,
    watermark::{self, Lost, Noted, Watermark},
};

/// A disk that has so many logs with segments, all but the last damaged, has a store that cannot be trusted with one more. Those
/// of which retention has left images at most do not count.
pub(crate) const LOGS_MAX: usize = 16;

/// The highest number that a log may have: each has a directory for good, which tells what was there.
pub(crate) const NUMBER_MAX: u32 = 1000;

/// What is left of a log that is out of use.
pub(crate) struct LeftOver {
    /// None when nothing can be read of it.
    pub(crate) salvaged: Option<Salvage>,
    pub(crate) memo: Option<Memo>,
    /// The device could not read some of it: the next look may give more.
    pub(crate) unread: bool,
}

impl Shelf {
    /// The directory of a disk's log: of its first, or of one that followed.
    pub(crate) fn dir(disk: DiskId, log: u32) -> PathBuf {
        let first = Path::new(DISKS).join(disk.to_string());
        if log == 1 { first } else { first.join(format!("log-{log}")) }
    }

    /// The numbers of a disk's logs, from 1 on.
    pub(crate) fn numbers(&self, disk: DiskId) -> Result<Vec<u32>, LogError> {
        let dir = Self::dir(disk, 1);
        let names = match self.storage.list(&dir) {
            Ok(names) => names,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(source) => {
                let dir = self.storage.display(&dir);
                let step = format!(
                    "list {}, which tells the disk's newest log: nothing of the disk is opened before that succeeds",
                    dir.display()
                );
                return Err(LogError::Io { step, source });
            }
        };
        let number = |name: &String| name.strip_prefix("log-")?.parse().ok();
        let later = names.iter().filter_map(number).filter(|number| (2..=NUMBER_MAX).contains(number));
        let mut numbers: Vec<u32> = std::iter::once(1).chain(later).collect();
        numbers.sort_unstable();
        Ok(numbers)
    }

    /// A disk with its logs, recovered; none when there is nothing of it. A log that cannot be opened
    /// is kept with the reason, and with what can still be read of it. One whose logs cannot be listed is kept with the reason alone.
    pub(crate) fn open_disk(&self, disk: DiskId) -> Option<Disk> {
        let numbers = match self.numbers(disk) {
            Ok(numbers) => numbers,
            Err(error) => {
                let memo = (1..=NUMBER_MAX).rev().find_map(|number| self.memo(disk, number));
                let attached = memo.map(|memo| memo.attached);
                return Some(Disk::unlisted(disk, &error, attached, self.shortfalls(disk)));
            }
        };
        // A crash while a log was being made leaves one that is none: nobody was ever told of it.
        let found = numbers.iter().rev().find_map(|&number| match self.open(disk, number) {
            Err(LogError::NoLog { .. }) => None,
            opened => Some((number, opened)),
        });
        let (number, opened) = found?;
        let mut past = Past::default();
        for &before in numbers.iter().filter(|before| **before < number) {
            past.put(self.ended(disk, before));
        }
        let opened = opened.and_then(|log| {
            let mark = self.mark(disk, number, &log)?;
            Ok((log, mark))
        });
        let opened = opened.map_err(|error| Failure::from(&error));
        let mut opened = Disk::new(disk, number, opened, past, self.shortfalls(disk));
        self.make_readable(&mut opened);
        Some(opened)
    }

    /// What is known beside an open log about how far it was durable. A log that ends before that has lost
    /// bytes that were acknowledged: that is said loudly and noted durably, and the agent's handshake finds it too. What opening
    /// has met of damage is noted among what was found of the disk; what nobody knew of puts the log in doubt, once, unless it is
    /// surely of the past.
    ///
    /// # Errors
    /// When what is known cannot be read, or a loss cannot be noted.
    pub(crate) fn mark(&self, disk: DiskId, number: u32, log: &DiskLog) -> Result<LogMark, LogError> {
        let dir = Self::dir(disk, number);
        let noted = self.noted(&dir)?.filter(|(history, _)| *history == log.identity().history);
        let (found, damage) = (log.durable(), log.damage_met()?);
        let findings = self.findings.of_life(disk);
        let known = noted.and_then(|(_, noted)| noted.lost_of(found.seq, log.timeline()));
        // What newer content covers no compare would bring back, and nothing that follows needs.
        let is_past = |why: &str| damage.touched.get(damaged_place(why)).is_some_and(Touched::is_past);
        let raises_doubt = |why: &String| findings.is_new(why) && !is_past(why);
        let lost = match damage.damage.iter().any(raises_doubt) {
            true => Some(Lost { is_compared: false, ..known.unwrap_or(Lost::in_doubt(found)) }),
            false => known,
        };
        let loss = lost.map(|lost| Loss::of(lost, self.lost_sentence(&dir, lost, found.seq)));
        if let Some(loss) = &loss {
            tracing::error!(%disk, why = loss.why, "what was acknowledged is to be compared");
        }
        let mark = Watermark::open(&*self.storage, &dir, log.identity().history, found);
        let mark = mark.and_then(|mark| match &loss {
            Some(loss) => mark.write_durably(Loss::noted(Some(loss), found)).map(|()| mark),
            None => Ok(mark),
        });
        let watermark = match mark {
            Ok(mark) => Some(mark),
            // The mark of before tells of more than there is: what is appended now and torn would be taken for damage.
            Err(source) if loss.is_some() => return Err(self.loss_not_noted(&dir, source)),
            Err(error) => {
                tracing::warn!(%disk, %error, "cannot note beside the log how far it is durable");
                None
            }
        };
        // Behind the mark: what is known puts no log in doubt.
        for why in &damage.damage {
            let known = damage.touched.get(damaged_place(why));
            findings.note_opening(why, known.map(|known| touched(damaged_place(why), known)));
        }
        Ok(LogMark { watermark, watch: self.watch.clone(), loss })
    }

    /// What is noted beside the log in a directory of how far it was durable, and of which history.
    ///
    /// # Errors
    /// When that cannot be read: a log that has lost its end would look whole.
    fn noted(&self, dir: &Path) -> Result<Option<(HistoryId, Noted)>, LogError> {
        let step = || {
            format!(
                "read {}, which tells how far the log was durable (if it stays so, `backtide fsck --repair` makes it anew)",
                self.storage.display(&dir.join(watermark::FILE)).display()
            )
        };
        Watermark::of_any(&*self.storage, dir).map_err(|error| match error {
            LogError::Io { source, .. } => LogError::Io { step: step(), source },
            newer => newer,
        })
    }

    pub(crate) fn loss_not_noted(&self, dir: &Path, source: io::Error) -> LogError {
        let step = format!(
            "write {}, which is to tell that the log has lost what was durable: it is used again when that can be written",
            self.storage.display(&dir.join(watermark::FILE)).display()
        );
        match source.kind() {
            io::ErrorKind::StorageFull => LogError::Full { step, source },
            _ => LogError::Io { step, source },
        }
    }

    /// A sentence.
    pub(crate) fn lost_sentence(&self, dir: &Path, lost: Lost, end: Seq) -> String {
        let through = lost.through;
        let segments = self.storage.display(&dir.join("segments"));
        let (segments, seq, lsn) = (segments.display(), through.seq, through.lsn);
        // It is said as long as an agent compares, too.
        let since = "not everything has been compared since";
        if lost.in_doubt {
            return format!(
                "what the log in {segments} holds up to entry {seq} (lsn:{lsn}) is in doubt, and {since}: some of it is damaged, \
                 or `backtide fsck --repair` has made the mark of how far it was durable anew"
            );
        }
        if seq > end {
            return format!(
                "the end of the log in {segments} is lost: entries up to {seq} (lsn:{lsn}) were durable, and {since}; it ends \
                 with entry {end}"
            );
        }
        format!(
            "the end of the log in {segments} is lost: everything up to lsn:{lsn} was durable, and {since}"
        )
    }

    /// Reads what is left of a log that is out of use, unless all of it is known. What cannot be read is said by the failure.
    pub(crate) fn make_readable(&self, disk: &mut Disk) {
        let Some(wanted) = disk.wants_salvage() else { return };
        let left = self.left_of(disk.id(), disk.log_number(), &wanted);
        disk.salvaged(left);
    }

    /// What is left of a log that is out of use.
    pub(crate) fn left_of(&self, disk: DiskId, number: u32, wanted: &Wanted) -> LeftOver {
        let whole = self.salvage_where(Unreadable::IsAnError, disk, number, wanted.through, Seq(0));
        // What the device cannot read now is damage to nobody for longer than it stays so.
        let unread =
            matches!(whole, Err(LogError::Io { .. })) || self.noted(&Self::dir(disk, number)).is_err();
        let salvaged = match whole {
            Err(LogError::Io { .. }) => self.salvage(disk, number, wanted.through),
            salvaged => salvaged,
        };
        let salvaged = match salvaged {
            Ok(salvaged) => {
                for damage in &salvaged.damage {
                    tracing::error!(%disk, damage, "the log is damaged");
                }
                Some(salvaged)
            }
            Err(error) => {
                tracing::warn!(%disk, why = chain(&error), "nothing can be read of a log that failed");
                None
            }
        };
        LeftOver { salvaged, memo: self.memo(disk, number), unread }
    }

    /// Opens a log with what is known beside it.
    pub(crate) fn open_marked(&self, disk: DiskId, number: u32) -> Result<(DiskLog, LogMark), LogError> {
        let log = self.open(disk, number)?;
        let mark = self.mark(disk, number, &log)?;
        Ok((log, mark))
    }

    pub(crate) fn salvage(&self, disk: DiskId, log: u32, through: Option<Seq>) -> Result<Salvage, LogError> {
        self.salvage_where(Unreadable::IsDamage, disk, log, through, Seq(0))
    }

    /// As [`Shelf::salvage`], for deciding what of a log goes.
    pub(crate) fn salvage_to_repair(&self, disk: DiskId, log: u32) -> Result<Salvage, LogError> {
        self.noted(&Self::dir(disk, log))?;
        self.salvage_unnoted(disk, log)
    }

    /// As [`Shelf::salvage_to_repair`], also when the device cannot read how far the log was durable: that is in what it says
    /// is damaged then, and all that is there may have been acknowledged.
    pub(crate) fn salvage_unnoted(&self, disk: DiskId, log: u32) -> Result<Salvage, LogError> {
        self.salvage_where(Unreadable::IsAnError, disk, log, None, Seq(u64::MAX))
    }

    /// With `unnoted` for what was durable where the device cannot read how far the log was.
    fn salvage_where(
        &self,
        unreadable: Unreadable,
        disk: DiskId,
        log: u32,
        through: Option<Seq>,
        unnoted: Seq,
    ) -> Result<Salvage, LogError> {
        let dir = Self::dir(disk, log);
        let known = self.memo(disk, log).map(|memo| memo.identity);
        let cut = Cut::read(&*self.storage, &dir)?;
        let noted = self.noted(&dir);
        let durable = |identity| noted.as_ref().map_or(unnoted, |noted| durable_of(*noted, identity));
        let salvaged = salvage(&self.storage, &dir, &self.cache, known, through, durable, unreadable);
        let mut salvaged = match (salvaged, &cut) {
            (Err(LogError::NoLog { .. }), Some(cut)) => {
                Salvage::nothing(cut.why.clone()).cut_because(&cut.why)
            }
            (Err(error @ LogError::NoLog { .. }), None) => {
                Salvage::nothing(chain(&self.lost(disk, log).ok_or(error)?))
            }
            (Ok(salvaged), _) if salvaged.is_ended() => return Ok(salvaged),
            (Ok(salvaged), Some(cut)) if salvaged.damage.is_empty() || salvaged.has_no_segment() => {
                salvaged.cut_because(&cut.why)
            }
            (salvaged, _) => salvaged?,
        };
        // What is left can be read all the same.
        let noted = noted.unwrap_or_else(|error| {
            salvaged.damage.push(chain(&error));
            None
        });
        let of = salvaged.identity.or(known).map(|known| known.history);
        let noted = noted.filter(|(history, _)| of.is_none_or(|of| of == *history));
        let Some((_, noted)) = noted else { return Ok(salvaged) };
        salvaged.damage.extend(self.lost_end_by(&dir, &noted, &salvaged));
        Ok(salvaged.reaching(noted.highest()))
    }

    /// The sentence among what is damaged of a log that says that its end is lost, as one that is in use says it too.
    pub(crate) fn lost_end_of(&self, disk: DiskId, log: u32, salvaged: &Salvage) -> Option<String> {
        let dir = Self::dir(disk, log);
        let (history, noted) = self.noted(&dir).ok().flatten()?;
        let is_its_own = salvaged.identity.is_none_or(|identity| identity.history == history);
        self.lost_end_by(&dir, &noted, salvaged).filter(|_| is_its_own && !salvaged.is_ended())
    }

    fn lost_end_by(&self, dir: &Path, noted: &Noted, salvaged: &Salvage) -> Option<String> {
        let end = salvaged.reached();
        let lost = noted.lost_of(end, salvaged.snapshot.timeline()).filter(|lost| !lost.in_doubt);
        lost.filter(|_| end > Seq(0)).map(|lost| self.lost_sentence(dir, lost, end))
    }

    /// What to say of a directory without a segment to go by, when something beside tells that a log was in use
    /// there: it is written when the first segment is durable, so nothing but damage leaves it alone.
    fn lost(&self, disk: DiskId, log: u32) -> Option<LogError> {
        let dir = Self::dir(disk, log);
        let noted = Watermark::of_any(&*self.storage, &dir).ok().flatten();
        // What tells of its images elsewhere outlives a directory that somebody has removed.
        let is_there = || self.storage.list(&dir).is_ok();
        let has_base = || FoundBase::read(&*self.storage, &dir).is_ok_and(|found| found.base.is_some());
        if noted.is_none()
            && !(is_there() && has_base())
            && self.memo(disk, log).is_none()
            && memo::damage_of(&*self.storage, &dir).is_none()
            && Watermark::damage_of(&*self.storage, &dir).is_none()
        {
            return None;
        }
        let end = match noted {
            Some((_, Noted { durable, .. })) if durable.seq > Seq(0) => {
                format!("entries up to {} (lsn:{}) were durable", durable.seq, durable.lsn)
            }
            Some(_) | None => "nothing tells how much was durable".to_owned(),
        };
        Some(LogError::Damaged {
            file: self.storage.display(&dir.join("segments")),
            offset: ByteOffset::ZERO,
            what: format!("all of the log is lost, no segment of it is left; {end}"),
        })
    }

    pub(crate) fn memo(&self, disk: DiskId, log: u32) -> Option<Memo> {
        memo::read(&*self.storage, &Self::dir(disk, log)).filter(|memo| memo.identity.disk == disk)
    }

    /// Remembers the newest attach beside the log.
    pub(crate) fn remember(&self, disk: &Disk) {
        let (Some(history), Some(attached)) =
            (disk.history(), disk.timeline().and_then(|timeline| timeline.attached()))
        else {
            return;
        };
        let identity = LogIdentity { disk: disk.id(), history };
        let memo = Memo { identity, attached: attached.clone() };
        let dir = Self::dir(disk.id(), disk.log_number());
        if let Err(error) = memo::write(&*self.storage, &dir, &memo) {
            tracing::warn!(disk = %disk.id(), %error, "cannot write disk.json beside the log");
        }
    }

    pub(crate) fn open(&self, disk: DiskId, log: u32) -> Result<DiskLog, LogError> {
        let noted = self.noted(&Self::dir(disk, log))?;
        self.open_by(disk, log, |identity| durable_of(noted, identity))
    }

    /// As [`Shelf::open`] when the device cannot read how far the log was durable: all that is there may have been
    /// acknowledged, so a payload that is not whole is damage and no torn write, and no segment is removed that holds anything.
    pub(crate) fn open_unnoted(&self, disk: DiskId, log: u32) -> Result<DiskLog, LogError> {
        self.open_by(disk, log, |_| Seq(u64::MAX))
    }

    fn open_by(
        &self,
        disk: DiskId,
        log: u32,
        noted: impl FnOnce(LogIdentity) -> Seq,
    ) -> Result<DiskLog, LogError> {
        let dir = Self::dir(disk, log);
        if let Some(cut) = Cut::read(&*self.storage, &dir)? {
            return Err(LogError::Damaged {
                file: self.storage.display(&dir.join("segments")),
                offset: ByteOffset::ZERO,
                what: format!("`backtide fsck --repair` has cut it: {}", cut.why),
            });
        }
        let storage = Arc::clone(&self.storage);
        let (log, recovered) = match DiskLog::open_noted(storage, &dir, self.log, &self.cache, noted) {
            Err(error @ LogError::NoLog { .. }) => return Err(self.lost(disk, log).unwrap_or(error)),
            opened => opened?,
        };
        let durable = log.durable();
        tracing::info!(%disk, lsn = %durable.lsn, segments = recovered.segments, "log opened");
        if !recovered.cut_bytes.is_zero() || !recovered.removed_segments.is_empty() {
            tracing::info!(%disk, cut_bytes = %recovered.cut_bytes, removed_segments = ?recovered.removed_segments, "unacknowledged end of the log cut");
        }
        if !recovered.damaged_entries.is_empty() {
            tracing::error!(%disk, entries = ?recovered.damaged_entries, "the log has damaged entries");
        }
        Ok(log)
    }

    /// Makes a log.
    pub(crate) fn create(&self, disk: DiskId, log: u32) -> Result<DiskLog, LogError> {
        let identity = LogIdentity { disk, history: (self.new_history)() };
        let dir = Self::dir(disk, log);
        let created = DiskLog::create(Arc::clone(&self.storage), &dir, identity, self.log, &self.cache);
        let created = match created {
            Ok(created) => created,
            // A claim that failed after its log was made: it goes on with that one.
            Err(LogError::LogExists { .. }) => return self.open(disk, log),
            Err(error) => return Err(error),
        };
        tracing::info!(%disk, log, history = %identity.history, "new log");
        Ok(created)
    }
}

/// Up to which entry a log is noted to have been durable.
fn durable_of(noted: Option<(HistoryId, Noted)>, identity: LogIdentity) -> Seq {
    let noted = noted.filter(|(history, _)| *history == identity.history);
    noted.map_or(Seq(0), |(_, noted)| noted.durable.seq)
}
