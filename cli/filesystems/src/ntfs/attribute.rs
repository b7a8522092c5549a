//! What a file consists of: the attributes of its record, and of the records that it needs besides.

use std::collections::BTreeSet;

use backtide_units::{ByteCount, ByteOffset};

use super::{Ntfs, record::restore};
use crate::{
    Contents, Error, Piece, Place,
    contents::{Compressed, PIECES_MAX},
    fields::{byte, index, le16, le32, le64, part},
};

const LIST: u32 = 0x20;
const END: u32 = 0xffff_ffff;

/// The longest list of attributes.
const LIST_MAX: u64 = 256 << 10;

/// The longest attribute that is read whole.
const WHOLE_MAX: u64 = 16 << 20;

const COMPRESSED: u16 = 0x00ff;
const ENCRYPTED: u16 = 0x4000;

/// A number of a record without how often it was used.
pub(super) const NUMBER: u64 = (1 << 48) - 1;

/// An attribute, or a part of one.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Attribute {
    kind: u32,
    name: Vec<u8>,
    flags: u16,
    body: Body,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Body {
    Resident(Vec<u8>),
    /// Runs of clusters from this cluster of the attribute on, to its last.
    Runs {
        first: u64,
        last: u64,
        runs: Vec<u8>,
        unit: u8,
        size: u64,
        valid: u64,
    },
}

/// All attributes of a file.
#[derive(Debug)]
pub(super) struct Attributes {
    pub(super) is_directory: bool,
    /// Whether records of the file table could not be read yet, which only it can do without.
    pub(super) is_partial: bool,
    all: Vec<Attribute>,
}

/// A stretch at the start of a file.
pub(super) fn one_piece(start: u64, length: u64) -> Piece {
    let place = Place::Volume(ByteOffset(start));
    Piece { at: ByteOffset::ZERO, length: ByteCount(length), place }
}

impl Attributes {
    /// Those of the file with this record: its number and, unless that is 0, how often it was used.
    pub(super) fn gather(volume: &Ntfs, reference: u64) -> Result<Self, Error> {
        let record = read(volume, reference)?;
        let number = reference & NUMBER;
        if le64(&record, 32)? & NUMBER != 0 {
            return Err(Error::damaged("", "it belongs to another file"));
        }
        let own = number | u64::from(le16(&record, 16)?) << 48;
        let is_directory = le16(&record, 22)? & 2 != 0;
        let mut found = Self { is_directory, is_partial: false, all: parse(&record)? };
        let Some(list) = found.whole(volume, LIST, &[], LIST_MAX)? else { return Ok(found) };
        let (mut others, mut at) = (BTreeSet::new(), 0);
        while at + 26 <= list.len() {
            let other = le64(&list, at + 16)?;
            if other & NUMBER != number {
                others.insert(other);
            }
            let length = usize::from(le16(&list, at + 4)?);
            if length < 26 {
                return Err(Error::damaged("", "an entry of its list of attributes is too short"));
            }
            at += length;
        }
        for other in others {
            // The table needs itself to be read: its records may be where it is not known yet.
            let record = match read(volume, other) {
                Ok(record) => record,
                Err(_) if number == super::MFT => {
                    found.is_partial = true;
                    continue;
                }
                Err(error) => return Err(error.of(|| format!("file record {}", other & NUMBER))),
            };
            if le64(&record, 32)? != own {
                let other = other & NUMBER;
                return Err(Error::damaged("", format!("record {other}, which it lists, is another file's")));
            }
            found.all.extend(parse(&record)?);
        }
        Ok(found)
    }

    fn of<'this>(&'this self, kind: u32, name: &'this [u8]) -> impl Iterator<Item = &'this Attribute> {
        self.all.iter().filter(move |attribute| attribute.kind == kind && attribute.name == name)
    }

    /// An attribute without a name that stands in the record.
    pub(super) fn resident(&self, kind: u32) -> Option<&[u8]> {
        self.of(kind, &[]).find_map(|attribute| match &attribute.body {
            Body::Resident(bytes) => Some(&bytes[..]),
            Body::Runs { .. } => None,
        })
    }

    /// How long an attribute is; nothing when there is none.
    pub(super) fn size(&self, kind: u32, name: &[u8]) -> ByteCount {
        let size = self.of(kind, name).find_map(|attribute| match &attribute.body {
            Body::Resident(bytes) => Some(ByteCount::of(bytes)),
            Body::Runs { first: 0, size, .. } => Some(ByteCount(*size)),
            Body::Runs { .. } => None,
        });
        size.unwrap_or(ByteCount::ZERO)
    }

