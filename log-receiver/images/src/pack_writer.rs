//! Writing a pack: chunk by chunk, then its table and trailer, then a sync.

use std::{path::PathBuf, sync::Arc};

use backtide_storage::StorageFile;
use backtide_units::{ByteCount, ByteOffset};

use crate::{
    ImageError,
    chunk::{ChunkHeader, whole_length},
    error::failed,
    pack::{Line, PACK_HEADER_LENGTH, encode_footer, encode_header},
};

/// Bytes that are written at once.
const BUFFER_BYTES: usize = 1 << 20;

/// A pack that is written.
pub(crate) struct PackWriter {
    file: Arc<dyn StorageFile>,
    name: PathBuf,
    number: u32,
    lines: Vec<Line>,
    buffer: Vec<u8>,
    /// Where the buffer goes.
    written: u64,
}

impl PackWriter {
    pub(crate) fn new(file: Arc<dyn StorageFile>, name: PathBuf, number: u32) -> Self {
        let buffer = encode_header(number).to_vec();
        debug_assert_eq!(buffer.len(), PACK_HEADER_LENGTH);
        Self { file, name, number, lines: Vec::new(), buffer, written: 0 }
    }

    pub(crate) fn number(&self) -> u32 {
        self.number
    }

    /// Whether it has no chunk yet.
    pub(crate) fn is_empty(&self) -> bool {
        self.lines.is_empty()
    }

    /// What the next chunk is called.
    pub(crate) fn next_ordinal(&self) -> u32 {
        self.lines.last().map_or(0, |last| last.ordinal + 1)
    }

    /// Where the next chunk goes.
    pub(crate) fn end(&self) -> ByteCount {
        ByteCount(self.written + self.buffer.len() as u64)
    }

    /// Appends a chunk.
    ///
    /// # Errors
    /// The file system's.
    pub(crate) fn append(&mut self, header: &ChunkHeader, stored: &[u8]) -> Result<(), ImageError> {
        assert_eq!(header.name.pack, self.number, "a chunk is named by its pack");
        let offset = u32::try_from(self.end().0).expect("a pack is far below 4 GiB");
        self.lines.push(Line { ordinal: header.name.ordinal, offset, hash: header.name.hash });
        let end = self.buffer.len() + whole_length(header.stored_length) as usize;
        self.buffer.extend_from_slice(&header.encode());
        self.buffer.extend_from_slice(stored);
        self.buffer.resize(end, 0);
        if self.buffer.len() < BUFFER_BYTES { Ok(()) } else { self.write() }
    }

    /// Writes table and trailer and makes all of it durable, but for its name.
    ///
    /// # Errors
    /// The file system's.
    pub(crate) fn finish(mut self) -> Result<ByteCount, ImageError> {
        let footer = encode_footer(self.number, &self.lines, self.end().0);
        self.buffer.extend_from_slice(&footer);
        self.write()?;
        let synced = self.file.sync_data();
        synced.map_err(|source| failed(format!("sync {}", self.name.display()), source))?;
        Ok(ByteCount(self.written))
    }

    fn write(&mut self) -> Result<(), ImageError> {
        let written = self.file.write_at(ByteOffset(self.written), &self.buffer);
        written.map_err(|source| failed(format!("write {}", self.name.display()), source))?;
        self.written += self.buffer.len() as u64;
        self.buffer.clear();
        Ok(())
    }
}
