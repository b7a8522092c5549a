//! Which points damage touches is told as a plain look at every point finds it: never less, and no more where it is exact.

mod common;

use std::{path::PathBuf, sync::Arc};

use backtide_recovery::{
    Checked, DiskLog, Entry, KeptPoint, Known, LogOptions, PassReason, Snapshot, TimedLsn, TouchedSpan,
};
use backtide_segment::{EntryHeader, Extent, Position, SegmentFile, Seq, scan_prefix};
use backtide_storage::{MemoryStorage, Storage};
use backtide_units::{ByteOffset, ByteRange, CaptureTime, Lsn, Reason};
use common::{Agent, Random, SayOnPanic, cache, directory, identity, seeds, whole};

/// What is read at once where a read of the whole disk fails.
const PIECE: u64 = 4096;

/// Points that are looked at beside those at which what was told begins and ends.
const LOOKED_AT: usize = 15;

/// An entry with a payload, as its header says.
struct Written {
    path: PathBuf,
    file: SegmentFile,
    header: EntryHeader,
    position: Position,
    range: ByteRange,
}

fn storage(agent: &Agent) -> Arc<dyn Storage> {
    Arc::new(agent.storage.clone())
}

fn files(agent: &Agent, ending: &str) -> Vec<(PathBuf, u64)> {
    let files = agent.storage.files().into_iter();
    let files = files.filter(|(path, _)| path.extension().is_some_and(|found| found == ending));
    files.map(|(path, content)| (path, content.len() as u64)).collect()
}

/// A log with passes that delivered over newer writes, sealed segments and one that is still written.
fn written(seed: u64) -> Agent {
    let mut agent = Agent::new(seed, MemoryStorage::new()).expect("create");
    agent.attach().expect("attach");
    for _ in 0..90 {
        agent.step().expect("step");
    }
    agent.settle().expect("settle");
    agent.flush_all();
    agent
}

/// The log as it is read from now on: nothing of it is in memory.
fn fresh(agent: &Agent) -> Snapshot {
    let (mut log, _) = DiskLog::open(storage(agent), directory(), agent.options, &cache()).expect("open");
    log.snapshot().expect("snapshot")
}

/// Every entry with data, in the order of the log.
fn entries(agent: &Agent) -> Vec<Written> {
    let mut all = Vec::new();
    for (path, _) in files(agent, "seg") {
        let file = SegmentFile::new(agent.storage.open(&path).expect("open"), path.clone());
        let header = file.header().expect("header");
        let (scanned, _) = scan_prefix(&file, header, Seq(u64::MAX), Seq(0)).expect("scan");
        for item in file.headers(header, scanned.end) {
            let (header, position) = item.expect("a header");
            if let Some(range) = header.range() {
                all.push(Written { path: path.clone(), file: file.clone(), header, position, range });
            }
        }
    }
    all
}

/// The bytes of an entry that cannot be read.
fn unreadable(entry: &Written) -> Vec<ByteRange> {
    if entry.header.payload_length == 0 {
        return Vec::new();
    }
    let EntryHeader { seq, lsn, .. } = entry.header;
    let extent = Extent { range: entry.range, version: lsn, seq, position: entry.position, zero: false };
    let segment = entry.file.header().expect("no bit of it was flipped");
    let Ok(parts) = entry.file.parts(&segment, &extent, &|_| None) else { return vec![entry.range] };
    let damaged = (0..parts.count()).filter(|number| entry.file.piece(&parts, *number).is_err());
    damaged.map(|number| parts.piece(number)).collect()
}

/// Parts of `range` that nothing newer than `entry` covers at a point.
fn left_at(entries: &[Written], entry: &Written, range: ByteRange, at: Lsn) -> Vec<ByteRange> {
    let age = |written: &Written| (written.header.lsn, written.header.seq);
    let newer = entries.iter().filter(|other| age(other) > age(entry) && other.header.lsn <= at);
    let mut left = vec![range];
    for other in newer {
        left = left.into_iter().flat_map(|part| without(part, other.range)).collect();
    }
    left
}

fn without(part: ByteRange, covered: ByteRange) -> Vec<ByteRange> {
    let Some(gone) = part.intersection(covered) else { return vec![part] };
    let before = ByteRange::between(part.start(), gone.start());
    let after = ByteRange::between(gone.end(), part.end());
    [before, after].into_iter().filter(|rest| !rest.is_empty()).collect()
}

