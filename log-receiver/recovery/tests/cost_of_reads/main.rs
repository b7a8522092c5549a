//! What a read of a view costs, counted and not timed: it follows what is read, not what is stored.
#![allow(unreachable_pub, reason = "modules of a test")]

mod counting;

use std::{path::Path, sync::Arc};

use backtide_recovery::{CacheLimits, DiskLog, Entry, LogCache, LogIdentity, LogOptions, PassReason};
use backtide_units::{
    ByteCount, ByteOffset, ByteRange, CaptureTime, DiskId, HistoryId, Lsn, PayloadChecksum,
};
use bytes::Bytes;
use uuid::Uuid;

use counting::CountingStorage;

const MIB: u64 = 1 << 20;

/// A log in sync, with a small cache.
struct Fixture {
    storage: CountingStorage,
    log: DiskLog,
    lsn: Lsn,
}

fn range(start: u64, count: u64) -> ByteRange {
    ByteRange::new(ByteOffset(start), ByteCount(count)).expect("a range")
}

impl Fixture {
    fn new(options: LogOptions) -> Self {
        let storage = CountingStorage::default();
        let cache = LogCache::new(CacheLimits { index_bytes_max: ByteCount(MIB), open_files_max: 4 });
        let identity =
            LogIdentity { disk: DiskId(Uuid::from_u128(1)), history: HistoryId(Uuid::from_u128(2)) };
        let shared = Arc::new(storage.clone());
        let log = DiskLog::create(shared, Path::new("d"), identity, options, &cache).expect("create");
        let mut this = Self { storage, log, lsn: Lsn(1) };
        let (at, time) = (Lsn(1), CaptureTime(1));
        let reason = PassReason { code: 1, text: String::new() };
        this.append(Entry::PassBegin { at, gap_from: Lsn(0), time, reason });
        this.append(Entry::PassEnd { at, valid_from: Some(at), time });
        this
    }

    fn append(&mut self, entry: Entry) {
        self.log.append(entry).expect("append");
    }

    fn write(&mut self, range: ByteRange, byte: u8) -> Lsn {
        self.lsn = self.lsn.next();
        let payload = Bytes::from(vec![byte; range.count().0 as usize]);
        let checksum = PayloadChecksum::of(&payload);
        self.append(Entry::Write { lsn: self.lsn, time: CaptureTime(1), range, payload, checksum });
        self.lsn
    }
}

#[test]
fn a_small_read_of_a_large_write_reads_one_piece() {
    let mut log = Fixture::new(LogOptions::default());
    let at = log.write(range(4096, 32 * MIB), 7);
    log.log.seal().expect("seal");
    let view = log.log.view(at).expect("a point");
    let place = range(4096 + 20 * MIB, 4096);
    let (read, cost) = log.storage.during(|| view.read(place).expect("read"));
    assert_eq!(read, vec![7; 4096]);
    // The piece, the table, the entry's header, and what stands in the index.
    assert!(cost.bytes <= 65_536 + 2048 + 64 + 3 * 4096, "{cost:?}");
    // The next blocks come from the same piece, which is kept.
    let (_, cost) = log.storage.during(|| view.read(range(place.start().0 + 8192, 4096)).expect("read"));
    assert_eq!(cost.bytes, 0);
}
