//! A virtual machine that runs from a protected disk: its host dies and it goes on at another one, and back; and the disk
//! is set back under it while it is paused.
//!
//! The disk answers a flush when the receiver has everything durable, so what the guest's database has acknowledged is
//! there, whatever dies.

use std::path::Path;

use backtide_e2e::{
    Bench, Disk, Held, OtherHost,
    machine::{Machine, Root, cannot_boot, make_root},
    qmp::qmp,
    skip,
};
use serde_json::{Value, json};

const SIZE: u64 = 128 << 20;

/// A disk with the guest's files, of which a machine can run.
fn bootable(bench: &Bench) -> Disk<'_> {
    let image = bench.image("vm1.img", SIZE);
    std::fs::create_dir(bench.path("db")).expect("make a directory");
    make_root(&image, &bench.path("db"));
    let disk = bench.attach("vm1", "vm1.img", &["--ack", "durable"]);
    disk.wait("sync");
    disk
}

/// A database of one table, in the guest's root.
struct Ledger {
    /// So many transactions were acknowledged, numbered from 1.
    acknowledged: u64,
}

impl Ledger {
    fn create(machine: &mut Machine) -> Self {
        machine.run(
            "sqlite3 /db/ledger.db 'pragma journal_mode=wal; create table ledger (n integer primary key)'",
        );
        Self { acknowledged: 0 }
    }

    /// So many more, each acknowledged.
    fn goes_on(&mut self, machine: &mut Machine, count: u64) {
        for _ in 0..count {
            let number = self.acknowledged + 1;
            let insert = format!("pragma synchronous=full; insert into ledger values ({number})");
            machine.run(&format!("sqlite3 /db/ledger.db '{insert}'"));
            self.acknowledged = number;
        }
    }

    /// Exactly the acknowledged ones are there, in a database and a file system that are whole.
    fn is_there(&self, machine: &mut Machine) {
        let said = machine.run(
            "sqlite3 /db/ledger.db 'pragma integrity_check; select count(*), min(n), max(n) from ledger'",
        );
        let count = self.acknowledged;
        assert_eq!(said.trim(), format!("ok\n{count}|1|{count}"));
    }
}

#[test]
fn a_guest_goes_on_at_another_host_and_back_with_all_it_had_acknowledged() {
    if let Some(why) = cannot_boot() {
        return skip(why);
    }
    let bench = Bench::new();
    let (_receiver, first) = (bench.receiver(), bench.agent());
    let disk = bootable(&bench);
    let mut machine = Machine::boot(&bench, "first", Root::FirstDisk, &[&disk.uri()], &[]);
    let mut ledger = Ledger::create(&mut machine);
    ledger.goes_on(&mut machine, 5);
    let epoch = disk.status()["epoch"].as_u64();
    // The host is gone, with the machine.
    first.kill();
    machine.cut_off();

    let (other, second) = OtherHost::start(&bench);
    let done = other.failover(&["--yes"]);
    assert_eq!(done.code, 0, "{done:?}");
    // At once: what is missing is fetched as the guest reads it.
    let mut machine = Machine::boot(&bench, "second", Root::FirstDisk, &[&other.uri()], &[]);
    ledger.is_there(&mut machine);
    assert!(other.status()["epoch"].as_u64() > epoch, "{}", other.status());
    ledger.goes_on(&mut machine, 5);
    let mut first = bench.agent();
    first.may_complain("fenced");
    first.may_complain("another agent has disk vm1");
    disk.until("it is fenced", |status| status["reason_code"] == "fenced");
    ledger.goes_on(&mut machine, 1);
    ledger.is_there(&mut machine);
    machine.cut_off();

    other.settle();
    assert_eq!(other.run(&["detach", "vm1"]).code, 0);
    assert_eq!(second.stop(), 0);
    bench.json_ending(3, &["detach", "vm1"]);
    let report = bench.json(&["failback", "vm1", "--yes"]);
    assert_eq!(report["everything_because"], Value::Null, "{report}");
    let mut machine = Machine::boot(&bench, "back", Root::FirstDisk, &[&disk.uri()], &[]);
    ledger.is_there(&mut machine);
    ledger.goes_on(&mut machine, 1);
    machine.cut_off();
    disk.whole();
    disk.settle();
    disk.latest_is_the_image();
}

#[test]
fn a_guest_is_paused_while_its_disk_goes_back_and_boots_from_that_moment() {
    if let Some(why) = cannot_boot() {
        return skip(why);
    }
    let bench = Bench::new();
    let (_receiver, _agent) = (bench.receiver(), bench.agent());
    let disk = bootable(&bench);
    let monitor = format!("unix:{},server=on,wait=off", bench.name("qmp"));
    let reconnects = format!("{},file.reconnect-delay=60", disk.uri());
    let mut machine =
        Machine::boot_with(&bench, "guest", Root::FirstDisk, &[&reconnects], &[], &["-qmp", &monitor]);
    let mut ledger = Ledger::create(&mut machine);
    ledger.goes_on(&mut machine, 3);
    bench.json(&["mark", "before", "vm1"]);
    let early = Ledger { ..ledger };
    ledger.goes_on(&mut machine, 3);
    disk.settle();
    let late = disk.last();
    let rewind = |to: &str| {
        let socket = bench.name("qmp");
        let report = bench.json(&["rewind", "vm1", "--to", to, "--yes", "--live", "--qmp", &socket]);
        assert_eq!((&report["guest_paused"], &report["hung_up"]), (&json!(true), &json!(1)), "{report}");
        reset(&bench.path("qmp"));
    };
    rewind("mark:before");
    machine.comes_up_again();
    early.is_there(&mut machine);

    // It goes on from there, and nothing of what came later is lost.
    let mut another = early;
    another.goes_on(&mut machine, 1);
    disk.whole();
    disk.settle();
    rewind(&format!("lsn:{late}"));
    machine.comes_up_again();
    ledger.is_there(&mut machine);
    machine.cut_off();
    disk.whole();
    disk.settle();
    disk.latest_is_the_image();
}

#[test]
fn a_guest_notices_nothing_of_an_agent_that_is_restarted_and_killed() {
    if let Some(why) = cannot_boot() {
        return skip(why);
    }
    let bench = Bench::new();
    let _receiver = bench.receiver();
    let held = Held::dying(&bench);
    let disk = bootable(&bench);
    let reconnects = format!("{},file.reconnect-delay=60", disk.uri());
    let mut machine = Machine::boot(&bench, "guest", Root::FirstDisk, &[&reconnects], &[]);
    let mut ledger = Ledger::create(&mut machine);
    for _ in 0..2 {
        ledger.goes_on(&mut machine, 3);
        bench.json(&["agent", "restart"]);
        ledger.goes_on(&mut machine, 3);
        held.kill_agent();
    }
    ledger.goes_on(&mut machine, 1);
    ledger.is_there(&mut machine);
    // Nothing was done in vain, or with an error.
    let errors = machine.run("dmesg | grep -ci 'i/o error' || true");
    assert_eq!(errors.trim(), "0");
    machine.cut_off();
    disk.settle();
    disk.latest_is_the_image();
    assert_eq!(held.stop(), 0);
}

/// Has a paused machine begin anew, as it knows its disk as that was before.
fn reset(monitor: &Path) {
    let command = |name: &str| json!({ "execute": name });
    let answers = qmp(
        monitor,
        &[
            command("query-status"),
            // It was started to end with its guest.
            json!({ "execute": "set-action", "arguments": { "reboot": "reset" } }),
            command("system_reset"),
            command("cont"),
        ],
    );
    assert_eq!(answers[0]["running"], false, "{answers:?}");
}
