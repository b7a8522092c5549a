//! What the local disk may lose, and what is known of it, outlives a failed flush and a clean stop.

use backtide_io_filter::{
    Change, Effect, Filter, IoFailure, IoId, LocalData, LocalOp, Now, RequestId, Resume, Settings, TrackingOp,
};
use backtide_protocol::{CompareResult, Message, ReceiverState};
use backtide_tracking::{ActivityLimits, DirtyBitmap};
use backtide_units::{ByteCount, ByteOffset, Epoch, LogPosition, Lsn, Reason};
use bytes::Bytes;

use crate::common::{HISTORY, at, welcome, write};

fn settings(activity: ActivityLimits) -> Settings {
    Settings { epoch: Epoch(2), activity, ..crate::common::settings() }
}

/// A disk whose agent died with these blocks in doubt; no receiver is there.
fn crashed(candidates: &DirtyBitmap) -> Filter {
    crashed_with(settings(ActivityLimits::default()), candidates)
}

fn crashed_with(settings: Settings, candidates: &DirtyBitmap) -> Filter {
    let resume = Resume::Crashed {
        reason: Reason::AgentCrashed,
        history: Some(HISTORY),
        last_lsn: Lsn(100),
        acked_durable: Lsn(40),
        acked_position: LogPosition::default(),
        candidates: candidates.clone(),
    };
    Filter::new(settings, resume, at(0))
}

type Asked = Vec<(IoId, LocalOp)>;
type Answers = Vec<Result<Lsn, IoFailure>>;

/// Carries out what is asked of the tracking file; gives what is asked of the local disk, and the answers.
fn go_on(filter: &mut Filter, now: Now) -> (Asked, Answers) {
    let (mut local, mut answers) = (Vec::new(), Vec::new());
    while let Some(effect) = filter.next_effect() {
        match effect {
            Effect::Tracking(io, TrackingOp::Record(_) | TrackingOp::Snapshot(_)) => {
                filter.tracking_done(now, io, Ok(ByteCount(512)));
            }
            Effect::Local(io, op) => local.push((io, op)),
            Effect::Complete { result, .. } => answers.push(result),
            Effect::Alarm(_) => {}
            other => panic!("{other:?}"),
        }
    }
    (local, answers)
}

#[test]
fn a_flush_that_failed_unasked_is_told_to_the_next_guest_that_flushes_and_once() {
    let mut filter = crashed(&DirtyBitmap::new());
    filter.submit(at(1), RequestId(1), write(3));
    let (local, _) = go_on(&mut filter, at(1));
    filter.local_done(at(1), local[0].0, Ok(LocalData::Changed));
    go_on(&mut filter, at(1));
    // The filter flushes for itself before it lets an idle extent go, and the disk has lost pages.
    let mut due = filter.next_deadline().expect("an idle extent is let go some time");
    let settle = loop {
        let now = Now { monotonic: due, ..at(2) };
        filter.tick(now);
        match go_on(&mut filter, now).0.pop() {
            Some((io, LocalOp::Settle)) => break io,
            Some((_, other)) => panic!("{other:?}"),
            None => due = filter.next_deadline().expect("the extent is still hot"),
        }
    };
    let now = Now { monotonic: due, ..at(3) };
    let lost = IoFailure { errno: 5 };
    assert!(!filter.is_quiet(), "a detach has to wait for what it says");
    filter.local_done(now, settle, Err(lost));
    go_on(&mut filter, now);
    assert!(filter.is_quiet() && filter.untold_failure() == Some(lost));
    // The system tells of lost pages once, and it told the filter: the guest's flush succeeds there.
    for expected in [Some(lost), None] {
        filter.submit(now, RequestId(2), Change::Flush);
        let (flush, _) = go_on(&mut filter, now);
        filter.local_done(now, flush[0].0, Ok(LocalData::Changed));
        let (_, answers) = go_on(&mut filter, now);
        assert_eq!(answers.iter().map(|answer| answer.err()).collect::<Vec<_>>(), [expected]);
    }
}

