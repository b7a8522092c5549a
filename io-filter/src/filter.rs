//! The filter's state, and how its mode changes.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    time::Duration,
};

use backtide_protocol::Message;
use backtide_tracking::DirtyBitmap;
use backtide_units::{BlockRange, ByteCount, CaptureTime, HistoryId, LogPosition, Lsn, Reason};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::{
    acknowledge::Acknowledgements,
    activity::Activity,
    capture::{CopyWait, Ongoing, Queued},
    courtesy::{Request, Watch},
    event::{Effect, IoId, Now, Resume, Settings},
    freeze::{PassPlan, Scanning},
    guard::{RangeGuard, Ticket},
    hasten::Asked,
    pace::Pace,
    pass::{Pass, Phase},
    progress::Progress,
    spill::SpillState,
    status::Counters,
    verify::VerifyJob,
    window::Window,
};

/// What becomes of a disk's changes.
///
/// ```text
///            attach                                         attach after a clean end in sync
///              ▼                                                         ▼
///   ┌────▶ Tracking ──connected──▶ Resync ──pass durable, nothing dirty──▶ Sync
///   │          ▲                    │  ▲                                   │ │
///   │          ├──── stream lost ───┤  └───── force · failed write ────────┘ │
///   │          └─ something dirty ──┘                                        │
///   └───────────── window overflow · replay impossible · spill failed ───────┘
///   any ──operator──▶ Paused ──operator──▶ Tracking        any ──operator──▶ Detached
/// ```
///
/// A stream lost in `Sync` leaves the mode as it is: the window is retained and replayed. A pass that is
/// forced, or due after a failed write, begins as soon as there is a stream. One that was durable while changes
/// were gathered leaves them dirty: it ends in `Tracking`, from where the next begins at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// Changes are marked in the passive bitmap; nothing is sent.
    Tracking,
    /// A pass delivers what the receiver misses.
    Resync,
    /// Every change is a record in the window or durable at the receiver.
    Sync,
    /// As `Tracking`, until a person resumes.
    Paused,
    /// The disk is given up; its bitmap was handed out to be saved.
    Detached,
}

/// The connection to the receiver.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Link {
    /// None.
    Down,
    /// Handshake done.
    Up {
        /// The sequence number of the next frame. The hello was frame 1.
        next_seq: u64,
        /// Frames up to here are in the receiver's memory.
        received: u64,
        /// Frames up to here are durable there.
        durable: u64,
        /// What the receiver was asked to hear about soon.
        asked: Asked,
        /// What its clock has shown, which is not answered yet.
        heard: Option<CaptureTime>,
    },
}

