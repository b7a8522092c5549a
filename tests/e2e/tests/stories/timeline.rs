//! A person looks for a point: what is around a time, and how much was written when.

use backtide_e2e::{Bench, ledger::Moment};
use serde_json::{Value, json};

const SIZE: u64 = 64 << 20;

#[test]
fn what_is_around_a_time_is_found_and_a_time_in_a_hole_says_why_it_is_none() {
    let bench = Bench::new();
    let (receiver, _agent, disk) = bench.protected(SIZE, &["--window", "4MiB", "--guest-delay-max", "0"]);
    let load = disk.load(1);
    load.goes_on(60);
    let there = Moment::now();
    load.goes_on(20);
    disk.settle();
    receiver.kill();
    disk.until("tracking", |status| status["mode"] == "tracking");
    load.goes_on(20);
    let in_hole = Moment::now();
    load.goes_on(20);
    let _receiver = bench.receiver();
    disk.wait("sync");
    load.goes_on(50);
    load.stop();
    disk.settle();
    let around = |time: &str| bench.json(&["points", "vm1", "--around", time]);
    let lsn = |point: &Value| point["lsn"].as_u64().unwrap_or_else(|| panic!("a point: {point}"));
    let time = |point: &Value| point["time"].as_u64().unwrap();

    let found = around(&there.rfc3339());
    // A loaded machine may have lost the stream by then, which is a hole too.
    if found["hole"].is_null() {
        assert_eq!(found["point"], found["before"], "{found}");
        assert!(time(&found["before"]) <= there.0 && there.0 < time(&found["after"]), "{found}");
        assert_eq!(lsn(&found["after"]), lsn(&found["before"]) + 1, "one LSN for each write: {found}");
        assert!(lsn(&found["flush_before"]) <= lsn(&found["before"]), "{found}");
        let diff = bench.json(&["diff", "vm1", "--from", &there.rfc3339(), "--to", "latest"]);
        assert_eq!(diff["from"]["lsn"], found["point"]["lsn"], "it is what --at takes it for");
    }

    let found = around(&in_hole.rfc3339());
    assert_eq!(found["point"], Value::Null, "{found}");
    // On a loaded machine the window may overflow just before the receiver is gone: another reason then.
    assert!(found["hole"]["reason"].as_str().is_some_and(|reason| !reason.is_empty()), "{found}");
    assert_eq!(lsn(&found["before"]), found["hole"]["after_lsn"].as_u64().unwrap(), "{found}");
    assert_eq!(lsn(&found["after"]), found["hole"]["before_lsn"].as_u64().unwrap(), "{found}");
    let said = bench.plain(&["points", "vm1", "--around", &in_hole.rfc3339()]);
    assert!(said.stdout.contains("cannot be gone back to: HOLE"), "{said:?}");

    let report = disk.points();
    assert_eq!(around("2001-01-01T00:00:00Z")["after"], report["first"]);
    let newest = around("latest");
    assert_eq!((&newest["point"]["lsn"], &newest["after"]), (&report["last"]["lsn"], &Value::Null));
    for command in [&["points", "vm1", "--around"][..], &["diff", "vm1", "--to", "latest", "--from"]] {
        let future = bench.run(&[command, &["2200-01-01T00:00:00Z"]].concat());
        assert_eq!(future.code, 4, "{future:?}");
        assert!(
            future.sentence().starts_with("2200-01-01T00:00:00Z is in the future: it is 20"),
            "{future:?}"
        );
    }
    assert_eq!(bench.run(&["points", "vm1", "--around", "yesterday"]).code, 2);

    let newest = bench.json(&["points", "vm1", "--last", "1"]);
    let intervals = report["intervals"].as_array().unwrap();
    assert!(intervals.len() > 1, "there was an outage: {report}");
    assert_eq!(newest["intervals"].as_array().unwrap(), &intervals[intervals.len() - 1..]);
    assert_eq!(newest["holes"], json!([]), "{newest}");
    assert_eq!(newest["first"], report["first"], "the others are there still");
    assert_eq!(bench.json(&["points", "vm1", "--last", "99"])["intervals"], report["intervals"]);

    let parts = report["density"]["parts"].as_array().unwrap();
    let sum = |name: &str| parts.iter().map(|part| part[name].as_u64().unwrap()).sum::<u64>();
    assert_eq!(parts.len(), 60);
    assert!(sum("changes") >= 130 && sum("bytes") > 130 * 512, "{report}");
    assert!(bench.plain(&["points", "vm1"]).stdout.contains("written |"));
}
