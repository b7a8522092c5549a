//! A link that is slower than the guest writes, for good: passes follow one another, each gives the point it
//! was begun at, the guest is held up no longer than its bound, and when it rests the disk is in sync.

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use backtide_e2e::{Bench, Model, Relay};
use serde_json::Value;

const SIZE: u64 = 1 << 20;

/// So long that a copy before a write is made in time, on a busy machine too.
const BOUND: Duration = Duration::from_millis(50);

/// Bytes a second: less than a guest writes that is held up for the bound each time, and so little that a pass over
/// the disk takes longer than one that forwarding is tried with.
const RATE: u64 = 256 << 10;

/// Passes that follow one another while the guest writes, each with its point.
const PASSES: usize = 4;

/// By T: what was seen of each pass.
#[derive(Debug, Default)]
struct Passes(BTreeMap<u64, Pass>);

#[derive(Debug)]
struct Pass {
    /// What the guest wrote meanwhile was gathered.
    gathers: bool,
    /// T is going to be a point: no write had to go ahead of a copy.
    has_point: bool,
}

impl Passes {
    fn see(&mut self, resync: &Value) {
        let Some(at) = resync["at"].as_u64() else { return };
        let pass = self.0.entry(at).or_insert(Pass { gathers: false, has_point: true });
        pass.gathers |= resync["kind"] == "coalescing";
        pass.has_point &= resync["point_recoverable"] == true;
    }

    fn gathering_with_a_point(&self) -> usize {
        self.0.values().filter(|pass| pass.gathers && pass.has_point).count()
    }
}

#[test]
fn a_link_that_is_too_slow_for_ever_gives_a_point_for_each_pass() {
    let bench = Bench::new();
    let (_receiver, _agent) = (bench.receiver(), bench.agent());
    let link = Relay::before(&bench.path("link.sock"), bench.path("stream.sock"));
    bench.image("vm1.img", SIZE);
    let slow = bench.socket("link.sock");
    let options = ["--window", "256KiB", "--guest-delay-max", "50"];
    let disk = bench.attach_to(&slow, "vm1", "vm1.img", &options);
    disk.settle();
    let count = |status: &Value, name: &str| status["counters"][name].as_u64().expect("a count");

    link.let_through(RATE);
    let load = disk.load(1);
    let passes = RefCell::new(Passes::default());
    let status = disk.until("passes that follow one another", |status| {
        let mut passes = passes.borrow_mut();
        passes.see(&status["resync"]);
        // The last of them is under way.
        passes.gathering_with_a_point() > PASSES
    });
    load.goes_on(10);
    let mut model = Model::of_zeroes(SIZE, Vec::new());
    model.then(load.stop());
    assert!(count(&status, "window_overflows") > 0, "the link was fast enough: {status}");
    disk.until("the end of the pass", |status| {
        passes.borrow_mut().see(&status["resync"]);
        status["mode"] == "sync"
    });
    disk.settle();
    let status = disk.status();
    assert_eq!((count(&status, "passes_aborted"), count(&status, "disconnects")), (0, 0), "{status}");
    let told = Duration::from_micros(count(&status, "guest_delay_max_us"));
    let late = Duration::from_micros(count(&status, "guest_delay_late_max_us"));
    println!("the guest was held up for {told:?} at the longest, {late:?} of it late");
    assert!(told > Duration::ZERO && told <= BOUND + late, "{told:?}, late {late:?}: {status}");

    let passes = passes.into_inner();
    println!("{} writes, {passes:?}", model.len());
    let offered = disk.points();
    let is_offered = |at: &u64| {
        let mut intervals = offered["intervals"].as_array().expect("intervals").iter();
        intervals.any(|one| one["from_lsn"].as_u64() <= Some(*at) && one["to_lsn"].as_u64() >= Some(*at))
    };
    let (with, without): (Vec<_>, Vec<_>) = passes.0.iter().partition(|(_, pass)| pass.has_point);
    let (points, missing): (Vec<u64>, Vec<u64>) = with.into_iter().map(|(at, _)| *at).partition(is_offered);
    // A pass may have lost its point after the last look at it.
    let unseen = count(&status, "passes_forfeited") - without.len() as u64;
    assert!(missing.len() as u64 <= unseen, "{missing:?} were to be points: {offered}");
    assert!(points.len() >= PASSES, "{points:?}");
    let counts = disk.points_are_prefixes(&points, &model);
    let moments: BTreeSet<usize> = counts.iter().copied().collect();
    assert!(moments.len() >= PASSES, "each pass is of a later moment: {counts:?}");
    disk.timeline_holds(1, 4, &model);
    disk.latest_is_the_image();
    model.assert_is_in(disk.image.as_ref(), model.len(), "the image");
}
