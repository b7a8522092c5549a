//! LSNs above what the agent has saved stay with it, and the guest waits for none of that.

use std::time::Duration;

use backtide_io_filter::{
    Change, Effect, Filter, LocalData, LocalOp, Mode, Now, RequestId, Resume, Settings,
};
use backtide_protocol::{Message, ReceiverState, Welcome};
use backtide_tracking::DirtyBitmap;
use backtide_units::{BlockRange, ByteCount, ByteOffset, ByteRange, Epoch, LogPosition, Lsn, Reason};
use bytes::Bytes;
use uuid::Uuid;

use crate::common::{HISTORY, at, saved_in_sync, settings, welcome};

const SIZE: ByteCount = ByteCount(64 * 4096);

fn now() -> Now {
    at(0)
}

struct World {
    filter: Filter,
    requests: u64,
    answered: u64,
    /// What the receiver has, and how long its log is.
    durable: Lsn,
    position: LogPosition,
}

impl World {
    /// A disk at LSN 100, of which LSNs up to `reserved` may leave.
    fn new(resume: Resume, reserved: u64) -> Self {
        let settings = Settings {
            size: SIZE,
            epoch: Epoch(2),
            attach: Uuid::from_u128(2),
            resync_buffer_bytes: ByteCount(1 << 20),
            guest_delay_max: Duration::ZERO,
            ..settings()
        };
        let filter = Filter::new(settings, resume, now());
        let (durable, position) = (Lsn(100), LogPosition::default());
        let mut world = Self { filter, requests: 0, answered: 0, durable, position };
        world.reserve(reserved);
        world
    }

    fn reserve(&mut self, bound: u64) {
        self.filter.lsns_reserved(now(), Lsn(bound));
        self.carry_out();
    }

    fn connect(&mut self, highest: u64) {
        let welcome = Welcome {
            highest: Lsn(highest),
            position: self.position,
            ..welcome(ReceiverState::Known, self.durable)
        };
        self.filter.connected(now(), &welcome);
        self.carry_out();
    }

    /// The guest writes a block, and has its answer at once.
    fn write(&mut self, block: u64) {
        let range = ByteRange::new(ByteOffset(block * 4096), ByteCount(4096)).unwrap();
        let change = Change::Write { range, data: Bytes::from(vec![1; 4096]), fua: false };
        self.requests += 1;
        self.filter.submit(now(), RequestId(self.requests), change);
        self.carry_out();
        assert_eq!(self.answered, self.requests, "the guest waits");
    }

    fn carry_out(&mut self) {
        while let Some(effect) = self.filter.next_effect() {
            match effect {
                Effect::Local(io, LocalOp::Read(range)) => {
                    let data = LocalData::Read(vec![0; range.count().as_usize().unwrap()].into());
                    self.filter.local_done(now(), io, Ok(data));
                }
                Effect::Local(io, LocalOp::Change(_) | LocalOp::Settle) => {
                    self.filter.local_done(now(), io, Ok(LocalData::Changed));
                }
                Effect::Scan(io) => {
                    self.filter.scanned(now(), io, &DirtyBitmap::of(BlockRange::whole_disk(SIZE)));
                }
                Effect::Complete { result, .. } => {
                    result.unwrap();
                    self.answered += 1;
                }
                Effect::Transition { .. } => {}
                Effect::Alarm(_)
                | Effect::Spill(..)
                | Effect::Tracking(..)
                | Effect::Disconnect { .. }
                | Effect::ReadFailed { .. } => panic!("unexpected {effect:?}"),
            }
        }
    }

    /// What brings the log further of all that is sent now, durable at once.
    fn sent(&mut self) -> Vec<u64> {
        let mut sent = Vec::new();
        while self.filter.has_to_send() {
            let (seq, message) = self.filter.poll_send(now()).expect("it has something");
            match &message {
                Message::Record(record) => sent.push(record.lsn.0),
                Message::PassBegin { at, .. } => sent.push(at.0),
                _ => {}
            }
            self.durable = sent.last().map_or(self.durable, |last| Lsn(*last));
            self.position.0 += 1;
            let position = self.position;
            self.filter.receive(now(), Message::Ack { received: seq, durable: seq, position });
            self.carry_out();
        }
        assert!(self.filter.poll_send(now()).is_none(), "there was nothing to send");
        sent
    }
}

/// In sync.
fn clean() -> Resume {
    Resume::Clean(saved_in_sync())
}

fn crashed() -> Resume {
    Resume::Lost {
        reason: Reason::AgentCrashed,
        history: Some(HISTORY),
        last_lsn: Lsn(100),
        acked_durable: Lsn(100),
    }
}

#[test]
fn what_is_above_the_bound_is_answered_and_stays_until_that_is_raised() {
    let mut world = World::new(clean(), 102);
    world.connect(100);
    (0..5).for_each(|block| world.write(block));
    assert_eq!(world.filter.last_lsn(), Lsn(105));
    assert_eq!(world.sent(), [101, 102]);
    assert!(!world.filter.awaits_acknowledgement(), "nobody owes one of what was not sent");
    assert_eq!((world.filter.status().lag_records, world.filter.mode()), (3, Mode::Sync));
    // Also what is sent again.
    world.filter.disconnected(now());
    world.carry_out();
    world.write(5);
    world.connect(102);
    assert!(world.sent().is_empty());
    world.reserve(104);
    assert!(world.filter.has_to_send() && world.filter.awaits_acknowledgement());
    assert_eq!(world.sent(), [103, 104]);
    world.reserve(1000);
    assert_eq!(world.sent(), [105, 106]);
    assert!(world.filter.is_drained());
}

#[test]
fn a_pass_begins_when_it_has_an_lsn_that_may_leave() {
    let mut world = World::new(crashed(), 102);
    (0..4).for_each(|block| world.write(block));
    world.connect(100);
    assert_eq!((world.sent(), world.filter.mode()), (vec![], Mode::Tracking));
    world.write(4);
    world.reserve(200);
    assert_eq!((world.sent(), world.filter.status().pass.is_some()), (vec![106], true));
}

#[test]
fn a_receiver_that_has_seen_more_is_not_told_of_lsns_that_are_not_reserved() {
    let mut world = World::new(crashed(), 200);
    world.connect(500);
    assert_eq!((world.sent(), world.filter.last_lsn()), (vec![], Lsn(500)));
    world.write(0);
    world.reserve(600);
    assert_eq!(world.sent(), [502]);
    world.write(1);
    assert_eq!(world.sent(), [503]);
}
