//! A qcow2 file, and a disk behind an NBD server, that is set back to a point: whoever dies meanwhile, the agent, what
//! serves the image, or both, the disk is the point under what was written since, and every point of before stays.
//!
//! Every kill point of a rewind is reached once; `BACKTIDE_KILL_ROUNDS=n` goes through all of them n times.

use std::path::{Path, PathBuf};

use backtide_e2e::{Bench, Disk, Load, Model, http, kill_rounds, tools};
use backtide_storage::KillPoint;
use serde_json::json;

const SIZE: u64 = 4 << 20;

/// What the disk lies on, and what serves it.
enum Behind {
    /// The agent's own `qemu-nbd`.
    Qcow2,
    /// A `qemu-nbd` of somebody else, of a raw file.
    Nbd(tools::Beside),
}

impl Behind {
    fn qcow2(bench: &Bench) -> (Self, String) {
        let image = bench.name("vm1.qcow2");
        tools::run("qemu-img", &["create", "-q", "-f", "qcow2", &image, &SIZE.to_string()]);
        (Self::Qcow2, image)
    }

    fn nbd(bench: &Bench) -> (Self, String) {
        bench.image("behind.img", SIZE);
        (Self::Nbd(serve(bench)), format!("nbd+unix:///?socket={}", bench.name("behind.sock")))
    }

    /// `kill -9` of what serves the image. The agent's own is started by it, or by the next agent.
    fn dies(self, bench: &Bench) -> Self {
        match self {
            Self::Qcow2 => {
                let id = std::fs::read_to_string(bench.path("vm1.qemu-nbd.pid")).unwrap();
                // It may have ended already.
                tools::try_run("kill", &["-s", "KILL", id.trim()]);
                Self::Qcow2
            }
            Self::Nbd(server) => {
                server.kill();
                Self::Nbd(serve(bench))
            }
        }
    }
}

fn serve(bench: &Bench) -> tools::Beside {
    let (image, socket) = (bench.name("behind.img"), bench.name("behind.sock"));
    let server = tools::Beside::start("qemu-nbd", &["-f", "raw", "-t", "-e", "8", "-k", &socket, &image]);
    tools::wait_for_socket(socket.as_ref());
    server
}

fn attach<'bench>(bench: &'bench Bench, image: &str) -> Disk<'bench> {
    let disk = bench.attach("vm1", image, &[]);
    disk.wait("sync");
    disk
}

/// The disk as its guest sees it.
fn content(bench: &Bench, disk: &Disk<'_>) -> PathBuf {
    let found = bench.path("found.img");
    tools::run("qemu-img", &["convert", "-f", "raw", "-O", "raw", &disk.uri(), found.to_str().unwrap()]);
    found
}

fn is_the_model(bench: &Bench, disk: &Disk<'_>, model: &Model, what: &str) {
    let found = content(bench, disk);
    model.assert_is_in(&found, model.len(), what);
    tools::assert_same_images(&found, &disk.restore("latest"));
    assert_eq!(bench.json(&["verify", "vm1"])["differing_count"], 0, "{what}");
}

