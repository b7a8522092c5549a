//! Reading entries one after the other: what is compressed together is decompressed once.

use backtide_units::ByteRange;
use bytes::Bytes;

use crate::{Body, EntryHeader, Position, SegmentError, SegmentFile, SegmentHeader};

/// Reads entries of one segment, best in their order.
pub struct EntryReader<'a> {
    file: &'a SegmentFile,
    segment: SegmentHeader,
    /// The batch that was read last, and its only frame.
    last: Option<(Body, Bytes)>,
}

impl<'a> EntryReader<'a> {
    /// Of a segment.
    pub fn new(file: &'a SegmentFile, segment: SegmentHeader) -> Self {
        Self { file, segment, last: None }
    }

    /// The header and the payload of the entry at `position`, checked.
    ///
    /// # Errors
    /// [`SegmentError::Damaged`] when any of both is not what was written.
    pub fn entry(&mut self, position: Position) -> Result<(EntryHeader, Bytes), SegmentError> {
        let header = self.file.entry_header(&self.segment, position)?;
        let last = self.last.take();
        let known = |at| last.as_ref().map(|(body, _)| body).filter(|body| body.at() == at).cloned();
        let parts = self.file.parts_behind(&self.segment, header, position, ByteRange::default(), &known)?;
        let Some(body) = parts.body().filter(|body| body.count() == 1) else {
            self.last = last.filter(|_| header.payload_length == 0);
            return Ok((header, self.file.payload(&parts, 0..parts.count())?));
        };
        let (body, frame) = match last.filter(|(last, _)| last.at() == body.at()) {
            Some(last) => last,
            None => (body.clone(), self.file.frame(body, 0)?),
        };
        let payload = Bytes::copy_from_slice(self.file.piece_in(&parts, 0, &frame)?);
        self.last = Some((body, frame));
        Ok((header, payload))
    }
}

impl SegmentFile {
    /// The header and the payload of the entry at `position`, checked.
    ///
    /// # Errors
    /// [`SegmentError::Damaged`] when any of both is not what was written.
    pub fn entry(
        &self,
        segment: &SegmentHeader,
        position: Position,
    ) -> Result<(EntryHeader, Bytes), SegmentError> {
        EntryReader::new(self, *segment).entry(position)
    }
}
