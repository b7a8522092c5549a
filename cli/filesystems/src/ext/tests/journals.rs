//! Journals that debugfs writes, against what e2fsck makes of them.

use super::made::{Files, Made, assert_same, files, find, pattern, read};
use super::{
    checksum::{crc32, crc32c},
    patches::MAGIC,
    *,
};
use crate::fields::be32;

const BLOCK: usize = 1024;

/// A volume with a file of 20 blocks, and which these are.
fn volume(options: &[&str]) -> (Made, Vec<usize>) {
    let small = ["-t", "ext4", "-b", "1024", "-J", "size=2"];
    let made = Made::new(12 << 10, &[&small, options].concat(), None);
    let source = made.beside("source", &pattern(20 * BLOCK, 1));
    made.debugfs(&[&format!("write {source} file")]);
    let blocks = made.blocks("file");
    assert!(blocks.len() >= 20);
    // A tree of extents has its own block before those of the file.
    let blocks = blocks[blocks.len() - 20..].to_vec();
    (made, blocks)
}

/// Puts six transactions into its journal: blocks that are written, revoked, and written again.
fn write_journal(made: &Made, blocks: &[usize], open: &str) {
    let two = made.beside("two", &pattern(2 * BLOCK, 7));
    let magic = made.beside("magic", &[&MAGIC, &pattern(BLOCK - 4, 8)[..]].concat());
    let newer = made.beside("newer", &pattern(BLOCK, 90));
    made.debugfs(&[
        open,
        &format!("jw -b {},{} {two}", blocks[0], blocks[1]),
        &format!("jw -r {},{}", blocks[1], blocks[5]),
        &format!("jw -b {} {magic}", blocks[2]),
        &format!("jw -b {},{} {two}", blocks[3], blocks[5]),
        // One of these for the second time: the later one counts.
        &format!("jw -r {},{},{}", blocks[3], blocks[4], blocks[5]),
        &format!("jw -b {} {newer}", blocks[3]),
        "jc",
    ]);
}

/// The bytes of the file when all of that has been replayed.
fn replayed() -> Vec<u8> {
    let mut bytes = pattern(20 * BLOCK, 1);
    bytes[..BLOCK].copy_from_slice(&pattern(BLOCK, 7));
    bytes[2 * BLOCK..3 * BLOCK].copy_from_slice(&[&MAGIC, &pattern(BLOCK - 4, 8)[..]].concat());
    bytes[3 * BLOCK..4 * BLOCK].copy_from_slice(&pattern(BLOCK, 90));
    bytes
}

fn mended(made: &Made) -> Files {
    let copy = made.copy();
    copy.mend("-fy");
    copy.dumped()
}

fn file(ext: &Ext) -> Vec<u8> {
    read(ext, find(ext, "/file"))
}

/// The places of the blocks of the journal.
fn journal_blocks(made: &Made) -> Vec<usize> {
    let blocks = made.blocks("<8>");
    let is_first = |block: &usize| made.bytes()[block * BLOCK..][..4] == MAGIC;
    let first = blocks.iter().position(is_first).unwrap();
    blocks[first..].to_vec()
}

/// Changes the superblock of the journal, and makes its checksum right.
fn change_superblock(bytes: &mut [u8], at: usize, change: impl FnOnce(&mut [u8])) {
    let superblock = &mut bytes[at * BLOCK..(at + 1) * BLOCK];
    change(superblock);
    if superblock[0x50] != 0 {
        superblock[0xfc..0x100].fill(0);
        let sum = crc32c(u32::MAX, superblock);
        superblock[0xfc..0x100].copy_from_slice(&sum.to_be_bytes());
    }
}

/// The blocks of the journal from its start on, each with its kind: 1 descriptor, 2 commit, 5 revocation.
fn headers(made: &Made) -> Vec<(usize, u32)> {
    let (bytes, blocks) = (made.bytes(), journal_blocks(made));
    let start = be32(&bytes, blocks[0] * BLOCK + 0x1c).unwrap() as usize;
    let is_header = |block: &&usize| bytes[**block * BLOCK..][..4] == MAGIC;
    let kind = |block: &usize| (*block, be32(&bytes, block * BLOCK + 4).unwrap());
    blocks[start..start + 40].iter().filter(is_header).map(kind).collect()
}

