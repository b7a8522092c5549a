//! Giving back the room of chunks that no image has any more.
//!
//! Packs without such a chunk stay as they are; packs with nothing else are removed; those of which half is of no use are
//! written anew without it, under the same name and with the same addresses. So references never change, and a reader that
//! has the old file open goes on with it.
//!
//! Invariants: a chunk stays when an image whose root is given, or that somebody has open, reaches it; when a node cannot be
//! read, nothing is removed, for nobody knows what it names. The caller gives every root that is durable anywhere, and runs
//! no writer beside it.

use std::{collections::HashSet, io, path::Path};

use backtide_units::ByteCount;
use roaring::RoaringTreemap;

use crate::{
    ImageError, Images, Root,
    chunk::ChunkRef,
    error::failed,
    pack::{Line, Pack},
    pack_writer::PackWriter,
    store::{PACKS_DIR, lock, path_of},
};

/// What a collection did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Collected {
    /// Packs that were removed.
    pub removed: u64,
    /// Packs that were written anew.
    pub rewritten: u64,
    /// Bytes of files that this gave back.
    pub bytes: ByteCount,
}

impl Images {
    /// Removes what no image with one of `roots` has, nor any that is open.
    ///
    /// # Errors
    /// [`ImageError::Damaged`] when a node cannot be read, and the file system's: what was not removed then is removed
    /// the next time.
    pub fn collect(&self, roots: &[Root]) -> Result<Collected, ImageError> {
        let _alone = lock(&self.shared.rewriting);
        // An image that is opened from now on has one of the roots.
        let held = self.held();
        let mut live = RoaringTreemap::new();
        for root in roots.iter().chain(&held) {
            self.shared.numbers.named(root.top.pack);
            self.mark(&root.top, root.height, &mut live)?;
        }
        let mut collected = Collected::default();
        let mut changed = self.remove_leftovers()?;
        let mut part = Vec::new();
        // What makes room first, whatever state its file is in: writing anew needs some.
        for number in self.numbers()? {
            let first = u64::from(number) << 32;
            let alive = live.rank(first | u64::from(u32::MAX)) - live.rank(first - 1);
            if alive > 0 {
                part.push((number, alive));
                continue;
            }
            let length = self.length(number)?;
            self.shared.storage.remove(&path_of(number)).map_err(|e| self.failed("remove", number, e))?;
            self.forget_pack(number);
            self.shared.durable.forget(number);
            collected.removed += 1;
            collected.bytes.0 += length;
            changed = true;
        }
        for (number, alive) in part {
            let pack = self.open_pack(number)?;
            if pack.broken().is_some()
                || alive as usize >= pack.lines().len()
                || !is_half_dead(number, &pack, &live)
            {
                continue;
            }
            let before = self.length(number)?;
            match self.rewrite(number, &pack, &live) {
                Ok(false) => {}
                Ok(true) => {
                    collected.rewritten += 1;
                    collected.bytes.0 += before.saturating_sub(self.length(number)?);
                    changed = true;
                }
                // Another may be shorter; what was begun of this one goes, and needs no room meanwhile.
                Err(ImageError::Full { .. }) => {
                    self.remove_leftovers()?;
                }
                Err(error) => return Err(error),
            }
        }
        if changed {
            let dir = Path::new(PACKS_DIR);
            let storage = &self.shared.storage;
            let synced = storage.sync_dir(dir);
            synced.map_err(|source| failed(format!("sync {}", storage.display(dir).display()), source))?;
        }
        Ok(collected)
    }

    fn mark(&self, name: &ChunkRef, level: u8, live: &mut RoaringTreemap) -> Result<(), ImageError> {
        if name.is_zeroes() || !live.insert(name.place()) {
            return Ok(());
        }
        let Some(below) = level.checked_sub(1) else { return Ok(()) };
        let node = self.node(name, level)?;
        for child in &node.children {
            self.mark(child, below, live)?;
        }
        Ok(())
    }

    /// Writes a pack without what nobody has. A chunk that is damaged keeps its pack as it is.
    fn rewrite(&self, number: u32, pack: &Pack, live: &RoaringTreemap) -> Result<bool, ImageError> {
        let kept: Vec<&Line> = pack.lines().iter().filter(|line| is_live(number, line, live)).collect();
        for line in &kept {
            match pack.stored(line) {
                Ok(_) => {}
                Err(ImageError::Damaged { .. }) => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        let storage = &self.shared.storage;
        let beside = path_of(number).with_extension("new");
        let fail = |source| self.failed("write", number, source);
        let file = storage.create_new(&beside).map_err(fail)?;
        let mut writer = PackWriter::new(file, self.name_of(number), number);
        for line in kept {
            let (header, stored) = pack.stored(line)?;
            writer.append(&header, &stored)?;
        }
        writer.finish()?;
        storage.rename(&beside, &path_of(number)).map_err(fail)?;
        self.forget_pack(number);
        Ok(true)
    }

    /// Removes what a rewrite left that was cut short.
    pub(crate) fn remove_leftovers(&self) -> Result<bool, ImageError> {
        let storage = &self.shared.storage;
        let dir = Path::new(PACKS_DIR);
        let names = match storage.list(dir) {
            Ok(names) => names,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(source) => return Err(failed(format!("list {}", storage.display(dir).display()), source)),
        };
        let mut any = false;
        for name in names.iter().filter(|name| name.ends_with(".new")) {
            let path = dir.join(name);
            let removed = storage.remove(&path);
            removed.map_err(|e| failed(format!("remove {}", storage.display(&path).display()), e))?;
            any = true;
        }
        Ok(any)
    }

    fn length(&self, number: u32) -> Result<u64, ImageError> {
        let file = self.shared.storage.open(&path_of(number)).and_then(|file| file.len());
        Ok(file.map_err(|source| self.failed("read", number, source))?.0)
    }

    fn failed(&self, what: &str, number: u32, source: io::Error) -> ImageError {
        failed(format!("{what} {}", self.name_of(number).display()), source)
    }
}

fn is_live(number: u32, line: &Line, live: &RoaringTreemap) -> bool {
    live.contains(u64::from(number) << 32 | u64::from(line.ordinal))
}

/// Whether half of a pack or more is of no use. The second of a node is of as much use as the first.
fn is_half_dead(number: u32, pack: &Pack, live: &RoaringTreemap) -> bool {
    let alive = pack.lines().iter().filter(|line| is_live(number, line, live)).map(|line| line.hash);
    let alive: HashSet<[u8; 32]> = alive.collect();
    let Some(lengths) = pack.lengths() else { return false };
    let used: u64 =
        lengths.iter().filter(|(line, _)| alive.contains(&line.hash)).map(|(_, length)| length).sum();
    used <= pack.chunk_bytes() / 2
}
