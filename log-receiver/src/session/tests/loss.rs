//! A log whose acknowledged end is lost: whoever attaches it compares everything.

use std::path::PathBuf;

use backtide_protocol::{Hello, Message, ReceiverState, Welcome};
use backtide_recovery::LogOptions;
use backtide_segment::Seq;
use backtide_storage::Storage;
use backtide_units::{ByteCount, CaptureTime, Epoch, HistoryId, Lsn, Reason};
use uuid::Uuid;

use super::fixture::*;
use crate::{Shelf, watermark::Watermark};

/// The log's only segment, and where what is written in it ends.
fn segment(bench: &Bench) -> (PathBuf, ByteCount) {
    let files = bench.storage.files();
    let mut segments =
        files.into_iter().filter(|(path, _)| path.extension().is_some_and(|name| name == "seg"));
    let (path, bytes) = segments.next().unwrap();
    let last = bytes.iter().rposition(|&byte| byte != 0).unwrap();
    (path, ByteCount(last as u64 + 1))
}

/// A pass has begun and part of its data is acknowledged; then the receiver ends and the log's end is lost.
fn lossy() -> (Bench, HistoryId) {
    let mut bench = Bench::with(LogOptions { allocation_step: ByteCount(1 << 16), ..LogOptions::default() });
    let (mut peer, first) = bench.welcomed(hello());
    peer.tell(&mut bench, pass_begin(5, 0));
    bench.commit(disk(7));
    let (path, end) = segment(&bench);
    for offset in [4096, 8192, 12288] {
        peer.tell(&mut bench, pass_data(5, offset, b"acknowledged"));
        bench.commit(disk(7));
    }
    assert!(segment(&bench).1 > end);
    let file = bench.storage.open(&path).unwrap();
    file.set_len(end).unwrap();
    // The last entry that stays may end with zeroes.
    file.set_len(ByteCount(end.0.next_multiple_of(8))).unwrap();
    file.sync_data().unwrap();
    bench.restart();
    assert!(bench.disks.get(disk(7)).unwrap().lost_end().is_some(), "the mark beside the log tells");
    (bench, first.history)
}

fn again(bench: &mut Bench, history: HistoryId, epoch: u64) -> (Peer, Welcome) {
    let attach = Uuid::from_u128(epoch.into());
    bench.welcomed(Hello { history: Some(history), epoch: Epoch(epoch), attach, ..hello() })
}

#[test]
fn an_agent_compares_everything_when_pass_data_it_saw_acknowledged_is_lost() {
    let (mut bench, history) = lossy();
    let (_, welcome) = again(&mut bench, history, 1);
    assert_eq!((welcome.state, welcome.history), (ReceiverState::Foreign, history));
    assert_eq!((welcome.durable, welcome.in_pass), (Lsn(5), true));
}

#[test]
fn a_loss_is_said_until_a_pass_has_begun_durably() {
    let (mut bench, history) = lossy();
    // A welcome may never arrive, whether or not its claim went into the log: that of an epoch makes the log as long
    // as it was and longer.
    for epoch in [1, 1, 2, 3, 4, 5, 5] {
        let (mut peer, welcome) = again(&mut bench, history, epoch);
        assert_eq!(welcome.state, ReceiverState::Foreign, "epoch {epoch}");
        bench.commit(disk(7));
        assert!(bench.disks.get(disk(7)).unwrap().lost_end().is_some(), "epoch {epoch}");
        if epoch == 5 {
            // The pass never becomes durable.
            peer.tell(&mut bench, pass_begin(8, 5));
        }
        bench.restart();
    }
    let (mut peer, _) = again(&mut bench, history, 5);
    peer.tell(&mut bench, pass_begin(9, 5));
    bench.commit(disk(7));
    for _ in 0..2 {
        let (_, welcome) = again(&mut bench, history, 5);
        assert_eq!((welcome.state, welcome.in_pass), (ReceiverState::Known, true));
        bench.restart();
    }
}

