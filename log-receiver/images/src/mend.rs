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
//! it. A crash on the way leaves the old pack and a file that the next collection or mend removes, or the new one. So does
//! whoever calls it off, which is possible at every chunk and at every MiB that is copied. A writer's packs are left alone
//! (`numbers.rs`), and the room that is to stay free stays free.

mod put_back;

use std::collections::{BTreeMap, BTreeSet, HashMap};

use backtide_units::ByteCount;
use bytes::Bytes;
use roaring::RoaringTreemap;

use crate::{
    CHUNK_BYTES, ImageError, Images, Losses, LostChunk,
    chunk::{ChunkHeader, ChunkRef},
    encode::Encoder,
    pack::{Pack, table_bytes},
};

/// A pack is written anew when so much of it was found, or all that can be.
const FOUND_BYTES_MAX: usize = 64 << 20;

/// So many chunks with one hash are tried.
const COPIES_MAX: usize = 4;

/// Whoever waits for the pace is asked at least this often.
const STEP_BYTES: ByteCount = ByteCount(1 << 20);

/// Finds what a chunk of data had, if it is what is wanted.
pub type FindChunk<'a> = &'a mut dyn FnMut(&LostChunk, &dyn Fn(&[u8]) -> bool) -> Option<Bytes>;

/// Is told how many bytes were read and written since it was last asked, and says whether to go on.
pub type Step<'a> = &'a mut dyn FnMut(ByteCount) -> bool;

/// What a mend came to.
#[derive(Debug, Default)]
pub struct Mended {
    /// What is whole again, by a read of it.
    pub chunks: Vec<LostChunk>,
    /// Packs that have a whole table again: what was wrong with each.
    pub tables: Vec<String>,
    /// What is still damaged.
    pub left: Vec<Left>,
    /// Whether it was called off: what it had not come to is left.
    pub called_off: bool,
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

/// Whether the chunk of a pack with this ordinal was found whole by the check.
type Whole<'a> = &'a dyn Fn(u32) -> bool;

/// Why what was found of a pack was not put back.
#[derive(Default)]
struct Why {
    /// None of it, or not all.
    all: Option<String>,
    /// Ordinals under which the pack has another chunk.
    taken: BTreeSet<u32>,
}

impl Why {
    fn of(&self, lost: &LostChunk) -> Option<String> {
        let taken = self.taken.contains(&lost.name.ordinal);
        if taken { Some("the pack has another chunk there".to_owned()) } else { self.all.clone() }
    }
}

/// Places of chunks with a hash.
type Copies = HashMap<[u8; 32], Vec<ChunkRef>>;

/// The caller's pace, and whether it called this off.
struct Pace<'a> {
    step: Step<'a>,
    /// What it was not told of yet.
    untold: ByteCount,
    called_off: bool,
}

impl Pace<'_> {
    /// Counts bytes, and asks after each MiB; false when it is called off.
    fn count(&mut self, bytes: ByteCount) -> bool {
        self.untold.0 = self.untold.0.saturating_add(bytes.0);
        if self.untold < STEP_BYTES { !self.called_off } else { self.ask(ByteCount::ZERO) }
    }

    /// Counts bytes, and asks.
    fn ask(&mut self, bytes: ByteCount) -> bool {
        let told = self.untold.0.saturating_add(bytes.0);
        self.untold = ByteCount::ZERO;
        self.called_off = self.called_off || !(self.step)(ByteCount(told));
        !self.called_off
    }
}

