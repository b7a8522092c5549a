//! `backtide rewind` as a person uses it: it says what it will do, asks, refuses a disk under a guest that runs, and
//! tells how to take it back.

use std::{path::Path, process::Stdio};

use backtide_e2e::{Bench, Disk, Load, qmp::qmp, skip, tools};
use serde_json::{Value, json};

const SIZE: u64 = 8 << 20;

/// Two points: before, where the disk has the first pattern, and now.
fn two_points(disk: &Disk<'_>) -> (u64, u64) {
    disk.qemu_io(&["write -P 0x11 0 1M", "flush"]);
    disk.settle();
    let early = disk.last();
    disk.qemu_io(&["write -P 0x22 512k 1M", "flush"]);
    disk.settle();
    (early, disk.last())
}

#[test]
fn a_disk_goes_back_by_command_when_somebody_agrees() {
    let bench = Bench::new();
    let (_receiver, _agent, disk) = bench.protected(SIZE, &[]);
    let (early, late) = two_points(&disk);
    let to = format!("lsn:{early}");
    // Nobody to ask: it says what it would do, and does nothing.
    let unasked = bench.plain(&["rewind", "vm1", "--to", &to]);
    assert_eq!(unasked.code, 2, "{unasked:?}");
    for part in [format!("lsn:{late}"), to.clone(), "1.0 MiB".to_owned(), "--yes".to_owned()] {
        assert!(unasked.stderr.contains(&part), "{part}: {unasked:?}");
    }
    disk.qemu_io(&["read -P 0x22 512k 1M"]);

    let done = bench.plain(&["rewind", "vm1", "--to", &to, "--yes", "--wait"]);
    assert_eq!(done.code, 0, "{done:?}");
    let undo = format!("backtide rewind vm1 --to lsn:{late}");
    assert!(done.stdout.contains(&undo), "{done:?}");
    disk.qemu_io(&["read -P 0x11 0 1M", "read -P 0 1M 512k"]);
    assert_eq!(disk.status()["hydration"], Value::Null);
    disk.settle();
    disk.latest_is_the_image();

    let undone = bench.json(&["rewind", "vm1", "--to", &format!("lsn:{late}"), "--yes", "--wait"]);
    assert_eq!((&undone["to"], &undone["guest_paused"]), (&json!(late), &json!(false)), "{undone}");
    disk.qemu_io(&["read -P 0x11 0 512k", "read -P 0x22 512k 1M"]);
    disk.settle();
    disk.latest_is_the_image();
}

#[test]
fn what_a_rewind_cannot_do_has_an_exit_code_and_a_reason() {
    let bench = Bench::new();
    let (receiver, _agent, disk) = bench.protected(SIZE, &[]);
    let (early, late) = two_points(&disk);
    let to = format!("lsn:{early}");
    let refused = |code: i32, arguments: &[&str], part: &str| {
        let said = bench.run(&[&["rewind", "vm1", "--yes"], arguments].concat());
        assert_eq!(said.code, code, "{arguments:?}: {said:?}");
        assert!(said.sentence().contains(part), "{arguments:?}: {said:?}");
    };
    refused(4, &["--to", "mark:never"], "never");
    refused(2, &["--to", &to, "--live"], "--qmp");
    refused(6, &["--to", &to, "--live", "--qmp", &bench.name("no.sock")], "QMP");
    let guest = Load::start(&disk.uri(), 1);
    guest.goes_on(5);
    refused(5, &["--to", &to], "in use");
    let _written = guest.stop();
    let gone = bench.run(&["rewind", "vm2", "--yes", "--to", &to]);
    assert_eq!(gone.code, 4, "{gone:?}");
    receiver.kill();
    refused(6, &["--to", &to], "receiver");
    assert!(disk.last() > late && disk.status()["hydration"].is_null());
}

