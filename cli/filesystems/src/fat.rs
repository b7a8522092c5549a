//! FAT12, FAT16 and FAT32 with long names: what firmware boots from, and what small disks have.
//!
//! A file is found again by the place of its entry on the volume: FAT has no numbers for files.

mod names;

use std::rc::Rc;

use backtide_units::{ByteCount, ByteOffset};

use crate::{
    Contents, Error, FileId, FileSystem, Kind, Name, Node, Piece, Place, Source,
    contents::PIECES_MAX,
    fields::{byte, le16, le32},
    file_system::{NAMES_MAX, is_same_text},
};

/// Bytes of an entry of a directory.
const ENTRY: usize = 32;

/// The longest directory: entries have a number of 16 bits.
const DIRECTORY_MAX: u64 = ENTRY as u64 * (1 << 16);

/// No entry lies there: it is the boot sector.
const ROOT: FileId = FileId(0);

const READ_ONLY: u8 = 0x01;
const LABEL: u8 = 0x08;
const DIRECTORY: u8 = 0x10;
const LONG_NAME: u8 = 0x0f;

/// What is wrong with a chain that is a circle.
const IN_TWICE: &str = "its chain of clusters has one of them twice";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Width {
    Bits12,
    Bits16,
    Bits32,
}

/// A volume with FAT.
pub struct Fat {
    source: Rc<dyn Source>,
    width: Width,
    cluster: u64,
    clusters: u32,
    /// The first byte of the table.
    table: u64,
    /// The first byte of cluster 2.
    data: u64,
    root: Root,
}

/// Where the root directory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Root {
    /// At its own place, so many bytes.
    Fixed { at: u64, length: u64 },
    /// In clusters, from this one on.
    Cluster(u32),
}

/// What an entry says of a file.
struct Found {
    is_directory: bool,
    is_read_only: bool,
    cluster: u32,
    size: u32,
    modified_ns: i128,
}

impl Fat {
    /// The volume on `source`.
    ///
    /// # Errors
    /// When it has no FAT, or one that is damaged.
    pub fn open(source: Rc<dyn Source>) -> Result<Self, Error> {
        let name = || "the boot sector of this FAT".to_owned();
        let mut sector = [0; 512];
        source.read_at(ByteOffset::ZERO, &mut sector).map_err(|error| Error::from(error).of(name))?;
        Self::parse(source, &sector).map_err(|error| error.of(name))
    }

    fn parse(source: Rc<dyn Source>, sector: &[u8]) -> Result<Self, Error> {
        let (bytes, per_cluster) = (u64::from(le16(sector, 11)?), u64::from(byte(sector, 13)?));
        let (reserved, tables) = (u64::from(le16(sector, 14)?), u64::from(byte(sector, 16)?));
        let entries = u64::from(le16(sector, 17)?);
        let either = |short: u16, long: u32| if short == 0 { u64::from(long) } else { u64::from(short) };
        let total = either(le16(sector, 19)?, le32(sector, 32)?);
        let (short_table, long_table) = (le16(sector, 22)?, le32(sector, 36)?);
        let table = either(short_table, long_table);
        let root_sectors = (entries * ENTRY as u64).div_ceil(bytes.max(1));
        let before = reserved + tables * table + root_sectors;
        let makes_sense = bytes.is_power_of_two()
            && (512..=4096).contains(&bytes)
            && per_cluster.is_power_of_two()
            && reserved > 0
            && tables > 0
            && table > 0
            && before < total;
        if !makes_sense {
            return Err(Error::damaged("", "its sizes do not go together"));
        }
        let clusters = (total - before) / per_cluster;
        // As Linux decides: which fields are in use tells FAT32 from the others, their clusters do not.
        let width = match (short_table, clusters) {
            (0, _) => Width::Bits32,
            (_, 0..4085) => Width::Bits12,
            (_, 4085..65525) => Width::Bits16,
            (_, 65525..) => {
                return Err(Error::damaged(
                    "",
                    format!("its fields are FAT16's, and it has {clusters} clusters"),
                ));
            }
        };
        if width != Width::Bits32 && entries == 0 {
            return Err(Error::damaged("", "its root directory has no room"));
        }
        let bits = match width {
            Width::Bits12 => 12,
            Width::Bits16 => 16,
            Width::Bits32 => 32,
        };
        if ((clusters + 2) * bits).div_ceil(8) > table * bytes || clusters > 0x0fff_fff0 {
            return Err(Error::damaged("", format!("its table has no room for {clusters} clusters")));
        }
        let fixed = (reserved + tables * table) * bytes;
        let root = match width {
            Width::Bits32 => Root::Cluster(le32(sector, 44)?),
            Width::Bits12 | Width::Bits16 => Root::Fixed { at: fixed, length: entries * ENTRY as u64 },
        };
        Ok(Self {
            source,
            width,
            cluster: per_cluster * bytes,
            // It was checked to be less than 2^28.
            clusters: clusters as u32,
            table: reserved * bytes,
            data: before * bytes,
            root,
        })
    }

