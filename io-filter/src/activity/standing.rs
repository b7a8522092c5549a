//! A tracking file that cannot be written: it is given up, and begun anew when there is a place for one again.
//!
//! Invariants: after a crash nobody believes a file that failed: it is removed, durably, before a change of a cold extent
//! goes on. Without one, and by the one that is begun anew, everything may differ: that is true at whatever moment the new
//! one gets its place, also of one that the driver could not finish, and no change waits for it. It is asked to know better
//! only when it is durable, and nothing is under way to the old one. The activity log in memory counts the changes under way through
//! all of that, so that the first snapshot that knows better has their extents.

use std::time::Duration;

use backtide_tracking::{DirtyBitmap, Snapshot};

use super::{Activity, COPIES, Parked};
use crate::{
    event::{Effect, IoFailure, IoId, TrackingOp},
    filter::{Filter, Mode},
    mutant::Mutant,
};

/// When a file that could not be removed is tried again.
const REMOVE_AGAIN: Duration = Duration::from_secs(5);

/// Where a file cannot be begun anew, or does not last so long as the longest pause, the next pause is twice as long, up to
/// so many times the first: each attempt costs syncs, and a place that is full stays so for a while.
const PAUSE_LAST: u32 = 6;

/// Why no activity log is kept of a disk that should have one: a crash of the agent means a compare of everything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Untracked {
    /// What became of the last attempt to write it, or to begin it anew.
    pub failure: IoFailure,
    /// It cannot be removed either: until it can, changes of extents that are not hot fail.
    pub stays: bool,
}

/// Where the file is.
///
/// ```text
///         a write fails           it is removed
///   Kept ──────────────▶ Failed ────────────────▶ Gone
///    ▲                   ▲    │ it is not          │ ▲ │ it cannot
///    │                   └────┘                    │ └─┘
///    └─────────────── a new one is durable ────────┘
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum File {
    /// In its place and written, since then.
    Kept {
        /// By the monotonic clock.
        since: Duration,
    },
    /// Nothing is written to it any more: it has to go.
    Failed {
        /// Its removal that is under way.
        removal: Option<IoId>,
        /// When it is removed at the latest, when none is.
        at: Duration,
    },
    /// There is none.
    Gone {
        /// The making of a new one that is under way.
        making: Option<IoId>,
        /// When that begins, when it is not.
        at: Duration,
    },
}

/// What happens to the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FileEvent {
    /// A record or a snapshot could not be written.
    WriteFailed(IoFailure),
    /// It is being removed.
    Removing(IoId),
    /// It was removed, durably, or could not be.
    Removed(Result<(), IoFailure>),
    /// A new one is being made.
    Making(IoId),
    /// A new one is in place, durably, or perhaps not.
    Made(Result<(), IoFailure>),
}

/// See the module's description.
#[derive(Clone, Debug)]
pub(crate) struct Standing {
    file: File,
    /// How long the first pause before it is begun anew is, and the next.
    first: Duration,
    pause: Duration,
    /// What there is to tell of it; nothing again when a snapshot of the new file is durable.
    untracked: Option<Untracked>,
}

impl Standing {
    /// Of a file that was just made; it is begun anew after a pause that is `first` so long.
    pub(super) fn new(first: Duration) -> Self {
        Self { file: File::Kept { since: Duration::ZERO }, first, pause: first, untracked: None }
    }

    /// Whether this operation removes the file, or makes a new one.
    pub(super) fn is_of_the_file(&self, io: IoId) -> bool {
        match self.file {
            File::Kept { .. } => false,
            File::Failed { removal: under_way, .. } | File::Gone { making: under_way, .. } => {
                under_way == Some(io)
            }
        }
    }

    /// What a crash costs is as it should be: there is nothing to tell any more.
    pub(super) fn is_tracked_again(&mut self) {
        self.untracked = None;
    }

