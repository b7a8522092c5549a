//! Repairs that follow each other, of damage at random places: in several segments, their headers, entries, payloads and
//! footers, and in what lies beside the log.
//!
//! What must hold:
//! - No repair costs a point that could be read before it, the first as little as any after it.
//! - What lies below the mark of what is durable is never taken for a torn tail.
//! - Whatever can be read is what was written.
//! - What cannot be read after a repair is told: by the disk, or by what was found of it.

use std::collections::BTreeMap;

use backtide_fuzz::Random;
use backtide_recovery::{Compression, Snapshot, damaged_place};
use backtide_segment::{SealedSegment, SegmentFile};

use crate::watermark;

use super::*;

const SEEDS: u64 = 250;
const PAGES: u64 = 16;
const PAGE: u64 = 4096;

/// Which pages can be read, of each point that is offered.
type Readable = BTreeMap<Lsn, Vec<u64>>;

/// A store with one log, in segments as chance has it.
fn written(random: &mut Random) -> MemoryStorage {
    let storage = MemoryStorage::new();
    let shared: Arc<dyn Storage> = Arc::new(storage.clone());
    write_store(&shared).unwrap();
    let dir = Shelf::dir(IDENTITY.disk, 1);
    let options = LogOptions {
        segment_bytes_max: ByteCount(10_000 + random.below(30_000)),
        compression: [Compression::None, Compression::Lz4][random.below(2) as usize],
        ..LogOptions::default()
    };
    let cache = LogCache::new(Default::default());
    let mut log = DiskLog::create(Arc::clone(&shared), &dir, IDENTITY, options, &cache).unwrap();
    let last = Lsn(30 + random.below(60));
    let syncs_in = 1 + random.below(12);
    for entry in first_pass().into_iter().chain((6..=last.0).map(write)) {
        log.append(entry).unwrap();
        if random.below(syncs_in) == 0 {
            sync(&mut log);
        }
        if random.below(20) == 0 {
            log.seal().unwrap();
        }
    }
    sync_all(&mut log);
    if random.below(3) == 0 {
        log.seal().unwrap();
        sync_all(&mut log);
    }
    Watermark::replace(&storage, &dir, IDENTITY.history, Noted::whole(log.durable())).unwrap();
    let memo = Memo { identity: IDENTITY, attached: log.timeline().attached().unwrap().clone() };
    memo::write_durably(&storage, &dir, &memo).unwrap();
    if random.below(3) == 0 {
        tear(log, last, random);
        storage.crash(random.below(1 << 32));
    }
    storage
}

/// Writes more that is never synced.
fn tear(mut log: DiskLog, last: Lsn, random: &mut Random) {
    for entry in (last.0 + 1..=last.0 + 1 + random.below(10)).map(write) {
        log.append(entry).unwrap();
        if random.below(8) == 0 {
            log.seal().unwrap();
        }
    }
    // What is held back is written.
    log.snapshot().unwrap();
}

/// Where a segment can be damaged.
struct Place {
    kind: Kind,
    path: PathBuf,
    at: u64,
    length: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Header,
    EntryHeader,
    /// In a batch other headers stand there, or its body.
    Payload,
    Footer,
    Trailer,
    Missing,
    HalfGone,
    Mark,
    UnreadableMark,
    Memo,
}

/// Entries twice: what is lost with them is what the others may still tell of.
const KINDS: [Kind; 12] = [
    Kind::Header,
    Kind::EntryHeader,
    Kind::EntryHeader,
    Kind::Payload,
    Kind::Payload,
    Kind::Footer,
    Kind::Trailer,
    Kind::Missing,
    Kind::HalfGone,
    Kind::Mark,
    Kind::UnreadableMark,
    Kind::Memo,
];

