//! The files of a store: segments, bases, packs of images, overlays.

use std::{
    ops::Range,
    path::{Path, PathBuf},
    sync::Arc,
};

use backtide_images::{Images, ImagesLimits, Losses, ROOT_LENGTH, Root};
use backtide_overlay::{OverlayFiles, OverlayId};
use backtide_recovery::{
    CacheLimits, DiskLog, FoundBase, LogCache, LogOptions, Snapshot, Unreadable, salvage,
};
use backtide_segment::{SealedSegment, SegmentFile, Seq, inspect, scan, scan_prefix};
use backtide_storage::Storage;
use backtide_units::{ByteCount, ByteOffset, ByteRange, Lsn};
use uuid::Uuid;

use super::{golden, leave, storage_with};
use crate::Target;

const PACK: &str = "images/packs/0000000000000001.pack";
const LOG: &str = "disks/d1";

pub(super) fn targets() -> Vec<Target> {
    let segments = || {
        ["sealed", "open", "pieces", "lz4", "zstd"]
            .map(|name| golden(&format!("segment/{name}.seg")))
            .to_vec()
    };
    vec![
        Target {
            name: "batch",
            seeds: 3000,
            samples: ["lz4", "zstd"].map(|name| golden(&format!("segment/{name}.seg"))).to_vec(),
            mend: mend_batches,
            take: segment,
        },
        Target { name: "segment", seeds: 1500, samples: segments(), mend: mend_segment, take: segment },
        Target { name: "log", seeds: 1500, samples: segments(), mend: mend_segment, take: log },
        Target {
            name: "base",
            seeds: 4000,
            samples: vec![golden("segment/base.1")],
            mend: mend_tail,
            take: base,
        },
        Target {
            name: "pack",
            seeds: 2000,
            samples: vec![golden("images/0000000000000001.pack")],
            mend: leave,
            take: pack,
        },
        Target {
            name: "image root",
            seeds: 1000,
            samples: golden("images/roots").chunks(ROOT_LENGTH).map(<[u8]>::to_vec).collect(),
            mend: leave,
            take: root,
        },
        Target {
            name: "overlay map",
            seeds: 3000,
            samples: vec![golden("overlay/vm1-1.map")],
            mend: leave,
            take: overlay,
        },
    ]
}

/// The parts of a segment that have a checksum right behind their start or end: its header, and its entries' headers.
fn mend_segment(bytes: &mut [u8]) {
    mend_entries(bytes, false);
}

/// The same, and the tables and frames of batches: what is decompressed is whatever it is then.
fn mend_batches(bytes: &mut [u8]) {
    mend_entries(bytes, true);
}

fn mend_entries(bytes: &mut [u8], bodies: bool) {
    let Some(header) = bytes.get(..128) else { return };
    let (salt, crc) = (crc32c::crc32c(&header[16..48]), crc32c::crc32c(&header[..124]));
    bytes[124..128].copy_from_slice(&crc.to_le_bytes());
    let mut at = 128;
    while let Some(entry) = bytes.get(at..at + 64) {
        let length = u32_at(entry, 48) as usize;
        if entry.iter().all(|byte| *byte == 0) || length > bytes.len() {
            break;
        }
        let crc = crc32c::crc32c_append(salt, &entry[4..]);
        bytes[at..at + 4].copy_from_slice(&crc.to_le_bytes());
        if bytes[at + 5] & 8 != 0 {
            at += 64;
            if u16::from_le_bytes([bytes[at - 58], bytes[at - 57]]) == 1 {
                let Some(end) = mend_body(bytes, at, salt, bodies) else { break };
                at = end;
            }
            continue;
        }
        let table = if length > 65_536 { (length.div_ceil(65_536) * 4).next_multiple_of(8) } else { 0 };
        at += 64 + table + length.next_multiple_of(8);
    }
    mend_footer(bytes, salt);
}

/// The body of a batch: its header, and what it contains, frames and table. Gives its end when it has one.
fn mend_body(bytes: &mut [u8], at: usize, salt: u32, contents: bool) -> Option<usize> {
    let header = bytes.get(at..at + 64)?;
    let entries = usize::from(u16::from_le_bytes([header[6], header[7]]));
    let (payload, stored) = (u32_at(header, 16) as usize, u32_at(header, 20) as usize);
    let table = at + 64 + entries * 4;
    let frames = table + payload.div_ceil(65_536) * 12;
    let end = frames.checked_add(stored).filter(|end| *end <= bytes.len())?;
    let mut start = frames;
    for record in (table..frames).step_by(12).take_while(|_| contents) {
        let frame_end = frames + u32_at(bytes, record) as usize;
        if (start..=end).contains(&frame_end) {
            put_crc(bytes, start..frame_end, record + 4, 0);
            start = frame_end;
        }
    }
    if contents {
        put_crc(bytes, at + 64..frames, at + 24, 0);
    }
    put_crc(bytes, at + 4..at + 64, at, salt);
    Some(end.next_multiple_of(8))
}

/// The parts of a footer lie before its trailer, with lengths and checksums in it.
fn mend_footer(bytes: &mut [u8], salt: u32) {
    let Some(trailer) = bytes.len().checked_sub(144).filter(|at| bytes[*at..].starts_with(b"BKTDEND\n"))
    else {
        return;
    };
    let mut end = trailer;
    for length_at in [128, 120, 112] {
        let length = u32_at(bytes, trailer + length_at) as usize;
        let Some(start) = end.checked_sub(length) else { break };
        put_crc(bytes, start..end, trailer + length_at + 4, 0);
        end = start;
    }
    put_crc(bytes, trailer..trailer + 140, trailer + 140, salt);
}

