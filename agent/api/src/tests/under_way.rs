//! When a disk is still on its way to the point it was set to.

use backtide_units::{ByteCount, CaptureTime, Lsn};

use super::{name, vm1};
use crate::{Counters, DiskStatus, HydrationKind, HydrationStatus, LsnStatus, RewindReport};

/// A disk that was set back from LSN 90 to 40 and lacks blocks of it.
fn set_back() -> DiskStatus {
    let hydration = HydrationStatus {
        kind: HydrationKind::Rewind,
        receiver: "unix:/run/backtide/stream.sock".to_owned(),
        disk: name("vm1"),
        point: Lsn(40),
        point_time: CaptureTime(5),
        before: Some(Lsn(90)),
        total_bytes: ByteCount(8192),
        missing_bytes: ByteCount(4096),
        damaged_bytes: ByteCount(0),
        fetched_bytes: ByteCount(4096),
        rate: ByteCount(0),
        eta_seconds: None,
        trouble: None,
        stuck: false,
        waiting_requests: 0,
    };
    let lsn = LsnStatus { last: Lsn(90), received: Lsn(40), durable: Lsn(40) };
    DiskStatus { hydration: Some(hydration), lsn, counters: Counters::default(), ..vm1() }
}

#[test]
fn a_rewind_is_under_way_only_while_nothing_was_written_since() {
    let is = |passes, last, failed_changes| {
        let counters = Counters { passes, failed_changes, ..Counters::default() };
        let lsn = LsnStatus { last: Lsn(last), ..LsnStatus::default() };
        RewindReport::under_way(&DiskStatus { lsn, counters, ..set_back() }, Lsn(40)).is_some()
    };
    assert!(is(0, 90, 0) && is(2, 92, 0), "a pass has an LSN of its own");
    assert!(!is(0, 91, 0), "a write");
    assert!(!is(1, 92, 0), "a write, and a pass");
    assert!(!is(1, 93, 0), "in attaches before, writes or passes");
    assert!(!is(0, 90, 1), "a write that failed may have changed something");
    assert!(!is(1, 90, 0), "the agent's state is not what it was");
    assert_eq!(RewindReport::under_way(&set_back(), Lsn(41)), None, "another point");
    let silent = DiskStatus { reason_code: "not-answering".to_owned(), ..set_back() };
    assert_eq!(RewindReport::under_way(&silent, Lsn(40)), None, "that was the case when it answered last");
    let report = RewindReport::under_way(&set_back(), Lsn(40)).unwrap();
    assert_eq!((report.from, report.under_way), (Lsn(90), true));
}
