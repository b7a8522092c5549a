//! A log that has ended, damaged or not, whose history is folded as a whole: what is kept reads as before, the rest is said to be
//! gone, and nothing of its segments is left, whatever is cut short.

mod common;

use std::sync::Arc;

use backtide_images::Root;
use backtide_recovery::{
    DiskLog, FoldError, FoundBase, KeptPoint, LogCache, LogError, Salvage, Seq, Snapshot, TimedLsn,
    Unreadable, inspect_base, rebase_closed, remove_unused, settle_closed, sync_names,
};
use backtide_storage::{MemoryStorage, Storage};
use backtide_units::{Lsn, Reason};
use common::{Agent, SayOnPanic, cache, directory, identity, options, seeds};

/// Folding what a test has written takes some hundred changes of files at the most.
const OPERATIONS_MAX: u64 = 2000;

/// A log that nobody has open any more.
struct World {
    agent: Agent,
    storage: MemoryStorage,
    cache: LogCache,
}

impl World {
    /// Every other one is damaged: a segment in its middle is lost.
    fn new(seed: u64) -> Self {
        let storage = MemoryStorage::new();
        let mut agent = Agent::new(seed, storage.clone()).expect("create");
        agent.options.segment_bytes_max.0 = 60_000;
        agent.attach().expect("attach");
        agent.sync().expect("sync");
        agent.reopen().expect("open");
        for _ in 0..120 {
            agent.step().expect("step");
        }
        agent.settle().expect("settle");
        agent.sync().expect("sync");
        let mut segments: Vec<_> = storage.files().into_iter().map(|(path, _)| path).collect();
        segments.retain(|path| path.extension().is_some_and(|name| name == "seg"));
        assert!(segments.len() > 3, "{segments:?}");
        if seed.is_multiple_of(2) {
            segments.sort();
            storage.remove(&segments[segments.len() - 2]).expect("remove");
            storage.sync_dir(&directory().join("segments")).expect("sync");
        }
        Self { agent, storage, cache: cache() }
    }

    fn shared(&self) -> Arc<dyn Storage> {
        Arc::new(self.storage.clone())
    }

    fn left(&self) -> Result<Salvage, LogError> {
        let shared = self.shared();
        backtide_recovery::salvage(
            &shared,
            directory(),
            &self.cache,
            None,
            None,
            |_| Seq(0),
            Unreadable::IsDamage,
        )
    }

    /// The points that it offers, those within intervals too.
    fn points(snapshot: &Snapshot) -> Vec<TimedLsn> {
        let timeline = snapshot.timeline();
        let (Some(first), Some(last)) = (timeline.intervals().first(), timeline.latest()) else {
            return Vec::new();
        };
        let offered = (first.from.lsn.0..=last.lsn.0).map(Lsn).filter(|lsn| timeline.offers(*lsn));
        let timed = |lsn| Some(TimedLsn { lsn, time: snapshot.time_of(lsn).expect("read")? });
        offered.filter_map(timed).collect()
    }

    /// Four of the points, if there are so many.
    fn chosen(snapshot: &Snapshot) -> Vec<TimedLsn> {
        let points = Self::points(snapshot);
        let mut chosen: Vec<_> = (0..4).map(|nth| points[nth * points.len() / 4]).collect();
        chosen.dedup();
        chosen
    }

    /// Folds all of it into images of these points, and gives back the room of what nobody needs then.
    fn fold(&self, wanted: &[TimedLsn]) -> Result<(), FoldError> {
        let snapshot = self.left()?.snapshot;
        let known: Vec<KeptPoint> = snapshot.base().iter().flat_map(|base| base.images()).collect();
        let images = self.cache.images(&self.shared());
        let mut writer = images.write().map_err(FoldError::from)?;
        let (mut last, mut kept) = (None, Vec::new());
        for at in wanted {
            let found = known.iter().find(|known| known.at.lsn == at.lsn).copied();
            let made = match found {
                Some(found) => found,
                None => KeptPoint {
                    at: *at,
                    root: snapshot.make_image(&mut writer, at.lsn, last, &mut |_| true)?,
                },
            };
            last = Some(made);
            kept.push(made);
        }
        writer.finish().map_err(FoldError::from)?;
        let base = snapshot.ended(identity(), kept);
        rebase_closed(&base, snapshot.base(), &self.storage, directory(), &images)?;
        drop(snapshot);
        Ok(self.tidy()?)
    }

