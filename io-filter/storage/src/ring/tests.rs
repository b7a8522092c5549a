//! The ring on real files. Where io_uring is forbidden these tests fail: a machine that builds this must
//! be able to test it.

use std::{
    fs::File,
    path::{Path, PathBuf},
};

use rustix::event::{PollFd, PollFlags};

use super::*;
use crate::{Cache, Opening};

const SIZE: u64 = 4 << 20;

fn image(directory: &Path) -> PathBuf {
    let path = directory.join("disk.raw");
    File::create(&path).unwrap().set_len(SIZE).unwrap();
    path
}

fn range(start: u64, end: u64) -> ByteRange {
    ByteRange::between(ByteOffset(start), ByteOffset(end))
}

/// A ring on an image in a directory whose file system takes direct I/O.
fn ring(opening: Opening) -> (tempfile::TempDir, Ring<u64>) {
    let directory = tempfile::tempdir_in(std::env::current_exe().unwrap().parent().unwrap()).unwrap();
    let image = ImageFile::open_with(&image(directory.path()), opening).unwrap();
    (directory, Ring::new(Arc::new(image)).expect("io_uring is needed for this test"))
}

fn each_way(test: impl Fn(Opening)) {
    for cache in [Cache::Writeback, Cache::Direct] {
        for block_min in [0, 4096] {
            test(Opening { cache, block_min });
        }
    }
}

/// Turns, waiting for the event in between, until nothing is under way.
fn finish(ring: &mut Ring<u64>) -> Vec<Completion<u64>> {
    let mut done = Vec::new();
    loop {
        ring.turn(&mut done).unwrap();
        if ring.under_way() == 0 {
            return done;
        }
        rustix::event::poll(&mut [PollFd::new(&*ring, PollFlags::IN)], None).unwrap();
        let mut count = [0; 8];
        let _ = rustix::io::read(&*ring, &mut count);
    }
}

#[test]
fn what_is_written_is_read() {
    each_way(|opening| {
        let (_directory, mut ring) = ring(opening);
        for round in 0..200u64 {
            let place = range(round * 8192, round * 8192 + 8192);
            let data = Bytes::from(vec![round as u8; 8192]);
            ring.push(RingOp::Write { range: place, data, stable: round % 50 == 0 }, round);
        }
        let done = finish(&mut ring);
        assert_eq!(done.len(), 200);
        assert!(done.iter().all(|done| done.result.as_ref().is_ok_and(Option::is_none)));
        ring.push(RingOp::Sync, 0);
        assert!(finish(&mut ring)[0].result.is_ok());
        for round in 0..200u64 {
            // Also what is not aligned.
            ring.push(RingOp::Read(range(round * 8192 + 100, round * 8192 + 8191)), round);
        }
        for Completion { tag, result } in finish(&mut ring) {
            let bytes = result.unwrap().unwrap();
            assert!(bytes.len() == 8091 && bytes.iter().all(|&byte| byte == tag as u8), "round {tag}");
        }
        let content = std::fs::read(ring.image.path()).unwrap();
        assert!(content[199 * 8192..200 * 8192].iter().all(|&byte| byte == 199));
    });
}

#[test]
fn long_requests_are_whole() {
    each_way(|opening| {
        let (_directory, mut ring) = ring(opening);
        let data: Bytes = (0..SIZE).map(|at| (at / 997) as u8).collect();
        ring.push(RingOp::Write { range: range(0, SIZE), data: data.clone(), stable: true }, 1);
        assert!(finish(&mut ring)[0].result.is_ok());
        ring.push(RingOp::Read(range(0, SIZE)), 2);
        assert!(finish(&mut ring).remove(0).result.unwrap() == Some(data));
    });
}

#[test]
fn a_read_beyond_a_cut_file_is_an_error() {
    each_way(|opening| {
        let (directory, mut ring) = ring(opening);
        let file = File::options().write(true).open(directory.path().join("disk.raw")).unwrap();
        file.set_len(8192 + 512).unwrap();
        for (number, place) in [range(8192, 12288), range(1 << 20, 2 << 20)].into_iter().enumerate() {
            ring.push(RingOp::Read(place), number as u64);
        }
        for done in finish(&mut ring) {
            assert_eq!(done.result.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        }
    });
}

#[test]
fn what_is_not_for_a_ring_is_not_taken() {
    let (_directory, unaligned) = ring(Opening { cache: Cache::Direct, block_min: 4096 });
    let write = |start: u64, end: u64| RingOp::Write {
        range: range(start, end),
        data: vec![0; (end - start) as usize].into(),
        stable: false,
    };
    assert!(!unaligned.takes(&write(512, 1024)));
    assert!(unaligned.takes(&write(4096, 8192)));
    let (_directory, cached) = ring(Opening::default());
    assert!(cached.takes(&write(512, 1024)));
    assert!(!cached.takes(&write(SIZE - 512, SIZE + 512)), "the file would grow");
    assert!(!cached.takes(&RingOp::Read(range(SIZE, SIZE + 512))));
}

#[test]
fn a_full_ring_says_so_and_goes_on() {
    let (_directory, mut ring) = ring(Opening { cache: Cache::Direct, block_min: 0 });
    let mut pushed = 0;
    while ring.has_room() {
        ring.push(RingOp::Read(range(0, 4096)), pushed);
        pushed += 1;
    }
    assert_eq!(ring.under_way(), FLIGHTS_MAX as usize);
    assert_eq!(finish(&mut ring).len() as u64, pushed);
    assert!(ring.has_room());
}

#[test]
fn a_ring_that_is_dropped_takes_its_memory_along_when_the_kernel_is_done() {
    for _ in 0..50 {
        let (_directory, mut ring) = ring(Opening { cache: Cache::Direct, block_min: 0 });
        let pool = ring.image.buffers().clone();
        let mut copied = 0;
        for round in 0..64 {
            let data = Bytes::from(vec![1; 65536]);
            if !ring.image.alignment().unwrap().takes_memory(&data) {
                copied += 65536;
            }
            ring.push(
                RingOp::Write { range: range(round * 65536, (round + 1) * 65536), data, stable: false },
                0,
            );
            ring.push(RingOp::Read(range(round * 4096, round * 4096 + 4096)), 0);
        }
        ring.enter().unwrap();
        assert!(ring.under_way() > 0);
        drop(ring);
        // Every buffer has come back: none is owned by a request any more.
        assert_eq!(pool.unused(), 64 * 4096 + copied);
    }
}
