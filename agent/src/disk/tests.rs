//! A disk on its thread, with a guest at its socket and no receiver.

use std::{path::Path, rc::Rc, sync::Arc, time::Duration};

use backtide_export::{Client, Directory, NbdAddress, NbdUri};
use backtide_io_filter::{Change, IoFailure, LocalData, LocalOp, MarkError, Settings};
use backtide_socket::Sockets;
use backtide_storage::RealStorage;
use backtide_units::{ByteCount, ByteOffset, ByteRange, HistoryId};
use rustix::fs::FlockOperation;
use tokio::{
    sync::oneshot,
    task::{JoinSet, LocalSet},
    time::Instant,
};
use uuid::Uuid;

use super::{Command, DetachError, DiskHandle, Entrance, InPlace, Leaving, nbd_disk::NbdDisk, open, start};
use crate::{
    claims::Identity,
    record::{DiskRecord, ImageStamp, Records},
};

/// A disk that was started in a test's directory.
pub(crate) struct Started {
    pub(crate) handle: DiskHandle,
    nbd: NbdUri,
    /// Its listening socket lives as long as they do.
    sockets: Sockets,
}

impl Started {
    /// Over a raw image of 1 MiB.
    pub(crate) async fn image(directory: &Path) -> Self {
        Self::image_of(directory, |record| record).await
    }

    /// The same with another record.
    async fn image_of(directory: &Path, change: impl FnOnce(DiskRecord) -> DiskRecord) -> Self {
        Self::kept_in(records(directory), directory, change, |_| {}).await
    }

    /// The same with its records elsewhere, and other settings.
    pub(super) async fn kept_in(
        records: Records,
        directory: &Path,
        change: impl FnOnce(DiskRecord) -> DiskRecord,
        set: impl FnOnce(&mut Settings),
    ) -> Self {
        let image = directory.join("vm1.img");
        // Another start goes on with the same content.
        let file = std::fs::File::options().write(true).create(true).truncate(false).open(&image).unwrap();
        file.set_len(1 << 20).unwrap();
        let behind = image.display().to_string();
        let receiver = backtide_control::Address::unix(directory.join("nobody.sock"));
        let record = change(DiskRecord::new("vm1".parse().unwrap(), behind.clone(), receiver));
        let sources: Arc<dyn crate::disk::source::Sources> = Arc::new(crate::disk::source::Remote);
        let (_, mut opened) =
            open(&records, record, &behind, ImageStamp::of(&image), &sources).await.unwrap();
        set(&mut opened.settings);
        opened.in_place = InPlace::new(&behind, Identity::of(&behind), ByteCount(1 << 20));
        let address = NbdAddress::Unix(directory.join("vm1.nbd"));
        let nbd = NbdUri { address, export: "vm1".to_owned(), tls: None };
        let sockets = Sockets::default();
        let (nbd_uri, kept, shared) = (nbd.clone(), sockets.clone(), Directory::new(""));
        let entrance = Entrance { nbd: nbd_uri, sockets: kept, shared };
        let handle = start(opened, records, entrance).await.unwrap();
        Self { handle, nbd, sockets }
    }

    /// Where it is served.
    pub(crate) fn uri(&self) -> String {
        self.nbd.to_string()
    }

    /// A guest.
    pub(super) async fn guest(&self) -> Client {
        Client::connect(&self.nbd).await.unwrap()
    }

    /// Waits until it has looked at its image just now: the next time is a second away.
    async fn has_looked(&self, directory: &Path) {
        let (image, away) = (directory.join("vm1.img"), directory.join("away.img"));
        for (from, to) in [(&image, &away), (&away, &image)] {
            std::fs::rename(from, to).unwrap();
            while self.handle.status().await.unwrap().local_error.is_some() != (to == &away) {
                tokio::task::yield_now().await;
            }
        }
    }

    pub(super) async fn end(&self) {
        let detach = |answer| Command::Detach { leaving: Leaving::Stopped, answer };
        self.handle.ask_at_length(detach).await.unwrap().unwrap();
        self.sockets.forget("disk-vm1");
    }
}

fn records(directory: &Path) -> Records {
    Records::new(Arc::new(RealStorage::open(&directory.join("records")).unwrap()))
}

