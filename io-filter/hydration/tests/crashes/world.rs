//! A disk that lacks blocks, driven one step at a time.

use std::{ops::Range, path::Path, sync::Arc};

use backtide_hydration::{ChangeId, FetchId, Header, HydrationFile, Kind, Missing, Need, SourcePoint};
use backtide_storage::{MemoryStorage, Storage, StorageFile};
use backtide_tracking::DirtyBitmap;
use backtide_units::{
    BlockCount, BlockIndex, BlockRange, ByteCount, ByteOffset, ByteRange, CaptureTime, DiskId, Epoch,
    HistoryId, Lsn,
};
use uuid::Uuid;

use crate::model::{Crash, Model, Tag, of_point, stale};

const SECTOR: u64 = 512;
const IN_BLOCK: u64 = 4096 / SECTOR;
/// The last block is a short one.
const SECTORS: u64 = 30 * IN_BLOCK - 3;
const SIZE: ByteCount = ByteCount(SECTORS * SECTOR);
const STEPS: u64 = 400;
const FILE: &str = "vm1.hydration";

/// What a driver must not do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mistake {
    /// Blocks are called durable although the image was not synced.
    DurableBeforeSync,
    /// Blocks are called present before the image has them.
    PresentBeforeWrite,
    /// A flush syncs the image, and nothing says so in the file.
    FlushWithoutFile,
    /// What was fetched is stored over what a guest wrote meanwhile.
    FetchOverWrite,
    /// A guest is answered before its blocks are called present.
    AnsweredBeforePresent,
}

impl Mistake {
    pub(crate) const ALL: [Self; 5] = [
        Self::DurableBeforeSync,
        Self::PresentBeforeWrite,
        Self::FlushWithoutFile,
        Self::FetchOverWrite,
        Self::AnsweredBeforePresent,
    ];
}

enum Task {
    Write { sectors: Range<u64>, tag: Tag, change: Option<ChangeId>, steps: u32 },
    Fetch { id: FetchId, blocks: BlockRange, store: Vec<BlockRange>, steps: u32 },
}

pub(crate) struct World {
    seed: u64,
    mistake: Option<Mistake>,
    storage: MemoryStorage,
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
        let image = storage.create_new(Path::new("image")).unwrap();
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
        storage.sync_dir(Path::new("")).unwrap();
        let shared = Arc::new(storage.clone());
        let file = HydrationFile::create(shared, Path::new(FILE), header(), lacking.clone()).unwrap();
        Self {
            seed: world_seed,
            mistake,
            storage,
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
                18 if self.dice(3) == 0 => self.crash(Crash::Killed)?,
                18 => {}
                _ if self.dice(4) == 0 => self.crash(Crash::PowerLost)?,
                _ => {}
            }
        }
        while !self.missing.is_empty() || !self.tasks.is_empty() {
            self.begin_fetch();
            self.step()?;
        }
        let acknowledged = self.model.acknowledged();
        self.file.finish(|| self.image.sync_data(), || Ok(())).map_err(|error| error.to_string())?;
        self.model.flushed(&acknowledged);
        let seed = self.dice(1 << 40);
        self.storage.crash(seed);
        self.image = self.storage.open(Path::new("image")).unwrap();
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
        self.tasks.push(Task::Write { sectors: range, tag, change, steps: 0 });
    }

    fn begin_needed(&mut self, need: Need) {
        let Need::Wait(fetch) = need else { panic!("nothing is damaged here") };
        for blocks in fetch {
            let id = self.missing.begin_fetch(blocks);
            self.tasks.push(Task::Fetch { id, blocks, store: Vec::new(), steps: 0 });
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
            Task::Write { sectors, tag, change, steps } => self.step_write(sectors, tag, change, steps),
            Task::Fetch { id, blocks, store, steps } => self.step_fetch(id, blocks, store, steps),
        };
        self.tasks.extend(next.map_err(|error| error.to_string())?);
        Ok(())
    }

    fn step_write(
        &mut self,
        sectors: Range<u64>,
        tag: Tag,
        change: Option<ChangeId>,
        steps: u32,
    ) -> std::io::Result<Option<Task>> {
        let early = [Some(Mistake::PresentBeforeWrite), Some(Mistake::AnsweredBeforePresent)];
        let middle = (sectors.start + sectors.end) / 2;
        match (steps, change) {
            (0, Some(change)) if self.mistake == early[0] => {
                self.file.present(self.missing.overwritten(change))?;
            }
            (1, _) => (sectors.start..middle).try_for_each(|n| put(&*self.image, n, tag))?,
            (2, _) => (middle..sectors.end).try_for_each(|n| put(&*self.image, n, tag))?,
            (3, _) if self.mistake == early[1] => self.model.acknowledge(sectors.clone()),
            (4, Some(change)) if self.mistake != early[0] => {
                self.file.present(self.missing.overwritten(change))?;
            }
            (5, change) => {
                if let Some(change) = change {
                    self.missing.end_change(change, true);
                }
                self.model.acknowledge(sectors);
                return Ok(None);
            }
            _ => {}
        }
        Ok(Some(Task::Write { sectors, tag, change, steps: steps + 1 }))
    }

    fn step_fetch(
        &mut self,
        id: FetchId,
        blocks: BlockRange,
        mut store: Vec<BlockRange>,
        steps: u32,
    ) -> std::io::Result<Option<Task>> {
        match steps {
            1 => {
                store = self.missing.end_fetch(id, true);
                if store.is_empty() {
                    return Ok(None);
                }
            }
            2 => {
                let all = vec![blocks];
                let written = if self.mistake == Some(Mistake::FetchOverWrite) { &all } else { &store };
                for n in written.iter().flat_map(|run| sectors(*run)) {
                    put(&*self.image, n, of_point(n))?;
                }
            }
            3 => self.file.present(&store)?,
            4 => {
                self.missing.end_store(id, true);
                return Ok(None);
            }
            _ => {}
        }
        Ok(Some(Task::Fetch { id, blocks, store, steps: steps + 1 }))
    }

    fn flush(&mut self, mistake: Option<Mistake>) -> Result<(), String> {
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
            Err(_) if fails => return self.crash(Crash::PowerLost),
            Err(error) => return Err(error.to_string()),
        }
        self.storage.fail_sync_after(u64::MAX / 2);
        Ok(())
    }

    fn crash(&mut self, crash: Crash) -> Result<(), String> {
        match crash {
            Crash::Killed => self.storage.kill_handles(),
            Crash::PowerLost => {
                let seed = self.dice(1 << 40);
                self.storage.crash(seed);
                self.boot += 1;
            }
        }
        self.tasks.clear();
        self.image = self.storage.open(Path::new("image")).map_err(|error| error.to_string())?;
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
