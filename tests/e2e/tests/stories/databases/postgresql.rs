//! PostgreSQL on ext4, with pgbench beside the client that counts.

use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering},
};

use backtide_e2e::{
    Bench,
    kernel_disk::{Mounted, Served, cannot_mount},
    ledger::{Client, Ledger, Moment, seed},
    postgres::{Postgres, cannot_serve},
    skip, tools,
};
use serde_json::Value;

use super::{assert_in_hole, assert_looked, mount_at, two_outages};

const SIZE: u64 = 512 << 20;

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
    let story = two_outages(&bench, receiver, &disk, vec![client], |heavy| {
        ballast.store(if heavy { 32_768 } else { 100 }, Ordering::Relaxed);
    });
    drop(pgbench);
    server.cut_off();
    mounted.unmount();
    drop(served);
    disk.settle();

    story.assert_refused_in_the_hole(&bench);
    let (moments, mut looks) = (story.moments(seed), 0);
    for (at, whole) in &moments {
        match mount_at(&bench, *at) {
            Ok(mount) => {
                look(&bench, &mount, *at, &story.ledgers[0]);
                looks += 1;
            }
            Err(refused) => assert_in_hole(&refused, *at, *whole),
        }
    }
    assert_looked(&moments, looks);
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
