//! What goes into a spill comes out of it, within its limit; what was torn or damaged never does.

mod common;

use backtide_protocol::{Message, Ping};
use backtide_tracking::DirtyBitmap;
use backtide_units::{ByteCount, ByteOffset, CaptureTime, Lsn};
use common::{Spill, limits, write};
use proptest::prelude::*;

#[test]
fn what_was_appended_is_read_back_and_recovered() {
    let mut spill = Spill::new(1 << 20);
    let flush = Message::Flush { lsn: Lsn(102), time: CaptureTime(5) };
    let mark = Message::Mark { lsn: Lsn(102), time: CaptureTime(6), label: "here".to_owned() };
    let first = [write(101, 100, 4096), write(102, 101, 512), flush, mark];
    assert!(spill.append(&first).unwrap());
    // LSNs are not dense: what follows an attach begins elsewhere.
    let second = [write(500, 102, 30_000), Message::Ping(Ping::default()), write(501, 500, 1)];
    assert!(spill.append(&second).unwrap());
    let all: Vec<Message> = first.into_iter().chain(second).collect();
    assert_eq!(spill.read_all(&spill.ring), all);
    let recovered = spill.files.recover(limits(1 << 20)).unwrap();
    assert_eq!(recovered.cut, None);
    assert_eq!(recovered.left.unwrap().last_time, CaptureTime(5010));
    assert_eq!((recovered.ring.base(), recovered.ring.end()), (Lsn(100), Lsn(501)));
    assert_eq!(spill.read_all(&recovered.ring), all);
    for (lsn, there) in [(100, false), (101, true), (102, true), (103, false), (499, false), (501, true)] {
        assert_eq!(recovered.ring.has_record(Lsn(lsn)), there, "LSN {lsn}");
    }
    assert_eq!(recovered.ring.records_above(Lsn(101)), 3);
    let mut touched = DirtyBitmap::new();
    recovered.ring.mark(&mut touched);
    assert_eq!(touched.count().0, 1 + 1 + 8);
}

#[test]
fn the_limit_is_kept_and_trimming_makes_room() {
    let limit = 64 * 1024;
    let mut spill = Spill::new(limit);
    while spill.write(2000) {
        assert!(spill.storage.used().0 <= limit);
    }
    assert!(spill.ring.bytes().0 > limit * 7 / 8, "{}", spill.ring.bytes());
    assert_eq!(spill.ring.bytes(), spill.storage.used());
    // A half is durable at the receiver: the files go, then there is room again.
    spill.ring.trim(spill.ring.first() + 16);
    assert!(!spill.write(2000));
    let gone = spill.ring.take_removable();
    assert!(!spill.write(2000), "files take room until they are gone");
    spill.files.remove(&gone).unwrap();
    spill.ring.removed(&gone);
    assert_eq!(spill.ring.bytes(), spill.storage.used());
    assert!(spill.write(2000));
    let recovered = spill.files.recover(limits(limit)).unwrap();
    assert_eq!(recovered.ring.end(), spill.ring.end());
    assert!(recovered.ring.base() <= Lsn(116), "{}", recovered.ring.base());
    // A long record has a file of its own, if it fits at all.
    assert!(!spill.write(limit as usize));
}

#[test]
fn an_empty_ring_begins_a_file_that_says_where_the_log_stands() {
    let mut spill = Spill::new(1 << 20);
    spill.write(100);
    spill.ring.trim(spill.ring.next());
    assert!(spill.ring.is_empty());
    let gone = spill.ring.take_removable();
    spill.files.remove(&gone).unwrap();
    spill.ring.removed(&gone);
    assert!(spill.ring.bytes().is_zero());
    spill.end = 777;
    spill.write(100);
    let recovered = spill.files.recover(limits(1 << 20)).unwrap();
    assert_eq!((recovered.ring.base(), recovered.ring.end()), (Lsn(777), Lsn(778)));
    assert_eq!(spill.read_all(&recovered.ring), [write(778, 777, 100)]);
}

