//! The filter's spill, story by story: a driver that carries out everything at once.

mod fenced;
mod in_doubt;

use std::{collections::VecDeque, sync::Arc, time::Duration};

use backtide_io_filter::{
    Change, Effect, Filter, LocalData, LocalOp, Mode, Now, RequestId, Resume, Settings, SpillDone, SpillOp,
};
use backtide_protocol::{Message, ReceiverState, Welcome};
use backtide_spill::{RingLimits, SpillFiles};
use backtide_storage::{MemoryStorage, Storage};
use backtide_tracking::DirtyBitmap;
use backtide_units::{
    BlockRange, ByteCount, ByteOffset, ByteRange, CaptureTime, Epoch, HistoryId, LogPosition, Lsn, Reason,
};
use bytes::Bytes;
use uuid::Uuid;

use crate::common::{DISK, HISTORY, saved_in_sync, settings, welcome};

const SIZE: ByteCount = ByteCount(256 * 4096);
const WINDOW: ByteCount = ByteCount(64 * 1024);

struct World {
    filter: Filter,
    storage: MemoryStorage,
    spill: ByteCount,
    now: u64,
    requests: u64,
    alarms: Vec<String>,
    transitions: Vec<(Mode, Option<Reason>)>,
    /// Spill operations are kept back.
    slow: bool,
    /// Those that remove files are.
    removes_slowly: bool,
    kept: VecDeque<Effect>,
}

impl World {
    /// A disk in sync at LSN 100, the receiver away.
    fn new(spill: u64) -> Self {
        Self::attached(MemoryStorage::new(), spill, Epoch(2), Resume::Clean(saved_in_sync()))
    }

    fn attached(storage: MemoryStorage, spill: u64, epoch: Epoch, resume: Resume) -> Self {
        let settings = Settings {
            size: SIZE,
            epoch,
            attach: Uuid::from_u128(epoch.0.into()),
            window_bytes: WINDOW,
            resync_buffer_bytes: ByteCount(1 << 20),
            ..settings()
        };
        let now = Now { monotonic: Duration::ZERO, wall: CaptureTime(1_000_000) };
        let mut world = Self {
            filter: Filter::new(settings, resume, now),
            storage,
            spill: ByteCount(spill),
            now: 0,
            requests: 0,
            alarms: Vec::new(),
            transitions: Vec::new(),
            slow: false,
            removes_slowly: false,
            kept: VecDeque::new(),
        };
        let end = BlockRange::whole_disk(SIZE).end();
        let limits = RingLimits::new(world.spill, WINDOW, ByteCount(1 << 20), end);
        let recovered = world.files().recover(limits).unwrap();
        world.filter.use_spill(recovered);
        world.carry_out();
        world
    }

    fn files(&self) -> SpillFiles {
        SpillFiles::new(Arc::new(self.storage.clone()), DISK, self.spill)
    }

    fn now(&mut self) -> Now {
        self.now += 1;
        Now { monotonic: Duration::from_millis(self.now), wall: CaptureTime(1_000_000 + self.now * 1000) }
    }

    fn carry_out(&mut self) {
        while let Some(effect) = self.filter.next_effect() {
            match effect {
                Effect::Spill(..) if self.slow => self.kept.push_back(effect),
                Effect::Spill(_, SpillOp::Remove(_)) if self.removes_slowly => self.kept.push_back(effect),
                Effect::Spill(io, op) => self.do_spill(io, &op),
                Effect::Local(io, LocalOp::Read(range)) => {
                    let data = LocalData::Read(vec![0; range.count().as_usize().unwrap()].into());
                    let now = self.now();
                    self.filter.local_done(now, io, Ok(data));
                }
                Effect::Local(io, LocalOp::Change(_) | LocalOp::Settle) => {
                    let now = self.now();
                    self.filter.local_done(now, io, Ok(LocalData::Changed));
                }
                Effect::Scan(io) => {
                    let all = DirtyBitmap::of(BlockRange::whole_disk(SIZE));
                    let now = self.now();
                    self.filter.scanned(now, io, &all);
                }
                Effect::Alarm(text) => self.alarms.push(text),
                Effect::Transition { to, reason, .. } => self.transitions.push((to, reason)),
                Effect::Complete { result, .. } => assert!(result.is_ok()),
                Effect::Tracking(..) | Effect::Disconnect { .. } | Effect::ReadFailed { .. } => {
                    panic!("unexpected {effect:?}")
                }
            }
        }
    }

