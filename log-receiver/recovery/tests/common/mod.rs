//! A small agent and a plain model of its disk: what the tests compare the log with.
//!
//! The agent writes, loses its stream, resynchronises (forwarding or coalescing, aborted or forfeited)
//! as the design has it. The model is the list of its writes; the disk at L is the effect of all of
//! them up to L.
#![allow(
    dead_code,
    unreachable_pub,
    unused_imports,
    reason = "each test file uses a part, as a module of its own"
)]

mod random;
mod views;

use std::{path::Path, sync::Arc};

use backtide_recovery::{
    CacheLimits, Compression, DiskLog, Entry, LogCache, LogIdentity, LogOptions, PassContent, PassReason,
    Snapshot, SyncTicket,
};
use backtide_storage::{MemoryStorage, Sharing, Storage};
use backtide_units::{
    BlockRange, ByteCount, ByteOffset, ByteRange, CaptureTime, DiskId, Epoch, HistoryId, Lsn, PayloadChecksum,
};
use bytes::Bytes;
use roaring::RoaringTreemap;
use uuid::Uuid;

pub use random::Random;
use random::half_noise;
pub use views::{assert_same, check_view, chunks_that_differ};

/// A pass takes a step for each dirty range; a few passes follow each other at the most.
const ADVANCES_MAX: usize = 20_000;

/// Not a multiple of a bucket, nor of a sector.
pub const DISK: u64 = 21 * 65536 + 777;

/// The checksum that an agent captures: of the whole payload only.
fn captured(payload: &[u8]) -> PayloadChecksum {
    PayloadChecksum::captured(crc32c::crc32c(payload))
}

/// The seeds of a test: `count` from a fixed root, or the one in `SEED`, or those in `SEEDS`, such as `1..100`.
pub fn seeds(count: u64) -> Vec<u64> {
    if let Ok(seed) = std::env::var("SEED") {
        return vec![seed.parse().expect("SEED is a number")];
    }
    let Ok(seeds) = std::env::var("SEEDS") else { return (1..=count).collect() };
    let ends = seeds.split_once("..").and_then(|(a, b)| Some(a.parse().ok()?..b.parse().ok()?));
    ends.expect("SEEDS is a range such as 1..100").collect()
}

/// Says which seed failed.
pub struct SayOnPanic(pub String);

impl Drop for SayOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("failed with {}", self.0);
        }
    }
}

/// One write of the guest; `None` is zeroes.
#[derive(Clone)]
pub struct Change {
    pub lsn: Lsn,
    pub range: ByteRange,
    pub bytes: Option<Vec<u8>>,
}

/// What the disk is at every LSN.
#[derive(Clone)]
pub struct Model {
    pub base: Vec<u8>,
    pub changes: Vec<Change>,
}

pub fn indices(range: ByteRange) -> std::ops::Range<usize> {
    range.start().0 as usize..range.end().0 as usize
}

pub fn whole() -> ByteRange {
    ByteRange::between(ByteOffset(0), ByteOffset(DISK))
}

impl Change {
    pub fn apply(&self, image: &mut [u8]) {
        let target = &mut image[indices(self.range)];
        match &self.bytes {
            Some(bytes) => target.copy_from_slice(bytes),
            None => target.fill(0),
        }
    }
}

impl Model {
    pub fn at(&self, lsn: Lsn) -> Vec<u8> {
        let mut image = self.base.clone();
        self.changes
            .iter()
            .take_while(|change| change.lsn <= lsn)
            .for_each(|change| change.apply(&mut image));
        image
    }

    /// Compares the points that the log offers; gives how many it compared.
    pub fn check(&self, log: &mut DiskLog) -> usize {
        self.check_some(log, 25)
    }

    /// Compares the ends of intervals and about `some` points between them.
    pub fn check_some(&self, log: &mut DiskLog, some: usize) -> usize {
        self.check_snapshot(&log.snapshot().expect("snapshot"), some)
    }

