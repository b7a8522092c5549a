//! A disk that lacks blocks, driven one step at a time. Its image is in the kernel's hands, or behind a server that keeps what
//! it was not told to flush in its own memory, and may end with the agent.

use std::{ops::Range, path::Path, sync::Arc};

use backtide_hydration::{ChangeId, FetchId, Header, HydrationFile, Kind, Missing, Need, SourcePoint};
use backtide_storage::{MemoryStorage, Storage, StorageFile};
use backtide_tracking::DirtyBitmap;
use backtide_units::{
    BlockCount, BlockIndex, BlockRange, ByteCount, ByteOffset, ByteRange, CaptureTime, DiskId, Epoch,
    HistoryId, Lsn,
};
use uuid::Uuid;

use crate::{
    mistake::Mistake,
    model::{Crash, Model, Tag, of_point, stale},
};

const SECTOR: u64 = 512;
const IN_BLOCK: u64 = 4096 / SECTOR;
/// The last block is a short one.
const SECTORS: u64 = 30 * IN_BLOCK - 3;
const SIZE: ByteCount = ByteCount(SECTORS * SECTOR);
const STEPS: u64 = 400;
const FILE: &str = "vm1.hydration";

/// No sync fails so late.
const NEVER: u64 = u64::MAX / 2;

enum Task {
    Write { sectors: Range<u64>, tag: Tag, change: Option<ChangeId>, steps: u32, refused: u64 },
    Fetch { id: FetchId, blocks: BlockRange, store: Vec<BlockRange>, steps: u32, refused: u64 },
}

/// Whose end it is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    /// The agent's.
    Agent,
    /// The agent's and that of the server which has the image: of the agent's host everything stays.
    AgentAndServer,
    /// The agent's host loses power, and the server is another one's.
    Host,
    /// Everything loses power.
    Everything,
}

pub(crate) struct World {
    seed: u64,
    mistake: Option<Mistake>,
    storage: MemoryStorage,
    /// What the server of the image writes to; none where the agent has the image itself.
    server: Option<MemoryStorage>,
    /// How many flushes the server has refused.
    refused: u64,
    /// No guest was told of the last one.
    untold: bool,
    image: Arc<dyn StorageFile>,
    file: Arc<HydrationFile>,
    boot: u8,
    missing: Missing,
    tasks: Vec<Task>,
    model: Model,
    next_tag: Tag,
}

fn boot(number: u8) -> Uuid {
    Uuid::from_bytes([number; 16])
}

fn header() -> Header {
    let disk = DiskId(Uuid::from_bytes([1; 16]));
    Header {
        disk,
        kind: Kind::Rewind,
        boot: boot(1),
        epoch: Epoch(3),
        inode: 4,
        before: Lsn(50),
        total: BlockCount(20),
        compare: false,
        source: SourcePoint {
            receiver: "unix:/run/receiver.sock".to_owned(),
            disk,
            name: "vm1".parse().unwrap(),
            history: HistoryId(Uuid::from_bytes([5; 16])),
            lsn: Lsn(40),
            time: CaptureTime(7),
            size: SIZE,
        },
    }
}

fn bytes(sectors: &Range<u64>) -> ByteRange {
    ByteRange::between(ByteOffset(sectors.start * SECTOR), ByteOffset(sectors.end * SECTOR))
}

fn sectors(blocks: BlockRange) -> Range<u64> {
    let bytes = blocks.bytes(SIZE);
    bytes.start().0 / SECTOR..bytes.end().0 / SECTOR
}

impl World {
    pub(crate) fn new(seed: u64, mistake: Option<Mistake>) -> Self {
        let storage = MemoryStorage::new();
        let server = (!seed.is_multiple_of(2)).then(MemoryStorage::new);
        let medium = server.as_ref().unwrap_or(&storage);
        let image = medium.create_new(Path::new("image")).unwrap();
        let mut world_seed = seed;
        let mut lacking = DirtyBitmap::new();
        for block in 0..30 {
            if !random(&mut world_seed).is_multiple_of(4) {
                lacking.insert((block..block + 1).into());
            }
        }
        for n in 0..SECTORS {
            let block = BlockIndex(n / IN_BLOCK);
            let lacks = lacking.touches((block.0..block.0 + 1).into());
            put(&*image, n, if lacks { stale(n) } else { of_point(n) }).unwrap();
        }
        image.sync_data().unwrap();
        medium.sync_dir(Path::new("")).unwrap();
        let shared = Arc::new(storage.clone());
        let file = HydrationFile::create(shared, Path::new(FILE), header(), lacking.clone()).unwrap();
        Self {
            seed: world_seed,
            mistake,
            storage,
            server,
            refused: 0,
            untold: false,
            image,
            file: Arc::new(file),
            boot: 1,
            missing: Missing::new(SIZE, lacking),
            tasks: Vec::new(),
            model: Model::new(SECTORS),
            next_tag: 1,
        }
    }

