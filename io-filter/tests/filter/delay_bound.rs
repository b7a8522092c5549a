//! No change is held up for longer than its bound, to the microsecond: the filter's clock is the test's.

use std::time::Duration;

use backtide_io_filter::{
    Change, Effect, Filter, IoId, LocalData, LocalOp, Mode, Now, RequestId, Resume, Settings,
};
use backtide_protocol::{Message, ReceiverState};
use backtide_tracking::DirtyBitmap;
use backtide_units::{ByteCount, ByteOffset, ByteRange, CaptureTime, LogPosition, Lsn};
use bytes::Bytes;

use crate::common::welcome;

const BOUND: Duration = Duration::from_millis(10);

const WINDOW: u64 = 1 << 20;

const BLOCKS: u64 = 1024;

/// A disk whose clock stands still until the test moves it.
struct Disk {
    filter: Filter,
    clock: Duration,
    requests: u64,
    /// Answers, and when they were given.
    answers: Vec<(RequestId, Duration)>,
    local: Vec<(IoId, LocalOp)>,
}

fn settings(window: u64, buffer: u64) -> Settings {
    Settings {
        size: ByteCount(BLOCKS * 4096),
        window_bytes: ByteCount(window),
        resync_buffer_bytes: ByteCount(buffer),
        guest_delay_max: BOUND,
        ..crate::common::settings()
    }
}

impl Disk {
    /// Its first protection has begun, of these blocks.
    fn in_a_pass(settings: Settings, allocated: &DirtyBitmap) -> Self {
        let start = Now { monotonic: Duration::ZERO, wall: CaptureTime(1_000_000) };
        let mut filter = Filter::new(settings, Resume::New, start);
        filter.connected(start, &welcome(ReceiverState::New, Lsn::ZERO));
        let scan = std::iter::from_fn(|| filter.next_effect());
        let scan = scan.filter_map(|effect| if let Effect::Scan(io) = effect { Some(io) } else { None });
        let scan = scan.last().expect("a scan was asked for");
        filter.scanned(start, scan, allocated);
        let (answers, local) = (Vec::new(), Vec::new());
        let mut disk = Self { filter, clock: Duration::ZERO, requests: 0, answers, local };
        disk.carry_out();
        disk
    }

    fn in_sync() -> Self {
        let mut disk = Self::in_a_pass(settings(WINDOW, 4096), &DirtyBitmap::new());
        let last = disk.send_all();
        let all = Message::Ack { received: last, durable: last, position: LogPosition(last) };
        disk.filter.receive(disk.now(), all);
        assert_eq!(disk.filter.mode(), Mode::Sync);
        disk.carry_out();
        disk
    }

    fn now(&self) -> Now {
        let micros = u64::try_from(self.clock.as_micros()).unwrap();
        Now { monotonic: self.clock, wall: CaptureTime(1_000_000 + micros) }
    }

    fn carry_out(&mut self) {
        while let Some(effect) = self.filter.next_effect() {
            match effect {
                Effect::Local(io, op) => self.local.push((io, op)),
                Effect::Complete { request, result } => {
                    result.expect("no local I/O fails here");
                    self.answers.push((request, self.clock));
                }
                Effect::Transition { .. } => {}
                other => panic!("{other:?}"),
            }
        }
    }

    fn send_all(&mut self) -> u64 {
        let now = self.now();
        std::iter::from_fn(|| self.filter.poll_send(now)).last().map_or(1, |(seq, _)| seq)
    }

    /// A change that the local disk does not do yet.
    fn submit(&mut self, block: u64, blocks: usize) -> RequestId {
        self.requests += 1;
        let request = RequestId(self.requests);
        let data = Bytes::from(vec![7; blocks * 4096]);
        let range = ByteRange::new(ByteOffset(block * 4096), ByteCount(data.len() as u64)).unwrap();
        let now = self.now();
        self.filter.submit(now, request, Change::Write { range, data, fua: false });
        self.carry_out();
        request
    }

    /// The local disk does what it was asked to last.
    fn local_ends(&mut self, what: LocalData) {
        let (io, _) = self.local.pop().expect("a local I/O is under way");
        let now = self.now();
        self.filter.local_done(now, io, Ok(what));
        self.carry_out();
    }