/// The filter of one disk. See the crate's description.
#[derive(Clone, Debug)]
pub struct Filter {
    pub(crate) settings: Settings,
    pub(crate) mode: Mode,
    /// Why the mode is not `Sync`.
    pub(crate) reason: Option<Reason>,
    /// While it is paused: why it was not in sync before that.
    pub(crate) before_pause: Option<Reason>,
    /// Somebody writes the local disk past the agent: a pass would read what changes under it.
    pub(crate) written_past: bool,
    /// The receiver was told on this connection that there is a hole, without a pass that would close it.
    pub(crate) hole_is_open: bool,
    /// The receiver refused the last connection, and has acknowledged nothing since.
    pub(crate) refused: bool,
    pub(crate) link: Link,
    pub(crate) history: Option<HistoryId>,
    /// The last LSN given.
    pub(crate) last_lsn: Lsn,
    /// The last capture time given.
    pub(crate) last_time: CaptureTime,
    /// When that was taken, by the monotonic clock.
    pub(crate) stamped_at: Duration,
    /// A moment that reads waited for has passed in an event that had nothing to do with them.
    pub(crate) reads_overdue: bool,
    /// Until the first handshake: no record that the receiver has was captured later, unless this state is
    /// an older copy.
    pub(crate) known_until: Option<CaptureTime>,
    /// See [`Filter::follows`].
    pub(crate) attaches: Option<Vec<Uuid>>,
    /// The highest LSN at which the disk is recoverable and durable at the receiver.
    pub(crate) durable_lsn: Lsn,
    /// The highest LSN the receiver has in memory.
    pub(crate) received_lsn: Lsn,
    /// The newest marks the receiver acknowledged as durable.
    pub(crate) durable_marks: VecDeque<(Lsn, String)>,
    /// The highest record LSN the receiver acknowledged as durable.
    pub(crate) acked_durable: Lsn,
    /// How much of the receiver's log was acknowledged as durable: what left the bitmaps is within it.
    pub(crate) acked_position: LogPosition,
    /// Whether the newest durable frames belong to a pass that has not ended.
    pub(crate) acked_in_pass: bool,
    pub(crate) window: Window,
    pub(crate) spill: SpillState,
    pub(crate) passive: DirtyBitmap,
    /// Blocks that read as zeroes, of which an interrupted compare pass has not told the receiver.
    pub(crate) passive_zeroes: DirtyBitmap,
    /// Whether the passive blocks are candidates to be compared rather than known differences.
    pub(crate) passive_compare: bool,
    /// Whether nothing is known of the differences: a scan has to come before a pass.
    pub(crate) lost: Option<PassPlan>,
    pub(crate) scanning: Option<Scanning>,
    pub(crate) pass: Option<Pass>,
    pub(crate) pace: Pace,
    /// Bytes of the last pass, if new writes were gathered meanwhile: the next has to be smaller.
    pub(crate) gathering_total: Option<ByteCount>,
    pub(crate) progress: Progress,
    /// After a pass that could not read some block: when the next may begin, and that pause.
    pub(crate) next_pass: Option<(Duration, Duration)>,
    /// The blocks it could not read.
    pub(crate) unreadable: DirtyBitmap,
    /// Bytes a second a pass last got through, for the choice of what to do with new writes.
    pub(crate) pass_rate: Option<u64>,
    /// The window overflowed while the receiver was there, and no small pass has ended since.
    pub(crate) slow: bool,
    pub(crate) guard: RangeGuard,
    /// Reads of passes and verifies that hold their range at the guard.
    pub(crate) reads: BTreeMap<IoId, BlockRange>,
    /// Those of them that wait for another host.
    pub(crate) far_reads: BTreeSet<IoId>,
    pub(crate) ongoing: BTreeMap<IoId, Ongoing>,
    pub(crate) queued: BTreeMap<Ticket, Queued>,
    pub(crate) waiting_for_buffer: VecDeque<CopyWait>,
    pub(crate) next_id: u64,
    pub(crate) next_compare: u64,
    /// Answers to the receiver's questions, to be sent; nobody misses them when the stream is lost.
    pub(crate) recalled: VecDeque<Message>,
    pub(crate) acknowledgements: Acknowledgements,
    pub(crate) flushed_to: Lsn,
    pub(crate) verify: Option<VerifyJob>,
    pub(crate) counters: Counters,
    pub(crate) activity: Activity,
    pub(crate) effects: VecDeque<Effect>,
    pub(crate) now: Now,
    #[cfg(feature = "mutants")]
    pub(crate) mutant: Option<crate::mutant::Mutant>,
}

impl Filter {
    /// The filter of a disk that begins an attach.
    pub fn new(settings: Settings, resume: Resume, now: Now) -> Self {
        let end = BlockRange::whole_disk(settings.size).end();
        let passive = DirtyBitmap::bounded(settings.bitmap_bytes, end);
        let mut filter = Self {
            window: Window::new(Lsn::ZERO),
            spill: SpillState::default(),
            activity: Activity::new(&settings, &resume),
            settings,
            mode: Mode::Tracking,
            reason: None,
            before_pause: None,
            written_past: false,
            hole_is_open: false,
            refused: false,
            link: Link::Down,
            history: None,
            last_lsn: Lsn::ZERO,
            last_time: CaptureTime::default(),
            stamped_at: Duration::ZERO,
            reads_overdue: false,
            known_until: None,
            attaches: None,
            durable_lsn: Lsn::ZERO,
            received_lsn: Lsn::ZERO,
            durable_marks: VecDeque::new(),
            acked_durable: Lsn::ZERO,
            acked_position: LogPosition::default(),
            acked_in_pass: false,
            passive,
            passive_zeroes: DirtyBitmap::new(),
            passive_compare: false,
            lost: None,
            scanning: None,
            pass: None,
            pace: Pace::default(),
            gathering_total: None,
            progress: Progress::default(),
            next_pass: None,
            unreadable: DirtyBitmap::new(),
            pass_rate: None,
            slow: false,
            guard: RangeGuard::default(),
            reads: BTreeMap::new(),
            far_reads: BTreeSet::new(),
            ongoing: BTreeMap::new(),
            queued: BTreeMap::new(),
            waiting_for_buffer: VecDeque::new(),
            next_id: 0,
            next_compare: 0,
            recalled: VecDeque::new(),
            acknowledgements: Acknowledgements::default(),
            flushed_to: Lsn::ZERO,
            verify: None,
            counters: Counters::default(),
            effects: VecDeque::new(),
            now,
            #[cfg(feature = "mutants")]
            mutant: None,
        };
        filter.resume_from(resume);
        filter
    }

