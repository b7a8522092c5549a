//! The fault model keeps its word: what is durable stays, the rest may go.

use std::path::Path;

use backtide_units::{ByteCount, ByteOffset, ByteRange};

use super::MemoryStorage;
use crate::{Storage, batch::FileSystem, read_file, replace_file};

fn path(name: &str) -> &Path {
    Path::new(name)
}

#[test]
fn synced_content_survives_every_crash() {
    for seed in 0..64 {
        let storage = MemoryStorage::new();
        let file = storage.create_new(path("a")).expect("create");
        file.write_at(ByteOffset(0), &[1; 2000]).expect("write");
        file.sync_data().expect("sync");
        storage.sync_dir(path("")).expect("sync dir");
        file.write_at(ByteOffset(1000), &[2; 3000]).expect("write");
        storage.crash(seed);
        assert!(file.read_at(ByteOffset(0), &mut [0; 1]).is_err(), "old handles are dead");
        let content = storage.open(path("a")).expect("open");
        let mut bytes = [0; 1000];
        content.read_exact_at(ByteOffset(0), &mut bytes).expect("read");
        assert_eq!(bytes, [1; 1000]);
    }
}

#[test]
fn unsynced_writes_are_torn_lost_and_reordered() {
    let (mut torn, mut lost, mut reordered) = (false, false, false);
    for seed in 0..200 {
        let storage = MemoryStorage::new();
        let file = storage.create_new(path("a")).expect("create");
        file.write_at(ByteOffset(0), &[0; 2048]).expect("write");
        file.sync_data().expect("sync");
        storage.sync_dir(path("")).expect("sync dir");
        file.write_at(ByteOffset(0), &[1; 1024]).expect("write");
        file.write_at(ByteOffset(1024), &[2; 1024]).expect("write");
        storage.crash(seed);
        let content = read_file(&storage, path("a"), ByteCount(4096)).expect("read");
        torn |= content[0] != content[512];
        lost |= content == [0; 2048];
        reordered |= content[..1024] == [0; 1024] && content[1024..] == [2; 1024];
    }
    assert!(torn && lost && reordered);
}

#[test]
fn a_seed_repeats() {
    let after = |seed| {
        let storage = MemoryStorage::new();
        let file = storage.create_new(path("a")).expect("create");
        file.write_at(ByteOffset(0), &[7; 9000]).expect("write");
        storage.crash(seed);
        storage.files()
    };
    for seed in 0..32 {
        assert_eq!(after(seed), after(seed));
    }
}

#[test]
fn names_need_their_directory_synced() {
    let mut outcomes = std::collections::BTreeSet::new();
    for seed in 0..64 {
        let storage = MemoryStorage::new();
        storage.create_dir(path("d")).expect("create dir");
        storage.create_new(path("d/a")).expect("create");
        storage.sync_dir(path("d")).expect("sync dir");
        storage.create_new(path("d/b")).expect("create");
        storage.remove(path("d/a")).expect("remove");
        storage.crash(seed);
        outcomes.insert(storage.list(path("d")).expect("list"));
    }
    let expected: [&[&str]; 3] = [&["a"], &["a", "b"], &["b"]];
    assert_eq!(outcomes.into_iter().collect::<Vec<_>>(), expected);
}

#[test]
fn a_failed_sync_is_not_healed_by_a_later_one() {
    let mut lost = false;
    for seed in 0..64 {
        let storage = MemoryStorage::new();
        let file = storage.create_new(path("a")).expect("create");
        file.set_len(ByteCount(512)).expect("set len");
        file.sync_data().expect("sync");
        storage.sync_dir(path("")).expect("sync dir");
        file.write_at(ByteOffset(0), &[1; 512]).expect("write");
        storage.fail_sync_after(0);
        assert!(file.sync_data().is_err());
        file.sync_data().expect("the second sync succeeds");
        storage.crash(seed);
        lost |= read_file(&storage, path("a"), ByteCount(512)).expect("read") == [0; 512];
    }
    assert!(lost);
}