    fn do_spill(&mut self, io: backtide_io_filter::IoId, op: &SpillOp) {
        let files = self.files();
        let result = match op {
            SpillOp::Append(slot, messages) => files.append(slot, messages),
            SpillOp::Remove(numbers) => files.remove(numbers),
            SpillOp::Read(place) => {
                let back = files.read(place);
                let done = SpillDone::Read(back.messages, back.failure.map(|failure| failure.to_string()));
                let now = self.now();
                return self.filter.spill_done(now, io, done);
            }
        };
        let done = result.map_or_else(|error| SpillDone::Failed(error.to_string()), |()| SpillDone::Durable);
        let now = self.now();
        self.filter.spill_done(now, io, done);
    }

    /// The guest writes so many blocks, from `first` on.
    fn write(&mut self, first: u64, count: u64) {
        for block in first..first + count {
            let range = ByteRange::new(ByteOffset(block * 4096), ByteCount(4096)).unwrap();
            let data = Bytes::from(vec![block as u8; 4096]);
            self.requests += 1;
            let (now, id) = (self.now(), RequestId(self.requests));
            self.filter.submit(now, id, Change::Write { range, data, fua: false });
            self.carry_out();
        }
    }

    fn connect(&mut self, durable: u64, state: ReceiverState) {
        self.connect_to(&welcome(state, Lsn(durable)));
    }

    fn connect_to(&mut self, welcome: &Welcome) {
        let now = self.now();
        self.filter.connected(now, welcome);
        self.carry_out();
    }

    /// Everything the filter sends, acknowledged as durable at once: the LSNs of records, and T.
    fn drain(&mut self) -> Vec<String> {
        let mut sent = Vec::new();
        loop {
            let now = self.now();
            let Some((seq, message)) = self.filter.poll_send(now) else { return sent };
            match &message {
                Message::Record(record) => sent.push(format!("{}", record.lsn)),
                Message::PassBegin { gap_from, .. } => sent.push(format!("pass after {gap_from}")),
                Message::Mark { label, .. } => sent.push(label.clone()),
                _ => {}
            }
            let now = self.now();
            self.filter
                .receive(now, Message::Ack { received: seq, durable: seq, position: LogPosition(seq) });
            self.carry_out();
        }
    }

    fn dirty(&self) -> u64 {
        self.filter.status().dirty.0
    }

    fn used(&self) -> u64 {
        self.storage.used().0
    }
}

fn lsns(range: std::ops::RangeInclusive<u64>) -> Vec<String> {
    range.map(|lsn| lsn.to_string()).collect()
}

/// What an agent that died leaves when the filter of its disk stood at `last`.
fn crashed(last: u64, candidates: DirtyBitmap) -> Resume {
    Resume::Crashed {
        reason: Reason::AgentCrashed,
        history: Some(HISTORY),
        last_lsn: Lsn(last),
        acked_durable: Lsn(100),
        acked_position: LogPosition::default(),
        candidates,
    }
}

#[test]
fn what_does_not_fit_into_memory_is_sent_in_order_and_the_files_go() {
    let mut world = World::new(4 << 20);
    world.write(0, 100);
    let now = world.now();
    assert_eq!(world.filter.mark(now, "now").unwrap().lsn, Lsn(200));
    world.carry_out();
    let status = world.filter.status();
    assert!(status.window < WINDOW && world.used() > 100 * 4096, "{status:?}");
    assert_eq!((status.lag_records, status.spill.unwrap().records), (100, 100));
    world.connect(100, ReceiverState::Known);
    let sent = world.drain();
    assert_eq!(sent[..100], lsns(101..=200));
    assert_eq!(sent[100], "now");
    assert!(world.filter.is_drained() && world.used() == 0);
    assert_eq!((world.filter.mode(), world.transitions.len(), world.alarms.len()), (Mode::Sync, 0, 0));
}

