//! What a mount would put from the journal over the volume: found in three passes, as the kernel does it.
//!
//! The first finds where the journal ends: each transaction counts from its commit on. The second finds which blocks
//! were revoked: those were freed, and what an earlier transaction has for them must not come back. The third finds the
//! newest copy of every other block.

use std::collections::{BTreeMap, HashMap};

use super::{
    Volume,
    checksum::{crc32, is_right},
    inode,
    journal::{COMMIT, DESCRIPTOR, Journal, REVOKE, Sums},
    map,
    patches::{Copied, MAGIC},
    superblock::{self, Superblock},
};
use crate::{
    Error,
    fields::{be32, be64, byte, le16, le32},
};

/// Descriptors and revocations that are read.
const RECORDS_MAX: usize = 1 << 20;

/// Blocks that they name.
const TAGS_MAX: usize = 4 << 20;
const REVOKED_MAX: usize = 4 << 20;

/// What a fast commit begins with, and how many bytes follow.
const FAST_HEAD: [u16; 2] = [9, 8];

/// The kind of a checksum in an older commit.
const CRC32: u8 = 1;

/// What a journal has.
#[derive(Debug, Default)]
pub(super) struct Replayed {
    /// The newest copy of each block.
    pub(super) copies: BTreeMap<u64, Copied>,
    /// The transaction that it ends before, when that is damaged.
    pub(super) damaged: Option<u32>,
    /// Whether fast commits follow.
    pub(super) is_fast: bool,
}

/// A descriptor or a revocation.
#[derive(Clone, Copy, Debug)]
struct Record {
    is_revocation: bool,
    sequence: u32,
    /// Its block of the journal.
    at: u32,
}

/// What the first pass has found.
struct Scan {
    records: Vec<Record>,
    /// The first transaction that does not count.
    end: u32,
    damaged: bool,
}

/// Whether the journal has something that a mount would not replay, as the superblock does not say that it must.
pub(super) fn is_left(volume: &Volume) -> bool {
    let superblock::Journal::Inode(number) = volume.superblock.journal else { return false };
    with_journal(volume, number, |journal| Ok(journal.start != 0)).unwrap_or(false)
}

/// Finds what is in the journal.
pub(super) fn replay(volume: &Volume) -> Result<Replayed, Error> {
    let replayed = match volume.superblock.journal {
        superblock::Journal::None => Ok(Replayed::default()),
        superblock::Journal::Elsewhere => {
            let what = "it is on a device of its own".to_owned();
            return Err(Error::Unsupported { what });
        }
        superblock::Journal::Inode(number) => {
            with_journal(volume, number, |journal| copies(journal, &volume.superblock))
        }
    };
    replayed.map_err(|error| error.of(|| "the journal of this ext file system".to_owned()))
}

