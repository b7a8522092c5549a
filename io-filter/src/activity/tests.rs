use backtide_protocol::{CompareResult, Message, PROTOCOL_VERSION, ReceiverState, Welcome};
use backtide_units::{ByteOffset, ByteRange, CaptureTime, Epoch, HistoryId, LogPosition};
use bytes::Bytes;
use uuid::Uuid;

use super::*;
use crate::{
    ResyncKind,
    event::{AckPolicy, LocalData, OnOutage},
};

pub(super) fn at(millis: u64) -> Now {
    Now { monotonic: Duration::from_millis(millis), wall: CaptureTime(1_000_000 + millis * 1000) }
}

fn filter() -> Filter {
    filter_of(None)
}

/// As it was detached, in sync with the log of that history.
fn filter_of(history: Option<HistoryId>) -> Filter {
    filter_with(history, ActivityLimits::default())
}

pub(super) fn filter_with(history: Option<HistoryId>, activity: ActivityLimits) -> Filter {
    let settings = Settings {
        disk: DiskId(Uuid::from_u128(1)),
        name: "vm1".parse().unwrap(),
        size: ByteCount(64 * 4096),
        epoch: Epoch(1),
        attach: Uuid::from_u128(1),
        ack: AckPolicy::Local,
        on_outage: OnOutage::Continue,
        window_bytes: ByteCount(1 << 20),
        resync_buffer_bytes: ByteCount(4096),
        guest_delay_max: Duration::from_millis(10),
        outage_after: Duration::from_secs(5),
        bitmap_bytes: ByteCount(1 << 20),
        read_retry: Duration::from_secs(1),
        unchanged_every: Duration::MAX,
        activity,
    };
    let saved = SavedTracking { history, ..SavedTracking::unknown(settings.disk) };
    Filter::new(settings, Resume::Clean(saved), at(0))
}

/// Submits it; the local I/O that is asked for.
fn begin(filter: &mut Filter, id: u64, change: Change) -> IoId {
    filter.submit(at(id), RequestId(id), change);
    let mut local = None;
    while let Some(effect) = filter.next_effect() {
        if let Effect::Tracking(io, _) = effect {
            filter.tracking_done(at(id), io, Ok(ByteCount(512)));
        } else if let Effect::Local(io, _) = effect {
            local = Some(io);
        }
    }
    local.expect("it is asked of the disk")
}

pub(super) fn write(block: u64) -> Change {
    let range = ByteRange::new(ByteOffset(block * 4096), ByteCount(4096)).unwrap();
    Change::Write { range, data: Bytes::from(vec![7; 4096]), fua: false }
}

/// The disk may have had a part of it then, which no later flush makes stable.
#[test]
fn what_was_being_written_when_a_flush_failed_is_in_doubt() {
    for by_driver in [false, true] {
        let mut filter = filter();
        let before = begin(&mut filter, 1, write(3));
        filter.local_done(at(1), before, Ok(LocalData::Changed));
        let meanwhile = begin(&mut filter, 2, write(5));
        match by_driver {
            true => filter.flush_failed(at(3), IoFailure { errno: 5 }),
            false => {
                let flush = begin(&mut filter, 3, Change::Flush);
                filter.local_done(at(3), flush, Err(IoFailure { errno: 5 }));
            }
        }
        filter.local_done(at(4), meanwhile, Ok(LocalData::Changed));
        let after = begin(&mut filter, 5, write(7));
        filter.local_done(at(5), after, Ok(LocalData::Changed));
        let flush = begin(&mut filter, 6, Change::Flush);
        filter.local_done(at(6), flush, Ok(LocalData::Changed));
        let mut expected = DirtyBitmap::of((3..4).into());
        expected.insert((5..6).into());
        assert_eq!(*filter.activity.doubtful(), expected);
    }
}

/// Carries out what is asked of the tracking file; what the snapshots say that were written.
fn snapshots(filter: &mut Filter, now: u64) -> Vec<bool> {
    let mut everything = Vec::new();
    while let Some(effect) = filter.next_effect() {
        if let Effect::Tracking(io, op) = effect {
            if let TrackingOp::Snapshot(snapshot) = op {
                everything.push(snapshot.everything);
            }
            filter.tracking_done(at(now), io, Ok(ByteCount(512)));
        }
    }
    everything
}

