//! How far a scrub is, and when each disk was read last: in memory, and in `scrub.json`.
//!
//! The file is written when a scrub begins and ends, and now and then between: a crash costs the disks that were read since,
//! and they are read again. A file that is damaged costs the order, and the scrub that ran.

use std::{
    collections::{BTreeMap, VecDeque},
    io,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use backtide_receiver_api::{DiskCheck, ScrubStatus};
use backtide_storage::{Storage, read_file, replace_file};
use backtide_units::{ByteCount, CaptureTime, DiskId};
use serde::{Deserialize, Serialize};

use super::Wanted;
use crate::clock;

/// Its name.
const FILE: &str = "scrub.json";
const MAGIC: &str = "backtide-scrub";
const VERSION: u32 = 1;
const FILE_BYTES_MAX: ByteCount = ByteCount(256 << 20);

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
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ScrubFile {
    magic: String,
    version: u32,
    content: Content,
    /// CRC32C of the JSON of this with an empty checksum, in hexadecimal.
    checksum: String,
}

impl ScrubFile {
    fn sum(&mut self) -> String {
        self.checksum.clear();
        let text = serde_json::to_vec(self).expect("plain data becomes JSON");
        format!("{:08x}", crc32c::crc32c(&text))
    }
}

/// See the module's description.
pub(super) struct Progress {
    storage: Arc<dyn Storage>,
    content: Content,
    written: Instant,
}

impl Progress {
    /// What the store's file says.
    pub(super) fn open(storage: Arc<dyn Storage>) -> Self {
        let content = read(&*storage).unwrap_or_else(|why| {
            tracing::error!(why, "how far the last scrub was is not known any more: the next one reads all");
            Content::default()
        });
        Self { storage, content, written: Instant::now() }
    }

    pub(super) fn status(&self) -> Option<&ScrubStatus> {
        self.content.status.as_ref()
    }

    /// A scrub of these disks begins; those that were read longest ago, or never, come first.
    pub(super) fn begin(&mut self, status: ScrubStatus, mut disks: Vec<Wanted>, overlays: bool) {
        if overlays {
            // All disks there are: of others nobody needs to know.
            self.content.read.retain(|disk, _| disks.iter().any(|wanted| wanted.disk == *disk));
        }
        let read = &self.content.read;
        disks.sort_by_key(|wanted| read.get(&wanted.disk).copied());
        self.content.status = Some(status);
        self.content.rest = disks.into();
        self.content.overlays = overlays;
        self.write();
    }

    /// The disk whose turn it is, and what comes after it; it stays the next until [`Progress::read`].
    pub(super) fn next(&self) -> Option<(DiskId, ByteCount)> {
        let mut rest = self.content.rest.iter();
        let next = rest.next()?;
        Some((next.disk, ByteCount(rest.map(|wanted| wanted.bytes.0).sum())))
    }

    /// Whether overlays are to be read.
    pub(super) fn wants_overlays(&self) -> bool {
        self.content.overlays
    }

    /// The disk whose turn it was has been read, or is gone. What was mended of it may have been damage of disks that were
    /// read before, for they share the chunks of images: gives those. Of one that was called off a part was read.
    pub(super) fn read(&mut self, disk: DiskId, found: Option<DiskCheck>, called_off: bool) -> Vec<DiskId> {
        self.content.rest.retain(|wanted| wanted.disk != disk);
        let mut too = Vec::new();
        if let Some(found) = found {
            if found.error.is_none() && !called_off {
                self.content.read.insert(disk, clock::now());
            }
            self.change(|status| {
                for before in &mut status.disks {
                    let damaged = before.damage.len();
                    let (mended, left) =
                        before.damage.drain(..).partition::<Vec<_>, _>(|place| found.mended.contains(place));
                    before.damage = left;
                    before.mended.extend(mended);
                    if before.damage.len() < damaged {
                        before.sound =
                            before.damage.is_empty() && before.more_damage == 0 && before.error.is_none();
                        too.push(before.uuid);
                    }
                }
                status.disks.push(found);
                status.sound = status.disks.iter().all(|disk| disk.sound);
            });
        }
        if self.written.elapsed() >= WRITE_EVERY {
            self.write();
        }
        too
    }

    /// The scrub has ended.
    pub(super) fn end(&mut self, cancelled: bool) {
        self.change(|status| {
            status.running = false;
            if !cancelled {
                status.done_bytes = status.total_bytes;
            }
            status.cancelled = cancelled;
            status.ended = Some(clock::now());
        });
        self.content.rest.clear();
        self.write();
    }

    pub(super) fn change(&mut self, change: impl FnOnce(&mut ScrubStatus)) {
        if let Some(status) = self.content.status.as_mut() {
            change(status);
        }
    }

    /// Puts it into the file, for the next start.
    pub(super) fn write(&mut self) {
        let mut file = ScrubFile {
            magic: MAGIC.to_owned(),
            version: VERSION,
            content: self.content.clone(),
            checksum: String::new(),
        };
        file.checksum = file.sum();
        let bytes = serde_json::to_vec(&file).expect("plain data becomes JSON");
        if let Err(error) = replace_file(&*self.storage, Path::new(FILE), &bytes) {
            tracing::warn!(%error, "cannot note how far the scrub is: the next start does not know it");
        }
        self.written = Instant::now();
    }
}

fn read(storage: &dyn Storage) -> Result<Content, String> {
    let name = storage.display(Path::new(FILE));
    let content = match read_file(storage, Path::new(FILE), FILE_BYTES_MAX) {
        Ok(content) => content,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Content::default()),
        Err(error) => return Err(format!("{} cannot be read: {error}", name.display())),
    };
    let damaged = |why: String| format!("{} is damaged: {why}", name.display());
    let mut file: ScrubFile = serde_json::from_slice(&content).map_err(|error| damaged(error.to_string()))?;
    let found = std::mem::take(&mut file.checksum);
    let expected = file.sum();
    if (file.magic.as_str(), file.version, &found) != (MAGIC, VERSION, &expected) {
        return Err(damaged(format!("expected magic {MAGIC}, version {VERSION} and checksum {expected}")));
    }
    Ok(file.content)
}

