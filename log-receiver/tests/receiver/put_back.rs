//! A store that has less than it had acknowledged, as one has that was put back to an older copy: that is told.

use backtide_log_receiver::Receiver;
use backtide_protocol::Message;
use backtide_receiver_api::ReceiverClient;
use backtide_storage::{MemoryStorage, Storage};
use backtide_units::{ByteCount, CaptureTime, Lsn, Reason};

use crate::{agent::*, fixture::*, retention::ladder};

async fn alarms(api: &ReceiverClient) -> Vec<String> {
    api.status().await.unwrap().alarms
}

/// The pass of an agent that misses what had been acknowledged, which gives a point at this time.
async fn pass(agent: &mut Agent, api: &ReceiverClient, at: u64, gap_from: u64, time: CaptureTime) {
    let (at, gap_from, reason) = (Lsn(at), Lsn(gap_from), Reason::ReceiverRolledBack);
    agent.send(&Message::PassBegin { at, gap_from, time, reason }).await;
    agent.all_durable().await;
    let open = alarms(api).await;
    assert!(open.len() == 1 && open[0].contains("has not brought everything anew"), "{open:?}");
    agent.send(&Message::PassEnd { at, valid_from: Some(at), time }).await;
    agent.all_durable().await;
}

#[tokio::test]
async fn a_store_that_was_put_back_is_an_alarm_for_a_week_also_after_a_start() {
    let place = Place::new();
    let receiver = place.start().await;
    let (mut agent, _) = Agent::welcomed(&receiver, hello(1, "vm1")).await;
    agent.first_pass(5).await;
    agent.all_durable().await;
    let api = client(&receiver);
    assert_eq!(alarms(&api).await, Vec::<String>::new());
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    let days_ago = |days: u64| CaptureTime(now.as_micros() as u64 - days * 24 * 60 * 60 * 1_000_000);
    // One that is told no more when there is a newer one.
    pass(&mut agent, &api, 60, 5, days_ago(8)).await;
    assert_eq!(alarms(&api).await, Vec::<String>::new());
    pass(&mut agent, &api, 70, 60, days_ago(6)).await;
    let told = alarms(&api).await;
    let text = "points and marks after lsn:60";
    assert!(told.len() == 1 && told[0].starts_with("disk vm1: ") && told[0].contains(text), "{told:?}");
    receiver.shutdown().await;
    let receiver = place.start().await;
    assert_eq!(alarms(&client(&receiver)).await, told);
    receiver.shutdown().await;
}

#[tokio::test]
async fn a_ladder_that_a_full_store_does_not_take_comes_with_what_to_do() {
    let place = Place::new();
    let storage = MemoryStorage::new();
    let memory = std::sync::Arc::new(storage.clone());
    let receiver = Receiver::start_on_storage(memory, place.config()).await.unwrap();
    let (mut agent, _) = Agent::welcomed(&receiver, hello(1, "vm1")).await;
    agent.first_pass(5).await;
    agent.all_durable().await;
    storage.set_capacity(Some(storage.used()));
    assert_eq!(storage.free_space().unwrap(), ByteCount(0));
    let refused =
        client(&receiver).set_retention(&"vm1".parse().unwrap(), &ladder("any=24h")).await.unwrap_err();
    assert!(refused.hint.as_ref().is_some_and(|hint| hint.contains("no room")), "{refused:?}");
    receiver.shutdown().await;
}
