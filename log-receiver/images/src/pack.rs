//! A pack that is read: where its chunks are, and their content, each checked.
//!
//! A pack whose trailer is not whole was never finished, or is damaged: its chunks are then found by their headers, one
//! after the other, so that damage of the table costs no chunk.

mod rest;

use std::{
    collections::HashMap,
    io,
    path::PathBuf,
    sync::{Arc, OnceLock},
};

use backtide_storage::{StorageFile, is_unreadable_place};
use backtide_units::{ByteCount, ByteOffset};
use bytes::{Buf, BufMut, Bytes};

use crate::{
    CHUNK_BYTES, ImageError,
    chunk::{CHUNK_HEADER_LENGTH, ChunkHeader, ChunkRef},
    error::failed,
    parts::PartSums,
};

/// The newest format version, the one we write.
pub(crate) const VERSION: u32 = 1;

/// How every pack begins.
pub const PACK_MAGIC: [u8; 8] = *b"BKTDPCK\n";
/// How its trailer does.
const TRAILER_MAGIC: [u8; 8] = *b"BKTDPKE\n";

/// Bytes of the header, and of the trailer.
pub(crate) const PACK_HEADER_LENGTH: usize = 64;
const TRAILER_LENGTH: usize = 64;
const CRC_AT: usize = 60;

/// Bytes of a chunk's line in the table.
const LINE_LENGTH: usize = 40;

/// A chunk of a pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Line {
    pub(crate) ordinal: u32,
    pub(crate) offset: u32,
    pub(crate) hash: [u8; 32],
}

/// A pack that is read.
pub(crate) struct Pack {
    file: Arc<dyn StorageFile>,
    name: PathBuf,
    number: u32,
    /// By ordinal.
    lines: Vec<Line>,
    /// Where the chunks end.
    chunks_end: u64,
    /// What is wrong with its trailer or table.
    broken: Option<String>,
    /// Ordinals of chunks that are there more than once; made when somebody asks.
    twins: OnceLock<HashMap<[u8; 32], Vec<u32>>>,
}

/// The header of a pack.
pub(crate) fn encode_header(number: u32) -> [u8; PACK_HEADER_LENGTH] {
    let mut bytes = [0; PACK_HEADER_LENGTH];
    let mut out = &mut bytes[..];
    out.put_slice(&PACK_MAGIC);
    out.put_u32_le(VERSION);
    out.put_u32_le(PACK_HEADER_LENGTH as u32);
    out.put_u32_le(number);
    seal(&mut bytes);
    bytes
}

/// Table and trailer of a pack.
pub(crate) fn encode_footer(number: u32, lines: &[Line], chunks_end: u64) -> Vec<u8> {
    let mut table = Vec::with_capacity(lines.len() * LINE_LENGTH + TRAILER_LENGTH);
    for Line { ordinal, offset, hash } in lines {
        table.put_u32_le(*ordinal);
        table.put_u32_le(*offset);
        table.put_slice(hash);
    }
    let mut trailer = [0; TRAILER_LENGTH];
    let mut out = &mut trailer[..];
    out.put_slice(&TRAILER_MAGIC);
    out.put_u32_le(VERSION);
    out.put_u32_le(number);
    out.put_u64_le(chunks_end);
    out.put_u32_le(lines.len() as u32);
    out.put_u32_le(crc32c::crc32c(&table));
    seal(&mut trailer);
    table.put_slice(&trailer);
    table
}

/// Bytes of the table of these chunks.
pub(crate) fn table_bytes(lines: &[Line]) -> ByteCount {
    ByteCount((lines.len() * LINE_LENGTH) as u64)
}