#[test]
fn every_kind_of_journal_is_replayed_as_e2fsck_does_it() {
    let all: &[(&[&str], &str)] = &[
        (&[], "jo -c -v 3"),
        (&[], "jo -c -v 2"),
        (&["-O", "^metadata_csum"], "jo"),
        (&["-O", "^metadata_csum,^64bit"], "jo"),
        (&["-O", "^64bit"], "jo -c -v 3"),
        (&["-O", "^64bit"], "jo -c -v 2"),
    ];
    for (options, how) in all {
        let (made, blocks) = volume(options);
        write_journal(&made, &blocks, how);
        let ext = made.open();
        assert_eq!(ext.warnings(), [] as [String; 0], "{options:?} {how}");
        assert!(file(&ext) == replayed(), "{options:?} {how}");
        assert_same(&files(&ext), &mended(&made), how);
    }
}

#[test]
fn a_journal_goes_on_at_its_start_when_it_has_come_to_its_end() {
    for (options, how) in [(&[][..], "jo -c -v 3"), (&["-O", "^metadata_csum,^64bit"], "jo")] {
        let (made, blocks) = volume(options);
        write_journal(&made, &blocks, how);
        let journal = journal_blocks(&made);
        let mut bytes = made.bytes();
        let superblock = bytes[journal[0] * BLOCK..][..BLOCK].to_vec();
        let [length, first, start] = [0x10, 0x14, 0x1c].map(|at| be32(&superblock, at).unwrap() as usize);
        let log: Vec<Vec<u8>> =
            journal[start..start + 30].iter().map(|block| bytes[block * BLOCK..][..BLOCK].to_vec()).collect();
        // It ends amid a transaction, between a descriptor and its blocks, and behind a commit.
        for before_end in 1..14 {
            for block in &journal[1..length] {
                bytes[block * BLOCK..][..BLOCK].fill(0);
            }
            let mut at = length - before_end;
            change_superblock(&mut bytes, journal[0], |superblock| {
                superblock[0x1c..0x20].copy_from_slice(&(at as u32).to_be_bytes());
            });
            for block in &log {
                bytes[journal[at] * BLOCK..][..BLOCK].copy_from_slice(block);
                at = if at + 1 == length { first } else { at + 1 };
            }
            made.put(&bytes);
            let ext = made.open();
            assert_eq!(ext.warnings(), [] as [String; 0], "{how}, {before_end}");
            assert!(file(&ext) == replayed(), "{how}, {before_end}");
        }
        assert_same(&files(&made.open()), &mended(&made), how);
    }
}

#[test]
fn a_transaction_without_its_commit_does_not_count() {
    let (made, blocks) = volume(&[]);
    write_journal(&made, &blocks, "jo -c -v 3");
    let commits: Vec<_> = headers(&made).into_iter().filter(|(_, kind)| *kind == 2).collect();
    assert_eq!(commits.len(), 6);
    let mut bytes = made.bytes();
    bytes[commits[5].0 * BLOCK..][..BLOCK].fill(0);
    made.put(&bytes);
    let ext = made.open();
    assert_eq!(ext.warnings(), [] as [String; 0]);
    let mut expected = replayed();
    // Revoked, and what would have been put there again is missing.
    expected[3 * BLOCK..4 * BLOCK].copy_from_slice(&pattern(20 * BLOCK, 1)[3 * BLOCK..4 * BLOCK]);
    assert!(file(&ext) == expected);
    assert_same(&files(&ext), &mended(&made), "without the last");
}