    /// The same for a log as it was at one moment.
    pub fn check_snapshot(&self, snapshot: &Snapshot, some: usize) -> usize {
        let mut points: Vec<Lsn> = self.changes.iter().map(|change| change.lsn).collect();
        for interval in snapshot.timeline().intervals() {
            points.extend([interval.from.lsn, interval.to.lsn]);
        }
        points.retain(|lsn| snapshot.timeline().offers(*lsn));
        points.sort();
        points.dedup();
        // All of a few points, a part of many: the ends of intervals are what goes wrong.
        let step = points.len() / some + 1;
        let ends = |lsn: &Lsn| {
            let mut intervals = snapshot.timeline().intervals().iter();
            intervals.any(|interval| interval.from.lsn == *lsn || interval.to.lsn == *lsn)
        };
        let chosen = points.iter().enumerate().filter(|(place, lsn)| place % step == 0 || ends(lsn));
        let points: Vec<Lsn> = chosen.map(|(_, lsn)| *lsn).collect();
        let mut image = self.base.clone();
        let mut changes = self.changes.iter().peekable();
        for lsn in &points {
            while let Some(change) = changes.next_if(|change| change.lsn <= *lsn) {
                change.apply(&mut image);
            }
            let view = snapshot.view(*lsn).expect("an offered point");
            assert_same(&view.read(whole()).expect("read"), &image, *lsn);
        }
        points.len()
    }
}

/// How far the agent is with the receiver.
#[derive(Clone)]
enum Mode {
    Sync,
    Away,
    Pass { at: Lsn, at_image: Vec<u8>, forwarding: bool, forfeited: bool },
}

/// The agent with its disk, its log, and the model of both.
pub struct Agent {
    pub random: Random,
    pub storage: MemoryStorage,
    pub options: LogOptions,
    pub log: DiskLog,
    pub model: Model,
    live: Vec<u8>,
    dirty: Vec<ByteRange>,
    active: Vec<ByteRange>,
    mode: Mode,
    lsn: Lsn,
    clock: u64,
    epoch: u64,
    /// Points that were offered when a ticket had succeeded.
    pub promised: Vec<Lsn>,
    /// What the log took of the disk, each with its version.
    pub taken: Vec<(Lsn, ByteRange)>,
}

pub fn identity() -> LogIdentity {
    LogIdentity { disk: DiskId(Uuid::from_u128(7)), history: HistoryId(Uuid::from_u128(8)) }
}

pub fn cache() -> LogCache {
    // Small, so that blocks and files come and go.
    LogCache::new(CacheLimits {
        index_bytes_max: ByteCount(3 * 4300),
        open_files_max: 2,
        ..CacheLimits::default()
    })
}

pub fn directory() -> &'static Path {
    Path::new("disks/d1")
}

pub fn options(random: &mut Random) -> LogOptions {
    let compressions = [Compression::None, Compression::Lz4, Compression::Zstd];
    let compression = compressions[random.0 as usize % compressions.len()];
    LogOptions {
        segment_bytes_max: ByteCount(20_000 << random.below(5)),
        segment_extents_max: 20 + random.below(400) as u32,
        buffer_bytes_max: ByteCount(1 << (6 + random.below(12))),
        allocation_step: ByteCount(1 << (8 + random.below(10))),
        // Often too little for exact look-ups.
        directory_bytes_max: ByteCount(1 << (6 + random.below(14))),
        compression,
    }
}

/// What a step of the agent met.
pub type Step = Result<(), backtide_recovery::AppendError>;

impl Agent {
    pub fn new(seed: u64, storage: MemoryStorage) -> Result<Self, backtide_recovery::LogError> {
        let mut random = Random(seed);
        let options = options(&mut random);
        let log = DiskLog::create(Arc::new(storage.clone()), directory(), identity(), options, &cache())?;
        let mut base = vec![0; DISK as usize];
        for _ in 0..4 {
            let range = random.range(200_000);
            base[indices(range)].fill(0xba);
        }
        let model = Model { base: base.clone(), changes: Vec::new() };
        Ok(Self {
            random,
            storage,
            options,
            log,
            model,
            live: base,
            dirty: vec![whole()],
            active: Vec::new(),
            mode: Mode::Away,
            lsn: Lsn(0),
            clock: 1_000_000,
            epoch: 0,
            promised: Vec::new(),
            taken: Vec::new(),
        })
    }

    /// The same agent with a copy of its storage, where `log` is what was opened of its log. Everything was in the files.
    pub fn fork(&self, storage: MemoryStorage, log: DiskLog) -> Self {
        Self {
            random: Random(self.random.0),
            storage,
            options: self.options,
            log,
            model: self.model.clone(),
            live: self.live.clone(),
            dirty: self.dirty.clone(),
            active: self.active.clone(),
            mode: self.mode.clone(),
            promised: self.promised.clone(),
            taken: self.taken.clone(),
            ..*self
        }
    }

    /// The disk was protected before, up to this LSN.
    pub fn starts_above(&mut self, lsn: Lsn) {
        self.lsn = lsn;
    }

