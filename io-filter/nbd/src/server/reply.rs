//! Replies out.
//!
//! The bytes of a read are never copied here: the encoder writes the header, the driver sends the
//! data right after it.
//!
//! Invariant: every request gets exactly one reply, in the framing the handshake settled: READ
//! and BLOCK_STATUS in chunks where structured replies were negotiated, the others simple.

use backtide_units::{ByteCount, ByteOffset};
use bytes::{BufMut, BytesMut};

use super::option::{BASE_ALLOCATION_ID, cut};
use crate::wire::{base_allocation, chunk, magic};
use crate::{Cookie, Extent, NbdError, ReplyStyle};

/// The most extents in one answer; the client asks again for the rest.
const EXTENTS_MAX: usize = 16 << 10;

/// Which request a reply belongs to, and what it has to look like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReplyTo {
    pub(super) cookie: Cookie,
    pub(super) shape: Shape,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shape {
    /// Success or error, nothing else.
    Plain,
    /// The bytes of a READ.
    Read { offset: ByteOffset, length: u32 },
    /// The extents of a BLOCK_STATUS.
    Status { length: u32, one: bool },
}

impl ReplyTo {
    /// The request's cookie.
    pub fn cookie(self) -> Cookie {
        self.cookie
    }

    /// How many bytes of data the answer has to bring: those of a READ.
    pub fn data_length(self) -> ByteCount {
        match self.shape {
            Shape::Read { length, .. } => ByteCount(u64::from(length)),
            Shape::Plain | Shape::Status { .. } => ByteCount::ZERO,
        }
    }
}

/// Encodes the replies of one connection.
#[derive(Clone, Copy, Debug)]
pub struct ReplyEncoder {
    style: ReplyStyle,
}

impl ReplyEncoder {
    /// For connections with replies of `style`.
    pub fn new(style: ReplyStyle) -> Self {
        Self { style }
    }

    /// Success of a request that asks for no data.
    ///
    /// # Panics
    /// When the request was a READ of some bytes, or a BLOCK_STATUS.
    pub fn done(&self, to: ReplyTo, out: &mut BytesMut) {
        match to.shape {
            Shape::Plain => put_simple(out, to.cookie, 0),
            Shape::Read { .. } | Shape::Status { .. } => {
                panic!("a read or block status was answered without its data")
            }
        }
    }

    /// The header of a READ's data; the data itself has to follow.
    ///
    /// # Panics
    /// When the request was no READ of that length.
    pub fn read_header(&self, to: ReplyTo, data_length: ByteCount, out: &mut BytesMut) {
        let Shape::Read { offset, length } = to.shape else {
            panic!("a request that is no read was answered with data");
        };
        assert!(
            u64::from(length) == data_length.0,
            "a read of {length} bytes was answered with {data_length}"
        );
        match self.style {
            ReplyStyle::Simple => put_simple(out, to.cookie, 0),
            ReplyStyle::Structured if length == 0 => {
                put_chunk(out, to.cookie, chunk::NONE, 0);
            }
            ReplyStyle::Structured => {
                put_chunk(out, to.cookie, chunk::OFFSET_DATA, 8 + length);
                out.put_u64(offset.0);
            }
        }
    }

    /// The extents of a BLOCK_STATUS, from its offset on. What lies beyond the request is cut,
    /// empty extents are left out, equal neighbors are joined.
    ///
    /// # Panics
    /// When the request was no BLOCK_STATUS, or the extents are no bytes at all.
    pub fn extents(&self, to: ReplyTo, extents: &[Extent], out: &mut BytesMut) {
        let Shape::Status { length, one } = to.shape else {
            panic!("a request that is no block status was answered with extents");
        };
        let joined = joined(extents, length, if one { 1 } else { EXTENTS_MAX });
        assert!(!joined.is_empty(), "a block status was answered with no extents");
        put_chunk(out, to.cookie, chunk::BLOCK_STATUS, 4 + 8 * joined.len() as u32);
        out.put_u32(BASE_ALLOCATION_ID);
        for (length, flags) in joined {
            out.put_u32(length);
            out.put_u32(flags);
        }
    }

    /// A failed request, with a sentence for people where the framing has room for one.
    pub fn error(&self, to: ReplyTo, error: NbdError, text: &str, out: &mut BytesMut) {
        let chunks = match (self.style, to.shape) {
            (ReplyStyle::Simple, _) | (ReplyStyle::Structured, Shape::Plain) => false,
            (ReplyStyle::Structured, Shape::Read { .. } | Shape::Status { .. }) => true,
        };
        if !chunks {
            return put_simple(out, to.cookie, error.code());
        }
        let text = cut(text);
        put_chunk(out, to.cookie, chunk::ERROR, 4 + 2 + text.len() as u32);
        out.put_u32(error.code());
        out.put_u16(text.len() as u16);
        out.put_slice(text);
    }
}

/// Lengths and wire flags of at most `most` extents covering at most `length` bytes.
fn joined(extents: &[Extent], length: u32, most: usize) -> Vec<(u32, u32)> {
    let mut joined: Vec<(u32, u32)> = Vec::new();
    let mut left = length;
    for extent in extents {
        // What fits a u32 and what is left of the request is the smaller of both.
        let take = u32::try_from(extent.length.0).unwrap_or(u32::MAX).min(left);
        if take == 0 {
            continue;
        }
        let hole = if extent.hole { base_allocation::HOLE } else { 0 };
        let flags = hole | if extent.zero { base_allocation::ZERO } else { 0 };
        let full = joined.len() == most;
        match joined.last_mut() {
            Some((length, same)) if *same == flags => *length += take,
            Some(_) | None if full => break,
            Some(_) | None => joined.push((take, flags)),
        }
        left -= take;
    }
    joined
}

fn put_simple(out: &mut BytesMut, cookie: Cookie, error: u32) {
    out.put_u32(magic::SIMPLE_REPLY);
    out.put_u32(error);
    out.put_u64(cookie.0);
}

/// A chunk's header; every reply of ours is one chunk, so each is the last.
fn put_chunk(out: &mut BytesMut, cookie: Cookie, kind: u16, length: u32) {
    out.put_u32(magic::STRUCTURED_REPLY);
    out.put_u16(chunk::FLAG_DONE);
    out.put_u16(kind);
    out.put_u64(cookie.0);
    out.put_u32(length);
}
