use super::*;
use crate::{Bytes, golden, path};

fn open(volume: Vec<u8>) -> Result<Ntfs, Error> {
    Ntfs::open(Rc::new(Bytes(volume)))
}

#[test]
fn everything_is_there_as_ntfs_3g_sees_it() {
    let ntfs = open(golden::volume("ntfs")).unwrap();
    assert_eq!(ntfs.warnings(), [] as [String; 0]);
    golden::compare(&ntfs, "ntfs");
    let find = |path: &str| path::find(&ntfs, path, true).map(|found| found.id);
    assert_eq!(find("/ETC/HOSTS").unwrap(), find("/link").unwrap(), "capitals, and a link of Windows");
    let packed = ntfs.contents(find("/packed/big").unwrap()).unwrap();
    assert!(packed.compressed.is_some());
    assert!(ntfs.contents(find("/scattered").unwrap()).unwrap().pieces().len() > 1000);
}

#[test]
fn files_whose_bytes_are_elsewhere_say_so_and_are_not_taken_for_zeroes() {
    let ntfs = open(golden::volume("ntfs")).unwrap();
    let found = path::find(&ntfs, "/compact", true).unwrap();
    let why = ntfs.contents(found.id).unwrap_err().to_string();
    assert!(why.ends_with("is compressed as a system file (CompactOS), which is not read here"), "{why}");
}

#[test]
fn damage_is_an_error_that_names_the_structure() {
    let volume = golden::volume("ntfs");
    let ntfs = open(volume.clone()).unwrap();
    let big = path::find(&ntfs, "/big", true).unwrap().id;
    let crate::Place::Volume(table) = ntfs.table.pieces()[0].place else { panic!("it is on the volume") };
    let number = big.0 & attribute::NUMBER;
    let record = table.0 as usize + number as usize * ntfs.record;
    let why = |at: usize, byte: u8| {
        let mut bad = volume.clone();
        bad[at] = byte;
        open(bad).unwrap().contents(big).unwrap_err().to_string()
    };
    let said = |why: &str| format!("file record {number} is damaged: {why}");
    assert_eq!(why(record, 0), said("its mark is not there"));
    assert_eq!(why(record + 510, 0x77), said("it was not written to its end"));
    assert_eq!(why(record + 22, 0), said("it is free"));
    assert_eq!(why(record + 32, 77), said("it belongs to another file"));
    let uses = volume[record + 16];
    assert_eq!(why(record + 16, uses ^ 1), said("it was reused: whoever names it means a file that is gone"));
    let mut at = record + usize::from(volume[record + 20]);
    while volume[at] != DATA as u8 {
        at += usize::from(u16::from_le_bytes([volume[at + 4], volume[at + 5]]));
    }
    assert_eq!(
        why(at + 24, volume[at + 24] ^ 4),
        said("the runs of its attribute 0x80 end before its last cluster")
    );
    // More bytes than clusters.
    let mut bad = volume.clone();
    bad[at + 48 + 3] = 0x7f;
    let why = open(bad).unwrap().contents(big).unwrap_err().to_string();
    assert!(why.contains("bytes, and clusters for"), "{why}");
    let mut bad = volume.clone();
    bad[at + 16] = 1;
    let why = open(bad).unwrap().contents(big).unwrap_err().to_string();
    assert_eq!(why, said("the part of its attribute 0x80 at cluster 0 is missing"));
}

#[test]
fn a_volume_in_use_or_in_need_of_a_check_says_so() {
    let volume = golden::volume("ntfs");
    let ntfs = open(volume.clone()).unwrap();
    let place = |record: u64, kind: u32| {
        let contents = ntfs.attributes(FileId(record)).unwrap().contents(&ntfs, kind, &[]).unwrap().unwrap();
        let crate::Place::Volume(place) = contents.pieces()[0].place else { panic!("it is on the volume") };
        place.0 as usize
    };
    let log = place(LOG_FILE, DATA);
    let mut used = volume.clone();
    used[log..log + 4].copy_from_slice(b"RSTR");
    let warnings = open(used).unwrap().warnings().to_vec();
    assert!(warnings[0].contains("was in use at that point"), "{warnings:?}");
}

#[test]
fn damage_neither_panics_nor_goes_on_for_ever() {
    golden::damage(&golden::volume("ntfs"), |bytes| {
        if let Ok(ntfs) = open(bytes) {
            golden::walk(&ntfs);
        }
    });
}
