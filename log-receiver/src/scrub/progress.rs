//! How far a scrub is, and when each disk was read last: in memory, and in `scrub.json`, which `FORMAT.md` beside this crate
//! describes.
//!
//! The file is written when a scrub begins, is called off and ends, and now and then between: a crash costs the disks that were
//! read since, and they are read again. A file that is damaged costs the order, and the scrub that ran; one of a newer version
//! stays as it is. Whoever asks how far it is never waits for the file: it is written outside of the lock of what it says.

use std::{
    collections::{BTreeMap, VecDeque},
    path::Path,
    sync::{Arc, Mutex, MutexGuard},
    time::{Duration, Instant},
};

use backtide_receiver_api::{DiskCheck, ScrubStatus};
use backtide_recovery::damaged_place;
use backtide_storage::Storage;
use backtide_units::{ByteCount, CaptureTime, DiskId};
use serde::{Deserialize, Serialize};

use super::{Wanted, lock, schedule::Runs};
use crate::{
    clock,
    sealed_json::{SealedError, SealedJson},
};

/// Its name.
pub(crate) const FILE: &str = "scrub.json";
const KIND: SealedJson = SealedJson { magic: "backtide-scrub", version: 1, bytes_max: ByteCount(256 << 20) };

/// The file is written again no sooner while a scrub runs.
const WRITE_EVERY: Duration = Duration::from_secs(10);

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Content {
    /// The scrub that runs, or ran last.
    status: Option<ScrubStatus>,
    /// The disks it has not come to the end of, the next first.
    rest: VecDeque<Wanted>,
    /// Whether overlays come after them.
    overlays: bool,
    /// When disks were read to their end last.
    read: BTreeMap<DiskId, CaptureTime>,
    /// When the last scrub of everything ended, of those before the one in `status`. Not in the file where there was none:
    /// programs that do not know of it read that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    whole: Option<CaptureTime>,
    /// What scrubs before the one in `status` found outside of the disks, of those since the last that read everything to its
    /// end. Not in the file where there is nothing, as `whole`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    outside: Vec<Outside>,
}

/// Damage that a scrub found outside of the disks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Outside {
    /// The overlay that it is of; else a small file is damaged.
    pub(super) overlay: Option<String>,
    /// A sentence.
    pub(super) why: String,
}

/// See the module's description.
pub(super) struct Progress {
    storage: Arc<dyn Storage>,
    content: Mutex<Content>,
    /// Held while the file is written, and taken before the lock of what it says, so that the newest is written last.
    file: Mutex<File>,
}

struct File {
    written: Instant,
    /// It is of a newer version.
    stays: bool,
}

impl Progress {
    /// What the store's file says.
    pub(super) fn open(storage: Arc<dyn Storage>) -> Self {
        let read = KIND.read::<Content>(&*storage, Path::new(FILE));
        let stays = matches!(read, Err(SealedError::Version { .. }));
        let content = read.unwrap_or_else(|error| {
            let why = error.to_string();
            tracing::error!(why, "how far the last scrub was is not known any more: the next one reads all");
            None
        });
        let file = File { written: Instant::now(), stays };
        Self { storage, content: Mutex::new(content.unwrap_or_default()), file: Mutex::new(file) }
    }

    /// What runs, or ran last.
    pub(super) fn status(&self) -> Option<ScrubStatus> {
        self.content().status.clone()
    }

    /// What is known to be damaged outside of the disks: found by the last scrub that read everything to its end, or since.
    pub(super) fn outside(&self) -> Vec<Outside> {
        self.content().found_outside()
    }

    /// Which one runs.
    pub(super) fn runs(&self) -> Runs {
        let content = self.content();
        match (content.status.as_ref().is_some_and(|status| status.running), content.overlays) {
            (false, _) => Runs::Nothing,
            (true, false) => Runs::Part,
            (true, true) => Runs::Whole,
        }
    }

    /// When the last scrub of everything ended, however it did.
    pub(super) fn whole_ended(&self) -> Option<CaptureTime> {
        self.content().whole_ended()
    }

    /// Whether the scrub that runs was called off.
    pub(super) fn is_cancelled(&self) -> bool {
        self.content().status.as_ref().is_some_and(|status| status.running && status.cancelled)
    }

    /// A scrub of these disks begins; those that were read longest ago, or never, come first.
    pub(super) fn begin(&self, status: ScrubStatus, mut disks: Vec<Wanted>, overlays: bool) {
        {
            let mut content = self.content();
            if overlays {
                // All disks there are: of others nobody needs to know.
                content.read.retain(|disk, _| disks.iter().any(|wanted| wanted.disk == *disk));
            }
            disks.sort_by_key(|wanted| content.read.get(&wanted.disk).copied());
            content.whole = content.whole_ended();
            content.outside = content.found_outside();
            content.status = Some(status);
            content.rest = disks.into();
            content.overlays = overlays;
        }
        self.write();
    }

