use super::*;
use crate::{Bytes, golden, path};

fn open(volume: Vec<u8>) -> Result<Fat, Error> {
    Fat::open(Rc::new(Bytes(volume)))
}

#[test]
fn everything_is_there_on_volumes_of_each_width() {
    for (name, width) in [("fat12", Width::Bits12), ("fat16", Width::Bits16), ("fat32", Width::Bits32)] {
        let fat = open(golden::volume(name)).unwrap();
        assert_eq!(fat.width, width);
        golden::compare(&fat, name);
    }
}

#[test]
fn capitals_do_not_count_in_a_path() {
    let fat = open(golden::volume("fat16")).unwrap();
    let find = |name: &str| path::find(&fat, name, true).map(|found| found.name);
    assert_eq!(find("/ETC/Hosts").unwrap(), b"hosts");
    assert!(find("/etc/none").is_err());
}

#[test]
fn a_chain_that_is_a_circle_or_leads_nowhere_or_ends_too_early_is_an_error() {
    let volume = golden::volume("fat32");
    let fat = open(volume.clone()).unwrap();
    let big = path::find(&fat, "/big", true).unwrap().id;
    let first = fat.entry(big).unwrap().cluster;
    let why = |next: u32| {
        let mut bad = volume.clone();
        let at = fat.table as usize + first as usize * 4;
        bad[at..at + 4].copy_from_slice(&next.to_le_bytes());
        open(bad).unwrap().contents(big).unwrap_err().to_string()
    };
    assert!(why(0x0fff_ffff).contains("it has 3000000 bytes, and clusters for"), "{}", why(0x0fff_ffff));
    assert!(why(0).contains("leads to cluster 0"), "{}", why(0));
    assert!(why(0x0fff_0000).contains("which is not there"));
    assert!(why(first).contains("has one of them twice"), "{}", why(first));
    // The chain of a file has an end: its size. That of a directory has none.
    let directory = path::find(&fat, "/some", true).unwrap().id;
    let first = fat.entry(directory).unwrap().cluster;
    let mut bad = volume;
    let at = fat.table as usize + first as usize * 4;
    bad[at..at + 4].copy_from_slice(&first.to_le_bytes());
    let why = open(bad).unwrap().names(directory).unwrap_err().to_string();
    assert!(why.contains("has one of them twice"), "{why}");
}

#[test]
fn a_directory_longer_than_any_can_be_is_not_cut_in_silence() {
    let mut volume = golden::volume("fat32");
    let fat = open(volume.clone()).unwrap();
    let directory = path::find(&fat, "/some", true).unwrap().id;
    let first = fat.entry(directory).unwrap().cluster;
    // A file that was deleted, again and again, in a chain of all clusters from the directory's own on.
    let count = (DIRECTORY_MAX / fat.cluster) as u32;
    assert!(first + count + 1 < fat.clusters, "there are enough of them");
    let fill = |volume: &mut [u8], clusters: u32| {
        for number in first..first + clusters {
            let next = if number + 1 == first + clusters { 0x0fff_ffff } else { number + 1 };
            let at = fat.table as usize + number as usize * 4;
            volume[at..at + 4].copy_from_slice(&u32::to_le_bytes(next));
            let at = (fat.data + u64::from(number - 2) * fat.cluster) as usize;
            for entry in volume[at..at + fat.cluster as usize].chunks_exact_mut(ENTRY) {
                entry[0] = 0xe5;
            }
        }
    };
    fill(&mut volume, count);
    assert_eq!(open(volume.clone()).unwrap().names(directory).unwrap(), []);
    fill(&mut volume, count + 1);
    let why = open(volume).unwrap().names(directory).unwrap_err().to_string();
    assert!(why.contains("more bytes than the 2097152 that are read here"), "{why}");
}

#[test]
fn the_fields_in_use_tell_the_width_and_a_root_without_room_is_refused() {
    // FAT32 with as few clusters as FAT16 has: Linux makes and reads it.
    let mut small = golden::volume("fat32");
    small[32..36].copy_from_slice(&20_000_u32.to_le_bytes());
    assert_eq!(open(small).unwrap().width, Width::Bits32);
    let mut none = golden::volume("fat16");
    none[17..19].fill(0);
    let why = open(none).err().unwrap().to_string();
    assert!(why.contains("its root directory has no room"), "{why}");
}

#[test]
fn damage_neither_panics_nor_goes_on_for_ever() {
    for name in ["fat12", "fat32"] {
        golden::damage(&golden::volume(name), |bytes| {
            if let Ok(fat) = open(bytes) {
                golden::walk(&fat);
            }
        });
    }
}

#[test]
fn times_are_those_of_the_calendar() {
    let date = |year: u16, month: u16, day: u16| (year - 1980) << 9 | month << 5 | day;
    assert_eq!(names::seconds(date(1980, 1, 1), 0), 315_532_800);
    assert_eq!(names::seconds(date(2000, 2, 29), 23 << 11 | 59 << 5 | 29), 951_868_798);
    assert_eq!(names::seconds(date(2100, 3, 1), 0), 4_107_542_400);
    assert_eq!(names::seconds(0, 0), 0);
}
