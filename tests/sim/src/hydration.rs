//! The missing blocks of the simulated disk: the production hydrator and hydration file, over a storage that loses
//! power and fails, a receiver that is away now and then, and an image that tears, or lies behind a server that
//! forgets.

use std::{collections::BTreeMap, io, sync::Arc};

use backtide_hydration::{
    Ahead, FetchId, HydrationFile, Hydrator, Refusal, RequestId, Step, StoreError, Wish,
};
use backtide_io_filter::{IoFailure, IoId, LocalOp};
use backtide_tracking::DirtyBitmap;
use backtide_units::{BlockRange, ByteRange, Lsn};
use bytes::Bytes;

use crate::{
    lacking::remove_note,
    local::indices,
    storing::{Brought, equal},
    world::{Event, World},
};

/// The missing blocks of an agent's disk.
pub(crate) struct Hydrating {
    hydrator: Hydrator,
    pub(crate) file: Arc<HydrationFile>,
    requests: BTreeMap<RequestId, For>,
    fetched: BTreeMap<FetchId, Brought>,
    jobs: BTreeMap<u64, Job>,
    next_job: u64,
    /// Nothing is missing, and no file says so.
    pub(crate) complete: bool,
    /// The disk is given up.
    stopped: bool,
    /// The image could not be synced: what of it is not durable counts for nothing at the next attach.
    pub(crate) gave_up: bool,
    /// Something failed that the next attach may do better.
    pub(crate) troubled: bool,
}

#[derive(Clone, Copy)]
enum For {
    Filter(IoId),
    /// A guest's read.
    Guest(ByteRange),
}

/// Something that is under way.
enum Job {
    Note(RequestId, Vec<BlockRange>),
    Settle(RequestId),
    /// With what the image showed when it was begun, where that may count.
    Fetch(FetchId, BlockRange, Option<Bytes>),
    Store(FetchId, Vec<BlockRange>, Brought),
    Finish,
    /// A request is answered.
    Answer(RequestId, Result<(), Refusal>),
    /// Something is fetched that nobody asked for.
    Ahead,
}

impl Hydrating {
    pub(crate) fn missing(&self) -> &DirtyBitmap {
        self.hydrator.missing().blocks()
    }

    pub(crate) fn needs_care(&self, wish: Wish) -> bool {
        !self.complete && self.hydrator.needs_care(wish)
    }

    pub(crate) fn submit(&mut self, wish: Wish, io: IoId) -> RequestId {
        let id = self.hydrator.submit(wish);
        self.requests.insert(id, For::Filter(io));
        id
    }

    pub(crate) fn overwrites_missing(&self, id: RequestId) -> bool {
        self.hydrator.overwrites_missing(id)
    }

    pub(crate) fn is_complete(&self) -> bool {
        self.complete
    }

    /// Whether something writes the image or the file, beside changes of guests.
    pub(crate) fn is_storing(&self) -> bool {
        self.jobs.values().any(|job| match job {
            Job::Settle(_) | Job::Store(..) | Job::Finish => true,
            Job::Note(..) | Job::Fetch(..) | Job::Answer(..) | Job::Ahead => false,
        })
    }

    /// The disk is given up.
    pub(crate) fn stop(&mut self) {
        self.stopped = true;
        self.hydrator.stop();
    }
}

pub(crate) fn refusal(error: io::Error) -> Refusal {
    Refusal::Failed { errno: error.raw_os_error().unwrap_or(5) }
}

impl World {
    /// The missing blocks of a new agent's disk.
    pub(crate) fn begin_hydrating(&mut self, file: HydrationFile) -> Hydrating {
        self.stats.hydrations += 1;
        if !self.calm && self.random.one_in(2) {
            let soon =
                self.random.pick(&[self.plan.hydrate_us, 2 * self.link.latency_us, self.plan.local_us]);
            self.within(2 * soon, Event::Strike);
        }
        let mut hydrator = Hydrator::new(self.plan.size, file.missing(), file.header().compare);
        if let Some(mutant) = self.lacking.mutant {
            hydrator.mutate(mutant);
        }
        Hydrating {
            hydrator,
            file: Arc::new(file),
            requests: BTreeMap::new(),
            fetched: BTreeMap::new(),
            jobs: BTreeMap::new(),
            next_job: 0,
            complete: false,
            stopped: false,
            gave_up: false,
            troubled: false,
        }
    }

