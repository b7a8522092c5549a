//! Mending a sealed segment in place: bytes that are damaged become again what was written.
//!
//! Nothing is written that a checksum in the segment does not ask for: a payload is taken from somewhere else only when it
//! has the checksum it was captured with, a footer is built from entries of which every header is whole. What a payload of data
//! has does not matter to the footer. So whoever reads meanwhile sees the damage or what was written, and after a power cut on
//! the way it is one of both. An entry whose header is damaged cannot be mended: nothing tells what stood there.

use backtide_units::{ByteCount, ByteOffset, ByteRange, Lsn, PayloadChecksum};
use bytes::{Bytes, BytesMut};

use crate::{
    Body, ENTRY_HEADER_LENGTH, EntryHeader, EntryParts, Position, SealedSegment, SegmentError, SegmentFile,
    SegmentHeader, Seq,
    body::body_at,
    footer::write_footer,
    pieces::{put_table, table_length},
    scan_prefix,
};

/// Tells the bytes that are wanted from others.
type IsWanted<'a> = &'a dyn Fn(&Bytes) -> bool;

/// Gives what the disk has, or had around a version, in a range, if it is what is wanted.
type Find<'a> = &'a mut dyn FnMut(ByteRange, Lsn, IsWanted<'_>) -> Option<Bytes>;

/// What came of building a footer again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rebuilt {
    /// It was what the entries give.
    Same,
    /// It was not, and is now.
    Written,
    /// The entries are not all whole: it stays as it is.
    EntriesDamaged,
}

impl SegmentFile {
    /// Writes the segment's header again, durably.
    ///
    /// # Errors
    /// The file's.
    pub fn mend_header(&self, header: &SegmentHeader) -> Result<(), SegmentError> {
        self.put(0, &header.encode())?;
        self.synced()
    }

    /// Mends the entry at `position` when its header is whole. `find` gives what the disk has, or had, in a range; what of it
    /// has the right checksum is put there, durably. False when nothing has, and then what was found is there.
    ///
    /// # Errors
    /// [`SegmentError::Damaged`] when the header is; the file's.
    pub fn mend_entry(
        &self,
        segment: &SegmentHeader,
        position: Position,
        find: Find<'_>,
    ) -> Result<bool, SegmentError> {
        let (header, parts) = match self.parts_at(segment, position)? {
            (header, Ok(parts)) => (header, parts),
            (header, Err(_)) if header.body_ahead().is_some() => {
                if !self.mend_body_header(segment, &header, position)? {
                    return Ok(false);
                }
                let (header, parts) = self.parts_at(segment, position)?;
                (header, parts?)
            }
            (header, Err(_)) => {
                if !self.mend_table(position, header.payload_length, header.payload_crc)? {
                    return Ok(false);
                }
                let (header, parts) = self.parts_at(segment, position)?;
                (header, parts?)
            }
        };
        if header.range().is_none() || header.payload_length == 0 {
            return Ok(false);
        }
        for number in 0..parts.count() {
            if !damage_of(self.payload(&parts, number..number + 1))? {
                continue;
            }
            let found = match parts.body() {
                None => find(parts.piece(number), header.lsn, &|bytes| parts.is_piece(number, bytes)),
                Some(body) if body.count() > 1 => {
                    let found = find(parts.piece(number), header.lsn, &|bytes| parts.is_piece(number, bytes));
                    found.and_then(|piece| body.pack(number, &piece))
                }
                Some(body) => self.find_batch(segment, body, find)?,
            };
            let Some(stored) = found else { return Ok(false) };
            self.put(parts.piece_at(number), &stored)?;
        }
        self.synced()?;
        Ok(!damage_of(self.entry(segment, position))?)
    }

    /// The stored bytes of the only frame of a batch, made again of all that it holds.
    fn find_batch(
        &self,
        segment: &SegmentHeader,
        body: &Body,
        find: Find<'_>,
    ) -> Result<Option<Bytes>, SegmentError> {
        let mut all = BytesMut::new();
        for nth in 0..u64::from(body.header().entries) {
            let at = body.first_header_at() + nth * ENTRY_HEADER_LENGTH as u64;
            let Ok(position) = u32::try_from(at).map(Position) else { return Ok(None) };
            let header = match self.entry_header(segment, position) {
                Ok(header) => header,
                Err(damage) => return damage_of::<()>(Err(damage)).map(|_| None),
            };
            let Some(range) = header.range().filter(|_| header.payload_length > 0) else { continue };
            let is_wanted = |bytes: &Bytes| {
                ByteCount::of(bytes).0 == u64::from(header.payload_length)
                    && crc32c::crc32c(bytes) == header.payload_crc
            };
            let Some(payload) = find(range, header.lsn, &is_wanted) else { return Ok(None) };
            all.extend_from_slice(&payload);
        }
        Ok(body.pack(0, &all.freeze()))
    }

