//! The bytes of version 1, as a file: this program reads it.
//!
//! `testdata/v1/images/` is made by this test when `BACKTIDE_WRITE_GOLDEN` is set; the file is never made again for a version
//! that was released. What is compressed may be written in other bytes by another zstd, so only reading is compared.

use std::{fs, path::Path, sync::Arc};

use backtide_images::{ImageError, ImageSource, Images, ImagesLimits, ROOT_LENGTH, Root, inspect};
use backtide_storage::{MemoryStorage, Storage};
use backtide_units::{ByteCount, ByteOffset, ByteRange};
use bytes::Bytes;

const SIZE: u64 = 5 << 16;
const PACK: &str = "images/packs/0000000000000001.pack";

/// A disk with a chunk that compresses, one that does not, and zeroes.
fn content(version: u8) -> Vec<u8> {
    let mut content = vec![0; SIZE as usize];
    content[..65536].fill(version);
    let mut state = 7_u64;
    for byte in &mut content[2 << 16..3 << 16] {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
        *byte = (state >> 56) as u8;
    }
    content
}

struct Whole(Vec<u8>);

impl ImageSource for Whole {
    type Error = ImageError;

    fn changed(&self, _: ByteRange) -> bool {
        true
    }

    fn is_zero(&mut self, _: ByteRange) -> Result<bool, ImageError> {
        Ok(false)
    }

    fn read(&mut self, range: ByteRange) -> Result<Bytes, ImageError> {
        Ok(Bytes::copy_from_slice(&self.0[range.start().0 as usize..range.end().0 as usize]))
    }
}

#[test]
fn a_pack_of_version_1_is_read() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/v1/images");
    let (pack, roots) = (dir.join("0000000000000001.pack"), dir.join("roots"));
    if std::env::var_os("BACKTIDE_WRITE_GOLDEN").is_some() {
        let storage = MemoryStorage::new();
        let mut writer = Images::new(Arc::new(storage.clone()), ImagesLimits::default()).write().unwrap();
        let mut named = Vec::new();
        for version in [1, 2] {
            let root = writer.image(None, ByteCount(SIZE), &mut Whole(content(version))).unwrap();
            named.extend_from_slice(&root.encode());
        }
        writer.finish().unwrap();
        fs::create_dir_all(&dir).unwrap();
        fs::write(&roots, named).unwrap();
        fs::write(&pack, &storage.files()[0].1).unwrap();
    }
    let storage = MemoryStorage::new();
    storage.create_dir(Path::new("images/packs")).unwrap();
    let file = storage.create_new(Path::new(PACK)).unwrap();
    file.write_at(ByteOffset::ZERO, &fs::read(&pack).unwrap()).unwrap();
    let images = Images::new(Arc::new(storage.clone()), ImagesLimits::default());
    for (version, root) in (1..).zip(fs::read(&roots).unwrap().chunks(ROOT_LENGTH)) {
        let image = images.image(Root::decode(root).unwrap());
        assert_eq!(image.root().encode(), root);
        let mut found = vec![0; SIZE as usize];
        image.read_into(ByteRange::between(ByteOffset::ZERO, ByteOffset(SIZE)), &mut found).unwrap();
        assert!(found == content(version));
    }
    let mut listing = Vec::new();
    inspect(&storage, Path::new(PACK), &mut listing).unwrap();
    let listing = String::from_utf8(listing).unwrap();
    assert!(listing.contains("pack 1, 7 chunks") && listing.contains("node of level 1"), "{listing}");
}
