//! Recovery of a batch: its headers, its body, and which payloads are what was captured.
//!
//! A batch is written by one write and acknowledged as a whole. So a scan looks at all of it before it takes the first entry:
//! where the headers do not stand, nothing of it does. Behind a body whose own header is not what was written the next entry is
//! found all the same ([`crate::lost_body`]); no payload of such a batch is.

use backtide_units::ByteCount;

use crate::{
    Body, ENTRY_HEADER_LENGTH, EntryHeader, PayloadState, SegmentError, SegmentHeader, Seq, body::BodyHeader,
    read::Window,
};

const HEADER: u64 = ENTRY_HEADER_LENGTH as u64;

/// A batch whose headers are good, and whose end is known.
pub(crate) struct ScannedBatch {
    /// Its first entry.
    pub(crate) first: Seq,
    /// Where the next entry after it goes.
    pub(crate) end: u64,
    /// What the device could not read of it.
    pub(crate) unreadable: Option<SegmentError>,
    /// Whether the payload of each entry is what was captured.
    good: Vec<bool>,
}

impl ScannedBatch {
    pub(crate) fn is_whole(&self) -> bool {
        self.good.iter().all(|good| *good)
    }

    pub(crate) fn state(&self, seq: Seq) -> PayloadState {
        let nth = (seq.0 - self.first.0) as usize;
        if self.good[nth] { PayloadState::Good } else { PayloadState::Wrong }
    }
}

/// The batch that begins with the header `first` at `at`, in a file of a length; `None` when it does not stand.
pub(crate) fn scan_batch(
    window: &mut Window<'_>,
    (at, length): (u64, u64),
    first: &EntryHeader,
    segment: &SegmentHeader,
) -> Result<Option<ScannedBatch>, SegmentError> {
    let Some(entries) = first.body_ahead() else { return Ok(None) };
    let mut headers = Vec::with_capacity(entries.into());
    for nth in 0..entries {
        let bytes = window.at(at + u64::from(nth) * HEADER, ENTRY_HEADER_LENGTH)?;
        let Ok(bytes) = <&[u8; ENTRY_HEADER_LENGTH]>::try_from(bytes) else { return Ok(None) };
        match EntryHeader::decode(bytes, segment.salt(), segment.id) {
            Ok(header)
                if header.body_ahead() == Some(entries - nth)
                    && header.seq.0 == first.seq.0 + u64::from(nth) =>
            {
                headers.push(header);
            }
            Ok(_) | Err(_) => return Ok(None),
        }
    }
    let body_at = at + u64::from(entries) * HEADER;
    let (body, unreadable) = match window.at(body_at, ENTRY_HEADER_LENGTH) {
        Ok(bytes) => {
            let Ok(bytes) = <&[u8; ENTRY_HEADER_LENGTH]>::try_from(bytes) else { return Ok(None) };
            (BodyHeader::decode(bytes, segment.salt(), segment.id), None)
        }
        Err(damage @ SegmentError::Damaged { .. }) => (None, Some(damage)),
        Err(
            error @ (SegmentError::UnknownVersion { .. }
            | SegmentError::Full { .. }
            | SegmentError::Io { .. }
            | SegmentError::Poisoned),
        ) => return Err(error),
    };
    let body = body.filter(|body| body.entries == entries && body.first_seq == first.seq);
    let Some(body) = body else {
        let end = window.file().end_of_lost_body(segment, body_at, length)?;
        let good = nothing_of(&headers);
        return match (end, unreadable) {
            (Some(end), unreadable) => Ok(Some(ScannedBatch { first: first.seq, end, unreadable, good })),
            (None, Some(damage)) => Err(damage),
            (None, None) => Ok(None),
        };
    };
    let end = body_at + body.stored_length();
    if end > length || end > u64::from(u32::MAX) {
        return Ok(None);
    }
    let mut batch = ScannedBatch { first: first.seq, end, unreadable: None, good: Vec::new() };
    let table = window.at(body_at + HEADER, body.table_length()).map(<[u8]>::to_vec);
    let good = match table {
        Ok(table) => match body.with_table(body_at, &table) {
            Some(body) => good_payloads(window, &body, &headers),
            None => Ok(nothing_of(&headers)),
        },
        Err(error) => Err(error),
    };
    batch.good = match good {
        Ok(good) => good,
        Err(damage @ SegmentError::Damaged { .. }) => {
            batch.unreadable = Some(damage);
            nothing_of(&headers)
        }
        Err(
            error @ (SegmentError::UnknownVersion { .. }
            | SegmentError::Full { .. }
            | SegmentError::Io { .. }
            | SegmentError::Poisoned),
        ) => return Err(error),
    };
    Ok(Some(batch))
}

/// When no payload is what was captured.
fn nothing_of(headers: &[EntryHeader]) -> Vec<bool> {
    headers.iter().map(|header| header.payload_length == 0).collect()
}

fn good_payloads(
    window: &mut Window<'_>,
    body: &Body,
    headers: &[EntryHeader],
) -> Result<Vec<bool>, SegmentError> {
    let mut bytes = Vec::new();
    for number in 0..body.count() {
        let stored = body.frame_at(number);
        let stored = window.at(stored.start, (stored.end - stored.start) as usize)?;
        let Ok(frame) = body.unpack(number, stored) else { return Ok(nothing_of(headers)) };
        bytes.extend_from_slice(&frame);
    }
    let is_good = |header: &EntryHeader| {
        let payload = body.payload_of(header);
        payload.is_some_and(|payload| {
            let payload = &bytes[payload.start as usize..payload.end as usize];
            crc32c::crc32c(payload) == header.payload_crc
                && ByteCount::of(payload).0 == u64::from(header.payload_length)
        })
    };
    Ok(headers.iter().map(|header| header.payload_length == 0 || is_good(header)).collect())
}
