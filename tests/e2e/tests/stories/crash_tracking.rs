//! An agent that is killed knows afterwards what may differ: the rest of the disk is not read again.

use std::path::Path;

use backtide_e2e::{Bench, Model, is_root, kill_rounds, skip, tools};
use serde_json::Value;

use crate::bad_input::Unmount;

const SIZE: u64 = 64 << 20;
const EXTENT: u64 = 4 << 20;

/// What a resync looked at: compared and found equal, or sent.
fn looked_at(status: &Value) -> u64 {
    let counters = &status["counters"];
    counters["resync_equal_bytes"].as_u64().unwrap() + counters["resync_sent_bytes"].as_u64().unwrap()
}

#[test]
fn a_killed_agent_compares_the_hot_extents_of_a_huge_disk_and_nothing_else() {
    let bench = Bench::new();
    let (_receiver, agent) = (bench.receiver(), bench.agent());
    bench.image("vm1.img", 1 << 40);
    tools::qemu_io(&bench.name("vm1.img"), &["write -P 0x11 0 256M"]);
    let disk = bench.attach("vm1", "vm1.img", &["--activity-extents", "4"]);
    disk.settle();
    for place in ["0", "100M", "500G", "1023G"] {
        disk.qemu_io(&[&format!("write -P 0x22 {place} 64k")]);
    }
    // Far from each other, so that older extents go cold.
    for index in 0..20 {
        disk.qemu_io(&[&format!("write -P 0x33 {}G 4k", 10 + index * 20)]);
    }
    let status = disk.status();
    assert!(status["counters"]["snapshots"].as_u64() > Some(2), "{status}");
    assert!(status["counters"]["cold_changes"].as_u64() > Some(20), "{status}");
    let hot = status["dirty"]["hot_extents"].as_u64().unwrap();
    assert!(hot <= 8, "extents go cold: {status}");
    agent.kill();
    let _agent = bench.agent();
    disk.settle();
    let status = disk.status();
    // What was not flushed to the local disk is compared too, block by block.
    assert!(looked_at(&status) <= hot * EXTENT + (8 << 20), "not the whole disk: {status}");
    let mount = bench.json(&["mount", "vm1", "--at", "latest"]);
    tools::assert_same(&bench.name("vm1.img"), mount["uri"].as_str().unwrap());
}

#[test]
fn a_damaged_tracking_file_means_a_compare_of_everything() {
    let bench = Bench::new();
    let (_receiver, agent, disk) = bench.protected(SIZE, &[]);
    disk.qemu_io(&["write -P 0x11 0 48M"]);
    disk.settle();
    agent.kill();
    let path = bench.path("state/vm1.tracking");
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[20] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    let mut agent = bench.agent();
    agent.may_complain("the tracking file cannot be trusted");
    disk.settle();
    let status = disk.status();
    assert!(looked_at(&status) >= 48 << 20, "everything is looked at: {status}");
    let log = agent.log();
    assert!(log.contains("the tracking file") && log.contains("is damaged"), "{log}");
    disk.latest_is_the_image();
}

#[test]
fn an_image_written_after_its_agent_died_is_compared_whole() {
    let bench = Bench::new();
    let (_receiver, agent, disk) = bench.protected(SIZE, &[]);
    disk.qemu_io(&["write -P 0x11 0 48M"]);
    disk.settle();
    agent.kill();
    tools::qemu_io(&disk.image, &["write -P 0x22 40M 1M"]);
    // Long after the agent was last alive.
    tools::run("touch", &["-d", "+10 minutes", &disk.image]);
    let _agent = bench.agent();
    disk.latest_is_the_image();
    assert!(looked_at(&disk.status()) >= 48 << 20, "{}", disk.status());
}

#[test]
fn without_an_activity_log_a_crash_means_a_compare_of_everything() {
    let bench = Bench::new();
    let (_receiver, agent, disk) = bench.protected(SIZE, &["--activity-extents", "0"]);
    disk.qemu_io(&["write -P 0x11 0 48M"]);
    disk.settle();
    assert_eq!(disk.status()["dirty"]["hot_extents"], Value::Null);
    assert_eq!(disk.status()["counters"]["cold_changes"], 0);
    agent.kill();
    let _agent = bench.agent();
    disk.latest_is_the_image();
    assert!(looked_at(&disk.status()) >= 48 << 20, "{}", disk.status());
}

#[test]
fn kills_one_after_the_other_under_load_lose_nothing() {
    let bench = Bench::new();
    let (mut receiver, mut agent, disk) = bench.protected(SIZE, &["--activity-extents", "2"]);
    let mut model = Model::of_zeroes(SIZE, Vec::new());
    for round in 0..kill_rounds(6) {
        let load = disk.load(round);
        // Somewhere in the attach, the compare, the drain, or in sync.
        load.goes_on(1 + round * 37 % 150);
        match round % 3 {
            0 => agent.kill(),
            1 => {
                receiver.kill();
                load.goes_on(20);
                agent.kill();
                receiver = bench.receiver();
            }
            _ => {
                agent.kill();
                receiver.kill();
                receiver = bench.receiver();
            }
        }
        model.then(load.broken());
        agent = bench.agent();
        if round % 2 == 1 {
            // In the middle of whatever the agent has to do.
            disk.timeline_holds(round, 2, &model);
        }
        if round % 5 == 4 {
            disk.latest_is_the_image();
            let found = bench.json(&["verify", "vm1"]);
            assert_eq!(found["differing_count"], 0, "round {round}: {found}");
        }
    }
    disk.latest_is_the_image();
    let found = bench.json(&["verify", "vm1"]);
    assert_eq!(found["differing_count"], 0, "{found}");
    drop(receiver);
}

