//! What a loop device lies on, asked of its driver: the path that the system shows for it may be another's by now.

use std::{
    fs::File,
    io,
    os::{
        fd::AsFd,
        unix::fs::{FileTypeExt, MetadataExt},
    },
};

use backtide_units::{ByteCount, ByteOffset};
use rustix::{fs::major, io::Errno};

/// What a loop device lies on. Device numbers are as in the metadata of files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoopBacking {
    /// The file system that has its file, or the name of its device ...
    pub device: u64,
    /// ... and the inode there.
    pub inode: u64,
    /// The block device it lies on; none when that is a file.
    pub block_device: Option<u64>,
    /// Where in it the loop device begins.
    pub offset: ByteOffset,
    /// How long the loop device may be; none when it goes on to the end.
    pub limit: Option<ByteCount>,
}

/// The driver of loop devices has this number, always.
const LOOP_MAJOR: u32 = 7;

/// `LOOP_GET_STATUS64` of `linux/loop.h`.
const GET_STATUS: rustix::ioctl::Opcode = 0x4c05;

/// `struct loop_info64` there: plain numbers.
#[repr(C)]
struct LoopInfo {
    device: u64,
    inode: u64,
    block_device: u64,
    offset: u64,
    limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// What the loop device `device` lies on.
///
/// # Errors
/// The operating system's: `ENXIO` when it lies on nothing, `ENOTTY` when it is no loop device.
#[expect(unsafe_code, reason = "rustix knows how to ask, not what this driver answers")]
pub fn loop_backing(device: &File) -> io::Result<LoopBacking> {
    let found = device.metadata()?;
    if !found.file_type().is_block_device() || major(found.rdev()) != LOOP_MAJOR {
        return Err(Errno::NOTTY.into());
    }
    // SAFETY: it is the driver of loop devices that is asked, as was seen just now. It fills in a `loop_info64`, whose
    // layout `LoopInfo` has and of which any bits are a value, and changes nothing.
    let found: LoopInfo = unsafe {
        let asked = rustix::ioctl::Getter::<GET_STATUS, LoopInfo>::new();
        rustix::ioctl::ioctl(device.as_fd(), asked)?
    };
    Ok(LoopBacking {
        device: found.device,
        inode: found.inode,
        block_device: Some(found.block_device).filter(|number| *number != 0),
        offset: ByteOffset(found.offset),
        limit: Some(ByteCount(found.limit)).filter(|limit| !limit.is_zero()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_loop_device_tells_has_the_size_the_kernel_fills_in() {
        assert_eq!(size_of::<LoopInfo>(), 232);
    }

    #[test]
    fn a_file_is_no_loop_device() {
        let file = tempfile::tempfile().unwrap();
        assert_eq!(loop_backing(&file).unwrap_err().raw_os_error(), Some(Errno::NOTTY.raw_os_error()));
    }
}
