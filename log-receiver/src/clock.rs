//! The receiver's clock: the only place that reads it.

use std::time::{SystemTime, UNIX_EPOCH};

use backtide_units::CaptureTime;

/// Now; 1970 when the machine's clock stands before it.
pub(crate) fn now() -> CaptureTime {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    CaptureTime(u64::try_from(since.as_micros()).unwrap_or(u64::MAX))
}
