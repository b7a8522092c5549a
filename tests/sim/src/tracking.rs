//! The tracking file of the simulated agent: the production file over a storage that loses power,
//! tears writes and fails now and then.

use std::path::Path;

use backtide_io_filter::{IoFailure, IoId, Resume, TrackingOp};
use backtide_storage::{MemoryStorage, Storage};
use backtide_tracking::{
    ActivityLimits, LoadError, Loaded, LogRecord, SavedTracking, Snapshot, TrackingFile,
};
use backtide_units::{BlockRange, ByteCount, ByteOffset, Reason};

use crate::world::{Event, World};

const PATH: &str = "vm1.tracking";

/// Where the log's sectors lie, and how long one is: see `io-filter/tracking/FORMAT.md`.
const LOG_AT: u64 = 8192;
const SECTOR: usize = 4096;

/// A record that was being written, by a device that does not write its sectors whole.
struct Tearing {
    /// Its sector of the log.
    sector: u64,
    /// What lay there before, and what was to.
    before: Vec<u8>,
    after: Vec<u8>,
}

/// What lies on the agent's own storage.
#[derive(Clone, Default)]
pub(crate) struct Tracking {
    pub(crate) storage: MemoryStorage,
    /// The last attach ended cleanly, and none has begun since.
    clean: bool,
    /// The sector of the log that the last power loss has torn.
    torn: Option<u64>,
    /// The file was given up in this life, and begun anew.
    anew: bool,
    /// The storage was told to fail, and an alarm is right.
    pub(crate) faulty: bool,
}

impl Tracking {
    /// Whether the last attach ended cleanly, and none has begun since.
    pub(crate) fn is_clean(&self) -> bool {
        self.clean
    }
}

impl World {
    fn limits(&self) -> ActivityLimits {
        self.plan.activity
    }

    /// What an agent that starts can know.
    pub(crate) fn resume_from(&mut self) -> Resume {
        let loaded = Loaded::from_file(&self.tracking.storage, Path::new(PATH));
        let (torn, clean) = (self.tracking.torn, std::mem::take(&mut self.tracking.clean));
        assert_eq!(loaded.is_err(), torn.is_some(), "{torn:?} was torn: {:?}", loaded.as_ref().err());
        let lost = |world: &Self, reason| Resume::Lost {
            reason,
            history: world.persisted.history,
            last_lsn: world.persisted.reserved,
            acked_durable: world.persisted.acked_durable,
        };
        match loaded {
            Ok(_) if self.past.wrote => lost(self, Reason::WrittenPastAgent),
            Ok(None) if self.persisted.epoch == 0 => Resume::New,
            Ok(None) => {
                assert!(self.tracking.faulty, "the tracking file is gone");
                lost(self, Reason::AgentCrashed)
            }
            Err(LoadError::Damaged { what, .. }) => {
                let sector = torn.expect("seen above");
                assert_eq!(what, format!("sector {sector} of the activity log"));
                self.stats.tracking_torn += 1;
                lost(self, Reason::BitmapUntrusted)
            }
            Err(error @ LoadError::Io { .. }) => panic!("the file can be read: {error}"),
            Ok(Some(loaded)) if loaded.snapshot.everything => lost(self, Reason::AgentCrashed),
            Ok(Some(loaded)) if clean => {
                assert!(loaded.clean, "nothing was logged after the detach");
                match self.gained() {
                    None => Resume::Clean(loaded.snapshot.saved),
                    Some(gained) => after_growth(loaded, gained),
                }
            }
            Ok(Some(loaded)) if loaded.snapshot.saved.history != self.persisted.history => {
                lost(self, Reason::AgentCrashed)
            }
            Ok(Some(loaded)) => self.crashed(loaded),
        }
    }

