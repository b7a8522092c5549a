use std::rc::Rc;

use backtide_units::{ByteCount, ByteOffset, ByteRange};

use super::*;
use crate::{Bytes, Window};

const MIB: u64 = 1 << 20;

/// How long the physical volumes of the golden files are.
const PV: u64 = 64 * MIB;

fn golden(name: &str) -> Vec<u8> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../testdata/volumes/");
    std::fs::read(format!("{path}{name}")).unwrap()
}

/// A disk of 130 MiB with these physical volumes at 1 MiB and at 65 MiB; each 64 KiB of it is filled with its number.
fn disk(first: &[u8], second: &[u8]) -> Vec<u8> {
    let mut disk: Vec<u8> = (0..130 * MIB).map(|at| (at >> 16) as u8).collect();
    for (start, head) in [(MIB as usize, first), ((MIB + PV) as usize, second)] {
        disk[start..start + head.len()].copy_from_slice(head);
    }
    disk
}

fn range(start: u64) -> ByteRange {
    ByteRange::new(ByteOffset(start), ByteCount(PV)).unwrap()
}

fn physicals(disk: &Rc<Bytes>, starts: &[u64]) -> Vec<(ByteRange, Physical)> {
    let one = |start: &u64| {
        let window = Window::new(Rc::clone(disk) as Rc<dyn Source>, range(*start));
        (range(*start), physical(&window).unwrap())
    };
    starts.iter().map(one).collect()
}

fn names(found: &[Logical]) -> Vec<(&str, u64)> {
    found.iter().map(|logical| (logical.name.as_str(), logical.length.0)).collect()
}

#[test]
fn linear_and_striped_volumes_are_where_lvm_put_them() {
    let disk = Rc::new(Bytes(disk(&golden("lvm-pv1"), &golden("lvm-pv2"))));
    let found = logical_volumes(&physicals(&disk, &[MIB, MIB + PV])).unwrap();
    assert_eq!(names(&found), [("root", 16 * MIB), ("fast", 16 * MIB), ("home", 8 * MIB)]);
    assert_eq!(found[0].group, "vg1");
    // What `lvs -o+devices` says: extents of 4 MiB from 1 MiB of each physical volume on.
    let read = |logical: &Logical, at: u64| {
        let bytes = LogicalBytes::new(Rc::clone(&disk) as Rc<dyn Source>, logical.segments.clone().unwrap());
        assert_eq!(bytes.size(), logical.length);
        let mut byte = [0; 2];
        bytes.read_at(ByteOffset(at), &mut byte).unwrap();
        assert!(bytes.read_at(ByteOffset(logical.length.0 - 1), &mut [0; 2]).is_err());
        (u64::from(byte[0]), u64::from(byte[1]))
    };
    let number = |at: u64| (at >> 16) & 0xff;
    let (extent, first) = (4 * MIB, 2 * MIB);
    assert_eq!(read(&found[0], 0).0, number(first));
    assert_eq!(read(&found[0], 2 * extent).0, number(first + 6 * extent), "its second segment");
    let across = (number(first + 2 * extent - 1), number(first + 6 * extent));
    assert_eq!(read(&found[0], 2 * extent - 1), across, "a read across both");
    assert_eq!(read(&found[2], MIB).0, number(first + 4 * extent + MIB));
    let stripe = 64 << 10;
    assert_eq!(read(&found[1], 0).0, number(first + 2 * extent));
    assert_eq!(read(&found[1], stripe).0, number(first + PV), "the second stripe");
    assert_eq!(read(&found[1], 2 * stripe).0, number(first + 2 * extent + stripe));
    assert_eq!(read(&found[1], 16 * MIB - 2).0, number(first + PV + 2 * extent - 2));
}

#[test]
fn a_volume_with_a_part_on_another_disk_says_so_and_the_others_can_be_read() {
    let disk = Rc::new(Bytes(disk(&golden("lvm-pv1"), &[])));
    let found = logical_volumes(&physicals(&disk, &[MIB])).unwrap();
    assert!(found[0].segments.is_ok() && found[2].segments.is_ok(), "{found:?}");
    let why = found[1].segments.clone().unwrap_err();
    assert!(why.contains("physical volume pv1, on another disk"), "{why}");
}

#[test]
fn damage_is_found_by_the_checksums_and_named() {
    let whole = golden("lvm-pv1");
    for (at, said) in [
        (0x220, "the label of the physical volume (LVM) is damaged: its checksum"),
        (0x1030, "the metadata area of the physical volume (LVM) is damaged: its checksum"),
        (0x2a80, "the metadata area of the physical volume (LVM) is damaged: the checksum of its text"),
    ] {
        let mut bytes = whole.clone();
        bytes[at] ^= 1;
        bytes.resize(PV as usize, 0);
        let why = physical(&Bytes(bytes)).unwrap_err().to_string();
        assert!(why.contains(said), "{at:#x}: {why}");
    }
    assert!(physical(&Bytes(vec![0; 4096])).unwrap_err().to_string().contains("there is none"));
}

