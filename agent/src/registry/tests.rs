//! What a start that fails leaves behind.

use std::{os::unix::net::UnixListener, path::Path};

use backtide_agent_api::DetachRequest;
use backtide_storage::{RealStorage, Storage};
use backtide_tracking::{SavedTracking, Snapshot};
use backtide_units::{HistoryId, Lsn};

use super::*;
use crate::{
    Config,
    disk::{Leaving, tests::Started},
};

/// The agent of `directory`.
pub(super) fn registry(directory: &Path) -> Arc<Registry> {
    registry_on(directory, Arc::new(RealStorage::open(&directory.join("state")).unwrap()))
}

/// The same with what it keeps of its disks elsewhere.
pub(super) fn registry_on(directory: &Path, storage: Arc<dyn Storage>) -> Arc<Registry> {
    let config = Config {
        state: directory.join("state"),
        run: directory.to_owned(),
        api: backtide_control::Address::unix(directory.join("agent.sock")),
        limits: backtide_agent_api::LimitsRequest::default(),
        cache: CacheMode::default(),
        io_engine: IoEngine::default(),
        poll_max_us: 0,
        spill_dir: None,
        spill_size: None,
        nbd_listen: None,
        nbd_tls: None,
        insecure: false,
        stream_tls: None,
        nbd: Default::default(),
        mounts: Default::default(),
    };
    Registry::new(&config, Records::new(storage), Sockets::default(), Directory::new(""))
}

/// A disk without times that was attached when its agent ended in good order, and whose own socket somebody else has now.
fn stopped(registry: &Registry, directory: &Path, image: String) -> (DiskName, UnixListener) {
    let name: DiskName = "vm2".parse().unwrap();
    let receiver = backtide_control::Address::unix(directory.join("nobody.sock"));
    let record = DiskRecord {
        history: Some(HistoryId::random()),
        lsn_bound: Lsn(77),
        attached: true,
        stopped: true,
        size: ByteCount(1 << 20),
        nbd: Some(format!("nbd+unix:///vm2?socket={}", directory.join("taken.sock").display())),
        ..DiskRecord::new(name.clone(), image, receiver)
    };
    let saved = SavedTracking { history: record.history, ..SavedTracking::unknown(record.uuid) };
    let limits = disk::activity_limits(&record, record.size);
    let snapshot = Snapshot::first(saved, true, false);
    registry.records.create_tracking(&name, limits, record.size, &snapshot).unwrap();
    registry.records.save(&record).unwrap();
    (name, UnixListener::bind(directory.join("taken.sock")).unwrap())
}

/// What the operator asks for who goes on with that disk, at a socket of its own.
fn request(registry: &Registry, name: &DiskName) -> AttachRequest {
    let DiskRecord { image, receiver, .. } = registry.records.load(name).unwrap().unwrap();
    AttachRequest { name: name.clone(), receiver, ..request_for(Path::new(&image)) }
}

pub(super) fn request_for(image: &Path) -> AttachRequest {
    let request = serde_json::json!({ "name": "vm1", "image": image, "receiver": "unix:/run/nobody.sock" });
    serde_json::from_value(request).unwrap()
}

/// A server that tells no time is believed only because the agent ended in good order with the disk
/// attached; a start that came to nothing changes nothing of that.
#[tokio::test]
async fn a_start_that_fails_leaves_a_disk_without_times_as_trusted_as_it_was() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let behind = Started::image(directory).await;
    let registry = registry(directory);
    let (name, taken) = stopped(&registry, directory, behind.uri());
    assert!(registry.restore().await.unwrap(), "its socket is taken: it has to be tried again");
    let left = registry.records.load(&name).unwrap().unwrap();
    assert!(left.stopped && left.attached, "{left:?}");
    assert!(registry.records.load_tracking(&name).unwrap().unwrap().clean);
    assert_eq!(registry.failing().await.len(), 1);

    drop(taken);
    std::fs::remove_file(directory.join("taken.sock")).unwrap();
    assert!(!registry.restore().await.unwrap());
    let (_, handle) = registry.find(&name).await.unwrap();
    let status = handle.status().await.unwrap();
    assert_eq!((status.mode, status.dirty.blocks.0), (backtide_agent_api::Mode::Sync, 0), "{status:?}");
    registry.shut_down().await;
}

