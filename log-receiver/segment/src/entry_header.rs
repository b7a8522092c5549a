//! The 64 bytes before each entry's payload, to and from [`Entry`].
//!
//! Decoding trusts nothing: a header is good only when its checksum (salted with the log's identity),
//! its segment, its kind and every length in it are right. Zeroed bytes are never a good header.

use backtide_units::{ByteCount, ByteOffset, ByteRange, CaptureTime, Epoch, Lsn, PayloadChecksum};
use bytes::{Buf, BufMut, Bytes};

use crate::{
    AttachFacts, Entry, PAYLOAD_MAX, PassContent, PassReason, SegmentId, Seq, TEXT_MAX,
    body::BATCH_ENTRIES_MAX, pieces::table_length,
};

/// Bytes of an entry's header.
pub const ENTRY_HEADER_LENGTH: usize = 64;

/// Entries begin at multiples of this.
pub(crate) const ALIGNMENT: u64 = 8;

/// No claim about what was synced.
const NO_CLAIM: u32 = u32::MAX;

const FLAG_TRIM: u8 = 1;
const FLAG_ZEROES: u8 = 2;
const FLAG_VALID: u8 = 4;
/// In a batch; the code says how many headers on its body is.
const FLAG_BATCHED: u8 = 8;

/// The kinds of entries, by their number in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EntryKind {
    /// [`Entry::Write`].
    Write = 1,
    /// [`Entry::Zero`].
    Zero = 2,
    /// [`Entry::Flush`].
    Flush = 3,
    /// [`Entry::PassBegin`].
    PassBegin = 4,
    /// [`Entry::PassData`].
    PassData = 5,
    /// [`Entry::PassEnd`].
    PassEnd = 6,
    /// [`Entry::Mark`].
    Mark = 7,
    /// [`Entry::Attach`].
    Attach = 8,
    /// [`Entry::Unchanged`].
    Unchanged = 9,
}

/// A decoded header. The meaning of `lsn`, `offset` and `length` depends on the kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EntryHeader {
    /// What the entry is.
    pub kind: EntryKind,
    pub(crate) flags: u8,
    pub(crate) code: u16,
    /// Its number in the log.
    pub seq: Seq,
    /// LSN of a record, T of a pass, the attach's next LSN.
    pub lsn: Lsn,
    /// When it was captured; zero for pass data.
    pub time: CaptureTime,
    pub(crate) offset: u64,
    pub(crate) length: u64,
    /// Bytes that follow the header.
    pub payload_length: u32,
    /// CRC32C of the payload.
    pub payload_crc: u32,
    /// The segment the entry was written to.
    pub segment: SegmentId,
    /// Every entry up to this one was durable when this was appended, if anything is claimed.
    pub synced: Option<Seq>,
}

/// Why 64 bytes are no header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum HeaderFault {
    /// All zeros: space that was reserved and never written.
    Zero,
    /// Anything else.
    Wrong(&'static str),
}

/// Bytes that an entry with such a payload takes in the file.
pub(crate) fn stored_length(payload: ByteCount) -> u64 {
    ENTRY_HEADER_LENGTH as u64 + table_length(payload) + payload.0.next_multiple_of(ALIGNMENT)
}

impl EntryKind {
    fn from_number(number: u8) -> Option<Self> {
        Some(match number {
            1 => Self::Write,
            2 => Self::Zero,
            3 => Self::Flush,
            4 => Self::PassBegin,
            5 => Self::PassData,
            6 => Self::PassEnd,
            7 => Self::Mark,
            8 => Self::Attach,
            9 => Self::Unchanged,
            _ => return None,
        })
    }

    /// Whether the entry carries bytes of the disk; the payload of any other is text,
    /// after an id in an attach.
    pub fn is_data(self) -> bool {
        match self {
            Self::Write | Self::Zero | Self::PassData => true,
            Self::Flush | Self::Unchanged | Self::PassBegin | Self::PassEnd | Self::Mark | Self::Attach => {
                false
            }
        }
    }
}