fn places(storage: &MemoryStorage) -> Vec<Place> {
    let mut places = Vec::new();
    for (path, bytes) in segments(storage) {
        let mut put = |kind, at, length| places.push(Place { kind, path: path.clone(), at, length });
        let file = SegmentFile::new(storage.open(&path).unwrap(), path.clone());
        // One that was torn as it was made has no places.
        let Ok(header) = file.header() else { continue };
        let length = bytes.len() as u64;
        let mut end = length;
        put(Kind::Header, 0, 128);
        put(Kind::Missing, 0, 1);
        put(Kind::HalfGone, 0, length);
        if let Some(sealed) = SealedSegment::open(&file, header).unwrap() {
            end = sealed.entries_end().0;
            put(Kind::Footer, end, length - 144 - end);
            put(Kind::Trailer, length - 144, 144);
        }
        for (entry, position) in file.headers(header, ByteOffset(end)).map_while(Result::ok) {
            let at = position.offset().0;
            put(Kind::EntryHeader, at, 64);
            put(Kind::Payload, at + 64, entry.payload_length.into());
        }
    }
    places
}

/// One of several, as chance has it.
fn one<'a, T>(of: &'a [T], random: &mut Random) -> Option<&'a T> {
    of.get(random.below(of.len() as u64) as usize)
}

/// Does something to the store, in every second case to the segment `near`, and says what.
fn damage(storage: &MemoryStorage, places: &[Place], near: &Path, random: &mut Random) -> String {
    let kind = *one(&KINDS, random).unwrap();
    let dir = Shelf::dir(IDENTITY.disk, 1);
    let beside = |name| {
        let path = dir.join(name);
        if storage.open(&path).is_ok() {
            storage.remove(&path).unwrap();
            storage.sync_dir(&dir).unwrap();
        }
        path
    };
    match kind {
        Kind::Memo => drop(beside(memo::FILE)),
        Kind::Mark => {
            let path = beside(watermark::FILE);
            // Of long ago, or none.
            let durable = 3 + random.below(20);
            let durable = Durable { seq: Seq(durable), lsn: Lsn(durable + 2) };
            Watermark::replace(storage, &dir, IDENTITY.history, Noted::whole(durable)).unwrap();
            if random.below(2) == 0 {
                storage.flip_bit(&path, ByteOffset(random.below(60)), 2);
            }
        }
        Kind::UnreadableMark => {
            let path = dir.join(watermark::FILE);
            storage.make_unreadable(&path, ByteRange::new(ByteOffset(0), ByteCount(512)).unwrap());
        }
        Kind::Header
        | Kind::EntryHeader
        | Kind::Payload
        | Kind::Footer
        | Kind::Trailer
        | Kind::Missing
        | Kind::HalfGone => {
            let there: Vec<_> = segments(storage).into_iter().map(|(path, _)| path).collect();
            let mut of_kind: Vec<_> =
                places.iter().filter(|place| place.kind == kind && there.contains(&place.path)).collect();
            if random.below(2) == 0 {
                of_kind.retain(|place| place.path == near);
            }
            let Some(Place { path, at, length, .. }) = one(&of_kind, random) else { return String::new() };
            let at = at + random.below(*length);
            match kind {
                Kind::Missing => storage.remove(path).unwrap(),
                Kind::HalfGone => storage.open(path).unwrap().set_len(ByteCount(at)).unwrap(),
                _ => storage.flip_bit(path, ByteOffset(at), random.below(8) as u32),
            }
            return format!("{kind:?} at {at} of {}", path.file_name().unwrap().display());
        }
    }
    format!("{kind:?}")
}

/// What a snapshot gives, all of it compared with what was written.
fn readable(snapshot: &Snapshot, said: &str) -> Readable {
    let mut readable = Readable::new();
    for lsn in (0..=110).map(Lsn).filter(|lsn| snapshot.timeline().offers(*lsn)) {
        let view = snapshot.view(lsn).unwrap();
        let pages = (0..PAGES).filter(|page| {
            let range = ByteRange::new(ByteOffset(page * PAGE), ByteCount(PAGE)).unwrap();
            let newest = (6..=lsn.0).rev().find(|write| write % PAGES == *page);
            let expected = vec![newest.unwrap_or(0) as u8; PAGE as usize];
            view.read(range).map(|bytes| assert!(bytes == expected, "page {page} at {lsn}: {said}")).is_ok()
        });
        readable.insert(lsn, pages.collect());
    }
    readable
}

