//! Who walks through an open segment and who writes it take turns.

use std::{
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use backtide_segment::{AttachFacts, Entry, PassReason};
use backtide_storage::MemoryStorage;
use backtide_units::{CaptureTime, DiskId, Epoch, HistoryId};
use uuid::Uuid;

use super::{open::WALKED_AT_ONCE, *};
use crate::{CacheLimits, DiskLog, LogIdentity, LogOptions};

const EXTENTS: usize = 10 * WALKED_AT_ONCE;

const SIZE: ByteCount = ByteCount(1 << 30);

fn zero(lsn: u64) -> Entry {
    let range = ByteRange::new(ByteOffset(lsn * 4096), ByteCount(512)).expect("on the disk");
    Entry::Zero { lsn: Lsn(lsn), time: CaptureTime(lsn), range, trim: false }
}

/// A log with so many extents in its open segment.
fn log() -> DiskLog {
    let identity = LogIdentity { disk: DiskId(Uuid::from_u128(1)), history: HistoryId(Uuid::from_u128(2)) };
    let cache = LogCache::new(CacheLimits::default());
    let storage = Arc::new(MemoryStorage::new());
    let mut log = DiskLog::create(storage, Path::new("log"), identity, LogOptions::default(), &cache)
        .expect("no fault");
    let (at, time) = (Lsn(1), CaptureTime(1));
    let begin = [
        Entry::Attach {
            epoch: Epoch(1),
            attach: Uuid::from_u128(3),
            next_lsn: at,
            size: SIZE,
            name: "vm1".parse().expect("a name"),
            time,
            facts: AttachFacts::default(),
        },
        Entry::PassBegin {
            at,
            gap_from: Lsn::ZERO,
            time,
            reason: PassReason { code: 0, text: String::new() },
        },
        Entry::PassEnd { at, valid_from: Some(at), time },
    ];
    for entry in begin.into_iter().chain((2..).take(EXTENTS).map(zero)) {
        log.append(entry).expect("no fault");
    }
    log
}

/// Walks through the open segment while another thread does something to the log that waits for the segment some times. Gives
/// the LSNs that were found, ascending, and how many of them when that was done.
fn walk_beside(act: impl FnOnce(&mut DiskLog) + Send) -> (Vec<u64>, Option<usize>) {
    let mut log = log();
    let snapshot = log.snapshot().expect("no fault");
    let segment = snapshot.segments.last().expect("a segment");
    let first = ExtentKey::newest(Bucket::holding(ByteOffset::ZERO, 0), Lsn::MAX);
    let (mut found, mut done_at) = (Vec::<Extent>::new(), None);
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let mut work = Some(|| {
            act(&mut log);
            done.store(true, Ordering::SeqCst);
        });
        let walked = segment.walk_on(first, &mut |_, extent| {
            found.push(extent);
            if let Some(work) = work.take() {
                scope.spawn(work);
            }
            // Until it waits for this piece, or is done.
            while !done.load(Ordering::SeqCst) && segment.turn.try_lock().is_ok() {
                thread::yield_now();
            }
            if done.load(Ordering::SeqCst) {
                done_at.get_or_insert(found.len());
            }
            Next::On
        });
        walked.expect("no fault");
    });
    let mut lsns: Vec<_> = found.iter().map(|extent| extent.version.0).collect();
    lsns.sort_unstable();
    (lsns, done_at)
}

#[test]
fn an_append_gets_in_between_the_pieces_of_a_walk() {
    let lsn = EXTENTS as u64 + 2;
    let (found, done_at) = walk_beside(|log| {
        log.append(zero(lsn)).expect("no fault");
    });
    assert_eq!(done_at, Some(WALKED_AT_ONCE + 1));
    assert!(found.into_iter().eq(2..=lsn));
}

#[test]
fn a_walk_goes_on_in_the_footer_of_a_segment_that_is_sealed_between_two_pieces() {
    let (found, done_at) = walk_beside(|log| log.seal().expect("no fault"));
    assert!(done_at.is_some_and(|at| at < EXTENTS), "{done_at:?}");
    assert!(found.into_iter().eq(2..EXTENTS as u64 + 2));
}