fn offered(snapshot: &Snapshot) -> Vec<Lsn> {
    let timeline = snapshot.timeline();
    (1..=timeline.highest_lsn().0).map(Lsn).filter(|lsn| timeline.offers(*lsn)).collect()
}

fn has(span: &TouchedSpan, at: Lsn) -> bool {
    assert!(!span.lost, "nothing is lost of a log that is in use");
    span.from.is_some_and(|from| from.lsn <= at) && span.to.is_some_and(|to| at <= to.lsn)
}

fn spans(checked: &Checked) -> Vec<TouchedSpan> {
    assert_eq!(checked.more_damage, 0);
    checked.touched.values().flat_map(|touched| touched.spans.iter().copied()).collect()
}

fn is_exact(checked: &Checked) -> bool {
    checked.touched.values().all(|touched| touched.known == Known::Exact)
}

/// Whether that a byte range cannot be read at a point was told.
fn is_told(spans: &[TouchedSpan], at: Lsn, bytes: ByteRange) -> bool {
    spans.iter().any(|span| has(span, at) && span.range.is_none_or(|range| range.contains(bytes)))
}

/// Reads points, and compares what cannot be read with what was told; gives how many could not.
fn compare_reads(snapshot: &Snapshot, checked: &Checked) -> usize {
    let (spans, points) = (spans(checked), offered(snapshot));
    let ends: Vec<Lsn> =
        spans.iter().flat_map(|span| [span.from, span.to]).flatten().map(|at| at.lsn).collect();
    let step = points.len() / LOOKED_AT + 1;
    let is_end = |lsn: &Lsn| ends.iter().any(|end| end.0.abs_diff(lsn.0) <= 3);
    let chosen = points.iter().enumerate().filter(|(nth, lsn)| nth % step == 0 || is_end(lsn));
    let mut failed = 0;
    for (_, lsn) in chosen {
        let view = snapshot.view(*lsn).expect("an offered point");
        let told = spans.iter().any(|span| has(span, *lsn));
        if view.read(whole()).is_ok() {
            assert!(
                !told || !is_exact(checked),
                "{lsn} reads, and is told as touched: {:?}",
                checked.touched
            );
            continue;
        }
        failed += 1;
        for piece in whole().split_at_multiples(backtide_units::ByteCount(PIECE)) {
            if view.read(piece).is_err() {
                let touches = |span: &TouchedSpan| {
                    has(span, *lsn) && span.range.is_none_or(|range| range.overlaps(piece))
                };
                assert!(spans.iter().any(touches), "{piece} at {lsn} was not told: {:?}", checked.touched);
            }
        }
    }
    failed
}

#[test]
fn a_damaged_entry_touches_what_a_plain_model_says() {
    let (mut exact, mut overwritten, mut failed) = (0, 0, 0);
    for seed in seeds(5) {
        let agent = written(seed);
        let mut random = Random(seed);
        for _ in 0..10 {
            let segments = files(&agent, "seg");
            let (path, _) = &segments[random.below(segments.len() as u64) as usize];
            let entries = entries(&agent);
            let here: Vec<&Written> = entries.iter().filter(|entry| entry.path == *path).collect();
            let Some(last) = here.last() else { continue };
            let end = last.position.offset().0 + 64 + u64::from(last.header.payload_length);
            let (first, bit) = (backtide_segment::SEGMENT_HEADER_LENGTH as u64, random.below(8) as u32);
            let offset = ByteOffset(first + random.below(end - first));
            let _say = SayOnPanic(format!("SEED={seed}, bit {bit} of byte {offset} of {}", path.display()));
            let snapshot = fresh(&agent);
            agent.storage.flip_bit(path, offset, bit);
            let checked = snapshot.check(&mut |_| true).expect("no failure");
            let told = spans(&checked);
            let lost: Vec<(&Written, ByteRange)> = entries
                .iter()
                .flat_map(|entry| unreadable(entry).into_iter().map(move |range| (entry, range)))
                .collect();
            for at in offered(&snapshot) {
                let mut needed = false;
                for (entry, range) in lost.iter().filter(|(entry, _)| entry.header.lsn <= at) {
                    for part in left_at(&entries, entry, *range, at) {
                        needed = true;
                        assert!(
                            is_told(&told, at, part),
                            "{part} at {at} was not told: {:?}",
                            checked.touched
                        );
                    }
                }
                let says = told.iter().any(|span| has(span, at));
                assert!(needed || !says || !is_exact(&checked), "{at} is not touched: {:?}", checked.touched);
            }
            let open =
                lost.iter().any(|(entry, range)| !left_at(&entries, entry, *range, Lsn::MAX).is_empty());
            assert!(!open || told.iter().any(|span| span.open), "points to come: {:?}", checked.touched);
            assert!(
                open || !is_exact(&checked) || told.iter().all(|span| !span.open),
                "{:?}",
                checked.touched
            );
            exact += usize::from(is_exact(&checked) && !told.is_empty());
            overwritten += usize::from(!lost.is_empty() && told.iter().any(|span| !span.open));
            failed += compare_reads(&snapshot, &checked);
            agent.storage.flip_bit(path, offset, bit);
        }
    }
    assert!(exact > 10 && overwritten > 5 && failed > 100, "{exact} {overwritten} {failed}");
}

