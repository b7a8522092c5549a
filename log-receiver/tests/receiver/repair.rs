//! `fsck --rebuild` and `fsck --repair`: what follows from the rest is written anew, what is damaged is mended, what is lost
//! is cut off and said; no point that was there is lost, and agents go on.

use std::{
    fs,
    path::{Path, PathBuf},
};

use backtide_log_receiver::{Receiver, Repair, fsck, repair};
use backtide_protocol::{CloseCode, Hello, ReceiverState};
use backtide_receiver_api::{PointsReport, ReceiverClient, StoreCheck};
use backtide_units::{Epoch, HistoryId, Lsn, Reason};

use crate::{
    agent::*,
    fixture::*,
    going_back::{assert_content, request},
    retention::{TENS, at, content, files, go_on, ladder, rounds, vm1, write_history},
};

fn repaired(place: &Place, what: Repair) -> StoreCheck {
    repair(&place.store(), what, &mut |_| {}).unwrap()
}

fn flip(path: &Path, at: usize) {
    let mut bytes = fs::read(path).unwrap();
    bytes[at] ^= 0x10;
    fs::write(path, bytes).unwrap();
}

fn cut_file(path: &Path, by: usize) {
    let bytes = fs::read(path).unwrap();
    fs::write(path, &bytes[..bytes.len() - by]).unwrap();
}

fn disk(place: &Place) -> PathBuf {
    place.store().join("disks").join(hello(1, "vm1").disk.to_string())
}

/// The segments of the disk's log.
fn segments_of(place: &Place) -> Vec<PathBuf> {
    let mut found = files(place, "seg");
    found.retain(|path| path.starts_with(place.store().join("disks")));
    found
}

