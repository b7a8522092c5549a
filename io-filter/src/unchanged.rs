//! What an idle disk says now and then: that it has not changed since its newest record.
//!
//! Without it the log's newest time is that of the newest record. When the agent dies later, nobody could tell whether
//! anything had been written since, and the hole would begin back there, hours before it. Said only in
//! sync with everything durable, and stamped like a change: whatever is captured afterwards is later.

use std::time::Duration;

use backtide_protocol::Message;
use backtide_units::CaptureTime;

use crate::{filter::Filter, mutant::Mutant};

impl Filter {
    /// Says that nothing has changed, when it is due.
    pub(crate) fn say_unchanged(&mut self) {
        if self.next_unchanged().is_none_or(|due| due > self.now.monotonic) {
            return;
        }
        let lsn = self.window.log_end();
        let time = self.stamp();
        let time =
            if self.is_mutant(Mutant::UnchangedAhead) { CaptureTime(time.0 + 1_000_000) } else { time };
        self.window.push(Message::Unchanged { lsn, time });
    }

    /// When it is due.
    pub(crate) fn next_unchanged(&self) -> Option<Duration> {
        let every = Some(self.settings.unchanged_every).filter(|every| *every < Duration::MAX)?;
        (self.is_connected() && self.is_drained()).then(|| self.stamped_at + every)
    }
}
