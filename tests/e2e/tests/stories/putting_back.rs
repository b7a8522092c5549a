//! A store that is put back to an older copy: what is told of it, and for how long.

use backtide_e2e::{Bench, tools};
use serde_json::json;

const SIZE: u64 = 8 << 20;

#[test]
fn what_a_store_had_less_of_is_told_until_a_person_has_seen_it() {
    let bench = Bench::new();
    let (receiver, mut agent, disk) = bench.protected(SIZE, &[]);
    agent.may_complain("the receiver");
    let nothing = bench.run(&["receiver", "dismiss", "vm1"]);
    assert_eq!((nothing.code, nothing.sentence().contains("nothing is told")), (5, true), "{nothing:?}");
    disk.qemu_io(&["write -P 0x11 0 1M", "flush"]);
    disk.settle();
    let left = disk.last();
    assert_eq!(receiver.stop(), 0);
    tools::run("cp", &["-a", &bench.name("store"), &bench.name("old")]);
    let receiver = bench.receiver();
    disk.qemu_io(&["write -P 0x22 0 1M", "flush"]);
    disk.settle();
    assert_eq!(receiver.stop(), 0);
    tools::run("rm", &["-r", &bench.name("store")]);
    std::fs::rename(bench.path("old"), bench.path("store")).unwrap();
    let receiver = bench.receiver();
    disk.settle();
    disk.latest_is_the_image();
    let told = |alarms: &serde_json::Value| alarms.to_string().contains(&format!("after lsn:{left} ("));
    let alarms = bench.json_ending(3, &["receiver", "status"])["alarms"].clone();
    assert!(told(&alarms), "{alarms}");
    assert_eq!(receiver.stop(), 0);
    let receiver = bench.receiver();
    disk.settle();
    let dismissed = bench.json(&["receiver", "dismiss", "vm1"]);
    assert!(told(&dismissed["shortfalls"]), "{dismissed}");
    assert_eq!(bench.json(&["receiver", "status"])["alarms"], json!([]));
    assert_eq!(bench.run(&["receiver", "dismiss", "vm1"]).code, 5);
    assert_eq!(bench.run(&["receiver", "dismiss", "nobody"]).code, 4);
    assert_eq!(receiver.stop(), 0);
    let _receiver = bench.receiver();
    disk.settle();
    assert_eq!(bench.json(&["receiver", "status"])["alarms"], json!([]), "after a start too");
}