#[tokio::test]
async fn a_flush_that_failed_before_a_detach_is_kept_until_a_guest_was_told() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let owes = || records(directory).load(&"vm1".parse().unwrap()).unwrap().unwrap().flush_failed;
    let owing = |record| DiskRecord { flush_failed: true, ..record };
    let disk = Started::image_of(directory, owing).await;
    assert!(disk.handle.ask(Command::Flush).await.unwrap(), "this one did not fail");
    disk.end().await;
    assert!(owes(), "no guest flushed");
    let disk = Started::image_of(directory, owing).await;
    let guest = Client::connect(&disk.nbd).await.unwrap();
    guest.flush().await.unwrap_err();
    guest.flush().await.unwrap();
    drop(guest);
    disk.end().await;
    assert!(!owes());
}

#[tokio::test]
async fn an_image_that_is_not_in_its_place_is_noted_and_nothing_is_believed_of_what_is_there() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let (image, kept) = (directory.join("vm1.img"), directory.join("kept.img"));
    let disk = Started::image(directory).await;
    let name = "vm1".parse().unwrap();
    let record = || records(directory).load(&name).unwrap().unwrap();
    let until = async |displaced: bool| {
        let told = async {
            while disk.handle.status().await.unwrap().local_error.is_some() != displaced {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), told).await.expect("it is looked at each second");
    };
    // What is there now tells no time, as a device does.
    let displace = || {
        std::fs::rename(&image, &kept).unwrap();
        std::os::unix::fs::symlink("/dev/null", &image).unwrap();
    };
    displace();
    until(true).await;
    assert!(record().image_displaced, "also should the agent die now");
    std::fs::rename(&kept, &image).unwrap();
    until(false).await;
    assert!(!record().image_displaced);
    displace();
    disk.end().await;
    assert!(record().image_displaced && record().image_at_detach.is_none());
    assert!(records(directory).load_tracking(&name).unwrap().unwrap().snapshot.everything);
}

#[tokio::test]
async fn that_a_qemu_had_the_image_itself_open_is_remembered_until_everything_was_compared() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let disk = Started::image(directory).await;
    let name = "vm1".parse().unwrap();
    let record = || records(directory).load(&name).unwrap().unwrap();
    let until = async |told: &str| {
        let told = async {
            while !disk.handle.status().await.unwrap().local_error.is_some_and(|error| error.contains(told)) {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), told).await.expect("it is looked at each second");
    };
    assert!(!record().written_past_agent);
    // A lock of the whole file is one of the byte that says who may write it.
    let qemu = std::fs::File::open(directory.join("vm1.img")).unwrap();
    let lock = |operation| rustix::fs::fcntl_lock(&qemu, operation).unwrap();
    lock(FlockOperation::NonBlockingLockShared);
    until("a QEMU has the image itself open").await;
    disk.handle.ask(Command::Pause).await.unwrap();
    assert!(record().written_past_agent, "also should the agent die now");
    lock(FlockOperation::Unlock);
    until("somebody else has written the image").await;
    // There is no receiver.
    assert!(disk.handle.status().await.unwrap().resync_due && record().written_past_agent);
    disk.end().await;
    assert!(record().written_past_agent);
    // It has been in sync once: what is lacked is a hole.
    let known = |record| DiskRecord { history: Some(HistoryId(Uuid::from_u128(5))), ..record };
    let disk = Started::image_of(directory, |_| DiskRecord { paused: false, ..known(record()) }).await;
    let status = disk.handle.status().await.unwrap();
    assert!(status.local_error.is_some_and(|told| told.contains("which happens by itself")));
    let refused = crate::marks::mark("here", &[(name.clone(), disk.handle.clone())]).await.unwrap_err();
    assert_eq!(
        refused.to_string(),
        "disk vm1 does not forward its writes now (written past the agent): this moment will not be recoverable"
    );
    disk.end().await;
    assert!(record().written_past_agent);
    assert!(records(directory).load_tracking(&name).unwrap().unwrap().snapshot.everything);
}

#[tokio::test]
async fn a_qemu_is_looked_for_once_more_at_the_detach() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let disk = Started::image(directory).await;
    let qemu = std::fs::File::open(directory.join("vm1.img")).unwrap();
    disk.has_looked(directory).await;
    rustix::fs::fcntl_lock(&qemu, FlockOperation::NonBlockingLockShared).unwrap();
    let detach = |answer| Command::Detach { leaving: Leaving::Asked { nobody_returns: false }, answer };
    let last = disk.handle.ask_at_length(detach).await.unwrap().unwrap();
    let record = records(directory).load(&"vm1".parse().unwrap()).unwrap().unwrap();
    assert!(record.written_past_agent && last.local_error.is_some() && last.resync_due);
}

