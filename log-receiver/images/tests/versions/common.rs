//! A disk as an array, its images, and what reads them back.

use std::{path::PathBuf, sync::Arc};

use backtide_images::{CHUNK_BYTES, Image, ImageError, ImageSource, Images, ImagesLimits, Losses, Root};
use backtide_storage::MemoryStorage;
use backtide_units::{ByteCount, ByteOffset, ByteRange};
use bytes::Bytes;
use roaring::RoaringTreemap;

pub(crate) const CHUNK: usize = CHUNK_BYTES.0 as usize;

/// SplitMix64.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}

/// A disk as a plain array, and which of its chunks changed since the last image.
pub(crate) struct Disk<'a> {
    pub(crate) content: &'a [u8],
    pub(crate) changed: &'a [bool],
}

impl ImageSource for Disk<'_> {
    type Error = ImageError;

    fn changed(&self, range: ByteRange) -> bool {
        let (first, behind) = (range.start().0 as usize / CHUNK, (range.end().0 as usize).div_ceil(CHUNK));
        self.changed[first.min(self.changed.len())..behind.min(self.changed.len())]
            .iter()
            .any(|changed| *changed)
    }

    fn is_zero(&mut self, _range: ByteRange) -> Result<bool, ImageError> {
        Ok(false)
    }

    fn read(&mut self, range: ByteRange) -> Result<Bytes, ImageError> {
        Ok(Bytes::copy_from_slice(&self.content[range.start().0 as usize..range.end().0 as usize]))
    }
}

pub(crate) struct Bench {
    pub(crate) storage: MemoryStorage,
    pub(crate) images: Images,
    pub(crate) random: Random,
    pub(crate) content: Vec<u8>,
}

pub(crate) fn images(storage: &MemoryStorage) -> Images {
    let limits = ImagesLimits {
        pack_bytes_max: ByteCount(256 << 10),
        node_bytes_max: ByteCount(40 << 10),
        chunk_bytes_max: ByteCount(300 << 10),
        open_packs_max: 3,
        known_chunks_max: 50,
        ..ImagesLimits::default()
    };
    Images::new(Arc::new(storage.clone()), limits)
}

impl Bench {
    pub(crate) fn new(seed: u64, size: usize) -> Self {
        let storage = MemoryStorage::new();
        Self { images: images(&storage), storage, random: Random(seed), content: vec![0; size] }
    }

    /// Changes some of the disk; gives the chunks that changed.
    pub(crate) fn change(&mut self) -> Vec<bool> {
        let mut changed = vec![false; self.content.len().div_ceil(CHUNK)];
        for _ in 0..=self.random.below(4) {
            let start = self.random.below(self.content.len() as u64) as usize;
            let length = 1 + self.random.below(3 * CHUNK as u64) as usize;
            let end = (start + length).min(self.content.len());
            let (kind, salt) = (self.random.below(3), self.random.next());
            for (at, byte) in self.content[start..end].iter_mut().enumerate() {
                *byte = match kind {
                    0 => 0,
                    1 => salt as u8,
                    _ => (salt.wrapping_mul(at as u64 + 1) >> 29) as u8,
                };
            }
            changed[start / CHUNK..end.div_ceil(CHUNK)].fill(true);
        }
        changed
    }

    pub(crate) fn make(&mut self, before: Option<&Image>, changed: &[bool]) -> Result<Root, ImageError> {
        let mut writer = self.images.write()?;
        let size = ByteCount(self.content.len() as u64);
        let root = writer.image(before, size, &mut Disk { content: &self.content, changed })?;
        writer.finish()?;
        Ok(root)
    }

    /// A new version and its image.
    pub(crate) fn next(&mut self, before: Option<&Image>) -> (Root, Vec<u8>) {
        let changed = self.change();
        let root = self.make(before, &changed).expect("no fault");
        (root, self.content.clone())
    }

    pub(crate) fn packs(&self) -> Vec<PathBuf> {
        let packs = self.storage.files().into_iter().map(|(path, _)| path);
        packs.filter(|path| path.extension().is_some_and(|name| name == "pack")).collect()
    }
}

pub(crate) fn read(image: &Image) -> Result<Vec<u8>, ImageError> {
    let mut found = vec![0; image.size().0 as usize];
    image.read_into(ByteRange::between(ByteOffset::ZERO, ByteOffset(image.size().0)), &mut found)?;
    Ok(found)
}

pub(crate) fn assert_reads(image: &Image, expected: &[u8], random: &mut Random) {
    assert!(read(image).expect("it can be read") == expected, "another content");
    // Parts of it, and where its data is.
    for _ in 0..5 {
        let start = random.below(expected.len() as u64);
        let length = random.below(4 * CHUNK as u64).min(expected.len() as u64 - start);
        let range = ByteRange::new(ByteOffset(start), ByteCount(length)).unwrap();
        let mut part = vec![0; length as usize];
        image.read_into(range, &mut part).expect("it can be read");
        assert!(part == expected[start as usize..][..length as usize]);
        let mut rest = part;
        let mut clear = |data: ByteRange| {
            assert!(range.contains(data));
            rest[(data.start().0 - start) as usize..(data.end().0 - start) as usize].fill(0);
        };
        image.data_in(range, &mut clear).expect("its tree can be read");
        assert!(rest.iter().all(|byte| *byte == 0), "data where it says that there is none");
    }
}

/// What a check of an image finds, and what it has read.
pub(crate) fn checked(images: &Images, root: Root) -> (Losses, RoaringTreemap) {
    let (mut losses, mut seen) = (Losses::default(), RoaringTreemap::new());
    let whole = images.image(root).check(0, &mut seen, &mut losses, &mut |_| true);
    assert!(whole.expect("no failure"));
    (losses, seen)
}

/// The same in sentences.
pub(crate) fn check(images: &Images, root: Root) -> Vec<String> {
    checked(images, root).0.sentences().map(str::to_owned).collect()
}

/// Cuts the power at each operation of `act`, on a store with two images of which the first is to stay.
pub(crate) fn at_every_operation(act: impl Fn(&mut Bench, &Image) -> Result<(), ImageError>) {
    let mut cuts = 0;
    for seed in 0..4 {
        let mut cut = 0;
        loop {
            let mut bench = Bench::new(seed, 12 * CHUNK);
            let (first, _) = bench.next(None);
            let older = bench.images.image(first);
            let (root, content) = bench.next(Some(&older));
            drop(older);
            let image = bench.images.image(root);
            bench.storage.cut_power_after(cut);
            let done = act(&mut bench, &image);
            if !bench.storage.is_off() {
                done.expect("no fault");
                cuts += cut;
                break;
            }
            drop(image);
            bench.storage.crash(seed ^ cut);
            bench.images = images(&bench.storage);
            bench.content.clone_from(&content);
            assert_reads(&bench.images.image(root), &content, &mut bench.random);
            bench.images.collect(&[root]).expect("what is left is removed");
            assert!(check(&bench.images, root).is_empty());
            // And the next image is made as ever.
            let image = bench.images.image(root);
            let (next, newer) = bench.next(Some(&image));
            bench.storage.crash(!cut);
            bench.images = images(&bench.storage);
            assert_reads(&bench.images.image(next), &newer, &mut bench.random);
            assert_reads(&bench.images.image(root), &content, &mut bench.random);
            cut += 1;
        }
    }
    assert!(cuts > 5, "it was cut somewhere: {cuts}");
}
