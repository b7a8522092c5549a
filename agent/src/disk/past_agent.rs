//! Who writes the image past the agent: a QEMU that has it open itself, as its locks tell, and whoever writes a raw file
//! while nobody uses the disk, as its time tells ([`Life`](super::life::Life)). Nothing keeps them away, so that the image
//! can be given back at any moment; what they write is in no point.
//!
//! From the first look that sees them nothing is forwarded until everything was compared: what the receiver had of the disk
//! meanwhile would be points of what the disk never was. So the history has a hole there.
//!
//! Invariant: that somebody was seen is in the disk's record, and told, until everything was compared, from a moment on at
//! which nobody was seen any more. As long as the record says so nothing that was saved of the disk is trusted.

use std::{io, rc::Rc, sync::Arc};

use backtide_io_filter::Filter;
use backtide_storage::ImageFile;

use super::{
    engine::{Engine, Kick},
    local::blocking,
};

/// What a person has to do of it.
const QEMU_IS_THERE: &str = "a QEMU has the image itself open, to write it: what it writes is in no point; have it use the disk's NBD export; \
     when it has let go of the image, everything is compared";

/// What the agent does of it.
const IS_COMPARED: &str = "somebody else has written the image past the agent, or may have: what was written so is in no point before \
     everything was compared, which happens by itself as soon as the receiver is there";

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

    /// Whether everything is to be compared that is not being compared yet.
    pub(super) fn is_compare_due(&self) -> bool {
        self.wrote && !self.compares
    }

    /// For people.
    pub(super) fn trouble(&self) -> Option<String> {
        self.wrote.then(|| if self.qemu { QEMU_IS_THERE } else { IS_COMPARED }.to_owned())
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
        assert!(past.is_there() && past.is_compare_due());
        assert_eq!(past.trouble().as_deref(), Some(QEMU_IS_THERE));
        past.saw(Ok(false), false, "vm1");
        assert!(!past.is_there() && past.wrote());
        assert_eq!(past.trouble().as_deref(), Some(IS_COMPARED));
    }
}
