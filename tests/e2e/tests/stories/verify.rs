//! The live disk against the receiver: no false alarm under load, no flipped byte overlooked.

use std::{
    os::unix::fs::FileExt,
    path::Path,
    process::{Command, Stdio},
};

use backtide_e2e::{Bench, nbd_wire::Connection, tools};

const SIZE: u64 = 64 << 20;

#[test]
fn verify_under_load_finds_no_difference() {
    let bench = Bench::new();
    let (_receiver, _agent, disk) = bench.protected(SIZE, &[]);
    let load = disk.load(1);
    for _ in 0..3 {
        load.goes_on(100);
        let report = bench.json(&["verify", "vm1"]);
        assert_eq!(report["state"], "done", "{report}");
        assert_eq!(
            (&report["differing_count"], &report["compared_bytes"]),
            (&0.into(), &SIZE.into()),
            "{report}"
        );
        assert!(
            report["to_lsn"].as_u64() > report["from_lsn"].as_u64(),
            "the guest wrote meanwhile: {report}"
        );
    }
    load.stop();
    disk.latest_is_the_image();
    assert_eq!(disk.holes(), Vec::<serde_json::Value>::new(), "a verify makes no hole");
}

/// Requests of all sizes overlap, a dozen at a time; slow enough for the stream to keep up with.
#[test]
fn verify_with_many_requests_under_way_finds_no_difference() {
    let bench = Bench::new();
    let (_receiver, _agent, disk) = bench.protected(SIZE, &[]);
    disk.qemu_io(&["write -P 0x11 0 64M"]);
    let mut fio = Command::new("fio");
    fio.args(["--name=guest", "--ioengine=nbd", "--rw=randrw", "--rwmixread=10", "--bsrange=512-16k"])
        .args([
            "--bs_unaligned=1",
            "--iodepth=16",
            "--rate_iops=400,400",
            "--thread",
            "--time_based",
            "--runtime=3600",
        ])
        .args(["--output-format=terse"])
        .arg(format!("--uri={}", disk.uri()))
        .arg(format!("--size={SIZE}"))
        .stdout(Stdio::null());
    let mut fio = tools::Beside::spawn(fio);
    disk.until("the guest writes", |status| status["counters"]["writes"].as_u64() > Some(200));
    let mut meanwhile = 0;
    while meanwhile < 3 {
        let report = bench.json(&["verify", "vm1"]);
        let found = (&report["state"], &report["differing_count"], &report["compared_bytes"]);
        assert_eq!(found, (&"done".into(), &0.into(), &SIZE.into()), "{report}");
        meanwhile += u32::from(report["to_lsn"].as_u64() > report["from_lsn"].as_u64());
        assert!(fio.runs(), "the guest writes all the time");
    }
    drop(fio);
    disk.settle();
    disk.latest_is_the_image();
}

