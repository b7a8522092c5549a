//! What can be told of a disk, in the control API's words.

use std::time::{Duration, Instant};

use backtide_agent_api::{
    ByteSpan, Counters, DIFFERING_SPANS_MAX, Dirty, DiskStatus, GuestWaits, Lag, LsnStatus, Mode, OnOutage,
    PassKind, PeerError, ResyncStatus, Spill, Unreadable, VerifyState, VerifyStatus, Window,
};
use backtide_control::{ApiError, ErrorCode};
use backtide_export::NbdUri;
use backtide_io_filter::{PassStatus, Status};
use backtide_units::{BlockCount, ByteCount, CaptureTime, Lsn, Reason};

use super::{engine::Engine, stream::Stream};
use crate::record::DiskRecord;

/// What is seen of a disk from one second to the next.
#[derive(Debug, Default)]
pub(crate) struct Watch {
    saved: Option<Instant>,
    /// Since when the guest has waited for answers, and how far the receiver had come then.
    waiting: Option<(Instant, Lsn, Lsn)>,
}

/// So long may answers wait before the status tells of it.
const WAIT_TOLD: Duration = Duration::from_secs(1);

impl Watch {
    /// Takes a sample; called about once a second.
    pub(crate) fn sample(&mut self, status: &Status) {
        let now = Instant::now();
        self.saved.get_or_insert(now);
        let (received, durable) = (status.received_lsn, status.durable_lsn);
        let stands = |&(_, then, stable): &(Instant, Lsn, Lsn)| (then, stable) == (received, durable);
        self.waiting = (status.waiting_answers > 0)
            .then(|| self.waiting.filter(stands).unwrap_or((now, received, durable)));
    }

    /// Whether a minute has gone by since it last said so.
    pub(crate) fn is_minute_over(&mut self) -> bool {
        let over = self.saved.is_none_or(|saved| saved.elapsed() > Duration::from_secs(60));
        if over {
            self.saved = Some(Instant::now());
        }
        over
    }

    /// What the guest waits for from a receiver that says nothing, when that is for long. Requests of a client
    /// that has left keep nobody waiting.
    fn guest_waits(&self, status: &Status, clients: u32) -> Option<GuestWaits> {
        let (since, received, durable) = self.waiting.filter(|_| clients > 0)?;
        let stands = (received, durable) == (status.received_lsn, status.durable_lsn);
        let waited = since.elapsed();
        let requests = status.waiting_answers;
        let long = stands && requests > 0 && waited > WAIT_TOLD;
        long.then_some(GuestWaits { requests, seconds: waited.as_secs_f64() })
    }

    /// Whether the guest has waited for long, and goes on to do so as long as the receiver is away: an answer that is only
    /// on its way comes by itself, and so does one of a disk that goes on without its receiver.
    pub(crate) fn waits_on(&self, status: &Status, clients: u32, on_outage: OnOutage) -> bool {
        match on_outage {
            OnOutage::Block => self.guest_waits(status, clients).is_some(),
            OnOutage::Continue => false,
        }
    }
}

pub(crate) fn dirty(blocks: BlockCount, hot_extents: Option<u64>) -> Dirty {
    Dirty { blocks, bytes: blocks.bytes(), hot_extents }
}