/// Back, and back again, in the life of one agent; then an agent that dies at every step of it.
fn goes_back_whoever_dies(bench: &Bench, (mut behind, image): (Behind, String)) {
    let (_receiver, mut agent) = (bench.receiver(), bench.agent());
    let disk = attach(bench, &image);
    let mut model = Model::of_zeroes(SIZE, Vec::new());
    let mut points = Vec::new();
    let mut seeds = 1..;
    let mut seed = || seeds.next().expect("there are more numbers");
    disk.guest_writes(&mut model, seed(), 80);
    let (early, at_early) = (disk.last(), model.clone());
    disk.guest_writes(&mut model, seed(), 80);
    let (late, at_late) = (disk.last(), model.clone());
    points.extend([(early, at_early.clone()), (late, at_late.clone())]);
    let report = disk.rewind(early);
    assert_eq!((&report["from"], &report["to"]), (&json!(late), &json!(early)), "{report}");
    let mut other = at_early;
    disk.guest_writes(&mut other, seed(), 80);
    disk.whole();
    is_the_model(bench, &disk, &other, "the early point and what came after it");
    assert!(!bench.path("state/vm1.hydration").exists());
    disk.rewind(late);
    disk.whole();
    is_the_model(bench, &disk, &at_late, "undone");

    let steps = [
        (KillPoint::RewindDetached, 1),
        (KillPoint::HydrationMade, 1),
        (KillPoint::AttachServed, 2),
        (KillPoint::HydrationStored, 1),
        (KillPoint::HydrationNoted, 1),
        (KillPoint::HydrationFinished, 1),
    ];
    let uri = disk.uri();
    for (round, (step, times)) in (0..kill_rounds(1)).flat_map(|_| steps).enumerate() {
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
        // What somebody else's server wrote is in the kernel's hands; the agent's own may not have written its tables.
        if round % 2 == 0 && matches!(behind, Behind::Nbd(_)) {
            behind = behind.dies(bench);
        }
        agent = bench.agent();
        disk.whole();
        is_the_model(bench, &disk, &model, step.name());
    }
    for (lsn, model) in points {
        let at = format!("lsn:{lsn}");
        model.assert_is_in(&disk.restore(&at), model.len(), &at);
    }
    drop(behind);
}

#[test]
fn a_qcow2_file_goes_back_whoever_dies() {
    let bench = Bench::new();
    goes_back_whoever_dies(&bench, Behind::qcow2(&bench));
}

#[test]
fn a_disk_behind_nbd_goes_back_whoever_dies() {
    let bench = Bench::new();
    goes_back_whoever_dies(&bench, Behind::nbd(&bench));
}

/// Agent and server die at the same time, again and again, while blocks are missing: what a guest flushed is there, and
/// everything else is the point or what was written over it.
fn outlives_both(bench: &Bench, (mut behind, image): (Behind, String)) {
    let (_receiver, mut agent) = (bench.receiver(), bench.agent());
    let disk = attach(bench, &image);
    let expected = bench.path("expected.img");
    disk.qemu_io(&["write -P 0x11 0 4M", "write -z 1M 512k", "flush"]);
    disk.settle();
    let early = disk.last();
    std::fs::copy(disk.restore(&format!("lsn:{early}")), &expected).unwrap();
    disk.qemu_io(&["write -P 0x22 0 4M", "flush"]);
    disk.settle();
    let late = disk.last();
    // So slow that most is missing still.
    bench.json(&["limits", "vm1", "--resync-rate", "4096"]);
    disk.rewind(early);
    for round in 0..4_u64 {
        let at = round * 777_216 + 1024;
        let written = format!("write -P {} {at} 150k", 0x40 + round);
        for target in [disk.uri(), expected.to_str().unwrap().to_owned()] {
            tools::qemu_io(&target, &[&written, "flush"]);
        }
        // Somebody reads, which brings some blocks that nobody flushes.
        disk.qemu_io(&[&format!("read {} 64k", 614_400 + round * 512_000)]);
        if round == 3 {
            bench.json(&["limits", "vm1", "--resync-rate", "0"]);
        }
        agent.kill();
        behind = behind.dies(bench);
        agent = bench.agent();
        disk.qemu_io(&[&format!("read -P {} {at} 150k", 0x40 + round)]);
    }
    bench.json(&["limits", "vm1", "--resync-rate", "0"]);
    disk.whole();
    let found = content(bench, &disk);
    tools::assert_same_images(&found, &expected);
    tools::assert_same_images(&found, &disk.restore("latest"));
    assert_eq!(bench.json(&["verify", "vm1"])["differing_count"], 0);
    // Nothing that was said to be there was in a memory only.
    behind = behind.dies(bench);
    tools::assert_same_images(&content(bench, &disk), &expected);
    let all = bench.path("late.img");
    std::fs::write(&all, vec![0x22; SIZE as usize]).unwrap();
    tools::assert_same_images(&all, &disk.restore(&format!("lsn:{late}")));
    drop((behind, agent));
}

#[test]
fn a_qcow2_file_that_lacks_blocks_outlives_the_agent_and_its_server_together() {
    let bench = Bench::new();
    outlives_both(&bench, Behind::qcow2(&bench));
}

