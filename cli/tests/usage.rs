//! Arguments, errors and exit codes, without any daemon.

mod support;

use std::process::Stdio;

use serde_json::Value;
use support::Bench;

fn error_of(stderr: &str) -> Value {
    let value: Value =
        serde_json::from_str(stderr.trim()).unwrap_or_else(|error| panic!("{error}: {stderr:?}"));
    value["error"].clone()
}

#[test]
fn every_command_has_help_and_says_it_on_stdout() {
    let bench = Bench::new();
    let said = bench.run(&["help"]);
    assert_eq!((said.code, said.stderr.as_str()), (0, ""));
    for command in [
        "up",
        "demo",
        "receiver",
        "agent",
        "attach",
        "detach",
        "status",
        "pause",
        "resume",
        "resync",
        "limits",
        "mark",
        "points",
        "diff",
        "find-change",
        "ls",
        "cp",
        "mount",
        "unmount",
        "restore",
        "rewind",
        "failover",
        "failback",
        "verify",
        "wait",
        "doctor",
        "support-bundle",
        "inspect",
        "completions",
    ] {
        assert!(
            said.stdout.contains(&format!("\n  {command} ")),
            "{command} is missing in:\n{}",
            said.stdout
        );
        let help = bench.run(&[command, "--help"]);
        assert_eq!(help.code, 0, "{command}: {help:?}");
        assert!(help.stdout.contains("Usage: backtide"), "{command}: {help:?}");
    }
    let codes = "4 not found, 5 refused (busy, fenced, locked), 6 peer unreachable";
    assert!(said.stdout.replace("\n", " ").contains(codes), "{}", said.stdout);
}

#[test]
fn help_names_defaults_and_units() {
    let bench = Bench::new();
    let attach = bench.run(&["attach", "--help"]).stdout;
    for part in ["64MiB", "32MiB", "milliseconds", "[default: as before", "durable-every-write"] {
        assert!(attach.contains(part), "{part} is missing in:\n{attach}");
    }
    assert!(bench.run(&["receiver", "run", "--help"]).stdout.contains("/var/lib/backtide/store"));
}

#[test]
fn wrong_usage_ends_with_2_and_a_near_miss_is_suggested() {
    let bench = Bench::new();
    for wrong in [
        vec![],
        vec!["restor"],
        vec!["status", "two words"],
        vec!["attach", "vm1", "x.img"],
        vec!["attach", "vm1", "x.img", "--receiver", "/run/stream.sock"],
        vec!["attach", "vm1", "x.img", "--receiver", "unix:/s", "--ack", "sometimes"],
        vec!["resync", "vm1", "--full", "--compare"],
        vec!["mark", "label"],
        vec!["wait", "vm1", "--for", "sync", "--timeout", "5"],
        vec!["wait", "vm1", "--for", "point"],
        vec!["restore", "vm1", "--at", "latest"],
    ] {
        let said = bench.run(&wrong);
        assert_eq!((said.code, said.stdout.as_str()), (2, ""), "{wrong:?}: {said:?}");
        assert!(!said.stderr.is_empty(), "{wrong:?}");
    }
    assert!(bench.run(&["restor"]).stderr.contains("'restore'"));
    let json = bench.run(&["--json", "restor"]);
    assert_eq!((json.code, error_of(&json.stderr)["code"].as_str()), (2, Some("usage")));
}

#[test]
fn wrong_usage_as_json_is_one_whole_sentence() {
    let bench = Bench::new();
    for (wrong, sentence) in [
        (vec!["--json"], "a command is missing"),
        (vec!["--json", "status", "--wach"], "unexpected argument '--wach' found"),
        (
            vec!["--json", "restore", "vm1"],
            "the following required arguments were not provided: --at <POINT>, --output <PATH|URI>",
        ),
    ] {
        let said = bench.run(&wrong);
        let error = error_of(&said.stderr);
        assert_eq!((said.code, said.stdout.as_str()), (2, ""), "{wrong:?}: {said:?}");
        assert_eq!((error["code"].as_str(), error["message"].as_str()), (Some("usage"), Some(sentence)));
    }
}

#[test]
fn an_up_that_fails_leaves_nothing_behind() {
    let bench = Bench::new();
    let (image, directory) = (bench.path("none.img"), bench.path("history"));
    let up = ["up", image.to_str().unwrap(), "--dir", directory.to_str().unwrap()];
    let said = bench.run(&up);
    assert_eq!(said.code, 4, "{said:?}");
    assert!(!directory.exists(), "{said:?}");
    // What was there before stays.
    std::fs::create_dir(&directory).unwrap();
    assert_eq!(bench.run(&up).code, 4);
    assert!(directory.exists());
}

