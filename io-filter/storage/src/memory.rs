//! The seam in memory, with power cuts and failing devices.
//!
//! The fault model, which is everything a power cut may do:
//! - A file's content is kept in sectors of 512 bytes, written whole or not at all. A sector written
//!   since the file's last successful `sync_data` holds, after the cut, any one of the contents it
//!   had since then, chosen by the seed for each sector alone: writes are lost, torn, reordered.
//! - A file's length is any one it had since the last sync; bytes that were never kept read as zeros.
//! - Of the names created, renamed or removed in a directory since its last `sync_dir`, a prefix
//!   chosen by the seed survives. Directories themselves survive.
//! - A `sync_data` that fails leaves its sectors as they were; a later one that succeeds does *not*
//!   make them durable unless they are written again.
//! - Handles from before the cut fail for ever.
//! - A sync of the whole file system, where it is allowed, is all or nothing, and reaches no file that was put on
//!   another one.
//!
//! Also: the power can fail at the n-th operation that changes something (the operation may have
//! happened in part; every later one fails), the n-th write or sync can fail alone, space can run out
//! after so many bytes, a bit can be flipped anywhere, and a place can become unreadable until it is written
//! whole. Everything follows from the seeds given:
//! the same calls with the same seeds give the same content.

mod content;
mod files;
mod names;
#[cfg(test)]
mod tests;

use std::{
    collections::BTreeSet,
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use backtide_units::{ByteCount, ByteOffset, ByteRange};

use crate::{
    DeviceId, SetSync, Sharing, Storage, StorageFile, SyncSet,
    batch::{self, Batch, FileSystem},
};
use content::Content;
use files::{EIO, MemoryFile};
use names::Names;

/// The file system that everything is on, and another one.
const HERE: DeviceId = DeviceId(0);
const ELSEWHERE: DeviceId = DeviceId(1);

/// A directory tree in memory. Clones are the same tree.
#[derive(Clone, Default)]
pub struct MemoryStorage {
    world: Arc<Mutex<World>>,
}

/// Everything the storage knows, behind one lock.
#[derive(Default)]
struct World {
    names: Names,
    files: Vec<Content>,
    /// Counts power cuts: a handle of an earlier generation is dead.
    generation: u64,
    powered_off: bool,
    operations: u64,
    cut_at: Option<u64>,
    writes: u64,
    fail_write: Option<u64>,
    syncs: u64,
    fail_sync: Option<u64>,
    capacity: Option<ByteCount>,
    shares_syncs: bool,
    read_only: bool,
    /// Files on another file system.
    elsewhere: BTreeSet<usize>,
    unreadable: Option<Unreadable>,
}

/// A place that cannot be read.
#[derive(Clone, Copy)]
struct Unreadable {
    file: usize,
    range: ByteRange,
    errno: i32,
    /// Reads that fail still.
    times: u64,
}

/// How many operations a storage has done: where a test can put the next fault.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OperationCounts {
    /// Operations that change something: writes, syncs, names, lengths.
    pub changes: u64,
    /// Writes to files.
    pub writes: u64,
    /// Syncs of files and directories.
    pub syncs: u64,
}

impl MemoryStorage {
    /// An empty tree.
    pub fn new() -> Self {
        Self::default()
    }

    fn world(&self) -> MutexGuard<'_, World> {
        self.world.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Cuts the power and switches it on again: what was not durable is kept or lost by `seed`.
    pub fn crash(&self, seed: u64) {
        let mut world = self.world();
        let mut random = Random::new(seed);
        world.names.crash(&mut random);
        for content in &mut world.files {
            content.crash(&mut random);
        }
        world.generation += 1;
        world.powered_off = false;
        world.cut_at = None;
        world.fail_write = None;
        world.fail_sync = None;
    }

    /// Lets handles of now fail, as when the process ends, and keeps everything written.
    pub fn kill_handles(&self) {
        self.world().generation += 1;
    }

    /// Cuts the power at the n-th changing operation from now (0 = the next).
    /// Call [`MemoryStorage::crash`] to switch it on again.
    pub fn cut_power_after(&self, changes: u64) {
        let mut world = self.world();
        world.cut_at = Some(world.operations + changes);
    }

    /// Switches the power on again with nothing lost: it was no power cut but a device that failed for a while. Handles
    /// stay as they are.
    pub fn answer_again(&self) {
        let mut world = self.world();
        world.powered_off = false;
        world.cut_at = None;
    }

    /// Whether the power is off.
    pub fn is_off(&self) -> bool {
        self.world().powered_off
    }

    /// Lets the n-th write from now (0 = the next) fail, having written some of it.
    pub fn fail_write_after(&self, writes: u64) {
        let mut world = self.world();
        world.fail_write = Some(world.writes + writes);
    }

    /// Lets the n-th sync from now (0 = the next) fail.
    pub fn fail_sync_after(&self, syncs: u64) {
        let mut world = self.world();
        world.fail_sync = Some(world.syncs + syncs);
    }

