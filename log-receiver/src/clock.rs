//! The receiver's clock: the only place that reads it.

use std::time::SystemTime;

use backtide_units::CaptureTime;

/// Now; 1970 when the machine's clock stands before it.
pub(crate) fn now() -> CaptureTime {
    SystemTime::now().into()
}
