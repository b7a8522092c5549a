//! Reading one segment file: its header, and the headers of its entries. Payloads: [`crate::pieces`].

use std::{path::PathBuf, sync::Arc};

use backtide_storage::StorageFile;
use backtide_units::ByteOffset;

use crate::{
    ENTRY_HEADER_LENGTH, EntryHeader, EntryKind, Position, SEGMENT_HEADER_LENGTH, SegmentError,
    SegmentHeader, Seq, Stretch, entry_header::HeaderFault,
};

/// An open segment file with the name that errors use.
#[derive(Clone)]
pub struct SegmentFile {
    file: Arc<dyn StorageFile>,
    name: PathBuf,
}

/// Bytes read at once when walking over headers.
const WINDOW: usize = 256 << 10;

/// The headers of a segment, in order, without payloads.
pub struct HeaderScan<'a> {
    window: Window<'a>,
    header: SegmentHeader,
    at: u64,
    end: u64,
    next_seq: Seq,
}

/// A part of a file in memory, moved along with the reads.
pub(crate) struct Window<'a> {
    file: &'a SegmentFile,
    start: u64,
    bytes: Vec<u8>,
}

impl SegmentFile {
    /// Names the file for errors.
    pub fn new(file: Arc<dyn StorageFile>, name: PathBuf) -> Self {
        Self { file, name }
    }

    /// The file.
    pub fn file(&self) -> &Arc<dyn StorageFile> {
        &self.file
    }

    /// Its name for errors.
    pub fn name(&self) -> &PathBuf {
        &self.name
    }

    /// Reads and checks the segment's header.
    ///
    /// # Errors
    /// [`SegmentError::Damaged`], [`SegmentError::UnknownVersion`] or the file's.
    pub fn header(&self) -> Result<SegmentHeader, SegmentError> {
        let mut bytes = [0; SEGMENT_HEADER_LENGTH];
        let found = self.read_at(0, &mut bytes)?;
        if found < bytes.len() {
            return Err(
                self.damaged(0, format!("expected a header of 128 bytes, the file ends after {found}"))
            );
        }
        SegmentHeader::decode(&bytes, &self.name)
    }

    /// Walks over the headers from the first entry to `end`.
    pub fn headers(&self, header: SegmentHeader, end: ByteOffset) -> HeaderScan<'_> {
        HeaderScan {
            window: Window::new(self),
            header,
            at: SEGMENT_HEADER_LENGTH as u64,
            end: end.0,
            next_seq: header.first_seq,
        }
    }

    /// Walks over the headers of one stretch, which ends where `next` begins or at `end`.
    pub fn headers_of(
        &self,
        header: SegmentHeader,
        stretch: &Stretch,
        next: Option<&Stretch>,
        end: ByteOffset,
    ) -> HeaderScan<'_> {
        HeaderScan {
            window: Window::new(self),
            header,
            at: stretch.position.offset().0,
            end: next.map_or(end.0, |next| next.position.offset().0),
            next_seq: stretch.seq,
        }
    }

    pub(crate) fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<usize, SegmentError> {
        self.file.read_at(ByteOffset(offset), buffer).map_err(|source| self.failed("read", source))
    }

    pub(crate) fn read_exact(&self, offset: u64, buffer: &mut [u8]) -> Result<(), SegmentError> {
        if buffer.is_empty() {
            return Ok(());
        }
        let found = self.read_at(offset, buffer)?;
        if found == buffer.len() {
            return Ok(());
        }
        let what = format!("expected {} bytes, the file ends after {found}", buffer.len());
        Err(self.damaged(offset, what))
    }

    pub(crate) fn length(&self) -> Result<u64, SegmentError> {
        self.file.len().map(|length| length.0).map_err(|source| self.failed("measure", source))
    }

    pub(crate) fn damaged(&self, offset: u64, what: String) -> SegmentError {
        SegmentError::Damaged { file: self.name.clone(), offset: ByteOffset(offset), what }
    }

    pub(crate) fn failed(&self, verb: &str, source: std::io::Error) -> SegmentError {
        let step = format!("{verb} {}", self.name.display());
        if source.kind() == std::io::ErrorKind::StorageFull {
            SegmentError::Full { step, source }
        } else {
            SegmentError::Io { step, source }
        }
    }
}

impl HeaderFault {
    pub(crate) fn describe(&self) -> String {
        match self {
            Self::Zero => "expected an entry, found zeros".to_owned(),
            Self::Wrong(what) => format!("expected an entry, but {what}"),
        }
    }
}

impl Iterator for HeaderScan<'_> {
    type Item = Result<(EntryHeader, Position), SegmentError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.at >= self.end {
            return None;
        }
        let item = self.step();
        if item.is_err() {
            self.at = self.end;
        }
        Some(item)
    }
}

impl HeaderScan<'_> {
    fn step(&mut self) -> Result<(EntryHeader, Position), SegmentError> {
        let at = self.at;
        let file = self.window.file;
        let bytes = self.window.at(at, ENTRY_HEADER_LENGTH)?;
        let bytes: &[u8; ENTRY_HEADER_LENGTH] =
            bytes.try_into().map_err(|_| file.damaged(at, "expected an entry, the file ends".to_owned()))?;
        let header = EntryHeader::decode(bytes, self.header.salt(), self.header.id)
            .map_err(|fault| file.damaged(at, fault.describe()))?;
        if header.seq != self.next_seq {
            return Err(file.damaged(at, format!("expected entry {}, found {}", self.next_seq, header.seq)));
        }
        self.next_seq = header.seq.next();
        self.at = at + header.stored_length();
        let position = u32::try_from(at).map(Position);
        Ok((header, position.map_err(|_| file.damaged(at, "a segment of 4 GiB or more".to_owned()))?))
    }
}

impl<'a> Window<'a> {
    pub(crate) fn new(file: &'a SegmentFile) -> Self {
        Self { file, start: 0, bytes: Vec::new() }
    }

    /// `length` bytes at `offset`; fewer at the end of the file.
    pub(crate) fn at(&mut self, offset: u64, length: usize) -> Result<&[u8], SegmentError> {
        let have = offset >= self.start && offset + length as u64 <= self.start + self.bytes.len() as u64;
        if !have {
            self.bytes.resize(length.max(WINDOW), 0);
            let found = self.file.read_at(offset, &mut self.bytes)?;
            self.bytes.truncate(found);
            self.start = offset;
        }
        let from = (offset - self.start) as usize;
        let to = (from + length).min(self.bytes.len());
        Ok(&self.bytes[from.min(to)..to])
    }
}

impl EntryKind {
    /// Whether the entry is a guest write or zero, that is: has an LSN of its own.
    pub fn is_record(self) -> bool {
        match self {
            Self::Write | Self::Zero => true,
            Self::PassData | Self::Flush | Self::PassBegin | Self::PassEnd | Self::Mark | Self::Attach => {
                false
            }
        }
    }

    /// Whether the entry is a flush.
    pub fn is_flush(self) -> bool {
        self == Self::Flush
    }
}
