//! A scrub mends what is damaged from the disk itself while that is attached, and goes on when the receiver is started again.

use std::{fs, path::PathBuf};

use backtide_log_receiver::{Receiver, fsck};
use backtide_protocol::{CloseCode, Closed, Data, FailureCode, Hello, Message, ReadFailure, Reading};
use backtide_receiver_api::{ErrorCode, ReceiverClient, ScrubRequest, ScrubStatus};
use backtide_units::{ByteCount, ByteRange, Epoch};
use bytes::Bytes;
use tokio::task::JoinHandle;

use crate::{
    agent::*,
    fixture::*,
    going_back::{assert_content, request},
    retention::{TENS, at, content, files, rounds, vm1, write_history},
};

/// How an agent answers when it is asked for bytes of its disk.
#[derive(Clone, Copy)]
enum Answers {
    Right,
    Zeroes,
    Fails,
    Elsewhere,
}

/// Answers what the receiver asks, until the stream ends; gives how often it was asked.
fn attached(mut agent: Agent, disk: Vec<u8>, answers: Answers) -> JoinHandle<usize> {
    tokio::spawn(async move {
        let mut asked = 0;
        while let Some(message) = agent.next().await {
            let Message::Reading(Reading::Fetch { id, range }) = message else { continue };
            asked += 1;
            let bytes = &disk[range.start().0 as usize..range.end().0 as usize];
            let piece = |range: ByteRange, bytes: &[u8]| {
                let data = Data::capture(Bytes::copy_from_slice(bytes));
                Message::Reading(Reading::Piece { id, range, data })
            };
            let answer = match answers {
                Answers::Right => piece(range, bytes),
                Answers::Zeroes => piece(range, &[]),
                Answers::Fails => {
                    let failure = ReadFailure { code: FailureCode::Failed, message: "a bad sector".into() };
                    Message::Reading(Reading::Failed { id, failure })
                }
                Answers::Elsewhere => piece(ByteRange::new(range.end(), range.count()).unwrap(), bytes),
            };
            agent.send(&answer).await;
        }
        asked
    })
}

/// Flips a bit in the bytes of a record wherever they stand as they were written.
fn damage(files: &[PathBuf], lsn: u64) {
    let wanted = content(lsn);
    for file in files {
        let mut bytes = fs::read(file).unwrap();
        if let Some(at) = bytes.windows(4096).position(|window| window == &wanted[..4096]) {
            bytes[at + 100] ^= 4;
            return fs::write(file, bytes).unwrap();
        }
    }
    panic!("the bytes of LSN {lsn} stand nowhere");
}

pub(crate) async fn scrubbed(api: &ReceiverClient) -> ScrubStatus {
    let fast = ScrubRequest { name: None, bytes_per_second_max: Some(ByteCount(0)) };
    let mut status = api.scrub(&fast).await.unwrap();
    while status.running {
        status = api.scrub_status().await.unwrap();
    }
    status
}

async fn attach_again(receiver: &Receiver, epoch: u64) -> Agent {
    let (agent, _) = Agent::welcomed(receiver, Hello { epoch: Epoch(epoch), ..hello(1, "vm1") }).await;
    agent
}

