//! A flipped bit in any kind of file of a store is found: by a scrub beside the receiver, and by fsck.

use std::{
    fs::{self, OpenOptions},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::Command,
};

use backtide_log_receiver::{Receiver, fsck};
use backtide_receiver_api::{
    DiskCheck, MountRequest, OverlayCheck, OverlayFate, ReceiverClient, RetentionReport, ScrubRequest,
    ScrubStatus,
};
use backtide_units::{ByteCount, DiskName, Reason};

use crate::{
    agent::*,
    fixture::*,
    forget::left,
    going_back::request,
    retention::{TENS, rounds, vm1, write_history},
};

/// A store with each kind of file there is, nothing of it being written: folded history, an overlay that is mounted and one that is
/// kept, a disk that was forgotten, what a scrub has found.
async fn filled(place: &Place) -> Receiver {
    let receiver = place.start().await;
    let api = client(&receiver);
    let mut agent = write_history(&receiver, 6..=95).await;
    agent.send(&pass_begin(100, 95, Reason::ReceiverRolledBack)).await;
    agent.send(&pass_end(100)).await;
    agent.all_durable().await;
    let vm2: DiskName = "vm2".parse().unwrap();
    let (mut two, _) = Agent::welcomed(&receiver, hello(2, "vm2")).await;
    two.first_pass(5).await;
    left(two, &api, &vm2).await;
    api.forget(&vm2).await.unwrap();
    // Until nothing more is folded, which later rounds would do meanwhile.
    loop {
        let [before, after] = [rounds(&api, &vm1(), TENS).await, rounds(&api, &vm1(), TENS).await];
        let taken = |report: &RetentionReport| (report.image_bytes, report.disks[0].log_bytes);
        if taken(&before) == taken(&after) {
            break;
        }
    }
    left(agent, &api, &vm1()).await;
    for fate in [Some(OverlayFate::Keep), None] {
        let mount = api.mount(&MountRequest { writable: true, ..request("latest", None) }).await.unwrap();
        let uri = mount.uri.clone();
        let write = move || {
            let steps = ["-c", "write -P 0x22 0 64k", "-c", "flush"];
            Command::new("qemu-io").args(["-f", "raw", &uri]).args(steps).status().unwrap().success()
        };
        assert!(tokio::task::spawn_blocking(write).await.unwrap());
        if fate.is_some() {
            api.unmount(&mount.id, fate).await.unwrap();
        }
    }
    // What is found now is noted, and forgotten when it is whole again. The last segment is neither mended nor folded.
    let segment = files(&place.store()).into_iter().rfind(|path| ending(path) == "seg").unwrap();
    flip(&segment, 5000);
    assert!(!scrubbed(place, &api).await.sound);
    flip(&segment, 5000);
    assert!(scrubbed(place, &api).await.sound);
    receiver
}

/// A scrub of all that there is. It has ended when its file says so: then nothing is written any more.
async fn scrubbed(place: &Place, api: &ReceiverClient) -> ScrubStatus {
    let all = ScrubRequest { name: None, bytes_per_second_max: Some(ByteCount(0)) };
    let mut status = api.scrub(&all).await.unwrap();
    while status.running {
        status = api.scrub_status().await.unwrap();
    }
    while !fs::read_to_string(place.store().join("scrub.json")).unwrap().contains("\"running\":false") {
        tokio::task::yield_now().await;
    }
    status
}

fn ending(path: &Path) -> String {
    let name = path.file_name().unwrap().to_str().unwrap().to_owned();
    name.rsplit_once('.').map_or(name.clone(), |(_, ending)| ending.to_owned())
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files(&path));
        } else if path.file_name().unwrap() != "lock" && ending(&path) != "new" {
            // What ends in `.new` holds nothing yet, and a start removes it.
            found.push(path);
        }
    }
    found.sort();
    found
}

/// Flips a bit where it stands, as a device does it.
fn flip(path: &Path, at: u64) {
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 4], at).unwrap();
}

/// Where bits are flipped in a file: in each of its parts.
fn places(path: &Path) -> Vec<u64> {
    let length = fs::metadata(path).unwrap().len();
    match ending(path).as_str() {
        "seg" => vec![20, 5000],
        "pack" => vec![20, 70_000, length - 5],
        // Header, mark, the first record; header, the first slot.
        "map" => vec![20, 520, 1040],
        "data" => vec![20, 4200],
        _ => vec![length / 2],
    }
}

fn said(damage: &[String], disks: &[DiskCheck], overlays: &[OverlayCheck]) -> Vec<String> {
    let mut said = damage.to_vec();
    for disk in disks {
        said.extend(disk.damage.iter().chain(&disk.mended).chain(&disk.error).cloned());
    }
    overlays.iter().for_each(|overlay| said.extend(overlay.damage.iter().chain(&overlay.error).cloned()));
    said
}

/// Flips bits in every file, one after the other, and has each found; gives the kinds of files.
async fn each_is_found<F: AsyncFnMut() -> Vec<String>>(place: &Place, mut find: F) -> Vec<String> {
    let mut kinds = Vec::new();
    for path in files(&place.store()) {
        for at in places(&path) {
            let before = fs::read(&path).unwrap();
            flip(&path, at);
            let flipped = fs::read(&path).unwrap();
            let said = find().await;
            let name = path.file_name().unwrap().to_str().unwrap();
            // An end that is torn is told of the log, not of the file.
            let log = format!("log in {} is lost", path.parent().unwrap().display());
            let told = said.iter().any(|said| said.contains(name) || said.contains(&log));
            assert!(told, "byte {at} of {}: {said:?}", path.display());
            let after = fs::read(&path).unwrap();
            // What was mended is as it was; what was written again since is something else.
            if after == flipped {
                flip(&path, at);
            } else if after != before {
                assert_eq!(ending(&path), "json");
            }
        }
        kinds.push(match ending(&path).as_str() {
            "json" => path.file_name().unwrap().to_str().unwrap().to_owned(),
            _ => ending(&path),
        });
    }
    kinds
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flipped_bit_in_any_file_is_found_by_a_scrub_and_by_fsck() {
    let place = Place::new();
    let receiver = filled(&place).await;
    let api = client(&receiver);
    let by_scrub = each_is_found(&place, async || {
        let status = scrubbed(&place, &api).await;
        let mended = status.disks.iter().any(|disk| !disk.mended.is_empty());
        if status.sound && !mended {
            return Vec::new();
        }
        said(&status.damage, &status.disks, &status.overlays)
    })
    .await;
    let status = scrubbed(&place, &api).await;
    assert!(status.sound, "{status:?}");
    receiver.shutdown().await;
    let sound = fsck(&place.store(), &mut |_| {}).unwrap();
    assert!(sound.sound, "{sound:?}");
    let by_fsck = each_is_found(&place, async || {
        let report = fsck(&place.store(), &mut |_| {}).unwrap();
        assert!(!report.sound);
        said(&report.damage, &report.disks, &report.overlays)
    })
    .await;
    assert_eq!(by_scrub, by_fsck);
    let forgotten = format!("{}.json", hello(2, "vm2").disk);
    let kinds = ["store.json", "retention.json", "findings.json", "scrub.json", "mounts.json", &forgotten];
    let kinds = kinds.into_iter().chain(["disk.json", "durable", "1", "2", "seg", "pack", "map", "data"]);
    let kinds = kinds.chain(["vm1-1.json", "vm1-2.json", "shortfalls.json"]);
    for kind in kinds {
        assert!(by_scrub.iter().any(|found| found == kind), "no {kind} in {by_scrub:?}");
    }
}
