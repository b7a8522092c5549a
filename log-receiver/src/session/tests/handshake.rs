//! The handshake, row by row.

use backtide_protocol::{CloseCode, Hello, Message, ReceiverState, Tracking};
use backtide_units::{ByteCount, DiskName, Epoch, HistoryId, LogPosition, Lsn};
use uuid::Uuid;

use super::fixture::*;

fn of_epoch(epoch: u64) -> Hello {
    Hello { epoch: Epoch(epoch), attach: Uuid::from_u128(epoch.into()), ..hello() }
}

#[test]
fn an_unknown_disk_gets_a_new_history() {
    let mut bench = Bench::new();
    let (_, welcome) = bench.welcomed(hello());
    assert_eq!(welcome.state, ReceiverState::New);
    assert_eq!((welcome.durable, welcome.in_pass), (Lsn::ZERO, false));
}

#[test]
fn nothing_is_answered_before_the_claim_is_durable() {
    let mut bench = Bench::new();
    let mut peer = bench.connect();
    peer.tell(&mut bench, Message::Hello(hello()));
    assert_eq!(peer.settle(&mut bench), []);
    bench.commit(disk(7));
    assert!(matches!(peer.settle(&mut bench).as_slice(), [Seen::Welcome(_)]));
    assert_eq!(peer.settle(&mut bench), [], "a welcome is said once");
}

#[test]
fn a_history_that_was_welcomed_is_known_again_after_a_restart() {
    let mut bench = Bench::new();
    let (mut peer, first) = bench.welcomed(hello());
    peer.tell(&mut bench, pass_begin(5, 0));
    peer.tell(&mut bench, pass_end(5));
    peer.tell(&mut bench, write(6, 5));
    bench.commit(disk(7));
    bench.restart();
    let again =
        Hello { history: Some(first.history), tracking: Tracking::Window { base: Lsn(5) }, ..hello() };
    let (_, welcome) = bench.welcomed(again);
    assert_eq!(welcome.state, ReceiverState::Known);
    assert_eq!(welcome.history, first.history);
    assert_eq!((welcome.durable, welcome.in_pass), (Lsn(6), false));
    assert!(welcome.highest >= Lsn(6));
}

#[test]
fn a_welcome_does_not_count_the_entry_of_its_own_hello() {
    let mut bench = Bench::new();
    let (mut peer, first) = bench.welcomed(of_epoch(1));
    assert_eq!((first.position, first.last_attach), (LogPosition(0), None));
    peer.tell(&mut bench, pass_begin(5, 0));
    bench.commit(disk(7));
    let (_, higher) = bench.welcomed(of_epoch(2));
    assert_eq!(higher.position, LogPosition(2), "its attach is the third");
    let (_, same) = bench.welcomed(of_epoch(2));
    assert_eq!(same.position, LogPosition(3), "it has none");
    let ids = [higher, same].map(|welcome| welcome.last_attach);
    assert_eq!(ids, [1, 2].map(|attach| Some(Uuid::from_u128(attach))), "whose the log was before");
}

#[test]
fn the_durable_lsn_of_a_welcome_survives_a_power_cut() {
    for seed in 0..20 {
        let mut bench = Bench::new();
        let (mut peer, first) = bench.welcomed(hello());
        peer.tell(&mut bench, pass_begin(5, 0));
        peer.tell(&mut bench, pass_end(5));
        // Received and not durable; the agent comes back before anybody committed.
        for lsn in 6..20 {
            peer.tell(&mut bench, write(lsn, lsn - 1));
        }
        let again = Hello { history: Some(first.history), ..hello() };
        let (_, welcome) = bench.welcomed(again.clone());
        assert_eq!(welcome.durable, Lsn(19));
        bench.storage.crash(seed);
        bench.restart();
        let (_, after) = bench.welcomed(again);
        assert_eq!(after.durable, Lsn(19), "seed {seed}");
    }
}

#[test]
fn an_agent_ahead_of_a_rolled_back_receiver_is_told_the_truth() {
    let mut bench = Bench::new();
    let (_, first) = bench.welcomed(hello());
    let ahead = Hello {
        history: Some(first.history),
        tracking: Tracking::Window { base: Lsn(100) },
        acked_durable: Lsn(100),
        next_lsn: Lsn(120),
        ..hello()
    };
    let (_, welcome) = bench.welcomed(ahead);
    assert_eq!((welcome.state, welcome.durable), (ReceiverState::Known, Lsn::ZERO));
}

#[test]
fn a_foreign_history_keeps_ours() {
    let mut bench = Bench::new();
    let (_, first) = bench.welcomed(hello());
    for named in [None, Some(HistoryId(Uuid::from_u128(99)))] {
        let (_, welcome) = bench.welcomed(Hello { history: named, ..hello() });
        assert_eq!(welcome.state, ReceiverState::Foreign);
        assert_eq!(welcome.history, first.history);
    }
}

