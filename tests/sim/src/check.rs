//! What must be true, and which promise each check stands for.
//!
//! All the while:
//! - every block that differs between disk and receiver is one the filter answers for ([`World`],
//!   promise 1);
//! - offered points equal the model, points in holes are refused, an open pass offers nothing
//!   (promises 2 and 3), also in the middle of outages;
//! - what was offered stays offered, what was acknowledged as durable is there after a crash
//!   (promises 4 and 5, also at each start of the receiver);
//! - no answer is later than the bound allows (promise 6), none names a wrong LSN or one out of order;
//! - an answer by the policy `received` or `durable` is covered by what the receiver has; none waits
//!   for a receiver that is away, unless the policy says so;
//! - every read of the image gives what the disk shows, missing blocks are never read; the disk is what the model says,
//!   and after a crash what it was; a note beside the image says so while blocks are missing, and no longer;
//! - a pass only shrinks (promise 7); replaced connections and stale epochs change nothing (promise 8);
//! - while somebody else writes the image no mark is taken, and the moment at which that is seen is no point;
//! - a verify finds nothing; nobody closes a connection for an invalid message, nobody alarms.
//!
//! At the end, with the world healed: sync is reached under load and then everything drains; disk,
//! receiver and model are equal; a planted difference is found.

use backtide_io_filter::{AckPolicy, Filter, Mode, OnOutage};
use backtide_units::{BlockRange, ByteCount, ByteOffset, ByteRange, Lsn};

use crate::{guest::Request, hydration::Hydrating, world::World};

/// Virtual time for the healed world to be in sync, and then to drain.
const PATIENCE_US: u64 = 120_000_000;

impl World {
    pub(crate) fn check_now(&mut self) {
        self.check_promises();
        self.check_nobody_waits();
        self.check_disk();
        self.check_note();
        self.check_differences();
        self.check_some_points(2);
    }

    /// Nothing acknowledged is forgotten: the filter answers for every difference.
    pub(crate) fn check_differences(&mut self) {
        if self.receiver.is_put_back_unseen() {
            return;
        }
        let Some(agent) = &self.agent else { return };
        let Some(unsettled) = agent.filter.unsettled_blocks() else { return };
        let Some(snapshot) = self.snapshot() else { return };
        let newest = snapshot.latest_view().read(self.whole()).expect("the log can be read");
        self.stats.differences_checked += 1;
        let shown = self.shown.disk.content();
        for (block, (local, remote)) in (0..).zip(shown.chunks(4096).zip(newest.chunks(4096))) {
            if local != remote {
                let range = BlockRange::from(block..block + 1);
                assert!(
                    unsettled.contains(range),
                    "block {block} differs, and nobody answers for it: disk {:x?}, receiver {:x?}",
                    &local[..16],
                    &remote[..16]
                );
            }
        }
    }

    /// While the receiver cannot be waited for, nobody waits for it, unless the policy says so.
    fn check_nobody_waits(&self) {
        let Some(agent) = &self.agent else { return };
        let status = agent.filter.status();
        let in_sync = status.connected && status.mode == Mode::Sync;
        if in_sync || self.plan.ack == AckPolicy::Local || self.plan.on_outage == OnOutage::Block {
            return;
        }
        // Slowed down a little it may be: that is bounded by the delay.
        let bound = self.plan.guest_delay_max.as_micros() as u64;
        let late = |done: u64| self.now - done > bound;
        let waits = |request: &&Request| request.done.is_some_and(late) && !request.held;
        let waiting = self.guest.requests.values().find(waits);
        if let Some(Request { done, lsn, .. }) = waiting {
            panic!("the guest waits for a receiver that is away: LSN {lsn:?}, done at {done:?} us");
        }
    }

    /// A mark names what it was set on, and nothing else is a mark.
    fn check_marks(&mut self) {
        let snapshot = self.snapshot().expect("the receiver is there");
        for mark in snapshot.timeline().marks() {
            let set = self.guest.marks.contains(&(mark.label.clone(), mark.at.lsn));
            assert!(set, "nobody set the mark {mark:?}");
        }
    }

    /// A flush (or stable write) that was answered by the policy is covered.
    pub(crate) fn check_answer(&mut self, request: &Request) {
        let agent = self.agent.as_ref().expect("it answered");
        let waits = match self.plan.ack {
            AckPolicy::Local => false,
            AckPolicy::Received | AckPolicy::DurableEveryWrite => true,
            AckPolicy::Durable => request.change.wants_stable(),
        };
        if !waits || agent.degraded || request.held || self.receiver.is_put_back_unseen() {
            return;
        }
        let needed = request.lsn.unwrap_or(Lsn::ZERO).max(request.floor());
        if self.plan.ack == AckPolicy::Received {
            let received = self.promises.received.max(self.promises.acked);
            return assert!(received >= needed, "answered as received: {needed}, received: {received}");
        }
        let offered = self.promises.intervals.last().map_or(Lsn::ZERO, |(_, to)| *to);
        let acked = self.promises.acked;
        assert!(
            acked >= needed && offered >= needed,
            "an answer as durable needs LSN {needed}: acknowledged {acked}, recoverable {offered}"
        );
    }