    /// The bytes of an attribute of at most `limit`; none when there is none.
    pub(super) fn whole(
        &self,
        volume: &Ntfs,
        kind: u32,
        name: &[u8],
        limit: u64,
    ) -> Result<Option<Vec<u8>>, Error> {
        let Some(contents) = self.contents(volume, kind, name)? else { return Ok(None) };
        let size = contents.size().0;
        if size > limit.min(WHOLE_MAX) {
            return Err(Error::damaged("", format!("its attribute {kind:#x} has {size} bytes")));
        }
        let mut bytes = vec![0; index(size)?];
        contents.read_stored(volume.source.as_ref(), ByteOffset::ZERO, &mut bytes)?;
        Ok(Some(bytes))
    }

    /// Where the bytes of an attribute are; none when there is none.
    pub(super) fn contents(&self, volume: &Ntfs, kind: u32, name: &[u8]) -> Result<Option<Contents>, Error> {
        let (mut pieces, mut start) = (Vec::new(), None);
        // The first cluster that no part before had, and the byte it begins at.
        let (mut next, mut end) = (0, 0);
        let mut parts: Vec<_> = self.of(kind, name).collect();
        parts.sort_by_key(|attribute| attribute.first());
        for attribute in parts {
            if attribute.flags & ENCRYPTED != 0 {
                return Err(Error::Unsupported { what: "the file is encrypted".to_owned() });
            }
            match &attribute.body {
                Body::Resident(bytes) => return Ok(Some(Contents::inline(bytes.clone()))),
                Body::Runs { first, last, runs, unit, size, valid } => {
                    if *first != next && self.is_partial {
                        break;
                    }
                    if *first != next {
                        let why = format!("the part of its attribute {kind:#x} at cluster {next} is missing");
                        return Err(Error::damaged("", why));
                    }
                    next = add_runs(volume, *first, runs, &mut pieces)?;
                    // Some writers leave the last cluster of what has one part at 0.
                    if *last != 0 && last.wrapping_add(1) != next {
                        let why = format!("the runs of its attribute {kind:#x} end before its last cluster");
                        return Err(Error::damaged("", why));
                    }
                    // It was multiplied there.
                    end = next * volume.cluster;
                    if *first == 0 {
                        start = Some((*unit, *size, *valid, attribute.flags));
                    }
                }
            }
        }
        let Some((unit, size, valid, flags)) = start else {
            return match pieces.is_empty() {
                true => Ok(None),
                false => Err(Error::damaged("", format!("the start of its attribute {kind:#x} is missing"))),
            };
        };
        // What of the file table is not known yet is not in it.
        let size = if self.is_partial { size.min(end) } else { size };
        if size > end {
            return Err(Error::damaged("", format!("it has {size} bytes, and clusters for {end}")));
        }
        let is_compressed = flags & COMPRESSED != 0 && unit != 0;
        if !is_compressed {
            // What was reserved and never written reads as zeroes.
            pieces.retain(|piece: &Piece| piece.at.0 < valid);
            for piece in &mut pieces {
                piece.length.0 = piece.length.0.min(valid - piece.at.0);
            }
        }
        let mut contents = Contents::new(ByteCount(size), pieces, volume.source.size())?;
        if is_compressed {
            let unit =
                volume.cluster.checked_shl(u32::from(unit)).filter(|unit| *unit <= 1 << 20 && *unit > 0);
            let unit = unit.ok_or_else(|| Error::damaged("", "it is compressed in units that cannot be"))?;
            contents.compressed = Some(Compressed { unit: ByteCount(unit), end: ByteOffset(end) });
        }
        Ok(Some(contents))
    }
}

impl Attribute {
    /// The first cluster of a part.
    fn first(&self) -> u64 {
        match &self.body {
            Body::Resident(_) => 0,
            Body::Runs { first, .. } => *first,
        }
    }
}

