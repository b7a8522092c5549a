//! Reading a part of an entry: each piece of 64 KiB of a long payload has a checksum of its own.
//!
//! The table of them stands between the header and the payload. It holds the CRC32C *so far* at the end of every
//! piece but the last, whose is the whole payload's, in the header; and a CRC of its own that starts from the
//! whole payload's, so that no other payload's table can pass for it. A short payload has one piece and no table.
//!
//! Whoever has checked a piece knows the CRC32C so far at the end of every 4 KiB of it as well ([`PartSums`]). By these any
//! few blocks of it are read and checked again without the rest.

use std::{ops::Range, sync::Arc};

use backtide_units::{ByteCount, ByteOffset, ByteRange, PayloadChecksum};
use bytes::{Buf, BufMut, Bytes, BytesMut};

use crate::{
    Body, ENTRY_HEADER_LENGTH, EntryHeader, Extent, Position, SegmentError, SegmentFile, SegmentHeader,
    body::body_at, entry_header::ALIGNMENT,
};

const PIECE: u64 = PayloadChecksum::PIECE.0;

/// What a piece that was checked is read in from then on.
const PART: u64 = 4096;

/// A body that was read before, by where it is.
pub type KnownBody<'a> = &'a dyn Fn(ByteOffset) -> Option<Body>;

/// An entry with a payload, and what is needed to read any piece of it: header and table, both checked.
#[derive(Clone, Debug)]
pub struct EntryParts {
    header: EntryHeader,
    range: ByteRange,
    place: Place,
    /// CRC32C of the payload up to the end of each piece.
    running: Arc<[u32]>,
}

/// Where the payload is.
#[derive(Clone, Debug)]
enum Place {
    /// From there on in the file.
    File(u64),
    /// From there on among the bytes of a batch.
    Batch(Body, u64),
}

/// CRC32C of the payload up to the end of each 4 KiB of one piece, learned when that was checked as a whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PartSums(Arc<[u32]>);

impl PartSums {
    /// How many parts the piece has.
    pub fn count(&self) -> usize {
        self.0.len()
    }
}

/// Bytes that the table of a payload takes, padding included; 0 for one piece.
pub(crate) fn table_length(payload: ByteCount) -> u64 {
    if payload.0 <= PIECE { 0 } else { (payload.0.div_ceil(PIECE) * 4).next_multiple_of(ALIGNMENT) }
}

/// Puts the table of a payload with several pieces.
///
/// # Panics
/// When the checksum is not complete.
pub(crate) fn put_table(out: &mut BytesMut, payload: &[u8], checksum: &PayloadChecksum) {
    let length = table_length(ByteCount::of(payload)) as usize;
    if length == 0 {
        return;
    }
    let running = checksum.running().expect("the checksum of a long payload is complete");
    assert_eq!(
        running.len(),
        PayloadChecksum::pieces_in(ByteCount::of(payload)),
        "a checksum for each piece"
    );
    let from = out.len();
    for crc in &running[..running.len() - 1] {
        out.put_u32_le(*crc);
    }
    let crc = crc32c::crc32c_append(checksum.whole(), &out[from..]);
    out.put_u32_le(crc);
    out.put_bytes(0, length - (out.len() - from));
}

/// The checksums in `table`, the whole payload's last; `None` when they are not what was written.
fn decode_table(header: &EntryHeader, mut table: &[u8]) -> Option<Arc<[u32]>> {
    let pieces = PayloadChecksum::pieces_in(ByteCount(header.payload_length.into())).max(1);
    if pieces == 1 {
        return Some([header.payload_crc].into());
    }
    let crc = crc32c::crc32c_append(header.payload_crc, &table[..(pieces - 1) * 4]);
    let mut running: Vec<u32> = (1..pieces).map(|_| table.get_u32_le()).collect();
    running.push(header.payload_crc);
    (table.get_u32_le() == crc).then(|| running.into())
}

/// Whether what follows a header (table and payload) is what was written.
pub(crate) fn is_sound(header: &EntryHeader, table: &[u8], payload: &[u8]) -> bool {
    match decode_table(header, table) {
        Some(running) if running.len() > 1 => {
            let mut crc = 0;
            payload.chunks(PIECE as usize).zip(running.iter()).all(|(piece, expected)| {
                crc = crc32c::crc32c_append(crc, piece);
                crc == *expected
            })
        }
        Some(_) => crc32c::crc32c(payload) == header.payload_crc,
        None => false,
    }
}

impl EntryParts {
    /// The entry's header.
    pub fn header(&self) -> &EntryHeader {
        &self.header
    }