    fn tidy(&self) -> Result<(), LogError> {
        remove_unused(&self.storage, directory(), &self.cache)?;
        let roots: Vec<Root> = FoundBase::read(&self.storage, directory())?.roots;
        self.cache.images(&self.shared()).collect(&roots)?;
        Ok(())
    }

    /// The files of segments, also of one that was to be, and packs.
    fn files(&self) -> Vec<String> {
        let names = self.storage.files().into_iter().map(|(path, _)| path.display().to_string());
        names.filter(|name| name.contains("/segments/") || name.ends_with(".pack")).collect()
    }

    /// Exactly these points are offered and read as they were; of the others it is said why they are gone.
    fn check(&self, kept: &[TimedLsn]) {
        let left = self.left().expect("read");
        assert_eq!(left.damage, Vec::<String>::new(), "what is gone is not damaged");
        assert!(left.is_ended());
        assert_eq!(Self::points(&left.snapshot), kept);
        let read =
            if kept.is_empty() { 0 } else { self.agent.model.check_snapshot(&left.snapshot, kept.len()) };
        assert_eq!(read, kept.len());
        let timeline = left.snapshot.timeline();
        for two in kept.windows(2) {
            let between = Lsn(two[0].lsn.0 + 1);
            if between < two[1].lsn {
                let hole = timeline.hole_at(between).expect("it is said that nothing is there");
                assert_eq!(hole.reason.code, Reason::Thinned.code());
            }
        }
        assert!(left.snapshot.check(&mut |_| true).expect("no failure").is_sound());
    }
}

#[test]
fn single_points_stay_as_long_as_they_are_wanted_and_then_nothing_is_left() {
    for seed in seeds(6) {
        let _say = SayOnPanic(format!("SEED={seed}"));
        let world = World::new(seed);
        // What was to be the next segment is of no use either.
        let spare = directory().join("segments/spare.new");
        drop(world.storage.create_new(&spare));
        let before = world.left().expect("read");
        let (marks, highest) =
            (before.snapshot.timeline().marks().to_vec(), before.snapshot.timeline().highest_lsn());
        let (attached, why) =
            (before.snapshot.timeline().attached().cloned(), before.damage.first().cloned());
        let kept = World::chosen(&before.snapshot);
        drop(before);
        world.fold(&kept).expect("no fault");
        world.check(&kept);
        assert!(world.files().iter().all(|name| name.ends_with(".pack")), "{:?}", world.files());
        let left = world.left().expect("read").snapshot;
        let timeline = left.timeline();
        assert_eq!((timeline.marks(), timeline.highest_lsn()), (&marks[..], highest));
        assert_eq!(timeline.attached(), attached.as_ref(), "a stale epoch stays fenced");
        let end = timeline.holes().last().filter(|hole| hole.to.is_none());
        assert_eq!(end.is_some(), why.is_some(), "why it ended is said");
        if let (Some(end), Some(why)) = (end, why) {
            assert!(end.from == kept.last().copied() && end.reason.text.contains(&why), "{end:?}");
        }
        drop(left);
        let mut listing = Vec::new();
        assert!(inspect_base(&world.storage, &directory().join("base.1"), &mut listing).expect("read"));
        let listing = String::from_utf8(listing).expect("a text");
        assert!(listing.contains("the log has ended") && listing.contains("single point lsn:"), "{listing}");
        // Nothing is appended to it.
        let opened =
            DiskLog::open(world.shared(), directory(), options(&mut common::Random(1)), &world.cache);
        let refused = opened.err().expect("it has ended").to_string();
        assert!(refused.contains("the log has ended"), "{refused}");
        // What grows old goes, at last all of it.
        let some = &kept[1..kept.len().min(3)];
        world.fold(some).expect("no fault");
        world.check(some);
        world.fold(&[]).expect("no fault");
        world.check(&[]);
        assert_eq!(world.files(), Vec::<String>::new());
        let left = world.left().expect("read").snapshot;
        assert!(left.timeline().holes().is_empty() && left.timeline().highest_lsn() == highest);
    }
}

