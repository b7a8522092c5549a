//! Writable mounts: overlays that are kept, discarded, bounded, checked, and served again after a restart.

use std::{
    fs,
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    process::Command,
};

use backtide_log_receiver::{Config, Receiver, fsck};
use backtide_receiver_api::{
    ErrorCode, Mount, MountRequest, OverlayFate, ReceiverClient, RemountRequest, ScrubRequest,
};
use backtide_units::ByteCount;

use crate::{
    agent::*,
    faults::{Fault, Faulty},
    fixture::*,
    going_back::*,
};

fn writable(at: &str) -> MountRequest {
    MountRequest { writable: true, ..request(at, None) }
}

/// Does steps of qemu-io on a mount; says whether all of them succeeded, and what was said.
async fn try_qemu_io(uri: &str, steps: &[&str]) -> (bool, String) {
    let mut command = Command::new("qemu-io");
    command.args(["-f", "raw", uri]);
    for step in steps {
        command.args(["-c", step]);
    }
    let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    let said =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    (output.status.success() && !said.contains("failed"), said)
}

async fn qemu_io(mount: &Mount, steps: &[&str]) {
    let (done, said) = try_qemu_io(&mount.uri, steps).await;
    assert!(done, "{said}");
}

async fn unmount(api: &ReceiverClient, id: &str, fate: OverlayFate) {
    api.unmount(id, Some(fate)).await.unwrap();
}

/// A disk whose point `latest` is all of 0x11 in its first MiB.
async fn one_point(receiver: &Receiver) -> Vec<u8> {
    let (mut agent, _) = Agent::welcomed(receiver, hello(1, "vm1")).await;
    agent.first_pass(5).await;
    agent.send(&write(6, 0, vec![0x11; 1 << 20])).await;
    agent.all_durable().await;
    let mut image = vec![0; DISK_BYTES as usize];
    image[..1 << 20].fill(0x11);
    image
}

