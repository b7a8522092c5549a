//! Which LSNs may leave: the agent keeps a bound of them durable, and after a crash the next attach goes on above it.
//!
//! Invariant: what reaches the receiver or the spill lies at or below a durable bound, so no LSN that anybody has seen is
//! given twice. Saving a bound can take long, or fail, and a receiver may have seen more than this state knows of: the guest
//! waits for none of that. Its changes get their LSNs as always, are retained or tracked, and stay here until the bound
//! has been raised. Who dies before that leaves them to the comparison that follows every crash.

use backtide_units::Lsn;

use crate::{event::Now, filter::Filter};

impl Filter {
    /// From now on LSNs up to `bound` may leave: it is durable that no other attach gives them. To be called before the
    /// first event, and whenever a higher bound is durable; without it any LSN may.
    pub fn lsns_reserved(&mut self, now: Now, bound: Lsn) {
        self.observe(now);
        self.window.reserve(bound);
        self.pump();
    }
}
