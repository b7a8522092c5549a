//! How an agent comes to its receiver, leaves it, and comes again; and how far behind it says it is.
//! The receivers here are played by the tests where a real one never behaves so.

use std::{io::Read, time::Instant};

use backtide_e2e::{
    Bench, http,
    wire::{PASS_BEGIN, PlayedReceiver, read_numbered, welcome, welcome_above},
};
use serde_json::json;

const SIZE: u64 = 16 << 20;

/// Attaches `vm1` without waiting for its receiver, as the command does.
fn attach(bench: &Bench) {
    let image = bench.image("vm1.img", SIZE);
    let body = json!({"name": "vm1", "image": image, "receiver": bench.socket("stream.sock")});
    http::call(&bench.path("agent.sock"), "POST", "/v1/disks", Some(&body));
}

#[test]
fn a_pause_during_the_handshake_leaves_no_idle_connection() {
    let bench = Bench::new();
    let receiver = PlayedReceiver::at(&bench.path("stream.sock"));
    let _agent = bench.agent();
    attach(&bench);
    let (mut stream, hello) = receiver.meet();
    bench.json(&["pause", "vm1"]);
    welcome(&mut stream, &hello).expect("the agent waits for its welcome");
    let mut said = Vec::new();
    stream.read_to_end(&mut said).expect("the agent closes in good order");
    assert_eq!(bench.json(&["status", "vm1"])["disks"][0]["connected"], false);
    // Resumed, it comes again.
    bench.json(&["resume", "vm1"]);
    receiver.meet();
}

#[test]
fn a_receiver_that_closes_at_once_is_asked_less_and_less_often() {
    let bench = Bench::new();
    let receiver = PlayedReceiver::at(&bench.path("stream.sock"));
    let _agent = bench.agent();
    attach(&bench);
    let (first, _) = receiver.meet();
    let began = Instant::now();
    drop(first);
    for _ in 0..5 {
        let (mut stream, hello) = receiver.meet();
        // The agent may have given up a connection that nobody accepted yet.
        let _ = welcome(&mut stream, &hello);
    }
    // The waits double from a tenth of a second: 3.1 s, where equal ones would have been 0.6 s.
    let waited = began.elapsed();
    assert!(waited.as_secs_f64() > 1.5, "six connections within {waited:?}");
}

/// A receiver may have seen more than this agent's state knows of.
#[test]
fn an_lsn_is_sent_when_no_later_attach_would_give_it_again() {
    let bench = Bench::new();
    let receiver = PlayedReceiver::at(&bench.path("stream.sock"));
    let _agent = bench.agent();
    attach(&bench);
    let bound = || {
        let record = std::fs::read_to_string(bench.path("state/vm1.json")).unwrap();
        let record: serde_json::Value = serde_json::from_str(&record).unwrap();
        record["lsn_bound"].as_u64().expect("a record has a bound")
    };
    let seen = 1 << 40;
    assert!(bound() < seen);
    let (mut stream, hello) = receiver.meet();
    welcome_above(&mut stream, &hello, seen).expect("the agent waits for its welcome");
    let at = loop {
        if let (PASS_BEGIN, at, _) = read_numbered(&mut stream) {
            break at;
        }
    };
    assert!(at > seen && bound() >= at, "{at} was sent, and LSNs above {} are given again", bound());
}

#[test]
fn the_lag_is_the_age_of_the_oldest_write_that_is_not_durable() {
    let bench = Bench::new();
    let (receiver, _agent, disk) = bench.protected(SIZE, &[]);
    disk.qemu_io(&["write -P 0x11 0 1M"]);
    disk.settle();
    receiver.signal("STOP");
    // The disk is idle for a while: that is no lag.
    for _ in 0..5 {
        let lag = disk.status()["lag"].clone();
        assert_eq!((&lag["records"], &lag["seconds"]), (&0.into(), &0.0.into()), "{lag}");
    }
    let uri = disk.uri();
    let before_first = Instant::now();
    backtide_e2e::tools::qemu_io(&uri, &["write -P 0x22 0 64k"]);
    let after_first = Instant::now();
    for pattern in 1..5 {
        backtide_e2e::tools::qemu_io(&uri, &[&format!("write -P {pattern} 1M 64k")]);
    }
    let at_least = after_first.elapsed().as_secs_f64();
    let status = disk.status();
    let at_most = before_first.elapsed().as_secs_f64();
    let seconds = status["lag"]["seconds"].as_f64().unwrap();
    assert_eq!((&status["lag"]["records"], &status["mode"]), (&5.into(), &"sync".into()), "{status}");
    assert!((at_least..=at_most).contains(&seconds), "{at_least} <= {seconds} <= {at_most}");
    receiver.signal("CONT");
    disk.settle();
    assert_eq!(disk.status()["lag"]["records"], 0);
}
