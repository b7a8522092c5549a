//! Calls about disks that a test plays: ones that stand still, and marks whose asker is gone.

use std::sync::Arc;

use backtide_agent_api::{AgentService, MarkRequest, MarkState};
use backtide_export::Directory;
use backtide_storage::{RealStorage, Storage};
use backtide_units::{CaptureTime, DiskId, Lsn};
use tokio::sync::mpsc;

use super::*;
use crate::{
    Config,
    disk::{DiskHandle, MarkAt, tests::Started},
    mounts,
    record::Records,
};

/// The service of an agent in `directory`, without disks.
fn service(directory: &std::path::Path) -> Arc<Service> {
    let config = Config {
        state: directory.join("state"),
        run: directory.to_owned(),
        api: backtide_control::Address::unix(directory.join("agent.sock")),
        limits: backtide_agent_api::LimitsRequest::default(),
        cache: backtide_agent_api::CacheMode::default(),
        io_engine: crate::config::IoEngine::default(),
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
    let storage: Arc<dyn Storage> = Arc::new(RealStorage::open(&config.state).unwrap());
    let sockets = backtide_socket::Sockets::default();
    let registry = Registry::new(&config, Records::new(Arc::clone(&storage)), sockets, Directory::new(""));
    let (run, nbd, nbd_rule, sources) =
        (config.run, config.nbd, backtide_export::NbdRule::default(), registry.sources());
    let limits = config.mounts;
    let mounts = Mounts::start(mounts::Settings { storage, run, nbd, nbd_rule, limits, sources }).unwrap();
    Service::new(registry, Arc::new(mounts), Arc::new(Restart::new(None, None)), None)
}

fn name(text: &str) -> DiskName {
    text.parse().unwrap()
}

/// A disk that the test plays.
async fn played(service: &Service, disk: &str) -> mpsc::Receiver<Command> {
    let (commands, inbox) = mpsc::channel(64);
    service.registry.insert(name(disk), DiskHandle::new(commands)).await;
    inbox
}

#[tokio::test]
async fn a_disk_that_stands_still_hides_no_other_and_says_so() {
    let directory = tempfile::tempdir().unwrap();
    let service = service(directory.path());
    let started = Started::image(directory.path()).await;
    service.registry.insert(name("vm1"), started.handle.clone()).await;
    let known = service.status(Some(name("vm1"))).await.unwrap().disks.remove(0);
    // From now on it is one that does not answer, and another one beside it does.
    let mut inbox = played(&service, "vm2").await;
    let (still, _unread) = started.handle.standing_still();
    service.registry.insert(name("vm1"), still.clone()).await;
    // Waits end as soon as nothing else can go on.
    tokio::time::pause();
    let asked = {
        let service = Arc::clone(&service);
        tokio::spawn(async move { service.status(None).await })
    };
    let Some(Command::Status(answer)) = inbox.recv().await else { panic!("vm2 is asked for its status") };
    let answering = DiskStatus { name: name("vm2"), ..known };
    answer.send(answering.clone()).unwrap();
    let disks = asked.await.unwrap().unwrap().disks;
    assert_eq!((disks.len(), &disks[1]), (2, &answering));
    assert_eq!((disks[0].name.as_str(), disks[0].reason_code.as_str()), ("vm1", "not-answering"));
    assert!(disks[1].is_of_now() && !disks[0].is_of_now() && !still.leaving().unwrap().is_of_now());
    assert!(disks[0].reason.contains("not answering"), "{}", disks[0].reason);
    let error = service.pause(name("vm1")).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::Busy);
    assert!(error.message.contains("vm1 is not answering"), "{error}");
}

