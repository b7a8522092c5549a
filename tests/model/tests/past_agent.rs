//! Somebody else writes the image past the agent: what they write is in no point before everything was compared, whenever
//! they come and go.

mod common;

use backtide_model::{Budget, Config, Op, Start};
use common::{NONE, holds};

const PAST: Budget = Budget { past_agents: 1, past_writes: 1, ..NONE };

const ONE: &[&[Op]] = &[&[Op::Write(0)]];

#[test]
fn in_sync() {
    holds(&Config { budget: PAST, ..Config::new("past the agent in sync", ONE) });
}

#[test]
fn twice() {
    holds(&Config { budget: Budget { past_agents: 2, ..PAST }, ..Config::new("past the agent twice", &[]) });
}

#[test]
fn during_a_pass() {
    holds(&Config {
        start: Start::Dirty(&[Op::Write(0), Op::Write(1)]),
        budget: PAST,
        ..Config::new("past the agent during a pass", &[])
    });
}

#[test]
fn while_the_stream_is_lost() {
    holds(&Config { budget: Budget { cuts: 1, ..PAST }, ..Config::new("past the agent and cut", &[]) });
}

#[test]
fn while_the_agent_dies() {
    holds(&Config {
        hot: 1,
        budget: Budget { agent_crashes: 1, ..PAST },
        ..Config::new("past the agent and agent crash", &[])
    });
}

#[test]
fn while_the_receiver_dies() {
    holds(&Config {
        budget: Budget { receiver_crashes: 1, ..PAST },
        ..Config::new("past the agent and receiver crash", &[])
    });
}

#[test]
fn while_the_disk_is_paused() {
    holds(&Config { budget: Budget { pauses: 1, ..PAST }, ..Config::new("past the agent and pause", &[]) });
}

#[test]
fn while_the_disk_is_detached() {
    holds(&Config {
        budget: Budget { detaches: 1, ..PAST },
        ..Config::new("past the agent and detach", &[])
    });
}

#[test]
fn while_records_are_in_the_spill() {
    holds(&Config {
        start: Start::Away,
        spill_bytes: 1 << 12,
        window_bytes: 700,
        budget: PAST,
        ..Config::new("past the agent with a spill", ONE)
    });
}