#[test]
fn another_version_is_refused_and_both_are_named() {
    let mut bench = Bench::new();
    let (code, why) = bench.refused(Hello { version: 9, ..hello() });
    assert_eq!(code, CloseCode::Version);
    assert!(why.contains("version 9") && why.contains("version 1"), "{why}");
    assert!(bench.disks.get(disk(7)).is_none(), "nothing was made");
}

#[test]
fn a_lower_epoch_is_fenced_also_after_a_restart() {
    let mut bench = Bench::new();
    bench.welcomed(of_epoch(3));
    for _ in 0..2 {
        let (code, why) = bench.refused(of_epoch(2));
        assert_eq!(code, CloseCode::Fenced);
        assert!(why.contains("epoch 2") && why.contains("epoch 3") && why.contains("vm1"), "{why}");
        bench.restart();
    }
}

#[test]
fn a_claim_that_was_answered_fences_after_a_power_cut() {
    for seed in 0..20 {
        let mut bench = Bench::new();
        bench.welcomed(of_epoch(3));
        bench.storage.crash(seed);
        bench.restart();
        assert_eq!(bench.refused(of_epoch(2)).0, CloseCode::Fenced, "seed {seed}");
    }
}

#[test]
fn the_same_epoch_again_replaces_the_half_dead_connection() {
    let mut bench = Bench::new();
    let (mut old, first) = bench.welcomed(hello());
    old.tell(&mut bench, pass_begin(5, 0));
    let mut new = bench.connect();
    let again = Message::Hello(Hello { history: Some(first.history), ..hello() });
    assert_eq!(new.send(&mut bench, again), [Seen::CloseOther(old.id, CloseCode::Busy)]);
    // The old one was not told yet; it cannot append all the same.
    assert_eq!(old.refused(&mut bench, write(6, 5)).0, CloseCode::Busy);
    bench.commit(disk(7));
    match new.settle(&mut bench).as_slice() {
        [Seen::Welcome(welcome)] => assert_eq!((welcome.durable, welcome.in_pass), (Lsn(5), true)),
        other => panic!("{other:?}"),
    }
    new.tell(&mut bench, write(6, 5));
}

#[test]
fn a_higher_epoch_fences_the_older_connection() {
    let mut bench = Bench::new();
    let (old, _) = bench.welcomed(hello());
    let mut new = bench.connect();
    let effects = new.send(&mut bench, Message::Hello(of_epoch(2)));
    assert_eq!(effects, [Seen::CloseOther(old.id, CloseCode::Fenced)]);
}

#[test]
fn a_replaced_connection_gets_no_acknowledgement() {
    let mut bench = Bench::new();
    let (mut old, _) = bench.welcomed(hello());
    old.tell(&mut bench, pass_begin(5, 0));
    let mut new = bench.connect();
    new.send(&mut bench, Message::Hello(hello()));
    bench.commit(disk(7));
    assert!(matches!(old.settle(&mut bench).as_slice(), [Seen::Close(CloseCode::Busy, _), Seen::End]));
    assert_eq!(bench.disks.get(disk(7)).unwrap().owner(), Some(new.id), "its end takes nothing away");
}

#[test]
fn a_disk_may_grow_and_not_shrink() {
    let mut bench = Bench::new();
    bench.welcomed(hello());
    let size = ByteCount(SIZE.0 * 2);
    bench.welcomed(Hello { size, ..of_epoch(2) });
    assert_eq!(bench.disks.get(disk(7)).unwrap().size(), size);
    let (code, why) = bench.refused(of_epoch(3));
    assert_eq!(code, CloseCode::Refused);
    assert!(why.contains("cannot shrink from 2097152 to 1048576 bytes"), "{why}");
}

#[test]
fn a_disk_may_grow_within_its_epoch() {
    let mut bench = Bench::new();
    bench.welcomed(hello());
    let (mut peer, _) = bench.welcomed(Hello { size: ByteCount(SIZE.0 * 2), ..hello() });
    peer.tell(&mut bench, pass_begin(5, 0));
    peer.tell(&mut bench, write_at(6, 5, SIZE.0, b"beyond the old end"));
}

#[test]
fn a_second_disk_of_one_name_is_refused_with_the_way_out() {
    let mut bench = Bench::new();
    bench.welcomed(hello());
    for _ in 0..2 {
        let (code, why) = bench.refused(Hello { disk: disk(8), ..hello() });
        assert_eq!(code, CloseCode::Refused);
        assert!(why.contains("is called vm1") && why.contains("under another name"), "{why}");
        assert!(bench.disks.get(disk(8)).is_none(), "nothing was made");
        bench.restart();
    }
}

#[test]
fn a_disk_may_change_its_name_with_a_new_epoch() {
    let mut bench = Bench::new();
    bench.welcomed(hello());
    let name: DiskName = "db".parse().unwrap();
    bench.welcomed(Hello { name: name.clone(), ..of_epoch(2) });
    // The old name is free again.
    bench.welcomed(Hello { disk: disk(8), ..hello() });
    bench.restart();
    let attached = bench.disks.get(disk(7)).unwrap().timeline().unwrap().attached().unwrap();
    assert_eq!(attached.name, name);
}

