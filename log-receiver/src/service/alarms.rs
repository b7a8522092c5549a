//! What a person should look at now, in the control API's answers.

use super::Service;
use crate::facts::DiskFacts;

impl Service {
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
            alarms.extend(facts.damage.iter().map(|why| format!("disk {name}: {why}")));
        }
        alarms.extend(self.overlays.alarms());
        alarms.extend(self.tls.iter().flat_map(|tls| tls.warnings()));
        alarms.dedup();
        alarms
    }
}
