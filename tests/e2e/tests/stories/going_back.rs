//! Any moment, exactly: many points against the model, marks over disks, mounts while writes go on.

use backtide_e2e::{Bench, tools};

const SIZE: u64 = 32 << 20;

/// The same points every time, spread at random.
fn some_of(count: usize, of: usize, seed: u64) -> Vec<usize> {
    let mut state = seed;
    let mut next = move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(state >> 33).unwrap()
    };
    (0..count).map(|_| next() % (of + 1)).collect()
}

#[test]
fn each_of_fifty_random_points_is_what_the_guest_had_written() {
    let bench = Bench::new();
    // Small segments, so that points lie in sealed ones, in the open one and on the seams.
    let (_receiver, _agent) = (bench.receiver_with("[limits]\nsegment_bytes = 4194304\n"), bench.agent());
    bench.image("vm1.img", SIZE);
    let disk = bench.attach("vm1", "vm1.img", &[]);
    disk.wait("sync");
    let before = disk.last();
    let load = disk.load(11);
    load.goes_on(1000);
    let model = load.stop().model();
    disk.settle();
    assert_eq!(disk.last(), before + model.len() as u64, "one LSN for each write");
    for count in some_of(50, model.len(), 5) {
        disk.point_is_the_model(before, count, &model);
    }
    disk.latest_is_the_image();
}

#[test]
fn a_mark_is_one_instant_of_two_disks() {
    let bench = Bench::new();
    let (_receiver, _agent) = (bench.receiver(), bench.agent());
    for image in ["data.img", "log.img"] {
        bench.image(image, SIZE);
    }
    let (data, log) = (bench.attach("data", "data.img", &[]), bench.attach("log", "log.img", &[]));
    data.wait("sync");
    log.wait("sync");
    // A guest writes number N to its log, and when that is acknowledged to its data: at no instant
    // do the data know a number that the log does not.
    numbers_in_step(&log.uri(), &data.uri(), |numbers| {
        for label in ["a", "b", "c", "d", "e"] {
            numbers.goes_on();
            let marks = bench.json(&["mark", label, "data", "log"]);
            assert!(
                marks["marks"].as_array().unwrap().iter().all(|mark| mark["recoverable"] == true),
                "{marks}"
            );
        }
    });
    data.settle();
    log.settle();
    for label in ["a", "b", "c", "d", "e"] {
        let number = |disk: &backtide_e2e::Disk<'_>| {
            let file = std::fs::read(disk.restore(&format!("mark:{label}"))).unwrap();
            u64::from_le_bytes(file[..8].try_into().unwrap())
        };
        let (in_log, in_data) = (number(&log), number(&data));
        assert!(in_log == in_data || in_log == in_data + 1, "mark {label}: log {in_log}, data {in_data}");
    }
}

/// Writes 1, 2, 3, ... to the first sector of the log and then of the data, until `during` is over.
fn numbers_in_step(log: &str, data: &str, during: impl FnOnce(&mut InStep)) {
    let mut in_step = InStep::start(log, data);
    during(&mut in_step);
    in_step.stop();
}

/// The guest of two disks.
struct InStep {
    thread: std::thread::JoinHandle<()>,
    stop: std::sync::Arc<std::sync::atomic::AtomicBool>,
    numbers: std::sync::mpsc::Receiver<u64>,
}

impl InStep {
    fn start(log: &str, data: &str) -> Self {
        use std::sync::{Arc, atomic::AtomicBool, atomic::Ordering, mpsc};
        let (mut log, mut data) = (backtide_e2e::Guest::connect(log), backtide_e2e::Guest::connect(data));
        let stop = Arc::new(AtomicBool::new(false));
        let (told, numbers) = mpsc::channel();
        let asked = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            for number in 1_u64.. {
                let mut sector = vec![0; 512];
                sector[..8].copy_from_slice(&number.to_le_bytes());
                log.write(0, &sector).unwrap();
                data.write(0, &sector).unwrap();
                // Nobody may be interested any more.
                let _ = told.send(number);
                if asked.load(Ordering::Relaxed) {
                    return;
                }
            }
        });
        Self { thread, stop, numbers }
    }

    fn goes_on(&mut self) {
        let seen = self.numbers.try_iter().last().unwrap_or(0);
        while self.numbers.recv().unwrap() < seen + 20 {}
    }

    fn stop(self) {
        self.stop.store(true, std::sync::atomic::Ordering::Relaxed);
        self.thread.join().unwrap();
    }
}

