//! Replies out.
//!
//! The bytes of a read are never copied here: the encoder writes the header, the driver sends the
//! data right after it.
//!
//! Invariants: every request gets exactly one reply, in the framing the handshake settled: all
//! in chunks with extended headers; with structured replies READ, BLOCK_STATUS and errors that have a text in chunks, the
//! others simple; one chunk of content where the client asked for no more. ENOTSUP answers nothing but a WRITE_ZEROES that had to be fast.

use backtide_units::{ByteCount, ByteOffset};
use bytes::{BufMut, BytesMut};

use super::handshake::{Contexts, Session};
use super::option::{BASE_ALLOCATION_ID, DIRTY_BITMAP_ID, cut};
use crate::wire::{self, base_allocation, chunk, dirty_bitmap, magic};
use crate::{Cookie, DirtyExtent, Extent, NbdError, ReplyStyle};

/// The most extents in one answer; the client asks again for the rest.
const EXTENTS_MAX: usize = 16 << 10;

/// Long reads are looked through for zeroes in pieces of so many bytes.
const ZERO_PIECE: usize = 64 << 10;

/// So many bytes of a piece are looked at one by one.
const FIRST_BYTES: usize = 64;

/// A part of the bytes of a READ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReadPart {
    /// Where in these bytes it begins.
    pub start: usize,
    /// How many they are.
    pub length: usize,
    /// Whether it is all zeroes, which need not be sent.
    pub zero: bool,
}

/// Which request a reply belongs to, and what it has to look like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReplyTo {
    pub(super) cookie: Cookie,
    pub(super) offset: ByteOffset,
    pub(super) shape: Shape,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shape {
    /// Success or error, nothing else.
    Plain,
    /// The same, of a WRITE_ZEROES that may fail for being slow.
    FastZero,
    /// The bytes of a READ, in one chunk if that was asked for.
    Read { length: ByteCount, one_chunk: bool },
    /// The extents of a BLOCK_STATUS.
    Status { length: ByteCount, one: bool, contexts: Contexts },
}

impl ReplyTo {
    /// The request's cookie.
    pub fn cookie(self) -> Cookie {
        self.cookie
    }

    /// How many bytes of data the answer has to bring: those of a READ.
    pub fn data_length(self) -> ByteCount {
        match self.shape {
            Shape::Read { length, .. } => length,
            Shape::Plain | Shape::FastZero | Shape::Status { .. } => ByteCount::ZERO,
        }
    }
}

/// Encodes the replies of one connection.
#[derive(Clone, Copy, Debug)]
pub struct ReplyEncoder {
    style: ReplyStyle,
    /// Extents are multiples of this many bytes.
    block: u64,
}

impl ReplyEncoder {
    /// For the transmission phase of `session`.
    pub fn new(session: &Session) -> Self {
        Self { style: session.style, block: u64::from(session.export.block_sizes.minimum) }
    }

    /// Success of a request that asks for no data.
    ///
    /// # Panics
    /// When the request was a READ of some bytes, or a BLOCK_STATUS.
    pub fn done(&self, to: ReplyTo, out: &mut BytesMut) {
        match to.shape {
            Shape::Plain | Shape::FastZero => {}
            Shape::Read { .. } | Shape::Status { .. } => {
                panic!("a read or block status was answered without its data")
            }
        }
        match self.style {
            ReplyStyle::Simple | ReplyStyle::Structured => put_simple(out, to.cookie, 0),
            ReplyStyle::Extended => self.put_chunk(out, to, chunk::NONE, 0),
        }
    }

