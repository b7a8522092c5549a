//! Each thing that can be wrong is found, and what is well is said to be.

use backtide_agent_api::{Dirty, Lag, Spill};
use backtide_control::{ApiError, ErrorCode};
use backtide_receiver_api::ReceiverDisk;
use backtide_units::{BlockCount, ByteCount, DiskId, Epoch, HistoryId, Lsn};

use super::*;
use crate::output::status::tests::in_sync;

fn receiver(free: u64) -> ReceiverStatus {
    ReceiverStatus {
        version: VERSION.to_owned(),
        now: None,
        store: "/srv/backtide".to_owned(),
        store_id: "5f0c9f54".to_owned(),
        listen: Vec::new(),
        nbd_listen: None,
        certificate: None,
        certificate_warnings: Vec::new(),
        log_bytes: ByteCount(0),
        store_error: None,
        free_bytes: ByteCount(free),
        free_bytes_min: ByteCount(64 << 20),
        growth: None,
        disks: 1,
        connected: 1,
        overlays: 0,
        overlay_bytes: ByteCount(0),
        commits: Default::default(),
        mounts: 0,
        alarms: Vec::new(),
        scrub: None,
        scrub_next: None,
    }
}

fn kept_disk(last_time: u64) -> ReceiverDisk {
    ReceiverDisk {
        name: "vm1".parse().unwrap(),
        uuid: DiskId::random(),
        size: ByteCount(1 << 30),
        history: HistoryId::random(),
        epoch: Epoch(1),
        connected: true,
        in_pass: false,
        received: Lsn(9),
        durable: Lsn(9),
        last_time: Some(CaptureTime(last_time)),
        clock: None,
        ack: None,
        on_outage: None,
        origin: None,
        log_bytes: ByteCount(0),
        segments: 1,
        error: None,
        damage: Vec::new(),
        touched: Vec::new(),
    }
}

#[test]
fn one_daemon_may_be_elsewhere_and_not_both() {
    let lost = || ApiError::new(ErrorCode::Unreachable, "no agent answers").with_hint("start it");
    let kept = ReceiverDisks { disks: Vec::new() };
    let half = Answers {
        agent: Err(lost()),
        receiver: Ok((receiver(1 << 40), kept)),
        clocks: Vec::new(),
        served: Vec::new(),
    };
    let verdicts = |answers| reachable(answers).iter().map(|finding| finding.verdict).collect::<Vec<_>>();
    assert_eq!(verdicts(&half), [Verdict::Warning, Verdict::Ok]);
    let none = Answers { agent: Err(lost()), receiver: Err(lost()), clocks: Vec::new(), served: Vec::new() };
    assert_eq!(verdicts(&none), [Verdict::Failed, Verdict::Failed]);
    assert!(versions(&none).is_empty());
    let older = ReceiverStatus { version: "0.0.9".to_owned(), ..receiver(1 << 40) };
    let older = Answers { receiver: Ok((older, ReceiverDisks { disks: Vec::new() })), ..half };
    let found = &versions(&older)[0];
    assert_eq!(found.verdict, Verdict::Warning);
    assert!(found.message.contains("the receiver is of version 0.0.9"), "{found:?}");
}

#[test]
fn a_store_without_room_fails_and_one_with_little_warns() {
    for (free, verdict) in
        [(1 << 40, Verdict::Ok), (200 << 20, Verdict::Warning), (64 << 20, Verdict::Failed)]
    {
        assert_eq!(free_space(&receiver(free)).verdict, verdict, "{free}");
    }
    let damage = vec!["segment 2 is damaged".to_owned()];
    let damaged = ReceiverDisk { error: Some("segment 3 is damaged".to_owned()), damage, ..kept_disk(0) };
    let found = kept(&ReceiverDisks { disks: vec![kept_disk(0), damaged] });
    assert_eq!(found.len(), 2);
    assert_eq!(
        (found[0].verdict, found[0].message.as_str()),
        (Verdict::Failed, "disk vm1: segment 3 is damaged")
    );
}

#[test]
fn each_alarm_of_the_receiver_is_told_once() {
    let said = |text: &str| text.to_owned();
    let alarming = ReceiverStatus {
        alarms: vec![
            said("retention.json is missing"),
            said("disk vm1: segment 3 is damaged; it touches"),
            said("it ends"),
        ],
        certificate_warnings: vec![said("it ends")],
        ..receiver(1 << 40)
    };
    let known = [Finding::new("store", Verdict::Failed, "disk vm1: segment 3 is damaged")];
    let found = alarms(&alarming, &known);
    assert_eq!(found, [Finding::new("alarms", Verdict::Warning, "retention.json is missing")]);
}