#[tokio::test]
async fn a_disk_without_times_that_is_given_up_is_trusted_no_more() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let behind = Started::image(directory).await;
    let registry = registry(directory);
    let (name, _taken) = stopped(&registry, directory, behind.uri());
    assert!(registry.restore().await.unwrap());
    let detached = registry.detach(&name, DetachRequest::default()).await.unwrap();
    assert_eq!(detached.reason_code, "detached");
    let left = registry.records.load(&name).unwrap().unwrap();
    assert!(!left.attached && !left.stopped, "{left:?}");
    let status = registry.attach(request(&registry, &name)).await.unwrap();
    assert_eq!((status.resync_due, status.reason_code.as_str()), (true, "bitmap-untrusted"), "{status:?}");
    registry.shut_down().await;
}

/// One that goes on elsewhere by a failover is saved as good, and never as attached, before it is.
#[tokio::test]
async fn a_disk_without_times_whose_attach_fails_is_trusted_no_more() {
    let directory = tempfile::tempdir().unwrap();
    let registry = registry(directory.path());
    let (name, _taken) = stopped(&registry, directory.path(), "nbd://localhost/vm2".to_owned());
    let was = registry.records.load(&name).unwrap().unwrap();
    for attached in [true, false] {
        registry.records.save(&DiskRecord { attached, ..was.clone() }).unwrap();
        registry.forget_attached(&name).await;
        let left = registry.records.load(&name).unwrap().unwrap();
        assert_eq!(left, DiskRecord { attached: false, stopped: false, ..was.clone() });
    }
}

/// Its guest waits at the socket that is kept for it.
#[tokio::test]
async fn a_disk_that_waits_for_its_storage_goes_on_waiting_after_an_attach_that_failed() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let registry = registry(directory);
    let (image, socket) = (directory.join("vm2.img"), directory.join("taken.sock"));
    let (name, listener) = stopped(&registry, directory, image.display().to_string());
    let (purpose, place) = (disk::nbd_purpose(&name), backtide_socket::Listening::Unix(&socket));
    let file = backtide_socket::SocketFile::of(&socket).ok();
    registry.sockets.keep(&purpose, place, listener, file).unwrap();
    assert!(registry.restore().await.unwrap());
    let was = registry.records.load(&name).unwrap().unwrap();
    let known = || registry.records.load(&name).unwrap().unwrap();

    let early = registry.attach(request(&registry, &name)).await.unwrap_err();
    assert_eq!(early.code, ErrorCode::NotFound, "{early}");
    assert_eq!(known(), was);
    // This one has all but a socket, and is of another image.
    let other = directory.join("other.img");
    std::fs::File::create(&other).unwrap().set_len(2 << 20).unwrap();
    let taken = directory.join("another.sock");
    let another = UnixListener::bind(&taken).unwrap();
    let nbd = Some(format!("nbd+unix:///vm2?socket={}", taken.display()));
    let elsewhere = AttachRequest { image: other.display().to_string(), nbd, ..request(&registry, &name) };
    let late = registry.attach(elsewhere).await.unwrap_err();
    assert_eq!(late.code, ErrorCode::Locked, "{late}");
    drop(another);
    let now = known();
    assert!(now.attached && now.epoch > was.epoch, "{now:?}");
    assert_eq!((&now.image, &now.nbd, now.size), (&was.image, &was.nbd, was.size));

    assert_eq!(registry.failing().await.len(), 1);
    assert!(registry.sockets.take(&purpose, place).is_some());
    std::fs::File::create(&image).unwrap().set_len(1 << 20).unwrap();
    assert!(!registry.restore().await.unwrap());
    let status = registry.find(&name).await.unwrap().1.status().await.unwrap();
    assert_eq!((status.image, status.nbd_uri), (was.image, was.nbd.unwrap()));
    assert!(status.resync_due, "it may have been another's meanwhile");
    registry.shut_down().await;
}

