//! SQLite in a virtual machine that runs from the protected disk: with a write-ahead log and with a
//! rollback journal. Another machine runs from a mount of the disk as it was.

use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering},
};

use backtide_e2e::{
    Bench,
    ledger::{Client, Moment, seed},
    machine::{Machine, Port, Root, cannot_boot, make_root},
    skip,
};
use serde_json::Value;

use super::{Story, assert_in_hole, mount_at, two_outages};

const SIZE: u64 = 256 << 20;

/// The databases: each of a port's name, and what makes a commit of it durable. Of a rollback journal
/// that is its removal, so the directory must be synced too.
const DATABASES: [(&str, &str, &str); 2] = [("wal", "wal", "full"), ("rollback", "delete", "extra")];

/// So many points are looked at by one machine.
const DISKS_MAX: usize = 12;

#[test]
fn sqlite_in_a_guest_has_at_every_moment_what_it_had_acknowledged() {
    if let Some(why) = cannot_boot() {
        return skip(why);
    }
    let seed = seed();
    let bench = Bench::new();
    let (receiver, _agent) = (bench.receiver(), bench.agent());
    let image = bench.image("vm1.img", SIZE);
    std::fs::create_dir(bench.path("db")).unwrap();
    make_root(&image, &bench.path("db"));
    let options = ["--window", "16MiB", "--guest-delay-max", "0"];
    let disk = bench.attach("vm1", "vm1.img", &options);
    disk.wait("sync");
    let names = DATABASES.map(|(name, ..)| name);
    let mut machine = Machine::boot(&bench, "guest", Root::FirstDisk, &[&disk.uri()], &names);
    let ballast = Arc::new(AtomicU32::new(LITTLE));
    let clients = DATABASES.map(|(name, journal, synchronous)| {
        machine.run(&format!(
            "sqlite3 /db/{name}.db 'pragma journal_mode={journal}; create table ledger (n integer primary key, \
             ballast blob)'"
        ));
        // A port can be opened once only, so for both ways at once.
        machine.run(&format!("exec 4<>/dev/ports/{name}; sqlite3 /db/{name}.db <&4 >&4 2>&4 &"));
        let mut port = machine.port();
        port.say(&format!("pragma synchronous={synchronous};"));
        let ballast = Arc::clone(&ballast);
        Client::start(move |number| transact(&mut port, number, ballast.load(Ordering::Relaxed)))
    });
    let story = two_outages(&bench, receiver, &disk, clients.into(), |heavy| {
        ballast.store(if heavy { MUCH } else { LITTLE }, Ordering::Relaxed);
    });
    machine.cut_off();
    disk.settle();

    story.assert_refused_in_the_hole(&bench);
    let (mut mounts, mut to_boot) = (Vec::new(), None);
    for (at, whole) in story.moments(seed) {
        match mount_at(&bench, at) {
            Ok(mount) => {
                to_boot.get_or_insert(at);
                mounts.push((at, mount));
            }
            Err(refused) => assert_in_hole(&refused, at, whole),
        }
        if mounts.len() == DISKS_MAX {
            look(&bench, &mut mounts, &story);
        }
    }
    look(&bench, &mut mounts, &story);

    let at = to_boot.expect("the disk was in sync before the long outage");
    let mount = mount_at(&bench, at).expect("it was a point a moment ago");
    let uri = mount["uri"].as_str().unwrap();
    let mut machine = Machine::boot(&bench, "again", Root::FirstDisk, &[uri], &[]);
    count(&mut machine, "", at, &story);
    machine.run("sqlite3 /db/wal.db 'insert into ledger values (1000000, null)' && sync");
    machine.cut_off();
}

/// Bytes beside a transaction's number, usually, and to fill the window.
const LITTLE: u32 = 2_000;
const MUCH: u32 = 1 << 20;

/// One transaction, which is durable when its answer comes.
fn transact(port: &mut Port, number: u64, ballast: u32) -> Result<(), String> {
    port.say(&format!("insert into ledger values ({number}, randomblob({ballast})); select 'done';"));
    match port.line().as_str() {
        "done" => Ok(()),
        other => Err(format!("{other:?}: {}", port.console())),
    }
}

/// Boots a machine with all of these points as disks: each is recovered and counted as after a power
/// cut.
fn look(bench: &Bench, mounts: &mut Vec<(Moment, Value)>, story: &Story) {
    let Some((first, _)) = mounts.first() else { return };
    let uris: Vec<&str> = mounts.iter().map(|(_, mount)| mount["uri"].as_str().unwrap()).collect();
    let mut machine = Machine::boot(bench, &format!("at-{}", first.0), Root::Memory, &uris, &[]);
    for ((at, _), letter) in mounts.iter().zip('a'..) {
        // It ends with 1 when it has mended what a cut leaves, and with more when it could not.
        machine.run(&format!("e2fsck -fp /dev/vd{letter} || [ $? -eq 1 ]"));
        machine.run(&format!("e2fsck -fn /dev/vd{letter}"));
        machine.run(&format!("mount -t ext4 /dev/vd{letter} /mnt"));
        count(&mut machine, "/mnt", *at, story);
        machine.run("umount /mnt");
    }
    machine.cut_off();
    for (_, mount) in mounts.drain(..) {
        bench.json(&["unmount", mount["id"].as_str().unwrap(), "--discard"]);
    }
}

/// The databases below a directory of a guest are whole and hold what they must.
fn count(machine: &mut Machine, root: &str, at: Moment, story: &Story) {
    for ((name, ..), ledger) in DATABASES.iter().zip(&story.ledgers) {
        let counted = machine.run(&format!(
            "sqlite3 {root}/db/{name}.db 'pragma integrity_check; select count(*), ifnull(max(n), 0), \
             ifnull(min(n), 1), count(length(ballast)) from ledger'"
        ));
        let (whole, numbers) = counted.split_once('\n').expect("two lines");
        assert_eq!(whole, "ok", "{name} at {at:?}: {counted}");
        let numbers: Vec<u64> = numbers.trim().split('|').map(|number| number.parse().unwrap()).collect();
        assert_eq!((numbers[0], 1, numbers[0]), (numbers[1], numbers[2], numbers[3]), "{name} at {at:?}");
        ledger.assert_holds(numbers[0], at, name);
    }
}