#[test]
fn a_full_device_takes_what_fits() {
    let storage = MemoryStorage::new();
    storage.set_capacity(Some(ByteCount(1000)));
    let file = storage.create_new(path("a")).expect("create");
    let whole = ByteRange::between(ByteOffset(0), ByteOffset(1001));
    assert_eq!(file.allocate(whole).map_err(|e| e.kind()), Err(std::io::ErrorKind::StorageFull));
    assert_eq!(file.len().expect("len"), ByteCount(0));
    let written = file.write_at(ByteOffset(0), &[1; 1200]);
    assert_eq!(written.map_err(|e| e.kind()), Err(std::io::ErrorKind::StorageFull));
    assert_eq!(file.len().expect("len"), ByteCount(1000));
    file.write_at(ByteOffset(0), &[2; 1000]).expect("overwriting needs no space");
}

#[test]
fn replacing_a_file_leaves_old_or_new_at_every_cut() {
    let counted = MemoryStorage::new();
    replace_file(&counted, path("f"), b"old").expect("replace");
    let first = counted.counts().changes;
    replace_file(&counted, path("f"), b"newer").expect("replace");
    let changes = counted.counts().changes - first;
    for cut in 0..changes {
        for seed in 0..16 {
            let storage = MemoryStorage::new();
            replace_file(&storage, path("f"), b"old").expect("replace");
            storage.cut_power_after(cut);
            assert!(replace_file(&storage, path("f"), b"newer").is_err());
            storage.crash(seed);
            let content = read_file(&storage, path("f"), ByteCount(10)).expect("one of both is there");
            assert!(content == b"old" || content == b"newer", "{content:?} at {cut}");
            replace_file(&storage, path("f"), b"again").expect("a leftover does no harm");
        }
    }
}

#[test]
fn a_failed_sync_of_the_file_system_is_told_by_each_file_that_lost_something() {
    let storage = MemoryStorage::new();
    let [lost, sound] = ["lost", "sound"].map(|name| storage.create_new(path(name)).expect("create"));
    FileSystem::sync(&storage).expect("sync");
    lost.write_at(ByteOffset(0), b"bytes").expect("write");
    storage.fail_sync_after(0);
    FileSystem::sync(&storage).expect_err("planned");
    sound.sync_data().expect("nothing of it was lost");
    lost.sync_data().expect_err("its bytes are not on the device");
    lost.sync_data().expect("it is told once");
    storage.crash(1);
    let names = storage.list(path("")).expect("list");
    assert_eq!(names, ["lost", "sound"], "the first sync made them durable");
}

#[test]
fn a_sync_of_the_file_system_makes_files_and_names_durable() {
    for seed in 0..16 {
        let storage = MemoryStorage::new();
        storage.create_dir(path("dir")).expect("create dir");
        let file = storage.create_new(path("dir/f")).expect("create");
        file.write_at(ByteOffset(0), &[7; 2000]).expect("write");
        FileSystem::sync(&storage).expect("sync");
        storage.crash(seed);
        assert_eq!(read_file(&storage, path("dir/f"), ByteCount(4000)).expect("it is there"), [7; 2000]);
    }
}

#[test]
fn a_removed_tree_is_gone_for_good_with_its_name_only() {
    let (mut back, mut gone) = (0, 0);
    for seed in 0..32 {
        let storage = MemoryStorage::new();
        for name in ["a/b/f", "a/g", "c/f"] {
            storage.create_dir(path(name).parent().expect("a directory")).expect("create dir");
            storage.create_new(path(name)).expect("create").sync_data().expect("sync");
            storage.sync_dir(path(name).parent().expect("a directory")).expect("sync");
        }
        storage.remove_tree(path("a")).expect("remove");
        storage.remove_tree(path("a")).expect("missing");
        assert_eq!(storage.list(path("")).expect("list"), ["c"]);
        let synced = seed % 2 == 0;
        if synced {
            storage.sync_dir(path("")).expect("sync");
        }
        storage.crash(seed);
        let left = storage.files().len();
        assert!(left == 1 || !synced, "seed {seed}: {left} files");
        back += u32::from(left > 1);
        gone += u32::from(left == 1);
    }
    assert!(back > 0 && gone > 16, "{back} came back, {gone} were gone");
}
