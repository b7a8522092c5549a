//! A virtual machine that does nothing while the agent is restarted, or dies, connects again only with its next
//! request: meanwhile its disk is in use, though nobody is connected.

use backtide_e2e::{Bench, Disk, Held, Reconnecting, tools};

const SIZE: u64 = 8 << 20;

/// A disk with two states, and the LSN of the first.
fn written_twice(disk: &Disk<'_>) -> u64 {
    disk.qemu_io(&["write -P 0x11 0 1M", "flush"]);
    disk.settle();
    let early = disk.last();
    disk.qemu_io(&["write -P 0x22 0 1M", "flush"]);
    disk.settle();
    early
}

/// What would take the disk from under its guest is refused.
fn assert_in_use(bench: &Bench, disk: &Disk<'_>, early: u64) {
    let status = disk.status();
    assert_eq!((&status["clients"], &status["awaited_clients"]), (&0.into(), &1.into()), "{status}");
    let to = format!("lsn:{early}");
    for taken in [
        &["rewind", "vm1", "--to", &to, "--yes"][..],
        &["detach", "vm1"],
        &["resize", "vm1", "--size", "16M"],
    ] {
        let said = bench.run(taken);
        assert_eq!(said.code, 5, "{taken:?}: {said:?}");
        assert!(said.stderr.contains("when its service was interrupted"), "{taken:?}: {said:?}");
    }
}

#[test]
fn a_disk_is_not_taken_from_an_idle_guest_after_a_restart() {
    let bench = Bench::new();
    let (_receiver, _agent, disk) = bench.protected(SIZE, &[]);
    let early = written_twice(&disk);
    let guest = Reconnecting::before(&bench, "vm1", &bench.path("vm1.nbd"));
    tools::qemu_io(&guest.uri, &["read -P 0x22 0 1M"]);
    for _ in 0..2 {
        bench.json(&["agent", "restart"]);
        assert_in_use(&bench, &disk, early);
    }
    // It asks for something again, and is there.
    tools::qemu_io(&guest.uri, &["read -P 0x22 0 1M"]);
    let status = disk.status();
    assert_eq!((&status["clients"], &status["awaited_clients"]), (&1.into(), &0.into()), "{status}");
    bench.json(&["agent", "restart"]);
    assert_in_use(&bench, &disk, early);
    // Who knows that nobody comes back says so.
    bench.json(&["detach", "vm1", "--force"]);
    let disk = bench.attach("vm1", "vm1.img", &[]);
    assert_eq!(disk.status()["awaited_clients"], 0);
    drop(guest);
    bench.json(&["detach", "vm1"]);
}

#[test]
fn a_disk_that_cannot_be_attached_again_is_not_given_up_under_an_idle_guest() {
    let bench = Bench::new();
    let (_receiver, agent, disk) = bench.protected(SIZE, &[]);
    written_twice(&disk);
    let _guest = Reconnecting::before(&bench, "vm1", &bench.path("vm1.nbd"));
    assert_eq!(agent.stop(), 0);
    std::fs::rename(bench.path("vm1.img"), bench.path("away.img")).unwrap();
    let mut agent = bench.agent();
    agent.may_complain("cannot attach the disk again");
    assert_eq!(disk.status()["awaited_clients"], 1);
    let said = bench.run(&["detach", "vm1"]);
    assert_eq!(said.code, 5, "{said:?}");
    assert!(said.sentence().contains("when its service was interrupted"), "{said:?}");
    bench.json_ending(3, &["detach", "vm1", "--force"]);
    // Nobody is expected of it any more, though the guest is there still.
    std::fs::rename(bench.path("away.img"), bench.path("vm1.img")).unwrap();
    let disk = bench.attach("vm1", "vm1.img", &[]);
    assert_eq!(disk.status()["awaited_clients"], 0);
    bench.json(&["detach", "vm1"]);
}

#[test]
fn a_disk_is_not_taken_from_an_idle_guest_after_its_agent_died_and_is_free_when_that_has_ended() {
    let bench = Bench::new();
    let _receiver = bench.receiver();
    let held = Held::dying(&bench);
    bench.image("vm1.img", SIZE);
    let disk = bench.attach("vm1", "vm1.img", &[]);
    disk.wait("sync");
    let early = written_twice(&disk);
    // The record says by itself who has the disk open, from the next look on.
    let until_noted = |is_open: bool| {
        while std::fs::read_to_string(bench.path("state/vm1.json")).unwrap().contains("clientele") != is_open
        {
            std::thread::yield_now();
        }
    };
    until_noted(false);
    let guest = Reconnecting::before(&bench, "vm1", &bench.path("vm1.nbd"));
    tools::qemu_io(&guest.uri, &["read -P 0x22 0 1M"]);
    until_noted(true);
    let instance = bench.json(&["status"])["instance"].clone();
    held.kill_agent();
    while bench.json(&["status"])["instance"] == instance {
        std::thread::yield_now();
    }
    disk.wait("sync");
    assert_in_use(&bench, &disk, early);
    drop(guest);
    assert_eq!(disk.status()["awaited_clients"], 0, "its process has ended");
    bench.json(&["rewind", "vm1", "--to", &format!("lsn:{early}"), "--yes", "--wait"]);
    disk.qemu_io(&["read -P 0x11 0 1M"]);
    bench.json(&["detach", "vm1"]);
    assert_eq!(held.stop(), 0);
}