#[test]
fn a_damaged_transaction_is_told_and_those_before_it_count() {
    let (made, blocks) = volume(&[]);
    write_journal(&made, &blocks, "jo -c -v 3");
    let headers = headers(&made);
    let good = made.bytes();
    // Its last commit; and its last descriptor, which names its block.
    let last = |kind: u32| headers.iter().rfind(|header| header.1 == kind).unwrap().0;
    for at in [last(2) * BLOCK + 20, last(1) * BLOCK + 20, last(1) * BLOCK + BLOCK - 1] {
        let mut bytes = good.clone();
        bytes[at] ^= 1;
        let ext = open(bytes).unwrap();
        let said = ext.warnings();
        assert!(said.len() == 1 && said[0].contains("is damaged"), "byte {at}: {said:?}, {headers:?}");
        let read = file(&ext);
        assert!(read[..3 * BLOCK] == replayed()[..3 * BLOCK]);
        assert!(
            read[3 * BLOCK..] == pattern(20 * BLOCK, 1)[3 * BLOCK..],
            "and what it has revoked stays revoked"
        );
    }
    // A block that is not what its descriptor says; one that was revoked is not looked at.
    let journal = journal_blocks(&made);
    let first = journal.iter().position(|block| *block == headers[0].0).unwrap();
    for (number, is_lost) in [(1, true), (2, false)] {
        let mut bytes = good.clone();
        bytes[journal[first + number] * BLOCK + 100] ^= 1;
        let ext = open(bytes).unwrap();
        if is_lost {
            assert!(ext.warnings()[0].contains("cannot be replayed"), "{:?}", ext.warnings());
            assert!(ext.warnings()[0].contains("checksum"), "{:?}", ext.warnings());
            assert!(file(&ext) == pattern(20 * BLOCK, 1), "as it lies there");
        } else {
            assert_eq!(ext.warnings(), [] as [String; 0]);
            assert!(file(&ext) == replayed());
        }
    }
}

#[test]
fn sums_of_whole_transactions_are_checked() {
    let (made, blocks) = volume(&["-O", "^metadata_csum"]);
    write_journal(&made, &blocks, "jo");
    let (journal, mut bytes) = (journal_blocks(&made), made.bytes());
    change_superblock(&mut bytes, journal[0], |superblock| superblock[0x27] |= 1);
    let start = be32(&bytes, journal[0] * BLOCK + 0x1c).unwrap() as usize;
    // Only descriptors and what they name count; here they name one or two blocks.
    let (mut sum, mut commits, mut left) = (u32::MAX, Vec::new(), 0);
    for at in journal[start..start + 30].iter().map(|block| block * BLOCK) {
        let is_header = left == 0 && bytes[at..at + 4] == MAGIC;
        let kind = if is_header { be32(&bytes, at + 4).unwrap() } else { 0 };
        if kind == 1 {
            left = if matches!(commits.len(), 0 | 3) { 3 } else { 2 };
        }
        if left > 0 {
            sum = crc32(sum, &bytes[at..at + BLOCK]);
            left -= 1;
        }
        if kind == 2 {
            bytes[at + 12..at + 14].copy_from_slice(&[1, 4]);
            bytes[at + 16..at + 20].copy_from_slice(&sum.to_be_bytes());
            (sum, left) = (u32::MAX, 0);
            commits.push(at);
        }
    }
    assert_eq!(commits.len(), 6);
    let ext = open(bytes.clone()).unwrap();
    assert_eq!(ext.warnings(), [] as [String; 0]);
    assert!(file(&ext) == replayed());
    // The block that the third names.
    bytes[commits[2] - BLOCK + 9] ^= 1;
    let ext = open(bytes).unwrap();
    assert!(ext.warnings()[0].contains("is damaged"), "{:?}", ext.warnings());
    let mut expected = pattern(20 * BLOCK, 1);
    expected[..BLOCK].copy_from_slice(&pattern(BLOCK, 7));
    assert!(file(&ext) == expected);
}