    /// The clock goes to the filter's next deadline, or so much beyond, and the filter is told.
    fn tick(&mut self, late: Duration) {
        self.clock = self.filter.next_deadline().expect("something is due") + late;
        let now = self.now();
        self.filter.tick(now);
        self.carry_out();
    }

    fn answered(&self, request: RequestId) -> Option<Duration> {
        self.answers.iter().find(|(answered, _)| *answered == request).map(|(_, at)| *at)
    }

    /// A change that the local disk does at once: how long its answer is held, when whoever keeps the time is late
    /// by so much.
    fn held(&mut self, block: u64, blocks: usize, late: Duration) -> Duration {
        let began = self.clock;
        let request = self.submit(block, blocks);
        self.local_ends(LocalData::Changed);
        if self.answered(request).is_none() {
            self.tick(late);
        }
        self.answered(request).expect("one tick is enough") - began
    }
}

fn told(disk: &Disk) -> (Duration, Duration) {
    let counters = disk.filter.status().counters;
    (Duration::from_micros(counters.guest_delay_us_max), Duration::from_micros(counters.guest_late_us_max))
}

#[test]
fn a_window_that_fills_up_holds_each_answer_for_its_share_of_the_bound_and_never_longer() {
    let mut disk = Disk::in_sync();
    let mut longest = Duration::ZERO;
    let mut last = Duration::ZERO;
    let mut held_at_all = 0;
    for number in 0..BLOCKS {
        let held = disk.held(number, 1, Duration::ZERO);
        if disk.filter.mode() != Mode::Sync {
            assert_eq!(held, Duration::ZERO, "a change that is only marked waits for nobody");
            break;
        }
        let window = disk.filter.status().window.0;
        let over = window.saturating_sub(WINDOW / 2).min(WINDOW / 2);
        let share = u64::try_from(BOUND.as_micros()).unwrap() * over / (WINDOW / 2);
        assert_eq!(held, Duration::from_micros(share), "after {number} writes, {window} bytes in the window");
        assert!(held >= last && held <= BOUND, "{held:?} after {last:?}");
        last = held;
        longest = longest.max(held);
        held_at_all += u64::from(!held.is_zero());
    }
    assert_eq!(disk.filter.status().counters.overflows, 1, "it did not fill up");
    assert!(longest > BOUND * 9 / 10, "nearly full is nearly the bound: {longest:?}");
    assert!(held_at_all > 100, "{held_at_all}");
    assert_eq!(disk.filter.status().counters.delayed_answers, held_at_all);
    assert_eq!(told(&disk), (longest, Duration::ZERO), "what is told is what was, and nobody was late");
}

#[test]
fn an_answer_that_is_given_late_is_told_as_late() {
    const LATE: Duration = Duration::from_micros(7_301);
    let mut disk = Disk::in_sync();
    // Three quarters of the window, in one change that is then half as long held.
    let meant = disk.held(0, (WINDOW / 4096 * 3 / 4) as usize, Duration::ZERO);
    assert!(meant > Duration::ZERO && meant < BOUND, "{meant:?}");
    let held = disk.held(900, 1, LATE);
    let (delay, late) = told(&disk);
    assert_eq!((delay, late), (held, LATE));
    assert!(held - LATE > meant && held - LATE < BOUND, "{held:?} after {meant:?}");
}

/// A pass of two runs that are apart: the first fills the buffer, and a change of the second has to wait for
/// room to copy what it overwrites.
fn short_of_room() -> Disk {
    let mut allocated = DirtyBitmap::of((0..4).into());
    allocated.insert((600..604).into());
    let mut disk = Disk::in_a_pass(settings(WINDOW, 4 * 4096), &allocated);
    disk.local_ends(LocalData::Read(Bytes::from(vec![1; 4 * 4096])));
    assert!(disk.local.is_empty(), "the buffer is full: {:?}", disk.local);
    disk
}