impl EntryHeader {
    /// The header and the payload of `entry` as number `seq` of `segment`. Payload checksums of data
    /// are taken as they came; those of text are computed.
    ///
    /// # Panics
    /// When the entry breaks a limit of the format: callers check first.
    pub fn of(entry: &Entry, seq: Seq, segment: SegmentId, synced: Seq) -> (Self, Bytes) {
        assert!(synced < seq, "entry {seq} cannot be durable before it is appended");
        let mut header = Self {
            kind: EntryKind::Flush,
            flags: 0,
            code: 0,
            seq,
            lsn: Lsn::ZERO,
            time: CaptureTime(0),
            offset: 0,
            length: 0,
            payload_length: 0,
            payload_crc: 0,
            segment,
            synced: Some(synced),
        };
        let payload = header.fill(entry);
        assert!(payload.len() as u64 <= PAYLOAD_MAX.0, "a payload of {} bytes", payload.len());
        header.payload_length = payload.len() as u32;
        if !header.kind.is_data() {
            header.payload_crc = crc32c::crc32c(&payload);
        }
        let fault = header.check();
        assert!(fault.is_none(), "an entry that the format cannot hold: {fault:?}");
        (header, payload)
    }

    fn fill(&mut self, entry: &Entry) -> Bytes {
        let text = |text: &str| Bytes::copy_from_slice(text.as_bytes());
        match entry {
            Entry::Write { lsn, time, range, payload, checksum } => {
                self.kind = EntryKind::Write;
                (self.lsn, self.time, self.payload_crc) = (*lsn, *time, checksum.whole());
                self.set_range(*range);
                payload.clone()
            }
            Entry::Zero { lsn, time, range, trim } => {
                self.kind = EntryKind::Zero;
                (self.lsn, self.time) = (*lsn, *time);
                self.flags = if *trim { FLAG_ZEROES | FLAG_TRIM } else { FLAG_ZEROES };
                self.set_range(*range);
                Bytes::new()
            }
            Entry::Flush { lsn, time } => {
                self.kind = EntryKind::Flush;
                (self.lsn, self.time) = (*lsn, *time);
                Bytes::new()
            }
            Entry::Unchanged { lsn, time } => {
                self.kind = EntryKind::Unchanged;
                (self.lsn, self.time) = (*lsn, *time);
                Bytes::new()
            }
            Entry::PassBegin { at, gap_from, time, reason } => {
                self.kind = EntryKind::PassBegin;
                (self.lsn, self.time, self.offset) = (*at, *time, gap_from.0);
                self.code = u16::from(reason.code);
                text(&reason.text)
            }
            Entry::PassData { at, range, content } => {
                self.kind = EntryKind::PassData;
                self.lsn = *at;
                self.set_range(*range);
                match content {
                    PassContent::Bytes { payload, checksum } => {
                        self.payload_crc = checksum.whole();
                        payload.clone()
                    }
                    PassContent::Zeroes => {
                        self.flags = FLAG_ZEROES;
                        Bytes::new()
                    }
                }
            }
            Entry::PassEnd { at, valid_from, time } => {
                self.kind = EntryKind::PassEnd;
                (self.lsn, self.time) = (*at, *time);
                if let Some(valid_from) = valid_from {
                    (self.flags, self.offset) = (FLAG_VALID, valid_from.0);
                }
                Bytes::new()
            }
            Entry::Mark { lsn, time, label } => {
                self.kind = EntryKind::Mark;
                (self.lsn, self.time) = (*lsn, *time);
                text(label)
            }
            Entry::Attach { epoch, attach, next_lsn, size, name, time, facts } => {
                self.kind = EntryKind::Attach;
                (self.lsn, self.time, self.offset, self.length) = (*next_lsn, *time, epoch.0, size.0);
                facts.encode(*attach, name)
            }
        }
    }

    fn set_range(&mut self, range: ByteRange) {
        (self.offset, self.length) = (range.start().0, range.count().0);
    }

