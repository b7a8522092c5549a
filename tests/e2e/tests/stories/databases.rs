//! Databases on a protected disk, looked at as they were at moments of its timeline: exactly the
//! transactions acknowledged by then are there.
//!
//! `BACKTIDE_MOMENTS=30` looks at so many random moments, `SEED=` at the same again when the story
//! takes as long.

use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering},
};

use backtide_e2e::{
    Bench, Daemon, Disk,
    kernel_disk::{Mounted, Served, cannot_mount},
    ledger::{Client, Ledger, Moment, moments, moments_asked_for, seed},
    postgres::{Postgres, cannot_serve},
    skip, tools,
};
use serde_json::Value;

const SIZE: u64 = 512 << 20;

/// The parts of a story with two outages, and a moment in the hole of the second.
struct Story {
    receiver: Daemon,
    ledger: Ledger,
    /// When the link was cut for long: everything before is at the receiver.
    cut: Moment,
    /// A moment in the hole.
    in_hole: Moment,
    /// When the disk was in sync again.
    back: Moment,
}

#[test]
fn postgresql_has_at_every_moment_what_it_had_acknowledged() {
    if let Some(why) = cannot_mount().or_else(cannot_serve) {
        return skip(why);
    }
    let seed = seed();
    let bench = Bench::new();
    let (receiver, _agent, disk) = bench.protected(SIZE, &["--window", "64MiB", "--guest-delay-max", "0"]);
    let served = Served::start(&bench, "disk", &disk.uri(), SIZE);
    tools::run("mkfs.ext4", &["-q", "-F", served.path().to_str().unwrap()]);
    let mounted = match Mounted::at(bench.path("mnt"), &served) {
        Ok(mounted) => mounted,
        Err(why) => return skip(&format!("no ext4 on a loop device here: {why}")),
    };
    Postgres::create(&bench, mounted.directory());
    let server = Postgres::start(&bench, "server", mounted.directory());
    server.prepare_pgbench();
    server.query("create table ledger (n bigint primary key, ballast text)");

    let pgbench = server.pgbench(20);
    let ballast = Arc::new(AtomicU32::new(100));
    let (mut session, of_client) = (server.session(), Arc::clone(&ballast));
    let client = Client::start(move |number| {
        let rows = of_client.load(Ordering::Relaxed);
        let text = format!("select string_agg(md5(random()::text), '') from generate_series(1, {rows})");
        session.run(&format!("insert into ledger values ({number}, ({text}))"))
    });
    let story = two_outages(&bench, receiver, &disk, client, |heavy| {
        ballast.store(if heavy { 32_768 } else { 100 }, Ordering::Relaxed);
    });
    drop(pgbench);
    server.cut_off();
    mounted.unmount();
    drop(served);
    disk.settle();

    let (first, last) = story.ledger.span();
    let refused = mount_at(&bench, story.in_hole).expect_err("a moment of the outage is no point");
    assert_eq!(refused["hole"]["reason_code"], "receiver-away", "{refused}");
    let _receiver = story.receiver;
    let count = moments_asked_for().div_ceil(3);
    for (span, whole) in [((first, story.cut), true), ((first, last), false), ((story.back, last), true)] {
        for at in moments(span, count, seed) {
            match mount_at(&bench, at) {
                Ok(mount) => look(&bench, &mount, at, &story.ledger),
                Err(refused) => assert_in_hole(&refused, at, whole),
            }
        }
    }
}

/// A short outage that is replayed, then one that outlasts the window and costs a resync.
fn two_outages(
    bench: &Bench,
    receiver: Daemon,
    disk: &Disk<'_>,
    client: Client,
    write_much: impl Fn(bool),
) -> Story {
    client.goes_on(20);
    receiver.kill();
    disk.until("the stream is lost", |status| status["connected"] == false);
    client.goes_on(10);
    let receiver = bench.receiver();
    disk.wait("sync");
    client.goes_on(20);
    assert_eq!(disk.holes(), Vec::<Value>::new(), "the first outage was replayed");

    let cut = Moment::now();
    disk.settle();
    receiver.kill();
    write_much(true);
    disk.until("tracking", |status| status["mode"] == "tracking");
    write_much(false);
    client.goes_on(3);
    let in_hole = Moment::now();
    client.goes_on(3);
    let receiver = bench.receiver();
    disk.wait("sync");
    let back = Moment::now();
    client.goes_on(20);
    Story { receiver, ledger: client.stop(), cut, in_hole, back }
}

/// Mounts the disk as it was, writable; else why it cannot be had.
fn mount_at(bench: &Bench, at: Moment) -> Result<Value, Value> {
    let said = bench.run(&["mount", "vm1", "--at", &at.rfc3339(), "--writable"]);
    if said.code == 0 {
        return Ok(serde_json::from_str(&said.stdout).unwrap());
    }
    let error = said.error();
    assert_eq!((said.code, &error["code"]), (4, &"point-in-hole".into()), "{error}");
    Err(error["details"].clone())
}

/// What was refused lies in the hole that is named; `whole` when it is not in the long outage.
fn assert_in_hole(refused: &Value, at: Moment, whole: bool) {
    let hole = &refused["hole"];
    let ends = (hole["from_time"].as_u64().unwrap(), hole["to_time"].as_u64().unwrap());
    assert!(ends.0 <= at.0 && at.0 <= ends.1, "{at:?} is refused for a hole elsewhere: {refused}");
    assert!(!whole || hole["reason_code"] != "receiver-away", "{at:?} was not in the outage: {refused}");
}

/// Starts the database on a mounted point, as after a power cut, and counts.
fn look(bench: &Bench, mount: &Value, at: Moment, ledger: &Ledger) {
    let (id, what) = (mount["id"].as_str().unwrap(), format!("lsn:{}", mount["lsn"]));
    let name = format!("{id}-at-{}", at.0);
    let served = Served::start(bench, &format!("{name}.disk"), mount["uri"].as_str().unwrap(), SIZE);
    served.check_ext4();
    let mounted = Mounted::at(bench.path(&format!("{name}.mnt")), &served).expect("mount it as before");
    let server = Postgres::start(bench, &name, mounted.directory());
    let counted = server.query("select count(*), coalesce(max(n), 0), coalesce(min(n), 1) from ledger");
    let numbers: Vec<u64> = counted.split('|').map(|number| number.parse().unwrap()).collect();
    assert_eq!((numbers[0], 1), (numbers[1], numbers[2]), "{what}: no transaction is missing in between");
    ledger.assert_holds(numbers[0], at, &what);
    // pgbench moves the same sum in all of its tables.
    let sums = "select (select sum(abalance) from pgbench_accounts) - (select sum(bbalance) from \
                pgbench_branches), (select sum(tbalance) from pgbench_tellers) - (select \
                coalesce(sum(delta), 0) from pgbench_history), (select sum(abalance) from pgbench_accounts) \
                - (select sum(tbalance) from pgbench_tellers)";
    assert_eq!(server.query(sums), "0|0|0", "{what}: the sums of pgbench's tables");
    // Every page is read, and its checksum with it.
    server.query("select count(length(ballast)) from ledger");
    server.cut_off();
    mounted.unmount();
    drop(served);
    bench.json(&["unmount", id, "--discard"]);
}
