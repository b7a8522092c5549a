//! What an interruption is called: the hole tells why it began, whatever came later.

use std::time::Duration;

use backtide_io_filter::{
    Change, Effect, Filter, IoFailure, LocalData, LocalOp, MarkError, Mode, RequestId, Resume, ResyncKind,
    Settings, VerifyError,
};
use backtide_protocol::{Message, ReceiverState};
use backtide_tracking::DirtyBitmap;
use backtide_units::{BlockIndex, BlockRange, ByteCount, HistoryId, LogPosition, Lsn, Reason};

use crate::common::{HISTORY, at, saved_in_sync, settings, welcome, write};

pub(super) struct Disk {
    pub(super) filter: Filter,
    requests: u64,
    /// The last frame of the connection.
    pub(super) last: u64,
    /// The reasons of the passes that were sent.
    pub(super) passes: Vec<Reason>,
    /// Reads of the local disk fail, each time at once.
    pub(super) unreadable: bool,
}

impl Disk {
    /// In sync, with a window of two blocks.
    pub(super) fn in_sync() -> Self {
        let window_bytes = ByteCount(2 * 4096);
        let settings = Settings { window_bytes, read_retry: Duration::ZERO, ..settings() };
        let filter = Filter::new(settings, Resume::New, at(0));
        let mut disk = Self { filter, requests: 0, last: 1, passes: Vec::new(), unreadable: false };
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

    pub(super) fn reconnect(&mut self) {
        self.connect(ReceiverState::Known, self.filter.acked_durable());
    }

    fn carry_out(&mut self) {
        while let Some(effect) = self.filter.next_effect() {
            match effect {
                Effect::Scan(io) => self.filter.scanned(at(0), io, &DirtyBitmap::new()),
                Effect::Local(io, LocalOp::Read(_)) if self.unreadable => {
                    self.filter.local_done(at(0), io, Err(IoFailure { errno: 5 }));
                }
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
    pub(super) fn send(&mut self) {
        while let Some((seq, message)) = self.filter.poll_send(at(0)) {
            self.last = seq;
            if let Message::PassBegin { reason, .. } = message {
                self.passes.push(reason);
            }
            self.carry_out();
        }
    }

    pub(super) fn acknowledge(&mut self) {
        let (received, durable) = (self.last, self.last);
        self.filter.receive(at(0), Message::Ack { received, durable, position: LogPosition::default() });
        self.carry_out();
    }

    /// The receiver takes everything.
    pub(super) fn settle(&mut self) {
        for _ in 0..8 {
            self.send();
            self.acknowledge();
        }
    }

    pub(super) fn write(&mut self, block: u64) {
        self.requests += 1;
        let change: Change = write(block);
        self.filter.submit(at(0), RequestId(self.requests), change);
        self.carry_out();
    }

    pub(super) fn overflow(&mut self) {
        (0..4).for_each(|block| self.write(block));
    }
}

#[test]
fn a_flush_that_the_receiver_may_not_have_got_is_told_on_the_next_connection() {
    let mut disk = Disk::in_sync();
    disk.write(1);
    disk.send();
    disk.acknowledge();
    disk.filter.submit(at(0), RequestId(99), Change::Flush);
    disk.carry_out();
    let told = |disk: &mut Disk| {
        let sent = std::iter::from_fn(|| disk.filter.poll_send(at(0)));
        sent.filter(|(_, message)| matches!(message, Message::Flush { .. })).count()
    };
    assert_eq!(told(&mut disk), 1);
    disk.filter.disconnected(at(0));
    disk.reconnect();
    assert_eq!((disk.filter.mode(), told(&mut disk)), (Mode::Sync, 1));
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
        before.plus(2),
        "a change that is lacked, and the hole that the receiver hears of"
    );
    disk.carry_out();
    assert!(matches!(disk.filter.mark(at(0), "here"), Err(MarkError::NotForwarding { .. })));
    disk.write(1);
    disk.send();
    assert_eq!(
        (disk.filter.mode(), disk.passes.len()),
        (Mode::Tracking, 1),
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
    let hole_and_pass = 2;
    assert_eq!(disk.passes, [Reason::WrittenPastAgent; 2].repeat(hole_and_pass));
}

#[test]
fn a_verify_ends_with_its_receiver_and_where_somebody_else_writes_the_disk() {
    let interrupted = Some(Err(VerifyError::Interrupted));
    let result = |disk: &Disk| disk.filter.verify_state().unwrap().1.cloned();
    // In sync; while it waits for sync; and of a disk that is somebody else's by then.
    for waits in [false, true] {
        let mut disk = Disk::in_sync();
        disk.filter.start_verify(at(0), false).unwrap();
        if waits {
            disk.overflow();
            assert!(disk.filter.mode() != Mode::Sync && disk.filter.is_connected());
            assert_eq!(result(&disk), None, "it waits");
        }
        disk.filter.is_written_past(at(0));
        assert_eq!(result(&disk), interrupted, "what holds data is not known any more");
    }
    let mut disk = Disk::in_sync();
    disk.filter.start_verify(at(0), false).unwrap();
    disk.overflow();
    disk.filter.fenced(at(0));
    assert_eq!(result(&disk), interrupted);
}

#[test]
fn a_verify_that_waits_ends_where_a_block_keeps_the_disk_from_sync() {
    let mut disk = Disk::in_sync();
    disk.filter.start_verify(at(0), false).unwrap();
    disk.overflow();
    assert_eq!(disk.filter.verify_state().unwrap().1, None, "it waits");
    disk.unreadable = true;
    disk.settle();
    assert!(disk.filter.mode() != Mode::Sync);
    let result = disk.filter.verify_state().unwrap().1;
    assert!(matches!(result, Some(Err(VerifyError::Read { errno: 5, .. }))), "{result:?}");
}

#[test]
fn what_a_log_in_doubt_lacks_of_an_outage_is_missing_for_its_damage() {
    let mut disk = Disk::in_sync();
    disk.filter.disconnected(at(0));
    disk.overflow();
    assert_eq!(disk.filter.status().reason, Some(Reason::ReceiverAway));
    disk.connect(ReceiverState::Foreign, disk.filter.acked_durable());
    disk.settle();
    assert_eq!(disk.passes, [Reason::Damaged]);
}

/// Without it the newest point that it has would be the disk's, for as long as somebody writes.
#[test]
fn the_receiver_hears_of_the_hole_at_once_and_nothing_closes_it_while_somebody_else_writes_the_disk() {
    let mut disk = Disk::in_sync();
    disk.write(1);
    disk.settle();
    let before = disk.filter.status().last_lsn;
    disk.filter.is_written_past(at(0));
    let hole = |disk: &mut Disk| {
        let sent: Vec<_> = std::iter::from_fn(|| disk.filter.poll_send(at(0))).collect();
        disk.last = sent.last().unwrap().0;
        let [(_, begin), (_, end)] = &sent[..] else { panic!("{sent:?}") };
        let Message::PassBegin { at, gap_from, reason: Reason::WrittenPastAgent, .. } = begin else {
            panic!("{begin:?}")
        };
        assert!(matches!(end, Message::PassEnd { at: of, valid_from: None, .. } if of == at), "{end:?}");
        assert!(disk.filter.status().pass.is_none(), "nothing is read");
        *gap_from
    };
    assert_eq!(hole(&mut disk), before, "right behind what it has");
    disk.acknowledge();
    // At each look.
    disk.filter.is_written_past(at(0));
    disk.write(2);
    assert_eq!(disk.filter.poll_send(at(0)), None, "it is told once");
    // It may have got lost with the connection.
    for _ in 0..2 {
        disk.filter.disconnected(at(0));
        disk.reconnect();
        hole(&mut disk);
    }
    disk.filter.disconnected(at(0));
    disk.filter.was_written_past(at(0));
    disk.reconnect();
    disk.settle();
    assert_eq!((disk.filter.mode(), disk.passes.len()), (Mode::Resync, 1), "this one compares");
}

/// An outage goes before it, and its records are true history.
#[test]
fn whom_the_receiver_was_away_from_it_hears_of_the_hole_when_it_is_back() {
    let mut disk = Disk::in_sync();
    disk.filter.disconnected(at(0));
    disk.overflow();
    disk.filter.is_written_past(at(0));
    assert_eq!(disk.filter.poll_send(at(0)), None);
    disk.reconnect();
    disk.settle();
    assert_eq!((disk.filter.mode(), &disk.passes[..]), (Mode::Tracking, &[Reason::ReceiverAway][..]));
}

#[test]
fn what_was_not_sent_when_somebody_else_was_seen_is_no_point() {
    let mut disk = Disk::in_sync();
    disk.write(1);
    disk.filter.is_written_past(at(0));
    disk.send();
    assert_eq!(disk.passes, [Reason::WrittenPastAgent], "the hole");
    assert!(disk.filter.status().dirty.0 > 0, "the change is in the next pass");
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
    assert_eq!(disk.passes, [Reason::WrittenPastAgent; 2], "the hole, and the pass that closes it");
}

/// An agent that died, whose activity log says which blocks may differ.
fn crashed(candidates: std::ops::Range<u64>) -> Disk {
    let resume = Resume::Crashed {
        reason: Reason::AgentCrashed,
        history: Some(HISTORY),
        last_lsn: Lsn(1000),
        acked_durable: Lsn(100),
        acked_position: LogPosition::default(),
        candidates: DirtyBitmap::of(BlockRange::between(
            BlockIndex(candidates.start),
            BlockIndex(candidates.end),
        )),
    };
    let filter = Filter::new(settings(), resume, at(0));
    Disk { filter, requests: 0, last: 1, passes: Vec::new(), unreadable: false }
}

#[test]
fn what_is_asked_for_during_a_scan_is_done_also_when_that_is_given_up() {
    type GivesUp = fn(&mut Filter);
    let gives_up: [GivesUp; 3] =
        [|filter| filter.disconnected(at(0)), |filter| filter.pause(at(0)), |filter| filter.fenced(at(0))];
    for (kind, gives_up) in
        [ResyncKind::Compare, ResyncKind::Full].into_iter().flat_map(|kind| gives_up.map(|it| (kind, it)))
    {
        let mut disk = crashed(3..5);
        disk.filter.connected(at(0), &welcome(ReceiverState::Known, Lsn(100)));
        assert_eq!(disk.filter.unsettled_blocks().unwrap().count().0, 2, "those are looked for");
        disk.filter.force_resync(at(0), kind);
        gives_up(&mut disk.filter);
        while disk.filter.next_effect().is_some() {}
        assert!(disk.filter.unsettled_blocks().is_none(), "{kind:?}: everything may differ");
        disk.filter.resume(at(0));
        disk.connect(ReceiverState::Known, Lsn(100));
        let questions = std::iter::from_fn(|| disk.filter.poll_send(at(0)))
            .filter(|(_, message)| matches!(message, Message::Compare(_)))
            .count();
        // Of zeroes the receiver is always asked: here they are the whole disk.
        assert!(questions > 0 && disk.filter.unsettled_blocks().unwrap().count().0 == 64, "{kind:?}");
    }
}

#[test]
fn two_plans_are_one_of_all_blocks_that_does_not_ask_where_either_does_not() {
    let mut disk = crashed(3..5);
    disk.filter.force_resync(at(0), ResyncKind::Full);
    disk.filter.force_resync(at(0), ResyncKind::Compare);
    disk.filter.connected(at(0), &welcome(ReceiverState::Known, Lsn(100)));
    let scan = std::iter::from_fn(|| disk.filter.next_effect()).find_map(|effect| match effect {
        Effect::Scan(io) => Some(io),
        _ => None,
    });
    let all = DirtyBitmap::of(BlockRange::whole_disk(settings().size));
    disk.filter.scanned(at(0), scan.unwrap(), &all);
    disk.carry_out();
    let (mut sent, mut asked) = (0, 0);
    for _ in 0..200 {
        while let Some((seq, message)) = disk.filter.poll_send(at(0)) {
            disk.last = seq;
            sent += usize::from(matches!(message, Message::PassData { .. }));
            asked += usize::from(matches!(message, Message::Compare(_)));
            disk.carry_out();
        }
        disk.acknowledge();
    }
    assert!(sent > 0 && asked == 0, "{sent} sent, {asked} asked about");
    assert_eq!(disk.filter.mode(), Mode::Sync);
}

#[test]
fn a_log_that_is_not_what_the_agent_thinks_is_not_joined_to_what_follows() {
    let later =
        |welcome| backtide_protocol::Welcome { last_time: Some(backtide_units::CaptureTime(9)), ..welcome };
    let another =
        |welcome| backtide_protocol::Welcome { history: HistoryId(uuid::Uuid::from_u128(6)), ..welcome };
    let stories = [
        (later(welcome(ReceiverState::Known, Lsn(100))), Reason::AgentRolledBack),
        (another(welcome(ReceiverState::Foreign, Lsn(100))), Reason::ForeignHistory),
    ];
    for (told, reason) in stories {
        let mut disk = crashed(0..0);
        disk.filter = Filter::new(settings(), Resume::Clean(saved_in_sync()), at(0));
        disk.filter.knows_until(backtide_units::CaptureTime(8));
        disk.filter.connected(at(0), &told);
        disk.carry_out();
        let begins =
            std::iter::from_fn(|| disk.filter.poll_send(at(0))).find_map(|(_, message)| match message {
                Message::PassBegin { at, gap_from, reason, .. } => Some((gap_from, at, reason)),
                _ => None,
            });
        assert_eq!(begins, Some((Lsn(100), Lsn(102), reason)), "LSN 101 is in the hole");
    }
}