    /// The file after `event`, at `now`.
    ///
    /// # Panics
    /// When that cannot happen to it.
    fn next(&mut self, event: FileEvent, now: Duration) {
        self.file = match (self.file, event) {
            (File::Kept { since }, FileEvent::WriteFailed(failure)) => {
                if now.saturating_sub(since) >= self.first * PAUSE_LAST {
                    self.pause = self.first;
                }
                self.untracked = Some(Untracked { failure, stays: false });
                File::Failed { removal: None, at: now }
            }
            // Something of the old file that was under way.
            (file @ (File::Failed { .. } | File::Gone { .. }), FileEvent::WriteFailed(_)) => file,
            (File::Failed { removal: None, at }, FileEvent::Removing(io)) => {
                File::Failed { removal: Some(io), at }
            }
            (File::Failed { removal: Some(_), .. }, FileEvent::Removed(Ok(()))) => {
                self.untracked = self.untracked.map(|told| Untracked { stays: false, ..told });
                File::Gone { making: None, at: now + self.take_pause() }
            }
            (File::Failed { removal: Some(_), .. }, FileEvent::Removed(Err(failure))) => {
                self.untracked = Some(Untracked { failure, stays: true });
                File::Failed { removal: None, at: now + REMOVE_AGAIN }
            }
            (File::Gone { making: None, at }, FileEvent::Making(io)) => File::Gone { making: Some(io), at },
            (File::Gone { making: Some(_), .. }, FileEvent::Made(Ok(()))) => File::Kept { since: now },
            (File::Gone { making: Some(_), .. }, FileEvent::Made(Err(failure))) => {
                self.untracked = Some(Untracked { failure, stays: false });
                File::Gone { making: None, at: now + self.take_pause() }
            }
            (
                file @ (File::Kept { .. } | File::Failed { .. } | File::Gone { .. }),
                event @ (FileEvent::Removing(_)
                | FileEvent::Removed(_)
                | FileEvent::Making(_)
                | FileEvent::Made(_)),
            ) => panic!("{event:?} cannot happen to a tracking file that is {file:?}"),
        };
    }

    fn take_pause(&mut self) -> Duration {
        let longer = (self.pause * 2).min(self.first * PAUSE_LAST);
        std::mem::replace(&mut self.pause, longer)
    }
}

impl Activity {
    /// Whether the file is written.
    pub(super) fn is_kept(&self) -> bool {
        matches!(self.standing.file, File::Kept { .. })
    }

    /// Why no activity log is kept, although one should be.
    pub(crate) fn untracked(&self) -> Option<Untracked> {
        self.standing.untracked
    }

    /// Whether the file is being removed or made, which nothing that a detach leaves there may meet.
    pub(crate) fn replaces_file(&self) -> bool {
        match self.standing.file {
            File::Kept { .. } => false,
            File::Failed { removal: under_way, .. } | File::Gone { making: under_way, .. } => {
                under_way.is_some()
            }
        }
    }

    /// When there is something to do for a file that is not kept.
    pub(super) fn next_for_file(&self) -> Option<Duration> {
        match self.standing.file {
            File::Failed { removal: None, at } => Some(at),
            // What is under way to the old one tells when it has ended.
            File::Gone { making: None, at } => {
                Some(at).filter(|_| self.record.is_none() && self.snapshot.is_none())
            }
            File::Kept { .. } | File::Failed { .. } | File::Gone { .. } => None,
        }
    }
}

impl Filter {
    /// The file cannot be written. Without it, a crash means a compare of everything, which has to be known before a cold
    /// extent is changed: so the file goes.
    pub(super) fn tracking_failed(&mut self, failure: IoFailure) {
        // What a detach has left there is another file.
        if !self.activity.is_kept() || self.mode == Mode::Detached {
            return;
        }
        if self.activity.untracked().is_none() {
            let (name, errno) = (&self.settings.name, failure.errno);
            self.effects.push_back(Effect::Alarm(format!(
                "disk {name}: the tracking file cannot be written (errno {errno}): it is given up until it can, and after a crash the whole disk will be compared"
            )));
        }
        self.file_happens(FileEvent::WriteFailed(failure));
        self.remove_file();
    }

