//! Chunks of images that are damaged become what they were: from the log, from another image, from the disk itself.

mod common;

use std::{path::PathBuf, sync::Arc};

use backtide_recovery::{DiskLog, KeptPoint, LogCache, Snapshot, TimedLsn, remove_unused};
use backtide_storage::{MemoryStorage, Storage};
use backtide_units::{ByteOffset, ByteRange, Lsn};
use bytes::Bytes;
use common::{Agent, Change, Random, SayOnPanic, cache, directory, indices, seeds};

struct World {
    agent: Agent,
    cache: LogCache,
}

impl World {
    /// A log that begins with an image, before which one point is kept. The last writes before that image are still in its
    /// first segment, and a few came since.
    fn new(seed: u64) -> Self {
        Self::amid(seed, 0, 0)
    }

    /// The same with so many segments before those, and behind them.
    fn amid(seed: u64, before: usize, behind: usize) -> Self {
        let mut agent = Agent::new(seed, MemoryStorage::new()).expect("create");
        agent.options.segment_bytes_max.0 = 400_000;
        let cache = cache();
        let storage: Arc<dyn Storage> = Arc::new(agent.storage.clone());
        let (log, _) = DiskLog::open(storage, directory(), agent.options, &cache).expect("open");
        agent.log = log;
        agent.attach().expect("attach");
        agent.settle().expect("settle");
        let mut world = Self { agent, cache };
        world.write_segments(before);
        for _ in 0..20 {
            world.agent.write().expect("write");
        }
        world.agent.log.seal().expect("seal");
        let older = world.latest();
        for _ in 0..4 {
            world.agent.write().expect("write");
        }
        let floor = world.latest();
        for _ in 0..2 {
            world.agent.write().expect("write");
        }
        world.agent.flush_all();
        world.write_segments(behind);
        world.fold(older, floor);
        world
    }

    fn write_segments(&mut self, count: usize) {
        for _ in 0..count {
            self.agent.write().expect("write");
            self.agent.log.seal().expect("seal");
            self.agent.flush_all();
        }
    }

    fn latest(&mut self) -> TimedLsn {
        self.agent.flush_all();
        self.agent.log.timeline().latest().expect("a point")
    }

    fn snapshot(&mut self) -> Snapshot {
        self.agent.log.snapshot().expect("snapshot")
    }

    fn fold(&mut self, older: TimedLsn, floor: TimedLsn) {
        let snapshot = self.snapshot();
        let storage: Arc<dyn Storage> = Arc::new(self.agent.storage.clone());
        let mut writer = self.cache.images(&storage).write().expect("no fault");
        let mut last = None;
        let mut kept = Vec::new();
        for at in [older, floor] {
            let root = snapshot.make_image(&mut writer, at.lsn, last, &mut |_| true).expect("no fault");
            last = Some(KeptPoint { at, root });
            kept.extend(last);
        }
        writer.finish().expect("no fault");
        let foldable = snapshot.foldable(floor.lsn).expect("the first segment");
        let floor = kept.pop().expect("the floor was the last");
        let base = snapshot.rebase(&foldable, floor, kept).expect("no fault");
        let ticket = self.agent.log.rebase(base).expect("it follows");
        let rebased = ticket.write().expect("no fault").expect("the log is open");
        self.agent.log.rebased(rebased);
    }

    fn packs(&self) -> Vec<PathBuf> {
        let packs = self.agent.storage.files().into_iter().map(|(path, _)| path);
        packs.filter(|path| path.extension().is_some_and(|name| name == "pack")).collect()
    }
}

