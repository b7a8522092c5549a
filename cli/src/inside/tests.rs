//! Partition tables over real NBD connections; files are tried in the stories of whole systems.

mod walks;

use std::rc::Rc;

use backtide_export::{
    Client, Command, Export, ExportInfo, ExportSummary, Exports, Limits, Listener, NbdAddress, NbdError,
    NbdUri, Reply,
};
use backtide_filesystems::{Source, Window};
use backtide_units::{ByteCount, ByteOffset, ByteRange};
use bytes::Bytes;
use tokio::{runtime::Handle, task::LocalSet};

use super::*;

const MIB: usize = 1 << 20;

/// A disk, and the bytes of it that cannot be read.
struct Ram(Bytes, Option<ByteRange>);

impl Export for Ram {
    fn info(&self) -> ExportInfo {
        ExportInfo { read_only: true, ..ExportInfo::new("ram", ByteCount::of(&self.0)) }
    }

    fn submit(&self, command: Command, reply: Reply) {
        let range = command.range();
        match command {
            Command::Read { .. } if self.1.is_some_and(|bad| bad.overlaps(range)) => reply.fail(NbdError::Io),
            Command::Read { .. } => {
                reply.data(self.0.slice(range.start().0 as usize..range.end().0 as usize));
            }
            _ => reply.fail(NbdError::NotSupported),
        }
    }
}

struct Only(Rc<Ram>);

impl Exports for Only {
    fn find(&self, _: &str) -> Option<Rc<dyn Export>> {
        Some(Rc::clone(&self.0) as Rc<dyn Export>)
    }

    fn list(&self) -> Vec<ExportSummary> {
        Vec::new()
    }
}

/// What `look` finds on a disk of these bytes.
fn on<T: Send + 'static>(disk: Vec<u8>, look: impl FnOnce(PointReader) -> T + Send + 'static) -> T {
    on_damaged(disk, None, look)
}

/// The same when some of them cannot be read.
fn on_damaged<T: Send + 'static>(
    disk: Vec<u8>,
    bad: Option<ByteRange>,
    look: impl FnOnce(PointReader) -> T + Send + 'static,
) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    LocalSet::new().block_on(&runtime, async move {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("disk");
        let listener = Listener::bind(&NbdAddress::Unix(socket.clone())).await.unwrap();
        let _server = listener.serve(Rc::new(Only(Rc::new(Ram(disk.into(), bad)))), Limits::default());
        let uri: NbdUri = format!("nbd+unix:///?socket={}", socket.display()).parse().unwrap();
        let client = Client::connect(&uri).await.unwrap();
        let runtime = Handle::current();
        tokio::task::spawn_blocking(move || look(PointReader::new(client, runtime))).await.unwrap()
    })
}

fn told(disk: Vec<u8>) -> Vec<(u32, u64, u64, Content)> {
    let found = on(disk, |disk| partitions(&Rc::new(disk)).unwrap());
    found.iter().map(|part| (part.number, part.offset.0, part.length.0, part.content)).collect()
}

/// Writes an entry of a boot record.
fn entry(disk: &mut [u8], record: usize, number: usize, kind: u8, start: u32, count: u32) {
    let at = record * 512 + 446 + number * 16;
    disk[at + 4] = kind;
    disk[at + 8..at + 12].copy_from_slice(&start.to_le_bytes());
    disk[at + 12..at + 16].copy_from_slice(&count.to_le_bytes());
    disk[record * 512 + 510..record * 512 + 512].copy_from_slice(&[0x55, 0xaa]);
}

#[test]
fn a_disk_without_a_table_is_one_part() {
    assert_eq!(told(vec![0; MIB]), [(0, 0, MIB as u64, Content::Unknown)]);
    assert_eq!(told(vec![0; 512]), [(0, 0, 512, Content::Unknown)]);
    let mut ext = vec![0; MIB];
    ext[1080..1082].copy_from_slice(&[0x53, 0xef]);
    assert_eq!(told(ext), [(0, 0, MIB as u64, Content::Ext4)]);
    // The boot record of a FAT volume has a table's signature and no table.
    let mut fat = vec![0; MIB];
    fat[54..59].copy_from_slice(b"FAT16");
    fat[510..512].copy_from_slice(&[0x55, 0xaa]);
    assert_eq!(told(fat), [(0, 0, MIB as u64, Content::Fat)]);
}

