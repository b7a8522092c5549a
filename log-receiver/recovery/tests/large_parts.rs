//! What large parts of a large disk are made of, against a plain model, and against the same in small parts.

mod common;

use std::sync::Arc;

use backtide_recovery::{
    Allocation, DiskLog, Entry, KeptPoint, LogOptions, PassContent, PassReason, Snapshot,
};
use backtide_storage::{MemoryStorage, Storage};
use backtide_units::{ByteCount, ByteOffset, ByteRange, CaptureTime, Epoch, Lsn, PayloadChecksum};
use bytes::Bytes;
use common::{Random, SayOnPanic, cache, directory, identity, seeds};
use uuid::Uuid;

const SECTOR: u64 = 512;

/// More than two buckets of 256 MiB, and some that are not whole.
const DISK: u64 = (600 << 20) + 9 * 65536 + 3 * SECTOR;

/// Writes go where there are others: a stretch here, and one across the end of a bucket of 256 MiB.
const BUSY: [(u64, u64); 2] = [(3 << 20, 21 << 20), ((256 << 20) - (1 << 20), (256 << 20) + (1 << 20))];

/// A version of some sectors: what they hold is one byte, 0 for zeroes.
struct Version {
    lsn: Lsn,
    range: ByteRange,
    byte: u8,
}