    /// Calls off the scrub that runs, if one does: it ends soon, and no start goes on with it.
    pub(super) fn cancel(&self) {
        let running = self.content().status.as_mut().filter(|status| status.running).map(|status| {
            status.cancelled = true;
        });
        if running.is_some() {
            self.write();
        }
    }

    /// The disk whose turn it is, and what comes after it; it stays the next until [`Progress::read`].
    pub(super) fn next(&self) -> Option<(DiskId, ByteCount)> {
        let content = self.content();
        let mut rest = content.rest.iter();
        let next = rest.next()?;
        Some((next.disk, ByteCount(rest.map(|wanted| wanted.bytes.0).sum())))
    }

    /// Whether overlays are to be read.
    pub(super) fn wants_overlays(&self) -> bool {
        self.content().overlays
    }

    /// The disk whose turn it was has been read, or is gone. What was mended of it may have been damage of disks that were
    /// read before, for they share the chunks of images: gives those. Of one that was called off a part was read.
    pub(super) fn read(&self, disk: DiskId, found: Option<DiskCheck>) -> Vec<DiskId> {
        let too = self.content().read(disk, found);
        if lock(&self.file).written.elapsed() >= WRITE_EVERY {
            self.write();
        }
        too
    }

    /// The scrub has ended; with `cancelled` before its time, whoever wanted that.
    pub(super) fn end(&self, cancelled: bool) {
        {
            let mut content = self.content();
            content.rest.clear();
            if let Some(status) = &mut content.status {
                status.running = false;
                status.cancelled |= cancelled;
                if !status.cancelled {
                    status.done_bytes = status.total_bytes;
                }
                status.ended = Some(clock::now());
            }
        }
        self.write();
    }

    /// The scrub could not run: it is over, and none of everything for those who count from the end of such a one.
    pub(super) fn end_unread(&self) {
        {
            let mut content = self.content();
            let found = content.found_outside();
            (content.overlays, content.outside) = (false, found);
        }
        self.end(true);
    }

    /// Changes what is told of the scrub that runs.
    pub(super) fn change(&self, change: impl FnOnce(&mut ScrubStatus)) {
        if let Some(status) = self.content().status.as_mut() {
            change(status);
        }
    }

    /// Puts it into the file, for the next start.
    pub(super) fn write(&self) {
        let mut file = lock(&self.file);
        if file.stays {
            return;
        }
        let content = self.content().clone();
        if let Err(error) = KIND.write(&*self.storage, Path::new(FILE), &content) {
            tracing::warn!(%error, "cannot note how far the scrub is: the next start does not know it");
        }
        file.written = Instant::now();
    }

    fn content(&self) -> MutexGuard<'_, Content> {
        lock(&self.content)
    }
}

impl Content {
    fn found_outside(&self) -> Vec<Outside> {
        let Some(status) = &self.status else { return self.outside.clone() };
        // One of some disks, one that runs and one that was called off need not have come to all there is.
        let read_all = self.overlays && !status.running && !status.cancelled;
        let mut found = if read_all { Vec::new() } else { self.outside.clone() };
        let files = status.damage.iter().map(|why| Outside { overlay: None, why: why.clone() });
        let of_overlays = status.overlays.iter().flat_map(|overlay| {
            let whys = overlay.damage.iter().chain(&overlay.error);
            whys.map(|why| Outside { overlay: Some(overlay.id.clone()), why: why.clone() })
        });
        for outside in files.chain(of_overlays) {
            if !found.contains(&outside) {
                found.push(outside);
            }
        }
        found
    }

    fn whole_ended(&self) -> Option<CaptureTime> {
        let last = self.status.as_ref().filter(|_| self.overlays).and_then(|status| status.ended);
        last.or(self.whole)
    }

    fn read(&mut self, disk: DiskId, found: Option<DiskCheck>) -> Vec<DiskId> {
        self.rest.retain(|wanted| wanted.disk != disk);
        let (Some(found), Some(status)) = (found, &mut self.status) else { return Vec::new() };
        if found.error.is_none() && !status.cancelled {
            self.read.insert(disk, clock::now());
        }
        let mut too = Vec::new();
        for before in &mut status.disks {
            let damaged = before.damage.len();
            let is_mended = |place: &String| found.mended.iter().any(|mended| mended == damaged_place(place));
            let (mended, left) = before.damage.drain(..).partition::<Vec<_>, _>(is_mended);
            before.damage = left;
            before.touched.retain(|touched| !mended.iter().any(|gone| damaged_place(gone) == touched.place));
            before.mended.extend(mended.iter().map(|place| damaged_place(place).to_owned()));
            if before.damage.len() < damaged {
                before.sound = before.damage.is_empty() && before.more_damage == 0 && before.error.is_none();
                too.push(before.uuid);
            }
        }
        status.disks.push(found);
        status.sound = status.damage.is_empty() && status.disks.iter().all(|disk| disk.sound);
        too
    }
}

