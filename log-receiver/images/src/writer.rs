//! Making images: one after the other into packs that become durable together.
//!
//! An image begins with the one before it: what did not change since is taken over by reference, subtree by subtree, so an
//! image costs what changed. A chunk that is stored already is not stored again, of whatever disk it was, as far as the
//! writer knows the packs. One of a pack that was there before is read first, once: what is stored may have been damaged since,
//! and what this image is made of may be the last that is whole.
//!
//! Invariant: nothing may name an image before [`ImageWriter::finish`] has returned. A writer that is given up removes its
//! packs, which nobody can name then; those of one that died [`Images::collect`] removes, unless another has named what they have:
//! that one makes them durable first (`durable.rs`). One writer at a time, and none beside a collection. A mend may run beside one, and leaves its packs alone (`numbers.rs`).

use std::{path::Path, sync::Arc};

use backtide_units::{ByteCount, ByteOffset, ByteRange, is_zeroes};
use bytes::Bytes;
use roaring::RoaringBitmap;

use crate::{
    CHUNK_BYTES, Image, ImageError, Images, Recent, Root,
    chunk::{ChunkRef, Kind},
    encode::Encoder,
    error::failed,
    image::{height_of, span},
    node::{FANOUT, Node},
    numbers::{self, Writing},
    pack::{Line, Pack},
    pack_writer::PackWriter,
    store::{PACKS_DIR, path_of},
};

/// The most a pack grows to, whatever the limits say.
const PACK_BYTES_MAX: u64 = 1 << 30;

/// What an image is made of.
pub trait ImageSource {
    /// Why it cannot be read.
    type Error: From<ImageError>;

    /// Whether anything in `range` may differ from the image before, or from zeroes when there is none.
    fn changed(&self, range: ByteRange) -> bool;

    /// Whether all of `range` is known to be zeroes, without reading it.
    ///
    /// # Errors
    /// When that cannot be found out.
    fn is_zero(&mut self, range: ByteRange) -> Result<bool, Self::Error>;

    /// The bytes of `range`; may take its time, to keep to a rate.
    ///
    /// # Errors
    /// When they cannot be read, or the image is not wanted any more.
    fn read(&mut self, range: ByteRange) -> Result<Bytes, Self::Error>;

    /// So many bytes of packs will be read; may take its time, to keep to a rate. Without one there is none.
    ///
    /// # Errors
    /// When the image is not wanted any more.
    fn pace(&mut self, _bytes: ByteCount) -> Result<(), Self::Error> {
        Ok(())
    }

    /// What it comes to that the image before cannot be taken over in `range`: the node that leads there cannot be read.
    fn lost(&mut self, _range: ByteRange, error: ImageError) -> Self::Error {
        error.into()
    }
}

/// What was written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Written {
    /// Chunks that were stored.
    pub chunks: u64,
    /// Chunks that were there already.
    pub known: u64,
    /// Bytes of packs.
    pub bytes: ByteCount,
}

/// Where a chunk is.
#[derive(Clone, Copy)]
struct Known {
    pack: u32,
    ordinal: u32,
    /// Where it begins in the pack, and the most that is read of it there: as this needs no table, a pack is read once, however
    /// many there are.
    offset: u32,
    stored: u32,
    /// This writer has stored it, or read it.
    whole: bool,
}

/// Makes images.
pub struct ImageWriter {
    images: Images,
    pack: Option<PackWriter>,
    /// Its packs may have these.
    numbers: Writing,
    next_pack: u32,
    /// Those that it has begun, as long as nobody can name them.
    begun: Vec<u32>,
    known: Recent<[u8; 32], Known>,
    /// Those that known chunks are read from, without their tables.
    packs: Recent<u32, Arc<Pack>>,
    /// Those of others that images of this writer name.
    others: RoaringBitmap,
    encoder: Encoder,
    written: Written,
}

