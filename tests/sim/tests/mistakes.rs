//! Tests of the test: each deliberate mistake is found, and a seed repeats exactly.

use backtide_io_filter::Mutant;
use backtide_sim::{Mistake, run, run_many};

const STEPS: u64 = 20_000;

/// The mistake is found by at least one of the first seeds.
fn is_found(mistake: Mistake, seeds: u64) {
    let (outcomes, failures) = run_many(0..seeds, STEPS, Some(mistake));
    println!("{mistake:?}: found by {} of {seeds} seeds", failures.len());
    if let Some((seed, why)) = failures.first() {
        println!("SEED={seed}: {why}");
    }
    assert!(!failures.is_empty(), "{} seeds found nothing wrong with {mistake:?}", outcomes.len());
}

#[test]
fn clearing_bits_before_the_read_is_found() {
    is_found(Mistake::Filter(Mutant::ClearBeforeRead), 20);
}

#[test]
fn overwriting_without_a_copy_is_found() {
    is_found(Mistake::Filter(Mutant::NoCopyBeforeWrite), 40);
}

#[test]
fn offering_the_t_of_a_forfeited_pass_is_found() {
    is_found(Mistake::Filter(Mutant::ForfeitedOffersT), 40);
}

#[test]
fn forgetting_changes_under_way_at_the_freeze_is_found() {
    is_found(Mistake::Filter(Mutant::FreezeForgetsOngoing), 20);
}

#[test]
fn changing_a_cold_extent_at_once_is_found() {
    is_found(Mistake::Filter(Mutant::NoWaitForHot), 60);
}

#[test]
fn a_snapshot_without_unflushed_blocks_is_found() {
    is_found(Mistake::Filter(Mutant::SnapshotForgetsUnflushed), 60);
}

#[test]
fn a_snapshot_without_the_window_is_found() {
    is_found(Mistake::Filter(Mutant::SnapshotForgetsWindow), 60);
}

#[test]
fn promising_that_nothing_changes_is_found() {
    is_found(Mistake::Filter(Mutant::UnchangedAhead), 40);
}

#[test]
fn trimming_the_spill_by_what_was_received_is_found() {
    is_found(Mistake::Filter(Mutant::SpillTrimsReceived), 20);
}

#[test]
fn forgetting_the_blocks_of_a_spill_is_found() {
    is_found(Mistake::Filter(Mutant::SpillForgetsBlocks), 20);
}

#[test]
fn acknowledging_before_the_sync_is_found() {
    is_found(Mistake::AckBeforeSync, 20);
}

#[test]
fn not_comparing_what_a_disk_has_gained_is_found() {
    is_found(Mistake::ForgetsGrowth, 40);
}

#[test]
fn a_seed_repeats_exactly() {
    for seed in 0..6 {
        let first = run(seed, STEPS, None, false).expect("a good seed");
        let second = run(seed, STEPS, None, false).expect("a good seed");
        assert_eq!((first.trace, first.steps), (second.trace, second.steps), "SEED={seed}");
    }
}
