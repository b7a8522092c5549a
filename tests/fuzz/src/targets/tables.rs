//! Tables of partitions, as guests write them: a GPT with both headers, and boot records with a chain of logical partitions.

use std::rc::Rc;

use backtide_filesystems::{
    Source, Window,
    partitions::{Mark, table},
};
use backtide_units::ByteOffset;

use super::volumes::{SECTOR, Sparse, pack};
use crate::Target;

/// Sectors of a sample.
const SECTORS: usize = 4096;

/// Entries of its GPT, and the sectors that they take.
const ENTRIES: usize = 8;
const ENTRY: usize = 128;
const ENTRY_SECTORS: usize = ENTRIES * ENTRY / SECTOR;

const HEADER: usize = 92;

pub(super) fn target() -> Target {
    let samples = vec![pack(&boot_records()), pack(&gpt())];
    Target { name: "partitions", seeds: 1500, samples, mend, take }
}

/// Writes an entry of a boot record.
fn entry(disk: &mut [u8], record: usize, number: usize, kind: u8, start: u32, count: u32) {
    let sector = &mut disk[record * SECTOR..(record + 1) * SECTOR];
    let entry = &mut sector[446 + number * 16..462 + number * 16];
    entry[4] = kind;
    entry[8..12].copy_from_slice(&start.to_le_bytes());
    entry[12..16].copy_from_slice(&count.to_le_bytes());
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
}

fn boot_records() -> Vec<u8> {
    let mut disk = vec![0; SECTORS * SECTOR];
    entry(&mut disk, 0, 0, 0x83, 64, 128);
    entry(&mut disk, 0, 1, 0x05, 1024, 2048);
    for (record, next) in [(1024, 512), (1536, 1024), (2048, 0)] {
        entry(&mut disk, record, 0, 0x83, 8, 64);
        if next > 0 {
            entry(&mut disk, record, 1, 0x05, next, 512);
        }
    }
    disk
}

fn gpt() -> Vec<u8> {
    let mut disk = vec![0; SECTORS * SECTOR];
    entry(&mut disk, 0, 0, 0xee, 1, SECTORS as u32 - 1);
    let last = SECTORS - 1;
    for (at, other, entries) in [(1, last, 2), (last, 1, last - ENTRY_SECTORS)] {
        for number in 0..3 {
            let entry = &mut disk[entries * SECTOR + number * ENTRY..][..ENTRY];
            entry[..32].fill(number as u8 + 1);
            entry[32..40].copy_from_slice(&(64 + number as u64 * 256).to_le_bytes());
            entry[40..48].copy_from_slice(&(64 + number as u64 * 256 + 127).to_le_bytes());
            entry[56] = b'a';
        }
        let header = &mut disk[at * SECTOR..][..HEADER];
        header[..8].copy_from_slice(b"EFI PART");
        header[10..12].copy_from_slice(&[1, 0]);
        header[12..16].copy_from_slice(&(HEADER as u32).to_le_bytes());
        let numbers = [(24, at), (32, other), (40, 8), (48, SECTORS - 8), (72, entries)];
        for (place, number) in numbers {
            header[place..place + 8].copy_from_slice(&(number as u64).to_le_bytes());
        }
        header[80..84].copy_from_slice(&(ENTRIES as u32).to_le_bytes());
        header[84..88].copy_from_slice(&(ENTRY as u32).to_le_bytes());
    }
    let mut packed = pack(&disk);
    mend(&mut packed);
    unpack(&packed)
}

fn unpack(packed: &[u8]) -> Vec<u8> {
    let sparse = Sparse::new(packed);
    let mut disk = vec![0; SECTORS * SECTOR];
    sparse.read_at(ByteOffset::ZERO, &mut disk).expect("as long as it was");
    disk
}

/// Puts the checksums of headers right, of their entries first, where there are few enough of them.
fn mend(packed: &mut [u8]) {
    let sparse = Sparse::new(packed);
    for chunk in packed.get_mut(4..).unwrap_or_default().chunks_exact_mut(4 + SECTOR) {
        let header = &mut chunk[4..];
        if !header.starts_with(b"EFI PART") {
            continue;
        }
        let number = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().expect("four bytes"));
        let (count, length, size) = (number(80) as usize, number(84) as usize, number(12) as usize);
        let first = u64::from(number(72)) * SECTOR as u64;
        let mut entries = vec![0; count.min(64) * length.min(ENTRY)];
        if sparse.read_at(ByteOffset(first), &mut entries).is_ok() {
            header[88..92].copy_from_slice(&crc32(&entries).to_le_bytes());
        }
        header[16..20].fill(0);
        let crc = crc32(&header[..size.min(SECTOR)]);
        header[16..20].copy_from_slice(&crc.to_le_bytes());
    }
}

/// The CRC of a GPT, which is another one than ours.
fn crc32(bytes: &[u8]) -> u32 {
    let step = |crc: u32, byte: &u8| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ if crc & 1 == 1 { 0xedb8_8320 } else { 0 })
    };
    !bytes.iter().fold(u32::MAX, step)
}

fn take(packed: &[u8]) {
    let disk = Rc::new(Sparse::new(packed));
    for mark in [Mark::None, Mark::Behind] {
        let Ok(found) = table(disk.as_ref(), mark) else { continue };
        for (_, range) in found {
            let part = Window::new(Rc::clone(&disk) as Rc<dyn Source>, range);
            assert!(part.size().0 <= disk.size().0, "{range:?}");
            let _ = part.read_at(ByteOffset::ZERO, &mut [0; SECTOR]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Else nothing of what is done to them would reach a parser.
    #[test]
    fn samples_are_read_as_the_tables_that_they_are() {
        let read = |disk: &[u8]| table(&Sparse::new(&pack(disk)), Mark::None).unwrap().len();
        assert_eq!(read(&boot_records()), 4);
        let mut disk = gpt();
        assert_eq!(read(&disk), 3);
        // The second header takes the place of the first.
        disk[SECTOR] = 0;
        assert_eq!(read(&disk), 3);
    }
}
