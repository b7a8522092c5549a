//! Whether the log of a volume has anything in it that is not in its place.

use backtide_units::ByteOffset;

use super::{DATA, LOG_FILE, Ntfs, record::restore};
use crate::{
    Error, FileId,
    fields::{le16, le32, le64, part},
};

/// Sizes of the two pages at the log's start.
const PAGES: std::ops::RangeInclusive<usize> = 512..=1 << 16;

const CLEAN: u16 = 2;
const NO_CLIENT: u16 = 0xffff;

/// Looks at the newer of the two pages that a log begins with.
pub(super) fn is_clean(volume: &Ntfs) -> Result<bool, Error> {
    let attributes = volume.attributes(FileId(LOG_FILE))?;
    let Some(log) = attributes.contents(volume, DATA, &[])? else { return Ok(true) };
    let mut newest: Option<(u64, bool)> = None;
    let mut size = 4096;
    for number in 0..2_u64 {
        let mut page = vec![0; size];
        log.read_stored(volume.source.as_ref(), ByteOffset(number * size as u64), &mut page)?;
        if number == 0 && page.iter().all(|byte| *byte == 0xff) {
            // It was emptied: there is nothing to replay.
            return Ok(true);
        }
        let told = le32(&page, 16).map_or(0, |size| size as usize);
        if number == 0 && PAGES.contains(&told) && told.is_power_of_two() && told != size {
            size = told;
            page.resize(size, 0);
            log.read_stored(volume.source.as_ref(), ByteOffset::ZERO, &mut page)?;
        }
        if restore(&mut page, b"RSTR").is_err() {
            continue;
        }
        let area = usize::from(le16(&page, 24)?);
        let area = part(&page, area, 16)?;
        let (lsn, client, flags) = (le64(area, 0)?, le16(area, 12)?, le16(area, 14)?);
        if newest.is_none_or(|(newest, _)| newest < lsn) {
            newest = Some((lsn, flags & CLEAN != 0 || client == NO_CLIENT));
        }
    }
    Ok(newest.is_some_and(|(_, is_clean)| is_clean))
}
