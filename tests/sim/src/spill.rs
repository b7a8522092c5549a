//! The spill of the simulated agent: the production files over a storage that loses power, tears
//! writes, rots, fills up and fails now and then.

use std::sync::Arc;

use backtide_io_filter::{Filter, IoId, Mode, SpillDone, SpillOp};
use backtide_spill::{RingLimits, SpillFiles};
use backtide_storage::MemoryStorage;
use backtide_units::{BlockRange, ByteCount, ByteOffset, Reason};

use crate::{
    reserve::check_reserved,
    world::{Event, World},
};

/// What lies where the spill is.
#[derive(Clone, Default)]
pub(crate) struct Spill {
    pub(crate) storage: MemoryStorage,
    /// The storage was told to fail, or lies, and an alarm is right.
    pub(crate) faulty: bool,
}

impl World {
    fn spill_files(&self) -> Option<SpillFiles> {
        let storage = Arc::new(self.spill.storage.clone());
        Some(SpillFiles::new(storage, self.disk, self.plan.spill?))
    }

    fn ring_limits(&self) -> Option<RingLimits> {
        let end = BlockRange::whole_disk(self.plan.size).end();
        Some(RingLimits::new(self.plan.spill?, self.plan.window, self.plan.bitmap, end))
    }

    /// Gives a new filter its spill, with what the last one left there.
    pub(crate) fn recover_spill(&mut self, filter: &mut Filter) {
        let (Some(files), Some(limits)) = (self.spill_files(), self.ring_limits()) else { return };
        let recovered = files.recover(limits).expect("the directory can be listed");
        if let Some(left) = recovered.left.filter(|left| Some(left.history) == self.persisted.history) {
            self.trace.note(self.now, "spill found", &[left.epoch.0, recovered.ring.end().0]);
            self.stats.spills_found += 1;
            let (base, acked) = (recovered.ring.base(), self.promises.acked);
            // An agent that noticed an older store may have died before it had removed what does not fit any more.
            let fits = base <= acked || self.stats.stores_put_back > 0;
            assert!(fits, "the spill begins behind LSN {base}, the receiver has LSN {acked} only");
        }
        filter.use_spill(recovered);
        self.stats.spills_complete += u64::from(filter.mode() == Mode::Sync && filter.holds_spill());
    }

    pub(crate) fn begin_spill(&mut self, io: IoId, op: SpillOp) {
        let agent = self.agent.as_mut().expect("it asked");
        let life = agent.life;
        if let SpillOp::Append(_, messages) = &op {
            messages.iter().for_each(|message| check_reserved(self.persisted.reserved, message));
        }
        let kind = match &op {
            SpillOp::Append(slot, _) => slot.first,
            SpillOp::Read(place) => place.first,
            SpillOp::Remove(files) => files.len() as u64,
        };
        agent.spill_ops.insert(io, op);
        self.trace.note(self.now, "spill begins", &[io.0, kind]);
        let us = if self.calm { 200 } else { self.plan.spill_us };
        self.within(us, Event::Spill { life, io });
    }

    pub(crate) fn spill_goes_on(&mut self, life: u64, io: IoId) {
        let Some(agent) = self.agent.as_mut().filter(|agent| agent.life == life) else { return };
        let op = agent.spill_ops.remove(&io).expect("an operation ends once");
        let done = self.do_spill(&op);
        self.trace.note(self.now, "spill ends", &[io.0]);
        self.call(|filter, now| filter.spill_done(now, io, done));
        self.check_spill();
        self.detach_when_quiet();
    }

    fn do_spill(&self, op: &SpillOp) -> SpillDone {
        let files = self.spill_files().expect("there is a spill");
        let result = match op {
            SpillOp::Append(slot, messages) => files.append(slot, messages),
            SpillOp::Remove(numbers) => files.remove(numbers),
            SpillOp::Read(place) => {
                let back = files.read(place);
                return SpillDone::Read(back.messages, back.failure.map(|failure| failure.to_string()));
            }
        };
        result.map_or_else(|failure| SpillDone::Failed(failure.to_string()), |()| SpillDone::Durable)
    }

