//! The filter at work: feeds it what happens and carries out what it says. Everything here runs on
//! the disk's own thread, so cells are enough.
//!
//! Invariant: no borrow of the filter is held while an effect is carried out, since that may bring
//! the next event at once.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    rc::Rc,
    time::{Duration, Instant, SystemTime},
};

use backtide_agent_api::Limits;
use backtide_export::Reply;
use backtide_io_filter::{
    Change, Effect, Filter, IoFailure, IoId, LocalData, LocalOp, Mode, Now, RequestId, SpillDone, SpillOp,
    TrackingOp,
};
use backtide_spill::{SpillError, SpillFiles};
use backtide_storage::{Completion, KillPoint};
use backtide_units::{ByteCount, ByteRange, Lsn};
use rustix::io::Errno;
use tokio::sync::Notify;

use super::{
    local::{Began, Purpose, SharedLocal, failure},
    marking::MarkWaits,
    polling::Polling,
    refused::{Refused, refuse},
    tracking::Tracking,
};

/// How long a kernel that could not take requests is left alone.
const RING_RETRY: Duration = Duration::from_millis(1);

/// One disk's filter, its disk behind, and the guest's requests under way.
pub(crate) struct Engine {
    filter: RefCell<Filter>,
    pub(crate) local: SharedLocal,
    pub(super) tracking: Rc<Tracking>,
    requests: RefCell<HashMap<RequestId, Pending>>,
    next_request: Cell<u64>,
    started: Instant,
    /// There is something to send to the receiver.
    pub(crate) send: Notify,
    /// The connection has to end, for this reason.
    pub(crate) kick: Notify,
    kick_reason: RefCell<Option<Kick>>,
    /// The filter's deadline has changed.
    pub(crate) deadline: Notify,
    armed: Cell<Option<Duration>>,
    /// Whether the connection is wanted has changed.
    pub(crate) wanted: Notify,
    /// A receiver has answered: the record of the disk may have to name another history.
    pub(crate) acquainted: Notify,
    /// Something has happened that somebody waits for, see [`Engine::until`].
    changed: Notify,
    watched: Cell<bool>,
    pub(super) marks: MarkWaits,
    refused: Refused,
    /// Reads of passes that failed, which are said as rarely.
    failed_reads: Refused,
    pub(crate) traffic: Traffic,
    pub(super) polling: Polling,
    /// When everything was at the receiver last.
    caught_up: Cell<Instant>,
}

/// Why this side ends a connection.
#[derive(Clone, Debug)]
pub(crate) enum Kick {
    /// A person asked for something that ends it.
    Operator(&'static str),
    /// The receiver said something that makes no sense.
    Invalid(String),
}

/// A client's request that is to be answered.
struct Pending {
    reply: Reply,
    kind: Kind,
}

#[derive(Clone, Copy)]
enum Kind {
    Write(ByteCount),
    Zero,
    Flush,
}

/// Counts of what the guest did.
#[derive(Default)]
pub(crate) struct Traffic {
    pub(crate) writes: Cell<u64>,
    pub(crate) write_bytes: Cell<u64>,
    pub(crate) zeroes: Cell<u64>,
    pub(crate) reads: Cell<u64>,
    pub(crate) read_bytes: Cell<u64>,
    pub(crate) flushes: Cell<u64>,
    pub(crate) errors: Cell<u64>,
    pub(crate) sent_bytes: Cell<u64>,
    pub(crate) resync_sent_bytes: Cell<u64>,
    pub(crate) disconnects: Cell<u64>,
}

pub(crate) fn add(counter: &Cell<u64>, count: u64) {
    counter.set(counter.get() + count);
}

impl Engine {
    pub(crate) fn new(
        make: impl FnOnce(Now) -> Filter,
        local: SharedLocal,
        tracking: Rc<Tracking>,
        polling: Polling,
    ) -> Rc<Self> {
        let started = Instant::now();
        Rc::new(Self {
            filter: RefCell::new(make(now_since(started))),
            local,
            tracking,
            requests: RefCell::default(),
            next_request: Cell::new(0),
            started,
            send: Notify::new(),
            kick: Notify::new(),
            kick_reason: RefCell::default(),
            deadline: Notify::new(),
            armed: Cell::new(None),
            wanted: Notify::new(),
            acquainted: Notify::new(),
            changed: Notify::new(),
            watched: Cell::new(false),
            marks: MarkWaits::default(),
            refused: Refused::default(),
            failed_reads: Refused::default(),
            traffic: Traffic::default(),
            polling,
            caught_up: Cell::new(started),
        })
    }

