//! Where what has to outlive the agent is written: the tracking file with the sign of life in it, and the spill.
//!
//! Invariant: a tracking file that is begun anew has the sign of life before the filter hears of it, and so before it says
//! anything that the sign vouches for.

use std::{
    cell::{Cell, RefCell},
    io,
    rc::Rc,
};

use backtide_io_filter::{TrackingOp, Untracked};
use backtide_spill::{Recovered, SpillFiles};
use backtide_tracking::{ActivityLimits, SignOfLife, Snapshot, TrackingFile};
use backtide_units::{ByteCount, DiskName};

use super::local::blocking;
use crate::{record::Records, spill::OpenedSpill};

/// See the module's description. All of it is used on the disk's own thread.
pub(crate) struct Tracking {
    file: Signed,
    /// How its file is made.
    limits: ActivityLimits,
    size: ByteCount,
    records: Records,
    disk: DiskName,
    pub(super) spill: Option<SpillFiles>,
    /// Why there is none, although there should be one.
    pub(super) spill_error: Option<String>,
}

/// What a person does about a state directory that cannot be written.
pub(super) fn way_out(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => "make room there",
        _ => "have it written to again",
    }
}

/// The tracking file as it is now, and what its sign of life is to say.
struct Signed {
    file: RefCell<TrackingFile>,
    sign: Cell<SignOfLife>,
}

impl Tracking {
    /// Of an attach with this file, in which `sign` is. With a spill, if it could be opened; gives what the last attach left
    /// in it.
    pub(crate) fn new(
        (file, sign): (TrackingFile, SignOfLife),
        (limits, size): (ActivityLimits, ByteCount),
        records: Records,
        disk: DiskName,
        spill: Option<OpenedSpill>,
    ) -> (Rc<Self>, Option<Recovered>) {
        let (opened, spill_error) = match spill {
            Some(Ok(opened)) => (Some(opened), None),
            Some(Err(error)) => (None, Some(error)),
            None => (None, None),
        };
        let (spill, left) = opened.unzip();
        let file = Signed { file: RefCell::new(file), sign: Cell::new(sign) };
        (Rc::new(Self { file, limits, size, records, disk, spill, spill_error }), left)
    }

    /// Does what the filter asks for; with what a snapshot took.
    pub(super) async fn carry_out(&self, op: TrackingOp) -> io::Result<ByteCount> {
        let (file, records, disk) = (self.file(), self.records.clone(), self.disk.clone());
        match op {
            TrackingOp::Record(record) => blocking(move || file.write_record(&record)).await?,
            TrackingOp::Snapshot(snapshot) => return blocking(move || file.write_snapshot(&snapshot)).await,
            TrackingOp::Discard => blocking(move || records.discard_tracking(&disk)).await?,
            TrackingOp::Begin(snapshot) => self.begin_anew(snapshot).await?,
        }
        Ok(ByteCount::ZERO)
    }

    async fn begin_anew(&self, snapshot: Box<Snapshot>) -> io::Result<()> {
        let (records, disk) = (self.records.clone(), self.disk.clone());
        let (limits, size) = (self.limits, self.size);
        let make = move || records.begin_tracking_anew(&disk, limits, size, &snapshot);
        let file = blocking(make).await?;
        let mut signed = None;
        // It may be renewed in the old one meanwhile.
        while signed != Some(self.sign()) {
            let (file, sign) = (file.clone(), self.sign());
            blocking(move || file.sign(sign)).await?;
            signed = Some(sign);
        }
        self.file.file.replace(file);
        tracing::info!(disk = %self.disk, "the tracking file can be written again, and is begun anew");
        Ok(())
    }

    fn file(&self) -> TrackingFile {
        self.file.file.borrow().clone()
    }

    /// What the sign of life says, or is to say.
    pub(super) fn sign(&self) -> SignOfLife {
        self.file.sign.get()
    }

    /// Says that the agent is alive, as [`TrackingFile::sign`].
    ///
    /// # Errors
    /// The storage's. The sign is in the file then that is begun anew, if one is.
    pub(super) async fn renew(&self, sign: SignOfLife) -> io::Result<()> {
        self.file.sign.set(sign);
        let file = self.file();
        blocking(move || file.sign(sign)).await
    }

    /// What a person has to know of a file that is not kept, and what to do.
    pub(super) fn told(&self, untracked: Untracked) -> String {
        let Untracked { failure, stays } = untracked;
        let path = self.records.tracking_file(&self.disk);
        let (path, error) = (path.display(), io::Error::from_raw_os_error(failure.errno));
        let way = way_out(&error);
        match stays {
            true => format!(
                "the tracking file {path} can neither be written nor removed: {error}: writes to where nothing was written lately fail; {way}, and they succeed again"
            ),
            false => format!(
                "the tracking file {path} cannot be written: {error}: a crash of the agent costs a compare of the whole disk; {way}, and a new one is begun by itself"
            ),
        }
    }
}

#[cfg(test)]
mod tests;
