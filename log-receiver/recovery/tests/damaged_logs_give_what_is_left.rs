//! A damaged log gives back every point before what is lost, each exact, and says what is wrong.

mod common;

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use backtide_recovery::{
    DiskLog, Entry, LogError, PassContent, PassReason, Salvage, Seq, Snapshot, TimedLsn, Unreadable, salvage,
};
use backtide_storage::{MemoryStorage, Storage};
use backtide_units::{ByteCount, ByteOffset, ByteRange, CaptureTime, Lsn, PayloadChecksum, Reason};
use bytes::Bytes;
use common::{Agent, Random, SayOnPanic, cache, directory, identity, seeds};

fn written(seed: u64) -> Agent {
    let mut agent = Agent::new(seed, MemoryStorage::new()).expect("create");
    agent.attach().expect("attach");
    agent.settle().expect("settle");
    for _ in 0..80 {
        agent.step().expect("step");
    }
    agent.settle().expect("settle");
    agent.sync().expect("sync");
    agent
}

/// The files of a log, copied.
fn copied(agent: &Agent) -> (MemoryStorage, Vec<PathBuf>) {
    let copy = MemoryStorage::new();
    copy.create_dir(&directory().join("segments")).expect("create dir");
    let files = agent.storage.files();
    for (path, content) in &files {
        let file = copy.create_new(path).expect("create");
        file.write_at(ByteOffset(0), content).expect("write");
    }
    (copy, files.into_iter().map(|(path, _)| path).collect())
}

fn left(storage: &MemoryStorage) -> Salvage {
    let shared: Arc<dyn Storage> = Arc::new(storage.clone());
    let before = storage.files();
    let salvaged =
        salvage(&shared, directory(), &cache(), Some(identity()), None, |_| Seq(0), Unreadable::IsDamage)
            .expect("salvage");
    assert_eq!(storage.files(), before, "nothing is written");
    salvaged
}

fn opens(agent: &Agent, storage: &MemoryStorage) -> Result<(), LogError> {
    // Opening may cut or seal: not on the copy that is looked at.
    let copy = MemoryStorage::new();
    copy.create_dir(&directory().join("segments")).expect("create dir");
    for (path, content) in storage.files().into_iter().filter(|(path, _)| path.starts_with(directory())) {
        copy.create_new(&path).expect("create").write_at(ByteOffset(0), &content).expect("write");
    }
    DiskLog::open(Arc::new(copy), directory(), agent.options, &cache()).map(|_| ())
}

/// After a repair the log has the points that it had, and no damage that a repair can do something about.
fn repaired(agent: &Agent, storage: &MemoryStorage, salvaged: &Salvage, said: &str, may_be_a_payload: bool) {
    let (lost, points) = (salvaged.can_be_cut(), salvaged.snapshot.timeline().intervals().to_vec());
    let mended = salvaged.mend_headers(storage, directory()).expect("mend");
    let bytes =
        |storage: &MemoryStorage| -> usize { storage.files().iter().map(|(_, content)| content.len()).sum() };
    let before = bytes(storage);
    let put = salvaged.cut(storage, directory(), Path::new("cut/one")).expect("cut");
    assert_eq!(put.is_empty(), !lost, "{said}");
    assert!(bytes(storage) >= before, "{said}: nothing is removed, what goes is put aside");
    let again = left(storage);
    assert_eq!(again.snapshot.timeline().intervals(), points, "{said}: every point that was there");
    assert!(
        !again.can_be_cut() && again.mend_headers(storage, directory()).expect("mend").is_empty(),
        "{said}"
    );
    if !may_be_a_payload && (lost || !mended.is_empty()) {
        assert_eq!(again.damage, Vec::<String>::new(), "{said}");
        agent.model.check_snapshot(&again.snapshot, 3);
        opens(agent, storage).expect("it is whole");
    }
}

#[derive(Clone, Copy, Debug)]
enum Harm {
    Header,
    Missing,
    HalfGone,
    Flip,
}

