//! Runs seeds: one, or many on several threads.

use std::{
    cell::RefCell,
    panic::{self, AssertUnwindSafe},
    sync::{
        Mutex, Once,
        atomic::{AtomicU64, Ordering},
    },
};

use backtide_io_filter::Mutant;

use crate::{
    lacking::DriverMistake,
    world::{Stats, World},
};

/// A deliberate mistake that a run must find.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mistake {
    /// One of the filter's.
    Filter(Mutant),
    /// The receiver acknowledges as durable what it only received.
    AckBeforeSync,
    /// What a disk has gained in size is not compared.
    ForgetsGrowth,
    /// One of the hydrator's.
    Hydrator(backtide_hydration::Mutant),
    /// One of whoever drives it.
    Driver(DriverMistake),
}

/// How a run ended.
#[derive(Clone, Copy, Debug)]
pub struct Outcome {
    /// The hash of everything that happened.
    pub trace: u64,
    /// How many events.
    pub steps: u64,
    /// What was seen.
    pub stats: Stats,
}

/// Steps between two rounds of checks.
const CHECK_EVERY: u64 = 200;

thread_local! {
    static SAID: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Runs a seed for so many steps, and then to a good end.
///
/// # Errors
/// What was found to be wrong.
pub fn run(seed: u64, steps: u64, mistake: Option<Mistake>, printing: bool) -> Result<Outcome, String> {
    keep_what_panics_say();
    SAID.set(Some(String::new()));
    let outcome = panic::catch_unwind(AssertUnwindSafe(|| live(seed, steps, mistake, printing)));
    let said = SAID.take().unwrap_or_default();
    outcome.map_err(|_| said)
}

fn live(seed: u64, steps: u64, mistake: Option<Mistake>, printing: bool) -> Outcome {
    let mut world = World::new(seed, steps, printing);
    match mistake {
        Some(Mistake::Filter(mutant)) => world.mutant = Some(mutant),
        Some(Mistake::AckBeforeSync) => world.receiver.acks_before_sync = true,
        Some(Mistake::ForgetsGrowth) => world.forgets_growth = true,
        Some(Mistake::Hydrator(mutant)) => world.lacking.mutant = Some(mutant),
        Some(Mistake::Driver(mistake)) => world.lacking.mistake = Some(mistake),
        None => {}
    }
    while world.steps < steps {
        world.step();
        if world.steps.is_multiple_of(CHECK_EVERY) {
            world.check_now();
        }
    }
    world.end_well();
    Outcome { trace: world.trace.hash(), steps: world.steps, stats: world.stats }
}

/// Runs seeds on all processors; gives the outcomes, and the failures in the order of their seeds.
pub fn run_many(
    seeds: std::ops::Range<u64>,
    steps: u64,
    mistake: Option<Mistake>,
) -> (Vec<Outcome>, Vec<(u64, String)>) {
    let next = AtomicU64::new(seeds.start);
    let outcomes = Mutex::new(Vec::new());
    let failures = Mutex::new(Vec::new());
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds.end {
                        break;
                    }
                    match run(seed, steps, mistake, false) {
                        Ok(outcome) => outcomes.lock().expect("nobody panics here").push(outcome),
                        Err(why) => failures.lock().expect("nobody panics here").push((seed, why)),
                    }
                }
            });
        }
    });
    let mut failures = failures.into_inner().expect("nobody panicked");
    failures.sort();
    (outcomes.into_inner().expect("nobody panicked"), failures)
}

/// A panic within a run is a result, not noise: its words are kept instead of printed.
fn keep_what_panics_say() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            let kept = SAID.with_borrow_mut(|said| match said {
                Some(said) => {
                    *said = info.to_string();
                    true
                }
                None => false,
            });
            if !kept {
                before(info);
            }
        }));
    });
}
