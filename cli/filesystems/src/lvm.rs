//! Logical volumes of LVM2, found on the physical volumes of one disk.
//!
//! The way: the label of each physical volume (`label`) leads to the text that describes its group (`text`), which
//! says of what stretches each logical volume is made (`group`). Linear and striped volumes can be read; what
//! others hold is said, not guessed.

mod group;
mod label;
mod text;

use std::{io, rc::Rc};

use backtide_units::{ByteCount, ByteOffset, ByteRange};

pub use label::{Physical, physical};

use crate::{Error, Source};

/// A logical volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Logical {
    /// The name of its group.
    pub group: String,
    /// Its name within the group.
    pub name: String,
    /// How many bytes.
    pub length: ByteCount,
    /// Where they are, or why that cannot be said here.
    pub segments: Result<Vec<Segment>, String>,
}

/// A stretch of a logical volume that lies on one physical volume, or on several in turns.
///
/// Invariant: `length` is a multiple of `stripe` times the number of stripes, unless there is one stripe.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Its first byte on the logical volume.
    pub at: ByteOffset,
    /// How many bytes.
    pub length: ByteCount,
    /// How many bytes lie together before the next stripe has its turn.
    pub stripe: ByteCount,
    /// The first byte of each stripe on the disk.
    pub stripes: Vec<ByteOffset>,
}

/// The visible logical volumes of the groups that `physicals` belong to, each given with its bytes on the disk.
///
/// # Errors
/// When the description of a group is damaged.
pub fn logical_volumes(physicals: &[(ByteRange, Physical)]) -> Result<Vec<Logical>, Error> {
    let mut groups: Vec<group::Group> = Vec::new();
    for text in physicals.iter().filter_map(|(_, physical)| physical.metadata.as_deref()) {
        let found = group::parse(text)?;
        // The newest description counts: a physical volume may have been away when it was written.
        match groups.iter_mut().find(|group| group.id == found.id) {
            Some(group) if group.seqno < found.seqno => *group = found,
            Some(_) => {}
            None => groups.push(found),
        }
    }
    Ok(groups.iter().flat_map(|group| group.logical_volumes(physicals)).collect())
}

/// The bytes of a logical volume.
pub struct LogicalBytes {
    disk: Rc<dyn Source>,
    segments: Vec<Segment>,
}

impl LogicalBytes {
    /// Those that `segments` are made of.
    pub fn new(disk: Rc<dyn Source>, segments: Vec<Segment>) -> Self {
        Self { disk, segments }
    }
}

impl Segment {
    fn end(&self) -> u64 {
        self.at.0 + self.length.0
    }

    /// Where byte `at` of the logical volume is on the disk, and how many bytes follow it there.
    fn place(&self, at: u64) -> (u64, u64) {
        let within = at - self.at.0;
        if let [only] = self.stripes[..] {
            return (only.0 + within, self.length.0 - within);
        }
        let stripe = self.stripe.0;
        let (row, in_row) = (within / stripe, within % stripe);
        let count = self.stripes.len() as u64;
        let column = usize::try_from(row % count).expect("the number of a stripe");
        (self.stripes[column].0 + row / count * stripe + in_row, stripe - in_row)
    }
}

/// Where bytes of a logical volume are on the disk, piece by piece.
pub fn on_disk(segments: &[Segment], range: ByteRange) -> Vec<ByteRange> {
    let (mut at, mut found) = (range.start().0, Vec::new());
    while at < range.end().0 {
        let index = segments.partition_point(|segment| segment.end() <= at);
        let Some(segment) = segments.get(index) else { break };
        let (from, left) = segment.place(at);
        let count = left.min(range.end().0 - at);
        found.extend(ByteRange::new(ByteOffset(from), ByteCount(count)));
        at += count;
    }
    found
}

impl Source for LogicalBytes {
    fn size(&self) -> ByteCount {
        ByteCount(self.segments.last().map_or(0, Segment::end))
    }

    fn read_at(&self, offset: ByteOffset, buffer: &mut [u8]) -> io::Result<()> {
        let end = offset.checked_add(ByteCount::of(buffer));
        if end.is_none_or(|end| end.0 > self.size().0) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let (mut at, mut done) = (offset.0, 0);
        while done < buffer.len() {
            let index = self.segments.partition_point(|segment| segment.end() <= at);
            let (from, left) = self.segments[index].place(at);
            let count = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len() - done);
            self.disk.read_at(ByteOffset(from), &mut buffer[done..done + count])?;
            (at, done) = (at + count as u64, done + count);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
