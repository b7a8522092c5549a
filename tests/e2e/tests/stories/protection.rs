//! A disk is attached, written and given back.

use backtide_e2e::{Bench, tools};

const SIZE: u64 = 64 << 20;

#[test]
fn what_qemu_io_writes_comes_back_from_the_receiver() {
    let bench = Bench::new();
    let (_receiver, _agent, disk) = bench.protected(SIZE, &[]);
    disk.qemu_io(&[
        "write -P 0x11 0 1M",
        "write -P 0x22 4k 512",
        "write -f -P 0x33 5M 32k",
        "write -P 0x44 10M 32M",
        "write -z 11M 64k",
        "write -z -u 12M 1M",
        "discard 14M 1M",
        "aio_write -P 0x55 16M 64k",
        "aio_write -P 0x66 17M 64k",
        "aio_flush",
        "write -P 0x77 67108352 512",
        "flush",
        "read -P 0x11 512k 512k",
        "read -P 0 12M 1M",
        "read -P 0 14M 1M",
        "read -P 0x77 67108352 512",
    ]);
    disk.latest_is_the_image();
}

#[test]
fn nbdinfo_shows_what_is_allocated_and_nbdcopy_reads_the_disk() {
    let bench = Bench::new();
    let (_receiver, _agent, disk) = bench.protected(SIZE, &[]);
    disk.qemu_io(&["write -P 0x11 1M 1M", "flush"]);
    let shown = tools::run("nbdinfo", &["--json", &disk.uri()]);
    for line in [
        "\"export-name\": \"vm1\"",
        "\"export-size\": 67108864",
        "\"is_read_only\": false",
        "base:allocation",
    ] {
        assert!(shown.contains(line), "{line} is not in {shown}");
    }
    let map = tools::run("nbdinfo", &["--map", &disk.uri()]);
    let extents: Vec<Vec<&str>> = map.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(extents[0][..3], ["0", "1048576", "3"], "{map}");
    assert_eq!(extents[1][..3], ["1048576", "1048576", "0"], "{map}");
    assert_eq!(extents[2][..3], ["2097152", "65011712", "3"], "{map}");

    let copy = bench.name("copy.img");
    tools::run("nbdcopy", &[&disk.uri(), &copy]);
    tools::assert_same(&disk.image, &copy);
    tools::run("nbdcopy", &[&copy, &disk.uri()]);
    disk.latest_is_the_image();
}

#[test]
fn an_image_with_data_is_protected_from_the_attach_on() {
    let bench = Bench::new();
    let (_receiver, _agent) = (bench.receiver(), bench.agent());
    bench.image("vm1.img", SIZE);
    tools::qemu_io(&bench.name("vm1.img"), &["write -P 0x11 0 20M", "write -P 0x22 40M 10M"]);
    std::fs::copy(bench.path("vm1.img"), bench.path("at-attach.img")).unwrap();
    let disk = bench.attach("vm1", "vm1.img", &[]);
    // The guest does not wait for its disk to be seeded, and the first point is that of the attach.
    disk.qemu_io(&["write -P 0x33 0 1M", "write -P 0x44 45M 10M"]);
    disk.latest_is_the_image();
    let first = disk.points()["first"]["lsn"].as_u64().unwrap();
    let restored = disk.restore(&format!("lsn:{first}"));
    tools::assert_same_images(&bench.path("at-attach.img"), &restored);
}

#[test]
fn disks_of_one_agent_keep_apart() {
    let bench = Bench::new();
    let (_receiver, _agent) = (bench.receiver(), bench.agent());
    let disks: Vec<_> = (1..=4)
        .map(|number| {
            let image = format!("vm{number}.img");
            bench.image(&image, SIZE - (number << 20));
            bench.attach(&format!("vm{number}"), &image, &[])
        })
        .collect();
    let loads: Vec<_> = disks.iter().zip(1..).map(|(disk, seed)| disk.load(seed)).collect();
    loads.iter().for_each(|load| load.goes_on(200));
    let written: Vec<_> = loads.into_iter().map(backtide_e2e::Load::stop).collect();
    for (disk, written) in disks.iter().zip(written) {
        disk.latest_is_the_image();
        let model = written.model();
        model.assert_is_in(disk.image.as_ref(), model.len(), &disk.name);
    }
    assert_eq!(bench.json(&["status"])["disks"].as_array().unwrap().len(), 4);
}

#[test]
fn two_connections_of_fio_find_what_they_wrote() {
    let bench = Bench::new();
    let (_receiver, _agent, disk) = bench.protected(SIZE, &[]);
    let mut fio = tools::fio_verified(&disk.uri(), SIZE / 2, 0);
    fio.args(["--numjobs=2", "--offset_increment=50%"]);
    tools::Beside::spawn(fio).succeed();
    disk.latest_is_the_image();
}
