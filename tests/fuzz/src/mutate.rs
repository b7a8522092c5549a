//! What is done to bytes that are right, by one random number after the other.

/// SplitMix64. Each crate of tests has it of its own: what a seed stands for must not change when another crate needs another
/// number, and none of them is built for another.
pub struct Random(pub u64);

impl Random {
    /// The next number.
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number in `0..bound`; 0 when there is none.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.number().checked_rem(bound).unwrap_or(0)
    }

    /// A place in something of this length; early ones more often, for what counts stands first.
    fn place(&mut self, length: usize) -> usize {
        let near = if self.below(3) == 0 { 160.min(length) } else { length };
        self.below(near as u64) as usize
    }
}

/// Numbers at which arithmetic breaks.
const EXTREMES: [u64; 14] = [
    0,
    1,
    7,
    0x7f,
    0xff,
    0xffff,
    0x1_0000,
    0x7fff_ffff,
    0xffff_ffff,
    0x1_0000_0000,
    1 << 48,
    1 << 63,
    u64::MAX - 1,
    u64::MAX,
];

/// A sample with one to four things done to it; the samples' parts may be mixed.
pub fn mutate(samples: &[Vec<u8>], random: &mut Random) -> Vec<u8> {
    let pick = |random: &mut Random| &samples[random.below(samples.len() as u64) as usize];
    let mut bytes = pick(random).clone();
    for _ in 0..=random.below(4) {
        match random.below(8) {
            0 => flip(&mut bytes, random),
            1 => put_extreme(&mut bytes, random, false),
            2 => put_extreme(&mut bytes, random, true),
            3 => bytes.truncate(random.place(bytes.len() + 1)),
            4 => {
                let more = 1 + random.below(300) as usize;
                let byte = random.number() as u8;
                bytes.resize(bytes.len() + more, byte);
            }
            5 => splice(&mut bytes, pick(random).clone().as_slice(), random),
            6 => repeat(&mut bytes, random),
            _ => scramble(&mut bytes, random),
        }
    }
    bytes
}

fn flip(bytes: &mut [u8], random: &mut Random) {
    let place = random.place(bytes.len());
    if let Some(byte) = bytes.get_mut(place) {
        *byte ^= 1 << random.below(8);
    }
}

/// A length, a count, an offset: any field of 1 to 8 bytes, of either order.
fn put_extreme(bytes: &mut [u8], random: &mut Random, big_endian: bool) {
    let width = 1 << random.below(4);
    let value = EXTREMES[random.below(EXTREMES.len() as u64) as usize];
    let place = random.place(bytes.len()) / width * width;
    let (little, big) = (value.to_le_bytes(), value.to_be_bytes());
    let field = if big_endian { &big[8 - width..] } else { &little[..width] };
    if let Some(target) = bytes.get_mut(place..place + width) {
        target.copy_from_slice(field);
    }
}

/// A part of another sample, here.
fn splice(bytes: &mut Vec<u8>, other: &[u8], random: &mut Random) {
    let from = random.place(other.len());
    let part = &other[from..from + random.place(other.len() - from + 1)];
    let place = random.place(bytes.len() + 1);
    let behind = (place + random.below(part.len() as u64 + 1) as usize).min(bytes.len());
    bytes.splice(place..behind, part.iter().copied());
}

/// A part of it again, or gone.
fn repeat(bytes: &mut Vec<u8>, random: &mut Random) {
    let from = random.place(bytes.len());
    let behind = (from + 1 + random.below(200) as usize).min(bytes.len());
    let part = bytes[from..behind].to_vec();
    if random.below(2) == 0 {
        bytes.splice(from..from, part);
    } else {
        bytes.drain(from..behind);
    }
}

fn scramble(bytes: &mut [u8], random: &mut Random) {
    let from = random.place(bytes.len());
    let behind = (from + 1 + random.below(16) as usize).min(bytes.len());
    bytes[from..behind].iter_mut().for_each(|byte| *byte = random.number() as u8);
}
