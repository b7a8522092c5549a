//! The body of a batch: where the payloads of its entries are, compressed together.
//!
//! Headers stand in the clear, each with a checksum of its own, so that a damaged frame or table costs the payloads of one batch
//! and never the log; nor does a damaged header of a body, where the batch's end can be found ([`crate::lost_body`]). What is read of a body is checked three times: the stored bytes by their own checksum before anything is
//! decompressed, what comes out by the body's, and an entry's part of it by the checksum from its capture.

use std::{fmt, ops::Range, sync::Arc};

use backtide_units::{ByteOffset, PayloadChecksum};
use bytes::{Buf, BufMut, Bytes, BytesMut};

use crate::{
    ENTRY_HEADER_LENGTH, EntryHeader, PAYLOAD_MAX, SegmentError, SegmentFile, SegmentHeader, SegmentId, Seq,
    compress::Method, entry_header::ALIGNMENT,
};

/// The most entries in a batch.
pub(crate) const BATCH_ENTRIES_MAX: u16 = 256;

/// What is compressed at once: no read of a few bytes decompresses more.
pub(crate) const FRAME: u64 = PayloadChecksum::PIECE.0;

/// Tells a body's header from an entry's.
const BODY_KIND: u8 = 10;

const START_LENGTH: usize = 4;
const FRAME_LENGTH: usize = 12;

/// The body of a batch, its header and table checked.
#[derive(Clone, Debug)]
pub struct Body(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    at: u64,
    header: BodyHeader,
    starts: Vec<u32>,
    frames: Vec<FrameRecord>,
}

/// What stands before the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BodyHeader {
    pub(crate) method: Method,
    /// How many headers stand before the body.
    pub(crate) entries: u16,
    pub(crate) first_seq: Seq,
    /// Of all payloads.
    pub(crate) bytes: u32,
    /// Of all frames, as stored.
    pub(crate) stored: u32,
    table_crc: u32,
}

/// A frame in the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FrameRecord {
    /// Where it ends among the stored bytes.
    pub(crate) end: u32,
    /// CRC32C of its stored bytes.
    pub(crate) crc: u32,
    /// CRC32C of all payload bytes up to its end.
    pub(crate) running: u32,
}

/// Bytes of the table of so many entries with so many bytes of payload.
fn table_length(entries: u16, bytes: u32) -> usize {
    usize::from(entries) * START_LENGTH + frames_in(bytes) * FRAME_LENGTH
}

fn frames_in(bytes: u32) -> usize {
    u64::from(bytes).div_ceil(FRAME) as usize
}

/// The most that a body takes.
pub(crate) fn body_length_max(entries: u16, bytes: u32) -> u64 {
    let table = table_length(entries, bytes) as u64;
    (ENTRY_HEADER_LENGTH as u64 + table + u64::from(bytes)).next_multiple_of(ALIGNMENT)
}

/// Header and table of a body.
pub(crate) fn encode_body(
    (salt, segment): (u32, SegmentId),
    (method, first_seq, bytes): (Method, Seq, u32),
    starts: &[u32],
    frames: &[FrameRecord],
) -> Bytes {
    let entries = starts.len() as u16;
    let table_bytes = table_length(entries, bytes);
    let mut table = BytesMut::with_capacity(table_bytes);
    starts.iter().for_each(|start| table.put_u32_le(*start));
    for frame in frames {
        table.put_u32_le(frame.end);
        table.put_u32_le(frame.crc);
        table.put_u32_le(frame.running);
    }
    assert_eq!(table.len(), table_bytes, "a start for each entry, a record for each frame");
    let mut header = [0; ENTRY_HEADER_LENGTH];
    let mut out = &mut header[4..];
    out.put_u8(BODY_KIND);
    out.put_u8(method as u8);
    out.put_u16_le(entries);
    out.put_u64_le(first_seq.0);
    out.put_u32_le(bytes);
    out.put_u32_le(frames.last().map_or(0, |frame| frame.end));
    out.put_u32_le(crc32c::crc32c(&table));
    header[56..60].copy_from_slice(&segment.0.to_le_bytes());
    let crc = crc32c::crc32c_append(salt, &header[4..]);
    header[..4].copy_from_slice(&crc.to_le_bytes());
    [&header[..], &table].concat().into()
}

