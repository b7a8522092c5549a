//! A log of millions of writes, made by the receiver's own writer: an agent's disk would take 4 KiB for each of them,
//! and its allocation longer than all else.

use std::{
    fs::File,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::Context;
use backtide_recovery::{CacheLimits, DiskLog, Entry, LogCache, LogIdentity, LogOptions, PassReason};
use backtide_storage::{RealStorage, Storage};
use backtide_units::{
    ByteCount, ByteOffset, ByteRange, CaptureTime, DiskId, Epoch, HistoryId, Lsn, PayloadChecksum,
};
use bytes::Bytes;
use rustix::fs::{Advice, fadvise};
use uuid::Uuid;

/// Bytes of the disk.
pub(crate) const SIZE: u64 = 1 << 40;

/// Bytes of a write: what it holds has no part in this, so it is as little as a sector.
pub(crate) const WRITE: usize = 512;

/// The first of the writes.
pub(crate) const FIRST: Lsn = Lsn(2);

/// Records between two syncs.
const BATCH: u64 = 1 << 16;

/// What was made.
pub(crate) struct LongLog {
    pub(crate) storage: Arc<dyn Storage>,
    /// Where its files lie in the storage.
    pub(crate) place: PathBuf,
    pub(crate) bytes: u64,
    pub(crate) segments: usize,
}

/// Writes the log of `disk` into a store that no receiver has open.
pub(crate) fn fill(store: &Path, records: u64) -> anyhow::Result<LongLog> {
    let disk = DiskId(Uuid::from_u128(0x6f70_656e));
    let place = Path::new("disks").join(disk.to_string());
    let storage: Arc<dyn Storage> = Arc::new(RealStorage::open(store)?);
    let identity = LogIdentity { disk, history: HistoryId(Uuid::from_u128(1)) };
    let cache = LogCache::new(CacheLimits::default());
    let mut log = DiskLog::create(Arc::clone(&storage), &place, identity, LogOptions::default(), &cache)?;
    let time = |lsn: u64| CaptureTime(1_700_000_000_000_000 + lsn * 100);
    log.append(Entry::Attach {
        epoch: Epoch(1),
        attach: Uuid::from_u128(2),
        next_lsn: Lsn(1),
        size: ByteCount(SIZE),
        name: "disk".parse()?,
        time: time(0),
        facts: Default::default(),
    })?;
    let (at, reason) = (Lsn(1), PassReason { code: 1, text: "the first".to_owned() });
    log.append(Entry::PassBegin { at, gap_from: Lsn(0), time: time(1), reason })?;
    log.append(Entry::PassEnd { at, valid_from: Some(at), time: time(1) })?;
    let mut random = Random(7);
    let payload = Bytes::from(vec![0x5a; WRITE]);
    let checksum = PayloadChecksum::of(&payload);
    for lsn in FIRST.0..FIRST.0 + records {
        let start = random.range().start();
        let range = ByteRange::new(start, ByteCount(WRITE as u64)).context("a range")?;
        let (payload, checksum) = (payload.clone(), checksum.clone());
        log.append(Entry::Write { lsn: Lsn(lsn), time: time(lsn), range, payload, checksum })?;
        if lsn.is_multiple_of(BATCH) {
            sync(&mut log)?;
        }
    }
    log.seal()?;
    for _ in 0..3 {
        sync(&mut log)?;
    }
    let (bytes, segments) = (log.size().0, log.segment_count());
    Ok(LongLog { storage, place, bytes, segments })
}

fn sync(log: &mut DiskLog) -> anyhow::Result<()> {
    if let Some(ticket) = log.ticket()? {
        log.synced(ticket.sync())?;
    }
    Ok(())
}

/// Takes the store's files out of the page cache.
pub(crate) fn forget(store: &Path) -> anyhow::Result<()> {
    for path in files(store)? {
        let file = File::open(&path)?;
        file.sync_all()?;
        fadvise(&file, 0, None, Advice::DontNeed)?;
    }
    Ok(())
}

fn files(directory: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(directory)? {
        let entry = entry?;
        match entry.file_type()? {
            kind if kind.is_dir() => found.extend(files(&entry.path())?),
            kind if kind.is_file() => found.push(entry.path()),
            _ => {}
        }
    }
    Ok(found)
}

/// Xorshift.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    /// 4 KiB somewhere.
    pub(crate) fn range(&mut self) -> ByteRange {
        for shift in [13_i32, -7, 17] {
            let shifted = if shift > 0 { self.0 << shift } else { self.0 >> -shift };
            self.0 ^= shifted;
        }
        let start = ByteOffset(self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) % (SIZE / 4096) * 4096);
        ByteRange::between(start, ByteOffset(start.0 + 4096))
    }
}
