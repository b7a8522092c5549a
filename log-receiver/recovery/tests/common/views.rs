//! What views give, compared.

use backtide_images::CHUNK_BYTES;
use backtide_recovery::View;
use backtide_units::{BLOCK_SIZE, Lsn};
use roaring::RoaringTreemap;

use super::{DISK, Random, indices, whole};

pub fn assert_same(found: &[u8], expected: &[u8], lsn: Lsn) {
    if found != expected {
        let place = found.iter().zip(expected).position(|(a, b)| a != b);
        panic!("the disk at {lsn} differs from the model at byte {place:?}");
    }
}

/// Zero extents read as zeros, and parts read as the whole does.
pub fn check_view(view: &View, random: &mut Random) {
    let all = view.read(whole()).expect("read");
    let mut at = 0;
    for (range, allocation) in view.extents(whole()).expect("extents") {
        assert_eq!(range.start().0, at, "extents adjoin");
        at = range.end().0;
        if allocation == backtide_recovery::Allocation::Zero {
            assert!(all[indices(range)].iter().all(|&byte| byte == 0), "{range} is not zero");
        }
    }
    assert_eq!(at, DISK);
    for _ in 0..8 {
        let range = random.range(DISK);
        assert_eq!(view.read(range).expect("read"), all[indices(range)], "{range}");
    }
}

/// The blocks of the chunks of images that two contents of the disk would not have in common.
pub fn chunks_that_differ(before: &[u8], after: &[u8]) -> RoaringTreemap {
    let chunk = CHUNK_BYTES.0 as usize;
    let differing = before.chunks(chunk).zip(after.chunks(chunk)).enumerate().filter(|(_, (a, b))| a != b);
    let blocks = CHUNK_BYTES.0 / BLOCK_SIZE;
    differing.flat_map(|(nth, _)| nth as u64 * blocks..(nth as u64 + 1) * blocks).collect()
}
