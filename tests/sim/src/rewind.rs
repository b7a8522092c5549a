//! Somebody sets the disk back to a point: chosen, planned at the receiver, let go of, written down, attached again.
//! And whatever may come in between.
//!
//! The decisions are production's ([`Since`], [`lacking`], [`may_be_set_back`], [`differing`]); what is here is the
//! order in which an agent goes about it.

use std::{path::Path, sync::Arc};

use backtide_hydration::{Header, HydrationFile, Kind, Since, SourcePoint, lacking, may_be_set_back};
use backtide_io_filter::Mode;
use backtide_log_receiver::differing;
use backtide_tracking::{DirtyBitmap, SavedTracking};
use backtide_units::{BlockIndex, BlockRange, CaptureTime, Epoch, Lsn};
use bytes::Bytes;

use crate::{
    lacking::FILE,
    model::What,
    world::{Event, World},
};

/// How often is looked whether everything is durable.
const POLL_US: u64 = 5_000;

/// A rewind that was begun.
#[derive(Clone, Debug)]
pub(crate) struct Rewind {
    to: Lsn,
    /// What the receiver lacks is given up.
    force: bool,
    since: Since,
    changed: DirtyBitmap,
    /// The disk at the point.
    content: Bytes,
}

impl Rewind {
    /// The point that is gone back to.
    pub(crate) fn to(&self) -> Lsn {
        self.to
    }
}

impl World {
    /// Somebody wants to go back; the guest does nothing new meanwhile.
    pub(crate) fn want_rewind(&mut self) {
        let Some(agent) = &self.agent else { return };
        if agent.detaching || agent.wants_rewind || self.past.wrote {
            return;
        }
        let life = agent.life;
        self.agent.as_mut().expect("seen above").wants_rewind = true;
        self.stats.rewinds_wanted += 1;
        // As long as until some more things have gone wrong, then it is given up.
        let polls = (4 * self.plan.chaos_us / POLL_US).clamp(60, 400);
        self.after(0, Event::Rewind { life, polls });
    }

    /// Looks whether the receiver has everything by now.
    pub(crate) fn rewind_goes_on(&mut self, life: u64, polls: u64) {
        let living = self.agent.as_ref().filter(|agent| agent.life == life && !agent.detaching);
        let Some(agent) = living.filter(|_| polls > 0 && !self.calm) else {
            self.guest.paused = false;
            if let Some(agent) = self.agent.as_mut().filter(|agent| agent.life == life) {
                agent.wants_rewind = false;
            }
            return;
        };
        let status = agent.filter.status();
        let settled = status.connected && agent.filter.is_drained() && self.guest.requests.is_empty();
        let lacks = agent.hydrating.as_ref().is_some_and(|hydrating| !hydrating.is_complete());
        let force = lacks && self.random.one_in(8);
        // The guest does nothing new for the moment in which everything becomes durable.
        self.guest.paused = status.connected && agent.filter.mode() == Mode::Sync;
        self.stats.polls_settled += u64::from(settled);
        if !settled && !force {
            return self.after(POLL_US, Event::Rewind { life, polls: polls - 1 });
        }
        let since = match settled && !lacks {
            true => Since::Lsn(status.last_lsn),
            false => Since::Everything,
        };
        let Some(rewind) = self.plan_rewind(status.last_lsn, since, force) else {
            return self.after(POLL_US, Event::Rewind { life, polls: polls - 1 });
        };
        self.mark_as("before-rewind".to_owned());
        self.trace.note(self.now, "rewind", &[rewind.to.0, u64::from(force), u64::from(settled)]);
        self.agent.as_mut().expect("seen above").rewind = Some(rewind);
        self.ask_to_detach();
    }

    /// Asks the receiver for a point, and for what differs from it.
    fn plan_rewind(&mut self, last: Lsn, since: Since, force: bool) -> Option<Rewind> {
        let to = self.choose_point(last)?;
        self.plan_to(to, since, force, None)
    }

    fn plan_to(
        &mut self,
        to: Lsn,
        since: Since,
        force: bool,
        left: Option<&SavedTracking>,
    ) -> Option<Rewind> {
        // Who asks a receiver for points gets what is durable, after he has waited for that.
        let disk = self.receiver.disks.as_mut()?.get_mut(self.disk)?;
        if !self.link.up || disk.durable().seq < disk.appended() {
            return None;
        }
        let snapshot = disk.snapshot().ok()?;
        let view = snapshot.view(to).ok()?;
        if view.disk_size() != self.plan.size || view.history() != self.persisted.history {
            return None;
        }
        let content = view.read(self.whole()).expect("an offered point can be read");
        let blocks = match (since, left) {
            (Since::Everything, Some(saved)) => {
                differing::after(&snapshot, to, saved.acked_durable, saved.acked_position).ok()?
            }
            (Since::Everything, None) | (Since::Lsn(_), _) => {
                differing::changed(&snapshot, to, since.lsn()).ok()?
            }
        };
        let mut changed = DirtyBitmap::new();
        for block in blocks {
            changed.insert(BlockRange::between(BlockIndex(block), BlockIndex(block + 1)));
        }
        Some(Rewind { to, force, since, changed, content })
    }