    fn crashed(&mut self, loaded: Loaded) -> Resume {
        self.stats.crashes_tracked += 1;
        self.stats.crashes_anew += u64::from(self.tracking.anew);
        let Loaded { snapshot: Snapshot { saved, .. }, hot, .. } = loaded;
        let mut candidates = hot;
        candidates.union_with(&saved.dirty);
        candidates.union_with(&saved.zeroes);
        if let Some(gained) = self.gained() {
            candidates.insert(gained);
        }
        Resume::Crashed {
            reason: Reason::AgentCrashed,
            history: self.persisted.history,
            last_lsn: self.persisted.reserved,
            acked_durable: self.persisted.acked_durable.max(saved.acked_durable),
            acked_position: saved.acked_position,
            candidates,
        }
    }

    /// Puts a new file in place; done before the agent does anything else.
    pub(crate) fn make_tracking(&mut self, snapshot: &Snapshot, clean: bool) -> TrackingFile {
        self.tracking.storage.fail_write_after(u64::MAX / 2);
        self.tracking.storage.fail_sync_after(u64::MAX / 2);
        self.tracking.storage.set_capacity(None);
        let made = self.new_file(snapshot);
        (self.tracking.clean, self.tracking.anew) = (clean, false);
        self.tracking.torn = None;
        made.expect("no fault is planned for it")
    }

    fn new_file(&self, snapshot: &Snapshot) -> std::io::Result<TrackingFile> {
        let (limits, size) = (self.limits(), self.plan.size);
        TrackingFile::create(&self.tracking.storage, Path::new(PATH), limits, size, snapshot)
    }

    fn file_anew(&self, snapshot: &Snapshot) -> std::io::Result<TrackingFile> {
        let (limits, size) = (self.limits(), self.plan.size);
        TrackingFile::create_with_room(&self.tracking.storage, Path::new(PATH), limits, size, snapshot)
    }

    /// A clean detach leaves what it knows.
    pub(crate) fn leave_tracking(&mut self, saved: Option<SavedTracking>) {
        self.tracking.faulty = false;
        let snapshot = match saved {
            Some(saved) => Snapshot::first(saved, true, false),
            None => Snapshot::first(SavedTracking::unknown(self.disk), false, true),
        };
        let clean = !snapshot.everything;
        self.make_tracking(&snapshot, clean);
    }

    pub(crate) fn begin_tracking(&mut self, io: IoId, op: TrackingOp) {
        let agent = self.agent.as_mut().expect("it asked");
        let life = agent.life;
        agent.tracking_ops.insert(io, op);
        self.trace.note(self.now, "tracking begins", &[io.0]);
        self.within(self.plan.tracking_us, Event::Tracking { life, io });
    }

    pub(crate) fn tracking_goes_on(&mut self, life: u64, io: IoId) {
        let Some(agent) = self.agent.as_mut().filter(|agent| agent.life == life) else { return };
        let op = agent.tracking_ops.remove(&io).expect("an operation ends once");
        let result = self.do_tracking(&op).map_err(|_| IoFailure { errno: 5 });
        assert!(result.is_ok() || self.tracking.faulty, "the storage is sound");
        self.cold_requests_begin();
        self.trace.note(self.now, "tracking ends", &[io.0, u64::from(result.is_ok())]);
        self.call(|filter, now| filter.tracking_done(now, io, result));
        self.detach_when_quiet();
    }

    fn do_tracking(&mut self, op: &TrackingOp) -> std::io::Result<ByteCount> {
        if let TrackingOp::Begin(snapshot) = op {
            let made = self.file_anew(snapshot)?;
            self.agent.as_mut().expect("it is alive").tracking = made;
            self.tracking.anew = true;
            self.stats.tracking_anew += 1;
            return Ok(ByteCount::ZERO);
        }
        let file = &self.agent.as_ref().expect("it is alive").tracking;
        match op {
            TrackingOp::Record(record) => file.write_record(record).map(|()| ByteCount::ZERO),
            TrackingOp::Snapshot(snapshot) => {
                self.stats.snapshots += 1;
                file.write_snapshot(snapshot)
            }
            TrackingOp::Discard => {
                match self.tracking.storage.remove(Path::new(PATH)) {
                    // The last time it was not durable.
                    Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
                    Ok(()) | Err(_) => {}
                }
                self.tracking.storage.sync_dir(Path::new("")).map(|()| ByteCount::ZERO)
            }
            TrackingOp::Begin(_) => unreachable!("done above"),
        }
    }