/// What is left, without a change; none when there is no log.
fn left(storage: &MemoryStorage, said: &str) -> Readable {
    let salvaged = shelf(storage).salvage(IDENTITY.disk, 1, None);
    salvaged.map_or_else(|_| Readable::new(), |salvaged| readable(&salvaged.snapshot, said))
}

/// What a receiver gives that starts on a copy of the store.
fn given(storage: &MemoryStorage, said: &str) -> Readable {
    let disk = shelf(&storage.copy()).open_disk(IDENTITY.disk);
    let snapshot = disk.and_then(|mut disk| disk.snapshot().ok());
    snapshot.map_or_else(Readable::new, |snapshot| readable(&snapshot, said))
}

/// What a receiver that starts on a copy of the store cannot read and does not tell of: a sentence.
fn untold(storage: &MemoryStorage) -> Option<String> {
    let copy = storage.copy();
    let shelf = shelf(&copy);
    let mut disk = shelf.open_disk(IDENTITY.disk)?;
    let found = shelf.findings.of(IDENTITY.disk).into_iter().map(|finding| finding.damage);
    let told: Vec<_> = found.chain(disk.damage().cloned()).collect();
    let snapshot = disk.snapshot().ok()?;
    for lsn in (0..=110).map(Lsn).filter(|lsn| snapshot.timeline().offers(*lsn)) {
        let view = snapshot.view(lsn).unwrap();
        for page in 0..PAGES {
            let range = ByteRange::new(ByteOffset(page * PAGE), ByteCount(PAGE)).unwrap();
            if let Err(error) = view.read(range)
                && !told.iter().any(|told| damaged_place(told) == error.to_string())
            {
                return Some(format!("page {page} at {lsn}: {error}, told is {told:?}"));
            }
        }
    }
    None
}

/// What could be read and cannot be any more: a sentence.
fn lost(before: &Readable, after: &Readable) -> Option<String> {
    before.iter().find_map(|(lsn, pages)| {
        let Some(found) = after.get(lsn) else { return Some(format!("{lsn} is no point any more")) };
        let lost: Vec<_> = pages.iter().filter(|page| !found.contains(page)).collect();
        (!lost.is_empty()).then(|| format!("pages {lost:?} at {lsn} cannot be read any more"))
    })
}

#[test]
fn no_repair_costs_what_could_be_read_before_it_however_many_there_are() {
    let seeds = match std::env::var("SEED") {
        Ok(seed) => vec![seed.parse().expect("SEED is a number")],
        Err(_) => (0..SEEDS).collect(),
    };
    let mut failed = Vec::new();
    for seed in seeds {
        let mut random = Random(seed);
        let storage = written(&mut random);
        let places = places(&storage);
        let newest = places.last().filter(|_| random.below(2) == 0);
        let near = newest.or(one(&places, &mut random)).unwrap().path.clone();
        let harms: Vec<_> =
            (0..=random.below(5)).map(|_| damage(&storage, &places, &near, &mut random)).collect();
        let said = format!("SEED={seed} {}", harms.join(", "));
        // Of what lies above the mark nobody knows that it was no torn tail; of one that cannot be read, what lies above it.
        let noted = Watermark::find(&storage, &Shelf::dir(IDENTITY.disk, 1), IDENTITY.history);
        let marked = noted.map_or(Some(Lsn::MAX), |noted| noted.map(|noted| noted.durable.lsn));
        let mut before = left(&storage, &said);
        before.retain(|lsn, _| Some(*lsn) <= marked);
        for nth in 1..=3 {
            let report = run(&storage, Repair::Everything).unwrap();
            let after = given(&storage, &said);
            if let Some(untold) = untold(&storage) {
                failed.push(format!("{said}: {untold} is not told after repair {nth}"));
            }
            if let Some(lost) = lost(&before, &after) {
                failed.push(format!("{said}: {lost} after repair {nth}: {:?}", report.disks));
            }
            before = after;
        }
    }
    assert!(failed.is_empty(), "{} failed:\n{}", failed.len(), failed.join("\n"));
}

