//! Images against a plain model: every version that is kept reads back, whatever else was made, collected, torn or flipped.

use backtide_images::{Image, ImageError, Root};
use backtide_storage::Storage;
use backtide_units::{ByteCount, ByteOffset, ByteRange};

use crate::common::*;

#[test]
fn every_version_that_is_kept_reads_back_and_others_give_their_room_back() {
    for seed in 0..6 {
        // The last one has trees of two levels, and a last chunk that is not whole.
        let size = if seed == 5 { 270 * CHUNK + 5000 } else { 20 * CHUNK };
        let mut bench = Bench::new(seed, size);
        let mut kept: Vec<(Root, Vec<u8>)> = Vec::new();
        let mut last: Option<Image> = None;
        for _ in 0..25 {
            let (root, content) = bench.next(last.as_ref());
            last = Some(bench.images.image(root));
            kept.push((root, content));
            if bench.random.below(4) == 0 {
                let gone = bench.random.below(kept.len() as u64) as usize;
                kept.remove(gone);
                let before = bench.storage.used();
                let roots: Vec<Root> = kept.iter().map(|(root, _)| *root).collect();
                let collected = bench.images.collect(&roots).expect("no fault");
                assert_eq!(bench.storage.used().0, before.0 - collected.bytes.0);
            }
            if bench.random.below(5) == 0 {
                bench.images = images(&bench.storage);
                last = last.map(|last| bench.images.image(last.root()));
            }
        }
        for (root, content) in &kept {
            assert_reads(&bench.images.image(*root), content, &mut bench.random);
            assert_eq!(check(&bench.images, *root), Vec::<String>::new());
        }
        for two in kept.windows(2) {
            let (a, b) = (bench.images.image(two[0].0), bench.images.image(two[1].0));
            let mut same = two[0].1.clone();
            let mut take = |range: ByteRange| {
                let range = range.start().0 as usize..(range.end().0 as usize).min(same.len());
                same[range.clone()].copy_from_slice(&two[1].1[range]);
            };
            a.differing(&b, &mut take).unwrap();
            assert!(same == two[1].1, "what differs is told");
            a.differing(&a, &mut |range| panic!("{range} does not differ")).unwrap();
        }
        drop(last);
        bench.images.collect(&[]).expect("no fault");
        assert_eq!((bench.packs().len(), bench.storage.used()), (0, ByteCount::ZERO));
    }
}

#[test]
fn equal_content_is_stored_once_whatever_the_disk() {
    let mut bench = Bench::new(1, 4 * CHUNK);
    for (at, byte) in (0_u64..).zip(&mut bench.content) {
        *byte = (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 31) as u8;
    }
    bench.make(None, &[true; 4]).unwrap();
    let used = bench.storage.used();
    // Another disk with the same content, and a writer that was started later.
    bench.images = images(&bench.storage);
    bench.make(None, &[true; 4]).unwrap();
    assert_eq!(bench.storage.used(), used);
    // What compresses is stored compressed.
    bench.content.fill(7);
    bench.make(None, &[true; 4]).unwrap();
    assert!(bench.storage.used().0 < used.0 + CHUNK as u64);
}

#[test]
fn what_pads_a_pack_is_read_by_nobody() {
    let mut bench = Bench::new(4, 6 * CHUNK);
    let (root, content) = bench.next(None);
    let mut flipped = 0;
    for pack in bench.packs() {
        let files = bench.storage.files();
        let (_, bytes) = files.iter().find(|(path, _)| *path == pack).unwrap();
        // From chunk to chunk: 64 bytes, what is stored, and zeros up to a multiple of 8.
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) as usize;
        let chunks_end = word(bytes.len() - 64 + 16);
        let mut at = 64;
        while at < chunks_end {
            let end = at + 64 + word(at + 16);
            for place in end..end.next_multiple_of(8) {
                bench.storage.flip_bit(&pack, ByteOffset(place as u64), 5);
                flipped += 1;
            }
            at = end.next_multiple_of(8);
        }
    }
    assert!(flipped > 0);
    let images = images(&bench.storage);
    assert_reads(&images.image(root), &content, &mut bench.random);
    assert_eq!(check(&images, root), Vec::<String>::new());
    images.collect(&[root]).unwrap();
    assert_reads(&images.image(root), &content, &mut bench.random);
}

#[test]
fn a_disk_that_grows_keeps_its_tree() {
    let mut bench = Bench::new(2, CHUNK / 2);
    let mut last: Option<Image> = None;
    let mut kept = Vec::new();
    for size in [CHUNK / 2, CHUNK, 3 * CHUNK + 1, 255 * CHUNK, 257 * CHUNK, 300 * CHUNK] {
        bench.content.resize(size, 0);
        let (root, content) = bench.next(last.as_ref());
        last = Some(bench.images.image(root));
        kept.push((root, content));
    }
    for (root, content) in kept {
        assert_reads(&bench.images.image(root), &content, &mut bench.random);
    }
}

#[test]
fn an_image_that_is_open_stays_whatever_is_collected() {
    let mut bench = Bench::new(3, 20 * CHUNK);
    let (root, content) = bench.next(None);
    let open = bench.images.image(root);
    let (next, newer) = bench.next(Some(&open));
    bench.images.collect(&[next]).unwrap();
    assert_reads(&open, &content, &mut bench.random);
    drop(open);
    bench.images.collect(&[next]).unwrap();
    assert_reads(&bench.images.image(next), &newer, &mut bench.random);
    assert!(read(&images(&bench.storage).image(root)).is_err(), "its chunks are gone");
}