/// What is wrong with the file of a store that nobody uses.
pub(crate) fn damage_of(storage: &dyn Storage) -> Option<String> {
    KIND.read::<Content>(storage, Path::new(FILE)).err().map(|error| error.to_string())
}

/// Whether it is damaged, and no other program's.
pub(crate) fn is_damaged(storage: &dyn Storage) -> bool {
    KIND.damage_of::<Content>(storage, Path::new(FILE)).is_some()
}

/// Does with the file of a store what a receiver does.
#[cfg(test)]
pub(crate) fn take(storage: &Arc<dyn Storage>) {
    let progress = Progress::open(Arc::clone(storage));
    let (next, _, _) = (progress.next(), progress.status(), progress.wants_overlays());
    if let Some((disk, _)) = next {
        progress.read(disk, None);
    }
    progress.begin(
        tests::begun(),
        vec![Wanted { disk: DiskId(uuid::Uuid::nil()), bytes: ByteCount(1) }],
        true,
    );
    progress.end(true);
}

#[cfg(test)]
mod golden;

#[cfg(test)]
pub(crate) mod tests {
    use backtide_receiver_api::OverlayCheck;
    use backtide_storage::MemoryStorage;
    use backtide_units::ByteOffset;

    use super::*;

    /// Files of a scrub that runs, and of one that has ended and found something.
    pub(crate) fn samples() -> Vec<Vec<u8>> {
        let storage = MemoryStorage::new();
        let disks = [1, 2].map(|number| DiskId(uuid::Uuid::from_u128(number)));
        let progress = Progress::open(Arc::new(storage.clone()));
        progress.begin(begun(), disks.map(|disk| Wanted { disk, bytes: ByteCount(10) }).to_vec(), true);
        let file = || backtide_storage::read_file(&storage, Path::new(FILE), KIND.bytes_max).unwrap();
        let runs = file();
        let damage = vec!["a.seg is damaged at byte 7".to_owned()];
        progress.read(disks[0], Some(DiskCheck { damage, sound: false, ..checked(disks[0]) }));
        progress.end(false);
        let ended = file();
        progress.begin(begun(), Vec::new(), false);
        vec![runs, ended, file()]
    }

    pub(super) fn begun() -> ScrubStatus {
        ScrubStatus {
            running: true,
            cancelled: false,
            started: CaptureTime(1),
            ended: None,
            done_bytes: ByteCount::ZERO,
            total_bytes: ByteCount(30),
            bytes_per_second_max: ByteCount(5),
            disks: Vec::new(),
            overlays: Vec::new(),
            damage: Vec::new(),
            sound: true,
        }
    }

    fn checked(uuid: DiskId) -> DiskCheck {
        DiskCheck { segments: 1, entries: 2, bytes: ByteCount(10), sound: true, ..DiskCheck::unread(uuid) }
    }

    #[test]
    fn when_everything_was_read_last_is_known_whatever_is_read_since_and_after_a_start() {
        let storage = MemoryStorage::new();
        let open = || Progress::open(Arc::new(storage.clone()));
        let wanted = || vec![Wanted { disk: DiskId::random(), bytes: ByteCount(10) }];
        let progress = open();
        progress.begin(begun(), wanted(), false);
        assert_eq!((progress.runs(), progress.whole_ended()), (Runs::Part, None));
        progress.end(false);
        assert_eq!((progress.runs(), open().whole_ended()), (Runs::Nothing, None), "of one disk");
        progress.begin(begun(), wanted(), true);
        assert_eq!((progress.runs(), progress.whole_ended()), (Runs::Whole, None));
        progress.end(false);
        let first = progress.status().unwrap().ended;
        assert!(first.is_some() && open().whole_ended() == first);
        progress.begin(begun(), wanted(), false);
        progress.end(false);
        storage.crash(1);
        assert_eq!(open().whole_ended(), first, "one of a disk is none");
        let progress = open();
        progress.begin(begun(), wanted(), true);
        assert_eq!(open().whole_ended(), first, "the next one has not ended");
        progress.end_unread();
        assert_eq!((progress.runs(), open().whole_ended()), (Runs::Nothing, first), "nor was it ever read");
        progress.begin(begun(), wanted(), true);
        progress.cancel();
        progress.end(true);
        assert_eq!(
            open().whole_ended(),
            progress.status().unwrap().ended,
            "who called it off wants none now"
        );
    }

