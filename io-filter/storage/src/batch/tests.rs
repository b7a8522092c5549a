//! Batches on the storage in memory: each step's failure reaches whom it concerns, and only them.

use std::{path::Path, sync::Arc};

use backtide_units::ByteOffset;

use super::{FileSystem, SetSync, SyncSet};
use crate::{MemoryStorage, Sharing, Storage, StorageFile};

const NAMES: [&str; 3] = ["a", "b", "c"];
const OLD: &[u8] = b"old";
const NEW: &[u8] = b"new";

type Files = Vec<[Arc<dyn StorageFile>; 1]>;

/// Three files with bytes that are not durable over some that are.
fn written() -> (MemoryStorage, Files) {
    let storage = MemoryStorage::new();
    storage.share_syncs(true);
    let write = |name| {
        let file = storage.create_new(Path::new(name)).expect("create");
        file.write_at(ByteOffset(0), OLD).expect("write");
        file.sync_data().expect("sync");
        file.write_at(ByteOffset(0), NEW).expect("write");
        [file]
    };
    let files = NAMES.into_iter().map(write).collect();
    storage.sync_dir(Path::new("")).expect("sync the names");
    (storage, files)
}

fn sync(storage: &MemoryStorage, files: &Files) -> Vec<SetSync> {
    let sets: Vec<_> = files.iter().map(|files| SyncSet { files, directory: Some(Path::new("")) }).collect();
    storage.sync_sets(&sets)
}

/// Whether a file has what was written after a power cut, whatever the seed.
fn kept(storage: &MemoryStorage, name: &str) -> bool {
    (0..16).all(|seed| {
        storage.crash(seed);
        storage.files().iter().any(|(path, content)| path == Path::new(name) && content == NEW)
    })
}

#[test]
fn two_flushes_make_all_of_them_durable() {
    let (storage, files) = written();
    let before = storage.counts().syncs;
    let synced = sync(&storage, &files);
    assert!(matches!(synced[..], [SetSync::Durable, SetSync::Durable, SetSync::Durable]), "{synced:?}");
    assert_eq!(storage.counts().syncs, before + 2);
    assert!(NAMES.iter().all(|name| kept(&storage, name)));
}

#[test]
fn a_file_that_cannot_be_written_out_is_its_own_failure() {
    let (storage, files) = written();
    storage.fail_write_out(Path::new("b"));
    let synced = sync(&storage, &files);
    assert!(matches!(synced[..], [SetSync::Durable, SetSync::Failed(_), SetSync::Durable]), "{synced:?}");
    assert_eq!(storage.shares_syncs(), Sharing::Cheap, "the others can go on");
    assert!(kept(&storage, "a") && kept(&storage, "c"));
}

#[test]
fn a_file_system_that_gave_up_makes_nothing_durable_though_its_sync_says_so() {
    let (storage, files) = written();
    storage.become_read_only();
    FileSystem::sync(&storage).expect("it says so");
    let synced = sync(&storage, &files);
    assert!(matches!(synced[..], [SetSync::Apart, SetSync::Apart, SetSync::Apart]), "{synced:?}");
    assert!(files[0][0].sync_data().is_err(), "each file tells");
    assert!(matches!(storage.shares_syncs(), Sharing::Never(_)));
}

#[test]
fn a_failed_flush_is_told_by_its_file_and_vouches_for_nobody() {
    let (storage, files) = written();
    storage.fail_sync_after(1);
    let synced = sync(&storage, &files);
    assert!(matches!(synced[..], [SetSync::Failed(_), SetSync::Apart, SetSync::Apart]), "{synced:?}");
    assert!(matches!(storage.shares_syncs(), Sharing::Never(_)));
}

#[test]
fn what_is_on_another_file_system_is_left_to_its_own_sync() {
    let (storage, files) = written();
    storage.put_elsewhere(Path::new("a"));
    let synced = sync(&storage, &files);
    assert!(matches!(synced[..], [SetSync::Apart, SetSync::Durable, SetSync::Durable]), "{synced:?}");
    files[0][0].sync_data().expect("its own");
    assert!(NAMES.iter().all(|name| kept(&storage, name)));
}
