//! All interleavings of tiny worlds: every promise holds in every state.
//!
//! `MODEL=large` walks larger ones too, with those of `spill` for half an hour.

mod common;

use std::time::Duration;

use backtide_model::{Budget, Config, Op, Start};
use common::{NONE, holds, walks_larger_worlds};

/// Two blocks that are no neighbors: the second has to wait for room in a buffer of one block.
const APART: Start = Start::Dirty(&[Op::Write(0), Op::Write(2)]);

#[test]
fn the_link_and_the_receiver_fail_in_sync() {
    holds(&Config {
        budget: Budget { cuts: 1, receiver_crashes: 1, ..NONE },
        ..Config::new("link and receiver", &[&[Op::Write(0), Op::Write(1)], &[Op::Write(0)]])
    });
}

#[test]
fn the_first_protection() {
    holds(&Config {
        content: &[5, 6],
        start: Start::FirstAttach,
        ..Config::new("first attach", &[&[Op::Write(0)], &[Op::Write(1)]])
    });
}

#[test]
fn a_pass_is_interrupted() {
    holds(&Config {
        start: Start::Dirty(&[Op::Write(0), Op::Write(1)]),
        budget: Budget { cuts: 1, ..NONE },
        ..Config::new("pass and cut", &[&[Op::Write(0)]])
    });
}

#[test]
fn the_receiver_dies_during_a_pass() {
    holds(&Config {
        start: Start::Dirty(&[Op::Write(0), Op::Write(1)]),
        budget: Budget { receiver_crashes: 1, ..NONE },
        ..Config::new("pass and receiver crash", &[&[Op::Write(0)]])
    });
}

#[test]
fn the_agent_dies_during_a_pass() {
    holds(&Config {
        start: Start::Dirty(&[Op::Write(0)]),
        hot: 1,
        budget: Budget { agent_crashes: 1, ..NONE },
        ..Config::new("pass and agent crash", &[&[Op::Write(0)]])
    });
}

#[test]
fn writes_land_late_during_a_pass() {
    holds(&Config {
        start: Start::Dirty(&[Op::Write(0), Op::Write(1)]),
        slow_landing: true,
        ..Config::new("slow writes", &[&[Op::Write(0)], &[Op::Write(0)]])
    });
}

#[test]
fn old_content_is_copied_before_a_write() {
    holds(&Config {
        blocks: 3,
        start: APART,
        buffer_bytes: 4096,
        budget: Budget { ticks: 1, ..NONE },
        ..Config::new("copies and deadlines", &[&[Op::Write(2)], &[Op::Write(0)]])
    });
}

#[test]
fn a_pass_is_forfeited() {
    holds(&Config {
        blocks: 3,
        start: APART,
        buffer_bytes: 4096,
        delay_max: Duration::ZERO,
        ..Config::new("forfeit", &[&[Op::Write(2)], &[Op::Trim(0)]])
    });
}

#[test]
fn the_link_is_too_slow() {
    holds(&Config {
        start: Start::Dirty(&[Op::Write(0)]),
        window_bytes: 450,
        ..Config::new("coalescing", &[&[Op::Write(0), Op::Write(1)], &[Op::Write(0)]])
    });
}

#[test]
fn the_window_overflows_in_sync() {
    holds(&Config {
        window_bytes: 300,
        budget: Budget { cuts: 1, ..NONE },
        ..Config::new("overflow", &[&[Op::Write(0)], &[Op::Write(0)]])
    });
}

#[test]
fn the_agent_dies() {
    holds(&Config {
        hot: 1,
        budget: Budget { agent_crashes: 1, ..NONE },
        ..Config::new("agent crash", &[&[Op::Write(0), Op::Write(1)]])
    });
}

#[test]
fn the_tracking_file_fails_and_is_begun_anew() {
    holds(&Config {
        hot: 1,
        budget: Budget { tracking_failures: 1, ticks: 1, ..NONE },
        ..Config::new("tracking file", &[&[Op::Write(0)], &[Op::Write(1)]])
    });
}

