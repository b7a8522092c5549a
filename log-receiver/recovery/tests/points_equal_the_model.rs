//! Every offered point equals the model, whatever the guest wrote and however the stream broke.

mod common;

use backtide_recovery::{Allocation, PointError};
use backtide_storage::MemoryStorage;
use backtide_units::{BLOCK_SIZE, Lsn};
use common::{Agent, SayOnPanic, check_view, seeds, whole};

fn agent(seed: u64) -> Agent {
    let mut agent = Agent::new(seed, MemoryStorage::new()).expect("create");
    agent.attach().expect("attach");
    agent
}

#[test]
fn every_offered_point_equals_the_model() {
    let mut points = 0;
    for seed in seeds(60) {
        let _say = SayOnPanic(format!("SEED={seed}"));
        let mut agent = agent(seed);
        for _ in 0..200 {
            agent.step().expect("step");
        }
        points += agent.model.check(&mut agent.log);
        agent.settle().expect("settle");
        points += agent.model.check(&mut agent.log);
        let view = agent.log.latest_view().expect("latest");
        check_view(&view, &mut agent.random);
    }
    assert!(points > 1000, "only {points} points were compared");
}

#[test]
fn a_reopened_log_has_the_same_timeline_and_points() {
    for seed in seeds(40) {
        let _say = SayOnPanic(format!("SEED={seed}"));
        let mut agent = agent(seed);
        for _ in 0..6 {
            for _ in 0..20 {
                agent.step().expect("step");
            }
            // A snapshot brings everything into the files, as a killed process may have.
            agent.log.snapshot().expect("snapshot");
            let before = agent.log.timeline().clone();
            let appended = agent.log.appended();
            let recovered = agent.reopen().expect("reopen");
            assert_eq!(agent.log.timeline(), &before);
            assert_eq!(agent.log.appended(), appended);
            assert_eq!(agent.log.durable().seq, appended);
            assert_eq!((recovered.cut_bytes.0, recovered.damaged_entries.len()), (0, 0));
        }
        agent.model.check(&mut agent.log);
    }
}

#[test]
fn a_snapshot_does_not_see_what_comes_after() {
    for seed in seeds(20) {
        let _say = SayOnPanic(format!("SEED={seed}"));
        let mut agent = agent(seed);
        agent.settle().expect("settle");
        for _ in 0..30 {
            agent.step().expect("step");
        }
        let latest = agent.log.latest_view().expect("latest");
        let bytes = latest.read(whole()).expect("read");
        let point = agent.log.timeline().latest().expect("a point").lsn;
        let view = agent.log.view(point).expect("view");
        let image = agent.model.at(point);
        for _ in 0..60 {
            agent.step().expect("step");
        }
        agent.log.seal().expect("seal");
        assert!(latest.read(whole()).expect("read") == bytes, "the snapshot has changed");
        common::assert_same(&view.read(whole()).expect("read"), &image, point);
    }
}

#[test]
fn changed_blocks_are_those_with_a_version_between_and_hold_every_difference() {
    for seed in seeds(20) {
        let _say = SayOnPanic(format!("SEED={seed}"));
        let mut agent = agent(seed);
        for _ in 0..100 {
            agent.step().expect("step");
        }
        agent.settle().expect("settle");
        let snapshot = agent.log.snapshot().expect("snapshot");
        let intervals = snapshot.timeline().intervals();
        let mut points: Vec<Lsn> = intervals.iter().flat_map(|i| [i.from.lsn, i.to.lsn]).collect();
        // And some between, where a segment has versions on both sides.
        points.extend(agent.model.changes.iter().map(|change| change.lsn).step_by(9));
        points.retain(|lsn| snapshot.timeline().offers(*lsn));
        points.sort();
        for (place, &a) in points.iter().enumerate() {
            for &b in &points[place..] {
                let changed = snapshot.changed_blocks(a, b).expect("changed");
                assert_eq!(changed, agent.blocks_taken(a, b), "between {a} and {b}");
                let (before, after) = (agent.model.at(a), agent.model.at(b));
                let blocks = before.chunks(BLOCK_SIZE as usize).zip(after.chunks(BLOCK_SIZE as usize));
                for (block, (before, after)) in (0_u64..).zip(blocks) {
                    assert!(before == after || changed.contains(block), "block {block} between {a} and {b}");
                }
            }
        }
    }
}

#[test]
fn the_empty_log_reads_as_zeros_and_has_no_points() {
    let mut agent = agent(1);
    let view = agent.log.latest_view().expect("latest");
    assert_eq!(view.extents(whole()).expect("extents"), [(whole(), Allocation::Zero)]);
    let refused = agent.log.view(Lsn(1)).map(|_| ()).expect_err("no points");
    assert!(matches!(refused, PointError::NoPoints { .. }), "{refused}");
}