#[test]
fn a_flush_of_the_drivers_that_failed_is_told_once_also_by_the_next_attach() {
    let mut filter = crashed(&DirtyBitmap::new());
    let lost = IoFailure { errno: 5 };
    filter.submit(at(1), RequestId(1), write(3));
    let (local, _) = go_on(&mut filter, at(1));
    filter.local_done(at(1), local[0].0, Ok(LocalData::Changed));
    go_on(&mut filter, at(1));
    filter.flush_failed(at(2), lost);
    go_on(&mut filter, at(2));
    assert_eq!(filter.untold_failure(), Some(lost), "what the next attach has to be told");
    let saved = filter.clone().detach(at(3)).expect("what may differ is known");
    assert_eq!((saved.dirty, saved.compare), (DirtyBitmap::of((3..4).into()), true));
    let mut next = crashed(&DirtyBitmap::new());
    next.owes_failure(lost);
    for mut filter in [filter, next] {
        for expected in [Some(lost), None] {
            filter.submit(at(3), RequestId(2), Change::Flush);
            let (flush, _) = go_on(&mut filter, at(3));
            filter.local_done(at(3), flush[0].0, Ok(LocalData::Changed));
            let (_, answers) = go_on(&mut filter, at(3));
            assert_eq!(answers.iter().map(|answer| answer.err()).collect::<Vec<_>>(), [expected]);
            assert_eq!(filter.untold_failure(), None);
        }
    }
}

#[test]
fn a_clean_stop_before_the_crash_was_made_good_keeps_what_is_in_doubt() {
    let candidates = DirtyBitmap::of((8..12).into());
    let mut filter = crashed(&candidates);
    filter.submit(at(1), RequestId(1), write(3));
    let (local, _) = go_on(&mut filter, at(1));
    filter.local_done(at(1), local[0].0, Ok(LocalData::Changed));
    go_on(&mut filter, at(1));
    let saved = filter.detach(at(2)).expect("what may differ is known");
    let mut expected = candidates;
    expected.insert((3..4).into());
    assert_eq!(saved.dirty, expected);
    assert!(saved.compare, "they may differ, and need not");
}

/// What it asked the driver for last.
fn asked(filter: &mut Filter) -> IoId {
    let effects = std::iter::from_fn(|| filter.next_effect());
    let asked = effects.filter_map(|effect| match effect {
        Effect::Scan(io) | Effect::Local(io, _) => Some(io),
        _ => None,
    });
    asked.last().expect("something is asked for")
}

/// Everything that is to be sent arrives.
fn everything_arrives(filter: &mut Filter) -> Vec<Message> {
    let (numbers, sent): (Vec<u64>, Vec<Message>) = std::iter::from_fn(|| filter.poll_send(at(1))).unzip();
    let last = numbers.last().copied().unwrap_or_default();
    filter.receive(at(1), Message::Ack { received: last, durable: last, position: LogPosition(last) });
    sent
}

/// A disk without an activity log in sync, with nothing on it.
fn in_sync() -> Filter {
    let settings = settings(ActivityLimits { hot: 0, ..ActivityLimits::default() });
    let mut filter = Filter::new(settings, Resume::New, at(0));
    filter.connected(at(0), &welcome(ReceiverState::New, Lsn::ZERO));
    let scan = asked(&mut filter);
    filter.scanned(at(0), scan, &DirtyBitmap::new());
    everything_arrives(&mut filter);
    filter
}

#[test]
fn what_the_disk_has_answered_and_forgotten_is_sent_again_as_it_is() {
    let mut filter = in_sync();
    filter.submit(at(1), RequestId(1), write(3));
    let write = asked(&mut filter);
    filter.local_done(at(1), write, Ok(LocalData::Changed));
    everything_arrives(&mut filter);
    assert!(filter.is_drained());
    go_on(&mut filter, at(1));
    filter.forgotten(at(1), &DirtyBitmap::of((3..4).into()));
    assert!(!filter.is_drained(), "the receiver has what it was told, and the disk has not");
    let read = std::iter::from_fn(|| filter.next_effect()).find_map(|effect| match effect {
        Effect::Local(io, LocalOp::Read(range)) => Some((io, range)),
        _ => None,
    });
    let (io, range) = read.expect("the block is read");
    assert_eq!((range.start(), range.count()), (ByteOffset(3 * 4096), ByteCount(4096)));
    filter.local_done(at(1), io, Ok(LocalData::Read(Bytes::from(vec![1; 4096]))));
    let sent = everything_arrives(&mut filter);
    let reasons = sent.iter().filter_map(|message| match message {
        Message::PassBegin { reason, .. } => Some(*reason),
        _ => None,
    });
    assert_eq!(reasons.collect::<Vec<_>>(), [Reason::LocalWriteFailed]);
    assert!(filter.is_drained(), "{:?}", filter.status());
}

