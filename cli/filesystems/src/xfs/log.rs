//! The log of an XFS: from its tail to its head, as transactions.
//!
//! ```text
//! record   FEEDBABE cycle version length lsn tail crc .. cycles[64] .. size | more cycles | operations, padded
//! operation   transaction length client flags | bytes
//! ```
//! The first four bytes of every sector of a record are its cycle, so that the head can be found; what they were is among
//! the header's cycles. A record is whole or does not count: the first that is not ends the log.

use std::collections::HashMap;

use backtide_units::{ByteCount, ByteOffset};

use crate::{
    Error, Source,
    fields::{be32, be64, byte, le32, part},
};

const SECTOR: u64 = 512;
const MAGIC: u32 = 0xfeed_babe;

/// Sectors before the head that are searched for records: eight buffers of 256 KiB may be under way at once.
const WINDOW: u64 = 8192;

/// The longest record.
const LENGTH_MAX: u32 = 1 << 20;

/// Cycles that one sector of a header has.
const CYCLES: usize = 64;

/// Bytes of transactions that have begun and are not over.
const PENDING_MAX: usize = 256 << 20;

const COMMIT: u8 = 0x02;
const CONTINUED: u8 = 0x08;
const START: u8 = 0x01;
const UNMOUNT: u8 = 0x20;

/// Bytes of the header that a transaction begins with.
const TRANSACTION_HEADER: usize = 16;

/// The log on its volume.
pub(super) struct Log<'source> {
    source: &'source dyn Source,
    start: ByteOffset,
    sectors: u64,
    has_crc: bool,
}

/// A record: where it is, and its bytes as they were logged.
struct Record {
    /// Its cycle and sector, as the format has them in one number.
    lsn: u64,
    tail: u64,
    /// The sector behind it, which may be beyond the end of the log.
    end: u64,
    operations: Vec<u8>,
}

/// What a transaction changes: its regions, the first of which says what they are.
pub(super) type Item = Vec<Vec<u8>>;

#[derive(Default)]
struct Transaction {
    lsn: u64,
    header: Vec<u8>,
    items: Vec<Item>,
}

impl<'source> Log<'source> {
    pub(super) fn new(
        source: &'source dyn Source,
        (start, length): (ByteOffset, ByteCount),
        has_crc: bool,
    ) -> Self {
        Self { source, start, sectors: length.0 / SECTOR, has_crc }
    }