#[test]
fn a_mounted_point_stays_what_it_was_while_the_guest_writes() {
    let bench = Bench::new();
    let (_receiver, _agent, disk) = bench.protected(SIZE, &[]);
    let load = disk.load(3);
    load.goes_on(100);
    bench.json(&["mark", "here", "vm1"]);
    disk.wait("durable");
    let mount = bench.json(&["mount", "vm1", "--at", "mark:here"]);
    let (id, uri) = (mount["id"].as_str().unwrap(), mount["uri"].as_str().unwrap());
    let first = bench.name("first.img");
    tools::run("nbdcopy", &[uri, &first]);
    load.goes_on(300);
    tools::assert_same(&first, uri);
    let model = load.stop().model();
    let at = mount["lsn"].as_u64().unwrap();
    let count = model.len() - usize::try_from(disk.last() - at).unwrap();
    model.assert_is_in(first.as_ref(), count, "the mount");

    let info = tools::run("nbdinfo", &["--json", uri]);
    assert!(info.contains("\"is_read_only\": true"), "{info}");
    let (written, said) = tools::try_run("qemu-io", &["-f", "raw", uri, "-c", "write 0 4k"]);
    assert!(!written || said.contains("failed"), "a mount is read-only: {said}");
    let (written, said) = tools::try_run("nbdcopy", &[&first, uri]);
    assert!(!written, "a mount is read-only: {said}");

    assert_eq!(bench.json(&["mount"])["mounts"].as_array().unwrap().len(), 1);
    bench.json(&["unmount", id]);
    assert_eq!(bench.json(&["mount"])["mounts"], serde_json::json!([]));
    assert!(!tools::try_run("nbdinfo", &[uri]).0, "nothing is served after unmount");
    assert_eq!(bench.run(&["unmount", id]).code, 4);
}

#[test]
fn a_restore_to_an_nbd_server_gives_any_format() {
    let bench = Bench::new();
    let (_receiver, _agent, disk) = bench.protected(SIZE, &[]);
    let load = disk.load(4);
    load.goes_on(100);
    load.stop();
    disk.settle();
    let (target, socket) = (bench.name("target.qcow2"), bench.name("target.sock"));
    tools::run("qemu-img", &["create", "-q", "-f", "qcow2", &target, &SIZE.to_string()]);
    let server = tools::Beside::start("qemu-nbd", &["-f", "qcow2", "-t", "-k", &socket, &target]);
    tools::wait_for_socket(socket.as_ref());
    let output = format!("nbd+unix:///?socket={socket}");
    let report = bench.json(&["restore", "vm1", "--at", "latest", "--output", &output]);
    assert_eq!(report["verified"], true, "{report}");
    drop(server);
    let (same, said) =
        tools::try_run("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", &disk.image, &target]);
    assert!(same, "{said}");
}

#[test]
fn times_find_what_was_written_before_them() {
    let bench = Bench::new();
    let (_receiver, _agent, disk) = bench.protected(SIZE, &[]);
    disk.qemu_io(&["write -P 0x11 0 64k"]);
    disk.settle();
    let then = tools::run("date", &["--iso-8601=ns"]).trim().replace(',', ".");
    std::fs::copy(&disk.image, bench.path("then.img")).unwrap();
    disk.qemu_io(&["write -P 0x22 0 64k"]);
    disk.settle();
    tools::assert_same_images(&bench.path("then.img"), &disk.restore(&then));
    tools::assert_same_images(disk.image.as_ref(), &disk.restore("-0s"));
    let changes = bench.json(&["diff", "vm1", "--from", &then, "--to", "latest"]);
    assert_eq!(changes["ranges"], serde_json::json!([{"offset": 0, "length": 65536}]), "{changes}");
}

