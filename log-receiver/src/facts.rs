//! What a disk's owner tells others about it: plain values, taken at one moment.

use std::{collections::BTreeMap, time::Duration};

use backtide_protocol::AckPolicy;
use backtide_receiver_api::{DiskOrigin, Touched};
use backtide_recovery::{Hole, TimedLsn, time_text};
use backtide_units::{ByteCount, CaptureTime, DiskId, DiskName, Epoch, HistoryId, Lsn, Reason};

use crate::{
    clock::{self, Difference},
    disk::Disk,
    findings::Finding,
    points,
};

/// So long it is told that a store had less than it had acknowledged.
const TOLD_FOR: Duration = Duration::from_secs(7 * 24 * 60 * 60);

/// One disk at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct DiskFacts {
    pub(crate) id: DiskId,
    /// As the newest attach gave it; none when it was never claimed, or nothing of that can be read.
    pub(crate) name: Option<DiskName>,
    pub(crate) size: ByteCount,
    pub(crate) history: Option<HistoryId>,
    pub(crate) epoch: Epoch,
    pub(crate) connected: bool,
    pub(crate) in_pass: bool,
    pub(crate) received: Lsn,
    pub(crate) durable: Lsn,
    pub(crate) last_time: Option<CaptureTime>,
    /// How the clock of its times differs from this machine's, as far as it shows.
    pub(crate) clock: Option<Difference>,
    /// When its guest was answered last, as far as an agent said.
    pub(crate) ack: Option<String>,
    /// And what that means while the receiver is away.
    pub(crate) on_outage: Option<String>,
    /// The point of another disk that it began as.
    pub(crate) origin: Option<DiskOrigin>,
    pub(crate) log_bytes: ByteCount,
    pub(crate) segments: u64,
    pub(crate) error: Option<String>,
    /// That is damage: the log is not opened again, another one begins when the agent comes.
    pub(crate) is_damaged: bool,
    pub(crate) damage: Vec<String>,
    /// Which points that touches, as far as it is known.
    pub(crate) touched: Vec<Touched>,
    /// The first point of each of its logs that has one, by number.
    pub(crate) begins: BTreeMap<u32, Lsn>,
    /// Where the log begins or goes on with less than its agent knew to be durable: the newest such place.
    pub(crate) rolled_back: Option<RolledBack>,
    /// Intervals beyond those that are offered.
    pub(crate) forgotten_intervals: u64,
}

/// History that had been acknowledged as durable, and that the store had no more when the agent came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RolledBack {
    /// The last point before it; none when nothing was left.
    pub(crate) from: Option<TimedLsn>,
    /// The first point after it; none before there is one.
    pub(crate) to: Option<TimedLsn>,
}

impl RolledBack {
    /// The newest of a disk. What is lost with a damaged log is told as damage.
    fn of(disk: &Disk) -> Option<Self> {
        if !disk.past().logs().is_empty() {
            return None;
        }
        let is_so = |hole: &&Hole| hole.reason.code == Reason::ReceiverRolledBack.code();
        let hole = disk.timeline()?.holes().iter().rev().find(is_so)?;
        Some(Self { from: hole.from, to: hole.to })
    }

    /// What a person should know of it, for a week after there is a point again.
    pub(crate) fn told(&self, now: CaptureTime) -> Option<String> {
        let is_long_ago = |to: TimedLsn| now.0.saturating_sub(to.time.0) > TOLD_FOR.as_micros() as u64;
        if self.to.is_some_and(is_long_ago) {
            return None;
        }
        let gone = match self.from {
            Some(from) => {
                format!("points and marks after lsn:{} ({}) are gone", from.lsn, time_text(from.time))
            }
            None => "all points and marks of before are gone".to_owned(),
        };
        let since = match self.to {
            Some(to) => format!(
                "everything was compared or sent anew, lsn:{} ({}) is the next point; this is told for a week after it",
                to.lsn,
                time_text(to.time)
            ),
            None => "its agent has not brought everything anew yet".to_owned(),
        };
        Some(format!(
            "the store had less of it than had been acknowledged as durable, as one has that was put back to an older copy: \
             {gone}; {since}"
        ))
    }
}

impl DiskFacts {
    /// Takes what was found damaged beside what its owner knows.
    pub(crate) fn add_findings(&mut self, found: Vec<Finding>) {
        for Finding { damage, touched } in found {
            if !self.damage.contains(&damage) {
                self.damage.push(damage);
                self.touched.extend(touched);
            }
        }
    }

    pub(crate) fn of(disk: &Disk) -> Self {
        let timeline = disk.timeline();
        let attached = disk.attached();
        let answers = timeline.and_then(|timeline| AckPolicy::of_code(timeline.ack()));
        Self {
            id: disk.id(),
            name: attached.map(|attached| attached.name.clone()),
            size: disk.size(),
            history: disk.history(),
            epoch: attached.map_or(Epoch(0), |attached| attached.epoch),
            connected: disk.owner().is_some(),
            in_pass: timeline.is_some_and(|timeline| timeline.open_pass().is_some()),
            received: timeline.map_or(Lsn::ZERO, |timeline| timeline.covered()),
            durable: disk.durable().lsn,
            last_time: timeline.and_then(|timeline| timeline.latest()).map(|point| point.time),
            clock: timeline.and_then(|timeline| Difference::seen(timeline, disk.came(), clock::now())),
            ack: answers.map(|(ack, _)| ack.name().to_owned()),
            on_outage: answers.map(|(_, on_outage)| on_outage.name().to_owned()),
            origin: timeline.and_then(|timeline| timeline.origin()).map(points::origin),
            log_bytes: disk.log_bytes(),
            segments: disk.segments(),
            error: disk.failure().map(|failure| failure.why.clone()),
            is_damaged: disk.failure().is_some_and(|failure| failure.damaged),
            damage: disk.damage().cloned().collect(),
            touched: disk.lost_points(),
            begins: disk.begins(),
            rolled_back: RolledBack::of(disk),
            forgotten_intervals: timeline.map_or(0, |timeline| timeline.forgotten().intervals),
        }
    }
}