    /// The cluster behind one; none behind the last.
    fn next(&self, cluster: u32) -> Result<Option<u32>, Error> {
        let mut bytes = [0; 4];
        let number = u64::from(cluster);
        let (at, width) = match self.width {
            Width::Bits12 => (number + number / 2, 2),
            Width::Bits16 => (number * 2, 2),
            Width::Bits32 => (number * 4, 4),
        };
        self.source.read_at(ByteOffset(self.table + at), &mut bytes[..width])?;
        let raw = u32::from_le_bytes(bytes);
        let (next, last) = match self.width {
            Width::Bits12 if cluster % 2 == 1 => (raw >> 4, 0xff8),
            Width::Bits12 => (raw & 0xfff, 0xff8),
            Width::Bits16 => (raw, 0xfff8),
            Width::Bits32 => (raw & 0x0fff_ffff, 0x0fff_fff8),
        };
        Ok((next < last).then_some(next))
    }

    /// The clusters from `first` on, as far as `limit` bytes; neighbors are one piece.
    fn chain(&self, first: u32, limit: u64) -> Result<Vec<Piece>, Error> {
        let mut pieces: Vec<Piece> = Vec::new();
        let (mut cluster, mut at) = (Some(first), 0);
        while at < limit {
            let Some(number) = cluster else { break };
            if number < 2 || number - 2 >= self.clusters {
                return Err(Error::damaged(
                    "",
                    format!("its chain leads to cluster {number}, which is not there"),
                ));
            }
            let place = self.data + u64::from(number - 2) * self.cluster;
            match pieces.last_mut() {
                Some(Piece { length, place: Place::Volume(start), .. }) if start.0 + length.0 == place => {
                    length.0 += self.cluster;
                }
                _ => pieces.push(Piece {
                    at: ByteOffset(at),
                    length: ByteCount(self.cluster),
                    place: Place::Volume(ByteOffset(place)),
                }),
            }
            if pieces.len() > PIECES_MAX {
                let (what, limit) = ("a file of this FAT".to_owned(), PIECES_MAX as u64);
                return Err(Error::TooMany { what, of: "pieces", limit });
            }
            at += self.cluster;
            if at / self.cluster > u64::from(self.clusters) {
                return Err(Error::damaged("", IN_TWICE));
            }
            cluster = if at < limit { self.next(number)? } else { None };
        }
        refuse_overlap(&pieces)?;
        Ok(pieces)
    }

    /// The entry of a file.
    fn entry(&self, id: FileId) -> Result<Found, Error> {
        let mut entry = [0; ENTRY];
        self.source.read_at(ByteOffset(id.0), &mut entry)?;
        let attributes = byte(&entry, 11)?;
        let high = if self.width == Width::Bits32 { u32::from(le16(&entry, 20)?) << 16 } else { 0 };
        Ok(Found {
            is_directory: attributes & DIRECTORY != 0,
            is_read_only: attributes & READ_ONLY != 0,
            cluster: high | u32::from(le16(&entry, 26)?),
            size: le32(&entry, 28)?,
            modified_ns: i128::from(names::seconds(le16(&entry, 24)?, le16(&entry, 22)?)) * 1_000_000_000,
        })
    }

    /// Where the entries of a directory are.
    fn directory(&self, id: FileId) -> Result<Vec<Piece>, Error> {
        let first = match (id, self.root) {
            (ROOT, Root::Fixed { at, length }) => {
                let place = Place::Volume(ByteOffset(at));
                return Ok(vec![Piece { at: ByteOffset::ZERO, length: ByteCount(length), place }]);
            }
            (ROOT, Root::Cluster(first)) => first,
            (id, _) => {
                let found = self.entry(id)?;
                if !found.is_directory {
                    return Err(Error::damaged("", "it is no directory"));
                }
                found.cluster
            }
        };
        // One cluster more tells whether there is more than can be.
        self.chain(first, DIRECTORY_MAX + 1)
    }
}

