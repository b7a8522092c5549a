//! The walk: breadth first over all states, level by level, on all processors.
//!
//! A state that was seen before is not walked again; states are told apart by their fingerprints. What
//! breaks a promise panics, in the production code or in a check: the walk then ends, and tells the
//! shortest way there.

use std::{
    cell::RefCell,
    collections::HashSet,
    fmt,
    panic::{self, AssertUnwindSafe},
    sync::{
        Mutex, Once,
        atomic::{AtomicUsize, Ordering},
    },
};

use crate::{actions::Action, config::Config, world::World};

/// What a walk has seen.
#[derive(Debug, Default)]
pub struct Walk {
    /// States, each counted once.
    pub states: usize,
    /// Steps from one to another, or to itself.
    pub transitions: usize,
    /// The longest of the shortest ways.
    pub depth: usize,
    /// States from which the world was healed.
    pub healed: usize,
    /// What was found, if anything was.
    pub violation: Option<Violation>,
}

/// A broken promise.
#[derive(Debug)]
pub struct Violation {
    /// What was wrong.
    pub why: String,
    /// What led there.
    pub way: Vec<Action>,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}\nafter {} steps:", self.why, self.way.len())?;
        self.way.iter().try_for_each(|action| writeln!(f, "  {action:?}"))
    }
}

/// One state in so many is healed, chosen by its fingerprint.
const HEALED_ONE_IN: u64 = 32;

const SHARDS: usize = 64;

thread_local! {
    /// What a panic said, while one is a result.
    static SAID: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// A state to walk on from, and its number.
type Place = (usize, World);

/// A step to a state that was not known: from which number, by what.
struct Found {
    from: usize,
    action: Action,
    world: World,
}

/// What one thread has done on a level.
#[derive(Default)]
struct Share {
    found: Vec<Found>,
    transitions: usize,
    healed: usize,
    violation: Option<(usize, Option<Action>, String)>,
}

/// Walks everything.
pub fn walk(config: &Config) -> Walk {
    keep_what_panics_say();
    let first = World::new(config);
    let seen: Vec<Mutex<HashSet<u64>>> = (0..SHARDS).map(|_| Mutex::default()).collect();
    is_news(&seen, first.fingerprint());
    // By number: where each state was come from, and how.
    let mut ways: Vec<(usize, Option<Action>)> = vec![(0, None)];
    let mut level: Vec<Place> = vec![(0, first)];
    let mut walk = Walk::default();
    while !level.is_empty() {
        walk.states += level.len();
        let shares = walk_level(config, level, &seen);
        level = Vec::new();
        walk.depth += 1;
        for share in shares {
            walk.transitions += share.transitions;
            walk.healed += share.healed;
            if let Some((from, action, why)) = share.violation {
                let way = way_to(&ways, from).chain(action).collect();
                walk.violation = Some(Violation { why, way });
                return walk;
            }
            for Found { from, action, world } in share.found {
                level.push((ways.len(), world));
                ways.push((from, Some(action)));
            }
        }
    }
    walk
}

fn walk_level(config: &Config, level: Vec<Place>, seen: &[Mutex<HashSet<u64>>]) -> Vec<Share> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let places: Vec<Mutex<Option<Place>>> = level.into_iter().map(|place| Mutex::new(Some(place))).collect();
    let next = AtomicUsize::new(0);
    let work = || {
        let mut share = Share::default();
        SAID.set(Some(String::new()));
        while let Some(place) = places.get(next.fetch_add(1, Ordering::Relaxed)) {
            let place = place.lock().expect("nobody panics with it").take().expect("it is taken once");
            go_on(config, place, seen, &mut share);
            if share.violation.is_some() {
                break;
            }
        }
        SAID.set(None);
        share
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
        let mut shares = vec![work()];
        shares.extend(workers.into_iter().map(|worker| worker.join().expect("panics are caught")));
        shares
    })
}

/// Everything that can happen in one state.
fn go_on(config: &Config, (number, world): Place, seen: &[Mutex<HashSet<u64>>], share: &mut Share) {
    let fingerprint = world.fingerprint();
    if fingerprint.is_multiple_of(HEALED_ONE_IN) {
        share.healed += 1;
        for newest_first in [false, true] {
            let healed = guarded(|| world.clone().heal(config, newest_first));
            if let Err(why) = healed {
                share.violation = Some((number, None, format!("healed, newest first {newest_first}: {why}")));
                return;
            }
        }
    }
    for action in world.actions(config) {
        let stepped = guarded(|| {
            let mut after = world.clone();
            after.step(config, &action);
            after.check(config);
            (after.fingerprint(), after)
        });
        share.transitions += 1;
        match stepped {
            Ok((fingerprint, after)) if is_news(seen, fingerprint) => {
                share.found.push(Found { from: number, action, world: after });
            }
            Ok(_) => {}
            Err(why) => {
                share.violation = Some((number, Some(action), why));
                return;
            }
        }
    }
}

fn is_news(seen: &[Mutex<HashSet<u64>>], fingerprint: u64) -> bool {
    let shard = usize::try_from(fingerprint % SHARDS as u64).expect("a small number");
    seen[shard].lock().expect("nobody panics with it").insert(fingerprint)
}

fn way_to(ways: &[(usize, Option<Action>)], number: usize) -> impl Iterator<Item = Action> {
    let mut way = Vec::new();
    let mut at = number;
    while let (from, Some(action)) = &ways[at] {
        way.push(action.clone());
        at = *from;
    }
    way.into_iter().rev()
}

fn guarded<R>(act: impl FnOnce() -> R) -> Result<R, String> {
    panic::catch_unwind(AssertUnwindSafe(act))
        .map_err(|_| SAID.with_borrow_mut(|said| said.as_mut().map(std::mem::take)).unwrap_or_default())
}

/// A panic within a walk is a result, not noise: its words are kept instead of printed.
fn keep_what_panics_say() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            let kept = SAID.with_borrow_mut(|said| said.as_mut().map(|said| *said = info.to_string()));
            if kept.is_none() {
                before(info);
            }
        }));
    });
}
