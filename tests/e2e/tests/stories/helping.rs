//! What helps to find out what is wrong: `doctor`, `support-bundle`, and a daemon that makes room for
//! itself.

use backtide_e2e::{Bench, tools};
use serde_json::{Value, json};

const SIZE: u64 = 16 << 20;

/// The verdicts of a check, worst last.
fn verdicts(report: &Value, check: &str) -> Vec<String> {
    let findings = report["findings"].as_array().unwrap().iter().filter(|finding| finding["check"] == check);
    let mut verdicts: Vec<String> = findings.map(|found| found["verdict"].as_str().unwrap().into()).collect();
    verdicts.sort_by_key(|verdict| ["ok", "warning", "failed"].iter().position(|known| known == verdict));
    verdicts
}

#[test]
fn the_doctor_finds_nothing_in_health_and_what_is_wrong_otherwise() {
    let bench = Bench::new();
    let both_away = bench.json_ending(1, &["doctor"]);
    assert_eq!(
        (verdicts(&both_away, "agent"), &both_away["verdict"]),
        (vec!["failed".into()], &json!("failed"))
    );

    let (receiver, _agent, disk) = bench.protected(SIZE, &[]);
    disk.qemu_io(&["write -P 0x11 0 1M"]);
    disk.settle();
    let well = bench.json(&["doctor"]);
    for check in ["agent", "receiver", "versions", "sockets", "store", "disks", "clock", "programs"] {
        assert_eq!(verdicts(&well, check).last().map(String::as_str), Some("ok"), "{check}: {well}");
    }
    let text = bench.plain(&["doctor"]).stdout;
    assert!(text.contains("disks: vm1: in sync"), "{text}");

    receiver.kill();
    disk.until("the stream is lost", |status| status["connected"] == false);
    tools::run("chmod", &["666", &bench.name("agent.sock")]);
    let ill = bench.json_ending(1, &["doctor"]);
    for (check, verdict) in [("receiver", "warning"), ("disks", "failed"), ("sockets", "failed")] {
        assert_eq!(verdicts(&ill, check).last().map(String::as_str), Some(verdict), "{check}: {ill}");
    }
}

#[test]
fn a_support_bundle_has_what_helps_and_no_secret() {
    let bench = Bench::new();
    let (receiver, _agent, disk) = bench.protected(SIZE, &[]);
    disk.settle();
    let config = bench.path("agent.toml");
    std::fs::write(&config, "state = '/s'\nstream_key = 'hush'\n").unwrap();
    std::fs::write(bench.path("agent.log"), "the last words\n").unwrap();
    let (output, config, log) = (bench.name("help.tar"), bench.name("agent.toml"), bench.name("agent.log"));
    let command = ["support-bundle", "--output", &output, "--config", &config, "--log", &log];
    let written = bench.json(&command);
    let expected = [
        "versions.json",
        "doctor.json",
        "agent-status.json",
        "receiver-status.json",
        "points-vm1.json",
        "receiver-disks.json",
        "mounts.json",
        "config-1.toml",
        "log-1.log",
    ];
    assert_eq!(written["files"], json!(expected), "{written}");
    let listed = tools::run("tar", &["-tf", &output]);
    let listed: Vec<&str> = listed.lines().map(|line| line.trim_start_matches("backtide-support/")).collect();
    assert_eq!(listed, expected);
    let part = |name: &str| tools::run("tar", &["-xOf", &output, &format!("backtide-support/{name}")]);
    assert_eq!(part("log-1.log"), "the last words\n");
    assert!(!part("config-1.toml").contains("hush"), "{}", part("config-1.toml"));
    let status: Value = serde_json::from_str(&part("agent-status.json")).unwrap();
    assert_eq!(status["disks"][0]["name"], "vm1");

    let said = bench.run(&command);
    assert_eq!((said.code, said.error()["code"].as_str()), (5, Some("exists")), "{said:?}");
    receiver.kill();
    let output = bench.name("half.tar");
    let written = bench.json_ending(3, &["support-bundle", "--output", &output]);
    assert!(written["files"].as_array().unwrap().contains(&json!("agent-status.json")), "{written}");
}

#[test]
fn a_daemon_raises_its_limit_of_open_files() {
    let bench = Bench::new();
    let limited = bench.limited_daemon(64, &["receiver", "run"]);
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", limited.id())).unwrap();
    let line = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
    let words: Vec<&str> = line.split_whitespace().collect();
    assert_eq!(words[3], words[4], "as many as it may: {line}");
    assert_ne!(words[3], "64", "{line}");
}