    /// Any point before; the moment before the last rewind, which undoes it, more often than others.
    fn choose_point(&mut self, last: Lsn) -> Option<Lsn> {
        let snapshot = self.snapshot()?;
        let timeline = snapshot.timeline().clone();
        let before = self.lacking.before.filter(|before| *before < last && timeline.offers(*before));
        if let Some(before) = before
            && self.random.one_in(3)
        {
            self.stats.undone += 1;
            return Some(before);
        }
        let ends: Vec<_> = timeline.intervals().iter().map(|found| (found.from.lsn, found.to.lsn)).collect();
        let (from, to) = ends.get(self.random.below(ends.len().max(1) as u64) as usize).copied()?;
        let to = to.min(Lsn(last.0.saturating_sub(1)));
        (from <= to).then(|| Lsn(self.random.between(from.0, to.0)))
    }

    /// The disk was let go of for this: it is set back, if it was left as it has to be.
    pub(crate) fn set_back(&mut self, rewind: Rewind, saved: Option<SavedTracking>) {
        self.guest.paused = false;
        let chance = if self.calm { u64::MAX } else { 12 };
        let Some(saved) = saved.filter(|saved| may_be_set_back(saved, rewind.force)) else {
            self.stats.rewinds_refused += 1;
            return;
        };
        if self.random.below(chance) == 0 {
            return self.lose_host_power();
        }
        let lacked = self.lacking.open().map(|file| file.missing());
        let rewind = match Since::of(&saved, lacked.is_some()) {
            since @ Since::Lsn(_) if since == rewind.since => Some(rewind),
            since => self.plan_to(rewind.to, since, rewind.force, Some(&saved)),
        };
        let Some(Rewind { to, changed, content, .. }) = rewind else {
            self.stats.rewinds_refused += 1;
            return;
        };
        let missing = lacking(changed, &saved, lacked.as_ref(), self.plan.size);
        if missing.is_empty() {
            return;
        }
        let header = self.header_of(to, &saved, &missing);
        let cut = self.random.below(chance) == 0;
        if cut {
            self.lacking.storage.cut_power_after(self.random.below(8));
        }
        // What an image has refused to keep before it was lacking something is not what this is about.
        self.local.forgive(&DirtyBitmap::new());
        let storage = Arc::new(self.lacking.storage.clone());
        let made = HydrationFile::create(storage, Path::new(FILE), header.clone(), missing);
        if cut {
            self.lose_host_power();
        }
        // Whoever fails late may have left it all the same.
        let there = self
            .lacking
            .open()
            .is_some_and(|file| Header { boot: header.boot, ..file.header().clone() } == header);
        assert!(there || cut || (made.is_err() && self.lacking.faulty), "the hydration file was made");
        if there {
            self.is_set_back(to, saved.last_lsn, content);
        }
    }

    fn header_of(&self, to: Lsn, saved: &SavedTracking, missing: &DirtyBitmap) -> Header {
        Header {
            disk: self.disk,
            kind: Kind::Rewind,
            boot: self.lacking.boot(),
            epoch: Epoch(self.persisted.epoch),
            inode: 0,
            before: saved.last_lsn,
            total: missing.count(),
            compare: self.plan.compares,
            source: SourcePoint {
                receiver: "sim".to_owned(),
                disk: self.disk,
                name: "vm1".parse().expect("a name"),
                history: saved.history.expect("a disk in sync has one"),
                lsn: to,
                time: CaptureTime(0),
                size: self.plan.size,
            },
        }
    }

    /// From here on the disk is what it was at the point.
    fn is_set_back(&mut self, to: Lsn, before: Lsn, content: Bytes) {
        let wrong = self.model.image_at(to).mismatch(&content);
        assert_eq!(wrong, None, "point {to} is not what the disk was at this byte");
        self.model.change(before.next(), self.whole(), What::Bytes(content.clone()));
        self.shown.become_point(content.to_vec());
        self.lacking.point = Some(to);
        self.lacking.content = content;
        self.lacking.before = Some(before);
        self.lacking.begins = before.next();
        self.lacking.written = false;
        self.stats.rewinds += 1;
        self.trace.note(self.now, "set back", &[to.0, before.0]);
    }

    /// Whether the receiver has taken everything that it is going to take before a detach.
    pub(crate) fn has_caught_up(&self) -> bool {
        let Some(agent) = &self.agent else { return true };
        agent.filter.is_drained() || !agent.filter.status().connected || agent.filter.mode() != Mode::Sync
    }
}
