//! Where the bytes of a file lie, and how they are read.
//!
//! Invariant: pieces are sorted by their place in the file, do not overlap, and lie within the volume. What no
//! piece covers is zeroes.

use backtide_units::{ByteCount, ByteOffset};

use crate::{Error, Source};

/// The most pieces of one file.
pub(crate) const PIECES_MAX: usize = 4 << 20;

/// The bytes of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Contents {
    size: ByteCount,
    pieces: Vec<Piece>,
    pub(crate) compressed: Option<Compressed>,
}

/// How a file is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Compressed {
    /// How many bytes are compressed together.
    pub(crate) unit: ByteCount,
    /// Where the file's clusters end, holes included.
    pub(crate) end: ByteOffset,
}

/// A stretch of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Its first byte in the file.
    pub at: ByteOffset,
    /// How many bytes.
    pub length: ByteCount,
    /// Where they are.
    pub place: Place,
}

/// Where the bytes of a piece are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// On the volume, from here on.
    Volume(ByteOffset),
    /// Beside what the volume says of the file: these.
    Inline(Vec<u8>),
}

impl Piece {
    fn end(&self) -> u64 {
        self.at.0 + self.length.0
    }
}

impl Contents {
    /// A file of `size` bytes in these pieces, on a volume of `volume` bytes.
    pub(crate) fn new(size: ByteCount, mut pieces: Vec<Piece>, volume: ByteCount) -> Result<Self, Error> {
        pieces.retain(|piece| !piece.length.is_zero());
        pieces.sort_by_key(|piece| piece.at);
        let mut end = 0;
        for piece in &pieces {
            let next = piece.at.checked_add(piece.length);
            let next = next.ok_or_else(|| Error::damaged("", "an extent ends beyond every file"))?;
            if piece.at.0 < end {
                return Err(Error::damaged("", format!("two extents have byte {} of the file", piece.at)));
            }
            end = next.0;
            match &piece.place {
                Place::Volume(from) => {
                    if from.checked_add(piece.length).is_none_or(|end| end.0 > volume.0) {
                        let why = format!("an extent at byte {from} ends beyond the volume's {volume}");
                        return Err(Error::damaged("", why));
                    }
                }
                Place::Inline(bytes) => assert_eq!(ByteCount::of(bytes), piece.length, "all its bytes"),
            }
        }
        Ok(Self { size, pieces, compressed: None })
    }

    /// A file whose bytes are these.
    pub(crate) fn inline(bytes: Vec<u8>) -> Self {
        let size = ByteCount::of(&bytes);
        let piece = Piece { at: ByteOffset::ZERO, length: size, place: Place::Inline(bytes) };
        let pieces = if size.is_zero() { Vec::new() } else { vec![piece] };
        Self { size, pieces, compressed: None }
    }

    /// How long the file is.
    pub fn size(&self) -> ByteCount {
        self.size
    }

    /// What is stored of it, in the order of the file. May reach beyond its end.
    pub fn pieces(&self) -> &[Piece] {
        &self.pieces
    }

    /// The first byte at or after `at` that may be other than zero; none when there is none before the end.
    pub fn next_data(&self, at: ByteOffset) -> Option<ByteOffset> {
        let unit = self.compressed.map_or(1, |compressed| compressed.unit.0.max(1));
        let index = self.pieces.partition_point(|piece| piece.end() <= at.0 / unit * unit);
        let start = ByteOffset(self.pieces.get(index)?.at.0 / unit * unit).max(at);
        (start.0 < self.size.0).then_some(start)
    }

    /// Fills `buffer` with what is stored from `at` on, whatever the file's size: the pieces and the gaps between.
    pub(crate) fn read_stored(
        &self,
        source: &dyn Source,
        at: ByteOffset,
        buffer: &mut [u8],
    ) -> Result<(), Error> {
        buffer.fill(0);
        let end = at.0.saturating_add(buffer.len() as u64);
        let first = self.pieces.partition_point(|piece| piece.end() <= at.0);
        for piece in self.pieces[first..].iter().take_while(|piece| piece.at.0 < end) {
            let (from, to) = (piece.at.0.max(at.0), piece.end().min(end));
            // Both lie within the buffer, and what is skipped within the piece.
            let target = &mut buffer[(from - at.0) as usize..(to - at.0) as usize];
            let skipped = from - piece.at.0;
            match &piece.place {
                Place::Volume(start) => source.read_at(ByteOffset(start.0 + skipped), target)?,
                Place::Inline(bytes) => {
                    let start = skipped as usize;
                    target.copy_from_slice(&bytes[start..start + target.len()]);
                }
            }
        }
        Ok(())
    }

    /// How many of the bytes from `start` to `end` of the file are stored.
    pub(crate) fn stored(&self, start: ByteOffset, end: ByteOffset) -> ByteCount {
        let first = self.pieces.partition_point(|piece| piece.end() <= start.0);
        let pieces = self.pieces[first..].iter().take_while(|piece| piece.at < end);
        ByteCount(pieces.map(|piece| piece.end().min(end.0) - piece.at.0.max(start.0)).sum())
    }

    /// Whether `is` holds for any of the places on the volume that these bytes are at.
    pub(crate) fn touches(
        &self,
        at: ByteOffset,
        length: usize,
        is: impl Fn(ByteOffset, usize) -> bool,
    ) -> bool {
        let end = at.0.saturating_add(length as u64);
        let first = self.pieces.partition_point(|piece| piece.end() <= at.0);
        self.pieces[first..].iter().take_while(|piece| piece.at.0 < end).any(|piece| match piece.place {
            Place::Volume(start) => {
                let (from, to) = (piece.at.0.max(at.0), piece.end().min(end));
                is(ByteOffset(start.0 + from - piece.at.0), (to - from) as usize)
            }
            Place::Inline(_) => false,
        })
    }

    /// Reads bytes of the file: as many as the buffer takes, fewer at its end only.
    pub(crate) fn read_at(
        &self,
        source: &dyn Source,
        at: ByteOffset,
        buffer: &mut [u8],
    ) -> Result<usize, Error> {
        let left = self.size.0.saturating_sub(at.0);
        let count = buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        self.read_stored(source, at, &mut buffer[..count])?;
        Ok(count)
    }
}
