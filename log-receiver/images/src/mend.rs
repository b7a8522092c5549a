//! Mending packs: a chunk that is damaged, or missing with its file, becomes again what it was.
//!
//! Its content is taken from another chunk with the same hash, of any pack; from memory; or from wherever the caller finds it.
//! It counts only when it has the hash by which images name it, so nothing is ever put there that was not.
//!
//! ```text
//!   lost chunks of a pack ─▶ contents with their hashes ─▶ PACK.new: those, and all other chunks as they stand
//!     ─▶ read back and checked ─▶ synced ─▶ renamed over the pack ─▶ directory synced ─▶ read once more: mended
//! ```
//! The pack keeps its number and its chunks their ordinals, so no reference changes, and who has the old file open goes on with
//! it. A crash on the way leaves the old pack and a file that the next collection or mend removes, or the new one.

use std::{
    collections::{BTreeMap, HashMap},
    error::Error as _,
    path::Path,
};

use bytes::Bytes;

use crate::{
    CHUNK_BYTES, ImageError, Images, Losses, LostChunk,
    chunk::{ChunkHeader, ChunkRef},
    encode::Encoder,
    error::failed,
    pack::{Line, Pack},
    pack_writer::PackWriter,
    store::{PACKS_DIR, lock, path_of},
};

/// A pack is written anew when so much of it was found, or all that can be.
const FOUND_BYTES_MAX: usize = 64 << 20;

/// No pack has more chunks than these bytes, nodes twice.
const REWRITTEN_BYTES_MAX: u64 = 3 << 30;

/// So many chunks with one hash are tried.
const COPIES_MAX: usize = 4;

/// Finds what a chunk of data had, if it is what is wanted.
pub type FindChunk<'a> = &'a mut dyn FnMut(&LostChunk, &dyn Fn(&[u8]) -> bool) -> Option<Bytes>;

/// What a mend came to.
#[derive(Debug, Default)]
pub struct Mended {
    /// What is whole again, by a read of it.
    pub chunks: Vec<LostChunk>,
    /// Packs that have a whole table again: what was wrong with each.
    pub tables: Vec<String>,
    /// What is still damaged.
    pub left: Vec<Left>,
}

/// Something that is still damaged.
#[derive(Debug)]
pub struct Left {
    /// What is wrong with it: a sentence with file and place.
    pub what: String,
    /// Why it could not be mended although what it had was found, if that is so.
    pub why: Option<String>,
}

/// Chunks to be put into a pack, by ordinal: header and what is stored.
type Found = BTreeMap<u32, (ChunkHeader, Vec<u8>)>;

/// Places of chunks with a hash.
type Copies = HashMap<[u8; 32], Vec<ChunkRef>>;

impl Images {
    /// Mends what checks found, as far as it can be. `find` is asked for data that no pack has any more.
    ///
    /// # Errors
    /// The file system's, of reading. What cannot be written stays as it is, and says so.
    pub fn mend(&self, losses: &Losses, find: FindChunk<'_>) -> Result<Mended, ImageError> {
        let mut mended = Mended::default();
        let copies = self.copies(losses)?;
        let mut packs: BTreeMap<u32, Vec<&LostChunk>> = BTreeMap::new();
        for lost in losses.chunks.values() {
            packs.entry(lost.name.pack).or_default().push(lost);
        }
        for pack in losses.tables.keys() {
            packs.entry(*pack).or_default();
        }
        let mut encoder = Encoder::new()?;
        for (number, lost) in packs {
            let table = losses.tables.get(&number);
            let mut why = None;
            let (mut found, mut bytes, mut tried) = (Found::new(), 0, false);
            for lost in &lost {
                let Some(content) = self.content_of(lost, &copies, find) else { continue };
                let (header, stored) = encoder.encode(lost.kind(), lost.name, &content);
                bytes += stored.len();
                found.insert(lost.name.ordinal, (header, stored.into_owned()));
                if bytes >= FOUND_BYTES_MAX {
                    why = self.put_back(number, &std::mem::take(&mut found)).or(why);
                    (bytes, tried) = (0, true);
                }
            }
            if !found.is_empty() || (table.is_some() && !tried) {
                why = self.put_back(number, &found).or(why);
            }
            self.tell(number, &lost, table, why, &mut mended);
        }
        Ok(mended)
    }

    /// Reads once more what was lost of a pack.
    fn tell(
        &self,
        number: u32,
        lost: &[&LostChunk],
        table: Option<&String>,
        why: Option<String>,
        mended: &mut Mended,
    ) {
        if let Some(what) = table {
            match self.open_pack(number) {
                Ok(pack) if pack.broken().is_none() => mended.tables.push(what.clone()),
                Ok(_) | Err(_) => mended.left.push(Left { what: what.clone(), why: why.clone() }),
            }
        }
        for lost in lost {
            match self.content(&lost.name, lost.kind()) {
                Ok(_) => mended.chunks.push(LostChunk::clone(lost)),
                Err(_) => mended.left.push(Left { what: lost.what().to_owned(), why: why.clone() }),
            }
        }
    }

