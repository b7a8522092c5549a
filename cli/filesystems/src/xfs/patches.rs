//! What the log has over what the volume has, by sector. In memory: nothing is written.

use std::{collections::BTreeMap, io, rc::Rc};

use backtide_units::{ByteCount, ByteOffset};

use crate::{Error, Source};

const SECTOR: u64 = 512;

/// The most sectors that are replaced: 256 MiB. Logs that are full are smaller as a rule, and have each sector many times.
const SECTORS_MAX: usize = 1 << 19;

/// A volume, and sectors that stand for others of it.
pub(super) struct Patched {
    source: Rc<dyn Source>,
    sectors: BTreeMap<u64, Box<[u8; SECTOR as usize]>>,
}

impl Patched {
    pub(super) fn new(source: Rc<dyn Source>) -> Self {
        Self { source, sectors: BTreeMap::new() }
    }

    /// Whether any of these bytes is other than on the volume.
    pub(super) fn is_patched(&self, at: ByteOffset, length: usize) -> bool {
        let end = at.0.saturating_add(length as u64).div_ceil(SECTOR);
        self.sectors.range(at.0 / SECTOR..end).next().is_some()
    }

    /// The volume as it is, without the log: no bytes of files are ever in it.
    pub(super) fn unpatched(&self) -> &dyn Source {
        self.source.as_ref()
    }

    /// Replaces bytes.
    pub(super) fn patch(&mut self, at: ByteOffset, bytes: &[u8]) -> Result<(), Error> {
        let (mut at, mut left) = (at.0, bytes);
        while !left.is_empty() {
            let (number, within) = (at / SECTOR, (at % SECTOR) as usize);
            let count = left.len().min(SECTOR as usize - within);
            if !self.sectors.contains_key(&number) {
                if self.sectors.len() >= SECTORS_MAX {
                    let (what, limit) = ("the log of this XFS".to_owned(), SECTORS_MAX as u64);
                    return Err(Error::TooMany { what, of: "sectors to replay", limit });
                }
                let mut sector = [0; SECTOR as usize];
                self.source.read_at(ByteOffset(number * SECTOR), &mut sector)?;
                self.sectors.insert(number, Box::new(sector));
            }
            let sector = self.sectors.get_mut(&number).expect("it was put there");
            sector[within..within + count].copy_from_slice(&left[..count]);
            (at, left) = (at + count as u64, &left[count..]);
        }
        Ok(())
    }

    /// As the volume is, without the log.
    pub(super) fn forget(&mut self) {
        self.sectors.clear();
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
        for (number, sector) in self.sectors.range(offset.0 / SECTOR..end.div_ceil(SECTOR)) {
            let start = number * SECTOR;
            let (from, to) = (start.max(offset.0), (start + SECTOR).min(end));
            let source = &sector[(from - start) as usize..(to - start) as usize];
            buffer[(from - offset.0) as usize..(to - offset.0) as usize].copy_from_slice(source);
        }
        Ok(())
    }
}
