//! Makes logs durable where blocking is fine, for the disks of all threads, and those that wait at once together.
//!
//! A ticket that comes alone is synced at once, beside others. When several wait, one run *leads*: it takes all of them
//! and has them made durable with one flush, where the storage shares flushes. What comes meanwhile waits for the leader's
//! next round, so that the work of a flush grows with the load and their number does not. A ticket with chores, which may
//! take long or panic, goes its own way: nobody else's bytes wait for them or fall with them.
//!
//! Invariant: as long as a ticket waits, a run is due or one leads, and runs are due for all with chores; so each is
//! synced, unless the receiver ends.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use backtide_storage::{Sharing, Storage};
use tokio::{sync::oneshot, task::JoinHandle};

use crate::{
    commit_ticket::{CommitOutcome, CommitTicket},
    pool::{GivenUp, Pool, PoolThreads},
    threads,
};

/// Makes logs durable. Clones share the work.
#[derive(Clone)]
pub(crate) struct Committer {
    shared: Arc<Shared>,
}

/// Keeps its threads.
pub(crate) struct CommitThreads {
    _threads: PoolThreads,
    shared: Arc<Shared>,
}

struct Shared {
    pool: Pool,
    storage: Arc<dyn Storage>,
    /// So many tickets that wait are synced together; 0 is never.
    together_min: usize,
    queue: Mutex<Queue>,
    commits: AtomicU64,
    flushes: AtomicU64,
    told: Told,
}

/// What was said about flushes that are not shared: each once.
#[derive(Default)]
struct Told {
    not_now: AtomicBool,
    never: AtomicBool,
}

#[derive(Default)]
struct Queue {
    /// With chores.
    apart: VecDeque<Job>,
    waiting: VecDeque<Job>,
    /// A run takes whatever waits, as long as that is several.
    led: bool,
    /// Nobody works on it any more.
    closed: bool,
}

struct Job {
    ticket: CommitTicket,
    answer: oneshot::Sender<CommitOutcome>,
}

/// A ticket that was handed over.
pub(crate) struct Submitted {
    run: JoinHandle<()>,
    answer: oneshot::Receiver<CommitOutcome>,
}

impl Committer {
    /// Starts `threads` threads at most for logs on this storage.
    pub(crate) fn start(
        storage: Arc<dyn Storage>,
        threads: usize,
        together_min: usize,
    ) -> std::io::Result<(Self, CommitThreads)> {
        let (pool, threads) = Pool::start(threads::COMMIT, threads)?;
        let shared = Arc::new(Shared {
            pool,
            storage,
            together_min,
            queue: Mutex::default(),
            commits: AtomicU64::new(0),
            flushes: AtomicU64::new(0),
            told: Told::default(),
        });
        if together_min > 0 {
            // At the start, when somebody looks.
            shared.shares_syncs();
        }
        Ok((Self { shared: Arc::clone(&shared) }, CommitThreads { _threads: threads, shared }))
    }

    /// Begins to sync these, together as far as that can be.
    pub(crate) fn submit(&self, tickets: Vec<CommitTicket>) -> Vec<Submitted> {
        let mut answers = Vec::with_capacity(tickets.len());
        {
            let mut queue = self.shared.queue();
            for ticket in tickets {
                let (answer, receiver) = oneshot::channel();
                let job = Job { ticket, answer };
                match (queue.closed, job.ticket.is_apart()) {
                    (true, _) => {}
                    (false, true) => queue.apart.push_back(job),
                    (false, false) => queue.waiting.push_back(job),
                }
                answers.push(receiver);
            }
        }
        let submitted = |answer| Submitted { run: Arc::clone(&self.shared).begin(), answer };
        answers.into_iter().map(submitted).collect()
    }

    /// Logs that were made durable since the start, each as often as it was.
    pub(crate) fn commits(&self) -> u64 {
        self.shared.commits.load(Ordering::Relaxed)
    }

    /// Flushes of the device that this took.
    pub(crate) fn flushes(&self) -> u64 {
        self.shared.flushes.load(Ordering::Relaxed)
    }
}

