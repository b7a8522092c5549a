//! The receiver gathers what it makes durable, unless it is told that somebody waits.

use std::time::Duration;

use backtide_io_filter::{
    AckPolicy, Change, Effect, Filter, IoId, LocalData, Mode, Now, OnOutage, RequestId, Resume, ResyncKind,
    Settings,
};
use backtide_protocol::{Message, Ping, ReceiverState};
use backtide_tracking::DirtyBitmap;
use backtide_units::{ByteCount, ByteOffset, ByteRange, CaptureTime, LogPosition, Lsn};
use bytes::Bytes;

use crate::common::{at, welcome};

const WINDOW: u64 = 1 << 20;

const UNCHANGED_EVERY: Duration = Duration::from_secs(30);

/// A disk in sync, and the last frame of the connection.
struct Disk {
    filter: Filter,
    requests: u64,
    last: u64,
}

fn now() -> Now {
    at(0)
}

impl Disk {
    fn in_sync(ack: AckPolicy) -> Self {
        let settings = Settings {
            ack,
            on_outage: OnOutage::Block,
            window_bytes: ByteCount(WINDOW),
            guest_delay_max: Duration::ZERO,
            unchanged_every: UNCHANGED_EVERY,
            ..crate::common::settings()
        };
        let mut filter = Filter::new(settings, Resume::New, now());
        filter.connected(now(), &welcome(ReceiverState::New, Lsn::ZERO));
        let mut disk = Self { filter, requests: 0, last: 1 };
        let scan = |effect| if let Effect::Scan(io) = effect { Some(io) } else { None };
        let scan = disk.effects().into_iter().find_map(scan).expect("a scan was asked for");
        disk.filter.scanned(now(), scan, &DirtyBitmap::new());
        disk.sent();
        disk.acknowledge();
        assert_eq!(disk.filter.mode(), Mode::Sync);
        disk.effects();
        disk
    }

    fn effects(&mut self) -> Vec<Effect> {
        std::iter::from_fn(|| self.filter.next_effect()).collect()
    }

    fn begin(&mut self, change: Change) -> (RequestId, IoId) {
        self.requests += 1;
        let request = RequestId(self.requests);
        self.filter.submit(now(), request, change);
        let local = |effect| if let Effect::Local(io, _) = effect { Some(io) } else { None };
        (request, self.effects().into_iter().find_map(local).expect("a local I/O was asked for"))
    }

    fn change(&mut self, change: Change, done: LocalData) -> RequestId {
        let (request, io) = self.begin(change);
        self.filter.local_done(now(), io, Ok(done));
        request
    }

    fn write(&mut self) -> RequestId {
        let range = ByteRange::new(ByteOffset(0), ByteCount(4096)).unwrap();
        let data = Bytes::from(vec![7; 4096]);
        self.change(Change::Write { range, data, fua: false }, LocalData::Changed)
    }

    fn flush(&mut self) -> RequestId {
        self.change(Change::Flush, LocalData::Changed)
    }

    /// The names of the frames that go out, with what is asked.
    fn sent(&mut self) -> Vec<&'static str> {
        let mut names = Vec::new();
        while self.filter.has_to_send() {
            let (seq, message) = self.filter.poll_send(now()).expect("it has something");
            self.last = seq;
            names.push(match message {
                Message::Hasten { durable: true } => "ask durable",
                Message::Hasten { durable: false } => "ask received",
                message => message.name(),
            });
        }
        assert_eq!(self.filter.poll_send(now()), None, "it said that there is nothing");
        names
    }

    fn acknowledge(&mut self) {
        self.filter.receive(
            now(),
            Message::Ack { received: self.last, durable: self.last, position: LogPosition::default() },
        );
    }

    fn is_answered(&mut self, request: RequestId) -> bool {
        self.effects().iter().any(
            |effect| matches!(effect, Effect::Complete { request: answered, .. } if *answered == request),
        )
    }
}

#[test]
fn nobody_waits_for_a_write_that_is_acknowledged_locally() {
    let mut disk = Disk::in_sync(AckPolicy::Local);
    disk.write();
    disk.flush();
    assert_eq!(disk.sent(), ["record", "flush"]);
}

#[test]
fn a_flush_waits_for_what_is_durable_and_a_write_does_not() {
    let mut disk = Disk::in_sync(AckPolicy::Durable);
    disk.write();
    assert_eq!(disk.sent(), ["record"]);
    let flush = disk.flush();
    assert!(!disk.is_answered(flush), "nothing is durable");
    assert_eq!(disk.sent(), ["flush", "ask durable"], "and asked once");
    disk.acknowledge();
    assert!(disk.is_answered(flush));
    let again = disk.flush();
    assert!(disk.is_answered(again), "nothing was written since");
    assert_eq!(disk.sent(), [""; 0]);
}

