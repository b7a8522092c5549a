//! Volumes with the features that there are, file by file as they were put there.

use std::{fs, os::unix::fs::symlink};

use backtide_units::ByteCount;
use tempfile::TempDir;

use super::made::{Made, assert_same, files, find, pattern, put, read};
use super::*;

/// Files of all kinds and sizes, and directories of many names.
fn tree() -> TempDir {
    let tree = TempDir::new().unwrap();
    let at = |name: &str| tree.path().join(name);
    for directory in ["etc/deep", "many", "some"] {
        fs::create_dir_all(at(directory)).unwrap();
    }
    for length in [0, 1, 59, 60, 61, 150, 4096, 4097, 3_000_000] {
        fs::write(at(&format!("etc/{length}")), pattern(length, length)).unwrap();
    }
    for length in [1, 59, 60, 61, 120, 900] {
        symlink("abcdefghi/".repeat(length / 10 + 1).get(..length).unwrap(), at(&format!("link {length}")))
            .unwrap();
    }
    for number in 0..2500 {
        fs::write(at(&format!("many/a name that is so long that few are in a block {number:060}")), "")
            .unwrap();
    }
    for number in 0..4 {
        fs::write(at(&format!("some/{number} ünïcödé")), "1").unwrap();
    }
    // Blocks here and there: a tree of extents, and every level of blocks of pointers of a kibibyte each.
    let scattered = fs::File::create(at("scattered")).unwrap();
    for number in (0..500).step_by(2).chain([700, 5000, 66_000]) {
        std::os::unix::fs::FileExt::write_all_at(&scattered, &pattern(1024, number), number as u64 * 1024)
            .unwrap();
    }
    tree
}

#[test]
fn volumes_of_all_features_have_the_files_that_were_put_there() {
    let tree = tree();
    let mut expected = put(tree.path());
    expected.insert(b"/lost+found".to_vec(), (Kind::Directory, 0o700, Vec::new()));
    let all: &[&[&str]] = &[
        &["-t", "ext4"],
        &["-t", "ext4", "-O", "^metadata_csum,^64bit"],
        &["-t", "ext4", "-O", "^metadata_csum,uninit_bg", "-b", "1024"],
        &[
            "-t",
            "ext4",
            "-O",
            "metadata_csum_seed,large_dir,ea_inode,^flex_bg,64bit",
            "-b",
            "1024",
            "-g",
            "1024",
        ],
        &["-t", "ext4", "-O", "inline_data", "-I", "256"],
        &["-t", "ext4", "-O", "inline_data,casefold,project,quota", "-I", "1024", "-b", "2048"],
        &["-t", "ext4", "-O", "bigalloc"],
        &["-t", "ext4", "-O", "bigalloc", "-b", "1024"],
        &["-t", "ext4", "-O", "meta_bg,^resize_inode", "-b", "1024", "-g", "512"],
        &["-t", "ext4", "-O", "meta_bg,^resize_inode,bigalloc", "-b", "1024", "-C", "2048", "-g", "4096"],
        &["-t", "ext4", "-O", "sparse_super2", "-E", "num_backup_sb=2", "-b", "1024"],
        &["-t", "ext4", "-O", "^filetype,^dir_index,^sparse_super,^resize_inode", "-I", "128", "-b", "1024"],
        &["-t", "ext4", "-b", "65536"],
        &["-t", "ext3", "-b", "1024"],
        &["-t", "ext2"],
        &["-t", "ext2", "-b", "1024", "-r", "0"],
    ];
    for options in all {
        // Only the smallest blocks take a file of three levels of pointers in so little room.
        let made = Made::new(40 << 10, &[options, &["-N", "4096"][..]].concat(), Some(tree.path()));
        let ext = made.open();
        assert_eq!(ext.warnings(), [] as [String; 0], "{options:?}");
        assert_same(&files(&ext), &expected, &format!("{options:?}"));
        // It packs large directories, and gives those an index that may have one.
        made.mend("-fyD");
        assert_same(&files(&made.open()), &expected, &format!("{options:?}, indexed"));
    }
}

#[test]
fn what_was_reserved_and_never_written_is_a_hole() {
    let made = Made::new(16 << 10, &["-t", "ext4", "-b", "4096"], None);
    let source = made.beside("source", &pattern(20_000, 1));
    made.debugfs(&[
        &format!("write {source} file"),
        // Their blocks have what was there before.
        "fallocate file 10 2000",
        "sif file size 314572801",
    ]);
    let ext = made.open();
    let contents = ext.contents(find(&ext, "/file")).unwrap();
    assert_eq!(contents.size(), ByteCount(314_572_801));
    let stored: u64 = contents.pieces().iter().map(|piece| piece.length.0).sum();
    assert_eq!(stored, 20_480, "{:?}", contents.pieces());
    assert_eq!(contents.next_data(ByteOffset(20_480)), None);
    let mut bytes = vec![1; 8_192_000];
    ext.read(&contents, ByteOffset::ZERO, &mut bytes).unwrap();
    assert!(bytes[..20_000] == pattern(20_000, 1));
    assert!(bytes[20_480..].iter().all(|byte| *byte == 0));
}

