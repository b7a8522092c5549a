//! What an overlay holds, how much it may hold, and what damage of it does.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use crate::common::*;
use backtide_overlay::{Base, BaseError, Budget, Existing, Kind, OverlayError, OverlayOptions, check};
use backtide_units::{ByteCount, ByteOffset, ByteRange};
use bytes::Bytes;

#[test]
fn any_write_and_zero_reads_back_exactly() {
    let (_storage, overlay) = fresh();
    let (mut steps, mut image) = (Steps(3), below());
    for _ in 0..2000 {
        let mut step = steps.next_step();
        if let Step::Zero(_, keep) = step {
            // At any byte, too.
            let start = steps.next_number(SIZE.0);
            let count = steps.next_number(SIZE.0 - start + 1);
            step = Step::Zero(range(start, count), keep);
        }
        step.run(&overlay).unwrap();
        step.run_on(&mut image);
        let start = steps.next_number(SIZE.0);
        let some = range(start, steps.next_number(SIZE.0 - start) + 1);
        assert_eq!(overlay.read(some, &Below).unwrap(), image[span(some)], "{step:?} {some}");
        let mut end = ByteOffset(0);
        for (part, kind) in overlay.extents(range(0, SIZE.0)) {
            assert_eq!(part.start(), end);
            end = part.end();
            match kind {
                Kind::Zero => assert!(image[span(part)].iter().all(|byte| *byte == 0), "{part}"),
                Kind::Below => assert_eq!(image[span(part)], below()[span(part)], "{part}"),
                Kind::Data => {}
            }
        }
        assert_eq!(end, ByteOffset(SIZE.0));
    }
    assert_eq!(content(&overlay).unwrap(), image);
    let usage = overlay.usage();
    assert!(usage.bytes.0 <= 24 * 4096 && usage.file_bytes.0 < 512 << 10, "slots are used again: {usage:?}");
}

/// Only what was asked for before a change.
struct Edges(Vec<ByteRange>);

impl Base for Edges {
    fn read(&self, range: ByteRange) -> Result<Bytes, BaseError> {
        assert!(self.0.contains(&range), "{range} of the disk below was not named: {:?}", self.0);
        Ok(below()[span(range)].to_vec().into())
    }
}

#[test]
fn whoever_has_the_disk_below_elsewhere_is_told_what_of_it_is_needed() {
    let (_storage, overlay) = fresh();
    let (mut steps, mut image, mut asked) = (Steps(5), below(), 0);
    for _ in 0..300 {
        let start = steps.next_number(SIZE.0);
        let some = range(start, steps.next_number((SIZE.0 - start).min(600)) + 1);
        let edges = Edges(overlay.edges(some));
        asked += edges.0.len();
        match steps.next_number(8) {
            keep @ 0..2 => {
                overlay.zero(some, keep == 0, &edges).unwrap();
                image[span(some)].fill(0);
            }
            _ => {
                overlay.write(some.start(), &vec![7; span(some).len()], &edges).unwrap();
                image[span(some)].fill(7);
            }
        }
        let partly = overlay.read_partly(range(0, SIZE.0)).unwrap();
        let rest = partly.below().iter().map(|part| below()[span(*part)].to_vec().into()).collect();
        assert_eq!(partly.complete(rest), image);
    }
    assert!(asked > 10 && overlay.edges(range(0, 4096)).is_empty(), "{asked}");
}

#[test]
fn a_full_overlay_takes_new_versions_and_no_new_block() {
    let storage = backtide_storage::MemoryStorage::new();
    backtide_storage::Storage::create_dir(&storage, std::path::Path::new("overlays")).unwrap();
    let options = OverlayOptions::alone(ByteCount(4 * 4096));
    let overlay = open_with(&storage, Existing::Create, options.clone()).unwrap();
    overlay.write(ByteOffset(0), &[1; 3 * 4096], &Below).unwrap();
    let full = overlay.write(ByteOffset(4 * 4096), &[1; 2 * 4096], &Below);
    assert!(matches!(full, Err(OverlayError::Full { .. })), "{full:?}");
    overlay.write(ByteOffset(4 * 4096), &[1; 4096], &Below).unwrap();
    for byte in 0..100 {
        overlay.write(ByteOffset(0), &[byte; 3 * 4096], &Below).unwrap();
    }
    assert_eq!(options.budget.left(), ByteCount(0));
    overlay.zero(range(0, SIZE.0), false, &Below).unwrap();
    assert_eq!(overlay.usage().bytes, ByteCount(0));
    assert_eq!(options.budget.left(), ByteCount(4 * 4096));
    overlay.write(ByteOffset(8 * 4096), &[9; 4 * 4096], &Below).unwrap();
    drop(overlay);
    assert_eq!(options.budget.left(), ByteCount(4 * 4096), "what is closed gives its share back");
    // Of all overlays together.
    let shared = OverlayOptions { budget: Budget::new(ByteCount(5 * 4096)), ..options };
    let overlay = open_with(&storage, Existing::Open, shared.clone()).unwrap();
    assert_eq!(shared.budget.left(), ByteCount(4096));
    assert!(shared.budget.clone().left() < overlay.usage().limit);
    let small = OverlayOptions { budget: Budget::new(ByteCount(4096)), ..shared };
    assert!(matches!(open_with(&storage, Existing::Open, small), Err(OverlayError::Full { .. })));
}