    #[test]
    fn what_is_damaged_outside_of_the_disks_is_known_until_all_of_it_was_read_and_is_whole() {
        let storage = MemoryStorage::new();
        let open = || Progress::open(Arc::new(storage.clone()));
        let wanted = || vec![Wanted { disk: DiskId::random(), bytes: ByteCount(10) }];
        let progress = open();
        let damage = vec!["store.json is damaged".to_owned()];
        progress.begin(ScrubStatus { damage, ..begun() }, wanted(), true);
        let overlay = OverlayCheck {
            id: "vm1-1".to_owned(),
            disk: None,
            bytes: ByteCount::ZERO,
            damage: vec!["its map is damaged".to_owned()],
            more_damage: 0,
            error: None,
            sound: false,
        };
        progress.change(|status| status.overlays.push(overlay));
        progress.end(false);
        let found = progress.outside();
        assert_eq!(found.len(), 2, "{found:?}");
        // Of some disks; all of it, called off; and again by the next receiver.
        for (all, cancelled) in [(false, false), (true, true), (true, true)] {
            progress.begin(begun(), wanted(), all);
            assert_eq!((progress.outside(), open().outside()), (found.clone(), found.clone()));
            progress.end(cancelled);
            assert_eq!((progress.outside(), open().outside()), (found.clone(), found.clone()));
        }
        progress.begin(begun(), wanted(), true);
        assert_eq!(progress.outside(), found, "it has not come to its end");
        progress.end(false);
        assert_eq!((progress.outside(), open().outside()), (Vec::new(), Vec::new()));
    }

    #[test]
    fn a_chunk_that_two_disks_share_is_mended_for_both() {
        let storage = MemoryStorage::new();
        let disks = [(); 3].map(|()| DiskId::random());
        let progress = Progress::open(Arc::new(storage));
        let wanted = disks.map(|disk| Wanted { disk, bytes: ByteCount(10) }).to_vec();
        progress.begin(begun(), wanted, true);
        let damaged = |disk, places: &[&str]| DiskCheck {
            damage: places.iter().map(|place| (*place).to_owned()).collect(),
            sound: false,
            ..checked(disk)
        };
        assert!(progress.read(disks[0], Some(damaged(disks[0], &["a"]))).is_empty());
        assert!(progress.read(disks[1], Some(damaged(disks[1], &["a", "b"]))).is_empty());
        let mended = DiskCheck { mended: vec!["a".to_owned()], ..checked(disks[2]) };
        assert_eq!(progress.read(disks[2], Some(mended)), disks[..2]);
        let status = progress.status().unwrap();
        assert!(status.disks[0].sound && status.disks[0].mended == ["a"], "{status:?}");
        assert_eq!(status.disks[1].damage, ["b"]);
        assert!(!status.disks[1].sound && !status.sound, "{status:?}");
    }

    #[test]
    fn a_scrub_goes_on_where_it_was_and_the_next_begins_with_who_was_read_longest_ago() {
        let storage = MemoryStorage::new();
        let disks = [(); 3].map(|()| DiskId::random());
        let wanted = || disks.map(|disk| Wanted { disk, bytes: ByteCount(10) }).to_vec();
        let open = || Progress::open(Arc::new(storage.clone()));
        let progress = open();
        progress.begin(begun(), wanted(), true);
        assert_eq!(progress.next(), Some((disks[0], ByteCount(20))));
        progress.read(disks[0], Some(checked(disks[0])));
        progress.write();
        storage.crash(3);

        let progress = open();
        assert_eq!(progress.status().unwrap().disks.len(), 1);
        assert_eq!(progress.next(), Some((disks[1], ByteCount(10))));
        progress.read(disks[1], None);
        assert_eq!(progress.next(), Some((disks[2], ByteCount(0))));
        progress.read(disks[2], Some(checked(disks[2])));
        assert_eq!(progress.next(), None);
        progress.end(false);
        let status = open().status().unwrap();
        assert!(!status.running && status.done_bytes == status.total_bytes, "{status:?}");

        progress.begin(begun(), wanted(), true);
        assert_eq!(progress.next().unwrap().0, disks[1], "it was never read");
        storage.flip_bit(Path::new(FILE), ByteOffset(40), 1);
        assert!(damage_of(&storage).unwrap().contains("scrub.json is damaged"));
        assert_eq!(open().status(), None);
    }
}
