//! Old history folded into images: what is kept reads as before, whatever is folded, removed, collected or cut short.

mod common;

use std::sync::Arc;

use backtide_images::{Images, Root};
use backtide_recovery::{
    DiskLog, FoldError, FoundBase, KeptPoint, LogError, LogOptions, PointError, Salvage, Seq, Snapshot,
    TimedLsn, Unreadable, remove_unused,
};
use backtide_segment::SEGMENT_HEADER_LENGTH;
use backtide_storage::{MemoryStorage, Storage};
use backtide_units::{BLOCK_SIZE, ByteCount, ByteOffset, Lsn, Reason};
use common::{
    Agent, SayOnPanic, assert_same, cache, check_view, chunks_that_differ, directory, seeds, whole,
};

/// Something can be folded after a few rounds of steps.
const ROUNDS_MAX: usize = 40;

/// Folding what a test has written takes some hundred changes of files at the most.
const OPERATIONS_MAX: u64 = 2000;

/// What a log offered, and must offer.
#[derive(Clone, Debug, Default)]
struct Kept {
    floor: Option<TimedLsn>,
    points: Vec<TimedLsn>,
}

struct World {
    agent: Agent,
    cache: backtide_recovery::LogCache,
    kept: Kept,
}

fn storage(agent: &Agent) -> Arc<dyn Storage> {
    Arc::new(agent.storage.clone())
}

impl World {
    fn new(seed: u64) -> Self {
        let mut agent = Agent::new(seed, MemoryStorage::new()).expect("create");
        // Segments fill fast.
        agent.options.segment_bytes_max.0 = 60_000;
        let cache = cache();
        let storage = storage(&agent);
        agent.attach().expect("attach");
        agent.sync().expect("sync");
        let (log, _) = DiskLog::open(storage, directory(), agent.options, &cache).expect("open");
        agent.log = log;
        Self { agent, cache, kept: Kept::default() }
    }

    fn images(&self) -> Images {
        self.cache.images(&storage(&self.agent))
    }

    fn steps(&mut self, count: u64) {
        for _ in 0..count {
            self.agent.step().expect("step");
        }
    }

    /// A new process.
    fn reopen(&mut self) -> Result<(), LogError> {
        self.agent.storage.kill_handles();
        self.cache = cache();
        let opened = DiskLog::open(storage(&self.agent), directory(), self.agent.options, &self.cache)?;
        self.agent.log = opened.0;
        Ok(())
    }

    /// All points that the log names, with times.
    fn named(snapshot: &Snapshot, above: Lsn, upto: Lsn) -> Vec<TimedLsn> {
        let mut points: Vec<TimedLsn> =
            snapshot.timeline().intervals().iter().flat_map(|i| [i.from, i.to]).collect();
        for lsn in above.0..upto.0 {
            if snapshot.timeline().offers(Lsn(lsn))
                && let Some(time) = snapshot.time_of(Lsn(lsn)).expect("read")
            {
                points.push(TimedLsn { lsn: Lsn(lsn), time });
            }
        }
        points.retain(|point| point.lsn > above && point.lsn <= upto);
        points.sort();
        points.dedup_by_key(|point| point.lsn);
        points
    }

    /// Folds what lies below some point; gives what is kept from then on, or none when nothing can go.
    fn fold(&mut self) -> Result<Option<Kept>, FoldError> {
        match self.agent.sync() {
            Ok(()) => {}
            Err(backtide_recovery::AppendError::Log(error)) => return Err(error.into()),
            Err(error) => panic!("{error}"),
        }
        let snapshot = self.agent.log.snapshot()?.alone();
        let Some(latest) = snapshot.timeline().latest() else { return Ok(None) };
        let before = snapshot.base().and_then(|base| base.floor());
        let above = before.map_or(Lsn::ZERO, |before| before.at.lsn);
        let choice = Self::named(&snapshot, above, latest.lsn);
        let random = &mut self.agent.random;
        let Some(floor) = choice.get(random.below(choice.len().max(1) as u64) as usize).copied() else {
            return Ok(None);
        };
        let Some(foldable) = snapshot.foldable(floor.lsn) else { return Ok(None) };
        let mut wanted: Vec<TimedLsn> =
            choice.into_iter().filter(|point| point.lsn < floor.lsn && random.one_in(6)).collect();
        wanted.truncate(4);
        wanted.push(floor);
        let mut kept: Vec<KeptPoint> = snapshot.base().iter().flat_map(|base| base.kept()).copied().collect();
        kept.extend(before);
        kept.retain(|_| !random.one_in(4));
        let mut writer = self.cache.images(&storage(&self.agent)).write().map_err(FoldError::from)?;
        let mut last = before;
        for at in wanted {
            let root = snapshot.make_image(&mut writer, at.lsn, last, &mut |_| true)?;
            last = Some(KeptPoint { at, root });
            kept.extend(last);
        }
        writer.finish().map_err(FoldError::from)?;
        let floor = kept.pop().expect("the floor was the last");
        let points = kept.iter().map(|kept| kept.at).collect();
        let base = snapshot.rebase(&foldable, floor, kept)?;
        let ticket = self.agent.log.rebase(base).expect("it follows");
        let rebased = ticket.write()?.expect("the log is open");
        self.agent.log.rebased(rebased);
        Ok(Some(Kept { floor: Some(floor.at), points }))
    }

