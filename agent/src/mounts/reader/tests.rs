//! Reads against a source in memory.

use std::path::Path;

use backtide_storage::{MemoryStorage, Storage};
use backtide_units::{BlockIndex, DiskId};
use tokio::task::LocalSet;

use super::*;
use crate::disk::source::fake::FakeSource;

const SIZE: u64 = 40 * CHUNK + 12_288;

fn content() -> Vec<u8> {
    let seed = DiskId::random().0.as_u128() as u64;
    (0..SIZE).map(|at| (at.wrapping_mul(0x9E37_79B9).wrapping_add(seed) >> 11) as u8).collect()
}

struct World {
    content: Vec<u8>,
    source: Rc<FakeSource>,
    reader: Rc<Reader>,
}

fn world(cache_chunks: u64) -> World {
    let content = content();
    let source = Rc::new(FakeSource::new(content.clone()));
    let storage = MemoryStorage::new();
    let file = storage.create_new(Path::new("cache")).unwrap();
    let cache = Cache::new(std::sync::Arc::new(storage), Some(file), ByteCount(cache_chunks * CHUNK));
    let reader = Rc::new(Reader::new(Rc::clone(&source) as Rc<dyn PointSource>, cache));
    World { content, source, reader }
}

impl World {
    async fn check(&self, start: u64, length: u64) {
        let range = ByteRange::new(ByteOffset(start), ByteCount(length)).unwrap();
        let bytes = self.reader.read(range).await.unwrap();
        assert!(bytes == self.content[start as usize..(start + length) as usize], "{range} reads wrong");
    }
}

fn local(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build();
    LocalSet::new().block_on(&runtime.unwrap(), test);
}

#[test]
fn every_read_gives_the_point_whatever_the_cache_has_room_for() {
    local(async {
        for cache_chunks in [0, 1, 3, 100] {
            let world = world(cache_chunks);
            world.check(0, SIZE).await;
            world.check(SIZE - 1, 1).await;
            let mut at = 7_u64;
            for step in 1..200_u64 {
                at = (at * 31 + step * 4_099) % (SIZE - 1);
                world.check(at, (step * 977 % 300_000 + 1).min(SIZE - at)).await;
            }
        }
    });
}

#[test]
fn what_was_read_is_not_fetched_again() {
    local(async {
        let world = world(100);
        world.check(5 * CHUNK + 10, 100).await;
        let asked = world.source.asked();
        assert_eq!(asked.len(), 1);
        assert_eq!(
            asked[0].count(),
            ByteCount(CHUNK),
            "a read of here and there fetches no more than it touches"
        );
        world.source.set_away(true);
        world.check(5 * CHUNK, CHUNK).await;
    });
}

#[test]
fn who_reads_on_gets_more_at_once() {
    local(async {
        let world = world(100);
        for at in (0..SIZE).step_by(4_096) {
            world.check(at, 4_096).await;
        }
        let asked = world.source.asked().len() as u64;
        assert_eq!(asked, SIZE.div_ceil(FETCH_CHUNKS * CHUNK), "whole fetches");
    });
}

#[test]
fn reads_of_one_chunk_share_its_fetch() {
    local(async {
        let world = Rc::new(world(100));
        world.source.close();
        let reads: Vec<_> = (0..10)
            .map(|read| {
                let world = Rc::clone(&world);
                tokio::task::spawn_local(async move { world.check(3 * CHUNK + read * 4_096, 4_096).await })
            })
            .collect();
        world.source.until_asked(1).await;
        world.source.open();
        for read in reads {
            read.await.unwrap();
        }
        assert_eq!(world.source.asked().len(), 1);
    });
}

#[test]
fn damage_is_an_error_of_the_reads_that_touch_it_and_of_no_others() {
    local(async {
        let world = world(100);
        let damaged = BlockIndex(2 * CHUNK / 4_096 + 1);
        world.source.damage(BlockRange::between(damaged, BlockIndex(damaged.0 + 1)));
        let range = |start, length| ByteRange::new(ByteOffset(start), ByteCount(length)).unwrap();
        // Neighbors in the same chunk.
        world.check(2 * CHUNK, 4_096).await;
        world.check(2 * CHUNK + 8_192, 4_096).await;
        for (start, length) in [(2 * CHUNK + 4_096, 512), (0, 10 * CHUNK)] {
            let error = world.reader.read(range(start, length)).await.unwrap_err();
            assert!(matches!(error, FetchError::Damaged(_)), "{error:?}");
        }
        world.check(3 * CHUNK, CHUNK).await;
    });
}

#[test]
fn a_receiver_that_comes_back_in_time_is_waited_for() {
    local(async {
        let world = Rc::new(world(100));
        world.source.set_away(true);
        let reading = Rc::clone(&world);
        let read = tokio::task::spawn_local(async move { reading.check(100, 9_000).await });
        world.source.until_asked(4).await;
        assert!(world.reader.last_error().unwrap().contains("away"));
        world.source.set_away(false);
        read.await.unwrap();
        assert_eq!(world.reader.last_error(), None);
    });
}

#[test]
fn one_that_does_not_is_an_error_of_every_read_that_waits_at_the_same_time() {
    local(async {
        // Away, and there without a word.
        for silent in [false, true] {
            let world = Rc::new(world(100));
            world.source.set_away(true);
            if silent {
                world.source.close();
            }
            let begun = Instant::now();
            let reads: Vec<_> = (0..16)
                .map(|read| {
                    let reader = Rc::clone(&world.reader);
                    let range = ByteRange::new(ByteOffset(read * 512), ByteCount(512)).unwrap();
                    tokio::task::spawn_local(async move { reader.read(range).await })
                })
                .collect();
            for read in reads {
                let error = read.await.unwrap().unwrap_err();
                assert!(matches!(error, FetchError::Unreachable(_)), "{error:?}");
            }
            assert!(begun.elapsed() <= PATIENCE, "one after the other");
            world.source.set_away(false);
            world.source.open();
            world.check(0, 4_096).await;
        }
    });
}

#[test]
fn what_is_known_to_be_zeroes_is_not_asked_for() {
    local(async {
        let world = world(100);
        world.reader.know_data(DirtyBitmap::of(BlockRange::between(BlockIndex(0), BlockIndex(1))));
        world.check(0, 100).await;
        let range = ByteRange::new(ByteOffset(CHUNK), ByteCount(CHUNK)).unwrap();
        assert!(world.reader.read(range).await.unwrap().iter().all(|byte| *byte == 0));
        assert_eq!(world.source.asked().len(), 1);
    });
}