    /// Builds the footer of a sealed segment again from its entries, durably; false when one of them is lost. Of the payloads of
    /// data it says nothing, so those may be damaged.
    ///
    /// # Errors
    /// The file's.
    pub fn mend_footer(&self, sealed: &SealedSegment) -> Result<bool, SegmentError> {
        let (scanned, damage) = scan_prefix(self, *sealed.header(), Seq::MAX, sealed.last())?;
        let gone = damage.is_some();
        if gone || scanned.contents.stats() != sealed.stats() || scanned.end != sealed.entries_end() {
            return Ok(false);
        }
        let file = &**self.file();
        let written = write_footer(file, sealed.header(), &scanned.contents, scanned.end);
        written.map_err(|source| self.failed("write", source))?;
        self.synced()?;
        Ok(!damage_of(sealed.verify(self))? && SealedSegment::open(self, *sealed.header())?.is_some())
    }

    /// Builds the footer of a sealed segment again from its entries, and writes it durably where it is not what stands there.
    ///
    /// # Errors
    /// The file's.
    pub fn rebuild_footer(&self, sealed: &SealedSegment) -> Result<Rebuilt, SegmentError> {
        let (scanned, damage) = scan_prefix(self, *sealed.header(), Seq::MAX, Seq(0))?;
        if damage.is_some() || !scanned.damaged.is_empty() || scanned.end != sealed.entries_end() {
            return Ok(Rebuilt::EntriesDamaged);
        }
        let footer = || {
            let mut bytes = vec![0; (self.length()?.saturating_sub(scanned.end.0)) as usize];
            self.read_exact(scanned.end.0, &mut bytes).map(|()| bytes)
        };
        // A place that the device cannot read is one to write.
        let before = match footer() {
            Ok(bytes) => Some(bytes),
            Err(damage) => damage_of::<()>(Err(damage)).map(|_| None)?,
        };
        let written = write_footer(&**self.file(), sealed.header(), &scanned.contents, scanned.end);
        written.map_err(|source| self.failed("write", source))?;
        self.synced()?;
        Ok(if before == Some(footer()?) { Rebuilt::Same } else { Rebuilt::Written })
    }

    /// What the header of a body says follows from the rest, when that is whole; nothing tells what stood in a table.
    fn mend_body_header(
        &self,
        segment: &SegmentHeader,
        header: &EntryHeader,
        position: Position,
    ) -> Result<bool, SegmentError> {
        let Some(at) = body_at(header, position.offset().0) else { return Ok(false) };
        if !damage_of(self.body_of(segment, header, position.offset().0))? {
            return Ok(false);
        }
        let Some(body) = self.lost_body(segment, at)? else { return Ok(false) };
        self.put(at, &body.encode_header(segment))?;
        self.synced()?;
        Ok(true)
    }

    /// The checksums of a payload's pieces follow from the payload, when that is whole.
    fn mend_table(&self, position: Position, length: u32, crc: u32) -> Result<bool, SegmentError> {
        let table_at = position.offset().0 + ENTRY_HEADER_LENGTH as u64;
        let mut payload = vec![0; length as usize];
        let at = table_at + table_length(ByteCount(length.into()));
        if damage_of(self.read_exact(at, &mut payload))? || crc32c::crc32c(&payload) != crc {
            return Ok(false);
        }
        let mut table = BytesMut::new();
        put_table(&mut table, &payload, &PayloadChecksum::of(&payload));
        self.put(table_at, &table)?;
        self.synced()?;
        Ok(true)
    }

    fn put(&self, at: u64, bytes: &[u8]) -> Result<(), SegmentError> {
        self.file().write_at(ByteOffset(at), bytes).map_err(|source| self.failed("write", source))
    }

    fn synced(&self) -> Result<(), SegmentError> {
        self.file().sync_data().map_err(|source| self.failed("sync", source))
    }
}

impl EntryParts {
    /// Whether these bytes are what was captured as a piece.
    fn is_piece(&self, number: usize, bytes: &Bytes) -> bool {
        let before = number.checked_sub(1).map_or(0, |before| self.running()[before]);
        ByteCount::of(bytes) == self.piece(number).count()
            && crc32c::crc32c_append(before, bytes) == self.running()[number]
    }
}

/// Whether it is damage; any other error goes on.
fn damage_of<T>(result: Result<T, SegmentError>) -> Result<bool, SegmentError> {
    match result {
        Ok(_) => Ok(false),
        Err(SegmentError::Damaged { .. }) => Ok(true),
        Err(
            error @ (SegmentError::UnknownVersion { .. }
            | SegmentError::Full { .. }
            | SegmentError::Io { .. }
            | SegmentError::Poisoned),
        ) => Err(error),
    }
}
