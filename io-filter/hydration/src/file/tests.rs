use backtide_storage::MemoryStorage;

use super::*;
use crate::header::tests::header;

#[test]
fn an_image_that_cannot_be_synced_at_the_end_ends_nothing() {
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new());
    let path = Path::new("vm1.hydration");
    let missing = DirtyBitmap::of((3..5).into());
    let file = HydrationFile::create(Arc::clone(&storage), path, header(), missing.clone()).unwrap();
    file.present(&[(3..5).into()]).unwrap();
    let synced = || Err(io::Error::other("the device is gone"));
    for attempt in 0..3 {
        file.finish(synced, || panic!("attempt {attempt}: it lacks blocks still")).unwrap_err();
    }
    file.finish(|| Ok(()), || panic!("nobody knows what it has lost")).unwrap_err();
    let again = HydrationFile::open(storage, path, header().boot).unwrap().unwrap();
    assert_eq!(again.missing(), missing);
}

#[test]
fn what_an_image_has_refused_to_keep_is_not_compared_at_the_next_attach() {
    let path = Path::new("vm1.hydration");
    let header = Header { compare: true, ..header() };
    for by_sync in [false, true] {
        let storage = MemoryStorage::new();
        let shared: Arc<dyn Storage> = Arc::new(storage.clone());
        let missing = DirtyBitmap::of((3..9).into());
        let file = HydrationFile::create(Arc::clone(&shared), path, header.clone(), missing).unwrap();
        file.present(&[(3..5).into()]).unwrap();
        file.settle(|| Ok(())).unwrap();
        file.present(&[(5..6).into()]).unwrap();
        let open = |boot| HydrationFile::open(Arc::clone(&shared), path, boot).unwrap().unwrap();
        assert!(open(header.boot).header().compare);
        match by_sync {
            true => drop(file.settle(|| Err(io::Error::other("the device is gone"))).unwrap_err()),
            false => {
                file.stop_comparing().unwrap();
                file.present(&[(6..7).into()]).unwrap();
            }
        }
        let again = open(header.boot);
        assert!(!again.header().compare);
        // What was said before counts as it did.
        let from = if by_sync { 5 } else { 7 };
        assert_eq!(again.missing(), DirtyBitmap::of((from..9).into()));
        drop(again);
        storage.crash(1);
        let other = uuid::Uuid::from_bytes([9; 16]);
        assert_eq!(open(other).missing(), DirtyBitmap::of((5..9).into()), "durable was only this");
    }
}

#[test]
fn what_a_killed_agent_called_durable_is_so_when_the_next_one_says_it() {
    let (path, blocks) = (Path::new("vm1.hydration"), BlockRange::from(3..5));
    let written = |storage: &MemoryStorage| {
        let files = storage.files().into_iter();
        files.map(|(_, bytes)| bytes).next().expect("the file is there")
    };
    let before = MemoryStorage::new();
    let missing = DirtyBitmap::of((3..9).into());
    let file = HydrationFile::create(Arc::new(before.clone()), path, header(), missing).unwrap();
    let empty = written(&before);
    file.present(&[blocks]).unwrap();
    file.settle(|| Ok(())).unwrap();
    for seed in 0..32 {
        // It was killed before the sync: what it appended is in the page cache only.
        let storage = MemoryStorage::new();
        let killed = storage.create_new(path).unwrap();
        killed.write_at(ByteOffset::ZERO, &empty).unwrap();
        killed.sync_data().unwrap();
        storage.sync_dir(Path::new("")).unwrap();
        killed.write_at(ByteOffset::ZERO, &written(&before)).unwrap();
        let shared: Arc<dyn Storage> = Arc::new(storage.clone());
        let open = |boot| HydrationFile::open(Arc::clone(&shared), path, boot).unwrap().unwrap();
        let next = open(header().boot);
        assert!(!next.missing().touches(blocks));
        // A guest's flush is answered by this.
        next.settle(|| Ok(())).unwrap();
        drop(next);
        storage.crash(seed);
        let other = uuid::Uuid::from_bytes([9; 16]);
        assert!(!open(other).missing().touches(blocks), "seed {seed}: what was flushed is missing again");
    }
}