struct World {
    random: Random,
    storage: MemoryStorage,
    log: DiskLog,
    lsn: Lsn,
    pass: Option<Lsn>,
    /// The guest writes nothing for a while.
    quiet: bool,
    versions: Vec<Version>,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut random = Random(seed);
        let storage = MemoryStorage::new();
        let options = LogOptions {
            segment_extents_max: 30 << random.below(6),
            directory_bytes_max: ByteCount(1 << (6 + random.below(14))),
            ..LogOptions::default()
        };
        let shared: Arc<dyn Storage> = Arc::new(storage.clone());
        let mut log = DiskLog::create(shared, directory(), identity(), options, &cache()).expect("create");
        let attach = Entry::Attach {
            epoch: Epoch(1),
            attach: Uuid::from_u128(1),
            next_lsn: Lsn(1),
            size: ByteCount(DISK),
            name: "vm1".parse().expect("a name"),
            time: CaptureTime(1),
            facts: Default::default(),
        };
        log.append(attach).expect("append");
        let mut world =
            Self { random, storage, log, lsn: Lsn(0), pass: None, quiet: false, versions: Vec::new() };
        world.begin_pass();
        world
    }

    fn range(&mut self) -> ByteRange {
        let random = &mut self.random;
        let (from, to) = if random.one_in(3) { (0, DISK) } else { BUSY[random.below(2) as usize] };
        let longest = [1, 8, 40, 2000][random.below(4) as usize];
        let start = (from + random.below(to - from)) / SECTOR;
        let length = (1 + random.below(longest)).min(DISK / SECTOR - start);
        ByteRange::between(ByteOffset(start * SECTOR), ByteOffset((start + length) * SECTOR))
    }

    fn step(&mut self) {
        match self.random.below(40) {
            0 => self.long_zero(),
            1 if self.pass.is_none() => self.begin_pass(),
            2 => self.end_pass(),
            3 => self.log.seal().expect("seal"),
            4 => self.sync(),
            5..=12 if self.pass.is_some() => self.deliver(),
            5..=6 => self.begin_pass(),
            _ if self.quiet && self.pass.is_some() => self.deliver(),
            _ => self.write(),
        }
    }

    fn content(&mut self, range: ByteRange) -> (u8, Bytes) {
        let byte = if self.random.one_in(4) { 0 } else { 1 + self.random.below(255) as u8 };
        (byte, vec![byte; range.count().0 as usize].into())
    }

    fn write(&mut self) {
        let range = self.range();
        let content = self.content(range);
        self.write_at(range, content);
    }

    fn write_at(&mut self, range: ByteRange, (byte, payload): (u8, Bytes)) {
        self.lsn = self.lsn.next();
        let (lsn, time) = (self.lsn, CaptureTime(self.lsn.0));
        let checksum = PayloadChecksum::of(&payload);
        let entry = match byte {
            0 => Entry::Zero { lsn, time, range, trim: false },
            _ => Entry::Write { lsn, time, range, payload, checksum },
        };
        self.log.append(entry).expect("append");
        self.versions.push(Version { lsn, range, byte });
    }

    /// A stretch of a large part of the disk is trimmed.
    fn long_zero(&mut self) {
        let start = self.random.below(DISK / SECTOR);
        let length = 1 + self.random.below(DISK / SECTOR - start);
        let range = ByteRange::between(ByteOffset(start * SECTOR), ByteOffset((start + length) * SECTOR));
        self.lsn = self.lsn.next();
        let (lsn, time) = (self.lsn, CaptureTime(self.lsn.0));
        self.log.append(Entry::Zero { lsn, time, range, trim: true }).expect("append");
        self.versions.push(Version { lsn, range, byte: 0 });
    }

    fn begin_pass(&mut self) {
        self.lsn = self.lsn.next();
        let (at, time) = (self.lsn, CaptureTime(self.lsn.0));
        let gap_from = self.log.timeline().covered();
        let reason = PassReason { code: 1, text: "first".to_owned() };
        self.log.append(Entry::PassBegin { at, gap_from, time, reason }).expect("append");
        self.pass = Some(at);
    }

    /// Lies behind records that are newer.
    fn deliver(&mut self) {
        let range = self.range();
        let content = self.content(range);
        self.deliver_at(range, content);
    }

    fn deliver_at(&mut self, range: ByteRange, (byte, payload): (u8, Bytes)) {
        let Some(at) = self.pass else { return };
        let content = match byte {
            0 => PassContent::Zeroes,
            _ => PassContent::Bytes { checksum: PayloadChecksum::of(&payload), payload },
        };
        self.log.append(Entry::PassData { at, range, content }).expect("append");
        self.versions.push(Version { lsn: at, range, byte });
    }

    fn end_pass(&mut self) {
        let Some(at) = self.pass.take() else { return };
        let time = CaptureTime(self.lsn.0);
        self.log.append(Entry::PassEnd { at, valid_from: Some(at), time }).expect("append");
    }

    fn sync(&mut self) {
        while let Some(ticket) = self.log.ticket().expect("ticket") {
            self.log.synced(ticket.sync()).expect("sync");
        }
    }

    /// The disk at an LSN, a byte for each sector, by the first `known` versions.
    fn at(&self, at: Lsn, known: usize) -> Vec<u8> {
        let mut versions: Vec<&Version> = self.versions[..known].iter().filter(|one| one.lsn <= at).collect();
        versions.sort_by_key(|version| version.lsn);
        let mut disk = vec![0; (DISK / SECTOR) as usize];
        for Version { range, byte, .. } in versions {
            disk[(range.start().0 / SECTOR) as usize..(range.end().0 / SECTOR) as usize].fill(*byte);
        }
        disk
    }

    /// A part that has buckets of 16 MiB in it, or the whole.
    fn part(&mut self) -> ByteRange {
        if self.random.one_in(3) {
            return ByteRange::between(ByteOffset(0), ByteOffset(DISK));
        }
        let start = self.random.below((DISK - (32 << 20)) / SECTOR) * SECTOR;
        let length = (32 << 20) + self.random.below((DISK - start - (32 << 20)) / SECTOR) * SECTOR;
        ByteRange::between(ByteOffset(start), ByteOffset(start + length))
    }

    /// Where a part has data: all at once is the same as piece by piece, and as the model when that is given.
    fn check(&mut self, snapshot: &Snapshot, at: Lsn, model: Option<&[u8]>) {
        let (part, view) = (self.part(), snapshot.newest_view(at));
        let paint = |ranges: &[ByteRange]| {
            let mut sectors = vec![None; (part.count().0 / SECTOR) as usize];
            for range in ranges {
                for (range, allocation) in view.extents(*range).expect("extents") {
                    let place = |at: ByteOffset| ((at.0 - part.start().0) / SECTOR) as usize;
                    let painted = &mut sectors[place(range.start())..place(range.end())];
                    assert!(painted.iter().all(Option::is_none), "{range} is told twice");
                    painted.fill(Some(allocation));
                }
            }
            sectors
        };
        let all = paint(&[part]);
        let pieces = part.split_at_multiples(ByteCount(1 << 20)).collect::<Vec<_>>();
        assert!(all == paint(&pieces), "another answer in small parts, of {part} at {at}");
        let Some(model) = model else { return };
        let model = &model[(part.start().0 / SECTOR) as usize..][..all.len()];
        for (sector, (found, byte)) in all.iter().zip(model).enumerate() {
            let expected = if *byte == 0 { Allocation::Zero } else { Allocation::Data };
            assert_eq!(*found, Some(expected), "sector {sector} of {part} at {at}");
        }
        let whole = ByteRange::between(ByteOffset(16 << 20), ByteOffset(48 << 20));
        let read = view.read(whole).expect("read");
        if part.contains(whole) {
            let before = ((whole.start().0 - part.start().0) / SECTOR) as usize;
            for (found, byte) in read.chunks(SECTOR as usize).zip(&model[before..]) {
                assert!(found.iter().all(|one| one == byte), "another content at {at}");
            }
        }
    }
}

