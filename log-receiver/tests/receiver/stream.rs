//! Ingest: acknowledged, durable, continued after a restart.

use std::{fs, io::Write, os::unix::fs::FileExt};

use backtide_control::Address;
use backtide_protocol::{
    CloseCode, Closed, Compare, CompareItem, Content, Hello, Message, ReceiverState, Tracking, encode,
};
use backtide_storage::MemoryStorage;
use backtide_units::{ByteCount, ByteOffset, ByteRange, Epoch, Lsn, Reason};

use crate::{agent::*, fixture::*};

#[tokio::test]
async fn what_was_acknowledged_is_there_after_a_restart() {
    let place = Place::new();
    let receiver = place.start().await;
    let (mut agent, first) = Agent::welcomed(&receiver, hello(1, "vm1")).await;
    assert_eq!(first.state, ReceiverState::New);
    agent.first_pass(5).await;
    for lsn in 6..500 {
        agent.send(&write(lsn, (lsn % 64) * 4096, vec![lsn as u8; 4096])).await;
    }
    agent.all_durable().await;
    receiver.shutdown().await;
    assert_eq!(agent.closed().await.code, CloseCode::Bye);

    let receiver = place.start().await;
    let again = Hello {
        history: Some(first.history),
        tracking: Tracking::Window { base: Lsn(5) },
        ..hello(1, "vm1")
    };
    let (mut agent, welcome) = Agent::welcomed(&receiver, again).await;
    assert_eq!((welcome.state, welcome.durable, welcome.in_pass), (ReceiverState::Known, Lsn(499), false));
    agent.send(&write(500, 0, vec![1; 512])).await;
    agent.all_durable().await;
    receiver.shutdown().await;
}

#[tokio::test]
async fn large_payloads_and_many_disks_at_once() {
    let place = Place::new();
    let receiver = place.start().await;
    let mut agents = Vec::new();
    for number in 1..=8 {
        let (agent, _) = Agent::welcomed(&receiver, hello(number, &format!("vm{number}"))).await;
        agents.push(agent);
    }
    for agent in &mut agents {
        agent.first_pass(5).await;
    }
    for lsn in 6..12 {
        for agent in &mut agents {
            agent.send(&write(lsn, 0, vec![lsn as u8; 3 << 20])).await;
        }
    }
    for agent in &mut agents {
        agent.all_durable().await;
    }
    let disks = client(&receiver).disks(None).await.unwrap().disks;
    assert_eq!(disks.len(), 8);
    for disk in disks {
        assert_eq!((disk.received, disk.durable, disk.connected), (Lsn(11), Lsn(11), true), "{}", disk.name);
        assert!(disk.segments > 1, "{}", disk.segments);
    }
    receiver.shutdown().await;
}

#[tokio::test]
async fn what_came_before_the_end_of_a_stream_becomes_durable() {
    let bye = Message::Close(Closed::new(CloseCode::Bye, ""));
    let close = {
        let (header, payload) = encode(4, &bye);
        [&header[..], &payload[..]].concat()
    };
    for end in [close, vec![0xff; 64]] {
        let place = Place::new();
        let receiver = place.start().await;
        let (mut agent, _) = Agent::welcomed(&receiver, hello(1, "vm1")).await;
        let mut bytes = Vec::new();
        for (seq, message) in [(2, pass_begin(5, 0, Reason::FirstAttach)), (3, pass_end(5))] {
            let (header, payload) = encode(seq, &message);
            bytes.extend_from_slice(&header);
            bytes.extend_from_slice(&payload);
        }
        bytes.extend_from_slice(&end);
        agent.send_raw(&bytes).await;
        // Nobody else asks for a commit: without one of its own this never ends.
        while client(&receiver).disks(None).await.unwrap().disks[0].durable != Lsn(5) {
            tokio::task::yield_now().await;
        }
        receiver.shutdown().await;
    }
}

#[tokio::test]
async fn a_torn_tail_is_cut_and_nothing_acknowledged_with_it() {
    let place = Place::new();
    let receiver = place.start().await;
    let (mut agent, first) = Agent::welcomed(&receiver, hello(1, "vm1")).await;
    agent.first_pass(5).await;
    agent.send(&write(6, 0, vec![7; 4096])).await;
    agent.all_durable().await;
    receiver.shutdown().await;

    // Half an entry, as a power cut leaves it: the beginning of another one's bytes.
    let segments = place.store().join("disks").join(hello(1, "vm1").disk.to_string()).join("segments");
    let mut files: Vec<_> = fs::read_dir(segments).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    let last = files.last().unwrap();
    let content = fs::read(last).unwrap();
    let end = content.iter().rposition(|byte| *byte != 0).unwrap() as u64 + 1;
    let tail = end.next_multiple_of(8);
    fs::OpenOptions::new().write(true).open(last).unwrap().write_all_at(&content[64..104], tail).unwrap();

    let receiver = place.start().await;
    let again = Hello { history: Some(first.history), ..hello(1, "vm1") };
    let (mut agent, welcome) = Agent::welcomed(&receiver, again).await;
    assert_eq!(welcome.durable, Lsn(6));
    agent.send(&write(7, 0, vec![8; 4096])).await;
    agent.all_durable().await;
    receiver.shutdown().await;
}