    /// The bytes of the disk that the payload holds.
    pub fn range(&self) -> ByteRange {
        self.range
    }

    /// How many pieces the payload has.
    pub fn count(&self) -> usize {
        self.running.len()
    }

    /// The bytes of the disk that a piece holds.
    ///
    /// # Panics
    /// When there is no such piece.
    pub fn piece(&self, number: usize) -> ByteRange {
        assert!(number < self.count(), "piece {number} of {}", self.count());
        let start = self.range.start().0 + number as u64 * PIECE;
        ByteRange::between(ByteOffset(start), ByteOffset((start + PIECE).min(self.range.end().0)))
    }

    fn piece_length(&self, number: usize) -> u64 {
        let before = number as u64 * PIECE;
        (u64::from(self.header.payload_length) - before).min(PIECE)
    }

    /// CRC32C of the payload up to the end of each piece.
    pub(crate) fn running(&self) -> &[u32] {
        &self.running
    }

    /// CRC32C of the payload up to where a piece begins.
    fn before(&self, number: usize) -> u32 {
        number.checked_sub(1).map_or(0, |before| self.running[before])
    }

    /// Where a piece stands in the file; of one in a batch, where the frame that has it does.
    pub(crate) fn piece_at(&self, number: usize) -> u64 {
        match &self.place {
            Place::File(payload_at) => payload_at + number as u64 * PIECE,
            Place::Batch(body, _) => body.frame_at(number).start,
        }
    }

    /// The body of the batch that has the payload, if one does: a piece is in the frame of the same number.
    pub fn body(&self) -> Option<&Body> {
        match &self.place {
            Place::File(_) => None,
            Place::Batch(body, _) => Some(body),
        }
    }

    /// The pieces that hold `part` of the disk.
    ///
    /// # Panics
    /// When the part is empty or not in the payload.
    pub fn pieces_of(&self, part: ByteRange) -> Range<usize> {
        assert!(!part.is_empty() && self.range.contains(part), "{part} lies in {}", self.range);
        let piece = |at: u64| ((at - self.range.start().0) / PIECE) as usize;
        piece(part.start().0)..piece(part.end().0 - 1) + 1
    }
}

impl SegmentFile {
    /// The entry that an index's extent points to, checked to be that one, for reading pieces of it.
    ///
    /// # Errors
    /// [`SegmentError::Damaged`] when its header or table is not what was written, and when the index
    /// points elsewhere.
    pub fn parts(
        &self,
        segment: &SegmentHeader,
        extent: &Extent,
        known: KnownBody<'_>,
    ) -> Result<EntryParts, SegmentError> {
        let header = self.entry_header(segment, extent.position)?;
        let range = header.range().filter(|range| range.contains(extent.range));
        match range {
            Some(range)
                if header.seq == extent.seq && header.lsn == extent.version && header.payload_length > 0 =>
            {
                self.parts_behind(segment, header, extent.position, range, known)
            }
            Some(_) | None => Err(self.damaged(
                extent.position.offset().0,
                format!(
                    "the index expects entry {} at lsn {} with {}, found entry {} at lsn {}",
                    extent.seq, extent.version, extent.range, header.seq, header.lsn
                ),
            )),
        }
    }

    /// The bytes of some pieces, one after the other, each checked.
    ///
    /// # Errors
    /// [`SegmentError::Damaged`] when one is not what was captured.
    ///
    /// # Panics
    /// When there are no such pieces.
    pub fn payload(&self, parts: &EntryParts, pieces: Range<usize>) -> Result<Bytes, SegmentError> {
        assert!(pieces.start <= pieces.end && pieces.end <= parts.count(), "pieces {pieces:?} of an entry");
        let end = (pieces.end as u64 * PIECE).min(parts.header.payload_length.into());
        let start = (pieces.start as u64 * PIECE).min(end);
        let mut bytes = vec![0; (end - start) as usize];
        self.payload_into(parts, pieces, &mut bytes)?;
        Ok(bytes.into())
    }

