//! A disk whose directory cannot be listed: nobody knows its newest log, so nothing is written to any of them.

use std::path::PathBuf;

use backtide_log_receiver::Receiver;
use backtide_protocol::{CloseCode, Hello, ReceiverState};
use backtide_units::{ByteOffset, Epoch, HistoryId, Lsn, Reason};

use crate::{
    agent::*,
    faults::{Fault, Faulty},
    fixture::*,
    retention::vm1,
};

/// A disk that has a damaged log and a newer one with a point at 60; gives the history of that.
async fn two_logs(place: &Place, storage: &Faulty) -> HistoryId {
    let receiver = place.start_on(storage.clone()).await;
    let (mut agent, _) = Agent::welcomed(&receiver, hello(1, "vm1")).await;
    agent.first_pass(5).await;
    agent.all_durable().await;
    drop(agent);
    receiver.shutdown().await;
    let files = storage.memory.files();
    let (segment, _) =
        files.iter().find(|(path, _)| path.extension().is_some_and(|end| end == "seg")).unwrap();
    storage.memory.flip_bit(segment, ByteOffset(40), 4);
    let receiver = place.start_on(storage.clone()).await;
    let (mut agent, welcome) = Agent::welcomed(&receiver, attach(2)).await;
    assert_eq!(welcome.state, ReceiverState::New, "a new log begins");
    agent.send(&pass_begin(60, 0, Reason::ReceiverRolledBack)).await;
    agent.send(&pass_end(60)).await;
    agent.all_durable().await;
    drop(agent);
    receiver.shutdown().await;
    welcome.history
}

fn attach(epoch: u64) -> Hello {
    Hello { epoch: Epoch(epoch), ..hello(1, "vm1") }
}

fn logs(storage: &Faulty) -> Vec<(PathBuf, Vec<u8>)> {
    storage.memory.files().into_iter().filter(|(path, _)| path.starts_with("disks")).collect()
}

async fn start_unlistable(place: &Place, storage: &Faulty) -> Receiver {
    storage.set(Fault::DisksUnlistable);
    place.start_on(storage.clone()).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_cannot_be_listed_is_not_written_and_goes_on_in_its_newest_log_when_it_can() {
    let (place, storage) = (Place::new(), Faulty::new());
    let history = two_logs(&place, &storage).await;
    let before = logs(&storage);
    let receiver = start_unlistable(&place, &storage).await;
    let api = client(&receiver);
    for _ in 0..2 {
        let closed = Agent::refused(&receiver, Hello { history: Some(history), ..attach(2) }).await;
        assert_eq!(closed.code, CloseCode::Store, "{closed:?}");
        assert!(closed.message.contains("newest log"), "{closed:?}");
        assert_eq!(Agent::refused(&receiver, attach(1)).await.code, CloseCode::Fenced, "its memo tells");
        api.points(&vm1()).await.expect_err("its newest point is not known");
        let disk = api.disks(Some(&vm1())).await.unwrap().disks.remove(0);
        assert!(disk.error.is_some_and(|why| why.contains("newest log")));
    }
    assert_eq!(logs(&storage), before);
    storage.set(Fault::None);
    let again = Hello { history: Some(history), ..attach(2) };
    let (mut agent, welcome) = Agent::welcomed(&receiver, again).await;
    assert_eq!((welcome.state, welcome.durable), (ReceiverState::Known, Lsn(60)));
    agent.send(&write(61, 0, vec![61; 4096])).await;
    agent.all_durable().await;
    let points = api.points(&vm1()).await.unwrap();
    assert_eq!(points.intervals.iter().map(|found| found.from_lsn).collect::<Vec<_>>(), [Lsn(5), Lsn(60)]);
    assert_eq!(points.last.map(|last| last.lsn), Some(Lsn(61)));
    receiver.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_asks_for_points_has_the_disk_listed_again() {
    let (place, storage) = (Place::new(), Faulty::new());
    let history = two_logs(&place, &storage).await;
    let receiver = start_unlistable(&place, &storage).await;
    storage.set(Fault::None);
    let points = client(&receiver).points(&vm1()).await.unwrap();
    assert_eq!(points.last.map(|last| last.lsn), Some(Lsn(60)));
    let (_agent, welcome) = Agent::welcomed(&receiver, Hello { history: Some(history), ..attach(3) }).await;
    assert_eq!((welcome.state, welcome.durable), (ReceiverState::Known, Lsn(60)));
    receiver.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_of_which_no_segment_can_be_listed_keeps_its_name_and_its_fence() {
    let (place, storage) = (Place::new(), Faulty::new());
    let history = two_logs(&place, &storage).await;
    storage.set(Fault::SegmentsUnlistable);
    let receiver = place.start_on(storage.clone()).await;
    let api = client(&receiver);
    let other = Agent::refused(&receiver, hello(2, "vm1")).await;
    assert!(other.code == CloseCode::Refused && other.message.contains("is called vm1"), "{other:?}");
    assert_eq!(Agent::refused(&receiver, attach(1)).await.code, CloseCode::Fenced);
    let unread = api.points(&vm1()).await.expect_err("nothing of it can be read");
    assert!(unread.message.contains("segments"), "{unread}");
    let disk = api.disks(Some(&vm1())).await.unwrap().disks.remove(0);
    assert!(disk.error.is_some() && disk.uuid == hello(1, "vm1").disk, "{disk:?}");
    storage.set(Fault::None);
    let again = Hello { history: Some(history), ..attach(3) };
    let (_agent, welcome) = Agent::welcomed(&receiver, again).await;
    assert_eq!((welcome.state, welcome.durable), (ReceiverState::Known, Lsn(60)));
    receiver.shutdown().await;
}