#[test]
fn what_is_offered_after_any_damage_is_exact_and_the_damage_is_named() {
    for seed in seeds(12) {
        let _say = SayOnPanic(format!("SEED={seed}"));
        let mut agent = written(seed);
        let mut random = Random(seed ^ 0xdead);
        let whole = agent.log.snapshot().expect("snapshot").timeline().intervals().to_vec();
        for harm in [Harm::Header, Harm::Missing, Harm::HalfGone, Harm::Flip] {
            let files = copied(&agent).1.len();
            for chosen in 0..files {
                let (storage, paths) = copied(&agent);
                let path = &paths[chosen];
                let length = storage.open(path).expect("open").len().expect("length").0;
                match harm {
                    Harm::Header => storage.flip_bit(path, ByteOffset(random.below(128)), 3),
                    Harm::Missing => storage.remove(path).expect("remove"),
                    Harm::HalfGone => {
                        storage.open(path).expect("open").set_len(ByteCount(length / 2)).expect("cut");
                    }
                    Harm::Flip => storage.flip_bit(path, ByteOffset(random.below(length)), 5),
                }
                let said = format!("{harm:?} of {} of {files}", path.display());
                let salvaged = match opens(&agent, &storage) {
                    Err(LogError::NoLog { .. }) => continue,
                    // A version of the future is no damage: another program reads it.
                    Err(LogError::UnknownVersion { .. }) => continue,
                    opened => {
                        let salvaged = left(&storage);
                        if let Err(error) = opened {
                            let named = salvaged.damage.iter().any(|damage| damage.contains(".seg"));
                            assert!(named, "{said}: {error}: {:?}", salvaged.damage);
                        }
                        salvaged
                    }
                };
                let timeline = salvaged.snapshot.timeline();
                // A flip may hit a payload: that is an error when it is read, which other tests show.
                if !matches!(harm, Harm::Flip) {
                    agent.model.check_snapshot(&salvaged.snapshot, 4);
                }
                if matches!(harm, Harm::Header) {
                    assert_eq!(timeline.intervals(), whole, "{said}: a header alone is no loss");
                }
                let hole = timeline.holes().last();
                let damaged = hole.is_some_and(|hole| hole.reason.code == Reason::Damaged.code());
                assert_eq!(damaged, !salvaged.damage.is_empty(), "{said}: {:?}", salvaged.damage);
                assert!(!timeline.in_sync(), "{said}");
                let intervals = timeline.intervals().to_vec();
                repaired(&agent, &storage, &salvaged, &said, matches!(harm, Harm::Flip));
                assert!(
                    intervals.iter().all(|found| whole
                        .iter()
                        .any(|all| { all.from.lsn <= found.from.lsn && found.to.lsn <= all.to.lsn })),
                    "{said}: no point that was none"
                );
            }
        }
    }
}

#[test]
fn points_before_a_lost_segment_stay_and_newer_attaches_are_known() {
    let mut agent = Agent::new(3, MemoryStorage::new()).expect("create");
    agent.attach().expect("attach");
    agent.settle().expect("settle");
    agent.write().expect("write");
    agent.log.seal().expect("seal");
    let kept = agent.log.timeline().covered();
    agent.write().expect("write");
    agent.log.seal().expect("seal");
    agent.attach().expect("attach");
    agent.write().expect("write");
    agent.sync().expect("sync");
    let (storage, paths) = copied(&agent);
    let count = paths.len();
    storage.remove(&paths[count - 2]).expect("remove");

    let salvaged = left(&storage);
    let timeline = salvaged.snapshot.timeline();
    assert_eq!(timeline.latest().expect("points").lsn, kept);
    assert_eq!(timeline.attached(), agent.log.timeline().attached(), "the newest epoch stays fenced");
    assert_eq!(timeline.highest_lsn(), agent.log.timeline().highest_lsn());
    let hole = timeline.holes().last().expect("a hole");
    assert!(hole.reason.text.starts_with("the receiver's store is damaged: "), "{hole}");
    assert!(hole.reason.text.contains(".seg is missing"), "{hole}");
    agent.model.check_snapshot(&salvaged.snapshot, 10);
}

