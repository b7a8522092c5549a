//! A local disk that fails each read at once, for a while or in places: a pass reads it at a bounded rate, and goes on as
//! fast as ever where it works.

use std::{collections::BTreeMap, time::Duration};

use backtide_io_filter::{
    Effect, Filter, IoFailure, LocalData, LocalOp, Mode, Now, RequestId, Resume, Settings,
};
use backtide_protocol::{Message, ReceiverState};
use backtide_tracking::DirtyBitmap;
use backtide_units::{BlockRange, ByteCount, ByteOffset, ByteRange, CaptureTime, LogPosition, Lsn};
use bytes::Bytes;

use crate::common::{settings, welcome, write};

const BLOCKS: u64 = 64 * 256;

const DISK: ByteCount = ByteCount(3 << 30);

/// A pass over a disk some of which cannot be read.
struct Disk {
    filter: Filter,
    clock: Duration,
    sent: u64,
    is_bad: Box<dyn Fn(Duration, ByteRange) -> bool>,
    /// When something was read, and whether that failed.
    reads: Vec<(Duration, ByteRange, bool)>,
}

impl Disk {
    fn in_a_pass(of: &DirtyBitmap, is_bad: impl Fn(Duration, ByteRange) -> bool + 'static) -> Self {
        let settings = Settings { size: DISK, resync_buffer_bytes: ByteCount(16 << 20), ..settings() };
        let filter = Filter::new(settings, Resume::New, now(Duration::ZERO));
        let is_bad = Box::new(is_bad);
        let mut disk = Self { filter, clock: Duration::ZERO, sent: 1, is_bad, reads: Vec::new() };
        disk.filter.connected(now(Duration::ZERO), &welcome(ReceiverState::New, Lsn::ZERO));
        let scan = std::iter::from_fn(|| disk.filter.next_effect());
        let scan =
            scan.filter_map(|effect| if let Effect::Scan(io) = effect { Some(io) } else { None }).last();
        disk.filter.scanned(now(Duration::ZERO), scan.expect("a scan was asked for"), of);
        disk.go_on();
        disk
    }

    /// Until nothing more happens at this moment.
    fn go_on(&mut self) {
        loop {
            let mut waits = true;
            while let Some(effect) = self.filter.next_effect() {
                waits = false;
                let Effect::Local(io, LocalOp::Read(range)) = effect else { continue };
                let fails = (self.is_bad)(self.clock, range);
                self.reads.push((self.clock, range, fails));
                assert!(self.reads.len() < 100_000, "without end");
                let bytes = Bytes::from(vec![1; usize::try_from(range.count().0).unwrap()]);
                let result = if fails { Err(IoFailure { errno: 5 }) } else { Ok(LocalData::Read(bytes)) };
                self.filter.local_done(now(self.clock), io, result);
            }
            while let Some((seq, _)) = self.filter.poll_send(now(self.clock)) {
                (waits, self.sent) = (false, seq);
            }
            let (durable, position) = (self.sent, LogPosition(self.sent));
            let all = Message::Ack { received: self.sent, durable, position };
            self.filter.receive(now(self.clock), all);
            if waits {
                return;
            }
        }
    }

    fn write(&mut self, block: u64) {
        self.filter.submit(now(self.clock), RequestId(block), write(block));
        let local = |effect| if let Effect::Local(io, _) = effect { Some(io) } else { None };
        let io = std::iter::from_fn(|| self.filter.next_effect()).find_map(local).expect("a local write");
        self.filter.local_done(now(self.clock), io, Ok(LocalData::Changed));
        self.go_on();
    }

    /// Time passes, until then or until the first pass has ended.
    fn pass_until(&mut self, end: Duration) {
        while let Some(due) = self.filter.next_deadline().filter(|due| *due <= end && !self.is_through()) {
            self.clock = due.max(self.clock);
            self.filter.tick(now(self.clock));
            self.go_on();
        }
        if !self.is_through() {
            self.clock = end;
        }
    }

    fn is_through(&self) -> bool {
        self.filter.status().counters.passes_completed > 0
    }
}

fn now(monotonic: Duration) -> Now {
    Now { monotonic, wall: CaptureTime(1_000_000 + u64::try_from(monotonic.as_micros()).unwrap()) }
}

fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