    /// Goes on until something was folded, and so as is wanted.
    ///
    /// # Panics
    /// When it never was: a sequence of steps that leads nowhere must not fill the memory.
    fn go_on_until_folded(&mut self, wanted: impl Fn(&Self, &Kept) -> bool) -> Kept {
        for _ in 0..ROUNDS_MAX {
            self.steps(60);
            if let Some(kept) = self.fold().expect("no fault")
                && wanted(self, &kept)
            {
                return kept;
            }
            // A guest that writes more than passes deliver gets no points by itself, ever.
            self.agent.settle().expect("settle");
        }
        let log = &self.agent.log;
        panic!(
            "nothing was folded as is wanted in {ROUNDS_MAX} rounds: {} segments, {:?}",
            log.segment_count(),
            log.timeline()
        );
    }

    /// Gives the room of everything back that nobody has.
    fn tidy(&self) -> Result<(), LogError> {
        let storage = storage(&self.agent);
        remove_unused(&*storage, directory(), &self.cache)?;
        let roots: Vec<Root> = FoundBase::read(&*storage, directory())?.roots;
        self.images().collect(&roots)?;
        Ok(())
    }

    /// What is offered is what is kept, and all of it is right.
    fn check(&mut self, kept: &Kept) {
        let snapshot = self.agent.log.snapshot().expect("snapshot");
        let timeline = snapshot.timeline();
        if let Some(floor) = kept.floor {
            let below = timeline.intervals().iter().filter(|interval| interval.from.lsn < floor.lsn);
            let points: Vec<TimedLsn> = below.map(|interval| interval.from).collect();
            assert_eq!(points, kept.points);
            assert!(timeline.offers(floor.lsn));
            for two in kept.points.iter().chain([&floor]).collect::<Vec<_>>().windows(2) {
                let between = Lsn(two[0].lsn.0 + 1);
                if between < two[1].lsn {
                    let hole = timeline.hole_at(between).expect("it is said that nothing is there");
                    assert_eq!(hole.reason.code, Reason::Thinned.code());
                    assert!(matches!(snapshot.view(between), Err(PointError::InHole { .. })));
                }
            }
        }
        self.agent.model.check_snapshot(&snapshot, 8);
        check_view(&snapshot.latest_view(), &mut self.agent.random);
        for point in kept.points.iter().chain(&kept.floor) {
            check_view(&snapshot.view(point.lsn).expect("a point"), &mut self.agent.random);
            assert_eq!(snapshot.point_at(point.time).is_ok(), snapshot.timeline().offers(point.lsn));
        }
    }
}

#[test]
fn what_is_kept_reads_as_before_and_the_rest_is_said_to_be_gone() {
    let (mut folds, mut removed) = (0, 0);
    for seed in seeds(5) {
        let _say = SayOnPanic(format!("SEED={seed}"));
        let mut world = World::new(seed);
        for round in 0..6 {
            world.steps(60);
            let segments = world.agent.log.segment_count();
            if let Some(kept) = world.fold().expect("no fault") {
                world.kept = kept;
                folds += 1;
                removed += segments - world.agent.log.segment_count();
            }
            let kept = world.kept.clone();
            world.check(&kept);
            world.tidy().expect("no fault");
            world.check(&kept);
            if round % 2 == 0 {
                world.agent.log.snapshot().expect("everything is in the files");
                let (before, size) = (world.agent.log.timeline().clone(), world.agent.log.size());
                world.reopen().expect("open");
                assert_eq!(world.agent.log.timeline(), &before, "the same after a start");
                assert!(world.agent.log.size() <= size);
                world.check(&kept);
            }
        }
        world.agent.settle().expect("settle");
        world.agent.sync().expect("sync");
        let snapshot = world.agent.log.snapshot().expect("snapshot");
        assert!(snapshot.check(&mut |_| true).expect("no failure").is_sound());
    }
    assert!(folds > 8 && removed > 15, "{folds} folds, {removed} segments");
}

