//! What was sent of a pass takes memory until it is durable: a receiver whose device stands still gets no more of it.

use std::time::Duration;

use backtide_io_filter::{Effect, Filter, LocalData, LocalOp, Mode, Now, RequestId, Resume, Settings};
use backtide_protocol::{CompareItem, CompareResult, Content, Message, ReceiverState};
use backtide_tracking::DirtyBitmap;
use backtide_units::{BlockRange, ByteCount, CaptureTime, LogPosition, Lsn, Reason};
use bytes::Bytes;

use crate::common::{HISTORY, settings, welcome, write};

/// More than may be on its way at once.
const RUNS: u64 = 40_000;

const NOW: Now = Now { monotonic: Duration::ZERO, wall: CaptureTime(1_000_000) };

/// Does what the filter asks for until it asks for no more; how many runs were read, and the last frame that was sent.
fn go_on(filter: &mut Filter, sent: &mut u64) -> u64 {
    let mut reads = 0;
    loop {
        let mut waits = true;
        while let Some(effect) = filter.next_effect() {
            waits = false;
            if let Effect::Local(io, LocalOp::Read(range)) = effect {
                reads += 1;
                let data = Bytes::from(vec![1; range.count().0 as usize]);
                filter.local_done(NOW, io, Ok(LocalData::Read(data)));
            }
        }
        while let Some((seq, _)) = filter.poll_send(NOW) {
            (waits, *sent) = (false, seq);
        }
        if waits {
            return reads;
        }
    }
}

#[test]
fn a_pass_waits_for_a_receiver_that_makes_nothing_durable_and_goes_on_when_it_does() {
    // Every other block, which no read takes together.
    let size = ByteCount(2 * RUNS * 4096);
    let mut filter = Filter::new(Settings { size, ..settings() }, Resume::New, NOW);
    filter.connected(NOW, &welcome(ReceiverState::New, Lsn::ZERO));
    let scan = std::iter::from_fn(|| filter.next_effect());
    let scan = scan.filter_map(|effect| if let Effect::Scan(io) = effect { Some(io) } else { None }).last();
    let mut allocated = DirtyBitmap::new();
    for run in 0..RUNS {
        allocated.insert((2 * run..2 * run + 1).into());
    }
    filter.scanned(NOW, scan.expect("a scan was asked for"), &allocated);
    let (mut read, mut sent) = (0, 0);
    loop {
        let reads = go_on(&mut filter, &mut sent);
        read += reads;
        // All of it is in memory there, and none of it durable.
        filter.receive(NOW, Message::Ack { received: sent, durable: 1, position: LogPosition(1) });
        if reads == 0 {
            break;
        }
    }
    assert!((1 << 15..(1 << 15) + 16).contains(&read), "{read} runs of {RUNS} are on their way");
    filter.receive(NOW, Message::Ack { received: sent, durable: sent, position: LogPosition(sent) });
    while read < RUNS {
        let reads = go_on(&mut filter, &mut sent);
        assert!(reads > 0, "it stands still at {read} of {RUNS} runs");
        read += reads;
        filter.receive(NOW, Message::Ack { received: sent, durable: sent, position: LogPosition(sent) });
    }
}

/// A disk whose receiver answers every question, that all is equal, but about zeroes only when it is told to, and makes
/// nothing durable before that.
struct Asked {
    filter: Filter,
    now: Now,
    sent: u64,
    items: Vec<CompareItem>,
    unanswered: Vec<u64>,
    changes: usize,
    answers: usize,
}

impl Asked {
    fn new(filter: Filter) -> Self {
        Self { filter, now: NOW, sent: 1, items: Vec::new(), unanswered: Vec::new(), changes: 0, answers: 0 }
    }

    /// A compare of everything, of a disk with data in every other of its blocks, as far as it goes.
    fn compared() -> Self {
        let size = ByteCount(BLOCKS * 4096);
        let resume = Resume::Lost {
            reason: Reason::AgentCrashed,
            history: Some(HISTORY),
            last_lsn: Lsn(200),
            acked_durable: Lsn(100),
        };
        let settings = Settings { size, resync_buffer_bytes: ByteCount(64 << 10), ..settings() };
        let mut disk = Self::new(Filter::new(settings, resume, NOW));
        disk.filter.connected(NOW, &welcome(ReceiverState::Known, Lsn(100)));
        let mut allocated = DirtyBitmap::new();
        for block in (0..BLOCKS).step_by(2) {
            allocated.insert((block..block + 1).into());
        }
        disk.go_on(&allocated);
        assert!((1 << 15..(1 << 15) + 16).contains(&disk.sent), "{} frames are on their way", disk.sent);
        disk
    }

    fn answer(&mut self) {
        while let Some(id) = self.unanswered.pop() {
            let equal = CompareResult { id, differing: Vec::new() };
            self.filter.receive(self.now, Message::CompareResult(equal));
            self.go_on(&DirtyBitmap::new());
        }
    }

