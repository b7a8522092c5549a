//! A place that the device cannot read is damage of that place for who reads, and never a reason to cut the log or
//! to put it aside.

mod common;

use std::{path::PathBuf, sync::Arc};

use backtide_recovery::{DiskLog, LogError, Salvage, Seq, Unreadable, salvage};
use backtide_storage::{MemoryStorage, Storage};
use backtide_units::{ByteOffset, ByteRange};
use common::{Agent, Random, SayOnPanic, cache, directory, identity, seeds, whole};

/// A log with sealed segments and an open one.
fn written(seed: u64) -> Agent {
    let mut agent = Agent::new(seed, MemoryStorage::new()).expect("create");
    agent.attach().expect("attach");
    agent.settle().expect("settle");
    for _ in 0..60 {
        agent.step().expect("step");
    }
    agent.settle().expect("settle");
    // What comes last says that the footers before it are durable: one of which nobody says so is made again from the
    // entries, and whether it can be read is nothing to tell.
    for _ in 0..2 {
        agent.write().expect("write");
        agent.sync().expect("sync");
        agent.mark().expect("mark");
    }
    agent.write().expect("write");
    agent.sync().expect("sync");
    agent.log.snapshot().expect("everything is in the files");
    agent
}

/// The files of a log, copied.
fn copied(agent: &Agent) -> (MemoryStorage, Vec<PathBuf>) {
    let copy = MemoryStorage::new();
    copy.create_dir(&directory().join("segments")).expect("create dir");
    let mut files = agent.storage.files();
    files.retain(|(path, _)| path.extension().is_some_and(|extension| extension == "seg"));
    for (path, content) in &files {
        copy.create_new(path).expect("create").write_at(ByteOffset(0), content).expect("write");
    }
    (copy, files.into_iter().map(|(path, _)| path).collect())
}

fn sector(at: u64) -> ByteRange {
    ByteRange::between(ByteOffset(at), ByteOffset(at + 8))
}

fn left(storage: &MemoryStorage) -> Salvage {
    let shared: Arc<dyn Storage> = Arc::new(storage.clone());
    salvage(&shared, directory(), &cache(), Some(identity()), None, |_| Seq(0), Unreadable::IsDamage)
        .expect("what can be read is read")
}

#[test]
fn a_place_that_cannot_be_read_changes_nothing_and_costs_no_other_place() {
    let (mut refused, mut opened) = (0, 0);
    for seed in seeds(6) {
        let agent = written(seed);
        let mut random = Random(seed ^ 0xbad);
        let whole_log = agent.log.timeline().intervals().to_vec();
        for _ in 0..40 {
            let (storage, paths) = copied(&agent);
            let path = &paths[random.below(paths.len() as u64) as usize];
            let files = storage.files();
            let content = &files.iter().find(|(name, _)| name == path).expect("the file").1;
            // Not in space that is only reserved.
            let length = content.iter().rposition(|byte| *byte != 0).expect("a header") as u64;
            let at = if random.one_in(4) { random.below(128) } else { random.below(length) };
            let _say = SayOnPanic(format!("SEED={seed}, {} cannot be read at byte {at}", path.display()));
            storage.make_unreadable(path, sector(at));

            let salvaged = left(&storage);
            let mut count = 0;
            for interval in salvaged.snapshot.timeline().intervals() {
                let point = interval.to.lsn;
                match salvaged.snapshot.view(point).expect("a point").read(whole()) {
                    Ok(bytes) => assert!(bytes == agent.model.at(point), "{point}"),
                    Err(error) => assert!(matches!(error, LogError::Damaged { .. }), "{error}"),
                }
                count += 1;
            }
            assert!(count > 0 || at >= 128, "a header alone is no loss");
            let checked = salvaged.check(&mut |_| true).expect("a bad sector ends no check");
            let named = checked.damage.iter().any(|damage| damage.contains(&path.display().to_string()));
            assert!(named, "{checked:?}");

            let before = storage.files();
            let shared = Arc::new(storage.clone());
            match DiskLog::open(shared.clone(), directory(), agent.options, &cache()) {
                Ok(_) => opened += 1,
                Err(error) => {
                    assert!(matches!(error, LogError::Io { .. }), "{error}");
                    assert!(storage.files() == before, "nothing was changed");
                    refused += 1;
                    // It can be read again.
                    storage.make_unreadable(path, ByteRange::default());
                    let (log, _) = DiskLog::open(shared, directory(), agent.options, &cache()).expect("open");
                    assert_eq!(log.timeline().intervals(), whole_log);
                }
            }
        }
    }
    assert!(refused > 0 && opened > 0, "{refused} {opened}");
}

