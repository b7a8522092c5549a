//! What guest and operator do while a pass runs: the pass is slowed down to be met, then let go.

use std::time::{Duration, Instant};

use backtide_e2e::{Bench, Daemon, Disk, Guest, tools};

const SIZE: u64 = 64 << 20;

/// So slow that a pass over a megabyte does not end by itself while somebody looks.
const SLOW: &str = "64KiB";

/// A disk with 8 MiB of data whose first pass has begun, slowly.
fn in_a_pass<'a>(bench: &'a Bench, options: &[&str]) -> (Daemon, Daemon, Disk<'a>) {
    let (receiver, agent) = (bench.receiver(), bench.agent());
    bench.image("vm1.img", SIZE);
    tools::qemu_io(&bench.name("vm1.img"), &["write -P 0x11 0 8M"]);
    let disk = bench.attach("vm1", "vm1.img", &[&["--resync-rate", SLOW], options].concat());
    disk.until("a pass", |status| status["resync"]["done_bytes"].as_u64() > Some(0));
    (receiver, agent, disk)
}

fn let_go(bench: &Bench, disk: &Disk<'_>) {
    bench.json(&["limits", "vm1", "--resync-rate", "0"]);
    disk.wait("sync");
}

#[test]
fn a_running_pass_is_let_go_and_its_new_limits_outlive_the_agent() {
    let bench = Bench::new();
    let (_receiver, agent, disk) = in_a_pass(&bench, &[]);
    let status = disk.status();
    assert_eq!(status["resync"]["held_to"], 64 << 10, "{status}");
    assert!(status["resync"]["eta_seconds"].as_u64() > Some(20), "8 MiB at 64 KiB a second: {status}");
    let changed = bench.json(&["limits", "vm1", "--resync-rate", "0", "--resync-latency-max", "1234"]);
    let limits = |status: &serde_json::Value| {
        let limits = &status["limits"];
        (limits["resync_bytes_per_second_max"].clone(), limits["resync_latency_us_max"].clone())
    };
    assert_eq!(limits(&changed), (0.into(), 1234.into()), "{changed}");
    disk.wait("sync");
    agent.kill();
    let _agent = bench.agent();
    assert_eq!(limits(&disk.status()), (0.into(), 1234.into()), "{}", disk.status());
    let shown = bench.plain(&["limits", "vm1"]);
    assert!(shown.code == 0 && shown.stdout.contains("1234 µs"), "{shown:?}");
}

#[test]
fn what_a_pass_is_about_is_its_moment_whatever_the_guest_does_meanwhile() {
    let bench = Bench::new();
    let (_receiver, _agent, disk) = in_a_pass(&bench, &["--guest-delay-max", "10000"]);
    let at = disk.status()["resync"]["at"].as_u64().expect("a pass");
    let image_then = bench.path("then.img");
    std::fs::copy(bench.path("vm1.img"), &image_then).expect("copy the image");
    // What the pass has not come to yet: a trim, zeroes, half a kilobyte within a block, and a write.
    disk.qemu_io(&[
        "discard 4M 1M",
        "write -z 5M 64k",
        "write -P 0x22 6292992 512",
        "write -P 0x33 7M 256k",
        "write -P 0x44 20M 4k",
    ]);
    let status = disk.status();
    assert_eq!(status["mode"], "resync", "{status}");
    assert_eq!(status["resync"]["forfeited"], false, "{status}");
    assert!(status["counters"]["copies_before_write"].as_u64() >= Some(4), "{status}");
    let_go(&bench, &disk);
    let restored = disk.restore(&format!("lsn:{at}"));
    let equal =
        std::fs::read(&restored).expect("read a restore") == std::fs::read(&image_then).expect("read");
    assert!(equal, "the point of the pass is the disk as it was when the pass began");
    disk.latest_is_the_image();
}

#[test]
fn a_resync_forced_twice_while_one_runs_ends_in_sync() {
    let bench = Bench::new();
    let (_receiver, _agent, disk) = in_a_pass(&bench, &[]);
    let load = disk.load(1);
    load.goes_on(20);
    bench.json(&["resync", "vm1", "--compare"]);
    bench.json(&["resync", "vm1", "--full"]);
    bench.json(&["resync", "vm1"]);
    assert_eq!(disk.status()["mode"], "resync");
    load.goes_on(20);
    bench.json(&["limits", "vm1", "--resync-rate", "0"]);
    bench.json(&["resync", "vm1", "--wait"]);
    load.goes_on(20);
    load.stop();
    disk.latest_is_the_image();
    let passes = disk.status()["counters"]["passes"].as_u64().expect("a count");
    assert!(passes >= 2, "what was forced is done after the first pass: {passes}");
}