#[test]
fn the_host_loses_power() {
    holds(&Config {
        hot: 1,
        budget: Budget { power_losses: 1, ..NONE },
        ..Config::new("power loss", &[&[Op::Write(0), Op::Flush]])
    });
}

#[test]
fn both_sides_die() {
    holds(&Config {
        hot: 1,
        budget: Budget { agent_crashes: 1, receiver_crashes: 1, ..NONE },
        ..Config::new("agent and receiver crash", &[&[Op::Write(0)]])
    });
}

#[test]
fn frames_of_a_lost_connection_arrive_late() {
    holds(&Config {
        ghosts: true,
        received_acks: true,
        budget: Budget { cuts: 2, ..NONE },
        ..Config::new("late frames", &[&[Op::Write(0)], &[Op::Trim(0)]])
    });
}

#[test]
fn an_operator_interferes() {
    holds(&Config {
        budget: Budget { pauses: 1, forces: 1, ..NONE },
        ..Config::new("pause and force", &[&[Op::Write(0)]])
    });
}

#[test]
fn another_host_takes_the_disk_over() {
    holds(&Config {
        ghosts: true,
        received_acks: true,
        budget: Budget { rivals: 1, cuts: 1, ..NONE },
        ..Config::new("takeover in sync", &[&[Op::Write(0)], &[Op::Trim(1)]])
    });
    holds(&Config {
        start: Start::Dirty(&[Op::Write(0), Op::Write(1)]),
        budget: Budget { rivals: 1, ..NONE },
        ..Config::new("takeover during a pass", &[&[Op::Write(0)]])
    });
    holds(&Config {
        lane: 2,
        budget: Budget { rivals: 1, receiver_crashes: 1, ..NONE },
        ..Config::new("takeover and receiver crash", &[&[Op::Write(0)], &[Op::Write(0)]])
    });
}

/// Larger worlds; see the module's description.
#[test]
fn larger_worlds() {
    if !walks_larger_worlds() {
        return;
    }
    const TWO: &[&[Op]] = &[&[Op::Write(0)], &[Op::Write(1)]];
    let dirty = Start::Dirty(&[Op::Write(0), Op::Write(1)]);
    holds(&Config {
        content: &[5, 6],
        start: Start::FirstAttach,
        budget: Budget { cuts: 1, ..NONE },
        ..Config::new("large: first attach and cut", TWO)
    });
    holds(&Config {
        start: dirty,
        lane: 2,
        budget: Budget { cuts: 1, ..NONE },
        ..Config::new("large: pass and cut", TWO)
    });
    holds(&Config {
        blocks: 3,
        start: APART,
        buffer_bytes: 4096,
        slow_landing: true,
        budget: Budget { cuts: 1, ticks: 1, ..NONE },
        ..Config::new("large: copies and cut", &[&[Op::Write(2)], &[Op::Write(0)]])
    });
    holds(&Config {
        start: dirty,
        window_bytes: 450,
        budget: Budget { cuts: 1, ..NONE },
        ..Config::new("large: coalescing and cut", &[&[Op::Write(0), Op::Write(1)], &[Op::Write(0)]])
    });
    holds(&Config {
        hot: 1,
        budget: Budget { agent_crashes: 1, ..NONE },
        ..Config::new("large: agent crash", TWO)
    });
    holds(&Config {
        hot: 1,
        budget: Budget { power_losses: 1, ..NONE },
        ..Config::new("large: power loss", &[&[Op::Write(0), Op::Flush, Op::Write(1)]])
    });
    holds(&Config {
        hot: 1,
        budget: Budget { tracking_failures: 1, ticks: 1, agent_crashes: 1, ..NONE },
        ..Config::new("large: tracking file and agent crash", &[&[Op::Write(0)]])
    });
    holds(&Config {
        hot: 1,
        budget: Budget { tracking_failures: 1, ticks: 1, ..NONE },
        ..Config::new("large: tracking file", &[&[Op::Write(0)], &[Op::Write(1), Op::Write(0)]])
    });
    holds(&Config {
        budget: Budget { pauses: 1, forces: 1, cuts: 1, ..NONE },
        ..Config::new("large: operator and cut", &[&[Op::Write(0)]])
    });
}
