//! The tracking file of an attached disk: header, sign of life, activity log, two snapshots.
//! `FORMAT.md` beside this crate describes the bytes and says why a crash loses nothing.
//!
//! Invariants: a snapshot is written where the older of the two lies, so the newer stays; a record
//! is written where no record lies that the durable snapshot needs ([`crate::ActivityLog`] sees to
//! that). Damage is an error and never a guess: everything is compared then.

use std::{
    io,
    ops::Range,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use backtide_storage::{KillPoint, Storage, StorageFile, replace_with};
use backtide_units::{BlockCount, BlockRange, ByteCount, ByteOffset, CaptureTime, DiskId};
use bytes::{Buf, BufMut};
use uuid::Uuid;

use crate::{
    DirtyBitmap,
    extents::{ActivityLimits, ExtentRun},
    record::{LogRecord, SECTOR_BYTES, Sector},
    snapshot::Snapshot,
};

const MAGIC: [u8; 8] = *b"BTTRFILE";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 8 + 4 + 4 + 16 + 8 + 4 + 4 + 8 + 4;
const LIFE_BYTES: usize = 8 + 16 + 8 + 8 + 8 + 4;
const SECTOR: u64 = SECTOR_BYTES as u64;

/// Where the sign of life lies; the log follows in the next sector.
const LIFE_AT: u64 = SECTOR;
const LOG_AT: u64 = 2 * SECTOR;

/// So many sectors of the log are given a place on the file system at once, which costs as much as
/// one. All at once would make every attach wait for the whole log to be written.
const FILL_SECTORS: u64 = 64;

/// No log is longer: 1 GiB.
const SECTORS_MAX: u32 = 1 << 18;

/// When the agent that has the disk was last known to be alive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SignOfLife {
    /// By the wall clock.
    pub at: CaptureTime,
    /// Which boot of the host: `/proc/sys/kernel/random/boot_id`.
    pub boot: Uuid,
    /// The image as it was then; none where a device or a server is behind.
    pub image: Option<ImageSeen>,
    /// The last capture time given until then.
    pub captured: CaptureTime,
}

/// Which file an image is, and when it was written last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImageSeen {
    /// Its inode.
    pub inode: u64,
    /// Nanoseconds since 1970, by the file system's clock.
    pub modified_ns: u64,
}

/// An open tracking file. Cheap to share; calls may overlap, but for two snapshots or two records.
#[derive(Clone)]
pub struct TrackingFile {
    file: Arc<dyn StorageFile>,
    layout: Layout,
    filled: Arc<Mutex<Filled>>,
}

/// Which sectors of the log have a place on the file system, as far as this process gave them one.
#[derive(Debug, Default)]
struct Filled {
    /// The first record written by this process.
    first: Option<u64>,
    /// Records below have a place.
    until: u64,
}

impl Filled {
    /// Those of the first so many records.
    fn up_to(room: u64) -> Self {
        Self { first: (room > 0).then_some(1), until: room + 1 }
    }

