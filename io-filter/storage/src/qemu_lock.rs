//! Whether a QEMU has an image open to write it. Only asked: a lock of ours would be in the way of giving the image back.

use std::{fs::File, io, os::fd::AsRawFd};

/// QEMU holds a shared lock on this byte of an image that it may write: `RAW_LOCK_PERM_BASE` (100) and the number of
/// `BLK_PERM_WRITE` (1), in `block/file-posix.c` there.
const MAY_WRITE: libc::off_t = 101;

/// Whether a QEMU, or another program with its locks, has `file` open to write it. Not seen where its locks are switched
/// off (`locking=off`), nor on a file system that keeps none.
///
/// # Errors
/// The operating system's, where locks cannot be asked for.
#[expect(unsafe_code, reason = "a request that rustix does not have")]
pub fn is_written_by_qemu(file: &File) -> io::Result<bool> {
    // SAFETY: any bits are a value of it.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = libc::F_WRLCK as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    (lock.l_start, lock.l_len) = (MAY_WRITE, 1);
    // SAFETY: it reads and fills in a `flock`, which lives as long as the call, and takes no lock.
    let asked = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &raw mut lock) };
    if asked < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(lock.l_type != libc::F_UNLCK as libc::c_short)
    }
}

#[cfg(test)]
mod tests {
    use rustix::fs::{Mode, OFlags};

    use super::*;

    #[test]
    fn a_question_that_nobody_answers_is_an_error_and_not_that_nobody_is_there() {
        let path = std::env::current_exe().unwrap();
        // Such a file can be asked for nothing.
        let opened = rustix::fs::open(&path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap();
        is_written_by_qemu(&File::from(opened)).unwrap_err();
        assert!(!is_written_by_qemu(&File::open(&path).unwrap()).unwrap());
    }
}
