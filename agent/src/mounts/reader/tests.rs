//! Reads against a source in memory.

use std::{
    io::{self, IoSlice},
    path::Path,
    sync::{Arc, Condvar, Mutex},
};

use backtide_storage::{MemoryStorage, Storage, StorageFile};
use backtide_tracking::DirtyBitmap;
use backtide_units::{BlockIndex, BlockRange, DiskId};
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

/// A cache's file that can stand still.
struct Gated {
    file: Arc<dyn StorageFile>,
    gate: Mutex<Gate>,
    changed: Condvar,
}

#[derive(Default)]
struct Gate {
    closed: bool,
    waiting: usize,
    /// Whoever could have opened it was waiting for it.
    stuck: bool,
}

impl Gated {
    fn pass(&self) {
        let mut gate = self.gate.lock().unwrap();
        gate.waiting += 1;
        let (mut gate, waited) =
            self.changed.wait_timeout_while(gate, Duration::from_secs(20), |gate| gate.closed).unwrap();
        gate.waiting -= 1;
        gate.stuck |= waited.timed_out();
    }

    fn set_closed(&self, closed: bool) {
        self.gate.lock().unwrap().closed = closed;
        self.changed.notify_all();
    }

    async fn until_waiting(&self, count: usize) {
        let is_there = |gate: &Gate| gate.waiting >= count || gate.stuck;
        while !is_there(&self.gate.lock().unwrap()) {
            tokio::task::yield_now().await;
        }
    }

    fn was_stuck(&self) -> bool {
        self.gate.lock().unwrap().stuck
    }
}

impl StorageFile for Gated {
    fn read_at(&self, offset: ByteOffset, buffer: &mut [u8]) -> io::Result<usize> {
        self.pass();
        self.file.read_at(offset, buffer)
    }