    /// Carries out what the hydrator wants, until it wants nothing more.
    pub(crate) fn hydrate(&mut self) {
        loop {
            let Some(hydrating) = self.agent.as_mut().and_then(|agent| agent.hydrating.as_mut()) else {
                return;
            };
            let Some(step) = hydrating.hydrator.next_step() else { break };
            match step {
                Step::Image(id) => self.on_image(id),
                Step::Note(id, blocks) => self.begin_job(Job::Note(id, blocks), self.plan.tracking_us),
                Step::Settle(id) => self.begin_job(Job::Settle(id), self.plan.local_us),
                Step::Fetch(id, blocks) => {
                    let us = 2 * self.link.latency_us
                        + blocks.bytes(self.plan.size).count().0 * 1_000_000 / self.link.bandwidth;
                    self.begin_fetch(id, blocks, us);
                }
                Step::Store(id, runs) => {
                    let brought = hydrating.fetched.remove(&id).expect("it was fetched just now");
                    self.begin_job(Job::Store(id, runs, brought), self.plan.local_us);
                }
                Step::Answer(id, result) => self.begin_job(Job::Answer(id, result), 0),
            }
        }
        self.fetch_more();
    }

    pub(crate) fn hydrating(&mut self) -> &mut Hydrating {
        let agent = self.agent.as_mut().expect("it is alive");
        agent.hydrating.as_mut().expect("blocks are missing")
    }

    fn begin_job(&mut self, job: Job, us: u64) {
        let life = self.agent.as_ref().expect("it is alive").life;
        let hydrating = self.hydrating();
        hydrating.next_job += 1;
        let number = hydrating.next_job;
        hydrating.jobs.insert(number, job);
        self.within(us, Event::Hydration { life, job: number });
    }

    /// The image is looked at before the receiver is asked.
    fn begin_fetch(&mut self, id: FetchId, blocks: BlockRange, us: u64) {
        let range = blocks.bytes(self.plan.size);
        let compares = self.hydrating().hydrator.may_compare(blocks) && !self.local.is_bad(range);
        let seen = compares.then(|| self.local.read(range));
        self.begin_job(Job::Fetch(id, blocks, seen), us);
    }

    /// Something that nobody asked for is fetched all the time, or nothing is missing.
    fn fetch_more(&mut self) {
        let hydrating = self.hydrating();
        let waits = |job: &Job| matches!(job, Job::Ahead | Job::Finish);
        if hydrating.complete || hydrating.stopped || hydrating.jobs.values().any(waits) {
            return;
        }
        let pause = if self.calm { 100 } else { self.plan.hydrate_us };
        let finished = self.hydrating().missing().is_empty();
        self.begin_job(if finished { Job::Finish } else { Job::Ahead }, pause);
    }

    fn on_image(&mut self, id: RequestId) {
        match self.hydrating().requests[&id] {
            For::Filter(io) => self.begin_on_image(io),
            For::Guest(range) => {
                self.check_read(range);
                self.hydrating().hydrator.image_done(id, Ok(()));
            }
        }
    }

    /// A guest reads, and waits where blocks are missing.
    pub(crate) fn guest_reads(&mut self, range: ByteRange) {
        let Some(hydrating) = self.agent.as_mut().and_then(|agent| agent.hydrating.as_mut()) else { return };
        if !hydrating.needs_care(Wish::Read(range)) {
            return self.check_read(range);
        }
        let id = hydrating.hydrator.submit(Wish::Read(range));
        hydrating.requests.insert(id, For::Guest(range));
        self.stats.reads_of_missing += 1;
        self.hydrate();
    }

    pub(crate) fn image_done(&mut self, id: RequestId, result: Result<(), IoFailure>) {
        let result = result.map_err(|failure| Refusal::Failed { errno: failure.errno });
        self.hydrating().hydrator.image_done(id, result);
        self.hydrate();
    }

    /// A request has ended.
    fn hydrated(&mut self, id: RequestId, result: Result<(), Refusal>) {
        let asked = self.hydrating().requests.remove(&id).expect("a request is answered once");
        let result = result.map_err(|refusal| match refusal {
            Refusal::Damaged(block) => panic!("block {block} of the point is damaged"),
            Refusal::Stopped => IoFailure { errno: 108 },
            Refusal::Failed { errno } => IoFailure { errno },
        });
        match asked {
            For::Filter(io) => self.local_ends(io, result),
            For::Guest(_) => {}
        }
    }

    pub(crate) fn hydration_goes_on(&mut self, life: u64, number: u64) {
        let Some(agent) = self.agent.as_mut().filter(|agent| agent.life == life) else { return };
        let hydrating = agent.hydrating.as_mut().expect("it has begun something");
        let job = hydrating.jobs.remove(&number).expect("a job ends once");
        self.trace.note(self.now, "hydration", &[number, kind_of(&job)]);
        match job {
            Job::Note(id, blocks) => {
                let noted = self.do_note(id, &blocks);
                self.hydrating().hydrator.noted(id, noted);
            }
            Job::Settle(id) => {
                let settled = self.do_settle();
                self.hydrating().hydrator.settled(id, settled);
            }
            Job::Fetch(id, blocks, seen) => self.do_fetch(id, blocks, seen.as_ref()),
            Job::Store(id, runs, brought) => {
                let stored = self.do_store(&runs, &brought, false);
                self.hydrating().troubled |= stored.is_err();
                let hydrator = &mut self.hydrating().hydrator;
                match stored {
                    Ok(()) => hydrator.stored(id, Ok(())),
                    Err(StoreError::Image(error)) => hydrator.stored(id, Err(refusal(error))),
                    Err(StoreError::Unnoted(_)) => {
                        hydrator.unnoted(id);
                        self.stats.stored_unnoted += 1;
                    }
                }
            }
            Job::Finish => self.do_finish(),
            Job::Answer(id, result) => self.hydrated(id, result),
            Job::Ahead => {
                if let Ahead::Begun(_) = self.hydrating().hydrator.fetch_ahead() {
                    self.stats.fetched_ahead += 1;
                }
            }
        }
        self.hydrate();
        self.detach_when_quiet();
    }

