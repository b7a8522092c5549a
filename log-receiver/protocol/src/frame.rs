//! How messages lie on the wire. `FORMAT.md` has the table; this file is its only code.
//!
//! Every frame is a 64-byte header, checksummed, and a payload of the length the header gives,
//! checksummed too. Encoding yields the header and the payload apart, so that a driver can hand
//! both to one vectored write without copying the payload.

mod reading;

use backtide_units::{
    ByteCount, ByteOffset, ByteRange, CaptureTime, Epoch, LogPosition, Lsn, PayloadChecksum, Reason,
};
use bytes::{Buf, BufMut, Bytes, BytesMut};

use crate::{
    Closed, Hello, PROTOCOL_VERSION, ProtocolError, Welcome,
    message::{
        COMPARE_CHUNK_BYTES_MAX, COMPARE_ITEMS_MAX, COMPARE_ZEROES_BYTES_MAX, Compare, CompareItem,
        CompareResult, Content, Data, LABEL_BYTES_MAX, Message, Ping, Record, RecordBody, Sequenced,
    },
    reading::{FETCH_BYTES_MAX, OWNER_BYTES_MAX},
};

/// "BTS1", little-endian: begins every frame.
pub const MAGIC: u32 = u32::from_le_bytes(*b"BTS1");

/// Bytes of a frame header.
pub const FRAME_HEADER_BYTES: usize = 64;

/// The longest payload of a frame: one NBD write of the largest size a client may send.
pub const PAYLOAD_BYTES_MAX: u64 = 32 * 1024 * 1024;

/// The longest payload of a message in JSON.
const JSON_BYTES_MAX: u64 = 64 * 1024;

const CRC_AT: usize = FRAME_HEADER_BYTES - 4;
const COMPARE_ITEM_BYTES: usize = 8 + 8 + 32;

/// Stands for "zeroes" where a hash would be; no input is known whose BLAKE3 this is.
const ZEROES_HASH: [u8; 32] = [0; 32];

/// The frame types. Never reuse a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Type {
    Hello = 1,
    Welcome = 2,
    Write = 3,
    Zero = 4,
    Trim = 5,
    Flush = 6,
    PassBegin = 7,
    PassData = 8,
    PassEnd = 9,
    Mark = 10,
    Compare = 11,
    CompareResult = 12,
    Ack = 13,
    Ping = 14,
    Close = 15,
    OpenPoint = 16,
    PointOpened = 17,
    Fetch = 18,
    Piece = 19,
    AskBlocks = 20,
    Blocks = 21,
    Hold = 22,
    Release = 23,
    Answered = 24,
    Failed = 25,
    Hasten = 26,
    Unchanged = 27,
}

const TYPES: [Type; 27] = [
    Type::Hello,
    Type::Welcome,
    Type::Write,
    Type::Zero,
    Type::Trim,
    Type::Flush,
    Type::PassBegin,
    Type::PassData,
    Type::PassEnd,
    Type::Mark,
    Type::Compare,
    Type::CompareResult,
    Type::Ack,
    Type::Ping,
    Type::Close,
    Type::OpenPoint,
    Type::PointOpened,
    Type::Fetch,
    Type::Piece,
    Type::AskBlocks,
    Type::Blocks,
    Type::Hold,
    Type::Release,
    Type::Answered,
    Type::Failed,
    Type::Hasten,
    Type::Unchanged,
];

impl Type {
    /// The longest payload of the type: checked before a byte of it is kept.
    fn payload_bytes_max(self) -> u64 {
        match self {
            Self::Hello
            | Self::Welcome
            | Self::Close
            | Self::OpenPoint
            | Self::PointOpened
            | Self::Failed => JSON_BYTES_MAX,
            Self::Piece => FETCH_BYTES_MAX,
            Self::Blocks => reading::BLOCKS_BYTES_MAX,
            Self::Write | Self::PassData => PAYLOAD_BYTES_MAX,
            Self::Zero | Self::Trim => 8,
            Self::Mark => LABEL_BYTES_MAX as u64,
            Self::Compare => (COMPARE_ITEMS_MAX * COMPARE_ITEM_BYTES) as u64,
            Self::CompareResult => (COMPARE_ITEMS_MAX * 4) as u64,
            Self::Fetch | Self::AskBlocks | Self::Answered => 0,
            Self::Hold | Self::Release => OWNER_BYTES_MAX as u64,
            Self::Flush
            | Self::Unchanged
            | Self::PassBegin
            | Self::PassEnd
            | Self::Ack
            | Self::Ping
            | Self::Hasten => 0,
        }
    }
}

