//! What was found out about a range, piece by piece, and what has to be written of it.
//!
//! Invariant: behind a server everything is written in whole blocks, wherever pieces end.

use std::io;

use backtide_io_filter::Change;
use backtide_storage::ImageFile;
use backtide_units::{BlockCount, BlockRange, ByteCount, ByteOffset, ByteRange};
use bytes::{BufMut, BytesMut};

use crate::disk::source::Piece;

/// What the point holds; none where the image holds it already.
pub(super) type Pieces = Vec<(ByteRange, Option<Piece>)>;

/// Whether the pieces are of all of `range`, in order.
pub(super) fn is_all(pieces: &Pieces, range: ByteRange) -> bool {
    let mut at = range.start();
    for (of, piece) in pieces {
        let whole = match piece {
            Some(Piece::Data(data)) => data.len() as u64 == of.count().0,
            Some(Piece::Zeroes) | None => true,
        };
        if of.start() != at || !whole {
            return false;
        }
        at = of.end();
    }
    at == range.end()
}

/// Whether something of it was found by comparison with the image.
pub(super) fn is_compared(pieces: &Pieces) -> bool {
    pieces.iter().any(|(_, piece)| piece.is_none())
}

/// How many of these blocks were fetched, at least in part.
pub(super) fn fetched(wanted: &[BlockRange], pieces: &Pieces, size: ByteCount) -> BlockCount {
    let came = pieces.iter().filter(|(_, piece)| piece.is_some());
    let of = came.flat_map(|(of, _)| wanted.iter().filter_map(|run| run.bytes(size).intersection(*of)));
    BlockCount(of.map(|part| BlockRange::touched_by(part).count().0).sum())
}

/// What has to be written for pieces to be in `range`.
fn changes(range: ByteRange, pieces: &Pieces) -> impl Iterator<Item = Change> {
    pieces.iter().filter_map(move |(of, piece)| {
        let range = of.intersection(range)?;
        Some(match piece.as_ref()? {
            Piece::Data(data) => {
                let skipped = (range.start().0 - of.start().0) as usize;
                let data = data.slice(skipped..skipped + range.count().0 as usize);
                Change::Write { range, data, fua: false }
            }
            Piece::Zeroes => Change::Zero { range, trim: true, fua: false },
        })
    })
}

/// The same in whole blocks of the granule, which is what some servers take: pieces may end anywhere.
pub(super) fn in_blocks(range: ByteRange, size: ByteCount, pieces: &Pieces) -> Vec<Change> {
    let mut whole = Vec::new();
    let (mut at, mut data) = (range.start(), BytesMut::new());
    let end_write = |at: &mut ByteOffset, data: &mut BytesMut, whole: &mut Vec<Change>| {
        if !data.is_empty() {
            let range = ByteRange::between(*at, ByteOffset(at.0 + data.len() as u64));
            *at = range.end();
            whole.push(Change::Write { range, data: data.split().freeze(), fua: false });
        }
    };
    for change in changes(range, pieces) {
        let start = change.range().map_or(at, ByteRange::start);
        // What lies between is there already.
        if start.0 != at.0 + data.len() as u64 {
            end_write(&mut at, &mut data, &mut whole);
            at = start;
        }
        match change {
            Change::Write { data: bytes, .. } => data.extend_from_slice(&bytes),
            Change::Zero { range: zeroes, trim, fua } => {
                let inner = BlockRange::covered_by(zeroes, size).bytes(size);
                let before = if inner.is_empty() { zeroes.end() } else { inner.start() };
                data.put_bytes(0, (before.0 - zeroes.start().0) as usize);
                if !inner.is_empty() {
                    end_write(&mut at, &mut data, &mut whole);
                    whole.push(Change::Zero { range: inner, trim, fua });
                    at = inner.end();
                    data.put_bytes(0, (zeroes.end().0 - inner.end().0) as usize);
                }
            }
            Change::Flush => unreachable!("nothing else is fetched"),
        }
    }
    end_write(&mut at, &mut data, &mut whole);
    whole
}

/// Writes what pieces have of `range`.
pub(super) fn write(image: &ImageFile, range: ByteRange, pieces: &Pieces) -> io::Result<()> {
    for change in changes(range, pieces) {
        match change {
            Change::Write { range, data, .. } => image.write_at(range.start(), &data)?,
            Change::Zero { range, trim, .. } => image.zero(range, trim)?,
            Change::Flush => unreachable!("nothing else is fetched"),
        }
    }
    Ok(())
}
