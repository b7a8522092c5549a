//! Where a batch ends whose body's own header is not what was written, and what that header was.
//!
//! All that it says stands somewhere else, too: the entries and their lengths in their headers, and so the length of the table; where
//! the stored bytes end in the table. What the frames' checksums bear out is certain. Where they do not, the next entry's header is
//! searched for, as far as the body can reach: it has the log's salted checksum, the segment and the next number.

use crate::{
    Body, ENTRY_HEADER_LENGTH, EntryHeader, SegmentError, SegmentFile, SegmentHeader, Seq,
    body::{BATCH_ENTRIES_MAX, Expected},
    compress::Method,
    entry_header::ALIGNMENT,
    read::{PAGE, Window},
};

const HEADER: u64 = ENTRY_HEADER_LENGTH as u64;

impl SegmentFile {
    /// Where the next entry goes behind the body at `at`, when its header is lost; not beyond `limit`. `None` when nothing tells.
    pub(crate) fn end_of_lost_body(
        &self,
        segment: &SegmentHeader,
        at: u64,
        limit: u64,
    ) -> Result<Option<u64>, SegmentError> {
        let Some(expected) = self.expected_body(segment, at)? else { return Ok(None) };
        let end = match self.rebuilt(&expected, at)? {
            Some(body) => Some(at + body.header().stored_length()),
            None => self.next_entry(segment, &expected, at)?,
        };
        Ok(end.filter(|end| *end <= limit.min(u32::MAX.into())))
    }

    /// The body at `at` as it was, when only its header is lost: all that it holds is whole.
    pub(crate) fn lost_body(&self, segment: &SegmentHeader, at: u64) -> Result<Option<Body>, SegmentError> {
        match self.expected_body(segment, at)? {
            Some(expected) => self.rebuilt(&expected, at),
            None => Ok(None),
        }
    }

    /// What the headers before `at` say of the body that is there.
    fn expected_body(&self, segment: &SegmentHeader, at: u64) -> Result<Option<Expected>, SegmentError> {
        let mut headers: Vec<EntryHeader> = Vec::new();
        for on in 1..=BATCH_ENTRIES_MAX {
            let Some(before) = at.checked_sub(u64::from(on) * HEADER) else { break };
            let mut bytes = [0; ENTRY_HEADER_LENGTH];
            let header = match readable(self.read_exact(before, &mut bytes))? {
                Some(()) => EntryHeader::decode(&bytes, segment.salt(), segment.id).ok(),
                None => None,
            };
            let follows = |header: &EntryHeader| {
                let next = headers.last().is_none_or(|next| header.seq.next() == next.seq);
                next && header.body_ahead() == Some(on)
            };
            let Some(header) = header.filter(follows) else { break };
            headers.push(header);
        }
        headers.reverse();
        Ok(Expected::of(&headers))
    }

    fn rebuilt(&self, expected: &Expected, at: u64) -> Result<Option<Body>, SegmentError> {
        let mut table = vec![0; expected.table_length()];
        if readable(self.read_exact(at + HEADER, &mut table))?.is_none() {
            return Ok(None);
        }
        for method in [Method::Lz4, Method::Zstd] {
            let Some(body) = expected.body(method, at, &table) else { return Ok(None) };
            let mut whole = true;
            for number in 0..body.count() {
                whole = whole && readable(self.frame(&body, number))?.is_some();
            }
            if whole {
                return Ok(Some(body));
            }
        }
        Ok(None)
    }

    /// Where the header of the entry behind the batch stands.
    fn next_entry(
        &self,
        segment: &SegmentHeader,
        expected: &Expected,
        at: u64,
    ) -> Result<Option<u64>, SegmentError> {
        let mut window = Window::new(self);
        let next: Seq = expected.next_seq();
        let last = at + expected.length_max();
        let mut place = (at + HEADER + expected.table_length() as u64 + 1).next_multiple_of(ALIGNMENT);
        while place <= last {
            let Some(bytes) = readable(window.at(place, ENTRY_HEADER_LENGTH).map(<[u8]>::to_vec))? else {
                place = (place + 1).next_multiple_of(PAGE);
                continue;
            };
            let Ok(bytes) = <&[u8; ENTRY_HEADER_LENGTH]>::try_from(&bytes[..]) else { break };
            if EntryHeader::looks_right(bytes, segment.id)
                && EntryHeader::decode(bytes, segment.salt(), segment.id).is_ok_and(|entry| entry.seq == next)
            {
                return Ok(Some(place));
            }
            place += ALIGNMENT;
        }
        Ok(None)
    }
}

/// `None` for damage; any other error goes on.
fn readable<T>(result: Result<T, SegmentError>) -> Result<Option<T>, SegmentError> {
    match result {
        Ok(read) => Ok(Some(read)),
        Err(SegmentError::Damaged { .. }) => Ok(None),
        Err(
            error @ (SegmentError::UnknownVersion { .. }
            | SegmentError::Full { .. }
            | SegmentError::Io { .. }
            | SegmentError::Poisoned),
        ) => Err(error),
    }
}
