//! Images that have bytes in common, and those that something else uses, on a host made up of directories.

use std::fs::File;

use rustix::fs::{FlockOperation, flock};

use super::{
    hold::{Hold, InUse, Standing},
    identity::Identity,
    made_up::MadeUp,
};

fn overlap(one: &Identity, other: &Identity) -> bool {
    assert_eq!(one.overlaps(other), other.overlaps(one), "it is the same the other way round");
    one.overlaps(other)
}

/// Two disks, of which the first has two partitions.
fn partitioned() -> MadeUp {
    let host = MadeUp::new();
    host.disk("sda", "8:0");
    host.partition("sda", "sda1", "8:1", (8, 100));
    host.partition("sda", "sda2", "8:2", (108, 500));
    host.disk("sdb", "8:16");
    host
}

#[test]
fn a_partition_is_a_part_of_its_disk_and_of_no_other() {
    let host = partitioned();
    let whole = host.of_device("sda", "8:0");
    let [first, second] = ["1", "2"].map(|n| host.of_device(&format!("sda{n}"), &format!("8:{n}")));
    assert!(overlap(&whole, &first) && overlap(&whole, &second));
    assert!(!overlap(&first, &second), "they lie side by side");
    assert!(overlap(&first, &host.of_device("by-id/first", "8:1")), "another name of it");
    let other = host.of_device("sdb", "8:16");
    assert!(!overlap(&whole, &other) && !overlap(&first, &other));
}

#[test]
fn a_loop_device_is_the_stretch_of_its_file_that_it_lies_on() {
    let host = MadeUp::new();
    let (image, other) = (host.image("vm.img"), host.image("other.img"));
    host.looped("loop0", "7:0", &image, 0, 0);
    host.looped("loop1", "7:1", &image, 0, 4096);
    host.looped("loop2", "7:2", &image, 4096, 4096);
    host.looped("loop3", "7:3", &image, 8191, 0);
    host.looped("loop4", "7:4", &other, 0, 0);
    // The partitions of loop0: sectors 0 to 7, and from 16 on.
    host.partition("loop0", "loop0p1", "259:0", (0, 8));
    host.partition("loop0", "loop0p2", "259:1", (16, 100));
    let file = host.of_file(&image);
    let device = |name: &str, number: &str| host.of_device(name, number);
    let loops: Vec<Identity> = (0..5).map(|n| device(&format!("loop{n}"), &format!("7:{n}"))).collect();
    for (number, expected) in [true, true, true, true, false].into_iter().enumerate() {
        assert_eq!(overlap(&file, &loops[number]), expected, "loop{number} and the file");
        assert_eq!(overlap(&loops[0], &loops[number]), expected, "loop{number} and loop0");
    }
    assert!(!overlap(&loops[1], &loops[2]), "they meet");
    assert!(overlap(&loops[2], &loops[3]), "by one byte");
    let (first, second) = (device("loop0p1", "259:0"), device("loop0p2", "259:1"));
    assert!(overlap(&file, &first) && overlap(&loops[1], &first));
    assert!(!overlap(&loops[2], &first) && !overlap(&loops[2], &second), "it lies between them");
    assert!(overlap(&loops[3], &second));
}

#[test]
fn a_loop_device_on_a_partition_has_bytes_of_the_disk() {
    let host = MadeUp::new();
    let image = host.image("vm.img");
    host.looped("loop0", "7:0", &image, 512, 51200);
    host.partition("loop0", "loop0p1", "259:0", (1, 10));
    // What lies on a loop device of a stretch never goes beyond that.
    host.partition("loop0", "loop0p2", "259:1", (50, 1000));
    host.looped("loop1", "7:1", &image, 0, 1024);
    host.looped("loop2", "7:2", &image, 512 + 51200, 0);
    let (first, second) = (host.of_device("loop0p1", "259:0"), host.of_device("loop0p2", "259:1"));
    assert!(
        !overlap(&first, &host.of_device("loop1", "7:1")),
        "the partition begins at byte 1024 of the file"
    );
    assert!(!overlap(&second, &host.of_device("loop2", "7:2")));
    assert!(overlap(&second, &host.of_file(&image)));
}