    fn time(&mut self) -> CaptureTime {
        self.clock += self.random.below(3);
        CaptureTime(self.clock)
    }

    pub fn attach(&mut self) -> Step {
        self.epoch += 1;
        let time = self.time();
        let name = "vm1".parse().expect("a name");
        let (epoch, next_lsn) = (Epoch(self.epoch), self.lsn.next());
        let (attach, size) = (Uuid::from_u128(self.epoch.into()), ByteCount(DISK));
        let facts = Default::default();
        self.log.append(Entry::Attach { epoch, attach, next_lsn, size, name, time, facts })?;
        Ok(())
    }

    /// One random thing that an agent, its guest or its receiver can do.
    pub fn step(&mut self) -> Step {
        match self.random.below(20) {
            0..=8 => self.write(),
            9..=10 => self.zero(),
            11 => self.flush(),
            12 => self.mark(),
            13..=16 => self.advance(),
            17 if self.random.one_in(3) => self.lose_stream(),
            18 => Ok(self.log.seal()?),
            _ => self.sync(),
        }
    }

    pub fn write(&mut self) -> Step {
        let range = self.random.range(200_000);
        let mut bytes = half_noise(self.random.next() as u8, range.count().0 as usize);
        let salt = self.random.next().to_le_bytes();
        let length = salt.len().min(bytes.len());
        bytes[..length].copy_from_slice(&salt[..length]);
        self.change(range, Some(bytes))
    }

    pub fn zero(&mut self) -> Step {
        let range = self.random.range(DISK);
        self.change(range, None)
    }

    /// Sends a change that was made before.
    pub fn replay(&mut self, change: &Change) -> Step {
        let (time, Change { lsn, range, bytes }) = (self.time(), change.clone());
        let entry = match bytes {
            Some(bytes) => {
                let payload = Bytes::from(bytes);
                Entry::Write { lsn, time, range, checksum: captured(&payload), payload }
            }
            None => Entry::Zero { lsn, time, range, trim: false },
        };
        self.log.append(entry).map(|_| ())
    }

    fn change(&mut self, range: ByteRange, bytes: Option<Vec<u8>>) -> Step {
        self.lsn = self.lsn.plus(1 + self.random.below(3));
        let (lsn, time) = (self.lsn, self.time());
        let change = Change { lsn, range, bytes };
        change.apply(&mut self.live);
        let entry = match &change.bytes {
            Some(bytes) => {
                let payload = Bytes::copy_from_slice(bytes);
                Entry::Write { lsn, time, range, checksum: captured(&payload), payload }
            }
            None => Entry::Zero { lsn, time, range, trim: self.random.one_in(2) },
        };
        self.model.changes.push(change);
        let forwarded = match &mut self.mode {
            Mode::Sync | Mode::Pass { forwarding: true, .. } => true,
            Mode::Away | Mode::Pass { forwarding: false, .. } => false,
        };
        if forwarded {
            self.log.append(entry)?;
            self.taken.push((lsn, range));
        } else {
            self.dirty.push(range);
        }
        Ok(())
    }

    fn flush(&mut self) -> Step {
        if matches!(self.mode, Mode::Sync) {
            let (lsn, time) = (self.lsn, self.time());
            let unchanged = self.random.one_in(2);
            let entry = if unchanged { Entry::Unchanged { lsn, time } } else { Entry::Flush { lsn, time } };
            self.log.append(entry)?;
        }
        Ok(())
    }

    pub fn mark(&mut self) -> Step {
        if matches!(self.mode, Mode::Sync) {
            let (lsn, time) = (self.lsn, self.time());
            let label = format!("m{lsn}");
            self.log.append(Entry::Mark { lsn, time, label })?;
        }
        Ok(())
    }

    fn lose_stream(&mut self) -> Step {
        // What a lost pass had not delivered is dirty again.
        self.dirty.append(&mut self.active);
        self.mode = Mode::Away;
        if self.random.one_in(3) { self.attach() } else { Ok(()) }
    }

    /// Brings a resync one step on; in sync it is a write.
    fn advance(&mut self) -> Step {
        match &mut self.mode {
            Mode::Sync => self.write(),
            Mode::Away => self.begin_pass(),
            Mode::Pass { .. } if self.active.is_empty() => self.end_pass(),
            Mode::Pass { .. } => self.deliver(),
        }
    }

