//! What is damaged in packs becomes what it was, from wherever that still is, or is told.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use backtide_images::{Images, ImagesLimits, Losses, Mended, Root};
use backtide_storage::{MemoryStorage, Storage};
use backtide_units::{ByteCount, ByteOffset, ByteRange};
use bytes::Bytes;
use roaring::RoaringTreemap;

use crate::common::*;

/// Mends what a check of `root` finds; `disk` is what the disk has.
pub(crate) fn mend(images: &Images, root: Root, disk: Option<&[u8]>) -> Mended {
    mend_checked(images, &checked(images, root), disk)
}

/// Mends what such a check has found.
pub(crate) fn mend_checked(
    images: &Images,
    (losses, seen): &(Losses, RoaringTreemap),
    disk: Option<&[u8]>,
) -> Mended {
    let find = &mut |lost: &backtide_images::LostChunk, is_wanted: &dyn Fn(&[u8]) -> bool| {
        let (_, range) = lost.places()[0];
        let disk = disk?;
        let (from, to) = (range.start().0 as usize, (range.end().0 as usize).min(disk.len()));
        let mut chunk = disk[from..to].to_vec();
        chunk.resize(CHUNK, 0);
        is_wanted(&chunk).then(|| Bytes::from(chunk))
    };
    images.mend(losses, seen, find, &mut |_| true).expect("no failure")
}

/// A disk of which nothing compresses, and its image.
pub(crate) fn noise(seed: u64, chunks: usize) -> (Bench, Root) {
    let mut bench = Bench::new(seed, chunks * CHUNK);
    bench.content = (0..chunks * CHUNK / 8).flat_map(|_| bench.random.next().to_le_bytes()).collect();
    let root = bench.make(None, &vec![true; chunks]).expect("no fault");
    (bench, root)
}

/// The same with a second version, which is given.
fn filled(seed: u64, chunks: usize) -> (Bench, Root, Vec<u8>) {
    let (mut bench, first) = noise(seed, chunks);
    let image = bench.images.image(first);
    let (root, content) = bench.next(Some(&image));
    drop(image);
    (bench, root, content)
}

#[test]
fn a_flipped_bit_anywhere_in_a_pack_is_mended_from_the_disk_and_the_nodes_from_their_seconds() {
    let (bench, root, content) = filled(11, 6);
    let (mut mended, mut places) = (0, 0);
    for pack in bench.packs() {
        let length = bench.storage.open(&pack).unwrap().len().unwrap().0;
        let around =
            |at: &u64| at.is_multiple_of(3001) || (*at < 150 || *at > length - 600) && at.is_multiple_of(7);
        for at in (0..length).filter(around) {
            places += 1;
            let storage = bench.storage.copy();
            storage.flip_bit(&pack, ByteOffset(at), (at % 8) as u32);
            let images = images(&storage);
            let before = check(&images, root);
            let done = mend(&images, root, Some(&content));
            assert!(done.left.is_empty(), "byte {at} of {}: {before:?}, {:?}", pack.display(), done.left);
            assert_eq!(done.chunks.len() + done.tables.len(), before.len(), "{before:?}");
            mended += before.len();
            // After a power cut too, and for whoever opens it anew.
            storage.crash(at);
            let images = crate::common::images(&storage);
            assert_eq!(check(&images, root), Vec::<String>::new(), "byte {at}: {before:?}");
            assert!(read(&images.image(root)).unwrap() == content);
            assert!(storage.files().iter().all(|(path, _)| path.extension().is_none_or(|e| e != "new")));
        }
    }
    assert!(mended > 150 && places > mended, "{mended} of {places}");
}