    fn go_on(&mut self, allocated: &DirtyBitmap) {
        loop {
            let mut waits = true;
            while let Some(effect) = self.filter.next_effect() {
                waits = false;
                match effect {
                    Effect::Scan(io) => self.filter.scanned(self.now, io, allocated),
                    Effect::Local(io, LocalOp::Read(range)) => {
                        let data = Bytes::from(vec![1; range.count().0 as usize]);
                        self.filter.local_done(self.now, io, Ok(LocalData::Read(data)));
                    }
                    Effect::Local(io, LocalOp::Change(_)) => {
                        self.changes += 1;
                        self.filter.local_done(self.now, io, Ok(LocalData::Changed));
                    }
                    Effect::Complete { result, .. } => {
                        result.expect("nothing fails here");
                        self.answers += 1;
                    }
                    _ => {}
                }
            }
            while let Some((seq, message)) = self.filter.poll_send(self.now) {
                (waits, self.sent) = (false, seq);
                if let Message::Compare(question) = message {
                    if question.items[0].content == Content::Zeroes {
                        self.unanswered.push(question.id);
                    } else {
                        let equal = CompareResult { id: question.id, differing: Vec::new() };
                        self.filter.receive(self.now, Message::CompareResult(equal));
                    }
                    self.items.extend(question.items);
                }
            }
            if waits {
                return;
            }
        }
    }

    fn make_durable(&mut self) {
        let (received, durable, position) = (self.sent, self.sent, LogPosition(self.sent));
        self.filter.receive(self.now, Message::Ack { received, durable, position });
        self.go_on(&DirtyBitmap::new());
        self.answer();
    }

    fn told(&self, block: u64) -> Option<Content> {
        let blocks = BlockRange::from(block..block + 1);
        let of = |item: &&CompareItem| BlockRange::touched_by(item.range).overlaps(blocks);
        self.items.iter().rev().find(of).map(|item| item.content)
    }
}

const BLOCKS: u64 = 2 * RUNS;

#[test]
fn zeroes_are_told_when_a_receiver_has_made_durable_what_was_sent() {
    let mut disk = Asked::compared();
    let before = disk.items.len();
    disk.answer();
    assert_eq!(disk.items.len(), before, "there is no place for another question");
    while disk.filter.mode() != Mode::Sync {
        let before = disk.sent;
        disk.make_durable();
        disk.make_durable();
        assert!(disk.sent > before || disk.filter.mode() == Mode::Sync, "it stands still");
    }
    assert_eq!(disk.items.len() as u64, BLOCKS, "all is asked about, and once");
}

#[test]
fn a_change_waits_for_its_zeroes_to_be_told_and_goes_ahead_when_they_are() {
    let mut disk = Asked::compared();
    let block = BLOCKS - 1;
    disk.filter.submit(disk.now, RequestId(1), write(block));
    disk.go_on(&DirtyBitmap::new());
    assert_eq!((disk.changes, disk.told(block)), (0, None), "there is no place for the question");
    disk.make_durable();
    assert_eq!((disk.changes, disk.told(block)), (1, Some(Content::Zeroes)));
    assert_eq!(disk.filter.status().counters.forfeited, 0);
}

#[test]
fn a_change_that_has_waited_its_time_for_that_goes_ahead_and_its_block_is_read() {
    let mut disk = Asked::compared();
    let block = BLOCKS - 1;
    disk.filter.submit(disk.now, RequestId(1), write(block));
    disk.go_on(&DirtyBitmap::new());
    let due = disk.filter.next_deadline().expect("the change has its bound");
    assert_eq!(due, settings().guest_delay_max);
    disk.now.monotonic = due;
    disk.filter.tick(disk.now);
    disk.go_on(&DirtyBitmap::new());
    assert_eq!((disk.changes, disk.answers, disk.told(block)), (1, 1, None));
    assert_eq!(disk.filter.status().counters.forfeited, 1);
    while disk.filter.mode() != Mode::Sync {
        disk.make_durable();
    }
    // The change says all of its own block. Of those around it that were zeroes, what they are by then is asked about.
    assert_eq!(disk.told(block), None);
    assert!(matches!(disk.told(block - 2), Some(Content::Hash(_))));
}

#[test]
fn a_verify_waits_for_a_receiver_that_makes_nothing_durable_and_goes_on_when_it_does() {
    // Without data: a question for each 64 MiB.
    let size = ByteCount(RUNS << 26);
    let mut disk = Asked::new(Filter::new(Settings { size, ..settings() }, Resume::New, NOW));
    disk.filter.connected(NOW, &welcome(ReceiverState::New, Lsn::ZERO));
    disk.go_on(&DirtyBitmap::new());
    disk.make_durable();
    assert_eq!(disk.filter.mode(), Mode::Sync);
    disk.filter.start_verify(NOW, false).unwrap();
    disk.go_on(&DirtyBitmap::new());
    while !disk.unanswered.is_empty() {
        disk.answer();
    }
    assert!((1 << 15..(1 << 15) + 64).contains(&disk.items.len()), "{}", disk.items.len());
    disk.make_durable();
    assert_eq!(disk.items.len() as u64, RUNS);
    assert!(matches!(disk.filter.verify_state(), Some((_, Some(Ok(()))))));
}