#[test]
fn a_pointer_to_nothing_is_a_hole_at_every_level() {
    let made = Made::new(16 << 10, &["-t", "ext2", "-b", "1024"], None);
    let source = made.beside("source", &pattern(1 << 20, 1));
    made.debugfs(&[&format!("write {source} file")]);
    let ids = 256;
    // The first block of pointers, one below the second, and a pointer of each.
    let mut expected = pattern(1 << 20, 1);
    let inode = find(&made.open(), "/file");
    made.debugfs(&["sif file block[IND] 0"]);
    expected[12 << 10..(12 + ids) << 10].fill(0);
    let mut bytes = made.bytes();
    let at = made.open().volume.superblock.inode_at(&made.open().volume.source, inode.0).unwrap().0 as usize;
    let pointer = |bytes: &[u8], at: usize| le32(bytes, at).unwrap() as usize;
    let double = pointer(&bytes, at + 0x28 + 13 * 4) * 1024;
    bytes[double + 4..double + 8].fill(0);
    let from = 12 + ids + ids;
    expected[from << 10..(from + ids) << 10].fill(0);
    let third = pointer(&bytes, double + 8) * 1024;
    bytes[third + 12..third + 16].fill(0);
    expected[(from + ids + 3) << 10..(from + ids + 4) << 10].fill(0);
    bytes[at + 0x28 + 8..at + 0x28 + 12].fill(0);
    expected[2 << 10..3 << 10].fill(0);
    made.put(&bytes);
    let ext = made.open();
    assert!(read(&ext, inode) == expected);
    let contents = ext.contents(inode).unwrap();
    assert_eq!(contents.next_data(ByteOffset(12 << 10)), Some(ByteOffset((12 + ids as u64) << 10)));
    assert_same(&files(&ext), &made.dumped(), "as debugfs has it");
}

#[test]
fn times_go_as_far_as_the_inode_has_room_for_them() {
    for (size, has_room) in [("128", false), ("256", true)] {
        let made = Made::new(4 << 10, &["-t", "ext4", "-I", size], None);
        let source = made.beside("source", b"1");
        let mut commands = vec![format!("write {source} file"), "sif file mtime @0x80000000".to_owned()];
        commands.extend(["sif file uid 70000".to_owned(), "sif file gid 4000000000".to_owned()]);
        if has_room {
            commands.push("sif file mtime_extra 0x00000015".to_owned());
            commands.push("sif file ctime_extra 0x00000008".to_owned());
        }
        commands.push("sif file ctime @0x10".to_owned());
        made.debugfs(&commands.iter().map(String::as_str).collect::<Vec<_>>());
        let ext = made.open();
        let node = ext.node(find(&ext, "/file")).unwrap();
        assert_eq!((node.uid, node.gid), (70_000, 4_000_000_000));
        let second = 1_000_000_000;
        let after = (1 << 31) * second + 5;
        assert_eq!(node.modified_ns, if has_room { after } else { -(1 << 31) * second }, "{size}");
        assert_eq!(node.changed_ns.rem_euclid(second), if has_room { 2 } else { 0 });
        if has_room {
            // Newer fields that end before it are not those.
            made.debugfs(&["sif file extra_isize 8"]);
            let ext = made.open();
            assert_eq!(ext.node(find(&ext, "/file")).unwrap().modified_ns, -(1 << 31) * second);
        }
    }
}

#[test]
fn what_is_encrypted_is_refused_one_by_one() {
    let made = Made::new(8 << 10, &["-t", "ext4", "-O", "encrypt"], None);
    let source = made.beside("source", b"1");
    made.debugfs(&[
        &format!("write {source} plain"),
        &format!("write {source} file"),
        "symlink link somewhere",
        "mkdir directory",
        "sif file flags 0x80800",
        "sif link flags 0x800",
        "sif directory flags 0x80800",
    ]);
    let ext = made.open();
    assert_eq!(read(&ext, find(&ext, "/plain")), b"1");
    let (file, link, directory) = (find(&ext, "/file"), find(&ext, "/link"), find(&ext, "/directory"));
    assert_eq!(ext.node(file).unwrap().size, ByteCount(1));
    let said = [
        ext.contents(file).unwrap_err(),
        ext.link_target(link).unwrap_err(),
        ext.names(directory).unwrap_err(),
    ];
    for error in said {
        assert!(
            matches!(error, Error::Unsupported { .. }) && error.to_string().contains("is encrypted"),
            "{error}"
        );
    }
}

#[test]
fn a_volume_in_use_without_a_journal_and_one_with_errors_say_so() {
    let made = Made::new(4 << 10, &["-t", "ext2"], None);
    assert_eq!(made.open().warnings(), [] as [String; 0]);
    made.debugfs(&["ssv state 0"]);
    assert!(made.open().warnings()[0].contains("was in use"));
    made.debugfs(&["ssv state 3"]);
    assert!(made.open().warnings()[0].contains("needs e2fsck"));
    made.debugfs(&["feature journal_dev"]);
    let why = open(made.bytes()).err().unwrap().to_string();
    assert!(why.contains("journal_dev"), "{why}");
}