#[test]
fn a_pause_ends_a_pass_and_a_resume_begins_another() {
    let bench = Bench::new();
    let (_receiver, _agent, disk) = in_a_pass(&bench, &[]);
    bench.json(&["pause", "vm1"]);
    disk.qemu_io(&["write -P 0x55 1M 1M", "discard 2M 1M"]);
    let status = disk.status();
    assert!(status["resync"].is_null() && status["dirty"]["bytes"].as_u64() >= Some(7 << 20), "{status}");
    bench.json(&["resume", "vm1"]);
    disk.until("another pass", |status| status["resync"]["done_bytes"].as_u64() > Some(0));
    let_go(&bench, &disk);
    disk.latest_is_the_image();
}

#[test]
fn a_full_window_delays_the_guest_by_no_more_than_its_bound() {
    const BOUND: Duration = Duration::from_millis(100);
    let bench = Bench::new();
    let options = ["--window", "4MiB", "--guest-delay-max", "100"];
    let (receiver, _agent, disk) = bench.protected(SIZE, &options);
    let mut guest = Guest::connect(&disk.uri());
    let data = vec![0x66; 64 << 10];
    receiver.signal("STOP");
    let mut longest = Duration::ZERO;
    for number in 0..80 {
        let began = Instant::now();
        guest.write(number * (64 << 10), &data).expect("a write");
        longest = longest.max(began.elapsed());
    }
    let status = disk.status();
    receiver.signal("CONT");
    assert_eq!(status["counters"]["window_overflows"], 1, "80 writes do not fit: {status}");
    let told = Duration::from_micros(status["counters"]["guest_delay_max_us"].as_u64().expect("a time"));
    assert!(status["counters"]["delayed_answers"].as_u64() > Some(10), "{status}");
    assert!(told > BOUND / 4, "a window that fills up delays more and more: {told:?}");
    // To the microsecond, but for what the machine was late: the filter's own tests have a clock without that.
    let late = status["counters"]["guest_delay_late_max_us"].as_u64().expect("a time");
    assert!(told <= BOUND + Duration::from_micros(late), "{told:?} told, {late} us of it late: {status}");
    assert!(longest >= told, "what is told is a part of what is seen: {longest:?} seen, {told:?} told");
    disk.wait("sync");
    disk.latest_is_the_image();
}

#[test]
fn without_a_bound_for_delays_a_full_window_delays_nobody() {
    let bench = Bench::new();
    let (receiver, _agent, disk) = bench.protected(SIZE, &["--window", "1MiB", "--guest-delay-max", "0"]);
    receiver.signal("STOP");
    disk.qemu_io(&["write -P 0x77 0 16M"]);
    let status = disk.status();
    receiver.signal("CONT");
    assert_eq!(status["counters"]["guest_delay_max_us"], 0, "{status}");
    assert_eq!(status["counters"]["delayed_answers"], 0, "{status}");
    disk.latest_is_the_image();
}

#[test]
fn a_verify_of_a_huge_sparse_disk_reads_its_data_only() {
    let bench = Bench::new();
    let (_receiver, _agent, disk) = bench.protected(1 << 40, &[]);
    disk.qemu_io(&["write -P 0x11 0 1M", "write -P 0x22 512G 64k", "write -P 0x33 1099511623680 4k"]);
    let report = bench.json(&["verify", "vm1"]);
    assert_eq!((&report["state"], &report["differing_bytes"]), (&"done".into(), &0.into()), "{report}");
    assert_eq!(
        (&report["compared_bytes"], &report["total_bytes"]),
        (&(1u64 << 40).into(), &(1u64 << 40).into())
    );
    // One byte where the disk holds nothing, behind the agent's back.
    use std::os::unix::fs::FileExt;
    let image = std::fs::File::options().write(true).open(bench.path("vm1.img")).expect("open the image");
    image.write_all_at(&[1], 700 << 30).expect("write a byte");
    let report = bench.json_ending(8, &["verify", "vm1"]);
    assert_eq!(report["differing_count"], 1, "{report}");
    assert_eq!(report["differing"][0]["offset"], 700u64 << 30, "{report}");
}