/// A record of the table, checked.
fn read(volume: &Ntfs, reference: u64) -> Result<Vec<u8>, Error> {
    let (number, uses) = (reference & NUMBER, reference >> 48);
    let beyond = || Error::damaged("", format!("record {number} is not in the master file table"));
    let mut bytes = vec![0; volume.record];
    let at = number.checked_mul(volume.record as u64).ok_or_else(beyond)?;
    if volume.table.read_at(volume.source.as_ref(), ByteOffset(at), &mut bytes)? < bytes.len() {
        return Err(beyond());
    }
    restore(&mut bytes, b"FILE")?;
    if le16(&bytes, 22)? & 1 == 0 {
        return Err(Error::damaged("", "it is free"));
    }
    if uses != 0 && u64::from(le16(&bytes, 16)?) != uses {
        return Err(Error::damaged("", "it was reused: whoever names it means a file that is gone"));
    }
    Ok(bytes)
}

/// The attributes that stand in a record.
fn parse(record: &[u8]) -> Result<Vec<Attribute>, Error> {
    let (mut at, mut all) = (usize::from(le16(record, 20)?), Vec::new());
    loop {
        let kind = le32(record, at)?;
        if kind == END {
            return Ok(all);
        }
        let length = index(u64::from(le32(record, at + 4)?))?;
        if length < 24 {
            return Err(Error::damaged("", "an attribute of it is too short"));
        }
        let bytes = part(record, at, length)?;
        at += length;
        let name = part(bytes, usize::from(le16(bytes, 10)?), usize::from(byte(bytes, 9)?) * 2)?;
        let body = if byte(bytes, 8)? == 0 {
            let (length, start) = (index(u64::from(le32(bytes, 16)?))?, usize::from(le16(bytes, 20)?));
            Body::Resident(part(bytes, start, length)?.to_vec())
        } else {
            let runs = usize::from(le16(bytes, 32)?);
            let runs = part(bytes, runs, bytes.len().saturating_sub(runs))?.to_vec();
            let first = le64(bytes, 16)?;
            // Only the first part of an attribute has its sizes.
            let (size, valid) = if first == 0 { (le64(bytes, 48)?, le64(bytes, 56)?) } else { (0, 0) };
            let last = le64(bytes, 24)?;
            Body::Runs { first, last, runs, unit: byte(bytes, 34)?, size, valid }
        };
        all.push(Attribute { kind, name: name.to_vec(), flags: le16(bytes, 12)?, body });
    }
}

/// Runs: a byte with two lengths, then how many clusters, then how far from the last run's start; nothing is a hole. Gives
/// the cluster of the attribute behind them.
fn add_runs(volume: &Ntfs, first: u64, runs: &[u8], pieces: &mut Vec<Piece>) -> Result<u64, Error> {
    let wrong = || Error::damaged("", "its runs of clusters make no sense");
    let (mut at, mut vcn, mut lcn) = (0, first, 0_i64);
    while let Some(header) = runs.get(at).copied().filter(|header| *header != 0) {
        let (lengths, offsets) = (usize::from(header & 15), usize::from(header >> 4));
        if lengths == 0 || lengths > 8 || offsets > 8 {
            return Err(wrong());
        }
        let number = |bytes: &[u8], is_signed: bool| {
            let fill = if is_signed && bytes.last().is_some_and(|last| last & 0x80 != 0) { 0xff } else { 0 };
            let mut whole = [fill; 8];
            whole[..bytes.len()].copy_from_slice(bytes);
            i64::from_le_bytes(whole)
        };
        let count = number(part(runs, at + 1, lengths)?, false);
        let offset = number(part(runs, at + 1 + lengths, offsets)?, true);
        at += 1 + lengths + offsets;
        let count = u64::try_from(count).map_err(|_| wrong())?;
        let (start, length) = (vcn.checked_mul(volume.cluster), count.checked_mul(volume.cluster));
        let (Some(start), Some(length)) = (start, length) else { return Err(wrong()) };
        vcn = vcn.checked_add(count).ok_or_else(wrong)?;
        if offsets == 0 {
            continue;
        }
        lcn = lcn.checked_add(offset).ok_or_else(wrong)?;
        let from =
            u64::try_from(lcn).ok().and_then(|lcn| lcn.checked_mul(volume.cluster)).ok_or_else(wrong)?;
        if pieces.len() >= PIECES_MAX {
            let what = "a file of this NTFS".to_owned();
            return Err(Error::TooMany { what, of: "runs", limit: PIECES_MAX as u64 });
        }
        let place = Place::Volume(ByteOffset(from));
        pieces.push(Piece { at: ByteOffset(start), length: ByteCount(length), place });
    }
    // Bytes of it can be counted, too.
    vcn.checked_mul(volume.cluster).map(|_| vcn).ok_or_else(wrong)
}