#[test]
fn a_clock_that_is_wrong_either_way_is_told_with_whose_it_is() {
    let lost = || ApiError::new(ErrorCode::Unreachable, "no agent answers");
    let answers = |agent, disk: ReceiverDisk| Answers {
        agent: Err(lost()),
        receiver: Ok((receiver(1 << 40), ReceiverDisks { disks: vec![kept_disk(0), disk] })),
        clocks: vec![("receiver", 0), ("agent", agent)],
        served: Vec::new(),
    };
    let verdicts = |answers: &Answers| {
        let told = clocks(answers).into_iter().map(|finding| (finding.verdict, finding.message));
        told.collect::<Vec<_>>()
    };
    assert_eq!(verdicts(&answers(-2_900_000, kept_disk(0)))[0].0, Verdict::Ok);
    let behind = verdicts(&answers(-3_600_000_000, kept_disk(0)));
    let said = "the clock of the agent is 1h 0m behind this machine's".to_owned();
    assert_eq!(behind, [(Verdict::Warning, said)]);
    let why = || "the newest point of disk vm1 is stamped 1h 0m ahead".to_owned();
    let ahead = verdicts(&answers(3_600_000_000, ReceiverDisk { clock: Some(why()), ..kept_disk(0) }));
    let said = "the clock of the agent is 1h 0m ahead of this machine's".to_owned();
    assert_eq!(ahead, [(Verdict::Warning, said), (Verdict::Warning, why())]);
}

#[test]
fn a_slow_answer_is_no_wrong_clock() {
    let at = |seconds: u64| CaptureTime(seconds * 1_000_000);
    assert_eq!(apart(at(100), at(101), at(115)), 0);
    assert_eq!(apart(at(100), at(40), at(115)), -60_000_000);
    assert_eq!(apart(at(100), at(175), at(115)), 60_000_000);
}

#[test]
fn a_state_that_cannot_be_written_is_no_trouble_of_the_image() {
    let said = |disk: DiskStatus| {
        let found = disks(&[disk]).into_iter().map(|finding| (finding.verdict, finding.message));
        found.collect::<Vec<_>>()
    };
    let trouble = || Some("the state is full".to_owned());
    let failed = (Verdict::Failed, "vm1: the state is full".to_owned());
    let unsaved = DiskStatus { local_error: trouble(), unsaved: trouble(), ..in_sync() };
    assert_eq!(said(unsaved), std::slice::from_ref(&failed));
    let refused = DiskStatus { local_error: trouble(), untracked: trouble(), ..in_sync() };
    assert_eq!(said(refused), [failed]);
    let image = DiskStatus { local_error: trouble(), ..in_sync() };
    assert_eq!(said(image), [(Verdict::Failed, "vm1: its image: the state is full".to_owned())]);
    let costly = DiskStatus { untracked: trouble(), ..in_sync() };
    let ok = (Verdict::Ok, "vm1: in sync".to_owned());
    assert_eq!(said(costly), [ok.clone(), (Verdict::Warning, "vm1: the state is full".to_owned())]);
    let spill = |error| Some(Spill { error, ..Spill::default() });
    assert_eq!(said(DiskStatus { spill: spill(None), ..in_sync() }), std::slice::from_ref(&ok));
    let found = said(DiskStatus { spill: spill(trouble()), ..in_sync() });
    let warned = "vm1: its spill cannot be used, and an outage is bridged by memory alone: the state is full";
    assert_eq!(found, [ok, (Verdict::Warning, warned.to_owned())]);
}

#[test]
fn what_the_receiver_lacks_of_a_disk_in_sync_is_said() {
    let blocks = BlockCount(2048);
    let dirty = Dirty { blocks, bytes: blocks.bytes(), hot_extents: None };
    for (lacks, missing) in [
        (DiskStatus { dirty, ..in_sync() }, "2048 changed blocks"),
        (DiskStatus { resync_due: true, dirty, ..in_sync() }, "everything"),
        (DiskStatus { resync_due: true, history: Some(HistoryId::random()), ..in_sync() }, "an unknown part"),
    ] {
        let found = disk(&lacks);
        let said = format!("vm1: in sync mode, and the receiver still lacks {missing}");
        assert_eq!((found.verdict, found.message), (Verdict::Warning, said));
    }
    let lag = Lag { records: 3, bytes: ByteCount(12 << 10), seconds: 0.1 };
    assert_eq!(disk(&DiskStatus { lag, ..in_sync() }).verdict, Verdict::Ok, "they are on their way");
}

#[test]
fn a_disk_that_is_not_protected_is_found() {
    assert_eq!(disks(&[])[0].verdict, Verdict::Warning);
    assert_eq!(disk(&in_sync()).verdict, Verdict::Ok);
    let code = |code: &str| DiskStatus { mode: Mode::Resync, reason_code: code.to_owned(), ..in_sync() };
    for (wrong, verdict) in [
        (DiskStatus { local_error: Some("away".to_owned()), ..in_sync() }, Verdict::Failed),
        (DiskStatus { reason_code: "not-answering".to_owned(), ..in_sync() }, Verdict::Failed),
        (DiskStatus { reason_code: "detaching".to_owned(), ..in_sync() }, Verdict::Failed),
        (DiskStatus { reason_code: "not-attached".to_owned(), ..in_sync() }, Verdict::Failed),
        (DiskStatus { resync_due: true, ..in_sync() }, Verdict::Warning),
        (DiskStatus { connected: false, ..in_sync() }, Verdict::Failed),
        (DiskStatus { connected: false, mode: Mode::Paused, ..in_sync() }, Verdict::Warning),
        (code("agent-crashed"), Verdict::Warning),
        (code("receiver-away"), Verdict::Warning),
    ] {
        assert_eq!(disk(&wrong).verdict, verdict, "{wrong:?}");
    }
}
