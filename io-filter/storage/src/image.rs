//! The guest's own image: a raw file or a block device, with the calls a disk needs. It is read and
//! written through the page cache, or directly (`direct.rs`).
//!
//! The image is shared with QEMU by design: an operator may put the plain file back under a running
//! VM at any moment. So it is locked with `flock(2)`, which QEMU's own image locks (open file
//! description locks of `fcntl(2)`) do not conflict with on local file systems. (On NFS they would.) On a
//! block device the same lock keeps udev from probing it.

mod direct;
mod holes;
mod transfer;

use std::{
    fs::{File, Metadata, OpenOptions},
    io,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
    sync::atomic::AtomicBool,
};

use backtide_units::{ByteCount, ByteOffset, ByteRange};
use rustix::{
    fs::{FlockOperation, OFlags, SeekFrom},
    io::Errno,
};

pub use self::{direct::Alignment, holes::tells_holes, transfer::Wrote};
use crate::buffer::BufferPool;

/// An image opened for reading and writing.
#[derive(Debug)]
pub struct ImageFile {
    file: File,
    path: PathBuf,
    size: ByteCount,
    is_device: bool,
    /// With direct I/O, what it has to be multiples of.
    direct: Option<Alignment>,
    /// Whether a write that is stable by its flag is so too when it ends later.
    keeps_flag: bool,
    /// What zeroes without writing them has to be multiples of, in bytes.
    zero_block: u64,
    /// Whether a write of one call is stable by its flag (`RWF_DSYNC`). Otherwise the file has to be synced after it.
    syncs_ranges: bool,
    /// Whether its holes are holes; a device has none.
    tells_holes: bool,
    /// Whether the file system has said that it cannot tell whether a write would wait.
    cannot_tell: AtomicBool,
    buffers: BufferPool,
}

/// Whether the page cache of the host is used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Cache {
    /// Reads and writes go through it.
    #[default]
    Writeback,
    /// They go around it, to the device.
    Direct,
}

/// How an image is opened.
#[derive(Clone, Copy, Debug, Default)]
pub struct Opening {
    /// Whether the page cache is used.
    pub cache: Cache,
    /// With direct I/O: the image is taken to have blocks of at least so many bytes; a power of two. 0:
    /// those it has.
    pub block_min: u32,
}

/// Why an image cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// It is not there.
    #[error("there is no image {}", path.display())]
    Missing {
        /// Which.
        path: PathBuf,
    },
    /// A directory, a socket, ...
    #[error("{} is neither a regular file nor a block device", path.display())]
    Kind {
        /// Which.
        path: PathBuf,
    },
    /// Another agent has it, or a restore, or who looks at a device.
    #[error("{} is locked by {}: {}", path.display(), by.as_deref().unwrap_or("another process"), locked_for(*is_shared))]
    Locked {
        /// Which.
        path: PathBuf,
        /// The process, when the system tells.
        by: Option<String>,
        /// The lock is one that many can have at a time.
        is_shared: bool,
    },
    /// Its size cannot be a disk's.
    #[error("{} has {size} bytes, which is not a positive multiple of 512", path.display())]
    Size {
        /// Which.
        path: PathBuf,
        /// Its size.
        size: ByteCount,
    },
    /// There is no way around the page cache.
    #[error("{} does not take direct I/O: its file system has only its page cache", path.display())]
    NotDirect {
        /// Which.
        path: PathBuf,
    },
    /// Direct I/O would need what cannot be served.
    #[error("direct I/O to {} needs blocks of {} and memory aligned to {} bytes, and at most 4096 can be served", path.display(), alignment.block, alignment.memory)]
    Alignment {
        /// Which.
        path: PathBuf,
        /// What it needs.
        alignment: Alignment,
    },
    /// The last block of it is not whole.
    #[error("{} has {size} bytes, which is not a multiple of the {block} that direct I/O to it needs", path.display())]
    Blocks {
        /// Which.
        path: PathBuf,
        /// Its size.
        size: ByteCount,
        /// Bytes of a block.
        block: u32,
    },
    /// The operating system refused.
    #[error("cannot open {}: {source}", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

