//! `up` and `demo`: everything in one process.

use backtide_e2e::{Bench, tools};

#[test]
fn demo_proves_what_it_shows() {
    let bench = Bench::new();
    let told = bench.plain(&["demo"]);
    assert_eq!(told.code, 0, "{told:?}");
    let report = bench.json(&["demo"]);
    assert_eq!(report["proved"], true, "{report}");
    let proofs = report["proofs"].as_array().unwrap();
    assert!(proofs.len() >= 3 && proofs.iter().all(|proof| proof["same"] == true), "{report}");
    assert_eq!(report["hole_refused"], true, "{report}");
}

#[test]
fn up_protects_an_image_and_continues_its_history() {
    let bench = Bench::new();
    bench.image("vm1.img", 64 << 20);
    let (image, directory) = (bench.name("vm1.img"), bench.name("up"));
    let mut earlier = None;
    for round in 1..=2 {
        let up = bench.daemon(&["up", &image, "--dir", &directory]);
        let (agent, receiver) = (up.ready["agent"].as_str().unwrap(), up.ready["receiver"].as_str().unwrap());
        let pattern = format!("write -P 0x1{round} {round}M 1M");
        tools::qemu_io(up.ready["nbd_uri"].as_str().unwrap(), &[&pattern, "flush"]);
        bench.json(&["--agent", agent, "wait", "vm1", "--for", "durable"]);
        let output = bench.name("restored.img");
        bench.json(&[
            "restore",
            "vm1",
            "--receiver",
            receiver,
            "--at",
            "latest",
            "--output",
            &output,
            "--force",
        ]);
        tools::assert_same(&image, &output);
        if let Some(lsn) = earlier {
            let at = format!("lsn:{lsn}");
            bench.json(&[
                "restore",
                "vm1",
                "--receiver",
                receiver,
                "--at",
                &at,
                "--output",
                &output,
                "--force",
            ]);
            tools::assert_same(&bench.name("first.img"), &output);
        }
        std::fs::copy(&image, bench.path("first.img")).unwrap();
        earlier = bench.json(&["points", "vm1", "--receiver", receiver])["last"]["lsn"].as_u64();
        assert_eq!(up.stop(), 0);
    }
    bench.image("other.img", 1 << 20);
    let other = bench.run(&["up", &bench.name("other.img"), "--dir", &directory]);
    assert_eq!(other.code, 5, "{other:?}");
}

/// As some managers of virtual machines name images. A name of that kind means the disk that has it as its UUID.
#[test]
fn up_names_a_disk_whose_image_is_called_by_a_uuid() {
    let bench = Bench::new();
    let uuid = "6f1c0a1e-9d56-4c8f-b1d3-0a52d4a51c11";
    bench.image(&format!("{uuid}.img"), 1 << 20);
    let up = bench.daemon(&["up", &bench.name(&format!("{uuid}.img")), "--dir", &bench.name("up")]);
    assert_eq!(up.ready["name"], format!("disk-{uuid}"), "{}", up.ready);
    assert_eq!(up.stop(), 0);
}
