//! Retention of a disk whose log was damaged: the log that ended grows old as the one behind it does.

use std::{
    fs,
    path::PathBuf,
    time::{SystemTime, UNIX_EPOCH},
};

use backtide_log_receiver::{Config, OnFull, Receiver, Repair, Retention, fsck, repair};
use backtide_protocol::{CloseCode, Hello, Message, ReceiverState, Record};
use backtide_receiver_api::{
    DiffRequest, ErrorCode, KeepRequest, LockRequest, MountRequest, OverlayFate, ReceiverClient,
};
use backtide_units::{ByteCount, CaptureTime, Epoch, Lsn, Reason};

use crate::{
    agent::*,
    fixture::*,
    going_back::{assert_content, request},
    retention::{TENS, at, content, go_on, ladder, rounds, vm1, write_history},
};

/// The first point of the log behind the one that has ended.
pub(crate) const NEXT: u64 = 100;

pub(crate) fn older_log(place: &Place) -> PathBuf {
    place.store().join("disks").join(hello(1, "vm1").disk.to_string())
}

/// The segments of the log that has ended.
pub(crate) fn segments(place: &Place) -> Vec<PathBuf> {
    let listed = fs::read_dir(older_log(place).join("segments")).unwrap();
    let mut found: Vec<_> = listed.map(|entry| entry.unwrap().path()).collect();
    found.retain(|path| path.extension().is_some_and(|name| name == "seg"));
    found.sort();
    found
}

/// A header that is lost costs no point, but the log is never written again.
pub(crate) fn end_the_log(place: &Place) {
    let last = segments(place).pop().unwrap();
    let mut bytes = fs::read(&last).unwrap();
    bytes[40] ^= 0x10;
    fs::write(last, bytes).unwrap();
}

pub(crate) fn second() -> Hello {
    Hello { epoch: Epoch(2), ..hello(1, "vm1") }
}

/// A pass with what the disk has, in a log behind the one that has ended.
pub(crate) async fn begin_anew(receiver: &Receiver) -> Agent {
    let (mut agent, welcome) = Agent::welcomed(receiver, second()).await;
    assert_eq!(welcome.state, ReceiverState::New);
    agent.send(&pass_begin(NEXT, 0, Reason::ReceiverRolledBack)).await;
    for (nth, piece) in at(95).chunks(1 << 20).enumerate() {
        agent.send(&pass_data(NEXT, (nth as u64) << 20, piece.to_vec())).await;
    }
    agent.send(&pass_end(NEXT)).await;
    agent.all_durable().await;
    agent
}

fn place_of(lsn: u64) -> u64 {
    (lsn * content(lsn).len() as u64) % DISK_BYTES
}

/// What the disk holds at a point of the newer log.
pub(crate) fn later(lsn: u64) -> Vec<u8> {
    let mut image = at(95);
    for lsn in NEXT + 1..=lsn {
        let place = place_of(lsn) as usize;
        image[place..place + content(lsn).len()].copy_from_slice(&content(lsn));
    }
    image
}

pub(crate) async fn reads_as(place: &Place, api: &ReceiverClient, lsn: u64, expected: &[u8]) {
    let mount = api.mount(&request(&format!("lsn:{lsn}"), None)).await.unwrap();
    assert_content(place, &mount, expected).await;
    api.unmount(&mount.id, None).await.unwrap();
}

pub(crate) async fn single(api: &ReceiverClient, wanted: &str) -> Vec<u64> {
    let report = rounds(api, &vm1(), wanted).await;
    assert!(report.error.is_none() && report.disks[0].error.is_none(), "{report:?}");
    report.disks[0].single_points.iter().map(|point| point.lsn.0).collect()
}

pub(crate) fn keep(lsn: u64, release: bool) -> KeepRequest {
    KeepRequest { name: vm1(), at: format!("lsn:{lsn}"), release, held: None }
}