#[test]
fn the_number_of_disks_is_bounded() {
    let mut bench = Bench::new();
    let numbered =
        |number| Hello { disk: disk(number), name: format!("vm{number}").parse().unwrap(), ..hello() };
    for number in 1..=3 {
        bench.welcomed(numbered(number));
    }
    let (code, why) = bench.refused(numbered(4));
    assert_eq!((code, why.as_str()), (CloseCode::Refused, "the store has its limit of 3 disks"));
}

#[test]
fn a_full_store_refuses_at_once() {
    let mut bench = Bench::new();
    bench.storage.set_capacity(Some(ByteCount(1000)));
    let (code, why) = bench.refused(hello());
    assert_eq!(code, CloseCode::Store);
    assert!(why.contains("is full: ") && why.contains("65536 are kept in reserve"), "{why}");
}

#[test]
fn a_refused_hello_gives_a_failed_log_back_to_nobody() {
    let refused = [
        (of_epoch(2), CloseCode::Fenced),
        (Hello { size: ByteCount(SIZE.0 / 2), ..of_epoch(4) }, CloseCode::Refused),
        (Hello { name: "other".parse().unwrap(), ..of_epoch(4) }, CloseCode::Refused),
    ];
    for (hello, expected) in refused {
        let mut bench = Bench::new();
        bench.welcomed(Hello { disk: disk(8), name: "other".parse().unwrap(), ..of_epoch(1) });
        let (mut old, _) = bench.welcomed(of_epoch(3));
        old.tell(&mut bench, pass_begin(5, 0));
        old.tell(&mut bench, pass_end(5));
        old.settle(&mut bench);
        bench.storage.fail_sync_after(0);
        bench.commit(disk(7));
        assert!(bench.disks.get(disk(7)).unwrap().failure().is_some());
        assert_eq!(bench.refused(hello).0, expected);
        match old.settle(&mut bench).as_slice() {
            [Seen::Close(CloseCode::Store, _), Seen::End] => {}
            other => panic!("an acknowledgement would be false: {other:?}"),
        }
    }
}

#[test]
fn a_log_opened_again_is_not_its_old_owners() {
    let mut bench = Bench::new();
    let (mut old, _) = bench.welcomed(of_epoch(3));
    old.tell(&mut bench, pass_begin(5, 0));
    bench.storage.fail_sync_after(0);
    bench.commit(disk(7));
    let mut new = bench.connect();
    let effects = new.send(&mut bench, Message::Hello(of_epoch(4)));
    assert_eq!(effects, [Seen::CloseOther(old.id, CloseCode::Fenced)]);
    assert!(matches!(old.settle(&mut bench).as_slice(), [Seen::Close(CloseCode::Busy, _), Seen::End]));
    assert_eq!(bench.disks.get(disk(7)).unwrap().owner(), Some(new.id));
}

#[test]
fn a_copied_agent_with_the_same_epoch_is_fenced_also_after_a_power_cut() {
    for seed in 0..5 {
        let mut bench = Bench::new();
        let (mut first, _) = bench.welcomed(of_epoch(3));
        let copy = Hello { attach: Uuid::from_u128(99), ..of_epoch(3) };
        let (code, why) = bench.refused(copy.clone());
        assert_eq!(code, CloseCode::Fenced);
        assert!(why.contains("a copy of this agent's state") && why.contains("attach it again"), "{why}");
        first.tell(&mut bench, pass_begin(5, 0));
        bench.storage.crash(seed);
        bench.restart();
        assert_eq!(bench.refused(copy).0, CloseCode::Fenced, "seed {seed}");
        // Whoever had it may come back; the copy takes it over with an attach of its own.
        bench.welcomed(of_epoch(3));
        bench.welcomed(Hello { attach: Uuid::from_u128(99), ..of_epoch(4) });
        assert_eq!(bench.refused(of_epoch(3)).0, CloseCode::Fenced);
    }
}

#[test]
fn a_claim_that_failed_while_the_log_was_made_can_be_tried_again_and_holds() {
    let mut failed = 0;
    for sync in 0..10 {
        for seed in 0..5 {
            let mut bench = Bench::new();
            bench.storage.fail_sync_after(sync);
            let mut first = bench.connect();
            match first.send(&mut bench, Message::Hello(of_epoch(3))).as_slice() {
                // So many syncs are not needed to make a log.
                [] => continue,
                [Seen::Close(CloseCode::Store, _), Seen::End] => failed += 1,
                other => panic!("{other:?}"),
            }
            if seed % 2 == 0 {
                bench.restart();
            }
            bench.welcomed(of_epoch(3));
            bench.storage.crash(seed);
            bench.restart();
            assert_eq!(bench.refused(of_epoch(2)).0, CloseCode::Fenced, "sync {sync}, seed {seed}");
        }
    }
    assert!(failed > 0, "no sync failed");
}
