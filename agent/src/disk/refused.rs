//! What clients and the log hear of requests that the local disk refused: a guest on a full disk makes any number of
//! them.
//!
//! Invariant: in the log at most one line in [`SAID_EVERY`], whatever the guest does; each refusal is in the count of one of them.

use std::{cell::Cell, time::Duration};

use backtide_export::{NbdError, Reply};
use backtide_io_filter::IoFailure;
use rustix::io::Errno;

/// How often refusals are said.
const SAID_EVERY: Duration = Duration::from_secs(10);

/// The refusals of one disk.
#[derive(Debug, Default)]
pub(crate) struct Refused {
    said_at: Cell<Option<Duration>>,
    unsaid: Cell<u64>,
}

impl Refused {
    /// One more, at this time of a clock that only goes on. Says how many are to be told of now.
    pub(crate) fn one_more(&self, now: Duration) -> Option<u64> {
        self.unsaid.set(self.unsaid.get() + 1);
        let said_lately = self.said_at.get().is_some_and(|at| now < at + SAID_EVERY);
        if said_lately {
            return None;
        }
        self.said_at.set(Some(now));
        Some(self.unsaid.take())
    }
}

/// Answers that a request came to nothing, and why, for people at the other end.
pub(crate) fn refuse(reply: Reply, failure: IoFailure) {
    let error = nbd_error(failure);
    match error {
        NbdError::Shutdown => {
            reply.fail_with(error, "the request ends with its disk, which is not served any more")
        }
        _ => reply.fail_with(error, &format!("the local disk: {}", Errno::from_raw_os_error(failure.errno))),
    }
}

/// The error a client is told for an errno of the disk behind.
fn nbd_error(failure: IoFailure) -> NbdError {
    match Errno::from_raw_os_error(failure.errno) {
        Errno::PERM | Errno::ACCESS | Errno::ROFS => NbdError::NotPermitted,
        Errno::NOMEM => NbdError::NoMemory,
        Errno::INVAL => NbdError::Invalid,
        Errno::FBIG | Errno::NOSPC | Errno::DQUOT => NbdError::NoSpace,
        Errno::OVERFLOW => NbdError::Overflow,
        Errno::OPNOTSUPP => NbdError::NotSupported,
        Errno::SHUTDOWN => NbdError::Shutdown,
        _ => NbdError::Io,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_that_is_refused_without_end_is_said_now_and_then() {
        let refused = Refused::default();
        let at = |ms| refused.one_more(Duration::from_millis(ms));
        assert_eq!(at(5), Some(1), "the first at once");
        assert!((6..10_005).all(|ms| at(ms).is_none()));
        assert_eq!(at(10_005), Some(10_000), "none is lost");
        assert_eq!(at(10_006), None);
    }
}