#[test]
fn the_guest_is_held_back_while_files_are_removed_before_more_is_spilled() {
    let mut world = World::new(4 << 20);
    world.write(0, 100);
    world.connect(100, ReceiverState::Known);
    world.removes_slowly = true;
    assert_eq!(world.drain(), lsns(101..=200));
    let now = world.now();
    world.filter.disconnected(now);
    world.carry_out();
    assert_eq!(world.kept.len(), 1, "files are being removed");
    let before = world.filter.status().counters.delayed_answers;
    // More than half of the window, and less than all of it.
    world.write(100, 12);
    assert!(world.filter.status().counters.delayed_answers > before, "{:?}", world.filter.status().counters);
    world.removes_slowly = false;
    let Some(Effect::Spill(io, op)) = world.kept.pop_front() else { panic!("it was kept") };
    world.do_spill(io, &op);
    world.carry_out();
    world.write(112, 20);
    assert_eq!((world.filter.mode(), world.filter.status().spill.unwrap().records > 0), (Mode::Sync, true));
}

#[test]
fn a_receiver_that_has_a_part_gets_the_rest() {
    for durable in [101, 137, 199, 200] {
        let mut world = World::new(4 << 20);
        world.write(0, 100);
        world.connect(durable, ReceiverState::Known);
        assert_eq!(world.drain(), lsns(durable + 1..=200), "{durable}");
        assert!(world.filter.is_drained() && world.used() == 0, "{durable}");
    }
}

#[test]
fn a_stream_lost_on_the_way_goes_on_where_the_receiver_is() {
    let mut world = World::new(4 << 20);
    world.write(0, 100);
    world.connect(100, ReceiverState::Known);
    let (mut sent, mut now) = (0, world.now());
    while world.filter.poll_send(now).is_some() {
        sent += 1;
        now = world.now();
    }
    assert!((2..50).contains(&sent), "what is not acknowledged is bounded: {sent} records");
    let now = world.now();
    world.filter.disconnected(now);
    world.carry_out();
    world.write(100, 10);
    world.connect(102, ReceiverState::Known);
    assert_eq!(world.drain(), lsns(103..=210));
}

#[test]
fn a_crash_loses_nothing_that_was_spilled_and_a_pass_follows() {
    let mut world = World::new(4 << 20);
    world.write(0, 100);
    let candidates = DirtyBitmap::of((0..128).into());
    let World { storage, spill, .. } = world;
    let mut world = World::attached(storage, spill.0, Epoch(3), crashed(1000, candidates));
    assert_eq!(world.filter.mode(), Mode::Tracking);
    // What is written before the receiver has caught up is in the hole.
    world.write(200, 1);
    world.connect(100, ReceiverState::Known);
    let sent = world.drain();
    assert_eq!(sent[..100], lsns(101..=200));
    assert_eq!(sent[100], "pass after 200");
}

#[test]
fn another_history_a_higher_epoch_or_a_lower_bound_is_not_replayed() {
    let stories = [
        (Epoch(3), 1000, ReceiverState::Foreign),
        // The state of the agent was rolled back: its epoch, or its bound.
        (Epoch(2), 1000, ReceiverState::Known),
        (Epoch(3), 150, ReceiverState::Known),
    ];
    for (epoch, bound, state) in stories {
        let mut world = World::new(4 << 20);
        world.write(0, 100);
        let storage = world.storage.clone();
        let candidates = DirtyBitmap::of((0..128).into());
        let mut world = World::attached(storage, 4 << 20, epoch, crashed(bound, candidates));
        let history = if state == ReceiverState::Known { HISTORY } else { HistoryId(Uuid::from_u128(4)) };
        world.connect_to(&Welcome { history, ..welcome(state, Lsn(100)) });
        let sent = world.drain();
        assert_eq!(sent[0], "pass after 100", "{epoch} {bound} {state:?}");
        assert_eq!(world.used(), 0);
    }
}

#[test]
fn a_log_that_another_attach_has_written_gets_none_of_it() {
    let candidates = DirtyBitmap::of((0..128).into());
    for resume in [Some(crashed(1000, candidates)), None] {
        let mut world = World::new(4 << 20);
        world.write(0, 100);
        if let Some(resume) = resume {
            world = World::attached(world.storage.clone(), 4 << 20, Epoch(3), resume);
        }
        let own = Uuid::from_u128(world.filter.settings().epoch.0.into());
        world.filter.follows(Some(vec![Uuid::from_u128(70), own]));
        // It stands where the spill begins.
        let last_attach = Some(Uuid::from_u128(71));
        world.connect_to(&Welcome { last_attach, ..welcome(ReceiverState::Known, Lsn(100)) });
        let sent = world.drain();
        assert_eq!(sent[0], "pass after 100", "{sent:?}");
        assert_eq!(world.used(), 0);
    }
}