#[test]
fn a_damaged_node_costs_no_read_because_it_is_there_twice() {
    let (bench, root, content) = filled(12, 4);
    let fresh = || images(&bench.storage);
    let mut served = 0;
    for pack in bench.packs() {
        let (_, bytes) = bench.storage.files().into_iter().find(|(path, _)| *path == pack).unwrap();
        let nodes = (0..bytes.len() - 64).step_by(8).filter(|at| {
            // The header of a chunk with a level, whose checksum is right.
            let header = &bytes[*at..*at + 64];
            header[4] > 0 && crc32c::crc32c(&header[4..]).to_le_bytes() == header[..4]
        });
        for at in nodes {
            bench.storage.flip_bit(&pack, ByteOffset(at as u64 + 100), 0);
            assert!(read(&fresh().image(root)).expect("the second is read") == content);
            served += usize::from(!check(&fresh(), root).is_empty());
            bench.storage.flip_bit(&pack, ByteOffset(at as u64 + 100), 0);
        }
    }
    assert!(served >= 2, "first and second of a node that the image has: {served}");
}

#[test]
fn what_nothing_has_is_told_and_stays_and_the_rest_of_its_pack_is_mended() {
    let (bench, root) = noise(13, 4);
    let content = bench.content.clone();
    let pack = &bench.packs()[0];
    // Two chunks beside each other.
    for at in [1000, 70_000] {
        bench.storage.flip_bit(pack, ByteOffset(at), 1);
    }
    let images = images(&bench.storage);
    let before = check(&images, root);
    assert_eq!(before.len(), 2, "{before:?}");
    // The disk has the second of them only.
    let mut disk = content.clone();
    disk[..CHUNK].fill(9);
    let done = mend(&images, root, Some(&disk));
    assert_eq!((done.chunks.len(), done.left.len()), (1, 1), "{done:?}");
    assert_eq!(check(&images, root), [done.left[0].what.clone()]);
    let nothing = mend(&images, root, None);
    assert_eq!((nothing.chunks.len(), nothing.left.len()), (0, 1), "{nothing:?}");
    let all = mend(&images, root, Some(&content));
    assert_eq!((all.chunks.len(), all.left.len()), (1, 0), "{all:?}");
    assert!(read(&images.image(root)).unwrap() == content);
}

#[test]
fn a_pack_that_is_missing_or_cut_short_is_made_again() {
    for cut in [None, Some(0), Some(30), Some(64), Some(70_000), Some(66_000 * 3)] {
        let (bench, root, content) = filled(14, 6);
        let pack = &bench.packs()[0];
        match cut {
            None => bench.storage.remove(pack).unwrap(),
            Some(length) => {
                bench.storage.open(pack).unwrap().set_len(ByteCount(length)).unwrap();
            }
        }
        let images = images(&bench.storage);
        assert!(!check(&images, root).is_empty());
        let done = mend(&images, root, Some(&content));
        assert!(done.left.is_empty() && check(&images, root).is_empty(), "{cut:?}: {done:?}");
        assert!(read(&images.image(root)).unwrap() == content, "{cut:?}");
    }
}

#[test]
fn a_copy_in_another_pack_is_enough() {
    let storage = MemoryStorage::new();
    // A writer that knows no chunk stores them again.
    let limits = ImagesLimits { known_chunks_max: 0, ..ImagesLimits::default() };
    let images = Images::new(Arc::new(storage.clone()), limits);
    let mut random = Random(15);
    let content: Vec<u8> = (0..3 * CHUNK / 8).flat_map(|_| random.next().to_le_bytes()).collect();
    let make = || {
        let mut writer = images.write().unwrap();
        let mut disk = Disk { content: &content, changed: &[true; 3] };
        let root = writer.image(None, ByteCount(content.len() as u64), &mut disk).unwrap();
        writer.finish().unwrap();
        root
    };
    let (root, _other) = (make(), make());
    let pack = Path::new("images/packs/0000000000000001.pack");
    storage.flip_bit(pack, ByteOffset(1000), 1);
    storage.make_unreadable(pack, ByteRange::between(ByteOffset(70_000), ByteOffset(70_512)));
    assert_eq!(check(&images, root).len(), 2);
    let done = mend(&images, root, None);
    assert_eq!((done.chunks.len(), done.left.len()), (2, 0), "{done:?}");
    assert!(read(&images.image(root)).unwrap() == content);
}

