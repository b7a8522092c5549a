//! The local I/O of the simulated agent: what the filter has the disk do goes straight to the image, or, where blocks
//! are missing, by the hydrator. It happens in halves, fails now and then, and ends late.

use backtide_hydration::{RequestId, Wish};
use backtide_io_filter::{Change, IoFailure, IoId, LocalData, LocalOp, Prepared};
use backtide_units::{ByteOffset, ByteRange, Lsn};
use bytes::Bytes;

use crate::{
    model::What,
    world::{Event, World},
};

/// A local I/O under way.
#[derive(Clone, Debug)]
pub(crate) struct InFlight {
    pub(crate) op: LocalOp,
    pub(crate) request: Option<u64>,
    /// T of the freeze that this was under way at.
    pub(crate) frozen: Option<Lsn>,
    /// It goes by the hydrator.
    pub(crate) hydrated: Option<RequestId>,
    /// The image was told to fail it.
    fails: bool,
    content: Option<Bytes>,
    flush_mark: u64,
    shown_mark: u64,
    /// How often the image had refused a flush when it began.
    refusals: u64,
}

impl InFlight {
    /// What it changes.
    pub(crate) fn range(&self) -> Option<ByteRange> {
        match &self.op {
            LocalOp::Change(change) => change.range(),
            LocalOp::Read(_) | LocalOp::Settle => None,
        }
    }
}

impl World {
    /// A local I/O the filter asked for begins.
    pub(crate) fn begin_local(&mut self, io: IoId, op: LocalOp) {
        let request = match &op {
            LocalOp::Change(change) => Some(self.start_request(change)),
            LocalOp::Read(_) | LocalOp::Settle => None,
        };
        self.trace.say(self.now, || match &op {
            LocalOp::Change(change) => format!("request {request:?} {:?}", change.range()),
            LocalOp::Read(range) => format!("read {range}"),
            LocalOp::Settle => "settle".to_owned(),
        });
        let wish = wish_of(&op);
        let (flush_mark, shown_mark) = (self.local.flush_mark(), self.shown.disk.flush_mark());
        let inflight = InFlight {
            op,
            request,
            frozen: None,
            hydrated: None,
            fails: false,
            content: None,
            flush_mark,
            shown_mark,
            refusals: self.lacking.refusals,
        };
        let agent = self.agent.as_mut().expect("the filter asked");
        agent.inflight.insert(io, inflight);
        match agent.hydrating.as_mut().filter(|hydrating| hydrating.needs_care(wish)) {
            Some(hydrating) => {
                let id = hydrating.submit(wish, io);
                let inflight = agent.inflight.get_mut(&io).expect("inserted above");
                inflight.hydrated = Some(id);
                if matches!(inflight.op, LocalOp::Read(_)) {
                    agent.filter.read_is_far(io);
                }
                self.trace.note(self.now, "local waits", &[io.0]);
                self.hydrate();
            }
            None => self.begin_on_image(io),
        }
    }

    /// The image has it from now on.
    pub(crate) fn begin_on_image(&mut self, io: IoId) {
        let agent = self.agent.as_mut().expect("it is alive");
        let (life, op) = (agent.life, agent.inflight[&io].op.clone());
        let flushes = matches!(&op, LocalOp::Settle | LocalOp::Change(Change::Flush));
        // A server's refusal that nobody was told of is told to whoever flushes next.
        let untold = flushes && std::mem::take(&mut self.lacking.untold);
        let fails = self.image_fails(&op) || untold;
        let write = matches!(&op, LocalOp::Change(change) if *change != Change::Flush);
        self.trace.note(self.now, "local begins", &[io.0, u64::from(write), u64::from(fails)]);
        let inflight = self.agent.as_mut().and_then(|agent| agent.inflight.get_mut(&io));
        inflight.expect("seen above").fails = fails;
        let mut at: Vec<u64> = (0..3).map(|_| self.random.below(self.plan.local_us + 1)).collect();
        at.sort_unstable();
        for (stage, us) in (0..).zip(at) {
            self.after(us, Event::Local { life, io, stage });
        }
    }

