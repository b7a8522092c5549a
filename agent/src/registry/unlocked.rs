//! Opening an image that may be locked for a moment: by an agent that is dying, or by whoever looks at a device.

use std::{future::Future, time::Duration};

use backtide_control::ApiError;
use backtide_storage::ImageError;
use tokio::time::Instant;

use super::{PREDECESSOR_POLL, errors::open_error};
use crate::disk::OpenError;

/// How long a shared lock may keep an image from its disk. udev has one on a device as long as it probes it, which it does
/// whenever somebody has written to it.
const PROBE_TIME: Duration = Duration::from_secs(2);

/// Opens with `open`, again and again: for `patience` while somebody has the image locked, and for [`PROBE_TIME`] at least while
/// that is a lock that many can have.
pub(super) async fn opened<T, F>(patience: Duration, mut open: impl FnMut() -> F) -> Result<T, ApiError>
where
    F: Future<Output = Result<Result<T, Box<OpenError>>, ApiError>>,
{
    let begun = Instant::now();
    loop {
        match open().await? {
            Err(error) if begun.elapsed() < patience_with(&error, patience) => {
                tokio::time::sleep(PREDECESSOR_POLL).await;
            }
            result => return result.map_err(|error| open_error(&error)),
        }
    }
}

fn patience_with(error: &OpenError, patience: Duration) -> Duration {
    match error {
        OpenError::Image(ImageError::Locked { is_shared: true, .. }) => patience.max(PROBE_TIME),
        OpenError::Image(ImageError::Locked { is_shared: false, .. }) => patience,
        _ => Duration::ZERO,
    }
}

#[cfg(test)]
mod tests {
    use backtide_control::ErrorCode;

    use super::*;

    /// How long it takes to open an image that is locked for so long, and how that ends.
    async fn opening(
        patience: Duration,
        is_shared: bool,
        locked_for: Duration,
    ) -> (Duration, Option<ErrorCode>) {
        let begun = Instant::now();
        let open = || async move {
            let by = Some("process 17 (udevd)".to_owned());
            let locked = ImageError::Locked { path: "/dev/sdb".into(), by, is_shared };
            let free = begun.elapsed() >= locked_for;
            Ok(if free { Ok(()) } else { Err(Box::new(OpenError::Image(locked))) })
        };
        let opened = opened(patience, open).await;
        (begun.elapsed(), opened.err().map(|error| error.code))
    }

    #[tokio::test(start_paused = true)]
    async fn who_looks_at_a_device_is_waited_for_and_who_has_it_is_not() {
        let (second, minute) = (Duration::from_secs(1), Duration::from_secs(60));
        assert_eq!(opening(Duration::ZERO, true, second).await, (second, None));
        assert_eq!(opening(Duration::ZERO, true, minute).await, (PROBE_TIME, Some(ErrorCode::Locked)));
        assert_eq!(opening(Duration::ZERO, false, second).await, (Duration::ZERO, Some(ErrorCode::Locked)));
        assert_eq!(opening(5 * second, false, second).await, (second, None), "a predecessor");
        assert_eq!(opening(5 * second, true, minute).await, (5 * second, Some(ErrorCode::Locked)));
    }
}
