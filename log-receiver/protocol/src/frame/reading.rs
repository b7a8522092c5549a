//! How the messages of a connection that reads a point lie on the wire.

use backtide_units::{BlockIndex, BlockRange, Epoch, LogPosition, Lsn};
use bytes::{Buf, Bytes};
use roaring::RoaringBitmap;

use super::{Header, Type, from_json, invalid, json, of_our_version, range_of};
use crate::{
    ProtocolError,
    message::Data,
    reading::{BLOCKS_PER_PART, Blocks, FETCH_BYTES_MAX, OWNER_BYTES_MAX, OpenPoint, Reading},
};

/// The longest bitmap of one part: its blocks in the form that takes the most room, and some.
pub(super) const BLOCKS_BYTES_MAX: u64 = 1 << 20;

const FLAG_CHANGED: u8 = 1;
const FLAG_LEFT: u8 = 2;
const FLAG_DAMAGED: u8 = 4;
const FLAG_PART: u8 = 8;
const FLAG_AFTER: u8 = 16;

/// No disk has so many blocks, so a range of them ends within what a number of bytes can be.
const BLOCKS_MAX: u64 = 1 << 52;

pub(super) fn encode(reading: &Reading) -> (Header, Data) {
    let none = || Data::capture(Bytes::new());
    let of = |kind, a, c, d| Header::of(kind).fields(a, 0, c, d);
    match reading {
        Reading::Open(open) => (Header::of(Type::OpenPoint), json(serde_json::to_vec(open))),
        Reading::Opened(opened) => (Header::of(Type::PointOpened), json(serde_json::to_vec(opened))),
        Reading::Fetch { id, range } => (of(Type::Fetch, *id, range.start().0, range.count().0), none()),
        Reading::Piece { id, range, data } => {
            (of(Type::Piece, *id, range.start().0, range.count().0), data.clone())
        }
        Reading::AskBlocks { id, which } => {
            let (flags, since, c, d) = match which {
                Blocks::Data => (0, Lsn::ZERO, 0, 0),
                Blocks::Changed(since) => (FLAG_CHANGED, *since, 0, 0),
                Blocks::DataIn(part) => (FLAG_PART, Lsn::ZERO, part.start().0, part.count().0),
                Blocks::ChangedIn(since, part) => {
                    (FLAG_PART | FLAG_CHANGED, *since, part.start().0, part.count().0)
                }
                Blocks::Damaged(None) => (FLAG_DAMAGED, Lsn::ZERO, 0, 0),
                Blocks::Damaged(Some(since)) => (FLAG_DAMAGED | FLAG_CHANGED, *since, 0, 0),
                Blocks::Left { epoch, durable, entries } => (FLAG_LEFT, *durable, epoch.0, entries.0),
                Blocks::After { durable, entries } => (FLAG_AFTER, *durable, 0, entries.0),
            };
            let header = Header::of(Type::AskBlocks).fields(*id, since.0, c, d);
            (Header { flags, ..header }, none())
        }
        Reading::Blocks { id, first, blocks } => {
            let mut payload = Vec::with_capacity(blocks.serialized_size());
            blocks.serialize_into(&mut payload).expect("memory takes every byte");
            (of(Type::Blocks, *id, first.0, 0), Data::capture(payload.into()))
        }
        Reading::Hold { id, owner } => (of(Type::Hold, *id, 0, 0), text(owner)),
        Reading::Release { id, owner } => (of(Type::Release, *id, 0, 0), text(owner)),
        Reading::Answered { id } => (of(Type::Answered, *id, 0, 0), none()),
        Reading::Failed { id, failure } => (of(Type::Failed, *id, 0, 0), json(serde_json::to_vec(failure))),
    }
}

