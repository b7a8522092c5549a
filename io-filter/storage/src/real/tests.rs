//! The seam on the real file system of the machine.

use std::{
    io::{ErrorKind, IoSlice},
    os::unix::fs::PermissionsExt,
    path::Path,
    sync::Arc,
};

use backtide_units::{ByteCount, ByteOffset, ByteRange};

use super::{RealStorage, VECTORS_MAX};
use crate::{SetSync, Sharing, Storage, SyncSet, read_file, replace_file};

fn storage() -> (tempfile::TempDir, RealStorage) {
    let dir = tempfile::tempdir().expect("a directory");
    let storage = RealStorage::open(&dir.path().join("store")).expect("open");
    (dir, storage)
}

#[test]
fn files_are_written_listed_renamed_and_removed() {
    let (_dir, storage) = storage();
    storage.create_dir(Path::new("a/b")).expect("create dir");
    let file = storage.create_new(Path::new("a/b/f")).expect("create");
    assert_eq!(
        storage.create_new(Path::new("a/b/f")).map(|_| ()).map_err(|e| e.kind()),
        Err(ErrorKind::AlreadyExists)
    );
    file.write_at(ByteOffset(10), b"hello").expect("write");
    file.sync_data().expect("sync");
    storage.rename(Path::new("a/b/f"), Path::new("a/b/g")).expect("rename");
    storage.sync_dir(Path::new("a/b")).expect("sync dir");
    storage.sync_dir(Path::new("")).expect("sync the root");
    assert_eq!(storage.list(Path::new("a/b")).expect("list"), ["g"]);
    let content = read_file(&storage, Path::new("a/b/g"), ByteCount(100)).expect("read");
    assert_eq!(content, b"\0\0\0\0\0\0\0\0\0\0hello");
    storage.remove(Path::new("a/b/g")).expect("remove");
    assert_eq!(storage.open(Path::new("a/b/g")).map(|_| ()).map_err(|e| e.kind()), Err(ErrorKind::NotFound));
    assert!(storage.free_space().expect("free space") > ByteCount(0));
    assert!(storage.open(Path::new("/etc/passwd")).is_err(), "paths are below the root");
}

#[test]
fn more_buffers_than_the_kernel_takes_are_written_in_order() {
    let (_dir, storage) = storage();
    let file = storage.create_new(Path::new("f")).expect("create");
    let pieces: Vec<Vec<u8>> = (0..VECTORS_MAX * 3 + 7).map(|n| vec![n as u8; n % 5]).collect();
    let slices: Vec<IoSlice<'_>> = pieces.iter().map(|piece| IoSlice::new(piece)).collect();
    file.write_vectored_at(ByteOffset(3), &slices).expect("write");
    let expected: Vec<u8> = [0; 3].into_iter().chain(pieces.concat()).collect();
    assert_eq!(read_file(&storage, Path::new("f"), ByteCount(1 << 20)).expect("read"), expected);
}

#[test]
fn reads_at_the_end_are_short_and_exact_ones_fail() {
    let (_dir, storage) = storage();
    let file = storage.create_new(Path::new("f")).expect("create");
    file.allocate(ByteRange::between(ByteOffset(0), ByteOffset(100))).expect("allocate");
    assert_eq!(file.len().expect("len"), ByteCount(100));
    let mut buffer = [1; 64];
    assert_eq!(file.read_at(ByteOffset(90), &mut buffer).expect("read"), 10);
    assert_eq!(buffer[..10], [0; 10]);
    let exact = file.read_exact_at(ByteOffset(90), &mut buffer);
    assert_eq!(exact.map_err(|e| e.kind()), Err(ErrorKind::UnexpectedEof));
    file.set_len(ByteCount(0)).expect("set len");
    assert!(file.is_empty().expect("len"));
}

#[test]
fn a_tree_may_be_made_with_the_directories_above_it() {
    let dir = tempfile::tempdir().expect("a directory");
    let root = dir.path().join("one/two/three");
    for _ in 0..2 {
        RealStorage::open(&root).expect("made, then found");
        assert!(root.is_dir());
    }
}

#[test]
fn a_store_is_locked_once() {
    let dir = tempfile::tempdir().expect("a directory");
    let first = RealStorage::open_locked(dir.path()).expect("open");
    let second = RealStorage::open_locked(dir.path());
    assert_eq!(second.map(|_| ()).map_err(|e| e.kind()), Err(ErrorKind::WouldBlock));
    drop(first);
    RealStorage::open_locked(dir.path()).expect("the lock goes with the value");
}

#[test]
fn a_small_file_is_replaced_whole() {
    let (_dir, storage) = storage();
    replace_file(&storage, Path::new("f"), b"one").expect("replace");
    replace_file(&storage, Path::new("f"), b"two!").expect("replace");
    assert_eq!(read_file(&storage, Path::new("f"), ByteCount(10)).expect("read"), b"two!");
    assert!(read_file(&storage, Path::new("f"), ByteCount(3)).is_err(), "larger than allowed");
    assert_eq!(storage.list(Path::new("")).expect("list"), ["f"]);
}

