//! The guest's own image: a raw file or a block device, with the calls a disk needs.
//!
//! The image is shared with QEMU by design: an operator may put the plain file back under a running
//! VM at any moment. So it is locked with `flock(2)`, which QEMU's own image locks (open file
//! description locks of `fcntl(2)`) do not conflict with on local file systems. (On NFS they would.) On a
//! block device the same lock keeps udev from probing it.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::{FileExt, FileTypeExt, MetadataExt},
    path::{Path, PathBuf},
};

use backtide_units::{ByteCount, ByteOffset, ByteRange};
use rustix::{
    fs::{FallocateFlags, FlockOperation, SeekFrom},
    io::{Errno, ReadWriteFlags},
};

/// An image opened for reading and writing.
#[derive(Debug)]
pub struct ImageFile {
    file: File,
    path: PathBuf,
    size: ByteCount,
    is_device: bool,
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
    /// Another agent has it.
    #[error("{} is locked by {}: another agent protects it", path.display(), by.as_deref().unwrap_or("another process"))]
    Locked {
        /// Which.
        path: PathBuf,
        /// The process, when the system tells.
        by: Option<String>,
    },
    /// Its size cannot be a disk's.
    #[error("{} has {size} bytes, which is not a positive multiple of 512", path.display())]
    Size {
        /// Which.
        path: PathBuf,
        /// Its size.
        size: ByteCount,
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

/// The unit disk sizes are multiples of.
const SECTOR_BYTES: u64 = 512;

/// Zeroes are written in pieces of this size where the file system cannot make them.
static ZEROES: [u8; 64 * 1024] = [0; 64 * 1024];

impl ImageFile {
    /// Opens and locks an image.
    ///
    /// # Errors
    /// See [`ImageError`].
    pub fn open(path: &Path) -> Result<Self, ImageError> {
        let path = path.to_path_buf();
        let io = |source: io::Error| match source.kind() {
            io::ErrorKind::NotFound => ImageError::Missing { path: path.clone() },
            _ => ImageError::Io { path: path.clone(), source },
        };
        let kind = std::fs::metadata(&path).map_err(io)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(ImageError::Kind { path });
        }
        let file = OpenOptions::new().read(true).write(true).open(&path).map_err(io)?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => return Err(ImageError::Locked { by: lock_owner(&file), path }),
            Err(errno) => return Err(io(errno.into())),
        }
        // The end is the size of files and of block devices alike.
        let size = rustix::fs::seek(&file, SeekFrom::End(0)).map_err(|errno| io(errno.into()))?;
        let size = ByteCount(size);
        if size.is_zero() || !size.0.is_multiple_of(SECTOR_BYTES) {
            return Err(ImageError::Size { path, size });
        }
        Ok(Self { file, path, size, is_device: kind.is_block_device() })
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

    /// Its size when it was opened.
    pub fn size(&self) -> ByteCount {
        self.size
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

    /// Fills `buffer` from `offset` without waiting for a device, as far as the page cache has it.
    /// Whether it did.
    ///
    /// # Errors
    /// The operating system's.
    pub fn try_read(&self, offset: ByteOffset, buffer: &mut [u8]) -> io::Result<bool> {
        let wanted = buffer.len();
        let mut slices = [io::IoSliceMut::new(buffer)];
        match rustix::io::preadv2(&self.file, &mut slices, offset.0, ReadWriteFlags::NOWAIT) {
            Ok(read) => Ok(read == wanted),
            Err(Errno::AGAIN | Errno::OPNOTSUPP | Errno::INTR | Errno::NOSYS) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Fills `buffer` from `offset`.
    ///
    /// # Errors
    /// The operating system's; also at the end of a file that was cut short.
    pub fn read_at(&self, offset: ByteOffset, buffer: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(buffer, offset.0)
    }

    /// Writes all of `data` at `offset`.
    ///
    /// # Errors
    /// The operating system's.
    pub fn write_at(&self, offset: ByteOffset, data: &[u8]) -> io::Result<()> {
        self.require_inside(offset, ByteCount::of(data))?;
        self.file.write_all_at(data, offset.0)
    }

    /// Makes the range read as zeroes; `may_unmap`: its space may be given back.
    ///
    /// # Errors
    /// The operating system's.
    pub fn zero(&self, range: ByteRange, may_unmap: bool) -> io::Result<()> {
        self.require_inside(range.start(), range.count())?;
        if range.is_empty() {
            return Ok(());
        }
        let how = if may_unmap { FallocateFlags::PUNCH_HOLE } else { FallocateFlags::ZERO_RANGE };
        let flags = how | FallocateFlags::KEEP_SIZE;
        loop {
            match rustix::fs::fallocate(&self.file, flags, range.start().0, range.count().0) {
                Ok(()) => return Ok(()),
                Err(Errno::INTR) => {}
                // Not this file system, or not at this alignment of this device.
                Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL | Errno::NODEV) => {
                    return self.write_zeroes(range);
                }
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// A write beyond the end would grow the file, and the guest's disk has no such place.
    fn require_inside(&self, offset: ByteOffset, count: ByteCount) -> io::Result<()> {
        match offset.checked_add(count) {
            Some(end) if end.0 <= self.size.0 => Ok(()),
            Some(_) | None => Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("{count} bytes at {offset} end beyond the image's {} bytes", self.size),
            )),
        }
    }

    fn write_zeroes(&self, range: ByteRange) -> io::Result<()> {
        for piece in range.split_at_multiples(ByteCount(ZEROES.len() as u64)) {
            let length = usize::try_from(piece.count().0).expect("a piece is small");
            self.file.write_all_at(&ZEROES[..length], piece.start().0)?;
        }
        Ok(())
    }

    /// Everything written so far to stable storage.
    ///
    /// # Errors
    /// The operating system's.
    pub fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// Asks for the range to be read ahead.
    pub fn read_ahead(&self, range: ByteRange) {
        let Some(length) = std::num::NonZeroU64::new(range.count().0) else { return };
        // Only advice: a file system that cannot take it changes nothing.
        let _ = rustix::fs::fadvise(&self.file, range.start().0, Some(length), rustix::fs::Advice::WillNeed);
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
        if self.is_device {
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

/// Who holds the lock on `file`, from `/proc/locks`: a help for people, so any trouble is no answer.
fn lock_owner(file: &File) -> Option<String> {
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
mod tests {
    use super::*;

    fn image(directory: &Path, size: u64) -> PathBuf {
        let path = directory.join("disk.raw");
        File::create(&path).unwrap().set_len(size).unwrap();
        path
    }

    fn range(start: u64, end: u64) -> ByteRange {
        ByteRange::between(ByteOffset(start), ByteOffset(end))
    }

    #[test]
    fn a_second_agent_is_locked_out() {
        let directory = tempfile::tempdir().unwrap();
        let path = image(directory.path(), 1 << 20);
        let first = ImageFile::open(&path).unwrap();
        let refused = ImageFile::open(&path).unwrap_err();
        assert!(matches!(refused, ImageError::Locked { .. }));
        // Where the system lists locks, the holder is this process.
        let text = refused.to_string();
        let named = text.contains(&format!("process {} (", std::process::id()));
        assert!(named || text.contains("another process"), "{text}");
        drop(first);
        ImageFile::open(&path).unwrap();
    }

    #[test]
    fn what_cannot_be_a_disk_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let odd = image(directory.path(), 1000);
        assert!(
            ImageFile::open(&odd)
                .unwrap_err()
                .to_string()
                .ends_with("has 1000 bytes, which is not a positive multiple of 512")
        );
        assert!(matches!(ImageFile::open(directory.path()), Err(ImageError::Kind { .. })));
        // Not opened: that would wait for somebody at the other end of a FIFO.
        let fifo = directory.path().join("fifo");
        assert!(std::process::Command::new("mkfifo").arg(&fifo).status().unwrap().success());
        assert!(matches!(ImageFile::open(&fifo), Err(ImageError::Kind { .. })));
        assert!(matches!(ImageFile::open(&directory.path().join("none")), Err(ImageError::Missing { .. })));
    }

    #[test]
    fn holes_and_data_are_told_apart() {
        let directory = tempfile::tempdir().unwrap();
        let image = ImageFile::open(&image(directory.path(), 16 << 20)).unwrap();
        image.write_at(ByteOffset(8 << 20), &[7; 4096]).unwrap();
        let allocated = image.allocated(range(0, 16 << 20)).unwrap();
        assert!(
            allocated.iter().any(|extent| extent.contains(range(8 << 20, (8 << 20) + 4096))),
            "{allocated:?}"
        );
        image.zero(range(8 << 20, (8 << 20) + 4096), true).unwrap();
        let mut buffer = [1; 4096];
        image.read_at(ByteOffset(8 << 20), &mut buffer).unwrap();
        assert_eq!(buffer, [0; 4096]);
    }

    #[test]
    fn zeroes_leave_the_bytes_around_them() {
        for may_unmap in [true, false] {
            let directory = tempfile::tempdir().unwrap();
            let path = image(directory.path(), 1 << 20);
            let image = ImageFile::open(&path).unwrap();
            image.write_at(ByteOffset(0), &vec![7; 1 << 20]).unwrap();
            image.zero(range(5000, 300_001), may_unmap).unwrap();
            let content = std::fs::read(&path).unwrap();
            assert!(content[..5000].iter().chain(&content[300_001..]).all(|&byte| byte == 7));
            assert!(content[5000..300_001].iter().all(|&byte| byte == 0));
        }
    }

    #[test]
    fn nothing_is_written_beyond_the_end() {
        let directory = tempfile::tempdir().unwrap();
        let path = image(directory.path(), 1 << 20);
        let image = ImageFile::open(&path).unwrap();
        assert!(image.write_at(ByteOffset((1 << 20) - 10), &[1; 11]).is_err());
        assert!(image.zero(range((1 << 20) - 10, (1 << 20) + 1), true).is_err());
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 1 << 20);
    }

    #[test]
    fn a_read_beyond_a_cut_file_is_an_error() {
        let directory = tempfile::tempdir().unwrap();
        let path = image(directory.path(), 1 << 20);
        let image = ImageFile::open(&path).unwrap();
        OpenOptions::new().write(true).open(&path).unwrap().set_len(4096).unwrap();
        assert!(image.read_at(ByteOffset(8192), &mut [0; 512]).is_err());
        assert!(!image.try_read(ByteOffset(8192), &mut [0; 512]).unwrap());
    }
}
