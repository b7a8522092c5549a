//! A state directory that is full when a disk is to be let go of.

use std::sync::Arc;

use backtide_agent_api::ResizeRequest;
use backtide_storage::MemoryStorage;
use backtide_tracking::DirtyBitmap;
use backtide_units::ByteCount;

use super::{
    super::tests::{registry_on, request_for},
    *,
};

#[tokio::test]
async fn a_disk_is_not_let_go_of_when_what_is_kept_of_it_has_no_room() {
    let directory = tempfile::tempdir().unwrap();
    let storage = MemoryStorage::new();
    let registry = registry_on(directory.path(), Arc::new(storage.clone()));
    let image = directory.path().join("vm1.img");
    std::fs::File::create(&image).unwrap().set_len(1 << 20).unwrap();
    let before = registry.attach(request_for(&image)).await.unwrap();
    let (name, files) = (before.name.clone(), storage.files().len());
    let missing = DirtyBitmap::of((0..1 << 18).into());
    // Every other block, which no run makes short.
    let mut scattered = DirtyBitmap::new();
    for block in (0..1 << 18).step_by(2) {
        scattered.insert((block..block + 1).into());
    }
    let needed = registry.records.room_for(&name, Some(&missing));
    storage.set_capacity(Some(ByteCount(storage.used().0 + needed.0)));
    registry.require_room(&name, Some(&missing)).await.unwrap();
    let full = registry.require_room(&name, Some(&scattered)).await.unwrap_err();
    assert_eq!(full.code, ErrorCode::Refused, "{full}");
    assert!(full.message.starts_with("what is kept of disk vm1 cannot be written in the state directory"));
    assert_eq!(storage.files().len(), files, "nothing stays of it");

    storage.set_capacity(Some(storage.used()));
    let request = ResizeRequest { size: Some(ByteCount(2 << 20)), reconnect: false };
    let refused = registry.resize(&name, request).await.unwrap_err();
    assert_eq!((refused.code, refused.message), (full.code, full.message));
    assert_eq!(std::fs::metadata(&image).unwrap().len(), 1 << 20, "nothing has changed");
    let now = registry.find(&name).await.unwrap().1.status().await.unwrap();
    assert_eq!((now.epoch, now.size), (before.epoch, before.size), "it was served all the time");
    storage.set_capacity(None);
    assert_eq!(registry.resize(&name, request).await.unwrap().disk.size, ByteCount(2 << 20));
    registry.shut_down().await;
}