#[test]
fn what_is_made_is_for_its_owner_only() {
    let dir = tempfile::tempdir().expect("a directory");
    let storage = RealStorage::open_locked(&dir.path().join("way/store")).expect("open");
    storage.create_dir(Path::new("a/b")).expect("create dir");
    storage.create_new(Path::new("a/b/f")).expect("create");
    let mode = |path: &str| {
        std::fs::metadata(dir.path().join("way/store").join(path)).expect("look").permissions().mode() & 0o777
    };
    assert_eq!((mode(""), mode("a"), mode("a/b"), mode("a/b/f")), (0o700, 0o700, 0o700, 0o600));
    assert_eq!(mode("lock"), 0o600, "who could open it could lock everybody out");
}

#[test]
fn sets_are_synced_at_once_where_that_is_as_good_and_names_are_looked_at_all_the_same() {
    let (dir, storage) = storage();
    storage.create_dir(Path::new("sub")).expect("create dir");
    let file = storage.create_new(Path::new("sub/f")).expect("create");
    file.write_at(ByteOffset(0), b"hello").expect("write");
    let files = [Arc::clone(&file)];
    let set = [SyncSet { files: &files, directory: Some(Path::new("sub")) }];
    let is_ext4 = rustix::fs::statfs(dir.path()).is_ok_and(|stat| stat.f_type == 0xef53);
    match storage.sync_sets(&set).remove(0) {
        SetSync::Durable => assert!(is_ext4),
        SetSync::Apart => assert!(matches!(storage.shares_syncs(), Sharing::Never(_))),
        SetSync::Failed(error) => panic!("{error}"),
    }
    storage.remove(Path::new("sub/f")).expect("remove");
    let why = file.require_name().expect_err("nobody finds it").to_string();
    assert_eq!(file.sync_data().expect_err("nobody finds it").to_string(), why);
    assert!(!matches!(storage.sync_sets(&set).remove(0), SetSync::Durable));
}

#[test]
fn a_file_that_a_link_leads_to_another_file_system_is_not_shared() {
    let (dir, storage) = storage();
    let Ok(other) = tempfile::tempdir_in("/dev/shm") else { return };
    let (here, there) = (dir.path().join("store"), other.path());
    std::os::unix::fs::symlink(there, here.join("away")).expect("link");
    let file = storage.create_new(Path::new("away/f")).expect("create");
    let own = storage.create_new(Path::new("f")).expect("create");
    let is_other = file.device().expect("look") != own.device().expect("look");
    let (files, owns) = ([file], [own]);
    let away = SyncSet { files: &files, directory: None };
    let linked = SyncSet { files: &owns, directory: Some(Path::new("away")) };
    if is_other {
        let synced = storage.sync_sets(&[away, linked]);
        assert!(matches!(synced[..], [SetSync::Apart, SetSync::Apart]), "{synced:?}");
    }
}

#[test]
fn what_was_written_is_written_out() {
    let (_dir, storage) = storage();
    let file = storage.create_new(Path::new("f")).expect("create");
    file.write_at(ByteOffset(0), &[7; 1 << 20]).expect("write");
    for wait in [false, true] {
        match file.write_out(wait) {
            Ok(()) => {}
            Err(error) => assert_eq!(error.kind(), ErrorKind::Unsupported, "only where it is forbidden"),
        }
    }
}

#[test]
fn a_tree_is_removed_with_all_below_it_and_nothing_beside() {
    let (dir, storage) = storage();
    for path in ["a/b/c/f", "a/f", "ab/f"] {
        storage.create_dir(Path::new(path).parent().expect("a directory")).expect("create dir");
        storage.create_new(Path::new(path)).expect("create");
    }
    // What a link below leads to is not of the tree; what the tree itself is a link to is.
    let (there, root) = (dir.path().join("there"), dir.path().join("store"));
    std::fs::create_dir_all(there.join("sub")).expect("create dir");
    std::fs::write(there.join("sub/f"), b"bytes").expect("write");
    std::os::unix::fs::symlink(there.join("sub"), root.join("a/link")).expect("link");
    for _ in 0..2 {
        storage.remove_tree(Path::new("a")).expect("removed, then missing");
        assert_eq!(storage.list(Path::new("")).expect("list"), ["ab"]);
    }
    assert!(there.join("sub/f").exists());
    std::os::unix::fs::symlink(&there, root.join("linked")).expect("link");
    storage.remove_tree(Path::new("linked")).expect("remove");
    assert_eq!(storage.list(Path::new("")).expect("list"), ["ab"]);
    assert!(there.exists() && !there.join("sub").exists());
}