#[test]
fn a_failed_log_gives_what_was_durable_and_nothing_above() {
    let mut agent = written(5);
    let durable = agent.log.durable();
    for _ in 0..20 {
        agent.write().expect("write");
    }
    agent.log.seal().expect("seal");
    agent.write().expect("write");
    agent.log.snapshot().expect("all of it is in the files");
    let shared: Arc<dyn Storage> = Arc::new(agent.storage.clone());
    let salvaged =
        salvage(&shared, directory(), &cache(), None, Some(durable.seq), |_| Seq(0), Unreadable::IsDamage)
            .expect("salvage");
    assert_eq!(salvaged.damage, Vec::<String>::new());
    let timeline = salvaged.snapshot.timeline();
    assert_eq!(timeline.covered(), durable.lsn);
    assert_eq!(salvaged.snapshot.through(), durable.seq);
    assert!(timeline.holes().iter().all(|hole| hole.to.is_some()), "nothing is lost");
    agent.model.check_snapshot(&salvaged.snapshot, 10);
}

#[test]
fn a_new_log_goes_on_where_a_damaged_one_ended() {
    let old = written(7);
    let (storage, paths) = copied(&old);
    storage.remove(&paths[paths.len() - 2]).expect("remove");
    let past = left(&storage).snapshot;
    let ended = past.timeline().latest();
    let highest = old.log.timeline().highest_lsn();

    let mut new = Agent::new(8, MemoryStorage::new()).expect("create");
    new.starts_above(highest);
    new.attach().expect("attach");
    let joined = new.log.snapshot().expect("snapshot").following(past.clone());
    let hole = joined.timeline().holes().last().expect("a hole").clone();
    assert_eq!((hole.from, hole.to), (ended, None), "open until the new log has a point");
    new.settle().expect("settle");
    new.write().expect("write");
    let snapshot = new.log.snapshot().expect("snapshot");
    let joined = snapshot.clone().following(past.clone());
    let first = snapshot.timeline().intervals()[0].from;
    let hole = joined.timeline().holes().last().expect("a hole").clone();
    assert_eq!((hole.from, hole.to), (ended, Some(first)));
    assert_eq!(hole.reason.code, Reason::Damaged.code());
    old.model.check_snapshot(&past, 5);
    new.model.check_snapshot(&snapshot, 5);
    for part in [&past, &snapshot] {
        reads_the_same(&joined, part);
    }
    // A difference over the seam is what either log has had until then, and covers everything that may differ.
    if let Some(ended) = ended {
        let changed = joined.changed_blocks(ended.lsn, first.lsn).expect("changed");
        let old = old.blocks_taken(Lsn::ZERO, ended.lsn);
        assert_eq!(changed, old | new.blocks_taken(Lsn::ZERO, first.lsn));
        let (before, after) = (past.view(ended.lsn).unwrap(), joined.view(first.lsn).unwrap());
        let (a, b) = (before.read(common::whole()).unwrap(), after.read(common::whole()).unwrap());
        for block in 0..a.len().div_ceil(4096) {
            let part = block * 4096..(block * 4096 + 4096).min(a.len());
            assert!(a[part.clone()] == b[part] || changed.contains(block as u64), "block {block}");
        }
    }
}

/// What is left of a log that begins above `highest`, with one pass that brought a few blocks: the rest is zeroes, of which
/// a new log need not hear.
fn follows(seed: u64, highest: Lsn) -> (Snapshot, Lsn) {
    let mut agent = Agent::new(seed, MemoryStorage::new()).expect("create");
    agent.starts_above(highest);
    agent.attach().expect("attach");
    let (at, time) = (highest.plus(5), CaptureTime(1_000_000 + highest.0));
    let reason = PassReason { code: 1, text: "the disk is new here".to_owned() };
    let mut entries = vec![Entry::PassBegin { at, gap_from: Lsn(0), time, reason }];
    for _ in 0..3 {
        let start = agent.random.below(40) * 4096;
        let range = ByteRange::between(ByteOffset(start), ByteOffset(start + 4096));
        let payload = Bytes::from(vec![agent.random.below(255) as u8 + 1; 4096]);
        let checksum = PayloadChecksum::captured(crc32c::crc32c(&payload));
        entries.push(Entry::PassData { at, range, content: PassContent::Bytes { checksum, payload } });
    }
    entries.push(Entry::PassEnd { at, valid_from: Some(at), time });
    entries.push(Entry::Flush { lsn: at, time });
    for entry in entries {
        agent.log.append(entry).expect("it follows");
    }
    agent.flush_all();
    (left(&agent.storage).snapshot, agent.log.timeline().highest_lsn())
}

