//! A disk is forgotten at its receiver: not while anybody uses it, then for good, and its agent is told.

use std::path::Path;

use backtide_e2e::{Bench, tools};
use backtide_storage::KillPoint;

const SIZE: u64 = 64 << 20;

#[test]
fn a_disk_is_forgotten_when_it_is_asked_for_by_name_and_protected_anew_when_it_is_attached_again() {
    let bench = Bench::new();
    let (mut receiver, mut agent, disk) = bench.protected(SIZE, &[]);
    receiver.may_complain("forgotten");
    receiver.may_complain("the disk is forgotten");
    agent.may_complain("was forgotten at this receiver");
    agent.may_complain("has lost the history");
    disk.qemu_io(&["write -P 0x11 0 8M"]);
    disk.settle();
    let refused = bench.run(&["forget", "vm1", "--yes"]);
    assert_eq!(refused.code, 5, "{}", refused.stderr);
    assert!(refused.sentence().contains("disk vm1 is connected: detach it"), "{}", refused.sentence());
    bench.json(&["pause", "vm1"]);
    while bench.json(&["receiver", "status"])["connected"] != 0 {}
    // Nobody can be asked here, and nobody has said yes.
    let asked = bench.run(&["forget", "vm1"]);
    assert_eq!(asked.code, 2, "{}", asked.stderr);
    assert!(asked.stderr.contains("all its history goes"), "{}", asked.stderr);
    assert_eq!(disk.points()["disk"]["name"], "vm1");

    let forgotten = bench.json(&["forget", "vm1", "--yes"]);
    assert_eq!((&forgotten["name"], forgotten["overlays"].as_array().unwrap().len()), (&"vm1".into(), 0));
    assert_eq!(bench.run(&["points", "vm1"]).code, 4);
    assert_eq!(bench.run(&["forget", "vm1", "--yes"]).code, 4);
    // The attach that was there goes on tracking, and hears why.
    bench.json(&["resume", "vm1"]);
    let status = disk.until("it is told", |status| status["last_error"]["code"] == "refused");
    let told = status["last_error"]["message"].as_str().unwrap();
    assert!(told.contains("disk vm1 was forgotten at this receiver at"), "{told}");
    disk.qemu_io(&["write -P 0x22 4M 8M"]);

    bench.json_ending(3, &["detach", "vm1"]);
    let disk = bench.attach("vm1", "vm1.img", &[]);
    disk.wait("sync");
    disk.latest_is_the_image();
    assert!(agent.log().contains("or was told to forget it"), "it is an alarm");
    let points = disk.points();
    assert_eq!(points["intervals"].as_array().unwrap().len(), 1, "nothing of what was before: {points}");
    assert_eq!((agent.stop(), receiver.stop()), (0, 0));
    let report = bench.json(&["fsck", &bench.name("store")]);
    assert_eq!((&report["sound"], report["disks"].as_array().unwrap().len()), (&true.into(), 1), "{report}");
}

fn segments(store: &Path) -> String {
    tools::run("find", &[store.to_str().unwrap(), "-name", "*.seg"])
}

#[test]
fn a_disk_is_gone_though_its_receiver_dies_while_it_forgets_it() {
    for point in [KillPoint::ForgetNoted, KillPoint::ForgetRemoved] {
        let bench = Bench::new();
        let (receiver, mut agent, disk) = bench.protected(SIZE, &[]);
        agent.may_complain("was forgotten at this receiver");
        agent.may_complain("has lost the history");
        disk.qemu_io(&["write -P 0x11 0 4M"]);
        disk.settle();
        bench.json(&["pause", "vm1"]);
        assert_eq!(receiver.stop(), 0);
        let mut doomed = bench.doomed(&["receiver", "run"], point.name());
        while bench.run(&["receiver", "status"]).code == 6 {
            assert!(!doomed.is_dead(), "it dies where it forgets");
        }
        let said = bench.run(&["forget", "vm1", "--yes"]);
        assert!(said.code == 6 && doomed.died(), "{}: {said:?}", point.name());
        let noted_only = point == KillPoint::ForgetNoted;
        assert_eq!(segments(&bench.path("store")).is_empty(), !noted_only, "{}", point.name());

        let mut receiver = bench.receiver();
        receiver.may_complain("the disk is forgotten");
        assert_eq!(bench.run(&["points", "vm1"]).code, 4, "{}", point.name());
        assert_eq!(segments(&bench.path("store")), "", "{}", point.name());
        assert_eq!(bench.run(&["forget", "vm1", "--yes"]).code, 4);
        bench.json(&["detach", "vm1"]);
        let disk = bench.attach("vm1", "vm1.img", &[]);
        disk.wait("sync");
        disk.latest_is_the_image();
        assert_eq!((agent.stop(), receiver.stop()), (0, 0));
        assert_eq!(bench.json(&["fsck", &bench.name("store")])["sound"], true);
    }
}
