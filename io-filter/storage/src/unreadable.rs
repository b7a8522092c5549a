//! Places that a device cannot give back.

use std::io;

use rustix::io::Errno;

/// Whether a read failed for its place: a bad sector (`EIO`), or bytes of which the file system found that they are not those that
/// were written (`EBADMSG`, and `EUCLEAN`, which is Linux's `EFSCORRUPTED`). Any other failure is of the read, not of the place.
pub fn is_unreadable_place(error: &io::Error) -> bool {
    let errno = Errno::from_io_error(error);
    errno.is_some_and(|errno| [Errno::IO, Errno::BADMSG, Errno::UCLEAN].contains(&errno))
}