#[test]
fn a_file_is_no_directory_to_keep_things_in() {
    let bench = Bench::new();
    let file = bench.image("file", 512);
    let file = file.to_str().unwrap();
    for command in [
        &["receiver", "run", "--store", file][..],
        &["agent", "run", "--state", file],
        &["demo", "--dir", file],
        &["up", "vm1.img", "--dir", file],
    ] {
        let said = bench.run(command);
        assert_eq!(said.code, 2, "{command:?}: {said:?}");
        assert!(said.stderr.contains(&format!("{file} is not a directory")), "{command:?}: {said:?}");
    }
}

#[test]
fn a_directory_is_no_file_to_inspect() {
    let bench = Bench::new();
    let said = bench.run(&["inspect", bench.path("").to_str().unwrap()]);
    assert_eq!(said.code, 2, "{said:?}");
    assert!(said.stderr.contains("is no file"), "{said:?}");
}

#[test]
fn an_absent_daemon_is_named_with_the_way_out() {
    let bench = Bench::new();
    let said = bench.run(&["status"]);
    assert_eq!((said.code, said.stdout.as_str()), (6, ""));
    let lines: Vec<&str> = said.stderr.lines().collect();
    assert_eq!(lines.len(), 2, "{said:?}");
    assert!(
        lines[0].starts_with(&format!("backtide: no agent answers at {}: ", bench.socket("agent.sock"))),
        "{said:?}"
    );
    assert_eq!(
        lines[1],
        "hint: start it with `backtide agent run`, or name its address with --agent or BACKTIDE_AGENT"
    );
    let said = bench.run(&["--json", "points", "vm1"]);
    assert_eq!(said.code, 6);
    let error = error_of(&said.stderr);
    assert_eq!(error["code"], "unreachable");
    assert!(error["hint"].as_str().unwrap().contains("backtide receiver run"), "{error}");
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let bench = Bench::new();
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let child =
        bench.command(&["completions", "bash"]).stdout(writer).stderr(Stdio::piped()).spawn().unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(
        (support::exit_code(output.status), String::from_utf8(output.stderr).unwrap().as_str()),
        (0, "")
    );
    assert!(bench.run(&["completions", "bash"]).stdout.contains("_backtide"));
}

#[test]
fn a_daemon_refuses_settings_it_does_not_know() {
    let bench = Bench::new();
    let file = bench.path("receiver.toml");
    std::fs::write(&file, "stroe = '/x'\n").unwrap();
    let said = bench.run(&["receiver", "run", "--config", file.to_str().unwrap()]);
    assert_eq!(said.code, 2, "{said:?}");
    assert!(said.stderr.contains("stroe") && said.stderr.contains("docs/cli.md"), "{said:?}");
    let said = bench.run(&["receiver", "run", "--api", "tcp://0.0.0.0:0"]);
    assert_eq!(said.code, 5, "{said:?}");
    assert!(said.stderr.contains("loopback only"), "{said:?}");
}

#[test]
fn a_file_that_is_not_there_is_not_found() {
    let bench = Bench::new();
    let said = bench.run(&["inspect", bench.path("none.seg").to_str().unwrap()]);
    assert_eq!((said.code, said.stdout.as_str()), (4, ""), "{said:?}");
}

/// A daemon that takes connections and says nothing.
#[test]
fn a_silent_daemon_keeps_no_command_beyond_its_timeout_or_a_signal() {
    use std::os::unix::net::UnixListener;
    let bench = Bench::new();
    let _agent = UnixListener::bind(bench.path("agent.sock")).unwrap();
    let _receiver = UnixListener::bind(bench.path("receiver.sock")).unwrap();
    for state in [&["durable"][..], &["sync"], &["point", "--at", "latest"]] {
        let arguments = [&["wait", "vm1", "--timeout", "100ms", "--for"], state].concat();
        let said = bench.run(&arguments);
        assert_eq!(said.code, 1, "{said:?}");
        assert!(said.stderr.contains("in vain: the "), "{said:?}");
        assert!(said.stderr.contains("does not answer"), "{said:?}");
    }
    // Another one, so that the connection seen is that of this command.
    let other = UnixListener::bind(bench.path("other.sock")).unwrap();
    let output = bench.path("out.raw");
    let mut restore = bench
        .command(&["restore", "vm1", "--at", "latest", "--output", output.to_str().unwrap()])
        .env("BACKTIDE_RECEIVER", bench.socket("other.sock"))
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let _asked = other.accept().unwrap();
    support::signal(&restore, "TERM");
    assert_eq!(support::exit_code(restore.wait().unwrap()), 130);
}
