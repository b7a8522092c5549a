//! Scrubs: those that somebody asks for, and those that begin by themselves.

use std::{sync::Arc, time::Duration};

use backtide_receiver_api::{ApiError, ErrorCode, ScrubNext, ScrubRequest, ScrubStatus};
use backtide_units::ByteCount;

use super::Service;
use crate::{
    clock,
    facts::DiskFacts,
    scrub::{self, schedule::Next},
};

/// How often it is looked whether a scrub is due.
const LOOK: Duration = Duration::from_secs(60);

impl Service {
    /// Begins a scrub.
    pub(super) async fn begin_scrub(&self, request: ScrubRequest) -> Result<ScrubStatus, ApiError> {
        let wanted = request.name.map(|name| self.find(&name)).transpose()?;
        let mut facts = self.own_facts().await?;
        facts.retain(|facts| wanted.is_none_or(|wanted| wanted == facts.id));
        if let (true, Some(wanted)) = (facts.is_empty(), wanted) {
            return Err(self.unknown(&wanted.to_string()));
        }
        facts.sort_by(|a, b| (&a.name, a.id).cmp(&(&b.name, b.id)));
        let wanted_disk = |facts: DiskFacts| scrub::Wanted { disk: facts.id, bytes: facts.log_bytes };
        let disks = facts.into_iter().map(wanted_disk).collect();
        let rate = request.bytes_per_second_max.unwrap_or(self.scrub_rate);
        let scrub = Arc::clone(&self.scrub);
        self.read(move || scrub.start(disks, wanted.is_none(), rate)).await?
    }

    /// Begins those that are due, as long as the receiver runs.
    pub(crate) async fn keep_scrubbing(&self) {
        let mut look = tokio::time::interval(LOOK);
        loop {
            look.tick().await;
            // Nobody is asked for anything as long as none is due.
            if self.scrub.next(clock::now(), None) == Some(Next::Begin) {
                self.scrub_if_nothing_hinders().await;
            }
        }
    }

    async fn scrub_if_nothing_hinders(&self) {
        let Ok(facts) = self.facts().await else { return };
        let free = self.storage.free_space().ok();
        if self.scrub.next(clock::now(), self.hinders_scrub(&facts, free)) != Some(Next::Begin) {
            return;
        }
        match self.begin_scrub(ScrubRequest::default()).await {
            Ok(begun) => {
                tracing::info!(bytes = begun.total_bytes.0, "the scrub that was due begins");
                self.scrub.came_of_it(clock::now(), None);
            }
            // Somebody asked for one just now, or the receiver ends.
            Err(error) if matches!(error.code, ErrorCode::Busy | ErrorCode::Unreachable) => {}
            Err(error) => {
                let why = format!("it could not begin: {}", error.message);
                tracing::warn!(why, "the scrub that was due is tried again later");
                self.scrub.came_of_it(clock::now(), Some(why));
            }
        }
    }

    /// The next one that begins by itself; `free` is what the store has left, if that can be told.
    pub(super) fn next_scrub(&self, facts: &[DiskFacts], free: Option<ByteCount>) -> Option<ScrubNext> {
        let now = clock::now();
        match self.scrub.next(now, self.hinders_scrub(facts, free))? {
            Next::Runs => None,
            // Within a minute.
            Next::Begin => Some(ScrubNext { at: now, waits: None }),
            Next::Later { at, waits } => Some(ScrubNext { at, waits }),
        }
    }

    /// Why the store is not to be disturbed by a scrub that nobody asked for: a sentence.
    fn hinders_scrub(&self, facts: &[DiskFacts], free: Option<ByteCount>) -> Option<String> {
        if let Err(why) = self.watch.check() {
            return Some(why);
        }
        if free.is_none_or(|free| self.is_full(free)) {
            return Some("the store is full".to_owned());
        }
        facts.iter().find(|facts| is_mended(facts)).map(|facts| {
            let name = facts.name.as_ref().map_or_else(|| facts.id.to_string(), ToString::to_string);
            format!("what is damaged or missing of disk {name} is brought anew")
        })
    }
}

/// Whether its agent brings anew what is damaged or missing of a disk, for which it needs all that the store can give. An
/// agent that went in the middle of that may never come back.
fn is_mended(facts: &DiskFacts) -> bool {
    let is_whole = facts.damage.is_empty() && facts.lacked.is_empty() && facts.error.is_none();
    facts.connected && facts.in_pass && !is_whole
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use backtide_units::{DiskId, Epoch, Lsn};
    use uuid::Uuid;

    use super::*;

    fn whole() -> DiskFacts {
        DiskFacts {
            id: DiskId(Uuid::nil()),
            name: None,
            size: ByteCount(1),
            history: None,
            epoch: Epoch(1),
            connected: true,
            in_pass: true,
            received: Lsn(1),
            durable: Lsn(1),
            last_time: None,
            clock: None,
            ack: None,
            on_outage: None,
            origin: None,
            log_bytes: ByteCount(1),
            segments: 1,
            error: None,
            is_damaged: false,
            damage: Vec::new(),
            touched: Vec::new(),
            begins: BTreeMap::new(),
            lacked: Vec::new(),
            forgotten_intervals: 0,
        }
    }

    #[test]
    fn a_scrub_waits_for_a_disk_whose_damage_or_loss_is_being_mended_and_for_no_other() {
        let damaged = DiskFacts { damage: vec!["its end is lost".to_owned()], ..whole() };
        let put_back = DiskFacts { lacked: vec![(true, "the store had less".to_owned())], ..whole() };
        assert!(is_mended(&damaged) && is_mended(&put_back));
        assert!(!is_mended(&whole()), "a resync as any other");
        assert!(!is_mended(&DiskFacts { in_pass: false, ..damaged.clone() }), "nothing is being done");
        assert!(!is_mended(&DiskFacts { connected: false, ..damaged }), "nor here");
    }
}
