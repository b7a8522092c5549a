//! A disk that is set back to a point: served at once, complete soon, whoever dies meanwhile; and every point of
//! before stays.
//!
//! Every kill point of a rewind is reached once; `BACKTIDE_KILL_ROUNDS=n` goes through all of them n times.

use std::path::Path;

use backtide_e2e::{Bench, Disk, Guest, Load, Model, http, kill_rounds};
use backtide_storage::KillPoint;
use serde_json::{Value, json};

const SIZE: u64 = 4 << 20;

fn is_the_model(disk: &Disk<'_>, model: &Model, what: &str) {
    disk.latest_is_the_image();
    model.assert_is_in(Path::new(&disk.image), model.len(), what);
}

fn note_of(disk: &Disk<'_>) -> String {
    format!("{}.backtide-incomplete", disk.image)
}

#[test]
fn a_disk_goes_back_and_back_again() {
    let bench = Bench::new();
    let (_receiver, agent, disk) = bench.protected(SIZE, &[]);
    let mut model = Model::of_zeroes(SIZE, Vec::new());
    disk.guest_writes(&mut model, 1, 80);
    let (early, at_early) = (disk.last(), model.clone());
    disk.guest_writes(&mut model, 2, 80);
    let (late, at_late) = (disk.last(), model.clone());

    let report = disk.rewind(early);
    assert_eq!((&report["from"], &report["to"]), (&json!(late), &json!(early)), "{report}");
    assert!(report["changed_blocks"].as_u64().unwrap() > 0, "{report}");
    // A guest uses it while blocks are missing, or not any more.
    let mut other = at_early.clone();
    disk.guest_writes(&mut other, 3, 80);
    disk.whole();
    is_the_model(&disk, &other, "the early point and what came after it");
    assert!(!Path::new(&note_of(&disk)).exists() && !bench.path("state/vm1.hydration").exists());
    let reasons: Vec<Value> = disk.holes().into_iter().map(|hole| hole["reason_code"].clone()).collect();
    assert!(reasons.iter().all(|reason| reason == "rewind"), "{}", disk.points());

    // Whoever has lost the answer finds what undoes it, for as long as the agent has the disk.
    let rewound = disk.status()["rewound"].clone();
    assert_eq!((&rewound["from"], &rewound["to"]), (&json!(late), &json!(early)), "{rewound}");
    agent.kill();
    let _agent = bench.agent();
    disk.wait("sync");
    assert_eq!(disk.status()["rewound"], rewound);
    let said = bench.plain(&["status", "vm1"]).stdout;
    assert!(said.contains(&format!("undone by rewind --to lsn:{late}")), "{said}");

    let marks = disk.points()["marks"].clone();
    assert_eq!((&marks[0]["label"], &marks[0]["lsn"]), (&json!("before-rewind"), &json!(late)), "{marks}");

    // Undone, with a client that is hung up: it would see another content.
    let mut client = Guest::connect(&disk.uri());
    let path = "/v1/disks/vm1/rewind";
    let report =
        http::call(&bench.path("agent.sock"), "POST", path, Some(&json!({ "to": late, "reconnect": true })));
    assert_eq!(report["hung_up"], 1, "{report}");
    assert!(client.flush().is_err());
    disk.whole();
    is_the_model(&disk, &at_late, "the late point");
    for (lsn, model) in [(early, &at_early), (late, &at_late)] {
        let at = format!("lsn:{lsn}");
        model.assert_is_in(&disk.restore(&at), model.len(), &at);
    }
    assert_eq!(bench.json(&["verify", "vm1"])["differing_count"], 0);
}

