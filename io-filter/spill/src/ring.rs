//! What is in the spill's files, as the filter knows it: no I/O.
//!
//! Frames are listed in places: stretches of one file, read back at once, whose records have
//! consecutive LSNs. So the list is short, and still says of each LSN whether it has its record.
//! Which blocks the records of a file touch is kept beside it: should the file turn out to be
//! unreadable, those are the blocks that differ.
//!
//! ```text
//!         trimmed ─────────────▶│◀──────────── the ring ────────────▶│
//!   file 7 (goes)   │ file 8          │ file 9          │ file 10 │ next
//! ```

use std::collections::VecDeque;

use backtide_protocol::{FRAME_HEADER_BYTES, Message, Record, RecordBody};
use backtide_tracking::DirtyBitmap;
use backtide_units::{BlockIndex, BlockRange, ByteCount, ByteOffset, CaptureTime, Lsn};

use crate::header::{FileHeader, HEADER_BYTES};

/// The limit is divided into so many files: what was trimmed of the oldest is not free yet.
const FILES: u64 = 16;

/// More is neither written nor read at once, unless one frame is longer.
const UNIT_BYTES_MAX: u64 = 4 * 1024 * 1024;

/// What a ring may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingLimits {
    /// Of all files together.
    pub bytes: ByteCount,
    /// Frames written or read at once, unless one alone is longer.
    pub unit: ByteCount,
    /// The memory of the lists of touched blocks.
    pub bitmap_bytes: ByteCount,
    /// The end of the disk.
    pub end: BlockIndex,
}

/// Where frames are going to be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// The file's number.
    pub file: u64,
    /// Where in it.
    pub at: ByteOffset,
    /// The number of the first frame.
    pub first: u64,
    /// With this header, when the file has to be made.
    pub create: Option<FileHeader>,
}

/// Where frames lie that are read back at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The file's number.
    pub file: u64,
    /// Where in it.
    pub at: ByteOffset,
    /// How long.
    pub bytes: ByteCount,
    /// The number of the first frame.
    pub first: u64,
    /// How many frames.
    pub frames: u64,
    /// Where the log stands before them.
    pub base: Lsn,
    /// The first and the last record: every LSN between has one.
    pub records: Option<(Lsn, Lsn)>,
    /// When the first record was captured.
    pub time: Option<CaptureTime>,
}

#[derive(Clone, Debug)]
struct File {
    number: u64,
    bytes: u64,
    touched: DirtyBitmap,
    /// Nothing more is written to it.
    closed: bool,
}

/// See the module's description.
#[derive(Clone, Debug)]
pub struct Ring {
    limits: RingLimits,
    files: VecDeque<File>,
    /// Files being removed, or that could not be: they still take room.
    leaving: Vec<(u64, u64)>,
    places: VecDeque<Place>,
    /// The first frame that was not trimmed.
    first: u64,
    /// The number of the next frame.
    next: u64,
    next_file: u64,
    /// Where the log stands after the last frame.
    end: Lsn,
}

/// What a message takes in a file.
///
/// # Panics
/// When it is one that is never spilled.
pub fn frame_bytes(message: &Message) -> ByteCount {
    let payload = match message {
        Message::Record(Record { body: RecordBody::Write(data), .. }) => data.bytes().len(),
        Message::Record(Record { body: RecordBody::Zero | RecordBody::Trim, .. }) => 8,
        Message::Mark { label, .. } => label.len(),
        Message::Flush { .. } | Message::Unchanged { .. } | Message::Ping(_) => 0,
        Message::Hello(_)
        | Message::Welcome(_)
        | Message::PassBegin { .. }
        | Message::PassData { .. }
        | Message::PassEnd { .. }
        | Message::Compare(_)
        | Message::CompareResult(_)
        | Message::Ack { .. }
        | Message::Reading(_)
        | Message::Hasten { .. }
        | Message::Close(_) => panic!("a {} is not spilled", message.name()),
    };
    ByteCount((FRAME_HEADER_BYTES + payload) as u64)
}

impl RingLimits {
    /// For a window whose memory has a limit too: what is written or read at once is a small part of
    /// both.
    pub fn new(bytes: ByteCount, window: ByteCount, bitmap_bytes: ByteCount, end: BlockIndex) -> Self {
        let unit = (window.0 / 8).min(bytes.0 / FILES).clamp(1, UNIT_BYTES_MAX);
        Self { bytes, unit: ByteCount(unit), bitmap_bytes, end }
    }
}

impl Place {
    /// Where the log stands after them.
    pub fn end(&self) -> Lsn {
        self.records.map_or(self.base, |(_, last)| last)
    }

    fn after(&self) -> u64 {
        self.first + self.frames
    }
}

impl Ring {
    /// With nothing in it.
    pub fn new(limits: RingLimits) -> Self {
        Self {
            limits,
            files: VecDeque::new(),
            leaving: Vec::new(),
            places: VecDeque::new(),
            first: 1,
            next: 1,
            next_file: 1,
            end: Lsn::ZERO,
        }
    }