    /// Whether the image fails this, as planned.
    pub(crate) fn image_fails(&mut self, op: &LocalOp) -> bool {
        let permille = match op {
            _ if self.calm => 0,
            LocalOp::Read(_) => self.plan.read_errors_permille,
            LocalOp::Change(_) | LocalOp::Settle => self.plan.write_errors_permille,
        };
        let bad = matches!(op, LocalOp::Read(range) if self.local.is_bad(*range));
        bad || (permille > 0 && self.random.permille(permille))
    }

    /// The filter names no request: the oldest with this change that has not begun is meant.
    fn start_request(&mut self, change: &Change) -> u64 {
        let mut waiting = self.guest.requests.iter_mut().filter(|(_, request)| request.started.is_none());
        let (number, request) =
            waiting.find(|(_, request)| request.change == *change).expect("somebody asked for this change");
        request.started = Some(self.now);
        *number
    }

    pub(crate) fn local_goes_on(&mut self, life: u64, io: IoId, stage: u8) {
        let Some(agent) = self.agent.as_mut().filter(|agent| agent.life == life) else { return };
        if stage < 2 {
            let mut inflight = agent.inflight[&io].clone();
            self.half_of(&mut inflight, stage);
            let agent = self.agent.as_mut().expect("it is alive");
            agent.inflight.insert(io, inflight);
            return;
        }
        let InFlight { hydrated, fails, .. } = agent.inflight[&io];
        let mut result = if fails { Err(IoFailure { errno: 5 }) } else { Ok(()) };
        match hydrated {
            Some(id) => {
                if self.plan.server && result.is_ok() {
                    result = self.overwritten_stably(io, id);
                }
                self.image_done(id, result);
            }
            None => self.local_ends(io, result),
        }
    }

    /// Behind a server what overwrote missing blocks is stable before the journal hears of it; what a flush was refused
    /// of meanwhile is written again.
    fn overwritten_stably(&mut self, io: IoId, id: RequestId) -> Result<(), IoFailure> {
        let agent = self.agent.as_ref().expect("it is alive");
        let overwrites = agent.hydrating.as_ref().is_some_and(|hydrating| hydrating.overwrites_missing(id));
        if !overwrites {
            return Ok(());
        }
        let InFlight { op, refusals, .. } = &agent.inflight[&io];
        let (again, op) = (*refusals != self.lacking.refusals, op.clone());
        let LocalOp::Change(change) = op else { unreachable!("only changes overwrite") };
        if again {
            self.land(&change, 0);
            self.land(&change, 1);
        }
        let refused = !self.calm && self.random.permille(self.plan.refused_permille);
        self.flush_of_store(refused).map_err(|_| IoFailure { errno: 5 })
    }

    /// An I/O has ended, by whatever way it went.
    pub(crate) fn local_ends(&mut self, io: IoId, result: Result<(), IoFailure>) {
        let agent = self.agent.as_mut().expect("it is alive");
        let inflight = agent.inflight.remove(&io).expect("an I/O ends once");
        self.trace.note(self.now, "local ends", &[io.0]);
        let through = inflight.hydrated.is_none();
        match &inflight.op {
            LocalOp::Change(change) => self.change_ends(change, &inflight, result.is_ok()),
            LocalOp::Settle if result.is_ok() => {
                if through {
                    self.local.flush(inflight.flush_mark);
                }
                self.shown.disk.flush(inflight.shown_mark);
            }
            LocalOp::Settle if through => self.refuse_flush(),
            LocalOp::Read(_) | LocalOp::Settle => {}
        }
        let result = result.map(|()| match (&inflight.op, inflight.content) {
            (LocalOp::Read(range), content) => {
                let bytes = content.expect("it was read before the end");
                let agent = self.agent.as_ref().expect("it is alive");
                // As some disks behind do, and not all.
                match agent.filter.read_use().filter(|_| io.0.is_multiple_of(2)) {
                    Some(wanted) => LocalData::Prepared(Prepared::new(wanted, *range, bytes)),
                    None => LocalData::Read(bytes),
                }
            }
            (LocalOp::Change(_) | LocalOp::Settle, _) => LocalData::Changed,
        });
        self.call(|filter, now| filter.local_done(now, io, result));
        self.detach_when_quiet();
    }

