//! How often the log is told of what is short.

use std::time::Duration;

use tokio::time::Instant;

/// Shortages with less than this between are one outage.
const GAP: Duration = Duration::from_secs(60);

/// What is short again and again: one line of the log, however long that lasts.
#[derive(Debug, Default)]
pub struct Outage {
    /// Until when a shortage belongs to the one before.
    until: Option<Instant>,
}

impl Outage {
    /// Notes a shortage, and says whether an outage begins with it: the last one was a minute ago or more, if there was one.
    pub fn begins(&mut self) -> bool {
        let begins = !self.lasts();
        self.until = Some(Instant::now() + GAP);
        begins
    }

    /// Whether a shortage would be one with the last.
    pub(crate) fn lasts(&self) -> bool {
        self.until.is_some_and(|until| until > Instant::now())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn an_outage_lasts_until_a_minute_without_a_shortage() {
        let mut outage = Outage::default();
        assert!(!outage.lasts() && outage.begins() && outage.lasts());
        for _ in 0..5 {
            tokio::time::advance(GAP - Duration::from_secs(1)).await;
            assert!(!outage.begins(), "a part of the same");
        }
        tokio::time::advance(GAP).await;
        assert!(!outage.lasts() && outage.begins());
    }
}
