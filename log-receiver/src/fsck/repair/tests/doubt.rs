//! A log of which something that was durable is not there as it was, although it opens: it is told, and compared once.

use std::collections::BTreeMap;

use backtide_protocol::{
    Compare, CompareItem, Content, Data, Hello, PROTOCOL_VERSION, ReceiverState, Tracking,
};

use backtide_units::Reason;

use crate::{CompareJob, ConnectionId, Disk, Disks, entries};

use super::{repeated::of_one_segment, *};

const PAGE: u64 = 4096;

fn hello() -> Hello {
    Hello {
        version: PROTOCOL_VERSION,
        disk: IDENTITY.disk,
        name: "vm1".parse().unwrap(),
        size: ByteCount(1 << 20),
        epoch: Epoch(9),
        attach: Uuid::from_u128(9),
        history: Some(IDENTITY.history),
        tracking: Tracking::New,
        next_lsn: Lsn(100),
        acked_durable: Lsn::ZERO,
        ack: None,
        on_outage: None,
        origin: None,
    }
}

/// What a receiver has that starts on the store, once the disk's agent has come; and what that agent is told.
fn started(storage: &MemoryStorage) -> (Disks, ReceiverState) {
    let mut disks = Disks::open(shelf(storage), [IDENTITY.disk]);
    let claim = disks.claim(ConnectionId(1), &hello(), CaptureTime(200)).unwrap();
    commit(disks.get_mut(IDENTITY.disk).unwrap());
    (disks, claim.state)
}

/// What the disk's agent is told that comes to a receiver on a copy of the store.
pub(super) fn claimed(storage: &MemoryStorage) -> ReceiverState {
    started(&storage.copy()).1
}

fn commit(disk: &mut Disk) {
    while let Some(ticket) = disk.ticket() {
        disk.synced(ticket.sync());
    }
}

fn findings(storage: &MemoryStorage) -> Vec<findings::Finding> {
    Findings::open(Arc::new(storage.clone())).of(IDENTITY.disk)
}

fn page(number: u64) -> ByteRange {
    ByteRange::new(ByteOffset(number * PAGE), ByteCount(PAGE)).unwrap()
}

/// What the agent has in a page, when lsn:25 is the last write.
fn content(page: u64) -> Bytes {
    let newest = (6..=25).rev().find(|lsn| lsn % 16 == page).unwrap();
    Bytes::from(vec![newest as u8; PAGE as usize])
}

/// Begins to compare everything, durably.
fn begin(disk: &mut Disk, at: u64) {
    let (at, time) = (Lsn(at), CaptureTime(at));
    disk.append_of_pass(entries::pass_begin(at, Lsn(25), time, Reason::Damaged), time).unwrap();
    commit(disk);
}

/// Compares everything as an agent does, and sends what differs: which pages.
fn compare(disk: &mut Disk, at: u64) -> Vec<u32> {
    begin(disk, at);
    compare_begun(disk, at)
}

fn compare_begun(disk: &mut Disk, at: u64) -> Vec<u32> {
    let (at, time) = (Lsn(at), CaptureTime(at));
    let hash = |number| Content::Hash(*blake3::hash(&content(number)).as_bytes());
    let items = (0..16).map(|number| CompareItem { range: page(number), content: hash(number) }).collect();
    let view = disk.snapshot().unwrap().newest_view(at);
    let differing = CompareJob::new(Compare { id: 1, at, items }, view).run().unwrap().differing;
    for number in &differing {
        let number = u64::from(*number);
        disk.append(entries::pass_data(at, page(number), &Data::capture(content(number))), ByteCount(PAGE))
            .unwrap();
    }
    disk.append_of_pass(Entry::PassEnd { at, valid_from: Some(at), time }, time).unwrap();
    commit(disk);
    differing
}

/// What is told of its end.
fn told(disk: &Disk) -> Vec<String> {
    let lacked = disk.lacked(CaptureTime(200)).into_iter().map(|(_, why)| why);
    disk.damage().cloned().chain(lacked).collect()
}

fn latest_is_whole(disk: &mut Disk) -> bool {
    let view = disk.snapshot().unwrap().latest_view();
    (0..16).all(|number| view.read(page(number)).is_ok_and(|bytes| bytes == content(number)))
}

/// Stores of which an entry that was durable is damaged where opening sees it: the header of one that a footer tells of, and
/// a payload of the segment that is written.
fn damaged_where_opening_sees_it() -> [MemoryStorage; 3] {
    [(0, true), (22, true), (22, false)].map(|(synced, sealed)| {
        let (storage, path, [_, payload]) = of_one_segment(synced, sealed);
        let at = if sealed { payload - 64 + 9 } else { payload + 100 };
        storage.flip_bit(&path, ByteOffset(at), 1);
        storage
    })
}