#[test]
fn the_receiver_syncs_while_the_local_disk_does() {
    for (ack, asked) in
        [(AckPolicy::Durable, &["ask durable"][..]), (AckPolicy::Local, &[]), (AckPolicy::Received, &[])]
    {
        let mut disk = Disk::in_sync(ack);
        disk.write();
        disk.sent();
        disk.acknowledge();
        disk.write();
        disk.sent();
        let (flush, io) = disk.begin(Change::Flush);
        assert_eq!(disk.sent(), asked, "{ack:?}, before the local disk has flushed");
        disk.acknowledge();
        assert!(!disk.is_answered(flush), "{ack:?}: the receiver alone is not enough");
        disk.filter.local_done(now(), io, Ok(LocalData::Changed));
        assert!(disk.is_answered(flush), "{ack:?}");
        assert_eq!(disk.sent(), ["flush"], "{ack:?}: it was asked before");
    }
}

#[test]
fn each_write_waits_for_what_its_policy_says() {
    let table = [(AckPolicy::Received, "ask received"), (AckPolicy::DurableEveryWrite, "ask durable")];
    for (ack, asked) in table {
        let mut disk = Disk::in_sync(ack);
        let writes = [disk.write(), disk.write()];
        assert_eq!(disk.sent(), ["record", "record", asked], "one question for both");
        let third = disk.write();
        assert_eq!(disk.sent(), ["record", asked]);
        disk.acknowledge();
        let answered = disk.effects();
        for request in writes.into_iter().chain([third]) {
            let is_it =
                |effect: &&Effect| matches!(effect, Effect::Complete { request: of, .. } if *of == request);
            assert!(answered.iter().any(|effect| is_it(&effect)), "{request:?} under {ack:?}");
        }
    }
}

#[test]
fn who_waits_is_asked_for_in_a_stream_without_a_pause() {
    let mut disk = Disk::in_sync(AckPolicy::DurableEveryWrite);
    for _ in 0..200 {
        disk.write();
    }
    let sent = disk.sent();
    let asked: Vec<_> = sent.iter().enumerate().filter(|(_, name)| **name == "ask durable").collect();
    assert!(asked.len() >= 3, "{asked:?}");
    assert!(asked.len() <= 6, "a question for each frame costs more than it brings: {asked:?}");
    assert_eq!(sent.last(), Some(&"ask durable"));
}

#[test]
fn a_filling_window_waits_for_the_receiver() {
    let mut disk = Disk::in_sync(AckPolicy::Local);
    let mut sent = Vec::new();
    let mut writes = 0;
    while sent.is_empty() {
        disk.write();
        writes += 1;
        sent = disk.sent().into_iter().filter(|name| *name != "record").collect();
    }
    assert_eq!(sent, ["ask durable"]);
    assert!((48..=64).contains(&writes), "a quarter of the window, and not before: {writes} writes");
    disk.write();
    assert_eq!(disk.sent(), ["record"], "it has been asked");
    disk.filter.receive(
        now(),
        Message::Ack { received: disk.last, durable: disk.last - 1, position: LogPosition::default() },
    );
    disk.write();
    assert_eq!(disk.sent(), ["record"], "there is room again");
}

#[test]
fn a_lost_stream_forgets_what_was_asked() {
    let mut disk = Disk::in_sync(AckPolicy::DurableEveryWrite);
    let durable = disk.filter.acked_durable();
    let write = disk.write();
    assert_eq!(disk.sent(), ["record", "ask durable"]);
    disk.filter.disconnected(now());
    disk.filter.connected(now(), &welcome(ReceiverState::Known, durable));
    assert_eq!(disk.sent(), ["record", "ask durable"]);
    disk.acknowledge();
    assert!(disk.is_answered(write));
}

#[test]
fn who_takes_the_disk_away_waits_for_all_of_it() {
    let mut disk = Disk::in_sync(AckPolicy::Local);
    disk.write();
    assert_eq!(disk.sent(), ["record"]);
    disk.filter.hasten();
    assert_eq!(disk.sent(), ["ask durable"]);
    disk.acknowledge();
    assert!(disk.filter.is_drained());
}

#[test]
fn little_that_nobody_waits_for_may_be_gathered() {
    let mut disk = Disk::in_sync(AckPolicy::Local);
    let waits = |disk: &Disk| (disk.filter.has_to_send(), disk.filter.may_gather());
    disk.write();
    disk.flush();
    assert_eq!(waits(&disk), (true, true));
    for _ in 2..32 {
        disk.write();
    }
    assert_eq!(waits(&disk), (true, false), "as much as is worth a write of its own");
    disk.sent();
    disk.acknowledge();
    disk.write();
    assert_eq!(waits(&disk), (true, true));
    disk.filter.mark(now(), "here").unwrap();
    assert_eq!(waits(&disk), (true, false), "a person waits for a mark");
    disk.sent();
    disk.write();
    disk.filter.hasten();
    assert_eq!(waits(&disk), (true, false), "somebody takes the disk away");
    disk.sent();
    disk.acknowledge();
    disk.write();
    disk.filter.disconnected(now());
    assert!(!disk.filter.may_gather());
    disk.filter.connected(now(), &welcome(ReceiverState::Known, disk.filter.acked_durable()));
    assert_eq!(waits(&disk), (true, true));
    disk.filter.receive(now(), Message::Ping(Ping { sent: Some(CaptureTime(1)), heard: None }));
    assert_eq!(waits(&disk), (true, false), "the receiver measures how long an answer takes");
}