#[test]
fn without_an_activity_log_a_failed_flush_is_remembered_too() {
    let mut filter = in_sync();
    // What was there before the first attach is flushed.
    filter.submit(at(1), RequestId(3), Change::Flush);
    let flush = asked(&mut filter);
    filter.local_done(at(1), flush, Ok(LocalData::Changed));
    filter.submit(at(1), RequestId(1), write(3));
    let write = asked(&mut filter);
    filter.local_done(at(1), write, Ok(LocalData::Changed));
    everything_arrives(&mut filter);
    assert!(filter.is_drained(), "{:?}", filter.status());
    go_on(&mut filter, at(1));
    filter.submit(at(1), RequestId(2), Change::Flush);
    let (flush, _) = go_on(&mut filter, at(1));
    filter.local_done(at(1), flush[0].0, Err(IoFailure { errno: 5 }));
    go_on(&mut filter, at(1));
    let saved = filter.detach(at(2)).expect("what may differ is known");
    assert_eq!((saved.dirty, saved.compare), (DirtyBitmap::of((3..4).into()), true));
}

#[test]
fn what_a_failed_flush_was_about_is_known_of_a_disk_of_which_nothing_else_is() {
    let settings = settings(ActivityLimits { hot: 0, ..ActivityLimits::default() });
    let mut filter = Filter::new(settings, Resume::New, at(0));
    filter.submit(at(1), RequestId(3), Change::Flush);
    let flush = asked(&mut filter);
    filter.local_done(at(1), flush, Ok(LocalData::Changed));
    filter.submit(at(1), RequestId(1), write(3));
    let write = asked(&mut filter);
    filter.local_done(at(1), write, Ok(LocalData::Changed));
    go_on(&mut filter, at(1));
    assert!(filter.doubtful().is_empty());
    filter.submit(at(1), RequestId(2), Change::Flush);
    let (flush, _) = go_on(&mut filter, at(1));
    filter.local_done(at(1), flush[0].0, Err(IoFailure { errno: 5 }));
    go_on(&mut filter, at(1));
    assert_eq!(filter.detach(at(2)), None, "it has never met a receiver");
    assert_eq!(filter.doubtful(), DirtyBitmap::of((3..4).into()));
}

/// What the receiver says is taken as it is meant, or not at all: else a block that differs would be taken for equal.
#[test]
fn an_answer_that_is_none_settles_nothing() {
    let candidates = DirtyBitmap::of((0..48).into());
    for wrong in [vec![2, 0], vec![1, 1], vec![0, 3]] {
        let settings =
            Settings { resync_buffer_bytes: ByteCount(1 << 20), ..settings(ActivityLimits::default()) };
        let mut filter = crashed_with(settings, &candidates);
        filter.connected(at(0), &welcome(ReceiverState::Known, Lsn(40)));
        let mut refused = false;
        let mut asked = Vec::new();
        for _ in 0..10 {
            while let Some(effect) = filter.next_effect() {
                match effect {
                    Effect::Tracking(io, _) => filter.tracking_done(at(1), io, Ok(ByteCount(512))),
                    Effect::Scan(io) => filter.scanned(at(1), io, &candidates),
                    Effect::Local(io, LocalOp::Read(range)) => {
                        let bytes = vec![7; usize::try_from(range.count().0).unwrap()];
                        filter.local_done(at(1), io, Ok(LocalData::Read(bytes.into())));
                    }
                    Effect::Disconnect { .. } => refused = true,
                    _ => {}
                }
            }
            while let Some((_, message)) = filter.poll_send(at(1)) {
                if let Message::Compare(question) = message {
                    asked.push((question.id, question.items.len()));
                }
            }
        }
        assert_eq!(asked.len(), 1, "{asked:?}");
        let (id, items) = asked[0];
        assert_eq!(items, 3);
        filter.receive(at(2), Message::CompareResult(CompareResult { id, differing: wrong.clone() }));
        while let Some(effect) = filter.next_effect() {
            refused |= matches!(effect, Effect::Disconnect { .. });
        }
        assert!(refused, "{wrong:?}");
        assert_eq!(filter.unsettled_blocks(), Some(candidates.clone()), "{wrong:?}");
        filter.disconnected(at(3));
        assert_eq!(filter.unsettled_blocks(), Some(candidates.clone()), "{wrong:?}");
    }
}