    fn write_vectored_at(&self, offset: ByteOffset, buffers: &[IoSlice<'_>]) -> io::Result<()> {
        self.pass();
        self.file.write_vectored_at(offset, buffers)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn len(&self) -> io::Result<ByteCount> {
        self.file.len()
    }

    fn set_len(&self, len: ByteCount) -> io::Result<()> {
        self.file.set_len(len)
    }

    fn allocate(&self, range: ByteRange) -> io::Result<()> {
        self.file.allocate(range)
    }
}

fn world(cache_chunks: u64) -> World {
    gated_world(cache_chunks).0
}

fn gated_world(cache_chunks: u64) -> (World, Arc<Gated>) {
    world_of(content(), cache_chunks)
}

/// A disk of zeroes but for its first block.
fn empty_world() -> World {
    let mut content = content();
    content[4_096..].fill(0);
    world_of(content, 100).0
}

fn world_of(content: Vec<u8>, cache_chunks: u64) -> (World, Arc<Gated>) {
    let source = Rc::new(FakeSource::new(content.clone()));
    let storage = MemoryStorage::new();
    let file = storage.create_new(Path::new("cache")).unwrap();
    let gated = Arc::new(Gated { file, gate: Mutex::default(), changed: Condvar::new() });
    let file = Arc::clone(&gated) as Arc<dyn StorageFile>;
    let cache = Cache::new(Arc::new(storage), Some(file), ByteCount(cache_chunks * CHUNK));
    let reader = Rc::new(Reader::new(Rc::clone(&source) as Rc<dyn PointSource>, cache, Some(Lsn(7))));
    (World { content, source, reader }, gated)
}

impl World {
    async fn check(&self, start: u64, length: u64) {
        let range = ByteRange::new(ByteOffset(start), ByteCount(length)).unwrap();
        let bytes = self.reader.read(range).await.unwrap();
        assert!(bytes == self.content[start as usize..(start + length) as usize], "{range} reads wrong");
    }
}

impl World {
    /// Waits until it was asked so often what blocks hold.
    async fn until_maps(&self, count: usize) {
        while self.source.maps().len() < count {
            tokio::task::yield_now().await;
        }
    }

    /// Waits until the cache has so many bytes.
    async fn until_kept(&self, bytes: u64) {
        while self.reader.usage().0 < ByteCount(bytes) {
            tokio::task::yield_now().await;
        }
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
        let world = empty_world();
        world.source.close_maps(true);
        world.check(0, 100).await;
        world.until_maps(1).await;
        // Nobody waits for that: what may be data is fetched.
        world.check(20 * CHUNK, CHUNK).await;
        assert_eq!(world.source.asked().len(), 2);
        world.source.close_maps(false);
        world.reader.told_of(ByteOffset::ZERO).await.unwrap();
        world.check(2 * CHUNK, SIZE - 2 * CHUNK).await;
        assert_eq!(world.source.asked().len(), 2);
        world.source.set_away(true);
        world.check(30 * CHUNK, CHUNK).await;
    });
}

#[test]
fn what_blocks_hold_is_asked_for_once_when_somebody_wants_to_know() {
    local(async {
        let world = Rc::new(empty_world());
        assert_eq!(world.source.maps(), [], "nobody has wanted to know");
        let asking = (0..10).map(|nth| {
            let world = Rc::clone(&world);
            tokio::task::spawn_local(async move { world.reader.told_of(ByteOffset(nth * CHUNK)).await })
        });
        let first = DirtyBitmap::of(BlockRange::from(0..1));
        for asked in asking.collect::<Vec<_>>() {
            let (data, changed) = asked.await.unwrap().unwrap();
            assert_eq!((&*data, changed.as_deref()), (&first, Some(&first)));
        }
        let whole = BlockRange::whole_disk(ByteCount(SIZE));
        assert_eq!(world.source.maps(), [whole, whole], "what has data, and what changed");
    });
}

#[test]
fn a_receiver_that_is_there_may_take_its_time_to_tell_what_blocks_hold() {
    local(async {
        let world = Rc::new(empty_world());
        world.source.close_maps(true);
        let asking = Rc::clone(&world);
        let asked =
            tokio::task::spawn_local(async move { asking.reader.told_of(ByteOffset::ZERO).await.is_ok() });
        world.until_maps(1).await;
        tokio::time::advance(PATIENCE * 10).await;
        // Whoever gives up then does so when it runs again.
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        assert!(!asked.is_finished());
        world.source.close_maps(false);
        assert!(asked.await.unwrap());
    });
}

#[test]
fn what_blocks_hold_is_an_error_while_nobody_tells_and_anything_when_nobody_ever_will() {
    local(async {
        let world = empty_world();
        world.source.set_away(true);
        let begun = Instant::now();
        let error = world.reader.told_of(ByteOffset::ZERO).await.unwrap_err();
        assert!(matches!(error, FetchError::Unreachable(_)), "{error:?}");
        assert!(begun.elapsed() <= PATIENCE && world.source.maps().len() > 1, "it was asked again and again");
        assert!(world.reader.last_error().unwrap().contains("away"));
        world.source.set_away(false);
        assert!(world.reader.told_of(ByteOffset::ZERO).await.is_ok());
        assert_eq!(world.reader.last_error(), None);

        let world = empty_world();
        world.source.damage(BlockRange::from(0..1));
        let (data, changed) = world.reader.told_of(ByteOffset::ZERO).await.unwrap();
        let whole = DirtyBitmap::of(BlockRange::whole_disk(ByteCount(SIZE)));
        assert_eq!((&*data, changed.as_deref()), (&whole, Some(&whole)));
        world.check(CHUNK, CHUNK).await;
    });
}

#[test]
fn a_cache_that_stands_still_holds_up_no_other_read() {
    local(async {
        let (world, gate) = gated_world(100);
        world.check(10, 100).await;
        world.until_kept(CHUNK).await;
        let world = Rc::new(world);
        gate.set_closed(true);
        let reading = Rc::clone(&world);
        let kept = tokio::task::spawn_local(async move { reading.check(10, 100).await });
        gate.until_waiting(1).await;
        // Fetched, given, and going to be kept; and once more while it is.
        world.check(5 * CHUNK, 100).await;
        world.check(5 * CHUNK, CHUNK).await;
        assert_eq!(world.source.asked().len(), 2);
        gate.set_closed(false);
        kept.await.unwrap();
        world.until_kept(2 * CHUNK).await;
        assert!(!gate.was_stuck(), "the one thread of all mounts has waited");
    });
}

#[test]
fn a_cache_that_goes_on_standing_still_is_given_up() {
    local(async {
        let (world, gate) = gated_world(100);
        world.check(0, 100).await;
        world.until_kept(CHUNK).await;
        let world = Rc::new(world);
        gate.set_closed(true);
        let reading = Rc::clone(&world);
        let kept = tokio::task::spawn_local(async move { reading.check(0, 100).await });
        gate.until_waiting(1).await;
        tokio::time::advance(CACHE_PATIENCE).await;
        kept.await.unwrap();
        assert_eq!(world.reader.usage().0, ByteCount::ZERO);
        world.check(0, 100).await;
        assert_eq!(world.source.asked().len(), 3);
        assert!(!gate.was_stuck());
        gate.set_closed(false);
    });
}
