//! The guest: sends requests, several at once, overlapping ones too, and remembers what it was told.

use std::collections::{BTreeMap, BTreeSet};

use backtide_io_filter::{AckPolicy, Change, IoFailure, RequestId};
use backtide_units::{BlockRange, ByteCount, ByteOffset, ByteRange, Lsn};
use bytes::Bytes;

use crate::{
    local::LocalDisk,
    random::Random,
    world::{Event, World},
};

/// A request the guest waits for.
#[derive(Clone, Debug)]
pub struct Request {
    pub(crate) change: Change,
    pub(crate) submitted: u64,
    /// When its local I/O began, if it has.
    pub(crate) started: Option<u64>,
    /// When its local I/O ended, if it has.
    pub(crate) done: Option<u64>,
    /// The LSN the change got.
    pub(crate) lsn: Option<Lsn>,
    /// The highest LSN the guest had been told of when it sent this: its own must be above.
    floor: Lsn,
    /// Somebody else had or wanted the range: waiting for that is not the receiver's fault.
    pub(crate) contended: bool,
    /// Answers were held while it waited.
    pub(crate) held: bool,
    /// It waited for an extent to become hot.
    pub(crate) cold: bool,
    /// Something was read there when it was sent.
    pub(crate) behind_read: bool,
}

/// See the module's description.
#[derive(Clone, Debug, Default)]
pub struct Guest {
    pub(crate) requests: BTreeMap<u64, Request>,
    next: u64,
    stamp: u64,
    /// The highest LSN of a change the guest was told of.
    pub(crate) told: Lsn,
    /// Marks that were set, on whatever attach.
    pub(crate) marks: BTreeSet<(String, Lsn)>,
    /// It sends nothing new.
    pub(crate) quiet: bool,
    /// The same for a while.
    pub(crate) paused: bool,
}

impl Request {
    pub(crate) fn floor(&self) -> Lsn {
        self.floor
    }
}

impl Guest {
    /// LSNs above this are given again: it knows none of them any more.
    pub(crate) fn forget_above(&mut self, last: Lsn) {
        self.told = self.told.min(last);
        for request in self.requests.values_mut() {
            request.floor = request.floor.min(last);
        }
    }
}

impl World {
    pub(crate) fn guest_turn(&mut self) {
        let pause = if self.calm { self.plan.think_us.max(20_000) } else { self.plan.think_us };
        self.within(pause, Event::Guest);
        let may = self.agent.as_ref().is_some_and(|agent| !agent.detaching);
        if may && self.lacking.point.is_some() && self.random.one_in(3) {
            let range = self.draw_range();
            self.guest_reads(range);
        }
        let silent = self.guest.quiet || self.guest.paused;
        if !may || silent || self.guest.requests.len() as u64 >= self.plan.depth {
            return;
        }
        let change = self.draw_change();
        self.guest.next += 1;
        let number = self.guest.next;
        self.send_request(number, change);
    }

    /// The machine's connection to the agent broke: what was not answered is sent again.
    pub(crate) fn send_requests_again(&mut self) {
        for (number, request) in std::mem::take(&mut self.guest.requests) {
            self.send_request(number, request.change);
        }
    }

    fn send_request(&mut self, number: u64, change: Change) {
        let held = self.agent.as_ref().is_some_and(|agent| agent.holding);
        let request = Request {
            change: change.clone(),
            submitted: self.now,
            started: None,
            done: None,
            lsn: None,
            floor: self.guest.told,
            contended: self.is_contended(&change),
            held,
            cold: false,
            behind_read: change.range().is_some_and(|range| self.is_read(BlockRange::touched_by(range))),
        };
        let (start, count) = change.range().map_or((u64::MAX, 0), |range| (range.start().0, range.count().0));
        self.trace.note(self.now, "guest sends", &[number, start, count]);
        self.guest.requests.insert(number, request);
        let cold =
            |world: &Self| world.agent.as_ref().map(|agent| agent.filter.status().counters.cold_changes);
        let before = cold(self);
        self.call(|filter, now| filter.submit(now, RequestId(number), change));
        if cold(self) != before
            && let Some(request) = self.guest.requests.get_mut(&number)
        {
            request.cold = true;
        }
    }

    /// A write to the tracking file has ended: who waited for that begins to wait for the receiver
    /// only now.
    pub(crate) fn cold_requests_begin(&mut self) {
        for request in self.guest.requests.values_mut().filter(|request| request.cold) {
            if request.started.is_none() {
                request.submitted = self.now;
            }
        }
    }

