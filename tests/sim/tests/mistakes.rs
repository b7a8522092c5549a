//! Tests of the test: each deliberate mistake is found, and a seed repeats exactly.

use backtide_hydration::Mutant as Hydration;
use backtide_io_filter::Mutant;
use backtide_sim::{DriverMistake, Mistake, run, run_many};

const STEPS: u64 = 20_000;

/// Seeds that are run before somebody looks whether one has found it.
const AT_ONCE: usize = 4;

/// So many are run at the most: every change of what is simulated gives all of them another course.
const SEEDS_MAX: u64 = 600;

/// The mistake is found by at least one of the first seeds.
fn is_found(mistake: Mistake) {
    for first in (0..SEEDS_MAX).step_by(AT_ONCE) {
        let (_, failures) = run_many(first..first + AT_ONCE as u64, STEPS, Some(mistake));
        if let Some((seed, why)) = failures.first() {
            return println!("{mistake:?}: found by SEED={seed}: {why}");
        }
    }
    panic!("{SEEDS_MAX} seeds found nothing wrong with {mistake:?}");
}

#[test]
fn clearing_bits_before_the_read_is_found() {
    is_found(Mistake::Filter(Mutant::ClearBeforeRead));
}

#[test]
fn overwriting_without_a_copy_is_found() {
    is_found(Mistake::Filter(Mutant::NoCopyBeforeWrite));
}

#[test]
fn offering_the_t_of_a_forfeited_pass_is_found() {
    is_found(Mistake::Filter(Mutant::ForfeitedOffersT));
}

#[test]
fn forgetting_changes_under_way_at_the_freeze_is_found() {
    is_found(Mistake::Filter(Mutant::FreezeForgetsOngoing));
}

#[test]
fn changing_a_cold_extent_at_once_is_found() {
    is_found(Mistake::Filter(Mutant::NoWaitForHot));
}

#[test]
fn a_snapshot_without_unflushed_blocks_is_found() {
    is_found(Mistake::Filter(Mutant::SnapshotForgetsUnflushed));
}

#[test]
fn a_snapshot_without_the_window_is_found() {
    is_found(Mistake::Filter(Mutant::SnapshotForgetsWindow));
}

#[test]
fn a_file_begun_anew_that_knows_nothing_and_does_not_say_so_is_found() {
    is_found(Mistake::Filter(Mutant::AnewForgetsBlocks));
}

#[test]
fn a_verify_that_goes_on_out_of_sync_is_found() {
    is_found(Mistake::Filter(Mutant::VerifyOutOfSync));
}

#[test]
fn promising_that_nothing_changes_is_found() {
    is_found(Mistake::Filter(Mutant::UnchangedAhead));
}

#[test]
fn trimming_the_spill_by_what_was_received_is_found() {
    is_found(Mistake::Filter(Mutant::SpillTrimsReceived));
}

#[test]
fn forgetting_the_blocks_of_a_spill_is_found() {
    is_found(Mistake::Filter(Mutant::SpillForgetsBlocks));
}

#[test]
fn reading_what_somebody_else_writes_is_found() {
    is_found(Mistake::Filter(Mutant::PassWhileWrittenPast));
}

#[test]
fn acknowledging_before_the_sync_is_found() {
    is_found(Mistake::AckBeforeSync);
}

#[test]
fn not_comparing_what_a_disk_has_gained_is_found() {
    is_found(Mistake::ForgetsGrowth);
}

#[test]
fn noting_blocks_before_they_are_written_is_found() {
    is_found(Mistake::Hydrator(Hydration::NotesFirst));
}

#[test]
fn not_noting_what_a_guest_overwrites_is_found() {
    is_found(Mistake::Hydrator(Hydration::NeverNotes));
}

#[test]
fn storing_over_what_was_written_meanwhile_is_found() {
    is_found(Mistake::Hydrator(Hydration::StoresOverWrites));
}

#[test]
fn calling_blocks_durable_before_the_sync_is_found() {
    is_found(Mistake::Driver(DriverMistake::DurableBeforeSync));
}

#[test]
fn writing_a_rewind_down_after_the_first_change_is_found() {
    is_found(Mistake::Driver(DriverMistake::NotedLate));
}

#[test]
fn not_sending_what_a_rewind_changed_is_found() {
    is_found(Mistake::Driver(DriverMistake::NotChanged));
}

#[test]
fn a_seed_repeats_exactly() {
    for seed in 0..6 {
        let first = run(seed, STEPS, None, false).expect("a good seed");
        let second = run(seed, STEPS, None, false).expect("a good seed");
        assert_eq!((first.trace, first.steps), (second.trace, second.steps), "SEED={seed}");
    }
}
