//! Where the disks' spills are: a directory for all, files of its own for each disk.
//!
//! A spill that cannot be used keeps no disk from being attached: it is said, loudly, and the disk does
//! without.

use std::{path::PathBuf, sync::Arc};

use backtide_io_filter::Settings;
use backtide_spill::{Recovered, RingLimits, SpillFiles};
use backtide_storage::RealStorage;
use backtide_units::{BlockRange, ByteCount, DiskId};

/// What a disk may spill when a directory is named and no size.
pub(crate) const SPILL_SIZE_DEFAULT: ByteCount = ByteCount(4 << 30);

/// With less there would be no room for a few of the longest writes.
pub(crate) const SPILL_SIZE_MIN: ByteCount = ByteCount(1 << 20);

/// Where spills are, and how large each may be.
#[derive(Clone, Debug)]
pub(crate) struct SpillPlace {
    pub(crate) directory: PathBuf,
    /// Of each disk.
    pub(crate) bytes: ByteCount,
}

/// A disk's spill at its attach: its files and what the last attach left in them, or why there is none.
pub(crate) type OpenedSpill = Result<(SpillFiles, Recovered), String>;

impl SpillPlace {
    /// Looks for what was left, which is read as a whole.
    pub(crate) fn open(&self, settings: &Settings) -> OpenedSpill {
        let disk = &settings.name;
        let opened = self.recover(settings);
        if let Err(error) = &opened {
            tracing::error!(%disk, error, "the spill cannot be used: a longer outage will be tracked");
        }
        opened
    }

    /// Removes what was left of a disk, durably.
    ///
    /// # Errors
    /// Why something may be left.
    pub(crate) fn discard(&self, disk: DiskId) -> Result<(), String> {
        let named = |error: std::io::Error| format!("{}: {error}", self.directory.display());
        let storage = Arc::new(RealStorage::open(&self.directory).map_err(named)?);
        let files = SpillFiles::new(storage, disk, self.bytes);
        let numbers = files.list().map_err(|error| error.to_string())?;
        files.remove(&numbers).map_err(|error| error.to_string())
    }

    fn recover(&self, settings: &Settings) -> OpenedSpill {
        let disk = &settings.name;
        let named = |error: std::io::Error| format!("{}: {error}", self.directory.display());
        let storage = Arc::new(RealStorage::open(&self.directory).map_err(named)?);
        let files = SpillFiles::new(storage, settings.disk, self.bytes);
        let end = BlockRange::whole_disk(settings.size).end();
        let limits = RingLimits::new(self.bytes, settings.window_bytes, settings.bitmap_bytes, end);
        let recovered = files.recover(limits).map_err(|error| error.to_string())?;
        if let Some(why) = &recovered.cut {
            tracing::warn!(%disk, why, "the spill of the last attach counts up to here only");
        }
        if !recovered.ring.is_empty() {
            let (from, to) = (recovered.ring.base(), recovered.ring.end());
            tracing::info!(%disk, %from, %to, "the last attach left records in the spill");
        }
        let room = files.room().map_err(|error| error.to_string())?.0 + recovered.ring.bytes().0;
        if room < self.bytes.0 {
            let directory = files.directory();
            tracing::warn!(%disk, directory = %directory.display(), room, limit = %self.bytes, "the spill has less room than it may take");
        }
        Ok((files, recovered))
    }
}