    /// Where chunks with the hashes of the lost ones are.
    fn copies(&self, losses: &Losses) -> Result<Copies, ImageError> {
        let mut copies: Copies = losses.chunks.values().map(|lost| (lost.name.hash, Vec::new())).collect();
        if copies.is_empty() {
            return Ok(copies);
        }
        for number in self.numbers()? {
            let pack = match self.open_pack(number) {
                Ok(pack) => pack,
                Err(ImageError::Damaged { .. } | ImageError::UnknownVersion { .. }) => continue,
                Err(error @ (ImageError::Full { .. } | ImageError::Io { .. })) => return Err(error),
            };
            for line in pack.lines() {
                let Some(places) = copies.get_mut(&line.hash) else { continue };
                let place = ChunkRef { hash: line.hash, pack: number, ordinal: line.ordinal };
                if places.len() < COPIES_MAX && !losses.chunks.contains_key(&place.place()) {
                    places.push(place);
                }
            }
        }
        Ok(copies)
    }

    fn content_of(&self, lost: &LostChunk, copies: &Copies, find: FindChunk<'_>) -> Option<Bytes> {
        let is_wanted = |bytes: &[u8]| *blake3::hash(bytes).as_bytes() == lost.name.hash;
        let copy = copies.get(&lost.name.hash).into_iter().flatten();
        let copy = copy.filter_map(|place| self.content(place, lost.kind()).ok()).map(|(_, content)| content);
        let remembered = || self.remembered(&lost.name, lost.kind());
        let known = copy.chain(std::iter::from_fn(remembered).take(1)).find(|bytes| is_wanted(bytes));
        if known.is_some() || lost.is_node() {
            return known;
        }
        let whole = |bytes: &[u8]| bytes.len() as u64 == CHUNK_BYTES.0 && is_wanted(bytes);
        find(lost, &whole).filter(|bytes| whole(bytes))
    }

    /// Writes a pack anew with these chunks; gives why it could not.
    fn put_back(&self, number: u32, found: &Found) -> Option<String> {
        let _alone = lock(&self.shared.rewriting);
        let tried = self.remove_leftovers().and_then(|_| self.replace(number, found));
        match tried {
            Ok(why) => why,
            Err(error) => {
                // Its room is given back at once, where that can be done.
                let _ = self.remove_leftovers();
                let source = error.source().map(|source| format!(": {source}")).unwrap_or_default();
                Some(format!("{error}{source}"))
            }
        }
    }

    fn replace(&self, number: u32, found: &Found) -> Result<Option<String>, ImageError> {
        let old = match self.open_pack(number) {
            Ok(pack) => Some(pack),
            Err(ImageError::Damaged { .. }) if !found.is_empty() => None,
            Err(error) => return Err(error),
        };
        let mut kept = Vec::new();
        if let Some(old) = &old {
            if !old.has_all_its_lines()? {
                return Ok(Some(
                    "the pack's table is damaged and so is a chunk's header before others".to_owned(),
                ));
            }
            let Some(lines) = old.lengths() else {
                return Ok(Some("the pack's chunks do not lie in their order".to_owned()));
            };
            kept = lines;
        }
        let another = |(line, _): &(Line, u64)| {
            found.get(&line.ordinal).is_some_and(|(header, _)| header.name.hash != line.hash)
        };
        if kept.iter().any(another) {
            return Ok(Some("the pack has another chunk there".to_owned()));
        }
        let bytes: u64 = kept.iter().map(|(_, length)| length).sum();
        if bytes > REWRITTEN_BYTES_MAX {
            return Ok(Some("the pack is longer than any can be".to_owned()));
        }
        let storage = &self.shared.storage;
        let name = self.name_of(number);
        let fail = |source| failed(format!("write {}", name.display()), source);
        let beside = path_of(number).with_extension("new");
        let file = storage.create_new(&beside).map_err(fail)?;
        let mut writer = PackWriter::new(file, name.clone(), number);
        let mut new = found.iter().peekable();
        for (line, length) in kept {
            while let Some((_, (header, stored))) = new.next_if(|(ordinal, _)| **ordinal < line.ordinal) {
                writer.append(header, stored)?;
            }
            match (new.next_if(|(ordinal, _)| **ordinal == line.ordinal), &old) {
                (Some((_, (header, stored))), _) => writer.append(header, stored)?,
                (None, Some(old)) => writer.append_as_it_is(&line, &old.as_it_is(&line, length)?)?,
                (None, None) => unreachable!("lines are of an old pack"),
            }
        }
        for (_, (header, stored)) in new {
            writer.append(header, stored)?;
        }
        writer.finish()?;
        let written = Pack::open(storage.open(&beside).map_err(fail)?, name.clone(), number)?;
        if let Some(broken) = written.broken() {
            return Ok(Some(format!("what was written beside it reads otherwise: {broken}")));
        }
        for (header, _) in found.values() {
            written.chunk(&header.name)?;
        }
        storage.rename(&beside, &path_of(number)).map_err(fail)?;
        self.forget_pack(number);
        let dir = Path::new(PACKS_DIR);
        let synced = storage.sync_dir(dir);
        synced.map_err(|source| failed(format!("sync {}", storage.display(dir).display()), source))?;
        Ok(None)
    }
}
