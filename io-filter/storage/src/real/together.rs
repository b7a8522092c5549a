//! Where and when [`crate::batch`] is as good as a sync of each file, and costs less.
//!
//! - On ext4, from Linux 5.17 on: its sync of a file system flushes the device and waits for the journal, and older
//!   kernels keep failures of the journal to themselves. XFS and btrfs are not known to flush the device then.
//! - A failure of the whole file system is told once, to one call, whosever file it was. So one batch is under way at
//!   a time, and after the first such failure there is no other: each file's own sync is what tells from then on.
//! - It writes what others have written to the same file system as well, and every disk of the batch waits for that.
//!   So it is used only while little waits to be written on the whole machine, and where one took long all the same,
//!   the next comes only after many times as long.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use rustix::fs::{FsWord, StatVfsMountFlags, fstatfs, fstatvfs, syncfs};

use crate::{
    DeviceId, SetSync, Sharing, SyncSet,
    batch::{self, Batch, FileSystem},
};

/// Bytes that wait to be written on the whole machine; with more each file is synced by itself. A disk waits for the
/// others' bytes: 8 MiB take 80 ms on a device that writes 100 MB/s, and many disks that write a little have less.
const DIRTY_BYTES_MAX: u64 = 8 << 20;

/// A batch that takes longer has written what is others', or the device is slow: a few flushes of a disk that turns.
const SLOW: Duration = Duration::from_millis(50);

/// After one that took long there is none for so many times as long: at most 3% of the time is lost to it.
const PAUSE: u32 = 32;

/// What the kernel says of the machine is believed for so long: reading it takes longer than a record.
const LOOK: Duration = Duration::from_millis(20);

/// The first kernel that tells of every failure.
const KERNEL_MIN: (u32, u32) = (5, 17);

/// What `statfs` says of ext4.
const EXT4: FsWord = 0xef53;

/// See the module's description.
pub(super) struct Together {
    /// None where it is not good for it.
    tree: Option<Box<dyn FileSystem + Send + Sync>>,
    /// One batch at a time.
    turn: Mutex<()>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Why there is no other batch.
    never: Option<String>,
    /// None before then.
    pause: Option<Instant>,
    /// When the machine was looked at last, and whether little waited to be written.
    look: Option<(Instant, bool)>,
}

/// The file system of a directory, which was opened before anything in it was written: failures since then are told.
struct Tree {
    root: File,
    path: PathBuf,
    device: DeviceId,
}

impl Together {
    /// For the tree below this directory.
    pub(super) fn of(root: &Path) -> Self {
        let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        let tree = match version(&release) {
            Some(found) if found >= KERNEL_MIN => Tree::open(root),
            Some(_) | None => Err(format!("Linux {} does not tell of every failure", release.trim())),
        };
        match tree {
            Ok(tree) => Self::on(Box::new(tree)),
            Err(never) => Self {
                tree: None,
                turn: Mutex::default(),
                state: Mutex::new(State { never: Some(never), ..State::default() }),
            },
        }
    }

    fn on(tree: Box<dyn FileSystem + Send + Sync>) -> Self {
        Self { tree: Some(tree), turn: Mutex::default(), state: Mutex::default() }
    }

    /// Whether it is good for it, and costs less than to sync several files.
    pub(super) fn sharing(&self) -> Sharing {
        let mut state = self.state();
        let now = Instant::now();
        if let Some(why) = &state.never {
            return Sharing::Never(why.clone());
        }
        if state.pause.is_some_and(|until| now < until) {
            return Sharing::NotNow("a sync of the whole file system took long");
        }
        let calm = match state.look {
            Some((at, calm)) if now.saturating_duration_since(at) < LOOK => calm,
            Some(_) | None => {
                let text = fs::read_to_string("/proc/meminfo").ok();
                let calm =
                    text.and_then(|text| dirty_bytes(&text)).is_some_and(|dirty| dirty <= DIRTY_BYTES_MAX);
                state.look = Some((now, calm));
                calm
            }
        };
        if calm {
            Sharing::Cheap
        } else {
            Sharing::NotNow("more than 8 MiB wait to be written on this machine")
        }
    }