#[tokio::test]
async fn an_agent_that_comes_back_need_not_wait_for_its_old_connection() {
    let place = Place::new();
    let receiver = place.start().await;
    let (mut old, first) = Agent::welcomed(&receiver, hello(1, "vm1")).await;
    old.first_pass(5).await;
    old.all_durable().await;
    let again = Hello { history: Some(first.history), ..hello(1, "vm1") };
    let (mut new, welcome) = Agent::welcomed(&receiver, again).await;
    assert_eq!(welcome.durable, Lsn(5));
    assert_eq!(old.closed().await.code, CloseCode::Busy);
    new.send(&write(6, 0, vec![1; 512])).await;
    new.all_durable().await;
    receiver.shutdown().await;
}

#[tokio::test]
async fn a_stale_epoch_is_fenced_and_a_new_one_fences() {
    let place = Place::new();
    let receiver = place.start().await;
    let of_epoch = |epoch| Hello { epoch: Epoch(epoch), ..hello(1, "vm1") };
    let (mut old, _) = Agent::welcomed(&receiver, of_epoch(4)).await;
    let (_new, _) = Agent::welcomed(&receiver, of_epoch(5)).await;
    let closed = old.closed().await;
    assert_eq!((closed.code, closed.message.as_str()), (CloseCode::Fenced, "epoch 5 has attached disk vm1"));
    assert_eq!(Agent::refused(&receiver, of_epoch(4)).await.code, CloseCode::Fenced);
    receiver.shutdown().await;
    // Durable: a restart forgets no fence.
    let receiver = place.start().await;
    assert_eq!(Agent::refused(&receiver, of_epoch(4)).await.code, CloseCode::Fenced);
    receiver.shutdown().await;
}

#[tokio::test]
async fn compares_are_answered_in_order_while_records_go_on() {
    let place = Place::new();
    let receiver = place.start().await;
    let (mut agent, _) = Agent::welcomed(&receiver, hello(1, "vm1")).await;
    agent.send(&pass_begin(5, 0, Reason::AgentCrashed)).await;
    agent.send(&pass_data(5, 0, vec![9; 65536])).await;
    let item = |offset, content| CompareItem {
        range: ByteRange::new(ByteOffset(offset), ByteCount(65536)).unwrap(),
        content,
    };
    let nines = Content::Hash(*blake3::hash(&[9; 65536]).as_bytes());
    for id in 0..40 {
        let items = vec![item(0, nines), item(65536, nines), item(65536, Content::Zeroes)];
        agent.send(&Message::Compare(Compare { id, at: Lsn(5), items })).await;
        agent.send(&write(6 + id, 1 << 20, vec![1; 4096])).await;
    }
    let mut expected = 0;
    while expected < 40 {
        match agent.next().await {
            Some(Message::CompareResult(result)) => {
                assert_eq!((result.id, result.differing), (expected, vec![1]));
                expected += 1;
            }
            Some(Message::Ack { .. } | Message::Ping(_)) => {}
            other => panic!("{other:?}"),
        }
    }
    receiver.shutdown().await;
}

#[tokio::test]
async fn small_questions_in_one_read_are_all_answered() {
    let place = Place::new();
    let receiver = place.start().await;
    let (mut agent, _) = Agent::welcomed(&receiver, hello(1, "vm1")).await;
    let mut bytes = Vec::new();
    for id in 0..2000 {
        agent.sent += 1;
        let question = Message::Compare(Compare { id, at: Lsn(0), items: Vec::new() });
        bytes.extend_from_slice(&backtide_protocol::encode(agent.sent, &question).0);
    }
    agent.send_raw(&bytes).await;
    let mut expected = 0;
    while expected < 2000 {
        if let Some(Message::CompareResult(result)) = agent.next().await {
            assert_eq!(result.id, expected);
            expected += 1;
        }
    }
    receiver.shutdown().await;
}

#[tokio::test]
async fn a_tiny_bound_on_undurable_bytes_slows_and_never_stops() {
    let place = Place::new();
    let mut config = place.config();
    config.limits.undurable_bytes = ByteCount(1);
    let receiver = backtide_log_receiver::Receiver::start(config).await.unwrap();
    let (mut agent, _) = Agent::welcomed(&receiver, hello(1, "vm1")).await;
    agent.first_pass(5).await;
    for lsn in 6..100 {
        agent.send(&write(lsn, 0, vec![lsn as u8; 65536])).await;
    }
    agent.all_durable().await;
    receiver.shutdown().await;
}