    fn resume_from(&mut self, resume: Resume) {
        match resume {
            Resume::New => {
                self.reason = Some(Reason::FirstAttach);
                self.lost = Some(PassPlan::everything(Reason::FirstAttach));
            }
            Resume::Clean(saved) => {
                self.history = saved.history;
                self.last_lsn = saved.last_lsn;
                self.acked_durable = saved.acked_durable;
                self.acked_position = saved.acked_position;
                self.durable_lsn = saved.acked_durable;
                self.passive.union_with(&saved.dirty);
                self.passive_zeroes = saved.zeroes;
                self.passive_compare = saved.compare;
                self.window = Window::new(saved.gap_from);
                self.spill.complete_to = saved.spilled_to;
                match saved.reason {
                    None if saved.history.is_some() => self.mode = Mode::Sync,
                    None | Some(Reason::FirstAttach) if saved.history.is_none() => {
                        self.reason = Some(Reason::FirstAttach);
                        self.lost = Some(PassPlan::everything(Reason::FirstAttach));
                    }
                    reason => self.reason = reason,
                }
            }
            Resume::Lost { reason, history, last_lsn, acked_durable } => {
                self.resume_unknown(history, last_lsn, acked_durable, PassPlan::compare(reason));
            }
            Resume::Crashed { reason, history, last_lsn, acked_durable, acked_position, candidates } => {
                self.acked_position = acked_position;
                let plan = Self::crash_plan(reason, candidates);
                self.resume_unknown(history, last_lsn, acked_durable, plan);
            }
        }
    }

    fn resume_unknown(&mut self, history: Option<HistoryId>, last: Lsn, acked: Lsn, plan: PassPlan) {
        self.history = history;
        self.last_lsn = last;
        self.acked_durable = acked;
        self.window = Window::new(acked);
        self.reason = Some(plan.reason);
        self.lost = Some(plan);
    }

    /// The next thing to do. The driver takes effects until there is none, after every event.
    pub fn next_effect(&mut self) -> Option<Effect> {
        self.effects.pop_front()
    }

    /// The mode.
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// The disk's identity and limits.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// The history the receiver keeps, once known: worth saving when it changes.
    pub fn history(&self) -> Option<HistoryId> {
        self.history
    }

    /// The highest LSN the receiver acknowledged as durable, of records and passes alike.
    pub fn acked_durable(&self) -> Lsn {
        self.acked_durable
    }

    /// Whether a mark now is going to name a recovery point.
    pub fn can_mark(&self) -> bool {
        // What is forwarded beside a pass that was forfeited is for the points behind its end, which it says when it is drained.
        let offers_none =
            |pass: &Pass| !pass.given_up.is_empty() || (pass.forfeited && pass.phase == Phase::Draining);
        self.is_forwarding() && !self.pass.as_ref().is_some_and(offers_none)
    }

    /// The last LSN given.
    pub fn last_lsn(&self) -> Lsn {
        self.last_lsn
    }

    /// No capture time is earlier than this: the last one of the attach before.
    pub fn not_before(&mut self, time: CaptureTime) {
        self.last_time = self.last_time.max(time);
    }

    /// What the filter resumed from knows of everything captured up to then. A receiver with something later
    /// has it from an attach, or a part of one, that was forgotten since: nothing is trusted then.
    pub fn knows_until(&mut self, time: CaptureTime) {
        self.known_until = Some(time);
    }

    /// Limits what passes and verifies read and send, in bytes a second; zero for no limit. A pass that
    /// loses ground is not held back.
    pub fn limit_resync(&mut self, now: Now, bytes_per_second: ByteCount) {
        self.observe(now);
        self.pace.limit(bytes_per_second);
        self.pump();
    }

    /// How much the reads of passes and verifies may add to the guest's latency; zero to give way to
    /// nobody. A pass that loses ground gives way to nobody either.
    pub fn yield_to_guest(&mut self, now: Now, added_latency: Duration) {
        self.observe(now);
        self.pace.aim(added_latency);
        self.pump();
    }

    /// A guest's read begins, which is the driver's: to be told of its end with what this returns.
    pub fn watch_read(&self, now: Now) -> Watch {
        self.pace.watch(now.monotonic)
    }

    /// It has ended, on the local disk.
    pub fn read_took(&mut self, now: Now, watch: Watch, bytes: ByteCount) {
        self.observe(now);
        if self.pace.guest_took(self.now.monotonic, watch, Request::Read(bytes)) {
            self.pump();
        }
    }

    /// Time passes: delayed answers and overdue copies are let go. Due at [`Self::next_deadline`].
    pub fn tick(&mut self, now: Now) {
        self.observe(now);
        self.note_lateness();
        self.release_due_answers();
        self.give_way_to_overdue();
        self.give_up_overdue_copies();
        self.let_idle_extents_go();
        self.say_unchanged();
        self.pump();
    }

