mod damage;
mod features;
mod journals;
mod made;

use super::*;
use crate::{fields::le32, golden};

fn open(volume: Vec<u8>) -> Result<Ext, Error> {
    Ext::open(Rc::new(crate::Bytes(volume)))
}

#[test]
fn everything_is_there_as_the_kernel_sees_it_with_what_was_in_the_journal_only() {
    for name in ["ext4", "ext3"] {
        let ext = open(golden::volume(name)).unwrap();
        assert_eq!(ext.warnings(), [] as [String; 0], "{name}");
        assert!(ext.volume.source.copies(0, u64::MAX).count() > 50, "{name}");
        golden::compare(&ext, name);
    }
}

#[test]
fn without_its_journal_the_volume_is_read_as_it_was_and_says_so() {
    let mut volume = golden::volume("ext3");
    let ext = open(volume.clone()).unwrap();
    let Journal::Inode(number) = ext.volume.superblock.journal else { panic!("it has one") };
    let inode = inode::read(&ext.volume, number.into()).unwrap();
    let stored = map::stored(&ext.volume, &inode).unwrap();
    let crate::Place::Volume(start) = stored.pieces()[0].place else { panic!("it is in blocks") };
    volume[start.0 as usize..start.0 as usize + 1024].fill(0x5a);
    let ext = open(volume).unwrap();
    assert!(ext.warnings()[0].contains("journal of this ext cannot be replayed"), "{:?}", ext.warnings());
    let find = |path: &str| crate::path::find(&ext, path, true);
    assert!(find("/big").is_ok() && find("/few/file 1").is_ok(), "what was there before");
    assert!(matches!(find("/new/deep"), Err(Error::NotFound { .. })));
}