#[test]
fn what_opening_finds_damaged_is_told_and_its_agent_compares_everything_once() {
    for storage in damaged_where_opening_sees_it() {
        let (mut disks, state) = started(&storage);
        assert_eq!(state, ReceiverState::Foreign);
        let found = findings(&storage);
        let told = found.iter().any(|finding| finding.damage.contains("1.seg") && finding.touched.is_some());
        assert!(told, "{found:?}");
        assert!(!latest_is_whole(disks.get_mut(IDENTITY.disk).unwrap()));
        // Nobody has compared yet.
        drop(disks);
        let (mut disks, state) = started(&storage);
        assert_eq!((state, findings(&storage)), (ReceiverState::Foreign, found.clone()));
        let disk = disks.get_mut(IDENTITY.disk).unwrap();
        assert_eq!((disk.damage().count(), disk.lost_end()), (0, None), "nothing is lost at its end");
        assert_eq!(compare(disk, 30), [4]);
        assert!(latest_is_whole(disk));
        assert_eq!(disk.lacked(CaptureTime(200)), [], "no point is missing");
        // The damage is there for ever, in older points.
        drop(disks);
        let (mut disks, state) = started(&storage);
        assert_eq!((state, findings(&storage)), (ReceiverState::Known, found));
        assert!(latest_is_whole(disks.get_mut(IDENTITY.disk).unwrap()));
    }
}

#[test]
fn what_a_full_store_could_not_note_is_noted_when_its_agent_comes_and_compared_once() {
    for storage in damaged_where_opening_sees_it() {
        // Opening cuts off what was reserved.
        storage.set_capacity(Some(ByteCount::ZERO));
        let mut disks = Disks::open(shelf(&storage), [IDENTITY.disk]);
        assert_eq!(findings(&storage), []);
        storage.set_capacity(None);
        let claim = disks.claim(ConnectionId(1), &hello(), CaptureTime(200)).unwrap();
        assert_eq!(claim.state, ReceiverState::Foreign);
        let found = findings(&storage);
        assert_eq!(found.len(), 1);
        compare(disks.get_mut(IDENTITY.disk).unwrap(), 30);
        drop(disks);
        assert_eq!((started(&storage).1, findings(&storage)), (ReceiverState::Known, found));
    }
}

#[test]
fn what_cannot_be_noted_because_a_newer_program_has_the_file_is_compared_once_too() {
    for storage in damaged_where_opening_sees_it() {
        note_as_a_newer_program(&storage);
        let (mut disks, state) = started(&storage);
        assert_eq!(state, ReceiverState::Foreign);
        compare(disks.get_mut(IDENTITY.disk).unwrap(), 30);
        drop(disks);
        assert_eq!((started(&storage).1, findings(&storage)), (ReceiverState::Known, Vec::new()));
    }
}

#[test]
fn what_is_found_damaged_while_everything_is_compared_is_to_be_compared_again() {
    let (storage, path, [another, payload]) = of_one_segment(22, false);
    storage.flip_bit(&path, ByteOffset(payload + 100), 1);
    let (mut disks, state) = started(&storage);
    assert_eq!(state, ReceiverState::Foreign);
    let (disk, at) = (disks.get_mut(IDENTITY.disk).unwrap(), Lsn(30));
    let begin = entries::pass_begin(at, Lsn(25), CaptureTime(30), Reason::Damaged);
    disk.append_of_pass(begin, CaptureTime(30)).unwrap();
    commit(disk);
    drop(disks);
    assert_eq!(started(&storage).1, ReceiverState::Known, "the pass has begun");
    storage.flip_bit(&path, ByteOffset(another + 100), 1);
    assert_eq!(started(&storage).1, ReceiverState::Foreign);
}

/// A store with a log whose mark a repair has made anew.
fn repaired() -> MemoryStorage {
    let (storage, path, [_, payload]) = of_one_segment(22, false);
    storage.flip_bit(&path, ByteOffset(payload + 100), 1);
    let mark = Shelf::dir(IDENTITY.disk, 1).join(crate::watermark::FILE);
    storage.make_unreadable(&mark, ByteRange::new(ByteOffset(0), ByteCount(512)).unwrap());
    let report = run(&storage, Repair::Everything).unwrap();
    assert!(report.disks[0].mended.iter().any(|mended| mended.contains("compares everything")), "{report:?}");
    storage
}