fn put_crc(bytes: &mut [u8], part: Range<usize>, at: usize, start: u32) {
    let crc = crc32c::crc32c_append(start, &bytes[part]);
    bytes[at..at + 4].copy_from_slice(&crc.to_le_bytes());
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

/// The last four bytes are the checksum of all before.
fn mend_tail(bytes: &mut [u8]) {
    if let Some(at) = bytes.len().checked_sub(4) {
        put_crc(bytes, 0..at, at, 0);
    }
}

fn segment(bytes: &[u8]) {
    let path = Path::new("x.seg");
    let storage = storage_with(&[(path, bytes)]);
    inspect(&storage, path, &mut std::io::sink()).expect("a listing");
    let file = SegmentFile::new(storage.open(path).expect("open"), path.to_owned());
    let Ok(header) = file.header() else { return };
    let _ = scan(&file, header, Seq(0), Seq(0));
    let _ = scan(&file, header, Seq(1000), Seq(3));
    let _ = scan_prefix(&file, header, Seq(u64::MAX >> 1), Seq(0));
    if let Ok(Some(sealed)) = SealedSegment::open(&file, header) {
        let _ = sealed.verify(&file);
        let _ = file.mend_footer(&sealed);
    }
}

/// A log whose first segment this is.
fn log(bytes: &[u8]) {
    let path = Path::new(LOG).join("segments/0000000000000001.seg");
    let storage = storage_with(&[(&path, bytes)]);
    let shared: Arc<dyn Storage> = Arc::new(storage);
    let cache = LogCache::new(CacheLimits {
        index_bytes_max: ByteCount(1 << 16),
        open_files_max: 4,
        ..CacheLimits::default()
    });
    if let Ok(left) = salvage(&shared, Path::new(LOG), &cache, None, None, |_| Seq(0), Unreadable::IsDamage) {
        read_everything(&left.snapshot);
        let _ = left.check(&mut |_| true);
    }
    if let Ok((mut log, _)) = DiskLog::open(shared, Path::new(LOG), LogOptions::default(), &cache) {
        let snapshot = log.snapshot().expect("a log that was just opened");
        read_everything(&snapshot);
        let _ = snapshot.check_and_mend(&|_| None, &mut |_| true);
    }
}

fn read_everything(snapshot: &Snapshot) {
    let intervals = snapshot.timeline().intervals();
    let points: Vec<Lsn> = intervals.iter().flat_map(|i| [i.from.lsn, i.to.lsn]).take(4).collect();
    for at in points.into_iter().chain([Lsn::MAX]) {
        let view = snapshot.newest_view(at);
        let _ = view.read(ByteRange::between(ByteOffset(0), ByteOffset(1 << 18)));
        let _ = view.extents(ByteRange::between(ByteOffset(0), ByteOffset(1 << 44)));
        let _ = (snapshot.time_of(at), snapshot.changed_blocks(Lsn(1), at));
    }
}

fn base(bytes: &[u8]) {
    let path = Path::new(LOG).join("base.1");
    let storage = storage_with(&[(&path, bytes)]);
    let _ = backtide_recovery::inspect(&storage, &path, &mut std::io::sink());
    if let Ok(found) = FoundBase::read(&storage, Path::new(LOG)) {
        assert!(found.base.is_some() || !found.damage.is_empty());
        let images = Images::new(Arc::new(storage), ImagesLimits::default());
        for root in found.roots {
            read_image(&images, root);
        }
    }
}

fn read_image(images: &Images, root: Root) {
    let image = images.image(root);
    let mut buffer = vec![0; 1 << 18];
    let _ = image.read_into(ByteRange::between(ByteOffset(0), ByteOffset(1 << 18)), &mut buffer);
    let mut chunks = 0_u64;
    let _ = image.data_in(ByteRange::between(ByteOffset(0), ByteOffset(1 << 24)), &mut |_| chunks += 1);
}

fn pack(bytes: &[u8]) {
    let path = Path::new(PACK);
    let storage = storage_with(&[(path, bytes)]);
    let _ = backtide_images::inspect(&storage, path, &mut std::io::sink());
    let images = Images::new(Arc::new(storage), ImagesLimits::default());
    let roots = golden("images/roots");
    let roots: Vec<Root> = roots.chunks(ROOT_LENGTH).filter_map(Root::decode).collect();
    roots.iter().for_each(|root| read_image(&images, *root));
    let (mut losses, mut seen) = (Losses::default(), Default::default());
    for (number, root) in roots.iter().enumerate() {
        let _ = images.image(*root).check(number, &mut seen, &mut losses, &mut |_| true);
    }
    let _ = images.mend(&losses, &seen, &mut |_, _| None, &mut |_| true);
    let _ = images.collect(&roots[..1]);
}

fn root(bytes: &[u8]) {
    let Some(root) = Root::decode(bytes) else { return };
    let pack = golden("images/0000000000000001.pack");
    let images = Images::new(Arc::new(storage_with(&[(Path::new(PACK), &pack)])), ImagesLimits::default());
    read_image(&images, root);
}

fn overlay(bytes: &[u8]) {
    let (map, data) = (PathBuf::from("overlays/vm1-1.map"), PathBuf::from("overlays/vm1-1.data"));
    let blocks = golden("overlay/vm1-1.data");
    let storage: Arc<dyn Storage> = Arc::new(storage_with(&[(&map, bytes), (&data, &blocks)]));
    let files = OverlayFiles { map, data };
    let (id, size) = (OverlayId(Uuid::from_u128(0x0e7)), ByteCount(23 * 4096 + 512));
    let _ = backtide_overlay::check(&storage, &files, id, size, &mut |_| true);
}