#[test]
fn verify_of_a_guest_that_is_faster_than_the_stream_waits_for_sync_and_comes_to_its_end() {
    let bench = Bench::new();
    let limits = ["--window", "1MiB", "--guest-delay-max", "0"];
    let (receiver, _agent, disk) = bench.protected(SIZE, &limits);
    disk.qemu_io(&["write -P 0x11 0 20M"]);
    for pattern in 0x22..0x25 {
        disk.settle();
        let before = disk.status()["counters"]["window_overflows"].as_u64();
        receiver.signal("STOP");
        let verify = bench.command(&["verify", "vm1", "--json"]).stdout(Stdio::piped()).spawn().unwrap();
        while !bench.run(&["verify", "vm1", "--last"]).stdout.contains(r#""state":"running""#) {}
        // What is compared at this moment is overwritten, and the stream takes none of it.
        let writes = [0, 4, 8, 12].map(|place| format!("write -P {pattern} {place}M 4M"));
        disk.qemu_io(&writes.each_ref().map(String::as_str));
        disk.until("it is not in sync", |status| status["mode"] != "sync");
        receiver.signal("CONT");
        let said = verify.wait_with_output().unwrap();
        let report: serde_json::Value = serde_json::from_slice(&said.stdout).unwrap();
        let found = (&report["state"], &report["differing_count"], &report["compared_bytes"]);
        assert_eq!(found, (&"done".into(), &0.into(), &SIZE.into()), "{report}");
        assert!(disk.status()["counters"]["window_overflows"].as_u64() > before);
    }
    disk.latest_is_the_image();
}

/// Changes a byte of the data that are all `pattern`, and the checksums that say that it is as it was captured: those of
/// the payload and of the entry (log-receiver/segment/FORMAT.md).
fn falsify(store: &Path, pattern: u8, length: usize) -> u64 {
    const HEADER: usize = 64;
    let listed = tools::run("find", &[store.to_str().unwrap(), "-name", "*.seg"]);
    for path in listed.lines() {
        let mut bytes = std::fs::read(path).unwrap();
        let found = bytes.windows(length).position(|window| window.iter().all(|byte| *byte == pattern));
        let Some(payload) = found else { continue };
        let header = payload - HEADER;
        let offset = u64::from_le_bytes(bytes[header + 32..header + 40].try_into().unwrap());
        bytes[payload + length / 2] ^= 1;
        let payload_crc = crc32c::crc32c(&bytes[payload..payload + length]);
        let salt = crc32c::crc32c(&bytes[16..48]);
        bytes[header + 52..header + 56].copy_from_slice(&payload_crc.to_le_bytes());
        let header_crc = crc32c::crc32c_append(salt, &bytes[header + 4..header + HEADER]);
        bytes[header..header + 4].copy_from_slice(&header_crc.to_le_bytes());
        let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
        file.write_all_at(&bytes[header..payload + length], header as u64).unwrap();
        return offset;
    }
    panic!("the data are in the log");
}

#[test]
fn verify_finds_a_byte_that_is_another_one_at_the_receiver_and_repairs_it_under_load() {
    let bench = Bench::new();
    let (receiver, _agent, disk) = bench.protected(SIZE, &[]);
    disk.qemu_io(&["write -P 0x33 40M 4k", "write -P 0x5c 60M 4k", "flush"]);
    disk.settle();
    receiver.kill();
    assert_eq!(falsify(&bench.path("store"), 0x5c, 4096), 60 << 20);
    let _receiver = bench.receiver();
    disk.settle();
    // What the guest writes over is right again: it leaves that place alone.
    let _load = tools::Beside::spawn(tools::fio_verified(&disk.uri(), 32 << 20, 400));
    let before = disk.status()["counters"]["writes"].as_u64();
    disk.until("the guest writes", |status| {
        status["counters"]["writes"].as_u64() > before.map(|count| count + 50)
    });
    let report = bench.json_ending(8, &["verify", "vm1"]);
    let found = &report["differing"][0];
    let (offset, length) = (found["offset"].as_u64().unwrap(), found["length"].as_u64().unwrap());
    assert_eq!(report["differing_count"], 1, "{report}");
    assert!(offset <= 60 << 20 && offset + length >= (60 << 20) + 4096, "{report}");
    let said = bench.plain(&["verify", "vm1", "--repair"]);
    assert!(said.code == 3 && said.stdout.contains("repaired"), "{said:?}");
    assert_eq!(bench.json(&["verify", "vm1"])["differing_count"], 0);
}

#[test]
fn verify_finds_a_byte_that_changed_behind_the_agent_and_a_compare_repairs_the_copy() {
    let bench = Bench::new();
    let (_receiver, _agent, disk) = bench.protected(SIZE, &[]);
    disk.qemu_io(&["write -P 0x11 0 8M", "flush"]);
    disk.settle();
    // As long as somebody uses the disk the file's time tells nothing.
    let _guest = Connection::open(&disk.uri());
    let image = std::fs::OpenOptions::new().write(true).open(&disk.image).unwrap();
    image.write_all_at(&[0x12], (5 << 20) + 4321).unwrap();
    image.write_all_at(&[0x01], SIZE - 1).unwrap();
    let report = bench.json_ending(8, &["verify", "vm1"]);
    let found: Vec<u64> =
        report["differing"].as_array().unwrap().iter().map(|span| span["offset"].as_u64().unwrap()).collect();
    assert_eq!(report["differing_count"], 2, "{report}");
    assert!(found[0] <= (5 << 20) + 4321 && found[0] + 65536 > (5 << 20) + 4321, "{report}");
    assert!(found[1] < SIZE && found[1] + 65536 >= SIZE, "{report}");
    let said = bench.plain(&["verify", "vm1"]);
    assert!(said.code == 8 && said.stdout.contains("DIFFERS"), "{said:?}");
    // The disk is what the guest has: a compare brings the receiver to it.
    bench.json(&["resync", "vm1", "--compare", "--wait"]);
    assert_eq!(bench.json(&["verify", "vm1"])["differing_count"], 0);
    disk.latest_is_the_image();
}

#[test]
fn verify_repairs_what_differs_when_told_to() {
    let bench = Bench::new();
    let (_receiver, _agent, disk) = bench.protected(SIZE, &[]);
    disk.qemu_io(&["write -P 0x11 0 8M", "flush"]);
    disk.settle();
    // As long as somebody uses the disk the file's time tells nothing.
    let _guest = Connection::open(&disk.uri());
    let image = std::fs::OpenOptions::new().write(true).open(&disk.image).unwrap();
    image.write_all_at(&[0x12], (5 << 20) + 4321).unwrap();
    let load = disk.load(1);
    load.goes_on(50);
    let said = bench.plain(&["verify", "vm1", "--repair"]);
    assert!(said.code == 3 && said.stdout.contains("repaired"), "{said:?}");
    load.goes_on(50);
    load.stop();
    let sent = disk.status()["counters"]["resync_sent_bytes"].as_u64().unwrap();
    assert!(sent <= 4 << 20, "only what differs: {sent}");
    assert_eq!(bench.json(&["verify", "vm1", "--repair"])["differing_count"], 0);
    disk.latest_is_the_image();
}