#[test]
fn a_full_store_refuses_a_write_and_nothing_is_lost() {
    let (storage, overlay) = fresh();
    overlay.write(ByteOffset(0), &[1; 4096], &Below).unwrap();
    storage.set_capacity(Some(storage.used()));
    let full = overlay.write(ByteOffset(8192), &[2; 4096], &Below);
    assert!(matches!(full, Err(OverlayError::NoRoom(_))), "{full:?}");
    storage.set_capacity(None);
    overlay.write(ByteOffset(8192), &[3; 4096], &Below).unwrap();
    let mut image = below();
    image[..4096].fill(1);
    image[8192..12288].fill(3);
    assert_eq!(content(&overlay).unwrap(), image);
    let refusing = OverlayOptions { room: Arc::new(|_| Err("the store is full".to_owned())), ..options() };
    drop(overlay);
    let overlay = open_with(&storage, Existing::Open, refusing).unwrap();
    let full = overlay.write(ByteOffset(0), &[2; 512], &Below).unwrap_err();
    assert_eq!(full.to_string(), "the store is full");
    assert_eq!(content(&overlay).unwrap(), image);
}

#[test]
fn a_flipped_bit_is_an_error_with_its_place_and_never_data() {
    let (storage, overlay) = fresh();
    let (mut steps, mut image) = (Steps(11), below());
    for _ in 0..25 {
        let step = steps.next_step();
        step.run(&overlay).unwrap();
        step.run_on(&mut image);
    }
    overlay.flush().unwrap();
    // Slots are used again: what an early record wrote is nowhere any more.
    for round in (1..=9).cycle().take(20) {
        let block = ByteRange::new(ByteOffset(u64::from(round / 5) * 4096), ByteCount(4096)).unwrap();
        overlay.write(block.start(), &[round; 4096], &Below).unwrap();
        let from = block.start().0 as usize;
        image[from..from + 4096].fill(round);
        overlay.flush().unwrap();
    }
    assert!(overlay.check(&mut |_| true).damage.is_empty());
    drop(overlay);
    let shared: Arc<dyn backtide_storage::Storage> = Arc::new(storage.clone());
    let mut noticed = 0;
    for (path, stride) in [(files().map, 1), (files().data, 61)] {
        let length = backtide_storage::Storage::open(&storage, &path).unwrap().len().unwrap().0;
        for at in (0..length).step_by(stride) {
            storage.flip_bit(&path, ByteOffset(at), (at % 8) as u32);
            let sound = check(&shared, &files(), ID, SIZE, &mut |_| true)
                .is_ok_and(|checked| checked.damage.is_empty());
            let before = storage.files();
            match open(&storage, Existing::Open).and_then(|overlay| content(&overlay)) {
                Ok(found) => assert!(found == image, "{} byte {at}", path.display()),
                Err(error) => {
                    assert!(!sound, "{} byte {at} is not noticed by a check", path.display());
                    assert!(matches!(error, OverlayError::Damaged { .. }), "{error}");
                    noticed += 1;
                }
            }
            // Opening it may have mended the mark.
            if storage.files() != before {
                assert!(!sound, "{} byte {at} was mended and not noticed", path.display());
            } else {
                storage.flip_bit(&path, ByteOffset(at), (at % 8) as u32);
            }
        }
    }
    assert!(noticed > 500, "{noticed}");
}

#[test]
fn a_lost_end_of_the_map_is_noticed() {
    let (storage, overlay) = fresh();
    overlay.write(ByteOffset(0), &[1; 4096], &Below).unwrap();
    overlay.flush().unwrap();
    overlay.write(ByteOffset(4096), &[2; 4096], &Below).unwrap();
    overlay.flush().unwrap();
    drop(overlay);
    let map = backtide_storage::Storage::open(&storage, &files().map).unwrap();
    let length = map.len().unwrap().0;
    map.set_len(ByteCount(length - 1)).unwrap();
    let Err(error) = open(&storage, Existing::Open) else { panic!("a record is missing") };
    assert!(error.to_string().contains("records up to 2 were durable"), "{error}");
}

#[test]
fn readers_see_whole_blocks_while_slots_are_used_again() {
    let (_storage, overlay) = fresh();
    overlay.write(ByteOffset(0), &[1; 8 * 4096], &Below).unwrap();
    let (overlay, stop) = (Arc::new(overlay), Arc::new(AtomicBool::new(false)));
    let readers: Vec<_> = (0..2)
        .map(|_| {
            let (overlay, stop) = (Arc::clone(&overlay), Arc::clone(&stop));
            std::thread::spawn(move || {
                let mut reads = 0;
                while !stop.load(Ordering::Relaxed) || reads == 0 {
                    let bytes = overlay.read(range(0, 8 * 4096), &Below).unwrap();
                    for block in bytes.chunks(4096) {
                        assert!(block.iter().all(|byte| *byte == block[0]), "a block of two writes");
                    }
                    reads += 1;
                }
            })
        })
        .collect();
    for round in 0..400_u64 {
        overlay.write(ByteOffset(round % 8 * 4096), &[round as u8 | 1; 4096], &Below).unwrap();
        if round % 3 == 0 {
            overlay.flush().unwrap();
        }
    }
    stop.store(true, Ordering::Relaxed);
    readers.into_iter().for_each(|reader| reader.join().unwrap());
    assert!(overlay.usage().file_bytes.0 < 256 << 10, "slots are used again: {:?}", overlay.usage());
}
