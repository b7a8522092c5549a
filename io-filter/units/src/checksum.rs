//! The checksum that a payload gets where it is captured, and what it becomes where it is stored.
//!
//! On the stream a payload has one CRC32C. A reader of the log wants to check a small part of a long payload, so
//! the store keeps the CRC32C *so far* at the end of every piece. Then a piece is checked by going on from the
//! one before it, the last one is the checksum of the whole, and all of them fall out of one pass over
//! the bytes: the pass in which a receiver verifies what it was sent.

use std::sync::Arc;

use crate::ByteCount;

/// CRC32C of a payload, and of the pieces of a long one once they are known.
///
/// Two of them are equal when the whole payload's are: the pieces follow from the bytes.
#[derive(Clone, Debug, Default)]
pub struct PayloadChecksum {
    whole: u32,
    running: Option<Arc<[u32]>>,
}

impl PayloadChecksum {
    /// Bytes of a piece; the last one of a payload may be shorter.
    pub const PIECE: ByteCount = ByteCount(64 << 10);

    /// One that came with the payload, which was not looked at.
    pub fn captured(crc32c: u32) -> Self {
        Self { whole: crc32c, running: None }
    }

    /// Of `payload`; of its pieces too when it has several.
    pub fn of(payload: &[u8]) -> Self {
        if payload.len() <= Self::PIECE.0 as usize {
            return Self::captured(crc32c::crc32c(payload));
        }
        let mut whole = 0;
        let mut running = Vec::with_capacity(Self::pieces_in(ByteCount::of(payload)));
        for piece in payload.chunks(Self::PIECE.0 as usize) {
            whole = crc32c::crc32c_append(whole, piece);
            running.push(whole);
        }
        Self { whole, running: Some(running.into()) }
    }

    /// The same one with its pieces, which are computed from `payload` when they are not known. Of a payload
    /// of one piece nothing is looked at.
    ///
    /// # Errors
    /// The checksum that `payload` has when it is not this one: the payload is damaged.
    pub fn complete(self, payload: &[u8]) -> Result<Self, u32> {
        if self.running.is_some() || payload.len() <= Self::PIECE.0 as usize {
            return Ok(self);
        }
        let found = Self::of(payload);
        if found.whole == self.whole { Ok(found) } else { Err(found.whole) }
    }

    /// CRC32C of the whole payload.
    pub fn whole(&self) -> u32 {
        self.whole
    }

    /// CRC32C of the bytes up to the end of each of several pieces, if known. The last is the whole one.
    pub fn running(&self) -> Option<&[u32]> {
        self.running.as_deref()
    }

    /// How many pieces a payload of `length` has.
    pub fn pieces_in(length: ByteCount) -> usize {
        length.0.div_ceil(Self::PIECE.0) as usize
    }
}

impl PartialEq for PayloadChecksum {
    fn eq(&self, other: &Self) -> bool {
        self.whole == other.whole
    }
}

impl Eq for PayloadChecksum {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_piece_goes_on_from_the_one_before() {
        let payload: Vec<u8> = (0..150_000_u32).map(|n| (n * 7) as u8).collect();
        let checksum = PayloadChecksum::of(&payload);
        assert_eq!(checksum.whole(), crc32c::crc32c(&payload));
        let running = checksum.running().expect("just computed");
        let expected = [&payload[..65536], &payload[..131_072], &payload[..]].map(crc32c::crc32c);
        assert_eq!(running, expected);
    }

    #[test]
    fn what_is_damaged_cannot_be_completed() {
        let mut payload = vec![7; 70_000];
        let checksum = PayloadChecksum::captured(crc32c::crc32c(&payload));
        let complete = checksum.clone().complete(&payload).expect("as captured");
        assert_eq!(complete.running().map(<[u32]>::len), Some(2));
        payload[3] = 8;
        assert_eq!(checksum.complete(&payload), Err(crc32c::crc32c(&payload)));
    }

    #[test]
    fn one_piece_needs_no_list() {
        for length in [0, 1, 65_536] {
            let payload = vec![1; length];
            let checksum = PayloadChecksum::of(&payload);
            assert_eq!((checksum.whole(), checksum.running()), (crc32c::crc32c(&payload), None));
        }
    }
}
