//! A world in which nothing goes wrong: what a pass says of its end, beside when it ended.

use std::time::Duration;

use backtide_io_filter::{AckPolicy, Mode, ResyncKind};
use backtide_units::ByteCount;

use crate::{plan::Plan, random::Random, world::World};

/// A world's speeds.
#[derive(Clone, Copy, Debug)]
pub struct Steady {
    /// Bytes a second of the link.
    pub bandwidth: u64,
    /// The longest pause between two writes of up to 8 KiB, in microseconds.
    pub think_us: u64,
    /// The limit of what passes read, in bytes a second; zero for none.
    pub resync_rate: u64,
    /// The link's bytes a second from the middle of the pass on.
    pub bandwidth_later: u64,
}

/// What was said at one moment of a pass, in microseconds since it began.
#[derive(Clone, Copy, Debug)]
pub struct Said {
    /// When.
    pub at: u64,
    /// How long it was going to take from then on.
    pub ends_in: Option<u64>,
}

/// A pass over the whole disk, from its begin to its end.
#[derive(Clone, Debug)]
pub struct PassSeen {
    /// How long it took.
    pub took: u64,
    /// Its moments, ten a second.
    pub said: Vec<Said>,
    /// What the guest was said to change, in bytes a second, half way.
    pub guest: u64,
}

/// Between two looks.
const LOOK_US: u64 = 100_000;

impl Steady {
    /// Lets a disk be sent whole under load.
    pub fn pass(self, seed: u64) -> PassSeen {
        let mut world = self.world(seed);
        run_until(&mut world, |world| mode(world) == Some(Mode::Sync));
        world.link.bandwidth = self.bandwidth;
        world.call(|filter, now| filter.force_resync(now, ResyncKind::Full));
        run_until(&mut world, |world| mode(world) == Some(Mode::Resync));
        let began = world.now;
        let mut seen = PassSeen { took: 0, said: Vec::new(), guest: 0 };
        let mut look = began;
        while mode(&world) == Some(Mode::Resync) {
            world.step();
            if world.now < look {
                continue;
            }
            look = world.now + LOOK_US;
            let Some(agent) = &world.agent else { continue };
            let Some(pass) = agent.filter.status_at(world.moment()).pass else { continue };
            if pass.done.0 * 2 > pass.total.0 && seen.guest == 0 {
                seen.guest = pass.speed.guest.0;
                world.link.bandwidth = self.bandwidth_later;
            }
            let ends_in = pass.speed.pass_ends_in.map(|time| time.as_micros() as u64);
            seen.said.push(Said { at: world.now - began, ends_in });
        }
        seen.took = world.now - began;
        seen
    }

    fn world(self, seed: u64) -> World {
        let mut random = Random::new(seed);
        let drawn = Plan::draw(&mut random, u64::MAX);
        let plan = Plan {
            size: ByteCount(16 << 20),
            ack: AckPolicy::Local,
            window: ByteCount(4 << 20),
            resync_buffer: ByteCount(1 << 20),
            guest_delay_max: Duration::from_millis(10),
            depth: 4,
            think_us: self.think_us,
            write_max: 8192,
            alignment: 512,
            resync_rate: ByteCount(self.resync_rate),
            added_latency: Duration::ZERO,
            local_us: 1_000,
            write_errors_permille: 0,
            read_errors_permille: 0,
            latency_us: 1_000,
            bandwidth: 400_000_000,
            socket_buffer: 256 * 1024,
            sync_us: 5_000,
            segment: ByteCount(4 << 20),
            bitmap: ByteCount(1 << 20),
            prefilled: true,
            ..drawn
        };
        let mut world = World::of(plan, random, false);
        world.calm = true;
        world
    }
}

fn mode(world: &World) -> Option<Mode> {
    world.agent.as_ref().map(|agent| agent.filter.mode())
}

fn run_until(world: &mut World, done: impl Fn(&World) -> bool) {
    let until = world.now + 600_000_000;
    while !done(world) {
        world.step();
        assert!(world.now < until, "the world does not get there");
    }
}