    /// Nothing goes wrong any more; see whether all ends well.
    pub(crate) fn end_well(&mut self) {
        self.calm_down();
        let healed = self.now + 2 * self.plan.outage_us;
        self.run_until("sync under load", |world| {
            world.now > healed && world.mode() == Some(Mode::Sync) && world.is_connected() && world.is_whole()
        });
        self.guest.quiet = true;
        self.run_until("everything is durable", |world| {
            let agent = world.agent.as_ref();
            // A pass that was forced may still be looking for its blocks: a verify would be interrupted by it.
            let rests = |filter: &Filter| filter.is_drained() && !filter.status().scanning;
            agent.is_some_and(|agent| rests(&agent.filter) && agent.inflight.is_empty())
                && world.guest.requests.is_empty()
        });
        self.run_until("a crash costs a compare of little again", |world| {
            world.agent.as_ref().is_some_and(|agent| agent.filter.status().untracked.is_none())
        });
        assert!(!self.past.wrote, "everything was compared, and somebody is still said to write the image");
        self.check_now();
        self.check_all_ends();
        self.check_marks();
        self.check_equal();
        self.verify_finds(None, false);
        let planted = self.random.below(self.plan.size.0) as usize;
        self.local.flip(planted);
        self.shown.disk.flip(planted);
        self.verify_finds(Some(planted), true);
        self.run_until("the repair is durable", |world| {
            world.agent.as_ref().is_some_and(|agent| agent.filter.is_drained())
        });
        self.verify_finds(None, false);
        let agent = self.agent.take().expect("it is alive");
        self.count(&agent.filter);
    }

    fn run_until(&mut self, what: &str, done: impl Fn(&Self) -> bool) {
        let until = self.now + PATIENCE_US;
        while !done(self) {
            self.step();
            assert!(self.now < until, "{what}: not reached in {PATIENCE_US} us; {}", self.describe());
        }
    }

    fn describe(&self) -> String {
        let status = self.agent.as_ref().map(|agent| agent.filter.status());
        format!("{status:#?}, {} requests wait", self.guest.requests.len())
    }

    fn mode(&self) -> Option<Mode> {
        self.agent.as_ref().map(|agent| agent.filter.mode())
    }

    fn is_connected(&self) -> bool {
        self.agent.as_ref().is_some_and(|agent| agent.filter.status().connected)
    }

    fn is_whole(&self) -> bool {
        let hydrating = self.agent.as_ref().and_then(|agent| agent.hydrating.as_ref());
        hydrating.is_none_or(Hydrating::is_complete)
    }

    fn is_verifying(&self) -> bool {
        let state = self.agent.as_ref().and_then(|agent| agent.filter.verify_state());
        state.is_some_and(|(_, result)| result.is_none())
    }

    /// Disk, model and receiver hold the same.
    fn check_equal(&mut self) {
        let snapshot = self.snapshot().expect("the receiver is there");
        let newest = snapshot.latest_view().read(self.whole()).expect("the log can be read");
        let latest = snapshot.timeline().latest().expect("sync means points").lsn;
        let point = snapshot.view(latest).expect("the newest point is one").read(self.whole());
        let local = self.local.content();
        let first = (0..local.len()).find(|at| local[*at] != newest[*at]);
        assert_eq!(first, None, "disk and receiver differ in sync");
        assert!(point.expect("it can be read") == newest, "the newest point is not the newest version");
        let mismatch = self.model.image_at(Lsn::MAX).mismatch(self.local.content());
        assert_eq!(mismatch, None, "the disk is not what the guest made of it");
    }

    /// A verify finds exactly what was planted, and repairs it when told to.
    fn verify_finds(&mut self, planted: Option<usize>, repair: bool) {
        self.run_until("an older verify ends", |world| !world.is_verifying());
        self.call(|filter, now| filter.start_verify(now, repair)).expect("a disk in sync can be verified");
        self.run_until("the verify ends", |world| !world.is_verifying());
        let agent = self.agent.as_ref().expect("it is alive");
        let (report, result) = agent.filter.verify_state().expect("it has run");
        assert_eq!(result, Some(&Ok(())));
        let found: Vec<ByteRange> = report.differing_ranges(self.plan.size).collect();
        match planted {
            None => assert!(found.is_empty(), "a false alarm: {report:?}"),
            Some(at) => {
                let byte = ByteRange::new(ByteOffset(at as u64), ByteCount(1)).expect("on the disk");
                assert!(found.len() == 1 && found[0].contains(byte), "byte {at} differs, found {found:?}");
            }
        }
    }
}
