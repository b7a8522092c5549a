//! A log of which the receiver says that some of it is damaged: what follows it is sent all the same.

use backtide_protocol::{ReceiverState, Welcome};
use backtide_tracking::DirtyBitmap;
use backtide_units::{CaptureTime, Epoch, Lsn};
use uuid::Uuid;

use super::{World, crashed, lsns};
use crate::common::welcome;

#[test]
fn a_log_in_doubt_gets_all_that_was_retained_before_everything_is_compared() {
    // In memory, in the spill, and in the spill of an agent that died.
    for (writes, dies) in [(5, false), (100, false), (100, true)] {
        let mut world = World::new(4 << 20);
        world.write(0, writes);
        if dies {
            let candidates = DirtyBitmap::of((0..128).into());
            world = World::attached(world.storage.clone(), 4 << 20, Epoch(3), crashed(1000, candidates));
        }
        world.connect(100, ReceiverState::Foreign);
        let sent = world.drain();
        let (records, rest) = sent.split_at(writes as usize);
        assert_eq!(records, lsns(101..=100 + writes), "{writes} {dies}");
        assert_eq!(rest[0], format!("pass after {}", 100 + writes), "{writes} {dies}");
        assert!(world.alarms[0].contains("is damaged or in doubt"), "{:?}", world.alarms);
        assert_eq!(world.used(), 0);
    }
}

#[test]
fn a_log_in_doubt_that_is_short_as_well_gets_none_of_it() {
    let own = Uuid::from_u128(70);
    let short = welcome(ReceiverState::Foreign, Lsn(90));
    let in_doubt = || welcome(ReceiverState::Foreign, Lsn(100));
    let stories = [
        (short, "pass after 90"),
        (Welcome { in_pass: true, ..in_doubt() }, "pass after 100"),
        (Welcome { last_attach: Some(own), ..in_doubt() }, "pass after 100"),
        (Welcome { highest: Lsn(300), ..in_doubt() }, "pass after 100"),
    ];
    for (told, first) in stories {
        let mut world = World::new(4 << 20);
        world.filter.follows(Some(vec![]));
        world.write(0, 5);
        world.connect_to(&told);
        assert_eq!(world.drain()[0], first, "{told:?}");
    }
}

#[test]
fn a_log_in_doubt_that_was_put_back_gets_none_of_it() {
    let mut world = World::new(4 << 20);
    world.connect(100, ReceiverState::Known);
    world.write(0, 1);
    assert_eq!(world.drain(), ["101"]);
    let now = world.now();
    world.filter.disconnected(now);
    world.write(1, 1);
    // With fewer entries than it has acknowledged, though not with fewer changes.
    world.connect(101, ReceiverState::Foreign);
    assert_eq!(world.drain()[0], "pass after 101");

    // It is newer than the agent's state: that was put back.
    let mut world = World::new(4 << 20);
    world.filter.knows_until(CaptureTime(7));
    world.write(0, 5);
    world.connect_to(&Welcome {
        last_time: Some(CaptureTime(8)),
        ..welcome(ReceiverState::Foreign, Lsn(100))
    });
    assert_eq!(world.drain()[0], "pass after 100");
}