/// A frame header's fields; `a` to `d` mean what `FORMAT.md` says for each type.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Header {
    kind: Type,
    flags: u8,
    pub(crate) payload_bytes: u32,
    pub(crate) seq: u64,
    a: u64,
    b: u64,
    c: u64,
    d: u64,
    pub(crate) payload_crc: u32,
}

impl Header {
    fn of(kind: Type) -> Self {
        Self { kind, flags: 0, payload_bytes: 0, seq: 0, a: 0, b: 0, c: 0, d: 0, payload_crc: 0 }
    }

    fn fields(self, a: u64, b: u64, c: u64, d: u64) -> Self {
        Self { a, b, c, d, ..self }
    }

    fn encode(&self) -> [u8; FRAME_HEADER_BYTES] {
        let mut bytes = [0u8; FRAME_HEADER_BYTES];
        let mut out = &mut bytes[..];
        out.put_u32_le(MAGIC);
        out.put_u8(self.kind as u8);
        out.put_u8(self.flags);
        out.put_u16_le(0);
        out.put_u64_le(self.seq);
        for field in [self.a, self.b, self.c, self.d] {
            out.put_u64_le(field);
        }
        out.put_u32_le(self.payload_bytes);
        out.put_u32_le(self.payload_crc);
        out.put_u32_le(0);
        let crc = crc32c::crc32c(&bytes[..CRC_AT]);
        bytes[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Reads a header and checks everything that can be checked without the payload.
    pub(crate) fn decode(bytes: &[u8; FRAME_HEADER_BYTES]) -> Result<Self, ProtocolError> {
        let mut input = &bytes[..];
        let magic = input.get_u32_le();
        if magic != MAGIC {
            return Err(ProtocolError::Magic { expected: MAGIC, found: magic });
        }
        let expected = (&bytes[CRC_AT..]).get_u32_le();
        let found = crc32c::crc32c(&bytes[..CRC_AT]);
        if expected != found {
            return Err(ProtocolError::HeaderChecksum { expected, found });
        }
        let kind = input.get_u8();
        let kind =
            TYPES.into_iter().find(|t| *t as u8 == kind).ok_or(ProtocolError::UnknownType { found: kind })?;
        let flags = input.get_u8();
        input.advance(2);
        let seq = input.get_u64_le();
        let [a, b, c, d] = std::array::from_fn(|_| input.get_u64_le());
        let payload_bytes = input.get_u32_le();
        let payload_crc = input.get_u32_le();
        let limit = kind.payload_bytes_max();
        if u64::from(payload_bytes) > limit {
            return Err(ProtocolError::TooLarge { found: payload_bytes.into(), limit });
        }
        Ok(Self { kind, flags, payload_bytes, seq, a, b, c, d, payload_crc })
    }
}

const FLAG_HAS_VALID_FROM: u8 = 1;
const FLAG_DURABLE: u8 = 1;

/// The frame of `message` as the `seq`-th of its sender: header and payload, to be written one
/// after the other.
pub fn encode(seq: u64, message: &Message) -> ([u8; FRAME_HEADER_BYTES], Bytes) {
    let (header, data) = encode_parts(message);
    let bytes = data.bytes().clone();
    let payload_bytes = u32::try_from(bytes.len()).expect("payloads are limited far below 4 GiB");
    let header = Header { seq, payload_bytes, payload_crc: data.crc32c(), ..header };
    (header.encode(), bytes)
}

fn encode_parts(message: &Message) -> (Header, Data) {
    let none = || Data::capture(Bytes::new());
    match message {
        Message::Hello(hello) => (Header::of(Type::Hello), json(serde_json::to_vec(hello))),
        Message::Welcome(welcome) => (Header::of(Type::Welcome), json(serde_json::to_vec(welcome))),
        Message::Close(closed) => (Header::of(Type::Close), json(serde_json::to_vec(closed))),
        Message::Record(record) => encode_record(record),
        Message::Flush { lsn, time } => (Header::of(Type::Flush).fields(lsn.0, 0, 0, time.0), none()),
        Message::Unchanged { lsn, time } => (Header::of(Type::Unchanged).fields(lsn.0, 0, 0, time.0), none()),
        Message::PassBegin { at, gap_from, time, reason } => {
            (Header::of(Type::PassBegin).fields(at.0, gap_from.0, reason.code().into(), time.0), none())
        }
        Message::PassData { at, range, data } => {
            (Header::of(Type::PassData).fields(at.0, 0, range.start().0, range.count().0), data.clone())
        }
        Message::PassEnd { at, valid_from, time } => {
            let header = Header::of(Type::PassEnd).fields(at.0, valid_from.unwrap_or_default().0, 0, time.0);
            let flags = if valid_from.is_some() { FLAG_HAS_VALID_FROM } else { 0 };
            (Header { flags, ..header }, none())
        }
        Message::Mark { lsn, time, label } => (
            Header::of(Type::Mark).fields(lsn.0, 0, 0, time.0),
            Data::capture(Bytes::copy_from_slice(label.as_bytes())),
        ),
        Message::Compare(compare) => encode_compare(compare),
        Message::CompareResult(result) => {
            let mut payload = BytesMut::with_capacity(result.differing.len() * 4);
            result.differing.iter().for_each(|index| payload.put_u32_le(*index));
            (Header::of(Type::CompareResult).fields(result.id, 0, 0, 0), Data::capture(payload.freeze()))
        }
        Message::Ack { received, durable, position } => {
            (Header::of(Type::Ack).fields(*received, *durable, position.0, 0), none())
        }
        Message::Hasten { durable } => {
            let flags = if *durable { FLAG_DURABLE } else { 0 };
            (Header { flags, ..Header::of(Type::Hasten) }, none())
        }
        Message::Ping(Ping { sent, heard }) => {
            let of = |time: &Option<CaptureTime>| time.unwrap_or_default().0;
            (Header::of(Type::Ping).fields(0, 0, of(heard), of(sent)), none())
        }
        Message::Reading(reading) => reading::encode(reading),
    }
}

fn json(bytes: Result<Vec<u8>, serde_json::Error>) -> Data {
    Data::capture(bytes.expect("plain structs always serialize").into())
}

fn encode_record(record: &Record) -> (Header, Data) {
    let Record { lsn, previous, time, range, body } = record;
    match body {
        RecordBody::Write(data) => {
            (Header::of(Type::Write).fields(lsn.0, previous.0, range.start().0, time.0), data.clone())
        }
        RecordBody::Zero | RecordBody::Trim => {
            let kind = if *body == RecordBody::Zero { Type::Zero } else { Type::Trim };
            let length = Bytes::copy_from_slice(&range.count().0.to_le_bytes());
            (Header::of(kind).fields(lsn.0, previous.0, range.start().0, time.0), Data::capture(length))
        }
    }
}

fn encode_compare(compare: &Compare) -> (Header, Data) {
    let mut payload = BytesMut::with_capacity(compare.items.len() * COMPARE_ITEM_BYTES);
    for item in &compare.items {
        payload.put_u64_le(item.range.start().0);
        payload.put_u64_le(item.range.count().0);
        payload.put_slice(match &item.content {
            Content::Hash(hash) => hash,
            Content::Zeroes => &ZEROES_HASH,
        });
    }
    (Header::of(Type::Compare).fields(compare.id, compare.at.0, 0, 0), Data::capture(payload.freeze()))
}

/// The message of a header and its payload, whose checksum is verified here.
pub(crate) fn decode(header: &Header, payload: Bytes) -> Result<Sequenced, ProtocolError> {
    // The one pass over the bytes: the log stores the checksums of pieces that it gives.
    let checksum = PayloadChecksum::of(&payload);
    let (expected, found) = (header.payload_crc, checksum.whole());
    if found != expected {
        return Err(ProtocolError::PayloadChecksum { seq: header.seq, expected, found });
    }
    let message = decode_message(header, payload, checksum)?;
    Ok(Sequenced { seq: header.seq, message })
}

fn decode_message(
    header: &Header,
    payload: Bytes,
    checksum: PayloadChecksum,
) -> Result<Message, ProtocolError> {
    let Header { a, b, c, d, .. } = *header;
    Ok(match header.kind {
        Type::Hello => {
            let hello: Hello = of_our_version("hello", &payload)?;
            refuse_above("hello", Some(hello.epoch), Epoch::PLAUSIBLE_MAX)?;
            Message::Hello(hello)
        }
        Type::Welcome => {
            let welcome: Welcome = of_our_version("welcome", &payload)?;
            welcome.plausible().map_err(|why| invalid("welcome", why))?;
            Message::Welcome(welcome)
        }
        Type::Close => {
            let closed: Closed = from_json("close", &payload)?;
            refuse_above("close", closed.epoch, Epoch::OTHERS_MAX)?;
            Message::Close(closed)
        }
        Type::Write => {
            let range = range_of("write", c, payload.len() as u64)?;
            let data = Data::with_checksum(payload, checksum);
            Message::Record(record(header, range, RecordBody::Write(data)))
        }
        Type::Zero => Message::Record(record(header, zeroed_range(header, payload)?, RecordBody::Zero)),
        Type::Trim => Message::Record(record(header, zeroed_range(header, payload)?, RecordBody::Trim)),
        Type::Flush => Message::Flush { lsn: Lsn(a), time: CaptureTime(d) },
        Type::Unchanged => Message::Unchanged { lsn: Lsn(a), time: CaptureTime(d) },
        Type::PassBegin => {
            let reason = u8::try_from(c).ok().and_then(Reason::from_code);
            let reason = reason.ok_or_else(|| invalid("pass-begin", format!("unknown reason code {c}")))?;
            Message::PassBegin { at: Lsn(a), gap_from: Lsn(b), time: CaptureTime(d), reason }
        }
        Type::PassData => {
            let range = range_of("pass-data", c, d)?;
            if !payload.is_empty() && payload.len() as u64 != d {
                return Err(invalid(
                    "pass-data",
                    format!("range of {d} bytes with a payload of {}", payload.len()),
                ));
            }
            let data = Data::with_checksum(payload, checksum);
            Message::PassData { at: Lsn(a), range, data }
        }
        Type::PassEnd => {
            let valid_from = (header.flags & FLAG_HAS_VALID_FROM != 0).then_some(Lsn(b));
            Message::PassEnd { at: Lsn(a), valid_from, time: CaptureTime(d) }
        }
        Type::Mark => Message::Mark { lsn: Lsn(a), time: CaptureTime(d), label: label(&payload)? },
        Type::Compare => Message::Compare(Compare { id: a, at: Lsn(b), items: compare_items(payload)? }),
        Type::CompareResult => Message::CompareResult(compare_result(a, payload)?),
        Type::Ack => Message::Ack { received: a, durable: b, position: LogPosition(c) },
        Type::Hasten => Message::Hasten { durable: header.flags & FLAG_DURABLE != 0 },
        Type::Ping => {
            let time = |micros| Some(CaptureTime(micros)).filter(|time| *time != CaptureTime::default());
            Message::Ping(Ping { sent: time(d), heard: time(c) })
        }
        Type::OpenPoint
        | Type::PointOpened
        | Type::Fetch
        | Type::Piece
        | Type::AskBlocks
        | Type::Blocks
        | Type::Hold
        | Type::Release
        | Type::Answered
        | Type::Failed => Message::Reading(reading::decode(header, Data::with_checksum(payload, checksum))?),
    })
}

fn record(header: &Header, range: ByteRange, body: RecordBody) -> Record {
    Record { lsn: Lsn(header.a), previous: Lsn(header.b), time: CaptureTime(header.d), range, body }
}

fn zeroed_range(header: &Header, mut payload: Bytes) -> Result<ByteRange, ProtocolError> {
    let length = payload.try_get_u64_le().map_err(|_| invalid("zero", "the length is missing".into()))?;
    if !payload.is_empty() {
        return Err(invalid("zero", format!("{} bytes after the length", payload.len())));
    }
    range_of("zero", header.c, length)
}

fn range_of(what: &'static str, start: u64, count: u64) -> Result<ByteRange, ProtocolError> {
    let range = ByteRange::new(ByteOffset(start), ByteCount(count));
    let range =
        range.ok_or_else(|| invalid(what, format!("offset {start} plus length {count} is beyond 2^64")))?;
    if range.is_empty() {
        return Err(invalid(what, "an empty range".into()));
    }
    Ok(range)
}

fn label(payload: &[u8]) -> Result<String, ProtocolError> {
    let text =
        std::str::from_utf8(payload).map_err(|e| invalid("mark", format!("label is not UTF-8: {e}")))?;
    if text.is_empty() || text.len() > LABEL_BYTES_MAX {
        return Err(invalid(
            "mark",
            format!("expected a label of 1 to {LABEL_BYTES_MAX} bytes, found {}", text.len()),
        ));
    }
    Ok(text.to_owned())
}

fn compare_items(mut payload: Bytes) -> Result<Vec<CompareItem>, ProtocolError> {
    let count = payload.len() / COMPARE_ITEM_BYTES;
    if !payload.len().is_multiple_of(COMPARE_ITEM_BYTES) || count > COMPARE_ITEMS_MAX {
        return Err(invalid("compare", format!("a payload of {} bytes", payload.len())));
    }
    let mut items = Vec::with_capacity(count);
    while payload.has_remaining() {
        let range = range_of("compare", payload.get_u64_le(), payload.get_u64_le())?;
        let mut hash = [0; 32];
        payload.copy_to_slice(&mut hash);
        let content = if hash == ZEROES_HASH { Content::Zeroes } else { Content::Hash(hash) };
        let longest = match content {
            Content::Zeroes => COMPARE_ZEROES_BYTES_MAX,
            Content::Hash(_) => COMPARE_CHUNK_BYTES_MAX,
        };
        if range.count().0 > longest {
            return Err(invalid("compare", format!("a chunk of {} bytes", range.count())));
        }
        items.push(CompareItem { range, content });
    }
    Ok(items)
}

fn compare_result(id: u64, mut payload: Bytes) -> Result<CompareResult, ProtocolError> {
    if !payload.len().is_multiple_of(4) || payload.len() / 4 > COMPARE_ITEMS_MAX {
        return Err(invalid("compare-result", format!("a payload of {} bytes", payload.len())));
    }
    let mut differing = Vec::with_capacity(payload.len() / 4);
    while payload.has_remaining() {
        differing.push(payload.get_u32_le());
    }
    Ok(CompareResult { id, differing })
}

/// A side's first message. Its version is looked at before its shape: another version may have
/// another one.
fn of_our_version<T: serde::de::DeserializeOwned>(
    what: &'static str,
    payload: &[u8],
) -> Result<T, ProtocolError> {
    #[derive(serde::Deserialize)]
    struct Versioned {
        version: u32,
    }
    let Versioned { version: found } = from_json(what, payload)?;
    if found != PROTOCOL_VERSION {
        return Err(ProtocolError::Version { found });
    }
    from_json(what, payload)
}

fn from_json<T: serde::de::DeserializeOwned>(what: &'static str, payload: &[u8]) -> Result<T, ProtocolError> {
    serde_json::from_slice(payload).map_err(|error| invalid(what, error.to_string()))
}

/// An epoch that nobody can have come to would be remembered, and leave the disk to nobody.
fn refuse_above(what: &'static str, epoch: Option<Epoch>, max: Epoch) -> Result<(), ProtocolError> {
    match epoch.filter(|epoch| *epoch > max) {
        Some(epoch) => Err(invalid(what, format!("epoch {epoch} is above the highest one believed, {max}"))),
        None => Ok(()),
    }
}

fn invalid(what: &'static str, why: String) -> ProtocolError {
    ProtocolError::Invalid { what, why }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_payload_over_the_limit_of_its_type_is_refused_by_its_header() {
        for kind in TYPES {
            let limit = kind.payload_bytes_max();
            let payload_bytes = u32::try_from(limit).unwrap();
            let good = Header { seq: 1, payload_bytes, ..Header::of(kind) };
            assert!(Header::decode(&good.encode()).is_ok(), "{kind:?}");
            let long = Header { payload_bytes: payload_bytes + 1, ..good };
            match Header::decode(&long.encode()) {
                Err(ProtocolError::TooLarge { found, limit: named }) => {
                    assert_eq!((found, named), (limit + 1, limit), "{kind:?}");
                }
                other => panic!("{kind:?}: {other:?}"),
            }
        }
    }
}
