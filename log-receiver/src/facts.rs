//! What a disk's owner tells others about it: plain values, taken at one moment.

use std::collections::BTreeMap;

use backtide_protocol::AckPolicy;
use backtide_receiver_api::{DiskOrigin, Touched};
use backtide_units::{ByteCount, CaptureTime, DiskId, DiskName, Epoch, HistoryId, Lsn};

use crate::{
    clock::{self, Difference},
    disk::Disk,
    findings::Finding,
    points,
};

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
    /// What the store had less of than its agent knew to be durable: sentences, each with whether any point was left.
    pub(crate) lacked: Vec<(bool, String)>,
    /// Intervals beyond those that are offered.
    pub(crate) forgotten_intervals: u64,
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
            lacked: disk.lacked(clock::now()),
            forgotten_intervals: timeline.map_or(0, |timeline| timeline.forgotten().intervals),
        }
    }
}
