//! Databases on a protected disk, looked at as they were at moments of its timeline: exactly the
//! transactions acknowledged by then are there.
//!
//! `BACKTIDE_MOMENTS=30` looks at so many random moments, `SEED=` at the same again when the story
//! takes as long.

mod postgresql;
mod sqlite;

use backtide_e2e::{
    Bench, Daemon, Disk,
    ledger::{Client, Ledger, Moment, moments, moments_asked_for},
};
use serde_json::Value;

/// The parts of a story with two outages, and a moment in the hole of the second.
struct Story {
    _receiver: Daemon,
    /// What each client has done.
    ledgers: Vec<Ledger>,
    /// When the link was cut for long: everything before is at the receiver.
    cut: Moment,
    /// A moment in the hole.
    in_hole: Moment,
    /// When the disk was in sync again.
    back: Moment,
}

/// A short outage that is replayed, then one that outlasts the window and costs a resync.
fn two_outages(
    bench: &Bench,
    receiver: Daemon,
    disk: &Disk<'_>,
    clients: Vec<Client>,
    write_much: impl Fn(bool),
) -> Story {
    let go_on = |more| clients.iter().for_each(|client| client.goes_on(more));
    go_on(10);
    receiver.kill();
    disk.until("the stream is lost", |status| status["connected"] == false);
    go_on(5);
    let receiver = bench.receiver();
    disk.wait("sync");
    go_on(10);
    assert_eq!(disk.holes(), Vec::<Value>::new(), "the first outage was replayed");

    let cut = Moment::now();
    disk.settle();
    receiver.kill();
    write_much(true);
    disk.until("tracking", |status| status["mode"] == "tracking");
    write_much(false);
    go_on(2);
    let in_hole = Moment::now();
    go_on(2);
    let receiver = bench.receiver();
    disk.wait("sync");
    let back = Moment::now();
    go_on(10);
    Story {
        _receiver: receiver,
        ledgers: clients.into_iter().map(Client::stop).collect(),
        cut,
        in_hole,
        back,
    }
}

impl Story {
    /// The moments to look at: as many before the long outage, anywhere, and after it. With each
    /// whether it must be a point as far as that outage goes.
    fn moments(&self, seed: u64) -> Vec<(Moment, bool)> {
        let spans: Vec<_> = self.ledgers.iter().map(Ledger::span).collect();
        let first = spans.iter().map(|span| span.0).max().expect("a client");
        let last = spans.iter().map(|span| span.1).max().expect("a client");
        let count = moments_asked_for().div_ceil(3);
        let of = |from, to, whole| moments((from, to), count, seed).into_iter().map(move |at| (at, whole));
        of(first, self.cut, true).chain(of(first, last, false)).chain(of(self.back, last, true)).collect()
    }

    /// The moment in the hole is refused, and the hole named.
    fn assert_refused_in_the_hole(&self, bench: &Bench) {
        let refused = mount_at(bench, self.in_hole).expect_err("a moment of the outage is no point");
        assert_in_hole(&refused, self.in_hole, false);
    }
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

/// Most of the moments were of times without an outage: a story that could mount hardly any has shown nothing.
fn assert_looked(moments: &[(Moment, bool)], looks: usize) {
    let whole = moments.iter().filter(|(_, whole)| *whole).count();
    assert!(
        whole > 0 && 2 * looks >= whole,
        "{looks} looks at {} moments, {whole} of them whole",
        moments.len()
    );
}

/// What was refused lies in the hole that is named; `whole` when it is not in the long outage.
fn assert_in_hole(refused: &Value, at: Moment, whole: bool) {
    let hole = &refused["hole"];
    let ends = (hole["from_time"].as_u64().unwrap(), hole["to_time"].as_u64().unwrap());
    assert!(ends.0 <= at.0 && at.0 <= ends.1, "{at:?} is refused for a hole elsewhere: {refused}");
    assert!(!whole || hole["reason_code"] != "receiver-away", "{at:?} was not in the outage: {refused}");
}
