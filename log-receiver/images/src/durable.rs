//! Which packs are known to be durable, and which are known not to be.
//!
//! A writer that dies between the trailer of a pack and its sync leaves one that reads whole out of memory, and nobody could tell
//! it from one that an image names. What of it is named again must be durable first, so each pack that this process did not
//! write is synced once before anything of it is named.
//!
//! Invariant: a file takes a number only as a new pack, of which nothing is known, or in place of another, and is durable then.

use std::sync::Mutex;

use roaring::RoaringBitmap;

use crate::{ImageError, Images, error::failed, store::lock};

/// See the module's description.
#[derive(Default)]
pub(crate) struct Durable(Mutex<Packs>);

#[derive(Default)]
struct Packs {
    synced: RoaringBitmap,
    /// A sync has failed: what memory has of such a pack the disk may not have, and a later sync does not tell.
    failed: RoaringBitmap,
}

impl Durable {
    /// A pack with this number begins, or has gone.
    pub(crate) fn forget(&self, pack: u32) {
        let mut packs = lock(&self.0);
        packs.synced.remove(pack);
        packs.failed.remove(pack);
    }

    /// All of it has been synced since it was written.
    pub(crate) fn synced(&self, pack: u32) {
        lock(&self.0).synced.insert(pack);
    }

    /// Whether something of it may be named, after a sync at the least.
    pub(crate) fn can_be_named(&self, pack: u32) -> bool {
        !lock(&self.0).failed.contains(pack)
    }
}

impl Images {
    /// Makes packs durable of which that is not known, but for their names.
    ///
    /// # Errors
    /// The file system's: then no writer names anything of that pack.
    pub(crate) fn make_durable(&self, packs: &RoaringBitmap) -> Result<(), ImageError> {
        let durable = &self.shared.durable;
        let unknown = packs - &lock(&durable.0).synced;
        for pack in unknown {
            let synced = self.open_file(pack)?.sync_data();
            if let Err(source) = synced {
                lock(&durable.0).failed.insert(pack);
                return Err(failed(format!("sync {}", self.name_of(pack).display()), source));
            }
            durable.synced(pack);
        }
        Ok(())
    }
}