#[tokio::test]
async fn what_is_written_to_the_image_of_an_idle_disk_is_not_trusted_after_a_detach() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let record = || records(directory).load(&"vm1".parse().unwrap()).unwrap().unwrap();
    let disk = Started::image(directory).await;
    disk.has_looked(directory).await;
    let guest = Client::connect(&disk.nbd).await.unwrap();
    guest.write(ByteOffset::ZERO, vec![0x11; 4096].into(), false).await.unwrap();
    drop(guest);
    // Of one that was there to the end it would be expected that it comes back.
    while disk.handle.status().await.unwrap().clients > 0 {
        tokio::task::yield_now().await;
    }
    disk.end().await;
    assert!(!record().written_past_agent && record().image_at_detach.is_some(), "that was its guest");
    let disk = Started::image_of(directory, |_| record()).await;
    disk.has_looked(directory).await;
    let image = std::fs::File::options().write(true).open(directory.join("vm1.img")).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&image, &[0x22; 4096], 8192).unwrap();
    let detach = |answer| Command::Detach { leaving: Leaving::Asked { nobody_returns: false }, answer };
    let last = disk.handle.ask_at_length(detach).await.unwrap().unwrap();
    assert!(last.local_error.is_some_and(|told| told.contains("somebody else has written the image")));
    assert!(last.resync_due && record().written_past_agent);
    assert!(records(directory).load_tracking(&record().name).unwrap().unwrap().snapshot.everything);
}

/// A receiver may have admitted one of them, and its answer was lost: to the next attach that one is no stranger.
#[tokio::test]
async fn attaches_that_heard_of_no_receiver_are_remembered_with_the_last_that_did() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let record = || records(directory).load(&"vm1".parse().unwrap()).unwrap().unwrap();
    let known = |ids: Vec<u128>| Some(ids.into_iter().map(Uuid::from_u128).collect());
    let disk = Started::image_of(directory, |record| DiskRecord { attaches: known(vec![7]), ..record }).await;
    let first = record().attaches.unwrap();
    assert_eq!((first.len(), first[0]), (2, Uuid::from_u128(7)), "it is durable before anybody hears of it");
    disk.end().await;
    assert_eq!(record().attaches.as_ref(), Some(&first), "nobody has admitted it");
    let disk = Started::image_of(directory, |_| record()).await;
    let second = record().attaches.unwrap();
    assert_eq!((second.len(), &second[..2]), (3, &first[..]));
    disk.end().await;
    let many = DiskRecord { attaches: known((0..64).collect()), ..record() };
    let disk = Started::image_of(directory, |_| many).await;
    let last = record().attaches.unwrap();
    assert_eq!(
        (last.len(), &last[..2]),
        (64, &[0, 2].map(Uuid::from_u128)[..]),
        "never the one that was heard of"
    );
    disk.end().await;
}

#[tokio::test]
async fn a_record_that_cannot_be_saved_is_told() {
    let directory = tempfile::tempdir().unwrap();
    let (records, away) = (directory.path().join("records"), directory.path().join("away"));
    let disk = Started::image(directory.path()).await;
    std::fs::rename(&records, &away).unwrap();
    let status = disk.handle.ask(Command::Pause).await.unwrap();
    let told = status.unsaved.expect("nothing can be saved");
    assert!(
        told.starts_with(&format!("cannot save the disk's record in {}/: ", records.display())),
        "{told}"
    );
    std::fs::rename(&away, &records).unwrap();
    // It is tried again, without being asked.
    while disk.handle.status().await.unwrap().local_error.is_some() {
        tokio::task::yield_now().await;
    }
    let saved = self::records(directory.path()).load(&"vm1".parse().unwrap()).unwrap().unwrap();
    assert!(saved.paused, "also should the agent die now");
    assert_eq!(disk.handle.ask(Command::Resume).await.unwrap().local_error, None);
    disk.end().await;
}