/// It may have been attached: its guest waits at the socket that was kept for it.
#[tokio::test]
async fn a_disk_whose_record_cannot_be_read_is_shown_until_it_can_or_is_taken_away() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let registry = registry(directory);
    let (image, socket) = (directory.join("vm2.img"), directory.join("taken.sock"));
    std::fs::File::create(&image).unwrap().set_len(1 << 20).unwrap();
    let (name, listener) = stopped(&registry, directory, image.display().to_string());
    let (purpose, place) = (disk::nbd_purpose(&name), backtide_socket::Listening::Unix(&socket));
    let file = backtide_socket::SocketFile::of(&socket).ok();
    registry.sockets.keep(&purpose, place, listener, file).unwrap();
    let record = directory.join("state/vm2.json");
    let kept = std::fs::read(&record).unwrap();
    let newer = String::from_utf8(kept.clone()).unwrap().replacen("\"version\": 1", "\"version\": 2", 1);
    std::fs::write(&record, newer).unwrap();

    registry.forget_other_sockets(&[]).await.unwrap();
    assert!(registry.restore().await.unwrap(), "it has to be tried again");
    let reason = registry.failing().await.remove(0).reason;
    assert!(reason.contains("vm2.json is of version 2, and this program knows version 1 only"), "{reason}");
    registry.detach(&name, DetachRequest::default()).await.unwrap_err();
    registry.attach(AttachRequest { name: name.clone(), ..request_for(&image) }).await.unwrap_err();
    assert!(registry.restore().await.unwrap());
    assert!(registry.sockets.take(&purpose, place).is_some());

    std::fs::write(&record, &kept).unwrap();
    assert!(!registry.restore().await.unwrap());
    let status = registry.find(&name).await.unwrap().1.status().await.unwrap();
    assert_eq!(status.nbd_uri, format!("nbd+unix:///vm2?socket={}", socket.display()));
    assert!(registry.failing().await.is_empty());
    registry.detach(&name, DetachRequest::default()).await.unwrap();

    std::fs::write(&record, "").unwrap();
    assert!(registry.restore().await.unwrap());
    std::fs::remove_file(&record).unwrap();
    assert!(!registry.restore().await.unwrap());
    assert!(registry.failing().await.is_empty());
}

/// A lock on the state directory lives as long as the registry does.
#[tokio::test]
async fn nothing_that_goes_on_trying_outlives_the_agent() {
    for hands_over in [false, true] {
        let directory = tempfile::tempdir().unwrap();
        let registry = registry(directory.path());
        registry.restore_beside();
        let tasks: Vec<AbortHandle> = registry.restoring.lock().unwrap().clone();
        match hands_over {
            true => registry.hand_over().await.unwrap(),
            false => registry.shut_down().await,
        }
        assert_eq!(tasks.len(), 1);
        assert!(registry.restoring.lock().unwrap().is_empty());
        while !tasks[0].is_finished() {
            tokio::task::yield_now().await;
        }
        assert_eq!(Arc::strong_count(&registry), 1);
    }
}

#[tokio::test]
async fn an_epoch_or_lsn_that_leaves_none_for_this_agent_is_not_adopted() {
    let directory = tempfile::tempdir().unwrap();
    let registry = registry(directory.path());
    let request = |epoch: u64, durable: u64| -> AttachRequest {
        let (uuid, history) = (backtide_units::DiskId::random(), HistoryId::random());
        let adopt =
            serde_json::json!({ "uuid": uuid, "history": history, "epoch": epoch, "durable": durable });
        let receiver = backtide_control::Address::unix(directory.path().join("nobody.sock"));
        let image = directory.path().join("none.img");
        let request =
            serde_json::json!({ "name": "vm1", "image": image, "receiver": receiver, "adopt": adopt });
        serde_json::from_value(request).unwrap()
    };
    for (epoch, durable) in [(u64::MAX, 7), (3, 1 << 63)] {
        let refused = registry.attach(request(epoch, durable)).await.unwrap_err();
        assert_eq!(refused.code, ErrorCode::Refused, "{refused:?}");
        assert!(refused.message.contains("is not believed"), "{refused:?}");
    }
    let other = registry.attach(request(3, 7)).await.unwrap_err();
    assert!(!other.message.contains("is not believed"), "there is no such image: {other:?}");
}

