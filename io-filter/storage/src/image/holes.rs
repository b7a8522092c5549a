//! Whether a file system can be believed where it calls a stretch of a file a hole.

use std::fs::File;

use rustix::fs::{IFlags, fstatfs, ioctl_getflags};

/// ext2, ext3 and ext4.
const EXT: u32 = 0xef53;

/// `FS_EXTENT_FL` of `linux/fs.h`: where the file lies is kept in extents.
const EXTENTS: IFlags = IFlags::from_bits_retain(0x0008_0000);

/// Whether what `SEEK_HOLE` calls a hole reads as zeroes. A file without extents on ext4, as on a file system that was ext3,
/// has what was written and has no place on the device yet in such a hole, until it is synced (seen with Linux 6.18).
pub fn tells_holes(file: &File) -> bool {
    // The kernel's numbers have 32 bits, of which the type on some machines makes a negative one.
    let is_ext = fstatfs(file).is_ok_and(|found| found.f_type as u32 == EXT);
    !is_ext || ioctl_getflags(file).is_ok_and(|flags| flags.contains(EXTENTS))
}
