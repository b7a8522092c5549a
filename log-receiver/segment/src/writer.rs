//! Appending to one segment.
//!
//! Entries wait in memory until enough bytes are there or the caller needs them in the file; payloads
//! are written from where they are, never copied. Space is reserved ahead, for the footer too, so a
//! full device is met when an entry is refused and not when bytes are half written. After a failed
//! write nobody knows what is in the file: the writer is poisoned.
//!
//! Space that was only reserved has to be noted as used by the file system when it is written first, and a sync waits
//! for that note, which takes longer than the entry itself. So while syncs come after little, zeroes are written
//! ahead, where zeroes are read anyway: of many syncs one pays for the others.

use std::{io::IoSlice, sync::Arc};

use backtide_storage::StorageFile;
use backtide_units::{ByteCount, ByteOffset, ByteRange, PayloadChecksum};
use bytes::{Bytes, BytesMut};

use crate::{
    Compression, Contents, Entry, EntryHeader, Position, SEGMENT_HEADER_LENGTH, SegmentError, SegmentFile,
    SegmentHeader, Seq,
    batch::{Gathering, Place},
    entry_header::ALIGNMENT,
    footer::write_footer,
    pieces::put_table,
};

/// Limits of a writer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WriterOptions {
    /// Entries are held back until so many bytes are waiting.
    pub buffer_bytes_max: ByteCount,
    /// Space is reserved in steps of this; at the beginning of a segment in smaller ones.
    pub allocation_step: ByteCount,
    /// How payloads are stored.
    pub compression: Compression,
}

/// The first step in which space is reserved: disks that are hardly written take little.
const FIRST_STEP: u64 = 64 << 10;

impl WriterOptions {
    /// The step in which space is reserved behind what takes so much: as much again, within limits.
    pub fn step_at(&self, end: ByteOffset) -> ByteCount {
        let most = self.allocation_step.0.max(1);
        ByteCount(end.0.max(FIRST_STEP).next_power_of_two().min(most))
    }
}

/// Appends to one segment file.
pub struct SegmentWriter {
    file: SegmentFile,
    header: SegmentHeader,
    options: WriterOptions,
    /// Where the next entry goes.
    end: u64,
    /// Everything below is in the file.
    written: u64,
    /// Everything below has space; `None` where the file system cannot reserve.
    allocated: Option<u64>,
    /// Zeroes have been written ahead up to here.
    filled: u64,
    /// Where entries ended at the last sync.
    synced: u64,
    waiting: Vec<Bytes>,
    headers: BytesMut,
    gathering: Gathering,
    poisoned: bool,
}

const PADDING: [u8; ALIGNMENT as usize] = [0; ALIGNMENT as usize];

/// A sync after no more bytes than this is one of many.
const LITTLE: u64 = 256 << 10;

/// As many zeroes are written ahead then.
static AHEAD: [u8; 1 << 20] = [0; 1 << 20];

/// Headers are laid into memory in pieces of this size.
const HEADERS: usize = 64 << 10;

impl SegmentWriter {
    /// Starts a segment in a file without entries, where space up to `allocated` is reserved: writes the header.
    ///
    /// # Errors
    /// [`SegmentError::Full`] or the file's; the file is then of no use.
    pub fn create(
        file: SegmentFile,
        header: SegmentHeader,
        options: WriterOptions,
        allocated: ByteCount,
    ) -> Result<Self, SegmentError> {
        let mut writer = Self::resume(file, header, options, ByteOffset(SEGMENT_HEADER_LENGTH as u64));
        writer.allocated = Some(allocated.0);
        writer.reserve(ByteCount(SEGMENT_HEADER_LENGTH as u64))?;
        let written = writer.file.file().write_at(ByteOffset::ZERO, &header.encode());
        written.map_err(|source| writer.file.failed("write", source))?;
        Ok(writer)
    }

