//! A damaged or failing log: the disk keeps its name, what is left of it can be read, and its agent
//! goes on.

use std::{fs, path::PathBuf};

use backtide_log_receiver::{Receiver, fsck};
use backtide_protocol::{CloseCode, FailureCode, Hello, Message, Reading, ReceiverState};
use backtide_receiver_api::{
    DiffRequest, ErrorCode, Hole, PointsReport, ReceiverClient, ScrubRequest, Touched, TouchedKnown,
    TouchedPoints,
};
use backtide_units::{ByteCount, ByteOffset, ByteRange, DiskName, Epoch, Lsn, Reason};

use crate::{
    agent::*,
    faults::{Fault, Faulty},
    fixture::*,
    going_back::{assert_content, request},
    point_reader::{PointReader, open},
};

fn vm1() -> DiskName {
    "vm1".parse().unwrap()
}

fn segments(place: &Place) -> Vec<PathBuf> {
    let directory = place.store().join("disks").join(hello(1, "vm1").disk.to_string()).join("segments");
    let mut found: Vec<_> = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    found.sort();
    found
}

/// What block 0 holds at each LSN.
fn image(lsn: u64) -> Vec<u8> {
    let mut image = vec![0; DISK_BYTES as usize];
    if lsn > 5 {
        image[..4096].fill(lsn as u8);
    }
    image
}

/// Writes LSN 6 to `last`, in turns: later entries are what proves that earlier ones were acknowledged.
async fn write_log(receiver: &Receiver, last: u64) {
    let (mut agent, _) = Agent::welcomed(receiver, hello(1, "vm1")).await;
    agent.first_pass(5).await;
    for lsn in 6..=last {
        agent.send(&write(lsn, 0, vec![lsn as u8; 4096])).await;
        if lsn % 100 == 0 {
            agent.all_durable().await;
        }
    }
    agent.all_durable().await;
}

fn flip(path: &PathBuf, at: usize) {
    let mut bytes = fs::read(path).unwrap();
    bytes[at] ^= 0x10;
    fs::write(path, bytes).unwrap();
}

async fn read_point(place: &Place, api: &ReceiverClient, lsn: u64) {
    let mount = api.mount(&request(&format!("lsn:{lsn}"), None)).await.unwrap();
    assert_content(place, &mount, &image(lsn)).await;
    api.unmount(&mount.id, None).await.unwrap();
}

fn damaged_hole(points: &PointsReport) -> &Hole {
    let hole = points.holes.last().expect("a hole");
    assert_eq!(hole.reason_code, "damaged", "{hole:?}");
    hole
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_with_a_bad_header_keeps_its_name_and_all_its_points_and_its_agent_goes_on() {
    let place = Place::new();
    let receiver = place.start().await;
    write_log(&receiver, 50).await;
    receiver.shutdown().await;
    let [only] = &segments(&place)[..] else { panic!("one segment") };
    flip(only, 40);

    let receiver = place.start().await;
    let api = client(&receiver);
    let points = api.points(&vm1()).await.unwrap();
    let damage = points.damage.clone().expect("it is said");
    assert!(damage.contains("0000000000000001.seg is damaged at byte 0"), "{damage}");
    assert_eq!((points.intervals[0].from_lsn, points.intervals[0].to_lsn), (Lsn(5), Lsn(50)));
    let hole = damaged_hole(&points);
    let listed = api.disks(None).await.unwrap().disks.remove(0);
    assert!(listed.log_bytes > ByteCount(45 * 4096), "{listed:?}");
    assert!(hole.open && hole.after_lsn == Lsn(50), "{hole:?}");
    read_point(&place, &api, 20).await;
    read_point(&place, &api, 50).await;

    // The agent is told that nothing of its history goes on, and where LSNs go on.
    let known = Hello { epoch: Epoch(2), ..hello(1, "vm1") };
    let (mut agent, welcome) = Agent::welcomed(&receiver, known.clone()).await;
    assert_eq!((welcome.state, welcome.durable, welcome.highest), (ReceiverState::New, Lsn(0), Lsn(50)));
    agent.send(&pass_begin(60, 0, Reason::ReceiverRolledBack)).await;
    agent.send(&pass_data(60, 0, vec![60; 4096])).await;
    agent.send(&pass_end(60)).await;
    agent.all_durable().await;
    both_logs_are_served(&place, &receiver).await;
    receiver.shutdown().await;
    let receiver = place.start().await;
    both_logs_are_served(&place, &receiver).await;
    let again = Hello { history: Some(welcome.history), ..known };
    let (_agent, welcome) = Agent::welcomed(&receiver, again).await;
    assert_eq!((welcome.state, welcome.durable), (ReceiverState::Known, Lsn(60)));
    receiver.shutdown().await;
}

async fn both_logs_are_served(place: &Place, receiver: &Receiver) {
    let api = client(receiver);
    let points = api.points(&vm1()).await.unwrap();
    assert_eq!(points.damage, None, "the log in use is sound");
    let hole = damaged_hole(&points);
    assert_eq!((hole.after_lsn, hole.before_lsn), (Lsn(50), Some(Lsn(60))), "{hole:?}");
    let disk = api.disks(Some(&vm1())).await.unwrap().disks.remove(0);
    assert!(disk.error.is_none() && disk.damage[0].contains("0000000000000001.seg"), "{disk:?}");
    for lsn in [5, 50, 60] {
        read_point(place, &api, lsn).await;
    }
    let error = api.mount(&request("lsn:55", None)).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::PointInHole, "{error}");
    let changed = DiffRequest { from: "lsn:20".into(), to: "lsn:60".into() };
    assert_eq!(api.diff(&vm1(), &changed).await.unwrap().bytes.0, 4096);
}

