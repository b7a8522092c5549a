use crate::golden;

use super::*;

fn open(volume: Vec<u8>) -> Result<Xfs, Error> {
    Xfs::open(Rc::new(crate::Bytes(volume)))
}

#[test]
fn everything_is_there_as_the_kernel_sees_it_with_what_was_in_the_log_only() {
    for name in ["xfs", "xfs-blocks"] {
        let xfs = open(golden::volume(name)).unwrap();
        assert_eq!(xfs.warnings(), [] as [String; 0]);
        golden::compare(&xfs, name);
    }
}

#[test]
fn without_its_log_the_volume_is_read_as_it_was_and_says_so() {
    let mut volume = golden::volume("xfs");
    let superblock = superblock::read(&crate::Bytes(volume.clone()), false).unwrap();
    let start = superblock.log.unwrap().0 as usize;
    volume[start..start + superblock.log_length.0 as usize].fill(0x5a);
    let xfs = open(volume).unwrap();
    assert!(xfs.warnings()[0].contains("log of this XFS cannot be replayed"), "{:?}", xfs.warnings());
    let find = |path: &str| crate::path::find(&xfs, path, true);
    assert!(find("/big").is_ok() && find("/few/file 1").is_ok(), "what was there before");
    assert!(matches!(find("/new/deep"), Err(Error::NotFound { .. })));
}

#[test]
fn paths_lead_through_links_and_up_again() {
    let xfs = open(golden::volume("xfs")).unwrap();
    let find = |path: &str, follow| crate::path::find(&xfs, path, follow).map(|found| found.id);
    let hosts = find("/etc/hosts", true).unwrap();
    for path in ["etc/hosts", "/link", "//etc/./deep/../hosts/", "/../etc/hosts"] {
        assert_eq!(find(path, true).unwrap(), hosts, "{path}");
    }
    assert_ne!(find("/link", false).unwrap(), hosts);
    let error = |path: &str| find(path, true).unwrap_err().to_string();
    assert_eq!(error("/etc/hosts/x"), "/etc/hosts is no directory");
    assert_eq!(error("/etc/none/x"), "there is no /etc/none");
    assert_eq!(error("/none"), "there is no /none");
    assert!(find("/etc/outside", true).is_err(), "its target is a path of the volume");
}

#[test]
fn damage_is_an_error_that_names_the_structure() {
    let volume = golden::volume("xfs");
    let xfs = open(volume.clone()).unwrap();
    let directory = crate::path::find(&xfs, "/many", true).unwrap().id;
    let at = xfs.superblock.inode_at(directory.0).unwrap().0 as usize;
    let mut bad = volume.clone();
    bad[at + 60] ^= 1;
    let why = open(bad).unwrap().node(directory).unwrap_err().to_string();
    assert_eq!(why, format!("inode {} is damaged: its checksum is another", directory.0));

    let stored = xfs.inode(directory).unwrap().stored(&xfs.source, &xfs.superblock).unwrap();
    let crate::Place::Volume(block) = stored.pieces()[0].place else { panic!("it is in blocks") };
    let mut bad = volume.clone();
    bad[block.0 as usize + 1000] ^= 1;
    let why = open(bad).unwrap().names(directory).unwrap_err().to_string();
    assert!(
        why.contains(&format!("the directory of inode {} is damaged: its block at", directory.0)),
        "{why}"
    );

    let mut bad = volume;
    bad[88] ^= 1;
    let why = open(bad).err().unwrap().to_string();
    assert_eq!(why, "the superblock of this XFS is damaged: its checksum is another");
}

/// Checksums keep most damage from the parsers: here they are not looked at.
#[test]
fn damage_that_no_checksum_tells_neither_panics_nor_goes_on_for_ever() {
    let volume = golden::volume("xfs-blocks");
    golden::damage(&volume, |bytes| {
        let Ok(xfs) = open(bytes) else { return };
        golden::walk(&xfs);
    });
}
