//! The packs of a store, with what readers share: open packs, nodes and chunks, all bounded.

use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicU64, Ordering},
    },
};

use backtide_storage::{BufferPool, Storage, StorageFile};
use backtide_units::ByteCount;
use bytes::Bytes;

use crate::{
    Image, ImageError, Recent, Root,
    chunk::{ChunkHeader, ChunkRef, Kind},
    durable::Durable,
    error::failed,
    image::ROOT_LENGTH,
    node::{NODE_LENGTH, Node},
    numbers::Numbers,
    pack::Pack,
    parts::PartSums,
};

/// Where packs are, from the store's directory.
pub const PACKS_DIR: &str = "images/packs";

/// What is kept beside a value weighs about this much.
const OVERHEAD: usize = 192;

/// Memory for checksums of parts of chunks, beside what the limits say: those of about 4 GiB.
const SUM_BYTES_MAX: usize = 16 << 20;

/// Limits of what readers and the writer keep in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImagesLimits {
    /// Memory for nodes of trees. Default 16 MiB.
    pub node_bytes_max: ByteCount,
    /// Memory for chunks. Default 32 MiB.
    pub chunk_bytes_max: ByteCount,
    /// Packs kept open. Default 64.
    pub open_packs_max: usize,
    /// A pack is finished when it has grown to this. Default 64 MiB, at most 1 GiB.
    pub pack_bytes_max: ByteCount,
    /// Chunks that a writer knows, so as not to store them twice, beside those of the image before. Default
    /// 262,144: 16 GiB of disks, about 30 MiB of memory.
    pub known_chunks_max: usize,
    /// No pack is mended where that would leave less than this free on the file system. Default 0.
    pub free_bytes_min: ByteCount,
}

/// The images of a store. Clones share it.
#[derive(Clone)]
pub struct Images {
    pub(crate) shared: Arc<Shared>,
}

pub(crate) struct Shared {
    pub(crate) storage: Arc<dyn Storage>,
    pub(crate) limits: ImagesLimits,
    packs: Mutex<Recent<u32, Arc<Pack>>>,
    /// How often a pack was forgotten; changes under the lock of `packs`.
    forgotten: AtomicU64,
    nodes: Mutex<Recent<[u8; 32], Arc<Node>>>,
    chunks: Mutex<Recent<[u8; 32], Bytes>>,
    sums: Mutex<Recent<[u8; 32], PartSums>>,
    buffers: BufferPool,
    /// Taken by whoever writes packs anew, which all of them do beside the old one under one name.
    pub(crate) rewriting: Mutex<()>,
    pub(crate) numbers: Numbers,
    pub(crate) durable: Durable,
    /// Images that somebody has: their chunks stay, whatever is written anywhere.
    held: Mutex<BTreeMap<[u8; ROOT_LENGTH], Weak<Root>>>,
}

impl Images {
    /// The images of the store on `storage`; makes nothing.
    pub fn new(storage: Arc<dyn Storage>, limits: ImagesLimits) -> Self {
        let bytes = |limit: ByteCount| limit.as_usize().unwrap_or(usize::MAX);
        Self {
            shared: Arc::new(Shared {
                storage,
                limits,
                packs: Mutex::new(Recent::new(limits.open_packs_max.max(1))),
                forgotten: AtomicU64::new(0),
                nodes: Mutex::new(Recent::new(bytes(limits.node_bytes_max))),
                chunks: Mutex::new(Recent::new(bytes(limits.chunk_bytes_max))),
                sums: Mutex::new(Recent::new(SUM_BYTES_MAX)),
                buffers: BufferPool::default(),
                rewriting: Mutex::default(),
                numbers: Numbers::default(),
                durable: Durable::default(),
                held: Mutex::default(),
            }),
        }
    }