#[test]
fn a_restore_never_goes_into_a_store_and_tells_of_a_killed_one() {
    let bench = Bench::new();
    let (_receiver, _agent, disk) = bench.protected(1 << 20, &[]);
    disk.qemu_io(&["write -P 0x11 0 64k"]);
    disk.settle();
    let restore = |output: &str, more: &[&str]| {
        let command = ["restore", "vm1", "--at", "latest", "--output", output];
        bench.plain(&[&command, more].concat())
    };
    for name in ["store/store.json", "store/disks/new.img"] {
        for force in [&["--force"][..], &[]] {
            let said = restore(&bench.name(name), force);
            assert_eq!(said.code, 5, "{name}: {said:?}");
        }
        let said = restore(&bench.name(name), &["--force"]);
        assert!(said.stderr.contains("lies in a receiver's store"), "{name}: {said:?}");
    }
    // What a restore leaves that was killed.
    let partial = bench.path(".out.img.Ab3dEf.restoring");
    std::fs::write(&partial, b"half").unwrap();
    let notes = bench.path(".out.img.Ab3dEf.restoring.notes");
    std::fs::write(&notes, b"none that can be read").unwrap();
    let output = bench.name("out.img");
    let held = std::fs::File::open(&partial).unwrap();
    held.lock().unwrap();
    let said = restore(&output, &[]);
    assert_eq!(said.code, 5, "{said:?}");
    assert!(said.stderr.contains("another restore to") && said.stderr.contains("is under way"), "{said:?}");
    drop(held);
    let said = restore(&output, &[]);
    assert_eq!(said.code, 0, "{said:?}");
    assert!(said.stderr.contains("was killed and left it half done"), "{said:?}");
    assert!(!partial.exists() && !notes.exists());
    disk.latest_is_the_image();
}

#[test]
fn a_restore_killed_at_any_moment_is_gone_on_with() {
    let bench = Bench::new();
    let (_receiver, _agent, disk) = bench.protected(SIZE, &[]);
    disk.qemu_io(&["write -P 0x11 0 24M", "write -P 0x22 28M 1M"]);
    disk.settle();
    let output = bench.name("out.img");
    let command = ["restore", "vm1", "--at", "latest", "--output", &output];
    let mut killed = 0;
    for pieces in [0_u64, 5, 12, 20] {
        let mut child = bench.command(&command).stdout(std::process::Stdio::null()).spawn().unwrap();
        let noted = || {
            let entries = std::fs::read_dir(bench.path("")).unwrap().flatten();
            let notes = entries.filter(|entry| entry.path().to_string_lossy().ends_with(".restoring.notes"));
            notes.filter_map(|entry| entry.metadata().ok()).map(|found| found.len()).max()
        };
        // It may have come to its end before it is killed: then that is what was tried.
        while noted().is_none_or(|length| length < 52 + pieces * 44) && child.try_wait().unwrap().is_none() {}
        child.kill().unwrap();
        child.wait().unwrap();
        if std::fs::exists(&output).unwrap() {
            tools::assert_same_images(disk.image.as_ref(), output.as_ref());
            std::fs::remove_file(&output).unwrap();
        } else {
            killed += 1;
        }
    }
    let report = bench.json(&command);
    assert_eq!(report["verified"], true, "{report}");
    tools::assert_same_images(disk.image.as_ref(), output.as_ref());
    let names: Vec<_> = std::fs::read_dir(bench.path("")).unwrap().flatten().map(|e| e.file_name()).collect();
    let left = names.iter().any(|name| name.to_string_lossy().contains(".restoring"));
    assert!(!left, "killed {killed} times: {names:?}");
    // Onto an old copy only what differs is written.
    disk.qemu_io(&["write -P 0x33 2M 64k"]);
    disk.settle();
    let refused = bench.run(&[&command[..], &["--only-changed"]].concat());
    assert_eq!(refused.code, 5, "{refused:?}");
    let report = bench.json(&[&command[..], &["--only-changed", "--force"]].concat());
    assert_eq!(report["data_bytes"], 65536, "{report}");
    tools::assert_same_images(disk.image.as_ref(), output.as_ref());
}