#[test]
fn a_flipped_bit_gives_the_right_data_or_an_error_that_names_the_file() {
    let mut bench = Bench::new(4, 6 * CHUNK);
    let (first, _) = bench.next(None);
    let image = bench.images.image(first);
    let (root, content) = bench.next(Some(&image));
    drop(image);
    let (mut refused, mut places) = (0, 0);
    for pack in bench.packs() {
        let length = bench.storage.open(&pack).unwrap().len().unwrap().0;
        // Everything but the middle of long contents byte by byte.
        let around = |at: &u64| at % 4096 < 200 || *at > length - 600;
        for at in (0..length).filter(around) {
            places += 1;
            bench.storage.flip_bit(&pack, ByteOffset(at), (at % 8) as u32);
            let images = images(&bench.storage);
            let damage = check(&images, root);
            match read(&images.image(root)) {
                Ok(found) => assert!(found == content, "wrong data after a flip at {at}"),
                Err(ImageError::Damaged { file, .. }) => {
                    assert_eq!(file, pack);
                    assert!(!damage.is_empty());
                    refused += 1;
                }
                Err(error) => panic!("{error}"),
            }
            bench.storage.flip_bit(&pack, ByteOffset(at), (at % 8) as u32);
        }
    }
    assert!(refused > 100 && places > refused, "{refused} of {places}");
    assert!(check(&bench.images, root).is_empty());
}

#[test]
fn a_block_is_read_without_its_chunk_once_that_was_checked_and_damage_since_is_found() {
    let mut bench = Bench::new(9, 2 * CHUNK);
    // It cannot be compressed.
    bench.content = (0..2 * CHUNK).map(|_| bench.random.next() as u8).collect();
    let root = bench.make(None, &[true, true]).expect("no fault");
    let image = bench.images.image(root);
    let block = |at: usize| {
        let range = ByteRange::new(ByteOffset(at as u64), ByteCount(4096)).unwrap();
        let mut found = vec![0; 4096];
        image.read_into(range, &mut found).map(|()| found)
    };
    let expected = |at: usize| bench.content[at..at + 4096].to_vec();
    for at in [0, 8192, 8192, 5000, CHUNK - 4096, CHUNK - 100, CHUNK] {
        assert!(block(at).unwrap() == expected(at), "{at}");
    }
    let pack = &bench.packs()[0];
    let file = bench.storage.open(pack).unwrap();
    let mut stored = vec![0; file.len().unwrap().0 as usize];
    file.read_at(ByteOffset(0), &mut stored).unwrap();
    let place =
        stored.windows(4096).position(|bytes| bytes == expected(8192)).expect("it is stored as it is");
    bench.storage.flip_bit(pack, ByteOffset(place as u64 + 7), 3);
    assert!(matches!(block(8192), Err(ImageError::Damaged { .. })));
    assert!(matches!(block(5000), Err(ImageError::Damaged { .. })));
    assert!(block(12_288).unwrap() == expected(12_288), "a block beside it is what it was");
    bench.storage.flip_bit(pack, ByteOffset(place as u64 + 7), 3);
    assert!(block(8192).unwrap() == expected(8192));
}

#[test]
fn a_pack_with_a_damaged_trailer_or_table_is_read_by_its_chunks() {
    let mut bench = Bench::new(5, 6 * CHUNK);
    let (root, content) = bench.next(None);
    for pack in bench.packs() {
        let length = bench.storage.open(&pack).unwrap().len().unwrap().0;
        bench.storage.flip_bit(&pack, ByteOffset(length - 30), 2);
    }
    let images = images(&bench.storage);
    assert_reads(&images.image(root), &content, &mut bench.random);
    assert!(check(&images, root)[0].contains("trailer"));
    images.collect(&[root]).unwrap();
    assert_reads(&images.image(root), &content, &mut bench.random);
}

#[test]
fn a_writer_that_is_given_up_leaves_no_pack_and_the_next_goes_on() {
    let mut bench = Bench::new(10, 20 * CHUNK);
    let (root, content) = bench.next(None);
    let before = bench.packs();
    let all = [true; 20];
    // Dropped when it has made something; not finished, for a sync of a pack or of the directory fails.
    for fails in [None, Some(0), Some(2), Some(4), Some(6), Some(7)] {
        bench.content = (0..20 * CHUNK).map(|_| bench.random.next() as u8).collect();
        match fails {
            None => {
                let mut writer = bench.images.write().expect("no fault");
                let size = ByteCount(bench.content.len() as u64);
                writer
                    .image(None, size, &mut Disk { content: &bench.content, changed: &all })
                    .expect("no fault");
                assert!(bench.packs().len() > before.len() + 3);
            }
            Some(syncs) => {
                bench.storage.fail_sync_after(syncs);
                assert!(bench.make(None, &all).is_err(), "{syncs}");
            }
        }
        assert_eq!(bench.packs(), before, "{fails:?}");
    }
    let next = bench.make(None, &all).expect("no fault");
    assert!(bench.packs().len() > before.len() + 3);
    bench.storage.crash(10);
    bench.images = images(&bench.storage);
    assert_reads(&bench.images.image(root), &content, &mut bench.random);
    let newer = bench.content.clone();
    assert_reads(&bench.images.image(next), &newer, &mut bench.random);
}

#[test]
fn a_power_cut_while_an_image_is_made_costs_no_other() {
    at_every_operation(|bench, image| {
        let changed = bench.change();
        bench.make(Some(image), &changed).map(|_| ())
    });
}

#[test]
fn a_power_cut_while_room_is_given_back_costs_no_image() {
    at_every_operation(|bench, image| bench.images.collect(&[image.root()]).map(|_| ()));
}