    /// The agent dies: what it was writing is there, or not, or with a power loss in part.
    pub(crate) fn kill_tracking(&mut self, ops: Vec<TrackingOp>, file: &TrackingFile, power: bool) {
        let mut tearing = None;
        for op in ops {
            // Powers fail while a record is written more seldom than that has to be seen.
            if power
                && let TrackingOp::Record(record) = &op
                && !self.random.one_in(4)
            {
                tearing = self.tear(record);
                continue;
            }
            if self.random.one_in(2) {
                continue;
            }
            if power {
                self.tracking.storage.cut_power_after(self.random.below(3));
            }
            // Nobody is left to be told how it went.
            let _ = match op {
                TrackingOp::Record(record) => file.write_record(&record),
                TrackingOp::Snapshot(snapshot) => file.write_snapshot(&snapshot).map(|_| ()),
                TrackingOp::Discard => self.tracking.storage.remove(Path::new(PATH)),
                TrackingOp::Begin(snapshot) => self.file_anew(&snapshot).map(drop),
            };
        }
        if power {
            let seed = self.random.below(u64::MAX);
            self.tracking.storage.crash(seed);
            self.tracking.torn = tearing.and_then(|tearing| self.torn_by(&tearing));
        }
    }

    /// The device writes a part of a record's sector, from its beginning.
    fn tear(&mut self, record: &LogRecord) -> Option<Tearing> {
        let sector = (record.sequence - 1) % u64::from(self.limits().sectors);
        let (before, after) = (self.log_sector(sector)?, record.encode().to_vec());
        // What lies behind its runs is zeroes.
        let written = self.random.below(24 + 8 * record.runs.len() as u64) as usize;
        let file = self.tracking.storage.open(Path::new(PATH)).expect("an agent has it");
        let at = ByteOffset(LOG_AT + sector * SECTOR as u64);
        // The power may go within this one, or be gone.
        let _ = file.write_at(at, &after[..written]);
        Some(Tearing { sector, before, after })
    }

    /// The sector, when it holds neither what lay there nor what was to.
    fn torn_by(&self, Tearing { sector, before, after }: &Tearing) -> Option<u64> {
        let found = self.log_sector(*sector)?;
        (found != *before && found != *after).then_some(*sector)
    }

    /// What a sector of the log holds; zeroes behind the file's end. None when there is no file.
    fn log_sector(&self, sector: u64) -> Option<Vec<u8>> {
        let file = self.tracking.storage.open(Path::new(PATH)).ok()?;
        let mut bytes = vec![0; SECTOR];
        file.read_at(ByteOffset(LOG_AT + sector * SECTOR as u64), &mut bytes).expect("a sector");
        Some(bytes)
    }

    /// The host loses power while no agent runs.
    pub(crate) fn lose_tracking_power(&mut self) {
        let seed = self.random.below(u64::MAX);
        self.tracking.storage.crash(seed);
    }

    /// The agent's own storage fails once, or is full for a while.
    pub(crate) fn tracking_fault(&mut self) {
        if self.agent.is_none() {
            return;
        }
        self.tracking.faulty = true;
        match self.random.below(3) {
            0 => self.tracking.storage.fail_write_after(0),
            1 => self.tracking.storage.fail_sync_after(0),
            _ => {
                self.tracking.storage.set_capacity(Some(self.tracking.storage.used()));
                self.within(self.plan.outage_us, Event::TrackingHeal);
            }
        }
    }
}

/// A clean detach, and then the disk grew.
fn after_growth(loaded: Loaded, gained: BlockRange) -> Resume {
    let Loaded { snapshot: Snapshot { saved, .. }, hot, .. } = loaded;
    let mut candidates = hot;
    candidates.union_with(&saved.dirty);
    candidates.union_with(&saved.zeroes);
    candidates.insert(gained);
    Resume::Crashed {
        reason: Reason::Resized,
        history: saved.history,
        last_lsn: saved.last_lsn,
        acked_durable: saved.acked_durable,
        acked_position: saved.acked_position,
        candidates,
    }
}