#[test]
fn volumes_share_what_they_are_made_of_and_nothing_else_does() {
    let host = partitioned();
    let image = host.image("pv.img");
    host.looped("loop0", "7:0", &image, 0, 0);
    for (minor, name) in ["root", "home", "crypt", "far"].into_iter().enumerate() {
        host.disk(&format!("dm-{minor}"), &format!("252:{minor}"));
        let of: &[&str] = [["sda/sda2"], ["sda/sda2"], ["dm-1"], ["loop0"]].get(minor).unwrap();
        host.volume(&format!("dm-{minor}"), name, of);
    }
    let [root, home, crypt, far] =
        [0, 1, 2, 3].map(|n| host.of_device(&format!("dm-{n}"), &format!("252:{n}")));
    assert!(!overlap(&root, &home), "two volumes of one partition");
    assert!(overlap(&home, &crypt) && !overlap(&root, &crypt));
    for (name, number, expected) in [("sda", "8:0", true), ("sda1", "8:1", false), ("sda2", "8:2", true)] {
        let below = host.of_device(name, number);
        assert_eq!(overlap(&root, &below), expected, "{name}");
        assert_eq!(overlap(&crypt, &below), expected, "{name}");
    }
    assert!(overlap(&far, &host.of_file(&image)) && overlap(&far, &host.of_device("loop0", "7:0")));
    host.looped("loop1", "7:1", &image, 0, 0);
    assert!(overlap(&far, &host.of_device("loop1", "7:1")), "beside the device that it has for itself");
}

/// The sentence and the way out.
fn said(refusal: Option<InUse>) -> (String, String) {
    let refusal = refusal.expect("it is in use");
    (refusal.to_string(), refusal.hint())
}

#[test]
fn a_device_that_is_in_use_is_named_with_what_uses_it() {
    let host = partitioned();
    let (whole, first) = (host.of_device("sda", "8:0"), host.of_device("sda1", "8:1"));
    assert_eq!(host.refusal(&whole), None);
    host.mount("8:1", "/mnt/a\\040b", "/dev/sda1");
    let (sentence, hint) = said(host.refusal(&first));
    assert_eq!(sentence, format!("{} is in use: it is mounted at /mnt/a b", host.dev("sda1")));
    assert_eq!(hint, "unmount it first: umount /mnt/a b");
    let (sentence, _) = said(host.refusal(&whole));
    let expected = format!(
        "{} is in use: {}, which has bytes of it, is mounted at /mnt/a b",
        host.dev("sda"),
        host.dev("sda1")
    );
    assert_eq!(sentence, expected);
    assert_eq!(host.refusal(&host.of_device("sda2", "8:2")), None, "the partition beside it is free");
    // A file system with a number of its own is known by what it was mounted from.
    host.mount("0:45", "/mnt/btrfs", "/dev/sdb");
    let (sentence, _) = said(host.refusal(&host.of_device("sdb", "8:16")));
    assert_eq!(sentence, format!("{} is in use: it is mounted at /mnt/btrfs", host.dev("sdb")));
}

#[test]
fn a_partition_of_a_disk_that_is_used_as_a_whole_is_in_use() {
    let host = partitioned();
    host.mount("8:0", "/mnt", "/dev/sda");
    let (sentence, _) = said(host.refusal(&host.of_device("sda1", "8:1")));
    assert!(sentence.ends_with("dev/sda, which has bytes of it, is mounted at /mnt"), "{sentence}");
}

#[test]
fn what_the_host_swaps_to_or_makes_volumes_of_is_in_use() {
    let host = partitioned();
    let image = host.image("swap.img");
    assert_eq!(host.refusal(&host.of_file(&image)), None);
    host.swap("/dev/sdb");
    host.swap(image.to_str().unwrap());
    let (sentence, hint) = said(host.refusal(&host.of_device("sdb", "8:16")));
    assert_eq!(sentence, format!("{} is in use: it is what the host swaps to", host.dev("sdb")));
    assert_eq!(hint, format!("take it from the host first: swapoff {}", host.dev("sdb")));
    let (sentence, _) = said(host.refusal(&host.of_file(&image)));
    assert_eq!(sentence, format!("{} is in use: it is what the host swaps to", image.display()));
    host.disk("dm-0", "252:0");
    host.volume("dm-0", "vg-root", &["sda/sda2"]);
    host.mount("252:0", "/mnt", "/dev/mapper/vg-root");
    let (sentence, hint) = said(host.refusal(&host.of_device("sda2", "8:2")));
    let volume = "is a part of the volume dm-0 (vg-root), which is mounted at /mnt";
    assert_eq!(sentence, format!("{} is in use: it {volume}", host.dev("sda2")));
    assert!(hint.starts_with("attach the volume instead"), "{hint}");
    let (sentence, _) = said(host.refusal(&host.of_device("sda", "8:0")));
    assert!(
        sentence.ends_with(&format!("{}, which has bytes of it, {volume}", host.dev("sda2"))),
        "{sentence}"
    );
}

