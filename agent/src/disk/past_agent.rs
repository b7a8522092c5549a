//! Who writes the image past the agent: a QEMU that has it open itself, as its locks tell, and whoever writes a raw file
//! while nobody uses the disk, as its time tells ([`Life`](super::life::Life)). Nothing keeps them away, so that the image
//! can be given back at any moment; what they write is in no point.
//!
//! From the first look that sees them nothing is forwarded and no pass reads: what the receiver had of the disk meanwhile would be
//! points of what the disk never was. The receiver hears at once that the history has a hole. When they have gone everything is
//! compared; the hole ends with that, and the guest's writes may be forwarded while it runs.
//!
//! Invariant: that somebody was seen is in the disk's record, and told, until everything was compared, from a moment on at
//! which nobody was seen any more. As long as the record says so nothing that was saved of the disk is trusted.

use std::{io, rc::Rc, sync::Arc};

use backtide_agent_api::{DiskStatus, Mode};
use backtide_io_filter::Filter;
use backtide_storage::ImageFile;

use super::{
    engine::{Engine, Kick},
    local::blocking,
};
use crate::record::DiskRecord;

/// What a person has to do of it.
const QEMU_IS_THERE: &str = "a QEMU has the image itself open, to write it: what it writes is in no point; have it use the disk's NBD export; \
     when it has let go of the image, everything is compared";

/// When everything is compared, now that nobody writes it any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Compared {
    /// As soon as the receiver is there.
    ByItself,
    /// After a resume.
    AfterResume,
    /// Another agent has the disk.
    NotHere,
    /// The disk is not attached any more.
    AfterAttach,
}

impl Compared {
    /// Of a disk with this record, in this mode.
    pub(super) fn next(record: &DiskRecord, mode: Mode) -> Self {
        match mode {
            _ if record.fenced => Self::NotHere,
            Mode::Paused => Self::AfterResume,
            Mode::Sync | Mode::Resync | Mode::Tracking | Mode::Detached => Self::ByItself,
        }
    }

    /// What the agent does of what was written.
    fn told(self) -> String {
        let when = match self {
            Self::ByItself => "which happens by itself as soon as the receiver is there",
            Self::AfterResume => "which happens when the disk is resumed",
            Self::NotHere => "which does not happen here as long as another agent has the disk",
            Self::AfterAttach => "which happens after the next attach",
        };
        format!(
            "somebody else has written the image past the agent, or may have: what was written so is in no point before everything \
             was compared, {when}"
        )
    }
}

/// What is known of others that write the image of a disk.
#[derive(Debug)]
pub(super) struct PastAgent {
    /// As of the last look.
    qemu: bool,
    /// Somebody has written it between the last two looks.
    writes: bool,
    /// Somebody may have written it since everything was compared last.
    wrote: bool,
    /// Since nobody is there any more everything is being compared, or waits for the receiver.
    compares: bool,
}

impl PastAgent {
    /// At an attach, which compares everything by itself if somebody may have `written` the image before, as the record
    /// says; `image` is none where its locks cannot be asked for.
    pub(super) fn new(image: Option<&ImageFile>, written: bool) -> Self {
        let qemu = image.is_some_and(|image| image.is_written_by_qemu().unwrap_or_default());
        Self { qemu, writes: false, wrote: written || qemu, compares: !qemu }
    }

    /// Looks who is there, and says so once; `writes` when somebody has written the image since the last look.
    pub(super) async fn look(&mut self, image: Option<&Arc<ImageFile>>, writes: bool, disk: &str) {
        let Some(image) = image.cloned() else { return };
        // A file system of another host may take its time.
        let found = blocking(move || image.is_written_by_qemu()).await;
        self.saw(found, writes, disk);
    }

    fn saw(&mut self, found: io::Result<bool>, writes: bool, disk: &str) {
        // No look is no news: who was there may write still.
        let qemu = found.unwrap_or(self.qemu);
        if writes && !self.wrote {
            tracing::warn!(disk, "somebody else has written the image, which only the agent is to write");
        }
        if qemu && !self.qemu {
            tracing::warn!(disk, "{QEMU_IS_THERE}");
        }
        (self.qemu, self.writes) = (qemu, writes);
        self.wrote |= self.is_there();
        // What was compared meanwhile may have been written after that.
        self.compares &= !self.is_there();
    }

    fn is_there(&self) -> bool {
        self.qemu || self.writes
    }

    /// Forwards nothing while somebody is there, has everything compared when nobody is any more, and forgets them when that
    /// has ended; whether it has now.
    pub(super) fn follow_up(&mut self, engine: &Rc<Engine>) -> bool {
        if !self.wrote {
            return false;
        }
        if self.is_there() {
            if engine.happen(Filter::is_written_past) {
                engine.end_stream(Kick::Operator("somebody else writes the image: nothing is read of it"));
            }
            return false;
        }
        let disk = engine.name();
        if !self.compares {
            tracing::warn!(%disk, "nobody else writes the image any more: everything is compared");
            engine.happen(Filter::was_written_past);
            self.compares = true;
        } else if engine.look(Filter::owes_no_resync) {
            tracing::info!(%disk, "what was written past the agent is at the receiver");
            self.wrote = false;
        }
        !self.wrote
    }

    /// Whether the receiver may lack what was written past the agent: nothing that is saved of the disk can be trusted.
    pub(super) fn wrote(&self) -> bool {
        self.wrote
    }

    /// Completes the status of the disk with this record.
    pub(super) fn tell(&self, status: &mut DiskStatus, record: &DiskRecord) {
        let compared = Compared::next(record, status.mode);
        status.local_error = status.local_error.take().or_else(|| self.trouble(compared));
        status.open_elsewhere = self.qemu;
        // Also what waits for them to go.
        status.resync_due |= self.wrote && !self.compares;
    }

    /// For people.
    pub(super) fn trouble(&self, compared: Compared) -> Option<String> {
        self.wrote.then(|| if self.qemu { QEMU_IS_THERE.to_owned() } else { compared.told() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_was_there_is_there_until_a_look_says_otherwise() {
        let mut past = PastAgent::new(None, false);
        let fails = || Err(io::Error::from(rustix::io::Errno::NOLCK));
        past.saw(fails(), false, "vm1");
        assert!(!past.wrote(), "nobody was seen");
        past.saw(Ok(true), false, "vm1");
        past.saw(fails(), false, "vm1");
        assert!(past.is_there() && !past.compares);
        assert_eq!(past.trouble(Compared::ByItself).as_deref(), Some(QEMU_IS_THERE));
        past.saw(Ok(false), false, "vm1");
        assert!(!past.is_there() && past.wrote());
        for (compared, when) in [
            (Compared::ByItself, "as soon as the receiver is there"),
            (Compared::AfterResume, "when the disk is resumed"),
            (Compared::NotHere, "as long as another agent has the disk"),
            (Compared::AfterAttach, "after the next attach"),
        ] {
            assert!(past.trouble(compared).unwrap().ends_with(when));
        }
    }
}