#[test]
fn a_disk_that_lacks_blocks_says_so_and_waits_for_its_receiver() {
    let bench = Bench::new();
    let (receiver, agent, disk) = bench.protected(SIZE, &[]);
    let mut model = Model::of_zeroes(SIZE, Vec::new());
    disk.guest_writes(&mut model, 1, 80);
    let (early, at_early) = (disk.last(), model.clone());
    disk.guest_writes(&mut model, 2, 80);
    // So slow that it lasts.
    bench.json(&["limits", "vm1", "--resync-rate", "4096"]);
    disk.rewind(early);
    let status = disk.status();
    assert_eq!(status["hydration"]["kind"], "rewind", "{status}");
    assert_eq!(status["hydration"]["point"], early);
    assert!(Path::new(&note_of(&disk)).exists());
    let refused = bench.run(&["detach", "vm1"]);
    assert_eq!(refused.code, 5, "{refused:?}");
    receiver.kill();
    // Nobody takes the image for a disk.
    bench.json_ending(3, &["detach", "vm1", "--incomplete"]);
    let stream = bench.socket("stream.sock");
    let image = disk.image.clone();
    let refused = bench.run(&["attach", "other", &image, "--receiver", &stream]);
    assert_eq!(refused.code, 5, "{refused:?}");
    assert!(refused.sentence().contains("lacks blocks"), "{refused:?}");
    // What the agent knows of it is damaged.
    let file = bench.path("state/vm1.hydration");
    let good = std::fs::read(&file).unwrap();
    let mut damaged = good.clone();
    damaged[100] ^= 1;
    std::fs::write(&file, damaged).unwrap();
    let refused = bench.run(&["attach", "vm1", &image, "--receiver", &stream]);
    assert_eq!(refused.code, 8, "{refused:?}");
    std::fs::write(&file, good).unwrap();
    bench.json_ending(3, &["attach", "vm1", &image, "--receiver", &stream]);
    // It goes on where it was, and ends although it waits.
    assert_eq!(agent.stop(), 0);
    let _agent = bench.agent();
    let status = disk.status();
    assert_eq!(status["hydration"]["point"], early, "{status}");
    let _receiver = bench.receiver();
    bench.json(&["limits", "vm1", "--resync-rate", "0"]);
    disk.whole();
    is_the_model(&disk, &at_early, "the early point");
}

#[test]
fn whoever_dies_in_a_rewind_leaves_one_point_or_the_other() {
    // Which step, and at which occurrence: the first attach is that of the agent's start.
    let steps = [
        (KillPoint::RewindDetached, 1),
        (KillPoint::HydrationMade, 1),
        (KillPoint::AttachTracking, 2),
        (KillPoint::AttachRecord, 2),
        (KillPoint::AttachServed, 2),
        (KillPoint::HydrationStored, 1),
        (KillPoint::HydrationNoted, 1),
        (KillPoint::HydrationFinished, 1),
    ];
    let bench = Bench::new();
    let (_receiver, mut agent, disk) = bench.protected(SIZE, &["--cache", "direct"]);
    let uri = disk.uri();
    let mut model = Model::of_zeroes(SIZE, Vec::new());
    let mut seeds = 1..;
    let mut seed = || seeds.next().expect("there are more numbers");
    let mut points = Vec::new();
    for (step, times) in (0..kill_rounds(1)).flat_map(|_| steps) {
        disk.guest_writes(&mut model, seed(), 40);
        let (early, at_early) = (disk.last(), model.clone());
        points.push((early, at_early.clone()));
        disk.guest_writes(&mut model, seed(), 40);
        points.push((disk.last(), model.clone()));
        assert_eq!(agent.stop(), 0);
        let mut doomed = bench.doomed(&["agent", "run"], &format!("{}:{times}", step.name()));
        for state in ["sync", "durable"] {
            while !doomed.is_dead() && bench.run(&["wait", "vm1", "--for", state]).code != 0 {}
        }
        disk.rewind_or_die(early);
        let load = Load::try_start(&uri, seed());
        if step != KillPoint::RewindDetached {
            model = at_early;
        }
        if let Some(load) = load {
            load.goes_on_or_breaks(40);
            model.then(load.end());
        }
        assert!(doomed.died(), "{} is never reached", step.name());
        agent = bench.agent();
        disk.whole();
        is_the_model(&disk, &model, step.name());
        assert_eq!(bench.json(&["verify", "vm1"])["differing_count"], 0, "{}", step.name());
    }
    for (lsn, model) in points {
        let at = format!("lsn:{lsn}");
        model.assert_is_in(&disk.restore(&at), model.len(), &at);
    }
}
