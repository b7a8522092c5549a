//! NTFS, version 3, with sparse and compressed files.
//!
//! The way of a file: `record` reads its record of the master file table, `attribute` gathers what it consists of
//! from there and from the records that it lists, `index` reads a directory's names, `compression` unpacks.
//!
//! The log is not replayed: a volume that was in use at the point says so.

mod attribute;
mod compression;
mod index;
mod log_file;
mod record;
mod reparse;

use std::rc::Rc;

use backtide_units::{ByteCount, ByteOffset};

use self::attribute::Attributes;
use crate::{
    Contents, Error, FileId, FileSystem, Kind, Name, Node, Source,
    fields::{byte, le16, le32, le64},
    file_system::is_same_text,
};

/// Records that every volume has.
const MFT: u64 = 0;
const LOG_FILE: u64 = 2;
const VOLUME: u64 = 3;
const ROOT: u64 = 5;

/// How often the table is read to find more of itself.
const TABLE_ROUNDS: usize = 8;

/// Records below are the volume's own: they are no files of anybody.
const FIRST_FILE: u64 = 16;

/// Kinds of attributes.
const STANDARD: u32 = 0x10;
const VOLUME_INFORMATION: u32 = 0x70;
const DATA: u32 = 0x80;
const REPARSE: u32 = 0xc0;

/// The longest that says what a file stands for.
const REPARSE_MAX: u64 = 64 << 10;

/// From 1601, when NTFS counts from, to 1970, in ticks of 100 ns.
const TICKS_TO_1970: i128 = 116_444_736_000_000_000;

/// A volume with NTFS.
pub struct Ntfs {
    source: Rc<dyn Source>,
    cluster: u64,
    record: usize,
    index_block: usize,
    /// The master file table.
    table: Contents,
    warnings: Vec<String>,
}

impl Ntfs {
    /// The volume on `source`.
    ///
    /// # Errors
    /// When it has no NTFS, or one that is damaged.
    pub fn open(source: Rc<dyn Source>) -> Result<Self, Error> {
        let name = || "the boot sector of this NTFS".to_owned();
        let mut sector = [0; 512];
        source.read_at(ByteOffset::ZERO, &mut sector).map_err(|error| Error::from(error).of(name))?;
        let mut volume = Self::parse(source, &sector).map_err(|error| error.of(name))?;
        // The table's first record says where the rest of it is. When that takes more records, these are in what is
        // known already, or become known with others.
        for _ in 0..TABLE_ROUNDS {
            let attributes = volume.attributes(FileId(MFT))?;
            let table = attributes
                .contents(&volume, DATA, &[])
                .and_then(|table| table.ok_or_else(|| Error::damaged("", "it has no data")));
            volume.table =
                table.map_err(|error| error.of(|| "the master file table of this NTFS".to_owned()))?;
            if !attributes.is_partial {
                break;
            }
        }
        volume.node(FileId(ROOT))?;
        volume.warnings = volume.find_warnings();
        Ok(volume)
    }

    fn parse(source: Rc<dyn Source>, sector: &[u8]) -> Result<Self, Error> {
        if sector[3..11] != *b"NTFS    " {
            return Err(Error::damaged("", "its mark is not there"));
        }
        let bytes = u64::from(le16(sector, 11)?);
        // Large numbers are negative powers of two.
        let sectors = match byte(sector, 13)? {
            number @ ..=128 => u64::from(number),
            number => 1_u64.checked_shl(256 - u32::from(number)).unwrap_or(0),
        };
        let cluster = bytes.checked_mul(sectors).unwrap_or(0);
        let size = |at: usize| -> Result<u64, Error> {
            let number = byte(sector, at)?.cast_signed();
            Ok(match number {
                1.. => u64::from(number.unsigned_abs()).saturating_mul(cluster),
                _ => 1_u64.checked_shl(u32::from(number.unsigned_abs())).unwrap_or(0),
            })
        };
        let (record, index_block) = (size(64)?, size(68)?);
        let makes_sense = bytes.is_power_of_two()
            && (256..=4096).contains(&bytes)
            && cluster.is_power_of_two()
            && (512..=2 << 20).contains(&cluster)
            && [record, index_block]
                .iter()
                .all(|size| size.is_power_of_two() && (512..=1 << 16).contains(size));
        if !makes_sense {
            return Err(Error::damaged("", "its sizes do not go together"));
        }
        let start = le64(sector, 48)?.checked_mul(cluster);
        let start = start.ok_or_else(|| Error::damaged("", "its file table is beyond every volume"))?;
        let first = attribute::one_piece(start, record);
        Ok(Self {
            table: Contents::new(ByteCount(record), vec![first], source.size())?,
            source,
            cluster,
            // Both have 64 KiB at most.
            record: record as usize,
            index_block: index_block as usize,
            warnings: Vec::new(),
        })
    }

    fn attributes(&self, id: FileId) -> Result<Attributes, Error> {
        Attributes::gather(self, id.0).map_err(|error| error.of(named(id)))
    }