    /// The limits.
    pub fn limits(&self) -> RingLimits {
        self.limits
    }

    /// Whether every frame was trimmed.
    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// What the files take.
    pub fn bytes(&self) -> ByteCount {
        let files: u64 = self.files.iter().map(|file| file.bytes).sum();
        ByteCount(files + self.leaving.iter().map(|(_, bytes)| bytes).sum::<u64>())
    }

    /// What the places from this frame on take.
    pub fn bytes_from(&self, frame: u64) -> ByteCount {
        let later = self.places.iter().rev().take_while(|place| place.first >= frame);
        ByteCount(later.map(|place| place.bytes.0).sum())
    }

    /// The number of the next frame.
    pub fn next(&self) -> u64 {
        self.next
    }

    /// The first frame that was not trimmed.
    pub fn first(&self) -> u64 {
        self.first
    }

    /// Where the log stands before the first frame that is left.
    pub fn base(&self) -> Lsn {
        self.places.front().map_or(self.end, |place| place.base)
    }

    /// Where the log stands after the last frame.
    pub fn end(&self) -> Lsn {
        self.end
    }

    /// How many records have an LSN above `after`.
    pub fn records_above(&self, after: Lsn) -> u64 {
        let of = |place: &Place| {
            place.records.map_or(0, |(first, last)| (last.0 + 1).saturating_sub(first.0.max(after.0 + 1)))
        };
        self.places.iter().map(of).sum()
    }

    /// Whether there is a record with this LSN.
    pub fn has_record(&self, lsn: Lsn) -> bool {
        let at = self.places.partition_point(|place| place.end() < lsn);
        let records = self.places.get(at).and_then(|place| place.records);
        records.is_some_and(|(first, last)| first <= lsn && lsn <= last)
    }

    /// When the first record with an LSN above `after` was captured, or one shortly before it.
    pub fn time_above(&self, after: Lsn) -> Option<CaptureTime> {
        self.places.iter().find(|place| place.records.is_some() && place.end() > after)?.time
    }

    /// The place that has this frame.
    pub fn place_of(&self, frame: u64) -> Option<Place> {
        let at = self.places.partition_point(|place| place.after() <= frame);
        self.places.get(at).copied()
    }

    /// Where frames of so many bytes go next; none when there is no room. `header` is that of a new
    /// file: its number and first frame are filled in.
    pub fn slot(&self, bytes: ByteCount, header: FileHeader) -> Option<Slot> {
        let used = self.bytes().0;
        if let Some(file) = self.files.back().filter(|file| !file.closed)
            && file.bytes + bytes.0 <= self.limits.bytes.0 / FILES
        {
            let slot = Slot { file: file.number, at: ByteOffset(file.bytes), first: self.next, create: None };
            return (used + bytes.0 <= self.limits.bytes.0).then_some(slot);
        }
        let header = FileHeader { number: self.next_file, first: self.next, ..header };
        let slot = Slot {
            file: self.next_file,
            at: ByteOffset(HEADER_BYTES as u64),
            first: self.next,
            create: Some(header),
        };
        (used + HEADER_BYTES as u64 + bytes.0 <= self.limits.bytes.0).then_some(slot)
    }