fn locked_for(is_shared: bool) -> &'static str {
    match is_shared {
        false => "another agent protects it, or a restore writes to it",
        true => {
            "it shares the lock, as udev does while it looks at a device, or an agent with a loop device over the file"
        }
    }
}

/// The unit disk sizes are multiples of.
const SECTOR_BYTES: u64 = 512;

/// How often an image is opened again whose name is given to another file meanwhile.
const LOOKS_MAX: usize = 8;

impl ImageFile {
    /// Opens and locks an image, to be used through the page cache.
    ///
    /// # Errors
    /// See [`ImageError`].
    pub fn open(path: &Path) -> Result<Self, ImageError> {
        Self::open_with(path, Opening::default())
    }

    /// Opens and locks an image.
    ///
    /// # Errors
    /// See [`ImageError`].
    pub fn open_with(path: &Path, opening: Opening) -> Result<Self, ImageError> {
        let path = path.to_path_buf();
        let io = |source: io::Error| match source.kind() {
            io::ErrorKind::NotFound => ImageError::Missing { path: path.clone() },
            _ => ImageError::Io { path: path.clone(), source },
        };
        let kind = std::fs::metadata(&path).map_err(io)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(ImageError::Kind { path });
        }
        let is_direct = opening.cache == Cache::Direct;
        let flags = if is_direct { OFlags::DIRECT } else { OFlags::empty() };
        let file = open_locked(&path, flags)?;
        // The end is the size of files and of block devices alike.
        let size = rustix::fs::seek(&file, SeekFrom::End(0)).map_err(|errno| io(errno.into()))?;
        let size = ByteCount(size);
        if size.is_zero() || !size.0.is_multiple_of(SECTOR_BYTES) {
            return Err(ImageError::Size { path, size });
        }
        let is_device = kind.is_block_device();
        let direct = match is_direct {
            true => Some(alignment(&file, &path, size, is_device, opening.block_min)?),
            false => None,
        };
        let syncs_ranges = is_device || rustix::fs::fstatfs(&file).is_ok_and(|found| syncs_ranges(&found));
        let keeps_flag = match is_direct {
            true => direct::keeps_flag(&file, is_device),
            false => syncs_ranges,
        };
        let zero_block = if is_device { rustix::fs::ioctl_blksszget(&file).unwrap_or(1) } else { 1 };
        let tells_holes = !is_device && tells_holes(&file);
        Ok(Self {
            file,
            path,
            size,
            is_device,
            direct,
            keeps_flag,
            tells_holes,
            zero_block: zero_block.into(),
            syncs_ranges,
            cannot_tell: AtomicBool::new(false),
            buffers: BufferPool::default(),
        })
    }

    /// Whether a QEMU has the image open to write it, past whoever has it here. As far as its locks tell.
    ///
    /// # Errors
    /// The operating system's: nothing is known of who is there.
    pub fn is_written_by_qemu(&self) -> io::Result<bool> {
        crate::qemu_lock::is_written_by_qemu(&self.file)
    }

    /// Gives the lock up before the file is closed.
    ///
    /// # Errors
    /// The operating system's.
    pub fn unlock(&self) -> io::Result<()> {
        Ok(rustix::fs::flock(&self.file, FlockOperation::Unlock)?)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// With direct I/O, what it has to be multiples of.
    pub fn alignment(&self) -> Option<Alignment> {
        self.direct
    }

    /// Whether a write of an io_uring is stable by its flag. Otherwise it has to be synced when it has ended.
    pub(crate) fn keeps_flag(&self) -> bool {
        self.keeps_flag
    }

    /// The memory its I/O is done in.
    pub fn buffers(&self) -> &BufferPool {
        &self.buffers
    }

    /// Its size when it was opened.
    pub fn size(&self) -> ByteCount {
        self.size
    }

    /// Its size by now: somebody may have cut it short, or the device.
    ///
    /// # Errors
    /// The operating system's.
    pub fn size_now(&self) -> io::Result<ByteCount> {
        Ok(ByteCount(rustix::fs::seek(&self.file, SeekFrom::End(0))?))
    }

    /// What the system tells of the file that is open, wherever its path leads by now.
    ///
    /// # Errors
    /// The operating system's.
    pub fn metadata(&self) -> io::Result<Metadata> {
        self.file.metadata()
    }

    /// When it was last written, in nanoseconds since the Unix epoch; zero for a device, which
    /// does not tell.
    ///
    /// # Errors
    /// The operating system's.
    pub fn modified_ns(&self) -> io::Result<u64> {
        if self.is_device {
            return Ok(0);
        }
        let since =
            self.file.metadata()?.modified()?.duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        Ok(u64::try_from(since.as_nanos()).unwrap_or(u64::MAX))
    }

    /// Asks for the range to be read ahead, into the page cache.
    pub fn read_ahead(&self, range: ByteRange) {
        if self.direct.is_some() {
            return;
        }
        let Some(length) = std::num::NonZeroU64::new(range.count().0) else { return };
        // Only advice: a file system that cannot take it changes nothing.
        let _ = rustix::fs::fadvise(&self.file, range.start().0, Some(length), rustix::fs::Advice::WillNeed);
    }

    /// Lets the page cache forget what it has of the range and calls clean: the next read comes from the device. After the
    /// system could not write pages out it keeps them, clean, and nobody who reads them learns what the device holds.
    pub fn let_go(&self, range: ByteRange) {
        let Some(length) = std::num::NonZeroU64::new(range.count().0) else { return };
        // Only advice: a file system that cannot take it changes nothing.
        let _ = rustix::fs::fadvise(&self.file, range.start().0, Some(length), rustix::fs::Advice::DontNeed);
    }

    /// The first stretch of `range` that is all data or all hole, and whether it is data.
    /// Where the file system cannot tell, everything is data. None for an empty range.
    ///
    /// # Errors
    /// The operating system's.
    pub fn first_extent(&self, range: ByteRange) -> io::Result<Option<(ByteRange, bool)>> {
        if range.is_empty() {
            return Ok(None);
        }
        let until = |end: u64| {
            ByteRange::between(range.start(), ByteOffset(end.clamp(range.start().0, range.end().0)))
        };
        if !self.tells_holes {
            return Ok(Some((range, true)));
        }
        let data = match rustix::fs::seek(&self.file, SeekFrom::Data(range.start().0)) {
            Ok(offset) => offset,
            Err(Errno::NXIO) => return Ok(Some((range, false))),
            Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok(Some((range, true))),
            Err(errno) => return Err(errno.into()),
        };
        if data > range.start().0 {
            return Ok(Some((until(data), false)));
        }
        let hole = rustix::fs::seek(&self.file, SeekFrom::Hole(range.start().0))?;
        Ok(Some((until(hole.max(range.start().0 + 1)), true)))
    }

    /// The stretches of `range` that may hold data, in order.
    ///
    /// # Errors
    /// The operating system's.
    pub fn allocated(&self, range: ByteRange) -> io::Result<Vec<ByteRange>> {
        let mut found = Vec::new();
        let mut rest = range;
        while let Some((extent, is_data)) = self.first_extent(rest)? {
            if is_data {
                found.push(extent);
            }
            rest = ByteRange::between(extent.end(), range.end());
        }
        Ok(found)
    }
}

