//! Damage in the store is an error that names the place, never data.

use std::{
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::Stdio,
};

use backtide_e2e::{Bench, tools};

const SIZE: u64 = 32 << 20;

fn segments(store: &Path) -> Vec<PathBuf> {
    let listed = tools::run("find", &[store.to_str().unwrap(), "-name", "*.seg"]);
    let mut found: Vec<PathBuf> = listed.lines().map(PathBuf::from).collect();
    found.sort();
    found
}

/// Flips one bit in the middle of the data that `pattern` marks.
fn flip(path: &Path, pattern: u8) -> u64 {
    let bytes = std::fs::read(path).unwrap();
    let run = [pattern; 4096];
    let at =
        bytes.windows(run.len()).position(|window| window == run).expect("the data are in the log") + 2000;
    let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
    file.write_all_at(&[bytes[at] ^ 1], at as u64).unwrap();
    at as u64
}

#[test]
fn a_flipped_bit_in_a_sealed_segment_is_named_and_other_points_are_served() {
    let bench = Bench::new();
    let receiver = bench.receiver_with("[limits]\nsegment_bytes = 1048576\n");
    let _agent = bench.agent();
    bench.image("vm1.img", SIZE);
    let disk = bench.attach("vm1", "vm1.img", &[]);
    disk.wait("sync");
    disk.qemu_io(&["write -P 0x11 0 64k"]);
    disk.settle();
    let good = disk.last();
    std::fs::copy(&disk.image, bench.path("good.img")).unwrap();
    disk.qemu_io(&["write -P 0x5c 1M 64k"]);
    disk.settle();
    let bad = disk.last();
    disk.qemu_io(&["write -P 0x33 4M 4M", "write -P 0x44 1M 64k"]);
    disk.settle();
    let holder = segments(&bench.path("store")).into_iter().find(|path| {
        let bytes = std::fs::read(path).unwrap();
        bytes.windows(4096).any(|window| window == [0x5c; 4096])
    });
    let holder = holder.expect("a segment holds the data");
    flip(&holder, 0x5c);
    let listing = bench.plain(&["inspect", holder.to_str().unwrap()]);
    assert_eq!((listing.code, listing.stdout.contains("DAMAGED")), (8, true), "{listing:?}");
    // A receiver that has nothing of it in memory.
    receiver.kill();
    let mut receiver = bench.receiver_with("[limits]\nsegment_bytes = 1048576\n");
    receiver.may_complain("damage");
    receiver.may_complain("checksum");
    disk.settle();

    let said = disk.restore_fails(&format!("lsn:{bad}"));
    assert_eq!(said.code, 8, "{said:?}");
    let sentence = said.sentence();
    let name = holder.file_name().unwrap().to_str().unwrap();
    assert!(sentence.contains(name), "the file is named: {sentence}");
    tools::assert_same_images(&bench.path("good.img"), &disk.restore(&format!("lsn:{good}")));
    disk.latest_is_the_image();
}

