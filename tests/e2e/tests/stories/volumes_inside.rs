//! Files on volumes that others have written: ext, XFS, NTFS, FAT, and logical volumes of LVM.

use std::{
    io::Write,
    os::unix::fs::{FileExt, MetadataExt},
    path::Path,
};

use backtide_e2e::{Bench, tools};

/// A file of `testdata/volumes`.
fn golden(name: &str) -> Vec<u8> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/volumes");
    std::fs::read(folder.join(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// An image with a volume of `testdata/volumes`.
fn unpack(bench: &Bench, image: &str, volume: &str) {
    let bytes = zstd::decode_all(&golden(volume)[..]).unwrap();
    let mut file = std::fs::File::create(bench.path(image)).unwrap();
    file.write_all(&bytes).unwrap();
}

#[test]
fn files_of_xfs_come_out_of_a_point_with_what_was_in_its_log_only() {
    files_come_out("xfs", 203, 20_000);
}

#[test]
fn files_of_ext4_come_out_of_a_point_with_what_was_in_its_journal_only() {
    files_come_out("ext4", 204, 1_000_000);
}

fn files_come_out(name: &str, count: usize, length: u32) {
    let bench = Bench::new();
    unpack(&bench, "vm1.img", &format!("{name}.zst"));
    let (_receiver, _agent) = (bench.receiver(), bench.agent());
    let disk = bench.attach("vm1", "vm1.img", &[]);
    disk.wait("sync");
    disk.settle();
    bench.json(&["mark", "whole", "vm1"]);
    disk.settle();
    disk.qemu_io(&["write -P 0x11 0 1M"]);
    disk.settle();

    let listed = bench.json(&["ls", "vm1", "--at", "mark:whole", "/new"]);
    let entries = listed["entries"].as_array().unwrap();
    assert_eq!(entries.len(), count, "{listed}");
    assert_eq!((&listed["partitions"][0]["content"], &listed["warnings"][0]), (&name.into(), &().into()));
    let out = bench.name("new");
    let copied = bench.run(&["cp", "vm1", "--at", "mark:whole", "/new", &out, "--recursive"]);
    assert_eq!(copied.code, 0, "{copied:?}");
    let expected: Vec<u8> = (0..length).map(|at| ((at / 1000 + 9) % 251) as u8).collect();
    assert!(std::fs::read(bench.path("new/deep/file")).unwrap() == expected);
    let link = std::fs::read_link(bench.path("new/long link")).unwrap();
    assert_eq!(link.to_str().unwrap(), format!("{}by", "near/".repeat(150)));
    // A file with holes is copied with them, and is as long as it was.
    let sparse = bench.name("sparse");
    assert_eq!(bench.run(&["cp", "vm1", "--at", "mark:whole", "/pieces", &sparse]).code, 0);
    assert_eq!(std::fs::metadata(&sparse).unwrap().len(), 599 * 4096);
    let empty = bench.name("empty");
    assert_eq!(bench.run(&["cp", "vm1", "--at", "mark:whole", "/sparse", &empty]).code, 0);
    let empty = std::fs::metadata(&empty).unwrap();
    assert_eq!((empty.len(), empty.blocks()), (700_000, 0));
    assert_eq!(bench.run(&["ls", "vm1", "--at", "mark:whole", "/few"]).code, 4, "it was deleted");
    assert_eq!(bench.run(&["ls", "vm1", "/"]).code, 5, "the newest has no file system");
    assert_eq!(bench.json(&["mount"])["mounts"], serde_json::json!([]), "nothing stays mounted");
}

#[test]
fn files_on_a_logical_volume_in_two_stretches_are_found() {
    let bench = Bench::new();
    let tree = bench.path("tree");
    std::fs::create_dir_all(&tree).unwrap();
    let big: Vec<u8> = (0..9 << 20_u32).map(|at| (at / 1000 % 251) as u8).collect();
    std::fs::write(tree.join("big"), &big).unwrap();
    let volume = bench.name("root");
    tools::run("truncate", &["-s", "16M", &volume]);
    tools::run(
        "mkfs.ext4",
        &["-q", "-F", "-m", "0", "-O", "^has_journal", "-d", tree.to_str().unwrap(), &volume],
    );
    // Where LVM has the volume: extents of 4 MiB, the first two from 1 MiB of the physical volume on, then from 25 MiB on.
    let (bytes, mib) = (std::fs::read(&volume).unwrap(), 1 << 20_u64);
    let image = std::fs::File::create(bench.path("vm1.img")).unwrap();
    image.set_len(64 * mib).unwrap();
    image.write_all_at(&golden("lvm-pv1"), 0).unwrap();
    image.write_all_at(&bytes[..8 << 20], mib).unwrap();
    image.write_all_at(&bytes[8 << 20..], 25 * mib).unwrap();
    let (_receiver, _agent) = (bench.receiver(), bench.agent());
    let disk = bench.attach("vm1", "vm1.img", &[]);
    disk.wait("sync");
    disk.settle();

    let listed = bench.json(&["ls", "vm1"]);
    let volumes = listed["logical_volumes"].as_array().unwrap();
    let names: Vec<_> = volumes.iter().map(|volume| &volume["name"]).collect();
    assert_eq!(names, ["vg1/root", "vg1/fast", "vg1/home"], "{listed}");
    assert_eq!(
        (&listed["logical_volume"], &listed["entries"][0]["name"]),
        (&"vg1/root".into(), &"big".into())
    );
    let out = bench.name("big");
    assert_eq!(bench.run(&["cp", "vm1", "/big", &out, "--partition", "vg1/root"]).code, 0);
    assert!(std::fs::read(&out).unwrap() == big);
    let said = bench.plain(&["ls", "vm1", "--partition", "vg1/fast"]);
    assert_eq!(said.code, 5, "{said:?}");
    assert!(said.stderr.contains("on the physical volume pv1, on another disk"), "{said:?}");
    assert_eq!(bench.run(&["ls", "vm1", "--partition", "vg1/none"]).code, 4);
    assert_eq!(bench.run(&["ls", "vm1", "--partition", "0"]).code, 5, "a physical volume has no files");
}

#[test]
fn files_of_ntfs_and_fat_come_out_of_a_point() {
    let bench = Bench::new();
    let (_receiver, _agent) = (bench.receiver(), bench.agent());
    let expected: Vec<u8> = (0..3_000_000).map(|at| ((at / 1000 + 1) % 251) as u8).collect();
    for (name, content) in [("ntfs", "ntfs"), ("fat16", "fat")] {
        unpack(&bench, &format!("{name}.img"), &format!("{name}.zst"));
        let disk = bench.attach(name, &format!("{name}.img"), &[]);
        disk.wait("sync");
        disk.settle();
        let listed = bench.json(&["ls", name, "/few"]);
        assert_eq!(listed["entries"].as_array().unwrap().len(), 40, "{listed}");
        assert_eq!(listed["partitions"][0]["content"], content);
        let out = bench.name(&format!("{name}-big"));
        let copied = bench.run(&["cp", name, "/BIG", &out]);
        assert_eq!(copied.code, 0, "capitals do not count: {copied:?}");
        assert!(std::fs::read(&out).unwrap() == expected);
    }
    let refused = bench.plain(&["cp", "ntfs", "/compact", "-"]);
    assert_eq!(refused.code, 5, "{refused:?}");
    assert!(refused.stderr.contains("CompactOS"), "{refused:?}");
    // One file that cannot be read keeps nobody from the others.
    let tree = bench.name("tree");
    let copied = bench.plain(&["cp", "ntfs", "/", &tree, "--recursive"]);
    assert_eq!(copied.code, 3, "{copied:?}");
    assert!(copied.stderr.contains("left out") && copied.stderr.contains("/tree/compact: "), "{copied:?}");
    assert!(std::fs::read(bench.path("tree/big")).unwrap() == expected);
    assert!(!bench.path("tree/compact").exists(), "no half of it stays");
}

/// The lines of `diff --files`, each without its path's slash.
fn differences(bench: &Bench, name: &str, rest: &[&str]) -> Vec<String> {
    let report = bench.json(&[&["diff", name, "--from", "mark:before", "--files"], rest].concat());
    let line = |file: &serde_json::Value| {
        let text = |field: &str| file[field].as_str().unwrap().to_owned();
        format!("{} {} {}", text("change"), text("path"), file["what"])
    };
    report["files"].as_array().unwrap().iter().map(line).collect()
}

#[test]
fn bytes_that_changed_under_a_file_that_looks_the_same_are_found() {
    let bench = Bench::new();
    unpack(&bench, "vm1.img", "xfs.zst");
    let image = std::fs::read(bench.path("vm1.img")).unwrap();
    let block: Vec<u8> = (409_600..413_696).map(|at| ((at / 1000 + 1) % 251) as u8).collect();
    let at = image.chunks(4096).position(|found| found == block).expect("a block of the file") * 4096;
    let (_receiver, _agent) = (bench.receiver(), bench.agent());
    let disk = bench.attach("vm1", "vm1.img", &[]);
    disk.wait("sync");
    disk.settle();
    bench.json(&["mark", "before", "vm1"]);
    disk.settle();
    // The same bytes again are no difference.
    let same = bench.path("same");
    std::fs::write(&same, &image[at - 4096..at]).unwrap();
    disk.qemu_io(&[&format!("write -s {} {} 4k", same.display(), at - 4096)]);
    disk.settle();
    assert_eq!(differences(&bench, "vm1", &[]), [] as [&str; 0]);
    disk.qemu_io(&[&format!("write -P 0xee {at} 4k")]);
    disk.settle();
    let expected = [r#"changed /another name of big ["content"]"#, r#"changed /moved ["content"]"#];
    assert_eq!(differences(&bench, "vm1", &[]), expected, "both names of the file");
}

#[test]
fn files_that_were_added_removed_and_changed_are_told() {
    let bench = Bench::new();
    let volume = |name: &str, files: &[(&str, &str)]| {
        let tree = bench.path(&format!("{name}-tree"));
        for (path, content) in files {
            let path = tree.join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, content).unwrap();
            let file = std::fs::File::options().write(true).open(&path).unwrap();
            file.set_modified(std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_600_000_000)).unwrap();
        }
        let image = bench.name(name);
        tools::run("truncate", &["-s", "8M", &image]);
        tools::run("mkfs.ext4", &["-q", "-F", "-O", "^has_journal", "-d", tree.to_str().unwrap(), &image]);
        image
    };
    volume(
        "vm1.img",
        &[("etc/same", "1"), ("etc/longer", "1"), ("etc/quiet", "1"), ("old/file", "1"), ("z", "1")],
    );
    let later = volume(
        "later",
        &[("etc/same", "1"), ("etc/longer", "12"), ("etc/quiet", "2"), ("new/deep/file", "1"), ("z", "1")],
    );
    let (_receiver, _agent) = (bench.receiver(), bench.agent());
    let disk = bench.attach("vm1", "vm1.img", &[]);
    disk.wait("sync");
    disk.settle();
    bench.json(&["mark", "before", "vm1"]);
    disk.settle();
    disk.qemu_io(&[&format!("write -s {later} 0 8M")]);
    disk.settle();
    let expected = [
        r#"changed /etc/longer ["size"]"#,
        // It only looks the same.
        r#"changed /etc/quiet ["content"]"#,
        "added /new []",
        "added /new/deep []",
        "added /new/deep/file []",
        "removed /old []",
        "removed /old/file []",
    ];
    assert_eq!(differences(&bench, "vm1", &[]), expected);
    assert_eq!(differences(&bench, "vm1", &["--content"]), expected);
    let text = bench.plain(&["diff", "vm1", "--from", "mark:before", "--files"]);
    assert_eq!(text.code, 0, "{text:?}");
    assert!(
        text.stdout.contains("M /etc/longer  (size)") && text.stdout.contains("+ /new/deep/file"),
        "{text:?}"
    );
    assert!(text.stderr.contains("files: 3 added, 2 removed, 2 changed"), "{text:?}");
    assert_eq!(bench.json(&["mount"])["mounts"], serde_json::json!([]), "nothing stays mounted");
}