#[test]
fn a_difference_over_several_logs_has_all_that_may_differ() {
    let mut only_in_the_first = 0;
    for seed in seeds(6) {
        let _say = SayOnPanic(format!("SEED={seed}"));
        let (first, highest) = follows(seed, Lsn(0));
        let (second, highest) = follows(seed ^ 0x55, highest);
        let (third, _) = follows(seed ^ 0xaa, highest);
        let parts = [first.clone(), second.clone(), third.clone()];
        let joined = third.following(second.following(first));
        let points = |part: &Snapshot| -> Vec<Lsn> {
            part.timeline().intervals().iter().flat_map(|i| [i.from.lsn, i.to.lsn]).collect()
        };
        for (nth, older) in parts.iter().enumerate() {
            for newer in &parts[nth + 1..] {
                for (a, b) in
                    points(older).into_iter().flat_map(|a| points(newer).into_iter().map(move |b| (a, b)))
                {
                    let changed = joined.changed_blocks(a, b).expect("changed");
                    let read = |at| joined.view(at).expect("a point").read(common::whole()).expect("read");
                    let (before, after) = (read(a), read(b));
                    let blocks = before.chunks(4096).zip(after.chunks(4096));
                    for (block, (before, after)) in (0_u64..).zip(blocks) {
                        assert!(
                            before == after || changed.contains(block),
                            "block {block} between {a} and {b}"
                        );
                        only_in_the_first += u64::from(nth == 0 && before != after);
                    }
                }
            }
        }
    }
    assert!(only_in_the_first > 10);
}

#[test]
fn what_older_logs_tell_of_a_block_and_of_flushes_is_told() {
    let (mut kept, mut went) = (0, 0);
    for seed in seeds(6) {
        let _say = SayOnPanic(format!("SEED={seed}"));
        let (first, highest) = follows(seed, Lsn(0));
        let (second, highest) = follows(seed ^ 0x55, highest);
        let (third, _) = follows(seed ^ 0xaa, highest);
        let parts = [&first, &second, &third];
        let points = parts.map(|part| part.timeline().latest().expect("a point"));
        let joined = third.clone().following(second.clone().following(first.clone()));
        let flushes: Vec<_> = points.into_iter().rev().collect();
        assert_eq!(joined.flush_points(Lsn::MAX, 9).expect("read"), flushes);
        assert_eq!(joined.flush_points(points[2].lsn, 2).expect("read"), flushes[..2]);
        assert_eq!(joined.flush_points(points[1].lsn, 9).expect("read"), flushes[1..]);
        for (nth, at) in points.iter().enumerate() {
            let view = joined.view(at.lsn).expect("a point");
            for block in 0..40 {
                let range = ByteRange::between(ByteOffset(block * 4096), ByteOffset((block + 1) * 4096));
                let has = |part: &Snapshot, at: TimedLsn| {
                    let bytes = part.view(at.lsn).expect("a point").read(range).expect("read");
                    bytes.iter().any(|byte| *byte != 0)
                };
                // Each of them begins with an empty disk, and has one point.
                let mut expected = None;
                let mut held = false;
                for (part, point) in parts.iter().zip(points).take(nth + 1) {
                    let holds = has(part, point);
                    kept += u64::from(holds);
                    went += u64::from(held && !holds);
                    if holds || held {
                        expected = Some(point.lsn);
                    }
                    held = holds;
                }
                assert_eq!(view.newest_version(range).expect("read"), expected, "block {block} at {at}");
            }
        }
    }
    assert!(kept > 20 && went > 20, "{kept}, {went}");
}

/// The points of one log, through both.
fn reads_the_same(joined: &Snapshot, part: &Snapshot) {
    for interval in part.timeline().intervals() {
        let at = interval.from.lsn;
        let found = joined.view(at).expect("a point").read(common::whole()).expect("read");
        assert!(found == part.view(at).expect("a point").read(common::whole()).expect("read"), "{at}");
    }
}