    /// The records whose sectors have to be filled with record `sequence`: a stretch ahead of it, once
    /// for each stretch of the first round.
    fn with(&mut self, sequence: u64, sectors: u32) -> Range<u64> {
        let first = *self.first.get_or_insert(sequence);
        let end = (sequence + FILL_SECTORS).min(first.saturating_add(sectors.into()));
        if sequence < self.until || end <= sequence {
            return sequence..sequence;
        }
        self.until = end;
        sequence + 1..end
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Layout {
    disk: DiskId,
    extent: BlockCount,
    sectors: u32,
    slot_bytes: u64,
}

/// What a tracking file says.
#[derive(Clone, Debug, PartialEq)]
pub struct Loaded {
    /// Its newest snapshot.
    pub snapshot: Snapshot,
    /// All blocks of extents that were hot, by the snapshot or by the log after it.
    pub hot: DirtyBitmap,
    /// A clean detach made the file, and nothing has happened since.
    pub clean: bool,
    /// The last sign of life of the agent that had the disk.
    pub alive: Option<SignOfLife>,
}

/// Why a tracking file says nothing.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// It cannot be read.
    #[error("cannot read the tracking file {path}: {source}")]
    Io {
        /// Which.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// What it holds is not what was written.
    #[error("the tracking file {path} is damaged: {what}")]
    Damaged {
        /// Which.
        path: PathBuf,
        /// What is wrong, and where.
        what: String,
    },
}

impl TrackingFile {
    /// Puts a new file at `path`, holding `snapshot`, in the place of one that is there: a crash
    /// leaves the old one or the new one. A snapshot by which everything may differ is there twice:
    /// should one be damaged later, nobody takes the file for an older one that knew better.
    ///
    /// # Errors
    /// The storage's. After one, the old file or the new one is in place, and none beside it as far
    /// as the storage allows.
    pub fn create(
        storage: &dyn Storage,
        path: &Path,
        limits: ActivityLimits,
        size: ByteCount,
        snapshot: &Snapshot,
    ) -> io::Result<Self> {
        Self::put(storage, path, limits, size, snapshot, 0)
    }

    /// The same with a place on the file system for the first records: where there is none, the file would be given up
    /// with the first of them.
    ///
    /// # Errors
    /// As [`create`](Self::create).
    pub fn create_with_room(
        storage: &dyn Storage,
        path: &Path,
        limits: ActivityLimits,
        size: ByteCount,
        snapshot: &Snapshot,
    ) -> io::Result<Self> {
        Self::put(storage, path, limits, size, snapshot, FILL_SECTORS)
    }

    fn put(
        storage: &dyn Storage,
        path: &Path,
        limits: ActivityLimits,
        size: ByteCount,
        snapshot: &Snapshot,
        room: u64,
    ) -> io::Result<Self> {
        let layout = Layout {
            disk: snapshot.saved.disk,
            extent: limits.extent,
            sectors: limits.sectors.clamp(1, SECTORS_MAX),
            slot_bytes: slot_bytes(limits, size),
        };
        let room = room.min(layout.sectors.into());
        let file = replace_with(storage, path, |file| {
            file.write_at(ByteOffset(LOG_AT), &vec![0; room as usize * SECTOR_BYTES])?;
            let bytes = snapshot.encode();
            put_snapshot(file, layout, snapshot.generation, &bytes)?;
            if snapshot.everything {
                put_snapshot(file, layout, snapshot.generation + 1, &bytes)?;
            }
            file.write_at(ByteOffset::ZERO, &layout.encode())
        })?;
        Ok(Self { file, layout, filled: Arc::new(Mutex::new(Filled::up_to(room))) })
    }

    /// Makes a record of the activity log durable.
    ///
    /// # Errors
    /// The storage's. After one, nobody knows what of the file is durable: use it no more.
    pub fn write_record(&self, record: &LogRecord) -> io::Result<()> {
        self.fill_ahead(record.sequence)?;
        self.file.write_at(self.place_of(record.sequence), &record.encode())?;
        KillPoint::ActivityWritten.reached();
        self.file.sync_data()?;
        KillPoint::ActivityDurable.reached();
        Ok(())
    }

    /// Gives the sectors after a record a place on the file system, so that the records which follow need
    /// not wait for it to find one. None of them holds a record: the log is in its first round.
    fn fill_ahead(&self, sequence: u64) -> io::Result<()> {
        let sectors = self.layout.sectors;
        let ahead = self.filled.lock().unwrap_or_else(PoisonError::into_inner).with(sequence, sectors);
        if ahead.is_empty() {
            return Ok(());
        }
        let zeroes = vec![0; (ahead.end - ahead.start) as usize * SECTOR_BYTES];
        // Up to the end of the log, and the rest at its beginning.
        let to_end = u64::from(sectors) - (ahead.start - 1) % u64::from(sectors);
        let split = (to_end as usize * SECTOR_BYTES).min(zeroes.len());
        self.file.write_at(self.place_of(ahead.start), &zeroes[..split])?;
        if split < zeroes.len() {
            self.file.write_at(ByteOffset(LOG_AT), &zeroes[split..])?;
        }
        Ok(())
    }

    fn place_of(&self, sequence: u64) -> ByteOffset {
        ByteOffset(LOG_AT + (sequence - 1) % u64::from(self.layout.sectors) * SECTOR)
    }

    /// Makes a snapshot durable; returns what it takes.
    ///
    /// # Errors
    /// As [`write_record`](Self::write_record).
    pub fn write_snapshot(&self, snapshot: &Snapshot) -> io::Result<ByteCount> {
        let bytes = snapshot.encode();
        put_snapshot(&*self.file, self.layout, snapshot.generation, &bytes)?;
        KillPoint::SnapshotWritten.reached();
        self.file.sync_data()?;
        KillPoint::SnapshotDurable.reached();
        Ok(ByteCount(bytes.len() as u64))
    }

    /// Says that the agent is alive. Not durable by itself: it has to outlive a process only.
    ///
    /// # Errors
    /// The storage's.
    pub fn sign(&self, alive: SignOfLife) -> io::Result<()> {
        let mut bytes = Vec::with_capacity(LIFE_BYTES);
        bytes.put_u64_le(alive.at.0);
        bytes.put_slice(alive.boot.as_bytes());
        let ImageSeen { inode, modified_ns } = alive.image.unwrap_or(ImageSeen { inode: 0, modified_ns: 0 });
        bytes.put_u64_le(inode);
        bytes.put_u64_le(modified_ns);
        bytes.put_u64_le(alive.captured.0);
        let crc = crc32c::crc32c(&bytes);
        bytes.put_u32_le(crc);
        self.file.write_at(ByteOffset(LIFE_AT), &bytes)
    }
}

fn put_snapshot(file: &dyn StorageFile, layout: Layout, generation: u64, bytes: &[u8]) -> io::Result<()> {
    if bytes.len() as u64 > layout.slot_bytes {
        let message = format!("a snapshot of {} bytes does not fit into {}", bytes.len(), layout.slot_bytes);
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, message));
    }
    file.write_at(ByteOffset(layout.slot_at(generation)), bytes)
}

