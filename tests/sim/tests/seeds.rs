//! Many seeds, each a life of a disk with everything that can go wrong in it.
//!
//! `SEED=n` replays one seed and prints its trace, `SEEDS=a..b` runs a range, `STEPS=n` makes the
//! lives longer or shorter.

use backtide_sim::{Stats, run, run_many};

/// Everything that must happen somewhere in some hundred seeds.
type Seen = (&'static str, fn(&Stats) -> u64);
const SEEN: [Seen; 58] = [
    ("changes", |stats| stats.changes),
    ("passes", |stats| stats.freezes),
    ("of these coalescing", |stats| stats.coalescing),
    ("completed passes", |stats| stats.completed),
    ("points read back", |stats| stats.points_checked),
    ("holes refused", |stats| stats.holes_refused),
    ("comparisons of all blocks", |stats| stats.differences_checked),
    ("agents dead", |stats| stats.agent_deaths),
    ("receivers dead", |stats| stats.receiver_deaths),
    ("stores put back from a copy", |stats| stats.stores_put_back),
    ("of these noticed by an agent", |stats| stats.put_back_noticed),
    ("times of points asked for", |stats| stats.times_asked),
    ("clean detaches", |stats| stats.detaches),
    ("disks grown", |stats| stats.grown),
    ("verifies under load", |stats| stats.verifies),
    ("window overflows", |stats| stats.overflows),
    ("passes forfeited", |stats| stats.forfeited),
    ("copies before a write", |stats| stats.copies),
    ("reads that gave way to the guest", |stats| stats.gave_way),
    ("looks at a pass held to a rate", |stats| stats.held),
    ("stale claims refused", |stats| stats.stale_refused),
    ("marks offered", |stats| stats.marks),
    ("snapshots of the tracking", |stats| stats.snapshots),
    ("crashes with a tracking file", |stats| stats.crashes_tracked),
    ("tracking files with a torn record", |stats| stats.tracking_torn),
    ("passes without unreadable blocks", |stats| stats.unreadable),
    ("tracking files given up", |stats| stats.tracking_lost),
    ("of these begun anew", |stats| stats.tracking_anew),
    ("crashes with one that was", |stats| stats.crashes_anew),
    ("spills found by a new agent", |stats| stats.spills_found),
    ("of these without a gap", |stats| stats.spills_complete),
    ("bytes spilled", |stats| stats.spilled_bytes),
    ("bytes read back", |stats| stats.unspilled_bytes),
    ("spills full", |stats| stats.spills_full),
    ("spills failed", |stats| stats.spills_failed),
    ("spills slower than the guest", |stats| stats.spills_slow),
    ("rewinds asked for", |stats| stats.rewinds_wanted),
    ("looks at a settled disk", |stats| stats.polls_settled),
    ("rewinds", |stats| stats.rewinds),
    ("of these undone", |stats| stats.undone),
    ("rewinds that changed nothing", |stats| stats.rewinds_refused),
    ("attaches that lacked blocks", |stats| stats.hydrations),
    ("of these complete", |stats| stats.hydrated),
    ("fetches ahead", |stats| stats.fetched_ahead),
    ("stored and not noted", |stats| stats.stored_unnoted),
    ("fetches that waited for the receiver", |stats| stats.fetches_waited),
    ("reads of missing blocks", |stats| stats.reads_of_missing),
    ("deaths while blocks were missing", |stats| stats.deaths_lacking),
    ("flushes refused", |stats| stats.flushes_refused),
    ("chunks that the image was found to hold", |stats| stats.compared_equal),
    ("servers that ended with the agent", |stats| stats.servers_ended),
    ("deaths with LSNs that were not reserved", |stats| stats.unreserved_deaths),
    ("frames held until they were", |stats| stats.unreserved_held),
    ("times the image was written past the agent", |stats| stats.past_agents),
    ("of these during a pass", |stats| stats.past_in_pass),
    ("writes past the agent", |stats| stats.past_writes),
    ("of these without one", |stats| stats.past_without_agent),
    ("comparisons of what was written past it", |stats| stats.past_compared),
];

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
    let steps: u64 = outcomes.iter().map(|outcome| outcome.steps).sum();
    println!("seeds {seeds:?}: {steps} steps");
    for (seed, why) in failures.iter().take(20) {
        println!("SEED={seed} fails: {why}");
    }
    let first = failures.first().map(|(seed, _)| seed);
    assert!(failures.is_empty(), "{} seeds fail; replay with SEED={}", failures.len(), first.unwrap());
    for (what, of) in SEEN {
        let seen: u64 = outcomes.iter().map(|outcome| of(&outcome.stats)).sum();
        println!("{seen:>10} {what}");
        // A simulation in which something never happens says nothing about it.
        assert!(seen > 0 || seeds.end - seeds.start < 200, "{what}: never seen");
    }
}