    /// The image with this root. As long as it or a clone is there, its chunks stay.
    pub fn image(&self, root: Root) -> Image {
        self.shared.numbers.named(root.top.pack);
        // With its size: disks of several sizes may have one tree.
        let key = root.encode();
        let mut held = lock(&self.shared.held);
        held.retain(|_, root| root.strong_count() > 0);
        let known = held.get(&key).and_then(Weak::upgrade).filter(|known| **known == root);
        let root = known.unwrap_or_else(|| Arc::new(root));
        held.insert(key, Arc::downgrade(&root));
        Image::new(self.clone(), root)
    }

    /// The roots of all images that somebody has.
    pub(crate) fn held(&self) -> Vec<Root> {
        lock(&self.shared.held).values().filter_map(Weak::upgrade).map(|root| *root).collect()
    }

    /// Bytes of all pack files.
    ///
    /// # Errors
    /// The file system's.
    pub fn size(&self) -> Result<ByteCount, ImageError> {
        let mut bytes = 0;
        for number in self.numbers()? {
            let file = self.shared.storage.open(&path_of(number));
            let length = file.and_then(|file| file.len());
            match length {
                Ok(length) => bytes += length.0,
                // Collected meanwhile.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(source) => {
                    return Err(failed(format!("read {}", self.name_of(number).display()), source));
                }
            }
        }
        Ok(ByteCount(bytes))
    }

    /// The numbers of all packs, in order.
    pub(crate) fn numbers(&self) -> Result<Vec<u32>, ImageError> {
        let dir = Path::new(PACKS_DIR);
        match self.shared.storage.list(dir) {
            Ok(names) => {
                let mut numbers: Vec<u32> = names.iter().filter_map(|name| number_of(name)).collect();
                numbers.sort_unstable();
                Ok(numbers)
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(source) => {
                Err(failed(format!("list {}", self.shared.storage.display(dir).display()), source))
            }
        }
    }

    pub(crate) fn name_of(&self, number: u32) -> PathBuf {
        self.shared.storage.display(&path_of(number))
    }

    pub(crate) fn pack(&self, number: u32) -> Result<Arc<Pack>, ImageError> {
        if let Some(pack) = lock(&self.shared.packs).get(&number) {
            return Ok(pack);
        }
        let forgotten = self.shared.forgotten.load(Ordering::Acquire);
        let pack = Arc::new(self.open_pack(number)?);
        let mut packs = lock(&self.shared.packs);
        // What was opened before its file was replaced serves this reader only.
        if self.shared.forgotten.load(Ordering::Acquire) == forgotten {
            packs.put(number, 1, Arc::clone(&pack));
        }
        Ok(pack)
    }

    /// A pack as its file is now.
    pub(crate) fn open_pack(&self, number: u32) -> Result<Pack, ImageError> {
        Pack::open(self.open_file(number)?, self.name_of(number), number)
    }

    /// The same for chunks whose places are known.
    pub(crate) fn open_pack_without_table(&self, number: u32) -> Result<Pack, ImageError> {
        Ok(Pack::without_table(self.open_file(number)?, self.name_of(number), number))
    }

    pub(crate) fn open_file(&self, number: u32) -> Result<Arc<dyn StorageFile>, ImageError> {
        let name = self.name_of(number);
        self.shared.storage.open(&path_of(number)).map_err(|source| {
            if source.kind() == io::ErrorKind::NotFound {
                let what = "the pack's file is missing".to_owned();
                let offset = backtide_units::ByteOffset::ZERO;
                return ImageError::Damaged { file: name.clone(), offset, what };
            }
            failed(format!("open {}", name.display()), source)
        })
    }

    /// Lets the next reader open the file anew.
    pub(crate) fn forget_pack(&self, number: u32) {
        let mut packs = lock(&self.shared.packs);
        self.shared.forgotten.fetch_add(1, Ordering::Release);
        packs.remove(&number);
    }

    /// A node of a tree, at this level.
    pub(crate) fn node(&self, name: &ChunkRef, level: u8) -> Result<Arc<Node>, ImageError> {
        if let Some(node) = lock(&self.shared.nodes).get(&name.hash).filter(|node| node.level == level) {
            return Ok(node);
        }
        let (pack, content) = match self.content(name, Kind::Node(level)) {
            Err(damage @ ImageError::Damaged { .. }) => {
                // A scrub finds it, and mends it.
                let second =
                    self.twins(name).iter().find_map(|twin| self.content(twin, Kind::Node(level)).ok());
                second.ok_or(damage)?
            }
            read => read?,
        };
        let node = Node::decode(&content, level);
        let what = || format!("expected a node of level {level} in chunk {}", name.ordinal);
        let node = Arc::new(node.ok_or_else(|| pack.damaged(0, what()))?);
        lock(&self.shared.nodes).put(name.hash, NODE_LENGTH + OVERHEAD, Arc::clone(&node));
        Ok(node)
    }

    /// Other chunks of its pack with the content of this one; none when the pack cannot be read.
    pub(crate) fn twins(&self, name: &ChunkRef) -> Vec<ChunkRef> {
        self.pack(name.pack).map_or_else(|_| Vec::new(), |pack| pack.twins(name).collect())
    }

    /// A chunk's content, if it is in memory: whoever asks checks it against the hash.
    pub(crate) fn remembered(&self, name: &ChunkRef, kind: Kind) -> Option<Bytes> {
        match kind {
            Kind::Data => lock(&self.shared.chunks).get(&name.hash),
            Kind::Node(_) => lock(&self.shared.nodes).get(&name.hash).map(|node| node.encode()),
        }
    }

    /// Memory for reads of this store's disks.
    pub fn buffers(&self) -> &BufferPool {
        &self.shared.buffers
    }

    /// Bytes of a disk: those of a chunk from `from` on, as many as the buffer has.
    ///
    /// A chunk is checked as a whole. What is stored as it is need not be read as a whole again: the checksums of its
    /// parts are kept. What is compressed is kept itself, for a while. Whoever reads all of it reads on, elsewhere, so
    /// nothing is kept then.
    pub(crate) fn data(&self, name: &ChunkRef, from: usize, buffer: &mut [u8]) -> Result<(), ImageError> {
        let kept = lock(&self.shared.chunks).get(&name.hash);
        if let Some(bytes) = kept {
            buffer.copy_from_slice(&bytes[from..from + buffer.len()]);
            return Ok(());
        }
        let whole = buffer.len() as u64 == crate::CHUNK_BYTES.0;
        let sums = if whole { None } else { lock(&self.shared.sums).get(&name.hash) };
        if let Some(sums) = sums
            && self.pack(name.pack)?.part(name, &sums, from, buffer)?
        {
            return Ok(());
        }
        let (_, header, bytes) = self.stored_content(name, Kind::Data)?;
        buffer.copy_from_slice(&bytes[from..from + buffer.len()]);
        match (whole, header.compressed) {
            (true, _) => {}
            (false, true) => lock(&self.shared.chunks).put(name.hash, bytes.len() + OVERHEAD, bytes),
            (false, false) => {
                let sums = PartSums::of(&bytes);
                lock(&self.shared.sums).put(name.hash, sums.weight() + OVERHEAD, sums);
            }
        }
        Ok(())
    }

    /// A chunk's content from its file, past what is kept in memory.
    pub(crate) fn content(&self, name: &ChunkRef, kind: Kind) -> Result<(Arc<Pack>, Bytes), ImageError> {
        self.stored_content(name, kind).map(|(pack, _, content)| (pack, content))
    }

    fn stored_content(
        &self,
        name: &ChunkRef,
        kind: Kind,
    ) -> Result<(Arc<Pack>, ChunkHeader, Bytes), ImageError> {
        let pack = self.pack(name.pack)?;
        let (header, content) = pack.chunk(name)?;
        let right_length = kind != Kind::Data || content.len() as u64 == crate::CHUNK_BYTES.0;
        let found = header.kind;
        if found != kind || !right_length {
            return Err(pack.damaged(0, format!("chunk {} is {found:?}, expected {kind:?}", name.ordinal)));
        }
        Ok((pack, header, content))
    }
}

