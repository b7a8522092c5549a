//! What people see of a disk's status.

use backtide_agent_api::{
    AckPolicy, CacheMode, Counters, Dirty, DiskStatus, GuestWaits, Lag, Limits, LsnStatus, Mode, OnOutage,
    PassKind, PeerError, ResyncStatus, Window,
};
use backtide_units::{BlockCount, ByteCount, CaptureTime, DiskId, Epoch, Lsn};

use super::*;

/// A disk in sync.
pub(crate) fn in_sync() -> DiskStatus {
    DiskStatus {
        name: "vm1".parse().unwrap(),
        uuid: DiskId::random(),
        mode: Mode::Sync,
        reason: "every write is forwarded".to_owned(),
        reason_code: "in-sync".to_owned(),
        connected: true,
        receiver: "unix:/run/backtide/stream.sock".parse().unwrap(),
        last_error: None,
        stream_tls: None,
        nbd_uri: "nbd+unix:///vm1?socket=/run/backtide/vm1.nbd".to_owned(),
        image: "/images/vm1.img".to_owned(),
        local_error: None,
        unsaved: None,
        untracked: None,
        size: ByteCount(1 << 30),
        epoch: Epoch(3),
        history: None,
        lsn: LsnStatus { last: Lsn(90), received: Lsn(90), durable: Lsn(90) },
        lag: Lag::default(),
        dirty: Dirty::default(),
        window: Window { bytes: ByteCount(0), limit: ByteCount(64 << 20) },
        spill: None,
        resync: None,
        resync_due: false,
        unreadable: None,
        hydration: None,
        rewound: None,
        origin: None,
        ack: AckPolicy::Local,
        on_outage: OnOutage::Continue,
        limits: Limits::default(),
        counters: Counters::default(),
        engine: "pread".to_owned(),
        engine_reason: Some("io_uring cannot be used: Operation not permitted (os error 1)".to_owned()),
        cache: CacheMode::Writeback,
        clients: 1,
        awaited_clients: 0,
        open_elsewhere: false,
        guest_waits: None,
    }
}

/// The same disk half way through a resync.
fn in_resync() -> DiskStatus {
    DiskStatus {
        mode: Mode::Resync,
        reason: "the receiver was away longer than the retained window lasts".to_owned(),
        reason_code: "receiver-away".to_owned(),
        lag: Lag { records: 12, bytes: ByteCount(8 << 20), seconds: 65.0 },
        dirty: Dirty { blocks: BlockCount(2048), bytes: ByteCount(8 << 20), hot_extents: Some(3) },
        resync: Some(ResyncStatus {
            pass: 1,
            at: Lsn(80),
            kind: PassKind::Forwarding,
            compare: false,
            forfeited: false,
            done_bytes: ByteCount(24 << 20),
            total_bytes: ByteCount(32 << 20),
            rate: ByteCount(4 << 20),
            eta_seconds: Some(2),
            guest_rate: ByteCount(1 << 20),
            sync_eta_seconds: Some(2),
            held_to: None,
            reason: "the receiver was away longer than the retained window lasts".to_owned(),
            reason_code: "receiver-away".to_owned(),
            point_recoverable: true,
        }),
        ..in_sync()
    }
}

#[test]
fn a_table_has_a_line_for_each_disk() {
    let text = table(&[in_sync(), in_resync()]);
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), 3, "{text}");
    assert!(lines[0].starts_with("DISK  MODE    LAG"), "{text}");
    assert!(lines[1].starts_with("vm1   sync    none"), "{text}");
    assert!(lines[2].contains("1m 5s, 12 writes, 8.0 MiB"), "{text}");
    assert!(lines[2].contains("pass 1 75% sent at 4.0 MiB/s, 2.0s left"), "{text}");
    assert!(lines[2].ends_with("the receiver was away longer than the retained window lasts"), "{text}");
    assert!(table(&[]).contains("backtide attach"), "an empty list says what to do");
}

#[test]
fn one_disk_is_shown_in_full() {
    let text = disk_text(&in_resync());
    for part in [
        "resync: the receiver was away longer",
        "nbd+unix:///vm1?socket=/run/backtide/vm1.nbd",
        "1.0 GiB (1073741824 bytes)",
        "90 last, 90 received, 90 durable",
        "2048 blocks, 8.0 MiB",
        "writes are forwarded meanwhile; lsn:80 becomes a point when the pass ends",
        "local, continue in an outage",
    ] {
        assert!(text.contains(part), "{part:?} is missing in:\n{text}");
    }
}

