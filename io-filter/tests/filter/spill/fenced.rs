//! Another agent has taken the disk: nothing is kept for a receiver that takes no more of this one.

use backtide_io_filter::{Effect, Mode};
use backtide_protocol::ReceiverState;
use backtide_units::Reason;

use super::World;

#[test]
fn a_fenced_disk_keeps_nothing_and_tracks_what_it_has_retained() {
    // In memory, in the spill, and with a write to the spill under way.
    for (writes, slow) in [(5, false), (100, false), (100, true)] {
        let mut world = World::new(4 << 20);
        world.slow = slow;
        world.write(0, writes);
        let now = world.now();
        world.filter.fenced(now);
        world.carry_out();
        world.slow = false;
        while let Some(Effect::Spill(io, op)) = world.kept.pop_front() {
            world.do_spill(io, &op);
            world.carry_out();
        }
        assert_eq!(world.used(), 0, "{writes} {slow}");
        assert_eq!(world.dirty(), writes, "{writes} {slow}");
        // A spill that is too slow overflows before.
        let reason = if slow { Reason::ReceiverAway } else { Reason::ForeignHistory };
        assert_eq!(world.transitions, [(Mode::Tracking, Some(reason))]);
        world.write(100, 100);
        assert_eq!((world.used(), world.dirty()), (0, writes + 100), "what comes later is tracked");
    }
}

#[test]
fn a_pass_is_given_up_by_a_fence_and_a_pause_goes_on() {
    let mut world = World::new(0);
    world.connect(0, ReceiverState::New);
    assert_eq!(world.filter.status().mode, Mode::Resync);
    let now = world.now();
    world.filter.fenced(now);
    world.carry_out();
    let status = world.filter.status();
    assert_eq!((status.mode, status.connected), (Mode::Tracking, false));
    world.filter.pause(now);
    world.filter.fenced(now);
    assert_eq!(world.filter.status().mode, Mode::Paused);
}