#[tokio::test]
async fn a_mark_whose_asker_is_gone_gives_the_held_answers() {
    let directory = tempfile::tempdir().unwrap();
    let service = service(directory.path());
    let known = Started::image(directory.path()).await.handle.status().await.unwrap();
    let (mut one, mut two) = (played(&service, "vm1").await, played(&service, "vm2").await);
    let asker = {
        let service = Arc::clone(&service);
        let request = MarkRequest { label: "here".into(), disks: vec![name("vm1"), name("vm2")], wait_ms: 0 };
        tokio::spawn(async move { service.mark(request).await })
    };
    for inbox in [&mut one, &mut two] {
        let Some(Command::Status(answer)) = inbox.recv().await else {
            panic!("whether it is fenced is asked")
        };
        answer.send(known.clone()).unwrap();
    }
    let Some(Command::Hold(held)) = one.recv().await else { panic!("vm1 is to hold its answers") };
    held.send(true).unwrap();
    let Some(Command::Hold(held)) = two.recv().await else { panic!("vm2 is to hold its answers") };
    asker.abort();
    assert!(asker.await.unwrap_err().is_cancelled());
    // Nobody waits for the mark any more, and both disks hold their guests' answers.
    held.send(true).unwrap();
    for inbox in [&mut one, &mut two] {
        let Some(Command::Mark(_, answer)) = inbox.recv().await else { panic!("the mark goes on") };
        let at = MarkAt { lsn: Lsn(7), time: CaptureTime(7), state: MarkState::Away };
        answer.send(Ok(at)).unwrap();
    }
    for inbox in [&mut one, &mut two] {
        let Some(Command::Release(answer)) = inbox.recv().await else { panic!("the answers are released") };
        answer.send(true).unwrap();
    }
}

/// A guest that was answered between may have built upon that on the other disk, before its mark.
#[tokio::test]
async fn a_mark_of_several_disks_of_which_one_has_answered_too_early_is_none() {
    let directory = tempfile::tempdir().unwrap();
    let service = service(directory.path());
    let known = Started::image(directory.path()).await.handle.status().await.unwrap();
    let (mut one, mut two) = (played(&service, "vm1").await, played(&service, "vm2").await);
    for (disks, held, fails) in [
        (2, [true, true], false),
        (2, [false, true], true),
        (2, [true, false], true),
        (1, [false, true], false),
    ] {
        let asker = {
            let service = Arc::clone(&service);
            let disks = [name("vm1"), name("vm2")][..disks].to_vec();
            let request = MarkRequest { label: "here".into(), disks, wait_ms: 0 };
            tokio::spawn(async move { service.mark(request).await })
        };
        let mut inboxes = [&mut one, &mut two];
        for inbox in &mut inboxes[..disks] {
            let Some(Command::Status(answer)) = inbox.recv().await else { panic!("first its status") };
            answer.send(known.clone()).unwrap();
        }
        for inbox in &mut inboxes[..disks] {
            let Some(Command::Hold(answer)) = inbox.recv().await else { panic!("it is to hold its answers") };
            answer.send(true).unwrap();
        }
        for inbox in &mut inboxes[..disks] {
            let Some(Command::Mark(_, answer)) = inbox.recv().await else { panic!("it is to be marked") };
            let at = MarkAt { lsn: Lsn(7), time: CaptureTime(7), state: MarkState::Away };
            answer.send(Ok(at)).unwrap();
        }
        for (inbox, held) in inboxes.iter_mut().zip(held).take(disks) {
            let Some(Command::Release(answer)) = inbox.recv().await else { panic!("it is released") };
            answer.send(held).unwrap();
        }
        let marked = asker.await.unwrap();
        assert_eq!(marked.is_err(), fails, "{disks} {held:?}: {marked:?}");
        if let Err(error) = marked {
            let which = if held[0] { "vm2" } else { "vm1" };
            assert!(error.message.starts_with(&format!("disk {which} could not be held")), "{error}");
        }
    }
}

