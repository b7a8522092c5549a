//! Restores: to a block device, and with a receiver that dies on the way.

use std::{
    fs,
    os::unix::fs::FileExt,
    process::{Child, Stdio},
};

use backtide_e2e::{Bench, Daemon, LoopDevice, skip, tools};

const SIZE: u64 = 32 << 20;

/// Bytes of the device behind the point.
const BEHIND: u64 = 1 << 20;

/// Exit codes of `backtide`.
const REFUSED: i32 = 5;
const UNREACHABLE: i32 = 6;

#[test]
fn a_restore_to_a_block_device_is_the_point_and_keeps_what_lies_behind() {
    let bench = Bench::new();
    let files = [("large.img", SIZE + BEHIND), ("small.img", SIZE - 4096)];
    let files = files.map(|(name, bytes)| bench.image(name, bytes));
    for file in &files {
        let old = vec![0xee; usize::try_from(file.metadata().unwrap().len()).unwrap()];
        fs::write(file, old).unwrap();
    }
    let [large, small] = match files.each_ref().map(|file| LoopDevice::of(file, 512)) {
        [Ok(large), Ok(small)] => [large, small],
        [Err(why), _] | [_, Err(why)] => return skip(&why),
    };
    let (_receiver, _agent, disk) = bench.protected(SIZE, &[]);
    disk.qemu_io(&["write -P 0x11 0 5M", "write -P 0x22 9M 64k"]);
    disk.settle();
    let restore = |device: &LoopDevice, more: &[&str]| {
        let command = ["restore", "vm1", "--at", "latest", "--output", device.path()];
        bench.run(&[&command, more].concat())
    };
    let refused = restore(&large, &[]);
    assert!(refused.code != 0 && refused.sentence().contains("exists already"), "{refused:?}");
    let refused = restore(&small, &["--force"]);
    assert_eq!(refused.code, REFUSED, "{refused:?}");
    for file in &files {
        assert!(
            fs::read(file).unwrap().iter().all(|&byte| byte == 0xee),
            "refused, and changed all the same"
        );
    }
    let is_the_disk = || {
        let content = fs::read(large.path()).unwrap();
        let (disk_part, behind) = content.split_at(usize::try_from(SIZE).unwrap());
        assert!(disk_part == fs::read(&disk.image).unwrap(), "the device differs from the disk");
        assert!(behind.iter().all(|&byte| byte == 0xee), "what lies behind the point is kept");
    };
    let report = bench.json(&["restore", "vm1", "--at", "latest", "--output", large.path(), "--force"]);
    assert_eq!(report["verified"], true, "{report}");
    is_the_disk();
    // And onto an old copy, where only what differs is written.
    fs::File::options().write(true).open(large.path()).unwrap().write_all_at(&[9; 512], 9 << 20).unwrap();
    let said = restore(&large, &["--force", "--only-changed"]);
    assert_eq!(said.code, 0, "{said:?}");
    is_the_disk();
}

#[test]
fn a_restore_whose_receiver_dies_is_gone_on_with_when_it_is_back() {
    is_gone_on_with(Daemon::kill);
}

#[test]
fn a_restore_whose_receiver_is_stopped_is_gone_on_with_when_it_is_back() {
    is_gone_on_with(|receiver| assert_eq!(receiver.stop(), 0));
}

fn is_gone_on_with(end: fn(Daemon)) {
    let bench = Bench::new();
    let (mut receiver, _agent, disk) = bench.protected(SIZE, &[]);
    disk.qemu_io(&["write -P 0x11 0 24M", "write -P 0x22 28M 1M"]);
    disk.settle();
    let at = format!("lsn:{}", disk.last());
    let output = bench.name("out.img");
    let command = ["restore", "vm1", "--at", &at, "--output", &output];
    let mut interrupted = false;
    // One may have come to its end before its receiver is dead: then the next is tried.
    for _ in 0..50 {
        let mut child = bench.command(&command).stdout(Stdio::null()).spawn().unwrap();
        while notes(&bench).is_none_or(|length| length < 200) && child.try_wait().unwrap().is_none() {
            std::thread::yield_now();
        }
        end(receiver);
        let code = ended(&mut child);
        receiver = bench.receiver();
        interrupted = code == UNREACHABLE && notes(&bench).is_some();
        if interrupted {
            break;
        }
        assert_eq!(code, 0, "neither whole nor told that its receiver is gone");
        fs::remove_file(&output).unwrap();
    }
    assert!(interrupted, "each restore was faster than its receiver's end");
    assert!(!fs::exists(&output).unwrap(), "a half restore has the name of a whole one");
    let report = bench.json(&command);
    assert_eq!(report["verified"], true, "{report}");
    assert!(report["resumed_bytes"].as_u64() > Some(0), "{report}");
    tools::assert_same_images(disk.image.as_ref(), output.as_ref());
    assert_eq!(notes(&bench), None);
    // A name that no file can have is refused before anything is copied.
    let refused = bench.run(&["restore", "vm1", "--at", &at, "--output", &bench.name("none/")]);
    assert_eq!(refused.code, 2, "{refused:?}");
    assert!(!fs::exists(bench.path("none")).unwrap());
}

/// The length of the notes of what an unfinished restore has done.
fn notes(bench: &Bench) -> Option<u64> {
    let entries = fs::read_dir(bench.path("")).unwrap().flatten();
    let notes = entries.filter(|entry| entry.path().to_string_lossy().ends_with(".restoring.notes"));
    notes.filter_map(|entry| entry.metadata().ok()).map(|found| found.len()).max()
}

fn ended(child: &mut Child) -> i32 {
    child.wait().unwrap().code().expect("an exit code")
}

#[test]
fn a_restore_replaces_no_image_that_a_qemu_has_open() {
    let bench = Bench::new();
    let (_receiver, _agent, disk) = bench.protected(SIZE, &[]);
    disk.qemu_io(&["write -P 0x11 0 1M"]);
    disk.settle();
    let (image, socket) = (bench.image("used.img", SIZE), bench.name("used.sock"));
    let image = image.to_str().unwrap();
    let server = tools::Beside::start("qemu-nbd", &["-f", "raw", "-t", "-k", &socket, image]);
    tools::wait_for_socket(socket.as_ref());
    let restore = ["restore", "vm1", "--at", "latest", "--output", image, "--force"];
    for more in [&[][..], &["--only-changed"]] {
        let said = bench.run(&[&restore[..], more].concat());
        assert_eq!((said.code, said.error()["code"].as_str()), (5, Some("locked")), "{said:?}");
        assert!(said.sentence().contains("a QEMU has it open to write"), "{said:?}");
    }
    tools::qemu_io(&format!("nbd+unix:///?socket={socket}"), &["read -P 0 0 32M"]);
    drop(server);
    bench.json(&restore);
    tools::assert_same(&disk.image, image);
}