#[tokio::test]
async fn what_could_not_be_saved_is_not_told_for_ever_though_nothing_is_left_to_save() {
    let directory = tempfile::tempdir().unwrap();
    let (records, away) = (directory.path().join("records"), directory.path().join("away"));
    let disk = Started::image(directory.path()).await;
    std::fs::rename(&records, &away).unwrap();
    assert!(disk.handle.ask(Command::Pause).await.unwrap().unsaved.is_some());
    // As it is saved.
    assert!(disk.handle.ask(Command::Resume).await.unwrap().unsaved.is_some(), "nothing can be");
    std::fs::rename(&away, &records).unwrap();
    while disk.handle.status().await.unwrap().unsaved.is_some() {
        tokio::task::yield_now().await;
    }
    disk.end().await;
}

#[tokio::test]
async fn a_detach_that_saves_everything_tells_nothing_of_what_could_not_be_saved_before() {
    let directory = tempfile::tempdir().unwrap();
    let (records, away) = (directory.path().join("records"), directory.path().join("away"));
    let disk = Started::image(directory.path()).await;
    disk.has_looked(directory.path()).await;
    std::fs::rename(&records, &away).unwrap();
    assert!(disk.handle.ask(Command::Pause).await.unwrap().local_error.is_some());
    std::fs::rename(&away, &records).unwrap();
    let detach = |answer| Command::Detach { leaving: Leaving::Stopped, answer };
    let last = disk.handle.ask_at_length(detach).await.unwrap().unwrap();
    assert_eq!((last.unsaved, last.local_error), (None, None));
}

#[tokio::test]
async fn a_hold_that_nobody_releases_ends_by_itself_and_a_late_mark_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let disk = Started::image(directory.path()).await;
    let guest = Client::connect(&disk.nbd).await.unwrap();
    disk.handle.ask(Command::Hold).await.unwrap();
    // Its answer is held; nobody will ask for it to be given.
    guest.write(ByteOffset::ZERO, vec![0x11; 4096].into(), false).await.unwrap();
    let late = disk.handle.ask(|answer| Command::Mark("late".into(), answer)).await.unwrap();
    assert!(matches!(late, Err(MarkError::HeldTooLong { .. })), "{late:?}");
    let read = guest.read(ByteOffset::ZERO, ByteCount(4096)).await.unwrap();
    assert!(read.iter().all(|&byte| byte == 0x11));
}

#[tokio::test]
async fn a_hold_whose_asker_is_gone_holds_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let disk = Started::image(directory.path()).await;
    let guest = Client::connect(&disk.nbd).await.unwrap();
    let (answer, answered) = oneshot::channel();
    drop(answered);
    disk.handle.send(Command::Hold(answer)).await;
    // Not a second later: the disk holds nothing when it comes to the mark.
    let mark = disk.handle.ask(|answer| Command::Mark("here".into(), answer)).await.unwrap();
    assert!(matches!(mark, Err(MarkError::HeldTooLong { .. })), "{mark:?}");
    guest.write(ByteOffset::ZERO, vec![0x22; 4096].into(), false).await.unwrap();
}

#[tokio::test]
async fn requests_of_a_lost_nbd_disk_fail_together_and_it_recovers() {
    let directory = tempfile::tempdir().unwrap();
    let tasks = LocalSet::new();
    tasks
        .run_until(async {
            let server = Started::image(directory.path()).await;
            let behind = Rc::new(NbdDisk::connect(server.nbd.clone(), ByteCount(1 << 20)).await.unwrap());
            server.end().await;
            tokio::time::pause();
            let began = Instant::now();
            let mut waiting = JoinSet::new();
            for _ in 0..8 {
                let behind = Rc::clone(&behind);
                waiting.spawn_local(async move { read(&behind).await });
            }
            for result in waiting.join_all().await {
                assert_eq!(result, Err(IoFailure { errno: 5 }));
            }
            let outage = began.elapsed();
            assert!((10..12).contains(&outage.as_secs()), "one deadline for all of them, not {outage:?}");
            assert!(behind.trouble().is_some());
            // It is known to be away: nobody waits for it again.
            assert_eq!(read(&behind).await, Err(IoFailure { errno: 5 }));
            assert!(began.elapsed() - outage < Duration::from_secs(1));
            tokio::time::resume();
            let _server = Started::image(directory.path()).await;
            while behind.trouble().is_some() {
                tokio::task::yield_now().await;
            }
            assert!(matches!(read(&behind).await, Ok(LocalData::Read(_))));
        })
        .await;
}

