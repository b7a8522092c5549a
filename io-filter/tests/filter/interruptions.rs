//! What an interruption is called: the hole tells why it began, whatever came later.

use backtide_io_filter::{
    Change, Effect, Filter, LocalData, LocalOp, MarkError, Mode, RequestId, Resume, ResyncKind, Settings,
};
use backtide_protocol::{Message, ReceiverState};
use backtide_tracking::DirtyBitmap;
use backtide_units::{ByteCount, LogPosition, Lsn, Reason};

use crate::common::{at, settings, welcome, write};

struct Disk {
    filter: Filter,
    requests: u64,
    /// The last frame of the connection.
    last: u64,
    /// The reasons of the passes that were sent.
    passes: Vec<Reason>,
}

impl Disk {
    /// In sync, with a window of two blocks.
    fn in_sync() -> Self {
        let settings = Settings { window_bytes: ByteCount(2 * 4096), ..settings() };
        let filter = Filter::new(settings, Resume::New, at(0));
        let mut disk = Self { filter, requests: 0, last: 1, passes: Vec::new() };
        disk.connect(ReceiverState::New, Lsn::ZERO);
        disk.settle();
        assert_eq!(disk.filter.mode(), Mode::Sync);
        disk.passes.clear();
        disk
    }

    fn connect(&mut self, state: ReceiverState, durable: Lsn) {
        self.last = 1;
        self.filter.connected(at(0), &welcome(state, durable));
        self.carry_out();
    }

    fn reconnect(&mut self) {
        self.connect(ReceiverState::Known, self.filter.acked_durable());
    }

    fn carry_out(&mut self) {
        while let Some(effect) = self.filter.next_effect() {
            match effect {
                Effect::Scan(io) => self.filter.scanned(at(0), io, &DirtyBitmap::new()),
                Effect::Local(io, LocalOp::Read(range)) => {
                    let read = vec![7; usize::try_from(range.count().0).unwrap()];
                    self.filter.local_done(at(0), io, Ok(LocalData::Read(read.into())));
                }
                Effect::Local(io, LocalOp::Change(_)) => {
                    self.filter.local_done(at(0), io, Ok(LocalData::Changed));
                }
                _ => {}
            }
        }
    }

    /// Sends what there is, which the receiver does not acknowledge.
    fn send(&mut self) {
        while let Some((seq, message)) = self.filter.poll_send(at(0)) {
            self.last = seq;
            if let Message::PassBegin { reason, .. } = message {
                self.passes.push(reason);
            }
            self.carry_out();
        }
    }

    fn acknowledge(&mut self) {
        let (received, durable) = (self.last, self.last);
        self.filter.receive(at(0), Message::Ack { received, durable, position: LogPosition::default() });
        self.carry_out();
    }

    /// The receiver takes everything.
    fn settle(&mut self) {
        for _ in 0..8 {
            self.send();
            self.acknowledge();
        }
    }

    fn write(&mut self, block: u64) {
        self.requests += 1;
        let change: Change = write(block);
        self.filter.submit(at(0), RequestId(self.requests), change);
        self.carry_out();
    }

    fn overflow(&mut self) {
        (0..4).for_each(|block| self.write(block));
    }
}

#[test]
fn a_receiver_that_refuses_is_not_away() {
    let mut disk = Disk::in_sync();
    disk.filter.receiver_refuses(at(0), true);
    disk.filter.disconnected(at(0));
    disk.overflow();
    assert_eq!(disk.filter.status().reason, Some(Reason::ReceiverRefuses));
    // It takes the disk, and refuses the first that is sent.
    for _ in 0..2 {
        disk.reconnect();
        disk.send();
        assert_eq!(disk.filter.mode(), Mode::Resync);
        disk.filter.receiver_refuses(at(0), true);
        disk.filter.disconnected(at(0));
    }
    assert!(disk.filter.is_refused());
    disk.reconnect();
    disk.settle();
    assert_eq!(disk.passes, [Reason::ReceiverRefuses; 3], "it had none of the first two");
    assert_eq!((disk.filter.mode(), disk.filter.is_refused()), (Mode::Sync, false));
    disk.filter.disconnected(at(0));
    disk.overflow();
    assert_eq!(disk.filter.status().reason, Some(Reason::ReceiverAway));
}

