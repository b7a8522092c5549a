//! A chunk that is stored already is not stored again, unless what is stored is not whole any more.

use std::{path::PathBuf, sync::Arc};

use backtide_images::{ImageError, ImageSource, Images, ImagesLimits, Root, Written};
use backtide_storage::{MemoryStorage, Storage};
use backtide_units::{ByteCount, ByteOffset, ByteRange};
use bytes::Bytes;

const CHUNK: u64 = 64 << 10;

/// A disk of chunks that are filled with these bytes.
const DISK: [u8; 4] = [1, 2, 0, 1];

struct Filled;

impl ImageSource for Filled {
    type Error = ImageError;

    fn changed(&self, _: ByteRange) -> bool {
        true
    }

    fn is_zero(&mut self, _: ByteRange) -> Result<bool, ImageError> {
        Ok(false)
    }

    fn read(&mut self, range: ByteRange) -> Result<Bytes, ImageError> {
        Ok(vec![DISK[(range.start().0 / CHUNK) as usize]; CHUNK as usize].into())
    }
}

fn images(storage: &MemoryStorage) -> Images {
    Images::new(Arc::new(storage.clone()), ImagesLimits::default())
}

fn make(storage: &MemoryStorage) -> (Root, Written) {
    let mut writer = images(storage).write().unwrap();
    let root = writer.image(None, ByteCount(DISK.len() as u64 * CHUNK), &mut Filled).unwrap();
    (root, writer.finish().unwrap())
}

fn assert_whole(storage: &MemoryStorage, root: Root, said: &str) {
    let mut found = vec![0; DISK.len() * CHUNK as usize];
    let range = ByteRange::between(ByteOffset(0), ByteOffset(found.len() as u64));
    images(storage)
        .image(root)
        .read_into(range, &mut found)
        .unwrap_or_else(|error| panic!("{said}: {error}"));
    let chunks = found.chunks(CHUNK as usize).zip(DISK);
    assert!(chunks.into_iter().all(|(chunk, byte)| chunk.iter().all(|found| *found == byte)), "{said}");
}

fn packs(storage: &MemoryStorage) -> Vec<PathBuf> {
    storage.files().into_iter().map(|(path, _)| path).collect()
}

#[test]
fn an_image_names_no_chunk_that_is_not_whole() {
    let storage = MemoryStorage::new();
    make(&storage);
    let (_, again) = make(&storage.copy());
    assert_eq!((again.chunks, again.bytes), (0, ByteCount(0)), "all of it is there: {again:?}");
    let pack = &packs(&storage)[0];
    let length = storage.open(pack).unwrap().len().unwrap().0;
    let mut stored = 0;
    for at in 0..length {
        let said = format!("a bit flipped at {at} of {length}");
        let damaged = storage.copy();
        damaged.flip_bit(pack, ByteOffset(at), 4);
        let (root, written) = make(&damaged);
        assert_whole(&damaged, root, &said);
        stored += written.chunks;
    }
    assert!(stored > 0);
    storage.remove(pack).unwrap();
    let (root, _) = make(&storage);
    assert_whole(&storage, root, "without the pack");
}
