//! Disks that are forgotten: when they may go, what goes with them, and what is told afterwards. Whenever the power
//! fails meanwhile, a disk is whole or it is gone.

use std::{fs, path::Path};

use backtide_log_receiver::{Receiver, fsck};
use backtide_protocol::{CloseCode, Hello, ReceiverState};
use backtide_receiver_api::{ErrorCode, KeepRequest, LockRequest, MountRequest, OverlayFate, ReceiverClient};
use backtide_storage::MemoryStorage;
use backtide_units::{DiskName, Epoch, Lsn};

use crate::{
    agent::*,
    fixture::*,
    going_back::{assert_content, request},
    point_reader::{PointReader, open},
    retention::{TENS, at, rounds, vm1, write_history},
};

fn vm2() -> DiskName {
    "vm2".parse().unwrap()
}

/// The disk's agent is seen to be gone.
pub(crate) async fn left(agent: Agent, api: &ReceiverClient, name: &DiskName) {
    drop(agent);
    while api.disks(Some(name)).await.unwrap().disks[0].connected {
        tokio::task::yield_now().await;
    }
}

async fn names(api: &ReceiverClient) -> Vec<String> {
    api.disks(None).await.unwrap().disks.into_iter().map(|disk| disk.name.into()).collect()
}

/// vm1 with several segments, an overlay that is kept and a point that is; vm2 with one record.
pub(crate) async fn two_disks(receiver: &Receiver) {
    let api = client(receiver);
    let one = write_history(receiver, 6..=40).await;
    let (mut two, _) = Agent::welcomed(receiver, hello(2, "vm2")).await;
    two.first_pass(5).await;
    two.send(&write(6, 0, vec![2; 4096])).await;
    two.all_durable().await;
    let writable = MountRequest { writable: true, ..request("lsn:20", None) };
    let overlay = api.mount(&writable).await.unwrap().id;
    api.unmount(&overlay, Some(OverlayFate::Keep)).await.unwrap();
    let keep = KeepRequest { name: vm1(), at: "lsn:30".to_owned(), release: false, held: None };
    api.keep(&keep).await.unwrap();
    left(one, &api, &vm1()).await;
    left(two, &api, &vm2()).await;
}

