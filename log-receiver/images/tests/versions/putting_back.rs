//! What is found of a pack is put back into it, whatever else of it is lost, or is there instead.

use std::path::Path;

use backtide_images::{Mended, Root};
use backtide_storage::Storage;
use backtide_units::{ByteCount, ByteOffset, ByteRange};
use roaring::RoaringTreemap;

use crate::{
    common::*,
    mending::{mend, mend_checked, noise},
};

/// A pack's table: ordinals, and where the chunks begin.
fn table(bench: &Bench, pack: &Path) -> (Vec<u32>, Vec<u64>) {
    let files = bench.storage.files();
    let (_, bytes) = files.iter().find(|(path, _)| path == pack).expect("it is there");
    let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
    let lines = || (word(bytes.len() - 64 + 16) as usize..bytes.len() - 64).step_by(40);
    (lines().map(word).collect(), lines().map(|at| word(at + 4).into()).collect())
}

/// Two disks of one writer, of noise. The first pack has all of the first one, its node behind its chunks, and then two chunks of
/// the second, whose others are in the second pack.
fn two_disks() -> (Bench, [(Root, Vec<u8>); 2]) {
    let mut bench = Bench::new(31, CHUNK);
    let mut writer = bench.images.write().expect("no fault");
    let disks = [2, 4].map(|chunks| {
        let noise = (0..chunks * CHUNK / 8).flat_map(|_| bench.random.next().to_le_bytes());
        let content: Vec<u8> = noise.collect();
        let mut disk = Disk { content: &content, changed: &[true; 4] };
        let root = writer.image(None, ByteCount(content.len() as u64), &mut disk).expect("no fault");
        (root, content)
    });
    writer.finish().expect("no fault");
    (bench, disks)
}

/// That of a node once more, which no chunk that an image names may need.
const SECOND: u32 = 1 << 31;

#[test]
fn what_a_pack_has_lost_can_be_put_back_whatever_scrubs_that_did_not_find_it_have_made_of_the_pack() {
    // Cut off within a chunk, behind one, before all of them; or missing.
    for (kept, more) in [(Some(3), 1000), (Some(3), 0), (Some(0), 0), (None, 0)] {
        let (bench, [(first, one), (second, two)]) = two_disks();
        let path = bench.packs()[0].clone();
        let (ordinals, chunks) = table(&bench, &path);
        assert_eq!(ordinals, [0, 1, 2, 3, 4, SECOND]);
        // The node is remembered.
        let scrubbing = images(&bench.storage);
        assert!(read(&scrubbing.image(first)).unwrap() == one);
        match kept {
            Some(kept) => {
                let file = bench.storage.open(&path).unwrap();
                file.set_len(ByteCount(chunks[kept] + more)).unwrap();
            }
            None => bench.storage.remove(&path).unwrap(),
        }
        // What the first disk has is found; the second cannot be asked.
        for _ in 0..2 {
            let found = mend(&scrubbing, first, Some(&one));
            assert!(found.left.is_empty(), "{kept:?} {more}: {found:?}");
        }
        assert!(read(&images(&bench.storage).image(first)).unwrap() == one);
        let nothing = mend(&scrubbing, second, None);
        assert_eq!((nothing.chunks.len(), nothing.left.len()), (0, 2), "{nothing:?}");
        // At last it can.
        let all = mend(&images(&bench.storage), second, Some(&two));
        assert_eq!((all.chunks.len(), all.left.len()), (2, 0), "{kept:?} {more}: {all:?}");
        assert_eq!(table(&bench, &path).0, ordinals);
        let fresh = images(&bench.storage);
        assert!(read(&fresh.image(first)).unwrap() == one && read(&fresh.image(second)).unwrap() == two);
        assert_eq!(fresh.collect(&[second]).expect("no fault").rewritten, 1);
        assert!(read(&images(&bench.storage).image(second)).unwrap() == two);
    }
}

#[test]
fn a_chunk_in_whose_place_is_another_is_told_and_the_others_are_put_back() {
    let (bench, [_, (second, two)]) = two_disks();
    let path = bench.packs()[0].clone();
    // The first pack of another store, with one chunk.
    let (other, _) = noise(32, 5);
    let foreign = other.storage.open(&other.packs()[0]).unwrap();
    let mut bytes = vec![0; foreign.len().unwrap().0 as usize];
    foreign.read_exact_at(ByteOffset::ZERO, &mut bytes).unwrap();
    bench.storage.remove(&path).unwrap();
    bench.storage.create_new(&path).unwrap().write_at(ByteOffset::ZERO, &bytes).unwrap();
    let done = mend(&images(&bench.storage), second, Some(&two));
    assert_eq!((done.chunks.len(), done.left.len()), (1, 1), "{done:?}");
    assert_eq!(done.left[0].why.as_deref(), Some("the pack has another chunk there"));
}

