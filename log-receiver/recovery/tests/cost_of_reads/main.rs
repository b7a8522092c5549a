//! What a read of a view costs, counted and not timed: it follows what is read, not what is stored.
#![allow(unreachable_pub, reason = "modules of a test")]

mod counting;

use std::{path::Path, sync::Arc};

use backtide_recovery::{
    CacheLimits, Compression, DiskLog, Entry, LogCache, LogIdentity, LogOptions, PassReason,
};
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
    options: LogOptions,
}

fn range(start: u64, count: u64) -> ByteRange {
    ByteRange::new(ByteOffset(start), ByteCount(count)).expect("a range")
}

fn cache() -> LogCache {
    LogCache::new(CacheLimits {
        index_bytes_max: ByteCount(MIB),
        open_files_max: 4,
        ..CacheLimits::default()
    })
}

impl Fixture {
    fn new(options: LogOptions) -> Self {
        let storage = CountingStorage::default();
        let identity =
            LogIdentity { disk: DiskId(Uuid::from_u128(1)), history: HistoryId(Uuid::from_u128(2)) };
        let shared = Arc::new(storage.clone());
        let log = DiskLog::create(shared, Path::new("d"), identity, options, &cache()).expect("create");
        let mut this = Self { storage, log, lsn: Lsn(1), options };
        let (at, time) = (Lsn(1), CaptureTime(1));
        let reason = PassReason { code: 1, text: String::new() };
        this.append(Entry::PassBegin { at, gap_from: Lsn(0), time, reason });
        this.append(Entry::PassEnd { at, valid_from: Some(at), time });
        this
    }

    fn sync(&mut self) {
        if let Some(ticket) = self.log.ticket().expect("a ticket") {
            self.log.synced(ticket.sync()).expect("durable");
        }
    }

    /// The log opened once more, with an empty cache.
    fn opened(&self) -> DiskLog {
        let storage = Arc::new(self.storage.clone());
        DiskLog::open(storage, Path::new("d"), self.options, &cache()).expect("open").0
    }

    fn reopen(&mut self) {
        self.log.snapshot().expect("everything is in the files");
        self.log = self.opened();
    }