#[test]
fn a_loss_is_no_damage_any_more_when_the_pass_that_compared_everything_has_ended_durably() {
    let (mut bench, history) = lossy();
    let damage = |bench: &Bench| bench.disks.get(disk(7)).unwrap().damage().count();
    let (mut peer, _) = again(&mut bench, history, 1);
    peer.tell(&mut bench, pass_begin(9, 5));
    peer.tell(&mut bench, pass_data(9, 4096, b"compared"));
    bench.commit(disk(7));
    assert_eq!(damage(&bench), 1, "the pass goes on");
    bench.restart();
    assert_eq!(damage(&bench), 1, "it is not at its end only because the receiver has started again");
    let (mut peer, welcome) = again(&mut bench, history, 1);
    assert_eq!((welcome.state, welcome.in_pass), (ReceiverState::Known, true));
    let lost_end = |bench: &Bench| bench.disks.get(disk(7)).unwrap().lost_end().is_some();
    assert!(!lost_end(&bench), "a hole of its own has followed");
    // One that ends without a point has not compared everything.
    let time = CaptureTime(9000);
    peer.tell(&mut bench, Message::PassEnd { at: Lsn(9), valid_from: None, time });
    bench.commit(disk(7));
    assert_eq!(damage(&bench), 1, "it gave no point");
    peer.tell(&mut bench, pass_begin(10, 9));
    peer.tell(&mut bench, pass_end(10));
    assert_eq!(damage(&bench), 1, "its end is not durable");
    bench.commit(disk(7));
    assert_eq!(damage(&bench), 0);
    bench.restart();
    assert_eq!(damage(&bench), 0);
}

#[test]
fn an_older_mark_of_a_log_that_was_compared_since_tells_of_no_loss() {
    let (mut bench, history) = lossy();
    let (mut peer, _) = again(&mut bench, history, 1);
    peer.tell(&mut bench, pass_begin(9, 5));
    bench.commit(disk(7));
    let dir = Shelf::dir(disk(7), 1);
    let (of, comparing) = Watermark::of_any(&bench.storage, &dir).unwrap().unwrap();
    assert!(comparing.lost.unwrap().is_compared);
    peer.tell(&mut bench, pass_end(9));
    bench.commit(disk(7));
    // The newest was in memory when the power failed.
    Watermark::replace(&bench.storage, &dir, of, comparing).unwrap();
    bench.restart();
    assert_eq!(bench.disks.get(disk(7)).unwrap().damage().count(), 0);
    let (_, welcome) = again(&mut bench, history, 1);
    assert_eq!((welcome.state, welcome.in_pass), (ReceiverState::Known, false));
}

/// As [`lossy`], with LSN 5 as the last point that is left.
fn lossy_behind_a_point() -> (Bench, HistoryId) {
    let mut bench = Bench::new();
    let (mut peer, first) = bench.welcomed(hello());
    peer.tell(&mut bench, pass_begin(5, 0));
    peer.tell(&mut bench, pass_end(5));
    bench.commit(disk(7));
    let (path, end) = segment(&bench);
    for lsn in 6..20 {
        peer.tell(&mut bench, write(lsn, lsn - 1));
    }
    bench.commit(disk(7));
    bench.storage.open(&path).unwrap().set_len(ByteCount(end.0.next_multiple_of(8))).unwrap();
    bench.restart();
    (bench, first.history)
}

fn pass_because(at: u64, reason: Reason) -> Message {
    Message::PassBegin { at: Lsn(at), gap_from: Lsn(5), time: CaptureTime(at * 1000), reason }
}

fn lacked(bench: &Bench) -> Vec<String> {
    let lacked = bench.disks.get(disk(7)).unwrap().lacked(TIME);
    lacked.into_iter().map(|(_, why)| why).collect()
}

#[test]
fn a_lost_end_is_damage_until_everything_was_compared_and_told_as_past_then() {
    let (mut bench, history) = lossy_behind_a_point();
    let (mut peer, _) = again(&mut bench, history, 1);
    assert_eq!(lacked(&bench), Vec::<String>::new());
    peer.tell(&mut bench, pass_because(29, Reason::Damaged));
    bench.commit(disk(7));
    assert_eq!(lacked(&bench), Vec::<String>::new(), "it is told as damage");
    peer.tell(&mut bench, pass_end(29));
    bench.commit(disk(7));
    let told = lacked(&bench);
    let text = "points and marks after lsn:5 (1970-01-01T00:00:00.005Z) that it had are gone";
    assert!(told.len() == 1 && told[0].starts_with("the end of its log was lost"), "{told:?}");
    assert!(told[0].contains(text) && told[0].contains("told until 1970-01-08T00:00:01Z"), "{told:?}");
    bench.restart();
    assert_eq!(lacked(&bench), told);
}