#[test]
fn logical_partitions_have_the_numbers_that_linux_gives_them() {
    let mib = MIB as u64;
    let mut disk = vec![0; 8 * MIB];
    entry(&mut disk, 0, 0, 0x05, 2048, 8192);
    // The first record of the chain names no partition: it was deleted.
    entry(&mut disk, 2048, 1, 0x05, 2048, 4096);
    entry(&mut disk, 4096, 0, 0x83, 2048, 2048);
    entry(&mut disk, 4096, 1, 0x05, 6144, 4096);
    entry(&mut disk, 8192, 0, 0x83, 2048, 2048);
    let empty = Content::Unknown;
    assert_eq!(told(disk), [(5, 3 * mib, mib, empty), (6, 5 * mib, mib, empty)]);
}

#[test]
fn a_walk_keeps_only_so_many_names() {
    let mut held = 0;
    for _ in 0..3 {
        hold_names(&mut held, 1 << 20).unwrap();
    }
    let why = hold_names(&mut held, 1).unwrap_err();
    assert!(why.message.contains("more than 3145728 names"), "{}", why.message);
    assert_eq!(held, NAMES_HELD_MAX);
}

#[test]
fn marks_of_what_was_there_before_a_table_do_not_hide_it() {
    let (mib, mut disk) = (MIB as u64, vec![0; 4 * MIB]);
    disk[1080..1082].copy_from_slice(&[0x53, 0xef]);
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    let bare = [(0, 0, 4 * mib, Content::Ext4)];
    assert_eq!(told(disk.clone()), bare, "no entry of a table is used");
    let mut beyond = disk.clone();
    entry(&mut beyond, 0, 0, 0x83, 2048, 1 << 20);
    assert_eq!(told(beyond), bare, "what an entry names is not there");
    let mut mbr = disk.clone();
    entry(&mut mbr, 0, 0, 0x83, 2048, 2048);
    mbr[MIB..MIB + 4].copy_from_slice(b"XFSB");
    assert_eq!(told(mbr.clone()), [(1, mib, mib, Content::Xfs)]);
    // What begins in the place of the table is there.
    mbr[3..11].copy_from_slice(b"NTFS    ");
    mbr[1080..1082].fill(0);
    assert_eq!(told(mbr), [(0, 0, 4 * mib, Content::Ntfs)]);

    entry(&mut disk, 0, 0, 0xee, 1, 8191);
    assert_eq!(told(disk.clone()), bare, "a GPT without a header");
    let table = gpt::GptConfig::new().writable(true).logical_block_size(gpt::disk::LogicalBlockSize::Lb512);
    let mut table = table.create_from_device(std::io::Cursor::new(&mut disk[..]), None).unwrap();
    table.add_partition("one", mib, gpt::partition_types::LINUX_FS, 0, None).unwrap();
    table.write().unwrap();
    disk[0x1_0040..0x1_0048].copy_from_slice(b"_BHRfS_M");
    let found = told(disk);
    assert_eq!((found.len(), found[0].0, found[0].2), (1, 1, mib), "{found:?}");
}

#[test]
fn a_partition_whose_beginning_cannot_be_read_is_damaged_and_the_others_are_there() {
    let mut disk = vec![0; 4 * MIB];
    entry(&mut disk, 0, 0, 0x83, 2048, 2048);
    entry(&mut disk, 0, 1, 0x83, 4096, 4096);
    let bad = |at: usize| ByteRange::new(ByteOffset(at as u64), ByteCount(4096));
    let said = |disk: Vec<u8>, at: usize, wanted: Option<&'static str>| {
        on_damaged(disk, bad(at), move |disk| {
            let disk = Rc::new(disk);
            let opened = Parts::find(&disk).and_then(|parts| {
                let opened = parts.choose(wanted)?.open(&disk);
                Ok((opened.map_err(|error| (error.code, error.message)).err(), parts.warnings()))
            });
            format!("{:?}", opened.map_err(|failure| format!("{failure:?}")))
        })
    };
    let why = said(disk.clone(), MIB, None);
    assert!(why.contains("Damaged") && why.contains("what partition 1 holds cannot be told"), "{why}");
    disk[2 * MIB + 1080..2 * MIB + 1082].copy_from_slice(&[0x53, 0xef]);
    let why = said(disk.clone(), MIB, None);
    assert!(why.contains("superblock of this ext"), "the other one can be read: {why}");
    assert!(why.contains("what partition 1 holds cannot be told"), "{why}");
    assert!(said(disk.clone(), MIB, Some("1")).contains("Damaged"));
    let why = said(disk, 0, None);
    assert!(why.contains("Damaged") && why.contains("the partitions cannot be read"), "{why}");
}