/// As [`started`], with an agent that knows so much to have been durable.
fn started_by(storage: &MemoryStorage, acked_durable: Lsn) -> (Disks, ReceiverState) {
    let mut disks = Disks::open(shelf(storage), [IDENTITY.disk]);
    let hello = Hello { acked_durable, ..hello() };
    let claim = disks.claim(ConnectionId(1), &hello, CaptureTime(200)).unwrap();
    commit(disks.get_mut(IDENTITY.disk).unwrap());
    (disks, claim.state)
}

#[test]
fn a_repair_that_makes_a_mark_anew_has_its_agent_compare_what_may_never_have_been_durable() {
    let storage = repaired();
    for _ in 0..2 {
        let (_, state) = started(&storage);
        assert_eq!(state, ReceiverState::Foreign);
    }
    // Whether something is missing at the end only its agent knows.
    for (acknowledged, missing) in [(Lsn(25), false), (Lsn(27), true)] {
        let storage = storage.copy();
        let (mut disks, state) = started_by(&storage, acknowledged);
        assert_eq!(state, ReceiverState::Foreign);
        let disk = disks.get_mut(IDENTITY.disk).unwrap();
        assert_eq!(told(disk).len(), usize::from(missing), "{:?}", told(disk));
        begin(disk, 30);
        assert_eq!(told(disk).len(), usize::from(missing), "{:?}", told(disk));
        assert_eq!(compare_begun(disk, 30), [4]);
        assert!(latest_is_whole(disk));
        assert_eq!(told(disk).len(), usize::from(missing));
        assert_eq!(disk.lacked(CaptureTime(200)).len(), usize::from(missing));
        drop(disks);
        assert_eq!(started(&storage).1, ReceiverState::Known);
    }
}

#[test]
fn what_the_agent_of_a_log_in_doubt_misses_is_known_from_its_hello_on_whenever_the_receiver_ends() {
    // The first attach goes into the log; the second does not, for it is there.
    for attached in [false, true] {
        let storage = repaired();
        if attached {
            drop(started(&storage));
        }
        drop(started_by(&storage, Lsn(27)));
        storage.crash(1);
        // By then the agent knows of no more than it was told.
        let (mut disks, state) = started_by(&storage, Lsn(25));
        assert_eq!(state, ReceiverState::Foreign);
        let disk = disks.get_mut(IDENTITY.disk).unwrap();
        let lost = told(disk);
        assert!(lost.len() == 1 && lost[0].contains("lsn:27") && lost[0].contains("is lost"), "{lost:?}");
        assert_eq!(disk.lost_end(), Some(lost[0].as_str()), "there is a hole");
        begin(disk, 30);
        assert_eq!(told(disk), lost);
        drop(disks);
        let (mut disks, state) = started_by(&storage, Lsn(30));
        let disk = disks.get_mut(IDENTITY.disk).unwrap();
        assert_eq!((state, told(disk).len()), (ReceiverState::Known, 1));
        compare_begun(disk, 30);
        let past = told(disk);
        assert!(past.len() == 1 && past[0].starts_with("the end of its log was lost"), "{past:?}");
        drop(disks);
        let (disks, state) = started(&storage);
        assert_eq!((state, told(disks.get(IDENTITY.disk).unwrap())), (ReceiverState::Known, past));
    }
}

#[test]
fn what_was_lost_before_is_told_also_while_a_log_is_in_doubt() {
    let storage = repaired();
    crate::shortfalls::sample(&storage, &Shelf::dir(IDENTITY.disk, 1));
    let (mut disks, _) = started(&storage);
    let disk = disks.get_mut(IDENTITY.disk).unwrap();
    assert_eq!(told(disk).len(), 2);
    begin(disk, 30);
    assert_eq!(told(disk).len(), 2);
}

#[test]
fn what_a_repair_mends_is_in_no_doubt() {
    let (storage, path, [payload, _]) = of_one_segment(22, false);
    let mut log = shelf(&storage).open(IDENTITY.disk, 1).unwrap();
    let Entry::Write { range, payload: bytes, checksum, .. } = write(10) else { unreachable!() };
    // The same bytes a second time.
    let again = Entry::Write { lsn: Lsn(26), time: CaptureTime(26), range, payload: bytes, checksum };
    log.append(again).unwrap();
    log.seal().unwrap();
    sync_all(&mut log);
    Watermark::replace(
        &storage,
        &Shelf::dir(IDENTITY.disk, 1),
        IDENTITY.history,
        Noted::whole(log.durable()),
    )
    .unwrap();
    let sound = storage.copy();
    // What is covered by newer content no compare brings back: it is told, and nothing is in doubt.
    storage.flip_bit(&path, ByteOffset(payload + 100), 1);
    assert_eq!((started(&storage).1, findings(&storage).len()), (ReceiverState::Known, 1));
    // The newest is in doubt until it is mended with the one before.
    let storage = sound;
    let (_, file) = storage.files().into_iter().find(|(found, _)| *found == path).unwrap();
    let newest = file.windows(PAGE as usize).rposition(|bytes| bytes == [10; PAGE as usize]).unwrap();
    storage.flip_bit(&path, ByteOffset(newest as u64 + 100), 1);
    assert_eq!(claimed(&storage), ReceiverState::Foreign);
    let report = run(&storage, Repair::Everything).unwrap();
    assert!(report.sound && !report.disks[0].mended.is_empty(), "{report:?}");
    assert_eq!((findings(&storage), started(&storage).1), (Vec::new(), ReceiverState::Known));
}

