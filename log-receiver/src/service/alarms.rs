//! What a person should look at now, in the control API's answers.

use backtide_receiver_api::StoreGrowth;
use backtide_recovery::INTERVALS_MAX;

use super::Service;
use crate::facts::DiskFacts;

impl Service {
    /// How the store fills.
    pub(super) fn growth(&self) -> Option<StoreGrowth> {
        self.keeper.status().growth.map(|growth| StoreGrowth {
            bytes_per_second: growth.bytes_per_second,
            over_seconds: growth.over.as_secs(),
            full_in_seconds: growth.full_in.map(|left| left.as_secs()),
        })
    }

    /// What a person should look at now.
    pub(super) fn alarms(&self, facts: &[DiskFacts]) -> Vec<String> {
        let mut alarms: Vec<String> = self.watch.check().err().into_iter().collect();
        let keeper = self.keeper.status();
        alarms.extend(keeper.low.into_iter().chain(self.policies.damage()).chain(keeper.error));
        for facts in facts {
            let name = facts.name.as_ref().map_or_else(|| facts.id.to_string(), ToString::to_string);
            alarms.extend(facts.error.iter().map(|why| format!("disk {name}: {why}")));
            let undone = keeper.errors.get(&facts.id);
            alarms.extend(undone.map(|why| format!("disk {name}: old history cannot be thinned: {why}")));
            if keeper.shrunk.contains_key(&facts.id) {
                alarms.push(format!(
                    "disk {name}: the store was nearly full, history that its retention promises is gone"
                ));
            }
            if facts.forgotten_intervals > 0 {
                alarms.push(format!(
                    "disk {name}: its history has more than {INTERVALS_MAX} intervals; the points of the oldest {} are not \
                     offered, kept or locked ones neither",
                    facts.forgotten_intervals
                ));
            }
            alarms.extend(facts.damage.iter().map(|why| format!("disk {name}: {why}")));
        }
        alarms.extend(self.overlays.alarms());
        alarms.extend(self.removal.shelf.forgotten.alarms());
        alarms.extend(self.tls.iter().flat_map(|tls| tls.warnings()));
        alarms.dedup();
        alarms
    }
}
