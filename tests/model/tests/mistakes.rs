//! Tests of the test: each deliberate mistake is found, by a way that is printed.

use std::time::Duration;

use backtide_io_filter::Mutant;
use backtide_model::{Budget, Config, Op, Start, walk};

const NONE: Budget = Config::new("", &[]).budget;

/// The world shows nothing wrong, until the mistake is made in it.
fn is_found(mutant: Mutant, config: Config) {
    let walked = walk(&Config { mutant: Some(mutant), ..config });
    let violation = walked.violation.unwrap_or_else(|| panic!("nobody notices {mutant:?}"));
    println!("{mutant:?}: after {} states: {violation}", walked.states);
}

fn tracked(name: &'static str) -> Config {
    Config { hot: 1, ..Config::new(name, &[&[Op::Write(0)], &[Op::Write(1)]]) }
}

fn apart() -> Config {
    Config {
        blocks: 3,
        start: Start::Dirty(&[Op::Write(0), Op::Write(2)]),
        buffer_bytes: 4096,
        ..Config::new("apart", &[&[Op::Write(2)]])
    }
}

#[test]
fn clearing_bits_before_the_read_is_found() {
    let start = Start::Dirty(&[Op::Write(0), Op::Write(1)]);
    is_found(
        Mutant::ClearBeforeRead,
        Config { start, budget: Budget { cuts: 1, ..NONE }, ..Config::new("", &[]) },
    );
}

#[test]
fn overwriting_without_a_copy_is_found() {
    is_found(Mutant::NoCopyBeforeWrite, apart());
}

#[test]
fn offering_the_t_of_a_forfeited_pass_is_found() {
    is_found(Mutant::ForfeitedOffersT, Config { delay_max: Duration::ZERO, ..apart() });
}

#[test]
fn forgetting_changes_under_way_at_the_freeze_is_found() {
    let start = Start::Dirty(&[Op::Write(0)]);
    is_found(Mutant::FreezeForgetsOngoing, Config { start, ..Config::new("", &[&[Op::Write(0)]]) });
}

#[test]
fn changing_a_cold_extent_at_once_is_found() {
    is_found(Mutant::NoWaitForHot, tracked("cold"));
}

#[test]
fn a_snapshot_without_unflushed_blocks_is_found() {
    is_found(
        Mutant::SnapshotForgetsUnflushed,
        Config { budget: Budget { ticks: 2, forces: 1, ..NONE }, ..tracked("unflushed") },
    );
}

#[test]
fn a_snapshot_without_the_window_is_found() {
    is_found(
        Mutant::SnapshotForgetsWindow,
        Config { budget: Budget { ticks: 2, forces: 1, ..NONE }, ..tracked("window") },
    );
}

#[test]
fn a_file_begun_anew_that_knows_nothing_and_does_not_say_so_is_found() {
    is_found(
        Mutant::AnewForgetsBlocks,
        Config { budget: Budget { tracking_failures: 1, ticks: 1, ..NONE }, ..tracked("anew") },
    );
}

#[test]
fn reading_what_somebody_else_writes_is_found() {
    is_found(
        Mutant::PassWhileWrittenPast,
        Config {
            budget: Budget { past_agents: 1, past_writes: 1, ..NONE },
            ..Config::new("past the agent", &[&[Op::Write(0)]])
        },
    );
}

fn spilled(writers: &'static [&'static [Op]]) -> Config {
    Config { spill_bytes: 1 << 16, window_bytes: 700, ..Config::new("spilled", writers) }
}

#[test]
fn trimming_the_spill_by_what_was_received_is_found() {
    is_found(
        Mutant::SpillTrimsReceived,
        Config {
            received_acks: true,
            budget: Budget { cuts: 1, receiver_crashes: 1, agent_crashes: 1, ..NONE },
            ..spilled(&[&[Op::Write(0), Op::Write(1)]])
        },
    );
}

#[test]
fn forgetting_the_blocks_of_a_spill_is_found() {
    is_found(
        Mutant::SpillForgetsBlocks,
        Config {
            budget: Budget { cuts: 1, spill_failures: 1, ..NONE },
            ..spilled(&[&[Op::Write(0), Op::Write(1)]])
        },
    );
}