    fn dice(&mut self, sides: u64) -> u64 {
        random(&mut self.seed) % sides
    }

    /// Lives through all steps, brings what is still missing, and looks once more.
    pub(crate) fn live(mut self) -> Result<(), String> {
        for _ in 0..STEPS {
            match self.dice(20) {
                0..4 => self.begin_write(),
                4..6 => self.begin_fetch(),
                6..15 => self.step()?,
                15..17 => self.read()?,
                17 => self.flush(self.mistake)?,
                18 if self.dice(3) == 0 => self.crash(End::Agent)?,
                18 if self.dice(3) == 0 => self.crash(End::AgentAndServer)?,
                18 => {}
                _ if self.dice(8) == 0 => self.crash(End::Host)?,
                _ if self.dice(6) == 0 => self.crash(End::Everything)?,
                _ => {}
            }
        }
        while !self.missing.is_empty() || !self.tasks.is_empty() {
            self.begin_fetch();
            self.step()?;
        }
        if self.untold {
            self.crash(End::Everything)?;
            return self.live();
        }
        let acknowledged = self.model.acknowledged();
        // Behind a server everything that is present is stable; what guests wrote since is for them to flush.
        let is_flushed = self.server.is_none();
        let sync = || if is_flushed { self.image.sync_data() } else { Ok(()) };
        self.file.finish(sync, || Ok(())).map_err(|error| error.to_string())?;
        if is_flushed {
            self.model.flushed(&acknowledged);
        }
        self.lose(End::Everything);
        if self.storage.open(Path::new(FILE)).is_ok() {
            return Err("the file is still there".to_owned());
        }
        (0..SECTORS).try_for_each(|n| self.model.crashed(Crash::PowerLost, n, get(&*self.image, n)))
    }

    fn begin_write(&mut self) {
        let start = self.dice(SECTORS);
        let length = match self.dice(3) {
            0 => 1,
            1 => IN_BLOCK,
            _ => 1 + self.dice(5 * IN_BLOCK),
        };
        let start = if self.dice(2) == 0 { start / IN_BLOCK * IN_BLOCK } else { start };
        let range = start..(start + length).min(SECTORS);
        // The filter's guard makes changes of one block take turns.
        let touched = BlockRange::touched_by(bytes(&range));
        let busy = self.tasks.iter().any(|task| match task {
            Task::Write { sectors, .. } => BlockRange::touched_by(bytes(sectors)).overlaps(touched),
            Task::Fetch { .. } => false,
        });
        if busy {
            return;
        }
        let change = match self.missing.touches(bytes(&range)) {
            false => None,
            true => match self.missing.begin_change(bytes(&range)) {
                Ok(change) => Some(change),
                Err(need) => return self.begin_needed(need),
            },
        };
        let tag = self.next_tag;
        self.next_tag += 1;
        self.model.begin(range.clone(), tag);
        let refused = self.refused;
        self.tasks.push(Task::Write { sectors: range, tag, change, steps: 0, refused });
    }

    fn begin_needed(&mut self, need: Need) {
        let Need::Wait(fetch) = need else { panic!("nothing is damaged here") };
        for blocks in fetch {
            let id = self.missing.begin_fetch(blocks);
            let refused = self.refused;
            self.tasks.push(Task::Fetch { id, blocks, store: Vec::new(), steps: 0, refused });
        }
    }

    fn begin_fetch(&mut self) {
        let from = BlockIndex(self.dice(30));
        let next = self.missing.next_unfetched(from).or_else(|| self.missing.next_unfetched(BlockIndex(0)));
        if let Some(run) = next {
            let some = BlockRange::from(run.start().0..run.end().0.min(run.start().0 + 3));
            self.begin_needed(Need::Wait(vec![some]));
        }
    }

    fn read(&mut self) -> Result<(), String> {
        let n = self.dice(SECTORS);
        match self.missing.before_read(bytes(&(n..n + 1))) {
            None => self.model.may_be(n, get(&*self.image, n)),
            Some(need) => {
                self.begin_needed(need);
                Ok(())
            }
        }
    }