    /// The frames of `messages` are in their slot.
    ///
    /// # Panics
    /// When the slot is not the next one.
    pub fn appended<'a>(&mut self, slot: &Slot, messages: impl IntoIterator<Item = &'a Message>) {
        assert_eq!(slot.first, self.next, "frames are appended in order");
        if let Some(header) = slot.create {
            self.begin_file(slot.file, slot.at, header.base);
        }
        for message in messages {
            self.append(message);
        }
    }

    /// A file begins, whose first frame is the next.
    pub(crate) fn begin_file(&mut self, number: u64, at: ByteOffset, base: Lsn) {
        if let Some(last) = self.files.back_mut() {
            last.closed = true;
        }
        let bound = ByteCount(self.limits.bitmap_bytes.0 / FILES);
        let touched = DirtyBitmap::bounded(bound, self.limits.end);
        self.files.push_back(File { number, bytes: at.0, touched, closed: false });
        self.next_file = number + 1;
        if self.places.is_empty() {
            self.end = base;
        }
    }

    /// The next frame is behind the last one of the newest file.
    pub(crate) fn append(&mut self, message: &Message) {
        let bytes = frame_bytes(message);
        let file = self.files.back_mut().expect("frames are in a file");
        let at = ByteOffset(file.bytes);
        file.bytes += bytes.0;
        let record = match message {
            Message::Record(record) => {
                file.touched.insert(BlockRange::touched_by(record.range));
                Some(record)
            }
            _ => None,
        };
        let extended = self.places.back_mut().filter(|place| {
            let dense = match (record, place.records) {
                (Some(record), Some((_, last))) => record.lsn == last.next(),
                (Some(_), None) | (None, _) => true,
            };
            place.file == file.number && dense && place.bytes.0 + bytes.0 <= self.limits.unit.0
        });
        let place = match extended {
            Some(place) => place,
            None => {
                self.places.push_back(Place {
                    file: file.number,
                    at,
                    bytes: ByteCount::ZERO,
                    first: self.next,
                    frames: 0,
                    base: self.end,
                    records: None,
                    time: None,
                });
                self.places.back_mut().expect("pushed just now")
            }
        };
        place.bytes.0 += bytes.0;
        place.frames += 1;
        if let Some(record) = record {
            place.records = Some((place.records.map_or(record.lsn, |(first, _)| first), record.lsn));
            place.time.get_or_insert(record.time);
            self.end = record.lsn;
        }
        self.next += 1;
    }

    /// Frames could not be written to their slot: whatever is there now, nothing follows it.
    pub fn append_failed(&mut self, slot: &Slot, bytes: ByteCount) {
        match self.files.back_mut().filter(|file| file.number == slot.file) {
            Some(file) => {
                file.bytes += bytes.0;
                file.closed = true;
            }
            None => {
                self.leaving.push((slot.file, slot.at.0 + bytes.0));
                self.next_file = slot.file + 1;
                if let Some(last) = self.files.back_mut() {
                    last.closed = true;
                }
            }
        }
    }

    /// Frames before this one are not needed any more.
    pub fn trim(&mut self, frame: u64) {
        self.first = self.first.max(frame.min(self.next));
        while self.places.front().is_some_and(|place| place.after() <= self.first) {
            self.places.pop_front();
        }
    }

    /// Frames before one that follows the record `durable` are not needed any more. The place of that
    /// record stays: what follows it there may be needed.
    pub fn trim_before(&mut self, durable: Lsn) {
        while let Some(place) = self.places.front().filter(|place| place.end() < durable) {
            self.first = self.first.max(place.after());
            self.places.pop_front();
        }
    }

    /// Frames from this one on cannot be read or are not wanted: the log ends at `end` before them.
    /// Their blocks are to be [`mark`](Self::mark)ed before.
    pub fn cut(&mut self, frame: u64, end: Lsn) {
        while self.places.back().is_some_and(|place| place.first >= frame) {
            self.places.pop_back();
        }
        if let Some(place) = self.places.back_mut().filter(|place| place.after() > frame) {
            place.frames = frame - place.first;
            place.records = place.records.filter(|(first, _)| *first <= end).map(|(first, _)| (first, end));
        }
        self.close();
        self.next = frame.max(self.first);
        self.end = end;
    }

    /// Marks every block that records in the ring touch, and perhaps some of trimmed ones.
    pub fn mark(&self, dirty: &mut DirtyBitmap) {
        for file in &self.files {
            dirty.union_with(&file.touched);
        }
    }

    /// Whether [`take_removable`](Self::take_removable) would give something.
    pub fn has_removable(&self) -> bool {
        let ends = [self.files.front(), self.files.back().filter(|file| file.closed)];
        !self.leaving.is_empty() || ends.into_iter().flatten().any(|file| !self.is_used(file.number))
    }

    fn is_used(&self, number: u64) -> bool {
        match (self.places.front(), self.places.back()) {
            (Some(front), Some(back)) => front.file <= number && number <= back.file,
            _ => false,
        }
    }

    /// The files that nothing is left in; they take room until they were [`removed`](Self::removed).
    pub fn take_removable(&mut self) -> Vec<u64> {
        let (kept, gone): (VecDeque<File>, VecDeque<File>) =
            std::mem::take(&mut self.files).into_iter().partition(|file| self.is_used(file.number));
        self.files = kept;
        self.leaving.extend(gone.iter().map(|file| (file.number, file.bytes)));
        self.leaving.iter().map(|(number, _)| *number).collect()
    }

    /// A file of this length of which nothing counts, or not its end.
    pub(crate) fn found_rest(&mut self, number: u64, bytes: ByteCount) {
        self.next_file = self.next_file.max(number + 1);
        match self.files.iter_mut().find(|file| file.number == number) {
            Some(file) => file.bytes = file.bytes.max(bytes.0),
            None => self.leaving.push((number, bytes.0)),
        }
    }

    /// Files are gone.
    pub fn removed(&mut self, numbers: &[u64]) {
        self.leaving.retain(|(number, _)| !numbers.contains(number));
    }

    /// Nothing more is written to the files that are there.
    pub(crate) fn close(&mut self) {
        for file in &mut self.files {
            file.closed = true;
        }
    }

    /// The next frame has this number: those before were trimmed long ago.
    pub(crate) fn begin_at(&mut self, frame: u64) {
        assert!(self.places.is_empty(), "only before the first frame");
        (self.first, self.next) = (frame, frame);
    }
}