#[test]
fn damage_of_before_an_outage_costs_no_point_of_the_outage() {
    for newest in [false, true] {
        let bench = Bench::new();
        let (receiver, mut agent, disk) = bench.protected(SIZE, &[]);
        disk.qemu_io(&["write -P 0x5c 1M 64k", "flush"]);
        if !newest {
            disk.qemu_io(&["write -P 0x44 1M 64k", "flush"]);
        }
        disk.settle();
        assert_eq!(receiver.stop(), 0);
        let mut kept = Vec::new();
        for (number, pattern) in ["0x61", "0x62", "0x63"].into_iter().enumerate() {
            disk.qemu_io(&[&format!("write -P {pattern} 4M 64k"), "flush"]);
            let (label, copy) = (format!("m{number}"), bench.path(&format!("m{number}.img")));
            bench.json_ending(3, &["mark", &label, "vm1", "--wait", "0s"]);
            std::fs::copy(&disk.image, &copy).unwrap();
            kept.push((format!("mark:{label}"), copy));
        }
        let holder = segments(&bench.path("store")).pop().unwrap();
        flip(&holder, 0x5c);
        let mut receiver = bench.receiver();
        receiver.may_complain("the log has damaged entries");
        if newest {
            // A compare brings it back; the history of the outage does not have to go for that.
            receiver.may_complain("is to be compared");
            receiver.may_complain("is damaged at byte");
            agent.may_complain("is damaged or in doubt");
        }
        disk.until("it is compared", |status| status["resync_due"] == false && status["resync"].is_null());
        disk.settle();
        for (mark, copy) in &kept {
            let at_mark =
                bench.run(&["restore", "vm1", "--at", mark, "--output", &bench.name("out.img"), "--force"]);
            // Until it was compared the damaged bytes are needed.
            assert_eq!(at_mark.code, if newest { 8 } else { 0 }, "{at_mark:?}");
            if !newest {
                tools::assert_same_images(copy, &bench.path("out.img"));
            }
        }
        disk.latest_is_the_image();
        let points = bench.json_ending(8, &["points", "vm1"]);
        assert!(
            points["marks"].as_array().unwrap().iter().all(|mark| mark["recoverable"] == true),
            "{points}"
        );
        assert_eq!(points["holes"], serde_json::json!([]), "{points}");
    }
}

#[test]
fn a_torn_tail_is_cut_and_the_disk_comes_into_sync_again() {
    let bench = Bench::new();
    let (receiver, _agent, disk) = bench.protected(SIZE, &[]);
    let before = disk.last();
    let load = disk.load(1);
    load.goes_on(100);
    disk.settle();
    receiver.kill();
    // What a power cut may leave behind the last durable record.
    let open = segments(&bench.path("store")).pop().unwrap();
    let mut file = std::fs::OpenOptions::new().append(true).open(open).unwrap();
    std::io::Write::write_all(&mut file, &[0xa5; 10_000]).unwrap();
    let _receiver = bench.receiver();
    disk.wait("sync");
    load.goes_on(50);
    let model = load.stop().model();
    disk.latest_is_the_image();
    assert_eq!(disk.holes(), Vec::<serde_json::Value>::new());
    disk.point_is_the_model(before, 90, &model);
}

#[test]
fn a_log_that_lost_a_segment_is_repaired_and_its_disk_goes_on() {
    let bench = Bench::new();
    let limits = "[limits]\nsegment_bytes = 1048576\n";
    let receiver = bench.receiver_with(limits);
    let mut agent = bench.agent();
    agent.may_complain("has lost the history");
    bench.image("vm1.img", SIZE);
    let disk = bench.attach("vm1", "vm1.img", &[]);
    disk.wait("sync");
    disk.qemu_io(&["write -P 0x11 0 64k"]);
    disk.settle();
    let good = disk.last();
    std::fs::copy(&disk.image, bench.path("good.img")).unwrap();
    disk.qemu_io(&["write -P 0x22 4M 8M", "write -P 0x33 1M 4M"]);
    disk.settle();
    let bad = disk.last();
    assert_eq!(receiver.stop(), 0);
    let found = segments(&bench.path("store"));
    assert!(found.len() > 3, "{found:?}");
    std::fs::remove_file(&found[2]).unwrap();
    let store = bench.name("store");
    assert_eq!(bench.plain(&["fsck", &store]).code, 8);
    let both = bench.plain(&["fsck", &store, "--repair", "--rebuild"]);
    assert_eq!(both.code, 2, "{both:?}");
    let repaired = bench.plain(&["fsck", &store, "--repair"]);
    assert_eq!(repaired.code, 3, "{repaired:?}");
    assert!(
        repaired.stdout.contains("vm1: CUT: every point after ") && repaired.stdout.contains("is missing")
    );
    assert!(repaired.stdout.contains(&format!("{store} is sound")), "{repaired:?}");
    assert_eq!(bench.plain(&["fsck", &store]).code, 0);
    assert_eq!(bench.plain(&["fsck", &store, "--repair"]).code, 0, "there is nothing left to do");

    let mut receiver = bench.receiver_with(limits);
    receiver.may_complain("has cut it");
    assert_eq!(bench.plain(&["fsck", &store, "--repair"]).code, 5, "a receiver has the store");
    disk.wait("sync");
    disk.latest_is_the_image();
    let holes = disk.holes();
    assert_eq!(holes.len(), 1, "{holes:?}");
    assert!(holes[0]["reason"].as_str().unwrap().contains("is missing"), "{holes:?}");
    tools::assert_same_images(&bench.path("good.img"), &disk.restore(&format!("lsn:{good}")));
    assert_ne!(disk.restore_fails(&format!("lsn:{bad}")).code, 0);
    disk.qemu_io(&["write -P 0x44 2M 1M"]);
    disk.settle();
    disk.latest_is_the_image();
}