#[test]
fn primary_and_logical_partitions_are_found_with_what_they_hold() {
    let mut disk = vec![0; 8 * MIB];
    entry(&mut disk, 0, 0, 0x83, 2048, 2048);
    entry(&mut disk, 0, 1, 0x05, 6144, 10240);
    entry(&mut disk, 0, 3, 0x07, 4096, 2048);
    entry(&mut disk, 6144, 0, 0x83, 2048, 2048);
    entry(&mut disk, 6144, 1, 0x05, 4096, 4096);
    entry(&mut disk, 10240, 0, 0x83, 2048, 100_000);
    disk[MIB + 1080..MIB + 1082].copy_from_slice(&[0x53, 0xef]);
    disk[2 * MIB + 3..2 * MIB + 11].copy_from_slice(b"NTFS    ");
    disk[4 * MIB..4 * MIB + 4].copy_from_slice(b"XFSB");
    let mib = MIB as u64;
    assert_eq!(
        told(disk),
        [
            (1, mib, mib, Content::Ext4),
            (4, 2 * mib, mib, Content::Ntfs),
            (5, 4 * mib, mib, Content::Xfs),
            (6, 6 * mib, 2 * mib, Content::Unknown),
        ],
        "the last one is cut at the disk's end"
    );
}

#[test]
fn a_chain_of_tables_that_is_a_circle_or_leads_nowhere_ends() {
    let mut disk = vec![0; 8 * MIB];
    entry(&mut disk, 0, 0, 0x05, 2048, 4096);
    entry(&mut disk, 2048, 0, 0x83, 1, 1);
    entry(&mut disk, 2048, 1, 0x05, 0, 1);
    assert_eq!(told(disk.clone()).len(), 128);
    entry(&mut disk, 2048, 1, 0x05, u32::MAX, 1);
    assert!(on(disk.clone(), |disk| partitions(&Rc::new(disk)).is_err()));
    entry(&mut disk, 2048, 1, 0x05, 2048, 1);
    assert!(on(disk, |disk| partitions(&Rc::new(disk)).is_err()), "no record is there");
}

#[test]
fn damaged_lvm_keeps_nobody_from_the_other_partitions() {
    let mut disk = vec![0; 3 * MIB];
    entry(&mut disk, 0, 0, 0x8e, 2048, 2048);
    entry(&mut disk, 0, 1, 0x83, 4096, 2048);
    // A label whose checksum is another, and a volume with ext4.
    disk[MIB + 512..MIB + 520].copy_from_slice(b"LABELONE");
    disk[MIB + 536..MIB + 544].copy_from_slice(b"LVM2 001");
    disk[2 * MIB + 1080..2 * MIB + 1082].copy_from_slice(&[0x53, 0xef]);
    let (only, wanted, warnings) = on(disk.clone(), |disk| {
        let parts = Parts::find(&Rc::new(disk)).unwrap();
        let wanted = parts.choose(Some("vg1/root")).unwrap_err();
        (parts.choose(None).unwrap().name(), format!("{wanted:?}"), parts.warnings())
    });
    assert_eq!(only, "2");
    assert!(wanted.contains("label of the physical volume"), "{wanted}");
    assert!(warnings[0].starts_with("logical volumes cannot be found: "), "{warnings:?}");
    // When nothing else can be read, it is what is wrong.
    disk[2 * MIB + 1080..2 * MIB + 1082].fill(0);
    let why = on(disk, |disk| {
        let parts = Parts::find(&Rc::new(disk)).unwrap();
        format!("{:?}", parts.choose(None).unwrap_err())
    });
    assert!(why.contains("label of the physical volume"), "{why}");
}