    /// Whether the whole tree can be synced at once. It ends with the first such sync that fails: after it each file
    /// that was not durable has lost what was written, and its own sync says so, once.
    pub fn share_syncs(&self, shares: bool) {
        self.world().shares_syncs = shares;
    }

    /// Lets the next attempt to write a file out fail, for that file alone.
    ///
    /// # Panics
    /// When there is no such file: the test names the wrong one.
    pub fn fail_write_out(&self, path: &Path) {
        let mut world = self.world();
        let file = world.names.find(path).expect("the file to fail exists");
        world.files[file].fail_next_sync();
    }

    /// Puts a file on another file system.
    ///
    /// # Panics
    /// When there is no such file: the test names the wrong one.
    pub fn put_elsewhere(&self, path: &Path) {
        let mut world = self.world();
        let file = world.names.find(path).expect("the file to put elsewhere exists");
        world.elsewhere.insert(file);
    }

    /// The file system gives up: a sync of all of it does nothing from now on and says that it went well, as the
    /// kernel's does, and each file's own fails.
    pub fn become_read_only(&self) {
        self.world().read_only = true;
    }

    /// Sets the size of the whole file system; `None` is without limit.
    pub fn set_capacity(&self, capacity: Option<ByteCount>) {
        self.world().capacity = capacity;
    }

    /// Bytes that files take: their length, or what is allocated when that is more.
    pub fn used(&self) -> ByteCount {
        self.world().used()
    }

    /// Another tree with what is visible in this one now, as a copy of the directory has it: all of it durable,
    /// no faults planned, no handles open.
    pub fn copy(&self) -> Self {
        let world = self.world();
        let files = world.files.iter().map(Content::copy).collect();
        let copy = World { names: world.names.copy(), files, ..World::default() };
        Self { world: Arc::new(Mutex::new(copy)) }
    }

    /// What has been done so far.
    pub fn counts(&self) -> OperationCounts {
        let world = self.world();
        OperationCounts { changes: world.operations, writes: world.writes, syncs: world.syncs }
    }

    /// Flips one bit of a file (`bit` of 0 to 7), durably. Nothing happens beyond its end.
    ///
    /// # Panics
    /// When there is no such file: the test names the wrong one.
    pub fn flip_bit(&self, path: &Path, offset: ByteOffset, bit: u32) {
        let mut world = self.world();
        let file = world.names.find(path).expect("the file to damage exists");
        world.files[file].flip_bit(offset.0, bit);
    }

    /// Lets every read that touches `range` of a file fail with `EIO`, as a bad sector does, until all of it is
    /// written again. There is one such place at a time.
    ///
    /// # Panics
    /// When there is no such file: the test names the wrong one.
    pub fn make_unreadable(&self, path: &Path, range: ByteRange) {
        self.fail_reads(path, range, EIO);
    }

    /// The same with another error.
    ///
    /// # Panics
    /// When there is no such file: the test names the wrong one.
    pub fn fail_reads(&self, path: &Path, range: ByteRange, errno: i32) {
        self.fail_reads_times(path, range, errno, u64::MAX);
    }

    /// The same for so many reads, as of a device that is away for a moment.
    ///
    /// # Panics
    /// When there is no such file: the test names the wrong one.
    pub fn fail_reads_times(&self, path: &Path, range: ByteRange, errno: i32, times: u64) {
        let mut world = self.world();
        let file = world.names.find(path).expect("the file to damage exists");
        world.unreadable = Some(Unreadable { file, range, errno, times });
    }

    /// All files, as they are visible now, for a test to look at or copy.
    pub fn files(&self) -> Vec<(PathBuf, Vec<u8>)> {
        let world = self.world();
        world.names.all().into_iter().map(|(path, file)| (path, world.files[file].to_vec())).collect()
    }
}

impl World {
    /// Counts an operation that changes something. The one at which the power fails is told so
    /// (`Ok(true)`): it may take effect, in part, and must then return [`power_off`].
    fn change(&mut self) -> io::Result<bool> {
        self.alive()?;
        let cut = self.cut_at == Some(self.operations);
        self.operations += 1;
        self.powered_off |= cut;
        Ok(cut)
    }

    fn alive(&self) -> io::Result<()> {
        if self.powered_off { Err(power_off()) } else { Ok(()) }
    }

    fn sync_fails(&mut self) -> bool {
        let fails = self.fail_sync == Some(self.syncs);
        self.syncs += 1;
        fails
    }

    /// What a read of `length` bytes of a file meets when a bad sector is among them.
    fn bad_sector(&mut self, file: usize, offset: ByteOffset, length: usize) -> Option<io::Error> {
        let read = ByteRange::between(offset, ByteOffset(offset.0 + length as u64));
        let met = |bad: &Unreadable| bad.file == file && bad.range.intersection(read).is_some();
        let bad = self.unreadable.as_mut().filter(|bad| met(bad))?;
        bad.times = bad.times.checked_sub(1)?;
        Some(io::Error::from_raw_os_error(bad.errno))
    }