#[tokio::test(flavor = "multi_thread")]
async fn points_before_a_lost_segment_stay_and_stale_epochs_stay_fenced() {
    let place = Place::new();
    let receiver = place.start().await;
    write_log(&receiver, 1005).await;
    let (agent, _) = Agent::welcomed(&receiver, Hello { epoch: Epoch(7), ..hello(1, "vm1") }).await;
    drop(agent);
    receiver.shutdown().await;
    fs::remove_file(&segments(&place)[1]).unwrap();

    let receiver = place.start().await;
    let api = client(&receiver);
    let points = api.points(&vm1()).await.unwrap();
    let damage = points.damage.clone().expect("it is said");
    assert!(damage.contains("0000000000000002.seg"), "{damage}");
    let last = points.last.unwrap().lsn.0;
    assert!((100..500).contains(&last), "{points:?}");
    assert!(damaged_hole(&points).reason.contains("0000000000000002.seg is missing"), "{points:?}");
    read_point(&place, &api, 5).await;
    read_point(&place, &api, last).await;
    let error = api.mount(&request("lsn:900", None)).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::PointInHole, "{error}");
    assert!(error.message.contains("is missing"), "{error}");
    let stale = Agent::refused(&receiver, Hello { epoch: Epoch(6), ..hello(1, "vm1") }).await;
    assert_eq!(stale.code, CloseCode::Fenced, "{stale:?}");
    let damage = api.points(&vm1()).await.unwrap().damage;
    assert!(damage.is_some(), "a refused hello changes nothing");
    let (_agent, welcome) = Agent::welcomed(&receiver, Hello { epoch: Epoch(8), ..hello(1, "vm1") }).await;
    assert_eq!((welcome.state, welcome.durable), (ReceiverState::New, Lsn(0)));
    assert!(welcome.highest >= Lsn(1005), "{welcome:?}");
    receiver.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_durable_in_a_failed_log_is_served_and_nothing_else() {
    let place = Place::new();
    let storage = Faulty::new();
    let receiver = place.start_on(storage.clone()).await;
    let (mut agent, first) = Agent::welcomed(&receiver, hello(1, "vm1")).await;
    agent.first_pass(5).await;
    agent.send(&write(6, 0, vec![6; 4096])).await;
    agent.all_durable().await;
    storage.set(Fault::WritesFail);
    agent.send(&write(7, 0, vec![7; 4096])).await;
    let closed = agent.closed().await;
    assert_eq!(closed.code, CloseCode::Store);
    assert!(closed.message.contains("injected failure of a write"), "{closed:?}");

    let api = client(&receiver);
    let points = api.points(&vm1()).await.unwrap();
    assert_eq!((points.last.unwrap().lsn, points.holes.len(), &points.damage), (Lsn(6), 0, &None));
    assert!(!points.intervals[0].open, "nothing can be added now");
    read_point(&place, &api, 6).await;
    let error = api.mount(&request("lsn:7", None)).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::PointNotFound, "{error}");
    let disk = api.disks(Some(&vm1())).await.unwrap().disks.remove(0);
    assert!(disk.error.unwrap().contains("injected failure of a write"));

    // The agent comes again and again; nothing but that brings the log back.
    let again = Hello { history: Some(first.history), ..hello(1, "vm1") };
    for _ in 0..3 {
        assert_eq!(Agent::refused(&receiver, again.clone()).await.code, CloseCode::Store);
        read_point(&place, &api, 6).await;
    }
    storage.set(Fault::None);
    let (mut agent, welcome) = Agent::welcomed(&receiver, again).await;
    assert_eq!((welcome.state, welcome.durable), (ReceiverState::Known, Lsn(6)));
    agent.send(&write(7, 0, vec![7; 4096])).await;
    agent.all_durable().await;
    read_point(&place, &api, 7).await;
    receiver.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_point_is_offered_only_when_it_is_durable_and_latest_has_all_that_was_received() {
    let place = Place::new();
    let storage = Faulty::new();
    let receiver = place.start_on(storage.clone()).await;
    let (mut agent, _) = Agent::welcomed(&receiver, hello(1, "vm1")).await;
    agent.first_pass(5).await;
    agent.all_durable().await;
    storage.set(Fault::SyncsWait);
    agent.send(&write(6, 0, vec![6; 4096])).await;
    storage.a_sync_waits().await;
    let api = client(&receiver);
    let name = vm1();
    let points = api.points(&name);
    tokio::pin!(points);
    // Calls that came later are answered, this one is not before the sync has ended.
    for _ in 0..30 {
        tokio::select! {
            biased;
            points = &mut points => panic!("offered before it was durable: {points:?}"),
            disks = api.disks(None) => assert_eq!(disks.unwrap().disks[0].durable, Lsn(5)),
        }
    }
    storage.set(Fault::None);
    assert_eq!(points.await.unwrap().last.unwrap().lsn, Lsn(6));
    agent.send(&write(7, 0, vec![7; 4096])).await;
    while !matches!(agent.next().await, Some(Message::Ack { received, .. }) if received == agent.sent) {}
    assert_eq!(api.mount(&request("latest", None)).await.unwrap().lsn, Lsn(7));
    receiver.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn damage_that_a_read_of_a_mounted_point_meets_is_remembered() {
    let place = Place::new();
    let receiver = place.start().await;
    write_log(&receiver, 50).await;
    let [only, ..] = &segments(&place)[..] else { panic!("a segment") };
    let payload = fs::read(only).unwrap().windows(512).position(|bytes| bytes.iter().all(|&byte| byte == 20));
    flip(only, payload.expect("the payload of LSN 20 stands in the file as it is"));
    let api = client(&receiver);
    read_point(&place, &api, 50).await;
    assert_eq!(api.points(&vm1()).await.unwrap().damage, None, "nobody has met it yet");

    let mount = api.mount(&request("lsn:20", None)).await.unwrap();
    let copy = place.path("copy.img");
    let copied = tokio::task::spawn_blocking(move || {
        std::process::Command::new("nbdcopy").arg(&mount.uri).arg(copy).output().unwrap()
    });
    assert!(!copied.await.unwrap().status.success(), "damage is never data");
    let damage = api.points(&vm1()).await.unwrap().damage.expect("it is said");
    assert!(damage.contains("0000000000000001.seg is damaged at byte"), "{damage}");
    let alarms = api.status().await.unwrap().alarms;
    assert!(alarms.iter().any(|alarm| alarm.contains(&damage)), "{alarms:?}");
    let disks = api.disks(None).await.unwrap().disks;
    assert_eq!(disks[0].damage, [damage], "{disks:?}");
    read_point(&place, &api, 50).await;
    receiver.shutdown().await;
}

/// A log of which nothing is left but what stands beside it: emptied or removed.
async fn a_lost_log_is_told(lose: fn(&PathBuf)) {
    let place = Place::new();
    let receiver = place.start().await;
    write_log(&receiver, 50).await;
    let (agent, _) = Agent::welcomed(&receiver, Hello { epoch: Epoch(7), ..hello(1, "vm1") }).await;
    drop(agent);
    receiver.shutdown().await;
    segments(&place).iter().for_each(lose);
    let report = fsck(&place.store(), &mut |_| {}).unwrap();
    let [disk] = &report.disks[..] else { panic!("{report:?}") };
    assert!(!report.sound && disk.name == Some(vm1()), "{report:?}");

    let receiver = place.start().await;
    let api = client(&receiver);
    let points = api.points(&vm1()).await.unwrap();
    let damage = points.damage.clone().expect("it is said");
    assert!(damage.contains("all of the log is lost") && damage.contains("lsn:50"), "{damage}");
    assert!(points.intervals.is_empty() && points.holes.len() == 1, "{points:?}");
    assert!(
        points.touched[0].points[0].lost && points.touched[0].text == "all points are lost",
        "{points:?}"
    );
    let hole = damaged_hole(&points);
    assert!(hole.open && hole.after_lsn == Lsn(0), "{hole:?}");
    let disks = api.disks(None).await.unwrap().disks;
    assert!(disks[0].name == vm1() && disks[0].error.is_some(), "{disks:?}");
    let alarms = api.status().await.unwrap().alarms;
    assert!(alarms.iter().any(|alarm| alarm.contains(&damage)), "{alarms:?}");
    let mut scrub = api.scrub(&ScrubRequest::default()).await.unwrap();
    while scrub.running {
        scrub = api.scrub_status().await.unwrap();
    }
    assert!(!scrub.sound, "{scrub:?}");

    // Its agent goes on in a new log, a stale one does not.
    let stale = Agent::refused(&receiver, Hello { epoch: Epoch(6), ..hello(1, "vm1") }).await;
    assert_eq!(stale.code, CloseCode::Fenced, "{stale:?}");
    let (mut agent, welcome) = Agent::welcomed(&receiver, Hello { epoch: Epoch(8), ..hello(1, "vm1") }).await;
    assert_eq!((welcome.state, welcome.durable, welcome.highest), (ReceiverState::New, Lsn(0), Lsn(50)));
    agent.send(&pass_begin(60, 0, Reason::ReceiverRolledBack)).await;
    agent.send(&pass_data(60, 0, vec![60; 4096])).await;
    agent.send(&pass_end(60)).await;
    agent.all_durable().await;
    for _ in 0..2 {
        let points = api.points(&vm1()).await.unwrap();
        assert_eq!((points.damage.as_ref(), points.intervals.len()), (None, 1), "{points:?}");
        let hole = damaged_hole(&points);
        assert_eq!((hole.after_lsn, hole.before_lsn), (Lsn(0), Some(Lsn(60))), "{hole:?}");
        read_point(&place, &api, 60).await;
    }
    receiver.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_whose_only_segment_was_emptied_is_damaged_and_not_unknown() {
    a_lost_log_is_told(|segment| fs::write(segment, b"").unwrap()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_whose_segments_were_removed_is_damaged_and_not_unknown() {
    a_lost_log_is_told(|segment| fs::remove_file(segment).unwrap()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn damage_is_an_error_that_names_it_for_an_agent_that_reads_a_point() {
    let place = Place::new();
    let receiver = place.start().await;
    let (mut agent, _) = Agent::welcomed(&receiver, hello(1, "vm1")).await;
    agent.first_pass(5).await;
    // Enough for a sealed segment, in places of their own.
    for lsn in 6..=40 {
        agent.send(&write(lsn, (lsn - 6) << 16, vec![lsn as u8; 1 << 16])).await;
    }
    agent.all_durable().await;
    let mut bytes = fs::read(&segments(&place)[0]).unwrap();
    let lies = bytes.windows(4096).position(|window| window.iter().all(|byte| *byte == 8)).unwrap();
    bytes[lies] ^= 1;
    fs::write(&segments(&place)[0], bytes).unwrap();
    let mut reader = PointReader::open(&receiver, open("vm1", Some(40))).await;
    let fetch = |at: u64| {
        let range = ByteRange::new(ByteOffset(at << 16), ByteCount(4096)).unwrap();
        move |id| Reading::Fetch { id, range }
    };
    let failure = reader.done(fetch(2)).await.unwrap_err();
    assert_eq!(failure.code, FailureCode::Damaged);
    assert!(failure.message.contains(".seg"), "{}", failure.message);
    // The rest can be read, and people hear of it.
    reader.done(fetch(3)).await.unwrap();
    let api = client(&receiver);
    let alarms = api.status().await.unwrap().alarms;
    let told = failure.message.strip_prefix("cannot read vm1 at lsn:40 (1970-01-01T00:00:40Z): ").unwrap();
    assert!(alarms.iter().any(|alarm| alarm == &format!("disk vm1: {told}")), "{alarms:?}");
    // With the points that need the place: from the write on, for nothing was written there since.
    let points =
        "it touches bytes 131072..196608 of lsn:8 (1970-01-01T00:00:08Z) to lsn:40 (1970-01-01T00:00:40Z)";
    assert!(told.contains(points) && told.ends_with("and on, until they are written again"), "{told}");
    let mount = api.mount(&request("lsn:20", None)).await.unwrap();
    crate::going_back::assert_unreadable(&place, &mount).await;
    api.unmount(&mount.id, None).await.unwrap();
    agent.send(&write(41, 2 << 16, vec![41; 1 << 16])).await;
    agent.all_durable().await;
    let mut scrub = api.scrub(&ScrubRequest::default()).await.unwrap();
    while scrub.running {
        scrub = api.scrub_status().await.unwrap();
    }
    let ends = |touched: &[Touched]| {
        let [Touched { points, known: TouchedKnown::Exact, .. }] = touched else { panic!("{touched:?}") };
        let [TouchedPoints { bytes: Some(bytes), from: Some(from), to: Some(to), open: false, lost: false }] =
            points[..]
        else {
            panic!("{touched:?}")
        };
        (bytes.offset, bytes.length, from.lsn, to.lsn)
    };
    let expected = (ByteOffset(2 << 16), ByteCount(1 << 16), Lsn(8), Lsn(40));
    assert_eq!(ends(&scrub.disks[0].touched), expected);
    assert_eq!(ends(&api.points(&vm1()).await.unwrap().touched), expected);
    assert_eq!(ends(&api.disks(None).await.unwrap().disks[0].touched), expected);
    receiver.shutdown().await;
    assert_eq!(ends(&fsck(&place.store(), &mut |_| {}).unwrap().disks[0].touched), expected);
    // And it is remembered.
    let receiver = place.start().await;
    assert_eq!(ends(&client(&receiver).points(&vm1()).await.unwrap().touched), expected);
    receiver.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn damage_is_told_after_a_start_and_mended_from_what_was_sent_again() {
    let place = Place::new();
    let receiver = place.start().await;
    let (mut agent, _) = Agent::welcomed(&receiver, hello(1, "vm1")).await;
    agent.first_pass(5).await;
    // The guest writes the same bytes over and over.
    let bytes = |at: u64| vec![at as u8 + 1; 64 << 10];
    for lsn in 6..=70 {
        agent.send(&write(lsn, lsn % 16 * (64 << 10), bytes(lsn % 16))).await;
    }
    agent.all_durable().await;
    let [first, _, ..] = &segments(&place)[..] else { panic!("several segments") };
    let sound = fs::read(first).unwrap();
    flip(first, 300_000);
    flip(first, sound.len() - 200);

    let api = client(&receiver);
    let scrub = ScrubRequest { name: None, bytes_per_second_max: Some(backtide_units::ByteCount(0)) };
    let points = api.points(&vm1()).await.unwrap();
    let mount = api.mount(&request("lsn:20", None)).await.unwrap();
    let mut image = vec![0; DISK_BYTES as usize];
    for lsn in 6..=20_u64 {
        let at = (lsn % 16) as usize * (64 << 10);
        image[at..at + (64 << 10)].copy_from_slice(&bytes(lsn % 16));
    }
    assert_eq!(points.damage, None, "nobody has read it yet");
    crate::going_back::assert_unreadable(&place, &mount).await;
    while api.points(&vm1()).await.unwrap().damage.is_none() {}
    api.unmount(&mount.id, None).await.unwrap();
    drop(agent);
    receiver.shutdown().await;

    let receiver = place.start().await;
    let api = client(&receiver);
    let damage = api.points(&vm1()).await.unwrap().damage.expect("it is still told");
    assert!(damage.contains(".seg is damaged"), "{damage}");
    let mut status = api.scrub(&scrub).await.unwrap();
    while status.running {
        status = api.scrub_status().await.unwrap();
    }
    assert!(status.sound && !status.disks[0].mended.is_empty(), "{status:?}");
    assert_eq!(api.points(&vm1()).await.unwrap().damage, None);
    assert!(fs::read(first).unwrap() == sound, "byte for byte");
    let mount = api.mount(&request("lsn:20", None)).await.unwrap();
    assert_content(&place, &mount, &image).await;
    receiver.shutdown().await;
    assert!(fsck(&place.store(), &mut |_| {}).unwrap().sound);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_is_moved_is_compared_no_second_time_and_tells_each_place_once() {
    let place = Place::new();
    let receiver = place.start().await;
    let (mut agent, first) = Agent::welcomed(&receiver, hello(1, "vm1")).await;
    agent.first_pass(5).await;
    for lsn in 6..=20 {
        agent.send(&write(lsn, lsn << 12, vec![lsn as u8; 4096])).await;
        agent.all_durable().await;
    }
    // Nothing seals the segment.
    let copy = fs::read(&segments(&place)[0]).unwrap();
    drop(agent);
    receiver.shutdown().await;
    let [only] = &segments(&place)[..] else { panic!("one segment") };
    fs::write(only, copy).unwrap();
    let payload = fs::read(only).unwrap().windows(4096).position(|bytes| bytes == [10; 4096]);
    flip(only, payload.expect("the payload of LSN 10 stands in the file as it is") + 100);

    let again = Hello { history: Some(first.history), ..hello(1, "vm1") };
    let receiver = place.start().await;
    let (mut agent, welcome) = Agent::welcomed(&receiver, again.clone()).await;
    assert_eq!(welcome.state, ReceiverState::Foreign);
    agent.send(&pass_begin(60, 20, Reason::Damaged)).await;
    agent.send(&pass_end(60)).await;
    agent.all_durable().await;
    let damage = client(&receiver).disks(None).await.unwrap().disks.remove(0).damage;
    assert_eq!(damage.len(), 1, "{damage:?}");
    drop(agent);
    receiver.shutdown().await;

    let noted = fs::read_to_string(place.store().join("findings.json")).unwrap();
    assert!(noted.contains("\"disks/") && !noted.contains(&place.store().display().to_string()), "{noted}");
    let moved = place.path("moved");
    fs::rename(place.store(), &moved).unwrap();
    let config = backtide_log_receiver::Config { store: moved.clone(), ..place.config() };
    let receiver = Receiver::start(config).await.unwrap();
    let (_agent, welcome) = Agent::welcomed(&receiver, again).await;
    assert_eq!(welcome.state, ReceiverState::Known);
    let disk = client(&receiver).disks(None).await.unwrap().disks.remove(0);
    let [told] = &disk.damage[..] else { panic!("one place, not {disk:?}") };
    assert!(told.starts_with(&format!("{}/disks/", moved.display())), "{told}");
    assert!(
        disk.touched.iter().all(|touched| *told == touched.place) && !disk.touched.is_empty(),
        "{disk:?}"
    );
    receiver.shutdown().await;
}
