//! Damage is mended from what has the same bytes, exactly or not at all.

mod common;

use backtide_storage::{MemoryStorage, Storage};
use backtide_units::{ByteOffset, Lsn};
use common::{Agent, Random, SayOnPanic, seeds};

/// A log of sealed segments in which all of the disk is there twice: the agent was attached again and sent everything.
fn written(seed: u64) -> Agent {
    let mut agent = Agent::new(seed, MemoryStorage::new()).expect("create");
    agent.attach().expect("attach");
    agent.settle().expect("settle");
    for _ in 0..30 {
        agent.step().expect("step");
    }
    agent.settle().expect("settle");
    agent.restart().expect("attach");
    agent.settle().expect("settle");
    agent.restart().expect("attach");
    agent.settle().expect("settle");
    agent.log.seal().expect("seal");
    agent.flush_all();
    agent
}

fn content(storage: &MemoryStorage, wanted: &std::path::Path) -> Vec<u8> {
    let files = storage.files().into_iter();
    files.filter(|(path, _)| path == wanted).map(|(_, content)| content).next().expect("a file")
}

#[test]
fn a_mended_segment_is_what_was_written_and_what_is_not_mended_is_told() {
    let (mut payloads, mut footers, mut left) = (0, 0, 0);
    for seed in seeds(3) {
        let mut agent = written(seed);
        let storage = agent.storage.clone();
        let mut random = Random(seed);
        let mut segments: Vec<_> = storage.files().into_iter().map(|(path, _)| path).collect();
        segments.retain(|path| path.extension().is_some_and(|name| name == "seg"));
        let points: Vec<Lsn> =
            agent.log.timeline().intervals().iter().flat_map(|i| [i.from.lsn, i.to.lsn]).collect();
        for _ in 0..40 {
            let path = &segments[random.below(segments.len() as u64) as usize];
            let before = content(&storage, path);
            let length = before.len() as u64;
            let near_end = random.one_in(3);
            let at =
                if near_end { length - 1 - random.below(length.min(5000)) } else { random.below(length) };
            let _say = SayOnPanic(format!("SEED={seed}, a bit flipped in {} byte {at}", path.display()));
            storage.flip_bit(path, ByteOffset(at), 3);
            let snapshot = agent.log.snapshot().expect("snapshot");
            let checked = snapshot.check_and_mend(&|_| None, &mut |_| true).expect("no failure");
            assert!(checked.damage.len() + checked.mended.len() <= 1, "{checked:?}");
            let after = content(&storage, path);
            match (&checked.damage[..], &checked.mended[..]) {
                ([], [told]) => {
                    assert_eq!(after, before, "{told}");
                    assert!(told.contains(".seg is damaged at byte"), "{told}");
                    if told.contains("payload") { payloads += 1 } else { footers += 1 }
                }
                // Padding between entries has no checksum.
                ([], _) => storage.flip_bit(path, ByteOffset(at), 3),
                _ => {
                    left += 1;
                    assert_ne!(after, before);
                    storage.flip_bit(path, ByteOffset(at), 3);
                }
            }
            assert!(snapshot.check(&mut |_| true).expect("no failure").is_sound());
        }
        for point in points {
            let view = agent.log.view(point).expect("a point");
            let read = view.read(common::whole()).expect("read");
            common::assert_same(&read, &agent.model.at(point), point);
        }
    }
    assert!(payloads > 5 && footers > 5 && left > 0, "{payloads} payloads, {footers} footers, {left} left");
}

#[test]
fn a_mend_that_cannot_be_written_stays_told_and_the_check_goes_on() {
    let mut agent = written(2);
    let storage = agent.storage.clone();
    let path = storage
        .files()
        .into_iter()
        .map(|(path, _)| path)
        .find(|path| path.extension().is_some_and(|name| name == "seg"));
    let path = path.expect("a segment");
    let length = storage.open(&path).expect("open").len().expect("length").0;
    storage.flip_bit(&path, ByteOffset(length - 200), 1);
    let snapshot = agent.log.snapshot().expect("snapshot");
    storage.fail_write_after(0);
    let failed = snapshot.check_and_mend(&|_| None, &mut |_| true).expect("no failure");
    assert!(failed.mended.is_empty() && failed.damage[0].contains(": cannot be mended: "), "{failed:?}");
    let read = snapshot.check(&mut |_| true).expect("no failure");
    assert!(!read.is_sound());
    assert_eq!((failed.segments, failed.entries, failed.bytes), (read.segments, read.entries, read.bytes));
    let checked = snapshot.check_and_mend(&|_| None, &mut |_| true).expect("no failure");
    assert_eq!((checked.damage.len(), checked.mended.len()), (0, 1));
}
