//! What the stories share: an ordinary disk, a receiver's Welcome, and changes of one block.

use std::time::Duration;

use backtide_io_filter::{AckPolicy, Change, Now, OnOutage, Settings};
use backtide_protocol::{PROTOCOL_VERSION, ReceiverState, Welcome};
use backtide_tracking::{ActivityLimits, SavedTracking};
use backtide_units::{
    ByteCount, ByteOffset, ByteRange, CaptureTime, DiskId, Epoch, HistoryId, LogPosition, Lsn,
};
use bytes::Bytes;
use uuid::Uuid;

pub(crate) const DISK: DiskId = DiskId(Uuid::from_u128(1));

/// The history that the receiver keeps of it.
pub(crate) const HISTORY: HistoryId = HistoryId(Uuid::from_u128(5));

/// Of a disk that was detached in sync, with a log up to LSN 100.
pub(crate) fn saved_in_sync() -> SavedTracking {
    SavedTracking {
        history: Some(HISTORY),
        last_lsn: Lsn(100),
        gap_from: Lsn(100),
        acked_durable: Lsn(100),
        acked_position: LogPosition::default(),
        compare: false,
        ..SavedTracking::unknown(DISK)
    }
}

/// Of a disk of 64 blocks, at its first attach, without an activity log.
pub(crate) fn settings() -> Settings {
    Settings {
        disk: DISK,
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
        activity: ActivityLimits { hot: 0, ..ActivityLimits::default() },
    }
}

/// Of a receiver that has everything up to `durable`.
pub(crate) fn welcome(state: ReceiverState, durable: Lsn) -> Welcome {
    Welcome {
        version: PROTOCOL_VERSION,
        history: HISTORY,
        state,
        durable,
        highest: durable,
        position: LogPosition::default(),
        in_pass: false,
        last_time: None,
        last_attach: None,
    }
}

/// So many milliseconds after the beginning, by both clocks.
pub(crate) fn at(millis: u64) -> Now {
    Now { monotonic: Duration::from_millis(millis), wall: CaptureTime(1_000_000 + millis * 1000) }
}

/// A write of one block.
pub(crate) fn write(block: u64) -> Change {
    let range = ByteRange::new(ByteOffset(block * 4096), ByteCount(4096)).unwrap();
    Change::Write { range, data: Bytes::from(vec![7; 4096]), fua: false }
}