    /// What a change brings into missing blocks is seen from when the journal knows them.
    fn do_note(&mut self, id: RequestId, blocks: &[BlockRange]) -> Result<(), Refusal> {
        let file = Arc::clone(&self.hydrating().file);
        if let Err(error) = file.present(blocks) {
            self.hydrating().troubled = true;
            return Err(refusal(error));
        }
        let For::Filter(io) = self.hydrating().requests[&id] else {
            unreachable!("guests change by the filter")
        };
        let op = self.agent.as_ref().expect("it is alive").inflight[&io].op.clone();
        let LocalOp::Change(change) = op else { unreachable!("only changes are noted") };
        for run in blocks {
            self.show(&change, run.bytes(self.plan.size));
        }
        Ok(())
    }

    /// The receiver gives what the point holds, if it can be reached and has it.
    fn do_fetch(&mut self, id: FetchId, blocks: BlockRange, seen: Option<&Bytes>) {
        let range = blocks.bytes(self.plan.size);
        let point = self.lacking.point.expect("blocks of it are missing");
        let reachable = self.link.up && self.receiver.disks.is_some();
        let snapshot = if reachable { self.snapshot() } else { None };
        let Some(snapshot) = snapshot else {
            self.stats.fetches_waited += 1;
            let pause = if self.calm { 1_000 } else { self.plan.outage_us };
            return self.begin_fetch(id, blocks, pause);
        };
        let view = snapshot.view(point).expect("the point is kept as long as blocks are missing of it");
        let bytes = view.read(range).expect("it can be read");
        let right = &self.lacking.content[indices(range)];
        assert!(bytes[..] == *right, "{range} of point {point} is not what it was");
        let held: Vec<ByteRange> = seen.map(|seen| equal(range, seen, &bytes)).unwrap_or_default();
        self.stats.compared_equal += held.len() as u64;
        let compared = !held.is_empty();
        let hydrating = self.hydrating();
        hydrating.fetched.insert(id, Brought { range, bytes, held });
        hydrating.hydrator.fetched(id, compared);
    }

    /// The agent dies: what was under way is done, or not, or in part.
    pub(crate) fn kill_hydration(&mut self, power: bool) {
        let Some(hydrating) = self.agent.as_mut().and_then(|agent| agent.hydrating.as_mut()) else { return };
        self.stats.deaths_lacking += u64::from(!hydrating.missing().is_empty());
        for job in std::mem::take(&mut hydrating.jobs).into_values() {
            if self.random.one_in(2) {
                continue;
            }
            if power {
                self.lacking.storage.cut_power_after(self.random.below(4));
            }
            // Nobody is left to be told how it went.
            match job {
                Job::Note(_, blocks) => drop(self.hydrating().file.present(&blocks)),
                Job::Settle(_) => drop(self.do_settle()),
                Job::Store(_, runs, brought) => {
                    let dies = self.random.one_in(2);
                    drop(self.do_store(&runs, &brought, dies));
                }
                Job::Finish if self.random.one_in(2) => self.do_finish(),
                Job::Finish => {
                    let file = Arc::clone(&self.hydrating().file);
                    let (local, beside) = (&mut self.local, &self.lacking.beside);
                    let server = self.plan.server;
                    let sync = || {
                        if !server {
                            local.flush(local.flush_mark());
                        }
                        Ok(())
                    };
                    let dies = || remove_note(beside).and(Err(io::Error::other("it dies here")));
                    drop(file.finish(sync, dies));
                }
                Job::Fetch(..) | Job::Answer(..) | Job::Ahead => {}
            }
        }
    }

    /// An agent ends whose image could not be synced: that takes what was not durable, as a power loss does.
    pub(crate) fn lose_unsynced(&mut self, hydrating: Option<&Hydrating>, next: Lsn) {
        if hydrating.is_some_and(|hydrating| hydrating.gave_up) {
            self.shown.unsynced = true;
            self.model.lose(next, self.whole());
        }
    }
}

fn kind_of(job: &Job) -> u64 {
    match job {
        Job::Note(..) => 1,
        Job::Settle(_) => 2,
        Job::Fetch(..) => 3,
        Job::Store(..) => 4,
        Job::Finish => 5,
        Job::Ahead => 6,
        Job::Answer(..) => 7,
    }
}
