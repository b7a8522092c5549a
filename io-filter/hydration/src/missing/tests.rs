use backtide_units::ByteOffset;

use super::*;

const SIZE: ByteCount = ByteCount(1000 * 4096);

fn missing(blocks: std::ops::Range<u64>) -> Missing {
    Missing::new(SIZE, DirtyBitmap::of(blocks.into()))
}

fn bytes(start: u64, end: u64) -> ByteRange {
    ByteRange::between(ByteOffset(start), ByteOffset(end))
}

fn blocks(start: u64, end: u64) -> BlockRange {
    (start..end).into()
}

#[test]
fn a_read_needs_what_is_missing_and_brings_its_surroundings() {
    let disk = missing(20..40);
    assert!(!disk.touches(bytes(0, 20 * 4096)));
    assert_eq!(disk.before_read(bytes(0, 20 * 4096)), None);
    let need = disk.before_read(bytes(33 * 4096 + 1, 33 * 4096 + 2));
    assert_eq!(need, Some(Need::Wait(vec![blocks(32, 40)])));
    let need = disk.before_read(bytes(19 * 4096, 21 * 4096));
    assert_eq!(need, Some(Need::Wait(vec![blocks(20, 32)])));
}

#[test]
fn what_is_being_fetched_is_not_fetched_again() {
    let mut disk = missing(16..32);
    let fetch = disk.begin_fetch(blocks(16, 32));
    assert_eq!(disk.before_read(bytes(16 * 4096, 17 * 4096)), Some(Need::Wait(Vec::new())));
    assert_eq!(disk.next_unfetched(BlockIndex(0)), None);
    assert_eq!(disk.end_fetch(fetch, true), [blocks(16, 32)]);
    assert_eq!(disk.before_read(bytes(16 * 4096, 17 * 4096)), Some(Need::Wait(Vec::new())), "being stored");
    disk.end_store(fetch, true);
    assert!(disk.is_empty());
    assert_eq!(disk.before_read(bytes(16 * 4096, 17 * 4096)), None);
}

#[test]
fn a_change_needs_only_the_blocks_it_covers_in_part() {
    let mut disk = missing(0..100);
    let whole = disk.begin_change(bytes(4096, 3 * 4096)).unwrap();
    assert_eq!(disk.overwritten(whole), [blocks(1, 3)]);
    let Err(Need::Wait(fetch)) = disk.begin_change(bytes(50 * 4096 + 1, 70 * 4096)) else {
        panic!("the first block is needed");
    };
    assert_eq!(fetch, [blocks(48, 64)]);
    disk.end_change(whole, true);
    assert!(!disk.touches(bytes(4096, 3 * 4096)));
}

#[test]
fn what_a_guest_writes_meanwhile_counts_and_not_what_was_fetched() {
    let mut disk = missing(0..16);
    let fetch = disk.begin_fetch(blocks(0, 16));
    let under_way = disk.begin_change(bytes(0, 4096)).unwrap();
    let over = disk.begin_change(bytes(5 * 4096, 6 * 4096)).unwrap();
    disk.end_change(over, true);
    assert_eq!(disk.end_fetch(fetch, true), [blocks(1, 5), blocks(6, 16)]);
    let wait = disk.begin_change(bytes(4096, 2 * 4096));
    assert_eq!(wait, Err(Need::Wait(Vec::new())), "it is being stored");
    disk.end_store(fetch, true);
    disk.end_change(under_way, false);
    assert_eq!(disk.before_read(bytes(0, 1)), Some(Need::Wait(vec![blocks(0, 1)])), "the write failed");
    assert_eq!(disk.blocks().count(), BlockCount(1));
}

#[test]
fn a_block_that_the_source_has_lost_can_only_be_written_over() {
    let mut disk = missing(0..4);
    disk.is_damaged(BlockIndex(2));
    assert_eq!(disk.before_read(bytes(0, 4 * 4096)), Some(Need::Damaged(BlockIndex(2))));
    assert_eq!(disk.before_read(bytes(0, 2 * 4096)), Some(Need::Wait(vec![blocks(0, 2), blocks(3, 4)])));
    assert_eq!(disk.begin_change(bytes(2 * 4096, 2 * 4096 + 1)), Err(Need::Damaged(BlockIndex(2))));
    assert_eq!(disk.next_unfetched(BlockIndex(2)), Some(blocks(3, 4)));
    let change = disk.begin_change(bytes(2 * 4096, 3 * 4096)).unwrap();
    disk.end_change(change, true);
    assert!(disk.damaged().is_empty() && disk.blocks().count() == BlockCount(3));
}

#[test]
fn a_short_last_block_is_covered_by_a_change_up_to_the_end() {
    let mut disk = Missing::new(ByteCount(4096 + 512), DirtyBitmap::of((0..2).into()));
    let change = disk.begin_change(bytes(4096, 4096 + 512)).unwrap();
    assert_eq!(disk.overwritten(change), [blocks(1, 2)]);
}

#[test]
fn what_is_shown_is_not_fetched_for_whoever_reads_it_and_is_fetched_to_be_noted() {
    let mut disk = missing(0..64);
    let fetch = disk.begin_fetch(blocks(16, 24));
    assert_eq!(disk.end_fetch(fetch, true), [blocks(16, 24)]);
    disk.end_unnoted(fetch);
    assert_eq!(disk.before_read(bytes(16 * 4096, 24 * 4096)), None);
    let around = disk.before_read(bytes(23 * 4096, 25 * 4096));
    assert_eq!(around, Some(Need::Wait(vec![blocks(24, 32)])));
    assert_eq!(disk.next_unfetched(BlockIndex(16)), Some(blocks(16, 64)));
    // It is there, whatever the source has lost since.
    disk.is_damaged(BlockIndex(20));
    disk.is_damaged(BlockIndex(30));
    assert_eq!(disk.before_read(bytes(16 * 4096, 24 * 4096)), None);
    assert_eq!(disk.before_read(bytes(16 * 4096, 32 * 4096)), Some(Need::Damaged(BlockIndex(30))));
    let change = disk.begin_change(bytes(17 * 4096 + 5, 19 * 4096 + 5)).unwrap();
    assert_eq!(disk.overwritten(change), [blocks(17, 20)]);
    assert_eq!(disk.before_read(bytes(17 * 4096, 18 * 4096)), Some(Need::Wait(Vec::new())));
    disk.end_change(change, true);
    assert!(!disk.touches(bytes(17 * 4096, 20 * 4096)));
    assert_eq!(disk.before_read(bytes(16 * 4096, 24 * 4096)), None);
}

#[test]
fn what_is_shown_is_brought_again_once_the_image_is_in_doubt_and_so_is_what_was_being_stored() {
    let mut disk = missing(0..64);
    let stored = |disk: &mut Missing, run: BlockRange| {
        let fetch = disk.begin_fetch(run);
        assert_eq!(disk.end_fetch(fetch, true), [run]);
        fetch
    };
    let (shown, storing) = (stored(&mut disk, blocks(0, 16)), stored(&mut disk, blocks(16, 32)));
    disk.end_unnoted(shown);
    disk.doubt_image();
    disk.end_unnoted(storing);
    let again = disk.before_read(bytes(0, 32 * 4096));
    assert_eq!(again, Some(Need::Wait(vec![blocks(0, 32)])));
    // What was stored since counts until the next doubt.
    let later = stored(&mut disk, blocks(0, 16));
    disk.end_unnoted(later);
    assert_eq!(disk.before_read(bytes(0, 16 * 4096)), None);
}