impl Loaded {
    /// Reads the tracking file at `path`; none when there is none.
    ///
    /// # Errors
    /// When it cannot be read or is damaged: everything has to be compared then.
    pub fn from_file(storage: &dyn Storage, path: &Path) -> Result<Option<Self>, LoadError> {
        let named = || storage.display(path);
        let file = match storage.open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(LoadError::Io { path: named(), source }),
        };
        let reader = Reader { file: &*file, len: 0 };
        reader.load().map(Some).map_err(|failure| match failure {
            Failure::Io(source) => LoadError::Io { path: named(), source },
            Failure::Damaged(what) => LoadError::Damaged { path: named(), what },
        })
    }
}

enum Failure {
    Io(io::Error),
    Damaged(String),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

struct Reader<'a> {
    file: &'a dyn StorageFile,
    len: u64,
}

impl Reader<'_> {
    fn load(mut self) -> Result<Loaded, Failure> {
        self.len = self.file.len()?.0;
        let layout = Layout::decode(&self.bytes(0, SECTOR)?)?;
        let snapshot = self.newest_snapshot(layout)?;
        if snapshot.saved.disk != layout.disk {
            return Err(Failure::Damaged(format!(
                "header of disk {}, snapshot of {}",
                layout.disk, snapshot.saved.disk
            )));
        }
        let records = self.records(layout, snapshot.log_from)?;
        let mut hot = DirtyBitmap::new();
        let logged = records.iter().flat_map(|record| &record.runs);
        for run in snapshot.hot.iter().chain(logged) {
            hot.insert(ExtentRun::blocks(*run, layout.extent));
        }
        let clean = snapshot.clean && records.is_empty();
        Ok(Loaded { snapshot, hot, clean, alive: self.sign_of_life()? })
    }

    /// Up to `count` bytes from `at` on: fewer at the end of the file.
    fn bytes(&self, at: u64, count: u64) -> io::Result<Vec<u8>> {
        let count = count.min(self.len.saturating_sub(at));
        let mut bytes = vec![0; usize::try_from(count).map_err(io::Error::other)?];
        self.file.read_exact_at(ByteOffset(at), &mut bytes)?;
        Ok(bytes)
    }

    fn newest_snapshot(&self, layout: Layout) -> Result<Snapshot, Failure> {
        let mut found = Vec::new();
        let mut wrong = String::new();
        for slot in 0..2 {
            match self.snapshot_at(layout.slot_at(slot), layout.slot_bytes)? {
                Some(Ok(snapshot)) => found.push(snapshot),
                Some(Err(what)) => wrong = what,
                None => {}
            }
        }
        let newest = found.into_iter().max_by_key(|snapshot| snapshot.generation);
        newest.ok_or_else(|| Failure::Damaged(format!("no snapshot is whole {wrong}")))
    }

    /// None where nothing was written yet.
    fn snapshot_at(&self, at: u64, slot_bytes: u64) -> io::Result<Option<Result<Snapshot, String>>> {
        let head = self.bytes(at, 16)?;
        if head.iter().all(|byte| *byte == 0) {
            return Ok(None);
        }
        let Some(length) = Snapshot::length(&head).filter(|length| *length <= slot_bytes) else {
            return Ok(Some(Err(format!("(at byte {at}: no snapshot begins there)"))));
        };
        let decoded = Snapshot::decode(&self.bytes(at, length)?);
        Ok(Some(decoded.map_err(|error| format!("(at byte {at}: {error})"))))
    }

    /// The log's records from `log_from` on. The log is damaged when one is missing, or when
    /// something follows the last that is neither a record nor empty: a record torn by a power loss
    /// looks like one that was durable and rotted, and only one of them may be passed over.
    fn records(&self, layout: Layout, log_from: u64) -> Result<Vec<LogRecord>, Failure> {
        let mut records = Vec::new();
        let mut damaged = None;
        let sectors = u64::from(layout.sectors);
        // Piece by piece: many disks are opened at once.
        for first in (0..sectors).step_by(FILL_SECTORS as usize) {
            let count = FILL_SECTORS.min(sectors - first);
            let log = self.bytes(LOG_AT + first * SECTOR, count * SECTOR)?;
            for (place, sector) in (first..).zip(log.chunks(SECTOR_BYTES)) {
                match Sector::decode(sector) {
                    Sector::Empty => {}
                    Sector::Record(record) if (record.sequence - 1) % sectors != place => {
                        damaged = Some(place);
                    }
                    Sector::Record(record) if record.sequence >= log_from => records.push(record),
                    Sector::Record(_) => {}
                    Sector::Damaged => damaged = Some(place),
                }
            }
        }
        if let Some(place) = damaged {
            return Err(Failure::Damaged(format!("sector {place} of the activity log")));
        }
        records.sort_by_key(|record| record.sequence);
        match (log_from..).zip(&records).find(|(expected, record)| record.sequence != *expected) {
            None => Ok(records),
            Some((missing, _)) => {
                Err(Failure::Damaged(format!("record {missing} of the activity log is missing")))
            }
        }
    }

    fn sign_of_life(&self) -> io::Result<Option<SignOfLife>> {
        let bytes = self.bytes(LIFE_AT, LIFE_BYTES as u64)?;
        if bytes.len() < LIFE_BYTES {
            return Ok(None);
        }
        let (body, mut crc) = bytes.split_at(LIFE_BYTES - 4);
        if crc.get_u32_le() != crc32c::crc32c(body) {
            return Ok(None);
        }
        let mut input = body;
        let at = CaptureTime(input.get_u64_le());
        let mut boot = [0; 16];
        input.copy_to_slice(&mut boot);
        let image = ImageSeen { inode: input.get_u64_le(), modified_ns: input.get_u64_le() };
        let image = (image.inode != 0).then_some(image);
        let captured = CaptureTime(input.get_u64_le());
        Ok(Some(SignOfLife { at, boot: Uuid::from_bytes(boot), image, captured }))
    }
}