#[test]
fn an_older_copy_in_the_place_of_the_image_is_compared_whole() {
    let bench = Bench::new();
    let (_receiver, agent, disk) = bench.protected(SIZE, &[]);
    disk.qemu_io(&["write -P 0x11 0 48M"]);
    disk.settle();
    let copy = bench.name("yesterday.img");
    tools::run("cp", &["-a", &disk.image, &copy]);
    disk.qemu_io(&["write -P 0x22 40M 1M"]);
    disk.settle();
    agent.kill();
    tools::run("mv", &[&copy, &disk.image]);
    let _agent = bench.agent();
    disk.latest_is_the_image();
    assert!(looked_at(&disk.status()) >= 48 << 20, "{}", disk.status());
}

#[test]
fn a_state_directory_that_is_removed_costs_the_guest_no_write() {
    let bench = Bench::new();
    let (_receiver, agent, disk) = bench.protected(SIZE, &[]);
    assert_eq!(agent.stop(), 0);
    let mut agent = bench.agent();
    agent.may_complain("the tracking file cannot be written");
    agent.may_complain("cannot save the disk's record");
    agent.may_complain("tracking could not be saved");
    disk.settle();
    std::fs::remove_dir_all(bench.path("state")).unwrap();
    disk.qemu_io(&["write -P 0x11 0 1M", "write -P 0x22 40M 1M", "flush"]);
    disk.latest_is_the_image();
    let log = agent.log();
    assert!(log.contains("after a crash the whole disk will be compared"), "{log}");
    agent.kill();
}

/// Has a directory of so much; none, with why, where that cannot be.
fn small_file_system(directory: &Path, size: &str) -> Option<Unmount> {
    std::fs::create_dir(directory).unwrap();
    let place = directory.to_str().unwrap();
    if let (false, said) =
        tools::try_run("mount", &["-t", "tmpfs", "-o", &format!("size={size}"), "none", place])
    {
        skip(&format!("tmpfs cannot be mounted here: {said}"));
        return None;
    }
    Some(Unmount(place.to_owned()))
}

#[test]
fn an_agent_that_dies_while_its_state_directory_is_full_serves_its_disks_again() {
    if !is_root() {
        return skip("only root mounts a small file system");
    }
    let bench = Bench::new();
    let state = bench.path("state");
    let Some(_mounted) = small_file_system(&state, "96M") else { return };
    let (_receiver, mut agent, disk) = bench.protected(SIZE, &[]);
    disk.settle();
    let reserve = state.join("reserve");
    disk.until("room is reserved", |_| std::fs::metadata(&reserve).is_ok_and(|found| found.len() == 4 << 20));
    agent.may_complain("the tracking file cannot be written");
    agent.may_complain("cannot save the disk's record");
    std::fs::write(state.join("fill"), vec![0; 96 << 20]).unwrap_err();
    disk.qemu_io(&["write -P 0x11 8M 1M", "flush"]);
    agent.kill();

    let mut agent = bench.agent();
    agent.may_complain("cannot attach the disk again");
    agent.may_complain("the state directory is full");
    agent.may_complain("the tracking file cannot be written");
    agent.may_complain("cannot save the disk's record");
    disk.qemu_io(&["read -P 0x11 8M 1M", "write -P 0x22 16M 1M", "flush"]);
    disk.latest_is_the_image();
    assert!(!reserve.exists(), "it was attached without the room that was reserved");
    assert!(agent.log().contains("with the room that was reserved there"), "{}", agent.log());
}

#[test]
fn a_state_directory_that_was_full_costs_a_later_crash_nothing() {
    if !is_root() {
        return skip("only root mounts a small file system");
    }
    let bench = Bench::new();
    let state = bench.path("state");
    let Some(_mounted) = small_file_system(&state, "2M") else { return };
    let (_receiver, mut agent, disk) = bench.protected(SIZE, &["--activity-extents", "2"]);
    agent.may_complain("the tracking file cannot be written");
    agent.may_complain("cannot save the disk's record");
    disk.settle();
    std::fs::write(state.join("fill"), vec![0; 4 << 20]).unwrap_err();
    disk.qemu_io(&["write -P 0x11 0 48M", "flush"]);
    let status = disk.until("it is told", |status| status["untracked"].is_string());
    assert_eq!(status["dirty"]["hot_extents"], Value::Null);
    for command in ["status", "doctor"] {
        let said = bench.run(&[command]).stdout;
        let sentence = "vm1.tracking cannot be written: No space left on device (os error 28): a crash of the agent costs a compare of the whole disk; make room there,";
        assert!(said.contains(sentence) && !said.contains("its image"), "{said}");
    }
    std::fs::remove_file(state.join("fill")).unwrap();
    let back = |status: &Value| status["untracked"].is_null() && status["dirty"]["hot_extents"].is_u64();
    disk.until("it is begun anew", back);
    let said = bench.run(&["doctor"]).stdout;
    assert!(!said.contains("tracking file") && !said.contains("cannot save"), "{said}");
    disk.settle();
    disk.qemu_io(&["write -P 0x22 60M 64k"]);
    agent.kill();
    let _agent = bench.agent();
    disk.latest_is_the_image();
    let status = disk.status();
    assert!(looked_at(&status) < 48 << 20, "not the whole disk: {status}");
}