    /// Whether somebody was about to change it.
    fn find_warnings(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        if !matches!(log_file::is_clean(self), Ok(true)) {
            warnings.push(
                "this NTFS was in use at that point and its log is not replayed here: what was changed in the seconds \
                 before may be missing or only half there"
                    .to_owned(),
            );
        }
        let information = self.attributes(FileId(VOLUME)).ok();
        let information = information.as_ref().and_then(|found| found.resident(VOLUME_INFORMATION));
        if information.is_some_and(|bytes| le16(bytes, 10).is_ok_and(|flags| flags & 1 != 0)) {
            warnings.push("this NTFS says of itself that it needs chkdsk".to_owned());
        }
        warnings
    }

    /// The tag of a file that stands for something else, and what it says.
    fn reparse(&self, attributes: &Attributes) -> Result<Option<(u32, Vec<u8>)>, Error> {
        let Some(bytes) = attributes.whole(self, REPARSE, &[], REPARSE_MAX)? else { return Ok(None) };
        Ok(Some((le32(&bytes, 0)?, bytes)))
    }
}

fn named(id: FileId) -> impl FnOnce() -> String {
    move || match id.0 & attribute::NUMBER {
        MFT => "the master file table of this NTFS".to_owned(),
        ROOT => "the root directory of this NTFS".to_owned(),
        number => format!("file record {number}"),
    }
}

fn time(bytes: &[u8], at: usize) -> Result<i128, Error> {
    Ok((i128::from(le64(bytes, at)?) - TICKS_TO_1970) * 100)
}

impl FileSystem for Ntfs {
    fn root(&self) -> FileId {
        FileId(ROOT)
    }

    fn node(&self, id: FileId) -> Result<Node, Error> {
        let attributes = self.attributes(id)?;
        let standard =
            attributes.resident(STANDARD).ok_or_else(|| Error::damaged(named(id)(), "it has no times"))?;
        let wrong = |error: Error| error.of(named(id));
        let times = time(standard, 8).and_then(|modified| Ok((modified, time(standard, 16)?)));
        let (modified_ns, changed_ns) = times.map_err(wrong)?;
        let is_read_only = le32(standard, 32).is_ok_and(|flags| flags & 1 != 0);
        let found = self.reparse(&attributes).map_err(wrong)?;
        let is_link = found.is_some_and(|(tag, _)| reparse::is_link(tag));
        let kind = match attributes.is_directory {
            _ if is_link => Kind::Symlink,
            true => Kind::Directory,
            false => Kind::File,
        };
        let size = match kind {
            Kind::File => attributes.size(DATA, &[]),
            Kind::Directory | Kind::Symlink | Kind::Special => ByteCount::ZERO,
        };
        let mode = match (kind, is_read_only) {
            (Kind::File, true) => 0o444,
            (Kind::File, false) => 0o644,
            (Kind::Symlink, _) => 0o777,
            (Kind::Directory | Kind::Special, _) => 0o755,
        };
        Ok(Node { kind, size, mode, uid: 0, gid: 0, modified_ns, changed_ns })
    }

    fn names(&self, directory: FileId) -> Result<Vec<Name>, Error> {
        let attributes = self.attributes(directory)?;
        let names = match attributes.is_directory {
            true => index::names(self, &attributes),
            false => Err(Error::damaged("", "it is no directory")),
        };
        names.map_err(|error| error.of(|| format!("the directory of {}", named(directory)())))
    }

    fn link_target(&self, id: FileId) -> Result<Vec<u8>, Error> {
        let attributes = self.attributes(id)?;
        let target = self.reparse(&attributes).and_then(|found| match found {
            Some((tag, bytes)) => reparse::target(tag, &bytes),
            None => Err(Error::damaged("", "it is no symbolic link")),
        });
        target.map_err(|error| error.of(named(id)))
    }

    fn contents(&self, id: FileId) -> Result<Contents, Error> {
        let attributes = self.attributes(id)?;
        let found = self.reparse(&attributes).map_err(|error| error.of(named(id)))?;
        let flags = attributes.resident(STANDARD).and_then(|standard| le32(standard, 32).ok());
        // Without attributes nothing says that the bytes are here.
        let flags = flags.unwrap_or(u32::MAX);
        if let Some(what) = found.and_then(|(tag, _)| reparse::stands_for(tag, flags)) {
            return Err(Error::Unsupported { what: format!("{} is {what}", named(id)()) });
        }
        if attributes.is_directory {
            return Err(Error::damaged(named(id)(), "it is no file with bytes"));
        }
        let contents = attributes.contents(self, DATA, &[]).map_err(|error| error.of(named(id)))?;
        Ok(contents.unwrap_or_else(|| Contents::inline(Vec::new())))
    }

    fn read(&self, contents: &Contents, at: ByteOffset, buffer: &mut [u8]) -> Result<usize, Error> {
        let read = match contents.compressed {
            None => contents.read_at(self.source.as_ref(), at, buffer),
            Some(how) => compression::read(self.source.as_ref(), contents, how, at, buffer),
        };
        read.map_err(|error| error.of(|| "a file of this NTFS".to_owned()))
    }

    fn is_same_name(&self, a: &[u8], b: &[u8]) -> bool {
        is_same_text(a, b)
    }

    fn warnings(&self) -> &[String] {
        &self.warnings
    }
}

#[cfg(test)]
mod tests;
