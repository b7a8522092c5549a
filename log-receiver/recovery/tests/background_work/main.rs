//! The power fails at every write and every sync of what is done in the background while the log goes on: history is folded,
//! the log begins later, room is given back, damage is mended, a base is written again. What was not synced is lost, torn or
//! reordered; what was promised is there, and the next run ends it.
//!
//! `SEEDS=1..100` runs more lives than a short run has.

#[path = "../common/mod.rs"]
mod common;

mod beside;
mod mending;
mod world;

use backtide_units::ByteOffset;
use common::{SayOnPanic, directory, seeds};
use world::{Begins, Done, World};

/// No work that a test has done takes so many changes of files.
const CHANGES_MAX: u64 = 5000;

/// A world in which some history was folded already, with more that can be.
fn with_history(seed: u64) -> World {
    let mut world = World::new(seed);
    for _ in 0..2 {
        let plan = world.next_plan();
        world.fold(&plan).expect("no fault");
        world.go_on(40);
    }
    world.agent().flush_all();
    world
}

/// The same, with everything in files and synced, and the agent in sync.
fn settled(seed: u64) -> World {
    let mut world = with_history(seed);
    world.go_on(30);
    world.tidy().expect("no fault");
    world
}

#[test]
fn a_power_cut_at_any_change_of_a_fold_beside_ingest_costs_no_promised_point() {
    let (mut cuts, mut all) = (0, Done::default());
    let seeds = seeds(2);
    for &seed in &seeds {
        let mut world = with_history(seed);
        let plan = world.next_plan();
        let before = Begins::of(&world.snapshot());
        let after = World::planned(&plan);
        for cut in 0..CHANGES_MAX {
            let _say = SayOnPanic(format!("SEED={seed}, the power cut at change {cut}"));
            let mut world = world.fork();
            world.memory.cut_power_after(cut);
            let folded = world.fold(&plan);
            if !world.memory.is_off() {
                world.memory.cut_power_after(u64::MAX >> 1);
                let done = folded.expect("no fault");
                all.segments += done.segments;
                all.collected.removed += done.collected.removed;
                all.collected.rewritten += done.collected.rewritten;
                world.check(&after);
                cuts += cut;
                break;
            }
            world.crash_and_check(seed ^ cut, &[&before, &after]);
            if cut % 8 == seed % 8 {
                // A second cut finds what was found to be durable.
                let now = Begins::of(&world.snapshot());
                world.crash_and_check(!cut, &[&now]);
                world.goes_on(cut);
            }
        }
    }
    assert!(cuts > 50 * seeds.len() as u64, "{cuts} cuts");
    let given = all.collected.removed + all.collected.rewritten;
    assert!(seeds.len() == 1 || (all.segments > 0 && given > 0), "{all:?}");
}

#[test]
fn a_power_cut_while_a_lost_copy_of_the_base_is_written_again_costs_nothing() {
    for seed in seeds(1) {
        let world = settled(seed);
        let begins = Begins::of(&world.snapshot());
        let elsewhere = format!("images/bases/{}.base", directory().display().to_string().replace('/', "-"));
        let copies = [directory().join("base.1"), directory().join("base.2"), elsewhere.into()];
        for only in 0..copies.len() {
            let mut ended = false;
            for cut in 0..CHANGES_MAX {
                let _say = SayOnPanic(format!("SEED={seed}, copy {only} is left, the power cut at {cut}"));
                let mut world = world.fork();
                for (_, copy) in copies.iter().enumerate().filter(|(nth, _)| *nth != only) {
                    world.memory.flip_bit(copy, ByteOffset(70), 3);
                }
                world.memory.cut_power_after(cut);
                let opened = world.reopen();
                ended = !world.memory.is_off();
                assert!(opened.is_ok() || !ended, "{opened:?}");
                world.crash_and_check(seed ^ cut, &[&begins]);
                if ended {
                    break;
                }
            }
            assert!(ended, "opening takes more than {CHANGES_MAX} changes");
        }
    }
}