#[test]
fn a_journal_that_cannot_be_replayed_is_told_with_why() {
    let (made, blocks) = volume(&[]);
    write_journal(&made, &blocks, "jo -c -v 3");
    let (good, journal) = (made.bytes(), journal_blocks(&made));
    let said = |at: usize, bytes: &[u8]| {
        let mut changed = good.clone();
        change_superblock(&mut changed, journal[0], |superblock| {
            superblock[at..at + bytes.len()].copy_from_slice(bytes);
        });
        let ext = open(changed).unwrap();
        assert!(file(&ext) == pattern(20 * BLOCK, 1), "as it lies there");
        ext.warnings().join("; ")
    };
    assert!(said(0x28, &[0x80]).contains("it has the features 0x80000000"));
    assert!(said(0x10, &[0xff]).contains("do not go together"));
    assert!(said(0x14, &[0, 0, 0, 0]).contains("do not go together"));
    assert!(said(0x1c, &[0, 0xff, 0, 0]).contains("do not go together"));
    assert!(said(0, &[0]).contains("it has no superblock"));
    // Nothing to replay is no reason to warn.
    assert_eq!(said(0x1c, &[0, 0, 0, 0]), "");

    let other = made.copy();
    other.debugfs(&["ssv journal_inum 0"]);
    assert!(
        other.open().warnings()[0].contains("it is on a device of its own"),
        "{:?}",
        other.open().warnings()
    );
    let other = made.copy();
    other.debugfs(&["feature ^needs_recovery"]);
    let ext = other.open();
    assert!(ext.warnings()[0].contains("that a mount would leave there"), "{:?}", ext.warnings());
    assert!(file(&ext) == pattern(20 * BLOCK, 1));
}

#[test]
fn a_journal_that_is_a_circle_ends() {
    let (made, blocks) = volume(&["-O", "^metadata_csum"]);
    write_journal(&made, &blocks, "jo");
    let (journal, mut bytes) = (journal_blocks(&made), made.bytes());
    let sequence = bytes[journal[0] * BLOCK + 0x18..][..4].to_vec();
    // Revocations of one transaction all round.
    for block in &journal[1..] {
        let block = &mut bytes[block * BLOCK..][..BLOCK];
        block.fill(0);
        block[..4].copy_from_slice(&MAGIC);
        block[7] = 5;
        block[8..12].copy_from_slice(&sequence);
        block[15] = 16;
    }
    let ext = open(bytes).unwrap();
    assert!(ext.warnings()[0].contains("longer than it has room"), "{:?}", ext.warnings());
}

#[test]
fn fast_commits_that_are_not_replayed_are_told() {
    let made = Made::new(24 << 10, &["-t", "ext4", "-b", "1024", "-J", "size=4", "-O", "fast_commit"], None);
    let source = made.beside("source", &pattern(20 * BLOCK, 1));
    made.debugfs(&[&format!("write {source} file")]);
    let blocks = made.blocks("file");
    write_journal(&made, &blocks[blocks.len() - 20..], "jo -c -v 3");
    let (journal, mut bytes) = (journal_blocks(&made), made.bytes());
    let features = journal[0] * BLOCK + 0x28;
    // As the kernel does when it mounts such a volume.
    change_superblock(&mut bytes, journal[0], |superblock| superblock[0x2b] |= 0x20);
    assert_eq!(bytes[features + 3] & 0x20, 0x20);
    let ext = open(bytes.clone()).unwrap();
    assert_eq!(ext.warnings(), [] as [String; 0]);
    assert!(file(&ext) == replayed());
    let superblock = &bytes[journal[0] * BLOCK..];
    let (length, sequence) = (be32(superblock, 0x10).unwrap(), be32(superblock, 0x18).unwrap());
    let count = match be32(superblock, 0x54).unwrap() {
        0 => 256,
        count => count,
    };
    let at = journal[(length - count) as usize + 1] * BLOCK;
    for (behind, is_told) in [(6, true), (5, false)] {
        bytes[at..at + 8].copy_from_slice(&[9, 0, 8, 0, 0, 0, 0, 0]);
        bytes[at + 8..at + 12].copy_from_slice(&(sequence + behind).to_le_bytes());
        let ext = open(bytes.clone()).unwrap();
        assert!(file(&ext) == replayed());
        assert_eq!(ext.warnings().iter().any(|said| said.contains("fast commits")), is_told, "{behind}");
    }
}
