//! The first part of a hydration file: whose it is, where missing blocks come from, and which they are.
//! `FORMAT.md` describes the bytes.

use backtide_tracking::DirtyBitmap;
use backtide_units::{
    BlockCount, BlockIndex, BlockRange, ByteCount, CaptureTime, DiskId, Epoch, HistoryId, Lsn,
};
use bytes::{Buf, BufMut};
use uuid::Uuid;

use crate::SourcePoint;

const MAGIC: [u8; 8] = *b"BTHYDRAT";
const VERSION: u32 = 1;

/// Magic, version, kind, length.
pub(crate) const PREFIX_BYTES: usize = 8 + 4 + 4 + 8;

/// Where the file's own id lies.
pub(crate) const FILE_ID_AT: u64 = PREFIX_BYTES as u64;

const FIXED_BYTES: usize = PREFIX_BYTES + 5 * 16 + 8 * 8 + 4 + 4 + 8;

/// No header is longer: that of a disk of 8 PiB with every other block missing.
pub(crate) const HEADER_BYTES_MAX: u64 = 1 << 38;

/// Blocks are compared before they are fetched.
const FLAG_COMPARE: u64 = 1;

/// No text in it is longer.
const TEXT_BYTES_MAX: usize = 4096;

/// Why a disk lacks blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// It was set back to an earlier point of its own history.
    Rewind,
    /// It began as a point of another disk.
    Origin,
    /// It is the same disk on another host, or back on the first.
    Failover,
}

/// What a hydration file says of its disk, beside the missing blocks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// The disk that lacks blocks.
    pub disk: DiskId,
    /// Why.
    pub kind: Kind,
    /// The boot of the host in which it was written; nil when that is not known.
    pub boot: Uuid,
    /// The disk's last epoch before it was made: an attach that finds the same is the first with it, and
    /// takes the missing blocks for changed where the kind asks for that.
    pub epoch: Epoch,
    /// The image's inode; 0 where that says nothing, as of a device.
    pub inode: u64,
    /// The newest LSN before a rewind, which undoes it; otherwise zero.
    pub before: Lsn,
    /// How many blocks were missing at first.
    pub total: BlockCount,
    /// The image may hold what is missing: blocks are compared with the point, and fetched where they differ.
    pub compare: bool,
    /// Where they come from.
    pub source: SourcePoint,
}

/// Why a file is no hydration file that can be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// Cut short, or something else.
    #[error("no hydration file: expected magic {expected:?}, found {found:?}", expected = MAGIC)]
    Magic {
        /// The first bytes.
        found: Vec<u8>,
    },
    /// Written by another version.
    #[error("hydration file of version {found}, this build reads version {VERSION}")]
    Version {
        /// The version in the file.
        found: u32,
    },
    /// Cut short, or longer than can be.
    #[error("damaged hydration file: a header of {expected} bytes, found {found}")]
    Length {
        /// As the header says.
        expected: u64,
        /// What there is.
        found: u64,
    },
    /// The checksum does not match.
    #[error("damaged hydration file: checksum of the header expected {expected:#010x}, found {found:#010x}")]
    Checksum {
        /// As the file says.
        expected: u32,
        /// As computed.
        found: u32,
    },
    /// A field has an impossible value.
    #[error("damaged hydration file: {0}")]
    Invalid(String),
}

impl Kind {
    fn code(self) -> u32 {
        match self {
            Self::Rewind => 1,
            Self::Origin => 2,
            Self::Failover => 3,
        }
    }

    fn from_code(code: u32) -> Option<Self> {
        [Self::Rewind, Self::Origin, Self::Failover].into_iter().find(|kind| kind.code() == code)
    }
}

/// The bytes of a header, with the file's own id and the missing blocks.
pub(crate) fn encode(header: &Header, file: Uuid, missing: &DirtyBitmap) -> Vec<u8> {
    let missing = missing.to_bytes();
    let (receiver, name) = (header.source.receiver.as_bytes(), header.source.name.as_str().as_bytes());
    let length = FIXED_BYTES + receiver.len() + name.len() + missing.len() + 4;
    let mut out = Vec::with_capacity(length);
    out.put_slice(&MAGIC);
    out.put_u32_le(VERSION);
    out.put_u32_le(header.kind.code());
    out.put_u64_le(length as u64);
    for id in [file, header.disk.0, header.boot, header.source.disk.0, header.source.history.0] {
        out.put_slice(id.as_bytes());
    }
    let SourcePoint { lsn, time, size, .. } = &header.source;
    let (epoch, inode, before, total) = (header.epoch.0, header.inode, header.before.0, header.total.0);
    let flags = if header.compare { FLAG_COMPARE } else { 0 };
    for field in [epoch, inode, before, total, lsn.0, time.0, size.0, flags] {
        out.put_u64_le(field);
    }
    out.put_u32_le(receiver.len() as u32);
    out.put_u32_le(name.len() as u32);
    out.put_u64_le(missing.len() as u64);
    for part in [receiver, name, &missing] {
        out.put_slice(part);
    }
    let crc = crc32c::crc32c(&out);
    out.put_u32_le(crc);
    out
}

/// How long the header is that begins with these bytes.
pub(crate) fn length(prefix: &[u8]) -> Result<u64, HeaderError> {
    if prefix.len() < PREFIX_BYTES || prefix[..8] != MAGIC {
        return Err(HeaderError::Magic { found: prefix[..prefix.len().min(8)].to_vec() });
    }
    let mut input = &prefix[8..];
    let version = input.get_u32_le();
    if version != VERSION {
        return Err(HeaderError::Version { found: version });
    }
    input.advance(4);
    let expected = input.get_u64_le();
    if expected < FIXED_BYTES as u64 + 4 || expected > HEADER_BYTES_MAX {
        return Err(HeaderError::Length { expected, found: prefix.len() as u64 });
    }
    Ok(expected)
}

