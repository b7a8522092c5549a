//! Writing a pack: chunk by chunk, then its nodes once more, then its table and trailer, then a sync.
//!
//! Nodes are little beside what hangs on them, so a pack has each of them twice, far apart: one that is damaged costs nothing.

use std::{collections::BTreeMap, path::PathBuf, sync::Arc};

use backtide_storage::StorageFile;
use backtide_units::{ByteCount, ByteOffset};

use crate::{
    ImageError,
    chunk::{CHUNK_HEADER_LENGTH, ChunkHeader, ChunkRef, Kind, whole_length},
    error::failed,
    pack::{Line, PACK_HEADER_LENGTH, encode_footer, encode_header},
};

/// Bytes that are written at once.
const BUFFER_BYTES: usize = 1 << 20;

/// The second of a node is called this or more. No image names such a chunk, for no pack has so many: so one that is lost can be
/// put back under its ordinal, whatever was written anew of its pack before it was found.
const FIRST_SECOND: u32 = 1 << 31;

/// A pack that is written.
pub(crate) struct PackWriter {
    file: Arc<dyn StorageFile>,
    name: PathBuf,
    number: u32,
    lines: Vec<Line>,
    /// The nodes among them.
    nodes: Vec<Line>,
    buffer: Vec<u8>,
    /// Where the buffer goes.
    written: u64,
}

impl PackWriter {
    pub(crate) fn new(file: Arc<dyn StorageFile>, name: PathBuf, number: u32) -> Self {
        let buffer = encode_header(number).to_vec();
        debug_assert_eq!(buffer.len(), PACK_HEADER_LENGTH);
        Self { file, name, number, lines: Vec::new(), nodes: Vec::new(), buffer, written: 0 }
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
        let ChunkRef { hash, ordinal, .. } = header.name;
        self.begin(ordinal, hash, matches!(header.kind, Kind::Node(_)));
        let end = self.buffer.len() + whole_length(header.stored_length) as usize;
        self.buffer.extend_from_slice(&header.encode());
        self.buffer.extend_from_slice(stored);
        self.buffer.resize(end, 0);
        if self.buffer.len() < BUFFER_BYTES { Ok(()) } else { self.write() }
    }

    /// Appends a chunk as it stands in another file of this pack, whole or not: header, what is stored, padding.
    ///
    /// # Errors
    /// The file system's.
    pub(crate) fn append_as_it_is(&mut self, line: &Line, bytes: &[u8]) -> Result<(), ImageError> {
        let header = bytes.first_chunk::<CHUNK_HEADER_LENGTH>();
        let header = header.and_then(|bytes| ChunkHeader::decode(bytes, &self.name, ByteOffset::ZERO).ok());
        self.begin(line.ordinal, line.hash, header.is_some_and(|header| header.kind != Kind::Data));
        self.buffer.extend_from_slice(bytes);
        if self.buffer.len() < BUFFER_BYTES { Ok(()) } else { self.write() }
    }

    fn begin(&mut self, ordinal: u32, hash: [u8; 32], is_node: bool) {
        let offset = u32::try_from(self.end().0).expect("a pack is far below 4 GiB");
        let line = Line { ordinal, offset, hash };
        self.lines.push(line);
        self.nodes.extend(Some(line).filter(|_| is_node));
    }

    /// Writes the nodes once more, then table and trailer, and makes all of it durable, but for its name.
    ///
    /// # Errors
    /// The file system's.
    pub(crate) fn finish(mut self) -> Result<ByteCount, ImageError> {
        self.write()?;
        self.repeat_nodes()?;
        let footer = encode_footer(self.number, &self.lines, self.end().0);
        self.buffer.extend_from_slice(&footer);
        self.write()?;
        let synced = self.file.sync_data();
        synced.map_err(|source| failed(format!("sync {}", self.name.display()), source))?;
        Ok(ByteCount(self.written))
    }

    /// Appends a second of each node that is there once. All before it is written.
    fn repeat_nodes(&mut self) -> Result<(), ImageError> {
        let mut once: BTreeMap<[u8; 32], Option<Line>> = BTreeMap::new();
        for line in std::mem::take(&mut self.nodes) {
            once.entry(line.hash).and_modify(|line| *line = None).or_insert(Some(line));
        }
        let mut once: Vec<Line> = once.into_values().flatten().collect();
        once.sort_unstable_by_key(|line| line.ordinal);
        // A pack that was found may be anything.
        let last = self.lines.last().map_or(0, |last| last.ordinal).max(FIRST_SECOND - 1);
        once.truncate((u32::MAX - last) as usize);
        for line in once {
            let at = u64::from(line.offset);
            let mut header = [0; CHUNK_HEADER_LENGTH];
            self.read(at, &mut header)?;
            let Ok(mut header) = ChunkHeader::decode(&header, &self.name, ByteOffset(at)) else { continue };
            let mut stored = vec![0; header.stored_length as usize];
            self.read(at + CHUNK_HEADER_LENGTH as u64, &mut stored)?;
            // Offsets have 32 bits, and a pack that was found may be long.
            if self.end().0 + whole_length(header.stored_length) > u64::from(u32::MAX) {
                break;
            }
            // One that is damaged as it is has no second.
            if crc32c::crc32c(&stored) == header.crc {
                header.name.ordinal = self.next_ordinal().max(FIRST_SECOND);
                self.append(&header, &stored)?;
            }
        }
        self.nodes.clear();
        Ok(())
    }

    fn read(&self, at: u64, buffer: &mut [u8]) -> Result<(), ImageError> {
        let read = self.file.read_exact_at(ByteOffset(at), buffer);
        read.map_err(|source| failed(format!("read {}", self.name.display()), source))
    }

    fn write(&mut self) -> Result<(), ImageError> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        let written = self.file.write_at(ByteOffset(self.written), &self.buffer);
        written.map_err(|source| failed(format!("write {}", self.name.display()), source))?;
        self.written += self.buffer.len() as u64;
        self.buffer.clear();
        Ok(())
    }
}
