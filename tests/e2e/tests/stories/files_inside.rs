//! Files out of a point: no root, and nothing mounted on this machine.

use std::{
    fs::Permissions,
    io::Read,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::Path,
    process::Stdio,
};

use backtide_e2e::{Bench, Daemon, tools};

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

/// A disk with `tree`, and with a file that takes long to read.
fn with_much_to_read(bench: &Bench) -> (std::path::PathBuf, Daemon, Daemon) {
    let tree = tree(bench);
    std::fs::write(tree.join("much"), vec![0x5a; 64 << 20]).unwrap();
    let image = bench.name("vm1.img");
    tools::run("truncate", &["-s", "128M", &image]);
    tools::run("mkfs.ext4", &["-q", "-F", "-d", tree.to_str().unwrap(), &image]);
    let (receiver, agent) = (bench.receiver(), bench.agent());
    let disk = bench.attach("vm1", "vm1.img", &[]);
    disk.wait("sync");
    disk.settle();
    (tree, receiver, agent)
}

/// Runs a command until it has `begun`, has the receiver stand still so that it cannot end, interrupts it, and sees that
/// it ends with that, and leaves nothing that `is_left` finds. One that was faster is run again after `anew`.
fn interrupted(
    bench: &Bench,
    receiver: &Daemon,
    command: &[&str],
    begun: impl Fn() -> bool,
    is_left: impl Fn() -> bool,
    anew: impl Fn(),
) {
    for _ in 0..50 {
        let mut child = bench.command(command).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        while !begun() && child.try_wait().unwrap().is_none() {
            std::thread::yield_now();
        }
        receiver.signal("STOP");
        tools::run("kill", &["-s", "INT", &child.id().to_string()]);
        let ended = child.wait().unwrap().code();
        receiver.signal("CONT");
        if ended == Some(130) {
            assert!(!is_left(), "{command:?} left what it had begun");
            return;
        }
        assert_eq!(ended, Some(0), "{command:?}");
        anew();
    }
    panic!("{command:?} was always faster");
}

/// What is in a directory, also what is not to be seen.
fn names_in(directory: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().into_string().unwrap()).collect()
}

#[test]
fn a_copy_that_is_interrupted_ends_and_leaves_no_half_file() {
    let bench = Bench::new();
    let (tree, receiver, _agent) = with_much_to_read(&bench);
    let place = bench.path("out");
    std::fs::create_dir(&place).unwrap();
    let (file, whole) = (bench.name("out/file"), bench.name("out/tree"));
    interrupted(
        &bench,
        &receiver,
        &["cp", "vm1", "/much", &file],
        || !names_in(&place).is_empty(),
        || !names_in(&place).is_empty(),
        || std::fs::remove_file(&file).unwrap(),
    );
    interrupted(
        &bench,
        &receiver,
        &["cp", "vm1", "/", &whole, "--recursive"],
        || names_in(Path::new(&whole)).contains(&"link".to_owned()),
        || {
            let half = |name: &String| {
                let name = Path::new(name);
                let (there, was) = (Path::new(&whole).join(name), tree.join(name));
                there.is_file() && std::fs::read(there).unwrap() != std::fs::read(was).unwrap_or_default()
            };
            names_in(Path::new(&whole)).iter().any(half)
        },
        || std::fs::remove_dir_all(&whole).unwrap(),
    );
}

#[test]
fn a_comparison_of_files_that_is_interrupted_ends() {
    let bench = Bench::new();
    let (_tree, receiver, _agent) = with_much_to_read(&bench);
    let disk = bench.disk("vm1");
    let from = format!("lsn:{}", disk.last());
    disk.qemu_io(&["write -P 0x11 120M 4k"]);
    disk.settle();
    let reads = || {
        let mounts = bench.json(&["mount"])["mounts"].as_array().unwrap().clone();
        mounts.len() == 2 && mounts.iter().all(|mount| mount["clients"] == 1)
    };
    interrupted(
        &bench,
        &receiver,
        &["diff", "vm1", "--from", &from, "--files", "--content"],
        reads,
        || false,
        || (),
    );
}

#[test]
fn a_copy_whose_reader_takes_nothing_ends_when_it_is_interrupted() {
    let bench = Bench::new();
    let (_tree, _receiver, _agent) = with_much_to_read(&bench);
    let mut copying = bench.command(&["cp", "vm1", "/much", "-"]);
    let mut copying = copying.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let mut output = copying.stdout.take().unwrap();
    // It waits for room in the pipe from here on.
    output.read_exact(&mut [0]).unwrap();
    tools::run("kill", &["-s", "TERM", &copying.id().to_string()]);
    assert_eq!(copying.wait().unwrap().code(), Some(130));
}

#[test]
fn a_copy_replaces_a_file_that_nobody_uses_and_nothing_else() {
    let bench = Bench::new();
    let tree = tree(&bench);
    let image = bench.name("vm1.img");
    tools::run("truncate", &["-s", "32M", &image]);
    tools::run("mkfs.ext4", &["-q", "-F", "-d", tree.to_str().unwrap(), &image]);
    let (_receiver, _agent) = (bench.receiver(), bench.agent());
    bench.attach("vm1", "vm1.img", &[]).wait("durable");
    let before = std::fs::metadata(&image).unwrap().ino();
    let link = bench.name("link");
    std::os::unix::fs::symlink(bench.name("elsewhere"), &link).unwrap();
    let store = bench.name("store/hosts");
    for (place, code, why) in
        [(&image, 5, "an agent protects it"), (&link, 5, "no regular file"), (&store, 5, "receiver's store")]
    {
        let said = bench.run(&["cp", "vm1", "/etc/hosts", place, "--force"]);
        assert_eq!(said.code, code, "{said:?}");
        assert!(said.sentence().contains(why), "{said:?}");
    }
    assert_eq!(std::fs::metadata(&image).unwrap().ino(), before);
    assert_eq!(std::fs::read_link(&link).unwrap(), bench.path("elsewhere"));
    assert!(!Path::new(&store).exists());
}
