//! A disk that ingests as fast as its guest writes is mounted, restored and rewound while its history is folded into
//! images, thinned and scrubbed: every kept moment stays exactly what it was.
//!
//! `BACKTIDE_KILL_ROUNDS=n` makes it n times as long.

use std::path::{Path, PathBuf};

use backtide_e2e::{Bench, Model, Write, http, kill_rounds, tools};
use serde_json::json;

const SIZE: u64 = 8 << 20;

/// Small segments and a short breath: there is always something to fold.
const SETTINGS: &str = "[limits]\nsegment_bytes = 1048576\n[retention]\ninterval_ms = 20\n";

/// So slow that a scrub is at work for as long as a round takes.
const SCRUB_RATE: &str = "64KiB";

/// Rounds of a short run.
const ROUNDS: u64 = 3;

/// A moment that is kept, as it was copied from its mount.
struct Kept {
    label: String,
    lsn: u64,
    copy: PathBuf,
    /// The writes that made it.
    writes: Vec<Write>,
}

#[test]
fn kept_moments_stay_while_everything_happens_at_once() {
    let bench = Bench::new();
    let receiver = bench.receiver_with(SETTINGS);
    let _agent = bench.agent();
    bench.image("vm1.img", SIZE);
    let disk = bench.attach("vm1", "vm1.img", &[]);
    disk.wait("sync");
    // What the disk holds, as the writes that made it.
    let mut writes: Vec<Write> = Vec::new();
    let mut kept: Vec<Kept> = Vec::new();
    let mut load = disk.load(0);
    for round in 0..ROUNDS * kill_rounds(1) {
        let label = format!("round-{round}");
        let at = format!("mark:{label}");
        load.goes_on(150);
        // After a rewind, when nothing is missing any more.
        disk.until("whole", |status| status["hydration"].is_null());
        disk.wait("sync");
        // Nothing goes before it can be kept.
        bench.json(&["retention", "set", "vm1", "any=1h"]);
        let lsn = bench.json(&["mark", &label, "vm1"])["marks"][0]["lsn"].as_u64().expect("an LSN");
        disk.wait("durable");
        bench.json(&["retention", "keep", "vm1", "--at", &at]);
        bench.json(&["retention", "set", "vm1", "any=1s", "--yes"]);

        bench.json(&["scrub", "--rate", SCRUB_RATE, "--no-wait"]);
        let mount = bench.json(&["mount", "vm1", "--at", &at]);
        let (id, uri) = (mount["id"].as_str().expect("an id"), mount["uri"].as_str().expect("a URI"));
        let copy = bench.path(&format!("{label}.img"));
        tools::run("nbdcopy", &[uri, &copy.display().to_string()]);
        tools::assert_same_images(&copy, &disk.restore(&at));
        load.goes_on(50);
        kept.push(Kept { label, lsn, copy, writes: Vec::new() });
        for one in &kept {
            tools::assert_same_images(&one.copy, &disk.restore(&format!("mark:{}", one.label)));
        }
        writes.extend(load.stop().writes);
        let model = Model::of_zeroes(SIZE, writes.clone());
        let newest = kept.last_mut().expect("there is one");
        newest.writes = writes[..model.prefix_in(&newest.copy, "the mark")].to_vec();
        disk.latest_is_the_image();
        model.assert_is_in(Path::new(&disk.image), model.len(), "the disk");
        // To this moment or an earlier one; the guest is there again at once.
        let back = &kept[(round / 2) as usize];
        http::call(
            &bench.path("agent.sock"),
            "POST",
            "/v1/disks/vm1/rewind",
            Some(&json!({ "to": back.lsn })),
        );
        load = disk.load(round + 1);
        writes.clone_from(&back.writes);
        tools::assert_same(uri, &kept[round as usize].copy.display().to_string());
        bench.json(&["unmount", id]);
        assert_eq!(bench.json(&["scrub", "--last"])["running"], true, "it was at work all the while");
        let read = bench.json(&["scrub", "--cancel"]);
        assert_eq!((&read["cancelled"], &read["sound"]), (&json!(true), &json!(true)), "{read}");
        // While the guest is at work again; of all there is.
        assert_eq!(bench.json(&["scrub", "--rate", "0"])["sound"], true);
    }
    load.stop();
    disk.until("whole", |status| status["hydration"].is_null());
    disk.settle();
    // What is not kept is gone, and what is, is what it was.
    let last = kept.last().expect("there was a round").lsn;
    while bench.json(&["retention", "show", "vm1"])["disks"][0]["every_point_from"]["lsn"].as_u64()
        <= Some(last)
    {}
    assert!(disk.holes().iter().any(|hole| hole["reason_code"] == "thinned"), "{}", disk.points());
    for one in &kept {
        tools::assert_same_images(&one.copy, &disk.restore(&format!("mark:{}", one.label)));
    }
    assert_eq!(bench.json(&["verify", "vm1"])["differing_count"], 0);
    receiver.kill();
    assert_eq!(bench.json(&["fsck", &bench.name("store")])["sound"], true);
}
