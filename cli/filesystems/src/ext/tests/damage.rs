//! Damage, and what a hostile guest may write.

use super::made::{Made, find, pattern, read};
use super::*;

/// A volume with a file of a tree of extents, another file, a link and a directory of several blocks.
fn volume() -> Made {
    let made = Made::new(16 << 10, &["-t", "ext4", "-b", "1024"], None);
    let (small, large) =
        (made.beside("small", &pattern(5000, 1)), made.beside("large", &pattern(900 << 10, 2)));
    let mut commands = vec![format!("write {small} small"), format!("write {large} scattered")];
    commands.extend((0..800).step_by(2).map(|block| format!("punch scattered {block} {block}")));
    commands.extend(["symlink link small".to_owned(), "mkdir names".to_owned()]);
    commands.extend((0..60).map(|number| format!("mkdir names/{number:040}")));
    made.debugfs(&commands.iter().map(String::as_str).collect::<Vec<_>>());
    made
}

fn inode_at(ext: &Ext, id: FileId) -> usize {
    ext.volume.superblock.inode_at(&ext.volume.source, id.0).unwrap().0 as usize
}

/// A change of one byte.
fn with(bytes: &[u8], at: usize) -> Ext {
    let mut bytes = bytes.to_vec();
    bytes[at] ^= 1;
    open(bytes).unwrap()
}

#[test]
fn what_a_checksum_tells_is_damaged_and_nothing_else_is() {
    let made = volume();
    let (bytes, ext) = (made.bytes(), made.open());
    let [small, scattered, names] = ["/small", "/scattered", "/names"].map(|path| find(&ext, path));
    let is_well = |ext: &Ext| read(ext, small) == pattern(5000, 1);
    assert!(is_well(&ext));

    let bad = with(&bytes, inode_at(&ext, scattered) + 0x10);
    let why = bad.node(scattered).unwrap_err().to_string();
    assert_eq!(why, format!("inode {} is damaged: its checksum is another", scattered.0));
    assert!(is_well(&bad));

    // The tree of extents is in a block of its own, which the inode names.
    let pointers = ext.inode(scattered).unwrap().pointers().to_vec();
    let node = le32(&pointers, 16).unwrap() as usize * 1024;
    let bad = with(&bytes, node + 20);
    let why = bad.contents(scattered).unwrap_err().to_string();
    assert!(why.contains("a node of its tree of extents has another checksum"), "{why}");
    assert!(bad.node(scattered).is_ok() && is_well(&bad));

    let block = made.blocks("names")[1] * 1024;
    let bad = with(&bytes, block + 10);
    let why = bad.names(names).unwrap_err().to_string();
    let said =
        format!("the directory of inode {} is damaged: in its block at byte 1024, the checksum", names.0);
    assert!(why.starts_with(&said), "{why}");
    assert!(is_well(&bad));

    let mut bad = bytes.clone();
    bad[1024 + 0x10] ^= 1;
    let why = open(bad).err().unwrap().to_string();
    assert_eq!(why, "the superblock of this ext file system is damaged: its checksum is another");

    // The descriptor of the first group, which has all of them.
    let why = with(&bytes, 2048 + 3).node(small).unwrap_err().to_string();
    assert_eq!(why, "the descriptor of group 0 is damaged: its checksum is another");
}

#[test]
fn descriptors_of_older_volumes_have_a_checksum_too() {
    let made = Made::new(8 << 10, &["-t", "ext4", "-O", "^metadata_csum,uninit_bg", "-b", "1024"], None);
    assert!(made.open().names(ROOT).is_ok());
    let why = with(&made.bytes(), 2048 + 3).node(ROOT).unwrap_err().to_string();
    assert_eq!(why, "the descriptor of group 0 is damaged: its checksum is another");
}

#[test]
fn an_index_is_checked_and_gone_over() {
    let made = volume();
    made.mend("-fyD");
    let (bytes, ext) = (made.bytes(), made.open());
    let names = find(&ext, "/names");
    assert!(ext.inode(names).unwrap().is_indexed());
    assert_eq!(ext.names(names).unwrap().len(), 60);
    // An entry of the root of the index.
    let bad = with(&bytes, made.blocks("names")[0] * 1024 + 44);
    assert!(bad.names(names).unwrap_err().to_string().contains("checksum"));
}

#[test]
fn trees_that_are_circles_end() {
    let made = Made::new(8 << 10, &["-t", "ext2", "-b", "1024"], None);
    let source = made.beside("source", &pattern(500 << 10, 1));
    made.debugfs(&[&format!("write {source} file"), "mkdir directory", "sif file size 17000000000"]);
    let (ext, mut bytes) = (made.open(), made.bytes());
    let file = find(&ext, "/file");
    let at = inode_at(&ext, file) + 0x28;
    // A block of pointers all of which lead to it again, at every level.
    let block = le32(&bytes, at + 13 * 4).unwrap();
    for pointer in bytes[block as usize * 1024..][..1024].chunks_exact_mut(4) {
        pointer.copy_from_slice(&block.to_le_bytes());
    }
    bytes.copy_within(at + 13 * 4..at + 14 * 4, at + 14 * 4);
    let ext = open(bytes).unwrap();
    let why = ext.contents(file).unwrap_err();
    assert!(matches!(why, Error::TooMany { .. }), "{why}");
    assert!(ext.names(find(&ext, "/directory")).is_ok());
}

