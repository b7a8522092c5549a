//! A chunk that is stored already is not stored again, unless what is stored is not whole any more.

use std::{path::PathBuf, sync::Arc};

use backtide_images::{ImageError, ImageSource, Images, ImagesLimits, Root, Written};
use backtide_storage::{MemoryStorage, Storage};
use backtide_units::{ByteCount, ByteOffset, ByteRange};
use bytes::Bytes;

use reads::Reads;

mod reads;

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

/// Chunk `number` of a disk of many different ones.
fn noise(number: u64) -> Vec<u8> {
    let mut state = number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut word = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    word();
    (0..CHUNK / 8).flat_map(|_| word()).collect()
}

/// A disk of `count` chunks, of which each is `step` behind the one before; tells what else is read, until it is called off.
struct Noise {
    count: u64,
    step: u64,
    paced: Vec<u64>,
    paces_max: usize,
}

impl Noise {
    fn new(count: u64, step: u64) -> Self {
        Self { count, step, paced: Vec::new(), paces_max: usize::MAX }
    }

    fn size(&self) -> ByteCount {
        ByteCount(self.count * CHUNK)
    }
}

impl ImageSource for Noise {
    type Error = ImageError;

    fn changed(&self, _: ByteRange) -> bool {
        true
    }

    fn is_zero(&mut self, _: ByteRange) -> Result<bool, ImageError> {
        Ok(false)
    }

    fn read(&mut self, range: ByteRange) -> Result<Bytes, ImageError> {
        let place = range.start().0 / CHUNK;
        Ok(noise(1 + place * self.step % self.count).into())
    }

    fn pace(&mut self, bytes: ByteCount) -> Result<(), ImageError> {
        if self.paced.len() == self.paces_max {
            let source = std::io::ErrorKind::Interrupted.into();
            return Err(ImageError::Io { step: "go on".to_owned(), source });
        }
        self.paced.push(bytes.0);
        Ok(())
    }
}

/// Images whose packs hold four chunks each.
fn small_packs(storage: &Reads) -> Images {
    let limits = ImagesLimits { pack_bytes_max: ByteCount(4 * CHUNK), ..ImagesLimits::default() };
    Images::new(Arc::new(storage.clone()), limits)
}

fn make_noise(storage: &Reads, source: &mut Noise) -> Result<Written, ImageError> {
    let mut writer = small_packs(storage).write()?;
    writer.image(None, source.size(), source)?;
    writer.finish()
}

#[test]
fn reads_of_known_chunks_keep_to_the_rate_and_end_when_called_off() {
    let storage = Reads::default();
    make_noise(&storage, &mut Noise::new(40, 1)).unwrap();
    let mut again = Noise::new(40, 1);
    assert_eq!(make_noise(&storage, &mut again).unwrap().chunks, 0);
    let (chunks, nodes): (Vec<u64>, Vec<u64>) = again.paced.iter().partition(|bytes| **bytes > CHUNK / 2);
    assert_eq!((chunks.len(), nodes.len()), (40, 1));
    assert!(chunks.iter().all(|bytes| (CHUNK..CHUNK + 4096).contains(bytes)), "{chunks:?}");
    let mut ended = Noise { paces_max: 7, ..Noise::new(40, 1) };
    assert!(matches!(make_noise(&storage, &mut ended), Err(ImageError::Io { .. })));
}

#[test]
fn packs_of_known_chunks_are_read_once_in_whatever_order_their_chunks_come() {
    let storage = Reads::default();
    make_noise(&storage, &mut Noise::new(160, 1)).unwrap();
    let before = *storage.bytes.lock().unwrap();
    drop(small_packs(&storage).write().unwrap());
    let begun = *storage.bytes.lock().unwrap();
    // Forty packs take turns.
    assert_eq!(make_noise(&storage, &mut Noise::new(160, 37)).unwrap().chunks, 1, "the tree is another");
    let read = *storage.bytes.lock().unwrap() - begun;
    let (tables, chunks) = (begun - before, 160 * (CHUNK + 128));
    assert!(read <= tables + chunks, "{read} bytes were read: tables have {tables}, chunks {chunks}");
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