#[test]
fn what_an_agent_misses_is_told_from_the_begin_of_its_pass_whenever_the_receiver_ends() {
    for (is_cut, is_written) in [(false, true), (true, true), (false, false)] {
        let mut bench = Bench::new();
        let (mut peer, first) = bench.welcomed(hello());
        peer.tell(&mut bench, pass_begin(5, 0));
        peer.tell(&mut bench, pass_end(5));
        bench.commit(disk(7));
        peer.tell(&mut bench, pass_because(9, Reason::ReceiverRolledBack));
        // Nobody hears of it.
        drop(bench.disks.get_mut(disk(7)).unwrap().ticket().unwrap().sync());
        if is_cut {
            bench.storage.crash(3);
        }
        if !is_written {
            bench.storage.remove(&Shelf::dir(disk(7), 1).join("shortfalls.json")).unwrap();
        }
        bench.restart();
        assert!(lacked(&bench)[0].contains("has not brought everything anew yet"));
        let (mut peer, _) = again(&mut bench, first.history, 1);
        peer.tell(&mut bench, pass_end(9));
        bench.commit(disk(7));
        let told = lacked(&bench);
        assert!(told.len() == 1 && told[0].contains("after lsn:5 ("), "{told:?}");
        bench.storage.crash(4);
        bench.restart();
        assert_eq!(lacked(&bench), told);
    }
}

#[test]
fn a_pass_that_goes_on_after_an_interruption_still_misses_what_it_began_for() {
    let mut bench = Bench::new();
    let (mut peer, _) = bench.welcomed(hello());
    peer.tell(&mut bench, pass_begin(5, 0));
    peer.tell(&mut bench, pass_end(5));
    peer.tell(&mut bench, pass_because(9, Reason::ReceiverRolledBack));
    let again = Message::PassBegin {
        at: Lsn(20),
        gap_from: Lsn(9),
        time: CaptureTime(20_000),
        reason: Reason::ResyncInterrupted,
    };
    peer.tell(&mut bench, again);
    peer.tell(&mut bench, pass_end(20));
    bench.commit(disk(7));
    bench.restart();
    assert!(lacked(&bench)[0].contains("after lsn:5 ("));
}

#[test]
fn no_lsn_that_was_lost_is_given_again() {
    let (mut bench, history) = lossy_behind_a_point();
    for _ in 0..3 {
        bench.restart();
        let (_, welcome) = again(&mut bench, history, 1);
        assert_eq!((welcome.durable, welcome.highest), (Lsn(5), Lsn(19)));
    }
    // What comes then is lost as well.
    let (mut peer, _) = again(&mut bench, history, 1);
    let (path, end) = segment(&bench);
    peer.tell(&mut bench, pass_begin(9, 5));
    bench.commit(disk(7));
    assert!(segment(&bench).1 > end);
    bench.storage.open(&path).unwrap().set_len(ByteCount(end.0.next_multiple_of(8))).unwrap();
    bench.restart();
    let (_, welcome) = again(&mut bench, history, 1);
    assert_eq!((welcome.state, welcome.highest), (ReceiverState::Foreign, Lsn(19)));
}

#[test]
fn what_a_second_power_cut_tears_below_the_lost_end_is_cut_and_never_damage() {
    let mut cut = 0;
    for seed in 0..64 {
        let (mut bench, history) = lossy();
        let (mut peer, _) = again(&mut bench, history, 2);
        let claimed = bench.disks.get(disk(7)).unwrap().appended();
        peer.tell(&mut bench, pass_begin(9, 5));
        peer.tell(&mut bench, pass_data(9, 4096, &[7; 8192]));
        // It is written, and not synced.
        drop(bench.disks.get_mut(disk(7)).unwrap().ticket());
        bench.storage.crash(seed);
        bench.restart();
        let state = bench.disks.get_mut(disk(7)).unwrap();
        assert_eq!(state.failure(), None, "seed {seed}");
        assert!(state.appended() >= claimed, "seed {seed}");
        cut += u64::from(state.appended() < Seq(claimed.0 + 2));
        let read = state.snapshot().unwrap().latest_view().read(range(0, 16384));
        assert!(read.is_ok(), "seed {seed}: {read:?}");
    }
    assert!(cut > 10, "the cut tore something in few worlds: {cut}");
}
