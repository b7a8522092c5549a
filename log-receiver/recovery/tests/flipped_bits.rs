//! A flipped bit anywhere gives the right bytes or an error that names the file, never wrong bytes.

mod common;

use std::sync::Arc;

use backtide_recovery::{DiskLog, LogError, Seq};
use backtide_storage::{MemoryStorage, Storage};
use backtide_units::{ByteOffset, Lsn};
use common::{Agent, Random, SayOnPanic, assert_same, cache, directory, seeds, whole};

/// A log with sealed segments and an open one, all of it durable, and what later entries know of that.
fn written(seed: u64) -> (Agent, Seq) {
    let mut agent = Agent::new(seed, MemoryStorage::new()).expect("create");
    agent.attach().expect("attach");
    agent.settle().expect("settle");
    for _ in 0..60 {
        agent.step().expect("step");
    }
    agent.settle().expect("settle");
    agent.sync().expect("sync");
    // The entries up to here are known durable by those that follow.
    let known = agent.log.durable().seq;
    for _ in 0..3 {
        agent.write().expect("write");
    }
    agent.sync().expect("sync");
    (agent, known)
}

/// A copy of the files with one bit flipped.
fn flipped(agent: &Agent, random: &mut Random) -> (MemoryStorage, String) {
    let files: Vec<_> = agent.storage.files();
    let chosen = random.below(files.len() as u64) as usize;
    let copy = MemoryStorage::new();
    copy.create_dir(&directory().join("segments")).expect("create dir");
    for (path, content) in &files {
        let file = copy.create_new(path).expect("create");
        file.write_at(ByteOffset(0), content).expect("write");
    }
    let (path, content) = &files[chosen];
    // Half the flips near the ends, where headers and footers are.
    let length = content.len() as u64;
    let near_end = length - random.below(length.min(6000)) - 1;
    let offset = match random.below(4) {
        0 => random.below(length.min(400)),
        1 => near_end,
        _ => random.below(length),
    };
    copy.flip_bit(path, ByteOffset(offset), random.below(8) as u32);
    (copy, format!("{} byte {offset}", path.display()))
}

fn names_a_segment(error: &LogError) {
    let text = error.to_string();
    assert!(matches!(error, LogError::Damaged { .. } | LogError::UnknownVersion { .. }), "{text}");
    assert!(text.contains(".seg "), "{text}");
}

#[test]
fn a_flipped_bit_gives_right_bytes_or_an_error_that_names_the_file() {
    let (mut refused, mut damaged, mut unharmed) = (0, 0, 0);
    for seed in seeds(4) {
        let (mut agent, known) = written(seed);
        let points: Vec<Lsn> =
            agent.log.timeline().intervals().iter().flat_map(|i| [i.from.lsn, i.to.lsn]).collect();
        let images: Vec<Vec<u8>> = points.iter().map(|lsn| agent.model.at(*lsn)).collect();
        agent.log.snapshot().expect("everything is in the files");
        let mut random = Random(seed);
        for _ in 0..50 {
            let (storage, place) = flipped(&agent, &mut random);
            let _say = SayOnPanic(format!("SEED={seed}, a bit flipped in {place}"));
            let mut log = match DiskLog::open(Arc::new(storage), directory(), agent.options, &cache()) {
                Ok((log, _)) => log,
                Err(error) => {
                    names_a_segment(&error);
                    refused += 1;
                    continue;
                }
            };
            assert!(log.appended() >= known, "entries that were known durable are gone without a word");
            for (lsn, image) in points.iter().zip(&images) {
                // What only the last sync made durable cannot be told from a torn tail.
                let Ok(view) = log.view(*lsn) else { continue };
                match view.read(whole()) {
                    Ok(bytes) => {
                        assert_same(&bytes, image, *lsn);
                        unharmed += 1;
                    }
                    Err(error) => {
                        names_a_segment(&error);
                        damaged += 1;
                    }
                }
            }
        }
    }
    assert!(refused > 0 && damaged > 0 && unharmed > 0, "{refused} {damaged} {unharmed}");
}

