//! Steps after which a test may kill the process: `kill -9` exactly between two writes.
//!
//! Only a build with debug assertions has them, and only the environment arms one, before the process
//! starts: `BACKTIDE_KILL_AT=NAME` ends it with SIGKILL when it reaches the point, `NAME:3` at the third
//! time, and `BACKTIDE_STOP_AT` stops it there with SIGSTOP. So the tests need no build of their own, and
//! a release build has nothing of this: [`KillPoint::reached`] is empty there.
//!
//! Invariant: a point is named after the step that has just been done, and every one is reached by a
//! story of the whole-system tests, which take their list from [`KillPoint::ALL`].

macro_rules! kill_points {
    ($($(#[$doc:meta])* $point:ident = $name:literal,)*) => {
        /// A step that has just been done.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum KillPoint {
            $($(#[$doc])* $point,)*
        }

        impl KillPoint {
            /// Every one.
            pub const ALL: &[Self] = &[$(Self::$point,)*];

            /// What arms it.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$point => $name,)*
                }
            }
        }
    };
}

kill_points! {
    /// Attach: the disk behind is open and locked.
    AttachOpened = "attach-opened",
    /// Attach: the tracking file says what the attach begins with.
    AttachTracking = "attach-tracking-made",
    /// Attach: the record has the new epoch, durably.
    AttachRecord = "attach-record-saved",
    /// Attach: clients can connect.
    AttachServed = "attach-served",
    /// A record of the activity log is written, not synced.
    ActivityWritten = "activity-record-written",
    /// It is durable; the changes that wait for it have not begun.
    ActivityDurable = "activity-record-durable",
    /// A snapshot of the bitmaps is in the place of the older one, not synced.
    SnapshotWritten = "snapshot-written",
    /// It is durable.
    SnapshotDurable = "snapshot-durable",
    /// A file that takes the place of another is durable under its first name: a tracking file, the record of a
    /// disk, a durable mark.
    FileBeside = "file-beside",
    /// It has its own name, not yet durably.
    FileRenamed = "file-renamed",
    /// The bitmaps have changed their roles: a pass is frozen.
    PassFrozen = "pass-frozen",
    /// The drain has read a run, or a change old content.
    PassRead = "pass-run-read",
    /// The pass's beginning leaves the window for the stream.
    PassBeginSent = "pass-begin-sent",
    /// A run of the pass does.
    PassDataSent = "pass-data-sent",
    /// The pass's end does.
    PassEndSent = "pass-end-sent",
    /// The pass is durable at the receiver: the disk is in sync.
    PassDurable = "pass-durable",
    /// Detach: no request is under way.
    DetachQuiet = "detach-quiet",
    /// Detach: the disk behind is flushed.
    DetachFlushed = "detach-flushed",
    /// Detach: the image is no longer locked, and nothing is saved.
    DetachUnlocked = "detach-unlocked",
    /// Detach: the tracking file says that it was clean; the record does not.
    DetachTracking = "detach-tracking-made",
    /// Detach: both do.
    DetachRecord = "detach-record-saved",
    /// Rewind: the disk is let go of, and as it was.
    RewindDetached = "rewind-detached",
    /// Failover: the receiver has the higher epoch, and nothing is made here.
    TakenOver = "disk-taken-over",
    /// The hydration file is there, durably: the disk lacks blocks from now on.
    HydrationMade = "hydration-made",
    /// A disk that was taken over has its tracking file, and not yet its record.
    TakenTracking = "taken-tracking",
    /// Missing blocks are on the image; the hydration file does not know.
    HydrationStored = "hydration-stored",
    /// It does.
    HydrationNoted = "hydration-noted",
    /// Nothing is missing, and the hydration file is removed.
    HydrationFinished = "hydration-finished",
    /// Receiver: an attach is in the log, not yet durable.
    ClaimAppended = "claim-appended",
    /// Receiver: a segment has its file, empty.
    SegmentCreated = "segment-created",
    /// Receiver: the segment has its header, not synced.
    SegmentBegun = "segment-begun",
    /// Receiver: an entry is taken; it may be in memory only.
    EntryAppended = "entry-appended",
    /// Receiver: entries that were held back are in the file, not synced.
    EntriesWritten = "entries-written",
    /// Receiver: the file of the next segment is made ahead.
    SpareMade = "spare-made",
    /// Receiver: a full segment has its footer, not synced.
    FooterWritten = "footer-written",
    /// Receiver: everything is synced; nobody knows yet.
    LogSynced = "log-synced",
    /// Receiver: it is noted how far the log is durable; the agent has not heard.
    MarkWritten = "durable-mark-written",
    /// Receiver: the end of a pass is durable; the agent has not heard.
    PassEndDurable = "pass-end-durable",
    /// Receiver: it is noted durably that a disk goes; all of it is there.
    ForgetNoted = "forget-noted",
    /// Receiver: nothing of the disk is there any more; its tombstone says that it goes.
    ForgetRemoved = "forget-removed",
}

impl KillPoint {
    /// The step is done.
    #[cfg(not(debug_assertions))]
    #[inline(always)]
    pub fn reached(self) {}

    /// The step is done. Does not return when this point is armed to kill.
    #[cfg(debug_assertions)]
    pub fn reached(self) {
        armed::reached(self);
    }
}

#[cfg(debug_assertions)]
mod armed {
    //! What the environment asks for.

    use std::{
        sync::{
            OnceLock,
            atomic::{AtomicU64, Ordering},
        },
        time::Duration,
    };

    use rustix::process::{Signal, getpid, kill_process};

    use super::KillPoint;

    struct Armed {
        point: KillPoint,
        signal: Signal,
        times: AtomicU64,
    }

    const A_MOMENT: Duration = Duration::from_millis(200);

    static ARMED: OnceLock<Option<Armed>> = OnceLock::new();

    pub(super) fn reached(point: KillPoint) {
        let Some(armed) = ARMED.get_or_init(from_environment) else { return };
        if armed.point == point && armed.times.fetch_sub(1, Ordering::Relaxed) == 1 {
            kill_process(getpid(), armed.signal).expect("a process may signal itself");
            // A signal to a process takes effect some moments later: this thread does not go on meanwhile.
            std::thread::sleep(A_MOMENT);
            if armed.signal == Signal::KILL {
                loop {
                    std::thread::park();
                }
            }
        }
    }

    fn from_environment() -> Option<Armed> {
        let wanted = [("BACKTIDE_KILL_AT", Signal::KILL), ("BACKTIDE_STOP_AT", Signal::STOP)];
        let (text, signal) =
            wanted.into_iter().find_map(|(name, signal)| Some((std::env::var(name).ok()?, signal)))?;
        let (name, times) = text.split_once(':').unwrap_or((&text, "1"));
        let point = KillPoint::ALL.iter().find(|point| point.name() == name);
        let point = *point.unwrap_or_else(|| panic!("there is no kill point {name:?}"));
        let times = times.parse().unwrap_or_else(|_| panic!("{times:?} is no number of times"));
        Some(Armed { point, signal, times: AtomicU64::new(times) })
    }
}
