//! Mounts that somebody has open are not taken from him by mistake.

use backtide_export::Client;
use backtide_log_receiver::{Config, Receiver};
use backtide_receiver_api::{ErrorCode, Mount, MountRequest, OverlayFate, RemountRequest};
use backtide_units::{ByteCount, ByteOffset};

use crate::{agent::*, fixture::*, going_back::request};

const KEEP: Option<OverlayFate> = Some(OverlayFate::Keep);
const DISCARD: Option<OverlayFate> = Some(OverlayFate::Discard);

fn writable() -> MountRequest {
    MountRequest { writable: true, ..request("latest", None) }
}

async fn connected(mount: &Mount) -> Client {
    Client::connect(&mount.uri.parse().unwrap()).await.unwrap()
}

/// Writes a block and has it made durable; whether that was done.
async fn write(client: &Client, at: u64, byte: u8) -> bool {
    client.write(ByteOffset(at), vec![byte; 4096].into(), true).await.is_ok()
}

async fn first_byte(client: &Client, at: u64) -> u8 {
    client.read(ByteOffset(at), ByteCount(512)).await.unwrap()[0]
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_written_is_taken_from_who_writes_it_only_by_force() {
    let place = Place::new();
    let receiver = place.start().await;
    let (mut agent, _) = Agent::welcomed(&receiver, hello(1, "vm1")).await;
    agent.first_pass(5).await;
    let api = client(&receiver);
    let mount = api.mount(&writable()).await.unwrap();
    let id = mount.id.as_str();
    let guest = connected(&mount).await;
    assert!(write(&guest, 0, 1).await);
    for (fate, way_out) in [(KEEP, "--keep --force"), (DISCARD, "--discard --force")] {
        let refused = api.unmount(id, fate).await.unwrap_err();
        assert_eq!(refused.code, ErrorCode::Busy, "{refused}");
        assert_eq!(refused.message, format!("mount {id} is in use: an NBD client has it open"));
        assert!(refused.hint.unwrap().contains(&format!("backtide unmount {id} {way_out}")));
    }
    // It does not say either what is to become of what was written.
    assert_eq!(api.unmount_by_force(id, None).await.unwrap_err().code, ErrorCode::Usage);
    assert!(write(&guest, 8192, 2).await, "nothing has changed for it");
    let other = connected(&mount).await;
    let refused = api.unmount(id, KEEP).await.unwrap_err();
    assert!(refused.message.contains("2 NBD connections have it open"), "{refused}");
    drop((guest, other));
    // Who has gone is in nobody's way, however lately.
    api.unmount(id, KEEP).await.unwrap();

    let again = api.remount(id, &RemountRequest::default()).await.unwrap();
    let guest = connected(&again).await;
    assert_eq!((first_byte(&guest, 0).await, first_byte(&guest, 8192).await), (1, 2));
    assert!(write(&guest, 0, 3).await);
    api.unmount_by_force(id, KEEP).await.unwrap();
    assert!(!write(&guest, 0, 4).await, "it was taken from it");
    let again = api.remount(id, &RemountRequest::default()).await.unwrap();
    let guest = connected(&again).await;
    assert_eq!(first_byte(&guest, 0).await, 3, "what it had written stays");
    api.unmount_by_force(id, DISCARD).await.unwrap();
    assert!(guest.flush().await.is_err());
    let left = api.mounts().await.unwrap();
    assert!(left.mounts.is_empty() && left.kept.is_empty(), "{left:?}");
    receiver.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_reads_a_mount_keeps_it_too_and_a_command_ends_its_own() {
    let place = Place::new();
    let shared = place.path("all.sock");
    let config =
        Config { nbd_listen: Some(format!("nbd+unix:///?socket={}", shared.display())), ..place.config() };
    let receiver = Receiver::start(config).await.unwrap();
    let (mut agent, _) = Agent::welcomed(&receiver, hello(1, "vm1")).await;
    agent.first_pass(5).await;
    let api = client(&receiver);
    let mount = api.mount(&request("latest", None)).await.unwrap();
    // By the socket of all mounts, from which its own takes it.
    let uri = format!("nbd+unix:///{}?socket={}", mount.id, shared.display());
    let reader = Client::connect(&uri.parse().unwrap()).await.unwrap();
    let refused = api.unmount(&mount.id, None).await.unwrap_err();
    assert_eq!(refused.code, ErrorCode::Busy, "{refused}");
    assert!(refused.hint.unwrap().contains(&format!("backtide unmount {} --force", mount.id)));
    reader.read(ByteOffset::ZERO, ByteCount(512)).await.unwrap();
    api.unmount_by_force(&mount.id, None).await.unwrap();
    assert!(reader.read(ByteOffset::ZERO, ByteCount(512)).await.is_err());

    let own = api.mount(&MountRequest { temporary: true, ..request("latest", None) }).await.unwrap();
    let _reader = connected(&own).await;
    api.unmount(&own.id, None).await.unwrap();
    receiver.shutdown().await;
}