impl BodyHeader {
    /// `None` when it is not what was written.
    pub(crate) fn decode(bytes: &[u8; ENTRY_HEADER_LENGTH], salt: u32, segment: SegmentId) -> Option<Self> {
        let mut input = &bytes[..];
        let sound = input.get_u32_le() == crc32c::crc32c_append(salt, &bytes[4..])
            && input.get_u8() == BODY_KIND
            && bytes[56..60] == segment.0.to_le_bytes();
        if !sound {
            return None;
        }
        let header = Self {
            method: Method::from_number(input.get_u8())?,
            entries: input.get_u16_le(),
            first_seq: Seq(input.get_u64_le()),
            bytes: input.get_u32_le(),
            stored: input.get_u32_le(),
            table_crc: input.get_u32_le(),
        };
        header.fits().then_some(header)
    }

    fn fits(&self) -> bool {
        let frames = frames_in(self.bytes);
        (1..=BATCH_ENTRIES_MAX).contains(&self.entries)
            && (1..=PAYLOAD_MAX.0).contains(&self.bytes.into())
            && (frames as u32..=self.bytes).contains(&self.stored)
            && (frames == 1 || self.entries == 1)
    }

    /// Bytes between the header and the frames.
    pub(crate) fn table_length(&self) -> usize {
        table_length(self.entries, self.bytes)
    }

    /// Bytes that the body takes in the file, padding included.
    pub(crate) fn stored_length(&self) -> u64 {
        let parts = ENTRY_HEADER_LENGTH as u64 + self.table_length() as u64 + u64::from(self.stored);
        parts.next_multiple_of(ALIGNMENT)
    }

    /// `None` when the table is not what was written.
    pub(crate) fn with_table(self, at: u64, mut table: &[u8]) -> Option<Body> {
        if table.len() != self.table_length() || crc32c::crc32c(table) != self.table_crc {
            return None;
        }
        let starts: Vec<u32> = (0..self.entries).map(|_| table.get_u32_le()).collect();
        let record = |table: &mut &[u8]| FrameRecord {
            end: table.get_u32_le(),
            crc: table.get_u32_le(),
            running: table.get_u32_le(),
        };
        let frames: Vec<_> = (0..frames_in(self.bytes)).map(|_| record(&mut table)).collect();
        let body = Inner { at, header: self, starts, frames };
        body.is_sound().then(|| Body(Arc::new(body)))
    }
}

impl fmt::Display for BodyHeader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { method, entries, bytes, stored, .. } = self;
        write!(f, "{entries} entries, {bytes} bytes in {stored} by {}", method.name())
    }
}

impl Inner {
    fn is_sound(&self) -> bool {
        let frames = (0..self.frames.len()).all(|number| {
            let (stored, bytes) = (self.stored_of(number), self.bytes_of(number));
            stored.start < stored.end && stored.end - stored.start <= bytes.end - bytes.start
        });
        frames
            && self.frames.last().is_some_and(|frame| frame.end == self.header.stored)
            && self.starts[0] == 0
            && self.starts.is_sorted()
            && self.starts.iter().all(|start| *start <= self.header.bytes)
    }

    /// Where a frame is among the stored bytes.
    fn stored_of(&self, number: usize) -> Range<u64> {
        let start = number.checked_sub(1).map_or(0, |before| self.frames[before].end);
        start.into()..self.frames[number].end.into()
    }

    /// Which of the payload bytes it holds.
    fn bytes_of(&self, number: usize) -> Range<u64> {
        let start = number as u64 * FRAME;
        start..(start + FRAME).min(self.header.bytes.into())
    }
}