/// A disk whose second partition the host has made volumes of by itself.
fn with_idle_volumes() -> MadeUp {
    let host = partitioned();
    host.disk("dm-0", "252:0");
    host.volume("dm-0", "mpath", &["sda/sda2"]);
    host.disk("dm-1", "252:1");
    host.volume("dm-1", "vg-root", &["dm-0"]);
    host
}

#[test]
fn a_volume_that_nothing_uses_keeps_no_disk_from_its_image_and_is_told() {
    let host = with_idle_volumes();
    for (name, number) in [("sda", "8:0"), ("sda2", "8:2")] {
        let told = host.told_beside(&host.of_device(name, number)).expect("it is not had alone");
        let expected = format!(
            "{} is not kept from other use by the host: it was a part of the volume dm-0 (mpath), which nothing uses",
            host.dev(name)
        );
        assert!(told.starts_with(&expected) && told.contains("dmsetup remove"), "{told}");
    }
    assert_eq!(host.told_beside(&host.of_device("sda1", "8:1")), None, "the partition beside it");
    // What uses it later is told too.
    let held = Hold::on(&host.host(), &host.of_device("sda2", "8:2"), Standing::New).unwrap();
    host.mount("252:1", "/mnt", "/dev/mapper/vg-root");
    let told = held.beside().unwrap().again().unwrap().to_string();
    let volumes =
        "the volume dm-0 (mpath), which is a part of the volume dm-1 (vg-root), which is mounted at /mnt";
    assert!(told.contains(&format!("is in use: it is a part of {volumes}: what that writes")), "{told}");
}

#[test]
fn a_volume_that_something_uses_keeps_a_disk_from_its_image() {
    let is_refused = |host: &MadeUp, used: &str| {
        for (name, number) in [("sda", "8:0"), ("sda2", "8:2")] {
            let (sentence, _) = said(host.refusal(&host.of_device(name, number)));
            let expected = format!(
                "is a part of the volume dm-0 (mpath), which is a part of the volume dm-1 (vg-root), which {used}"
            );
            assert!(sentence.ends_with(&expected), "{sentence}");
        }
    };
    let host = with_idle_volumes();
    host.claim("dm-1");
    is_refused(&host, "is opened exclusively, for instance by a mount that cannot be seen from here");
    let host = with_idle_volumes();
    host.open_in(17, "qemu", "/dev/dm-1");
    is_refused(&host, "is open in process 17 (qemu)");
    let host = with_idle_volumes();
    host.swap("/dev/dm-1");
    is_refused(&host, "is what the host swaps to");
    // Somebody else has another partition.
    let host = with_idle_volumes();
    host.claim("sda1");
    let (sentence, _) = said(host.refusal(&host.of_device("sda", "8:0")));
    assert!(sentence.contains("/dev/sda1, which has bytes of it, is opened exclusively"), "{sentence}");
    assert_eq!(host.refusal(&host.of_device("sda2", "8:2")), None);
}

#[test]
fn a_volume_over_a_loop_device_that_nothing_uses_is_no_use_of_the_file() {
    let host = MadeUp::new();
    let image = host.image("vm.img");
    host.looped("loop0", "7:0", &image, 0, 0);
    host.disk("dm-0", "252:0");
    host.volume("dm-0", "loop0p1", &["loop0"]);
    assert_eq!(host.refusal(&host.of_file(&image)), None);
    host.mount("252:0", "/mnt", "/dev/mapper/loop0p1");
    let (sentence, _) = said(host.refusal(&host.of_file(&image)));
    assert!(
        sentence.ends_with("is a part of the volume dm-0 (loop0p1), which is mounted at /mnt"),
        "{sentence}"
    );
}