/// Half the bits near the ends of files, where tables and footers are.
fn flip_anywhere(agent: &Agent, files: &[(PathBuf, u64)], random: &mut Random) -> (PathBuf, ByteOffset, u32) {
    let (path, length) = files[random.below(files.len() as u64) as usize].clone();
    let offset = match random.below(2) {
        0 => length - random.below(length.min(6000)) - 1,
        _ => random.below(length),
    };
    let bit = random.below(8) as u32;
    agent.storage.flip_bit(&path, ByteOffset(offset), bit);
    (path, ByteOffset(offset), bit)
}

#[test]
fn what_any_flipped_bit_of_a_log_makes_unreadable_is_told() {
    let mut failed = 0;
    for seed in seeds(5) {
        let agent = written(seed);
        let mut random = Random(seed);
        for _ in 0..8 {
            let snapshot = fresh(&agent);
            let (path, offset, bit) = flip_anywhere(&agent, &files(&agent, "seg"), &mut random);
            let _say = SayOnPanic(format!("SEED={seed}, bit {bit} of byte {offset} of {}", path.display()));
            let checked = snapshot.check(&mut |_| true).expect("no failure");
            failed += compare_reads(&snapshot, &checked);
            agent.storage.flip_bit(&path, offset, bit);
        }
    }
    assert!(failed > 30, "{failed}");
}

/// A log of which all but the newest part is images of a few points.
fn folded(seed: u64) -> Agent {
    let mut agent = Agent::new(seed, MemoryStorage::new()).expect("create");
    agent.options.segment_bytes_max.0 = 300_000;
    let cache = cache();
    let (log, _) = DiskLog::open(storage(&agent), directory(), agent.options, &cache).expect("open");
    agent.log = log;
    agent.attach().expect("attach");
    agent.settle().expect("settle");
    let mut points = Vec::new();
    for _ in 0..5 {
        for _ in 0..3 {
            agent.write().expect("write");
        }
        agent.flush_all();
        points.push(agent.log.timeline().latest().expect("a point"));
    }
    agent.log.seal().expect("seal");
    for _ in 0..12 {
        agent.write().expect("write");
    }
    agent.flush_all();
    let snapshot = agent.log.snapshot().expect("snapshot");
    let mut writer = cache.images(&storage(&agent)).write().expect("no fault");
    let mut kept: Vec<KeptPoint> = Vec::new();
    for at in points {
        let last = kept.last().copied();
        let root = snapshot.make_image(&mut writer, at.lsn, last, &mut |_| true).expect("no fault");
        kept.push(KeptPoint { at, root });
    }
    writer.finish().expect("no fault");
    let floor = kept.pop().expect("the floor was the last");
    let foldable = snapshot.foldable(floor.at.lsn).expect("the first segment");
    let base = snapshot.rebase(&foldable, floor, kept).expect("no fault");
    let ticket = agent.log.rebase(base).expect("it follows");
    let rebased = ticket.write().expect("no fault").expect("the log is open");
    agent.log.rebased(rebased);
    agent
}