#[tokio::test(flavor = "multi_thread")]
async fn a_payload_is_mended_from_the_attached_disk_and_from_nothing_else() {
    let place = Place::new();
    let receiver = place.start().await;
    let agent = write_history(&receiver, 6..=45).await;
    drop(agent);
    let api = client(&receiver);
    damage(&files(&place, "seg"), 7);
    let status = scrubbed(&api).await;
    assert!(!status.sound && status.disks[0].mended.is_empty(), "nobody is there to be asked: {status:?}");
    let wrong = [Answers::Zeroes, Answers::Fails, Answers::Elsewhere];
    for (epoch, answers) in (2..).zip(wrong) {
        // Each attach takes the disk from the one before, which ends that.
        drop(attached(attach_again(&receiver, epoch).await, at(45), answers));
        assert!(!scrubbed(&api).await.sound);
    }
    let disk = attached(attach_again(&receiver, 20).await, at(45), Answers::Right);
    let status = scrubbed(&api).await;
    assert!(status.sound && status.disks[0].mended.len() == 1, "{status:?}");
    assert_eq!(api.points(&vm1()).await.unwrap().damage, None);
    let mount = api.mount(&request("lsn:45", None)).await.unwrap();
    assert_content(&place, &mount, &at(45)).await;
    receiver.shutdown().await;
    assert_eq!(disk.await.unwrap(), 1, "it was asked once");
    assert!(fsck(&place.store(), &mut |_| {}).unwrap().sound);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chunk_of_an_image_is_mended_from_the_attached_disk() {
    let place = Place::new();
    let receiver = place.start().await;
    let agent = write_history(&receiver, 6..=60).await;
    let api = client(&receiver);
    let report = rounds(&api, &vm1(), TENS).await;
    assert!(!report.disks[0].single_points.is_empty(), "{report:?}");
    // Written once, long before the log begins, and never since.
    damage(&files(&place, "pack"), 7);
    let disk = attached(agent, at(60), Answers::Right);
    let status = scrubbed(&api).await;
    assert!(status.sound && status.disks[0].mended.len() == 1, "{status:?}");
    assert!(status.disks[0].mended[0].contains(".pack is damaged at byte"), "{status:?}");
    for lsn in [20, 60] {
        let mount = api.mount(&request(&format!("lsn:{lsn}"), None)).await.unwrap();
        assert_content(&place, &mount, &at(lsn)).await;
    }
    receiver.shutdown().await;
    assert_eq!(disk.await.unwrap(), 1, "it was asked once");
    assert!(fsck(&place.store(), &mut |_| {}).unwrap().sound);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_scrub_goes_on_when_the_receiver_is_started_again_and_holds_one_disk() {
    let place = Place::new();
    let receiver = place.start().await;
    for (number, name, last) in [(1, "vm1", 8), (2, "vm2", 30), (3, "vm3", 8)] {
        let (mut agent, _) = Agent::welcomed(&receiver, hello(number, name)).await;
        agent.first_pass(5).await;
        for lsn in 6..=last {
            agent.send(&write(lsn, (lsn % 50) << 16, content(lsn))).await;
        }
        agent.all_durable().await;
        // When that is answered by the end, the disk is nobody's.
        agent.send(&Message::Close(Closed::new(CloseCode::Bye, "detached"))).await;
        while agent.next().await.is_some() {}
    }
    let api = client(&receiver);
    // The first takes a moment, the second a while.
    let slow = ScrubRequest { name: None, bytes_per_second_max: Some(ByteCount(1 << 18)) };
    let begun = api.scrub(&slow).await.unwrap();
    // Between two disks it reads none.
    let is_in_second =
        |status: ScrubStatus| status.disks.first().is_some_and(|first| status.done_bytes.0 > first.bytes.0);
    while !is_in_second(api.scrub_status().await.unwrap()) {}
    let busy = api.forget(&"vm2".parse().unwrap()).await.unwrap_err();
    assert!(busy.code == ErrorCode::Busy && busy.message.contains("a scrub is reading"), "{busy}");
    api.forget(&"vm3".parse().unwrap()).await.unwrap();
    receiver.shutdown().await;

    let receiver = place.start().await;
    let api = client(&receiver);
    let status = api.scrub_status().await.unwrap();
    assert_eq!((status.started, status.cancelled), (begun.started, false), "{status:?}");
    assert!(status.disks[0].name == Some(vm1()) && status.disks[0].sound, "{status:?}");
    let mut status = status;
    while status.running {
        status = api.scrub_status().await.unwrap();
    }
    let names: Vec<_> = status.disks.iter().map(|disk| disk.name.clone().unwrap().to_string()).collect();
    assert_eq!(names, ["vm1", "vm2"], "one was forgotten: {status:?}");
    assert!(status.sound && status.done_bytes == status.total_bytes, "{status:?}");
    receiver.shutdown().await;
    assert!(fsck(&place.store(), &mut |_| {}).unwrap().sound);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pack_that_cannot_be_opened_keeps_nothing_else_from_being_mended() {
    let place = Place::new();
    let receiver = place.start().await;
    let agent = write_history(&receiver, 6..=60).await;
    let api = client(&receiver);
    rounds(&api, &vm1(), TENS).await;
    damage(&files(&place, "pack"), 7);
    // No image has a chunk of it.
    fs::create_dir(place.store().join("images/packs/0000000000000099.pack")).unwrap();
    let disk = attached(agent, at(60), Answers::Right);
    let status = scrubbed(&api).await;
    assert!(status.sound && status.disks[0].mended.len() == 1, "{status:?}");
    receiver.shutdown().await;
    disk.await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_found_before_an_error_is_told_with_it() {
    let place = Place::new();
    let receiver = place.start().await;
    drop(write_history(&receiver, 6..=60).await);
    let api = client(&receiver);
    rounds(&api, &vm1(), TENS).await;
    damage(&files(&place, "seg"), 60);
    let pack = &files(&place, "pack")[0];
    let bytes = fs::read(pack).unwrap();
    fs::remove_file(pack).unwrap();
    fs::create_dir(pack).unwrap();
    let status = scrubbed(&api).await;
    let found = &status.disks[0];
    assert!(found.error.as_ref().is_some_and(|why| why.contains(".pack")), "{found:?}");
    assert!(found.damage.len() == 1 && found.damage[0].contains(".seg is damaged at byte"), "{found:?}");
    let known = api.points(&vm1()).await.unwrap().damage;
    assert_eq!(known.as_ref(), Some(&found.damage[0]));
    receiver.shutdown().await;
    let checked = fsck(&place.store(), &mut |_| {}).unwrap();
    // The last entry of a log that nobody has open is its end.
    assert!(!checked.disks[0].damage.is_empty() && checked.disks[0].error.is_some(), "{checked:?}");
    fs::remove_dir(pack).unwrap();
    fs::write(pack, bytes).unwrap();
}