#[test]
fn a_lost_store_is_an_alarm_and_everything_is_sent_again() {
    let bench = Bench::new();
    let (receiver, mut agent, disk) = bench.protected(SIZE, &[]);
    agent.may_complain("has lost the history");
    disk.qemu_io(&["write -P 0x11 0 8M"]);
    disk.settle();
    let history = disk.status()["history"].clone();
    receiver.kill();
    std::fs::rename(bench.path("store"), bench.path("lost")).unwrap();
    let _receiver = bench.receiver();
    disk.wait("sync");
    assert_ne!(disk.status()["history"], history, "another store has another history");
    assert!(agent.log().contains("has lost the history of disk vm1"), "it is an alarm");
    disk.latest_is_the_image();
}

#[test]
fn a_rolled_back_store_is_noticed_and_compared() {
    let bench = Bench::new();
    let (receiver, mut agent, disk) = bench.protected(SIZE, &[]);
    agent.may_complain("was its store rolled back?");
    disk.qemu_io(&["write -P 0x11 0 4M"]);
    disk.settle();
    assert_eq!(receiver.stop(), 0);
    tools::run("cp", &["-a", &bench.name("store"), &bench.name("old")]);
    let receiver = bench.receiver();
    disk.qemu_io(&["write -P 0x22 2M 4M"]);
    disk.settle();
    assert_eq!(receiver.stop(), 0);
    tools::run("rm", &["-r", &bench.name("store")]);
    std::fs::rename(bench.path("old"), bench.path("store")).unwrap();
    let _receiver = bench.receiver();
    disk.wait("sync");
    disk.latest_is_the_image();
    assert!(agent.log().contains("was its store rolled back?"), "it is an alarm");
    let holes = disk.holes();
    assert!(holes.iter().any(|hole| hole["reason_code"] == "receiver-rolled-back"), "{}", disk.points());
}

#[test]
fn a_bad_segment_header_takes_no_history_and_the_disk_comes_into_sync_again() {
    let bench = Bench::new();
    let (receiver, mut agent, disk) = bench.protected(SIZE, &[]);
    agent.may_complain("has lost the history");
    disk.qemu_io(&["write -P 0x11 0 4M"]);
    disk.settle();
    let old = disk.last();
    std::fs::copy(&disk.image, bench.path("old.img")).unwrap();
    assert_eq!(agent.log().matches("has lost the history").count(), 0);
    assert_eq!(receiver.stop(), 0);
    disk.qemu_io(&["write -P 0x22 1M 1M"]);
    let segment = segments(&bench.path("store")).remove(0);
    let header = std::fs::read(&segment).unwrap();
    let file = std::fs::OpenOptions::new().write(true).open(&segment).unwrap();
    file.write_all_at(&[header[40] ^ 1], 40).unwrap();

    let mut receiver = bench.receiver();
    receiver.may_complain("damaged");
    receiver.may_complain("cannot be opened");
    disk.wait("sync");
    disk.latest_is_the_image();
    tools::assert_same_images(&bench.path("old.img"), &disk.restore(&format!("lsn:{old}")));
    let holes = disk.holes();
    assert!(holes.iter().any(|hole| hole["reason_code"] == "damaged"), "{}", disk.points());

    let said = bench.run(&["inspect", segment.to_str().unwrap()]);
    assert_eq!(said.code, 8, "{said:?}");
    assert!(said.stderr.contains("the segment is damaged"), "{said:?}");
}

