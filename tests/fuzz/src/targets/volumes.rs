//! What guests write: volumes of ext, FAT, NTFS and XFS, the metadata of LVM, and tables of partitions.
//!
//! A sample is a volume without its empty sectors: its length in sectors, and then each sector behind its number. So
//! what is done to it is done to something. XFS and ext4 check what they read by checksums, which turn most of it away here: their
//! own tests damage volumes behind them (`BACKTIDE_DAMAGE_ROUNDS`).

use std::{collections::BTreeMap, io, path::Path, rc::Rc};

use backtide_filesystems::{FileSystem, Kind, Source, Window, ext::Ext, fat::Fat, lvm, ntfs::Ntfs, xfs::Xfs};
use backtide_units::{ByteCount, ByteOffset, ByteRange};

use super::{leave, tables};
use crate::Target;

pub(super) const SECTOR: usize = 512;

/// The longest volume that a length can say: no reader has to take more than the bytes that are asked for.
const SECTORS_MAX: u32 = 1 << 24;

/// Sectors that a sample has at most: the later ones are bytes of files.
const SAMPLE_SECTORS_MAX: usize = 2048;

/// The target of this name: each has its samples made when it is asked for, which takes some time.
///
/// # Panics
/// When there is none.
pub fn volume(name: &str) -> Target {
    let packed = |names: &[&str]| names.iter().map(|name| pack(&unpacked(name))).collect();
    match name {
        "ext" => Target {
            name: "ext",
            seeds: 150,
            samples: packed(&["ext3", "ext4"]),
            mend: leave,
            take: |bytes| walk_if_open(Ext::open(Rc::new(Sparse::new(bytes)))),
        },
        "fat" => Target {
            name: "fat",
            seeds: 150,
            samples: packed(&["fat12", "fat16", "fat32"]),
            mend: leave,
            take: |bytes| walk_if_open(Fat::open(Rc::new(Sparse::new(bytes)))),
        },
        "ntfs" => Target {
            name: "ntfs",
            seeds: 150,
            samples: packed(&["ntfs"]),
            mend: leave,
            take: |bytes| walk_if_open(Ntfs::open(Rc::new(Sparse::new(bytes)))),
        },
        "xfs" => Target {
            name: "xfs",
            seeds: 150,
            samples: packed(&["xfs"]),
            mend: leave,
            take: |bytes| walk_if_open(Xfs::open(Rc::new(Sparse::new(bytes)))),
        },
        "lvm" => Target {
            name: "lvm",
            seeds: 1500,
            samples: vec![pack(&golden("lvm-pv1")), pack(&golden("lvm-pv2"))],
            mend: leave,
            take: groups,
        },
        "partitions" => tables::target(),
        other => panic!("there is no volume {other}"),
    }
}

fn golden(name: &str) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/volumes").join(name);
    std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn unpacked(name: &str) -> Vec<u8> {
    zstd::decode_all(&golden(&format!("{name}.zst"))[..]).expect("a volume is packed as it was")
}

/// The sectors of a volume that are not empty.
pub(super) fn pack(volume: &[u8]) -> Vec<u8> {
    let sectors = u32::try_from(volume.len() / SECTOR).expect("a small volume");
    let mut packed = sectors.to_le_bytes().to_vec();
    let used = volume.chunks_exact(SECTOR).zip(0_u32..).filter(|(sector, _)| *sector != [0; SECTOR]);
    for (sector, number) in used.take(SAMPLE_SECTORS_MAX) {
        packed.extend_from_slice(&number.to_le_bytes());
        packed.extend_from_slice(sector);
    }
    packed
}

/// A volume out of a sample.
pub(super) struct Sparse {
    size: ByteCount,
    sectors: BTreeMap<u64, Vec<u8>>,
}

impl Sparse {
    pub(super) fn new(packed: &[u8]) -> Self {
        let number = |bytes: &[u8]| bytes.first_chunk().map_or(0, |first| u32::from_le_bytes(*first));
        let mut sectors = BTreeMap::new();
        for entry in packed.get(4..).unwrap_or_default().chunks(4 + SECTOR) {
            let mut sector = entry.get(4..).unwrap_or_default().to_vec();
            sector.resize(SECTOR, 0);
            sectors.insert(u64::from(number(entry)), sector);
        }
        Self { size: ByteCount(u64::from(number(packed).min(SECTORS_MAX)) * SECTOR as u64), sectors }
    }
}