    /// The header of a READ's data; the data itself has to follow.
    ///
    /// # Panics
    /// When the request was no READ of that length.
    pub fn read_header(&self, to: ReplyTo, data_length: ByteCount, out: &mut BytesMut) {
        self.assert_read(to, data_length);
        let length = data_length;
        match self.style {
            ReplyStyle::Simple => put_simple(out, to.cookie, 0),
            ReplyStyle::Structured | ReplyStyle::Extended if length.0 == 0 => {
                self.put_chunk(out, to, chunk::NONE, 0);
            }
            ReplyStyle::Structured | ReplyStyle::Extended => {
                // Reads are no longer than the largest payload.
                self.put_chunk(out, to, chunk::OFFSET_DATA, 8 + length.0 as u32);
                out.put_u64(to.offset.0);
            }
        }
    }

    /// The parts in which the bytes of a READ are sent, in order, each with [`part`](Self::part); none where they are sent as
    /// they are, behind a [`read_header`](Self::read_header). Stretches of zeroes are told where the framing has a word for
    /// it and the client takes several chunks, or all of it is zeroes.
    ///
    /// # Panics
    /// As `read_header`.
    pub fn parts(&self, to: ReplyTo, data: &[u8]) -> Option<Vec<ReadPart>> {
        let one_chunk = self.assert_read(to, ByteCount(data.len() as u64));
        if self.style == ReplyStyle::Simple || data.is_empty() {
            return None;
        }
        if is_zero(data) {
            return Some(vec![ReadPart { start: 0, length: data.len(), zero: true }]);
        }
        if one_chunk || data.len() < 2 * ZERO_PIECE {
            return None;
        }
        let mut parts: Vec<ReadPart> = Vec::new();
        for piece in data.chunks(ZERO_PIECE) {
            let zero = is_zero(piece);
            match parts.last_mut() {
                Some(last) if last.zero == zero => last.length += piece.len(),
                Some(_) | None => {
                    let start = parts.last().map_or(0, |last| last.start + last.length);
                    parts.push(ReadPart { start, length: piece.len(), zero });
                }
            }
        }
        (parts.len() > 1).then_some(parts)
    }

    /// The chunk of one part of a READ; the bytes of data have to follow. `last`: it is the reply's last.
    pub fn part(&self, to: ReplyTo, part: ReadPart, last: bool, out: &mut BytesMut) {
        // Reads are no longer than the largest payload.
        let length = part.length as u32;
        let (kind, payload) =
            if part.zero { (chunk::OFFSET_HOLE, 12) } else { (chunk::OFFSET_DATA, 8 + length) };
        self.put_one_chunk(out, to, kind, payload, last);
        out.put_u64(to.offset.0 + part.start as u64);
        if part.zero {
            out.put_u32(length);
        }
    }

    /// Whether the READ is to be answered in one chunk.
    fn assert_read(&self, to: ReplyTo, data_length: ByteCount) -> bool {
        let Shape::Read { length, one_chunk } = to.shape else {
            panic!("a request that is no read was answered with data");
        };
        assert!(length == data_length, "a read of {length} bytes was answered with {data_length}");
        one_chunk
    }

    /// The extents of a BLOCK_STATUS, from its offset on. What lies beyond the request is cut,
    /// empty extents are left out, equal neighbors are joined.
    ///
    /// # Panics
    /// When the request was no BLOCK_STATUS, or the extents are no bytes at all.
    pub fn extents(&self, to: ReplyTo, extents: &[Extent], out: &mut BytesMut) {
        let contexts = self.status_of(to).2;
        assert!(!contexts.dirty_bitmap, "a block status was answered without its dirty bitmap");
        self.statuses(to, extents, &[], out);
    }