    /// Goes on in a segment whose entries end at `end`, as a scan found it.
    pub fn resume(file: SegmentFile, header: SegmentHeader, options: WriterOptions, end: ByteOffset) -> Self {
        Self {
            file,
            header,
            options,
            end: end.0,
            written: end.0,
            allocated: Some(end.0),
            filled: end.0,
            synced: end.0,
            waiting: Vec::new(),
            headers: BytesMut::new(),
            gathering: Gathering::new(options.compression),
            poisoned: false,
        }
    }

    /// The segment.
    pub fn header(&self) -> &SegmentHeader {
        &self.header
    }

    /// The file.
    pub fn file(&self) -> &SegmentFile {
        &self.file
    }

    /// Everything below has space; `None` where the file system cannot reserve.
    pub fn allocated(&self) -> Option<ByteOffset> {
        self.allocated.map(ByteOffset)
    }

    /// Somebody else has reserved space up to `end`, from where it was or below.
    pub fn note_allocated(&mut self, end: ByteOffset) {
        self.allocated = self.allocated.map(|allocated| allocated.max(end.0));
    }

    /// Where the next entry goes.
    pub fn end(&self) -> ByteOffset {
        ByteOffset(self.end)
    }

    /// Where the entries would end at the most with `entry` behind them.
    pub fn reach(&self, entry: &Entry) -> ByteOffset {
        ByteOffset(self.gathering.reach(self.end, entry.payload_length()))
    }

    /// Appends the next entry. `synced` is the entry up to which the log is known durable.
    /// Adds it to `contents` too.
    ///
    /// # Errors
    /// [`SegmentError::Full`] has changed nothing; after [`SegmentError::Io`] the writer is poisoned.
    ///
    /// # Panics
    /// When the entry breaks a limit of the format, its checksum is not complete (see [`Entry::complete`]),
    /// or the segment would reach 4 GiB.
    pub fn append(
        &mut self,
        entry: Entry,
        synced: Seq,
        contents: &mut Contents,
    ) -> Result<Position, SegmentError> {
        if self.poisoned {
            return Err(SegmentError::Poisoned);
        }
        let (header, payload) = EntryHeader::of(&entry, contents.stats.next_seq, self.header.id, synced);
        let place = self.gathering.place(&header);
        if place != Place::Joins {
            self.close_batch();
        }
        let position = Position(self.end as u32);
        let reach = self.gathering.end_max_with(self.end, place, &header);
        assert!(reach <= u64::from(u32::MAX), "a segment of 4 GiB");
        self.reserve(ByteCount(reach + contents.footer_bytes_max().0))?;
        let control = (!header.kind.is_data()).then(|| entry.clone());
        match (place, entry.data()) {
            (Place::Alone, data) => self.put(&header, payload, data.map(|(_, checksum)| checksum)),
            (Place::Begins | Place::Joins, data) => {
                let checksum = data.map(|(_, checksum)| checksum);
                self.end = self.gathering.add(self.end, header, payload, checksum);
                if self.gathering.is_full() {
                    self.close_batch();
                }
            }
        }
        contents.add(&header, position, control);
        if self.end - self.written >= self.options.buffer_bytes_max.0 {
            self.write_waiting()?;
        }
        Ok(position)
    }

    /// Lays an entry into memory that stands for itself.
    fn put(&mut self, header: &EntryHeader, payload: Bytes, checksum: Option<&PayloadChecksum>) {
        let length = header.stored_length();
        if self.headers.capacity() < crate::ENTRY_HEADER_LENGTH {
            self.headers.reserve(HEADERS);
        }
        self.headers.extend_from_slice(&header.encode(self.header.salt()));
        if let Some(checksum) = checksum {
            put_table(&mut self.headers, &payload, checksum);
        }
        let padding = length as usize - self.headers.len() - payload.len();
        self.waiting.push(self.headers.split().freeze());
        if !payload.is_empty() {
            self.waiting.push(payload);
        }
        if padding > 0 {
            self.waiting.push(Bytes::from_static(&PADDING[..]).slice(..padding));
        }
        self.end += length;
    }