#[test]
fn a_guest_that_waits_and_a_fenced_disk_are_shown_with_the_way_out() {
    let waits = Some(GuestWaits { requests: 2, seconds: 75.0 });
    let on_outage = OnOutage::Block;
    let mut disk = DiskStatus { connected: false, guest_waits: waits, on_outage, ..in_sync() };
    let text = disk_text(&disk);
    assert!(text.contains("2 requests for the receiver, for 1m 15s: acknowledged local, block"), "{text}");
    assert!(text.contains("`backtide detach vm1 --force`"), "{text}");
    assert!(needs_a_person(&disk));
    // What comes right by itself is told, and no more.
    let soon = Some(GuestWaits { requests: 2, seconds: 9.0 });
    for itself in [
        DiskStatus { guest_waits: soon, ..disk.clone() },
        DiskStatus { on_outage: OnOutage::Continue, ..disk.clone() },
    ] {
        assert!(disk_text(&itself).contains("2 requests for the receiver, for "));
        assert!(!needs_a_person(&itself) && way_out(&itself).is_none());
    }
    // The receiver is there, and is not what it waits for.
    let here = DiskStatus { connected: true, ..disk.clone() };
    let behind = DiskStatus { mode: Mode::Resync, ..here.clone() };
    assert!(
        way_out(&behind)
            .unwrap()
            .starts_with("it goes on when the resync has ended; `backtide detach vm1 --force`")
    );
    let elsewhere = DiskStatus { mode: Mode::Tracking, open_elsewhere: true, ..here };
    let told = way_out(&elsewhere).unwrap();
    assert!(told.starts_with("shut down the program that has ") && needs_a_person(&elsewhere), "{told}");
    assert!(told.contains("it goes on when everything was compared"), "{told}");
    disk.reason_code = "fenced".to_owned();
    for text in [disk_text(&disk), table(std::slice::from_ref(&disk))] {
        assert!(text.contains("`backtide detach vm1 --force`; then `backtide failback vm1`"), "{text}");
    }
    assert!(!needs_a_person(&in_sync()));
    assert_eq!(way_out(&in_resync()), None);
}

#[test]
fn what_cannot_be_saved_is_no_trouble_of_the_image() {
    let trouble = Some("cannot save the disk's record in /state: no space".to_owned());
    let disk = DiskStatus { local_error: trouble.clone(), unsaved: trouble, ..in_sync() };
    assert!(table(std::slice::from_ref(&disk)).contains("state error: cannot save"));
    let text = disk_text(&DiskStatus { local_error: Some("the image is away".to_owned()), ..disk });
    assert!(text.contains("image error") && !text.contains("state error"), "{text}");
}

#[test]
fn what_a_crash_would_cost_is_told_beside_what_is_wrong_and_once() {
    let costly = Some("vm1.tracking cannot be written".to_owned());
    let disk = DiskStatus { untracked: costly.clone(), ..in_sync() };
    let shown = table(std::slice::from_ref(&disk));
    assert!(shown.contains("every write is forwarded"), "{shown}");
    assert!(shown.ends_with("\nvm1: vm1.tracking cannot be written"), "{shown}");
    assert!(
        disk_text(&disk).contains("state error   vm1.tracking cannot be written"),
        "{}",
        disk_text(&disk)
    );
    let away = DiskStatus { local_error: Some("the image is away".to_owned()), ..disk.clone() };
    assert!(disk_text(&away).contains("image error") && disk_text(&away).contains("state error"));
    // Writes fail by it.
    let refused = DiskStatus { local_error: costly, ..disk };
    for text in [table(std::slice::from_ref(&refused)), disk_text(&refused)] {
        assert_eq!(text.matches("vm1.tracking").count(), 1, "{text}");
        assert!(text.contains("state error") && !text.contains("image error"), "{text}");
    }
}

#[test]
fn a_spill_that_cannot_be_used_is_told_below_the_table() {
    let spill = |error: Option<&str>| Some(Spill { error: error.map(str::to_owned), ..Spill::default() });
    let disk = DiskStatus { spill: spill(Some("/spill/vm1: no space")), ..in_sync() };
    let shown = table(std::slice::from_ref(&disk));
    assert!(shown.contains("every write is forwarded"), "{shown}");
    let told =
        "\nvm1: its spill cannot be used, and an outage is bridged by memory alone: /spill/vm1: no space";
    assert!(shown.ends_with(told), "{shown}");
    assert!(!needs_a_person(&disk), "the disk is protected");
    let well = table(&[DiskStatus { spill: spill(None), ..in_sync() }]);
    assert_eq!(well.lines().count(), 2, "{well}");
}

