//! One image is one disk's, and nothing else's on its host, by whatever name it goes.

use std::path::Path;

use backtide_e2e::{Bench, Daemon, Held, LoopDevice, OtherHost, Said, kernel_disk, skip, tools};

const SIZE: u64 = 16 << 20;
const REFUSED: i32 = 5;

/// `O_EXCL`: of a block device, for nobody else who asks for that.
const EXCLUSIVE: i32 = 0o200;

/// Tries to attach an image.
fn attach(bench: &Bench, name: &str, image: &str) -> Said {
    bench.run(&["attach", name, image, "--receiver", &bench.socket("stream.sock")])
}

fn attaches(bench: &Bench, name: &str, image: &str) {
    let said = attach(bench, name, image);
    assert_eq!(said.code, 0, "{image}: {said:?}");
}

/// The sentence, and the way out.
fn refusal(said: &Said) -> (String, String) {
    assert_eq!(said.code, REFUSED, "{said:?}");
    assert_eq!(said.error()["code"], "locked", "{said:?}");
    (said.sentence(), said.error()["hint"].as_str().unwrap_or_default().to_owned())
}

/// Disk `name`, which is `other`, has bytes of `image`.
fn is_refused(bench: &Bench, image: &str, name: &str, other: &str) {
    let (sentence, hint) = refusal(&attach(bench, "refused", image));
    let because = format!("it has bytes of {other}, which is disk {name} of this agent");
    assert_eq!(sentence, format!("{image} is protected already: {because}"));
    assert_eq!(hint, format!("use disk {name}, or detach it first"));
}

/// Whether the kernel lets a program have a device for itself, as a mount does.
fn can_be_had_alone(device: &str) -> bool {
    use std::os::unix::fs::OpenOptionsExt;
    let alone = std::fs::File::options().read(true).custom_flags(EXCLUSIVE).open(device);
    match alone {
        Ok(_) => true,
        Err(error) if error.kind() == std::io::ErrorKind::ResourceBusy => false,
        Err(error) => panic!("{device}: {error}"),
    }
}

fn daemons(bench: &Bench) -> (Daemon, Daemon) {
    (bench.receiver(), bench.agent())
}

#[test]
fn a_file_its_loop_devices_and_their_partitions_are_one_image() {
    let bench = Bench::new();
    let image = bench.image("vm.img", SIZE);
    let devices = (|| -> Result<_, String> {
        let (whole, half) = (LoopDevice::of(&image, 512)?, LoopDevice::stretch(&image, SIZE / 2, SIZE / 2)?);
        let (first, second) = (whole.partition(1, 8, 8184)?, whole.partition(2, 16384, 8192)?);
        Ok((LoopDevice::of(whole.path().as_ref(), 512)?, whole, half, first, second))
    })();
    let (above, whole, half, first, second) = match devices {
        Ok(devices) => devices,
        Err(why) => return skip(&why),
    };
    let (_receiver, _agent) = daemons(&bench);
    let file = image.display().to_string();
    let all = [whole.path(), half.path(), &first, &second, above.path()];
    attaches(&bench, "file", &file);
    for device in all {
        is_refused(&bench, device, "file", &file);
    }
    bench.json(&["detach", "file"]);
    attaches(&bench, "first", &first);
    for image in [&file, whole.path(), above.path()] {
        is_refused(&bench, image, "first", &first);
    }
    // What lies beside it is another's.
    attaches(&bench, "half", half.path());
    is_refused(&bench, &second, "half", half.path());
    bench.json(&["detach", "half"]);
    attaches(&bench, "second", &second);
    for name in ["first", "second"] {
        bench.json(&["detach", name]);
    }
    attaches(&bench, "above", above.path());
    for image in [&file, &first, half.path()] {
        is_refused(&bench, image, "above", above.path());
    }
    bench.json(&["detach", "above"]);
}