impl Images {
    /// Begins to make images.
    ///
    /// # Errors
    /// The file system's.
    pub fn write(&self) -> Result<ImageWriter, ImageError> {
        let storage = &self.shared.storage;
        let dir = Path::new(PACKS_DIR);
        let fail = |source| failed(format!("create {}", storage.display(dir).display()), source);
        storage.create_dir(dir).map_err(fail)?;
        let writing = Writing::begin(Arc::clone(&self.shared), || Ok(self.numbers()?.last().copied()))?;
        let numbers = self.numbers()?;
        let mut known = Recent::new(self.shared.limits.known_chunks_max);
        let mut room = self.shared.limits.known_chunks_max;
        for number in numbers.iter().rev().filter(|number| self.shared.durable.can_be_named(**number)) {
            // Not one that readers share: it may be the file before a collection wrote it anew, and name what has gone.
            let Ok(pack) = self.open_pack(*number) else { continue };
            // One that was not finished is removed by the next collection.
            if pack.broken().is_some() || pack.lines().len() > room {
                continue;
            }
            room -= pack.lines().len();
            // Of a node that is there twice the first is the one that images name.
            for (line, stored) in pack.lines_with_lengths().rev() {
                let Line { ordinal, offset, hash } = *line;
                known.put(hash, 1, Known { pack: *number, ordinal, offset, stored, whole: false });
            }
        }
        let next_pack = writing.first();
        let encoder = Encoder::new()?;
        let written = Written::default();
        let images = self.clone();
        let packs = Recent::new(self.shared.limits.open_packs_max.max(1));
        let (pack, begun, others) = (None, Vec::new(), RoaringBitmap::new());
        Ok(ImageWriter {
            images,
            pack,
            numbers: writing,
            next_pack,
            begun,
            known,
            packs,
            others,
            encoder,
            written,
        })
    }
}

impl ImageWriter {
    /// Makes an image of a disk of `size` bytes.
    ///
    /// # Errors
    /// The source's, or of writing: then the writer is of no use any more.
    pub fn image<S: ImageSource>(
        &mut self,
        before: Option<&Image>,
        size: ByteCount,
        source: &mut S,
    ) -> Result<Root, S::Error> {
        let old = before.map(Image::root).filter(|old| old.size() <= size);
        let old = old.map_or((ChunkRef::ZEROES, 0), |old| (old.top, old.height));
        if self.pack.as_ref().is_some_and(|pack| old.0.pack >= self.numbers.first() && !pack.is_empty()) {
            // Its nodes may be in the pack that is written, which cannot be read yet.
            self.finish_pack()?;
        }
        let top = self.build(height_of(size), ByteOffset::ZERO, size, old, source)?;
        Ok(Root::new(top, size))
    }

    /// Finishes the packs: after this the images may be named.
    ///
    /// # Errors
    /// The file system's: then none may be.
    pub fn finish(mut self) -> Result<Written, ImageError> {
        self.finish_pack()?;
        self.images.make_durable(&self.others)?;
        let storage = &self.images.shared.storage;
        let dir = Path::new(PACKS_DIR);
        for path in dir.ancestors() {
            let synced = storage.sync_dir(path);
            synced.map_err(|source| failed(format!("sync {}", storage.display(path).display()), source))?;
        }
        self.begun.clear();
        Ok(self.written)
    }

    fn build<S: ImageSource>(
        &mut self,
        level: u8,
        start: ByteOffset,
        size: ByteCount,
        old: (ChunkRef, u8),
        source: &mut S,
    ) -> Result<ChunkRef, S::Error> {
        let range = ByteRange::between(start, ByteOffset(size.0.min(start.0.saturating_add(span(level).0))));
        let as_it_was = old.1 == level || old.0.is_zeroes();
        if range.is_empty() || (as_it_was && !source.changed(range)) {
            return Ok(old.0);
        }
        // At this level an answer is about few extents, and spares the look at 256 chunks.
        if level <= 1 && source.is_zero(range)? {
            return Ok(ChunkRef::ZEROES);
        }
        let Some(below) = level.checked_sub(1) else { return self.data(range, source) };
        let old_children = self.images.children(old, level).map_err(|error| source.lost(range, error))?;
        let mut node = Node::zeroes(level);
        for (place, old) in (0..).zip(old_children) {
            let start = ByteOffset(start.0 + place * span(below).0);
            if start.0 >= size.0 {
                break;
            }
            node.children[place as usize] = self.build(below, start, size, old, source)?;
        }
        debug_assert_eq!(node.children.len(), FANOUT);
        if node.is_zeroes() {
            return Ok(ChunkRef::ZEROES);
        }
        self.put(Kind::Node(level), &node.encode(), source)
    }