pub(crate) fn disk_status(
    engine: &Engine,
    stream: &Stream,
    record: &DiskRecord,
    nbd: &NbdUri,
    clients: u32,
    watch: &Watch,
) -> DiskStatus {
    let status = engine.look(|filter| filter.status_at(engine.now()));
    let last_error = stream.last_error.borrow().as_ref().map(|last| PeerError {
        code: last.code.to_owned(),
        message: last.message.clone(),
        time: last.time,
    });
    let guest_waits = watch.guest_waits(&status, clients);
    let hydration = engine.local.hydration();
    // A pass reads what is missing as well, and waits for it.
    let ends = hydration.as_ref().is_none_or(|lacks| !lacks.stuck && lacks.damaged_bytes.is_zero());
    let untracked = status.untracked.map(|untracked| engine.tracking.told(untracked));
    // The guest's writes fail by it.
    let refuses = status.untracked.is_some_and(|untracked| untracked.stays);
    let (reason, reason_code) = reason_of(&status, last_error.as_ref(), guest_waits);
    DiskStatus {
        name: record.name.clone(),
        uuid: record.uuid,
        mode: mode(status.mode),
        reason,
        reason_code,
        connected: status.connected,
        receiver: record.receiver.clone(),
        last_error,
        stream_tls: stream.tls(),
        nbd_uri: nbd.to_string(),
        image: record.image.clone(),
        local_error: engine.local.trouble().or_else(|| untracked.clone().filter(|_| refuses)),
        open_elsewhere: false,
        unsaved: None,
        untracked,
        size: engine.local.size(),
        epoch: record.epoch,
        history: status.history,
        lsn: lsn(&status),
        lag: lag(engine, &status),
        dirty: dirty(status.dirty, status.hot_extents),
        window: Window { bytes: status.window, limit: record.limits.window_bytes },
        spill: spill(engine, &status),
        resync: status.pass.as_ref().map(|pass| resync(pass, status.counters.passes, ends)),
        resync_due: status.scanning,
        unreadable: status.unreadable.map(|(blocks, first)| Unreadable {
            blocks,
            offset: first.start(),
            length: first.count(),
        }),
        hydration,
        ack: record.ack,
        on_outage: record.on_outage,
        limits: record.limits,
        counters: counters(engine, &status),
        engine: engine.local.engine().0.to_owned(),
        engine_reason: engine.local.engine().1.map(str::to_owned),
        cache: record.cache,
        rewound: record.rewound,
        origin: record.origin.clone(),
        clients,
        awaited_clients: 0,
        guest_waits,
    }
}

/// The status of a disk that is to be attached and cannot be, for this reason.
pub(crate) fn not_attached(record: &DiskRecord, why: &str) -> DiskStatus {
    DiskStatus {
        name: record.name.clone(),
        uuid: record.uuid,
        mode: Mode::Detached,
        reason: format!("it cannot be attached again, and will be tried: {why}"),
        reason_code: "not-attached".to_owned(),
        connected: false,
        receiver: record.receiver.clone(),
        last_error: None,
        stream_tls: None,
        nbd_uri: record.nbd.clone().unwrap_or_default(),
        image: record.image.clone(),
        local_error: None,
        open_elsewhere: false,
        unsaved: None,
        untracked: None,
        size: record.size,
        epoch: record.epoch,
        history: record.history,
        lsn: LsnStatus::default(),
        lag: Lag::default(),
        dirty: Dirty::default(),
        window: Window { bytes: ByteCount::ZERO, limit: record.limits.window_bytes },
        spill: None,
        resync: None,
        // What the receiver lacks is not known before it is attached.
        resync_due: true,
        unreadable: None,
        hydration: None,
        ack: record.ack,
        on_outage: record.on_outage,
        limits: record.limits,
        counters: Counters::default(),
        engine: String::new(),
        engine_reason: None,
        cache: record.cache,
        rewound: record.rewound,
        origin: record.origin.clone(),
        clients: 0,
        awaited_clients: record.clientele.left().count(),
        guest_waits: None,
    }
}

/// The last status of such a disk, when it is not to be attached any more.
pub(crate) fn given_up(last: DiskStatus) -> DiskStatus {
    DiskStatus {
        reason: backtide_units::Reason::Detached.to_string(),
        reason_code: "detached".to_owned(),
        ..last
    }
}

fn mode(mode: backtide_io_filter::Mode) -> Mode {
    match mode {
        backtide_io_filter::Mode::Sync => Mode::Sync,
        backtide_io_filter::Mode::Resync => Mode::Resync,
        backtide_io_filter::Mode::Tracking => Mode::Tracking,
        backtide_io_filter::Mode::Paused => Mode::Paused,
        backtide_io_filter::Mode::Detached => Mode::Detached,
    }
}

