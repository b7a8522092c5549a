//! Whatever ends when, a disk that lacks blocks is what it should be: the point, under everything a guest has
//! written and was told so.
//!
//! A world of random fetches, writes, reads and flushes, step by step, in which the agent is killed or the power
//! fails between any two steps; in every other one the image is behind a server, which may end with the agent. `SEED=n` runs one world only, `WORLDS=n` more than usual.

mod mistake;
mod model;
mod world;

use mistake::Mistake;
use world::World;

const WORLDS: u64 = 400;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name} is a number")))
}

#[test]
fn no_crash_shows_what_nobody_wrote() {
    let seeds = match number("SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("WORLDS").unwrap_or(WORLDS),
    };
    for seed in seeds {
        if let Err(wrong) = World::new(seed, None).live() {
            panic!("SEED={seed}: {wrong}");
        }
    }
}

/// The world above would notice a driver that did one thing in the wrong order.
#[test]
fn every_mistake_is_noticed() {
    for mistake in Mistake::ALL {
        let noticed = (0..WORLDS).any(|seed| World::new(seed, Some(mistake)).live().is_err());
        assert!(noticed, "{mistake:?}");
    }
}