#[tokio::test]
async fn a_full_store_is_told_to_that_agent_and_goes_on_when_there_is_room() {
    let place = Place::new();
    let storage = MemoryStorage::new();
    let receiver = place.start_on(storage.clone()).await;
    let (mut agent, first) = Agent::welcomed(&receiver, hello(1, "vm1")).await;
    agent.first_pass(5).await;
    agent.send(&write(6, 0, vec![6; 4096])).await;
    agent.all_durable().await;
    storage.set_capacity(Some(ByteCount(storage.used().0 + 60_000)));
    agent.send(&write(7, 0, vec![7; 4096])).await;
    let closed = agent.closed().await;
    assert_eq!(closed.code, CloseCode::Store);
    assert!(closed.message.contains("is full: "), "{}", closed.message);
    let again = Hello { history: Some(first.history), ..hello(1, "vm1") };
    assert_eq!(Agent::refused(&receiver, again.clone()).await.code, CloseCode::Store);

    storage.set_capacity(None);
    let (mut agent, welcome) = Agent::welcomed(&receiver, again).await;
    assert_eq!(welcome.durable, Lsn(6));
    agent.send(&write(7, 0, vec![7; 4096])).await;
    agent.all_durable().await;
    receiver.shutdown().await;
}

#[tokio::test]
async fn a_failing_store_loses_no_truth_and_other_disks_go_on() {
    let place = Place::new();
    let storage = MemoryStorage::new();
    let receiver = place.start_on(storage.clone()).await;
    let (mut sick, first) = Agent::welcomed(&receiver, hello(1, "vm1")).await;
    let (mut well, _) = Agent::welcomed(&receiver, hello(2, "vm2")).await;
    sick.first_pass(5).await;
    sick.all_durable().await;
    storage.fail_sync_after(0);
    sick.send(&write(6, 0, vec![6; 4096])).await;
    assert_eq!(sick.closed().await.code, CloseCode::Store);
    well.first_pass(5).await;
    well.all_durable().await;
    let again = Hello { history: Some(first.history), ..hello(1, "vm1") };
    let (mut sick, welcome) = Agent::welcomed(&receiver, again).await;
    let durable = welcome.durable.0;
    assert!((5..=6).contains(&durable), "{durable}");
    sick.send(&write(durable + 1, 0, vec![7; 4096])).await;
    sick.all_durable().await;
    receiver.shutdown().await;
}

#[tokio::test]
async fn streams_come_over_tcp_too() {
    let place = Place::new();
    let mut config = place.config();
    config.listen = vec![place.address("stream.sock"), "tcp://127.0.0.1:0".parse().unwrap()];
    let receiver = backtide_log_receiver::Receiver::start(config).await.unwrap();
    let Address::Tcp { host, port } = &receiver.stream_addresses()[1] else { panic!("no TCP address") };
    let mut stream = std::net::TcpStream::connect((host.as_str(), *port)).unwrap();
    let (header, payload) = backtide_protocol::encode(1, &Message::Hello(hello(1, "vm1")));
    stream.write_all(&header).unwrap();
    stream.write_all(&payload).unwrap();
    let welcome = tokio::task::spawn_blocking(move || {
        let mut answer = [0; 64];
        std::io::Read::read_exact(&mut stream, &mut answer).unwrap();
        answer
    });
    assert_eq!(&welcome.await.unwrap()[..5], b"BTS1\x02");
    receiver.shutdown().await;
}

#[tokio::test]
async fn an_agent_hears_from_a_receiver_whose_device_is_slow() {
    let place = Place::new();
    let storage = crate::faults::Faulty::new();
    let mut config = place.config();
    config.limits.ping_interval_ms = 20;
    let receiver =
        backtide_log_receiver::Receiver::start_on_storage(std::sync::Arc::new(storage.clone()), config);
    let receiver = receiver.await.unwrap();
    let (mut agent, _) = Agent::welcomed(&receiver, hello(1, "vm1")).await;
    agent.first_pass(5).await;
    agent.all_durable().await;
    storage.set(crate::faults::Fault::SyncsWait);
    agent.send(&write(6, 0, vec![6; 4096])).await;
    let mut pings = 0;
    while pings < 3 {
        match agent.next().await {
            Some(Message::Ping(_)) => pings += 1,
            Some(Message::Ack { durable, .. }) => assert!(durable < agent.sent, "it is not durable"),
            other => panic!("expected a ping, found {other:?}"),
        }
    }
    storage.set(crate::faults::Fault::None);
    agent.all_durable().await;
    receiver.shutdown().await;
}