#[test]
fn a_disk_behind_nbd_that_lacks_blocks_outlives_the_agent_and_its_server_together() {
    let bench = Bench::new();
    outlives_both(&bench, Behind::nbd(&bench));
}

/// The server alone dies, and the receiver, and guests go on.
#[test]
fn a_qcow2_file_that_lacks_blocks_outlives_its_server_and_its_receiver() {
    let bench = Bench::new();
    let (receiver, mut agent) = (bench.receiver(), bench.agent());
    agent.may_complain("no stream to the receiver");
    let (mut behind, image) = Behind::qcow2(&bench);
    let disk = attach(&bench, &image);
    let mut model = Model::of_zeroes(SIZE, Vec::new());
    disk.guest_writes(&mut model, 1, 200);
    let (early, at_early) = (disk.last(), model.clone());
    disk.guest_writes(&mut model, 2, 200);
    bench.json(&["limits", "vm1", "--resync-rate", "256KiB"]);
    disk.rewind(early);
    model = at_early;
    let load = disk.load(3);
    for _ in 0..3 {
        load.goes_on(20);
        behind = behind.dies(&bench);
        load.goes_on(20);
    }
    receiver.kill();
    let _receiver = bench.receiver();
    load.goes_on(20);
    behind = behind.dies(&bench);
    model.then(load.stop());
    bench.json(&["limits", "vm1", "--resync-rate", "0"]);
    disk.whole();
    is_the_model(&bench, &disk, &model, "the early point and what came after it");
    drop(behind);
}

#[test]
fn an_image_that_lacks_blocks_says_so_where_it_can() {
    let bench = Bench::new();
    let (_receiver, _agent) = (bench.receiver(), bench.agent());
    let (behind, uri) = Behind::nbd(&bench);
    let (_, image) = Behind::qcow2(&bench);
    let stream = bench.socket("stream.sock");
    for (name, image, kind) in [("vm1", &image, "qcow2"), ("vm2", &uri, "nbd")] {
        let disk = bench.attach(name, image, &[]);
        disk.qemu_io(&["write -P 0x11 0 4M", "flush"]);
        disk.settle();
        let early = disk.last();
        disk.qemu_io(&["write -P 0x22 0 4M", "flush"]);
        disk.settle();
        bench.json(&["limits", name, "--resync-rate", "4096"]);
        let path = format!("/v1/disks/{name}/rewind");
        http::call(&bench.path("agent.sock"), "POST", &path, Some(&json!({ "to": early })));
        let status = disk.status();
        assert_eq!(status["hydration"]["point"], early, "{status}");
        let note = format!("{image}.backtide-incomplete");
        assert_eq!(Path::new(&note).exists(), kind == "qcow2");
        let refused = bench.run(&["detach", name]);
        assert_eq!(refused.code, 5, "{refused:?}");
        let detached = bench.run(&["detach", name, "--incomplete"]);
        assert!([0, 3].contains(&detached.code), "{detached:?}");
        if kind == "qcow2" {
            let refused = bench.run(&["attach", "other", image, "--receiver", &stream]);
            assert_eq!(refused.code, 5, "{refused:?}");
            assert!(refused.sentence().contains("lacks blocks"), "{refused:?}");
        } else {
            // By another name it may be another disk.
            std::os::unix::fs::symlink(bench.path("behind.sock"), bench.path("other.sock")).unwrap();
            let other = uri.replace("behind.sock", "other.sock");
            let refused = bench.run(&["attach", name, &other, "--receiver", &stream]);
            assert_eq!(refused.code, 5, "{refused:?}");
            assert!(refused.sentence().contains("lacks blocks of the image it had"), "{refused:?}");
        }
        bench.attach(name, image, &["--resync-rate", "4096"]);
        assert_eq!(disk.status()["hydration"]["point"], early);
        bench.json(&["limits", name, "--resync-rate", "0"]);
        disk.whole();
        disk.qemu_io(&["read -P 0x11 0 4M"]);
        assert!(!Path::new(&note).exists());
    }
    drop(behind);
}