#[test]
fn a_damaged_chunk_or_node_touches_the_images_that_have_it_and_what_stands_on_the_last() {
    let (mut exact, mut failed, mut above) = (0, 0, 0);
    for seed in seeds(5) {
        let agent = folded(seed);
        let mut random = Random(seed);
        let floor: TimedLsn = fresh(&agent).base().and_then(|base| base.floor()).expect("it has one").at;
        for _ in 0..16 {
            let snapshot = fresh(&agent);
            let (path, offset, bit) = flip_anywhere(&agent, &files(&agent, "pack"), &mut random);
            let _say = SayOnPanic(format!("SEED={seed}, bit {bit} of byte {offset} of {}", path.display()));
            let checked = snapshot.check(&mut |_| true).expect("no failure");
            let told = spans(&checked);
            exact += usize::from(is_exact(&checked) && !told.is_empty());
            above += usize::from(told.iter().any(|span| span.to.is_some_and(|to| to > floor)));
            failed += compare_reads(&snapshot, &checked);
            agent.storage.flip_bit(&path, offset, bit);
        }
    }
    assert!(exact > 20 && failed > 100 && above > 5, "{exact} {failed} {above}");
}

#[test]
fn what_is_lost_with_one_damage_is_not_told_of_another_that_was_compared_long_ago() {
    let options = LogOptions::default();
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new());
    let mut log = DiskLog::create(storage, directory(), identity(), options, &cache()).unwrap();
    let mut pass = |at: u64, valid_from: Option<Lsn>| {
        let (at, time, gap_from) = (Lsn(at), CaptureTime(at), log.timeline().covered());
        let reason = PassReason { code: Reason::Damaged.code(), text: Reason::Damaged.to_string() };
        log.append(Entry::PassBegin { at, gap_from, time, reason }).unwrap();
        if valid_from.is_some() {
            log.append(Entry::PassEnd { at, valid_from, time }).unwrap();
        }
        log.snapshot().unwrap()
    };
    pass(5, Some(Lsn(5)));
    let compared = pass(10, Some(Lsn(10)));
    assert_eq!(compared.timeline().holes().len(), 1);
    assert_eq!(compared.lost_with("b.seg is damaged").spans, []);
    let lost = |snapshot: &Snapshot, why| {
        let spans = snapshot.lost_with(why).spans.into_iter();
        spans.map(|span| (span.from.map(|from| from.lsn), span.to.map(|to| to.lsn))).collect::<Vec<_>>()
    };
    let ended = compared.ending("b.seg is damaged");
    assert_eq!(lost(&ended, "b.seg is damaged"), [(Some(Lsn(10)), None)]);
    assert_eq!(lost(&ended, "c.seg is damaged"), [(Some(Lsn(10)), None)], "nobody knows which of both");
    let comparing = pass(20, None);
    assert_eq!(lost(&comparing, "the end is lost"), [(Some(Lsn(10)), None)], "nothing is compared yet");
}

#[test]
fn what_a_read_meets_is_told_with_points_that_need_it_and_the_one_that_was_read() {
    let mut met = 0;
    for (seed, ending) in seeds(6).into_iter().flat_map(|seed| [(seed, "seg"), (seed, "pack")]) {
        let agent = if ending == "seg" { written(seed) } else { folded(seed) };
        let mut random = Random(seed);
        for _ in 0..8 {
            let snapshot = fresh(&agent);
            let (path, offset, bit) = flip_anywhere(&agent, &files(&agent, ending), &mut random);
            let _say = SayOnPanic(format!("SEED={seed}, bit {bit} of byte {offset} of {}", path.display()));
            let points = offered(&snapshot);
            let at = points[random.below(points.len() as u64) as usize];
            let view = snapshot.view(at).expect("an offered point");
            if let Err(error) = view.read(whole()) {
                let by_read = view.touched(whole());
                let checked = snapshot.check(&mut |_| true).expect("no failure");
                let told = by_read.get(&error.to_string());
                met += usize::from(told.is_some());
                for span in told.into_iter().flat_map(|touched| &touched.spans) {
                    for at in points.iter().filter(|at| has(span, **at)) {
                        assert!(spans(&checked).iter().any(|span| has(span, *at)), "{at} {by_read:?}");
                    }
                }
                assert!(
                    told.is_none_or(|told| told.spans.iter().any(|span| has(span, at))),
                    "{at} {by_read:?}"
                );
            }
            agent.storage.flip_bit(&path, offset, bit);
        }
    }
    assert!(met > 20, "{met}");
}
