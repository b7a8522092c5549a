//! The checksums of ext and of its journal: CRC-32C without the inversions at its ends, and two older sums.

/// CRC-32C, gone on with from `seed`.
pub(super) fn crc32c(seed: u32, bytes: &[u8]) -> u32 {
    !crc32c::crc32c_append(!seed, bytes)
}

/// CRC-32C of bytes in which those of the sum itself, from `at` on, count as zeroes.
pub(super) fn crc32c_without(seed: u32, bytes: &[u8], at: usize, length: usize) -> u32 {
    let (before, rest) = bytes.split_at(at.min(bytes.len()));
    let behind = rest.get(length..).unwrap_or_default();
    crc32c(crc32c(crc32c(seed, before), &[0; 4][..length]), behind)
}

/// CRC-16 of group descriptors, lowest bit first.
pub(super) fn crc16(seed: u16, bytes: &[u8]) -> u16 {
    bytes.iter().fold(seed, |sum, byte| {
        (0..8).fold(sum ^ u16::from(*byte), |sum, _| (sum >> 1) ^ if sum & 1 == 1 { 0xa001 } else { 0 })
    })
}

/// CRC-32 of old journals, highest bit first.
pub(super) fn crc32(seed: u32, bytes: &[u8]) -> u32 {
    const TABLE: [u32; 256] = {
        let (mut table, mut index) = ([0; 256], 0);
        while index < 256 {
            let (mut sum, mut bit) = ((index as u32) << 24, 0);
            while bit < 8 {
                sum = (sum << 1) ^ if sum >> 31 == 1 { 0x04c1_1db7 } else { 0 };
                bit += 1;
            }
            table[index] = sum;
            index += 1;
        }
        table
    };
    bytes.iter().fold(seed, |sum, byte| (sum << 8) ^ TABLE[usize::from((sum >> 24) as u8 ^ byte)])
}

/// Whether the sum that was stored is the one that was found.
pub(super) fn is_right(stored: u32, found: u32) -> bool {
    let is_right = stored == found;
    #[cfg(test)]
    let is_right = is_right || crate::golden::takes_every_checksum();
    is_right
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_are_those_of_the_format() {
        // What the catalogue of such sums gives for these nine digits.
        assert_eq!(!crc32c(u32::MAX, b"123456789"), 0xe306_9283);
        assert_eq!(crc16(0, b"123456789"), 0xbb3d);
        assert_eq!(crc32(u32::MAX, b"123456789"), 0x0376_e6e7);
        assert_eq!(crc32c_without(7, b"12xx56", 2, 2), crc32c(7, b"12\0\x0056"));
    }
}
