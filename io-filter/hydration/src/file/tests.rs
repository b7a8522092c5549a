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