#[test]
fn a_damaged_chunk_is_mended_from_the_log_or_the_disk_and_every_point_reads_as_before() {
    let (mut from_here, mut from_disk, mut left) = (0, 0, 0);
    for seed in seeds(4) {
        let mut world = World::new(seed);
        let disk = world.agent.model.at(Lsn(u64::MAX));
        let ask = |range: ByteRange| Some(Bytes::copy_from_slice(&disk[indices(range)]));
        let mut random = Random(seed);
        for _ in 0..40 {
            let packs = world.packs();
            let pack = &packs[random.below(packs.len() as u64) as usize];
            let length = world.agent.storage.open(pack).expect("open").len().expect("length").0;
            let at = ByteOffset(random.below(length));
            let _say = SayOnPanic(format!("SEED={seed}, a bit flipped in {} at {at}", pack.display()));
            world.agent.storage.flip_bit(pack, at, 3);
            let snapshot = world.snapshot();
            let alone = snapshot.check_and_mend(&|_| None, &mut |_| true).expect("no failure");
            from_here += alone.mended.len();
            if !alone.is_sound() {
                let asked = snapshot.check_and_mend(&ask, &mut |_| true).expect("no failure");
                from_disk += asked.mended.len();
                if !asked.is_sound() {
                    assert!(asked.damage[0].contains(".pack is damaged at byte"), "{asked:?}");
                    left += 1;
                    world.agent.storage.flip_bit(pack, at, 3);
                }
            }
            let again = snapshot.check(&mut |_| true).expect("no failure");
            assert!(again.is_sound(), "{again:?}");
            world.agent.model.check_snapshot(&snapshot, 6);
        }
        // And so it is after a power cut.
        world.agent.storage.crash(seed);
        world.cache = cache();
        let storage: Arc<dyn Storage> = Arc::new(world.agent.storage.clone());
        world.agent.log =
            DiskLog::open(storage, directory(), world.agent.options, &world.cache).expect("open").0;
        let snapshot = world.snapshot();
        let again = snapshot.check(&mut |_| true).expect("no failure");
        assert!(again.is_sound(), "SEED={seed}: {again:?}");
        world.agent.model.check_snapshot(&snapshot, 6);
    }
    assert!(
        from_here > 20 && from_disk > 5,
        "{from_here} mended from here, {from_disk} from the disk, {left} left"
    );
}

#[test]
fn a_chunk_is_mended_by_a_process_that_knows_segments_which_are_gone() {
    let mut mended = 0;
    for seed in seeds(3) {
        let _say = SayOnPanic(format!("SEED={seed}"));
        let mut world = World::amid(seed, 3, 12);
        let removed = remove_unused(&world.agent.storage, directory(), &world.cache).expect("no fault");
        assert!(removed.segments > 2, "{removed:?}");
        let disk = world.agent.model.at(Lsn(u64::MAX));
        let ask = |range: ByteRange| Some(Bytes::copy_from_slice(&disk[indices(range)]));
        let mut random = Random(seed);
        for _ in 0..30 {
            let packs = world.packs();
            let pack = &packs[random.below(packs.len() as u64) as usize];
            let length = world.agent.storage.open(pack).expect("open").len().expect("length").0;
            let at = ByteOffset(random.below(length));
            world.agent.storage.flip_bit(pack, at, 3);
            let copy = world.agent.storage.copy();
            let here = world.snapshot().check_and_mend(&ask, &mut |_| true).expect("no failure");
            // A process that has just been started knows no more than what is there.
            let storage: Arc<dyn Storage> = Arc::new(copy);
            let mut log = DiskLog::open(storage, directory(), world.agent.options, &cache()).expect("open").0;
            let fresh = log.snapshot().expect("snapshot").check_and_mend(&ask, &mut |_| true);
            assert_eq!(here.mended, fresh.expect("no failure").mended, "a bit in {} at {at}", pack.display());
            mended += here.mended.len();
            if !here.is_sound() {
                world.agent.storage.flip_bit(pack, at, 3);
            }
        }
    }
    assert!(mended > 20, "{mended}");
}