/// A pack's file, from the store's directory.
pub(crate) fn path_of(number: u32) -> PathBuf {
    Path::new(PACKS_DIR).join(format!("{number:016}.pack"))
}

/// The number of the pack with this file name, if it is one.
pub(crate) fn number_of(name: &str) -> Option<u32> {
    let digits = name.strip_suffix(".pack").filter(|digits| digits.len() == 16)?;
    let number = digits.parse().ok().filter(|number| *number > 0)?;
    (format!("{number:016}") == digits).then_some(number)
}

/// Nothing that could panic runs under these locks, or what it panics about is not what they guard.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Default for ImagesLimits {
    fn default() -> Self {
        Self {
            node_bytes_max: ByteCount(16 << 20),
            chunk_bytes_max: ByteCount(32 << 20),
            open_packs_max: 64,
            pack_bytes_max: ByteCount(64 << 20),
            known_chunks_max: 1 << 18,
            free_bytes_min: ByteCount::ZERO,
        }
    }
}

#[cfg(test)]
mod tests {
    use backtide_storage::MemoryStorage;
    use backtide_units::{ByteOffset, ByteRange};

    use super::*;
    use crate::{CHUNK_BYTES, ImageSource};

    /// A disk of whole chunks, each of one byte.
    struct Chunks(&'static [u8]);

    impl ImageSource for Chunks {
        type Error = ImageError;

        fn changed(&self, _range: ByteRange) -> bool {
            true
        }

        fn is_zero(&mut self, _range: ByteRange) -> Result<bool, ImageError> {
            Ok(false)
        }

        fn read(&mut self, range: ByteRange) -> Result<Bytes, ImageError> {
            let byte = self.0[(range.start().0 / CHUNK_BYTES.0) as usize];
            Ok(vec![byte; CHUNK_BYTES.0 as usize].into())
        }
    }

    fn make(images: &Images, disks: &[&'static [u8]]) -> Vec<Root> {
        let mut writer = images.write().unwrap();
        let one = |disk: &&'static [u8]| {
            let size = ByteCount(disk.len() as u64 * CHUNK_BYTES.0);
            writer.image(None, size, &mut Chunks(disk)).unwrap()
        };
        let roots = disks.iter().map(one).collect();
        writer.finish().unwrap();
        roots
    }

    #[test]
    fn a_writer_names_no_chunk_that_only_the_pack_before_a_collection_has() {
        let storage = MemoryStorage::new();
        let images = Images::new(Arc::new(storage.clone()), ImagesLimits::default());
        let roots = make(&images, &[&[1], &[2, 3, 4, 5, 6, 7]]);
        let before = images.pack(1).unwrap();
        assert_eq!(images.collect(&roots[..1]).unwrap().rewritten, 1);
        // A reader that opened the pack just before keeps it just after.
        lock(&images.shared.packs).put(1, 1, before);
        let again = make(&images, &[&[5]]);
        let fresh = Images::new(Arc::new(storage), ImagesLimits::default());
        let mut read = vec![0; CHUNK_BYTES.0 as usize];
        let range = ByteRange::between(ByteOffset(0), ByteOffset(CHUNK_BYTES.0));
        fresh.image(again[0]).read_into(range, &mut read).unwrap();
        assert!(read.iter().all(|byte| *byte == 5));
    }

    #[test]
    fn images_of_two_sizes_with_one_tree_are_held_apart() {
        let storage = MemoryStorage::new();
        let images = Images::new(Arc::new(storage), ImagesLimits::default());
        let roots = make(&images, &[&[1, 2], &[1, 2, 0]]);
        assert_eq!(roots[0].top, roots[1].top);
        let (short, long) = (images.image(roots[0]), images.image(roots[1]));
        drop(long);
        assert_eq!(images.collect(&[]).unwrap().removed, 0);
        drop(short);
        assert_eq!(images.collect(&[]).unwrap().removed, 1);
    }
}