impl Images {
    /// Mends what checks found, as far as it can be; `seen` is what they have read, of which a mend loses nothing. `find` is asked
    /// for data that no pack has any more, `step` for each chunk and each MiB.
    ///
    /// # Errors
    /// The file system's, of listing packs. What cannot be read or written stays as it is, and says so.
    pub fn mend(
        &self,
        losses: &Losses,
        seen: &RoaringTreemap,
        find: FindChunk<'_>,
        step: Step<'_>,
    ) -> Result<Mended, ImageError> {
        let mut pace = Pace { step, untold: ByteCount::ZERO, called_off: false };
        let mut mended = Mended::default();
        let copies = self.copies(losses, &mut pace)?;
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
            let whole =
                |ordinal| losses.is_whole(ChunkRef { hash: [0; 32], pack: number, ordinal }.place(), seen);
            let lost_of_it = (&lost[..], table.is_some());
            let why = self.mend_pack(number, lost_of_it, (&copies, find), &whole, &mut encoder, &mut pace);
            self.tell(number, &lost, table, &why, &mut pace, &mut mended);
        }
        mended.called_off = pace.called_off;
        Ok(mended)
    }

    /// Mends what was lost of a pack, and its table; gives why not all of what was found is back.
    fn mend_pack(
        &self,
        number: u32,
        (lost, table): (&[&LostChunk], bool),
        (copies, find): (&Copies, FindChunk<'_>),
        whole: Whole<'_>,
        encoder: &mut Encoder,
        pace: &mut Pace<'_>,
    ) -> Why {
        let mut why = Why::default();
        let (mut found, mut bytes, mut tried) = (Found::new(), 0, false);
        for lost in lost {
            if pace.called_off {
                return why;
            }
            let content = self.content_of(lost, copies, find);
            if !pace.ask(CHUNK_BYTES) {
                return why;
            }
            let Some(content) = content else { continue };
            let (header, stored) = encoder.encode(lost.kind(), lost.name, &content);
            bytes += stored.len();
            found.insert(lost.name.ordinal, (header, stored.into_owned()));
            if bytes >= FOUND_BYTES_MAX {
                self.put_back(number, std::mem::take(&mut found), whole, pace, &mut why);
                (bytes, tried) = (0, true);
            }
        }
        if !pace.called_off && (!found.is_empty() || (table && !tried)) {
            self.put_back(number, found, whole, pace, &mut why);
        }
        why
    }

    /// Reads once more what was lost of a pack; when this was called off nobody knows whether it is whole.
    fn tell(
        &self,
        number: u32,
        lost: &[&LostChunk],
        table: Option<&String>,
        why: &Why,
        pace: &mut Pace<'_>,
        mended: &mut Mended,
    ) {
        if let Some(what) = table {
            let whole = !pace.called_off && self.open_pack(number).is_ok_and(|pack| pack.broken().is_none());
            if whole {
                mended.tables.push(what.clone());
            } else {
                mended.left.push(Left { what: what.clone(), why: why.all.clone() });
            }
        }
        for lost in lost {
            let whole = !pace.called_off && self.content(&lost.name, lost.kind()).is_ok();
            if whole {
                mended.chunks.push(LostChunk::clone(lost));
            } else {
                mended.left.push(Left { what: lost.what().to_owned(), why: why.of(lost) });
            }
            pace.count(CHUNK_BYTES);
        }
    }

    /// Where chunks with the hashes of the lost ones are. A pack that cannot be read has none.
    fn copies(&self, losses: &Losses, pace: &mut Pace<'_>) -> Result<Copies, ImageError> {
        let mut copies: Copies = losses.chunks.values().map(|lost| (lost.name.hash, Vec::new())).collect();
        if copies.is_empty() {
            return Ok(copies);
        }
        for number in self.numbers()? {
            let pack = self.open_pack(number).ok();
            let lines = pack.as_ref().map_or(&[][..], Pack::lines);
            for line in lines {
                let Some(places) = copies.get_mut(&line.hash) else { continue };
                let place = ChunkRef { hash: line.hash, pack: number, ordinal: line.ordinal };
                if places.len() < COPIES_MAX && !losses.chunks.contains_key(&place.place()) {
                    places.push(place);
                }
            }
            if !pace.ask(table_bytes(lines)) {
                break;
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
}
