//! A log with history, what is done to it in the background, and what must hold after a power cut on the way.

use std::sync::{Arc, Mutex, MutexGuard};

use backtide_images::{Collected, Images, ImagesLimits, Losses, Root};
use backtide_recovery::{
    DiskLog, FoldError, FoundBase, KeptPoint, LogCache, LogError, RebaseTicket, Seq, Snapshot, TimedLsn,
    Unreadable, remove_unused, salvage,
};
use backtide_storage::{MemoryStorage, Storage};
use backtide_units::Lsn;

use super::beside::Beside;
use crate::common::{Agent, Random, cache, directory};

/// What history is to become.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    floor: TimedLsn,
    /// Points below it for which an image is to be made.
    made: Vec<TimedLsn>,
    /// Of the points that are images already.
    kept: Vec<KeptPoint>,
}

/// Where a log begins, and the single points before that.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Begins {
    pub(crate) floor: Option<TimedLsn>,
    points: Vec<TimedLsn>,
}

impl Plan {
    fn begins(&self) -> Begins {
        let points = self.kept.iter().map(|kept| kept.at).chain(self.made.iter().copied()).collect();
        Begins { floor: Some(self.floor), points }
    }
}

impl Begins {
    pub(crate) fn of(snapshot: &Snapshot) -> Self {
        snapshot.base().map_or_else(Self::default, |base| Self {
            floor: base.floor().map(|floor| floor.at),
            points: base.kept().iter().map(|kept| kept.at).collect(),
        })
    }

    /// Whether a log that begins like this is said to have lost the point.
    fn drops(&self, lsn: Lsn) -> bool {
        self.floor.is_some_and(|floor| lsn < floor.lsn) && self.points.iter().all(|point| point.lsn != lsn)
    }
}

/// What the background did.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Done {
    pub(crate) segments: u64,
    pub(crate) collected: Collected,
}

pub(crate) struct World {
    agent: Arc<Mutex<Agent>>,
    pub(crate) storage: Beside,
    pub(crate) memory: MemoryStorage,
    pub(crate) cache: LogCache,
    pub(crate) random: Random,
}

impl World {
    pub(crate) fn new(seed: u64) -> Self {
        let memory = MemoryStorage::new();
        let mut agent = Agent::new(seed, memory.clone()).expect("create");
        // Segments fill fast.
        agent.options.segment_bytes_max.0 = 60_000;
        agent.attach().expect("attach");
        agent.flush_all();
        let mut world = Self::opened(agent, memory, Random(!seed)).expect("open");
        world.go_on(60);
        world
    }

    fn opened(mut agent: Agent, memory: MemoryStorage, random: Random) -> Result<Self, LogError> {
        let (storage, cache) = (Beside::new(memory.clone()), cache());
        let options = agent.options;
        agent.log = DiskLog::open(Arc::new(storage.clone()), directory(), options, &cache)?.0;
        Ok(Self { agent: Arc::new(Mutex::new(agent)), storage, memory, cache, random })
    }

    /// Another world that is the same. Everything of this one must be in the files.
    pub(crate) fn fork(&self) -> Self {
        let (memory, agent) = (self.memory.copy(), self.agent());
        let (storage, cache) = (Beside::new(memory.clone()), cache());
        let opened = DiskLog::open(Arc::new(storage.clone()), directory(), agent.options, &cache);
        let agent = agent.fork(memory.clone(), opened.expect("open").0);
        let random = Random(self.random.0);
        Self { agent: Arc::new(Mutex::new(agent)), storage, memory, cache, random }
    }