#[test]
fn a_power_cut_while_an_ended_log_is_folded_costs_no_point_that_is_kept() {
    for seed in seeds(2) {
        let mut done = false;
        for cut in 0..OPERATIONS_MAX {
            let _say = SayOnPanic(format!("SEED={seed}, the power cut at operation {cut}"));
            let mut world = World::new(seed);
            let before = world.left().expect("read").snapshot;
            let (all, kept) = (World::points(&before), World::chosen(&before));
            drop(before);
            world.storage.cut_power_after(cut);
            let folded = world.fold(&kept);
            if !world.storage.is_off() {
                folded.expect("no fault");
                world.check(&kept);
                done = true;
                break;
            }
            assert!(folded.is_err());
            world.storage.crash(seed ^ cut);
            world.cache = cache();
            sync_names(&world.storage, directory()).expect("a start makes sure of it");
            let as_before_or_after = |world: &World| {
                let left = world.left().expect("a log survives a power cut").snapshot;
                let points = World::points(&left);
                assert!(points == all || points == kept, "{points:?}");
                world.agent.model.check_snapshot(&left, 8);
                points
            };
            let found = as_before_or_after(&world);
            world.tidy().expect("no fault");
            assert_eq!(as_before_or_after(&world), found, "nothing goes that it has");
            settle_closed(&world.storage, directory()).expect("no fault");
            world.storage.crash(!cut);
            world.cache = cache();
            assert_eq!(as_before_or_after(&world), found, "it was settled");
            world.fold(&kept).expect("no fault");
            world.check(&kept);
            assert!(world.files().iter().all(|name| name.ends_with(".pack")), "{:?}", world.files());
        }
        assert!(done, "SEED={seed}: the fold never ended");
    }
}

#[test]
fn a_reader_of_an_ended_log_keeps_its_segments() {
    let world = World::new(3);
    let before = world.left().expect("read").snapshot;
    let kept = World::chosen(&before);
    let segments = world.files().len();
    world.fold(&kept[2..]).expect("no fault");
    assert!(world.files().len() >= segments, "{:?}", world.files());
    let first = before.view(kept[0].lsn).expect("a point");
    drop(before);
    world.tidy().expect("no fault");
    let read = first.read(common::whole()).expect("it reads as ever");
    common::assert_same(&read, &world.agent.model.at(kept[0].lsn), kept[0].lsn);
    drop(first);
    world.tidy().expect("no fault");
    assert!(world.files().iter().all(|name| name.ends_with(".pack")), "{:?}", world.files());
    world.check(&kept[2..]);
}

#[test]
fn logs_around_one_that_is_folded_away_are_joined_as_if_it_was_not_there() {
    let worlds = [World::new(1), World::new(2), World::new(5)];
    let first = World::chosen(&worlds[0].left().expect("read").snapshot);
    worlds[0].fold(&first[..1]).expect("no fault");
    worlds[1].fold(&[]).expect("no fault");
    let [oldest, gone, newest] = worlds.each_ref().map(|world| world.left().expect("read").snapshot);
    let alone = gone.clone().timeline().holes().len();
    assert_eq!(alone, 0);
    let joined = newest.clone().following(gone);
    assert_eq!(joined.timeline().intervals(), newest.timeline().intervals());
    assert_eq!(joined.timeline().holes(), newest.timeline().holes(), "none was made of what is folded away");
    // Before it a point is left: the hole behind that reaches to the newest log.
    let joined = joined.logs().into_iter().fold(oldest, |before, log| log.following(before));
    let hole = &joined.timeline().holes()[0];
    assert_eq!((hole.from, hole.to), (Some(first[0]), newest.timeline().intervals().first().map(|i| i.from)));
    assert_eq!(joined.logs().len(), 3);
}