#[test]
fn a_power_cut_while_a_pack_is_mended_leaves_it_damaged_or_whole() {
    // In a chunk, and in the table.
    for place in [1000, -40] {
        let mut cut = 0;
        loop {
            let (bench, root, content) = filled(17, 4);
            let pack = &bench.packs()[0];
            let length = bench.storage.open(pack).unwrap().len().unwrap().0;
            bench.storage.flip_bit(pack, ByteOffset(length.wrapping_add_signed(place) % length), 1);
            bench.storage.cut_power_after(cut);
            let done = mend(&images(&bench.storage), root, Some(&content));
            let was_cut = bench.storage.is_off();
            let mended = done.chunks.len() + done.tables.len();
            bench.storage.crash(cut);
            let images = images(&bench.storage);
            let damage = check(&images, root);
            assert!(damage.len() <= 1, "cut {cut}: {damage:?}");
            assert!(mended == 0 || damage.is_empty(), "cut {cut}: it was told to be whole");
            if let Ok(read) = read(&images.image(root)) {
                assert!(read == content, "cut {cut}");
            }
            // The next one goes on, whatever is left; nothing of the first stays.
            assert!(mend(&images, root, Some(&content)).left.is_empty(), "cut {cut}");
            assert!(check(&images, root).is_empty(), "cut {cut}");
            bench.storage.crash(!cut);
            let images = crate::common::images(&bench.storage);
            images.collect(&[root]).expect("no fault");
            assert!(read(&images.image(root)).unwrap() == content, "cut {cut}");
            let leftover = |(path, _): &(PathBuf, Vec<u8>)| path.extension().is_some_and(|e| e == "new");
            assert!(!bench.storage.files().iter().any(leftover), "cut {cut}");
            if !was_cut {
                assert!(mended == 1 && cut >= 4, "create, write, sync, rename, sync: {cut}");
                break;
            }
            cut += 1;
        }
    }
}

#[test]
fn a_mend_that_finds_no_room_says_so_and_changes_nothing() {
    let (bench, root) = noise(16, 4);
    let content = bench.content.clone();
    let pack = &bench.packs()[0];
    bench.storage.flip_bit(pack, ByteOffset(1000), 1);
    let images = images(&bench.storage);
    let before = bench.storage.files();
    bench.storage.set_capacity(Some(bench.storage.used()));
    let done = mend(&images, root, Some(&content));
    assert!(done.left[0].why.as_ref().is_some_and(|why| why.contains("no space left")), "{done:?}");
    bench.storage.set_capacity(None);
    let packs = |files: &[(PathBuf, Vec<u8>)]| {
        let packs = files.iter().filter(|(path, _)| path.extension().is_some_and(|e| e == "pack"));
        packs.cloned().collect::<Vec<_>>()
    };
    assert!(packs(&bench.storage.files()) == packs(&before));
    assert_eq!(mend(&images, root, Some(&content)).chunks.len(), 1);
    assert!(check(&images, root).is_empty());
}

#[test]
fn a_mend_and_a_writer_never_have_one_pack() {
    // Whoever begins to write knows of the image, or not.
    for knows in [true, false] {
        let (mut bench, _) = noise(18, 3);
        bench.content = noise(23, 1).0.content;
        let root = bench.make(None, &[true]).expect("no fault");
        let packs = bench.packs();
        bench.storage.remove(Path::new("images/packs/0000000000000002.pack")).unwrap();
        let images = images(&bench.storage);
        let open = knows.then(|| images.image(root));
        let mut writer = images.write().unwrap();
        let mut random = Random(19);
        let other: Vec<u8> = (0..3 * CHUNK / 8).flat_map(|_| random.next().to_le_bytes()).collect();
        let mut disk = Disk { content: &other, changed: &[true; 3] };
        let second = writer.image(None, ByteCount(other.len() as u64), &mut disk).unwrap();
        assert_eq!(bench.packs().len(), packs.len(), "one was begun, and has no trailer");
        let done = mend(&images, root, Some(&bench.content));
        writer.finish().unwrap();
        drop(open);
        assert!(read(&images.image(second)).unwrap() == other, "what was written meanwhile");
        bench.storage.crash(20);
        let images = crate::common::images(&bench.storage);
        assert!(read(&images.image(second)).unwrap() == other, "after a power cut too");
        if knows {
            assert!(done.left.is_empty(), "{done:?}");
            assert!(read(&images.image(root)).unwrap() == bench.content);
        } else {
            let why = done.left[0].why.as_deref();
            assert!(done.chunks.is_empty() && why == Some("the pack is being written"), "{done:?}");
        }
    }
}