/// A sentence and a code for people and scripts; in sync there is nothing to explain but a
/// connection that is away. What holds at this moment goes before what began it.
fn reason_of(
    status: &Status,
    last_error: Option<&PeerError>,
    guest_waits: Option<GuestWaits>,
) -> (String, String) {
    let serving =
        !matches!(status.mode, backtide_io_filter::Mode::Paused | backtide_io_filter::Mode::Detached);
    // No resume brings it back either.
    let attached = status.mode != backtide_io_filter::Mode::Detached;
    if let Some(error) = last_error.filter(|error| error.code == "fenced" && attached && !status.connected) {
        let reason = match guest_waits {
            Some(waits) => format!("{}; the guest has waited for {:.0} s", error.message, waits.seconds),
            None => error.message.clone(),
        };
        return (reason, "fenced".to_owned());
    }
    if let Some(waits) = guest_waits {
        return (awaited(status, waits), "guest-waits".to_owned());
    }
    if is_written_past(status) {
        return (Reason::WrittenPastAgent.to_string(), code(Reason::WrittenPastAgent));
    }
    let refuses = last_error.filter(|error| error.code == "store" && serving && !status.connected);
    if let Some(error) = refuses {
        let goes_on = match status.reason {
            None => "writes are retained".to_owned(),
            Some(Reason::ReceiverAway | Reason::ReceiverRefuses | Reason::Paused | Reason::Detached) => {
                "changes are tracked".to_owned()
            }
            Some(reason) => reason.to_string(),
        };
        let code = match status.reason {
            None => "retaining".to_owned(),
            Some(Reason::Paused | Reason::Detached) => code(Reason::ReceiverRefuses),
            Some(reason) => code(reason),
        };
        return (format!("the receiver refuses data: {}; {goes_on}", error.message), code);
    }
    match status.reason {
        // The operator's part is over: what is missing is the receiver.
        Some(Reason::Paused | Reason::Detached) if serving && !status.connected => {
            ("the receiver has not answered yet".to_owned(), code(Reason::ReceiverAway))
        }
        Some(Reason::Paused) if status.mode == backtide_io_filter::Mode::Resync => {
            ("what changed while it was paused is being sent".to_owned(), code(Reason::Paused))
        }
        Some(reason) => (reason.to_string(), code(reason)),
        None if status.connected => ("every write is forwarded".to_owned(), "in-sync".to_owned()),
        None => ("the receiver is away: writes are retained".to_owned(), "retaining".to_owned()),
    }
}

/// Whether that somebody else writes the image is what keeps the disk from being resynchronized, whatever its hole began with.
fn is_written_past(status: &Status) -> bool {
    status.written_past && status.mode == backtide_io_filter::Mode::Tracking
}

/// What the guest waits for, as far as it is known.
fn awaited(status: &Status, waits: GuestWaits) -> String {
    let seconds = waits.seconds.floor();
    match status.mode {
        _ if is_written_past(status) => format!(
            "the guest waits until nobody else has the image open and everything was compared, for {seconds} s so far"
        ),
        backtide_io_filter::Mode::Resync | backtide_io_filter::Mode::Tracking if status.connected => {
            format!("the guest waits until the resync has ended, for {seconds} s so far")
        }
        _ => format!("the guest waits for the receiver, which has said nothing for {seconds} s"),
    }
}

fn code(reason: Reason) -> String {
    match serde_json::to_value(reason) {
        Ok(serde_json::Value::String(code)) => code,
        Ok(_) | Err(_) => unreachable!("a reason serializes as its code"),
    }
}

/// How far its changes have come, and how far the receiver is behind.
pub(super) fn progress(engine: &Engine) -> (LsnStatus, Lag) {
    let status = engine.look(|filter| filter.status_at(engine.now()));
    (lsn(&status), lag(engine, &status))
}

fn lsn(status: &Status) -> LsnStatus {
    LsnStatus { last: status.last_lsn, received: status.received_lsn, durable: status.durable_lsn }
}

fn lag(engine: &Engine, status: &Status) -> Lag {
    let on_disk = status.spill.as_ref().map_or(0, |spill| spill.unread.0);
    let bytes = ByteCount(status.window.0 + on_disk + status.dirty.bytes().0);
    let in_sync = status.mode == backtide_io_filter::Mode::Sync && status.dirty.0 == 0;
    let seconds = match (in_sync, status.oldest_time) {
        (true, Some(oldest)) => {
            Duration::from_micros(engine.now().wall.0.saturating_sub(oldest.0)).as_secs_f64()
        }
        (true, None) => 0.0,
        (false, _) => engine.behind_for().as_secs_f64(),
    };
    Lag { records: status.lag_records, bytes, seconds }
}

/// The spill, or why there is none although there should be one.
fn spill(engine: &Engine, status: &Status) -> Option<Spill> {
    if let Some(error) = engine.spill_error() {
        return Some(Spill { error: Some(error.clone()), ..Spill::default() });
    }
    let spill = status.spill.as_ref()?;
    Some(Spill {
        bytes: spill.bytes,
        limit: spill.limit,
        records: spill.records,
        full: spill.full,
        error: spill.failure.clone(),
    })
}

