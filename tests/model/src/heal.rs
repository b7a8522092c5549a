//! From here on nothing goes wrong: sync must be reached, and everything must be equal. (Promise 7:
//! a resync ends.)
//!
//! Of all orders in which the healed world can go on, two are tried: the oldest thing first, and the
//! newest first. Each is finite, so an order that never ends is found by its length.

use backtide_io_filter::Mode;
use backtide_units::Lsn;

use crate::{
    actions::Action,
    config::{Budget, Config},
    world::World,
};

/// No healed tiny world takes longer.
const STEPS_MAX: usize = 2000;

impl World {
    /// Runs until nothing is left to do; gives the steps it took.
    ///
    /// # Panics
    /// When that does not end, or does not end in sync.
    pub(crate) fn heal(&mut self, config: &Config, newest_first: bool) -> usize {
        self.left = Budget::default();
        for step in 0..STEPS_MAX {
            let mut actions = self.progress(config);
            let next = if newest_first { actions.pop() } else { actions.drain(..).next() };
            match next {
                Some(action) => self.step(config, &action),
                None if self.rival.is_some() && self.fenced && self.guest_is_done(config) => {
                    self.check(config);
                    return step;
                }
                None if self.is_settled(config) => {
                    self.check(config);
                    self.check_equal(config);
                    return step;
                }
                None => {
                    assert!(self.filter.next_deadline().is_some(), "stuck: {:?}", self.filter.status());
                    self.step(config, &Action::Tick);
                }
            }
        }
        panic!("{STEPS_MAX} steps do not lead to sync: {:?}", self.filter.status());
    }

    fn is_settled(&self, config: &Config) -> bool {
        let is_tracked = self.filter.status().untracked.is_none();
        is_tracked
            && self.filter.mode() == Mode::Sync
            && self.filter.is_drained()
            && self.guest_is_done(config)
    }

    /// Disk, receiver and model hold the same.
    fn check_equal(&self, config: &Config) {
        let latest = self.receiver.timeline.latest().expect("sync means points").lsn;
        let offered =
            self.receiver.offers().iter().any(|(from, to)| *from <= self.kept_to && self.kept_to <= *to);
        let kept = self.kept_to;
        assert!(
            kept == Lsn::ZERO || self.spill_failed || offered,
            "LSN {kept} was in the spill, and is no point"
        );
        let image = self.history.image_at(Lsn::MAX);
        for block in 0..config.blocks {
            let local = self.disk.value(block);
            let entries = self.receiver.log.len();
            let newest = self.receiver.value(block, Lsn::MAX, entries);
            let point = self.receiver.value(block, latest, entries);
            assert_eq!(local, newest, "disk and receiver differ in block {block} in sync");
            assert_eq!(point, newest, "the newest point is not the newest version of block {block}");
            let expected = image[usize::from(block)];
            assert!(expected.is_none_or(|expected| expected == local), "block {block} is not the guest's");
        }
    }
}
