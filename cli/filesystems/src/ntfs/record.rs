//! Records of several sectors, whose last two bytes of each sector are kept elsewhere so that a torn write is seen.

use crate::{
    Error,
    fields::{le16, part},
};

/// What has a sequence number in place of the last two bytes is always so long, whatever the device's sectors.
const STRIDE: usize = 512;

/// Checks the mark and puts the bytes back where they belong.
pub(super) fn restore(bytes: &mut [u8], mark: &[u8; 4]) -> Result<(), Error> {
    if part(bytes, 0, 4)? != mark {
        return Err(Error::damaged("", "its mark is not there"));
    }
    let (at, count) = (usize::from(le16(bytes, 4)?), usize::from(le16(bytes, 6)?));
    if count != bytes.len() / STRIDE + 1 || at + count * 2 > STRIDE - 2 {
        return Err(Error::damaged("", "its sequence numbers are not as many as its sectors"));
    }
    let numbers = part(bytes, at, count * 2)?.to_vec();
    for (sector, kept) in bytes.chunks_exact_mut(STRIDE).zip(numbers[2..].chunks_exact(2)) {
        let end = &mut sector[STRIDE - 2..];
        if *end != numbers[..2] {
            return Err(Error::damaged("", "it was not written to its end"));
        }
        end.copy_from_slice(kept);
    }
    Ok(())
}