impl Submitted {
    /// How it went.
    pub(crate) async fn outcome(self) -> Result<CommitOutcome, GivenUp> {
        self.run.await?;
        // Its run may have synced another ticket, and another run this one.
        self.answer.await.map_err(|_| GivenUp::Unanswered)
    }
}

impl Drop for CommitThreads {
    fn drop(&mut self) {
        let mut queue = self.shared.queue();
        queue.closed = true;
        queue.apart.clear();
        queue.waiting.clear();
    }
}

impl Shared {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn begin(self: Arc<Self>) -> JoinHandle<()> {
        let pool = self.pool.clone();
        pool.spawn(move || self.run())
    }

    /// Syncs one with chores or the ticket that has waited longest, or leads.
    fn run(self: Arc<Self>) {
        let apart = self.queue().apart.pop_front();
        if let Some(job) = apart {
            self.sync(job);
            return;
        }
        if self.wants_leader() && !std::mem::replace(&mut self.queue().led, true) {
            Leading(self).lead();
            return;
        }
        let job = {
            let mut queue = self.queue();
            // What waits for a leader is not taken from it: that would be a flush of its own.
            if queue.led && self.are_several(&queue) { None } else { queue.waiting.pop_front() }
        };
        if let Some(job) = job {
            self.sync(job);
        }
    }

    fn sync(&self, Job { ticket, answer }: Job) {
        self.answer(vec![answer], vec![ticket.sync()]);
    }

    fn are_several(&self, queue: &Queue) -> bool {
        self.together_min > 0 && queue.waiting.len() >= self.together_min
    }

    fn wants_leader(&self) -> bool {
        // The storage is asked outside the lock, for it may take a moment.
        let several = self.are_several(&self.queue());
        several && self.shares_syncs()
    }

    /// Whether flushes are to be shared now; what stands against it is said once.
    fn shares_syncs(&self) -> bool {
        let first = |told: &AtomicBool| !told.swap(true, Ordering::Relaxed);
        match self.storage.shares_syncs() {
            Sharing::Cheap => return true,
            Sharing::NotNow(why) if first(&self.told.not_now) => {
                tracing::warn!(why, "disks do not share flushes for now, and whenever that is so again");
            }
            Sharing::Never(why) if first(&self.told.never) => {
                tracing::warn!(
                    why,
                    "disks do not share flushes (commit_together): each is flushed by itself"
                );
            }
            Sharing::NotNow(_) | Sharing::Never(_) => {}
        }
        false
    }

    fn answer(&self, answers: Vec<oneshot::Sender<CommitOutcome>>, outcomes: Vec<CommitOutcome>) {
        for (answer, outcome) in answers.into_iter().zip(outcomes) {
            self.commits.fetch_add(1, Ordering::Relaxed);
            self.flushes.fetch_add(u64::from(outcome.outcome.flushes()), Ordering::Relaxed);
            // Whoever asked may have gone: nobody misses the answer.
            let _ = answer.send(outcome);
        }
    }
}

/// A run that leads. However it ends, what waits then has runs again.
struct Leading(Arc<Shared>);

impl Leading {
    fn lead(self) {
        let shared = &self.0;
        loop {
            let jobs: Vec<Job> = shared.queue().waiting.drain(..).collect();
            // Somebody else may have had the last of them.
            if !jobs.is_empty() {
                let (tickets, answers) = jobs.into_iter().map(|job| (job.ticket, job.answer)).unzip();
                shared.answer(answers, CommitTicket::sync_together(&*shared.storage, tickets));
            }
            if !shared.wants_leader() {
                return;
            }
        }
    }
}

impl Drop for Leading {
    fn drop(&mut self) {
        let left = {
            let mut queue = self.0.queue();
            queue.led = false;
            queue.waiting.len()
        };
        // Nobody waits for them: they are in place of runs that left their tickets to the leader.
        (0..left).for_each(|_| drop(Arc::clone(&self.0).begin()));
    }
}