#[tokio::test]
async fn what_is_no_disk_is_refused_without_waiting_for_it() {
    let directory = tempfile::tempdir().unwrap();
    let service = service(directory.path());
    let fifo = directory.path().join("fifo");
    assert!(std::process::Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    let socket = directory.path().join("socket");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    for image in [fifo, socket] {
        let text = serde_json::json!({ "name": "vm1", "image": image, "receiver": "unix:/nobody" });
        let refused = service.attach(serde_json::from_value(text).unwrap()).await.unwrap_err();
        assert_eq!(refused.code, ErrorCode::Usage, "{refused:?}");
        assert!(refused.message.ends_with("is neither a regular file nor a block device"), "{refused:?}");
    }
}

#[tokio::test]
async fn a_disk_that_cannot_be_attached_again_is_shown_with_the_reason() {
    let directory = tempfile::tempdir().unwrap();
    let service = service(directory.path());
    let receiver = backtide_control::Address::unix(directory.path().join("nobody.sock"));
    let image = directory.path().join("gone.img").display().to_string();
    let record = crate::record::DiskRecord {
        attached: true,
        ..crate::record::DiskRecord::new(name("vm1"), image.clone(), receiver)
    };
    let storage = RealStorage::open(&directory.path().join("state")).unwrap();
    Records::new(Arc::new(storage)).save(&record).unwrap();
    assert!(service.registry.restore().await.unwrap());
    for asked in [None, Some(name("vm1"))] {
        let disks = service.status(asked).await.unwrap().disks;
        assert_eq!((disks[0].reason_code.as_str(), disks.len()), ("not-attached", 1));
        assert!(disks[0].reason.contains(&image), "{}", disks[0].reason);
    }
    std::fs::File::create(&image).unwrap().set_len(1 << 20).unwrap();
    assert!(!service.registry.restore().await.unwrap());
    let disks = service.status(None).await.unwrap().disks;
    assert_eq!(disks.len(), 1);
    assert_ne!(disks[0].reason_code, "not-attached");
    service.registry.shut_down().await;
}

#[tokio::test]
async fn a_disk_that_cannot_be_attached_again_can_be_given_up() {
    let directory = tempfile::tempdir().unwrap();
    let service = service(directory.path());
    let receiver = backtide_control::Address::unix(directory.path().join("nobody.sock"));
    let image = directory.path().join("gone.img").display().to_string();
    let fresh = |disk: &str| crate::record::DiskRecord {
        attached: true,
        ..crate::record::DiskRecord::new(name(disk), image.clone(), receiver.clone())
    };
    let (by_name, by_uuid) = (fresh("vm1"), fresh("vm2"));
    let uuid = by_uuid.uuid.to_string();
    let records = Records::new(Arc::new(RealStorage::open(&directory.path().join("state")).unwrap()));
    records.save(&by_name).unwrap();
    records.save(&by_uuid).unwrap();
    assert!(service.registry.restore().await.unwrap());
    for (asked, left) in [("vm1", 1), (uuid.as_str(), 0)] {
        let detached = service.detach(name(asked), DetachRequest::default()).await.unwrap();
        assert_eq!(detached.reason_code, "detached", "{}", detached.reason);
        assert_eq!(service.status(None).await.unwrap().disks.len(), left);
        let again = service.detach(name(asked), DetachRequest::default()).await.unwrap_err();
        assert_eq!(again.code, ErrorCode::NotFound, "{}", again.message);
    }
    // Neither the next attempt nor the next agent has anything to do with them.
    std::fs::File::create(&image).unwrap().set_len(1 << 20).unwrap();
    assert!(!service.registry.restore().await.unwrap());
    assert!(service.status(None).await.unwrap().disks.is_empty());
    let kept = records.load(&name("vm1")).unwrap().expect("what is known of it stays");
    assert_eq!((kept.uuid, kept.attached), (by_name.uuid, false));
}

#[test]
fn a_name_that_is_written_as_a_uuid_names_no_disk() {
    let uuid = DiskId::random();
    let refused = refuse_identity(&name(&uuid.to_string())).unwrap_err();
    assert_eq!(refused.code, ErrorCode::Usage);
    // A disk is never looked for so.
    refuse_identity(&name(&uuid.0.simple().to_string())).unwrap();
    refuse_identity(&name("vm1")).unwrap();
}
