use std::rc::Rc;

use super::*;
use crate::{Bytes, golden, xfs::superblock};

/// What the log has of the root directory's inode, in the form with so many bytes.
fn root_item(superblock: &Superblock, length: usize) -> Item {
    let mut format = vec![0; length];
    format[..2].copy_from_slice(&INODE.to_le_bytes());
    format[2..4].copy_from_slice(&2_u16.to_le_bytes());
    let shift = 56 - length;
    format[16 - shift..24 - shift].copy_from_slice(&superblock.root.to_le_bytes());
    let sector = superblock.inode_at(superblock.root).unwrap().0 / 512;
    format[40 - shift..48 - shift].copy_from_slice(&sector.to_le_bytes());
    format[48 - shift..52 - shift].copy_from_slice(&32_u32.to_le_bytes());
    let mut core = vec![0; 176];
    core[..2].copy_from_slice(&0x494e_u16.to_le_bytes());
    core[4] = 3;
    vec![format, core]
}

#[test]
fn inodes_of_a_freed_cluster_are_not_put_over_what_is_there_now() {
    let mut volume = golden::volume("xfs");
    let superblock = superblock::read(&Bytes(volume.clone()), false).unwrap();
    let at = superblock.inode_at(superblock.root).unwrap();
    // The bytes of a file, by now.
    volume[at.0 as usize..][..512].fill(b'x');
    for length in [52, 56] {
        let item = root_item(&superblock, length);
        let place = Place { sector: at.0 / 512, sectors: 32 };
        for (cancelled, is_replayed) in [(vec![(place, 1)], false), (Vec::new(), true)] {
            let mut source = Patched::new(Rc::new(Bytes(volume.clone())));
            let transactions = vec![(u64::MAX, vec![item.clone()])];
            apply(&superblock, &mut source, transactions, cancelled.into_iter().collect()).unwrap();
            assert_eq!(source.is_patched(at, 512), is_replayed, "{length}");
            // Whatever the log has, the bytes of files are those of the volume.
            let mut bytes = [0; 512];
            source.unpatched().read_at(at, &mut bytes).unwrap();
            assert_eq!(bytes, [b'x'; 512]);
        }
    }
}

#[test]
fn what_the_log_has_begun_and_not_ended_is_counted() {
    let item = |kind: u16, id: u64| {
        vec![
            [&kind.to_le_bytes()[..], &1_u16.to_le_bytes(), &1_u32.to_le_bytes(), &id.to_le_bytes()].concat(),
        ]
    };
    let (mapping, exchange, allocation) = (0x1244, 0x1248, 0x1236);
    let mut unfinished = Unfinished::default();
    unfinished.note(&[item(mapping, 1), item(mapping, 2), item(exchange, 2), item(allocation, 9)]).unwrap();
    unfinished.note(&[item(mapping + 1, 2), item(allocation + 1, 9)]).unwrap();
    assert_eq!(unfinished.0, HashSet::from([(mapping, 1), (exchange, 2)]));
    unfinished.note(&[item(mapping + 1, 1), item(exchange + 1, 2)]).unwrap();
    assert!(unfinished.0.is_empty());
    // It ends where its number would be.
    assert!(unfinished.note(&[vec![mapping.to_le_bytes().to_vec()]]).is_err());
}

#[test]
fn an_inode_of_the_same_lsn_is_replayed_and_one_of_a_later_is_not() {
    let volume = golden::volume("xfs");
    let superblock = superblock::read(&Bytes(volume.clone()), false).unwrap();
    let at = superblock.inode_at(superblock.root).unwrap();
    let written = be64(&volume, at.0 as usize + 112).unwrap();
    for (lsn, is_replayed) in [(written - 1, false), (written, true), (written + 1, true)] {
        let mut source = Patched::new(Rc::new(Bytes(volume.clone())));
        let transactions = vec![(lsn, vec![root_item(&superblock, 56)])];
        apply(&superblock, &mut source, transactions, HashMap::new()).unwrap();
        assert_eq!(source.is_patched(at, 512), is_replayed, "{lsn} of {written}");
    }
}

#[test]
fn a_superblock_out_of_the_log_has_the_checksum_of_before() {
    let mut source = Patched::new(Rc::new(Bytes(golden::volume("xfs"))));
    source.patch(ByteOffset(144), &[0x11]).unwrap();
    assert!(superblock::read(&source, false).is_err());
    assert!(superblock::read(&source, true).is_ok());
}