    fn file_happens(&mut self, event: FileEvent) {
        self.activity.standing.next(event, self.now.monotonic);
    }

    /// Does what there is to do for a file that is not kept.
    pub(super) fn see_to_the_file(&mut self) {
        let due = self.activity.next_for_file().is_some_and(|at| at <= self.now.monotonic);
        match self.activity.standing.file {
            File::Failed { removal: None, .. } if due || self.activity.has_parked() => self.remove_file(),
            File::Gone { .. } if due => self.make_file(),
            File::Kept { .. } | File::Failed { .. } | File::Gone { .. } => {}
        }
    }

    fn remove_file(&mut self) {
        let io = self.take_io_id();
        self.file_happens(FileEvent::Removing(io));
        self.effects.push_back(Effect::Tracking(io, TrackingOp::Discard));
    }

    fn make_file(&mut self) {
        let io = self.take_io_id();
        self.file_happens(FileEvent::Making(io));
        let everything = !self.is_mutant(Mutant::AnewForgetsBlocks);
        let snapshot = Snapshot::first(self.tracked(DirtyBitmap::new()), false, everything);
        self.effects.push_back(Effect::Tracking(io, TrackingOp::Begin(Box::new(snapshot))));
    }

    /// The file was removed, or a new one was made, or it could not be.
    pub(super) fn file_done(&mut self, result: Result<(), IoFailure>) {
        match self.activity.standing.file {
            File::Failed { .. } => self.file_removed(result),
            File::Gone { .. } => self.file_made(result),
            File::Kept { .. } => unreachable!("nothing is under way for a file that is kept"),
        }
    }

    /// The file is gone, durably; or it stays, and who would have to be in it gets an error.
    fn file_removed(&mut self, result: Result<(), IoFailure>) {
        let was_told = self.activity.untracked().is_some_and(|untracked| untracked.stays);
        self.file_happens(FileEvent::Removed(result));
        let activity = &mut self.activity;
        let parked = std::mem::take(&mut activity.parked);
        match result {
            Ok(()) => {
                activity.log.as_mut().expect("a file has one").begin_anew();
                (activity.everything_copies, activity.everything_coming) = (COPIES, false);
                (activity.wanted, activity.idle_at) = (false, None);
            }
            Err(_) if was_told => {}
            Err(failure) => {
                let (name, errno) = (&self.settings.name, failure.errno);
                self.effects.push_back(Effect::Alarm(format!(
                    "disk {name}: the tracking file cannot be removed either (errno {errno}): writes to where nothing was written lately fail until it can"
                )));
            }
        }
        for parked in parked.into_values().flatten() {
            match result {
                Ok(()) => self.begin_parked(parked),
                Err(failure) => self.refuse_parked(parked, failure),
            }
        }
    }

    /// A new file is in place, durably, and says that everything may differ: it is told better. Or it may be in place, and
    /// what it says is true all the same.
    fn file_made(&mut self, result: Result<(), IoFailure>) {
        self.file_happens(FileEvent::Made(result));
        if result.is_err() {
            return;
        }
        if self.unsettled_blocks().is_some() {
            self.activity.want_snapshot();
        } else {
            // It says what there is to say.
            self.activity.standing.is_tracked_again();
        }
    }

    fn refuse_parked(&mut self, parked: Parked, failure: IoFailure) {
        self.activity.log.as_mut().expect("a file has one").leave(parked.blocks);
        self.counters.failed_changes += 1;
        self.effects.push_back(Effect::Complete { request: parked.request, result: Err(failure) });
        self.release(parked.blocks);
    }
}

#[cfg(test)]
mod tests;