    /// Calls `each` with every transaction that was committed between tail and head, and the LSN it began at.
    pub(super) fn transactions(
        &self,
        each: &mut dyn FnMut(u64, Vec<Item>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let Some(last) = self.last_record()? else { return Ok(()) };
        let (mut cycle, mut sector) = (last.tail >> 32, last.tail & u64::from(u32::MAX));
        let (mut open, mut pending) = (HashMap::new(), 0);
        loop {
            let record = match self.record(sector, cycle)? {
                Some(record) if record.lsn <= last.lsn => record,
                _ => return Err(Error::damaged("", format!("no record of it is at sector {sector}"))),
            };
            replay_operations(&record, &mut open, &mut pending, each)?;
            if record.lsn == last.lsn {
                return Ok(());
            }
            (sector, cycle) = self.after(&record, cycle);
        }
    }

    /// The sector and cycle of the record behind this one.
    fn after(&self, record: &Record, cycle: u64) -> (u64, u64) {
        if record.end >= self.sectors { (record.end - self.sectors, cycle + 1) } else { (record.end, cycle) }
    }

    /// The last whole record; none in a log that was never written.
    fn last_record(&self) -> Result<Option<Record>, Error> {
        if self.sectors < 2 {
            return Err(Error::damaged("", "it has no room"));
        }
        let first = self.cycle(0)?;
        if first == 0 {
            return Ok(None);
        }
        // The sectors before the head are of one cycle, those behind of the one before.
        let (mut below, mut above) = (0, self.sectors);
        while above - below > 1 {
            let middle = below + (above - below) / 2;
            if self.cycle(middle)? == first { below = middle } else { above = middle }
        }
        let head = above;
        // Buffers are written side by side: near the head some may be missing. From the earliest record on that is
        // there, the log goes as far as one whole record follows the other.
        let window = WINDOW.min(self.sectors / 2);
        for back in (1..=window).rev() {
            let (sector, cycle) = match head.checked_sub(back) {
                Some(sector) => (sector, first),
                None => (head + self.sectors - back, first.saturating_sub(1)),
            };
            let Some(mut last) = self.record(sector, cycle)? else { continue };
            let mut next = self.after(&last, cycle);
            // Each record is longer than nothing, and a cycle of its own ends this.
            while let Some(record) = self.record(next.0, next.1)? {
                next = self.after(&record, next.1);
                last = record;
            }
            return Ok(Some(last));
        }
        Err(Error::damaged("", "no whole record is before its head"))
    }

    fn cycle(&self, sector: u64) -> Result<u64, Error> {
        let mut start = [0; 8];
        self.source.read_at(ByteOffset(self.start.0 + sector * SECTOR), &mut start)?;
        let first = be32(&start, 0)?;
        Ok(u64::from(if first == MAGIC { be32(&start, 4)? } else { first }))
    }

    /// Reads sectors, round the end.
    fn sectors(&self, sector: u64, count: u64) -> Result<Vec<u8>, Error> {
        let mut bytes = vec![0; (count * SECTOR) as usize];
        let straight = count.min(self.sectors - sector);
        let (before, behind) = bytes.split_at_mut((straight * SECTOR) as usize);
        self.source.read_at(ByteOffset(self.start.0 + sector * SECTOR), before)?;
        self.source.read_at(self.start, behind)?;
        Ok(bytes)
    }

    /// The record of this cycle at a sector; none when none is there, or not all of it.
    fn record(&self, sector: u64, cycle: u64) -> Result<Option<Record>, Error> {
        if sector >= self.sectors {
            return Ok(None);
        }
        let header = self.sectors(sector, 1)?;
        let lsn = cycle << 32 | sector;
        if be32(&header, 0)? != MAGIC || be64(&header, 16)? != lsn {
            return Ok(None);
        }
        let (length, size) = (be32(&header, 12)?, be32(&header, 320)?);
        if be32(&header, 300)? != 1 {
            let what = "this log was written by a machine of another byte order".to_owned();
            return Err(Error::Unsupported { what });
        }
        let headers = match be32(&header, 8)? & 2 {
            0 => 1,
            _ => u64::from(size).div_ceil(CYCLES as u64 * SECTOR).max(1),
        };
        let data = u64::from(length).div_ceil(SECTOR);
        if length > LENGTH_MAX
            || headers * CYCLES as u64 > u64::from(LENGTH_MAX)
            || data > headers * CYCLES as u64
            || headers + data > self.sectors
        {
            return Ok(None);
        }
        let mut bytes = self.sectors(sector, headers + data)?;
        let mut operations = bytes.split_off((headers * SECTOR) as usize);
        operations.truncate(length as usize);
        if self.has_crc && !is_whole(&bytes, &operations)? {
            return Ok(None);
        }
        for (number, sector) in operations.chunks_mut(SECTOR as usize).enumerate() {
            let (header, within) = (number / CYCLES, number % CYCLES);
            let at = header * SECTOR as usize + if header == 0 { 44 } else { 4 } + within * 4;
            let count = sector.len().min(4);
            sector[..count].copy_from_slice(part(&bytes, at, count)?);
        }
        let tail = be64(&header, 24)?;
        Ok(Some(Record { lsn, tail, end: sector + headers + data, operations }))
    }
}

/// Whether the checksum of a record is right. Its header has two lengths, by the machine it was written on.
fn is_whole(headers: &[u8], operations: &[u8]) -> Result<bool, Error> {
    let stored = le32(headers, 32)?;
    // Headers that this record has no cycles for are there, and not in the sum.
    let used = operations.len().div_ceil(CYCLES * SECTOR as usize);
    for length in [328, 324] {
        let mut sum = crc32c::crc32c_append(crc32c::crc32c(&headers[..32]), &[0; 4]);
        sum = crc32c::crc32c_append(sum, &headers[36..length]);
        for more in headers.chunks(SECTOR as usize).skip(1).take(used.saturating_sub(1)) {
            sum = crc32c::crc32c_append(sum, &more[..260]);
        }
        if crc32c::crc32c_append(sum, operations) == stored {
            return Ok(true);
        }
    }
    #[cfg(test)]
    if crate::golden::takes_every_checksum() {
        return Ok(true);
    }
    Ok(false)
}

/// Puts a record's operations to their transactions, and hands over those that are committed with it.
fn replay_operations(
    record: &Record,
    open: &mut HashMap<u32, Transaction>,
    pending: &mut usize,
    each: &mut dyn FnMut(u64, Vec<Item>) -> Result<(), Error>,
) -> Result<(), Error> {
    let bytes = &record.operations;
    let mut at = 0;
    // Behind the last operation there is padding, shorter than one.
    while at + 12 <= bytes.len() {
        let (id, length, flags) = (be32(bytes, at)?, be32(bytes, at + 4)? as usize, byte(bytes, at + 9)?);
        let region = part(bytes, at + 12, length)?;
        at += 12 + length;
        if flags & UNMOUNT != 0 || id == 0 && length == 0 && flags == 0 {
            continue;
        }
        if flags & START != 0 {
            open.insert(id, Transaction { lsn: record.lsn, ..Transaction::default() });
            continue;
        }
        // What began before the tail is in its place already.
        let Some(transaction) = open.get_mut(&id) else { continue };
        *pending += length;
        if *pending > PENDING_MAX {
            let (what, limit) = ("the log of this XFS".to_owned(), PENDING_MAX as u64);
            return Err(Error::TooMany { what, of: "bytes of unfinished transactions", limit });
        }
        if flags & COMMIT != 0 {
            let Transaction { lsn, items, header } = open.remove(&id).expect("it is there");
            let bytes = items.iter().flatten().map(Vec::len).sum::<usize>() + header.len() + length;
            *pending = pending.saturating_sub(bytes);
            each(lsn, items)?;
        } else if flags & CONTINUED != 0 {
            transaction.go_on(region);
        } else {
            transaction.add(region)?;
        }
    }
    Ok(())
}

impl Transaction {
    /// A region of its own.
    fn add(&mut self, region: &[u8]) -> Result<(), Error> {
        if self.header.len() < TRANSACTION_HEADER {
            self.header.extend_from_slice(region);
            return Ok(());
        }
        // The first region of an item says how many it has.
        let is_complete = self.items.last().is_none_or(is_complete);
        if is_complete {
            if region.len() < 4 {
                return Err(Error::damaged("", "an item of it is cut short"));
            }
            self.items.push(Vec::new());
        }
        self.items.last_mut().expect("one is there").push(region.to_vec());
        Ok(())
    }