impl AsFd for ImageFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Opens and locks what has the name `path`. A restore that replaces a file holds its lock until the name is that
/// of another one: who opened the old one before would have it then, and write to what nobody finds.
fn open_locked(path: &Path, flags: OFlags) -> Result<File, ImageError> {
    let io = |source: io::Error| match source.kind() {
        io::ErrorKind::NotFound => ImageError::Missing { path: path.to_path_buf() },
        // What the system answers to a flag that a file system does not know.
        io::ErrorKind::InvalidInput if flags.contains(OFlags::DIRECT) => {
            ImageError::NotDirect { path: path.to_path_buf() }
        }
        _ => ImageError::Io { path: path.to_path_buf(), source },
    };
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(flags.bits().cast_signed());
    for _ in 0..LOOKS_MAX {
        let file = options.open(path).map_err(io)?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) if has_name(&file, path).map_err(io)? => return Ok(file),
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => {
                let by = lock_owner(&file);
                // Given up again with the file.
                let is_shared = rustix::fs::flock(&file, FlockOperation::NonBlockingLockShared).is_ok();
                return Err(ImageError::Locked { by, path: path.to_path_buf(), is_shared });
            }
            Err(errno) => return Err(io(errno.into())),
        }
    }
    Err(ImageError::Locked { by: None, path: path.to_path_buf(), is_shared: false })
}

