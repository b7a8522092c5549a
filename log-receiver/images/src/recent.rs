//! Values that are kept for a while, bounded by their weight.

use std::{
    collections::{BTreeMap, HashMap},
    hash::Hash,
};

/// Values with weights; the one used longest ago goes first.
#[derive(Debug)]
pub struct Recent<K, V> {
    values: HashMap<K, (u64, usize, V)>,
    by_use: BTreeMap<u64, K>,
    uses: u64,
    weight: usize,
    weight_max: usize,
}

impl<K: Clone + Eq + Hash, V: Clone> Recent<K, V> {
    /// None yet, and never more than this.
    pub fn new(weight_max: usize) -> Self {
        Self { values: HashMap::new(), by_use: BTreeMap::new(), uses: 0, weight: 0, weight_max }
    }

    /// A value, if it was kept.
    pub fn get(&mut self, key: &K) -> Option<V> {
        let (used, _, value) = self.values.get_mut(key)?;
        self.by_use.remove(used);
        self.uses += 1;
        *used = self.uses;
        self.by_use.insert(self.uses, key.clone());
        Some(value.clone())
    }

    /// Keeps a value; those used longest ago make room for it.
    pub fn put(&mut self, key: K, weight: usize, value: V) {
        self.uses += 1;
        if let Some((used, weight, _)) = self.values.insert(key.clone(), (self.uses, weight, value)) {
            self.by_use.remove(&used);
            self.weight -= weight;
        }
        self.by_use.insert(self.uses, key);
        self.weight += weight;
        while self.weight > self.weight_max {
            let Some((_, oldest)) = self.by_use.pop_first() else { return };
            if let Some((_, weight, _)) = self.values.remove(&oldest) {
                self.weight -= weight;
            }
        }
    }

    /// Forgets a value.
    pub fn remove(&mut self, key: &K) {
        if let Some((used, weight, _)) = self.values.remove(key) {
            self.by_use.remove(&used);
            self.weight -= weight;
        }
    }

    /// Forgets all that are not wanted.
    pub fn retain(&mut self, wanted: impl Fn(&V) -> bool) {
        let unwanted: Vec<K> = self
            .values
            .iter()
            .filter(|(_, (_, _, value))| !wanted(value))
            .map(|(key, _)| key.clone())
            .collect();
        unwanted.iter().for_each(|key| self.remove(key));
    }

    /// What all of them weigh.
    pub fn weight(&self) -> usize {
        self.weight
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_one_used_longest_ago_goes_first() {
        let mut recent = Recent::new(10);
        recent.put("a", 4, 1);
        recent.put("b", 4, 2);
        assert_eq!(recent.get(&"a"), Some(1));
        recent.put("c", 4, 3);
        assert_eq!((recent.get(&"a"), recent.get(&"b"), recent.get(&"c")), (Some(1), None, Some(3)));
        assert_eq!(recent.weight, 8);
    }

    #[test]
    fn what_is_too_large_is_not_kept() {
        let mut recent = Recent::new(10);
        recent.put("a", 11, 1);
        assert_eq!(recent.get(&"a"), None);
        assert_eq!(recent.weight, 0);
        recent.put("b", 3, 1);
        recent.put("b", 5, 2);
        assert_eq!((recent.weight, recent.by_use.len()), (5, 1));
    }
}