#[test]
fn a_window_that_fills_is_not_filled_by_gathering() {
    let mut disk = Disk::in_sync(AckPolicy::Local);
    for _ in 0..64 {
        disk.write();
        disk.sent();
    }
    disk.write();
    assert!(disk.filter.has_to_send() && !disk.filter.may_gather());
}

#[test]
fn what_a_guest_waits_for_is_not_gathered() {
    for ack in [AckPolicy::Received, AckPolicy::DurableEveryWrite] {
        let mut disk = Disk::in_sync(ack);
        disk.write();
        assert!(disk.filter.has_to_send() && !disk.filter.may_gather(), "{ack:?}");
    }
    let mut disk = Disk::in_sync(AckPolicy::Durable);
    disk.write();
    assert!(disk.filter.may_gather(), "a guest waits for flushes only");
    let (_, io) = disk.begin(Change::Flush);
    assert!(!disk.filter.may_gather(), "from their beginning");
    disk.sent();
    disk.filter.local_done(now(), io, Ok(LocalData::Changed));
    assert!(disk.filter.has_to_send() && !disk.filter.may_gather());
}

#[test]
fn what_a_resync_sends_is_not_gathered() {
    let mut disk = Disk::in_sync(AckPolicy::Local);
    disk.filter.force_resync(now(), ResyncKind::Full);
    let scan = |effect| if let Effect::Scan(io) = effect { Some(io) } else { None };
    let scan = disk.effects().into_iter().find_map(scan).expect("a scan was asked for");
    disk.filter.scanned(now(), scan, &DirtyBitmap::new());
    disk.write();
    assert!(disk.filter.has_to_send() && !disk.filter.may_gather());
}

#[test]
fn an_idle_disk_in_sync_says_now_and_then_that_it_has_not_changed() {
    let mut disk = Disk::in_sync(AckPolicy::Local);
    disk.write();
    disk.sent();
    let later = |count: u32| Now { monotonic: UNCHANGED_EVERY * count, wall: CaptureTime(9_000_000) };
    disk.filter.tick(later(1));
    assert_eq!(disk.sent(), [""; 0], "the write is not durable yet");
    disk.acknowledge();
    assert_eq!(disk.filter.next_deadline(), Some(UNCHANGED_EVERY));
    disk.filter.tick(later(1));
    let (seq, message) = disk.filter.poll_send(later(1)).expect("it says so");
    let lsn = disk.filter.last_lsn();
    assert_eq!(message, Message::Unchanged { lsn, time: CaptureTime(9_000_000) });
    disk.filter.tick(later(2));
    assert_eq!(disk.sent(), [""; 0], "the first time has to be durable before the next");
    disk.last = seq;
    disk.acknowledge();
    disk.filter.tick(later(2));
    assert_eq!(disk.sent(), ["unchanged"]);
    // Whatever comes next is later, also when the clock does not go on.
    disk.write();
    let (_, message) = disk.filter.poll_send(later(2)).expect("a record");
    assert!(matches!(message, Message::Record(record) if record.time > CaptureTime(9_000_001)));
    disk.filter.disconnected(later(2));
    disk.filter.tick(later(9));
    assert_eq!(disk.filter.next_deadline(), None, "who is not in sync says nothing");
}

#[test]
fn a_mark_is_told_with_the_time_that_the_log_has_also_when_the_clock_was_set_back() {
    let mut disk = Disk::in_sync(AckPolicy::Local);
    disk.write();
    disk.sent();
    let earlier = Now { wall: CaptureTime(1), ..now() };
    let marked = disk.filter.mark(earlier, "here").unwrap();
    let (_, message) = disk.filter.poll_send(earlier).expect("the mark");
    let Message::Mark { lsn, time, .. } = message else { panic!("{message:?}") };
    assert_eq!((marked.lsn, marked.time), (lsn, time));
    assert!(time > CaptureTime(1_000_000), "{time:?}");
}

#[test]
fn a_mark_is_durable_when_the_receiver_says_so_and_not_before() {
    let mut disk = Disk::in_sync(AckPolicy::Local);
    disk.write();
    let at = disk.filter.mark(now(), "here").unwrap().lsn;
    disk.filter.hasten();
    assert_eq!(disk.sent(), ["record", "mark", "ask durable"]);
    let received = Message::Ack { received: disk.last, durable: 1, position: LogPosition::default() };
    disk.filter.receive(now(), received);
    assert!(!disk.filter.has_durable_mark(at, "here"), "it is in the receiver's memory only");
    disk.acknowledge();
    assert!(disk.filter.has_durable_mark(at, "here"));
    assert!(!disk.filter.has_durable_mark(at, "there") && !disk.filter.has_durable_mark(Lsn(0), "here"));

    // One that goes with the window is never said to be durable.
    let lost = disk.filter.mark(now(), "lost").unwrap().lsn;
    disk.filter.disconnected(now());
    for _ in 0..WINDOW / 4096 {
        disk.write();
    }
    assert_eq!(disk.filter.mode(), Mode::Tracking);
    assert!(!disk.filter.has_durable_mark(lost, "lost"));
}
