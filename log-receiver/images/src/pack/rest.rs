//! A pack as those see it who write it anew: where each chunk lies, what is there twice, whether any may be missing.

use std::collections::HashMap;

use backtide_storage::is_unreadable_place;
use backtide_units::{ByteCount, ByteOffset, ByteRange};

use super::{Line, Pack, encode_footer};
use crate::{
    ImageError,
    chunk::{CHUNK_HEADER_LENGTH, ChunkRef},
};

/// The system reads from the device in pages.
const PAGE: u64 = 4096;

impl Pack {
    /// Bytes that the chunk of a line takes, of all lines; none when they do not lie in the order of their ordinals.
    pub(crate) fn lengths(&self) -> Option<Vec<(Line, u64)>> {
        let ends = self.lines.iter().skip(1).map(|line| u64::from(line.offset)).chain([self.chunks_end]);
        let length = |(line, end): (&Line, u64)| {
            let length = end.checked_sub(line.offset.into())?;
            (length >= CHUNK_HEADER_LENGTH as u64).then_some((*line, length))
        };
        self.lines.iter().zip(ends).map(length).collect()
    }

    /// The bytes of a chunk as they stand there, and zeroes where the device cannot read them, by which the chunk is damaged as
    /// before: those places go to `unread`.
    pub(crate) fn as_it_is(
        &self,
        line: &Line,
        length: u64,
        unread: &mut Vec<ByteRange>,
    ) -> Result<Vec<u8>, ImageError> {
        let mut bytes = vec![0; usize::try_from(length).expect("a pack is far below 4 GiB")];
        let start = u64::from(line.offset);
        match self.file.read_exact_at(ByteOffset(start), &mut bytes) {
            Ok(()) => {}
            Err(error) if is_unreadable_place(&error) => self.read_by_pages(start, &mut bytes, unread)?,
            Err(error) => return Err(self.unread(start, error)),
        }
        Ok(bytes)
    }

    /// One bad sector takes its page and no more.
    fn read_by_pages(
        &self,
        start: u64,
        mut bytes: &mut [u8],
        unread: &mut Vec<ByteRange>,
    ) -> Result<(), ImageError> {
        let mut at = start;
        while !bytes.is_empty() {
            let length = bytes.len().min((PAGE - at % PAGE) as usize);
            let (page, rest) = bytes.split_at_mut(length);
            match self.file.read_exact_at(ByteOffset(at), page) {
                Ok(()) => {}
                Err(error) if is_unreadable_place(&error) => {
                    page.fill(0);
                    unread.push(ByteRange::between(ByteOffset(at), ByteOffset(at + length as u64)));
                }
                Err(error) => return Err(self.unread(at, error)),
            }
            (at, bytes) = (at + length as u64, rest);
        }
        Ok(())
    }

    /// Whether the device can read one of these places after all.
    pub(crate) fn any_can_be_read(&self, unread: &[ByteRange]) -> Result<bool, ImageError> {
        for place in unread {
            let ByteCount(length) = place.count();
            let mut page = vec![0; usize::try_from(length).expect("it is a page at the most")];
            match self.file.read_exact_at(place.start(), &mut page) {
                Ok(()) => return Ok(true),
                Err(error) if is_unreadable_place(&error) => {}
                Err(error) => return Err(self.unread(place.start().0, error)),
            }
        }
        Ok(false)
    }

    /// Whether its lines are all it has: a table that is damaged may have named chunks behind one whose header is damaged
    /// too. Where exactly their table follows, or the file ends within a chunk or that table, there are none.
    pub(crate) fn has_all_its_lines(&self) -> Result<bool, ImageError> {
        if self.broken.is_none() {
            return Ok(true);
        }
        let footer = encode_footer(self.number, &self.lines, self.chunks_end);
        let rest = self.length()?.saturating_sub(self.chunks_end);
        if rest == footer.len() as u64 || rest < CHUNK_HEADER_LENGTH as u64 {
            return Ok(true);
        }
        if rest < footer.len() as u64 {
            let mut found = vec![0; rest as usize];
            self.read(self.chunks_end, &mut found)?;
            if footer.starts_with(&found) {
                return Ok(true);
            }
        }
        let cut = self.header_at(self.chunks_end).is_ok_and(|header| header.whole() > rest);
        Ok(cut)
    }

    /// Others of its chunks with the same content.
    pub(crate) fn twins(&self, name: &ChunkRef) -> impl Iterator<Item = ChunkRef> {
        let twins = self.twins.get_or_init(|| {
            let mut all = HashMap::<[u8; 32], Vec<u32>>::new();
            self.lines.iter().for_each(|line| all.entry(line.hash).or_default().push(line.ordinal));
            all.retain(|_, ordinals| ordinals.len() > 1);
            all.shrink_to_fit();
            all
        });
        let name = *name;
        let others = twins.get(&name.hash).into_iter().flatten().filter(move |other| **other != name.ordinal);
        others.map(move |ordinal| ChunkRef { ordinal: *ordinal, ..name })
    }
}