    /// Brings one task on by one step.
    fn step(&mut self) -> Result<(), String> {
        if self.tasks.is_empty() {
            return Ok(());
        }
        let index = self.dice(self.tasks.len() as u64) as usize;
        let task = self.tasks.swap_remove(index);
        let next = match task {
            Task::Write { .. } => self.step_write(task),
            Task::Fetch { .. } => self.step_fetch(task),
        };
        self.tasks.extend(next.map_err(|error| error.to_string())?);
        Ok(())
    }

    /// Behind a server, has it flush; whether what was written when it had refused so many flushes is stable.
    fn is_stable(&mut self, refused: u64) -> bool {
        let Some(server) = self.server.clone() else { return true };
        if self.mistake == Some(Mistake::PresentBeforeStable) {
            return true;
        }
        if self.dice(16) == 0 {
            server.fail_sync_after(0);
        }
        let flushed = self.image.sync_data();
        server.fail_sync_after(NEVER);
        if flushed.is_err() {
            self.refused += 1;
            self.untold = true;
            return false;
        }
        self.refused == refused || self.mistake == Some(Mistake::StableAfterRefusal)
    }

    fn step_write(&mut self, task: Task) -> std::io::Result<Option<Task>> {
        let Task::Write { sectors, tag, change, mut steps, mut refused } = task else { unreachable!() };
        let early = [Some(Mistake::PresentBeforeWrite), Some(Mistake::AnsweredBeforePresent)];
        let middle = (sectors.start + sectors.end) / 2;
        match (steps, change) {
            (0, Some(change)) if self.mistake == early[0] => {
                self.file.present(self.missing.overwritten(change))?;
            }
            (1, _) => {
                refused = self.refused;
                (sectors.start..middle).try_for_each(|n| put(&*self.image, n, tag))?;
            }
            (2, _) => (middle..sectors.end).try_for_each(|n| put(&*self.image, n, tag))?,
            (3, _) if self.mistake == early[1] => self.model.acknowledge(sectors.clone()),
            // A driver would fail it; whoever asked writes it again then.
            (4, Some(_)) if !self.is_stable(refused) => steps = 0,
            (5, Some(change)) if self.mistake != early[0] => {
                self.file.present(self.missing.overwritten(change))?;
            }
            (6, change) => {
                if let Some(change) = change {
                    self.missing.end_change(change, true);
                }
                self.model.acknowledge(sectors);
                return Ok(None);
            }
            _ => {}
        }
        Ok(Some(Task::Write { sectors, tag, change, steps: steps + 1, refused }))
    }

    fn step_fetch(&mut self, task: Task) -> std::io::Result<Option<Task>> {
        let Task::Fetch { id, blocks, mut store, mut steps, mut refused } = task else { unreachable!() };
        match steps {
            1 => {
                store = self.missing.end_fetch(id, true);
                if store.is_empty() {
                    return Ok(None);
                }
            }
            2 => {
                refused = self.refused;
                let all = vec![blocks];
                let written = if self.mistake == Some(Mistake::FetchOverWrite) { &all } else { &store };
                for n in written.iter().flat_map(|run| sectors(*run)) {
                    put(&*self.image, n, of_point(n))?;
                }
            }
            3 if !self.is_stable(refused) => steps = 1,
            4 => self.file.present(&store)?,
            5 => {
                self.missing.end_store(id, true);
                return Ok(None);
            }
            _ => {}
        }
        Ok(Some(Task::Fetch { id, blocks, store, steps: steps + 1, refused }))
    }

    fn flush(&mut self, mistake: Option<Mistake>) -> Result<(), String> {
        if self.server.is_some() {
            return self.flush_server(mistake);
        }
        let acknowledged = self.model.acknowledged();
        let file = Arc::clone(&self.file);
        let fails = self.dice(12) == 0 && mistake.is_none();
        if fails {
            let syncs = self.dice(3);
            self.storage.fail_sync_after(syncs);
        }
        let meanwhile = self.dice(6);
        let flushed = match mistake {
            Some(Mistake::FlushWithoutFile) => self.image.sync_data(),
            Some(Mistake::DurableBeforeSync) => file.settle(|| Ok(())),
            _ => file.settle(|| {
                self.image.sync_data()?;
                // Others go on between the sync and what is said of it.
                (0..meanwhile).try_for_each(|_| self.step()).map_err(std::io::Error::other)
            }),
        };
        match flushed {
            Ok(()) => self.model.flushed(&acknowledged),
            // What an image that failed still holds is known when the host has started again.
            Err(_) if fails => return self.crash(End::Everything),
            Err(error) => return Err(error.to_string()),
        }
        self.storage.fail_sync_after(NEVER);
        Ok(())
    }