#[test]
fn a_missing_file_ends_what_counts() {
    let mut spill = Spill::new(64 * 1024);
    while spill.write(2000) {}
    let paths: Vec<_> = spill.storage.files().into_iter().map(|(path, _)| path).collect();
    backtide_storage::Storage::remove(&spill.storage, &paths[3]).unwrap();
    let mut recovered = spill.files.recover(limits(64 * 1024)).unwrap();
    assert!(recovered.cut.is_some());
    assert_eq!(recovered.ring.end(), Lsn(103));
    let kept = spill.read_all(&recovered.ring).len() as u64;
    assert_eq!(recovered.ring.end(), Lsn(100 + kept));
    // What lies behind takes room until it is removed.
    assert_eq!(recovered.ring.bytes(), spill.storage.used());
    let gone = recovered.ring.take_removable();
    assert_eq!(gone.len(), paths.len() - 4);
}

/// The frames of a recovered spill are the first ones of what was written, unchanged.
fn assert_is_a_beginning(spill: &Spill, all: &[Message]) -> usize {
    let recovered = spill.files.recover(limits(1 << 16)).unwrap();
    let found = spill.read_all(&recovered.ring);
    assert!(found.len() <= all.len());
    assert!(found == all[..found.len()], "what counts is what was written");
    if found.is_empty() {
        assert_eq!(recovered.left, None);
    }
    found.len()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn a_power_loss_leaves_at_least_what_was_synced(
        batches in prop::collection::vec(prop::collection::vec(1usize..3000, 1..6), 1..8),
        cut in 0u64..12,
        seed in any::<u64>(),
    ) {
        let mut spill = Spill::new(1 << 16);
        let (mut all, mut synced) = (Vec::new(), 0);
        spill.storage.cut_power_after(cut);
        for lengths in batches {
            let mut at = spill.end;
            let batch: Vec<Message> = lengths.iter().map(|length| { at += 1; write(at, at - 1, *length) }).collect();
            all.extend(batch.clone());
            match spill.append(&batch) {
                Ok(true) => synced = all.len(),
                Ok(false) => { all.truncate(synced); break }
                Err(_) => break,
            }
        }
        spill.storage.crash(seed);
        prop_assert!(assert_is_a_beginning(&spill, &all) >= synced);
    }

    #[test]
    fn a_flipped_bit_is_noticed_by_whoever_reads(
        lengths in prop::collection::vec(1usize..3000, 1..12),
        file in any::<prop::sample::Index>(),
        at in any::<prop::sample::Index>(),
        bit in 0u32..8,
    ) {
        let mut spill = Spill::new(1 << 16);
        let mut all = Vec::new();
        for length in lengths {
            let message = write(spill.end + 1, spill.end, length);
            all.push(message.clone());
            spill.append(&[message]).unwrap();
        }
        let files = spill.storage.files();
        let (path, bytes) = file.get(&files);
        spill.storage.flip_bit(path, ByteOffset(at.index(bytes.len()) as u64), bit);
        // What is read by the ring that knew it before: the frames before the damage, and the reason.
        let mut frame = spill.ring.first();
        let mut found = Vec::new();
        while let Some(place) = spill.ring.place_of(frame) {
            let back = spill.files.read(&place);
            frame = place.first + place.frames;
            let whole = back.messages.len() as u64 == place.frames;
            prop_assert_eq!(whole, back.failure.is_none());
            found.extend(back.messages);
            if !whole { break }
        }
        prop_assert!(found == all[..found.len()]);
        // And by one who comes later.
        assert_is_a_beginning(&spill, &all);
    }

    #[test]
    fn a_cut_ring_is_what_was_read_before_it(lengths in prop::collection::vec(1usize..3000, 2..12), cut in 1u64..12) {
        let mut spill = Spill::new(1 << 16);
        for length in &lengths {
            spill.write(*length);
        }
        let cut = cut.min(lengths.len() as u64);
        let all = spill.read_all(&spill.ring);
        spill.ring.cut(spill.ring.first() + cut, Lsn(100 + cut));
        prop_assert_eq!(spill.ring.end(), Lsn(100 + cut));
        prop_assert_eq!(spill.ring.records_above(Lsn(100)), cut);
        prop_assert_eq!(spill.read_all(&spill.ring), &all[..cut as usize]);
        spill.ring.trim(spill.ring.next());
        let gone = spill.ring.take_removable();
        spill.files.remove(&gone).unwrap();
        spill.ring.removed(&gone);
        prop_assert_eq!(spill.storage.used(), ByteCount::ZERO);
    }
}
