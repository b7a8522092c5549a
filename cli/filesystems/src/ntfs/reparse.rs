//! Files that stand for something else: links, and files whose bytes are kept in another way.

use super::index::text;
use crate::{
    Error,
    fields::{le16, part},
};

const SYMLINK: u32 = 0xa000_000c;
/// Mount points have it, too.
const JUNCTION: u32 = 0xa000_0003;
const DEDUPLICATED: u32 = 0x8000_0013;
const SYSTEM_COMPRESSED: u32 = 0x8000_0017;

/// What a service keeps in a cloud, of sixteen kinds, and may have here as well.
const CLOUD: u32 = 0x9000_001a;
const CLOUD_KINDS: u32 = 0x0000_f000;

/// Attributes of a file whose bytes are not here: offline, to be fetched when it is opened or when it is read.
const AWAY: u32 = 0x1000 | 0x4_0000 | 0x40_0000;

/// Whether it leads elsewhere.
pub(super) fn is_link(tag: u32) -> bool {
    matches!(tag, SYMLINK | JUNCTION)
}

/// What keeps the bytes of a file from being where they are as a rule; `attributes` are those of its times. Whatever is not
/// known to leave them there is taken to keep them elsewhere: what is left behind reads as zeroes.
pub(super) fn stands_for(tag: u32, attributes: u32) -> Option<String> {
    match tag {
        SYMLINK | JUNCTION => None,
        DEDUPLICATED => Some("kept by the deduplication of Windows Server".to_owned()),
        SYSTEM_COMPRESSED => Some("compressed as a system file (CompactOS)".to_owned()),
        tag if tag & !CLOUD_KINDS == CLOUD && attributes & AWAY == 0 => None,
        tag if tag & !CLOUD_KINDS == CLOUD => Some(format!("kept in a cloud (reparse tag {tag:#010x})")),
        tag => Some(format!("kept in a way that its reparse tag {tag:#010x} says")),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_tags_that_are_known_to_leave_the_bytes_where_they_are_pass() {
        for tag in [SYMLINK, JUNCTION, CLOUD, CLOUD | 0x3000] {
            assert_eq!(stands_for(tag, 0x20), None, "{tag:#x}");
        }
        for away in [0x1000, 0x4_0000, 0x40_0000] {
            let why = stands_for(CLOUD | 0xf000, away | 0x20).unwrap();
            assert_eq!(why, "kept in a cloud (reparse tag 0x9000f01a)");
        }
        // Files moved to tapes, kept once for many, of an image (WIM), of GVFS, of nobody.
        for tag in [0xc000_0004, 0x8000_0006, 0x8000_0007, 0x8000_0008, 0x9000_001c, 0x1234_5678, 0] {
            let why = stands_for(tag, 0).unwrap();
            assert!(why.contains(&format!("{tag:#010x}")), "{why}");
        }
    }
}