#[test]
fn a_missing_segment_is_damage() {
    let (agent, _) = written(2);
    let mut segments: Vec<_> = agent.storage.files().into_iter().map(|(path, _)| path).collect();
    segments.retain(|path| path.extension().is_some_and(|extension| extension == "seg"));
    segments.sort();
    assert!(segments.len() > 3, "{segments:?}");
    // The last one's loss cannot be told from a power cut before it was durable.
    for path in &segments[..segments.len() - 1] {
        let copy = MemoryStorage::new();
        copy.create_dir(&directory().join("segments")).expect("create dir");
        for (other, content) in agent.storage.files() {
            if other != *path {
                let file = copy.create_new(&other).expect("create");
                file.write_at(ByteOffset(0), &content).expect("write");
            }
        }
        let opened = DiskLog::open(Arc::new(copy), directory(), agent.options, &cache());
        let error = opened.map(|_| ()).expect_err("damage");
        assert!(error.to_string().contains(&path.display().to_string()), "{error}");
    }
}

#[test]
fn a_log_of_a_newer_version_is_refused() {
    let (agent, _) = written(1);
    let copy = MemoryStorage::new();
    copy.create_dir(&directory().join("segments")).expect("create dir");
    for (path, mut content) in agent.storage.files() {
        content[8] = 9;
        let crc = crc32c::crc32c(&content[..124]);
        content[124..128].copy_from_slice(&crc.to_le_bytes());
        copy.create_new(&path).and_then(|file| file.write_at(ByteOffset(0), &content)).expect("copy");
    }
    let error = DiskLog::open(Arc::new(copy), directory(), agent.options, &cache()).map(|_| ());
    let text = error.expect_err("refused").to_string();
    assert!(text.ends_with("has format version 9, this program reads up to 1"), "{text}");
}

#[test]
fn an_only_segment_whose_header_became_zeros_is_damage_and_no_new_log() {
    let (agent, _) = written(1);
    let copy = MemoryStorage::new();
    copy.create_dir(&directory().join("segments")).expect("create dir");
    let (path, mut content) = agent.storage.files().into_iter().min().expect("a log has a segment");
    content[..backtide_segment::SEGMENT_HEADER_LENGTH].fill(0);
    copy.create_new(&path).expect("create").write_at(ByteOffset(0), &content).expect("write");
    let opened = DiskLog::open(Arc::new(copy), directory(), agent.options, &cache());
    let error = opened.err().expect("acknowledged entries are behind the header");
    names_a_segment(&error);
}

#[test]
fn a_damaged_payload_up_to_what_was_noted_as_durable_cuts_nothing() {
    let mut agent = Agent::new(9, MemoryStorage::new()).expect("create");
    agent.attach().expect("attach");
    agent.settle().expect("settle");
    agent.sync().expect("sync");
    // One batch, of which no later entry knows that it became durable.
    for _ in 0..3 {
        agent.write().expect("write");
    }
    agent.sync().expect("sync");
    let (noted, latest) = (agent.log.durable().seq, agent.log.timeline().latest());
    let first = agent.model.changes[agent.model.changes.len() - 3].bytes.clone().expect("a write");
    for (known, kept) in [(noted, true), (Seq(noted.0 - 3), false)] {
        let storage = MemoryStorage::new();
        storage.create_dir(&directory().join("segments")).expect("create dir");
        let mut harmed = false;
        for (path, content) in agent.storage.files() {
            let file = storage.create_new(&path).expect("create");
            file.write_at(ByteOffset(0), &content).expect("write");
            if let Some(at) = content.windows(first.len()).position(|bytes| bytes == first) {
                storage.flip_bit(&path, ByteOffset(at as u64), 1);
                harmed = true;
            }
        }
        assert!(harmed);
        let storage: Arc<dyn Storage> = Arc::new(storage);
        let opened = DiskLog::open_noted(storage, directory(), agent.options, &cache(), |_| known);
        let (mut log, recovered) = opened.expect("open");
        assert_eq!(
            (log.appended() == noted, log.timeline().latest() == latest),
            (kept, kept),
            "{recovered:?}"
        );
        assert_eq!(
            (recovered.damaged_entries.len(), recovered.cut_bytes.is_zero()),
            (usize::from(kept), kept)
        );
        if let (true, Some(latest)) = (kept, latest) {
            names_a_segment(
                &log.view(latest.lsn).expect("a point").read(whole()).expect_err("it is damaged"),
            );
        }
    }
}