#[test]
fn points_of_a_damaged_log_name_the_place_and_end_with_8() {
    let bench = Bench::new();
    let (receiver, agent, disk) = bench.protected(SIZE, &[]);
    disk.qemu_io(&["write -P 0x11 0 4M"]);
    disk.settle();
    let last = disk.last();
    assert_eq!(agent.stop(), 0);
    assert_eq!(receiver.stop(), 0);
    let segment = segments(&bench.path("store")).remove(0);
    let file = std::fs::OpenOptions::new().write(true).open(&segment).unwrap();
    file.write_all_at(&[0xff; 16], 100).unwrap();
    let mut receiver = bench.receiver();
    receiver.may_complain("damaged");
    receiver.may_complain("cannot be opened");
    let said = bench.run(&["points", "vm1"]);
    assert_eq!(said.code, 8, "{said:?}");
    let points: serde_json::Value = serde_json::from_str(&said.stdout).unwrap();
    let damage = points["damage"].as_str().unwrap();
    assert!(damage.contains("0000000000000001.seg is damaged at byte 0"), "{damage}");
    assert_eq!(points["last"]["lsn"], last, "{points}");
    // Of a log that goes on nowhere nobody knows what came after that.
    let output = bench.name("latest.img");
    bench.json_ending(3, &["restore", "vm1", "--at", "latest", "--output", &output]);
    tools::assert_same_images(&bench.path("vm1.img"), output.as_ref());
}

#[test]
fn a_scrub_mends_the_log_from_the_disk_while_that_is_attached() {
    let bench = Bench::new();
    let mut receiver = bench.receiver_with("[limits]\nsegment_bytes = 1048576\n");
    let agent = bench.agent();
    bench.image("vm1.img", SIZE);
    let disk = bench.attach("vm1", "vm1.img", &[]);
    disk.wait("sync");
    disk.qemu_io(&["write -P 0x5c 1M 64k", "write -P 0x33 4M 4M"]);
    disk.settle();
    let at = disk.last();
    let segments = segments(&bench.path("store"));
    let before: Vec<Vec<u8>> = segments.iter().map(|path| std::fs::read(path).unwrap()).collect();
    let nth = before.iter().position(|bytes| bytes.windows(4096).any(|window| window == [0x5c; 4096]));
    let nth = nth.expect("a segment holds the data");
    flip(&segments[nth], 0x5c);
    receiver.may_complain("the scrub has mended damage");
    let scrub = bench.json_ending(3, &["scrub", "--rate", "0"]);
    let mended = scrub["disks"][0]["mended"].as_array().unwrap();
    assert!(scrub["sound"] == true && mended.len() == 1, "{scrub}");
    assert!(std::fs::read(&segments[nth]).unwrap() == before[nth], "byte for byte");
    tools::assert_same_images(&bench.path("vm1.img"), &disk.restore(&format!("lsn:{at}")));
    assert_eq!(bench.json(&["scrub", "--rate", "0"])["sound"], true);
    assert_eq!(agent.stop(), 0);
    assert_eq!(receiver.stop(), 0);
}