#[tokio::test]
async fn an_nbd_disk_is_flushed_before_anybody_relies_on_it() {
    let directory = tempfile::tempdir().unwrap();
    let server = Started::image(directory.path()).await;
    let guest = Client::connect(&server.nbd).await.unwrap();
    // An agent wrote this and died: it is in nobody's memory but the server's.
    guest.write(ByteOffset::ZERO, vec![0x11; 4096].into(), false).await.unwrap();
    let flushes = || async { server.handle.status().await.unwrap().counters.flushes };
    assert_eq!(flushes().await, 0);
    let tasks = LocalSet::new();
    let connected = tasks.run_until(NbdDisk::connect(server.nbd.clone(), ByteCount(1 << 20))).await;
    connected.unwrap();
    assert_eq!(flushes().await, 1);
}

#[tokio::test]
async fn what_was_stable_at_once_is_not_undone_by_what_is_made_again() {
    let directory = tempfile::tempdir().unwrap();
    let tasks = LocalSet::new();
    tasks
        .run_until(async {
            let server = Started::image(directory.path()).await;
            let behind = NbdDisk::connect(server.nbd.clone(), ByteCount(1 << 20)).await.unwrap();
            // Nothing flushes the first, so a new server is given it again; the second lies above it.
            for (pattern, fua) in [(0x11, false), (0x22, true)] {
                let range = ByteRange::between(ByteOffset::ZERO, ByteOffset(4096));
                let change = Change::Write { range, data: vec![pattern; 4096].into(), fua };
                behind.run(LocalOp::Change(change)).await.unwrap();
            }
            server.end().await;
            // A request finds out that the server has gone, and may fail when this machine is slow.
            let (_, _server) = tokio::join!(read(&behind), Started::image(directory.path()));
            while behind.trouble().is_some() {
                tokio::task::yield_now().await;
            }
            assert_eq!(read(&behind).await, Ok(LocalData::Read(vec![0x22; 4096].into())));
        })
        .await;
}

async fn read(behind: &NbdDisk) -> Result<LocalData, IoFailure> {
    behind.run(LocalOp::Read(ByteRange::between(ByteOffset::ZERO, ByteOffset(4096)))).await
}

#[tokio::test]
async fn a_disk_that_a_client_opens_as_it_is_about_to_be_taken_stays() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let disk = Started::image(directory).await;
    let guest = Client::connect(&disk.nbd).await.unwrap();
    for leaving in [
        Leaving::Asked { nobody_returns: false },
        Leaving::Asked { nobody_returns: true },
        Leaving::Resized { reconnect: false },
        Leaving::SetBack { clients_max: Some(0) },
    ] {
        let detach = |answer| Command::Detach { leaving, answer };
        let open = disk.handle.ask_at_length(detach).await.unwrap().unwrap_err();
        assert!(matches!(open, DetachError::Open { clients: 1, awaited: 0, .. }), "{leaving:?}: {open}");
        guest.write(ByteOffset::ZERO, vec![0x11; 4096].into(), false).await.unwrap();
    }
    let second = Client::connect(&disk.nbd).await.unwrap();
    let set_back =
        |clients_max| move |answer| Command::Detach { leaving: Leaving::SetBack { clients_max }, answer };
    let open = disk.handle.ask_at_length(set_back(Some(1))).await.unwrap().unwrap_err();
    assert!(matches!(open, DetachError::Open { clients: 2, awaited: 0, .. }), "{open}");
    drop(second);
    while disk.handle.status().await.unwrap().clients > 1 {
        tokio::task::yield_now().await;
    }
    let detach = set_back(Some(1));
    disk.handle.ask_at_length(detach).await.unwrap().unwrap();
    let record = records(directory).load(&"vm1".parse().unwrap()).unwrap().unwrap();
    assert_eq!(record.clientele.left().count(), 1, "it comes back");
    disk.sockets.forget("disk-vm1");
    // Who had it open is expected, until somebody knows better.
    let disk = Started::image_of(directory, |_| record).await;
    let asked =
        |nobody_returns| move |answer| Command::Detach { leaving: Leaving::Asked { nobody_returns }, answer };
    let open = disk.handle.ask_at_length(asked(false)).await.unwrap().unwrap_err();
    assert!(matches!(open, DetachError::Open { clients: 0, awaited: 1, .. }), "{open}");
    disk.handle.ask_at_length(asked(true)).await.unwrap().unwrap();
}
