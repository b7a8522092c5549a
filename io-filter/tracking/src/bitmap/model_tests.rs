//! The bitmap beside a plain list of blocks.

use super::*;

const BLOCKS: u64 = 4 * REGION;

struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 16) % limit
    }

    /// A range that often ends where a region does.
    fn range(&mut self) -> BlockRange {
        let mut edge = || match self.below(3) {
            0 => self.below(5) * REGION,
            _ => self.below(BLOCKS + 1),
        };
        let (one, other) = (edge(), edge());
        (one.min(other)..one.max(other)).into()
    }
}

type Plain = Vec<bool>;

fn fill(plain: &mut Plain, range: BlockRange, dirty: bool) {
    let (start, end) = (range.start().0 as usize, range.end().0 as usize);
    plain[start..end].fill(dirty);
}

fn check(bitmap: &DirtyBitmap, plain: &Plain, what: &str) {
    let mut of_runs = vec![false; plain.len()];
    for run in bitmap.runs((0..BLOCKS).into(), BlockCount(BLOCKS)) {
        fill(&mut of_runs, run, true);
    }
    assert!(of_runs == *plain, "{what}");
    assert_eq!(bitmap.count().0, plain.iter().filter(|dirty| **dirty).count() as u64, "{what}");
    assert!(bitmap.regions().iter().all(|region| !bitmap.whole.contains(*region)), "{what}");
}

#[test]
fn a_bitmap_is_the_list_of_its_blocks_whatever_is_done_to_it() {
    let mut random = Random(7);
    let mut sets: Vec<(DirtyBitmap, Plain)> =
        (0..3).map(|_| (DirtyBitmap::new(), vec![false; BLOCKS as usize])).collect();
    for _ in 0..400 {
        let (one, two) = (random.below(3) as usize, random.below(3) as usize);
        let range = random.range();
        let (other, other_plain) = sets[two].clone();
        let (bitmap, plain) = &mut sets[one];
        let step = random.below(8);
        match step {
            0..=2 => {
                let news =
                    plain[range.start().0 as usize..range.end().0 as usize].iter().filter(|dirty| !**dirty);
                let news = news.count() as u64;
                fill(plain, range, true);
                assert_eq!(bitmap.insert(range), BlockCount(news), "{range:?}");
            }
            3 => {
                fill(plain, range, false);
                bitmap.remove(range);
            }
            4 => {
                plain.iter_mut().zip(&other_plain).for_each(|(one, other)| *one |= other);
                bitmap.union_with(&other);
            }
            5 => {
                plain.iter_mut().zip(&other_plain).for_each(|(one, other)| *one &= !other);
                bitmap.subtract(&other);
            }
            6 => {
                plain.iter_mut().zip(&other_plain).for_each(|(one, other)| *one &= other);
                bitmap.intersect_with(&other);
            }
            _ => {
                let mut kept = vec![false; plain.len()];
                fill(&mut kept, range, true);
                plain.iter_mut().zip(&kept).for_each(|(one, kept)| *one &= kept);
                bitmap.keep_only(range);
            }
        }
        check(bitmap, plain, &format!("step {step} {range:?}"));
        let again = DirtyBitmap::from_bytes(&bitmap.to_bytes()).expect("what was written");
        assert!(again == *bitmap, "step {step} {range:?}");
        let range = random.range();
        let all = plain[range.start().0 as usize..range.end().0 as usize].iter().all(|dirty| *dirty);
        assert_eq!(bitmap.contains(range), all, "{range:?}");
    }
}

#[test]
fn a_disk_that_has_grown_loses_no_block_to_the_bound() {
    let mut bitmap = DirtyBitmap::bounded(ByteCount(1 << 10), BlockIndex(100));
    let mut marked = DirtyBitmap::new();
    for block in (REGION..3 * REGION).step_by(64) {
        bitmap.insert((block..block + 1).into());
        marked.insert((block..block + 1).into());
    }
    bitmap.union_with(&DirtyBitmap::of((4 * REGION + 5..4 * REGION + 6).into()));
    marked.subtract(&bitmap);
    assert!(marked.is_empty() && bitmap.contains((4 * REGION + 5..4 * REGION + 6).into()));
    assert!(bitmap.memory() <= ByteCount(1 << 10));
}

#[test]
fn what_cannot_be_given_up_is_noticed() {
    let mut bitmap = DirtyBitmap::bounded(ByteCount(64 << 10), BlockIndex(64 * REGION));
    bitmap.insert((0..64 * REGION).into());
    for block in (0..64 * REGION).step_by(33) {
        bitmap.remove((block..block + 1).into());
    }
    assert!(bitmap.exceeds_bound(), "{} of memory", bitmap.memory());
    bitmap.union_with(&DirtyBitmap::new());
    assert!(!bitmap.exceeds_bound() && bitmap.memory() <= ByteCount(64 << 10));
}
