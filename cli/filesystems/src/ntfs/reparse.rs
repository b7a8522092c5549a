//! Files that stand for something else: links, and files whose bytes are kept in another way.

use super::index::text;
use crate::{
    Error,
    fields::{le16, part},
};

const SYMLINK: u32 = 0xa000_000c;
const JUNCTION: u32 = 0xa000_0003;
const DEDUPLICATED: u32 = 0x8000_0013;
const SYSTEM_COMPRESSED: u32 = 0x8000_0017;

/// Whether it leads elsewhere.
pub(super) fn is_link(tag: u32) -> bool {
    matches!(tag, SYMLINK | JUNCTION)
}

/// What keeps the bytes of a file from being where they are as a rule.
pub(super) fn stands_for(tag: u32) -> Option<&'static str> {
    match tag {
        DEDUPLICATED => Some("kept by the deduplication of Windows Server"),
        SYSTEM_COMPRESSED => Some("compressed as a system file (CompactOS)"),
        _ => None,
    }
}

/// Where a link leads, with slashes.
pub(super) fn target(tag: u32, bytes: &[u8]) -> Result<Vec<u8>, Error> {
    let start = match tag {
        SYMLINK => 20,
        JUNCTION => 16,
        _ => return Err(Error::damaged("", "it is no symbolic link")),
    };
    let name = |at: usize| -> Result<String, Error> {
        let (from, length) = (usize::from(le16(bytes, at)?), usize::from(le16(bytes, at + 2)?));
        Ok(text(part(bytes, start + from, length)?))
    };
    // The one for people, or the one for the kernel without its prefix.
    let (kernel, people) = (name(8)?, name(12)?);
    let found = if people.is_empty() { kernel.trim_start_matches(r"\??\").to_owned() } else { people };
    Ok(found.replace('\\', "/").into_bytes())
}
