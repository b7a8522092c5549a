//! The grid a disk is copied and compared on.

use backtide_export::Extent;
use backtide_units::{ByteCount, ByteOffset, ByteRange, is_zeroes};
use blake3::Hash;

/// What is read, written and hashed at once.
pub(crate) const PIECE: ByteCount = ByteCount(1 << 20);

/// What shares one digest.
pub(crate) const WINDOW: ByteCount = ByteCount(1 << 30);

/// Zeroes are skipped in multiples of this, inside a piece that holds data.
pub(crate) const ZERO_GRAIN: usize = 64 << 10;

/// The digest of a piece that is all zeroes, whether it was read or known to be.
const ZERO_DIGEST: [u8; 32] = [0; 32];

/// The windows of a disk.
pub(crate) fn windows(size: ByteCount) -> impl Iterator<Item = ByteRange> {
    ByteRange::between(ByteOffset::ZERO, ByteOffset(size.0)).split_at_multiples(WINDOW)
}

/// The pieces of a window, each with whether it may hold data.
///
/// `extents` describe the window from its start; what they do not cover may hold data.
pub(crate) fn pieces(window: ByteRange, extents: &[Extent]) -> Vec<(ByteRange, bool)> {
    let mut pieces: Vec<(ByteRange, bool)> =
        window.split_at_multiples(PIECE).map(|piece| (piece, false)).collect();
    let mut mark = |data: ByteRange| {
        let Some(data) = window.intersection(data) else { return };
        let first = (data.start().0 - window.start().0) / PIECE.0;
        let last = (data.end().0 - 1 - window.start().0) / PIECE.0;
        for (_, holds_data) in &mut pieces[first as usize..=last as usize] {
            *holds_data = true;
        }
    };
    let mut at = window.start();
    for extent in extents {
        let end = ByteOffset(at.0.saturating_add(extent.length.0).min(window.end().0));
        if !extent.zero {
            mark(ByteRange::between(at, end));
        }
        at = end;
    }
    mark(ByteRange::between(at, window.end()));
    pieces
}

/// The runs of one piece's bytes: which to write, and which are zeroes. Those that equal `there` are left out.
pub(crate) fn runs(data: &[u8], there: Option<&[u8]>) -> Vec<(std::ops::Range<usize>, bool)> {
    let mut runs: Vec<(std::ops::Range<usize>, bool)> = Vec::new();
    let mut at = 0;
    for grain in data.chunks(ZERO_GRAIN) {
        let (end, zero) = (at + grain.len(), is_zeroes(grain));
        if there.is_some_and(|there| there[at..end] == *grain) {
            at = end;
            continue;
        }
        match runs.last_mut() {
            Some((run, same)) if *same == zero && run.end == at => run.end = end,
            Some(_) | None => runs.push((at..end, zero)),
        }
        at = end;
    }
    runs
}

/// The digest of one piece's bytes.
pub(crate) fn digest(data: &[u8]) -> [u8; 32] {
    if is_zeroes(data) { ZERO_DIGEST } else { *blake3::hash(data).as_bytes() }
}

/// The digests of a window's pieces, in their order; pieces nobody reads are zeroes.
pub(crate) struct WindowDigest(Vec<[u8; 32]>);

impl WindowDigest {
    /// Of a window of so many pieces.
    pub(crate) fn of(pieces: usize) -> Self {
        Self(vec![ZERO_DIGEST; pieces])
    }

    /// Notes the digest of piece number `index`.
    pub(crate) fn set(&mut self, index: usize, digest: [u8; 32]) {
        self.0[index] = digest;
    }

    /// The digest of the whole window.
    pub(crate) fn finish(&self) -> Hash {
        let mut hasher = blake3::Hasher::new();
        for digest in &self.0 {
            hasher.update(digest);
        }
        hasher.finalize()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn window(start: u64, end: u64) -> ByteRange {
        ByteRange::between(ByteOffset(start), ByteOffset(end))
    }

    fn marks(window: ByteRange, extents: &[Extent]) -> Vec<bool> {
        pieces(window, extents).into_iter().map(|(_, data)| data).collect()
    }

    #[test]
    fn pieces_that_touch_data_are_read_and_others_not() {
        let hole = |length| Extent::hole(ByteCount(length));
        let data = |length| Extent::data(ByteCount(length));
        let whole = window(0, 4 * MIB);
        assert_eq!(marks(whole, &[hole(4 * MIB)]), [false; 4]);
        assert_eq!(marks(whole, &[hole(MIB + 4096), data(512), hole(9 * MIB)]), [false, true, false, false]);
        assert_eq!(marks(whole, &[data(MIB), hole(MIB), data(MIB + 1), hole(1)]), [true, false, true, true]);
    }

    #[test]
    fn what_the_extents_do_not_cover_counts_as_data() {
        assert_eq!(marks(window(0, 2 * MIB), &[]), [true, true]);
        assert_eq!(marks(window(0, 2 * MIB), &[Extent::hole(ByteCount(MIB))]), [false, true]);
        assert_eq!(marks(window(0, MIB + 1), &[Extent::hole(ByteCount(MIB))]), [false, true]);
    }

    #[test]
    fn zero_runs_inside_a_piece_are_found() {
        let mut data = vec![0_u8; 4 * ZERO_GRAIN];
        data[ZERO_GRAIN + 7] = 1;
        data[2 * ZERO_GRAIN] = 1;
        assert_eq!(
            runs(&data, None),
            [
                (0..ZERO_GRAIN, true),
                (ZERO_GRAIN..3 * ZERO_GRAIN, false),
                (3 * ZERO_GRAIN..4 * ZERO_GRAIN, true)
            ]
        );
        assert_eq!(runs(&[0; 100], None), [(0..100, true)]);
        let mut there = data.clone();
        there[ZERO_GRAIN + 8] = 1;
        assert_eq!(runs(&data, Some(&there)), [(ZERO_GRAIN..2 * ZERO_GRAIN, false)]);
        there[3 * ZERO_GRAIN] = 1;
        assert_eq!(runs(&data, Some(&there))[1], (3 * ZERO_GRAIN..4 * ZERO_GRAIN, true));
        assert_eq!(runs(&data, Some(&data)), []);
    }

    #[test]
    fn a_zero_piece_has_the_same_digest_read_or_not_and_one_bit_changes_it() {
        let mut read = WindowDigest::of(2);
        read.set(1, digest(&[0; 4097]));
        assert_eq!(read.finish(), WindowDigest::of(2).finish());
        let mut flipped = [0; 4097];
        flipped[4096] = 1;
        read.set(1, digest(&flipped));
        assert_ne!(read.finish(), WindowDigest::of(2).finish());
    }
}
