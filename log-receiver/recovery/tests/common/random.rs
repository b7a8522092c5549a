//! Chance that is the same in every run.

use backtide_units::{ByteOffset, ByteRange};

use super::DISK;

/// SplitMix64. Each crate of tests has it of its own: what a seed stands for must not change when another crate needs another
/// number, and none of them is built for another.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number in `0..bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    pub fn one_in(&mut self, chances: u64) -> bool {
        self.below(chances) == 0
    }

    /// A range of the disk: odd offsets and lengths, mostly small.
    pub fn range(&mut self, longest: u64) -> ByteRange {
        let longest = if self.one_in(6) { longest } else { 5000.min(longest) };
        let length = 1 + self.below(longest);
        let start = self.below(DISK - length + 1);
        ByteRange::between(ByteOffset(start), ByteOffset(start + length))
    }
}

/// Bytes that compress to about half.
pub fn half_noise(salt: u8, length: usize) -> Vec<u8> {
    let mut noise = Random(salt.into());
    let mut bytes = vec![salt; length];
    for chunk in bytes.chunks_mut(64) {
        let half = chunk.len() / 2;
        chunk[..half].fill_with(|| noise.next() as u8);
    }
    bytes
}