#[test]
fn differences_between_kept_points_are_told_and_nothing_else() {
    for seed in seeds(8) {
        let _say = SayOnPanic(format!("SEED={seed}"));
        let mut world = World::new(seed);
        for _ in 0..4 {
            world.steps(60);
            world.fold().expect("no fault");
        }
        world.tidy().expect("no fault");
        let snapshot = world.agent.log.snapshot().expect("snapshot");
        let points: Vec<Lsn> =
            snapshot.timeline().intervals().iter().flat_map(|i| [i.from.lsn, i.to.lsn]).collect();
        let floor = snapshot.base().and_then(|base| base.floor()).map_or(Lsn::ZERO, |floor| floor.at.lsn);
        for (place, &a) in points.iter().enumerate() {
            for &b in &points[place..] {
                let changed = snapshot.changed_blocks(a, b).expect("changed");
                // Of images whole chunks that differ; above them the log's versions.
                let mut expected = world.agent.blocks_taken(a.max(floor), b);
                let imaged = |at: Lsn| world.agent.model.at(at.min(floor));
                expected |= chunks_that_differ(&imaged(a), &imaged(b));
                assert_eq!(changed, expected, "between {a} and {b}, the floor is {floor}");
                let (before, after) = (world.agent.model.at(a), world.agent.model.at(b));
                let blocks = before.chunks(BLOCK_SIZE as usize).zip(after.chunks(BLOCK_SIZE as usize));
                for (block, (before, after)) in (0_u64..).zip(blocks) {
                    assert!(before == after || changed.contains(block), "block {block} between {a} and {b}");
                }
            }
        }
    }
}

#[test]
fn a_point_that_somebody_reads_is_never_pulled_away() {
    for seed in seeds(6) {
        let _say = SayOnPanic(format!("SEED={seed}"));
        let mut world = World::new(seed);
        world.steps(80);
        world.agent.settle().expect("settle");
        let mut mounted = Vec::new();
        for _ in 0..5 {
            world.agent.sync().expect("sync");
            let snapshot = world.agent.log.snapshot().expect("snapshot");
            for interval in snapshot.timeline().intervals() {
                mounted.push(snapshot.view(interval.from.lsn).expect("a point"));
            }
            world.steps(60);
            if world.fold().expect("no fault").is_some() {
                world.tidy().expect("no fault");
            }
            for view in &mounted {
                assert_same(&view.read(whole()).expect("read"), &world.agent.model.at(view.at()), view.at());
            }
        }
        let segments = |world: &World| {
            let files = world.agent.storage.files();
            files.iter().filter(|(path, _)| path.extension().is_some_and(|name| name == "seg")).count()
        };
        let before = segments(&world);
        mounted.clear();
        world.tidy().expect("no fault");
        assert_eq!(segments(&world), world.agent.log.segment_count());
        assert!(segments(&world) <= before);
    }
}