#[test]
fn a_mend_that_is_called_off_anywhere_leaves_the_old_pack_or_the_new_one_and_nothing_beside_it() {
    let storage = MemoryStorage::new();
    let images = Images::new(Arc::new(storage.clone()), ImagesLimits::default());
    let mut random = Random(21);
    let content: Vec<u8> = (0..40 * CHUNK / 8).flat_map(|_| random.next().to_le_bytes()).collect();
    let mut writer = images.write().unwrap();
    let mut disk = Disk { content: &content, changed: &[true; 40] };
    let root = writer.image(None, ByteCount(content.len() as u64), &mut disk).unwrap();
    writer.finish().unwrap();
    let pack = Path::new("images/packs/0000000000000001.pack");
    for at in [1000, 70_000] {
        storage.flip_bit(pack, ByteOffset(at), 1);
    }
    let before = storage.files();
    let (found, seen) = checked(&images, root);
    let find = &mut |lost: &backtide_images::LostChunk, is_wanted: &dyn Fn(&[u8]) -> bool| {
        let chunk = &content[lost.places()[0].1.start().0 as usize..][..CHUNK];
        is_wanted(chunk).then(|| Bytes::copy_from_slice(chunk))
    };
    for stop in 0.. {
        let (mut asked, mut told) = (0, 0);
        let mut step = |bytes: ByteCount| {
            asked += 1;
            told += bytes.0;
            asked <= stop
        };
        let done = images.mend(&found, &seen, find, &mut step).expect("no failure");
        assert!(storage.files().len() == before.len(), "{stop}: something is left beside it");
        if !done.called_off {
            assert_eq!((done.chunks.len(), done.left.len()), (2, 0), "{done:?}");
            // A look into the pack, two chunks, all of it while it is copied.
            assert!(stop >= 5 && told > 42 * CHUNK as u64, "{stop} steps, {told} bytes");
            break;
        }
        assert_eq!(asked, stop + 1, "it goes on after it was called off");
        assert_eq!(done.left.len(), 2, "{done:?}");
        assert!(storage.files() == before, "{stop}");
    }
    assert!(read(&images.image(root)).unwrap() == content);
}

#[test]
fn a_mend_leaves_the_room_that_is_to_stay_free() {
    let (bench, root) = noise(22, 3);
    let content = bench.content.clone();
    let pack = &bench.packs()[0];
    bench.storage.flip_bit(pack, ByteOffset(1000), 1);
    let limits = ImagesLimits { free_bytes_min: ByteCount(1 << 20), ..ImagesLimits::default() };
    let images = Images::new(Arc::new(bench.storage.clone()), limits);
    let before = bench.storage.files();
    let used = bench.storage.used();
    // The pack has less than 512 KiB.
    for (room, mends) in [(1_u64 << 20, false), ((1 << 20) + (64 << 10), false), (3 << 19, true)] {
        bench.storage.set_capacity(Some(ByteCount(used.0 + room)));
        let done = mend(&images, root, Some(&content));
        assert_eq!(done.left.is_empty(), mends, "{room}: {done:?}");
        if !mends {
            let why = done.left[0].why.as_deref().unwrap_or_default();
            assert!(
                why.contains("no space left") && why.contains("1048576 of them are to stay free"),
                "{why}"
            );
            assert!(bench.storage.files() == before);
        }
    }
    assert!(check(&images, root).is_empty());
}
