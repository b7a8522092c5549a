//! Removes what a store has of a disk that is going: overlays, what was wanted of it, what was found, its logs.
//!
//! Every step may be done again, so a start after a crash does all of them. The tombstone says *gone* only when
//! everything is durably removed. Chunks of its images are no business of this: no base names them any more.

use std::{io, path::Path};

use crate::{
    Shelf, disks::DISKS, findings::Findings, forgotten::Tombstone, fsck::CUT_DIR, overlays::Overlays,
    retention::Policies,
};
use backtide_recovery::forget_bases;
use backtide_storage::KillPoint;
use backtide_units::DiskId;

/// What knows of disks, beside their logs.
#[derive(Clone)]
pub(crate) struct Removal {
    pub(crate) shelf: Shelf,
    pub(crate) overlays: Overlays,
    pub(crate) policies: Policies,
    pub(crate) findings: Findings,
}

impl Removal {
    /// Removes the rest of every disk that is going, before anybody asks for one; blocks.
    pub(crate) fn finish_all(&self) {
        for (disk, stone) in self.shelf.forgotten.going() {
            let Some(_asked) = self.shelf.forgotten.ask(disk) else { continue };
            match self.finish(disk, stone) {
                Ok(()) => tracing::info!(%disk, "the rest of a forgotten disk is removed"),
                Err(why) => tracing::error!(%disk, why, "a forgotten disk cannot be removed"),
            }
        }
    }

    /// Removes what is left of a disk that is going; blocks.
    ///
    /// # Errors
    /// A sentence; the disk goes on going.
    pub(crate) fn finish(&self, disk: DiskId, stone: Tombstone) -> Result<(), String> {
        let gone = Tombstone { gone: true, ..stone };
        let removed = self.remove(disk).inspect(|()| KillPoint::ForgetRemoved.reached());
        let finished = removed.and_then(|()| self.shelf.forgotten.note(disk, gone));
        if let Err(why) = &finished {
            self.shelf.forgotten.note_problem(disk, why.clone());
        }
        finished
    }

    fn remove(&self, disk: DiskId) -> Result<(), String> {
        for id in self.overlays.of_disk(disk) {
            self.overlays.discard(&id, true).map_err(|error| error.message)?;
        }
        let storage = &self.shelf.storage;
        let dir = Shelf::dir(disk, 1);
        let cut = Path::new(CUT_DIR);
        let removed = match storage.list(cut) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            listed => listed
                .and_then(|_| storage.remove_tree(&cut.join(disk.to_string())))
                .and_then(|()| storage.sync_dir(cut)),
        };
        removed
            .and_then(|()| forget_bases(&**storage, &dir))
            .and_then(|()| storage.remove_tree(&dir))
            .and_then(|()| storage.sync_dir(Path::new(DISKS)))
            .map_err(|error| format!("remove {}: {error}", storage.display(&dir).display()))?;
        self.findings.forget_all(disk);
        self.policies.forget(disk).map_err(|error| error.to_string())?;
        self.shelf.names.release(disk);
        Ok(())
    }
}