fn with_journal<T>(
    volume: &Volume,
    number: u32,
    look: impl FnOnce(&Journal<'_>) -> Result<T, Error>,
) -> Result<T, Error> {
    let inode = inode::read(volume, number.into())?;
    if inode.is_inline() || inode.is_encrypted() {
        return Err(Error::damaged("", "its blocks are none"));
    }
    let contents = map::stored(volume, &inode)?;
    look(&Journal::open(volume.source.unpatched(), contents, &volume.superblock)?)
}

fn copies(journal: &Journal<'_>, superblock: &Superblock) -> Result<Replayed, Error> {
    if journal.start == 0 {
        return Ok(Replayed::default());
    }
    let scan = scan(journal)?;
    let revoked = revoked(journal, &scan.records)?;
    let mut copies = BTreeMap::new();
    for record in scan.records.iter().filter(|record| !record.is_revocation) {
        let mut at = record.at;
        for tag in journal.tags(&journal.block(record.at)?)? {
            at = journal.after(at, 1);
            // What was freed since may hold the bytes of a file by now.
            if revoked.get(&tag.block).is_some_and(|revoked| !is_later(record.sequence, *revoked)) {
                continue;
            }
            if journal.sums == Sums::Half || journal.sums == Sums::Full {
                let block = journal.block(at)?;
                if !journal.is_block_right(&block, tag, record.sequence) {
                    let why = format!("the checksum of its block {at} is another");
                    return Err(Error::damaged("", why));
                }
            }
            // The first block may hold the superblock.
            if tag.block >= superblock.blocks {
                let why = format!("it changes block {} of the volume, which is not there", tag.block);
                return Err(Error::damaged("", why));
            }
            copies.insert(tag.block, Copied { at: journal.place(at)?, is_escaped: tag.is_escaped });
        }
    }
    let is_fast = is_fast(journal, scan.end)?;
    Ok(Replayed { copies, damaged: scan.damaged.then_some(scan.end), is_fast })
}

/// Finds where the journal ends, and what is before.
fn scan(journal: &Journal<'_>) -> Result<Scan, Error> {
    let mut found = Scan { records: Vec::new(), end: journal.sequence, damaged: false };
    // Of the transaction that has no commit yet: its records, its sum, and whether a checksum was wrong.
    let (mut open, mut sum, mut is_doubtful) = (Vec::new(), u32::MAX, false);
    let (mut at, mut walked, mut tags, mut last_time) = (journal.start, 0_u64, 0, 0);
    loop {
        let block = journal.block(at)?;
        if block[..4] != MAGIC || be32(&block, 8)? != found.end {
            return Ok(found);
        }
        let (kind, record_at) = (be32(&block, 4)?, at);
        let mut step = 1;
        match kind {
            DESCRIPTOR => {
                is_doubtful |= !journal.is_tail_right(&block)?;
                // A block has fewer tags than bytes.
                let count = journal.tags(&block)?.len() as u32;
                tags += count as usize;
                if journal.sums == Sums::Commits {
                    sum = crc32(sum, &block);
                    for number in 1..=count.min(ring_length(journal)) {
                        sum = crc32(sum, &journal.block(journal.after(at, number))?);
                    }
                }
                step += count;
            }
            REVOKE => is_doubtful |= !journal.is_tail_right(&block)?,
            COMMIT => {
                let time = be64(&block, 48)?;
                let is_right = match journal.sums {
                    Sums::Commits => is_sum_right(&block, sum)?,
                    _ => !is_doubtful && journal.is_commit_right(&block)?,
                };
                if !is_right {
                    // One of an earlier round is none of these. With commits that do not wait, the last may be half written.
                    let is_half = !is_doubtful && journal.is_asynchronous;
                    found.damaged = time >= last_time && !is_half;
                    return Ok(found);
                }
                found.records.append(&mut open);
                (found.end, sum, last_time) = (found.end.wrapping_add(1), u32::MAX, time);
            }
            _ => return Ok(found),
        }
        if kind != COMMIT {
            let is_revocation = kind == REVOKE;
            open.push(Record { is_revocation, sequence: found.end, at: record_at });
        }
        if found.records.len() + open.len() > RECORDS_MAX {
            return Err(too_many("descriptors", RECORDS_MAX));
        }
        if tags > TAGS_MAX {
            return Err(too_many("blocks to replay", TAGS_MAX));
        }
        walked += u64::from(step);
        if walked > u64::from(ring_length(journal)) {
            return Err(Error::damaged("", "it is longer than it has room"));
        }
        at = journal.after(at, step);
    }
}

fn ring_length(journal: &Journal<'_>) -> u32 {
    journal.ring.end - journal.ring.start
}

/// Whether an older commit has the sum of its transaction, or none.
fn is_sum_right(block: &[u8], sum: u32) -> Result<bool, Error> {
    let (kind, length, stored) = (byte(block, 12)?, byte(block, 13)?, be32(block, 16)?);
    let is_none = (kind, length, stored) == (0, 0, 0);
    Ok(is_none || (kind, length) == (CRC32, 4) && is_right(stored, sum))
}

/// Which blocks were revoked, and the last transaction that has done so.
fn revoked(journal: &Journal<'_>, records: &[Record]) -> Result<HashMap<u64, u32>, Error> {
    let mut revoked: HashMap<u64, u32> = HashMap::new();
    for record in records.iter().filter(|record| record.is_revocation) {
        for block in journal.revoked(&journal.block(record.at)?)? {
            let last = revoked.entry(block).or_insert(record.sequence);
            if is_later(record.sequence, *last) {
                *last = record.sequence;
            }
        }
        if revoked.len() > REVOKED_MAX {
            return Err(too_many("revoked blocks", REVOKED_MAX));
        }
    }
    Ok(revoked)
}

/// Whether one transaction comes behind another: their numbers go round.
fn is_later(one: u32, other: u32) -> bool {
    one.wrapping_sub(other).cast_signed() > 0
}

/// Whether a fast commit follows the transaction before `end`.
fn is_fast(journal: &Journal<'_>, end: u32) -> Result<bool, Error> {
    for block in &journal.fast {
        let block = journal.block(*block)?;
        if [le16(&block, 0)?, le16(&block, 2)?] == FAST_HEAD && le32(&block, 8)? == end {
            return Ok(true);
        }
    }
    Ok(false)
}

fn too_many(of: &'static str, limit: usize) -> Error {
    Error::TooMany { what: "the journal of this ext file system".to_owned(), of, limit: limit as u64 }
}