impl Source for Sparse {
    fn size(&self) -> ByteCount {
        self.size
    }

    fn read_at(&self, offset: ByteOffset, buffer: &mut [u8]) -> io::Result<()> {
        let end = offset.checked_add(ByteCount::of(buffer)).filter(|end| end.0 <= self.size.0);
        let end = end.ok_or(io::ErrorKind::UnexpectedEof)?.0;
        buffer.fill(0);
        let first = offset.0 / SECTOR as u64;
        for (number, sector) in self.sectors.range(first..end.div_ceil(SECTOR as u64).max(first)) {
            let at = number * SECTOR as u64;
            let (from, to) = (at.max(offset.0), (at + SECTOR as u64).min(end));
            let place = |byte: u64, base: u64| usize::try_from(byte - base).expect("within the buffer");
            buffer[place(from, offset.0)..place(to, offset.0)]
                .copy_from_slice(&sector[place(from, at)..place(to, at)]);
        }
        Ok(())
    }
}

fn walk_if_open<E>(opened: Result<impl FileSystem, E>) {
    if let Ok(volume) = opened {
        walk(&volume);
    }
}

/// Looks at everything there is, up to some bounds; errors are fine.
fn walk(volume: &dyn FileSystem) {
    let (mut left, mut directories, mut buffer) = (500, vec![(0, volume.root())], vec![0; 4096]);
    while let Some((depth, directory)) = directories.pop() {
        let Ok(names) = volume.names(directory) else { continue };
        for entry in names {
            left -= 1;
            if left == 0 {
                return;
            }
            let Ok(node) = volume.node(entry.id) else { continue };
            match node.kind {
                Kind::Directory if depth < 5 => directories.push((depth + 1, entry.id)),
                Kind::Symlink => drop(volume.link_target(entry.id)),
                Kind::File => {
                    let Ok(contents) = volume.contents(entry.id) else { continue };
                    let Some(from) = contents.next_data(ByteOffset::ZERO) else { continue };
                    drop(volume.read(&contents, from, &mut buffer));
                }
                Kind::Directory | Kind::Special => {}
            }
        }
    }
}

/// The logical volumes of a group that has one physical volume here.
fn groups(packed: &[u8]) {
    let volume = Rc::new(Sparse::new(packed));
    let range = ByteRange::between(ByteOffset::ZERO, ByteOffset(volume.size.0));
    let window = Window::new(Rc::clone(&volume) as Rc<dyn Source>, range);
    let Ok(physical) = lvm::physical(&window) else { return };
    let Ok(found) = lvm::logical_volumes(&[(range, physical)]) else { return };
    for logical in found {
        let Ok(segments) = logical.segments else { continue };
        let bytes = lvm::LogicalBytes::new(Rc::clone(&volume) as Rc<dyn Source>, segments);
        let _ = bytes.read_at(ByteOffset::ZERO, &mut [0; 4096]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Else nothing of what is done to them would reach a parser.
    #[test]
    fn samples_are_read_as_the_volumes_that_they_are() {
        let open = |name: &str| -> Box<dyn FileSystem> {
            let source = Rc::new(Sparse::new(&pack(&unpacked(name))));
            match name {
                "ext3" | "ext4" => Box::new(Ext::open(source).unwrap()),
                "ntfs" => Box::new(Ntfs::open(source).unwrap()),
                "xfs" => Box::new(Xfs::open(source).unwrap()),
                _ => Box::new(Fat::open(source).unwrap()),
            }
        };
        for name in ["ext3", "ext4", "fat12", "fat16", "fat32", "ntfs", "xfs"] {
            let volume = open(name);
            let names = volume.names(volume.root()).unwrap();
            assert!(names.len() > 3, "{name}: {names:?}");
        }
        let physical = Sparse::new(&pack(&golden("lvm-pv1")));
        assert!(lvm::physical(&physical).is_ok());
    }
}