#[test]
fn large_parts_are_told_as_the_model_has_them_and_as_small_ones_are() {
    for seed in seeds(2) {
        let _say = SayOnPanic(format!("SEED={seed}"));
        let mut world = World::new(seed);
        let mut snapshots = Vec::new();
        for _ in 0..8 {
            world.quiet = world.random.one_in(2);
            (0..200).for_each(|_| world.step());
            snapshots.push((world.log.snapshot().expect("snapshot"), world.versions.len()));
            // Old ones too, in whose segments there is more by now.
            for _ in 0..2 {
                let (snapshot, known) = &snapshots[world.random.below(snapshots.len() as u64) as usize];
                let (snapshot, known) = (snapshot.clone(), *known);
                let at = Lsn(world.random.below(world.lsn.0 + 2));
                for at in [at, Lsn::MAX] {
                    let model = world.at(at, known);
                    world.check(&snapshot, at, Some(&model));
                }
            }
        }
    }
}

#[test]
fn what_lies_below_the_log_is_told_of_its_images() {
    for seed in seeds(2) {
        let _say = SayOnPanic(format!("SEED={seed}"));
        let mut world = World::new(seed);
        (0..500).for_each(|_| world.step());
        world.end_pass();
        world.sync();
        let floor = world.log.timeline().latest().expect("a point");
        // Some of them in the segment that has versions below the floor too.
        (0..100).for_each(|_| world.write());
        world.log.seal().expect("seal");
        world.write();
        world.sync();
        let shared: Arc<dyn Storage> = Arc::new(world.storage.clone());
        let snapshot = world.log.snapshot().expect("snapshot");
        let mut writer = cache().images(&shared).write().expect("no fault");
        let root = snapshot.make_image(&mut writer, floor.lsn, None, &mut |_| true).expect("no fault");
        writer.finish().expect("no fault");
        let foldable = snapshot.foldable(floor.lsn).expect("sealed segments");
        let base = snapshot.rebase(&foldable, KeptPoint { at: floor, root }, Vec::new()).expect("no fault");
        let ticket = world.log.rebase(base).expect("it follows");
        world.log.rebased(ticket.write().expect("no fault").expect("the log is open"));
        for _ in 0..4 {
            (0..60).for_each(|_| world.write());
            let snapshot = world.log.snapshot().expect("snapshot");
            let at = Lsn(floor.lsn.0 + world.random.below(world.lsn.0 - floor.lsn.0 + 1));
            let model = world.at(at, world.versions.len());
            world.check(&snapshot, at, None);
            let read = snapshot.newest_view(at).read(ByteRange::between(ByteOffset(0), ByteOffset(64 << 20)));
            for (found, byte) in read.expect("read").chunks(SECTOR as usize).zip(&model) {
                assert!(found.iter().all(|one| one == byte), "another content at {at}");
            }
        }
    }
}

#[test]
fn of_one_version_the_later_entry_counts_whatever_segments_have_both() {
    let mut world = World::new(1);
    let block = |at: u64| ByteRange::new(ByteOffset(at * 4096), ByteCount(4096)).expect("a range");
    let full = |byte: u8| (byte, Bytes::from(vec![byte; 4096]));
    // The first segment has something newer than the pass too, so it is looked at first.
    world.write_at(block(9), full(3));
    world.deliver_at(block(1), full(4));
    world.deliver_at(block(2), full(5));
    world.log.seal().expect("seal");
    world.sync();
    world.deliver_at(block(1), (0, Bytes::new()));
    world.deliver_at(block(5), full(6));
    world.log.seal().expect("seal");
    world.sync();
    let snapshot = world.log.snapshot().expect("snapshot");
    let model = world.at(Lsn::MAX, world.versions.len());
    let whole = ByteRange::between(ByteOffset(0), ByteOffset(32 << 20));
    let view = snapshot.latest_view();
    let read = view.read(whole).expect("read");
    for (found, byte) in read.chunks(SECTOR as usize).zip(&model) {
        assert!(found.iter().all(|one| one == byte), "another content");
    }
    for (range, allocation) in view.extents(whole).expect("extents") {
        let sectors = &model[(range.start().0 / SECTOR) as usize..(range.end().0 / SECTOR) as usize];
        let expected = |byte: &u8| if *byte == 0 { Allocation::Zero } else { Allocation::Data };
        assert!(sectors.iter().all(|byte| expected(byte) == allocation), "{range}");
    }
}