#[tokio::test(flavor = "multi_thread")]
async fn mounts_of_one_point_are_written_apart_and_the_point_stays() {
    let place = Place::new();
    let receiver = place.start().await;
    let mut image = one_point(&receiver).await;
    let api = client(&receiver);
    let plain = api.mount(&request("latest", None)).await.unwrap();
    let one = api.mount(&writable("latest")).await.unwrap();
    let two = api.mount(&writable("latest")).await.unwrap();
    qemu_io(&one, &["write -P 0x22 512 3k", "write -z -u 64k 64k", "discard 200k 4k", "flush"]).await;
    qemu_io(&two, &["write -P 0x33 2M 1M", "write -f -P 0x44 0 4k"]).await;
    assert_content(&place, &plain, &image).await;
    let mut other = image.clone();
    image[512..512 + 3072].fill(0x22);
    image[64 << 10..128 << 10].fill(0);
    image[200 << 10..204 << 10].fill(0);
    assert_content(&place, &one, &image).await;
    other[2 << 20..3 << 20].fill(0x33);
    other[..4096].fill(0x44);
    assert_content(&place, &two, &other).await;
    let overlay = api.mounts().await.unwrap().mounts[2].overlay.unwrap();
    assert_eq!(overlay.bytes, ByteCount((1 << 20) + 4096));
    let status = api.status().await.unwrap();
    assert_eq!((status.mounts, status.overlays), (3, 2));
    assert!(status.overlay_bytes.0 > 1 << 20, "{status:?}");
    receiver.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_writable_mount_says_what_it_can_and_where_it_has_data() {
    let place = Place::new();
    let receiver = place.start().await;
    one_point(&receiver).await;
    let mount = client(&receiver).mount(&writable("latest")).await.unwrap();
    qemu_io(&mount, &["write -P 1 3M 64k", "write -z -u 0 512k"]).await;
    let uri = mount.uri.clone();
    let (info, map) = tokio::task::spawn_blocking(move || {
        let run = |arguments: &[&str]| {
            let output = Command::new("nbdinfo").args(arguments).arg(&uri).output().unwrap();
            serde_json::from_slice::<serde_json::Value>(&output.stdout).unwrap()
        };
        (run(&["--json"]), run(&["--map", "--json"]))
    })
    .await
    .unwrap();
    let export = &info["exports"][0];
    assert_eq!(export["is_read_only"], false);
    for can in ["can_multi_conn", "can_flush", "can_fua", "can_trim", "can_zero"] {
        assert_eq!(export[can], true, "{can}: {export}");
    }
    let map: Vec<(u64, u64)> = map
        .as_array()
        .unwrap()
        .iter()
        .filter(|extent| extent["type"] == 0)
        .map(|extent| (extent["offset"].as_u64().unwrap(), extent["length"].as_u64().unwrap()))
        .collect();
    assert_eq!(map, [(512 << 10, 512 << 10), (3 << 20, 64 << 10)]);
    receiver.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_written_is_served_again_until_it_is_discarded() {
    let place = Place::new();
    let receiver = place.start().await;
    let mut image = one_point(&receiver).await;
    let api = client(&receiver);
    let mount = api.mount(&writable("latest")).await.unwrap();
    qemu_io(&mount, &["write -P 0x22 0 8k", "flush"]).await;
    image[..8192].fill(0x22);
    let refused = api.unmount(&mount.id, None).await.unwrap_err();
    assert_eq!(refused.code, ErrorCode::Usage, "{refused}");
    receiver.shutdown().await;

    let receiver = place.start().await;
    let api = client(&receiver);
    let again = api.mounts().await.unwrap().mounts;
    assert_eq!(again.len(), 1);
    assert_eq!((&again[0].id, &again[0].uri), (&mount.id, &mount.uri), "the same place, without asking");
    assert_content(&place, &again[0], &image).await;
    qemu_io(&again[0], &["write -P 0x33 1M 4k"]).await;
    image[1 << 20..(1 << 20) + 4096].fill(0x33);
    assert_eq!(api.discard(&mount.id).await.unwrap_err().code, ErrorCode::Busy);
    unmount(&api, &mount.id, OverlayFate::Keep).await;
    let kept = api.mounts().await.unwrap();
    assert_eq!((kept.mounts.len(), kept.kept[0].id.as_str()), (0, mount.id.as_str()));
    receiver.shutdown().await;

    let receiver = place.start().await;
    let api = client(&receiver);
    assert_eq!(api.mounts().await.unwrap().mounts, [], "what is only kept is not served");
    let other = api.mount(&writable("latest")).await.unwrap();
    assert_ne!(other.id, mount.id);
    let again = api.remount(&mount.id, &RemountRequest::default()).await.unwrap();
    assert_content(&place, &again, &image).await;
    let twice = api.remount(&mount.id, &RemountRequest::default()).await.unwrap_err();
    assert_eq!(twice.code, ErrorCode::Busy, "{twice}");
    unmount(&api, &mount.id, OverlayFate::Discard).await;
    unmount(&api, &other.id, OverlayFate::Keep).await;
    assert_eq!(api.discard(&other.id).await.unwrap().id, other.id);
    for id in [&mount.id, &other.id] {
        assert_eq!(api.discard(id).await.unwrap_err().code, ErrorCode::NotFound);
        let gone = api.remount(id, &RemountRequest::default()).await.unwrap_err();
        assert_eq!(gone.code, ErrorCode::NotFound);
    }
    assert_eq!(fs::read_dir(place.store().join("overlays")).unwrap().count(), 0);
    let plain = api.mount(&request("latest", None)).await.unwrap();
    let wrong = api.unmount(&plain.id, Some(OverlayFate::Keep)).await.unwrap_err();
    assert_eq!(wrong.code, ErrorCode::Usage, "{wrong}");
    receiver.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_overlay_is_no_space_to_its_client_and_overlays_are_bounded() {
    let place = Place::new();
    let mut config = place.config();
    config.limits.overlay_bytes = ByteCount(256 << 10);
    config.limits.overlays_bytes = ByteCount(320 << 10);
    config.limits.overlays = 2;
    let receiver = Receiver::start(config).await.unwrap();
    one_point(&receiver).await;
    let api = client(&receiver);
    let mount = api.mount(&writable("latest")).await.unwrap();
    qemu_io(&mount, &["write -P 1 0 256k"]).await;
    let (written, said) = try_qemu_io(&mount.uri, &["write -P 1 1M 4k"]).await;
    assert!(!written && said.contains("No space left on device"), "{said}");
    qemu_io(&mount, &["write -P 2 0 256k", "read -P 2 0 256k", "read -P 0 1M 4k"]).await;
    qemu_io(&mount, &["discard 0 64k", "write -P 3 1M 64k"]).await;
    let second = api.mount(&writable("latest")).await.unwrap();
    let (written, said) = try_qemu_io(&second.uri, &["write -P 1 0 128k"]).await;
    assert!(!written && said.contains("No space left on device"), "{said}");
    let third = api.mount(&writable("latest")).await.unwrap_err();
    assert_eq!(third.code, ErrorCode::Busy, "{third}");
    let temporary = MountRequest { temporary: true, ..writable("latest") };
    assert_eq!(api.mount(&temporary).await.unwrap_err().code, ErrorCode::Usage);
    receiver.shutdown().await;
}

fn data_of(place: &Place, id: &str) -> PathBuf {
    place.store().join("overlays").join(format!("{id}.data"))
}

fn flip(path: &PathBuf, at: usize) {
    let mut bytes = fs::read(path).unwrap();
    bytes[at] ^= 1;
    fs::write(path, bytes).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn damage_of_an_overlay_is_an_error_and_told_by_scrub_fsck_and_status() {
    let place = Place::new();
    let receiver = place.start().await;
    one_point(&receiver).await;
    let api = client(&receiver);
    let mount = api.mount(&writable("latest")).await.unwrap();
    qemu_io(&mount, &["write -P 1 0 64k", "flush"]).await;
    let scrub = || async {
        let mut status = api.scrub(&ScrubRequest::default()).await.unwrap();
        while status.running {
            status = api.scrub_status().await.unwrap();
        }
        status
    };
    let sound = scrub().await;
    assert!(sound.sound, "{sound:?}");
    assert_eq!((sound.overlays.len(), sound.overlays[0].bytes), (1, ByteCount(64 << 10)));
    flip(&data_of(&place, &mount.id), 4096 + 5 * 4096 + 7);
    let damaged = scrub().await;
    assert!(!damaged.sound && damaged.overlays[0].damage.len() == 1, "{damaged:?}");
    let (read, said) = try_qemu_io(&mount.uri, &["read 20k 4k"]).await;
    assert!(!read && said.contains("Input/output error"), "{said}");
    qemu_io(&mount, &["read -P 1 24k 40k"]).await;
    let alarms = api.status().await.unwrap().alarms;
    assert!(alarms.iter().any(|alarm| alarm.contains("vm1-1.data is damaged at byte 24576")), "{alarms:?}");
    receiver.shutdown().await;
    let report = fsck(&place.store(), &mut |_| {}).unwrap();
    assert!(!report.sound && !report.overlays[0].sound, "{report:?}");

    // A map that is damaged is not served, and everything else is.
    flip(&place.store().join("overlays").join("vm1-1.map"), 1024 + 40);
    let receiver = place.start().await;
    let api = client(&receiver);
    let mounts = api.mounts().await.unwrap();
    assert_eq!(mounts.mounts, []);
    let problem = mounts.kept[0].problem.clone().unwrap();
    assert!(problem.contains("vm1-1.map is damaged at byte 1024"), "{problem}");
    assert_eq!(api.remount("vm1-1", &RemountRequest::default()).await.unwrap_err().code, ErrorCode::Damaged);
    flip(&place.store().join("overlays").join("vm1-1.json"), 40);
    receiver.shutdown().await;
    let receiver = place.start().await;
    let api = client(&receiver);
    assert_eq!(api.mounts().await.unwrap().kept[0].disk, None);
    api.discard("vm1-1").await.unwrap();
    receiver.shutdown().await;
    assert!(fsck(&place.store(), &mut |_| {}).unwrap().sound);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_keeps_what_cannot_be_made_durable_is_told_so() {
    let (place, storage) = (Place::new(), Faulty::new());
    let receiver = place.start_on(storage.clone()).await;
    one_point(&receiver).await;
    let api = client(&receiver);
    for fate in [OverlayFate::Keep, OverlayFate::Discard] {
        let mount = api.mount(&writable("latest")).await.unwrap();
        storage.set(Fault::OverlaysFail);
        // It flushes at its end, and hears that this fails.
        try_qemu_io(&mount.uri, &["write -P 0x22 0 8k"]).await;
        let ended = api.unmount(&mount.id, Some(fate)).await;
        storage.set(Fault::None);
        match fate {
            OverlayFate::Keep => {
                let why = ended.unwrap_err();
                assert_eq!(why.code, ErrorCode::Failed, "{why}");
                assert!(why.message.contains("is kept, but not all that was written is durable"), "{why}");
                let kept = api.mounts().await.unwrap().kept;
                assert_eq!((kept.len(), &kept[0].id), (1, &mount.id));
            }
            // Nobody wants it.
            OverlayFate::Discard => assert_eq!(ended.unwrap().id, mount.id),
        }
        assert!(api.mounts().await.unwrap().mounts.is_empty(), "it has ended");
    }
    receiver.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_written_is_not_removed_because_its_record_alone_is_lost() {
    let place = Place::new();
    let receiver = place.start().await;
    one_point(&receiver).await;
    let api = client(&receiver);
    let [lost, going, empty] = [(); 3].map(|()| writable("latest"));
    let lost = api.mount(&lost).await.unwrap();
    let going = api.mount(&going).await.unwrap();
    let empty = api.mount(&empty).await.unwrap();
    for mount in [&lost, &going] {
        qemu_io(mount, &["write -P 0x22 0 8k", "flush"]).await;
    }
    for mount in [&lost, &going, &empty] {
        unmount(&api, &mount.id, OverlayFate::Keep).await;
    }
    receiver.shutdown().await;
    let file = |id: &str, ending: &str| place.store().join("overlays").join(format!("{id}.{ending}"));
    let record = fs::read(file(&lost.id, "json")).unwrap();
    fs::remove_file(file(&lost.id, "json")).unwrap();
    fs::remove_file(file(&empty.id, "json")).unwrap();
    // As a discard leaves it that was killed.
    fs::rename(file(&going.id, "json"), file(&going.id, "going")).unwrap();
    fs::remove_file(file(&going.id, "map")).unwrap();
    let report = fsck(&place.store(), &mut |_| {}).unwrap();
    let told: Vec<_> = report.overlays.iter().map(|overlay| overlay.id.as_str()).collect();
    assert_eq!((told, report.sound), (vec![lost.id.as_str()], false), "{report:?}");
    assert!(report.overlays[0].error.as_ref().unwrap().contains("it is missing"), "{report:?}");

    let receiver = place.start().await;
    let kept = client(&receiver).mounts().await.unwrap().kept;
    assert_eq!(kept.len(), 1, "{kept:?}");
    assert!(kept[0].problem.as_ref().unwrap().contains("it is missing"), "{kept:?}");
    receiver.shutdown().await;
    let left = |id: &str| ["json", "map", "data", "going"].map(|ending| file(id, ending).exists());
    assert_eq!(left(&lost.id), [false, true, true, false]);
    assert_eq!((left(&going.id), left(&empty.id)), ([false; 4], [false; 4]));
    // With its record it is what it was; and without, a person may still discard it.
    fs::write(file(&lost.id, "json"), record).unwrap();
    let receiver = place.start().await;
    let again = client(&receiver).remount(&lost.id, &RemountRequest::default()).await.unwrap();
    qemu_io(&again, &["read -P 0x22 0 8k"]).await;
    unmount(&client(&receiver), &lost.id, OverlayFate::Keep).await;
    receiver.shutdown().await;
    fs::remove_file(file(&lost.id, "json")).unwrap();
    let receiver = place.start().await;
    client(&receiver).discard(&lost.id).await.unwrap();
    receiver.shutdown().await;
    assert_eq!(left(&lost.id), [false; 4]);
    assert!(fsck(&place.store(), &mut |_| {}).unwrap().sound);
    // A directory that cannot be listed is not one without overlays, and keeps no other report back.
    fs::remove_dir(place.store().join("overlays")).unwrap();
    fs::write(place.store().join("overlays"), "").unwrap();
    let report = fsck(&place.store(), &mut |_| {}).unwrap();
    assert!(!report.sound && report.damage.iter().any(|why| why.contains("cannot list")), "{report:?}");
    assert!(report.disks[0].sound, "{report:?}");
}

fn copy_dir(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let (entry, kind) = entry.map(|entry| (entry.path(), entry.file_type().unwrap())).unwrap();
        let to = to.join(entry.file_name().unwrap());
        if kind.is_dir() {
            copy_dir(&entry, &to);
        } else if kind.is_file() {
            fs::copy(&entry, &to).unwrap();
        }
    }
}

/// A receiver on another directory, with sockets of its own.
fn elsewhere(place: &Place, store: &str) -> Config {
    Config { store: place.path(store), run: Some(place.path("run-elsewhere")), ..place.config() }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_of_a_store_leaves_its_mounts_to_the_original() {
    let place = Place::new();
    let receiver = place.start().await;
    let mut image = one_point(&receiver).await;
    let api = client(&receiver);
    let told = place.path("told.sock");
    let uri = format!("nbd+unix:///booted?socket={}", told.display());
    let of_its_own = api.mount(&writable("latest")).await.unwrap();
    let there = api.mount(&MountRequest { nbd: Some(uri.clone()), ..writable("latest") }).await.unwrap();
    assert_eq!(there.uri, uri);
    qemu_io(&there, &["write -P 0x22 0 8k", "flush"]).await;
    image[..8192].fill(0x22);
    // While the original runs, and while it does not.
    copy_dir(&place.store(), &place.path("copy"));
    let mut original = Some(receiver);
    for round in 0..2 {
        let copy = Receiver::start(elsewhere(&place, "copy")).await.unwrap();
        let of_copy = client(&copy);
        let mounts = of_copy.mounts().await.unwrap();
        assert_eq!((mounts.mounts.len(), mounts.kept.len()), (0, 2), "{mounts:?}");
        if round == 0 {
            let said = format!("this store is a copy of {}", place.store().canonicalize().unwrap().display());
            let alarms = of_copy.status().await.unwrap().alarms;
            assert!(
                mounts.kept.iter().all(|kept| kept.problem.as_ref().is_some_and(|why| why.contains(&said))),
                "{mounts:?}"
            );
            assert_eq!(alarms.iter().filter(|alarm| alarm.contains(&said)).count(), 2, "{alarms:?}");
            assert_content(&place, &there, &image).await;
            original.take().unwrap().shutdown().await;
        }
        assert!(!told.exists(), "nobody serves there");
        copy.shutdown().await;
    }
    // It serves what it is told to, at a place of its own from then on, and the original what it has served.
    let copy = Receiver::start(elsewhere(&place, "copy")).await.unwrap();
    let again = client(&copy).remount(&there.id, &RemountRequest::default()).await.unwrap();
    assert!(again.uri.contains("run-elsewhere"), "{again:?}");
    copy.shutdown().await;
    let copy = Receiver::start(elsewhere(&place, "copy")).await.unwrap();
    let receiver = place.start().await;
    assert_eq!(client(&copy).mounts().await.unwrap().mounts[0].uri, again.uri);
    let mounts = client(&receiver).mounts().await.unwrap().mounts;
    let uris: Vec<_> = mounts.iter().map(|mount| mount.uri.as_str()).collect();
    assert_eq!(uris, [&of_its_own.uri, &uri]);
    qemu_io(&mounts[1], &["write -P 0x33 0 4k", "flush"]).await;
    assert_content(&place, &again, &image).await;
    copy.shutdown().await;
    receiver.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_was_renamed_serves_its_mounts_as_before() {
    let place = Place::new();
    // Its sockets are in its own directory.
    let at = |store: &str| Config { run: None, store: place.path(store), ..place.config() };
    let receiver = Receiver::start(at("store")).await.unwrap();
    let image = one_point(&receiver).await;
    let uri = format!("nbd+unix:///booted?socket={}", place.path("told.sock").display());
    let api = client(&receiver);
    api.mount(&MountRequest { nbd: Some(uri.clone()), ..writable("latest") }).await.unwrap();
    let of_its_own = api.mount(&writable("latest")).await.unwrap();
    receiver.shutdown().await;
    fs::rename(place.path("store"), place.path("renamed")).unwrap();
    for _ in 0..2 {
        let receiver = Receiver::start(at("renamed")).await.unwrap();
        let mounts = client(&receiver).mounts().await.unwrap().mounts;
        assert_eq!(mounts.len(), 2, "{mounts:?}");
        assert_eq!(mounts[0].uri, uri);
        assert_eq!(mounts[1].uri, of_its_own.uri.replace("/store/", "/renamed/"));
        assert_content(&place, &mounts[1], &image).await;
        receiver.shutdown().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mount_whose_socket_is_another_process_s_is_said_and_tried_again() {
    let place = Place::new();
    let receiver = place.start().await;
    let mut image = one_point(&receiver).await;
    let told = place.path("told.sock");
    let uri = format!("nbd+unix:///booted?socket={}", told.display());
    let mount = client(&receiver)
        .mount(&MountRequest { nbd: Some(uri.clone()), ..writable("latest") })
        .await
        .unwrap();
    qemu_io(&mount, &["write -P 0x22 0 8k", "flush"]).await;
    image[..8192].fill(0x22);
    receiver.shutdown().await;
    let other = UnixListener::bind(&told).unwrap();
    let receiver = place.start().await;
    let api = client(&receiver);
    let mounts = api.mounts().await.unwrap();
    assert!(mounts.mounts.is_empty(), "{mounts:?}");
    let why = mounts.kept[0].problem.clone().unwrap();
    assert!(why.contains(&format!("not served at {uri}, which is tried again")), "{why}");
    let alarms = api.status().await.unwrap().alarms;
    assert!(alarms.iter().any(|alarm| alarm.contains(&why)), "{alarms:?}");
    UnixStream::connect(&told).expect("it is the other process's as before");
    // That one ends, and leaves its file.
    drop(other);
    let served = loop {
        if let Some(mount) = api.mounts().await.unwrap().mounts.pop() {
            break mount;
        }
    };
    assert_eq!((&served.uri, served.id), (&uri, mount.id));
    assert_eq!(api.status().await.unwrap().alarms, Vec::<String>::new());
    let again = api.mounts().await.unwrap().mounts.pop().unwrap();
    assert_content(&place, &again, &image).await;
    receiver.shutdown().await;
}
