//! For the tests: volumes that others have written, what is on them by a mount, and damage.

use std::{cell::Cell, collections::BTreeMap, fmt::Write as _, path::PathBuf};

use backtide_units::ByteOffset;

use crate::{Error, FileId, FileSystem, Kind, Node};

thread_local! {
    static EVERY_CHECKSUM: Cell<bool> = const { Cell::new(false) };
}

/// Whether checksums are taken as they are, so that damage gets to the parsers.
pub(crate) fn takes_every_checksum() -> bool {
    EVERY_CHECKSUM.get()
}

fn unpacked(name: &str) -> Vec<u8> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../testdata/volumes");
    let packed = std::fs::read(folder.join(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
    zstd::decode_all(&packed[..]).unwrap()
}

/// The bytes of a volume.
pub(crate) fn volume(name: &str) -> Vec<u8> {
    unpacked(&format!("{name}.zst"))
}

/// What the file says that lies beside the volume, by path.
fn expected(name: &str) -> BTreeMap<String, String> {
    let text = String::from_utf8(unpacked(&format!("{name}.files.zst"))).unwrap();
    let line = |line: &str| {
        let (what, path) = line.rsplit_once('\t').unwrap();
        (path.to_owned(), what.to_owned())
    };
    text.lines().map(line).collect()
}

fn describe(volume: &dyn FileSystem, id: FileId) -> String {
    let node = volume.node(id).unwrap();
    let (kind, size, extra) = match node.kind {
        Kind::File => {
            let contents = match volume.contents(id) {
                Err(Error::Unsupported { .. }) => return line(&node, "file", node.size.0, "unreadable"),
                contents => contents.unwrap(),
            };
            let (mut at, mut sum, mut buffer) = (0, 0, vec![0; 70_000]);
            loop {
                let count = volume.read(&contents, ByteOffset(at), &mut buffer).unwrap();
                if count == 0 {
                    break;
                }
                sum = crc32c::crc32c_append(sum, &buffer[..count]);
                at += count as u64;
            }
            assert_eq!((at, contents.size()), (node.size.0, node.size));
            ("file", node.size.0, format!("{sum:08x}"))
        }
        Kind::Directory => ("directory", 0, String::new()),
        Kind::Symlink => {
            let target = volume.link_target(id).unwrap();
            let hex = target.iter().fold(String::new(), |mut hex, byte| {
                write!(hex, "{byte:02x}").unwrap();
                hex
            });
            ("symlink", 0, hex)
        }
        Kind::Special => ("special", 0, String::new()),
    };
    line(&node, kind, size, &extra)
}

fn line(node: &Node, kind: &str, size: u64, extra: &str) -> String {
    let seconds = node.modified_ns.div_euclid(1_000_000_000);
    format!("{kind}\t{:o}\t{}\t{}\t{size}\t{seconds}\t{extra}", node.mode, node.uid, node.gid)
}

/// Compares all of a volume with what a mount has told.
pub(crate) fn compare(volume: &dyn FileSystem, name: &str) {
    let mut found = BTreeMap::new();
    let mut directories = vec![(String::new(), volume.root())];
    while let Some((path, directory)) = directories.pop() {
        for entry in volume.names(directory).unwrap() {
            let path = format!("{path}/{}", String::from_utf8(entry.bytes).unwrap());
            if volume.node(entry.id).unwrap().kind == Kind::Directory {
                directories.push((path.clone(), entry.id));
            }
            let before = found.insert(path, describe(volume, entry.id));
            assert_eq!(before, None, "a name that is there twice");
        }
    }
    let expected = expected(name);
    for (path, what) in &expected {
        assert_eq!(found.get(path), Some(what), "{name}: {path}");
    }
    let more: Vec<_> = found.keys().filter(|path| !expected.contains_key(*path)).collect();
    assert!(more.is_empty(), "{name}: {more:?}");
}

/// Looks at everything there is, up to some bounds; errors are fine.
pub(crate) fn walk(volume: &dyn FileSystem) {
    let (mut left, mut directories, mut buffer) = (20_000, vec![(0, volume.root())], vec![0; 4096]);
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
                    let mut at = Some(ByteOffset::ZERO);
                    for _ in 0..4 {
                        let Some(from) = at.and_then(|at| contents.next_data(at)) else { break };
                        drop(volume.read(&contents, from, &mut buffer));
                        at = from.0.checked_add(100_000).map(ByteOffset);
                    }
                }
                Kind::Directory | Kind::Special => {}
            }
        }
    }
}

/// Calls `take` with the volume damaged in different ways, the same ones every time; `BACKTIDE_DAMAGE_ROUNDS` says in how
/// many. Checksums are taken as they are.
pub(crate) fn damage(volume: &[u8], mut take: impl FnMut(Vec<u8>)) {
    let rounds = std::env::var("BACKTIDE_DAMAGE_ROUNDS").map_or(12, |rounds| rounds.parse().unwrap());
    // Where bytes are, so that damage is not done to nothing.
    let used: Vec<usize> = (0..volume.len() / 512)
        .filter(|sector| volume[sector * 512..][..512].iter().any(|byte| *byte != 0))
        .collect();
    EVERY_CHECKSUM.set(true);
    for round in 0..rounds {
        let mut state = u64::wrapping_mul(round, 0x9e37_79b9_7f4a_7c15) | 1;
        let mut next = |below: usize| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            usize::try_from(state % below as u64).unwrap()
        };
        let mut bytes = volume.to_vec();
        for _ in 0..200 {
            let at = used[next(used.len())] * 512 + next(512);
            bytes[at] = match next(4) {
                0 => 0,
                1 => 0xff,
                2 => bytes[at] ^ (1 << next(8)),
                _ => next(256) as u8,
            };
        }
        take(bytes);
    }
}
