//! A client of a database that numbers its transactions and remembers when each was issued and when
//! it was acknowledged: what a database must hold at any moment.
//!
//! Both times are of this machine's clock, taken outside the database: a transaction cannot have
//! begun before it was issued, and was there at the latest when its acknowledgement arrived. The agent
//! captures by the same clock, so a moment of the disk's timeline has every transaction acknowledged
//! by then and none issued later.

use std::{
    sync::{Arc, Condvar, Mutex, MutexGuard},
    thread::JoinHandle,
    time::{SystemTime, UNIX_EPOCH},
};

use crate::tools;

/// A moment: microseconds since the Unix epoch, as a disk's timeline has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Moment(pub u64);

impl Moment {
    /// This moment.
    pub fn now() -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).expect("a clock after 1970");
        Self(u64::try_from(since.as_micros()).expect("a clock before the year 500000"))
    }

    /// As `--at` takes it.
    pub fn rfc3339(self) -> String {
        let (seconds, micros) = (self.0 / 1_000_000, self.0 % 1_000_000);
        let date = tools::run("date", &["-u", "-d", &format!("@{seconds}"), "+%Y-%m-%dT%H:%M:%S"]);
        format!("{}.{micros:06}Z", date.trim())
    }
}

/// One transaction that was acknowledged, or was under way at the end.
#[derive(Clone, Copy, Debug)]
struct Transaction {
    issued: Moment,
    acknowledged: Option<Moment>,
}

/// A client that does one transaction after the other, numbered from 1, until it is stopped.
pub struct Client {
    thread: JoinHandle<()>,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    transactions: Vec<Transaction>,
    stop: bool,
    failure: Option<String>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic")
    }
}

impl Client {
    /// Starts it: `transact` does the transaction of a number and comes back when the database has
    /// acknowledged it, or says why it cannot.
    pub fn start(mut transact: impl FnMut(u64) -> Result<(), String> + Send + 'static) -> Self {
        let shared = Arc::new(Shared::default());
        let of_thread = Arc::clone(&shared);
        let thread = std::thread::spawn(move || {
            for number in 1.. {
                {
                    let mut state = of_thread.lock();
                    if state.stop {
                        return;
                    }
                    state.transactions.push(Transaction { issued: Moment::now(), acknowledged: None });
                }
                let done = transact(number);
                let acknowledged = Some(Moment::now());
                let mut state = of_thread.lock();
                of_thread.changed.notify_all();
                if let Err(why) = done {
                    state.failure = Some(why);
                    return;
                }
                state.transactions.last_mut().expect("pushed before").acknowledged = acknowledged;
            }
        });
        Self { thread, shared }
    }

    /// Waits until `more` transactions have been issued and acknowledged from now on.
    pub fn goes_on(&self, more: usize) {
        let state = self.shared.lock();
        // The one under way was issued before.
        let target = state.transactions.len() + more;
        let pending = |state: &mut State| {
            let last = state.transactions.get(target - 1).and_then(|transaction| transaction.acknowledged);
            last.is_none() && state.failure.is_none()
        };
        let state = self.shared.changed.wait_while(state, pending).expect("no panic");
        assert!(state.failure.is_none(), "the database failed: {}", state.failure.as_deref().unwrap_or(""));
    }

    /// Stops it after the transaction that is under way.
    pub fn stop(self) -> Ledger {
        self.shared.lock().stop = true;
        self.thread.join().expect("the client does not panic");
        let mut state = self.shared.lock();
        assert!(state.failure.is_none(), "the database failed: {}", state.failure.as_deref().unwrap_or(""));
        Ledger { transactions: std::mem::take(&mut state.transactions) }
    }
}

/// What a client has done.
pub struct Ledger {
    transactions: Vec<Transaction>,
}

impl Ledger {
    /// When the first was issued and the last acknowledged.
    pub fn span(&self) -> (Moment, Moment) {
        let first = self.transactions.first().expect("a transaction");
        let last = self.transactions.last().expect("a transaction");
        (first.issued, last.acknowledged.expect("it was stopped between two"))
    }

    /// A database that holds the transactions 1 to `found` holds what it must at this moment: all
    /// that were acknowledged and none that was issued later.
    pub fn assert_holds(&self, found: u64, at: Moment, what: &str) {
        let acknowledged = self.count(|one| one.acknowledged.is_some_and(|acknowledged| acknowledged <= at));
        let issued = self.count(|one| one.issued <= at);
        assert!(
            (acknowledged..=issued).contains(&found),
            "{what} at {at:?}: {acknowledged} transactions were acknowledged by then and {issued} issued, \
             the database has {found}"
        );
    }

    fn count(&self, counts: impl Fn(&Transaction) -> bool) -> u64 {
        self.transactions.iter().filter(|one| counts(one)).count() as u64
    }
}

/// One random moment out of each of `count` equal parts of a span, the same for the same seed.
pub fn moments(span: (Moment, Moment), count: u64, mut seed: u64) -> Vec<Moment> {
    let part = (span.1.0 - span.0.0) / count;
    let random = |nth| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        Moment(span.0.0 + nth * part + (seed >> 33) % part.max(1))
    };
    (0..count).map(random).collect()
}

/// How many moments to look at: `BACKTIDE_MOMENTS`, else a few.
pub fn moments_asked_for() -> u64 {
    let asked = std::env::var("BACKTIDE_MOMENTS").ok();
    asked.map_or(3, |text| text.parse().expect("BACKTIDE_MOMENTS is a number"))
}

/// The seed of the moments: `SEED`, else another each time; it is printed.
pub fn seed() -> u64 {
    let given = std::env::var("SEED").ok().map(|text| text.parse().expect("SEED is a number"));
    let seed = given.unwrap_or_else(|| Moment::now().0);
    println!("SEED={seed}");
    seed
}