/// Everything that is in the store's directory of what was cut, by name.
fn aside(place: &Place) -> Vec<String> {
    let directory = place.store().join("cut").join(hello(1, "vm1").disk.to_string()).join("log-1");
    let Ok(entries) = fs::read_dir(directory) else { return Vec::new() };
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

async fn points(receiver: &Receiver) -> PointsReport {
    client(receiver).points(&vm1()).await.unwrap()
}

async fn history(receiver: &Receiver) -> HistoryId {
    client(receiver).disks(Some(&vm1())).await.unwrap().disks.remove(0).history
}

async fn reads(place: &Place, api: &ReceiverClient, lsn: u64) {
    let mount = api.mount(&request(&format!("lsn:{lsn}"), None)).await.unwrap();
    assert_content(place, &mount, &at(lsn)).await;
    api.unmount(&mount.id, None).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_header_that_is_lost_is_written_again_and_the_disk_goes_on_without_a_hole() {
    let place = Place::new();
    let receiver = place.start().await;
    drop(write_history(&receiver, 6..=60).await);
    let before = points(&receiver).await;
    let history = history(&receiver).await;
    receiver.shutdown().await;
    let segments = segments_of(&place);
    for segment in [&segments[0], segments.last().unwrap()] {
        flip(segment, 40);
    }
    assert!(!fsck(&place.store(), &mut |_| {}).unwrap().sound);
    let report = repaired(&place, Repair::Rebuild);
    assert!(report.sound && report.disks[0].cut.is_empty(), "{report:?}");
    let mended = &report.disks[0].mended;
    assert!(mended.iter().filter(|done| done.contains("header is written again")).count() == 2, "{mended:?}");
    let receiver = place.start().await;
    assert_eq!(points(&receiver).await.intervals, before.intervals);
    let again = Hello { epoch: Epoch(2), history: Some(history), ..hello(1, "vm1") };
    let (_agent, welcome) = Agent::welcomed(&receiver, again).await;
    assert_eq!((welcome.state, welcome.durable), (ReceiverState::Known, Lsn(60)));
    reads(&place, &client(&receiver), 33).await;
    receiver.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_follows_from_the_logs_is_made_again_and_is_what_it_was() {
    let place = Place::new();
    let receiver = place.start().await;
    let mut agent = write_history(&receiver, 6..=60).await;
    let api = client(&receiver);
    let report = rounds(&api, &vm1(), TENS).await;
    assert!(!report.disks[0].single_points.is_empty(), "{report:?}");
    go_on(&mut agent, 61..=100).await;
    // A hole, and points behind it.
    agent.send(&pass_begin(110, 100, Reason::AgentCrashed)).await;
    agent.send(&pass_data(110, 0, content(110)[..4096].to_vec())).await;
    agent.send(&pass_end(110)).await;
    agent.send(&mark(110, "behind the hole")).await;
    agent.all_durable().await;
    drop(agent);
    let before = points(&receiver).await;
    let history = fs::read(disk(&place).join("base.1")).unwrap();
    receiver.shutdown().await;

    let store = place.store();
    for lost in ["base.1", "base.2", "disk.json", "durable"] {
        fs::remove_file(disk(&place).join(lost)).unwrap();
    }
    for lost in ["store.json", "mounts.json", "scrub.json", "findings.json"] {
        match fs::remove_file(store.join(lost)) {
            Err(error) if lost == "store.json" => panic!("{error}"),
            Ok(()) | Err(_) => {}
        }
    }
    let segments = segments_of(&place);
    let (_, sealed) = segments.split_last().unwrap();
    assert!(sealed.len() > 2, "{segments:?}");
    // Of one the trailer is gone, of one a part of the index is another, of one a bit of the guide.
    cut_file(&sealed[0], 20);
    let length = fs::metadata(&sealed[1]).unwrap().len() as usize;
    flip(&sealed[1], length - 400);

    let report = repaired(&place, Repair::Rebuild);
    assert!(report.sound, "{report:?}");
    assert!(report.repaired[0].contains("store.json"), "{report:?}");
    for made in ["base.1", "base.2", "disk.json", "durable"] {
        assert!(report.disks[0].mended.iter().any(|done| done.contains(made)), "{made}: {report:?}");
    }
    assert_eq!(fs::read(disk(&place).join("base.1")).unwrap(), history);
    let receiver = place.start().await;
    let after = points(&receiver).await;
    assert_eq!(after, before);
    for lsn in [10, 33, 60, 99] {
        if after.intervals.iter().any(|found| (found.from_lsn.0..=found.to_lsn.0).contains(&lsn)) {
            reads(&place, &client(&receiver), lsn).await;
        }
    }
    receiver.shutdown().await;
    let again = repaired(&place, Repair::Rebuild);
    assert!(again.sound && again.repaired.is_empty() && again.disks[0].mended.is_empty(), "{again:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_lost_a_segment_is_cut_there_and_keeps_its_points_and_its_fence() {
    let place = Place::new();
    let receiver = place.start().await;
    drop(write_history(&receiver, 6..=100).await);
    let (agent, _) = Agent::welcomed(&receiver, Hello { epoch: Epoch(7), ..hello(1, "vm1") }).await;
    drop(agent);
    let before = history(&receiver).await;
    receiver.shutdown().await;
    let segments = segments_of(&place);
    assert!(segments.len() > 4, "{segments:?}");
    fs::remove_file(&segments[2]).unwrap();
    let rebuilt = repaired(&place, Repair::Rebuild);
    assert!(!rebuilt.sound && rebuilt.disks[0].cut.is_empty(), "a rebuild cuts nothing: {rebuilt:?}");
    assert!(rebuilt.disks[0].damage.iter().any(|damage| damage.contains("missing")), "{rebuilt:?}");
    assert_eq!(segments_of(&place).len(), segments.len() - 1);

    let report = repaired(&place, Repair::Everything);
    assert!(report.sound, "{report:?}");
    let [cut] = &report.disks[0].cut[..] else { panic!("{report:?}") };
    assert!(cut.contains("is missing") && cut.contains("up to lsn:100 is lost"), "{cut}");
    let put: Vec<_> = segments[3..].iter().map(|path| path.file_name().unwrap().to_str().unwrap()).collect();
    assert_eq!(aside(&place), put);
    assert_eq!(segments_of(&place), segments[..2]);
    let again = repaired(&place, Repair::Everything);
    assert!(again.sound && again.disks[0].cut.is_empty(), "there is nothing left to do: {again:?}");

    let receiver = place.start().await;
    let kept = points(&receiver).await;
    let last = kept.last.unwrap().lsn;
    assert!(Lsn(6) < last && last < Lsn(60), "{kept:?}");
    let hole = kept.holes.last().unwrap();
    assert!(hole.open && hole.after_lsn == last && hole.reason.contains("is missing"), "{hole:?}");
    assert_eq!(hole.reason_code, "damaged");
    reads(&place, &client(&receiver), last.0).await;
    let stale = Agent::refused(&receiver, Hello { epoch: Epoch(6), ..hello(1, "vm1") }).await;
    assert_eq!(stale.code, CloseCode::Fenced, "{stale:?}");
    let known = Hello { epoch: Epoch(8), history: Some(before), ..hello(1, "vm1") };
    let (mut agent, welcome) = Agent::welcomed(&receiver, known).await;
    assert_eq!((welcome.state, welcome.durable), (ReceiverState::New, Lsn(0)), "nothing of it is relied on");
    assert_eq!(welcome.highest, Lsn(100), "no LSN comes a second time");
    agent.first_pass(110).await;
    agent.all_durable().await;
    drop(agent);
    let after = points(&receiver).await;
    assert_eq!(after.damage, None);
    let hole = after.holes.last().unwrap();
    assert_eq!((hole.after_lsn, hole.before_lsn), (last, Some(Lsn(110))), "{hole:?}");
    assert!(hole.reason.contains("is missing"), "{hole:?}");
    receiver.shutdown().await;
    assert!(fsck(&place.store(), &mut |_| {}).unwrap().sound);
    // Forgotten is forgotten, also what was cut off.
    let receiver = place.start().await;
    let forgotten = client(&receiver).forget(&vm1()).await;
    assert!(forgotten.is_ok(), "{forgotten:?}");
    assert_eq!(aside(&place), Vec::<String>::new());
    receiver.shutdown().await;
}

/// Within the first entry's header behind `middle`: what is lost from there on begins with an entry, and not with the
/// payload of one that is there still.
fn header_behind(segment: &[u8], middle: usize) -> usize {
    let beginnings: Vec<Vec<u8>> = (6..=100).map(|lsn| content(lsn)[..32].to_vec()).collect();
    let is_payload = |at: &usize| beginnings.iter().any(|begins| segment[*at..].starts_with(begins));
    let payload = (middle.next_multiple_of(8)..segment.len()).step_by(8).find(is_payload);
    payload.expect("an entry is behind the middle") - 32
}

#[tokio::test(flavor = "multi_thread")]
async fn a_segment_is_kept_up_to_the_entry_that_is_lost() {
    let place = Place::new();
    let receiver = place.start().await;
    drop(write_history(&receiver, 6..=100).await);
    receiver.shutdown().await;
    let segments = segments_of(&place);
    let broken = &segments[1];
    // No index, and in the middle a stretch longer than any entry.
    let length = fs::metadata(broken).unwrap().len() as usize;
    cut_file(broken, 20);
    let mut bytes = fs::read(broken).unwrap();
    let lost = header_behind(&bytes, length / 2);
    bytes[lost..lost + 70_000].fill(0xee);
    fs::write(broken, &bytes).unwrap();
    let rebuilt = repaired(&place, Repair::Rebuild);
    assert!(!rebuilt.sound && segments_of(&place) == segments, "{rebuilt:?}");
    let report = repaired(&place, Repair::Everything);
    assert!(report.sound && report.disks[0].cut.len() == 1, "{report:?}");
    assert_eq!(segments_of(&place), segments[..2]);
    // Entries behind the lost one are cut off where one of them says that it was durable: that one of the next
    // segment begins with does not. It depends on which of them were written with the same sync.
    let kept = fs::read(broken).unwrap();
    assert!(bytes.starts_with(&kept) && kept.len() >= lost, "{} of {} bytes", kept.len(), bytes.len());
    assert_eq!(aside(&place).len(), segments.len() - 2 + usize::from(kept != bytes));
    let receiver = place.start().await;
    let last = points(&receiver).await.last.unwrap().lsn.0;
    for lsn in [6, last] {
        reads(&place, &client(&receiver), lsn).await;
    }
    receiver.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_payload_is_mended_from_an_image_without_a_receiver() {
    let place = Place::new();
    let receiver = place.start().await;
    drop(write_history(&receiver, 6..=60).await);
    let report = rounds(&client(&receiver), &vm1(), TENS).await;
    assert!(!report.disks[0].single_points.is_empty(), "{report:?}");
    receiver.shutdown().await;
    let packs = files(&place, "pack");
    // A node or a table somewhere: each is mended from its second.
    let length = fs::metadata(&packs[0]).unwrap().len() as usize;
    flip(&packs[0], length - 100);
    assert!(!fsck(&place.store(), &mut |_| {}).unwrap().sound);
    let report = repaired(&place, Repair::Everything);
    assert!(report.sound && report.disks[0].mended.len() == 1, "{report:?}");
    assert!(fsck(&place.store(), &mut |_| {}).unwrap().sound);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_may_be_whole_but_for_its_base_is_not_cut() {
    let place = Place::new();
    let receiver = place.start().await;
    drop(write_history(&receiver, 6..=60).await);
    rounds(&client(&receiver), &vm1(), TENS).await;
    let whole = points(&receiver).await;
    receiver.shutdown().await;
    let base = fs::read(disk(&place).join("base.1")).unwrap();
    for lost in ["base.1", "base.2"] {
        fs::remove_file(disk(&place).join(lost)).unwrap();
    }
    fs::remove_dir_all(place.store().join("images/bases")).unwrap();
    let (before, packs) = (segments_of(&place), files(&place, "pack"));
    let report = repaired(&place, Repair::Everything);
    assert!(!report.sound && report.disks[0].cut.is_empty(), "{report:?}");
    assert_eq!(segments_of(&place), before);
    assert_eq!(aside(&place), Vec::<String>::new());
    // Nor are its images taken for nobody's, for as long as it takes to put the base back.
    let receiver = place.start().await;
    let api = client(&receiver);
    let error = loop {
        let report = api.retention(None).await.unwrap();
        if report.rounds > 2 {
            break report.error;
        }
        api.set_retention(&vm1(), &ladder(TENS)).await.ok();
    };
    assert!(error.is_some_and(|error| error.contains("which images a log has")));
    receiver.shutdown().await;
    assert_eq!(files(&place, "pack"), packs);
    fs::write(disk(&place).join("base.1"), base).unwrap();
    let receiver = place.start().await;
    assert_eq!(points(&receiver).await, whole);
    receiver.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_a_receiver_serves_in_full_is_not_cut() {
    let place = Place::new();
    let receiver = place.start().await;
    let mut agent = write_history(&receiver, 6..=6).await;
    for lsn in 7..=100 {
        // Each durable for itself: later segments say so of those before.
        go_on(&mut agent, lsn..=lsn).await;
    }
    drop(agent);
    receiver.shutdown().await;
    let segments = segments_of(&place);
    // A bad page where the entries of a segment end and its index begins.
    let mut bytes = fs::read(&segments[1]).unwrap();
    let length = bytes.len();
    bytes[length - 6000..length - 2000].fill(0);
    fs::write(&segments[1], &bytes).unwrap();
    let report = repaired(&place, Repair::Everything);
    assert!(report.disks[0].cut.is_empty(), "{report:?}");
    assert_eq!((segments_of(&place), aside(&place)), (segments, Vec::new()));
    let receiver = place.start().await;
    let found = points(&receiver).await;
    assert_eq!((found.intervals.len(), found.last.unwrap().lsn), (1, Lsn(100)), "{found:?}");
    reads(&place, &client(&receiver), 100).await;
    receiver.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_base_of_another_time_in_the_images_is_not_believed() {
    let place = Place::new();
    let receiver = place.start().await;
    let mut agent = write_history(&receiver, 6..=60).await;
    let api = client(&receiver);
    rounds(&api, &vm1(), TENS).await;
    let elsewhere = &files(&place, "base")[0];
    let old = fs::read(elsewhere).unwrap();
    go_on(&mut agent, 61..=140).await;
    rounds(&api, &vm1(), TENS).await;
    assert_ne!(fs::read(elsewhere).unwrap(), old, "it has been folded again");
    drop(agent);
    let before = points(&receiver).await;
    receiver.shutdown().await;
    let own = fs::read(disk(&place).join("base.1")).unwrap();
    fs::write(elsewhere, &old).unwrap();
    let report = repaired(&place, Repair::Rebuild);
    assert!(report.sound, "{report:?}");
    assert_eq!(
        (&fs::read(elsewhere).unwrap(), &fs::read(disk(&place).join("base.1")).unwrap()),
        (&own, &own)
    );
    // Nor when it is the only one, and not of the segments that are there.
    for lost in ["base.1", "base.2"] {
        fs::remove_file(disk(&place).join(lost)).unwrap();
    }
    fs::write(elsewhere, &old).unwrap();
    let segments = segments_of(&place);
    let report = repaired(&place, Repair::Everything);
    assert!(!report.sound && report.disks[0].cut.is_empty(), "{report:?}");
    assert_eq!(segments_of(&place), segments);
    fs::write(elsewhere, &own).unwrap();
    assert!(repaired(&place, Repair::Rebuild).sound);
    let receiver = place.start().await;
    assert_eq!(points(&receiver).await, before);
    receiver.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_segment_that_is_empty_is_put_aside_with_those_behind_it() {
    let place = Place::new();
    let receiver = place.start().await;
    drop(write_history(&receiver, 6..=100).await);
    receiver.shutdown().await;
    let segments = segments_of(&place);
    fs::write(&segments[2], []).unwrap();
    let damage = fsck(&place.store(), &mut |_| {}).unwrap().disks.remove(0).damage;
    assert!(damage[0].contains("0000000000000003.seg"), "{damage:?}");
    let report = repaired(&place, Repair::Everything);
    assert!(report.sound && report.disks[0].cut.len() == 1, "{report:?}");
    assert_eq!((segments_of(&place), aside(&place).len()), (segments[..2].to_vec(), segments.len() - 2));
    // A second cut puts nothing in the place of what the first put aside.
    fs::write(&segments[1], []).unwrap();
    fs::write(
        place.store().join("cut").join(hello(1, "vm1").disk.to_string()).join("log-1/0000000000000002.seg"),
        "x",
    )
    .unwrap();
    let report = repaired(&place, Repair::Everything);
    assert!(report.sound && report.disks[0].cut.len() == 1, "{report:?}");
    assert_eq!(segments_of(&place), segments[..1]);
    assert!(aside(&place).contains(&"0000000000000002.seg.2".to_owned()), "{:?}", aside(&place));
    let receiver = place.start().await;
    let last = points(&receiver).await.last.unwrap().lsn.0;
    reads(&place, &client(&receiver), last).await;
    receiver.shutdown().await;
}

#[test]
fn what_is_no_store_is_refused_and_stays_as_it_is() {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("letter.txt"), "dear").unwrap();
    for what in [Repair::Rebuild, Repair::Everything] {
        let error = repair(directory.path(), what, &mut |_| {}).unwrap_err().to_string();
        assert!(error.contains("is no store of a receiver"), "{error}");
        let error = repair(&directory.path().join("none"), what, &mut |_| {}).unwrap_err().to_string();
        assert!(error.contains("open the store"), "{error}");
    }
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
}
