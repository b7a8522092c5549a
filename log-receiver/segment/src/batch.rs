//! Gathering entries whose payloads are compressed together.
//!
//! A batch grows to 64 KiB of payload, or to one payload that is longer, and is closed when its bytes have to be in the file. Where
//! each header stands is known when its entry is appended; only the body behind the last one depends on how well the
//! bytes compress. Data that does not is found out by trying, and then left alone for a while: for longer each time.

use backtide_units::{ByteCount, PayloadChecksum};
use bytes::{Bytes, BytesMut};

use crate::{
    Compression, ENTRY_HEADER_LENGTH, EntryHeader, EntryKind, Seq,
    body::{BATCH_ENTRIES_MAX, FRAME, FrameRecord, body_length_max, encode_body},
    compress::Method,
    entry_header::ALIGNMENT,
    pieces::put_table,
};

/// After data that did not compress so many bytes are not tried, in the beginning and at the most.
const LEFT_ALONE: (u64, u64) = (64 << 10, 4 << 20);

const HEADER: u64 = ENTRY_HEADER_LENGTH as u64;

/// Behind payloads, up to a multiple of 8.
const PADDING: [u8; ALIGNMENT as usize] = [0; ALIGNMENT as usize];

/// What an entry does to the batch that is gathered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// It stands for itself; the batch is closed before.
    Alone,
    /// It begins one; the batch before is closed.
    Begins,
    /// It is one more of the batch.
    Joins,
}

/// Decides what is gathered, and holds the batch.
pub(crate) struct Gathering {
    method: Option<Method>,
    batch: Option<Batch>,
    /// So many bytes are not tried.
    leave: u64,
    /// As many were left alone the last time.
    left: u64,
}

struct Batch {
    method: Method,
    start: u64,
    headers: Vec<EntryHeader>,
    starts: Vec<u32>,
    payloads: Vec<Bytes>,
    bytes: u32,
    /// Of the payload that is longer than a frame, which is alone.
    long: Option<PayloadChecksum>,
}

/// A batch as it goes into the file.
pub(crate) struct Closed {
    pub(crate) parts: Vec<Bytes>,
    /// Where the next entry goes.
    pub(crate) end: u64,
}

impl Gathering {
    pub(crate) fn new(compression: Compression) -> Self {
        Self { method: compression.method(), batch: None, leave: 0, left: 0 }
    }

    /// Where an entry would end at the most, were it appended behind `end` now.
    pub(crate) fn reach(&self, end: u64, payload: ByteCount) -> u64 {
        let alone = HEADER + body_length_max(1, payload.0 as u32);
        match (&self.batch, self.method) {
            (Some(batch), _) => batch.end_max(0, 0) + alone,
            (None, Some(_)) => end + alone,
            (None, None) => end + crate::entry_header::stored_length(payload),
        }
    }

    /// Where the next entry belongs.
    pub(crate) fn place(&mut self, header: &EntryHeader) -> Place {
        let Some(_) = self.method else { return Place::Alone };
        let length = u64::from(header.payload_length);
        let may_join = match header.kind {
            EntryKind::Write
            | EntryKind::Zero
            | EntryKind::Flush
            | EntryKind::PassData
            | EntryKind::Unchanged => true,
            EntryKind::PassBegin | EntryKind::PassEnd | EntryKind::Mark | EntryKind::Attach => false,
        };
        if let Some(batch) = &self.batch
            && may_join
            && u64::from(batch.bytes) + length <= FRAME
        {
            return Place::Joins;
        }
        if !header.kind.is_data() || length == 0 {
            return Place::Alone;
        }
        if self.leave > 0 {
            self.leave = self.leave.saturating_sub(length);
            return Place::Alone;
        }
        Place::Begins
    }

    /// Adds an entry that begins a batch at `start` or joins it. Gives where the next header goes, and where the batch
    /// ends at the most.
    pub(crate) fn add(
        &mut self,
        start: u64,
        header: EntryHeader,
        payload: Bytes,
        checksum: Option<&PayloadChecksum>,
    ) -> u64 {
        let method = self.method.expect("only what is compressed is gathered");
        let batch = self.batch.get_or_insert_with(|| Batch::new(method, start));
        batch.starts.push(batch.bytes);
        batch.bytes += header.payload_length;
        batch.headers.push(header);
        if u64::from(header.payload_length) > FRAME {
            batch.long = checksum.cloned();
        }
        if !payload.is_empty() {
            batch.payloads.push(payload);
        }
        batch.start + batch.headers.len() as u64 * HEADER
    }