/// Else an agent that is killed before the receiver is there has forgotten what it was told.
#[test]
fn a_forced_compare_is_in_the_file_before_there_is_a_receiver() {
    for kind in [ResyncKind::Compare, ResyncKind::Full] {
        for paused in [false, true] {
            let mut filter = filter_of(Some(HistoryId(Uuid::from_u128(7))));
            if paused {
                filter.pause(at(0));
            }
            assert!(snapshots(&mut filter, 0).is_empty(), "nothing is to be compared");
            filter.force_resync(at(1), kind);
            assert!(filter.is_saving_everything());
            // Twice, so that damage to one of them is not believed.
            assert_eq!(snapshots(&mut filter, 1), [true, true], "{kind:?}");
            assert!(!filter.is_saving_everything());
            filter.force_resync(at(2), kind);
            assert!(snapshots(&mut filter, 2).is_empty(), "it says so already");
        }
    }
}

/// With a receiver that has everything.
fn in_sync() -> Filter {
    let history = HistoryId(Uuid::from_u128(7));
    let mut filter = filter_of(Some(history));
    let welcome = Welcome {
        version: PROTOCOL_VERSION,
        history,
        state: ReceiverState::Known,
        durable: filter.acked_durable(),
        highest: filter.acked_durable(),
        position: LogPosition::default(),
        in_pass: false,
        last_time: None,
        last_attach: None,
    };
    filter.connected(at(0), &welcome);
    assert!(snapshots(&mut filter, 0).is_empty() && filter.mode() == Mode::Sync);
    filter
}

/// Else an agent that dies before the receiver has it has forgotten what it was asked to find.
#[test]
fn what_a_verify_is_to_repair_is_in_the_file() {
    let mut filter = in_sync();
    filter.start_verify(at(1), true).unwrap();
    let mut saved = DirtyBitmap::new();
    for now in 2..100 {
        while let Some(effect) = filter.next_effect() {
            match effect {
                Effect::Scan(io) => filter.scanned(at(now), io, &DirtyBitmap::of((0..64).into())),
                Effect::Local(io, LocalOp::Read(range)) => {
                    let read = Bytes::from(vec![7; usize::try_from(range.count().0).unwrap()]);
                    filter.local_done(at(now), io, Ok(LocalData::Read(read)));
                }
                Effect::Tracking(io, op) => {
                    if let TrackingOp::Snapshot(snapshot) = op {
                        saved = snapshot.saved.dirty;
                    }
                    filter.tracking_done(at(now), io, Ok(ByteCount(512)));
                }
                _ => {}
            }
        }
        // Nothing of the repair is acknowledged.
        while let Some((_, message)) = filter.poll_send(at(now)) {
            if let Message::Compare(question) = message {
                let differing = (0..).take(question.items.len()).collect();
                let id = question.id;
                filter.receive(at(now), Message::CompareResult(CompareResult { id, differing }));
            }
        }
    }
    assert_eq!(filter.mode(), Mode::Resync);
    assert_eq!(saved.count().0, 64, "all that differs");
}

/// Else the receiver would take a pass that compares less for the one that compares everything, should the agent die meanwhile.
#[test]
fn a_hole_is_told_when_the_file_says_that_everything_is_compared_after_it() {
    let mut filter = in_sync();
    filter.is_written_past(at(1));
    assert_eq!(filter.poll_send(at(1)), None);
    assert_eq!(snapshots(&mut filter, 1), [true, true]);
    let sent = filter.poll_send(at(2));
    assert!(matches!(sent, Some((_, Message::PassBegin { .. }))), "{sent:?}");
}

#[test]
fn nobody_waits_for_a_file_that_cannot_be_written() {
    let mut filter = filter_of(Some(HistoryId(Uuid::from_u128(7))));
    filter.force_resync(at(1), ResyncKind::Compare);
    while let Some(effect) = filter.next_effect() {
        if let Effect::Tracking(io, _) = effect {
            filter.tracking_done(at(1), io, Err(IoFailure { errno: 5 }));
        }
    }
    assert!(!filter.is_saving_everything());
}