#[test]
fn a_lost_receiver_is_shown_with_its_words() {
    let mut disk = in_sync();
    disk.connected = false;
    disk.last_error = Some(PeerError {
        code: "fenced".to_owned(),
        message: "epoch 4 owns the disk".to_owned(),
        time: CaptureTime(1_772_366_400_000_000),
    });
    let text = disk_text(&disk);
    assert!(text.contains("sync (disconnected)"), "{text}");
    assert!(text.contains("epoch 4 owns the disk (fenced)"), "{text}");
}

#[test]
fn a_disk_that_was_never_in_sync_lacks_everything() {
    let tracking = DiskStatus {
        mode: Mode::Tracking,
        reason: "first protection of the disk".to_owned(),
        reason_code: "first-attach".to_owned(),
        connected: false,
        lag: Lag { seconds: 65.0, ..Lag::default() },
        resync_due: true,
        ..in_sync()
    };
    let text = disk_text(&tracking);
    assert!(text.contains("everything that the disk holds is to be sent"), "{text}");
    assert!(text.contains("1m 5s, everything") && !text.contains("0 blocks"), "{text}");
    let line = table(std::slice::from_ref(&tracking));
    assert!(line.contains("vm1   tracking  1m 5s, everything  everything"), "{line}");
    assert_eq!(missing_at_receiver(&tracking).unwrap(), "everything");

    let found_out = DiskStatus {
        history: Some(backtide_units::HistoryId::random()),
        reason_code: "agent-crashed".to_owned(),
        ..tracking
    };
    let text = disk_text(&found_out);
    assert!(text.contains("0 blocks, 0 B; what else differs is found out"), "{text}");
    assert!(table(std::slice::from_ref(&found_out)).contains("not known yet"));
    let detached = DiskStatus { reason_code: "detached".to_owned(), ..found_out };
    assert_eq!(missing_at_receiver(&detached).unwrap(), "an unknown part");
}

#[test]
fn what_the_receiver_lacks_is_counted() {
    assert_eq!(missing_at_receiver(&in_sync()), None);
    assert_eq!(missing_at_receiver(&in_resync()).unwrap(), "2048 changed blocks");
}

#[test]
fn the_json_has_the_documented_fields() {
    let value = serde_json::to_value(in_resync()).unwrap();
    for path in [
        "/name",
        "/uuid",
        "/mode",
        "/reason",
        "/reason_code",
        "/connected",
        "/receiver",
        "/last_error",
        "/nbd_uri",
        "/image",
        "/size",
        "/epoch",
        "/history",
        "/lsn/last",
        "/lsn/received",
        "/lsn/durable",
        "/lag/records",
        "/lag/bytes",
        "/lag/seconds",
        "/dirty/blocks",
        "/dirty/bytes",
        "/window/bytes",
        "/window/limit",
        "/resync/pass",
        "/resync/at",
        "/resync/kind",
        "/resync/compare",
        "/resync/forfeited",
        "/resync/done_bytes",
        "/resync/total_bytes",
        "/resync/rate",
        "/resync/eta_seconds",
        "/resync/reason",
        "/resync/point_recoverable",
        "/ack",
        "/on_outage",
        "/counters/writes",
        "/engine",
        "/clients",
    ] {
        assert!(value.pointer(path).is_some(), "{path} is missing in {value}");
    }
    assert_eq!(value["mode"], "resync");
    assert_eq!(value["size"], 1_u64 << 30);
}

#[test]
fn an_image_that_cannot_be_used_is_shown_first() {
    let trouble = "nbd://host has 512 bytes now, and the disk has 1024".to_owned();
    let disk = DiskStatus { local_error: Some(trouble.clone()), ..in_sync() };
    assert!(table(std::slice::from_ref(&disk)).contains(&format!("image error: {trouble}")));
    assert!(disk_text(&disk).contains(&trouble));
}

#[test]
fn limits_tell_when_silence_is_no_outage() {
    let text = |ack, on_outage| limits_text(&DiskStatus { ack, on_outage, ..in_sync() });
    let continues = text(AckPolicy::Durable, OnOutage::Continue);
    assert!(continues.contains("after 5000 ms"), "{continues}");
    for ack in [AckPolicy::Received, AckPolicy::Durable] {
        let blocks = text(ack, OnOutage::Block);
        assert!(blocks.contains("never: the guest waits"), "{blocks}");
    }
    for on_outage in [OnOutage::Continue, OnOutage::Block] {
        let local = text(AckPolicy::Local, on_outage);
        assert!(local.contains("never: no request waits for the receiver"), "{local}");
    }
}