#[test]
fn extents_that_overlap_or_lead_to_themselves_are_damage() {
    // Without checksums, so that it gets to the tree.
    let made = Made::new(8 << 10, &["-t", "ext4", "-b", "1024", "-O", "^metadata_csum"], None);
    let large = made.beside("large", &pattern(900 << 10, 2));
    let mut commands = vec![format!("write {large} file")];
    commands.extend((0..200).step_by(2).map(|block| format!("punch file {block} {block}")));
    made.debugfs(&commands.iter().map(String::as_str).collect::<Vec<_>>());
    let (ext, bytes) = (made.open(), made.bytes());
    let file = find(&ext, "/file");
    assert!(ext.contents(file).unwrap().pieces().len() == 100);
    let root = inode_at(&ext, file) + 0x28;
    let node = le32(&bytes, root + 16).unwrap() as usize * 1024;
    let said = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = bytes.clone();
        change(&mut bytes);
        open(bytes).unwrap().contents(file).unwrap_err().to_string()
    };
    let overlap = said(&|bytes| bytes.copy_within(node + 12..node + 24, node + 24));
    assert!(overlap.contains("is the first that can be"), "{overlap}");
    let itself = said(&|bytes| bytes.copy_within(root..root + 24, node));
    assert!(itself.contains("of the level"), "{itself}");
    let deep = said(&|bytes| bytes[root + 6] = 6);
    assert!(deep.contains("of the level 6"), "{deep}");
    let none = said(&|bytes| bytes[node + 16..node + 18].fill(0));
    assert!(none.contains("no blocks"), "{none}");
    let more = said(&|bytes| bytes[node + 2..node + 4].fill(0xff));
    assert!(more.contains("room for"), "{more}");
    let mark = said(&|bytes| bytes[node] = 0);
    assert!(mark.contains("no mark"), "{mark}");
    let beyond = said(&|bytes| bytes[node + 20..node + 24].fill(0xff));
    assert!(beyond.contains("which is not there"), "{beyond}");
}

#[test]
fn a_directory_that_lost_a_block_is_not_one_with_fewer_names() {
    let made = Made::new(8 << 10, &["-t", "ext4", "-b", "1024"], None);
    let mut commands = vec!["mkdir many".to_owned()];
    commands.extend((0..300).map(|number| format!("mkdir many/a-name-of-some-length-{number}")));
    made.debugfs(&commands.iter().map(String::as_str).collect::<Vec<_>>());
    let names = |made: &Made| made.open().names(find(&made.open(), "/many"));
    assert_eq!(names(&made).unwrap().len(), 300);
    let blocks = made.blocks("/many").len();
    for (from, to) in [(3, 4), (blocks - 1, blocks - 1)] {
        made.debugfs(&[&format!("punch many {from} {to}")]);
        let why = names(&made).unwrap_err().to_string();
        assert!(why.contains("a hole"), "{why}");
    }
}

#[test]
fn a_link_that_is_too_long_is_an_error_of_its_own() {
    let made = volume();
    made.debugfs(&["sif link size 0x7fffffff", "sif small size 0xffffffffffffffff"]);
    let ext = made.open();
    assert!(ext.link_target(find(&ext, "/link")).unwrap_err().to_string().contains("2147483647 bytes"));
    assert!(ext.node(find(&ext, "/small")).is_err());
    assert_eq!(ext.names(find(&ext, "/names")).unwrap().len(), 60);
    assert!(matches!(ext.node(FileId(0)), Err(Error::Damaged { .. })));
    assert!(matches!(ext.node(FileId(u64::MAX)), Err(Error::Damaged { .. })));
}

#[test]
fn bytes_that_are_not_in_the_inode_are_not_made_up() {
    let made = Made::new(8 << 10, &["-t", "ext4", "-O", "inline_data", "-I", "256"], None);
    let source = made.beside("source", &pattern(100, 1));
    made.debugfs(&[&format!("write {source} file"), "sif file size 5000"]);
    let ext = made.open();
    let why = ext.contents(find(&ext, "/file")).unwrap_err().to_string();
    assert!(why.contains("it says that 5000 bytes are in it, and 100 are"), "{why}");
}

/// Checksums keep most damage from the parsers: here they are not looked at.
#[test]
fn damage_that_no_checksum_tells_neither_panics_nor_goes_on_for_ever() {
    for name in ["ext4", "ext3"] {
        golden::damage(&golden::volume(name), |bytes| {
            let Ok(ext) = open(bytes) else { return };
            golden::walk(&ext);
        });
    }
}