/// `ends`: everything that the pass still has to read can be had.
fn resync(pass: &PassStatus, passes: u64, ends: bool) -> ResyncStatus {
    // Rounded up: what is left takes some time.
    let seconds = |time: Duration| time.as_secs() + u64::from(time.subsec_nanos() > 0);
    ResyncStatus {
        pass: u32::try_from(passes).unwrap_or(u32::MAX),
        at: pass.at,
        kind: if pass.forwarding { PassKind::Forwarding } else { PassKind::Coalescing },
        compare: pass.compare,
        forfeited: pass.forfeited,
        done_bytes: pass.done,
        total_bytes: pass.total,
        rate: pass.speed.rate,
        eta_seconds: pass.speed.pass_ends_in.filter(|_| ends).map(seconds),
        guest_rate: pass.speed.guest,
        sync_eta_seconds: pass.speed.sync_in.filter(|_| ends).map(seconds),
        held_to: pass.held_to,
        reason: pass.reason.to_string(),
        reason_code: code(pass.reason),
        point_recoverable: !pass.forfeited && !pass.incomplete,
    }
}

fn counters(engine: &Engine, status: &Status) -> Counters {
    let traffic = &engine.traffic;
    let filter = &status.counters;
    Counters {
        writes: traffic.writes.get(),
        write_bytes: ByteCount(traffic.write_bytes.get()),
        zeroes: traffic.zeroes.get(),
        reads: traffic.reads.get(),
        read_bytes: ByteCount(traffic.read_bytes.get()),
        flushes: traffic.flushes.get(),
        errors: traffic.errors.get(),
        guest_delay_max_us: filter.guest_delay_us_max,
        guest_delay_late_max_us: filter.guest_late_us_max,
        sent_bytes: ByteCount(traffic.sent_bytes.get()),
        resync_sent_bytes: ByteCount(traffic.resync_sent_bytes.get()),
        connects: filter.connections,
        disconnects: traffic.disconnects.get(),
        window_overflows: filter.overflows,
        spilled_bytes: ByteCount(filter.spilled_bytes),
        unspilled_bytes: ByteCount(filter.unspilled_bytes),
        passes: filter.passes,
        passes_forfeited: filter.forfeited,
        copies_before_write: filter.copies_before_write,
        passes_aborted: filter.passes_aborted,
        resync_equal_bytes: ByteCount(filter.resync_bytes_equal),
        failed_reads: filter.failed_reads,
        failed_changes: filter.failed_changes,
        degraded_answers: filter.degraded_answers,
        delayed_answers: filter.delayed_answers,
        polled_us: u64::try_from(engine.polling.spent().as_micros()).unwrap_or(u64::MAX),
        reads_gave_way: filter.reads_abandoned,
        cold_changes: filter.cold_changes,
        snapshots: filter.snapshots,
        transitions: filter.transitions,
    }
}

const _: () = assert!(DIFFERING_SPANS_MAX <= backtide_io_filter::STRETCHES_LISTED, "a report is cut short");

/// The verifies of a disk since its attach.
#[derive(Debug, Default)]
pub(crate) struct Verifies {
    count: u64,
    started: CaptureTime,
    ended: Option<CaptureTime>,
}

impl Verifies {
    pub(crate) fn begin(&mut self, now: CaptureTime) {
        self.count += 1;
        self.started = now;
        self.ended = None;
    }

    /// The running or last verify.
    pub(crate) fn status(&mut self, engine: &Engine) -> Option<VerifyStatus> {
        let disk = engine.name();
        let now = engine.now().wall;
        engine.look(|filter| {
            let (report, result) = filter.verify_state()?;
            if result.is_some() {
                self.ended.get_or_insert(now);
            }
            let (state, error) = match result {
                None => (VerifyState::Running, None),
                Some(Ok(())) => (VerifyState::Done, None),
                Some(Err(error)) => {
                    (VerifyState::Failed, Some(ApiError::from_error(ErrorCode::Failed, error)))
                }
            };
            let size = filter.settings().size;
            // Nothing is walked: this is asked for many times a second, and the guest waits meanwhile.
            let listed = report.differing.first(size).take(DIFFERING_SPANS_MAX);
            let differing: Vec<ByteSpan> =
                listed.map(|range| ByteSpan { offset: range.start(), length: range.count() }).collect();
            Some(VerifyStatus {
                disk,
                id: self.count,
                state,
                at: Some(report.to),
                from_lsn: report.from,
                to_lsn: result.map(|_| report.to),
                started: self.started,
                ended: self.ended,
                compared_bytes: report.compared,
                total_bytes: report.total,
                differing_bytes: report.differing.bytes(size),
                differing,
                differing_count: report.differing.stretches(),
                error,
            })
        })
    }
}