    fn begin_pass(&mut self) -> Step {
        self.lsn = self.lsn.next();
        let (at, time) = (self.lsn, self.time());
        let gap_from = self.log.timeline().covered();
        let reason = PassReason { code: 1, text: "the stream was lost".to_owned() };
        self.log.append(Entry::PassBegin { at, gap_from, time, reason })?;
        self.active = std::mem::take(&mut self.dirty);
        let forwarding = self.random.one_in(2);
        // A pass can be forfeited only where a later point can take its place.
        let forfeited = forwarding && self.random.one_in(4);
        self.mode = Mode::Pass { at, at_image: self.live.clone(), forwarding, forfeited };
        Ok(())
    }

    fn deliver(&mut self) -> Step {
        let Mode::Pass { at, at_image, forfeited, .. } = &self.mode else { return Ok(()) };
        let Some(range) = self.active.pop() else { return Ok(()) };
        let (at, mut left) = (*at, None);
        let mut now = range;
        if range.count().0 > 400_000 {
            let middle = ByteOffset(range.start().0 + 400_000);
            now = ByteRange::between(range.start(), middle);
            left = Some(ByteRange::between(middle, range.end()));
        }
        let source = if *forfeited { &self.live } else { at_image };
        let bytes = &source[indices(now)];
        let content = if bytes.iter().all(|&byte| byte == 0) {
            PassContent::Zeroes
        } else {
            let payload = Bytes::copy_from_slice(bytes);
            PassContent::Bytes { checksum: captured(&payload), payload }
        };
        self.active.extend(left);
        self.log.append(Entry::PassData { at, range: now, content })?;
        self.taken.push((at, now));
        Ok(())
    }

    fn end_pass(&mut self) -> Step {
        let Mode::Pass { at, forwarding, forfeited, .. } = &self.mode else { return Ok(()) };
        let (at, forwarding, forfeited) = (*at, *forwarding, *forfeited);
        let covered = self.log.timeline().covered();
        let useless = self.random.one_in(8);
        let valid_from = if forfeited { covered } else { at };
        let time = self.time();
        self.log.append(Entry::PassEnd { at, valid_from: (!useless).then_some(valid_from), time })?;
        // After a useless pass, and after a coalescing one with more to drain, the next must follow.
        self.mode = if useless || (!forwarding && !self.dirty.is_empty()) { Mode::Away } else { Mode::Sync };
        Ok(())
    }

    pub fn sync(&mut self) -> Step {
        let offered: Vec<Lsn> =
            self.log.timeline().intervals().iter().flat_map(|i| [i.from.lsn, i.to.lsn]).collect();
        let Some(ticket) = self.log.ticket()? else { return Ok(()) };
        let through = ticket.through();
        let outcome = if self.storage.shares_syncs() == Sharing::Cheap {
            SyncTicket::sync_together(&self.storage, vec![ticket]).remove(0)
        } else {
            ticket.sync()
        };
        let durable = self.log.synced(outcome)?;
        assert!(durable.seq >= through.seq);
        self.promised = offered;
        Ok(())
    }

    /// Syncs until everything is durable and every segment that is full is sealed.
    pub fn flush_all(&mut self) {
        for _ in 0..3 {
            self.sync().expect("sync");
        }
        self.log.snapshot().expect("everything is in the files");
    }

    /// Ends the process and starts it again; what was written to files is still there.
    pub fn reopen(&mut self) -> Result<backtide_recovery::Recovered, backtide_recovery::LogError> {
        self.storage.kill_handles();
        let (log, recovered) =
            DiskLog::open(Arc::new(self.storage.clone()), directory(), self.options, &cache())?;
        self.log = log;
        Ok(recovered)
    }

    /// The agent after its receiver came back with less than it had: everything may be missing there.
    pub fn restart(&mut self) -> Step {
        self.active.clear();
        self.dirty = vec![whole()];
        self.mode = Mode::Away;
        self.lsn = self.lsn.max(self.log.timeline().highest_lsn());
        self.attach()
    }

    /// The blocks that the log took a version of in `(after, through]`.
    pub fn blocks_taken(&self, after: Lsn, through: Lsn) -> RoaringTreemap {
        let between = self.taken.iter().filter(|(lsn, _)| after < *lsn && *lsn <= through);
        between.flat_map(|(_, range)| BlockRange::touched_by(*range).indices()).collect()
    }

    /// Runs passes until the log is in sync.
    pub fn settle(&mut self) -> Step {
        for _ in 0..ADVANCES_MAX {
            if matches!(self.mode, Mode::Sync) {
                return Ok(());
            }
            self.advance()?;
        }
        panic!("not in sync after {ADVANCES_MAX} steps of passes");
    }
}