#[test]
fn a_change_waits_for_a_copy_until_its_bound_and_then_goes_ahead() {
    let mut disk = short_of_room();
    disk.clock = Duration::from_micros(1_234);
    let request = disk.submit(601, 1);
    assert!(disk.local.is_empty(), "it waits for room");
    assert_eq!(disk.filter.next_deadline(), Some(disk.clock + BOUND));
    let before = Duration::from_nanos(1);
    disk.clock += BOUND - before;
    let now = disk.now();
    disk.filter.tick(now);
    disk.carry_out();
    assert!(disk.local.is_empty(), "a nanosecond is left");
    assert!(disk.filter.can_mark(), "it is a point when the pass has ended");
    disk.tick(Duration::ZERO);
    assert_eq!(disk.filter.status().counters.forfeited, 1, "the pass loses its T for it");
    let now = disk.now();
    assert!(!disk.filter.can_mark(), "nor is anything a point that is forwarded before the pass has ended");
    assert!(disk.filter.mark(now, "here").is_err());
    // Neither reads of the pass nor what it would be copied by stand before it.
    let change = disk.local.iter().position(|(_, op)| matches!(op, LocalOp::Change(_)));
    let change = change.expect("the change goes ahead");
    let (io, _) = disk.local.remove(change);
    let now = disk.now();
    disk.filter.local_done(now, io, Ok(LocalData::Changed));
    disk.carry_out();
    assert_eq!(disk.answered(request), Some(Duration::from_micros(1_234) + BOUND));
    assert_eq!(told(&disk), (BOUND, Duration::ZERO));
}

#[test]
fn a_change_that_waited_for_a_copy_is_held_for_the_rest_of_its_bound_at_most() {
    let mut disk = short_of_room();
    // The window, which the pass's own data are a part of, is nearly full of what the guest writes elsewhere.
    let mut number = 10;
    while disk.filter.status().window.0 < WINDOW * 19 / 20 {
        disk.held(number, 4, Duration::ZERO);
        number += 4;
    }
    assert_eq!(disk.filter.status().counters.forfeited, 0);
    let began = disk.clock;
    let request = disk.submit(601, 1);
    assert!(disk.local.is_empty(), "it waits for room");
    // What the buffer holds is on its way after a while: there is room for the copy.
    disk.clock += BOUND * 7 / 10;
    disk.send_all();
    disk.carry_out();
    let copy = disk
        .local
        .iter()
        .position(|(_, op)| matches!(op, LocalOp::Read(range) if range.start().0 == 601 * 4096));
    let (io, op) = disk.local.remove(copy.expect("the old content is read"));
    let LocalOp::Read(range) = op else { unreachable!("it is a read") };
    let now = disk.now();
    let content = Bytes::from(vec![1; usize::try_from(range.count().0).unwrap()]);
    disk.filter.local_done(now, io, Ok(LocalData::Read(content)));
    disk.carry_out();
    let change = disk.local.iter().position(|(_, op)| matches!(op, LocalOp::Change(_)));
    let (io, _) = disk.local.remove(change.expect("the change goes ahead"));
    let now = disk.now();
    disk.filter.local_done(now, io, Ok(LocalData::Changed));
    disk.carry_out();
    if disk.answered(request).is_none() {
        disk.tick(Duration::ZERO);
    }
    let held = disk.answered(request).expect("one tick is enough") - began;
    assert_eq!(held, BOUND, "the window alone would hold it for nearly as long again");
    assert_eq!(told(&disk), (BOUND, Duration::ZERO));
}

/// A pass reads its only block, from another host when `far`; a change of that block waits for its time. Gives how long the
/// change waited for the read, if that was bounded.
fn waited_for_a_read(far: bool) -> Option<Duration> {
    let mut disk = Disk::in_a_pass(settings(WINDOW, 4 * 4096), &DirtyBitmap::of((5..6).into()));
    let (read, _) = disk.local.pop().expect("the pass reads its block");
    if far {
        disk.filter.read_is_far(read);
    }
    disk.clock = Duration::from_micros(1_234);
    let began = disk.clock;
    disk.submit(5, 1);
    while !disk.local.iter().any(|(_, op)| matches!(op, LocalOp::Change(_))) {
        // Nor does it wait for the copy that the pass takes then.
        disk.clock = disk.filter.next_deadline().filter(|due| *due <= began + BOUND)?.max(disk.clock);
        let now = disk.now();
        disk.filter.tick(now);
        disk.carry_out();
    }
    Some(disk.clock - began)
}

#[test]
fn a_read_of_a_single_block_gives_way_when_it_waits_for_another_host() {
    assert_eq!(waited_for_a_read(true), Some(BOUND));
    assert_eq!(waited_for_a_read(false), None, "a read of the disk comes to an end by itself");
}