#[test]
fn a_power_cut_while_history_is_folded_costs_no_point_that_is_kept() {
    for seed in seeds(3) {
        let mut ended = false;
        let until_the_cut = || {
            let mut world = World::new(seed);
            world.steps(70);
            let first = world.fold().expect("no fault");
            world.steps(50);
            world.agent.sync().expect("sync");
            (world, first)
        };
        let mut without = until_the_cut().0;
        without.fold().expect("no fault");
        let intended = without.agent.log.timeline().clone();
        for cut in 0..OPERATIONS_MAX {
            let _say = SayOnPanic(format!("SEED={seed}, the power cut at operation {cut}"));
            let (mut world, first) = until_the_cut();
            let offered = world.agent.log.timeline().clone();
            let random = world.agent.random.0;
            world.agent.storage.cut_power_after(cut);
            let folded = world.fold().and_then(|kept| {
                world.tidy()?;
                Ok(kept)
            });
            let done = !world.agent.storage.is_off();
            if done {
                let kept = folded.expect("no fault");
                assert!(kept.is_some() || cut < 10, "something was folded");
                if let Some(kept) = kept.or(first) {
                    world.check(&kept);
                }
                ended = true;
                break;
            }
            world.agent.storage.crash(seed ^ cut);
            world.reopen().expect("a log survives a power cut");
            // Either as before or as it was to become: without a fault it goes the same way.
            let after = world.agent.log.timeline().clone();
            assert!(after == offered || after == intended, "{after:#?}\n{offered:#?}\n{intended:#?}");
            world.agent.model.check_some(&mut world.agent.log, 4);
            world.tidy().expect("what is left is removed");
            world.agent.model.check_some(&mut world.agent.log, 4);
            world.agent.random.0 = random;
            world.agent.restart().expect("attach");
            world.agent.settle().expect("settle");
            if let Some(kept) = world.fold().expect("no fault") {
                world.tidy().expect("no fault");
                world.check(&kept);
            }
            world.agent.storage.crash(!cut);
            world.reopen().expect("open");
            world.agent.model.check_some(&mut world.agent.log, 4);
        }
        assert!(ended, "SEED={seed}: folding takes more than {OPERATIONS_MAX} operations");
    }
}

#[test]
fn a_copy_of_the_base_that_is_lost_is_written_again_and_one_is_enough() {
    let mut world = World::new(3);
    let kept = world.go_on_until_folded(|_, _| true);
    world.tidy().expect("no fault");
    let elsewhere = format!("images/bases/{}.base", directory().display().to_string().replace('/', "-"));
    let copies = [directory().join("base.1"), directory().join("base.2"), elsewhere.into()];
    let found = |world: &World| FoundBase::read(&world.agent.storage, directory()).expect("read");
    for only in 0..copies.len() {
        let lost = || copies.iter().enumerate().filter(move |(nth, _)| *nth != only);
        for (nth, copy) in lost() {
            if nth == 1 {
                world.agent.storage.remove(copy).expect("remove");
            } else {
                world.agent.storage.flip_bit(copy, ByteOffset(70), 3);
            }
        }
        let left = found(&world);
        assert!(left.base.is_some() && left.damage.len() == 2 && !left.is_settled(), "{:?}", left.damage);
        for (_, copy) in lost() {
            let name = copy.file_name().expect("a name").to_string_lossy().into_owned();
            assert!(left.damage.iter().any(|damage| damage.contains(&name)), "{name}: {:?}", left.damage);
        }
        world.reopen().expect("one tells");
        world.check(&kept);
        assert!(found(&world).is_settled());
    }
    for copy in &copies {
        world.agent.storage.flip_bit(copy, ByteOffset(70), 3);
    }
    let error = world.reopen().expect_err("nobody knows where the log begins");
    assert!(matches!(error, LogError::Damaged { .. }) && error.to_string().contains("base.1"), "{error}");
    let salvaged = salvage(&world);
    assert!(!salvaged.damage.is_empty());
}

#[test]
fn a_log_whose_directory_somebody_removed_begins_anew() {
    let mut world = World::new(3);
    world.go_on_until_folded(|_, _| true);
    let identity = world.agent.log.identity();
    let files = world.agent.storage.files().into_iter().map(|(path, _)| path);
    for path in files.filter(|path| path.starts_with(directory())) {
        world.agent.storage.remove(&path).expect("remove");
    }
    let elsewhere = FoundBase::read(&world.agent.storage, directory()).expect("read");
    assert!(elsewhere.base.is_some());
    let storage = storage(&world.agent);
    let log = DiskLog::create(Arc::clone(&storage), directory(), identity, LogOptions::default(), &cache());
    assert_eq!(log.expect("a new log").timeline().highest_lsn(), Lsn(0));
    assert!(FoundBase::read(&*storage, directory()).expect("read").is_none());
}

fn salvage(world: &World) -> Salvage {
    let (storage, cache, damage) = (storage(&world.agent), cache(), Unreadable::IsDamage);
    let salvaged = backtide_recovery::salvage(&storage, directory(), &cache, None, None, |_| Seq(0), damage);
    salvaged.expect("salvage")
}