#[tokio::test(start_paused = true)]
async fn an_attach_that_stands_still_refuses_a_restart_by_name() {
    let directory = tempfile::tempdir().unwrap();
    let registry = registry(directory.path());
    registry.prepare_to_hand_over().await.unwrap();
    let stuck: Vec<_> =
        ["vm7", "vm8"].map(|name| registry.claims.try_claim(&name.parse().unwrap()).unwrap()).into();
    for refused in [registry.prepare_to_hand_over().await, registry.hand_over().await] {
        let refused = refused.unwrap_err();
        assert_eq!(refused.code, ErrorCode::Busy);
        assert!(refused.message.starts_with("disks vm7, vm8 are being attached or detached"), "{refused:?}");
        assert!(refused.hint.is_some(), "{refused:?}");
    }
    drop(stuck);
    registry.prepare_to_hand_over().await.unwrap();
}

#[tokio::test]
async fn a_disk_whose_clients_may_come_back_is_given_up_only_by_who_knows_better() {
    let directory = tempfile::tempdir().unwrap();
    let registry = registry(directory.path());
    let receiver = backtide_control::Address::unix(directory.path().join("nobody.sock"));
    let image = directory.path().join("gone.img").display().to_string();
    let far = serde_json::json!({ "boot": uuid::Uuid::nil(), "peers": [{ "host": "192.0.2.1" }] });
    let ways = [("vm1", false, true), ("vm2", true, false)];
    for (name, ..) in ways {
        let clientele = serde_json::from_value(far.clone()).unwrap();
        let new = DiskRecord::new(name.parse().unwrap(), image.clone(), receiver.clone());
        registry.records.save(&DiskRecord { attached: true, clientele, ..new }).unwrap();
    }
    assert!(registry.restore().await.unwrap());
    for (name, force, nobody_returns) in ways {
        let name: DiskName = name.parse().unwrap();
        let refused = registry.detach(&name, DetachRequest::default()).await.unwrap_err();
        assert_eq!(refused.code, ErrorCode::Busy, "{refused}");
        assert!(refused.hint.unwrap().contains(&format!("backtide detach {name} --nobody-returns")));
        assert!(registry.records.load(&name).unwrap().unwrap().attached);
        let request = DetachRequest { force, nobody_returns, incomplete: false };
        registry.detach(&name, request).await.unwrap();
        assert!(!registry.records.load(&name).unwrap().unwrap().attached);
    }
    assert!(registry.failing().await.is_empty());
}

/// Its client comes when it was looked at, and before it is taken.
#[tokio::test]
async fn a_disk_that_a_client_opened_meanwhile_goes_on() {
    let directory = tempfile::tempdir().unwrap();
    let registry = registry(directory.path());
    let image = directory.path().join("vm1.img");
    std::fs::File::create(&image).unwrap().set_len(1 << 20).unwrap();
    let status = registry.attach(request_for(&image)).await.unwrap();
    let guest = backtide_export::Client::connect(&status.nbd_uri.parse().unwrap()).await.unwrap();
    for leaving in [Leaving::Resized { reconnect: false }, Leaving::SetBack { clients_max: Some(0) }] {
        let attached = registry.disks.write().await.remove(&status.name).unwrap();
        let shown = disk::not_attached(&registry.records.load(&status.name).unwrap().unwrap(), "a moment");
        registry.failing.write().await.insert(status.name.clone(), shown);
        let records = registry.records.clone();
        let ended = leave::end_unless_open(status.name.clone(), attached, records, leaving).await;
        let (attached, open) = ended.expect("a client has it open");
        assert_eq!(open.to_string(), "an NBD client has the disk open");
        assert!(!registry.records.load(&status.name).unwrap().unwrap().stopped);
        registry.keep_attached(&status.name, attached).await;
        assert!(registry.failing().await.is_empty());
        assert_eq!(registry.find(&status.name).await.unwrap().1.status().await.unwrap().clients, 1);
        guest.flush().await.unwrap();
    }
    registry.shut_down().await;
}

