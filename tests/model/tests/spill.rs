//! All interleavings of tiny worlds with a spill: what it has of the log is never lost from the timeline.

mod common;

use backtide_model::{Budget, Config, Op, Start};
use common::{NONE, holds, walks_larger_worlds};

/// No record fits beside the files, so every one is read back.
const TIGHT: u64 = 700;

/// A disk whose receiver is away, with a spill.
fn spilled(name: &'static str, writers: &'static [&'static [Op]]) -> Config {
    Config { start: Start::Away, spill_bytes: 1 << 16, window_bytes: TIGHT, ..Config::new(name, writers) }
}

#[test]
fn the_link_comes_and_goes() {
    holds(&Config {
        budget: Budget { cuts: 1, ..NONE },
        ..spilled("spill and cut", &[&[Op::Write(0), Op::Write(1)], &[Op::Write(0)]])
    });
}

#[test]
fn the_link_is_slow() {
    holds(&Config {
        start: Start::InSync,
        ..spilled("spill and slow link", &[&[Op::Write(0), Op::Write(1)], &[Op::Write(0), Op::Trim(1)]])
    });
}

#[test]
fn the_receiver_dies() {
    holds(&Config {
        received_acks: true,
        budget: Budget { receiver_crashes: 1, ..NONE },
        ..spilled("spill and receiver crash", &[&[Op::Write(0), Op::Write(1)], &[Op::Write(0)]])
    });
}

#[test]
fn the_agent_dies() {
    holds(&Config {
        hot: 1,
        budget: Budget { agent_crashes: 1, ..NONE },
        ..spilled("spill and agent crash", &[&[Op::Write(0)]])
    });
}

#[test]
fn the_host_loses_power() {
    holds(&Config {
        hot: 1,
        budget: Budget { power_losses: 1, ..NONE },
        ..spilled("spill and power loss", &[&[Op::Write(0)]])
    });
}

#[test]
fn the_disk_is_detached() {
    holds(&Config {
        hot: 1,
        budget: Budget { detaches: 1, ..NONE },
        ..spilled("spill and detach", &[&[Op::Write(0), Op::Write(1)]])
    });
}

#[test]
fn there_is_no_room() {
    // A file has room for a single record, and there is room for two or three of them.
    holds(&Config {
        spill_bytes: 420,
        ..spilled("full spill", &[&[Op::Write(0), Op::Write(1)], &[Op::Write(0), Op::Write(1)]])
    });
}

#[test]
fn the_spill_fails() {
    holds(&Config {
        budget: Budget { spill_failures: 1, ..NONE },
        ..spilled("spill fails", &[&[Op::Write(0), Op::Write(1)], &[Op::Write(0)]])
    });
}

#[test]
fn an_operator_interferes() {
    holds(&Config {
        budget: Budget { forces: 1, pauses: 1, ..NONE },
        ..spilled("spill and operator", &[&[Op::Write(0)]])
    });
}

/// Larger ones, for the same time as those of `interleavings`.
#[test]
fn larger_worlds() {
    if !walks_larger_worlds() {
        return;
    }
    const TWO: &[&[Op]] = &[&[Op::Write(0), Op::Write(0)]];
    holds(&Config {
        hot: 1,
        budget: Budget { agent_crashes: 1, ..NONE },
        ..spilled("large: spill and agent crash", TWO)
    });
    holds(&Config {
        hot: 1,
        budget: Budget { power_losses: 1, ..NONE },
        ..spilled("large: spill and power loss", TWO)
    });
    holds(&Config {
        budget: Budget { forces: 1, pauses: 1, ..NONE },
        ..spilled("large: spill and operator", &[&[Op::Write(0), Op::Write(1)]])
    });
    holds(&Config {
        hot: 1,
        budget: Budget { detaches: 1, cuts: 1, receiver_crashes: 1, ..NONE },
        ..spilled("large: spill, detach and receiver crash", TWO)
    });
}

#[test]
fn a_resync_of_everything_is_forced() {
    holds(&Config {
        start: Start::InSync,
        // The first record is one too many for memory alone.
        window_bytes: 500,
        budget: Budget { forces: 1, ..NONE },
        ..spilled("spill and forced resync", &[&[Op::Write(0)], &[Op::Write(1)]])
    });
}

#[test]
fn a_pause_follows_a_lost_link() {
    holds(&Config {
        start: Start::InSync,
        budget: Budget { cuts: 2, pauses: 2, ..NONE },
        ..spilled("spill and pauses", &[&[Op::Write(0)]])
    });
}