/// Refuses a chain that is a circle or comes back to itself: each cluster has bytes of one place of a file.
fn refuse_overlap(pieces: &[Piece]) -> Result<(), Error> {
    let mut places: Vec<(u64, u64)> = pieces
        .iter()
        .filter_map(|piece| match piece.place {
            Place::Volume(start) => Some((start.0, start.0 + piece.length.0)),
            Place::Inline(_) => None,
        })
        .collect();
    places.sort_unstable();
    match places.is_sorted_by(|before, after| before.1 <= after.0) {
        true => Ok(()),
        false => Err(Error::damaged("", IN_TWICE)),
    }
}

fn named(id: FileId) -> impl FnOnce() -> String {
    move || match id {
        ROOT => "the root directory of this FAT".to_owned(),
        id => format!("the file of this FAT whose entry is at byte {}", id.0),
    }
}

impl FileSystem for Fat {
    fn root(&self) -> FileId {
        ROOT
    }

    fn node(&self, id: FileId) -> Result<Node, Error> {
        let root = Found { is_directory: true, is_read_only: false, cluster: 0, size: 0, modified_ns: 0 };
        let found = if id == ROOT { root } else { self.entry(id).map_err(|error| error.of(named(id)))? };
        let kind = if found.is_directory { Kind::Directory } else { Kind::File };
        let mode = match (kind, found.is_read_only) {
            (Kind::Directory, _) => 0o755,
            (_, true) => 0o444,
            (_, false) => 0o644,
        };
        let size = if found.is_directory { 0 } else { found.size };
        let (modified_ns, size) = (found.modified_ns, ByteCount(u64::from(size)));
        Ok(Node { kind, size, mode, uid: 0, gid: 0, modified_ns, changed_ns: modified_ns })
    }

    fn names(&self, directory: FileId) -> Result<Vec<Name>, Error> {
        let pieces = self.directory(directory).map_err(|error| error.of(named(directory)))?;
        let (mut names, mut reader) = (Vec::new(), names::Reader::default());
        let mut left = DIRECTORY_MAX;
        for piece in pieces {
            let Place::Volume(start) = piece.place else { continue };
            let length = piece.length.0.min(left);
            left -= length;
            let is_cut = length < piece.length.0;
            let mut bytes = vec![0; length as usize];
            let read = self.source.read_at(start, &mut bytes);
            read.map_err(|error| Error::from(error).of(named(directory)))?;
            for (entry, number) in bytes.chunks_exact(ENTRY).zip(0_u64..) {
                match (entry[0], entry[11]) {
                    (0, _) => return Ok(names),
                    (0xe5, _) => reader.forget(),
                    (_, attributes) if attributes & 0x3f == LONG_NAME => reader.add(entry),
                    (_, attributes) if attributes & LABEL != 0 => reader.forget(),
                    _ => {
                        let name = reader.name(entry);
                        if name == b"." || name == b".." {
                            continue;
                        }
                        let id = FileId(start.0 + number * ENTRY as u64);
                        names.push(Name { bytes: name, id });
                    }
                }
                if names.len() > NAMES_MAX {
                    let (what, limit) = (named(directory)(), NAMES_MAX as u64);
                    return Err(Error::TooMany { what, of: "names", limit });
                }
            }
            if is_cut {
                let (what, limit) = (named(directory)(), DIRECTORY_MAX);
                return Err(Error::TooMany { what, of: "bytes", limit });
            }
        }
        Ok(names)
    }

    fn link_target(&self, id: FileId) -> Result<Vec<u8>, Error> {
        Err(Error::damaged(named(id)(), "it is no symbolic link"))
    }

    fn contents(&self, id: FileId) -> Result<Contents, Error> {
        let found = self.entry(id).map_err(|error| error.of(named(id)))?;
        let size = ByteCount(u64::from(found.size));
        let pieces = if size.is_zero() { Ok(Vec::new()) } else { self.chain(found.cluster, size.0) };
        let stored = pieces.and_then(|pieces| {
            let length: u64 = pieces.iter().map(|piece| piece.length.0).sum();
            if length < size.0 {
                let why = format!("it has {size} bytes, and clusters for {length}");
                return Err(Error::damaged("", why));
            }
            Contents::new(size, pieces, self.source.size())
        });
        stored.map_err(|error| error.of(named(id)))
    }

    fn read(&self, contents: &Contents, at: ByteOffset, buffer: &mut [u8]) -> Result<usize, Error> {
        let read = contents.read_at(self.source.as_ref(), at, buffer);
        read.map_err(|error| error.of(|| "a file of this FAT".to_owned()))
    }

    fn is_same_name(&self, a: &[u8], b: &[u8]) -> bool {
        is_same_text(a, b)
    }

    fn warnings(&self) -> &[String] {
        &[]
    }
}

#[cfg(test)]
mod tests;