fn seal(bytes: &mut [u8; 64]) {
    let crc = crc32c::crc32c(&bytes[..CRC_AT]);
    bytes[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
}

fn is_sealed(bytes: &[u8; 64]) -> bool {
    crc32c::crc32c(&bytes[..CRC_AT]).to_le_bytes() == bytes[CRC_AT..]
}

impl Pack {
    /// Opens a pack.
    ///
    /// # Errors
    /// [`ImageError::UnknownVersion`] or the file system's. Damage is told when a chunk is read, or by
    /// [`Pack::broken`].
    pub(crate) fn open(file: Arc<dyn StorageFile>, name: PathBuf, number: u32) -> Result<Self, ImageError> {
        let mut pack = Self::without_table(file, name, number);
        let read = pack.check_header().and_then(|()| pack.read_footer());
        match read {
            Ok(()) => {}
            Err(error @ ImageError::Damaged { .. }) => {
                pack.broken = Some(error.to_string());
                pack.find_chunks()?;
            }
            Err(
                error @ (ImageError::UnknownVersion { .. } | ImageError::Full { .. } | ImageError::Io { .. }),
            ) => {
                return Err(error);
            }
        }
        Ok(pack)
    }

    /// A pack of which only chunks are read whose lines are known.
    pub(crate) fn without_table(file: Arc<dyn StorageFile>, name: PathBuf, number: u32) -> Self {
        Self { file, name, number, lines: Vec::new(), chunks_end: 0, broken: None, twins: OnceLock::new() }
    }

    /// Its chunks, by ordinal, each with the bytes that it takes at the most.
    pub(crate) fn lines_with_lengths(&self) -> impl DoubleEndedIterator<Item = (&Line, u32)> {
        let whole = (CHUNK_HEADER_LENGTH as u64 + CHUNK_BYTES.0) as u32;
        let next = |place: usize| {
            let end = u32::try_from(self.chunks_end).unwrap_or(u32::MAX);
            self.lines.get(place + 1).map_or(end, |line| line.offset)
        };
        let length =
            move |(place, line): (usize, &'_ Line)| next(place).saturating_sub(line.offset).min(whole);
        self.lines.iter().enumerate().map(move |(place, line)| (line, length((place, line))))
    }

    /// Its chunks, by ordinal.
    pub(crate) fn lines(&self) -> &[Line] {
        &self.lines
    }

    /// What is wrong with header, table or trailer, if anything: a sentence with file and place.
    pub(crate) fn broken(&self) -> Option<&str> {
        self.broken.as_deref()
    }

    /// Bytes of all chunks with what belongs to them.
    pub(crate) fn chunk_bytes(&self) -> u64 {
        self.chunks_end.saturating_sub(PACK_HEADER_LENGTH as u64)
    }

    pub(crate) fn damaged(&self, offset: u64, what: impl Into<String>) -> ImageError {
        ImageError::Damaged { file: self.name.clone(), offset: ByteOffset(offset), what: what.into() }
    }

    fn length(&self) -> Result<u64, ImageError> {
        let length = self.file.len();
        Ok(length.map_err(|source| failed(format!("read {}", self.name.display()), source))?.0)
    }

    /// Fills a buffer; a file that ends before is damaged there, and so is a place that the device cannot read.
    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), ImageError> {
        let read = self.file.read_exact_at(ByteOffset(offset), buffer);
        read.map_err(|error| self.unread(offset, error))
    }

    fn unread(&self, offset: u64, error: io::Error) -> ImageError {
        if error.kind() == io::ErrorKind::UnexpectedEof {
            self.damaged(offset, error.to_string())
        } else if is_unreadable_place(&error) {
            self.damaged(offset, format!("the device cannot read it: {error}"))
        } else {
            failed(format!("read {}", self.name.display()), error)
        }
    }

    fn check_header(&self) -> Result<(), ImageError> {
        let mut bytes = [0; PACK_HEADER_LENGTH];
        self.read(0, &mut bytes)?;
        let version = (&bytes[8..]).get_u32_le();
        if bytes[..8] == PACK_MAGIC && is_sealed(&bytes) && version != VERSION {
            return Err(ImageError::UnknownVersion {
                file: self.name.clone(),
                found: version,
                known: VERSION,
            });
        }
        if bytes != encode_header(self.number) {
            return Err(self.damaged(0, format!("expected the header of pack {}", self.number)));
        }
        Ok(())
    }

    fn read_footer(&mut self) -> Result<(), ImageError> {
        let length = self.length()?;
        let least = (PACK_HEADER_LENGTH + TRAILER_LENGTH) as u64;
        let Some(at) = length.checked_sub(TRAILER_LENGTH as u64).filter(|_| length >= least) else {
            return Err(self.damaged(length, "the file ends before its trailer"));
        };
        let mut trailer = [0; TRAILER_LENGTH];
        self.read(at, &mut trailer)?;
        let mut input = &trailer[8..];
        let (_version, number, chunks_end) = (input.get_u32_le(), input.get_u32_le(), input.get_u64_le());
        let (count, crc) = (input.get_u32_le(), input.get_u32_le());
        let table_length = u64::from(count) * LINE_LENGTH as u64;
        let adjoin = chunks_end.checked_add(table_length) == Some(at);
        if trailer[..8] != TRAILER_MAGIC || !is_sealed(&trailer) || number != self.number || !adjoin {
            return Err(self.damaged(at, format!("expected the trailer of pack {}", self.number)));
        }
        // The length of the file has room for it, so memory has.
        let mut table = vec![0; table_length as usize];
        self.read(chunks_end, &mut table)?;
        if crc32c::crc32c(&table) != crc {
            return Err(self.damaged(chunks_end, "the table's checksum is wrong"));
        }
        self.lines = table.chunks_exact(LINE_LENGTH).map(Line::decode).collect();
        if !self.lines.is_sorted_by(|a, b| a.ordinal < b.ordinal) {
            return Err(self.damaged(chunks_end, "the table is not sorted"));
        }
        self.chunks_end = chunks_end;
        Ok(())
    }

    /// Goes from chunk to chunk, as far as headers are whole.
    fn find_chunks(&mut self) -> Result<(), ImageError> {
        self.lines.clear();
        let length = self.length()?;
        let mut at = PACK_HEADER_LENGTH as u64;
        while at + (CHUNK_HEADER_LENGTH as u64) <= length {
            let Ok(header) = self.header_at(at) else { break };
            if header.name.pack != self.number || at > u64::from(u32::MAX) || at + header.whole() > length {
                break;
            }
            let ChunkRef { ordinal, hash, .. } = header.name;
            self.lines.push(Line { ordinal, offset: at as u32, hash });
            at += header.whole();
        }
        self.lines.sort_by_key(|line| line.ordinal);
        self.chunks_end = at;
        Ok(())
    }

    fn header_at(&self, offset: u64) -> Result<ChunkHeader, ImageError> {
        let mut bytes = [0; CHUNK_HEADER_LENGTH];
        self.read(offset, &mut bytes)?;
        ChunkHeader::decode(&bytes, &self.name, ByteOffset(offset))
    }

    /// A chunk's header and the bytes behind it as they are stored, with the checksum checked.
    pub(crate) fn stored(&self, line: &Line) -> Result<(ChunkHeader, Vec<u8>), ImageError> {
        let offset = u64::from(line.offset);
        let header = self.header_at(offset)?;
        let expected = ChunkRef { hash: line.hash, pack: self.number, ordinal: line.ordinal };
        if header.name != expected {
            return Err(self.damaged(offset, format!("expected chunk {}", line.ordinal)));
        }
        let mut stored = vec![0; header.stored_length as usize];
        self.read(offset + CHUNK_HEADER_LENGTH as u64, &mut stored)?;
        let computed = crc32c::crc32c(&stored);
        if computed != header.crc {
            let what = format!("the chunk's checksum is {:08x}, its bytes give {computed:08x}", header.crc);
            return Err(self.damaged(offset + CHUNK_HEADER_LENGTH as u64, what));
        }
        Ok((header, stored))
    }

    fn line(&self, name: &ChunkRef) -> Option<&Line> {
        let found = self.lines.binary_search_by_key(&name.ordinal, |line| line.ordinal);
        found.ok().map(|place| &self.lines[place])
    }

    /// Bytes of a chunk that is stored as it is, from `from` on, by the sums of its content. False when they are not
    /// there: it may be stored otherwise in a pack that took this one's place, or damaged; then a read of all of it tells.
    pub(crate) fn part(
        &self,
        name: &ChunkRef,
        sums: &PartSums,
        from: usize,
        buffer: &mut [u8],
    ) -> Result<bool, ImageError> {
        let Some(line) = self.line(name).filter(|line| line.hash == name.hash) else { return Ok(false) };
        let behind = u64::from(line.offset) + CHUNK_HEADER_LENGTH as u64;
        sums.read(from, buffer, |at, bytes| match self.read(behind + at as u64, bytes) {
            Ok(()) => Ok(true),
            Err(ImageError::Damaged { .. }) => Ok(false),
            Err(
                error @ (ImageError::UnknownVersion { .. } | ImageError::Full { .. } | ImageError::Io { .. }),
            ) => Err(error),
        })
    }

    /// A chunk's content, which has the hash in its name, and its header.
    pub(crate) fn chunk(&self, name: &ChunkRef) -> Result<(ChunkHeader, Bytes), ImageError> {
        let Some(line) = self.line(name) else {
            let what = match &self.broken {
                Some(broken) => format!("chunk {} cannot be found: {broken}", name.ordinal),
                None => format!("it has no chunk {}", name.ordinal),
            };
            return Err(self.damaged(self.chunks_end, what));
        };
        self.content(line, name)
    }

    /// The content of the chunk of a line, which must be `name`.
    pub(crate) fn content(&self, line: &Line, name: &ChunkRef) -> Result<(ChunkHeader, Bytes), ImageError> {
        let (header, stored) = self.stored(line)?;
        let behind = u64::from(line.offset) + CHUNK_HEADER_LENGTH as u64;
        let content = if header.compressed {
            let content = zstd::bulk::decompress(&stored, header.length as usize);
            content.map_err(|error| self.damaged(behind, format!("it cannot be decompressed: {error}")))?
        } else {
            stored
        };
        if content.len() != header.length as usize || *blake3::hash(&content).as_bytes() != name.hash {
            return Err(self.damaged(behind, "the chunk's content does not have the hash in its name"));
        }
        Ok((header, content.into()))
    }
}

impl Line {
    fn decode(mut bytes: &[u8]) -> Self {
        let (ordinal, offset) = (bytes.get_u32_le(), bytes.get_u32_le());
        let mut hash = [0; 32];
        bytes.copy_to_slice(&mut hash);
        Self { ordinal, offset, hash }
    }
}