/// The message of a header whose type [`is_reading`](Type::is_reading), with a payload of that checksum.
pub(super) fn decode(header: &Header, data: Data) -> Result<Reading, ProtocolError> {
    let Header { a: id, b, c, d, flags, .. } = *header;
    let payload = data.bytes();
    Ok(match header.kind {
        Type::OpenPoint => Reading::Open(open(payload)?),
        Type::PointOpened => Reading::Opened(of_our_version("point-opened", payload)?),
        Type::Fetch => Reading::Fetch { id, range: bounded("fetch", c, d)? },
        Type::Piece => {
            let range = bounded("piece", c, d)?;
            if !payload.is_empty() && payload.len() as u64 != d {
                let why = format!("range of {d} bytes with a payload of {}", payload.len());
                return Err(invalid("piece", why));
            }
            Reading::Piece { id, range, data }
        }
        Type::AskBlocks => {
            let which = match flags {
                0 => Blocks::Data,
                FLAG_CHANGED => Blocks::Changed(Lsn(b)),
                FLAG_PART => Blocks::DataIn(part(c, d)?),
                flags if flags == FLAG_PART | FLAG_CHANGED => Blocks::ChangedIn(Lsn(b), part(c, d)?),
                FLAG_DAMAGED => Blocks::Damaged(None),
                flags if flags == FLAG_DAMAGED | FLAG_CHANGED => Blocks::Damaged(Some(Lsn(b))),
                FLAG_LEFT => Blocks::Left { epoch: Epoch(c), durable: Lsn(b), entries: LogPosition(d) },
                FLAG_AFTER => Blocks::After { durable: Lsn(b), entries: LogPosition(d) },
                other => return Err(invalid("ask-blocks", format!("flags {other:#x}"))),
            };
            Reading::AskBlocks { id, which }
        }
        Type::Blocks => Reading::Blocks { id, first: first(c)?, blocks: bitmap(payload)? },
        Type::Hold => Reading::Hold { id, owner: owner(payload)? },
        Type::Release => Reading::Release { id, owner: owner(payload)? },
        Type::Answered => Reading::Answered { id },
        Type::Failed => Reading::Failed { id, failure: from_json("failed", payload)? },
        Type::Hello
        | Type::Welcome
        | Type::Write
        | Type::Zero
        | Type::Trim
        | Type::Flush
        | Type::PassBegin
        | Type::PassData
        | Type::PassEnd
        | Type::Mark
        | Type::Compare
        | Type::CompareResult
        | Type::Ack
        | Type::Ping
        | Type::Hasten
        | Type::Unchanged
        | Type::Close => unreachable!("the caller has those"),
    })
}

fn open(payload: &[u8]) -> Result<OpenPoint, ProtocolError> {
    let open: OpenPoint = of_our_version("open-point", payload)?;
    check_name("open-point", &open.reader)?;
    Ok(open)
}

fn owner(payload: &[u8]) -> Result<String, ProtocolError> {
    let text = std::str::from_utf8(payload).map_err(|error| invalid("hold", error.to_string()))?;
    check_name("hold", text)?;
    Ok(text.to_owned())
}

fn check_name(what: &'static str, text: &str) -> Result<(), ProtocolError> {
    if text.is_empty() || text.len() > OWNER_BYTES_MAX {
        let why = format!("expected a name of 1 to {OWNER_BYTES_MAX} bytes, found {}", text.len());
        return Err(invalid(what, why));
    }
    Ok(())
}

fn text(text: &str) -> Data {
    Data::capture(Bytes::copy_from_slice(text.as_bytes()))
}

fn bounded(what: &'static str, start: u64, count: u64) -> Result<backtide_units::ByteRange, ProtocolError> {
    if count > FETCH_BYTES_MAX {
        return Err(invalid(what, format!("{count} bytes, at most {FETCH_BYTES_MAX} are read at once")));
    }
    range_of(what, start, count)
}

/// A range of blocks, which may be empty. A long one would cost the receiver memory by its length.
fn part(start: u64, count: u64) -> Result<BlockRange, ProtocolError> {
    let end = start.checked_add(count).filter(|end| *end <= BLOCKS_MAX && count <= BLOCKS_PER_PART);
    let beyond = || {
        let why = format!(
            "expected at most {BLOCKS_PER_PART} blocks below block {BLOCKS_MAX}, found {count} from {start} on"
        );
        invalid("ask-blocks", why)
    };
    Ok(BlockRange::between(BlockIndex(start), BlockIndex(end.ok_or_else(beyond)?)))
}

fn first(block: u64) -> Result<BlockIndex, ProtocolError> {
    let index = BlockIndex(block);
    if !block.is_multiple_of(BLOCKS_PER_PART) || block >= BLOCKS_MAX {
        return Err(invalid("blocks", format!("a stretch that begins with block {block}")));
    }
    Ok(index)
}

fn bitmap(payload: &[u8]) -> Result<RoaringBitmap, ProtocolError> {
    let mut rest = payload;
    let bitmap =
        RoaringBitmap::deserialize_from(&mut rest).map_err(|error| invalid("blocks", error.to_string()))?;
    if rest.has_remaining() {
        return Err(invalid("blocks", format!("{} bytes after the bitmap", rest.len())));
    }
    match bitmap.max() {
        Some(last) if u64::from(last) < BLOCKS_PER_PART => Ok(bitmap),
        Some(last) => Err(invalid("blocks", format!("block {last} of a stretch of {BLOCKS_PER_PART}"))),
        None => Err(invalid("blocks", "a stretch without blocks".to_owned())),
    }
}
