//! Writes a pack anew with chunks that were found: beside the old one, read back, renamed over it.

use std::{collections::BTreeSet, error::Error as _, path::Path};

use backtide_units::{ByteCount, ByteRange};

use super::{Found, Pace, Whole, Why};
use crate::{
    ImageError, Images,
    chunk::Kind,
    error::failed,
    pack::{Line, Pack, table_bytes},
    pack_writer::PackWriter,
    store::{PACKS_DIR, lock, path_of},
};

/// No pack has more chunks than these bytes, nodes twice.
const REWRITTEN_BYTES_MAX: u64 = 3 << 30;

/// Header, trailer, and what the file system needs for a name.
const AROUND_BYTES: u64 = 64 << 10;

/// What became of it.
enum Replaced {
    Done,
    CalledOff,
    Cannot(String),
}

/// A pack before it is mended.
struct Before {
    /// None when its file is missing.
    pack: Option<Pack>,
    /// Its chunks, whole or not, with the bytes that each takes.
    kept: Vec<(Line, u64)>,
}

impl Before {
    /// The ordinals of those that the pack has otherwise.
    fn others_than(&self, found: &Found) -> impl Iterator<Item = u32> {
        let another =
            |line: &Line| found.get(&line.ordinal).is_some_and(|(header, _)| header.name.hash != line.hash);
        self.kept.iter().map(|(line, _)| line).filter(move |line| another(line)).map(|line| line.ordinal)
    }
}

impl Images {
    /// Writes a pack anew with these chunks, but for those in whose place it has another; says why, unless it was called off.
    /// Of `whole` chunks nothing may be lost by it.
    pub(super) fn put_back(
        &self,
        number: u32,
        found: Found,
        whole: Whole<'_>,
        pace: &mut Pace<'_>,
        why: &mut Why,
    ) {
        let _alone = lock(&self.shared.rewriting);
        let Some(_number) = self.shared.numbers.mend(number) else {
            why.all = Some("the pack is being written".to_owned());
            return;
        };
        let tried = self.remove_leftovers();
        let tried = tried.and_then(|_| self.replace(number, found, whole, pace, &mut why.taken));
        match tried {
            Ok(Replaced::Done) => return,
            Ok(Replaced::CalledOff) => {}
            Ok(Replaced::Cannot(cannot)) => why.all = Some(cannot),
            Err(error) => {
                let source = error.source().map(|source| format!(": {source}")).unwrap_or_default();
                why.all = Some(format!("{error}{source}"));
            }
        }
        // Its room is given back at once, where that can be done.
        let _ = self.remove_leftovers();
    }

    fn replace(
        &self,
        number: u32,
        mut found: Found,
        whole: Whole<'_>,
        pace: &mut Pace<'_>,
        taken: &mut BTreeSet<u32>,
    ) -> Result<Replaced, ImageError> {
        let before = match self.before(number, &found)? {
            Ok(before) => before,
            Err(why) => return Ok(Replaced::Cannot(why)),
        };
        taken.extend(before.others_than(&found));
        found.retain(|ordinal, _| !taken.contains(ordinal));
        let is_broken = before.pack.as_ref().is_none_or(|pack| pack.broken().is_some());
        if found.is_empty() && !is_broken {
            return Ok(Replaced::Done);
        }
        let found = &found;
        if let Some(why) = self.no_room(&before, found)? {
            return Ok(Replaced::Cannot(why));
        }
        let unread = match self.write_beside(number, &before, found, whole, pace)? {
            Ok(unread) => unread,
            Err(not_written) => return Ok(not_written),
        };
        let storage = &self.shared.storage;
        let name = self.name_of(number);
        let fail = |source| failed(format!("write {}", name.display()), source);
        let beside = path_of(number).with_extension("new");
        let written = Pack::open(storage.open(&beside).map_err(fail)?, name.clone(), number)?;
        if let Some(broken) = written.broken() {
            return Ok(Replaced::Cannot(format!("what was written beside it reads otherwise: {broken}")));
        }
        for (header, _) in found.values() {
            written.chunk(&header.name)?;
            if !pace.count(ByteCount(header.whole())) {
                return Ok(Replaced::CalledOff);
            }
        }
        if !pace.ask(ByteCount::ZERO) {
            return Ok(Replaced::CalledOff);
        }
        // What the device fails to read for a moment is not lost.
        if let Some(old) = &before.pack
            && old.any_can_be_read(&unread)?
        {
            return Ok(Replaced::Cannot(
                "a place of the pack that could not be read can be read again".to_owned(),
            ));
        }
        storage.rename(&beside, &path_of(number)).map_err(fail)?;
        self.forget_pack(number);
        let dir = Path::new(PACKS_DIR);
        let synced = storage.sync_dir(dir);
        synced.map_err(|source| failed(format!("sync {}", storage.display(dir).display()), source))?;
        Ok(Replaced::Done)
    }