#[test]
fn a_receiver_beyond_the_spill_gets_none_of_it() {
    let mut world = World::new(4 << 20);
    world.write(0, 100);
    let World { storage, spill, .. } = world;
    let resume = crashed(1000, DirtyBitmap::of((0..128).into()));
    let mut world = World::attached(storage, spill.0, Epoch(3), resume);
    world.connect(300, ReceiverState::Known);
    assert_eq!(world.drain()[0], "pass after 300");
    assert_eq!(world.used(), 0);
}

#[test]
fn a_detach_in_an_outage_leaves_everything_to_the_next_attach() {
    let mut world = World::new(4 << 20);
    world.write(0, 100);
    let now = world.now();
    world.filter.prepare_detach(now);
    world.carry_out();
    assert!(world.filter.is_spill_settled());
    let now = world.now();
    let saved = world.filter.detach(now).unwrap();
    assert_eq!((saved.spilled_to, saved.gap_from, saved.dirty.count().0), (Some(Lsn(200)), Lsn(100), 100));
    let storage = world.storage.clone();
    let mut world = World::attached(storage, 4 << 20, Epoch(3), Resume::Clean(saved.clone()));
    assert_eq!((world.filter.mode(), world.dirty()), (Mode::Sync, 0));
    world.write(100, 50);
    world.connect(100, ReceiverState::Known);
    assert_eq!(world.drain(), lsns(101..=250));
    // Without the files the bitmap says it.
    let mut world = World::attached(MemoryStorage::new(), 4 << 20, Epoch(3), Resume::Clean(saved));
    assert_eq!((world.filter.mode(), world.dirty()), (Mode::Tracking, 100));
    world.connect(100, ReceiverState::Known);
    assert_eq!(world.drain()[0], "pass after 100");
}

#[test]
fn a_disk_set_back_is_not_in_sync_whatever_its_spill_has() {
    let mut world = World::new(4 << 20);
    world.write(0, 100);
    let now = world.now();
    world.filter.prepare_detach(now);
    world.carry_out();
    let now = world.now();
    let mut saved = world.filter.detach(now).unwrap();
    assert_eq!(saved.spilled_to, Some(Lsn(200)));
    saved.zeroes = DirtyBitmap::of((150..155).into());
    let missing = DirtyBitmap::of((150..160).into());
    let resume = Resume::Clean(saved).set_back(&missing);
    let Resume::Clean(saved) = &resume else { panic!("{resume:?}") };
    assert!(saved.zeroes.is_empty(), "missing blocks are not known to be zeroes");
    let mut world = World::attached(world.storage.clone(), 4 << 20, Epoch(3), resume);
    assert_eq!((world.filter.mode(), world.dirty()), (Mode::Tracking, 110));
    world.connect(100, ReceiverState::Known);
    let sent = world.drain();
    assert_eq!((&sent[..100], &sent[100][..]), (&lsns(101..=200)[..], "pass after 200"));
    assert!(world.filter.is_drained());
}

#[test]
fn a_spill_whose_first_file_is_missing_is_not_complete() {
    let mut world = World::new(1 << 20);
    world.write(0, 100);
    let now = world.now();
    world.filter.prepare_detach(now);
    world.carry_out();
    let now = world.now();
    let saved = world.filter.detach(now).unwrap();
    assert_eq!((saved.spilled_to, saved.dirty.count().0), (Some(Lsn(200)), 100));
    let storage = world.storage.clone();
    let files: Vec<_> = storage.files().into_iter().map(|(path, _)| path).collect();
    assert!(files.len() > 2, "{files:?}");
    storage.remove(files.iter().min().unwrap()).unwrap();
    let mut world = World::attached(storage, 1 << 20, Epoch(3), Resume::Clean(saved));
    assert_eq!((world.filter.mode(), world.dirty()), (Mode::Tracking, 100), "the bitmap says it");
    world.connect(100, ReceiverState::Known);
    let sent = world.drain();
    assert!(sent[0].starts_with("pass after"), "{sent:?}");
    assert!(world.filter.is_drained());
}