impl Body {
    /// Where it stands: behind the last header of its batch.
    pub fn at(&self) -> ByteOffset {
        ByteOffset(self.0.at)
    }

    pub(crate) fn header(&self) -> &BodyHeader {
        &self.0.header
    }

    /// How many frames it has.
    pub fn count(&self) -> usize {
        self.0.frames.len()
    }

    /// About what it takes of memory, in bytes.
    pub fn weight(&self) -> usize {
        size_of::<Inner>() + self.0.header.table_length()
    }

    /// CRC32C of the payload bytes up to the end of each frame.
    pub(crate) fn running(&self) -> Arc<[u32]> {
        self.0.frames.iter().map(|frame| frame.running).collect()
    }

    /// Where the first header of the batch stands.
    pub(crate) fn first_header_at(&self) -> u64 {
        self.0.at - u64::from(self.0.header.entries) * ENTRY_HEADER_LENGTH as u64
    }

    /// Where the payload of an entry of this batch lies among the bytes of all; `None` when it does not.
    pub(crate) fn payload_of(&self, header: &EntryHeader) -> Option<Range<u64>> {
        let nth = header.seq.0.checked_sub(self.0.header.first_seq.0)?;
        let start = u64::from(*self.0.starts.get(usize::try_from(nth).ok()?)?);
        let end = start + u64::from(header.payload_length);
        let on = u64::from(self.0.header.entries) - nth;
        (header.body_ahead() == Some(on as u16) && end <= self.0.header.bytes.into()).then_some(start..end)
    }

    /// Where a frame stands in the file.
    pub(crate) fn frame_at(&self, number: usize) -> Range<u64> {
        let frames = self.0.at + (ENTRY_HEADER_LENGTH + self.0.header.table_length()) as u64;
        let Range { start, end } = self.0.stored_of(number);
        frames + start..frames + end
    }

    /// What a frame holds, from its stored bytes; what is wrong with them otherwise.
    pub(crate) fn unpack(&self, number: usize, stored: &[u8]) -> Result<Bytes, &'static str> {
        let (frame, bytes) = (self.0.frames[number], self.0.bytes_of(number));
        if crc32c::crc32c(stored) != frame.crc {
            return Err("its stored bytes are not what was written");
        }
        let length = (bytes.end - bytes.start) as usize;
        let content = if stored.len() == length {
            Bytes::copy_from_slice(stored)
        } else {
            let unpacked = self.0.header.method.decompress(stored, length);
            unpacked.ok_or("it cannot be decompressed")?.into()
        };
        let before = number.checked_sub(1).map_or(0, |before| self.0.frames[before].running);
        if crc32c::crc32c_append(before, &content) != frame.running {
            return Err("what is compressed in it is not what was written");
        }
        Ok(content)
    }
}

impl Body {
    /// Its header, as it is in a segment of a log.
    pub(crate) fn encode_header(&self, segment: &SegmentHeader) -> Bytes {
        let Inner { header, starts, frames, .. } = &*self.0;
        let facts = (header.method, header.first_seq, header.bytes);
        encode_body((segment.salt(), segment.id), facts, starts, frames).slice(..ENTRY_HEADER_LENGTH)
    }

    /// The stored bytes of a frame, made again of what it holds; `None` when they are others than were written.
    pub(crate) fn pack(&self, number: usize, content: &Bytes) -> Option<Bytes> {
        let (stored, bytes) = (self.0.stored_of(number), self.0.bytes_of(number));
        let raw = stored.end - stored.start == bytes.end - bytes.start;
        let packed = if raw { Some(content.clone()) } else { self.0.header.method.compress(content) };
        packed.filter(|packed| {
            packed.len() as u64 == stored.end - stored.start
                && crc32c::crc32c(packed) == self.0.frames[number].crc
        })
    }
}