    /// The image first, then what the file says of it, whose blocks were stable before.
    fn flush_server(&mut self, mistake: Option<Mistake>) -> Result<(), String> {
        let acknowledged = self.model.acknowledged();
        // Its guest is told, and nobody knows what the server still has.
        if self.untold || !self.is_stable(self.refused) {
            return self.crash(End::Everything);
        }
        let meanwhile = self.dice(6);
        (0..meanwhile).try_for_each(|_| self.step())?;
        let fails = self.dice(12) == 0 && mistake.is_none();
        if fails {
            let syncs = self.dice(3);
            self.storage.fail_sync_after(syncs);
        }
        let settled = match mistake {
            Some(Mistake::FlushWithoutFile) => Ok(()),
            _ => self.file.settle(|| Ok(())),
        };
        self.storage.fail_sync_after(NEVER);
        match settled {
            Ok(()) => self.model.flushed(&acknowledged),
            Err(_) if fails => return self.crash(End::Everything),
            Err(error) => return Err(error.to_string()),
        }
        Ok(())
    }

    /// What is left of everything that was written.
    fn lose(&mut self, end: End) -> Crash {
        let seed = self.dice(1 << 40);
        // Of a flush that a server refused somebody has to hear: until then it must not go on as if nothing was.
        let end = match end {
            End::Agent if self.untold => End::AgentAndServer,
            End::Host if self.untold => End::Everything,
            end => end,
        };
        let whole = match end {
            End::Agent => {
                self.storage.kill_handles();
                self.image = self.medium().open(Path::new("image")).expect("the image is there");
                return Crash::Killed;
            }
            End::AgentAndServer => false,
            End::Host | End::Everything => true,
        };
        let server = self.server.clone();
        match (whole, &server) {
            (false, Some(server)) => {
                self.storage.kill_handles();
                server.crash(seed);
            }
            (true, Some(_)) if end == End::Host => self.storage.crash(seed),
            (true, Some(server)) => {
                self.storage.crash(seed);
                server.crash(seed + 1);
            }
            // Its own processes leave everything to the kernel.
            (false, None) => self.storage.kill_handles(),
            (true, None) => self.storage.crash(seed),
        }
        self.boot += u8::from(whole);
        self.image = self.medium().open(Path::new("image")).expect("the image is there");
        match (whole, server.is_some()) {
            (true, _) => Crash::PowerLost,
            (false, true) => Crash::ServerLost,
            (false, false) => Crash::Killed,
        }
    }

    fn medium(&self) -> &MemoryStorage {
        self.server.as_ref().unwrap_or(&self.storage)
    }

    fn crash(&mut self, end: End) -> Result<(), String> {
        let crash = self.lose(end);
        self.untold = false;
        if self.server.is_some() {
            // Nobody else knows what the last agent had not flushed.
            self.image.sync_data().map_err(|error| error.to_string())?;
        }
        self.tasks.clear();
        let storage = Arc::new(self.storage.clone());
        let opened = HydrationFile::open(storage, Path::new(FILE), boot(self.boot));
        let file = opened.map_err(|error| error.to_string())?.ok_or("the file is gone")?;
        self.file = Arc::new(file);
        self.missing = Missing::new(SIZE, self.file.missing());
        for n in 0..SECTORS {
            let lacks = self.missing.touches(bytes(&(n..n + 1)));
            let tag = if lacks { of_point(n) } else { get(&*self.image, n) };
            self.model.crashed(crash, n, tag)?;
        }
        Ok(())
    }
}

fn put(image: &dyn StorageFile, sector: u64, tag: Tag) -> std::io::Result<()> {
    let content: Vec<u8> = tag.to_le_bytes().repeat(SECTOR as usize / 4);
    image.write_at(ByteOffset(sector * SECTOR), &content)
}

fn get(image: &dyn StorageFile, sector: u64) -> Tag {
    let mut content = [0; 4];
    image.read_exact_at(ByteOffset(sector * SECTOR), &mut content).unwrap();
    Tag::from_le_bytes(content)
}

fn random(seed: &mut u64) -> u64 {
    *seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *seed;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