    /// What is wrong with the fields; `None` when they fit together.
    fn check(&self) -> Option<&'static str> {
        if self.flags & FLAG_BATCHED != 0 && !self.fits_in_a_batch() {
            return Some("a batch where none can be");
        }
        let text_fits = u64::from(self.payload_length) <= TEXT_MAX.0;
        match self.kind {
            EntryKind::Write | EntryKind::Zero | EntryKind::PassData => self.check_data(),
            EntryKind::Flush | EntryKind::Unchanged | EntryKind::PassEnd if self.payload_length != 0 => {
                Some("a payload where none can be")
            }
            EntryKind::PassBegin if self.code > 255 => Some("a reason code beyond 255"),
            EntryKind::Flush
            | EntryKind::Unchanged
            | EntryKind::PassBegin
            | EntryKind::PassEnd
            | EntryKind::Mark
            | EntryKind::Attach => (!text_fits).then_some("a text longer than 1024 bytes"),
        }
    }

    fn fits_in_a_batch(&self) -> bool {
        let kind = match self.kind {
            EntryKind::Write
            | EntryKind::Zero
            | EntryKind::Flush
            | EntryKind::PassData
            | EntryKind::Unchanged => true,
            EntryKind::PassBegin | EntryKind::PassEnd | EntryKind::Mark | EntryKind::Attach => false,
        };
        kind && (1..=BATCH_ENTRIES_MAX).contains(&self.code)
    }

    /// The same entry in a batch whose body stands so many headers on.
    pub(crate) fn in_batch(mut self, headers_on: u16) -> Self {
        (self.flags, self.code) = (self.flags | FLAG_BATCHED, headers_on);
        self
    }

    /// How many headers on the body of its batch is; `None` for an entry that stands for itself.
    pub(crate) fn body_ahead(&self) -> Option<u16> {
        (self.flags & FLAG_BATCHED != 0).then_some(self.code)
    }

    fn check_data(&self) -> Option<&'static str> {
        let zeroes = self.flags & FLAG_ZEROES != 0;
        let ends = self.offset.checked_add(self.length);
        if self.length == 0 || ends.is_none_or(|end| end > crate::DISK_SIZE_MAX.0) {
            return Some("a range that is empty or beyond the largest disk");
        }
        if zeroes && self.payload_length != 0 {
            return Some("zeroes with a payload");
        }
        if !zeroes && u64::from(self.payload_length) != self.length {
            return Some("a payload whose length is not its range's");
        }
        if u64::from(self.payload_length) > PAYLOAD_MAX.0 {
            return Some("a payload longer than 32 MiB");
        }
        match self.kind {
            EntryKind::Write if zeroes => Some("a write with the zeroes flag"),
            EntryKind::Zero if !zeroes => Some("zeroes without their flag"),
            EntryKind::Write
            | EntryKind::Zero
            | EntryKind::PassData
            | EntryKind::Flush
            | EntryKind::Unchanged
            | EntryKind::PassBegin
            | EntryKind::PassEnd
            | EntryKind::Mark
            | EntryKind::Attach => None,
        }
    }

    pub(crate) fn encode(&self, salt: u32) -> [u8; ENTRY_HEADER_LENGTH] {
        let mut bytes = [0; ENTRY_HEADER_LENGTH];
        let mut out = &mut bytes[4..];
        out.put_u8(self.kind as u8);
        out.put_u8(self.flags);
        out.put_u16_le(self.code);
        out.put_u64_le(self.seq.0);
        out.put_u64_le(self.lsn.0);
        out.put_u64_le(self.time.0);
        out.put_u64_le(self.offset);
        out.put_u64_le(self.length);
        out.put_u32_le(self.payload_length);
        out.put_u32_le(self.payload_crc);
        out.put_u32_le(self.segment.0);
        let behind = self.synced.map_or(u64::MAX, |synced| self.seq.0 - synced.0);
        out.put_u32_le(u32::try_from(behind).unwrap_or(NO_CLAIM));
        let crc = crc32c::crc32c_append(salt, &bytes[4..]);
        bytes[..4].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Whether `bytes` could begin a header of `segment`: a cheap test before the checksum.
    pub(crate) fn looks_right(bytes: &[u8], segment: SegmentId) -> bool {
        bytes[56..60] == segment.0.to_le_bytes() && matches!(bytes[4], 1..=9)
    }

    pub(crate) fn decode(
        bytes: &[u8; ENTRY_HEADER_LENGTH],
        salt: u32,
        segment: SegmentId,
    ) -> Result<Self, HeaderFault> {
        if bytes.iter().all(|&byte| byte == 0) {
            return Err(HeaderFault::Zero);
        }
        let mut input = &bytes[..];
        if input.get_u32_le() != crc32c::crc32c_append(salt, &bytes[4..]) {
            return Err(HeaderFault::Wrong("its checksum is wrong"));
        }
        let kind = EntryKind::from_number(input.get_u8()).ok_or(HeaderFault::Wrong("its kind is unknown"))?;
        let mut header = Self {
            kind,
            flags: input.get_u8(),
            code: input.get_u16_le(),
            seq: Seq(input.get_u64_le()),
            lsn: Lsn(input.get_u64_le()),
            time: CaptureTime(input.get_u64_le()),
            offset: input.get_u64_le(),
            length: input.get_u64_le(),
            payload_length: input.get_u32_le(),
            payload_crc: input.get_u32_le(),
            segment: SegmentId(input.get_u32_le()),
            synced: None,
        };
        if header.seq == Seq(0) || header.seq > Seq::MAX {
            return Err(HeaderFault::Wrong("its number is out of range"));
        }
        let behind = input.get_u32_le();
        if behind != NO_CLAIM {
            header.synced = header.seq.0.checked_sub(u64::from(behind)).map(Seq);
        }
        if header.segment != segment {
            return Err(HeaderFault::Wrong("it belongs to another segment"));
        }
        match header.check() {
            Some(fault) => Err(HeaderFault::Wrong(fault)),
            None => Ok(header),
        }
    }

    /// Where the entry's bytes of the disk lie; `None` for entries without any.
    pub fn range(&self) -> Option<ByteRange> {
        if !self.kind.is_data() {
            return None;
        }
        ByteRange::new(ByteOffset(self.offset), ByteCount(self.length))
    }

    /// Bytes that the entry takes in the file, table and padding included. One in a batch takes its header; what
    /// the batch takes beside them is known to the body.
    pub fn stored_length(&self) -> u64 {
        if self.body_ahead().is_some() {
            return ENTRY_HEADER_LENGTH as u64;
        }
        stored_length(ByteCount(self.payload_length.into()))
    }

    /// The entry, with its payload.
    ///
    /// # Errors
    /// What is wrong: the payload of a text is no UTF-8, or no disk name.
    pub fn entry(&self, payload: Bytes) -> Result<Entry, &'static str> {
        let utf8 = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).map_err(|_| "its text is no UTF-8");
        let text = || utf8(&payload);
        let range = || self.range().ok_or("its range is beyond any disk");
        let (lsn, time) = (self.lsn, self.time);
        Ok(match self.kind {
            EntryKind::Write => {
                let checksum = PayloadChecksum::captured(self.payload_crc);
                Entry::Write { lsn, time, range: range()?, payload, checksum }
            }
            EntryKind::Zero => Entry::Zero { lsn, time, range: range()?, trim: self.flags & FLAG_TRIM != 0 },
            EntryKind::Flush => Entry::Flush { lsn, time },
            EntryKind::Unchanged => Entry::Unchanged { lsn, time },
            EntryKind::PassBegin => Entry::PassBegin {
                at: lsn,
                gap_from: Lsn(self.offset),
                time,
                reason: PassReason {
                    code: u8::try_from(self.code).map_err(|_| "its reason code is beyond 255")?,
                    text: text()?,
                },
            },
            EntryKind::PassData => {
                let content = if self.flags & FLAG_ZEROES != 0 {
                    PassContent::Zeroes
                } else {
                    PassContent::Bytes { payload, checksum: PayloadChecksum::captured(self.payload_crc) }
                };
                Entry::PassData { at: lsn, range: range()?, content }
            }
            EntryKind::PassEnd => {
                let valid_from = (self.flags & FLAG_VALID != 0).then_some(Lsn(self.offset));
                Entry::PassEnd { at: lsn, valid_from, time }
            }
            EntryKind::Mark => Entry::Mark { lsn, time, label: text()? },
            EntryKind::Attach => {
                let told = AttachFacts::decode(&payload).ok_or("an attach that tells no disk")?;
                let (attach, facts, name) = told;
                let (epoch, size) = (Epoch(self.offset), ByteCount(self.length));
                Entry::Attach { epoch, attach, next_lsn: lsn, size, name, time, facts }
            }
        })
    }
}