#[test]
fn a_full_spill_means_tracking_and_keeps_what_it_has() {
    let mut world = World::new(256 * 1024);
    world.write(0, 200);
    assert_eq!(world.transitions, [(Mode::Tracking, Some(Reason::SpillFull))]);
    let records = world.filter.status().spill.unwrap().records;
    assert!(records > 50 && world.used() <= 256 * 1024, "{records} records, {} bytes", world.used());
    assert_eq!(world.dirty(), 200 - records, "each block is a record or dirty");
    world.connect(100, ReceiverState::Known);
    let sent = world.drain();
    assert_eq!(sent[..records as usize], lsns(101..=100 + records));
    assert_eq!(sent[records as usize], format!("pass after {}", 100 + records));
}

#[test]
fn a_spill_that_fails_is_said_once_and_memory_lasts_as_long_as_it_does() {
    let mut world = World::new(4 << 20);
    world.storage.set_capacity(Some(ByteCount(100 * 1024)));
    world.write(0, 100);
    assert_eq!(world.transitions, [(Mode::Tracking, Some(Reason::SpillFailed))]);
    assert_eq!(world.alarms.len(), 1, "{:?}", world.alarms);
    assert!(world.alarms[0].contains("spill"), "{:?}", world.alarms);
    world.storage.set_capacity(None);
    world.connect(100, ReceiverState::Known);
    let sent = world.drain();
    let replayed = sent.iter().position(|sent| sent.starts_with("pass")).unwrap();
    assert!(replayed < 100 && sent[..replayed] == lsns(101..=100 + replayed as u64), "{sent:?}");
}

#[test]
fn a_spill_slower_than_the_guest_delays_it_and_then_gives_up() {
    let mut world = World::new(4 << 20);
    world.slow = true;
    world.write(0, 12);
    assert!(world.filter.status().counters.delayed_answers > 0);
    assert!(world.filter.status().counters.guest_delay_us_max <= 10_000);
    world.write(12, 20);
    assert_eq!(world.transitions, [(Mode::Tracking, Some(Reason::ReceiverAway))]);
    world.slow = false;
    while let Some(Effect::Spill(io, op)) = world.kept.pop_front() {
        world.do_spill(io, &op);
        world.carry_out();
    }
    let records = world.filter.status().spill.unwrap().records;
    assert_eq!((records > 0, world.dirty()), (true, 32 - records));
}

#[test]
fn damage_in_the_middle_ends_the_replay_there_and_everything_behind_is_dirty() {
    let mut world = World::new(4 << 20);
    world.write(0, 100);
    let files = world.storage.files();
    let (path, bytes) = files.first().unwrap();
    world.storage.flip_bit(path, ByteOffset(bytes.len() as u64 / 2), 0);
    world.connect(100, ReceiverState::Known);
    let sent = world.drain();
    assert_eq!(world.transitions[0], (Mode::Tracking, Some(Reason::SpillFailed)));
    assert_eq!(world.alarms.len(), 1, "{:?}", world.alarms);
    let replayed = sent.iter().position(|sent| sent.starts_with("pass")).unwrap();
    assert!(replayed > 10 && replayed < 90, "{sent:?}");
    assert_eq!(sent[..replayed], lsns(101..=100 + replayed as u64));
    assert_eq!(sent[replayed], format!("pass after {}", 100 + replayed));
    assert_eq!(world.filter.mode(), Mode::Sync, "the pass delivers the rest");
}

#[test]
fn a_pass_that_is_asked_for_waits_until_the_spill_is_empty() {
    let mut world = World::new(4 << 20);
    world.write(0, 100);
    world.connect(100, ReceiverState::Known);
    let now = world.now();
    world.filter.force_resync(now, backtide_io_filter::ResyncKind::Changed);
    world.carry_out();
    assert_eq!(world.filter.mode(), Mode::Sync);
    let left = world.filter.clone().detach(now).expect("what may differ is known");
    assert_eq!(left.spilled_to, None, "the next attach has a pass to make");
    let sent = world.drain();
    assert_eq!(sent[..100], lsns(101..=200));
    assert_eq!(sent[100], "pass after 200");
    assert_eq!(world.filter.mode(), Mode::Sync);
}