/// Where the payloads begin that repeat these numbers.
fn places_of(
    storage: &MemoryStorage,
    numbers: std::ops::RangeInclusive<u64>,
) -> BTreeMap<u64, (std::path::PathBuf, u64)> {
    let mut places = BTreeMap::new();
    for (path, file) in storage.files() {
        for (at, bytes) in file.windows(16).enumerate() {
            let number = u64::from_le_bytes(bytes[..8].try_into().unwrap());
            if numbers.contains(&number) && bytes[..8] == bytes[8..] {
                places.entry(number).or_insert_with(|| (path.clone(), at as u64));
            }
        }
    }
    places
}

/// Whatever else is damaged, and was known before: places that newer content covers are named up to a number.
#[test]
fn damage_of_the_newest_content_is_in_doubt_behind_any_number_of_places_of_the_past() {
    for (past, at_once) in [(99, false), (100, false), (101, false), (100, true), (130, true)] {
        let (storage, ..) = of_one_segment(22, false);
        let mut log = shelf(&storage).open(IDENTITY.disk, 1).unwrap();
        let newest = 1000 + past;
        for lsn in (1000..newest).chain([newest, newest + 1]) {
            let data = Data::capture(u64::to_le_bytes(lsn).repeat(PAGE as usize / 8).into());
            let (payload, checksum) = (data.bytes().clone(), data.checksum().clone());
            // Only the last of all is of another page.
            let range = page(if lsn > newest { 6 } else { 5 });
            log.append(Entry::Write { lsn: Lsn(lsn), time: CaptureTime(lsn), range, payload, checksum })
                .unwrap();
        }
        sync_all(&mut log);
        let noted = Noted::whole(log.durable());
        Watermark::replace(&storage, &Shelf::dir(IDENTITY.disk, 1), IDENTITY.history, noted).unwrap();
        drop(log);
        let places = places_of(&storage, 1000..=newest + 1);
        let rot = |lsn: u64| {
            let (path, at) = &places[&lsn];
            storage.flip_bit(path, ByteOffset(*at + 100), 1);
        };
        (1000..newest).for_each(rot);
        if !at_once {
            assert_eq!(started(&storage).1, ReceiverState::Known, "{past} of the past");
            assert_eq!(findings(&storage).len() as u64, past.min(100));
        }
        rot(newest + 1);
        let (disks, state) = started(&storage);
        assert_eq!(state, ReceiverState::Foreign, "{past} of the past, at once: {at_once}");
        drop(disks);
        let found = findings(&storage);
        let open = found.iter().filter(|found| !found.touched.as_ref().unwrap().is_past()).count();
        assert_eq!((open, found.len() as u64), (1, (past + 1).min(100)));
    }
}

#[test]
fn a_power_cut_that_tears_what_was_not_synced_is_told_nowhere_and_nothing_is_compared() {
    let mut torn = 0;
    for seed in 0..60 {
        let (storage, path, _) = of_one_segment(22, false);
        let before = storage.files();
        let mut log = shelf(&storage).open(IDENTITY.disk, 1).unwrap();
        for lsn in 26..=40 {
            log.append(write(lsn)).unwrap();
        }
        if seed % 2 == 0 {
            log.seal().unwrap();
        }
        drop(log.snapshot());
        storage.crash(seed);
        torn += u32::from(storage.files().iter().find(|(found, _)| *found == path) != before.first());
        let (mut disks, state) = started(&storage);
        assert_eq!((state, findings(&storage)), (ReceiverState::Known, Vec::new()), "seed {seed}");
        let disk = disks.get_mut(IDENTITY.disk).unwrap();
        assert_eq!((disk.damage().count(), disk.failure()), (0, None), "seed {seed}");
    }
    assert!(torn > 10, "{torn}");
}
