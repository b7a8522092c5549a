//! What is kept and what makes room, against a file in memory.

use std::{io::IoSlice, path::Path};

use backtide_storage::MemoryStorage;

use super::*;

fn chunk_of(seed: u8) -> Vec<u8> {
    (0..CHUNK as usize).map(|at| (at / 7) as u8 ^ seed).collect()
}

fn cache(limit: u64) -> (Arc<dyn StorageFile>, Cache) {
    let storage = MemoryStorage::new();
    let file = storage.create_new(Path::new("cache")).unwrap();
    (Arc::clone(&file), Cache::new(Arc::new(storage), Some(file), ByteCount(limit)))
}

fn put(cache: &mut Cache, first: u64, bytes: &[u8]) {
    if let Some(placing) = cache.place(first, Bytes::copy_from_slice(bytes)) {
        cache.placed(placing.write());
    }
}

fn has(cache: &mut Cache, chunk: u64, seed: u8, span: Range<usize>) -> bool {
    let Some(lookup) = cache.find(chunk, span.clone()) else { return false };
    let read = lookup.read();
    cache.was_read(&lookup, read.is_some());
    assert!(
        read.as_ref().is_none_or(|bytes| bytes[..] == chunk_of(seed)[span]),
        "chunk {chunk} is not what was put in"
    );
    read.is_some()
}

#[test]
fn what_was_put_in_is_given_at_every_offset() {
    let (_, mut cache) = cache(10 * CHUNK);
    put(&mut cache, 3, &chunk_of(3));
    put(&mut cache, 9, &chunk_of(9)[..5_000]);
    for span in [0..1, 4_095..4_097, 0..65_536, 65_535..65_536] {
        assert!(has(&mut cache, 3, 3, span));
    }
    assert!(has(&mut cache, 9, 9, 4_090..5_000));
    assert!(!has(&mut cache, 4, 4, 0..1));
}

#[test]
fn what_is_used_stays_and_the_file_does_not_grow() {
    let (file, mut cache) = cache(4 * CHUNK);
    for chunk in 0..4 {
        put(&mut cache, chunk, &chunk_of(chunk as u8));
    }
    // Everything was used once: the hand goes round, and takes the first.
    put(&mut cache, 4, &chunk_of(4));
    assert!(!cache.contains(0));
    for chunk in 5..50_u64 {
        assert!(has(&mut cache, 2, 2, 0..100), "chunk 2 is used all the time, and gone at {chunk}");
        put(&mut cache, chunk, &chunk_of(chunk as u8));
        assert!(has(&mut cache, chunk, chunk as u8, 0..10));
    }
    assert_eq!(cache.bytes(), ByteCount(4 * CHUNK));
    assert_eq!(file.len().unwrap(), ByteCount(4 * CHUNK));
}

#[test]
fn a_byte_that_changed_on_disk_is_never_given() {
    let (file, mut cache) = cache(4 * CHUNK);
    put(&mut cache, 0, &chunk_of(0));
    file.write_vectored_at(ByteOffset(5_000), &[IoSlice::new(&[0xEE])]).unwrap();
    assert!(has(&mut cache, 0, 0, 0..4_096), "another part is whole");
    assert!(!has(&mut cache, 0, 0, 6_000..6_001));
    assert!(!cache.contains(0));
    put(&mut cache, 0, &chunk_of(0));
    assert!(has(&mut cache, 0, 0, 0..65_536));
}

#[test]
fn without_room_nothing_is_kept() {
    let (_, mut cache) = cache(0);
    put(&mut cache, 0, &chunk_of(0));
    assert!(!has(&mut cache, 0, 0, 0..1));
}

#[test]
fn a_place_is_one_chunks_while_it_is_written_and_whoever_reads_it_notices_the_next() {
    let (_, mut cache) = cache(2 * CHUNK);
    put(&mut cache, 0, &chunk_of(0));
    let reading = cache.find(0, 0..100).unwrap();
    let first = cache.place(1, chunk_of(1).into()).unwrap();
    let second = cache.place(2, chunk_of(2).into()).unwrap();
    assert!(cache.place(3, chunk_of(3).into()).is_none(), "both places are being written");
    assert!(!cache.contains(0) && !cache.contains(1) && !cache.contains(2));
    cache.placed(first.write());
    cache.placed(second.write());
    // What is there now is another's: it is not taken for what was wanted, and not dropped.
    assert!(reading.read().is_none());
    cache.was_read(&reading, false);
    assert!(has(&mut cache, 1, 1, 0..65_536) && has(&mut cache, 2, 2, 0..65_536));
}

#[test]
fn several_chunks_at_once_are_each_found_also_when_some_are_there_already() {
    let (_, mut cache) = cache(10 * CHUNK);
    put(&mut cache, 1, &chunk_of(1));
    let all: Vec<u8> = (0..4).flat_map(chunk_of).collect();
    put(&mut cache, 0, &all[..all.len() - 1_000]);
    for chunk in 0..4_u8 {
        assert!(has(&mut cache, chunk.into(), chunk, 0..64_000), "chunk {chunk}");
    }
    assert_eq!(cache.bytes(), ByteCount(4 * CHUNK));
}

#[test]
fn a_cache_that_is_given_up_has_nothing_and_takes_nothing() {
    let (_, mut cache) = cache(10 * CHUNK);
    put(&mut cache, 0, &chunk_of(0));
    let (reading, writing) = (cache.find(0, 0..100).unwrap(), cache.place(1, chunk_of(1).into()).unwrap());
    cache.give_up(&"a test");
    cache.was_read(&reading, true);
    cache.placed(writing.write());
    assert!(!cache.contains(0) && !cache.contains(1));
    assert!(cache.place(2, chunk_of(2).into()).is_none());
}