#[test]
fn a_file_whose_loop_device_is_in_use_is_in_use() {
    let host = MadeUp::new();
    let image = host.image("vm.img");
    host.looped("loop0", "7:0", &image, 0, 8192);
    host.looped("loop1", "7:1", &image, 8192, 8192);
    let file = host.of_file(&image);
    assert_eq!(host.refusal(&file), None, "a loop device that nobody uses writes nothing");
    host.mount("7:1", "/mnt", "/dev/loop1");
    let (sentence, hint) = said(host.refusal(&file));
    let used = host.dev("loop1");
    let expected =
        format!("{} is in use: {used}, which has bytes of it, is mounted at /mnt", image.display());
    assert_eq!((sentence, hint), (expected, "unmount it first: umount /mnt".to_owned()));
    assert_eq!(host.refusal(&host.of_device("loop0", "7:0")), None, "it lies before what is mounted");
    // Another agent has it, or a mount that is not seen from here.
    host.claim("loop0");
    host.looped("loop2", "7:2", &image, 0, 512);
    let (sentence, hint) = said(host.refusal(&host.of_device("loop2", "7:2")));
    assert!(sentence.contains("/dev/loop0, which has bytes of it, is opened exclusively"), "{sentence}");
    assert!(hint.contains("lsblk"), "{hint}");
}

#[test]
fn only_the_partitions_of_a_loop_device_that_have_its_bytes_count() {
    let host = MadeUp::new();
    let image = host.image("vm.img");
    host.looped("loop0", "7:0", &image, 0, 0);
    host.partition("loop0", "loop0p1", "259:0", (0, 8));
    host.partition("loop0", "loop0p2", "259:1", (8, 8));
    host.looped("loop1", "7:1", &image, 0, 4096);
    host.looped("loop2", "7:2", &image, 4096, 4096);
    host.mount("259:1", "/mnt", "/dev/loop0p2");
    // With a partition of it in use the disk cannot be had alone.
    host.claim("loop0");
    assert_eq!(host.refusal(&host.of_device("loop1", "7:1")), None);
    for used in [host.of_file(&image), host.of_device("loop2", "7:2")] {
        let (sentence, _) = said(host.refusal(&used));
        assert!(sentence.ends_with("dev/loop0p2, which has bytes of it, is mounted at /mnt"), "{sentence}");
    }
}

#[test]
fn a_loop_device_of_an_image_that_another_agent_has_is_locked() {
    let host = MadeUp::new();
    let image = host.image("vm.img");
    host.looped("loop0", "7:0", &image, 0, 512);
    host.looped("loop1", "7:1", &image, 512, 512);
    let of_loop = |n: u32| host.of_device(&format!("loop{n}"), &format!("7:{n}"));
    let other = File::open(&image).unwrap();
    flock(&other, FlockOperation::NonBlockingLockExclusive).unwrap();
    let (sentence, hint) = said(host.refusal(&of_loop(0)));
    assert!(
        sentence.starts_with(&format!("{} is locked by ", host.dev("loop0")))
            && hint.contains("the other agent"),
        "{sentence}"
    );
    flock(&other, FlockOperation::Unlock).unwrap();
    // Whoever has a part of it keeps others from all of it, and not from other parts.
    let first = Hold::on(&host.host(), &of_loop(0), Standing::New).unwrap();
    let second = Hold::on(&host.host(), &of_loop(1), Standing::New).unwrap();
    drop(first);
    flock(&other, FlockOperation::NonBlockingLockExclusive).unwrap_err();
    drop(second);
    flock(&other, FlockOperation::NonBlockingLockExclusive).unwrap();
}