#[test]
fn what_is_mounted_is_no_disk_and_a_disk_is_not_mounted() {
    if let Some(why) = kernel_disk::cannot_mount() {
        return skip(why);
    }
    let bench = Bench::new();
    let image = bench.image("vm.img", SIZE);
    let devices = LoopDevice::of(&image, 512).and_then(|whole| Ok((whole.partition(1, 8, 16384)?, whole)));
    let (part, whole) = match devices {
        Ok(devices) => devices,
        Err(why) => return skip(&why),
    };
    let (_receiver, _agent) = daemons(&bench);
    let (file, directory) = (image.display().to_string(), bench.name("mounted"));
    std::fs::create_dir(&directory).unwrap();
    let mount = || tools::try_run("mount", &[&part, &directory]);
    tools::run("mkfs.ext4", &["-q", &part]);
    let (mounted, said) = mount();
    assert!(mounted, "{said}");
    for (image, used) in [
        (part.as_str(), "it".to_owned()),
        (whole.path(), format!("{part}, which has bytes of it,")),
        (&file, format!("{part}, which has bytes of it,")),
    ] {
        let (sentence, hint) = refusal(&attach(&bench, "vm1", image));
        assert_eq!(sentence, format!("{image} is in use: {used} is mounted at {directory}"));
        assert_eq!(hint, format!("unmount it first: umount {directory}"));
    }
    tools::run("umount", &[&directory]);
    for (name, attached) in [("part", part.as_str()), ("whole", whole.path())] {
        attaches(&bench, name, attached);
        let (mounted, said) = mount();
        assert!(!mounted && said.contains("busy"), "{attached}: {said}");
        assert!(!can_be_had_alone(&part), "{attached}");
        // The way back is open: QEMU has no device for itself.
        tools::qemu_io(attached, &["read 0 4k"]);
        bench.json(&["detach", name]);
        assert!(can_be_had_alone(&part), "{attached}");
    }
    let (mounted, said) = mount();
    tools::run("umount", &[&directory]);
    assert!(mounted, "{said}");
}

#[test]
fn what_the_host_swaps_to_is_no_disk() {
    let bench = Bench::new();
    let image = bench.image("vm.img", SIZE);
    let device = match LoopDevice::of(&image, 512) {
        Ok(device) => device,
        Err(why) => return skip(&why),
    };
    tools::run("mkswap", &[device.path()]);
    if let (false, why) = tools::try_run("swapon", &[device.path()]) {
        return skip(&format!("no swap here: {why}"));
    }
    let (_receiver, _agent) = daemons(&bench);
    let said = attach(&bench, "vm1", device.path());
    tools::run("swapoff", &[device.path()]);
    let (sentence, hint) = refusal(&said);
    assert_eq!(sentence, format!("{} is in use: it is what the host swaps to", device.path()));
    assert!(hint.contains("swapoff"), "{hint}");
    attaches(&bench, "vm1", device.path());
    let (swaps, _) = tools::try_run("swapon", &[device.path()]);
    bench.json(&["detach", "vm1"]);
    assert!(!swaps, "the host swaps to a disk");
}

#[test]
fn another_agent_has_no_image_of_this_one() {
    let bench = Bench::new();
    let image = bench.image("vm.img", SIZE);
    let devices = LoopDevice::of(&image, 512).and_then(|whole| {
        Ok((
            LoopDevice::stretch(&image, 0, SIZE / 2)?,
            LoopDevice::stretch(&image, SIZE / 2, SIZE / 2)?,
            whole,
        ))
    });
    let (first, second, whole) = match devices {
        Ok(devices) => devices,
        Err(why) => return skip(&why),
    };
    let (_receiver, agent) = daemons(&bench);
    let (other, _other_agent) = OtherHost::start(&bench);
    let stream = bench.socket("stream.sock");
    let elsewhere = |image: &str| other.run(&["attach", "there", image, "--receiver", &stream]);
    let this = format!("process {} (", agent.id());
    let file = image.display().to_string();
    attaches(&bench, "vm1", &file);
    for device in [whole.path(), first.path()] {
        let (sentence, hint) = refusal(&elsewhere(device));
        assert!(sentence.starts_with(&format!("{device} is locked by {this}")), "{sentence}");
        assert_eq!(hint, "detach it from the other agent first");
    }
    bench.json(&["detach", "vm1"]);
    attaches(&bench, "first", first.path());
    let alias = bench.name("alias");
    tools::run("cp", &["-a", first.path(), &alias]);
    for image in [&file, whole.path(), first.path(), &alias] {
        let (sentence, _) = refusal(&elsewhere(image));
        let told = sentence.contains(&this) || sentence.contains("is opened exclusively");
        assert!(sentence.starts_with(image) && told, "{sentence}");
    }
    let beside = elsewhere(second.path());
    assert_eq!(beside.code, 0, "the other half is another image: {beside:?}");
    let detached = other.run(&["detach", "there"]);
    assert_eq!(detached.code, 0, "{detached:?}");
    bench.json(&["detach", "first"]);
}

