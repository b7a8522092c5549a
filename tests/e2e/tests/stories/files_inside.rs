//! Files out of a point: no root, and nothing mounted on this machine.

use std::{fs::Permissions, os::unix::fs::PermissionsExt};

use backtide_e2e::{Bench, tools};

/// A directory with files of all kinds, and a big one.
fn tree(bench: &Bench) -> std::path::PathBuf {
    let tree = bench.path("tree");
    std::fs::create_dir_all(tree.join("etc/deep")).unwrap();
    std::fs::write(tree.join("etc/hosts"), "127.0.0.1 here\n").unwrap();
    std::fs::write(tree.join("etc/deep/empty"), "").unwrap();
    std::fs::set_permissions(tree.join("etc"), Permissions::from_mode(0o710)).unwrap();
    let big: Vec<u8> = (0..3 << 20_u32).map(|at| (at / 1000 % 251) as u8).collect();
    std::fs::write(tree.join("big"), big).unwrap();
    std::os::unix::fs::symlink("etc/hosts", tree.join("link")).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", tree.join("etc/outside")).unwrap();
    tree
}

#[test]
fn files_are_listed_and_copied_out_of_a_point_as_they_were() {
    let bench = Bench::new();
    let tree = tree(&bench);
    let image = bench.name("vm1.img");
    tools::run("truncate", &["-s", "32M", &image]);
    tools::run("mkfs.ext4", &["-q", "-F", "-d", tree.to_str().unwrap(), &image]);
    let (_receiver, _agent) = (bench.receiver(), bench.agent());
    let disk = bench.attach("vm1", "vm1.img", &[]);
    disk.wait("sync");
    disk.settle();
    bench.json(&["mark", "whole", "vm1"]);
    disk.settle();
    // After the mark there is no file system any more.
    disk.qemu_io(&["write -P 0x11 0 8M"]);
    disk.settle();

    let listed = bench.json(&["ls", "vm1", "--at", "mark:whole"]);
    let names: Vec<_> = listed["entries"].as_array().unwrap().iter().map(|entry| &entry["name"]).collect();
    assert_eq!(names, ["big", "etc", "link", "lost+found"], "{listed}");
    assert_eq!(listed["entries"][2]["target"], "etc/hosts");
    let text = bench.plain(&["ls", "vm1", "--at", "mark:whole", "/etc"]);
    assert!(text.stdout.contains("hosts") && text.stdout.contains("outside -> /etc/passwd"), "{text:?}");

    let (file, whole) = (bench.name("hosts"), bench.name("copy"));
    let copy = |more: &[&str]| bench.run(&[&["cp", "vm1", "--at", "mark:whole"], more].concat());
    assert_eq!(copy(&["/link", &file]).code, 0);
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "127.0.0.1 here\n");
    assert_eq!(copy(&["/big", &file]).code, 5, "it exists");
    assert_eq!(copy(&["/big", &file, "--force"]).code, 0);
    assert!(std::fs::read(&file).unwrap() == std::fs::read(tree.join("big")).unwrap());
    let printed = bench.plain(&["cp", "vm1", "--at", "mark:whole", "/etc/hosts", "-"]);
    assert_eq!(printed.stdout, "127.0.0.1 here\n");
    assert_eq!(copy(&["/etc", &whole]).code, 2, "a directory needs --recursive");
    let copied = copy(&["/", &whole, "--recursive"]);
    assert_eq!(copied.code, 0, "{copied:?}");
    // What only root may look into stays so.
    for (name, mode) in [("copy/lost+found", 0o700), ("copy/etc", 0o710)] {
        let found = std::fs::metadata(bench.path(name)).unwrap().permissions().mode();
        assert_eq!(found & 0o777, mode, "{name}");
    }
    std::fs::remove_dir(bench.path("copy/lost+found")).unwrap();
    tools::run("diff", &["-r", "--no-dereference", tree.to_str().unwrap(), &whole]);
    assert_eq!(copy(&["/none", &bench.name("none")]).code, 4);
    assert!(!std::fs::exists(bench.name("none")).unwrap());

    let said = bench.plain(&["ls", "vm1", "--at", "latest", "/"]);
    assert_eq!(said.code, 5, "{said:?}");
    assert!(said.stderr.contains("guestfish"), "{said:?}");
    assert_eq!(bench.json(&["mount"])["mounts"], serde_json::json!([]), "nothing stays mounted");
}

#[test]
fn partitions_are_listed_and_the_readable_one_is_found() {
    let bench = Bench::new();
    if !tools::is_there("sfdisk") {
        return backtide_e2e::skip("there is no sfdisk, which is in the Debian package fdisk");
    }
    let tree = tree(&bench);
    let image = bench.name("vm1.img");
    tools::run("truncate", &["-s", "64M", &image]);
    let table = bench.path("table");
    std::fs::write(&table, "label: gpt\nsize=8M\nsize=40M\n").unwrap();
    tools::run("sh", &["-c", &format!("sfdisk -q {image} < {}", table.display())]);
    let second = (1 + 8) << 20;
    let options = format!("offset={second}");
    let directory = tree.to_str().unwrap();
    tools::run("mkfs.ext4", &["-q", "-F", "-E", &options, "-d", directory, &image, "40960k"]);
    let (_receiver, _agent) = (bench.receiver(), bench.agent());
    let disk = bench.attach("vm1", "vm1.img", &[]);
    disk.wait("sync");
    disk.settle();
    let listed = bench.json(&["ls", "vm1", "/etc"]);
    let part = |number: u64, offset: u64, length: u64, content: &str| serde_json::json!({"number": number, "offset": offset, "length": length, "content": content});
    let expected = [part(1, 1 << 20, 8 << 20, "unknown"), part(2, second, 40 << 20, "ext4")];
    assert_eq!(listed["partitions"], serde_json::json!(expected), "{listed}");
    assert_eq!((&listed["partition"], &listed["entries"][1]["name"]), (&2.into(), &"hosts".into()));
    assert_eq!(bench.run(&["ls", "vm1", "--partition", "1"]).code, 5);
    assert_eq!(bench.run(&["ls", "vm1", "--partition", "3"]).code, 4);
}

#[test]
fn a_receiver_that_is_lost_meanwhile_is_no_damage_of_a_file() {
    use std::{io::Read, process::Stdio};
    let bench = Bench::new();
    let tree = tree(&bench);
    let image = bench.name("vm1.img");
    tools::run("truncate", &["-s", "32M", &image]);
    tools::run("mkfs.ext4", &["-q", "-F", "-d", tree.to_str().unwrap(), &image]);
    let (receiver, _agent) = (bench.receiver(), bench.agent());
    let disk = bench.attach("vm1", "vm1.img", &[]);
    disk.wait("sync");
    disk.settle();
    let mut copying = bench.command(&["cp", "vm1", "/big", "-"]);
    let mut copying = copying.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    // It waits for whoever reads its output, with most of the file still to come.
    let mut output = copying.stdout.take().unwrap();
    output.read_exact(&mut [0]).unwrap();
    receiver.kill();
    let mut rest = Vec::new();
    output.read_to_end(&mut rest).unwrap();
    assert!(rest.len() < 3 << 20, "{}", rest.len());
    let ended = copying.wait_with_output().unwrap();
    let said = String::from_utf8(ended.stderr).unwrap();
    assert_eq!(ended.status.code(), Some(6), "{said}");
    assert!(said.contains("begin again"), "{said}");
}