impl Layout {
    fn slot_at(self, generation: u64) -> u64 {
        let first = LOG_AT + u64::from(self.sectors) * SECTOR;
        first + (generation % 2) * self.slot_bytes
    }

    fn encode(self) -> Vec<u8> {
        let mut out = Vec::with_capacity(HEADER_BYTES);
        out.put_slice(&MAGIC);
        out.put_u32_le(VERSION);
        out.put_u32_le(0);
        out.put_slice(self.disk.0.as_bytes());
        out.put_u64_le(self.extent.0);
        out.put_u32_le(self.sectors);
        out.put_u32_le(0);
        out.put_u64_le(self.slot_bytes);
        let crc = crc32c::crc32c(&out);
        out.put_u32_le(crc);
        out
    }

    fn decode(sector: &[u8]) -> Result<Self, Failure> {
        let damaged = |what: String| Err(Failure::Damaged(what));
        let Some(header) = sector.get(..HEADER_BYTES) else {
            return damaged(format!("{} bytes, expected a header of {HEADER_BYTES}", sector.len()));
        };
        if header[..8] != MAGIC {
            return damaged(format!("expected magic {MAGIC:?}, found {:?}", &header[..8]));
        }
        let (body, mut crc) = header.split_at(HEADER_BYTES - 4);
        let mut input = &body[8..];
        let version = input.get_u32_le();
        if version != VERSION {
            return damaged(format!("version {version}, this build reads version {VERSION}"));
        }
        if crc.get_u32_le() != crc32c::crc32c(body) {
            return damaged("the header's checksum does not match".to_owned());
        }
        input.advance(4);
        let mut disk = [0; 16];
        input.copy_to_slice(&mut disk);
        let extent = BlockCount(input.get_u64_le());
        let sectors = input.get_u32_le();
        input.advance(4);
        let slot_bytes = input.get_u64_le();
        if extent.0 == 0
            || extent.0 > 1 << 32
            || sectors == 0
            || sectors > SECTORS_MAX
            || slot_bytes > 1 << 48
        {
            return damaged(format!(
                "extents of {extent} blocks, {sectors} sectors, slots of {slot_bytes} bytes"
            ));
        }
        Ok(Self { disk: DiskId(Uuid::from_bytes(disk)), extent, sectors, slot_bytes })
    }
}

/// Room for the largest snapshot of a disk: two bitmaps with a bit for every block, what Roaring
/// adds to them, and the hot extents. Most of it is never written and takes no space.
fn slot_bytes(limits: ActivityLimits, size: ByteCount) -> u64 {
    let bits = BlockRange::whole_disk(size).count().0.div_ceil(8);
    let hot = u64::from(limits.extents_of(size)) * 8;
    (2 * (bits + bits / 64) + hot + (1 << 16)).next_multiple_of(SECTOR)
}

#[cfg(test)]
mod tests;
