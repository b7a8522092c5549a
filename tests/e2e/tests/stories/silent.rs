//! A daemon that is stopped takes connections and says nothing: whoever asks hears of that after a bounded
//! time, and nothing is told to be kept that the receiver has not said to have.

use std::{cell::RefCell, process::Stdio};

use backtide_e2e::{Bench, Said};

const SIZE: u64 = 8 << 20;

fn is_silence(said: &Said, who: &str) {
    assert_eq!((said.code, said.stdout.as_str()), (6, ""), "{said:?}");
    let sentence = said.sentence();
    assert!(sentence.starts_with(&format!("the {who} at unix:")), "{sentence}");
    assert!(sentence.contains("has not answered for 15 s"), "{sentence}");
    assert_eq!(said.error()["details"]["silent_seconds"], 15, "{said:?}");
}

/// What `doctor` finds about a daemon.
fn verdict(said: &Said, check: &str) -> String {
    let report: serde_json::Value = serde_json::from_str(&said.stdout).expect("a report");
    let findings = report["findings"].as_array().expect("findings");
    let found = findings.iter().find(|finding| finding["check"] == check);
    found.unwrap_or_else(|| panic!("{check}: {report}"))["verdict"].as_str().expect("a verdict").to_owned()
}

#[test]
fn a_silent_receiver_is_said_and_no_mark_is_promised_of_it() {
    let bench = Bench::new();
    let (receiver, agent, disk) = bench.protected(SIZE, &[]);
    let kept = bench.json(&["mark", "kept", "vm1"]);
    assert_eq!(
        (&kept["marks"][0]["recoverable"], &kept["marks"][0]["state"]),
        (&true.into(), &"kept".into())
    );

    receiver.signal("STOP");
    let doubted = bench.json_ending(3, &["mark", "doubted", "vm1", "--wait", "200ms"]);
    let mark = &doubted["marks"][0];
    assert_eq!((&mark["recoverable"], &mark["state"]), (&false.into(), &"unconfirmed".into()), "{doubted}");
    // All at once: each waits for as long as the others.
    let ask = |arguments: &[&str]| {
        let mut command = bench.command(&["--json"]);
        command.args(arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("run backtide")
    };
    let asked = [ask(&["points", "vm1"]), ask(&["receiver", "status"])];
    let examined = bench.run(&["doctor"]);
    assert_eq!(examined.code, 1, "{examined:?}");
    assert_eq!((verdict(&examined, "receiver"), verdict(&examined, "agent")), ("failed".into(), "ok".into()));
    for child in asked {
        let output = child.wait_with_output().expect("a command");
        let text = |bytes| String::from_utf8(bytes).expect("text");
        let (code, stdout) = (output.status.code().expect("it exits"), text(output.stdout));
        is_silence(&Said { code, stdout, stderr: text(output.stderr) }, "receiver");
    }

    receiver.signal("CONT");
    disk.wait("sync");
    bench.json(&["mark", "after", "vm1"]);
    let points = disk.points();
    let labels: Vec<_> = points["marks"].as_array().unwrap().iter().map(|mark| &mark["label"]).collect();
    assert!(labels.contains(&&"doubted".into()), "the window had room for it: {points}");
    assert_eq!(agent.stop(), 0);
}

#[test]
fn a_mark_is_waited_for_through_a_resync_and_until_it_is_given_up() {
    let bench = Bench::new();
    let (receiver, agent, disk) = bench.protected(SIZE, &[]);
    disk.settle();
    // Long enough to be told from whatever else an idle disk sends.
    let label = |first: char| format!("{first}{}", "-".repeat(200));
    let asked = |label: &str| {
        let mut command = bench.command(&["--json", "mark", label, "vm1", "--wait", "30s"]);
        let spawned = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        let child = RefCell::new(spawned.expect("run backtide"));
        disk.until("the mark is on its way", |status| {
            let ended = child.borrow_mut().try_wait().expect("wait for a command");
            let on_its_way = status["window"]["bytes"].as_u64() > Some(300);
            assert!(on_its_way || ended.is_none(), "it has ended and sent no mark: {ended:?}");
            on_its_way
        });
        child.into_inner()
    };
    let told = |child: std::process::Child| {
        let output = child.wait_with_output().expect("a command");
        let report: serde_json::Value = serde_json::from_slice(&output.stdout).expect("a report");
        let state = report["marks"][0]["state"].as_str().expect("a state").to_owned();
        (output.status.code().expect("it exits"), state)
    };

    receiver.signal("STOP");
    let outlasting = asked(&label('o'));
    bench.json(&["resync", "vm1"]);
    disk.until("a resync", |status| status["mode"] == "resync");
    receiver.signal("CONT");
    assert_eq!(told(outlasting), (0, "kept".to_owned()));

    disk.wait("sync");
    disk.settle();
    receiver.signal("STOP");
    let given_up = asked(&label('g'));
    bench.json(&["pause", "vm1"]);
    assert_eq!(told(given_up), (3, "lost".to_owned()));
    receiver.signal("CONT");
    bench.json(&["resume", "vm1"]);
    disk.wait("sync");
    assert_eq!(agent.stop(), 0);
}

#[test]
fn a_disk_that_is_attached_to_a_silent_receiver_is_said_to_be_alone() {
    let bench = Bench::new();
    let (receiver, _agent) = (bench.receiver(), bench.agent());
    bench.image("vm1.img", SIZE);
    receiver.signal("STOP");
    let (address, image) = (bench.socket("stream.sock"), bench.name("vm1.img"));
    let said = bench.run(&["attach", "vm1", &image, "--receiver", &address]);
    assert_eq!(said.code, 3, "{said:?}");
    assert!(said.stderr.contains("has not answered"), "{said:?}");
    receiver.signal("CONT");
    bench.disk("vm1").wait("sync");
}

#[test]
fn a_silent_agent_is_said() {
    let bench = Bench::new();
    let (_receiver, agent, _disk) = bench.protected(SIZE, &[]);
    agent.signal("STOP");
    is_silence(&bench.run(&["status"]), "agent");
    agent.signal("CONT");
    assert_eq!(bench.json(&["status"])["disks"][0]["name"], "vm1");
}
