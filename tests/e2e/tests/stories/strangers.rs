//! Peers of the stream that speak otherwise: newer versions, other protocols, noise.
//!
//! The frames are made by hand, see `wire`, so that this side does not share the mistakes of the other.

use std::{
    io::{Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::Path,
};

use backtide_e2e::{
    Bench,
    wire::{CLOSE, HELLO, frame, read_frame},
};
use serde_json::{Value, json};

const SIZE: u64 = 16 << 20;

fn hello(version: u32) -> Value {
    json!({
        "version": version, "disk": "5f0c9f54-7d5b-4a59-8f0e-0e2b2a1d9a55", "name": "stranger",
        "size": SIZE, "epoch": 1, "history": null, "tracking": {"state": "new"}, "next_lsn": 1,
        "acked_durable": 0, "something_newer": [1, 2, 3],
    })
}

#[test]
fn a_newer_agent_is_told_why_it_is_refused() {
    let bench = Bench::new();
    let _receiver = bench.receiver();
    let mut stream = UnixStream::connect(bench.path("stream.sock")).unwrap();
    stream.write_all(&frame(HELLO, 1, hello(99).to_string().as_bytes())).unwrap();
    let (kind, payload) = read_frame(&mut stream);
    let closed: Value = serde_json::from_slice(&payload).unwrap();
    assert_eq!((kind, &closed["code"]), (CLOSE, &"version".into()), "{closed}");
    let message = closed["message"].as_str().unwrap();
    assert!(message.contains("99") && message.contains('1'), "both versions are named: {message}");
    assert_eq!(stream.read(&mut [0]).unwrap(), 0, "and the connection is closed");
}

#[test]
fn noise_on_the_stream_harms_nobody() {
    let bench = Bench::new();
    let (mut receiver, _agent, disk) = bench.protected(SIZE, &[]);
    receiver.may_complain("connection");
    let good = frame(HELLO, 1, hello(1).to_string().as_bytes());
    let mut flipped = good.clone();
    flipped[70] ^= 1;
    let mut endless = frame(HELLO, 1, b"{}");
    endless[48..52].copy_from_slice(&u32::MAX.to_le_bytes());
    let checksum = crc32c::crc32c(&endless[..60]);
    endless[60..64].copy_from_slice(&checksum.to_le_bytes());
    let cases: [(&str, Vec<u8>); 7] = [
        (
            "another protocol",
            b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\nandmuchmoreofitandmore...........".to_vec(),
        ),
        ("a flipped bit", flipped),
        ("a frame without end", endless),
        ("no JSON", frame(HELLO, 1, b"hello")),
        ("another first frame", frame(14, 1, b"")),
        ("an unknown frame", frame(77, 1, b"")),
        ("a wrong sequence number", frame(HELLO, 5, hello(1).to_string().as_bytes())),
    ];
    for (what, bytes) in &cases {
        let mut stream = UnixStream::connect(bench.path("stream.sock")).unwrap();
        stream.write_all(bytes).unwrap();
        let mut rest = Vec::new();
        // A reset is an end, too.
        let _ = stream.read_to_end(&mut rest);
        assert!(rest.is_empty() || rest[4] == CLOSE, "{what}: {rest:?}");
    }
    // Half a hello, and then nothing: it is not in anybody's way.
    let mut half = UnixStream::connect(bench.path("stream.sock")).unwrap();
    half.write_all(&good[..80]).unwrap();
    disk.qemu_io(&["write -P 0x11 0 1M"]);
    disk.latest_is_the_image();
}

/// A receiver that answers every hello with the same frame; it ends with the test.
fn receiver_that_answers(path: &Path, answer: Vec<u8>) {
    let listener = UnixListener::bind(path).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            let (kind, _) = read_frame(&mut stream);
            assert_eq!(kind, HELLO);
            // The agent may be gone, at the end of the test.
            let _ = stream.write_all(&answer);
            let _ = stream.read(&mut [0; 1024]);
        }
    });
}

#[test]
fn an_agent_tracks_while_its_receiver_is_of_another_version() {
    let bench = Bench::new();
    let _agent = bench.agent();
    let message = "this receiver speaks version 7 of the stream, the agent version 1";
    let closed = json!({"code": "version", "message": message}).to_string();
    receiver_that_answers(&bench.path("stream.sock"), frame(CLOSE, 1, closed.as_bytes()));
    bench.image("vm1.img", SIZE);
    let disk = bench.attach_ending(3, "vm1", "vm1.img", &[]);
    disk.qemu_io(&["write -P 0x11 0 1M", "read -P 0x11 0 1M"]);
    let status = disk.until("it says why", |status| status["last_error"]["code"] == "version");
    assert!(status["last_error"]["message"].as_str().unwrap().contains(message), "{status}");
    assert_eq!(status["mode"], "tracking", "{status}");
    // The right receiver takes the place of the wrong one, and all is well.
    std::fs::remove_file(bench.path("stream.sock")).unwrap();
    let _receiver = bench.receiver();
    disk.latest_is_the_image();
}

#[test]
fn an_agent_does_not_believe_a_receiver_that_talks_nonsense() {
    let bench = Bench::new();
    let mut agent = bench.agent();
    agent.may_complain("stream");
    let welcome = json!({
        "version": 99, "history": "0c2ff4a2-3b7c-4d21-9d0b-5b6d0f1f8e10", "state": "new", "durable": 0,
        "highest": 0, "in_pass": false,
    });
    receiver_that_answers(&bench.path("stream.sock"), frame(2, 1, welcome.to_string().as_bytes()));
    bench.image("vm1.img", SIZE);
    let disk = bench.attach_ending(3, "vm1", "vm1.img", &[]);
    disk.qemu_io(&["write -P 0x11 0 1M", "read -P 0x11 0 1M"]);
    let status = disk.until("it says why", |status| status["last_error"]["code"] == "version");
    assert!(status["last_error"]["message"].as_str().unwrap().contains("99"), "{status}");
}
