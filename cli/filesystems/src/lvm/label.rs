//! The label of a physical volume, and the text of its group that it leads to.
//!
//! ```text
//! sector 0-3   LABELONE  sector  crc  offset  "LVM2 001"        checked by crc
//!   + offset   uuid[32]  device size  data areas.. 0  metadata areas.. 0
//! area         crc  magic[16]  version  start  size  {offset size crc flags}..
//!   + offset   the text, round the area's end back to byte 512 of it
//! ```

use backtide_units::{ByteCount, ByteOffset};

use crate::{
    Error, Source,
    fields::{le32, le64, part},
};

const SECTOR: u64 = 512;

/// Sectors in which a label may be.
const LABEL_SECTORS: u64 = 4;

/// Areas of either kind that a label names; there are two at most.
const AREAS_MAX: usize = 16;

/// The longest text; groups with thousands of volumes stay far below.
const TEXT_MAX: u64 = 16 << 20;

const AREA_MAGIC: &[u8; 16] = b"\x20LVM2\x20x[5A%r0N*>";

/// A physical volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Physical {
    /// Its id, without the dashes.
    pub(super) id: String,
    /// What it says of its group, when it says anything.
    pub(super) metadata: Option<String>,
}

/// Reads the physical volume on `source`.
///
/// # Errors
/// When it is none, or damaged.
pub fn physical(source: &dyn Source) -> Result<Physical, Error> {
    let name = || "the label of the physical volume (LVM)".to_owned();
    let mut sectors = [0; (LABEL_SECTORS * SECTOR) as usize];
    source.read_at(ByteOffset::ZERO, &mut sectors).map_err(|error| Error::from(error).of(name))?;
    for (number, sector) in (0..).zip(sectors.chunks_exact(SECTOR as usize)) {
        if sector.starts_with(b"LABELONE") && sector[24..32] == *b"LVM2 001" {
            return label(source, sector, number).map_err(|error| error.of(name));
        }
    }
    Err(Error::damaged(name(), "there is none"))
}

fn label(source: &dyn Source, sector: &[u8], number: u64) -> Result<Physical, Error> {
    if le64(sector, 8)? != number {
        return Err(Error::damaged("", format!("it says it is of sector {}", le64(sector, 8)?)));
    }
    if checksum(&sector[20..]) != le32(sector, 16)? {
        return Err(Error::damaged("", "its checksum is another"));
    }
    let header = usize::try_from(le32(sector, 20)?).unwrap_or(usize::MAX);
    let id = String::from_utf8_lossy(part(sector, header, 32)?).into_owned();
    // Two lists of areas, each ended by an empty one: of data, then of metadata.
    let mut at = header.saturating_add(40);
    let mut areas = Vec::new();
    for list in 0..2 {
        loop {
            let area = (ByteOffset(le64(sector, at)?), ByteCount(le64(sector, at + 8)?));
            at += 16;
            if area.0.0 == 0 {
                break;
            }
            if list == 1 {
                areas.push(area);
            }
            if areas.len() > AREAS_MAX {
                let (what, limit) = (String::from("the physical volume"), AREAS_MAX as u64);
                return Err(Error::TooMany { what, of: "metadata areas", limit });
            }
        }
    }
    // Copies of each other: one that can be read is enough. None is there when another volume of the group has them.
    let mut failed = None;
    for (start, length) in areas {
        match area(source, start, length) {
            Ok(Some(text)) => return Ok(Physical { id, metadata: Some(text) }),
            Ok(None) => {}
            Err(error) => failed = Some(error),
        }
    }
    match failed {
        Some(error) => Err(error.of(|| "the metadata area of the physical volume (LVM)".to_owned())),
        None => Ok(Physical { id, metadata: None }),
    }
}

/// The text in a metadata area; none when it is not in use.
fn area(source: &dyn Source, start: ByteOffset, length: ByteCount) -> Result<Option<String>, Error> {
    let mut header = [0; SECTOR as usize];
    source.read_at(start, &mut header)?;
    if header[4..20] != *AREA_MAGIC || le32(&header, 20)? != 1 {
        return Err(Error::damaged("", "its mark is not there"));
    }
    if checksum(&header[4..]) != le32(&header, 0)? {
        return Err(Error::damaged("", "its checksum is another"));
    }
    let (offset, size, crc, flags) =
        (le64(&header, 40)?, le64(&header, 48)?, le32(&header, 56)?, le32(&header, 60)?);
    if offset == 0 || size == 0 || flags & 1 != 0 {
        return Ok(None);
    }
    // The text is in a ring behind the header.
    if length.0 <= SECTOR || offset < SECTOR || offset >= length.0 || size > length.0 - SECTOR {
        return Err(Error::damaged("", format!("its text of {size} bytes at {offset} is not within it")));
    }
    if size > TEXT_MAX {
        let what = "the metadata area of the physical volume (LVM)".to_owned();
        return Err(Error::TooMany { what, of: "bytes of text", limit: TEXT_MAX });
    }
    // Both parts are at most `size`, which was checked.
    let mut text = vec![0; size as usize];
    let straight = size.min(length.0 - offset) as usize;
    let at = |within: u64| start.checked_add(ByteCount(within)).ok_or(crate::fields::Short);
    source.read_at(at(offset)?, &mut text[..straight])?;
    if straight < text.len() {
        source.read_at(at(SECTOR)?, &mut text[straight..])?;
    }
    if checksum(&text) != crc {
        return Err(Error::damaged("", "the checksum of its text is another"));
    }
    String::from_utf8(text).map(Some).map_err(|_| Error::damaged("", "its text is no UTF-8"))
}

/// The CRC-32 of LVM: the usual polynomial from a start of its own, and not inverted.
pub(super) fn checksum(bytes: &[u8]) -> u32 {
    let mut crc = 0xf597_a6cf_u32;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ if crc & 1 == 1 { 0xedb8_8320 } else { 0 };
        }
    }
    crc
}