#[test]
fn a_damaged_gpt_is_an_error() {
    let mut disk = vec![0; MIB];
    entry(&mut disk, 0, 0, 0xee, 1, 2047);
    disk[512..520].copy_from_slice(b"EFI PART");
    disk[592..596].copy_from_slice(&u32::MAX.to_le_bytes());
    assert!(on(disk, |disk| partitions(&Rc::new(disk)).is_err()));
}

/// Writes the header of a GPT, with a checksum that is right.
fn gpt_header(disk: &mut [u8], sector: usize, entries: u32, length: u32) {
    let header = &mut disk[sector * 512..sector * 512 + 92];
    header[..8].copy_from_slice(b"EFI PART");
    header[8..12].copy_from_slice(&0x1_0000_u32.to_le_bytes());
    header[12..16].copy_from_slice(&92_u32.to_le_bytes());
    header[24..32].copy_from_slice(&(sector as u64).to_le_bytes());
    header[72..80].copy_from_slice(&2_u64.to_le_bytes());
    header[80..84].copy_from_slice(&entries.to_le_bytes());
    header[84..88].copy_from_slice(&length.to_le_bytes());
    let mut crc = u32::MAX;
    for byte in &*header {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ if crc & 1 == 1 { 0xedb8_8320 } else { 0 };
        }
    }
    header[16..20].copy_from_slice(&(!crc).to_le_bytes());
}

#[test]
fn a_gpt_with_numbers_nobody_uses_is_refused_in_a_sentence() {
    let last = MIB / 512 - 1;
    for sector in [1, last] {
        for (entries, length) in [(128, 256), (128, 0), (1025, 128), (u32::MAX, 128)] {
            let mut disk = vec![0; MIB];
            entry(&mut disk, 0, 0, 0xee, 1, 2047);
            gpt_header(&mut disk, sector, entries, length);
            let why = on(disk, |disk| partitions(&Rc::new(disk)).unwrap_err().to_string());
            let said = format!("says it has {entries} entries of {length} bytes");
            assert!(why.contains(&said), "sector {sector}: {why}");
        }
        // With these it is the checksum of the entries that is wrong: the header is read.
        let mut disk = vec![0; MIB];
        entry(&mut disk, 0, 0, 0xee, 1, 2047);
        gpt_header(&mut disk, sector, 1024, 128);
        let why = on(disk, |disk| partitions(&Rc::new(disk)).unwrap_err().to_string());
        assert!(why.contains("CRC mismatch"), "sector {sector}: {why}");
    }
}

#[test]
fn a_point_reads_its_bytes_in_any_order_and_a_part_no_others() {
    let disk: Vec<u8> = (0..8 * MIB).map(|at| (at / 4096) as u8).collect();
    on(disk, |disk| {
        let disk: Rc<dyn Source> = Rc::new(disk);
        // More stretches than are remembered, forth and back.
        for at in (0..8 * MIB).step_by(100_000).chain((0..8 * MIB).rev().step_by(70_001)) {
            let mut byte = [0];
            disk.read_at(ByteOffset(at as u64), &mut byte).unwrap();
            assert_eq!(byte[0], (at / 4096) as u8, "{at}");
        }
        let range = ByteRange::between(ByteOffset(8192), ByteOffset(2_000_000));
        let part = Window::new(disk, range);
        let mut bytes = vec![0; 1_991_808];
        part.read_at(ByteOffset::ZERO, &mut bytes).unwrap();
        assert!(bytes.iter().enumerate().all(|(at, byte)| *byte == ((at + 8192) / 4096) as u8));
        assert!(part.read_at(ByteOffset(1_991_808), &mut [0]).is_err());
        assert!(part.read_at(ByteOffset(u64::MAX), &mut [0]).is_err());
        let mut pair = [0; 2];
        part.read_at(ByteOffset(4095), &mut pair).unwrap();
        assert_eq!(pair, [2, 3]);
    });
}
