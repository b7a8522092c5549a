//! The first state of a walk.

use std::{collections::BTreeMap, time::Duration};

use backtide_io_filter::{Now, Resume};
use backtide_units::Lsn;

use crate::{
    actions::Action,
    agent::{first_file, new_filter},
    config::{Budget, Config, Op, Start},
    disk::LocalDisk,
    history::History,
    past_agent::PastAgent,
    receiver::{Receiver, TIME},
    spill::SpillDirectory,
    world::{World, Writer},
};

impl World {
    pub(crate) fn new(config: &Config) -> Self {
        let mut world = Self::at_first_attach(config);
        match config.start {
            Start::FirstAttach => {}
            Start::InSync => world.reach_sync(config),
            Start::Away => {
                world.reach_sync(config);
                world.lose_connection(config);
            }
            Start::Dirty(ops) => {
                world.reach_sync(config);
                world.dirty(config, ops);
            }
        }
        world.left = config.budget;
        world.writers = vec![Writer { next: 0, waiting: None }; config.writers.len()];
        world.check(config);
        world
    }

    fn at_first_attach(config: &Config) -> Self {
        let disk = LocalDisk::new(config.content, config.blocks);
        let now = Now { monotonic: Duration::ZERO, wall: TIME };
        let mut world = Self {
            left: Budget::default(),
            filter: new_filter(config, 1, Resume::New, now),
            now: Duration::ZERO,
            epoch: 1,
            paused: false,
            inflight: BTreeMap::new(),
            tracking_ops: BTreeMap::new(),
            scans: BTreeMap::new(),
            file: first_file(config, &Resume::New, None),
            spill: SpillDirectory::default(),
            spill_ops: BTreeMap::new(),
            spill_failed: false,
            file_failed: false,
            kept_to: Lsn::ZERO,
            detaching: false,
            history: History::new(disk.values()),
            disk,
            writers: Vec::new(),
            told: Lsn::ZERO,
            connections: Vec::new(),
            connected: 0,
            receiver: Receiver::new(),
            past: PastAgent::default(),
            rival: None,
            fenced: false,
            pass: None,
        };
        world.use_spill(config);
        world.carry_out(config);
        world
    }

    /// In sync, and with a tracking file that names nothing: what was changed is flushed and idle.
    fn reach_sync(&mut self, config: &Config) {
        const WRITER: &[&[Op]] = &[&[Op::Write(0)]];
        let writers = if config.hot > 0 { WRITER } else { &[] };
        let quiet = Config { writers, first_value: 0xc0, ..config.clone() };
        self.writers = vec![Writer { next: 0, waiting: None }; quiet.writers.len()];
        self.heal(&quiet, false);
        while config.hot > 0 && self.filter.next_deadline().is_some() {
            self.step(&quiet, &Action::Tick);
            self.heal(&quiet, false);
        }
        self.told = Lsn::ZERO;
    }

    /// Blocks are changed while the disk is paused; then it is resumed.
    fn dirty(&mut self, config: &Config, ops: &'static [Op]) {
        let writer: &'static [&'static [Op]] = Box::leak(Box::new([ops]));
        let before = Config { writers: writer, first_value: 0xd0, ..config.clone() };
        self.left.pauses = 1;
        self.step(&before, &Action::Pause);
        self.writers = vec![Writer { next: 0, waiting: None }];
        while !self.guest_is_done(&before) || !self.tracking_ops.is_empty() {
            let mut possible = self.progress(&before).into_iter();
            let next = possible.find(|action| {
                matches!(
                    action,
                    Action::Submit(_)
                        | Action::Land(_)
                        | Action::Local(_)
                        | Action::Tracking(_)
                        | Action::Spill(_)
                )
            });
            self.step(&before, &next.expect("a write goes on"));
        }
        self.step(&before, &Action::Resume);
    }
}