    /// The same of a BLOCK_STATUS that may ask for the dirty bitmap, too, or for it alone: a chunk for each
    /// context that it asks for.
    ///
    /// # Panics
    /// As [`ReplyEncoder::extents`], of each context that is asked for.
    pub fn statuses(&self, to: ReplyTo, extents: &[Extent], dirty: &[DirtyExtent], out: &mut BytesMut) {
        let (length, one, contexts) = self.status_of(to);
        let most = if one { 1 } else { EXTENTS_MAX };
        if contexts.base_allocation {
            let flags = |extent: &Extent| {
                let hole = if extent.hole { base_allocation::HOLE } else { 0 };
                (extent.length.0, hole | if extent.zero { base_allocation::ZERO } else { 0 })
            };
            let all = Both { of_both: |a, b| a & b, unknown: 0 };
            let joined = Joined::of(extents.iter().map(flags), length, most, self.block, all);
            self.put_extents(out, to, BASE_ALLOCATION_ID, joined, !contexts.dirty_bitmap);
        }
        if contexts.dirty_bitmap {
            let flags =
                |extent: &DirtyExtent| (extent.length.0, if extent.dirty { dirty_bitmap::DIRTY } else { 0 });
            let any = Both { of_both: |a, b| a | b, unknown: dirty_bitmap::DIRTY };
            let joined = Joined::of(dirty.iter().map(flags), length, most, self.block, any);
            self.put_extents(out, to, DIRTY_BITMAP_ID, joined, true);
        }
    }

    fn status_of(&self, to: ReplyTo) -> (ByteCount, bool, Contexts) {
        match to.shape {
            Shape::Status { length, one, contexts } => (length, one, contexts),
            Shape::Plain | Shape::FastZero | Shape::Read { .. } => {
                panic!("a request that is no block status was answered with extents")
            }
        }
    }

    fn put_extents(&self, out: &mut BytesMut, to: ReplyTo, id: u32, joined: Vec<(u64, u32)>, last: bool) {
        assert!(!joined.is_empty(), "a block status was answered with no extents");
        let count = joined.len() as u32;
        if self.style == ReplyStyle::Extended {
            self.put_one_chunk(out, to, chunk::BLOCK_STATUS_EXT, 4 + 4 + 16 * count, last);
            out.put_u32(id);
            out.put_u32(count);
            for (length, flags) in joined {
                out.put_u64(length);
                out.put_u64(u64::from(flags));
            }
            return;
        }
        self.put_one_chunk(out, to, chunk::BLOCK_STATUS, 4 + 8 * count, last);
        out.put_u32(id);
        for (length, flags) in joined {
            // No longer than the request, whose length had 32 bits.
            out.put_u32(length as u32);
            out.put_u32(flags);
        }
    }

    /// A failed request, with a sentence for people where the framing has room for one.
    pub fn error(&self, to: ReplyTo, error: NbdError, text: &str, out: &mut BytesMut) {
        let (wants_chunks, error) = match to.shape {
            Shape::FastZero => (false, fast_zero_error(error)),
            Shape::Plain => (false, other_error(error)),
            Shape::Read { .. } | Shape::Status { .. } => (true, other_error(error)),
        };
        let chunks = match self.style {
            ReplyStyle::Simple => false,
            // A simple reply would do for the others, and has no room for the text.
            ReplyStyle::Structured => wants_chunks || !text.is_empty(),
            ReplyStyle::Extended => true,
        };
        if !chunks {
            return put_simple(out, to.cookie, error.code());
        }
        let text = cut(text);
        self.put_chunk(out, to, chunk::ERROR, 4 + 2 + text.len() as u32);
        out.put_u32(error.code());
        out.put_u16(text.len() as u16);
        out.put_slice(text);
    }

    /// The header of a reply's only chunk.
    fn put_chunk(&self, out: &mut BytesMut, to: ReplyTo, kind: u16, length: u32) {
        self.put_one_chunk(out, to, kind, length, true);
    }