    pub(crate) fn now(&self) -> Now {
        now_since(self.started)
    }

    /// Looks at the filter.
    pub(crate) fn look<T>(&self, look: impl FnOnce(&Filter) -> T) -> T {
        look(&self.filter.borrow())
    }

    /// Lets something happen to the filter, then carries out what follows.
    pub(crate) fn happen<T>(self: &Rc<Self>, event: impl FnOnce(&mut Filter, Now) -> T) -> T {
        let now = self.now();
        let result = event(&mut self.filter.borrow_mut(), now);
        self.carry_out();
        result
    }

    /// Waits until the filter is as asked for. One at a time may wait.
    pub(crate) async fn until(&self, reached: impl Fn(&Filter) -> bool) {
        self.watched.set(true);
        while !self.look(&reached) {
            self.changed.notified().await;
        }
        self.watched.set(false);
    }

    /// A guest's change.
    pub(crate) fn submit(self: &Rc<Self>, change: Change, reply: Reply) {
        self.polling.asked();
        let id = RequestId(self.next_request.get());
        self.next_request.set(id.0 + 1);
        let kind = match &change {
            Change::Write { range, .. } => Kind::Write(range.count()),
            Change::Zero { .. } => Kind::Zero,
            Change::Flush => Kind::Flush,
        };
        self.requests.borrow_mut().insert(id, Pending { reply, kind });
        self.happen(|filter, now| filter.submit(now, id, change));
    }

    fn carry_out(self: &Rc<Self>) {
        loop {
            let effect = self.filter.borrow_mut().next_effect();
            let Some(effect) = effect else { break };
            self.carry_out_one(effect);
        }
        self.after_effects();
    }

    fn carry_out_one(self: &Rc<Self>, effect: Effect) {
        match effect {
            Effect::Local(io, op) => self.start_local(op, Purpose::Filter(io)),
            Effect::Tracking(io, op) => self.start_tracking(io, op),
            Effect::Spill(io, op) => self.start_spill(io, op),
            Effect::Complete { request, result } => self.complete(request, result),
            Effect::Scan(io) => self.start_scan(io),
            Effect::Transition { from, to, reason } => self.log_transition(from, to, reason),
            Effect::Disconnect { why } => {
                tracing::warn!(disk = %self.name(), why, "closing the stream");
                self.end_stream(Kick::Invalid(why));
            }
            Effect::ReadFailed { range, failure } => {
                if let Some(reads) = self.failed_reads.one_more(self.started.elapsed()) {
                    let errno = failure.errno;
                    tracing::warn!(disk = %self.name(), %range, errno, reads, "cannot read for the resync: will try again");
                }
            }
            Effect::Alarm(text) => tracing::error!(disk = %self.name(), "{text}"),
        }
    }

    /// Whether this is a flush to be done on this thread: a client waits for it and for nothing else, and two threads that
    /// have to be woken would take as long as the device.
    fn flushes_here(&self, op: &LocalOp) -> bool {
        matches!(op, LocalOp::Change(Change::Flush))
            && self.polling.is_for_one()
            && self.local.flushes_at_once().is_some()
    }

    fn flush_soon(self: &Rc<Self>, op: LocalOp, purpose: Purpose) {
        let engine = Rc::clone(self);
        tokio::task::spawn_local(async move {
            // First whatever else is due: answers of before, and what the receiver is to hear.
            tokio::task::yield_now().await;
            match engine.local.flushes_at_once().filter(|_| engine.polling.is_for_one()) {
                Some(image) => engine.local_ended(purpose, image.flush_here()),
                None => engine.begin_local(op, purpose),
            }
            engine.carry_out();
        });
    }

    /// Has the disk behind do something. What follows from its end is to be carried out by the caller
    /// when it ends at once.
    fn start_local(self: &Rc<Self>, op: LocalOp, purpose: Purpose) {
        if self.flushes_here(&op) { self.flush_soon(op, purpose) } else { self.begin_local(op, purpose) }
    }