/// Reads the bytes of a header, all of them.
pub(crate) fn decode(bytes: &[u8]) -> Result<(Header, Uuid, DirtyBitmap), HeaderError> {
    let expected = length(bytes)?;
    if expected != bytes.len() as u64 {
        return Err(HeaderError::Length { expected, found: bytes.len() as u64 });
    }
    let (body, mut crc) = bytes.split_at(bytes.len() - 4);
    let (expected, found) = (crc.get_u32_le(), crc32c::crc32c(body));
    if expected != found {
        return Err(HeaderError::Checksum { expected, found });
    }
    let mut input = &body[12..];
    let kind = input.get_u32_le();
    let kind = Kind::from_code(kind).ok_or_else(|| HeaderError::Invalid(format!("unknown kind {kind}")))?;
    input.advance(8);
    let [file, disk, boot, source, history] = std::array::from_fn(|_| {
        let mut id = [0; 16];
        input.copy_to_slice(&mut id);
        Uuid::from_bytes(id)
    });
    let [epoch, inode, before, total, lsn, time, size, flags] = std::array::from_fn(|_| input.get_u64_le());
    if flags & !FLAG_COMPARE != 0 {
        return Err(HeaderError::Invalid(format!("unknown flags {flags:#x}")));
    }
    let [receiver_bytes, name_bytes] = std::array::from_fn(|_| input.get_u32_le() as usize);
    let missing_bytes = input.get_u64_le();
    let texts = receiver_bytes.saturating_add(name_bytes);
    if receiver_bytes.max(name_bytes) > TEXT_BYTES_MAX
        || missing_bytes.checked_add(texts as u64) != Some(input.len() as u64)
    {
        return Err(HeaderError::Invalid(format!(
            "texts of {receiver_bytes} and {name_bytes} bytes, a bitmap of {missing_bytes}, {} in all",
            input.len()
        )));
    }
    let (receiver, rest) = input.split_at(receiver_bytes);
    let (name, missing) = rest.split_at(name_bytes);
    let invalid = |error: &dyn std::fmt::Display| HeaderError::Invalid(error.to_string());
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).map_err(|error| invalid(&error));
    let name = text(name)?.parse().map_err(|error| invalid(&error))?;
    let source = SourcePoint {
        receiver: text(receiver)?,
        disk: DiskId(source),
        name,
        history: HistoryId(history),
        lsn: Lsn(lsn),
        time: CaptureTime(time),
        size: ByteCount(size),
    };
    let header = Header {
        disk: DiskId(disk),
        kind,
        boot,
        epoch: Epoch(epoch),
        inode,
        before: Lsn(before),
        total: BlockCount(total),
        compare: flags & FLAG_COMPARE != 0,
        source,
    };
    let missing = DirtyBitmap::from_bytes(missing).map_err(|error| invalid(&error))?;
    let end = BlockRange::whole_disk(header.source.size).end();
    if missing.next_run(end, BlockIndex(u64::MAX), BlockCount(1)).is_some() {
        return Err(HeaderError::Invalid(format!("blocks are missing beyond the disk's end at block {end}")));
    }
    Ok((header, file, missing))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn header() -> Header {
        let id = |byte| Uuid::from_bytes([byte; 16]);
        Header {
            disk: DiskId(id(1)),
            kind: Kind::Rewind,
            boot: id(2),
            epoch: Epoch(3),
            inode: 4,
            before: Lsn(50),
            total: BlockCount(9),
            compare: true,
            source: SourcePoint {
                receiver: "unix:/run/receiver.sock".to_owned(),
                disk: DiskId(id(1)),
                name: "vm1".parse().unwrap(),
                history: HistoryId(id(5)),
                lsn: Lsn(40),
                time: CaptureTime(1_700_000_000_000_000),
                size: ByteCount(1 << 20),
            },
        }
    }

    #[test]
    fn a_header_comes_back_and_every_flipped_bit_and_cut_is_noticed() {
        let missing = DirtyBitmap::of((3..12).into());
        let file = Uuid::from_bytes([7; 16]);
        let bytes = encode(&header(), file, &missing);
        assert_eq!(decode(&bytes), Ok((header(), file, missing)));
        assert_eq!(length(&bytes[..PREFIX_BYTES]), Ok(bytes.len() as u64));
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(decode(&damaged).is_err(), "bit {bit}");
        }
        for length in 0..bytes.len() {
            assert!(decode(&bytes[..length]).is_err(), "cut to {length}");
        }
        let beyond = DirtyBitmap::of((256..257).into());
        assert!(decode(&encode(&header(), file, &beyond)).is_err(), "the disk has 256 blocks");
    }

    /// Every byte behind the length changed to every value, with a right checksum: an error or a header.
    #[test]
    fn no_field_makes_it_panic() {
        let bytes = encode(&header(), Uuid::from_bytes([7; 16]), &DirtyBitmap::of((3..12).into()));
        let end = bytes.len() - 4;
        for at in PREFIX_BYTES..end {
            for value in 0..=u8::MAX {
                let mut changed = bytes.clone();
                changed[at] = value;
                let crc = crc32c::crc32c(&changed[..end]);
                changed[end..].copy_from_slice(&crc.to_le_bytes());
                let _ = decode(&changed);
            }
        }
    }
}
