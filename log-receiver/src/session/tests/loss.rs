//! A log whose acknowledged end is lost: whoever attaches it compares everything.

use std::path::PathBuf;

use backtide_protocol::{Hello, ReceiverState, Welcome};
use backtide_storage::Storage;
use backtide_units::{ByteCount, Epoch, HistoryId, Lsn};
use uuid::Uuid;

use super::fixture::*;

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
    let mut bench = Bench::new();
    let (mut peer, first) = bench.welcomed(hello());
    peer.tell(&mut bench, pass_begin(5, 0));
    bench.commit(disk(7));
    let (path, end) = segment(&bench);
    peer.tell(&mut bench, pass_data(5, 4096, b"acknowledged"));
    bench.commit(disk(7));
    assert!(segment(&bench).1 > end);
    let file = bench.storage.open(&path).unwrap();
    file.set_len(end).unwrap();
    // The last entry that stays may end with zeroes.
    file.set_len(ByteCount(end.0.next_multiple_of(8))).unwrap();
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
fn a_loss_is_said_until_a_pass_has_begun() {
    let (mut bench, history) = lossy();
    // The first welcome may never arrive, whether or not its claim went into the log.
    for epoch in [1, 1, 2] {
        let (_, welcome) = again(&mut bench, history, epoch);
        assert_eq!(welcome.state, ReceiverState::Foreign, "epoch {epoch}");
        bench.commit(disk(7));
        if epoch == 1 {
            bench.restart();
        }
    }
    let (mut peer, _) = again(&mut bench, history, 2);
    peer.tell(&mut bench, pass_begin(9, 5));
    bench.commit(disk(7));
    for _ in 0..2 {
        let (_, welcome) = again(&mut bench, history, 2);
        assert_eq!((welcome.state, welcome.in_pass), (ReceiverState::Known, true));
        bench.restart();
    }
}
