//! What a seed decides before anything happens: sizes, limits, speeds and how bad the world is.

use std::time::Duration;

use backtide_io_filter::{AckPolicy, OnOutage};
use backtide_tracking::ActivityLimits;
use backtide_units::{BlockCount, ByteCount};

use crate::random::Random;

/// All times are in microseconds of the virtual clock.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The disk's size; a multiple of 512, not always of 4096.
    pub size: ByteCount,
    /// When the guest is answered.
    pub ack: AckPolicy,
    /// What that means while the receiver is away.
    pub on_outage: OnOutage,
    /// The window's limit.
    pub window: ByteCount,
    /// The resync buffer's limit.
    pub resync_buffer: ByteCount,
    /// The bound of what the guest may wait for the receiver's sake.
    pub guest_delay_max: Duration,
    /// Requests the guest has under way at once.
    pub depth: u64,
    /// The longest pause between two requests.
    pub think_us: u64,
    /// The longest write.
    pub write_max: u64,
    /// Where writes begin and end: multiples of this.
    pub alignment: u64,
    /// So many in a thousand requests go to the first blocks of the disk.
    pub hot_permille: u64,
    /// The limit of what passes read, in bytes a second; zero for none.
    pub resync_rate: ByteCount,
    /// What passes may add to the guest's latency; zero for anything.
    pub added_latency: Duration,
    /// The longest that a local I/O takes.
    pub local_us: u64,
    /// Local writes and reads that fail, of a thousand.
    pub write_errors_permille: u64,
    /// See above.
    pub read_errors_permille: u64,
    /// The longest latency of the link, each way.
    pub latency_us: u64,
    /// Bytes a second of the link at the beginning.
    pub bandwidth: u64,
    /// Bytes the link takes in ahead of the wire.
    pub socket_buffer: u64,
    /// The longest sync of the receiver.
    pub sync_us: u64,
    /// The longest comparison at the receiver.
    pub compare_us: u64,
    /// Segments of the receiver's log are sealed at this size.
    pub segment: ByteCount,
    /// What the receiver's log holds back in memory.
    pub log_buffer: ByteCount,
    /// The longest pause between two things that go wrong.
    pub chaos_us: u64,
    /// The longest that something stays broken, and that nobody notices.
    pub outage_us: u64,
    /// Whether the receiver's storage fails now and then.
    pub store_faults: bool,
    /// Whether the storage of the tracking file fails again and again.
    pub tracking_faults: bool,
    /// Steps until the world is healed.
    pub steps: u64,
    /// How long a silent receiver is waited for.
    pub outage_after: Duration,
    /// What the passive bitmap may take.
    pub bitmap: ByteCount,
    /// How long an unreadable block is left alone.
    pub read_retry: Duration,
    /// How often a disk that is idle says that it has not changed.
    pub unchanged_every: Duration,
    /// The activity log: few small extents, so that they go cold all the time.
    pub activity: ActivityLimits,
    /// The longest that a write to the tracking file takes.
    pub tracking_us: u64,
    /// What the spill may take, if there is one.
    pub spill: Option<ByteCount>,
    /// The longest that an operation of the spill takes.
    pub spill_us: u64,
    /// The longest pause between two fetches of missing blocks that nobody asked for.
    pub hydrate_us: u64,
    /// How often somebody goes back, of so many times that something happens and 44 more.
    pub rewinds: u64,
    /// The image lies behind a server, which may end with the agent and takes with it what it was not told to flush.
    pub server: bool,
    /// Flushes of what was fetched that such a server refuses, of a thousand.
    pub refused_permille: u64,
    /// The image may hold what a rewind finds missing: it is compared.
    pub compares: bool,
    /// Whether the disk holds data before it is first protected.
    pub prefilled: bool,
}

/// From a megabyte to many in a second.
pub const BANDWIDTHS: [u64; 5] = [300_000, 2_000_000, 10_000_000, 50_000_000, 400_000_000];