#[test]
fn a_pause_in_an_interruption_does_not_name_it() {
    let mut disk = Disk::in_sync();
    disk.filter.disconnected(at(0));
    disk.overflow();
    disk.filter.pause(at(0));
    assert_eq!(disk.filter.status().reason, Some(Reason::Paused), "that is why nothing happens now");
    disk.filter.resume(at(0));
    disk.reconnect();
    disk.settle();
    disk.filter.pause(at(0));
    disk.filter.resume(at(0));
    disk.reconnect();
    disk.settle();
    assert_eq!(disk.passes, [Reason::ReceiverAway, Reason::Paused]);
}

#[test]
fn what_a_paused_disk_leaves_says_why_its_hole_began() {
    let mut disk = Disk::in_sync();
    disk.filter.disconnected(at(0));
    disk.overflow();
    disk.filter.pause(at(0));
    assert_eq!(disk.filter.detach(at(0)).unwrap().reason, Some(Reason::ReceiverAway));
}

#[test]
fn nothing_is_a_point_from_when_somebody_else_writes_the_disk_until_everything_was_compared() {
    let mut disk = Disk::in_sync();
    let before = disk.filter.status().last_lsn;
    assert!(!disk.filter.is_written_past(at(0)), "the stream can stay");
    assert_eq!(
        disk.filter.status().last_lsn,
        before.next(),
        "without a change that is lacked there is no hole"
    );
    disk.carry_out();
    assert!(matches!(disk.filter.mark(at(0), "here"), Err(MarkError::NotForwarding { .. })));
    disk.write(1);
    disk.send();
    assert_eq!(
        (disk.filter.mode(), disk.passes.len()),
        (Mode::Tracking, 0),
        "it would read what changes under it"
    );
    // Somebody is there still, at each look.
    disk.filter.is_written_past(at(0));
    disk.filter.was_written_past(at(0));
    disk.carry_out();
    disk.send();
    assert_eq!(disk.filter.mode(), Mode::Resync);
    // Somebody is there again.
    assert!(disk.filter.is_written_past(at(0)), "half a pass is in the stream");
    disk.carry_out();
    disk.reconnect();
    disk.send();
    assert_eq!(disk.filter.mode(), Mode::Tracking);
    disk.filter.was_written_past(at(0));
    disk.carry_out();
    disk.send();
    assert_eq!(disk.passes, [Reason::WrittenPastAgent; 2]);
}

#[test]
fn what_was_not_sent_when_somebody_else_was_seen_is_no_point() {
    let mut disk = Disk::in_sync();
    disk.write(1);
    disk.filter.is_written_past(at(0));
    assert_eq!(disk.filter.poll_send(at(0)), None);
}

#[test]
fn a_paused_disk_that_is_written_past_lacks_something_too() {
    let mut disk = Disk::in_sync();
    let before = disk.filter.status().last_lsn;
    disk.filter.pause(at(0));
    for _ in 0..2 {
        assert!(!disk.filter.is_written_past(at(0)), "there is no stream");
        assert_eq!(disk.filter.status().last_lsn, before.next(), "as of when it was seen first");
    }
    disk.filter.was_written_past(at(0));
    disk.filter.resume(at(0));
    disk.reconnect();
    disk.settle();
    assert_eq!(disk.passes, [Reason::Paused], "that is how the hole began");
}

#[test]
fn a_comparison_that_somebody_asked_for_does_not_name_the_hole_of_what_is_written_past() {
    let mut disk = Disk::in_sync();
    disk.filter.force_resync(at(0), ResyncKind::Compare);
    assert!(disk.filter.is_written_past(at(0)), "what the scan has seen may have been written since");
    disk.carry_out();
    disk.reconnect();
    disk.filter.was_written_past(at(0));
    disk.carry_out();
    disk.settle();
    assert_eq!(disk.passes, [Reason::WrittenPastAgent]);
}