#[test]
fn a_place_that_the_device_cannot_read_keeps_no_other_chunk_of_its_pack_from_being_mended() {
    // In a chunk that is wanted and not found: its header, what is behind it. Whatever the system says.
    for (at, errno) in [(0, 5), (30_000, 74), (0, 117), (30_000, 117)] {
        let (bench, root) = noise(33, 4);
        let content = bench.content.clone();
        let path = bench.packs()[0].clone();
        let (_, chunks) = table(&bench, &path);
        let bad = ByteOffset(chunks[0] + at);
        bench.storage.fail_reads(&path, ByteRange::new(bad, ByteCount(512)).unwrap(), errno);
        bench.storage.flip_bit(&path, ByteOffset(chunks[2] + 1000), 1);
        let images = images(&bench.storage);
        assert_eq!(check(&images, root).len(), 2);
        let mut disk = content.clone();
        disk[..CHUNK].fill(9);
        let done = mend(&images, root, Some(&disk));
        assert_eq!((done.chunks.len(), done.left.len()), (1, 1), "{done:?}");
        assert_eq!(check(&images, root).len(), 1, "it is damaged as before");
        let all = mend(&images, root, Some(&content));
        assert_eq!((all.chunks.len(), all.left.len()), (1, 0), "{all:?}");
        assert!(read(&images.image(root)).unwrap() == content);
    }
}

#[test]
fn nor_does_one_in_a_chunk_that_nobody_has_any_more_but_any_other_failure_does() {
    for (errno, mends) in [(5, true), (74, true), (117, true), (12, false), (13, false)] {
        let (mut bench, first) = noise(34, 3);
        let image = bench.images.image(first);
        bench.content[..CHUNK].fill(3);
        let root = bench.make(Some(&image), &[true, false, false]).expect("no fault");
        drop(image);
        let path = bench.packs()[0].clone();
        let (_, chunks) = table(&bench, &path);
        bench.storage.flip_bit(&path, ByteOffset(chunks[1] + 1000), 1);
        let bad = ByteRange::new(ByteOffset(chunks[0] + 30_000), ByteCount(512)).unwrap();
        bench.storage.fail_reads(&path, bad, errno);
        let files = bench.storage.files();
        let images = images(&bench.storage);
        let done = mend(&images, root, Some(&bench.content));
        assert_eq!(
            (done.chunks.len(), done.left.len()),
            (usize::from(mends), usize::from(!mends)),
            "{errno}: {done:?}"
        );
        if mends {
            assert!(read(&images.image(root)).unwrap() == bench.content);
            assert!(check(&images, root).is_empty());
        } else {
            assert!(done.left[0].why.as_deref().is_some_and(|why| why.contains("cannot read")), "{done:?}");
            assert!(bench.storage.files() == files, "nothing has changed");
        }
    }
}

#[test]
fn what_the_device_fails_to_read_for_a_moment_is_not_lost_by_a_mend() {
    let why = |done: &Mended| done.left[0].why.clone().unwrap_or_default();
    // A chunk that the check has read whole; one that no image has any more, or that is lost all the same. The two reads are
    // those of the chunk and of the page.
    for (whole, lost) in [(true, false), (false, false), (false, true)] {
        let (mut bench, first) = noise(35, 3);
        let mut root = first;
        let before = bench.content.clone();
        if !whole && !lost {
            let image = bench.images.image(first);
            bench.content[..CHUNK].fill(3);
            root = bench.make(Some(&image), &[true, false, false]).expect("no fault");
        }
        let path = bench.packs()[0].clone();
        let (_, chunks) = table(&bench, &path);
        bench.storage.flip_bit(&path, ByteOffset(chunks[1] + 1000), 1);
        let bad = ByteRange::new(ByteOffset(chunks[0] + 30_000), ByteCount(512)).unwrap();
        let images = images(&bench.storage);
        if lost {
            bench.storage.fail_reads(&path, bad, 5);
        }
        let found = checked(&images, root);
        // Of the disk the first chunk is not to be had.
        let mut disk = bench.content.clone();
        disk[..CHUNK].fill(9);
        let files = bench.storage.files();
        for times in [Some(2), whole.then_some(u64::MAX)].into_iter().flatten() {
            bench.storage.fail_reads_times(&path, bad, 5, times);
            let done = mend_checked(&images, &found, Some(&disk));
            assert!(bench.storage.files() == files, "nothing has changed: {done:?}");
            assert_eq!((done.chunks.len(), done.left.len()), (usize::from(lost), 1), "{done:?}");
            let expected = if whole { "that was whole cannot be read" } else { "can be read again" };
            assert!(why(&done).contains(expected), "{done:?}");
        }
        // Once it can be read nothing is in the way.
        bench.storage.fail_reads_times(&path, bad, 5, 0);
        let done = mend(&images, root, Some(&disk));
        assert_eq!((done.chunks.len(), done.left.len()), (1, 0), "{done:?}");
        assert!(read(&images.image(root)).unwrap() == bench.content);
        assert!(read(&crate::common::images(&bench.storage).image(first)).unwrap() == before);
    }
}

#[test]
fn one_that_was_lost_before_is_not_taken_for_whole() {
    let (bench, root) = noise(36, 3);
    let path = bench.packs()[0].clone();
    let (_, chunks) = table(&bench, &path);
    let bad = ByteRange::new(ByteOffset(chunks[0] + 30_000), ByteCount(512)).unwrap();
    bench.storage.fail_reads(&path, bad, 5);
    let images = images(&bench.storage);
    let (mut losses, _) = checked(&images, root);
    assert_eq!(losses.take().sentences().count(), 1);
    // What a later round of the same scrub finds.
    bench.storage.flip_bit(&path, ByteOffset(chunks[1] + 1000), 1);
    let mut seen = RoaringTreemap::from_iter([1 << 32]);
    let whole = images.image(root).check(0, &mut seen, &mut losses, &mut |_| true);
    assert!(whole.expect("no failure"));
    let done = mend_checked(&images, &(losses, seen), Some(&bench.content));
    assert_eq!((done.chunks.len(), done.left.len()), (1, 0), "{done:?}");
}