    fn begin_local(self: &Rc<Self>, op: LocalOp, purpose: Purpose) {
        if let Purpose::Filter(io) = purpose {
            self.local.note_far_read(&op, || self.filter.borrow_mut().read_is_far(io));
        }
        match self.local.begin(op, purpose) {
            // Out of the page cache: that tells nothing of the disk.
            Began::Ended(result, Purpose::Reader(range, reply, _)) => {
                self.answer_read(range.count(), result, reply);
            }
            Began::Ended(result, purpose) => self.local_ended(purpose, result),
            Began::UnderWay => {}
            Began::Later(op, purpose) => {
                let engine = Rc::clone(self);
                let wanted = match purpose {
                    Purpose::Filter(_) => self.look(Filter::read_use),
                    Purpose::Reader(..) => None,
                };
                tokio::task::spawn_local(async move {
                    let result = match wanted {
                        Some(wanted) => engine.local.run_for_filter(op, wanted).await,
                        None => engine.local.run(op).await,
                    };
                    engine.local_ended(purpose, result);
                    engine.carry_out();
                });
            }
        }
    }

    fn local_ended(&self, purpose: Purpose, result: Result<LocalData, IoFailure>) {
        match purpose {
            Purpose::Filter(io) => {
                if matches!(result, Ok(LocalData::Read(_) | LocalData::Prepared(_))) {
                    KillPoint::PassRead.reached();
                }
                let now = self.now();
                self.filter.borrow_mut().local_done(now, io, result);
            }
            Purpose::Reader(range, reply, watch) => {
                let now = self.now();
                self.filter.borrow_mut().read_took(now, watch, range.count());
                self.answer_read(range.count(), result, reply);
            }
        }
    }

    /// A guest's read. The filter only hears how long it takes.
    pub(crate) fn read(self: &Rc<Self>, range: ByteRange, reply: Reply) {
        self.polling.asked();
        let watch = self.look(|filter| filter.watch_read(self.now()));
        self.start_local(LocalOp::Read(range), Purpose::Reader(range, reply, watch));
    }

    fn answer_read(&self, bytes: ByteCount, read: Result<LocalData, IoFailure>, reply: Reply) {
        self.polling.answered();
        match read {
            Ok(LocalData::Read(data)) => {
                add(&self.traffic.reads, 1);
                add(&self.traffic.read_bytes, bytes.0);
                reply.data(data);
            }
            Ok(LocalData::Changed | LocalData::Prepared(_)) => unreachable!("a client's read brings bytes"),
            Err(failure) => {
                add(&self.traffic.errors, 1);
                refuse(reply, failure);
            }
        }
    }

    /// Hands over what the disk's ring was given, and takes what it brings back, for ever. A disk
    /// without a ring has no need of it.
    pub(crate) async fn keep_ring(self: Rc<Self>) {
        let Some(ring) = self.local.ring() else { return };
        let mut done = Vec::new();
        loop {
            ring.due().await;
            let turned = ring.turn(&mut done);
            for Completion { tag, result } in done.drain(..) {
                let read = result.map_err(failure);
                self.local_ended(tag, read.map(|bytes| bytes.map_or(LocalData::Changed, LocalData::Read)));
            }
            self.carry_out();
            if let Err(error) = turned {
                tracing::warn!(disk = %self.name(), %error, "the kernel does not take local I/O now: will try again");
                tokio::time::sleep(RING_RETRY).await;
                ring.wake();
            }
        }
    }

    fn start_tracking(self: &Rc<Self>, io: IoId, op: TrackingOp) {
        let engine = Rc::clone(self);
        tokio::task::spawn_local(async move {
            let result = engine.tracking.carry_out(op).await.map_err(failure);
            engine.happen(|filter, now| filter.tracking_done(now, io, result));
        });
    }

    fn start_spill(self: &Rc<Self>, io: IoId, op: SpillOp) {
        let engine = Rc::clone(self);
        let files = self.tracking.spill.clone().expect("the filter was given a spill");
        tokio::task::spawn_local(async move {
            let done = tokio::task::spawn_blocking(move || do_spill(&files, &op)).await;
            let done = done.unwrap_or_else(|error| SpillDone::Failed(error.to_string()));
            engine.happen(|filter, now| filter.spill_done(now, io, done));
        });
    }

    /// Why there is no spill, although there should be one.
    pub(crate) fn spill_error(&self) -> Option<&String> {
        self.tracking.spill_error.as_ref()
    }

    fn start_scan(self: &Rc<Self>, io: IoId) {
        let engine = Rc::clone(self);
        tokio::task::spawn_local(async move {
            let allocated = match engine.local.allocated().await {
                Ok(allocated) => allocated,
                Err(failure) => {
                    let errno = failure.errno;
                    tracing::warn!(disk = %engine.name(), errno, "cannot list the allocated blocks: taking all");
                    let size = engine.local.size();
                    backtide_tracking::DirtyBitmap::of(backtide_units::BlockRange::whole_disk(size))
                }
            };
            engine.happen(|filter, now| filter.scanned(now, io, &allocated));
        });
    }