    fn is_read(&self, blocks: BlockRange) -> bool {
        self.agent.as_ref().is_some_and(|agent| agent.reads(blocks))
    }

    /// Requests that had to wait for reads and wait for extents to become hot now.
    pub(crate) fn more_are_cold(&mut self) {
        for request in self.guest.requests.values_mut().filter(|request| request.behind_read) {
            request.cold |= request.started.is_none();
        }
    }

    fn is_contended(&self, change: &Change) -> bool {
        let Some(blocks) = change.range().map(BlockRange::touched_by) else { return false };
        let others = self.guest.requests.values().filter(|request| request.done.is_none());
        let mut wanted = others.filter_map(|request| request.change.range()).map(BlockRange::touched_by);
        let agent = self.agent.as_ref().expect("a request needs an agent");
        wanted.any(|other| other.overlaps(blocks)) || agent.occupies(blocks) || agent.may_verify(self.now)
    }

    fn draw_change(&mut self) -> Change {
        let kind = self.random.below(100);
        if kind < 6 {
            return Change::Flush;
        }
        let fua = self.random.one_in(10);
        let range = self.draw_range();
        match kind {
            6..=14 => Change::Zero { range, trim: self.random.one_in(2), fua },
            15..=18 => Change::Write { range, data: Bytes::from(vec![0; range.count().0 as usize]), fua },
            _ => {
                self.guest.stamp += 1;
                Change::Write { range, data: stamped(self.guest.stamp, range.count()), fua }
            }
        }
    }

    fn draw_range(&mut self) -> ByteRange {
        let size = self.plan.size.0;
        let unit = self.plan.alignment;
        let longest = if self.random.one_in(3) { self.plan.write_max } else { 8192.min(self.plan.write_max) };
        let count = self.random.between(1, longest.div_ceil(unit)) * unit;
        let reach = if self.random.permille(self.plan.hot_permille) { size / 8 } else { size };
        let start = self.random.below(reach.div_ceil(unit)) * unit;
        let end = (start + count).min(size);
        ByteRange::between(ByteOffset(start.min(end - 1)), ByteOffset(end))
    }

    /// The filter answers.
    pub(crate) fn answered(&mut self, request: RequestId, result: Result<Lsn, IoFailure>) {
        let Some(known) = self.guest.requests.remove(&request.0) else {
            panic!("request {} was answered twice", request.0)
        };
        let lsn = result.map_or(0, |lsn| lsn.0);
        self.trace.note(self.now, "guest hears", &[request.0, lsn]);
        if known.done.is_none() {
            assert!(
                result.is_err() && self.tracking.faulty,
                "nothing is answered before the local disk has it"
            );
            return;
        }
        let done = known.done.expect("seen just now");
        self.check_delay(&known, done);
        let Ok(lsn) = result else { return };
        self.check_answer(&known);
        if known.change == Change::Flush {
            return;
        }
        assert_eq!(known.lsn, Some(lsn), "the answer names another LSN than the change got");
        assert!(lsn > known.floor, "{lsn} is answered to a request sent after {} was", known.floor);
        self.guest.told = self.guest.told.max(lsn);
    }

    /// The guest comes first: waiting for the receiver is bounded.
    fn check_delay(&self, request: &Request, done: u64) {
        if self.plan.ack != AckPolicy::Local || request.held {
            return;
        }
        let bound = self.plan.guest_delay_max.as_micros() as u64;
        let started = request.started.expect("it ended, so it began");
        let mut waited = self.now - done;
        if !request.contended {
            waited += started - request.submitted;
        }
        assert!(waited <= bound, "the guest waited {waited} us for the receiver, the bound is {bound}");
    }
}

/// Bytes that tell which write they are of.
fn stamped(stamp: u64, count: ByteCount) -> Bytes {
    let count = count.0 as usize;
    let mut bytes = (stamp << 8 | 0xa5).to_le_bytes().repeat(count.div_ceil(8));
    bytes.truncate(count);
    bytes.into()
}

/// Puts data on about half of a disk.
pub(crate) fn prefill(local: &mut LocalDisk, random: &mut Random) {
    let size = local.content().len() as u64;
    for start in (0..size).step_by(16384) {
        if random.one_in(2) {
            let end = (start + 16384).min(size);
            let range = ByteRange::between(ByteOffset(start), ByteOffset(end));
            local.write(range, Some(&stamped(1 << 40 | start, range.count())), false);
        }
    }
    local.flush(local.flush_mark());
}