#[test]
fn a_machine_that_has_the_disk_open_is_paused_for_it_and_stays_so() {
    if !tools::is_there("qemu-system-x86_64") {
        return skip("there is no qemu-system-x86_64, which is in the Debian package qemu-system-x86");
    }
    let bench = Bench::new();
    let (_receiver, _agent, disk) = bench.protected(SIZE, &[]);
    let (early, _) = two_points(&disk);
    let uri = disk.uri();
    let served = uri.split_once("socket=").expect("a unix socket").1.to_owned();
    let socket = |name: &str| (bench.path(name), format!("unix:{},server=on,wait=off", bench.name(name)));
    let ((with, with_address), (without, without_address)) = (socket("with.qmp"), socket("without.qmp"));
    let server = json!({ "driver": "nbd", "node-name": "d0", "export": "vm1", "reconnect-delay": 60,
                         "server": { "type": "unix", "path": served } })
    .to_string();
    let nothing = ["-machine", "none", "-nodefaults", "-no-user-config", "-display", "none", "-qmp"];
    let _other = tools::Beside::start("qemu-system-x86_64", &[&nothing[..], &[&without_address]].concat());
    let arguments = [&nothing[..], &[&with_address, "-blockdev", &server]].concat();
    let _machine = tools::Beside::start("qemu-system-x86_64", &arguments);
    tools::wait_for_socket(&with);
    tools::wait_for_socket(&without);
    disk.until("opened by QEMU", |status| status["clients"] == 1);

    let to = format!("lsn:{early}");
    let rewind = |qmp: &Path, rest: &[&str]| {
        let socket = qmp.to_str().unwrap();
        bench.run(&[&["rewind", "vm1", "--to", &to, "--yes", "--live", "--qmp", socket], rest].concat())
    };
    // Another machine, which is left alone.
    let refused = rewind(&without, &[]);
    assert_eq!(refused.code, 5, "{refused:?}");
    let running = json!({ "execute": "query-status" });
    assert_eq!(qmp(&without, std::slice::from_ref(&running))[0]["running"], true);

    let done = rewind(&with, &["--wait"]);
    assert_eq!(done.code, 0, "{done:?}");
    let report: Value = serde_json::from_str(&done.stdout).unwrap();
    assert_eq!((&report["guest_paused"], &report["hung_up"]), (&json!(true), &json!(1)), "{report}");
    let read = |command: &str| {
        let arguments = json!({ "command-line": format!("qemu-io d0 \"{command}\"") });
        json!({ "execute": "human-monitor-command", "arguments": arguments })
    };
    let answers = qmp(
        &with,
        &[
            running.clone(),
            json!({ "execute": "system_reset" }),
            json!({ "execute": "cont" }),
            running,
            // The machine has connected again, to the disk as it was.
            read("read -P 0x11 0 1M"),
            read("read -P 0 1M 512k"),
        ],
    );
    assert_eq!((&answers[0]["running"], &answers[3]["running"]), (&json!(false), &json!(true)));
    for said in &answers[4..] {
        assert!(!said.to_string().contains("failed"), "{said}");
    }
}

/// A machine without a guest whose disk is `vm1` of the NBD server at `served`, with two monitors.
fn machine(bench: &Bench, served: &str) -> (tools::Beside, [std::path::PathBuf; 2]) {
    let server = json!({ "driver": "nbd", "node-name": "d0", "export": "vm1", "reconnect-delay": 60,
                         "server": { "type": "unix", "path": served } })
    .to_string();
    let monitors = ["one.qmp", "two.qmp"].map(|name| bench.path(name));
    let addresses = monitors.each_ref().map(|path| format!("unix:{},server=on,wait=off", path.display()));
    let nothing = ["-machine", "none", "-nodefaults", "-no-user-config", "-display", "none"];
    let own = ["-blockdev", &server, "-qmp", &addresses[0], "-qmp", &addresses[1]];
    let machine = tools::Beside::start("qemu-system-x86_64", &[&nothing[..], &own].concat());
    monitors.iter().for_each(|monitor| tools::wait_for_socket(monitor));
    (machine, monitors)
}

#[test]
fn a_guest_that_an_interrupted_rewind_leaves_paused_is_told_of() {
    if !tools::is_there("qemu-system-x86_64") {
        return skip("there is no qemu-system-x86_64, which is in the Debian package qemu-system-x86");
    }
    let bench = Bench::new();
    let shared = format!("nbd+unix:///?socket={}", bench.name("all.nbd"));
    let receiver = bench.receiver();
    let _agent = bench.daemon(&["agent", "run", "--nbd-listen", &shared]);
    bench.image("vm1.img", SIZE);
    let disk = bench.attach("vm1", "vm1.img", &[]);
    disk.wait("sync");
    let (early, _) = two_points(&disk);
    let (_machine, [given, watched]) = machine(&bench, &bench.name("all.nbd"));
    disk.until("opened by QEMU", |status| status["clients"] == 1);

    let to = format!("lsn:{early}");
    let query = json!({ "execute": "query-status" });
    let runs = || qmp(&watched, std::slice::from_ref(&query))[0]["running"] == true;
    // One may have come to its end before its receiver stands still: then the next is tried.
    for _ in 0..20 {
        let mut command =
            bench.command(&["rewind", "vm1", "--to", &to, "--yes", "--live", "--wait", "--qmp"]);
        let mut rewinding = command.arg(&given).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        while runs() && rewinding.try_wait().unwrap().is_none() {
            std::thread::yield_now();
        }
        receiver.signal("STOP");
        tools::run("kill", &["-s", "INT", &rewinding.id().to_string()]);
        let ended = rewinding.wait_with_output().unwrap();
        let said = String::from_utf8(ended.stderr).unwrap();
        receiver.signal("CONT");
        assert!(!runs(), "nobody has let it go on");
        if ended.status.code() == Some(130) {
            assert!(said.contains("the guest is paused") && said.contains("system_reset"), "{said}");
            return;
        }
        assert_eq!(ended.status.code(), Some(0), "{said}");
        disk.whole();
        qmp(&watched, &[json!({ "execute": "cont" })]);
    }
    panic!("each rewind was faster than its receiver's end");
}