#[test]
fn a_loop_device_that_does_not_answer_refuses_no_image_and_hides_no_other() {
    let mut host = MadeUp::new();
    let (image, elsewhere) = (host.image("vm.img"), host.image("elsewhere.img"));
    host.looped("loop0", "7:0", &elsewhere, 0, 0);
    let still = host.stand_still(&elsewhere);
    assert_eq!(host.refusal(&host.of_file(&image)), None, "what it has is not known");
    host.looped("loop1", "7:1", &image, 0, 0);
    host.mount("7:1", "/mnt", "/dev/loop1");
    // It is not waited for again.
    host.wait_long();
    let (sentence, _) = said(host.refusal(&host.of_file(&image)));
    assert!(sentence.ends_with("dev/loop1, which has bytes of it, is mounted at /mnt"), "{sentence}");
    drop(still);
}

#[test]
fn what_is_mounted_or_swapped_to_from_elsewhere_is_not_waited_for() {
    let mut host = partitioned();
    let (image, elsewhere) = (host.image("vm.img"), host.image("elsewhere.img"));
    let still = host.stand_still(&elsewhere);
    host.swap(elsewhere.to_str().unwrap());
    assert_eq!(host.refusal(&host.of_file(&image)), None);
    host.mount("0:45", "/mnt", elsewhere.to_str().unwrap());
    assert_eq!(host.refusal(&host.of_device("sdb", "8:16")), None);
    drop(still);
}

#[test]
fn a_loop_device_that_nobody_can_write_to_is_no_use_of_its_file() {
    let host = MadeUp::new();
    let image = host.image("vm.img");
    host.looped("loop0", "7:0", &image, 0, 0);
    host.mount("7:0", "/mnt", "/dev/loop0");
    assert!(host.refusal(&host.of_file(&image)).is_some());
    host.read_only("loop0");
    assert_eq!(host.refusal(&host.of_file(&image)), None);
}

#[test]
fn a_disk_keeps_the_image_it_had_and_tells_what_uses_it_until_that_is_over() {
    let host = MadeUp::new();
    let image = host.image("vm.img");
    host.looped("loop0", "7:0", &image, 0, 0);
    let identity = host.of_file(&image);
    let hold = |standing| Hold::on(&host.host(), &identity, standing);
    assert!(hold(Standing::Had).unwrap().beside().is_none());
    host.mount("7:0", "/mnt", "/dev/loop0");
    hold(Standing::New).unwrap_err();
    let found = hold(Standing::Had).unwrap().beside().expect("it is mounted");
    let used = host.dev("loop0");
    let expected = format!(
        "{} is in use: {used}, which has bytes of it, is mounted at /mnt: what that writes is in no point of the disk; unmount it first: umount /mnt",
        image.display()
    );
    assert_eq!(found.to_string(), expected);
    assert_eq!(found.again().expect("it is still mounted").to_string(), expected);
    host.unmount_all();
    assert!(found.again().is_none());
    // What the host does with the image itself is no neighbour of it.
    host.swap(image.to_str().unwrap());
    hold(Standing::Had).unwrap_err();
}

#[test]
fn overlays_share_what_nobody_writes_and_nothing_else() {
    let host = MadeUp::new();
    let [base, data, first, second] = ["base", "data", "first", "second"].map(|name| host.image(name));
    let overlay = host.of_overlay(&first, &[(&base, false)]);
    let other = host.of_overlay(&second, &[(&base, false), (&data, true)]);
    assert!(!overlap(&overlay, &other), "nobody writes their backing file");
    assert!(overlap(&overlay, &host.of_file(&base)), "it is another disk's image");
    assert!(overlap(&other, &host.of_file(&data)) && !overlap(&overlay, &host.of_file(&data)));
    assert!(overlap(&host.of_overlay(&first, &[(&data, false)]), &other), "the other writes to it");
    host.looped("loop0", "7:0", &base, 0, 0);
    assert!(overlap(&overlay, &host.of_device("loop0", "7:0")));
    // Other agents keep away from it too, and other overlays do not.
    let held = Hold::on(&host.host(), &overlay, Standing::New).unwrap();
    let another = Hold::on(&host.host(), &other, Standing::New).unwrap();
    let file = File::open(&base).unwrap();
    flock(&file, FlockOperation::NonBlockingLockExclusive).unwrap_err();
    drop((held, another));
    flock(&file, FlockOperation::NonBlockingLockExclusive).unwrap();
    let (sentence, _) = said(host.refusal(&overlay));
    assert!(sentence.starts_with(&format!("{} is locked by ", first.display())), "{sentence}");
}