#[test]
fn entries_of_which_a_part_was_written_are_none_for_who_opens_the_file() {
    let path = Path::new("vm1.hydration");
    for runs in 1..6 {
        let storage = MemoryStorage::new();
        let shared: Arc<dyn Storage> = Arc::new(storage.clone());
        let missing = DirtyBitmap::of((0..64).into());
        let file = HydrationFile::create(Arc::clone(&shared), path, header(), missing.clone()).unwrap();
        let blocks: Vec<BlockRange> = (0..runs).map(|run| (run * 2..run * 2 + 1).into()).collect();
        storage.fail_write_after(0);
        file.present(&blocks).unwrap_err();
        assert_eq!(file.missing(), missing);
        let again = HydrationFile::open(shared, path, header().boot).unwrap().unwrap();
        assert_eq!(again.missing(), missing, "{runs} runs");
        again.present(&blocks).unwrap();
    }
}

fn other_boot() -> Uuid {
    Uuid::from_bytes([9; 16])
}

/// A file of these blocks, on a file system that is full from then on.
fn on_a_full_file_system(missing: &DirtyBitmap) -> (MemoryStorage, Arc<dyn Storage>, HydrationFile) {
    let storage = MemoryStorage::new();
    let shared: Arc<dyn Storage> = Arc::new(storage.clone());
    let mut header = Header { compare: true, ..header() };
    header.source.size = ByteCount(1 << 40);
    let path = Path::new("vm1.hydration");
    let file = HydrationFile::create(Arc::clone(&shared), path, header, missing.clone()).unwrap();
    storage.set_capacity(Some(storage.used()));
    (storage, shared, file)
}

#[test]
fn each_block_of_a_few_can_be_noted_and_made_durable_without_room() {
    let missing = DirtyBitmap::of((3..300).into());
    let (_, shared, mut file) = on_a_full_file_system(&missing);
    for block in 3..300 {
        file.present(&[(block..block + 1).into()]).unwrap_or_else(|error| panic!("block {block}: {error}"));
        file.settle(|| Ok(())).unwrap_or_else(|error| panic!("block {block}: {error}"));
        if block == 100 {
            let path = Path::new("vm1.hydration");
            file = HydrationFile::open(Arc::clone(&shared), path, header().boot).unwrap().unwrap();
            assert_eq!(file.missing(), DirtyBitmap::of((101..300).into()));
        }
    }
    file.finish(|| Ok(()), || Ok(())).unwrap();
}

#[test]
fn where_room_runs_out_at_last_every_flush_succeeds_and_nothing_is_noted_that_is_not_kept() {
    // Wherever in what was kept for flushes it ends.
    (0..3).for_each(room_runs_out_after);
}

fn room_runs_out_after(before: u64) {
    let blocks = 1 << 20;
    let missing = DirtyBitmap::of((0..blocks).into());
    let (storage, shared, file) = on_a_full_file_system(&missing);
    let path = Path::new("vm1.hydration");
    let note = |block: u64| file.present(&[(block..block + 1).into()]);
    (0..before).for_each(|block| note(block).unwrap());
    let mut block = before;
    let full = loop {
        assert!(block < blocks, "it has found room");
        if let Err(error) = note(block) {
            break error;
        }
        block += 1;
        // Others note something between the sync of the image and what is said of it.
        let mut meanwhile = Ok(());
        let sync = || {
            meanwhile = note(block);
            Ok(())
        };
        file.settle(sync).unwrap();
        match meanwhile {
            Ok(()) => block += 1,
            Err(error) => break error,
        }
    };
    assert_eq!(full.kind(), io::ErrorKind::StorageFull);
    assert!(block > 40_000, "{block}");
    assert_eq!(file.missing(), DirtyBitmap::of((block..blocks).into()));
    file.settle(|| Ok(())).unwrap();
    assert!(file.is_settled());
    file.settle(|| Ok(())).unwrap();
    note(block).unwrap_err();
    storage.crash(7);
    storage.set_capacity(None);
    let again = HydrationFile::open(Arc::clone(&shared), path, other_boot()).unwrap().unwrap();
    assert_eq!(again.missing(), DirtyBitmap::of((block..blocks).into()), "all of it was durable");
    for block in block..block + 100 {
        again.present(&[(block..block + 1).into()]).unwrap();
        again.settle(|| Ok(())).unwrap();
    }
}

#[test]
fn room_is_there_before_it_is_needed() {
    let blocks = 1 << 22;
    let mut missing = DirtyBitmap::new();
    for block in (0..blocks).step_by(2) {
        missing.insert((block..block + 1).into());
    }
    // So long a header that the journal is not begun anew before it has used up the room that it began with.
    let (storage, _, file) = on_a_full_file_system(&missing);
    storage.set_capacity(None);
    let present = |entries: std::ops::Range<u64>| {
        for entry in entries {
            file.present(&[(2 * entry..2 * entry + 1).into()]).unwrap();
            if entry % 1000 == 0 {
                file.settle(|| Ok(())).unwrap();
            }
        }
    };
    present(0..100_001);
    storage.set_capacity(Some(storage.used()));
    present(100_001..160_000);
}