    /// Where an entry's batch would end at the most.
    pub(crate) fn end_max_with(&self, start: u64, place: Place, header: &EntryHeader) -> u64 {
        match (&self.batch, place) {
            (Some(batch), Place::Joins) => batch.end_max(1, header.payload_length),
            (_, Place::Joins | Place::Begins) => start + HEADER + body_length_max(1, header.payload_length),
            (_, Place::Alone) => start + header.stored_length(),
        }
    }

    /// Whether the batch must be closed before the next entry.
    pub(crate) fn is_full(&self) -> bool {
        self.batch.as_ref().is_some_and(|batch| {
            u64::from(batch.bytes) >= FRAME || batch.headers.len() >= usize::from(BATCH_ENTRIES_MAX)
        })
    }

    /// Compresses the batch, if there is one.
    pub(crate) fn close(&mut self, salt: u32) -> Option<Closed> {
        let batch = self.batch.take()?;
        let (frames, contents) = batch.compress();
        let stored: u64 = contents.iter().flatten().map(|part| part.len() as u64).sum();
        let saved = stored * 10 <= u64::from(batch.bytes) * 9;
        (self.left, self.leave) = match (saved, (self.left * 2).clamp(LEFT_ALONE.0, LEFT_ALONE.1)) {
            (true, _) => (0, 0),
            (false, more) => (more, more),
        };
        Some(if saved || batch.headers.len() > 1 {
            batch.with_body(salt, &frames, contents.into_iter().flatten().collect())
        } else {
            batch.plain(salt)
        })
    }
}

impl Batch {
    fn new(method: Method, start: u64) -> Self {
        let (headers, starts, payloads) = (Vec::new(), Vec::new(), Vec::new());
        Self { method, start, headers, starts, payloads, bytes: 0, long: None }
    }

    fn end_max(&self, more: u16, bytes: u32) -> u64 {
        let entries = self.headers.len() as u16 + more;
        self.start + u64::from(entries) * HEADER + body_length_max(entries, self.bytes + bytes)
    }

    /// The frames, and the stored bytes of each.
    fn compress(&self) -> (Vec<FrameRecord>, Vec<Vec<Bytes>>) {
        let running = self.long.as_ref().map(|checksum| checksum.running().expect("a complete checksum"));
        let (mut frames, mut contents, mut end) = (Vec::new(), Vec::new(), 0);
        let joined: Bytes = match &self.payloads[..] {
            [payload] => payload.clone(),
            payloads => payloads.concat().into(),
        };
        for (number, content) in joined.chunks(FRAME as usize).enumerate() {
            let compressed = self.method.compress(content);
            let stored: Vec<Bytes> = match compressed {
                Some(compressed) => vec![compressed],
                None if self.payloads.len() > 1 => self.payloads.clone(),
                None => vec![joined.slice_ref(content)],
            };
            let crc = stored.iter().fold(0, |crc, part| crc32c::crc32c_append(crc, part));
            end += stored.iter().map(Bytes::len).sum::<usize>() as u32;
            let running = running.map_or_else(|| crc32c::crc32c(content), |running| running[number]);
            frames.push(FrameRecord { end, crc, running });
            contents.push(stored);
        }
        (frames, contents)
    }

    fn with_body(self, salt: u32, frames: &[FrameRecord], contents: Vec<Bytes>) -> Closed {
        let Self { method, headers, starts, bytes, .. } = self;
        let segment = headers[0].segment;
        let first: Seq = headers[0].seq;
        let mut before = BytesMut::with_capacity(headers.len() * ENTRY_HEADER_LENGTH);
        for (nth, header) in headers.iter().enumerate() {
            let on = (headers.len() - nth) as u16;
            before.extend_from_slice(&header.in_batch(on).encode(salt));
        }
        let mut parts = vec![before.freeze()];
        parts.push(encode_body((salt, segment), (method, first, bytes), &starts, frames));
        parts.extend(contents);
        Closed::padded(self.start, parts)
    }

    /// As an entry for itself stands.
    fn plain(self, salt: u32) -> Closed {
        let (header, payload) = (self.headers[0], &self.payloads[0]);
        let mut before = BytesMut::from(&header.encode(salt)[..]);
        if let Some(checksum) = &self.long {
            put_table(&mut before, payload, checksum);
        }
        Closed::padded(self.start, vec![before.freeze(), payload.clone()])
    }
}

impl Closed {
    fn padded(start: u64, mut parts: Vec<Bytes>) -> Self {
        let length: u64 = parts.iter().map(|part| part.len() as u64).sum();
        let padding = length.next_multiple_of(ALIGNMENT) - length;
        if padding > 0 {
            parts.push(Bytes::from_static(&PADDING).slice(..padding as usize));
        }
        Self { parts, end: start + length + padding }
    }
}