/// Whether `path` leads to this file.
fn has_name(file: &File, path: &Path) -> io::Result<bool> {
    let (opened, named) = (file.metadata()?, std::fs::metadata(path)?);
    Ok((opened.dev(), opened.ino()) == (named.dev(), named.ino()))
}

/// The file systems of which it is known that they sync a write that asks for it.
const SYNC_RANGES: [u32; 5] = [
    0xef53,      // ext2, ext3, ext4
    0x5846_5342, // XFS
    0x9123_683e, // Btrfs
    0xf2f5_2010, // F2FS
    0x0102_1994, // tmpfs, which keeps nothing
];

/// Whether a file system syncs a write that asks for it. One of FUSE whose files go around the page cache (`direct_io`)
/// takes `RWF_DSYNC`, tells its server so in a flag that few look at, and syncs nothing; network file systems have such
/// modes too. So it is believed only where it is known.
fn syncs_ranges(found: &rustix::fs::StatFs) -> bool {
    // The kernel's numbers have 32 bits, of which the type on some machines makes a negative one.
    let found = found.f_type as u32;
    SYNC_RANGES.contains(&found)
}

/// What direct I/O to an image of this size has to be multiples of.
fn alignment(
    file: &File,
    path: &Path,
    size: ByteCount,
    is_device: bool,
    block_min: u32,
) -> Result<Alignment, ImageError> {
    let path = path.to_path_buf();
    let found =
        Alignment::of(file, is_device).map_err(|source| ImageError::Io { path: path.clone(), source })?;
    let Some(alignment) = found else { return Err(ImageError::NotDirect { path }) };
    let alignment = alignment.at_least(block_min);
    let block = alignment.block;
    if !alignment.is_usable() {
        return Err(ImageError::Alignment { path, alignment });
    }
    // A write of its last block would make it longer.
    if !size.0.is_multiple_of(block.into()) {
        return Err(ImageError::Blocks { path, size, block });
    }
    Ok(alignment)
}

/// Who holds the lock on `file`, from `/proc/locks`: a help for people, so any trouble is no answer.
pub fn lock_owner(file: &File) -> Option<String> {
    let inode = file.metadata().ok()?.ino().to_string();
    let locks = std::fs::read_to_string("/proc/locks").ok()?;
    let process = locks.lines().find_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let [_, "FLOCK", _, _, process, place, ..] = fields[..] else { return None };
        (place.rsplit(':').next() == Some(&inode)).then(|| process.to_owned())
    })?;
    Some(match std::fs::read_to_string(format!("/proc/{process}/comm")) {
        Ok(name) => format!("process {process} ({})", name.trim()),
        Err(_) => format!("process {process}"),
    })
}

#[cfg(test)]
mod tests;