#[test]
fn a_device_stays_a_disk_over_restarts_deaths_and_rewinds_of_its_agent() {
    let bench = Bench::new();
    let image = bench.image("vm.img", SIZE);
    let device = match LoopDevice::of(&image, 512) {
        Ok(device) => device,
        Err(why) => return skip(&why),
    };
    let _receiver = bench.receiver();
    let held = Held::dying(&bench);
    std::os::unix::fs::symlink(device.path(), bench.path("vm1.img")).unwrap();
    let disk = bench.attach("vm1", "vm1.img", &[]);
    disk.qemu_io(&["write -P 0x11 0 64k"]);
    disk.settle();
    let point = disk.last();
    let is_held = |after: &str| {
        disk.settle();
        assert!(!can_be_had_alone(device.path()), "{after}");
    };
    is_held("an attach");
    bench.json(&["agent", "restart"]);
    is_held("a restart");
    for _ in 0..3 {
        let agent = held.agent();
        held.kill_agent();
        while held.agent().is_none() || held.agent() == agent {
            std::thread::yield_now();
        }
        disk.until("attached again", |status| status["mode"] != "detached");
        is_held("a death");
    }
    disk.qemu_io(&["write -P 0x22 0 64k"]);
    disk.settle();
    disk.rewind(point);
    disk.qemu_io(&["read -P 0x11 0 64k"]);
    is_held("a rewind");
    bench.json(&["detach", "vm1"]);
    assert!(can_be_had_alone(device.path()), "a detach");
    assert_eq!(held.stop(), 0);
    assert!(Path::new(device.path()).exists());
}

#[test]
fn what_is_mounted_beside_a_disk_takes_it_from_nobody_at_a_restart() {
    if let Some(why) = kernel_disk::cannot_mount() {
        return skip(why);
    }
    let bench = Bench::new();
    let image = bench.image("vm1.img", SIZE);
    let (_receiver, mut agent) = daemons(&bench);
    agent.may_complain("which has bytes of it, is mounted");
    let (file, directory) = (image.display().to_string(), bench.name("mounted"));
    std::fs::create_dir(&directory).unwrap();
    tools::run("mkfs.ext4", &["-q", &file]);
    let mount = |options: &str| tools::try_run("mount", &["-o", options, &file, &directory]);
    if let (false, why) = mount("loop,ro,noload") {
        return skip(&format!("no loop device here: {why}"));
    }
    // Nothing is written that way.
    let disk = bench.attach("vm1", "vm1.img", &[]);
    bench.json(&["agent", "restart"]);
    disk.until("in sync", |status| status["mode"] == "sync" && status["local_error"].is_null());
    tools::run("umount", &[&directory]);
    let (mounted, why) = mount("loop");
    assert!(mounted, "{why}");
    bench.json(&["agent", "restart"]);
    let told = disk.status()["local_error"].as_str().unwrap_or_default().to_owned();
    let why = format!("is mounted at {directory}: what that writes is in no point of the disk");
    assert!(told.contains(&why), "{told}");
    disk.qemu_io(&["read 0 4k"]);
    tools::run("umount", &[&directory]);
    disk.until("nothing is told any more", |status| status["local_error"].is_null());
    // The next program would not get an image that the host uses itself.
    let size = SIZE.to_string();
    let swaps = tools::try_run("fallocate", &["-l", &size, &file]).0
        && tools::try_run("mkswap", &[&file]).0
        && tools::try_run("swapon", &[&file]).0;
    if !swaps {
        return skip("no swap to a file here");
    }
    let refused = bench.run(&["agent", "restart"]);
    let goes_on = disk.status()["mode"] != "detached";
    tools::run("swapoff", &[&file]);
    assert_eq!(refused.code, REFUSED, "{refused:?}");
    let expected =
        format!("disk vm1 could not be attached again: {file} is in use: it is what the host swaps to");
    assert_eq!(refused.sentence(), expected);
    assert!(goes_on, "it is served as before");
}

#[test]
fn what_an_overlay_reads_is_no_other_disk() {
    let bench = Bench::new();
    let base = bench.image("base.img", SIZE).display().to_string();
    let [first, second, data, with_data] =
        ["a.qcow2", "b.qcow2", "data.raw", "c.qcow2"].map(|name| bench.name(name));
    for overlay in [&first, &second] {
        tools::run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", &base, "-F", "raw", overlay]);
    }
    let (option, size) = (format!("data_file={data}"), SIZE.to_string());
    tools::run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", &option, &with_data, &size]);
    let (_receiver, _agent) = daemons(&bench);
    attaches(&bench, "base", &base);
    is_refused(&bench, &first, "base", &base);
    bench.json(&["detach", "base"]);
    for (name, image) in [("first", &first), ("second", &second), ("data", &with_data)] {
        attaches(&bench, name, image);
    }
    let (sentence, _) = refusal(&attach(&bench, "base", &base));
    assert!(sentence.contains("it has bytes of"), "{sentence}");
    is_refused(&bench, &data, "data", &with_data);
    let (other, _other_agent) = OtherHost::start(&bench);
    let (sentence, _) =
        refusal(&other.run(&["attach", "there", &base, "--receiver", &bench.socket("stream.sock")]));
    assert!(sentence.starts_with(&format!("{base} is locked by ")), "{sentence}");
    bench.json(&["agent", "restart"]);
    for name in ["first", "second", "data"] {
        bench.disk(name).until("in sync", |status| status["mode"] == "sync");
        bench.json(&["detach", name]);
    }
    attaches(&bench, "base", &base);
    bench.json(&["detach", "base"]);
}