#[test]
fn a_mend_that_is_called_off_ends_there_and_the_next_one_goes_on() {
    let mut world = World::new(5);
    let disk = world.agent.model.at(Lsn(u64::MAX));
    let ask = |range: ByteRange| Some(Bytes::copy_from_slice(&disk[indices(range)]));
    let pack = &world.packs()[0];
    world.agent.storage.flip_bit(pack, ByteOffset(200), 3);
    let snapshot = world.snapshot();
    let mut reads = 0;
    let before = snapshot.check(&mut |_| {
        reads += 1;
        true
    });
    let before = before.expect("no failure").damage;
    assert_eq!(before.len(), 1, "{before:?}");
    // All is read: what comes behind that is the mend.
    for stop in reads.. {
        let mut asked = 0;
        let checked = snapshot.check_and_mend(&ask, &mut |_| {
            asked += 1;
            asked <= stop
        });
        let checked = checked.expect("no failure");
        if !checked.called_off {
            assert!(checked.is_sound() && checked.mended == before, "{checked:?}");
            assert!(stop >= reads + 3, "it was asked in the mend: {stop} of {reads}");
            break;
        }
        assert!(asked == stop + 1 && checked.mended.is_empty(), "{stop}: {asked} {checked:?}");
        assert_eq!(checked.damage, before, "{stop}");
        assert_eq!(snapshot.check(&mut |_| true).expect("no failure").damage, before, "{stop}");
    }
    assert!(snapshot.check(&mut |_| true).expect("no failure").is_sound());
    world.agent.model.check_snapshot(&snapshot, 6);
}

#[test]
fn a_disk_that_has_something_else_mends_nothing() {
    let mut world = World::new(3);
    let pack = &world.packs()[0];
    world.agent.storage.flip_bit(pack, ByteOffset(200), 3);
    let snapshot = world.snapshot();
    let other = |range: ByteRange| Some(Bytes::from(vec![0x5a; range.count().0 as usize]));
    let short = |_: ByteRange| Some(Bytes::from_static(b"short"));
    for disk in [&other as &dyn Fn(ByteRange) -> Option<Bytes>, &short] {
        let before = snapshot.check(&mut |_| true).expect("no failure").damage;
        let checked = snapshot.check_and_mend(disk, &mut |_| true).expect("no failure");
        assert!(checked.mended.is_empty() || checked.damage.is_empty(), "{checked:?}");
        assert_eq!(checked.damage, before);
    }
}

#[test]
fn a_payload_that_only_the_disk_still_has_is_mended_from_there() {
    let mut from_disk = 0;
    // With each kind of compression.
    for seed in seeds(3) {
        let mut agent = Agent::new(seed, MemoryStorage::new()).expect("create");
        agent.attach().expect("attach");
        agent.settle().expect("settle");
        let mut random = Random(seed);
        for nth in 0..6 {
            let lsn = agent.log.timeline().covered().next();
            let start = ByteOffset(300_000 + nth * 100_000);
            let range = ByteRange::between(start, ByteOffset(start.0 + 512 * (1 + random.below(150))));
            let bytes = (0..range.count().0 / 8).flat_map(|_| (random.next() >> 20).to_le_bytes()).collect();
            let change = Change { lsn, range, bytes: Some(bytes) };
            agent.replay(&change).expect("it follows");
            agent.model.changes.push(change);
        }
        agent.log.seal().expect("seal");
        agent.flush_all();
        let disk = agent.model.at(Lsn(u64::MAX));
        let ask = |range: ByteRange| Some(Bytes::copy_from_slice(&disk[indices(range)]));
        let segments: Vec<_> = agent.storage.files().into_iter().map(|(path, _)| path).collect();
        for segment in segments.iter().filter(|path| path.extension().is_some_and(|name| name == "seg")) {
            for _ in 0..12 {
                let length = agent.storage.open(segment).expect("open").len().expect("length").0;
                let at = ByteOffset(random.below(length));
                agent.storage.flip_bit(segment, at, 2);
                let snapshot = agent.log.snapshot().expect("snapshot");
                if !snapshot.check_and_mend(&|_| None, &mut |_| true).expect("no failure").is_sound() {
                    let checked = snapshot.check_and_mend(&ask, &mut |_| true).expect("no failure");
                    from_disk += checked.mended.len();
                    if !checked.is_sound() {
                        agent.storage.flip_bit(segment, at, 2);
                    }
                }
                assert!(snapshot.check(&mut |_| true).expect("no failure").is_sound());
                agent.model.check_snapshot(&snapshot, 4);
            }
        }
    }
    assert!(from_disk > 5, "{from_disk} payloads came from the disk");
}