    /// The header of one of a reply's chunks.
    fn put_one_chunk(&self, out: &mut BytesMut, to: ReplyTo, kind: u16, length: u32, last: bool) {
        let flags = if last { chunk::FLAG_DONE } else { 0 };
        match self.style {
            ReplyStyle::Simple => unreachable!("chunks were not negotiated"),
            ReplyStyle::Structured => {
                out.put_u32(magic::STRUCTURED_REPLY);
                out.put_u16(flags);
                out.put_u16(kind);
                out.put_u64(to.cookie.0);
                out.put_u32(length);
            }
            ReplyStyle::Extended => {
                let mut header = [0; wire::EXTENDED_HEADER];
                header[..4].copy_from_slice(&magic::EXTENDED_REPLY.to_be_bytes());
                header[4..6].copy_from_slice(&flags.to_be_bytes());
                header[6..8].copy_from_slice(&kind.to_be_bytes());
                header[8..16].copy_from_slice(&to.cookie.0.to_be_bytes());
                header[16..24].copy_from_slice(&to.offset.0.to_be_bytes());
                header[24..].copy_from_slice(&u64::from(length).to_be_bytes());
                out.put_slice(&header);
            }
        }
    }
}

/// Whether all bytes are zero. Of others mostly the first few are looked at.
fn is_zero(bytes: &[u8]) -> bool {
    let (first, rest) = bytes.split_at(bytes.len().min(FIRST_BYTES));
    // Each byte of the rest is what was so many before it.
    first.iter().all(|byte| *byte == 0) && rest == &bytes[..rest.len()]
}

/// What a WRITE_ZEROES that had to be fast may fail with: its length is no reason.
fn fast_zero_error(error: NbdError) -> NbdError {
    if error == NbdError::Overflow { NbdError::NotSupported } else { error }
}

/// What anything else may fail with: not being supported is what was not offered.
fn other_error(error: NbdError) -> NbdError {
    if error == NbdError::NotSupported { NbdError::Invalid } else { error }
}

/// The extents of one answer: lengths and wire flags, in whole blocks but for the request's end.
struct Joined {
    extents: Vec<(u64, u32)>,
    most: usize,
    both: Both,
}

/// What is said of a block of which a part is so and a part otherwise.
#[derive(Clone, Copy)]
struct Both {
    of_both: fn(u32, u32) -> u32,
    /// Of a block of which a part is not known.
    unknown: u32,
}

impl Joined {
    /// At most `most` extents covering at most `length` bytes, in blocks of `block` bytes.
    fn of(
        extents: impl Iterator<Item = (u64, u32)>,
        length: ByteCount,
        most: usize,
        block: u64,
        both: Both,
    ) -> Vec<(u64, u32)> {
        let mut joined = Self { extents: Vec::new(), most, both };
        // None is no failure: there is no room for more.
        let _ = joined.gather(extents, length.0, block);
        joined.extents
    }

    fn gather(&mut self, extents: impl Iterator<Item = (u64, u32)>, length: u64, block: u64) -> Option<()> {
        let mut left = length;
        // Bytes of a block that is not whole yet, and what is true of all of them.
        let (mut partial, mut common) = (0, 0);
        for (length, flags) in extents {
            let mut take = length.min(left);
            left -= take;
            if partial > 0 {
                let fill = take.min(block - partial);
                (partial, common, take) = (partial + fill, (self.both.of_both)(common, flags), take - fill);
                if partial < block {
                    continue;
                }
                self.push(partial, common)?;
            }
            (partial, common) = (take % block, flags);
            self.push(take - partial, flags)?;
        }
        if left == 0 {
            self.push(partial, common)
        } else if self.extents.is_empty() && partial > 0 {
            // Nothing is known of the rest of the block.
            self.push(block.min(partial + left), self.both.unknown)
        } else {
            Some(())
        }
    }

    /// Appends an extent if it is one. `None` when there is no room.
    fn push(&mut self, length: u64, flags: u32) -> Option<()> {
        if length == 0 {
            return Some(());
        }
        let full = self.extents.len() == self.most;
        match self.extents.last_mut() {
            Some((last, same)) if *same == flags => *last += length,
            Some(_) | None if full => return None,
            Some(_) | None => self.extents.push((length, flags)),
        }
        Some(())
    }
}

fn put_simple(out: &mut BytesMut, cookie: Cookie, error: u32) {
    out.put_u32(magic::SIMPLE_REPLY);
    out.put_u32(error);
    out.put_u64(cookie.0);
}
