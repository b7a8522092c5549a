//! Gives room back: segments that logs do without and no reader has, and what no image has any more.
//!
//! Invariant: no image goes unless the base of every log was read, also of one whose directory is away, for nobody else knows
//! which there are.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use backtide_images::Root;
use backtide_recovery::{Apart, Elsewhere, FoundBase, remove_unused};
use backtide_units::{ByteCount, DiskId};

use super::{Work, lock};
use crate::{Shelf, disk::chain, disks::DISKS};

impl Work {
    /// Removes segments and chunks that nobody has.
    pub(super) fn give_room_back(&mut self) -> Result<(), String> {
        let mut roots: Vec<Root> = Vec::new();
        let mut left = BTreeMap::<DiskId, ByteCount>::new();
        let elsewhere = Elsewhere::list(&*self.shelf.storage).map_err(|error| chain(&error))?;
        let logs = self.logs()?;
        let mut wrong = self.keep_apart(elsewhere, &logs, &mut roots).err();
        // One log that cannot be read keeps only its own segments, and the images of all.
        for (disk, dir) in logs {
            let known = match self.remove_segments(&dir, &mut roots) {
                Ok(known) => known,
                // Half of it is gone: nobody has it any more.
                Err(_) if self.shelf.forgotten.is_going(disk) => continue,
                Err(why) => {
                    wrong.get_or_insert(why);
                    // Nobody knows: at least something.
                    ByteCount(1)
                }
            };
            left.entry(disk).or_default().0 += known.0;
        }
        self.left = Some(left);
        if let Some(why) = wrong {
            return Err(why);
        }
        if self.collect {
            let images = self.shelf.cache.images(&self.shelf.storage);
            let collected = images.collect(&roots).map_err(|error| chain(&error))?;
            lock(&self.shared.status).freed.0 += collected.bytes.0;
            self.collect = false;
        }
        Ok(())
    }

    /// Removes a log's segments that nobody has, and adds the images it has; gives the bytes that readers hold.
    fn remove_segments(&self, dir: &Path, roots: &mut Vec<Root>) -> Result<ByteCount, String> {
        let storage = &*self.shelf.storage;
        let removed = remove_unused(storage, dir, &self.shelf.cache).map_err(|error| chain(&error));
        let found = FoundBase::read(storage, dir).map_err(|error| chain(&error))?;
        if let (None, Some(why)) = (&found.base, found.damage.first()) {
            return Err(format!("nobody knows which images a log has: {why}"));
        }
        roots.extend(found.roots);
        let removed = removed?;
        lock(&self.shared.status).freed.0 += removed.bytes.0;
        Ok(removed.left)
    }

    /// Adds the images of logs whose directories are away: those may be put back.
    fn keep_apart(
        &self,
        elsewhere: Elsewhere,
        logs: &[(DiskId, PathBuf)],
        roots: &mut Vec<Root>,
    ) -> Result<(), String> {
        let dirs: Vec<PathBuf> = logs.iter().map(|(_, dir)| dir.clone()).collect();
        // After the logs were listed: one that goes since then is no disk that is away.
        let going: Vec<PathBuf> =
            self.shelf.forgotten.going().iter().map(|(disk, _)| Shelf::dir(*disk, 1)).collect();
        let apart = elsewhere.without(&*self.shelf.storage, &dirs, &going).map_err(|error| {
            let why = chain(&error);
            format!("nobody knows which images a log has whose directory is missing: {why}")
        })?;
        let mut told = Vec::new();
        for Apart { file, disk, roots: named } in apart {
            roots.extend(named);
            // To forget it would take the other logs of the disk as well.
            let or = match logs.iter().any(|(known, _)| *known == disk) {
                true => "let go of them by removing that file".to_owned(),
                false => format!("let go of them with `backtide forget {disk} --yes`"),
            };
            told.push(format!(
                "a directory of disk {disk} is missing in {}, and the images that {} names stay: put it back and start the \
                 receiver again, or {or}",
                self.shelf.storage.display(Path::new(DISKS)).display(),
                file.display()
            ));
        }
        let mut status = lock(&self.shared.status);
        for why in told.iter().filter(|why| !status.apart.contains(why)) {
            tracing::warn!(why, "images of a disk that is away stay");
        }
        status.apart = told;
        Ok(())
    }

    /// Removes the segments of a disk's logs that nobody has. What stands against it is told at the end of the round.
    pub(super) fn remove_segments_of(&self, disk: DiskId) {
        let Ok(numbers) = self.shelf.numbers(disk) else { return };
        for number in numbers {
            let _ = self.remove_segments(&Shelf::dir(disk, number), &mut Vec::new());
        }
    }

    /// The directories of all logs, whether or not they are in use.
    fn logs(&self) -> Result<Vec<(DiskId, PathBuf)>, String> {
        let mut logs = Vec::new();
        for disk in self.shelf.list().map_err(|error| chain(&error))? {
            let numbers = self.shelf.numbers(disk).map_err(|error| chain(&error))?;
            logs.extend(numbers.into_iter().map(|number| (disk, Shelf::dir(disk, number))));
        }
        Ok(logs)
    }
}