    /// Lays the batch into memory that is gathered, so that the next entry stands behind it.
    fn close_batch(&mut self) {
        if let Some(closed) = self.gathering.close(self.header.salt()) {
            self.waiting.extend(closed.parts);
            self.end = closed.end;
        }
    }

    /// Brings everything appended into the file (not onto the device).
    ///
    /// # Errors
    /// The file's; the writer is then poisoned.
    pub fn write_waiting(&mut self) -> Result<(), SegmentError> {
        if self.poisoned {
            return Err(SegmentError::Poisoned);
        }
        self.close_batch();
        if self.waiting.is_empty() {
            return Ok(());
        }
        let slices: Vec<IoSlice<'_>> = self.waiting.iter().map(|bytes| IoSlice::new(bytes)).collect();
        let written = self.file.file().write_vectored_at(ByteOffset(self.written), &slices);
        if let Err(source) = written {
            self.poisoned = true;
            return Err(self.file.failed("write", source));
        }
        self.waiting.clear();
        self.written = self.end;
        Ok(())
    }

    /// The same before a sync; it may write zeroes ahead, where space is reserved.
    ///
    /// # Errors
    /// The file's; the writer is then poisoned.
    pub fn write_for_sync(&mut self) -> Result<(), SegmentError> {
        self.close_batch();
        let little = self.end - self.synced <= LITTLE;
        self.synced = self.end;
        let to = self.allocated.unwrap_or(0).min(self.end + AHEAD.len() as u64);
        if little && !self.waiting.is_empty() && self.end > self.filled && self.end < to {
            self.waiting.push(Bytes::from_static(&AHEAD).slice(..(to - self.end) as usize));
            self.filled = to;
        }
        self.write_waiting()
    }

    /// Writes the footer. The segment is sealed once the file has been synced.
    /// Gives the file's length.
    ///
    /// # Errors
    /// The file's; the writer is then poisoned.
    pub fn seal(&mut self, contents: &Contents) -> Result<ByteCount, SegmentError> {
        self.write_waiting()?;
        self.poisoned = true;
        seal(&self.file, &self.header, contents, ByteOffset(self.end))
    }

    /// A handle to sync the file with.
    pub fn sync_handle(&self) -> Arc<dyn StorageFile> {
        Arc::clone(self.file.file())
    }

    /// Lets every later call fail: a sync has failed.
    pub fn poison(&mut self) {
        self.poisoned = true;
    }

    /// Whether the writer can still be used.
    pub fn is_poisoned(&self) -> bool {
        self.poisoned
    }

    fn reserve(&mut self, needed: ByteCount) -> Result<(), SegmentError> {
        let Some(allocated) = self.allocated else { return Ok(()) };
        if needed.0 <= allocated {
            return Ok(());
        }
        let step = self.options.step_at(ByteOffset(allocated)).0;
        let file = self.file.file();
        let to = |end: u64| ByteRange::between(ByteOffset(allocated), ByteOffset(end));
        let generous = needed.0.next_multiple_of(step);
        let result = file.allocate(to(generous)).map(|()| generous);
        // Near the end of the device what is needed may still fit.
        let result = match result {
            Err(error) if error.kind() == std::io::ErrorKind::StorageFull => {
                file.allocate(to(needed.0)).map(|()| needed.0)
            }
            Err(error) => Err(error),
            Ok(end) => Ok(end),
        };
        match result {
            Ok(end) => self.allocated = Some(end),
            Err(error) if error.kind() == std::io::ErrorKind::Unsupported => self.allocated = None,
            Err(error) => return Err(self.file.failed("reserve space in", error)),
        }
        Ok(())
    }
}

/// Writes the footer behind entries that are all in the file and end at `end`. The segment is sealed once the file
/// has been synced. Gives the file's length.
///
/// # Errors
/// The file's; nobody knows what is behind the entries then.
pub fn seal(
    file: &SegmentFile,
    header: &SegmentHeader,
    contents: &Contents,
    end: ByteOffset,
) -> Result<ByteCount, SegmentError> {
    let sealed = write_footer(&**file.file(), header, contents, end);
    sealed.map_err(|source| file.failed("seal", source))
}