#[test]
fn room_that_is_not_enough_ahead_is_left_to_others() {
    let blocks = 1 << 20;
    let (storage, shared, file) = on_a_full_file_system(&DirtyBitmap::of((0..blocks).into()));
    let room = ByteCount(100 << 10);
    storage.set_capacity(Some(ByteCount(storage.used().0 + room.0)));
    for block in 0..35_000 {
        file.present(&[(block..block + 1).into()]).unwrap();
        file.settle(|| Ok(())).unwrap();
        assert_eq!(shared.free_space().unwrap(), room, "after {block} blocks");
    }
}

#[test]
fn what_an_image_has_lost_is_not_believed_though_no_new_file_can_say_so() {
    let missing = DirtyBitmap::of((3..9).into());
    let path = Path::new("vm1.hydration");
    let (storage, shared, file) = on_a_full_file_system(&missing);
    file.present(&[(3..5).into()]).unwrap();
    file.settle(|| Ok(())).unwrap();
    file.present(&[(5..6).into(), (7..8).into()]).unwrap();
    let gone = || Err(io::Error::other("the device is gone"));
    file.settle(gone).unwrap_err();
    let open = |boot| HydrationFile::open(Arc::clone(&shared), path, boot).unwrap().unwrap();
    let durable = DirtyBitmap::of((5..9).into());
    assert_eq!((file.missing(), open(header().boot).missing()), (durable.clone(), durable.clone()));
    let told = file.settle(|| Ok(())).unwrap_err().to_string();
    assert!(told.contains("the device is gone; and that could not be noted: "), "{told}");
    assert!(open(header().boot).header().compare, "there was no room for that");
    file.present(&[(5..6).into()]).unwrap_err();
    storage.set_capacity(None);
    assert_eq!(
        file.settle(|| Ok(())).unwrap_err().to_string(),
        "the image could not be synced: the device is gone"
    );
    let again = open(header().boot);
    assert!(!again.header().compare && again.missing() == durable);
    storage.crash(7);
    assert_eq!(open(other_boot()).missing(), durable);
}

#[test]
fn what_an_image_has_lost_is_said_when_it_can_be() {
    let missing = DirtyBitmap::of((3..9).into());
    let path = Path::new("vm1.hydration");
    let (storage, shared, file) = on_a_full_file_system(&missing);
    file.present(&[(3..5).into()]).unwrap();
    // Nothing can be written at all.
    storage.cut_power_after(0);
    file.settle(|| Err(io::Error::other("the device is gone"))).unwrap_err();
    storage.answer_again();
    let open = || HydrationFile::open(Arc::clone(&shared), path, header().boot).unwrap().unwrap();
    assert!(!open().missing().touches((3..5).into()), "nobody could say so");
    file.settle(|| Ok(())).unwrap_err();
    assert_eq!(open().missing(), missing);
}

#[test]
fn that_an_image_is_not_to_be_compared_is_said_when_it_can_be() {
    let path = Path::new("vm1.hydration");
    let (storage, shared, file) = on_a_full_file_system(&DirtyBitmap::of((3..9).into()));
    file.stop_comparing().unwrap_err();
    file.present(&[(3..4).into()]).unwrap();
    file.settle(|| Ok(())).unwrap();
    let open = || HydrationFile::open(Arc::clone(&shared), path, header().boot).unwrap().unwrap();
    assert!(open().header().compare && open().missing() == DirtyBitmap::of((4..9).into()));
    storage.set_capacity(None);
    file.settle(|| Ok(())).unwrap();
    let again = open();
    assert!(!again.header().compare && again.missing() == DirtyBitmap::of((4..9).into()));
}

#[test]
fn what_is_stored_in_an_image_that_has_lost_something_is_not_said_to_be_there() {
    let missing = DirtyBitmap::of((3..9).into());
    for full in [false, true] {
        let (storage, _, file) = on_a_full_file_system(&missing);
        if !full {
            storage.set_capacity(None);
        }
        file.present(&[(3..5).into()]).unwrap();
        file.settle(|| Err(io::Error::other("the device is gone"))).unwrap_err();
        let stored = file.store(&[(6..7).into()], || Ok(()));
        assert!(matches!(stored, Err(StoreError::Image(_))), "{stored:?}");
    }
}
