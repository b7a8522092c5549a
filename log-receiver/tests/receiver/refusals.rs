//! What the receiver refuses: in a sentence, and without harm to anybody else.

use std::{fs, os::unix::net::UnixListener};

use backtide_protocol::{CloseCode, Hello, Message, Ping, encode};

use crate::{agent::*, fixture::*};

#[tokio::test]
async fn another_version_is_named_with_ours() {
    let place = Place::new();
    let receiver = place.start().await;
    let closed = Agent::refused(&receiver, Hello { version: 2, ..hello(1, "vm1") }).await;
    assert_eq!(closed.code, CloseCode::Version);
    assert!(closed.message.contains("version 2 ") && closed.message.contains("version 1:"), "{closed:?}");
    receiver.shutdown().await;
}

#[tokio::test]
async fn garbage_is_answered_with_the_reason_and_hurts_nobody() {
    let place = Place::new();
    let receiver = place.start().await;
    let (mut bystander, _) = Agent::welcomed(&receiver, hello(1, "vm1")).await;

    let mut web = Agent::connect(&receiver).await;
    web.send_raw(format!("GET / HTTP/1.1\r\nHost: receiver\r\n{}\r\n", "X: y\r\n".repeat(20)).as_bytes())
        .await;
    let closed = web.closed().await;
    assert_eq!(closed.code, CloseCode::Invalid);
    assert!(closed.message.contains("does not speak the backtide stream protocol"), "{closed:?}");

    let (mut greeted, _) = Agent::welcomed(&receiver, hello(2, "vm2")).await;
    greeted.send_raw(&[0xff; 4096]).await;
    assert_eq!(greeted.closed().await.code, CloseCode::Invalid);

    let mut impatient = Agent::connect(&receiver).await;
    impatient.send(&Message::Ping(Ping::default())).await;
    let closed = impatient.closed().await;
    assert_eq!(closed.message, "expected hello as the first frame, found ping");

    bystander.first_pass(5).await;
    bystander.all_durable().await;
    receiver.shutdown().await;
}

#[tokio::test]
async fn a_missing_record_ends_the_stream_and_is_not_in_the_log() {
    let place = Place::new();
    let receiver = place.start().await;
    let (mut agent, _) = Agent::welcomed(&receiver, hello(1, "vm1")).await;
    agent.first_pass(5).await;
    agent.send(&write(7, 0, vec![1; 512])).await;
    let closed = agent.closed().await;
    assert_eq!(closed.code, CloseCode::Invalid);
    assert!(closed.message.contains("something is missing"), "{closed:?}");
    let disks = client(&receiver).disks(None).await.unwrap().disks;
    assert_eq!(disks[0].received.0, 5);
    assert!(!disks[0].connected);
    receiver.shutdown().await;
}

#[tokio::test]
async fn two_disks_of_one_name_are_told_apart_before_it_is_too_late() {
    let place = Place::new();
    let receiver = place.start().await;
    // Whichever threads own them.
    let (_agent, _) = Agent::welcomed(&receiver, hello(1, "vm1")).await;
    for number in 2..10 {
        let closed = Agent::refused(&receiver, hello(number, "vm1")).await;
        assert_eq!(closed.code, CloseCode::Refused);
        assert!(closed.message.contains("attach this one") && closed.message.contains("under another name"));
    }
    receiver.shutdown().await;
}

#[tokio::test]
async fn an_address_in_use_is_named_and_a_stale_socket_is_replaced() {
    let place = Place::new();
    fs::create_dir_all(place.path("run")).unwrap();
    let listener = UnixListener::bind(place.path("run/stream.sock")).unwrap();
    let why = place.refusal(place.config()).await;
    assert!(why.contains("run/stream.sock is in use: another process answers there"), "{why}");
    // Its process ends without removing the file.
    drop(listener);
    let receiver = place.start().await;
    Agent::welcomed(&receiver, hello(1, "vm1")).await;
    receiver.shutdown().await;
    assert!(!place.path("run/stream.sock").exists(), "a socket is removed by whom it was made");
    fs::write(place.path("run/stream.sock"), "precious").unwrap();
    let why = place.refusal(place.config()).await;
    assert!(why.contains("there is a file of that name that is no socket"), "{why}");
    assert_eq!(fs::read_to_string(place.path("run/stream.sock")).unwrap(), "precious");
}

#[tokio::test]
async fn who_has_not_said_hello_is_given_little_memory() {
    let place = Place::new();
    let receiver = place.start().await;
    let mut stranger = Agent::connect(&receiver).await;
    let (header, _) = encode(1, &write(6, 0, vec![6; 1 << 20]));
    stranger.send_raw(&header).await;
    // The header alone is enough: what it announces is not waited for.
    let closed = stranger.closed().await;
    assert_eq!(closed.code, CloseCode::Invalid);
    assert!(closed.message.contains("65536"), "{closed:?}");
    // An agent that has said hello may send that much.
    let (mut agent, _) = Agent::welcomed(&receiver, hello(1, "vm1")).await;
    agent.first_pass(5).await;
    agent.send(&write(6, 0, vec![6; 1 << 20])).await;
    agent.all_durable().await;
    receiver.shutdown().await;
}