/// What the headers of a batch say of its body.
pub(crate) struct Expected {
    first_seq: Seq,
    starts: Vec<u32>,
    bytes: u32,
}

impl Expected {
    /// `None` when no batch has such headers.
    pub(crate) fn of(headers: &[EntryHeader]) -> Option<Self> {
        let (mut starts, mut bytes) = (Vec::with_capacity(headers.len()), 0_u32);
        for header in headers {
            starts.push(bytes);
            bytes = bytes.checked_add(header.payload_length)?;
        }
        Some(Self { first_seq: headers.first()?.seq, starts, bytes }).filter(|expected| {
            (1..=PAYLOAD_MAX.0).contains(&expected.bytes.into())
                && (frames_in(expected.bytes) == 1 || expected.starts.len() == 1)
        })
    }

    fn entries(&self) -> u16 {
        self.starts.len() as u16
    }

    /// The number of the entry behind the batch.
    pub(crate) fn next_seq(&self) -> Seq {
        Seq(self.first_seq.0 + self.starts.len() as u64)
    }

    pub(crate) fn table_length(&self) -> usize {
        table_length(self.entries(), self.bytes)
    }

    /// The most that the body takes.
    pub(crate) fn length_max(&self) -> u64 {
        body_length_max(self.entries(), self.bytes)
    }

    /// The body that has this table, whatever its header says; `None` when the table is not one of these entries.
    pub(crate) fn body(&self, method: Method, at: u64, table: &[u8]) -> Option<Body> {
        let stored = table.get(table.len().checked_sub(FRAME_LENGTH)?..)?.get_u32_le();
        let table_crc = crc32c::crc32c(table);
        let (entries, first_seq, bytes) = (self.entries(), self.first_seq, self.bytes);
        let header = BodyHeader { method, entries, first_seq, bytes, stored, table_crc };
        let body = Some(header).filter(BodyHeader::fits)?.with_table(at, table)?;
        Some(body).filter(|body| body.0.starts == self.starts)
    }
}

/// Where the body of the batch is that the entry at `position` is in, if it is in one.
pub(crate) fn body_at(header: &EntryHeader, position: u64) -> Option<u64> {
    header.body_ahead().map(|on| position + u64::from(on) * ENTRY_HEADER_LENGTH as u64)
}

impl SegmentFile {
    /// The body of the batch that the entry at `position` is in.
    pub(crate) fn body_of(
        &self,
        segment: &SegmentHeader,
        header: &EntryHeader,
        position: u64,
    ) -> Result<Body, SegmentError> {
        let at = body_at(header, position).expect("an entry in a batch");
        let mut bytes = [0; ENTRY_HEADER_LENGTH];
        self.read_exact(at, &mut bytes)?;
        let body = BodyHeader::decode(&bytes, segment.salt(), segment.id)
            .ok_or_else(|| self.damaged(at, "expected the body of a batch".to_owned()))?;
        let mut table = vec![0; body.table_length()];
        self.read_exact(at + ENTRY_HEADER_LENGTH as u64, &mut table)?;
        let wrong = || self.damaged(at, "the table of a batch's body is damaged".to_owned());
        body.with_table(at, &table).ok_or_else(wrong)
    }

    /// The bytes of all payloads that a frame holds, checked.
    ///
    /// # Errors
    /// [`SegmentError::Damaged`] when they are not what was written.
    ///
    /// # Panics
    /// When there is no such frame.
    pub fn frame(&self, body: &Body, number: usize) -> Result<Bytes, SegmentError> {
        let Range { start, end } = body.frame_at(number);
        let mut stored = vec![0; (end - start) as usize];
        self.read_exact(start, &mut stored)?;
        body.unpack(number, &stored).map_err(|what| {
            let first = body.header().first_seq;
            self.damaged(
                start,
                format!("frame {number} of the batch from entry {first} on is damaged: {what}"),
            )
        })
    }
}