    fn data<S: ImageSource>(&mut self, range: ByteRange, source: &mut S) -> Result<ChunkRef, S::Error> {
        let mut bytes = source.read(range)?;
        if is_zeroes(&bytes) {
            return Ok(ChunkRef::ZEROES);
        }
        if (bytes.len() as u64) < CHUNK_BYTES.0 {
            let mut whole = bytes.to_vec();
            whole.resize(CHUNK_BYTES.0 as usize, 0);
            bytes = whole.into();
        }
        self.put(Kind::Data, &bytes, source)
    }

    /// Stores a chunk that is not stored yet.
    fn put<S: ImageSource>(
        &mut self,
        kind: Kind,
        content: &[u8],
        source: &mut S,
    ) -> Result<ChunkRef, S::Error> {
        let hash = *blake3::hash(content).as_bytes();
        if let Some(name) = self.stored(hash, source)? {
            self.written.known += 1;
            return Ok(name);
        }
        Ok(self.store(kind, hash, content)?)
    }

    fn store(&mut self, kind: Kind, hash: [u8; 32], content: &[u8]) -> Result<ChunkRef, ImageError> {
        let limit = self.images.shared.limits.pack_bytes_max.0.min(PACK_BYTES_MAX);
        if self.pack.as_ref().is_some_and(|pack| pack.end().0 >= limit) {
            self.finish_pack()?;
        }
        if self.pack.is_none() {
            self.pack = Some(self.begin_pack()?);
        }
        let pack = self.pack.as_mut().expect("one was begun");
        let name = ChunkRef { hash, pack: pack.number(), ordinal: pack.next_ordinal() };
        let (header, stored) = self.encoder.encode(kind, name, content);
        pack.append(&header, &stored)?;
        self.written.chunks += 1;
        let ChunkRef { pack, ordinal, .. } = name;
        // It is not read again.
        self.known.put(hash, 1, Known { pack, ordinal, offset: 0, stored: 0, whole: true });
        Ok(name)
    }

    /// A chunk that is stored, and whole.
    fn stored<S: ImageSource>(
        &mut self,
        hash: [u8; 32],
        source: &mut S,
    ) -> Result<Option<ChunkRef>, S::Error> {
        let Some(known) = self.known.get(&hash) else { return Ok(None) };
        let name = ChunkRef { hash, pack: known.pack, ordinal: known.ordinal };
        if !known.whole {
            source.pace(ByteCount(known.stored.into()))?;
            if !self.is_whole(&name, known.offset) {
                return Ok(None);
            }
            self.others.insert(known.pack);
            self.known.put(hash, 1, Known { whole: true, ..known });
        }
        Ok(Some(name))
    }

    /// What cannot be read now is stored again, whatever is wrong.
    fn is_whole(&mut self, name: &ChunkRef, offset: u32) -> bool {
        let pack = match self.packs.get(&name.pack) {
            Some(pack) => Ok(pack),
            None => self.images.open_pack_without_table(name.pack).map(Arc::new),
        };
        let Ok(pack) = pack else { return false };
        self.packs.put(name.pack, 1, Arc::clone(&pack));
        let ChunkRef { hash, ordinal, .. } = *name;
        pack.content(&Line { ordinal, offset, hash }, name).is_ok()
    }

    fn begin_pack(&mut self) -> Result<PackWriter, ImageError> {
        let number = self.next_pack;
        self.next_pack = numbers::after(number)?;
        let name = self.images.name_of(number);
        let file = self.images.shared.storage.create_new(&path_of(number));
        let file = file.map_err(|source| failed(format!("create {}", name.display()), source))?;
        self.images.shared.durable.forget(number);
        self.begun.push(number);
        Ok(PackWriter::new(file, name, number))
    }

    fn finish_pack(&mut self) -> Result<(), ImageError> {
        if let Some(pack) = self.pack.take() {
            let number = pack.number();
            self.written.bytes.0 += pack.finish()?.0;
            self.images.shared.durable.synced(number);
            // Whoever looked at it while it was written saw a part.
            self.images.forget_pack(number);
        }
        Ok(())
    }
}

impl Drop for ImageWriter {
    fn drop(&mut self) {
        // While no other writer can have their numbers. What cannot be removed is the next collection's.
        for number in self.begun.drain(..) {
            let _ = self.images.shared.storage.remove(&path_of(number));
            self.images.forget_pack(number);
        }
    }
}