#[test]
fn a_disk_that_is_away_is_read_now_and_then_and_its_rest_as_fast_as_ever() {
    let back = seconds(4);
    let all = DirtyBitmap::of(BlockRange::from(0..BLOCKS));
    let mut disk = Disk::in_a_pass(&all, move |at, _| at < back);
    disk.pass_until(back - Duration::from_nanos(1));
    let failed = disk.reads.len();
    assert!((4..4_200).contains(&failed), "{failed} reads of a disk that is away for {back:?}");
    disk.pass_until(back + seconds(3));
    assert!(disk.is_through());
    let more = disk.reads.len() - failed;
    // In each of the runs that failed they get longer: 1, 2, 4 blocks and so on; the 1024 blocks that failed alone are read
    // alone, and so is what lies between two of them.
    assert!((64..64 * 10 + 2 * 1024).contains(&more), "{more} reads of 64 runs");
    assert_eq!(disk.filter.status().unreadable, None);
}

#[test]
fn a_few_bad_blocks_hold_up_the_rest_for_no_time_worth_mentioning() {
    let all = DirtyBitmap::of(BlockRange::from(0..BLOCKS));
    let bad = |block: u64| block % 2000 == 77;
    let is_bad = move |_, range: ByteRange| BlockRange::touched_by(range).indices().any(bad);
    let mut disk = Disk::in_a_pass(&all, is_bad);
    disk.pass_until(seconds(60));
    assert!(disk.is_through(), "each bad block is given up in the end");
    let count = (0..BLOCKS).filter(|block| bad(*block)).count() as u64;
    assert_eq!(disk.filter.status().unreadable.expect("they are told").0.0, count);
    let last = disk.reads.iter().filter(|(_, _, fails)| !fails).map(|(at, _, _)| *at).max();
    assert!(last.is_some_and(|last| last < seconds(2)), "{last:?}");
}

#[test]
fn so_many_blocks_wait_to_be_tried_again_and_no_more_and_all_come_to_their_end() {
    let mut isolated = DirtyBitmap::new();
    // Far apart: others come first before one is tried again.
    for number in 0..3000 {
        isolated.insert((number * 256..number * 256 + 1).into());
    }
    let mut disk = Disk::in_a_pass(&isolated, |_, _| true);
    disk.pass_until(seconds(100_000));
    assert!(disk.is_through());
    assert_eq!(disk.filter.status().unreadable.expect("they are told").0.0, 3000);
    let (mut tries, mut waiting, mut most) = (BTreeMap::new(), 0_u64, 0);
    for (_, range, _) in &disk.reads {
        let tried = tries.entry(range.start()).or_insert(0);
        *tried += 1;
        match *tried {
            1 => waiting += 1,
            5 => waiting -= 1,
            _ => {}
        }
        most = most.max(waiting);
    }
    assert!((1000..1032).contains(&most), "{most} blocks");
}

#[test]
fn nobody_is_told_when_a_disk_is_in_sync_of_which_a_block_was_given_up() {
    let all = DirtyBitmap::of(BlockRange::from(0..BLOCKS));
    let half = ByteOffset(BLOCKS / 2 * 4096);
    let bad = BlockRange::from(0..1).bytes(DISK);
    let mut disk = Disk::in_a_pass(&all, move |_, range| range.overlaps(bad) || range.end() > half);
    let incomplete = |disk: &mut Disk| {
        disk.pass_until(disk.clock + seconds(1));
        disk.filter.status().pass.filter(|pass| pass.incomplete)
    };
    let pass = (1..60).find_map(|_| incomplete(&mut disk)).expect("half of it cannot be read yet");
    assert_eq!(pass.speed.sync_in, None, "there will be another one, after a pause");
}

#[test]
fn a_guest_that_writes_what_could_not_be_read_need_not_wait_for_the_next_pass() {
    let of = DirtyBitmap::of(BlockRange::from(3..5));
    let mut disk = Disk::in_a_pass(&of, |_, _| true);
    disk.pass_until(seconds(1000));
    assert_eq!(disk.filter.status().unreadable.expect("two").0.0, 2);
    disk.is_bad = Box::new(|_, _| false);
    disk.write(3);
    assert_eq!(disk.filter.status().unreadable.expect("one is left").0.0, 1);
    assert_eq!(disk.filter.mode(), Mode::Tracking);
    disk.write(4);
    assert_eq!((disk.filter.status().unreadable, disk.filter.mode()), (None, Mode::Sync));
}
