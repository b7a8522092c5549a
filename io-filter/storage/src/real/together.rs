//! One flush for many files: `syncfs` of the file system that a tree is on.
//!
//! A sync of one file commits the file system's journal and flushes the device, so a thousand disks that write a
//! little each cost a thousand of both, when one would do for all of them.
//!
//! What makes it as good as a sync of each file:
//! - It is used where it is known to write everything and to tell of every failure: ext4, XFS and btrfs, from Linux
//!   5.17 on. Older kernels keep failures of the journal to themselves, other file systems those of a file.
//! - A failure is told once, to one call, whosever file it was. So one call is under way at a time, and after the first
//!   failure there is no other: the kernel keeps the failures of each open file too, and its own sync tells of them.
//! - It writes what others have written to the same file system as well. So it is used only while little waits to be
//!   written on the whole machine: what a call may have to write is bounded by that. Where one took long all the same,
//!   the next comes only after many times as long.

use std::{
    fs::{self, File},
    path::Path,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use rustix::fs::{FsWord, fstatfs, syncfs};

/// Bytes that wait to be written on the whole machine; with more each file is synced by itself.
const DIRTY_BYTES_MAX: u64 = 64 << 20;

/// A call that takes longer has written what is others'.
const SLOW: Duration = Duration::from_millis(250);

/// After one that took long there is none for so many times as long.
const PAUSE: u32 = 32;

/// The first kernel that tells of every failure.
const KERNEL_MIN: (u32, u32) = (5, 17);

/// What `statfs` says of file systems that are known to be good for it: ext4, XFS, btrfs.
const KINDS: [FsWord; 3] = [0xef53, 0x5846_5342, 0x9123_683e];

/// See the module's description.
pub(super) struct Together {
    /// The tree's root, opened before anything in it was written: failures since then are told. None where it is not
    /// good for it.
    root: Option<File>,
    turn: Mutex<()>,
    /// None before then.
    pause: Mutex<Option<Instant>>,
    /// A call has failed.
    failed: AtomicBool,
}

impl Together {
    /// For the tree below this directory.
    pub(super) fn of(root: &Path) -> Self {
        let opened =
            File::open(root).ok().filter(|file| fstatfs(file).is_ok_and(|stat| KINDS.contains(&stat.f_type)));
        let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        let root = opened.filter(|_| version(&release).is_some_and(|found| found >= KERNEL_MIN));
        Self { root, turn: Mutex::default(), pause: Mutex::default(), failed: AtomicBool::new(false) }
    }

    /// Whether it costs less than to sync several files.
    pub(super) fn is_cheap(&self) -> bool {
        self.is_sound()
            && !self.pauses()
            && fs::read_to_string("/proc/meminfo")
                .ok()
                .and_then(|text| dirty_bytes(&text))
                .is_some_and(|dirty| dirty <= DIRTY_BYTES_MAX)
    }

    /// Syncs; false when each file has to be synced by itself.
    pub(super) fn sync(&self) -> bool {
        self.sync_by(|root| syncfs(root).map_err(Into::into))
    }

    fn sync_by(&self, sync: impl FnOnce(&File) -> std::io::Result<()>) -> bool {
        let Some(root) = &self.root else { return false };
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        // Whoever was before may have been told of a failure that was ours.
        if !self.is_sound() {
            return false;
        }
        let begun = Instant::now();
        let synced = sync(root);
        self.note(begun.elapsed());
        self.failed.fetch_or(synced.is_err(), Ordering::AcqRel);
        synced.is_ok()
    }

    /// Takes note of how long one took.
    fn note(&self, took: Duration) {
        if took > SLOW {
            *self.pause.lock().unwrap_or_else(PoisonError::into_inner) =
                Instant::now().checked_add(took * PAUSE);
        }
    }

    fn pauses(&self) -> bool {
        let until = *self.pause.lock().unwrap_or_else(PoisonError::into_inner);
        until.is_some_and(|until| Instant::now() < until)
    }

    fn is_sound(&self) -> bool {
        self.root.is_some() && !self.failed.load(Ordering::Acquire)
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

    #[test]
    fn after_a_failure_each_file_is_synced_by_itself_for_good() {
        let dir = tempfile::tempdir().expect("a directory");
        let root = Some(File::open(dir.path()).expect("open it"));
        let together = Together {
            root,
            turn: Mutex::default(),
            pause: Mutex::default(),
            failed: AtomicBool::new(false),
        };
        assert!(together.sync_by(|_| Ok(())));
        assert!(!together.sync_by(|_| Err(std::io::ErrorKind::StorageFull.into())));
        assert!(!together.sync_by(|_| panic!("the kernel has told of the failure, and will not again")));
        assert!(!together.is_cheap());
    }

    #[test]
    fn one_that_took_long_is_not_followed_soon() {
        let dir = tempfile::tempdir().expect("a directory");
        let together = Together::of(dir.path());
        together.note(SLOW);
        assert!(!together.pauses());
        together.note(Duration::from_secs(3600));
        assert!(together.pauses() && !together.is_cheap());
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