    fn complete(&self, request: RequestId, result: Result<Lsn, IoFailure>) {
        let pending = self.requests.borrow_mut().remove(&request);
        let Some(Pending { reply, kind }) = pending else { return };
        self.polling.answered();
        match result {
            Ok(_) => {
                match kind {
                    Kind::Write(bytes) => {
                        add(&self.traffic.writes, 1);
                        add(&self.traffic.write_bytes, bytes.0);
                    }
                    Kind::Zero => add(&self.traffic.zeroes, 1),
                    Kind::Flush => add(&self.traffic.flushes, 1),
                }
                reply.done();
            }
            Err(failure) => {
                add(&self.traffic.errors, 1);
                let why = match Errno::from_raw_os_error(failure.errno) {
                    Errno::SHUTDOWN => "a guest request ends with its disk",
                    _ => "the local disk refused a guest request",
                };
                if let Some(requests) = self.refused.one_more(self.started.elapsed()) {
                    tracing::warn!(disk = %self.name(), errno = failure.errno, requests, "{why}");
                }
                refuse(reply, failure);
            }
        }
    }

    fn log_transition(&self, from: Mode, to: Mode, reason: Option<backtide_units::Reason>) {
        match (from, to) {
            (_, Mode::Resync) => KillPoint::PassFrozen.reached(),
            (Mode::Resync, Mode::Sync) => KillPoint::PassDurable.reached(),
            (_, Mode::Tracking | Mode::Sync | Mode::Paused | Mode::Detached) => {}
        }
        let lsn = self.look(Filter::last_lsn);
        let reason = reason.map(|reason| reason.to_string()).unwrap_or_default();
        tracing::info!(disk = %self.name(), ?from, ?to, reason, %lsn, "mode changed");
    }

    fn after_effects(&self) {
        let filter = self.filter.borrow();
        if filter.has_to_send() {
            self.send.notify_one();
        }
        if self.watched.get() {
            self.changed.notify_one();
        }
        self.marks.look(&filter);
        if filter.is_drained() {
            self.caught_up.set(Instant::now());
        }
        let deadline = filter.next_deadline();
        if deadline != self.armed.get() {
            self.armed.set(deadline);
            self.deadline.notify_one();
        }
    }

    /// Ticks the filter whenever it is due.
    pub(crate) async fn keep_time(self: Rc<Self>) {
        loop {
            match self.armed.get() {
                None => self.deadline.notified().await,
                Some(due) => {
                    let at = tokio::time::Instant::from_std(self.started + due);
                    tokio::select! {
                        () = tokio::time::sleep_until(at) => {
                            self.armed.set(None);
                            self.happen(|filter, now| filter.tick(now));
                        }
                        () = self.deadline.notified() => {}
                    }
                }
            }
        }
    }

    /// Ends the connection to the receiver, if there is one.
    pub(crate) fn end_stream(&self, why: Kick) {
        self.kick_reason.replace(Some(why));
        self.kick.notify_one();
    }

    /// Why the connection is to end, if it is.
    pub(crate) fn take_kick(&self) -> Option<Kick> {
        self.kick_reason.take()
    }

    pub(crate) fn behind_for(&self) -> Duration {
        self.caught_up.get().elapsed()
    }

    pub(crate) fn name(&self) -> backtide_units::DiskName {
        self.filter.borrow().settings().name.clone()
    }
}

/// Tells the filter how fast passes and verifies may read.
pub(crate) fn set_pace(engine: &Rc<Engine>, limits: &Limits) {
    engine.local.limit_hydration(limits.resync_bytes_per_second_max);
    let added = Duration::from_micros(limits.resync_latency_us_max.into());
    engine.happen(|filter, now| {
        filter.limit_resync(now, limits.resync_bytes_per_second_max);
        filter.yield_to_guest(now, added);
    });
}

fn do_spill(files: &SpillFiles, op: &SpillOp) -> SpillDone {
    let result = match op {
        SpillOp::Append(slot, messages) => files.append(slot, messages),
        SpillOp::Remove(numbers) => files.remove(numbers),
        SpillOp::Read(place) => {
            let back = files.read(place);
            return SpillDone::Read(back.messages, back.failure.as_ref().map(SpillError::to_string));
        }
    };
    result.map_or_else(|failure| SpillDone::Failed(failure.to_string()), |()| SpillDone::Durable)
}

fn now_since(started: Instant) -> Now {
    Now { monotonic: started.elapsed(), wall: SystemTime::now().into() }
}
