//! Whether anybody else has had the disk at the receiver.
//!
//! Positions and LSNs cannot tell: of a store and a state that were put back from copies of one moment, both go on from
//! there, and a store of the time before then fits by its numbers and not by what is in it. Ids of attaches are
//! random: the receiver's log was last written by one of those that may have done so, or it is another's.

use backtide_protocol::{ReceiverState, Welcome};
use uuid::Uuid;

use crate::filter::Filter;

impl Filter {
    /// The attaches that may have written the receiver's log last: that of the last Welcome, and those since, which
    /// may have been admitted without having heard of it, with this one, which is durable before its hello. None where
    /// that is not known, as before the first Welcome.
    pub fn follows(&mut self, attaches: Option<Vec<Uuid>>) {
        self.attaches = attaches;
    }

    /// What the next attach [`follows`](Self::follows), beside itself.
    pub fn attaches(&self) -> Option<&[Uuid]> {
        self.attaches.as_deref()
    }

    /// Whether a receiver has admitted this attach.
    pub fn was_welcomed(&self) -> bool {
        self.attaches.as_deref() == Some(&[self.settings.attach])
    }

    /// The log ends with this attach from now on.
    pub(crate) fn welcomed(&mut self) {
        self.attaches = Some(vec![self.settings.attach]);
    }

    /// The attach that wrote the receiver's log last, if this state knows nothing of it.
    pub(crate) fn stranger(&self, welcome: &Welcome) -> Option<Uuid> {
        let is_own = welcome.state == ReceiverState::Known || self.history == Some(welcome.history);
        let welcome = Some(welcome).filter(|_| is_own)?;
        let (known, last) = self.attaches.as_ref().zip(welcome.last_attach)?;
        (last != self.settings.attach && !known.contains(&last)).then_some(last)
    }
}