pub(crate) fn higher(name: &str) -> Hello {
    Hello { epoch: Epoch(2), ..hello(1, name) }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_forgotten_disk_is_gone_with_all_it_had_and_its_agent_is_told() {
    let place = Place::new();
    let receiver = place.start().await;
    two_disks(&receiver).await;
    let api = client(&receiver);
    rounds(&api, &vm1(), TENS).await;
    let before = api.retention(None).await.unwrap();
    assert!(before.image_bytes.0 > 0, "history was folded: {before:?}");
    let forgotten = api.forget(&vm1()).await.unwrap();
    assert_eq!((forgotten.name, forgotten.uuid), (vm1(), hello(1, "vm1").disk));
    assert_eq!(forgotten.overlays.len(), 1);
    assert_eq!(names(&api).await, ["vm2"]);
    assert_eq!(api.points(&vm1()).await.unwrap_err().code, ErrorCode::NotFound);
    assert_eq!(api.forget(&vm1()).await.unwrap_err().code, ErrorCode::NotFound);
    assert!(api.mounts().await.unwrap().kept.is_empty());
    let seen = rounds(&api, &vm2(), "forever").await;
    assert_eq!(seen.image_bytes.0, 0, "no image has a reader: {seen:?}");
    assert!(!place.store().join("disks").join(forgotten.uuid.to_string()).exists());
    let told = Agent::refused(&receiver, hello(1, "vm1")).await;
    assert!(
        told.code == CloseCode::Refused && told.message.contains("was forgotten at this receiver"),
        "{told:?}"
    );
    receiver.shutdown().await;

    // The same after a restart; and its name is free.
    let receiver = place.start().await;
    let api = client(&receiver);
    assert_eq!(Agent::refused(&receiver, hello(1, "vm1")).await.message, told.message);
    let (_other, _) = Agent::welcomed(&receiver, hello(3, "vm1")).await;
    let refused = Agent::refused(&receiver, higher("vm1")).await;
    assert!(refused.message.contains("another disk"), "{refused:?}");
    // Who attaches it again begins anew.
    let (mut again, welcome) = Agent::welcomed(&receiver, higher("vm1-again")).await;
    assert_eq!((welcome.state, welcome.durable), (ReceiverState::New, Lsn::ZERO));
    again.first_pass(50).await;
    again.send(&write(51, 0, vec![5; 4096])).await;
    again.all_durable().await;
    let mount = api.mount(&MountRequest { name: vm2(), ..request("latest", None) }).await.unwrap();
    let mut image = vec![0; DISK_BYTES as usize];
    image[..4096].fill(2);
    assert_content(&place, &mount, &image).await;
    left(again, &api, &"vm1-again".parse().unwrap()).await;
    receiver.shutdown().await;
    let report = fsck(&place.store(), &mut |_| ()).unwrap();
    assert!(report.sound && report.forgotten.is_empty() && report.disks.len() == 3, "{report:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_somebody_uses_or_has_locked_stays() {
    let place = Place::new();
    let receiver = place.start().await;
    let api = client(&receiver);
    let agent = write_history(&receiver, 6..=40).await;
    let refuses = async |code: ErrorCode, why: &str| {
        let refused = api.forget(&vm1()).await.unwrap_err();
        assert_eq!(refused.code, code, "{refused:?}");
        assert!(refused.message.contains(why), "{refused:?}");
    };
    refuses(ErrorCode::Busy, "is connected: detach it").await;
    left(agent, &api, &vm1()).await;
    let mount = api.mount(&request("lsn:20", None)).await.unwrap();
    refuses(ErrorCode::Busy, "disk vm1 is mounted: vm1-").await;
    assert_content(&place, &mount, &at(20)).await;
    api.unmount(&mount.id, None).await.unwrap();
    let mut reader = PointReader::open(&receiver, open("vm1", Some(20))).await;
    let owner = "a rewind".to_owned();
    reader.done(|id| backtide_protocol::Reading::Hold { id, owner: owner.clone() }).await.unwrap();
    refuses(ErrorCode::Busy, "an agent still fetches lsn:20 of disk vm1 for a rewind").await;
    reader.done(|id| backtide_protocol::Reading::Release { id, owner: owner.clone() }).await.unwrap();
    for at in [Some("lsn:20".to_owned()), None] {
        api.lock(&LockRequest { name: vm1(), at, until: "30d".to_owned() }).await.unwrap();
        refuses(ErrorCode::Refused, "of disk vm1 is locked until").await;
    }
    // It is as it was.
    let (_agent, welcome) = Agent::welcomed(&receiver, hello(1, "vm1")).await;
    assert_eq!(welcome.durable, Lsn(40));
    receiver.shutdown().await;
}

/// Everything the power can cut, one after the other.
#[tokio::test(flavor = "multi_thread")]
async fn a_disk_is_whole_or_gone_wherever_the_power_fails() {
    let place = Place::new();
    let storage = MemoryStorage::new();
    let receiver = place.start_on(storage.clone()).await;
    two_disks(&receiver).await;
    receiver.shutdown().await;
    let (mut stayed, mut halves) = (0, 0);
    for cut in 0.. {
        let storage = storage.copy();
        let receiver = place.start_on(storage.clone()).await;
        storage.cut_power_after(cut);
        let done = client(&receiver).forget(&vm1()).await.is_ok();
        let whole = !storage.is_off();
        receiver.shutdown().await;
        storage.crash(cut);
        halves += u32::from(fsck_tells_a_half(&place, &storage));
        let receiver = place.start_on(storage.clone()).await;
        let is_there = check(&receiver, &storage).await;
        assert!(!(done && is_there), "cut {cut}: what was told to be forgotten is there");
        stayed += u32::from(is_there);
        receiver.shutdown().await;
        if whole {
            assert!(done && cut > 20, "cut {cut}");
            break;
        }
    }
    assert!(stayed > 1 && halves > 5, "{stayed} stayed, {halves} were found half gone");
}

/// Whether vm1 is there: all of it, or nothing. vm2 always is.
async fn check(receiver: &Receiver, storage: &MemoryStorage) -> bool {
    let api = client(receiver);
    assert_eq!(api.points(&vm2()).await.unwrap().last.unwrap().lsn, Lsn(6));
    let kept = api.mounts().await.unwrap().kept.len();
    let own = Path::new("disks").join(hello(1, "vm1").disk.to_string());
    if names(&api).await == ["vm2"] {
        let mut files = storage.files().into_iter().map(|(path, _)| path);
        assert!(kept == 0 && !files.any(|path| path.starts_with(&own)), "nothing is left");
        let told = Agent::refused(receiver, hello(1, "vm1")).await;
        assert!(told.message.contains("was forgotten"), "{told:?}");
        let (_, welcome) = Agent::welcomed(receiver, higher("vm1")).await;
        assert_eq!(welcome.state, ReceiverState::New);
        assert!(api.retention(Some(&vm1())).await.unwrap().disks[0].keep.is_empty());
        return false;
    }
    assert_eq!(api.points(&vm1()).await.unwrap().last.unwrap().lsn, Lsn(40));
    assert_eq!((kept, api.retention(Some(&vm1())).await.unwrap().disks[0].keep.len()), (1, 1));
    let (_, welcome) = Agent::welcomed(receiver, hello(1, "vm1")).await;
    assert_eq!(welcome.durable, Lsn(40));
    true
}

/// What fsck says of a store as the power cut left it: sound, and whether vm1 is being forgotten.
fn fsck_tells_a_half(place: &Place, storage: &MemoryStorage) -> bool {
    let store = place.path("copied");
    let _ = fs::remove_dir_all(&store);
    for (path, content) in storage.files() {
        let path = store.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }
    let report = fsck(&store, &mut |_| ()).unwrap();
    assert!(report.damage.is_empty() && report.disks.iter().all(|disk| disk.sound), "{report:?}");
    match &report.forgotten[..] {
        [half] => {
            assert_eq!(half.name, vm1());
            assert_eq!(report.disks.len(), 1);
            true
        }
        [] => false,
        more => panic!("{more:?}"),
    }
}