/// A log of one segment, of which nothing but its mark says that it was durable, in full or up to `synced`; and where the
/// payloads of two writes stand.
pub(super) fn of_one_segment(synced: u64, sealed: bool) -> (MemoryStorage, PathBuf, [u64; 2]) {
    let storage = MemoryStorage::new();
    let shared: Arc<dyn Storage> = Arc::new(storage.clone());
    write_store(&shared).unwrap();
    let dir = Shelf::dir(IDENTITY.disk, 1);
    let cache = LogCache::new(Default::default());
    let mut log = DiskLog::create(shared, &dir, IDENTITY, LogOptions::default(), &cache).unwrap();
    for entry in first_pass().into_iter().chain((6..=25).map(write)) {
        let is_last = matches!(&entry, Entry::Write { lsn, .. } if lsn.0 == synced);
        log.append(entry).unwrap();
        if is_last {
            sync_all(&mut log);
        }
    }
    if sealed {
        log.seal().unwrap();
    }
    sync_all(&mut log);
    Watermark::replace(&storage, &dir, IDENTITY.history, Noted::whole(log.durable())).unwrap();
    let (path, bytes) = segments(&storage).swap_remove(0);
    let at = |byte| bytes.windows(4096).position(|page| page == [byte; 4096]).unwrap() as u64;
    (storage, path, [at(10), at(20)])
}

/// Where the footer of the first segment that has one stands.
pub(super) fn footer_of(storage: &MemoryStorage) -> u64 {
    places(storage).into_iter().find(|place| place.kind == Kind::Footer).unwrap().at
}

#[test]
fn a_payload_that_is_damaged_is_no_torn_tail_when_what_told_so_is_cut_off() {
    let (storage, path, [payload, entry]) = of_one_segment(22, false);
    storage.flip_bit(&path, ByteOffset(payload + 100), 1);
    storage.flip_bit(&path, ByteOffset(entry - 64 + 9), 1);
    let before = left(&storage, "before");
    assert_eq!(before.keys().last(), Some(&Lsn(19)));
    for nth in 1..=2 {
        let report = run(&storage, Repair::Everything).unwrap();
        assert_eq!(report.disks[0].cut.len(), usize::from(nth == 1), "{report:?}");
        assert_eq!(left(&storage, "after"), before, "repair {nth}");
    }
}

#[test]
fn what_a_footer_tells_of_an_entry_that_is_gone_is_believed_when_the_entry_was_durable() {
    for synced in [0, 22] {
        let (storage, path, [_, entry]) = of_one_segment(synced, true);
        storage.flip_bit(&path, ByteOffset(entry - 64 + 9), 1);
        let log = shelf(&storage.copy()).open(IDENTITY.disk, 1).unwrap();
        assert_eq!(log.timeline().latest().map(|latest| latest.lsn), Some(Lsn(25)));
        assert_eq!(given(&storage, "without an entry").keys().last(), Some(&Lsn(25)));
    }
    // Without a mark it may be the torn end of what nobody was told of.
    let (storage, path, [_, entry]) = of_one_segment(0, true);
    storage.flip_bit(&path, ByteOffset(entry - 64 + 9), 1);
    storage.remove(&Shelf::dir(IDENTITY.disk, 1).join(watermark::FILE)).unwrap();
    assert_eq!(given(&storage, "without a mark").keys().last(), Some(&Lsn(19)));
}

#[test]
fn entries_are_read_where_their_footer_and_a_payload_are_damaged() {
    let (storage, path, [payload, _]) = of_one_segment(0, true);
    let before = left(&storage, "before");
    storage.flip_bit(&path, ByteOffset(payload + 100), 1);
    // Its only index block.
    storage.flip_bit(&path, ByteOffset(footer_of(&storage) + 10), 1);
    let after = left(&storage, "after");
    assert_eq!(after.keys().last(), before.keys().last());
    // The page of the damaged write, until it is written again.
    let lost = |lsn: &Lsn| (10..26).contains(&lsn.0).then_some(10);
    for (lsn, pages) in &after {
        let expected: Vec<_> = (0..PAGES).filter(|page| Some(*page) != lost(lsn)).collect();
        assert_eq!(*pages, expected, "{lsn}");
    }
    run(&storage, Repair::Everything).unwrap();
    assert_eq!(given(&storage, "mended"), after);
}
