//! The receiver that the walks use answers as the one that is shipped.

use backtide_model::{Budget, Config, Op, Steps, lockstep};

#[test]
fn the_walked_receiver_is_the_shipped_one() {
    const WRITERS: &[&[Op]] = &[
        &[Op::Write(0), Op::Write(1), Op::Flush, Op::Trim(0), Op::Write(2), Op::Write(0), Op::Write(1)],
        &[Op::Write(2), Op::Write(1), Op::Trim(2), Op::Write(0), Op::Flush, Op::Write(2), Op::Write(1)],
    ];
    let budget = Budget {
        cuts: 4,
        agent_crashes: 2,
        power_losses: 1,
        receiver_crashes: 4,
        ticks: 3,
        pauses: 2,
        forces: 2,
        rivals: 0,
        detaches: 1,
        spill_failures: 1,
        tracking_failures: 0,
        past_agents: 2,
        past_writes: 2,
    };
    let mut all = Steps::default();
    for seed in 0..400 {
        // Odd ones with a window that overflows.
        let window_bytes = if seed % 2 == 0 { 1 << 20 } else { 700 };
        // In some another host takes the disk over, which is the end of what the first one may do.
        let rivals = u8::from(seed % 5 == 4);
        let config = Config {
            blocks: 3,
            content: &[7, 0, 9],
            budget: Budget { rivals, ..budget },
            window_bytes,
            // Every other one of those, and of the others, with a spill.
            spill_bytes: if seed % 4 < 2 { 0 } else { 1 << 12 },
            hot: 1,
            ghosts: true,
            slow_landing: true,
            lane: 3,
            ..Config::new("lockstep", WRITERS)
        };
        let steps = lockstep(&config, seed);
        all.steps += steps.steps;
        all.answers += steps.answers;
        all.points += steps.points;
        all.stale += steps.stale;
        all.rivals += steps.rivals;
        all.crashes = (all.crashes.0 + steps.crashes.0, all.crashes.1 + steps.crashes.1);
    }
    println!("{all:?}");
    assert!(
        all.answers > 1000 && all.crashes.1 > 20 && all.points > 1000 && all.stale > 1000 && all.rivals > 20,
        "{all:?}"
    );
}