#[test]
fn fsck_and_scrub_say_what_is_sound_and_what_is_not() {
    let bench = Bench::new();
    let (receiver, agent, disk) = bench.protected(SIZE, &[]);
    disk.qemu_io(&["write -P 0x5c 1M 64k"]);
    disk.settle();
    let store = bench.name("store");
    let said = bench.run(&["fsck", &store]);
    assert_eq!((said.code, said.error()["code"].as_str()), (5, Some("locked")), "{said:?}");
    let scrub = bench.json(&["scrub"]);
    assert_eq!((&scrub["sound"], &scrub["disks"][0]["name"]), (&true.into(), &"vm1".into()), "{scrub}");
    let status = bench.json(&["receiver", "status"]);
    assert_eq!((&status["scrub"], &status["alarms"]), (&scrub, &serde_json::json!([])), "{status}");

    let segment = segments(&bench.path("store")).remove(0);
    flip(&segment, 0x5c);
    let scrub = bench.json_ending(8, &["scrub", "vm1", "--rate", "0"]);
    let name = segment.file_name().unwrap().to_str().unwrap();
    let damage = scrub["disks"][0]["damage"][0].as_str().unwrap();
    assert!(damage.contains(name) && damage.contains("at byte"), "{damage}");
    // What it found is told by whoever is asked next.
    let points = bench.json_ending(8, &["points", "vm1"]);
    assert_eq!(points["damage"], damage, "{points}");
    let around = bench.json_ending(8, &["points", "vm1", "--around", "latest"]);
    assert_eq!((&around["damage"], &around["touched"]), (&points["damage"], &points["touched"]), "{around}");
    let around = bench.plain(&["points", "vm1", "--around", "latest"]);
    assert!(around.stdout.contains("some bytes are DAMAGED"), "{around:?}");
    let waited = bench.run(&["wait", "vm1", "--for", "point", "--at", "latest"]);
    assert_eq!(waited.code, 8, "{waited:?}");
    // Also when nobody reads what it says.
    let mut unread = bench.command(&["points", "vm1"]);
    let mut unread = unread.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    drop(unread.stdout.take());
    assert_eq!(unread.wait().unwrap().code(), Some(8));
    let status = bench.json_ending(3, &["receiver", "status"]);
    assert!(status["alarms"][0].as_str().unwrap().contains(damage), "{status}");
    let doctor = bench.run(&["doctor"]);
    assert!(doctor.code != 0 && doctor.stdout.contains(name), "{doctor:?}");
    let mut receiver = receiver;
    receiver.may_complain("the scrub found damage");
    assert_eq!(agent.stop(), 0);
    assert_eq!(receiver.stop(), 0);
    let report = bench.json_ending(8, &["fsck", &store]);
    let damage = report["disks"][0]["damage"][0].as_str().unwrap();
    // No entry behind it tells that it was durable, but the mark beside the log does.
    let directory = segment.parent().unwrap().to_str().unwrap();
    assert!(damage.contains(directory), "{damage}");
    flip_back(&segment, 0x5c);
    assert_eq!(bench.json(&["fsck", &store])["sound"], true);
    assert_eq!(bench.run(&["fsck", &bench.name("nothing")]).code, 4);
}

/// Undoes [`flip`].
fn flip_back(path: &Path, pattern: u8) {
    let mut bytes = std::fs::read(path).unwrap();
    let at = bytes.windows(3).position(|window| window == [pattern, pattern ^ 1, pattern]).unwrap() + 1;
    bytes[at] = pattern;
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn a_scrub_begins_by_itself_where_the_configuration_says_so_and_status_tells_when_the_next_does() {
    let bench = Bench::new();
    let config = bench.path("wrong.toml");
    std::fs::write(&config, "[scrub]\nevery = \"59m\"\n").unwrap();
    let refused = bench.run(&["receiver", "run", "--check", "--config", config.to_str().unwrap()]);
    assert_eq!(refused.code, 2, "{refused:?}");
    assert!(refused.stderr.contains("is no time between two scrubs"), "{refused:?}");
    let _receiver = bench.receiver_with("[scrub]\nevery = \"1d\"\nbytes_per_second_max = 0\n");
    let next = loop {
        let status = bench.json(&["receiver", "status"]);
        if status["scrub"]["ended"].is_u64() {
            assert_eq!(status["scrub"]["sound"], true, "{status}");
            break status["scrub_next"]["at"].as_u64().unwrap() - status["scrub"]["ended"].as_u64().unwrap();
        }
    };
    assert_eq!(next, 24 * 60 * 60 * 1_000_000);
    let told = bench.plain(&["receiver", "status"]).stdout;
    assert!(told.lines().any(|line| line.starts_with("next scrub")), "{told}");
}