    /// Half of a write lands; a read sees what is there.
    fn half_of(&mut self, inflight: &mut InFlight, stage: u8) {
        match &inflight.op {
            LocalOp::Change(Change::Flush) | LocalOp::Settle => {}
            LocalOp::Change(change) => {
                if !inflight.fails || self.random.one_in(2) {
                    self.land(&change.clone(), stage);
                }
            }
            LocalOp::Read(range) if stage == 0 => {
                self.check_read(*range);
                inflight.content = Some(self.local.read(*range));
            }
            LocalOp::Read(_) => {}
        }
    }

    /// One half of a change is on the image. Whoever reads the disk sees what of it is in blocks that are not missing.
    pub(crate) fn land(&mut self, change: &Change, half: u8) {
        let range = change.range().expect("a flush has no halves");
        let middle = (range.start().0 + range.count().0 / 2).next_multiple_of(512).min(range.end().0);
        let (start, end) = if half == 0 { (range.start().0, middle) } else { (middle, range.end().0) };
        let part = ByteRange::between(ByteOffset(start), ByteOffset(end));
        put(&mut self.local, change, part);
        for part in self.not_missing(part) {
            put(&mut self.shown.disk, change, part);
        }
    }

    /// What a change has brought into blocks that were missing is seen now.
    pub(crate) fn show(&mut self, change: &Change, blocks: ByteRange) {
        let part = change.range().and_then(|range| range.intersection(blocks));
        put(&mut self.shown.disk, change, part.expect("it overwrote them"));
    }

    /// A change ends: the model learns of it, with the LSN that the filter is about to give it.
    fn change_ends(&mut self, change: &Change, inflight: &InFlight, well: bool) {
        let agent = self.agent.as_ref().expect("it is alive");
        let last = agent.filter.last_lsn();
        let in_pass = agent.pass.map(|(at, _)| at).filter(|at| inflight.frozen == Some(*at));
        let number = inflight.request.expect("a change is of a request");
        let request = self.guest.requests.get_mut(&number).expect("it was not answered yet");
        request.done = Some(self.now);
        let through = inflight.hydrated.is_none();
        let Some(range) = change.range() else {
            if well {
                if through {
                    self.local.flush(inflight.flush_mark);
                }
                self.shown.disk.flush(inflight.shown_mark);
            } else if through {
                self.refuse_flush();
            }
            return;
        };
        if !well {
            if through && change.wants_stable() {
                self.refuse_flush();
            }
            match in_pass {
                Some(at) => self.model.settle(at, range, self.shown.disk.read(range)),
                None => self.model.lose(last.max(self.lacking.begins), range),
            }
            return;
        }
        let lsn = in_pass.unwrap_or(last.next());
        request.lsn = Some(lsn);
        self.stats.changes += 1;
        let what = match change {
            Change::Write { data, .. } => What::Bytes(data.clone()),
            Change::Zero { .. } => What::Zeroes,
            Change::Flush => unreachable!("a flush has no range"),
        };
        self.model.change(lsn, range, what);
        self.lacking.written = true;
        self.trace.note(self.now, "change", &[lsn.0, range.start().0, range.count().0]);
        if change.wants_stable() {
            if through {
                self.local.flush_range(range);
            }
            self.shown.disk.flush_range(range);
        }
    }
}

/// What a local operation is to the hydrator.
fn wish_of(op: &LocalOp) -> Wish {
    match op {
        LocalOp::Read(range) => Wish::Read(*range),
        LocalOp::Change(Change::Write { range, fua, .. } | Change::Zero { range, fua, .. }) => {
            Wish::Change { range: *range, stable: *fua }
        }
        LocalOp::Change(Change::Flush) | LocalOp::Settle => Wish::Flush,
    }
}

/// Does a part of a change.
fn put(disk: &mut crate::local::LocalDisk, change: &Change, part: ByteRange) {
    let range = change.range().expect("a flush changes nothing");
    let skip = (part.start().0 - range.start().0) as usize;
    match change {
        Change::Write { data, .. } => {
            disk.write(part, Some(&data[skip..skip + part.count().0 as usize]), false);
        }
        Change::Zero { trim, .. } => disk.write(part, None, *trim),
        Change::Flush => {}
    }
}