    /// The bytes of some pieces into `buffer`, one after the other, each checked.
    ///
    /// # Errors
    /// [`SegmentError::Damaged`] when one is not what was captured; the buffer holds anything then.
    ///
    /// # Panics
    /// When there are no such pieces, or the buffer is not as long as they are.
    pub fn payload_into(
        &self,
        parts: &EntryParts,
        pieces: Range<usize>,
        buffer: &mut [u8],
    ) -> Result<(), SegmentError> {
        assert!(pieces.end <= parts.count(), "pieces {pieces:?} of {}", parts.count());
        let filled = buffer.len().div_ceil(PIECE as usize);
        assert!(filled == pieces.len() || buffer.is_empty(), "a buffer for {pieces:?}");
        if let Some(body) = parts.body() {
            for (number, into) in pieces.zip(buffer.chunks_mut(PIECE as usize)) {
                let frame = self.frame(body, number)?;
                into.copy_from_slice(self.piece_in(parts, number, &frame)?);
            }
            return Ok(());
        }
        self.read_exact(parts.piece_at(pieces.start), buffer)?;
        for (number, piece) in pieces.zip(buffer.chunks(PIECE as usize)) {
            self.check_piece(parts, number, crc32c::crc32c_append(parts.before(number), piece))?;
        }
        Ok(())
    }