    /// The pack as it is now, if these chunks can be put into it; else why not.
    fn before(&self, number: u32, found: &Found) -> Result<Result<Before, String>, ImageError> {
        let pack = match self.open_pack(number) {
            Ok(pack) => pack,
            Err(ImageError::Damaged { .. }) if !found.is_empty() => {
                return Ok(Ok(Before { pack: None, kept: Vec::new() }));
            }
            Err(error) => return Err(error),
        };
        if !pack.has_all_its_lines()? {
            return Ok(
                Err("the pack's table is damaged and so is a chunk's header before others".to_owned()),
            );
        }
        let Some(kept) = pack.lengths() else {
            return Ok(Err("the pack's chunks do not lie in their order".to_owned()));
        };
        if kept.iter().map(|(_, length)| length).sum::<u64>() > REWRITTEN_BYTES_MAX {
            return Ok(Err("the pack is longer than any can be".to_owned()));
        }
        Ok(Ok(Before { pack: Some(pack), kept }))
    }

    /// What new data needs is not a mend's: says so when too little would be left.
    fn no_room(&self, before: &Before, found: &Found) -> Result<Option<String>, ImageError> {
        let kept: u64 = before.kept.iter().map(|(_, length)| length).sum();
        let table = before.pack.as_ref().map_or(ByteCount::ZERO, |pack| table_bytes(pack.lines()));
        let twice = |kind: Kind| if kind == Kind::Data { 1 } else { 2 };
        let found: u64 = found.values().map(|(header, _)| header.whole() * twice(header.kind)).sum();
        let needed = kept + table.0 + found + AROUND_BYTES;
        let storage = &self.shared.storage;
        let free =
            storage.free_space().map_err(|source| failed("see how much is free".to_owned(), source))?;
        let reserve = self.shared.limits.free_bytes_min;
        let why = || {
            format!(
                "no space left to write its pack anew: that takes {needed} bytes, {free} are free, and {reserve} of \
                 them are to stay free"
            )
        };
        Ok((free.0 < needed.saturating_add(reserve.0)).then(why))
    }

    /// Writes all of the pack beside it, durably but for its name; gives the places of the old one for which it has zeroes.
    fn write_beside(
        &self,
        number: u32,
        before: &Before,
        found: &Found,
        whole: Whole<'_>,
        pace: &mut Pace<'_>,
    ) -> Result<Result<Vec<ByteRange>, Replaced>, ImageError> {
        let name = self.name_of(number);
        let file = self.shared.storage.create_new(&path_of(number).with_extension("new"));
        let file = file.map_err(|source| failed(format!("write {}", name.display()), source))?;
        let mut writer = PackWriter::new(file, name, number);
        let mut new = found.iter().peekable();
        let mut unread = Vec::new();
        for (line, length) in &before.kept {
            while let Some((_, (header, stored))) = new.next_if(|(ordinal, _)| **ordinal < line.ordinal) {
                writer.append(header, stored)?;
            }
            match (new.next_if(|(ordinal, _)| **ordinal == line.ordinal), &before.pack) {
                (Some((_, (header, stored))), _) => writer.append(header, stored)?,
                (None, Some(old)) => {
                    let known = unread.len();
                    let bytes = old.as_it_is(line, *length, &mut unread)?;
                    if unread.len() > known && whole(line.ordinal) {
                        let why = "a chunk of the pack that was whole cannot be read now";
                        return Ok(Err(Replaced::Cannot(why.to_owned())));
                    }
                    writer.append_as_it_is(line, &bytes)?;
                }
                (None, None) => unreachable!("lines are of an old pack"),
            }
            if !pace.count(ByteCount(*length)) {
                return Ok(Err(Replaced::CalledOff));
            }
        }
        for (_, (header, stored)) in new {
            writer.append(header, stored)?;
            if !pace.count(ByteCount(header.whole())) {
                return Ok(Err(Replaced::CalledOff));
            }
        }
        writer.finish()?;
        Ok(Ok(unread))
    }
}