impl Plan {
    /// The plan of a seed.
    pub fn draw(random: &mut Random, steps: u64) -> Self {
        let blocks = random.pick(&[64, 64, 100, 128, 200, 256, 512]);
        let odd = if random.one_in(2) { 512 * random.between(1, 7) } else { 0 };
        let ack = random.pick(&[
            AckPolicy::Local,
            AckPolicy::Local,
            AckPolicy::Received,
            AckPolicy::Durable,
            AckPolicy::DurableEveryWrite,
        ]);
        let faulty = random.one_in(3);
        let think_us = random.pick(&[300, 1_000, 3_000, 10_000]);
        // So many requests between two things that go wrong, whatever the guest's pace.
        let chaos_us = think_us * random.pick(&[30, 100, 100, 300, 1_000]);
        let mut plan = Self {
            size: ByteCount(blocks * 4096 - odd),
            ack,
            on_outage: random.pick(&[OnOutage::Continue, OnOutage::Continue, OnOutage::Block]),
            window: ByteCount(random.pick(&[64, 128, 256, 1024]) * 1024),
            resync_buffer: ByteCount(random.pick(&[16, 64, 256, 2048]) * 1024),
            guest_delay_max: Duration::from_micros(random.pick(&[0, 300, 2_000, 10_000, 50_000])),
            depth: random.pick(&[1, 3, 8, 16]),
            think_us,
            write_max: random.pick(&[4096, 16 * 1024, 64 * 1024]),
            alignment: random.pick(&[512, 512, 4096, 1]),
            hot_permille: random.pick(&[0, 300, 800]),
            resync_rate: ByteCount(random.pick(&[0, 0, 300_000, 5_000_000])),
            added_latency: Duration::from_micros(random.pick(&[0, 50, 500, 5_000])),
            local_us: random.pick(&[100, 1_000, 10_000]),
            write_errors_permille: if faulty { random.pick(&[1, 5, 30]) } else { 0 },
            read_errors_permille: if faulty { random.pick(&[0, 10, 100]) } else { 0 },
            latency_us: random.pick(&[50, 1_000, 20_000, 100_000]),
            bandwidth: random.pick(&BANDWIDTHS),
            socket_buffer: random.pick(&[1, 16 * 1024, 256 * 1024]),
            sync_us: random.pick(&[100, 5_000, 50_000]),
            compare_us: random.pick(&[100, 5_000]),
            segment: ByteCount(random.pick(&[64, 256, 4096]) * 1024),
            log_buffer: ByteCount(random.pick(&[0, 64, 1024]) * 1024),
            chaos_us,
            outage_us: chaos_us / random.pick(&[1, 4, 20]),
            store_faults: random.one_in(4),
            steps,
            outage_after: Duration::from_micros(random.pick(&[10_000, 200_000, 5_000_000])),
            bitmap: ByteCount(random.pick(&[40, 100, 1 << 20])),
            read_retry: Duration::from_micros(random.pick(&[1_000, 30_000, 1_000_000])),
            unchanged_every: Duration::from_micros(random.pick(&[5_000, 100_000, 5_000_000])),
            activity: ActivityLimits {
                extent: BlockCount(random.pick(&[1, 4, 16])),
                hot: random.pick(&[0, 1, 2, 8, 64]),
                sectors: random.pick(&[2, 4, 64]),
                idle: Duration::from_micros(chaos_us),
                anew: Duration::from_micros(chaos_us / 10),
            },
            tracking_us: random.pick(&[100, 1_000, 20_000]),
            prefilled: random.one_in(2),
            spill: random.pick(&[None, Some(100), Some(600), Some(8192)]).map(|kib| ByteCount(kib * 1024)),
            spill_us: random.pick(&[100, 2_000, 30_000]),
            hydrate_us: random.pick(&[1_000, 50_000, 1_000_000]),
            rewinds: random.pick(&[1, 4, 20, 60]),
            server: random.one_in(2),
            refused_permille: if faulty { random.pick(&[20, 200]) } else { 0 },
            compares: random.one_in(2),
            tracking_faults: random.one_in(8),
        };
        if plan.rewinds > 1 {
            // A disk that says all the time that nothing changes is never all durable.
            plan.unchanged_every = Duration::from_secs(5);
        }
        plan
    }
}