    fn zero(&mut self, range: ByteRange) {
        self.lsn = self.lsn.next();
        self.append(Entry::Zero { lsn: self.lsn, time: CaptureTime(1), range, trim: true });
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
    // Of the same piece, which was checked, the next read takes no more than the blocks that it wants.
    for (start, count, bytes) in [(8192, 4096, 4096), (4096, 512, 4096), (12_000, 1000, 8192)] {
        let place = range(place.start().0 + start, count);
        let (read, cost) = log.storage.during(|| view.read(place).expect("read"));
        assert_eq!(read, vec![7; count as usize]);
        assert_eq!(cost.bytes, bytes, "{place}");
    }
}

/// `segments` sealed segments. Each writes a bucket of its own and one that all write; the first alone
/// writes `LONELY`.
fn many_segments(segments: u64) -> Fixture {
    let mut log = Fixture::new(LogOptions::default());
    log.write(range(LONELY, 4096), 1);
    for n in 0..segments {
        log.write(range((1000 + n) * 65_536, 4096), n as u8);
        log.write(range(HOT, 4096), n as u8);
        log.log.seal().expect("seal");
    }
    log
}

const LONELY: u64 = 5 * 65_536;
const HOT: u64 = 7 * 65_536;

#[test]
fn the_cost_of_a_look_up_does_not_grow_with_segments_that_do_not_touch_the_block() {
    let costs = [10, 600].map(|segments| {
        let mut log = many_segments(segments);
        let point = Lsn(log.lsn.0 / 2);
        [
            (LONELY, log.lsn),
            (HOT, log.lsn),
            (HOT, point),
            ((1000 + segments / 2) * 65_536, log.lsn),
            (0, point),
        ]
        .map(|(place, at)| {
            log.reopen();
            let view = log.log.view(at).expect("a point");
            let (_, cost) = log.storage.during(|| view.read(range(place, 4096)).expect("read"));
            // Guide and index block of two segments, as the point may lie between the two writes of one;
            // header and payload.
            assert!(cost.reads <= 6, "{cost:?}");
            cost
        })
    });
    assert_eq!(costs[0], costs[1], "of 10 segments and of 600");
}

#[test]
fn opening_a_point_reads_footers_and_not_the_log() {
    let mut log = Fixture::new(LogOptions { segment_bytes_max: ByteCount(8 * MIB), ..LogOptions::default() });
    for n in 0..160 {
        log.write(range(n * MIB, MIB / 4), 3);
        log.sync();
    }
    log.log.seal().expect("seal");
    let size = log.log.size().0;
    let (opened, cost) = log.storage.during(|| log.opened());
    log.log = opened;
    let segments = log.log.segment_count() as u64;
    // The last footer is checked against its entries; of the others only the summaries are read.
    assert!(cost.bytes < 10 * MIB + segments * 1000, "{cost:?} of {size} bytes");
    let middle = Lsn(60);
    let snapshot = log.log.snapshot().expect("snapshot");
    let (view, cost) = log.storage.during(|| snapshot.view(middle).expect("a point"));
    assert_eq!(cost.reads, 0, "{cost:?}");
    assert_eq!(view.at(), middle);
    // A time, too, needs one stretch of the log and not a segment.
    let (_, cost) = log.storage.during(|| snapshot.time_of(middle).expect("a time"));
    assert!(cost.bytes <= 2 * MIB, "{cost:?}");
}

#[test]
fn the_status_of_a_huge_disk_costs_what_it_has_and_not_its_size() {
    const TIB: u64 = 1 << 40;
    let disk = range(0, 16 * TIB);
    let mut log = Fixture::new(LogOptions::default());
    for n in 0..20 {
        log.write(range(n * 799 * MIB * 1000, 8192), 1);
    }
    log.zero(range(4096, 16 * TIB - 12_288));
    let empty = log.lsn;
    for n in 1..10 {
        log.write(range(n * TIB + 512, 1024), 1);
    }
    let full = log.lsn;
    let held = log.log.snapshot().expect("snapshot");
    log.log.seal().expect("seal");
    // The segment of the first snapshot was sealed under it.
    for snapshot in [held, log.log.snapshot().expect("snapshot")] {
        let status = |at: Lsn| snapshot.view(at).expect("a point").extents(disk).expect("extents").len();
        assert_eq!(status(empty), 2, "data in the first block, zeroes");
        assert_eq!(status(full), 2 + 2 * 9);
        assert_eq!(snapshot.changed_blocks(empty, full).expect("changed").len(), 9);
        let all = snapshot.changed_blocks(Lsn(1), full).expect("changed").len();
        assert_eq!(all, 16 * TIB / 4096 - 2, "all but the last two");
    }
    log.reopen();
    let view = log.log.view(full).expect("a point");
    let (_, cost) = log.storage.during(|| view.extents(disk).expect("extents"));
    assert!(cost.reads <= 3, "{cost:?}");
}

#[test]
fn what_is_durable_is_let_go_but_for_the_newest() {
    let mut log =
        Fixture::new(LogOptions { segment_bytes_max: ByteCount(20 * MIB), ..LogOptions::default() });
    log.write(range(0, 8 * MIB), 1);
    log.sync();
    assert_eq!(log.storage.let_go(), [], "a reader of the newest points wants it");
    for n in 0..4 {
        log.write(range(n * 8 * MIB, 8 * MIB), 1);
    }
    let ticket = log.log.ticket().expect("a ticket").expect("there is something to sync");
    assert_eq!(log.storage.let_go(), [], "nothing of it is durable");
    log.log.synced(ticket.sync()).expect("durable");
    // 16 MiB in each of two segments, and 8 in a third: the first goes, and of the second what is older than 16 MiB.
    let gone = log.storage.let_go();
    assert_eq!(gone.len(), 2, "{gone:?}");
    assert!((16 * MIB..17 * MIB).contains(&gone[0].end().0), "{gone:?}");
    assert!((8 * MIB..9 * MIB).contains(&gone[1].end().0), "{gone:?}");
    log.write(range(0, 8 * MIB), 1);
    let ticket = log.log.ticket().expect("a ticket").expect("there is something to sync");
    log.storage.fail_a_sync();
    assert!(log.log.synced(ticket.sync()).is_err());
    assert_eq!(log.storage.let_go(), [], "nobody knows what is durable");
}

#[test]
fn a_small_read_of_what_was_compressed_reads_and_decompresses_one_batch_once() {
    for compression in [Compression::Lz4, Compression::Zstd] {
        let mut log = Fixture::new(LogOptions { compression, ..LogOptions::default() });
        for n in 0..1000 {
            log.write(range(n * MIB, 4096), n as u8);
        }
        log.log.seal().expect("seal");
        assert!(log.log.size() < ByteCount(1000 * 4096 / 4), "it is compressed: {}", log.log.size());
        let view = log.log.view(log.lsn).expect("a point");
        let read = |n: u64| {
            let (read, cost) = log.storage.during(|| view.read(range(n * MIB, 4096)).expect("read"));
            assert_eq!(read, vec![n as u8; 4096]);
            cost
        };
        let first = read(512);
        // Header, body's header and table, frame, and what stands in the index.
        assert!(first.bytes <= 65_536 + 2048 + 3 * 4096, "{first:?}");
        // Its neighbor in the same batch: 16 of 4 KiB are in one, from the first write on.
        let second = read(513);
        assert_eq!((second.reads, second.bytes), (1, 64), "only its header");
    }
}