    /// A sector that is written whole can be read again.
    fn heal(&mut self, file: usize, offset: ByteOffset, length: usize) {
        let written = ByteRange::between(offset, ByteOffset(offset.0 + length as u64));
        self.unreadable = self.unreadable.filter(|bad| bad.file != file || !written.contains(bad.range));
    }

    fn used(&self) -> ByteCount {
        let of = |file: usize| self.files[file].space();
        ByteCount(self.names.all().into_iter().map(|(_, file)| of(file)).sum())
    }

    fn free(&self) -> u64 {
        self.capacity.map_or(u64::MAX / 2, |capacity| capacity.0.saturating_sub(self.used().0))
    }
}

fn power_off() -> io::Error {
    io::Error::other("the power is off")
}

impl Storage for MemoryStorage {
    fn create_new(&self, path: &Path) -> io::Result<Arc<dyn StorageFile>> {
        let mut world = self.world();
        let cut = world.change()?;
        let file = world.files.len();
        world.names.create(path, file)?;
        world.files.push(Content::default());
        if cut {
            return Err(power_off());
        }
        Ok(Arc::new(MemoryFile { storage: self.clone(), file, generation: world.generation }))
    }

    fn open(&self, path: &Path) -> io::Result<Arc<dyn StorageFile>> {
        let world = self.world();
        world.alive()?;
        let file = world.names.find(path).ok_or(io::ErrorKind::NotFound)?;
        Ok(Arc::new(MemoryFile { storage: self.clone(), file, generation: world.generation }))
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        let world = self.world();
        world.alive()?;
        world.names.list(dir)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut world = self.world();
        let cut = world.change()?;
        world.names.rename(from, to)?;
        if cut { Err(power_off()) } else { Ok(()) }
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let mut world = self.world();
        let cut = world.change()?;
        world.names.remove(path)?;
        if cut { Err(power_off()) } else { Ok(()) }
    }

    fn create_dir(&self, dir: &Path) -> io::Result<()> {
        let mut world = self.world();
        world.alive()?;
        world.names.create_dir(dir);
        Ok(())
    }

    fn remove_tree(&self, dir: &Path) -> io::Result<()> {
        loop {
            let mut world = self.world();
            // File by file, so that the power can fail between any two of them.
            let Some(path) = world.names.first_below(dir) else {
                world.alive()?;
                world.names.tree_removed(dir);
                return Ok(());
            };
            let cut = world.change()?;
            world.names.remove(&path)?;
            if cut {
                return Err(power_off());
            }
        }
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        let mut world = self.world();
        if world.change()? {
            return Err(power_off());
        }
        if world.sync_fails() {
            return Err(io::Error::other("injected failure of a directory sync"));
        }
        world.names.sync(dir)
    }

    fn shares_syncs(&self) -> Sharing {
        match self.world().shares_syncs {
            true => Sharing::Cheap,
            false => Sharing::Never("it was not asked for, or has failed".to_owned()),
        }
    }

    fn sync_sets(&self, sets: &[SyncSet<'_>]) -> Vec<SetSync> {
        if self.shares_syncs() != Sharing::Cheap {
            return Batch::apart(sets).sets;
        }
        let Batch { sets, unsound } = batch::sync(self, sets);
        if unsound.is_some() {
            self.share_syncs(false);
        }
        sets
    }

    fn free_space(&self) -> io::Result<ByteCount> {
        Ok(ByteCount(self.world().free()))
    }

    fn display(&self, path: &Path) -> PathBuf {
        path.to_owned()
    }
}

impl FileSystem for MemoryStorage {
    fn device(&self) -> DeviceId {
        HERE
    }

    fn device_of(&self, _directory: &Path) -> io::Result<DeviceId> {
        Ok(HERE)
    }

    fn sync(&self) -> io::Result<()> {
        let mut world = self.world();
        if world.change()? {
            return Err(power_off());
        }
        let (fails, read_only) = (world.sync_fails(), world.read_only);
        let World { files, elsewhere, names, .. } = &mut *world;
        for (_, content) in files.iter_mut().enumerate().filter(|(file, _)| !elsewhere.contains(file)) {
            match (fails, read_only) {
                (true, _) => content.fail_next_sync(),
                (false, true) => {}
                (false, false) => content.sync(),
            }
        }
        match (fails, read_only) {
            (true, _) => return Err(io::Error::other("injected failure of a sync")),
            (false, true) => {}
            (false, false) => names.sync_all(),
        }
        Ok(())
    }

    fn is_read_only(&self) -> io::Result<bool> {
        Ok(self.world().read_only)
    }
}

/// SplitMix64: small, seeded, the same everywhere.
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number in `0..=max`.
    fn up_to(&mut self, max: usize) -> usize {
        usize::try_from(self.next() % (max as u64 + 1)).unwrap_or(0)
    }
}