/// It was attached by an agent that had its TLS configured, or was told that this may be.
#[tokio::test]
async fn a_disk_that_other_machines_would_reach_in_the_clear_is_not_served_after_a_start() {
    let directory = tempfile::tempdir().unwrap();
    let registry = registry(directory.path());
    let image = directory.path().join("vm2.img");
    std::fs::File::create(&image).unwrap().set_len(1 << 20).unwrap();
    let (name, _taken) = stopped(&registry, directory.path(), image.display().to_string());
    let was = registry.records.load(&name).unwrap().unwrap();
    let open = "nbd://0.0.0.0:10809/vm2";
    registry.records.save(&DiskRecord { nbd: Some(open.to_owned()), ..was }).unwrap();
    assert!(registry.restore().await.unwrap());
    let reason = registry.failing().await.remove(0).reason;
    let rule = registry.nbd_rule.check_open(&open.parse().unwrap()).unwrap_err();
    assert!(reason.contains(&rule.to_string()), "{reason}");
}

#[tokio::test]
async fn a_disk_that_lacks_blocks_is_given_up_only_as_incomplete_also_when_its_image_is_away() {
    let directory = tempfile::tempdir().unwrap();
    let registry = registry(directory.path());
    let receiver: backtide_control::Address = "unix:/run/nobody.sock".parse().unwrap();
    // One is of another size than it had, and one is away.
    let short = directory.path().join("vm1.img");
    std::fs::File::create(&short).unwrap().set_len(4096).unwrap();
    for name in ["vm1", "vm2"] {
        let image = directory.path().join(format!("{name}.img"));
        let (name, image): (DiskName, _) = (name.parse().unwrap(), image.display().to_string());
        let record = DiskRecord { attached: true, ..DiskRecord::new(name.clone(), image, receiver.clone()) };
        registry.records.save(&record).unwrap();
        let source = backtide_hydration::SourcePoint {
            receiver: receiver.to_string(),
            disk: record.uuid,
            name: name.clone(),
            history: HistoryId::random(),
            lsn: Lsn(40),
            time: backtide_units::CaptureTime(7),
            size: ByteCount(1 << 20),
        };
        let header = backtide_hydration::Header {
            disk: record.uuid,
            kind: backtide_hydration::Kind::Rewind,
            boot: disk::trust::boot_id(),
            epoch: record.epoch,
            inode: ImageStamp::of(&short).unwrap().inode,
            before: Lsn(90),
            total: backtide_units::BlockCount(4),
            compare: false,
            source,
        };
        let missing = backtide_tracking::DirtyBitmap::of((0..4).into());
        registry.records.create_hydration(&name, header, missing).unwrap();
    }
    assert!(registry.restore().await.unwrap());
    let note = directory.path().join("vm1.img.backtide-incomplete");
    for name in ["vm1", "vm2"] {
        let name: DiskName = name.parse().unwrap();
        for force in [false, true] {
            let request = DetachRequest { force, nobody_returns: true, incomplete: false };
            let refused = registry.detach(&name, request).await.unwrap_err();
            assert_eq!(refused.code, ErrorCode::Refused, "{refused}");
            let lacks = "which is not attached, is not complete: it lacks 16384 bytes";
            assert!(refused.message.contains(lacks) && refused.hint.unwrap().contains("--incomplete"));
            assert!(registry.records.load(&name).unwrap().unwrap().attached);
        }
    }
    assert!(!note.exists());
    for name in ["vm1", "vm2"] {
        let name: DiskName = name.parse().unwrap();
        let request = DetachRequest { incomplete: true, ..DetachRequest::default() };
        let status = registry.detach(&name, request).await.unwrap();
        let lacks = "it lacks 16384 bytes, which are still at the receiver";
        assert_eq!(status.local_error.as_deref(), Some(lacks));
        assert!(!registry.records.load(&name).unwrap().unwrap().attached);
    }
    assert!(std::fs::read_to_string(note).unwrap().contains("is not complete: do not use it by itself"));
    assert!(registry.failing().await.is_empty());
}