#[test]
fn what_is_left_of_a_log_has_its_images() {
    let mut world = World::new(4);
    let kept = world.go_on_until_folded(|_, _| true);
    world.tidy().expect("no fault");
    world.agent.sync().expect("sync");
    let whole_log = salvage(&world);
    assert!(whole_log.damage.is_empty(), "{:?}", whole_log.damage);
    world.agent.model.check_snapshot(&whole_log.snapshot, 6);
    // The first segment that is left is lost: the images are not.
    let files = world.agent.storage.files().into_iter().map(|(path, _)| path);
    let segment = files.filter(|path| path.extension().is_some_and(|name| name == "seg")).min().expect("one");
    world.agent.storage.remove(&segment).expect("remove");
    let left = salvage(&world);
    assert!(left.damage.iter().any(|damage| damage.contains("missing")), "{:?}", left.damage);
    let points = left.snapshot.timeline().intervals().len();
    assert_eq!(points, kept.points.len() + 1);
    assert_eq!(world.agent.model.check_snapshot(&left.snapshot, 6), points);
}

#[test]
fn a_base_that_was_written_once_only_drops_no_kept_point() {
    let mut world = World::new(5);
    let kept = world.go_on_until_folded(|_, kept| !kept.points.is_empty());
    world.agent.sync().expect("sync");
    let snapshot = world.agent.log.snapshot().expect("snapshot");
    let base = snapshot.rebase_kept(Vec::new()).expect("there is a base");
    drop(snapshot);
    let ticket = world.agent.log.rebase(base).expect("it follows");
    world.agent.storage.fail_write_after(1);
    assert!(ticket.write().is_err(), "the second file was not written");
    world.check(&kept);
    world.tidy().expect("no fault");
    world.reopen().expect("open");
    world.check(&kept);
    assert!(FoundBase::read(&world.agent.storage, directory()).expect("read").is_settled());
}

#[test]
fn a_log_that_has_lost_all_above_its_floor_gives_its_images_and_goes_on_from_them() {
    let (mut ended_below, mut went_on) = (0, 0);
    for seed in seeds(8) {
        let _say = SayOnPanic(format!("SEED={seed}"));
        let mut world = World::new(seed);
        let kept = world.go_on_until_folded(|world, _| world.agent.log.segment_count() > 1);
        let floor = kept.floor.expect("it was folded");
        world.agent.sync().expect("sync");
        world.tidy().expect("no fault");
        // Nothing beside the log tells that it was longer.
        let first = world.agent.storage.files().into_iter().map(|(path, _)| path);
        let mut segments: Vec<_> =
            first.filter(|path| path.extension().is_some_and(|e| e == "seg")).collect();
        segments.sort();
        world.agent.storage.kill_handles();
        for segment in &segments[1..] {
            world.agent.storage.remove(segment).expect("remove");
        }
        let file = world.agent.storage.open(&segments[0]).expect("open");
        file.set_len(ByteCount(SEGMENT_HEADER_LENGTH as u64)).expect("cut");
        drop(file);
        world.reopen().expect("open");
        let covered = world.agent.log.timeline().covered();
        world.check(&kept);
        if covered > floor.lsn {
            continue;
        }
        assert_eq!(covered, floor.lsn);
        ended_below += 1;
        let points = world.agent.log.timeline().intervals().len();
        assert_eq!(points, kept.points.len() + 1, "the images and nothing else");
        world.reopen().expect("open");
        world.check(&kept);
        // What follows the floor exactly is a point; what a pass brings is one from then on.
        let next = world.agent.model.changes.iter().find(|change| change.lsn > floor.lsn).cloned();
        if let Some(next) = next.filter(|_| world.agent.log.timeline().in_sync()) {
            went_on += 1;
            world.agent.replay(&next).expect("it follows");
            let view = world.agent.log.view(next.lsn).expect("a point");
            assert_same(&view.read(whole()).expect("read"), &world.agent.model.at(next.lsn), next.lsn);
        }
        world.agent.restart().expect("attach");
        world.agent.settle().expect("settle");
        world.steps(20);
        world.check(&kept);
        world.reopen().expect("open");
        world.check(&kept);
    }
    assert!(ended_below > 4 && went_on > 2, "{ended_below}, {went_on}");
}
