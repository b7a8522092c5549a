//! Many seeds, each a life of a disk with everything that can go wrong in it.
//!
//! `SEED=n` replays one seed and prints its trace, `SEEDS=a..b` runs a range, `STEPS=n` makes the
//! lives longer or shorter.

use backtide_sim::{run, run_many};

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name} is a number")))
}

fn range() -> std::ops::Range<u64> {
    let Ok(text) = std::env::var("SEEDS") else { return 0..300 };
    let ends = text.split_once("..").and_then(|(a, b)| Some(a.parse().ok()?..b.parse().ok()?));
    ends.expect("SEEDS is a range such as 0..1000")
}

#[test]
fn every_promise_holds_for_every_seed() {
    let steps = number("STEPS").unwrap_or(20_000);
    if let Some(seed) = number("SEED") {
        let outcome = run(seed, steps, None, true);
        println!("{outcome:#?}");
        return assert!(outcome.is_ok(), "SEED={seed} fails: {}", outcome.unwrap_err());
    }
    let seeds = range();
    let (outcomes, failures) = run_many(seeds.clone(), steps, None);
    let sum = |of: fn(&backtide_sim::Outcome) -> u64| outcomes.iter().map(of).sum::<u64>();
    println!(
        "seeds {seeds:?}: {} steps, {} changes, {} freezes, {} points read, {} holes refused, \
         {} comparisons of all blocks, {} agent deaths, {} receiver deaths, {} detaches, {} verifies, \
         {} overflows, {} passes forfeited, {} copies before write, {} stale claims",
        sum(|outcome| outcome.steps),
        sum(|outcome| outcome.stats.changes),
        sum(|outcome| outcome.stats.freezes),
        sum(|outcome| outcome.stats.points_checked),
        sum(|outcome| outcome.stats.holes_refused),
        sum(|outcome| outcome.stats.differences_checked),
        sum(|outcome| outcome.stats.agent_deaths),
        sum(|outcome| outcome.stats.receiver_deaths),
        sum(|outcome| outcome.stats.detaches),
        sum(|outcome| outcome.stats.verifies),
        sum(|outcome| outcome.stats.overflows),
        sum(|outcome| outcome.stats.forfeited),
        sum(|outcome| outcome.stats.copies),
        sum(|outcome| outcome.stats.stale_refused),
    );
    for (seed, why) in failures.iter().take(20) {
        println!("SEED={seed} fails: {why}");
    }
    let first = failures.first().map(|(seed, _)| seed);
    assert!(failures.is_empty(), "{} seeds fail; replay with SEED={}", failures.len(), first.unwrap());
}