    /// A change that has waited its time, and nobody came to see: that is part of its delay, and not meant.
    fn note_lateness(&mut self) {
        let deadlines =
            [self.acknowledgements.next_deadline(), self.next_copy_deadline(), self.next_give_way()];
        let Some(due) = deadlines.into_iter().flatten().min() else { return };
        let late = self.now.monotonic.saturating_sub(due);
        let late_us = u64::try_from(late.as_micros()).unwrap_or(u64::MAX);
        self.counters.guest_late_us_max = self.counters.guest_late_us_max.max(late_us);
    }

    /// When [`Self::tick`] has to be called at the latest; by the monotonic clock.
    pub fn next_deadline(&self) -> Option<Duration> {
        let copies = self.next_copy_deadline();
        let answers = self.acknowledgements.next_deadline();
        let retries = self.pass.as_ref().and_then(|pass| pass.next_retry(self.now.monotonic));
        let reads = self.next_paced_read().or(self.reads_overdue.then_some(self.now.monotonic));
        let idle = self.next_tracking();
        let pass = self.pause_between_passes();
        let stall = self.next_stall();
        let ways = self.next_give_way();
        let spill = self.next_spill_try();
        let unchanged = self.next_unchanged();
        [copies, answers, ways, stall, retries, reads, idle, pass, spill, unchanged]
            .into_iter()
            .flatten()
            .min()
    }

    pub(crate) fn observe(&mut self, now: Now) {
        let waited = self.next_paced_read().is_some();
        let retry = self.pass.as_ref().and_then(|pass| pass.next_retry(self.now.monotonic));
        self.now.monotonic = self.now.monotonic.max(now.monotonic);
        self.now.wall = now.wall;
        self.pace.observe(self.now.monotonic);
        self.reads_overdue |= waited && self.next_paced_read().is_none();
        self.reads_overdue |= retry.is_some_and(|due| due <= self.now.monotonic);
    }

    /// The capture time of something that happens now; never goes back.
    pub(crate) fn stamp(&mut self) -> CaptureTime {
        self.last_time = self.next_stamp();
        self.stamped_at = self.now.monotonic;
        self.last_time
    }

    /// What [`stamp`](Self::stamp) would give.
    pub(crate) fn next_stamp(&self) -> CaptureTime {
        self.now.wall.after(self.last_time)
    }

    pub(crate) fn take_lsn(&mut self) -> Lsn {
        self.last_lsn = self.last_lsn.next();
        self.last_lsn
    }

    pub(crate) fn take_io_id(&mut self) -> IoId {
        self.next_id += 1;
        IoId(self.next_id)
    }

    pub(crate) fn take_ticket(&mut self) -> Ticket {
        self.next_id += 1;
        Ticket(self.next_id)
    }

    /// Whether there is a stream to the receiver, or one being negotiated.
    pub fn is_connected(&self) -> bool {
        self.link != Link::Down
    }

    /// For a set of blocks that may hold more than were marked, when it becomes large.
    pub(crate) fn bounded_bitmap(&self) -> DirtyBitmap {
        DirtyBitmap::bounded(self.settings.bitmap_bytes, self.all_blocks().end())
    }

    /// All blocks of the disk.
    pub(crate) fn all_blocks(&self) -> BlockRange {
        BlockRange::whole_disk(self.settings.size)
    }

    /// The only way the mode changes.
    pub(crate) fn enter(&mut self, to: Mode, reason: Option<Reason>) {
        let from = self.mode;
        assert!(from != Mode::Detached, "a detached disk changes no more");
        assert!(to != Mode::Resync || self.pass.is_some(), "a resync is a pass");
        assert!(to == Mode::Resync || self.pass.is_none(), "a pass is a resync");
        assert!(to != Mode::Sync || self.lost.is_none(), "what is unknown is not in sync");
        match to {
            Mode::Sync => {}
            Mode::Tracking | Mode::Resync => self.suspend_verify(),
            Mode::Paused | Mode::Detached => self.interrupt_verify(),
        }
        if from == Mode::Sync && matches!(to, Mode::Tracking | Mode::Paused) {
            self.name_hole(reason);
        }
        if to != Mode::Sync {
            // A pass that is due must not wait for what will not be written any more.
            self.stop_spilling();
        }
        self.mode = to;
        self.reason = reason;
        if from != to {
            self.counters.transitions += 1;
            self.effects.push_back(Effect::Transition { from, to, reason });
        }
    }

    /// Does whatever has become possible: passes begin, go on and end, verifies go on.
    pub(crate) fn pump(&mut self) {
        self.reads_overdue = false;
        self.begin_pass_if_due();
        if !self.waiting_for_buffer.is_empty() {
            self.retry_copies();
        }
        self.drain();
        self.end_pass_if_drained();
        self.go_on_verifying();
        self.keep_tracking();
        self.sample_progress();
        self.keep_spilling();
    }
}