    /// More of the region before, which did not fit into its record.
    fn go_on(&mut self, region: &[u8]) {
        let last = self.items.last_mut().and_then(|item| item.last_mut());
        last.unwrap_or(&mut self.header).extend_from_slice(region);
    }
}

/// Whether an item has as many regions as it says.
fn is_complete(item: &Item) -> bool {
    let count = item.first().and_then(|format| crate::fields::le16(format, 2).ok());
    count.is_none_or(|count| item.len() >= usize::from(count))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sum_of_a_record_has_only_the_headers_that_it_needs() {
        let mut headers = vec![7; 1024];
        for (length, is_second_in) in [(512, false), (33_000, true)] {
            let operations = vec![3; length];
            let mut sum = crc32c::crc32c_append(crc32c::crc32c(&headers[..32]), &[0; 4]);
            sum = crc32c::crc32c_append(sum, &headers[36..328]);
            if is_second_in {
                sum = crc32c::crc32c_append(sum, &headers[512..512 + 260]);
            }
            sum = crc32c::crc32c_append(sum, &operations);
            headers[32..36].copy_from_slice(&sum.to_le_bytes());
            assert!(is_whole(&headers, &operations).unwrap(), "{length}");
            headers[600] ^= 1;
            assert_eq!(is_whole(&headers, &operations).unwrap(), !is_second_in, "{length}");
            headers[600] ^= 1;
        }
    }
}
