//! Reading one segment file: its header, and the headers of its entries. Payloads: [`crate::pieces`].

use std::{io, path::PathBuf, sync::Arc};

use backtide_storage::{StorageFile, is_unreadable_place};
use backtide_units::ByteOffset;

use crate::{
    ENTRY_HEADER_LENGTH, EntryHeader, EntryKind, Position, SEGMENT_HEADER_LENGTH, SegmentError,
    SegmentHeader, Seq, Stretch, body::BodyHeader, entry_header::HeaderFault,
};

/// An open segment file with the name that errors use.
#[derive(Clone)]
pub struct SegmentFile {
    file: Arc<dyn StorageFile>,
    name: PathBuf,
    unreadable: Unreadable,
}

/// What a place is that the device cannot read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Unreadable {
    /// Damage of that place, as wrong bytes are: for everybody who only reads.
    Damage,
    /// A failure that may pass: for whoever decides what the log is from now on.
    Failure,
}

/// Bytes read at once when walking over headers.
const WINDOW: usize = 256 << 10;

/// The system reads from the device in pages: one bad sector takes its page and no more.
pub(crate) const PAGE: u64 = 4096;

/// The headers of a segment, in order, without payloads.
pub struct HeaderScan<'a> {
    window: Window<'a>,
    header: SegmentHeader,
    at: u64,
    end: u64,
    next_seq: Seq,
    /// Within a batch, how many headers on its body is.
    body_ahead: Option<u16>,
}

/// A part of a file in memory, moved along with the reads.
pub(crate) struct Window<'a> {
    file: &'a SegmentFile,
    start: u64,
    bytes: Vec<u8>,
    /// Whether some place could not be read: from then on no read takes more pages than it needs.
    careful: bool,
}

impl SegmentFile {
    /// Names the file for errors. A place that the device cannot read is [`SegmentError::Damaged`].
    pub fn new(file: Arc<dyn StorageFile>, name: PathBuf) -> Self {
        Self { file, name, unreadable: Unreadable::Damage }
    }

    /// The same file for whoever cuts, seals or replaces by what is read: there a place that the device cannot
    /// read is [`SegmentError::Io`], for the next try may read it.
    #[must_use]
    pub fn for_recovery(&self) -> Self {
        Self { unreadable: Unreadable::Failure, ..self.clone() }
    }

    /// The same file for everybody else.
    #[must_use]
    pub fn for_readers(&self) -> Self {
        Self { unreadable: Unreadable::Damage, ..self.clone() }
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
            body_ahead: None,
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
            body_ahead: None,
        }
    }

    pub(crate) fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<usize, SegmentError> {
        let read = self.file.read_at(ByteOffset(offset), buffer);
        read.map_err(|source| match self.unreadable {
            Unreadable::Damage if is_unreadable_place(&source) => {
                self.damaged(offset, format!("{} bytes from there on cannot be read: {source}", buffer.len()))
            }
            Unreadable::Damage | Unreadable::Failure => self.failed("read", source),
        })
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

    pub(crate) fn failed(&self, verb: &str, source: io::Error) -> SegmentError {
        let step = format!("{verb} {}", self.name.display());
        if source.kind() == io::ErrorKind::StorageFull {
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
        if self.body_ahead.is_some() && self.body_ahead != header.body_ahead() {
            return Err(file.damaged(at, format!("expected entry {} in the batch before it", header.seq)));
        }
        self.next_seq = header.seq.next();
        self.at = at + header.stored_length();
        self.body_ahead = header.body_ahead().map(|on| on - 1).filter(|on| *on > 0);
        if header.body_ahead() == Some(1) {
            self.at += self.body_length()?;
        }
        let position = u32::try_from(at).map(Position);
        Ok((header, position.map_err(|_| file.damaged(at, "a segment of 4 GiB or more".to_owned()))?))
    }
}

impl HeaderScan<'_> {
    /// Bytes of the body that stands here.
    fn body_length(&mut self) -> Result<u64, SegmentError> {
        let (at, file) = (self.at, self.window.file);
        let bytes = match self.window.at(at, ENTRY_HEADER_LENGTH) {
            // Behind what cannot be read the next entry may be found.
            Err(SegmentError::Damaged { .. }) => &[],
            read => read?,
        };
        let body = <&[u8; ENTRY_HEADER_LENGTH]>::try_from(bytes)
            .ok()
            .and_then(|bytes| BodyHeader::decode(bytes, self.header.salt(), self.header.id));
        if let Some(body) = body {
            return Ok(body.stored_length());
        }
        let end = file.end_of_lost_body(&self.header, at, self.end)?;
        end.map(|end| end - at).ok_or_else(|| file.damaged(at, "expected the body of a batch".to_owned()))
    }
}

impl<'a> Window<'a> {
    pub(crate) fn new(file: &'a SegmentFile) -> Self {
        Self { file, start: 0, bytes: Vec::new(), careful: false }
    }

    pub(crate) fn file(&self) -> &'a SegmentFile {
        self.file
    }

    /// `length` bytes at `offset`; fewer at the end of the file.
    pub(crate) fn at(&mut self, offset: u64, length: usize) -> Result<&[u8], SegmentError> {
        let have = offset >= self.start && offset + length as u64 <= self.start + self.bytes.len() as u64;
        if !have {
            self.fill(offset, length)?;
        }
        let from = (offset - self.start) as usize;
        let to = (from + length).min(self.bytes.len());
        Ok(&self.bytes[from.min(to)..to])
    }

    /// Reads ahead, unless that meets a place that cannot be read: what stands before it can.
    fn fill(&mut self, offset: u64, length: usize) -> Result<(), SegmentError> {
        let needed = ((offset + length as u64).next_multiple_of(PAGE) - offset) as usize;
        if !self.careful && needed < WINDOW {
            match self.read(offset, WINDOW) {
                Err(SegmentError::Damaged { .. }) => self.careful = true,
                read => return read,
            }
        }
        self.read(offset, needed)
    }

    fn read(&mut self, offset: u64, length: usize) -> Result<(), SegmentError> {
        self.bytes.resize(length, 0);
        let found = self.file.read_at(offset, &mut self.bytes);
        // After an error nothing is in the window.
        self.bytes.truncate(*found.as_ref().unwrap_or(&0));
        self.start = offset;
        found.map(|_| ())
    }
}

impl EntryKind {
    /// Whether the entry is a guest write or zero, that is: has an LSN of its own.
    pub fn is_record(self) -> bool {
        match self {
            Self::Write | Self::Zero => true,
            Self::PassData
            | Self::Flush
            | Self::Unchanged
            | Self::PassBegin
            | Self::PassEnd
            | Self::Mark
            | Self::Attach => false,
        }
    }

    /// Whether the entry is a flush.
    pub fn is_flush(self) -> bool {
        self == Self::Flush
    }
}