/// What is wrong with the file of a store that nobody uses.
pub(crate) fn damage_of(storage: &dyn Storage) -> Option<String> {
    read(storage).err()
}

#[cfg(test)]
mod tests {
    use backtide_storage::MemoryStorage;
    use backtide_units::ByteOffset;

    use super::*;

    fn begun() -> ScrubStatus {
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
            sound: true,
        }
    }

    fn checked(uuid: DiskId) -> DiskCheck {
        DiskCheck {
            name: None,
            uuid,
            segments: 1,
            entries: 2,
            bytes: ByteCount(10),
            damage: Vec::new(),
            more_damage: 0,
            mended: Vec::new(),
            error: None,
            sound: true,
        }
    }

    #[test]
    fn a_chunk_that_two_disks_share_is_mended_for_both() {
        let storage = MemoryStorage::new();
        let disks = [(); 3].map(|()| DiskId::random());
        let mut progress = Progress::open(Arc::new(storage));
        let wanted = disks.map(|disk| Wanted { disk, bytes: ByteCount(10) }).to_vec();
        progress.begin(begun(), wanted, true);
        let damaged = |disk, places: &[&str]| DiskCheck {
            damage: places.iter().map(|place| (*place).to_owned()).collect(),
            sound: false,
            ..checked(disk)
        };
        assert!(progress.read(disks[0], Some(damaged(disks[0], &["a"])), false).is_empty());
        assert!(progress.read(disks[1], Some(damaged(disks[1], &["a", "b"])), false).is_empty());
        let mended = DiskCheck { mended: vec!["a".to_owned()], ..checked(disks[2]) };
        assert_eq!(progress.read(disks[2], Some(mended), false), disks[..2]);
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
        let mut progress = open();
        progress.begin(begun(), wanted(), true);
        assert_eq!(progress.next(), Some((disks[0], ByteCount(20))));
        progress.read(disks[0], Some(checked(disks[0])), false);
        progress.write();
        storage.crash(3);

        let mut progress = open();
        assert_eq!(progress.status().unwrap().disks.len(), 1);
        assert_eq!(progress.next(), Some((disks[1], ByteCount(10))));
        progress.read(disks[1], None, false);
        assert_eq!(progress.next(), Some((disks[2], ByteCount(0))));
        progress.read(disks[2], Some(checked(disks[2])), false);
        assert_eq!(progress.next(), None);
        progress.end(false);
        let status = open().status().cloned().unwrap();
        assert!(!status.running && status.done_bytes == status.total_bytes, "{status:?}");

        progress.begin(begun(), wanted(), true);
        assert_eq!(progress.next().unwrap().0, disks[1], "it was never read");
        storage.flip_bit(Path::new(FILE), ByteOffset(40), 1);
        assert!(damage_of(&storage).unwrap().contains("scrub.json is damaged"));
        assert_eq!(open().status(), None);
    }
}
