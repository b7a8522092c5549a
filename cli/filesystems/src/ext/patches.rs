//! The volume with what is in its journal: blocks whose newest copy lies elsewhere. In memory is only where.

use std::{collections::BTreeMap, io, rc::Rc};

use backtide_units::{ByteCount, ByteOffset};

use crate::Source;

/// What a block of the journal begins with that is none of the volume. A copy of a block that begins so, too, has zeroes
/// there instead.
pub(super) const MAGIC: [u8; 4] = [0xc0, 0x3b, 0x39, 0x98];

/// Where the newest copy of a block is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Copied {
    /// Its first byte on the volume.
    pub(super) at: ByteOffset,
    /// Whether it begins with the magic that the journal has taken out.
    pub(super) is_escaped: bool,
}

/// A volume, and blocks of its journal that stand for others of it.
pub(super) struct Patched {
    source: Rc<dyn Source>,
    block_size: u64,
    copies: BTreeMap<u64, Copied>,
}

impl Patched {
    pub(super) fn new(source: Rc<dyn Source>, block_size: u64, copies: BTreeMap<u64, Copied>) -> Self {
        Self { source, block_size, copies }
    }

    /// The volume as it lies there: where [`crate::Contents`] says that bytes are, they are.
    pub(super) fn unpatched(&self) -> &dyn Source {
        self.source.as_ref()
    }

    /// The blocks among `count` from `first` on that lie elsewhere.
    pub(super) fn copies(&self, first: u64, count: u64) -> impl Iterator<Item = (u64, Copied)> + '_ {
        self.copies.range(first..first.saturating_add(count)).map(|(block, copied)| (*block, *copied))
    }
}

impl Source for Patched {
    fn size(&self) -> ByteCount {
        self.source.size()
    }

    fn read_at(&self, offset: ByteOffset, buffer: &mut [u8]) -> io::Result<()> {
        self.source.read_at(offset, buffer)?;
        // The read was within the volume, so no sum overflows.
        let end = offset.0 + buffer.len() as u64;
        let first = offset.0 / self.block_size;
        for (block, copied) in self.copies(first, end.div_ceil(self.block_size) - first) {
            let start = block * self.block_size;
            let (from, to) = (start.max(offset.0), (start + self.block_size).min(end));
            let target = &mut buffer[(from - offset.0) as usize..(to - offset.0) as usize];
            self.source.read_at(ByteOffset(copied.at.0 + from - start), target)?;
            if copied.is_escaped {
                let rest = MAGIC.get((from - start) as usize..).unwrap_or_default();
                target.iter_mut().zip(rest).for_each(|(byte, magic)| *byte = *magic);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Bytes;

    #[test]
    fn a_block_is_read_where_its_newest_copy_is() {
        let bytes: Vec<u8> = (0..16_u8).flat_map(|block| [block; 16]).collect();
        let copied = |block: u64, is_escaped| Copied { at: ByteOffset(block * 16), is_escaped };
        let copies = BTreeMap::from([(2, copied(9, false)), (3, copied(10, true))]);
        let source = Patched::new(Rc::new(Bytes(bytes.clone())), 16, copies);
        let mut expected = bytes;
        expected[32..48].fill(9);
        expected[48..64].fill(10);
        expected[48..52].copy_from_slice(&MAGIC);
        for from in 0..80 {
            for to in from..80 {
                let mut found = vec![0; to - from];
                source.read_at(ByteOffset(from as u64), &mut found).unwrap();
                assert_eq!(found, expected[from..to], "{from} to {to}");
            }
        }
    }
}