    /// The bytes of a piece of an entry in a batch, checked, out of the [`frame`](Self::frame) of the same number.
    ///
    /// # Errors
    /// [`SegmentError::Damaged`] when they are not what was captured.
    ///
    /// # Panics
    /// When the entry is in no batch, or there is no such piece.
    pub fn piece_in<'f>(
        &self,
        parts: &EntryParts,
        number: usize,
        frame: &'f [u8],
    ) -> Result<&'f [u8], SegmentError> {
        let Place::Batch(_, start) = &parts.place else { panic!("an entry in a batch") };
        let length = parts.piece_length(number);
        // Of several frames the first begins with the payload, and each holds one piece.
        let start = *start as usize;
        let piece = &frame[start..start + length as usize];
        self.check_piece(parts, number, crc32c::crc32c_append(parts.before(number), piece))?;
        Ok(piece)
    }

    /// The bytes of one piece, checked, and what its parts are checked by from now on.
    ///
    /// # Errors
    /// [`SegmentError::Damaged`] when it is not what was captured.
    ///
    /// # Panics
    /// When there is no such piece.
    pub fn piece(&self, parts: &EntryParts, number: usize) -> Result<(Vec<u8>, PartSums), SegmentError> {
        let mut bytes = vec![0; parts.piece_length(number) as usize];
        match parts.body() {
            Some(body) => bytes.copy_from_slice(self.piece_in(parts, number, &self.frame(body, number)?)?),
            None => self.read_exact(parts.piece_at(number), &mut bytes)?,
        }
        let mut crc = parts.before(number);
        let so_far = |part: &[u8]| {
            crc = crc32c::crc32c_append(crc, part);
            crc
        };
        let sums: Arc<[u32]> = bytes.chunks(PART as usize).map(so_far).collect();
        self.check_piece(parts, number, crc)?;
        Ok((bytes, PartSums(sums)))
    }

    /// Bytes of a piece that was checked before, by the sums of it, into `buffer`; reads no more than the 4 KiB parts
    /// that have them.
    ///
    /// # Errors
    /// [`SegmentError::Damaged`] when they are not what was captured; the buffer holds anything then.
    ///
    /// # Panics
    /// When they are not in that piece, the sums are of another one, or the buffer is not as long.
    pub fn part(
        &self,
        parts: &EntryParts,
        number: usize,
        sums: &PartSums,
        wanted: ByteRange,
        buffer: &mut [u8],
    ) -> Result<(), SegmentError> {
        let piece = parts.piece(number);
        assert!(piece.contains(wanted), "{wanted} lies in {piece}");
        assert_eq!(ByteCount::of(buffer), wanted.count(), "a buffer for {wanted}");
        assert_eq!(sums.count() as u64, piece.count().0.div_ceil(PART), "sums of {piece}");
        let (from, to) = (wanted.start().0 - piece.start().0, wanted.end().0 - piece.start().0);
        let (start, end) = (from / PART * PART, to.next_multiple_of(PART).min(piece.count().0));
        if (start, end) == (from, to) {
            return self.whole_parts(parts, number, sums, start, buffer);
        }
        let mut around = vec![0; (end - start) as usize];
        self.whole_parts(parts, number, sums, start, &mut around)?;
        buffer.copy_from_slice(&around[(from - start) as usize..(to - start) as usize]);
        Ok(())
    }

    /// Whole parts of a piece, from byte `start` of it on.
    fn whole_parts(
        &self,
        parts: &EntryParts,
        number: usize,
        PartSums(sums): &PartSums,
        start: u64,
        buffer: &mut [u8],
    ) -> Result<(), SegmentError> {
        let (at, first) = (parts.piece_at(number) + start, (start / PART) as usize);
        match parts.body() {
            Some(body) => {
                let frame = self.frame(body, number)?;
                let piece = self.piece_in(parts, number, &frame)?;
                buffer.copy_from_slice(&piece[start as usize..][..buffer.len()]);
            }
            None => self.read_exact(at, buffer)?,
        }
        let mut crc = first.checked_sub(1).map_or_else(|| parts.before(number), |before| sums[before]);
        for (place, part) in buffer.chunks(PART as usize).enumerate() {
            let expected = sums[first + place];
            crc = crc32c::crc32c_append(crc, part);
            if crc != expected {
                return Err(self.wrong_payload(parts, at + place as u64 * PART, crc, expected));
            }
        }
        Ok(())
    }

    fn check_piece(&self, parts: &EntryParts, number: usize, found: u32) -> Result<(), SegmentError> {
        let expected = parts.running[number];
        if found == expected {
            return Ok(());
        }
        Err(self.wrong_payload(parts, parts.piece_at(number), found, expected))
    }

    fn wrong_payload(&self, parts: &EntryParts, at: u64, found: u32, expected: u32) -> SegmentError {
        let EntryHeader { seq, lsn, .. } = parts.header;
        let what = format!(
            "the payload of entry {seq} (lsn {lsn}) has checksum {found:08x}, it was captured with {expected:08x}"
        );
        self.damaged(at, what)
    }

    /// The header of the entry at `position`, and its parts, or what is wrong with its table.
    pub(crate) fn parts_at(
        &self,
        segment: &SegmentHeader,
        position: Position,
    ) -> Result<(EntryHeader, Result<EntryParts, SegmentError>), SegmentError> {
        let header = self.entry_header(segment, position)?;
        let range = header.range().unwrap_or_default();
        Ok((header, self.parts_behind(segment, header, position, range, &|_| None)))
    }

    pub(crate) fn entry_header(
        &self,
        segment: &SegmentHeader,
        position: Position,
    ) -> Result<EntryHeader, SegmentError> {
        let mut bytes = [0; ENTRY_HEADER_LENGTH];
        let at = position.offset().0;
        self.read_exact(at, &mut bytes)?;
        EntryHeader::decode(&bytes, segment.salt(), segment.id)
            .map_err(|fault| self.damaged(at, fault.describe()))
    }

    pub(crate) fn parts_behind(
        &self,
        segment: &SegmentHeader,
        header: EntryHeader,
        position: Position,
        range: ByteRange,
        known: KnownBody<'_>,
    ) -> Result<EntryParts, SegmentError> {
        if let Some(at) = body_at(&header, position.offset().0).filter(|_| header.payload_length > 0) {
            let read = || self.body_of(segment, &header, position.offset().0);
            let body = known(ByteOffset(at)).map_or_else(read, Ok)?;
            return self.parts_in(body, header, position, range);
        }
        let table_at = position.offset().0 + ENTRY_HEADER_LENGTH as u64;
        // A header made by hand could ask for memory for what is not there.
        if u64::from(header.payload_length) > PIECE {
            let ends = position.offset().0 + header.stored_length();
            let length = self.length()?;
            if ends > length {
                let what =
                    format!("expected entry {} up to byte {ends}, the file ends at {length}", header.seq);
                return Err(self.damaged(position.offset().0, what));
            }
        }
        let mut table = vec![0; table_length(ByteCount(header.payload_length.into())) as usize];
        self.read_exact(table_at, &mut table)?;
        let running = decode_table(&header, &table).ok_or_else(|| {
            self.damaged(table_at, format!("the checksum table of entry {} is damaged", header.seq))
        })?;
        let place = Place::File(table_at + table.len() as u64);
        Ok(EntryParts { header, range, place, running })
    }

    /// The parts of an entry whose payload `body` has.
    pub(crate) fn parts_in(
        &self,
        body: Body,
        header: EntryHeader,
        position: Position,
        range: ByteRange,
    ) -> Result<EntryParts, SegmentError> {
        let running: Arc<[u32]> = match u64::from(header.payload_length) {
            0..=PIECE => [header.payload_crc].into(),
            _ => body.running(),
        };
        let pieces = PayloadChecksum::pieces_in(ByteCount(header.payload_length.into())).max(1);
        let payload = body
            .payload_of(&header)
            .filter(|_| running.len() == pieces && running.last() == Some(&header.payload_crc));
        let Some(payload) = payload else {
            let what =
                format!("the batch's body at byte {} has no payload for entry {}", body.at(), header.seq);
            return Err(self.damaged(position.offset().0, what));
        };
        Ok(EntryParts { header, range, place: Place::Batch(body, payload.start), running })
    }
}
