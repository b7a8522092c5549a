//! What the receiver has promised: LSNs acknowledged as durable, points offered. And whether it
//! keeps it, whatever happens to it.

use backtide_log_receiver::Disk;
use backtide_recovery::Snapshot;
use backtide_units::{ByteOffset, ByteRange, Lsn};

use crate::{receiver::offered, world::World};

/// Promises of the receiver that hold for ever.
#[derive(Clone, Debug, Default)]
pub struct Promises {
    /// Everything up to it is durable.
    pub(crate) acked: Lsn,
    /// Everything up to it was in the receiver's memory at some time.
    pub(crate) received: Lsn,
    /// Points that were durable.
    pub(crate) intervals: Vec<(Lsn, Lsn)>,
}

impl World {
    /// What was acknowledged as durable is there; what was offered is offered. (Promises 4 and 5.)
    pub(crate) fn check_promises(&mut self) {
        let Some(disk) = self.receiver_disk() else { return };
        let Some(timeline) = disk.timeline() else { return };
        let covered = timeline.covered();
        assert!(
            covered >= self.promises.acked,
            "LSN {} was acknowledged as durable, the log ends at {covered}",
            self.promises.acked
        );
        let offers = offered(disk);
        self.check_past_agent(&offers);
        for (from, to) in &self.promises.intervals {
            let kept = offers.iter().any(|(first, last)| first <= from && to <= last);
            assert!(kept, "points {from} to {to} were offered, now there are {offers:?}");
        }
        if let Some(pass) = timeline.open_pass() {
            let newest = timeline.latest().map_or(Lsn::ZERO, |latest| latest.lsn);
            assert!(newest < pass.at, "point {newest} is offered, the pass at {} is not complete", pass.at);
        }
    }

    pub(crate) fn snapshot(&mut self) -> Option<Snapshot> {
        let disk: &mut Disk = self.receiver.disks.as_mut()?.get_mut(self.disk)?;
        disk.snapshot().ok()
    }

    /// Reads some of the offered points back, and asks for some that are not. (Promises 2 and 3.)
    pub(crate) fn check_some_points(&mut self, count: u64) {
        let Some(snapshot) = self.snapshot() else { return };
        let intervals: Vec<(Lsn, Lsn)> = snapshot
            .timeline()
            .intervals()
            .iter()
            .map(|interval| (interval.from.lsn, interval.to.lsn))
            .collect();
        if intervals.is_empty() {
            return;
        }
        for _ in 0..count {
            let newest = intervals.len() as u64 - 1;
            let which = if self.random.one_in(2) { newest } else { self.random.below(newest + 1) };
            let (from, to) = intervals[which as usize];
            let lsn = match self.random.below(4) {
                0 => from,
                1 => to,
                _ => Lsn(self.random.between(from.0, to.0)),
            };
            self.check_point(&snapshot, lsn);
            self.check_time(&snapshot, lsn);
        }
        self.check_clock(&snapshot);
        let lsn = Lsn(self.random.below(self.last_lsn().0 + 2));
        self.check_refused(&snapshot, lsn);
        let gap = self.random.pick(&intervals).1.next();
        self.check_refused(&snapshot, gap);
    }

    /// Both ends of every offered interval.
    pub(crate) fn check_all_ends(&mut self) {
        let Some(snapshot) = self.snapshot() else { return };
        let timeline = snapshot.timeline().clone();
        for interval in timeline.intervals() {
            self.check_point(&snapshot, interval.from.lsn);
            self.check_point(&snapshot, interval.to.lsn);
        }
        for mark in timeline.marks().iter().filter(|mark| timeline.offers(mark.at.lsn)) {
            self.check_point(&snapshot, mark.at.lsn);
            self.stats.marks += 1;
        }
    }

    fn check_point(&mut self, snapshot: &Snapshot, lsn: Lsn) {
        let view = snapshot.view(lsn).expect("an offered point has a view");
        let found = view.read(self.whole()).expect("an offered point can be read");
        let image = self.model.image_at(lsn);
        self.stats.points_checked += 1;
        if let Some(at) = image.mismatch(&found) {
            panic!(
                "point {lsn} is wrong at byte {at} (block {}): expected {:x?}, found {:x?}; it is offered as one of {:?}",
                at / 4096,
                &image.bytes[at..(at + 16).min(image.bytes.len())],
                &found[at..(at + 16).min(found.len())],
                snapshot.timeline().intervals()
            );
        }
    }

    /// The point of a time is the last captured by then, whatever clocks did: no two changes have one time.
    fn check_time(&mut self, snapshot: &Snapshot, lsn: Lsn) {
        let time = snapshot.time_of(lsn).expect("the log can be read");
        let Some(time) = time else { return };
        let found =
            snapshot.point_at(time).unwrap_or_else(|error| panic!("{lsn} of {time:?} is a point: {error:?}"));
        self.stats.times_asked += 1;
        let (wanted, named) = (self.model.image_at(lsn), self.model.image_at(found));
        assert_eq!(
            wanted.mismatch(&named.bytes),
            None,
            "{lsn} was captured at {time:?}, which names {found}"
        );
    }

    /// Later points are not captured earlier, whatever clocks did; and until the time of one, nothing was captured that is
    /// not in it.
    fn check_clock(&self, snapshot: &Snapshot) {
        let intervals = snapshot.timeline().intervals();
        let ends: Vec<_> = intervals.iter().flat_map(|interval| [interval.from, interval.to]).collect();
        for two in ends.windows(2) {
            assert!(two[0].time <= two[1].time, "times go back from {:?} to {:?}", two[0], two[1]);
        }
        for end in intervals.iter().map(|interval| interval.to) {
            if let Some((lsn, time)) = self.captured.range(end.lsn.next()..).next() {
                assert!(*time > end.time, "{lsn} was captured at {time:?}, in the point {end:?}");
            }
        }
    }

    fn check_refused(&mut self, snapshot: &Snapshot, lsn: Lsn) {
        let offers = snapshot.timeline().intervals().iter();
        if offers.clone().all(|interval| lsn < interval.from.lsn || lsn > interval.to.lsn) {
            assert!(snapshot.view(lsn).is_err(), "{lsn} is in no interval and has a view");
            self.stats.holes_refused += 1;
        }
    }

    pub(crate) fn whole(&self) -> ByteRange {
        ByteRange::between(ByteOffset::ZERO, ByteOffset(self.plan.size.0))
    }
}
