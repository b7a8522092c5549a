//! How a chunk's content is stored: compressed where that pays.

use std::borrow::Cow;

use crate::{
    ImageError,
    chunk::{ChunkHeader, ChunkRef, Kind},
    error::failed,
};

/// Compression that pays on any processor.
const ZSTD_LEVEL: i32 = 1;

/// Makes the bytes of chunks.
pub(crate) struct Encoder(zstd::bulk::Compressor<'static>);

impl Encoder {
    /// # Errors
    /// When there is no memory for it.
    pub(crate) fn new() -> Result<Self, ImageError> {
        let compressor = zstd::bulk::Compressor::new(ZSTD_LEVEL);
        let compressor =
            compressor.map_err(|source| failed("start the compression of images".to_owned(), source))?;
        Ok(Self(compressor))
    }

    /// The header of the chunk `name`, and what is stored behind it.
    pub(crate) fn encode<'a>(
        &mut self,
        kind: Kind,
        name: ChunkRef,
        content: &'a [u8],
    ) -> (ChunkHeader, Cow<'a, [u8]>) {
        let compressed = self.0.compress(content).ok();
        // An eighth less is worth the time that each read then takes.
        let compressed = compressed.filter(|short| short.len() <= content.len() / 8 * 7);
        let is_compressed = compressed.is_some();
        let stored = compressed.map_or(Cow::Borrowed(content), Cow::Owned);
        let header = ChunkHeader {
            kind,
            compressed: is_compressed,
            name,
            stored_length: stored.len() as u32,
            length: content.len() as u32,
            crc: crc32c::crc32c(&stored),
        };
        (header, stored)
    }
}