#[test]
fn no_new_log_begins_where_a_header_cannot_be_read() {
    let agent = written(2);
    let (storage, paths) = copied(&agent);
    storage.make_unreadable(&paths[0], sector(0));
    let shared: Arc<dyn Storage> = Arc::new(storage.clone());
    let opened = DiskLog::open(shared, directory(), agent.options, &cache());
    let error = opened.err().expect("nobody knows what stands there");
    assert!(matches!(error, LogError::Io { .. }), "{error}");
    let salvaged = left(&storage);
    assert_eq!(salvaged.snapshot.timeline().intervals(), agent.log.timeline().intervals());
    let damage = &salvaged.damage[0];
    assert!(damage.contains(".seg is damaged at byte 0") && damage.contains("cannot be read"), "{damage}");
    agent.model.check_snapshot(&salvaged.snapshot, 5);
}

#[test]
fn what_may_be_read_the_next_time_is_told_of_where_it_costs_points_and_what_is_wrong_is_not() {
    let (mut costs, mut missing) = (0, 0);
    for seed in seeds(4) {
        let agent = written(seed);
        let (storage, paths) = copied(&agent);
        let all = left(&storage);
        assert_eq!(all.away, None);
        let last = |left: &Salvage| left.snapshot.through();
        for (nth, path) in paths.iter().enumerate() {
            let _say = SayOnPanic(format!("SEED={seed}, {}", path.display()));
            let files = storage.files();
            let content = &files.iter().find(|(name, _)| name == path).expect("the file").1;
            let length = content.iter().rposition(|byte| *byte != 0).expect("a header") as u64;
            for at in (0..length).step_by(509) {
                let bad = storage.copy();
                bad.make_unreadable(path, sector(at));
                let salvaged = left(&bad);
                let loses = last(&salvaged) < last(&all);
                assert_eq!(salvaged.away.is_some(), loses, "byte {at}: {:?}", salvaged.damage);
                assert!(!loses || salvaged.away.is_some_and(|away| away.contains("cannot be read")));
                costs += usize::from(loses);
                let flipped = storage.copy();
                flipped.flip_bit(path, ByteOffset(at), 2);
                assert_eq!(left(&flipped).away, None, "byte {at}");
            }
            let gone = storage.copy();
            gone.remove(path).expect("remove");
            let away = left(&gone).away;
            assert_eq!(
                away.as_ref().is_some_and(|away| away.ends_with("is missing")),
                nth + 1 < paths.len(),
                "{away:?}"
            );
            missing += usize::from(away.is_some());
        }
    }
    assert!(costs > 0 && missing > 0, "{costs} {missing}");
}

#[test]
fn a_check_names_the_place_and_reads_everything_else() {
    let agent = written(3);
    let (storage, paths) = copied(&agent);
    let sound = left(&storage).check(&mut |_| true).expect("check");
    assert!(sound.is_sound(), "{sound:?}");
    // Deep in a payload: the window that reads ahead meets it long before.
    let in_each = paths.iter().filter_map(|path| longest_payload(&storage, path));
    let (length, path, at) = in_each.max().expect("a sealed segment");
    assert!(length > 5 * 4096, "an entry with pages of its own: {length}");
    storage.make_unreadable(&path, sector(at));
    let checked = left(&storage).check(&mut |_| true).expect("check");
    assert_eq!(checked.entries, sound.entries - 1, "{checked:?}");
    assert!(checked.damage.iter().all(|damage| damage.contains("cannot be read")), "{checked:?}");
}

/// The longest payload of a sealed segment, the file, and the middle of it.
fn longest_payload(storage: &MemoryStorage, path: &PathBuf) -> Option<(usize, PathBuf, u64)> {
    let files = storage.files();
    let bytes = &files.iter().find(|(name, _)| name == path).expect("the file").1;
    let u32_at = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes")) as usize;
    let trailer = bytes.len().checked_sub(144)?;
    if &bytes[trailer..trailer + 8] != b"BKTDEND\n" {
        return None;
    }
    let (mut at, mut longest) = (128, (0, 0));
    while at < u32_at(trailer + 96) {
        let payload = u32_at(at + 48);
        let table = if payload > 65_536 { (payload.div_ceil(65_536) * 4).next_multiple_of(8) } else { 0 };
        longest = longest.max((payload, at + 64 + table + payload / 2));
        at += 64 + table + payload.next_multiple_of(8);
    }
    Some((longest.0, path.clone(), longest.1 as u64))
}