    /// Syncs, as far as that can be shared.
    pub(super) fn sync(&self, sets: &[SyncSet<'_>]) -> Vec<SetSync> {
        let Some(tree) = &self.tree else { return Batch::apart(sets).sets };
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        // Whoever was before may have been told of a failure that was ours.
        if self.state().never.is_some() {
            return Batch::apart(sets).sets;
        }
        let begun = Instant::now();
        let Batch { sets, unsound } = batch::sync(&**tree, sets);
        self.note(begun.elapsed(), unsound);
        sets
    }

    /// Takes note of how long one took, and whether it was the last.
    fn note(&self, took: Duration, unsound: Option<String>) {
        let mut state = self.state();
        if took > SLOW {
            state.pause = Instant::now().checked_add(took * PAUSE);
        }
        if unsound.is_some() {
            state.never = unsound;
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Tree {
    fn open(root: &Path) -> Result<Self, String> {
        let open = || {
            let opened = File::open(root)?;
            let kind = fstatfs(&opened)?.f_type;
            let device = DeviceId(opened.metadata()?.dev());
            Ok((kind, Self { root: opened, path: root.to_owned(), device }))
        };
        let (kind, tree) =
            open().map_err(|error: io::Error| format!("cannot look at {}: {error}", root.display()))?;
        if kind == EXT4 { Ok(tree) } else { Err(format!("{} is not on ext4", root.display())) }
    }
}

impl FileSystem for Tree {
    fn device(&self) -> DeviceId {
        self.device
    }

    fn device_of(&self, directory: &Path) -> io::Result<DeviceId> {
        Ok(DeviceId(fs::metadata(self.path.join(directory))?.dev()))
    }

    fn sync(&self) -> io::Result<()> {
        Ok(syncfs(&self.root)?)
    }

    fn is_read_only(&self) -> io::Result<bool> {
        Ok(fstatvfs(&self.root)?.f_flag.contains(StatVfsMountFlags::RDONLY))
    }
}

/// The first two numbers of a kernel's release.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

/// Bytes that wait to be written, or are being written, by the text of `/proc/meminfo`.
fn dirty_bytes(meminfo: &str) -> Option<u64> {
    let kib = |name: &str| -> Option<u64> {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(name))?;
        line.split_whitespace().next()?.parse().ok()
    };
    Some((kib("Dirty:")? + kib("Writeback:")?) << 10)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{MemoryStorage, Storage};

    #[test]
    fn after_a_failure_each_file_is_synced_by_itself_for_good() {
        let storage = MemoryStorage::new();
        let together = Together::on(Box::new(storage.clone()));
        let files = [storage.create_new(Path::new("f")).expect("create")];
        let set = [SyncSet { files: &files, directory: None }];
        assert!(matches!(together.sync(&set)[..], [SetSync::Durable]));
        storage.fail_sync_after(0);
        assert!(matches!(together.sync(&set)[..], [SetSync::Apart]));
        let before = storage.counts();
        assert!(matches!(together.sync(&set)[..], [SetSync::Apart]));
        assert_eq!(storage.counts(), before, "the kernel has told of the failure, and will not again");
        let Sharing::Never(why) = together.sharing() else { panic!("it is over") };
        assert!(why.contains("a sync of the file system failed"), "{why}");
    }

    #[test]
    fn one_that_took_long_is_not_followed_soon() {
        let together = Together::on(Box::new(MemoryStorage::new()));
        let pauses = || together.sharing() == Sharing::NotNow("a sync of the whole file system took long");
        together.note(SLOW, None);
        assert!(!pauses());
        together.note(Duration::from_secs(3600), None);
        assert!(pauses());
    }

    #[test]
    fn where_it_is_not_good_it_says_why() {
        // Never ext4, and always there.
        let Sharing::Never(why) = Together::of(Path::new("/proc")).sharing() else {
            panic!("proc is no ext4")
        };
        assert_eq!(why, "/proc is not on ext4");
        let Sharing::Never(why) = Together::of(Path::new("/proc/none")).sharing() else {
            panic!("nothing is there")
        };
        assert!(why.starts_with("cannot look at /proc/none"), "{why}");
    }

    #[test]
    fn what_the_kernel_says_is_understood() {
        assert_eq!(version("6.18.44-fc-v657\n"), Some((6, 18)));
        assert_eq!(version("5.17.0"), Some((5, 17)));
        assert_eq!(version("5.4-rc1"), Some((5, 4)));
        assert_eq!(version("what"), None);
        let text =
            "MemTotal: 1 kB\nDirty:              2048 kB\nWriteback:             1 kB\nWritebackTmp: 9 kB\n";
        assert_eq!(dirty_bytes(text), Some(2049 << 10));
        assert_eq!(dirty_bytes("Dirty: 1 kB\n"), None);
        assert!(dirty_bytes(&fs::read_to_string("/proc/meminfo").expect("read it")).is_some());
    }
}