    /// Nobody else has it but who goes on beside some work.
    pub(crate) fn agent(&self) -> MutexGuard<'_, Agent> {
        self.agent.lock().expect("no panic")
    }

    fn shared(&self) -> Arc<dyn Storage> {
        Arc::new(self.storage.clone())
    }

    pub(crate) fn images(&self) -> Images {
        self.cache.images(&self.shared())
    }

    /// The agent goes on for a while, and ends in sync.
    pub(crate) fn go_on(&mut self, steps: u64) {
        let mut agent = self.agent();
        for _ in 0..steps {
            agent.step().expect("step");
        }
        agent.settle().expect("settle");
        agent.flush_all();
    }

    /// A new process.
    pub(crate) fn reopen(&mut self) -> Result<(), LogError> {
        self.memory.kill_handles();
        self.cache = cache();
        let shared = self.shared();
        let mut agent = self.agent();
        let opened = DiskLog::open(shared, directory(), agent.options, &self.cache)?;
        agent.log = opened.0;
        Ok(())
    }

    /// The same after a new process has opened the log, if it could.
    pub(crate) fn reopened(mut self) -> Option<Self> {
        self.reopen().is_ok().then_some(self)
    }

    pub(crate) fn snapshot(&self) -> Snapshot {
        self.agent().log.snapshot().expect("everything is in the files").alone()
    }

    /// What could be folded now, or at least dropped of what is folded already.
    pub(crate) fn plan(&mut self) -> Option<Plan> {
        let snapshot = self.snapshot();
        let above = snapshot.base().and_then(|base| base.floor()).map_or(Lsn::ZERO, |floor| floor.at.lsn);
        let latest = snapshot.timeline().latest()?;
        let ends = snapshot.timeline().intervals().iter().flat_map(|interval| [interval.from, interval.to]);
        let mut choice: Vec<TimedLsn> = ends.collect();
        for lsn in (above.0..latest.lsn.0).map(Lsn).filter(|lsn| snapshot.timeline().offers(*lsn)) {
            let time = snapshot.time_of(lsn).expect("read");
            choice.extend(time.map(|time| TimedLsn { lsn, time }));
        }
        choice.retain(|point| point.lsn > above && point.lsn <= latest.lsn);
        choice.sort();
        choice.dedup_by_key(|point| point.lsn);
        let random = &mut self.random;
        let mut kept: Vec<KeptPoint> = snapshot.base().iter().flat_map(|base| base.kept()).copied().collect();
        kept.extend(snapshot.base().and_then(|base| base.floor()));
        // Most of what was kept goes, so that packs have more of what nobody needs than of the rest.
        kept.retain(|_| random.one_in(4));
        let floor =
            choice[choice.len().checked_sub(1 + random.below(choice.len().max(1) as u64) as usize)?];
        snapshot.foldable(floor.lsn)?;
        choice.retain(|point| point.lsn < floor.lsn && random.one_in(6));
        choice.truncate(3);
        Some(Plan { floor, made: choice, kept })
    }

    /// Goes on until there is something to fold.
    pub(crate) fn next_plan(&mut self) -> Plan {
        for _ in 0..40 {
            if let Some(plan) = self.plan() {
                return plan;
            }
            self.go_on(40);
        }
        panic!("nothing can be folded");
    }

    /// Does some work while the agent takes a step now and then. Whatever fails when the power is off is told by who works.
    pub(crate) fn beside_ingest<T>(&self, work: impl FnOnce() -> T) -> T {
        self.beside(|agent| drop(agent.step()), work)
    }

    fn beside<T>(&self, step: fn(&mut Agent), work: impl FnOnce() -> T) -> T {
        let agent = Arc::clone(&self.agent);
        let step = move || {
            let mut agent = agent.lock().expect("no panic");
            if agent.random.one_in(2) {
                step(&mut agent);
            }
        };
        self.storage.during(step, work)
    }

    /// Makes the images of a plan, lets the log begin with them, and gives the room back that nobody needs then.
    pub(crate) fn fold(&self, plan: &Plan) -> Result<Done, FoldError> {
        let snapshot = self.snapshot();
        let base = self.beside_ingest(|| {
            let mut writer = self.images().write().map_err(FoldError::from)?;
            let mut last = snapshot.base().and_then(|base| base.floor());
            let mut kept = plan.kept.clone();
            for at in plan.made.iter().chain([&plan.floor]) {
                let root = snapshot.make_image(&mut writer, at.lsn, last, &mut |_| true)?;
                last = Some(KeptPoint { at: *at, root });
                kept.extend(last);
            }
            writer.finish().map_err(FoldError::from)?;
            let floor = kept.pop().expect("the floor was the last");
            let foldable = snapshot.foldable(floor.at.lsn).expect("it was so");
            Ok::<_, FoldError>(snapshot.rebase(&foldable, floor, kept)?)
        })?;
        drop(snapshot);
        let ticket = self.agent().log.rebase(base);
        // While a base is written the log syncs nothing, and takes entries.
        let written = |ticket: RebaseTicket| self.beside(|agent| drop(agent.write()), || ticket.write());
        // A log whose writer has failed takes none.
        let Some(rebased) = ticket.map_or(Ok(None), written)? else { return Err(FoldError::CalledOff) };
        self.agent().log.rebased(rebased);
        Ok(self.beside_ingest(|| self.tidy())?)
    }

    /// Gives the room of everything back that nobody has.
    pub(crate) fn tidy(&self) -> Result<Done, LogError> {
        let segments = remove_unused(&self.storage, directory(), &self.cache)?.segments;
        let roots: Vec<Root> = FoundBase::read(&self.storage, directory())?.roots;
        Ok(Done { segments, collected: self.images().collect(&roots)? })
    }

    /// The power is cut and comes back, and the receiver starts again. The log begins as one of `begins` has it, every
    /// point that was promised is there unless its base is one that says otherwise, what images need is there, and the
    /// catalog that was saved is the one that the entries give.
    pub(crate) fn crash_and_check(&mut self, seed: u64, begins: &[&Begins]) {
        self.memory.crash(seed);
        // A log that is not open holds no image: what its base names stays all the same.
        let roots = FoundBase::read(&self.memory, directory()).expect("read").roots;
        let images = Images::new(Arc::new(self.memory.clone()), ImagesLimits::default());
        images.collect(&roots).expect("no fault");
        self.reopen().expect("a log survives a power cut");
        let found = FoundBase::read(&self.memory, directory()).expect("read");
        assert!(found.is_settled(), "{:?}", found.damage);
        let snapshot = self.snapshot();
        let now = Begins::of(&snapshot);
        assert!(begins.contains(&&now), "it begins with {now:?}, expected one of {begins:?}");
        self.check(&now);
        self.check_catalog();
    }

    /// What is offered reads back, and what was promised is offered.
    pub(crate) fn check(&self, now: &Begins) {
        let snapshot = self.snapshot();
        for root in FoundBase::read(&self.memory, directory()).expect("read").roots {
            let (mut losses, mut seen) = (Losses::default(), Default::default());
            self.images().image(root).check(0, &mut seen, &mut losses, &mut |_| true).expect("no failure");
            assert!(losses.is_empty(), "{:?}", losses.sentences().collect::<Vec<_>>());
        }
        let agent = self.agent();
        for ends in agent.promised.chunks(2) {
            let (from, to) = (ends[0].0, ends[1].0);
            let step = ((to - from) / 6).max(1);
            for lsn in (from..=to).step_by(step as usize).chain([to]).map(Lsn) {
                assert!(snapshot.timeline().offers(lsn) || now.drops(lsn), "{lsn} was a point");
            }
        }
        let kept = now.points.iter().chain(&now.floor);
        kept.for_each(|point| assert!(snapshot.timeline().offers(point.lsn), "{point:?} was kept"));
        agent.model.check_snapshot(&snapshot, 4);
    }

    /// What was saved of the catalog (footers, the base's timeline) is what the entries give, and both readers agree.
    fn check_catalog(&self) {
        let copy = self.memory.copy();
        let shared: Arc<dyn Storage> = Arc::new(copy);
        let agent = self.agent();
        let (mut log, _) =
            DiskLog::open(Arc::clone(&shared), directory(), agent.options, &cache()).expect("open");
        assert_eq!(log.timeline(), agent.log.timeline(), "the same at every start");
        let snapshot = log.snapshot().expect("snapshot");
        let checked = snapshot.check(&mut |_| true).expect("no failure");
        assert!(checked.is_sound(), "{checked:?}");
        let rebuilt = snapshot.rebuild_footers(&mut |_| true).expect("no failure");
        assert_eq!(rebuilt, Vec::<String>::new(), "footers are what the entries give");
        let left = salvage(&shared, directory(), &cache(), None, None, |_| Seq(0), Unreadable::IsDamage)
            .expect("salvage");
        assert_eq!(left.damage, Vec::<String>::new());
        let (left, all) = (left.snapshot.timeline(), log.timeline());
        assert_eq!(
            (left.intervals(), left.holes(), left.marks()),
            (all.intervals(), all.holes(), all.marks())
        );
    }

    /// The agent comes back: what it had not heard to be durable may be missing.
    pub(crate) fn attach_again(&self) {
        let mut agent = self.agent();
        agent.restart().expect("attach");
        agent.settle().expect("settle");
        agent.flush_all();
    }

    /// The agent comes back, and the next run of the same work completes.
    pub(crate) fn goes_on(&mut self, seed: u64) {
        self.tidy().expect("what is left is removed");
        self.attach_again();
        let before = Begins::of(&self.snapshot());
        let plan = self.next_plan();
        let done = self.fold(&plan).expect("no fault");
        let now = plan.begins();
        assert!(done.segments > 0 || now == before, "{done:?}");
        self.check(&now);
        self.agent().flush_all();
        self.crash_and_check(seed, &[&now]);
    }

    pub(crate) fn planned(plan: &Plan) -> Begins {
        plan.begins()
    }
}