/// Of what is not merged yet it would show what was there before.
#[test]
fn a_volume_that_a_snapshot_is_merged_into_is_not_read() {
    let plain = "status = [\"VISIBLE\"] segment1 { start_extent = 0 extent_count = 2 type = \"striped\" \
                 stripe_count = 1 stripes = [\"pv0\", 0] }";
    for (store, is_read) in [("cow_store", true), ("merging_store", false)] {
        let snapshot = format!(
            "status = [] segment1 {{ start_extent = 0 extent_count = 2 type = \"snapshot\" chunk_size = 8 \
             origin = \"root\" {store} = \"snap\" }}"
        );
        let metadata = format!(
            "vg {{ id = \"g\" seqno = 1 extent_size = 8\n\
             physical_volumes {{ pv0 {{ id = \"a-b\" pe_start = 8 }} }}\n\
             logical_volumes {{ root {{ {plain} }} home {{ {plain} }} snapshot0 {{ {snapshot} }} }} }}"
        );
        let physical = Physical { id: "ab".to_owned(), metadata: Some(metadata) };
        let found = logical_volumes(&[(range(MIB), physical)]).unwrap();
        assert_eq!(names(&found), [("root", 8192), ("home", 8192)]);
        let why = found[0].segments.clone().err();
        assert_eq!(why.is_none(), is_read, "{why:?}");
        assert!(is_read || why.unwrap().contains("a snapshot is being merged into it"));
        assert!(found[1].segments.is_ok());
    }
}

#[test]
fn descriptions_that_make_no_sense_are_refused_in_a_sentence() {
    let text = |volume: &str| {
        format!(
            "vg {{ id = \"g\" seqno = 1 extent_size = 8 # a comment\n\
             physical_volumes {{ pv0 {{ id = \"a-b\" pe_start = 8 }} }}\n\
             logical_volumes {{ lv {{ status = [\"VISIBLE\"] segment1 {{ {volume} }} }} }} }}"
        )
    };
    let why = |volume: &str| {
        let physical = Physical { id: "ab".to_owned(), metadata: Some(text(volume)) };
        let found = logical_volumes(&[(range(MIB), physical)]).unwrap();
        found[0].segments.clone().err()
    };
    let linear = "start_extent = 0 extent_count = 2 type = \"striped\" stripe_count = 1";
    assert_eq!(why(&format!("{linear} stripes = [\"pv0\", 0]")), None);
    let huge = "start_extent = 0 extent_count = 18446744073709551615 type = \"striped\" stripe_count = 1";
    for (volume, said) in [
        ("start_extent = 0 extent_count = 1 type = \"thin\"".to_owned(), "of the kind \"thin\""),
        (format!("{linear} stripes = [\"pv0\", 99999999]"), "beyond the physical volume"),
        (format!("{linear} stripes = [\"pv0\", 18446744073709551615]"), "larger than any disk"),
        (format!("{linear} stripes = [\"pv0\"]"), "1 stripes in a list of 1"),
        (format!("{huge} stripes = [\"pv0\", 0]"), "larger than any disk"),
        (linear.replace("t = 0", "t = 1") + " stripes = [\"pv0\", 0]", "no segment begins at byte 0"),
        (linear.replace("= 1", "= 2") + " stripe_size = 0 stripes = [\"pv0\", 0, \"pv0\", 2]", "no stripes"),
    ] {
        let found = why(&volume).unwrap_or_else(|| panic!("{volume} is taken"));
        assert!(found.contains(said), "{volume}: {found}");
    }
    for (text, said) in [
        ("vg { id = \"g\" ", "should begin '}'"),
        ("vg { id = \"g }", "a text that ends"),
        ("vg = [1 2]", "',' or ']'"),
        ("vg = x", "a number or a text"),
        ("vg x", "'{' or '='"),
        ("vg = 1", "names no group"),
        ("vg { seqno = 1 }", "no text \"id\""),
        ("vg { id = \"g\" seqno = 1 extent_size = 0 }", "no size"),
    ] {
        let why = group::parse(text).err().map(|error| error.to_string()).unwrap_or_default();
        assert!(why.contains(said), "{text}: {why}");
    }
    assert!(group::parse(&"a { ".repeat(1 << 16)).is_err(), "and no deeper than the stack");
}