    /// The limits are kept.
    fn check_spill(&mut self) {
        let Some(limit) = self.plan.spill else { return };
        let used = self.spill.storage.used();
        assert!(used <= limit, "the spill takes {used} bytes of {limit}");
        let Some(agent) = &self.agent else { return };
        let status = agent.filter.status();
        let spill = status.spill.as_ref().expect("there is one");
        let acked = self.promises.acked;
        assert!(
            spill.records == 0 || spill.from <= acked || self.receiver.is_put_back_unseen(),
            "the spill begins behind LSN {}, the receiver has LSN {acked} only",
            spill.from
        );
        let most = 2 * self.plan.window.0 + 2 * self.plan.write_max + 4096;
        assert!(
            status.window.0 <= most,
            "{} bytes in memory, the window has {}",
            status.window,
            self.plan.window
        );
    }

    /// With a spill, the log has a gap only when that is full, fails, or is slower than the guest.
    pub(crate) fn check_spill_was_used(&mut self, reason: Option<Reason>) {
        let (Some(limit), Some(agent)) = (self.plan.spill, &self.agent) else { return };
        let status = agent.filter.status().spill.expect("there is one");
        let under_way = |op: &SpillOp| matches!(op, SpillOp::Append(..) | SpillOp::Remove(_));
        let busy = agent.spill_ops.values().any(under_way);
        match reason {
            Some(Reason::ReceiverAway | Reason::LinkTooSlow | Reason::ReceiverRefuses) => {
                let giant = 2 * self.plan.write_max >= self.plan.window.0;
                let held = agent.filter.last_lsn() > self.persisted.reserved;
                assert!(
                    busy || giant || held,
                    "an outage that the spill has room for made a gap: {status:?}"
                );
                self.stats.spills_slow += 1;
            }
            Some(Reason::SpillFull) => {
                let left = limit.0 - status.bytes.0;
                let batch = self.plan.write_max + 4096 + limit.0 / 8;
                assert!(left <= batch, "the spill is full with {left} bytes left of {limit}");
                self.stats.spills_full += 1;
            }
            Some(Reason::SpillFailed) => {
                assert!(self.spill.faulty, "the spill is sound: {status:?}");
                self.stats.spills_failed += 1;
            }
            Some(_) | None => {}
        }
    }

    /// The agent dies: what it was doing is done, or not, or with a power loss in part.
    pub(crate) fn kill_spill(&mut self, ops: Vec<SpillOp>, power: bool) {
        for op in ops {
            if self.random.one_in(2) {
                continue;
            }
            if power {
                self.spill.storage.cut_power_after(self.random.below(4));
            }
            // Nobody is left to be told how it went.
            let _ = self.do_spill(&op);
        }
        if power {
            self.lose_spill_power();
        }
    }

    pub(crate) fn lose_spill_power(&mut self) {
        let seed = self.random.below(u64::MAX);
        self.spill.storage.crash(seed);
    }

    /// The spill's storage fails once, is full for a while, or rots.
    pub(crate) fn spill_fault(&mut self) {
        if self.plan.spill.is_none() || !self.plan.store_faults {
            return;
        }
        self.spill.faulty = true;
        match self.random.below(8) {
            0 => self.spill.storage.fail_write_after(self.random.below(3)),
            1 => self.spill.storage.fail_sync_after(self.random.below(3)),
            2 => {
                let left = self.random.below(100_000);
                let used = self.spill.storage.used().0;
                self.spill.storage.set_capacity(Some(ByteCount(used + left)));
                self.within(self.plan.outage_us, Event::SpillHeal);
            }
            _ => {
                let files = self.spill.storage.files();
                if files.is_empty() {
                    return;
                }
                let (path, bytes) = &files[self.random.below(files.len() as u64) as usize];
                let at = self.random.below((bytes.len() as u64).max(1));
                if !bytes.is_empty() {
                    self.spill.storage.flip_bit(path, ByteOffset(at), 3);
                }
            }
        }
    }
}