/// The older log has points from LSN 5 to 95.
pub(crate) async fn with_two_logs(place: &Place) -> (Receiver, Agent) {
    let receiver = place.start().await;
    let mut agent = write_history(&receiver, 6..=95).await;
    agent.send(&mark(44, "the middle")).await;
    agent.all_durable().await;
    drop(agent);
    receiver.shutdown().await;
    end_the_log(place);
    let receiver = place.start().await;
    let agent = begin_anew(&receiver).await;
    (receiver, agent)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_history_of_a_log_that_has_ended_grows_old_as_that_of_the_one_behind_it() {
    let place = Place::new();
    let (receiver, mut agent) = with_two_logs(&place).await;
    go_on(&mut agent, NEXT + 1..=190).await;
    let api = client(&receiver);
    let damage = api.disks(Some(&vm1())).await.unwrap().disks.remove(0).damage;
    assert!(damage[0].contains(".seg is damaged at byte 0"), "{damage:?}");
    // One is mounted, one is kept, one is locked, and one has something written to it.
    let mounted = api.mount(&request("lsn:33", None)).await.unwrap();
    api.keep(&keep(44, false)).await.unwrap();
    let lock = LockRequest { name: vm1(), at: Some("lsn:27".to_owned()), until: "1h".to_owned() };
    api.lock(&lock).await.unwrap();
    let writable = MountRequest { writable: true, ..request("lsn:52", None) };
    let overlay = api.mount(&writable).await.unwrap().id;
    api.unmount(&overlay, Some(OverlayFate::Keep)).await.unwrap();

    let preview = api.preview_retention(&vm1(), &ladder(TENS)).await.unwrap();
    let older: u64 = segments(&place).iter().map(|path| fs::metadata(path).unwrap().len()).sum();
    assert!(preview.changes && preview.log_bytes_freed.0 > older, "{preview:?}");
    assert_eq!(api.points(&vm1()).await.unwrap().first.unwrap().lsn, Lsn(5), "a preview changes nothing");
    let found = single(&api, TENS).await;
    let tens = (1..=9).map(|tens| tens * 10).chain([27, 44, 52]);
    let mut expected: Vec<u64> =
        tens.chain((10..).map(|tens| tens * 10).take_while(|lsn| *lsn < 190)).collect();
    expected.sort_unstable();
    expected.retain(|lsn| found.contains(lsn) || *lsn <= 150);
    assert_eq!(found, expected);
    let kept: Vec<u64> = preview.keep.iter().map(|point| point.lsn.0).collect();
    assert_eq!(kept, found, "as was told");
    let points = api.points(&vm1()).await.unwrap();
    let ends = points.holes.iter().find(|hole| hole.after_lsn == Lsn(90)).unwrap();
    assert_eq!((ends.before_lsn, ends.reason_code.as_str()), (Some(Lsn(NEXT)), "damaged"), "{ends:?}");
    let others = points.holes.iter().filter(|hole| hole.after_lsn != Lsn(90));
    assert!(
        others.clone().count() > 10 && others.clone().all(|hole| hole.reason_code == "thinned"),
        "{points:?}"
    );
    let gone = api.mount(&request("lsn:45", None)).await.unwrap_err();
    assert_eq!(gone.code, ErrorCode::PointInHole, "{gone}");
    // What is mounted reads as ever, and its segments go when that ends; what is gone is no damage.
    assert_content(&place, &mounted, &at(33)).await;
    assert!(!segments(&place).is_empty());
    api.unmount(&mounted.id, None).await.unwrap();
    rounds(&api, &vm1(), TENS).await;
    assert_eq!(segments(&place), Vec::<PathBuf>::new());
    assert_eq!(api.disks(Some(&vm1())).await.unwrap().disks.remove(0).damage, Vec::<String>::new());
    for lsn in [10, 27, 44, 90] {
        reads_as(&place, &api, lsn, &at(lsn)).await;
    }
    reads_as(&place, &api, 190, &later(190)).await;
    let changed = DiffRequest { from: "lsn:90".into(), to: "lsn:190".into() };
    assert_eq!(api.diff(&vm1(), &changed).await.unwrap().bytes.0, DISK_BYTES);

    // It is as it is after a start, and for those who check; a stale agent stays fenced.
    drop(agent);
    receiver.shutdown().await;
    let checked = fsck(&place.store(), &mut |_| {}).unwrap();
    assert!(checked.sound, "{checked:?}");
    // Of what it begins with a copy is lost: it is written again, by a repair and by a start. There is nothing to cut.
    fs::remove_file(older_log(&place).join("base.1")).unwrap();
    assert!(!fsck(&place.store(), &mut |_| {}).unwrap().sound);
    let repaired = repair(&place.store(), Repair::Everything, &mut |_| {}).unwrap();
    assert!(repaired.sound && repaired.disks[0].cut.is_empty(), "{repaired:?}");
    let mended = &repaired.disks[0].mended;
    assert!(
        mended.iter().any(|mended| mended.contains("base.1 is missing: it is written again")),
        "{mended:?}"
    );
    let copy = older_log(&place).join("base.2");
    fs::remove_file(&copy).unwrap();
    let receiver = place.start().await;
    let stale = Agent::refused(&receiver, hello(1, "vm1")).await;
    assert_eq!(stale.code, CloseCode::Fenced, "{stale:?}");
    let api = client(&receiver);
    assert_eq!(single(&api, TENS).await, found);
    assert!(copy.exists());
    reads_as(&place, &api, 44, &at(44)).await;
    let again = api.points(&vm1()).await.unwrap();
    assert_eq!(again.marks[0].lsn, Lsn(44));
    assert!(again.marks[0].recoverable, "{again:?}");
    // At last nothing of it is left but what somebody wants, and then nothing.
    assert_eq!(single(&api, "any=1h").await, [27, 44, 52]);
    api.keep(&keep(44, true)).await.unwrap();
    api.discard(&overlay).await.unwrap();
    assert_eq!(single(&api, "any=1h").await, [27]);
    reads_as(&place, &api, 27, &at(27)).await;
    let again = api.points(&vm1()).await.unwrap();
    assert!(!again.marks[0].recoverable, "it is said what it was called: {again:?}");
    receiver.shutdown().await;
}

/// A record of 64 KiB that was captured so many thousand seconds after the beginning of 1970: however long a test takes, that
/// is little beside them.
fn hours_apart(lsn: u64) -> Message {
    let Message::Record(record) = write(lsn, place_of(lsn), content(lsn)) else { unreachable!() };
    Message::Record(Record { time: CaptureTime(time(lsn).0 * 1000), ..record })
}

/// A ladder that keeps every point from so many seconds after the beginning of 1970 on, and next to nothing before.
fn since(seconds: u64) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    format!("any={}s per-1000s=1001s", now - seconds)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_has_ended_stays_until_the_one_behind_it_has_all_that_is_promised() {
    let place = Place::new();
    let receiver = place.start().await;
    let (mut agent, _) = Agent::welcomed(&receiver, hello(1, "vm1")).await;
    agent.first_pass(5).await;
    for lsn in 6..=95 {
        agent.send(&hours_apart(lsn)).await;
    }
    agent.all_durable().await;
    drop(agent);
    receiver.shutdown().await;
    end_the_log(&place);
    let receiver = place.start().await;
    let api = client(&receiver);
    // An agent has come, and its first pass is not complete: the newest that the disk has is of the older log.
    let (mut agent, _) = Agent::welcomed(&receiver, second()).await;
    let later = CaptureTime(time(NEXT).0 * 1000);
    let (at_next, reason) = (Lsn(NEXT), Reason::ReceiverRolledBack);
    agent.send(&Message::PassBegin { at: at_next, gap_from: Lsn(0), time: later, reason }).await;
    agent.all_durable().await;
    assert!(single(&api, "any=1h").await.is_empty());
    assert_eq!(api.points(&vm1()).await.unwrap().intervals.len(), 1);
    reads_as(&place, &api, 95, &at(95)).await;
    // What is older than `any` goes, the rest stays though its log has ended; and the last of it as long as there is no point
    // behind it that is as old.
    agent.send(&Message::PassEnd { at: at_next, valid_from: Some(at_next), time: later }).await;
    for lsn in NEXT + 1..=110 {
        agent.send(&hours_apart(lsn)).await;
    }
    agent.all_durable().await;
    let mut left = segments(&place).len();
    for (horizon, expected) in [(50_000, 40..=50), (97_000, 90..=95)] {
        let report = rounds(&api, &vm1(), &since(horizon)).await;
        let from = report.disks[0].every_point_from.unwrap().lsn.0;
        assert!(expected.contains(&from), "{report:?}");
        assert!((1..left).contains(&segments(&place).len()), "{:?}", segments(&place));
        left = segments(&place).len();
        for lsn in [from, 95] {
            reads_as(&place, &api, lsn, &at(lsn)).await;
        }
        let points = api.points(&vm1()).await.unwrap();
        assert_eq!((points.intervals[0].from_lsn, points.intervals[0].to_lsn), (Lsn(from), Lsn(95)));
    }
    // All of it goes when all of it is old.
    assert!(single(&api, "any=1h").await.is_empty());
    assert_eq!(segments(&place), Vec::<PathBuf>::new());
    let points = api.points(&vm1()).await.unwrap();
    assert_eq!(points.first.unwrap().lsn, Lsn(NEXT), "{points:?}");
    receiver.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_of_a_log_that_has_ended_goes_while_what_is_kept_of_it_cannot_be_read() {
    let place = Place::new();
    let receiver = place.start().await;
    drop(write_history(&receiver, 6..=95).await);
    client(&receiver).keep(&keep(80, false)).await.unwrap();
    receiver.shutdown().await;
    // A part of it cannot be found, and is there again later.
    let lost = segments(&place)[2].clone();
    let away = place.path("away.seg");
    fs::rename(&lost, &away).unwrap();
    let receiver = place.start().await;
    let _agent = begin_anew(&receiver).await;
    let api = client(&receiver);
    let report = rounds(&api, &vm1(), "any=1h").await;
    let why = report.disks[0].error.clone().unwrap_or_default();
    assert!(
        why.contains("lsn:80 is to be kept and cannot be read there (`backtide retention show`"),
        "{report:?}"
    );
    let left = segments(&place);
    receiver.shutdown().await;
    fs::rename(&away, &lost).unwrap();
    assert_eq!(segments(&place).len(), left.len() + 1);
    let receiver = place.start().await;
    let api = client(&receiver);
    assert_eq!(single(&api, "any=1h").await, [80]);
    reads_as(&place, &api, 80, &at(80)).await;
    assert_eq!(segments(&place), Vec::<PathBuf>::new());
    // Where it is never found again it goes when nobody wants it.
    api.keep(&keep(80, true)).await.unwrap();
    assert!(single(&api, "any=1h").await.is_empty());
    receiver.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn each_of_several_logs_that_have_ended_has_its_points() {
    let place = Place::new();
    let (receiver, mut agent) = with_two_logs(&place).await;
    go_on(&mut agent, NEXT + 1..=190).await;
    let api = client(&receiver);
    let of_two = single(&api, TENS).await;
    drop(agent);
    receiver.shutdown().await;
    // The second is damaged in its turn, where its newest points are, and a third begins.
    let second_log = older_log(&place).join("log-2/segments");
    let mut listed: Vec<_> = fs::read_dir(&second_log).unwrap().map(|entry| entry.unwrap().path()).collect();
    listed.sort();
    let newest = listed.iter().rev().find(|path| path.extension().is_some_and(|name| name == "seg")).unwrap();
    let mut bytes = fs::read(newest).unwrap();
    bytes[40] ^= 0x10;
    fs::write(newest, bytes).unwrap();
    let receiver = place.start().await;
    let third = Hello { epoch: Epoch(3), ..hello(1, "vm1") };
    let (mut agent, welcome) = Agent::welcomed(&receiver, third).await;
    assert_eq!((welcome.state, welcome.highest), (ReceiverState::New, Lsn(190)));
    agent.first_pass(200).await;
    agent.all_durable().await;
    let api = client(&receiver);
    let of_three = single(&api, TENS).await;
    assert!(of_three.starts_with(&of_two), "{of_two:?} {of_three:?}");
    assert_eq!(of_three.last(), Some(&190));
    for lsn in of_three.iter().filter(|lsn| **lsn < NEXT) {
        reads_as(&place, &api, *lsn, &at(*lsn)).await;
    }
    for lsn in [NEXT, 150, 190] {
        reads_as(&place, &api, lsn, &later(lsn)).await;
    }
    let points = api.points(&vm1()).await.unwrap();
    let damaged: Vec<_> = points.holes.iter().filter(|hole| hole.reason_code == "damaged").collect();
    let around = |nth: usize| (damaged[nth].after_lsn.0, damaged[nth].before_lsn.unwrap().0);
    assert_eq!((damaged.len(), around(0), around(1)), (2, (90, NEXT), (190, 200)), "{points:?}");
    assert!(single(&api, "any=1h").await.is_empty());
    assert_eq!(api.points(&vm1()).await.unwrap().first.unwrap().lsn, Lsn(200));
    let packs = || crate::retention::files(&place, "pack");
    while !packs().is_empty() {
        rounds(&api, &vm1(), "any=1h").await;
    }
    receiver.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_without_room_gives_up_the_history_of_a_log_that_has_ended_first() {
    let place = Place::new();
    let (receiver, mut agent) = with_two_logs(&place).await;
    go_on(&mut agent, NEXT + 1..=190).await;
    drop(agent);
    receiver.shutdown().await;
    let free =
        backtide_storage::Storage::free_space(&backtide_storage::RealStorage::open(&place.store()).unwrap());
    // It never has as much room as that.
    let low_bytes = ByteCount(free.unwrap().0 * 2);
    let retention = Retention { on_full: OnFull::Shrink, low_bytes, interval_ms: 20, ..Retention::default() };
    let receiver = Receiver::start(Config { retention, ..place.config() }).await.unwrap();
    let api = client(&receiver);
    let from = loop {
        let report = api.retention(None).await.unwrap();
        if report.disks[0].shrunk > 0 {
            break report.disks[0].every_point_from.as_ref().unwrap().lsn.0;
        }
    };
    assert!(from >= NEXT, "the older one has gone as a whole: {from}");
    receiver.shutdown().await;
    assert_eq!(segments(&place), Vec::<PathBuf>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn who_has_points_kept_meanwhile_does_not_hold_up_the_folding_of_a_log_that_has_ended() {
    let place = Place::new();
    let (receiver, agent) = with_two_logs(&place).await;
    drop(agent);
    receiver.shutdown().await;
    // What is wanted is noted where history is read: on one thread here, which has always somebody who waits for it.
    let retention = Retention { interval_ms: 1, ..Retention::default() };
    let mut config = Config { retention, ..place.config() };
    config.limits.read_threads = 1;
    let receiver = Receiver::start(config).await.unwrap();
    let address = receiver.api_address().clone();
    let keepers: Vec<_> = (0..6)
        .map(|_| {
            let api = ReceiverClient::new(&address).unwrap();
            tokio::spawn(async move {
                loop {
                    for release in [false, true] {
                        // Another one may have released it.
                        let _ = api.keep(&keep(NEXT, release)).await;
                    }
                }
            })
        })
        .collect();
    let api = client(&receiver);
    // Each of these lets the older log keep fewer points.
    for ladder_of in ["any=1h per-1s=100y", "any=1h per-2s=100y", TENS, "any=1h per-20s=100y", "any=1h"] {
        api.set_retention(&vm1(), &ladder(ladder_of)).await.unwrap();
        let single = async || api.retention(Some(&vm1())).await.unwrap().disks.remove(0).single_points.len();
        let wanted = match ladder_of {
            "any=1h per-1s=100y" => 80..=95,
            "any=1h per-2s=100y" => 40..=50,
            TENS => 9..=9,
            "any=1h per-20s=100y" => 4..=4,
            _ => 0..=0,
        };
        while !wanted.contains(&single().await) {}
    }
    keepers.iter().for_each(|keeper| keeper.abort());
    assert_eq!(segments(&place), Vec::<PathBuf>::new());
    receiver.shutdown().await;
}
