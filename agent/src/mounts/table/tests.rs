//! Mounts that can be written, over storage whose power fails, at points in memory.

use std::path::Path;

use backtide_agent_api::{AgentOverlayFate, AgentUnmountRequest};
use backtide_export::Client;
use backtide_hydration::SourcePoint;
use backtide_storage::MemoryStorage;
use backtide_units::{ByteOffset, DiskId, HistoryId, Lsn};
use bytes::Bytes;
use tokio::task::LocalSet;

use super::*;
use crate::{
    config::MountLimits,
    disk::source::{Fetching, fake::FakeSource},
};

const PLAIN: AgentUnmountRequest = AgentUnmountRequest { overlay: None, force: false };
const KEEP: AgentUnmountRequest = AgentUnmountRequest { overlay: Some(AgentOverlayFate::Keep), force: false };
const DISCARD: AgentUnmountRequest =
    AgentUnmountRequest { overlay: Some(AgentOverlayFate::Discard), force: false };

fn by_force(how: AgentUnmountRequest) -> AgentUnmountRequest {
    AgentUnmountRequest { force: true, ..how }
}

/// Its last block is a short one.
const SIZE: usize = 16 * 4096 + 512;

/// Every point holds the same.
struct Points;

thread_local! {
    /// The point that was opened last.
    static LAST: RefCell<Option<Rc<FakeSource>>> = const { RefCell::new(None) };
}

fn point() -> Rc<dyn PointSource> {
    let source = Rc::new(FakeSource::new(below()));
    LAST.set(Some(Rc::clone(&source)));
    source
}

fn below() -> Vec<u8> {
    (0..SIZE).map(|at| (at / 512) as u8 | 0x80).collect()
}

impl Sources for Points {
    fn open(&self, _point: SourcePoint, _dialer: Dialer) -> Rc<dyn PointSource> {
        point()
    }

    fn find(
        &self,
        _dialer: Dialer,
        _disk: DiskId,
        _history: Option<HistoryId>,
        _lsn: Option<Lsn>,
    ) -> Fetching<'static, Rc<dyn PointSource>> {
        Box::pin(async { Ok(point()) })
    }
}

fn table_with(storage: &MemoryStorage, run: &Path, limits: &MountLimits) -> Rc<Table> {
    let storage: Arc<dyn backtide_storage::Storage> = Arc::new(storage.clone());
    Table::new(Serving {
        records: MountRecords::new(Arc::clone(&storage)),
        overlays: Overlays::load(storage, limits).unwrap(),
        overlays_max: limits.overlays,
        run: run.to_owned(),
        nbd: Limits::default(),
        nbd_rule: NbdRule::default(),
        sources: Arc::new(Points),
    })
}

fn table(storage: &MemoryStorage, run: &Path) -> Rc<Table> {
    table_with(storage, run, &MountLimits::default())
}

/// What an agent does that is started after another one.
async fn started(storage: &MemoryStorage, run: &Path) -> Rc<Table> {
    let table = table(storage, run);
    for record in table.serving.records.load_all().unwrap() {
        match record.ended {
            true => table.give_up(&table.source_of(&record), record).await,
            false => Rc::clone(&table).serve_again(record).await,
        }
    }
    table
}

fn wanted(writable: bool) -> Wanted {
    Wanted {
        disk: DiskId::random(),
        lsn: Lsn(40),
        receiver: "unix:/run/stream.sock".parse().unwrap(),
        stream_tls: None,
        changed_since: None,
        nbd: None,
        cache_bytes: None,
        writable,
    }
}

fn local(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    LocalSet::new().block_on(&runtime.unwrap(), test);
}

async fn client(mount: &AgentMount) -> Client {
    Client::connect(&mount.uri.parse().unwrap()).await.unwrap()
}

/// What a mount may hold, oldest first: what was flushed last, and every change since.
struct Possible(Vec<Vec<u8>>);

impl Possible {
    /// Writes, and flushes; says whether the flush was answered.
    async fn write(&mut self, client: &Client, at: usize, length: usize, byte: u8) -> bool {
        let mut image = self.0.last().unwrap().clone();
        image[at..at + length].fill(byte);
        self.0.push(image);
        let offset = ByteOffset(at as u64);
        let (fua, data) = (at == 0, Bytes::from(vec![byte; length]));
        let written = client.write(offset, data, fua).await.is_ok();
        // What is forced needs no flush.
        let durable = written && (fua || client.flush().await.is_ok());
        if durable {
            self.0.drain(..self.0.len() - 1);
        }
        durable
    }

    async fn check(&self, mount: &AgentMount, story: &str) {
        let found = client(mount).await.read(ByteOffset::ZERO, ByteCount(SIZE as u64)).await.unwrap();
        assert!(self.0.iter().any(|image| *image == found), "{story}: none of {} images", self.0.len());
    }
}

/// How far a story of one mount came: what was answered last.
#[derive(Debug, PartialEq, Eq)]
enum Answered {
    Nothing,
    Mounted,
    Kept,
    /// And perhaps discarded.
    MountedAgain,
    Discarded,
}

async fn life(table: &Rc<Table>, possible: &mut Possible) -> Answered {
    let Ok(mount) = table.mount(wanted(true)).await else { return Answered::Nothing };
    let guest = client(&mount).await;
    // Whole blocks, a part of one, parts of two, the first part of one, and the short one at the end.
    let writes = [(0, 8192, 1), (5120, 512, 2), (19_968, 1024, 3), (40_960, 512, 6), (SIZE - 512, 512, 4)];
    for (at, length, byte) in writes {
        if !possible.write(&guest, at, length, byte).await {
            return Answered::Mounted;
        }
    }
    drop(guest);
    if table.unmount(&mount.id, KEEP).await.is_err() {
        return Answered::Mounted;
    }
    let Ok(mount) = table.remount(&mount.id, None).await else { return Answered::Kept };
    if !possible.write(&client(&mount).await, 30_208, 7168, 5).await {
        return Answered::MountedAgain;
    }
    match table.unmount(&mount.id, DISCARD).await {
        Ok(_) => Answered::Discarded,
        Err(_) => Answered::MountedAgain,
    }
}

/// Cuts the power at a step; whether there was such a step.
async fn cut_at(cut: u64, run: &Path) -> bool {
    let story = format!("cut {cut}");
    let storage = MemoryStorage::new();
    let mut possible = Possible(vec![below()]);
    let before = table(&storage, run);
    storage.cut_power_after(cut);
    let answered = life(&before, &mut possible).await;
    let was_off = storage.is_off();
    drop(before);
    storage.crash(cut);
    let after = started(&storage, run).await;
    let AgentMounts { mounts, kept } = after.list().await;
    let count = mounts.len() + kept.len();
    match answered {
        Answered::Discarded => assert_eq!(count, 0, "{story}"),
        // It was begun, or is being discarded, and nobody was told.
        Answered::Nothing | Answered::MountedAgain => assert!(count < 2, "{story}"),
        Answered::Mounted | Answered::Kept => assert_eq!(count, 1, "{story}"),
    }
    let mut all = mounts;
    for kept in kept {
        assert_ne!(answered, Answered::Nothing, "{story}: {kept:?}");
        all.push(after.remount(&kept.id, None).await.unwrap());
    }
    for mount in all {
        assert_eq!(mount.last_error, None, "{story}");
        possible.check(&mount, &story).await;
        after.unmount(&mount.id, DISCARD).await.unwrap();
    }
    assert_eq!(after.list().await, AgentMounts::default(), "{story}");
    // Records that have ended go when the receiver has been told, by this agent or the next.
    started(&storage, run).await;
    let left: Vec<_> = storage.files().into_iter().map(|(path, _)| path).collect();
    assert!(left.is_empty(), "{story}: {left:?}");
    was_off
}

#[test]
fn a_power_cut_at_any_step_leaves_what_was_flushed_and_nothing_of_what_was_discarded() {
    let directory = tempfile::tempdir().unwrap();
    local(async {
        let mut cut = 0;
        while cut_at(cut, directory.path()).await {
            cut += 1;
        }
        assert!(cut > 50, "the story has {cut} places to cut");
    });
}

#[test]
fn what_becomes_of_an_overlay_is_said_when_its_mount_ends_and_only_then() {
    let directory = tempfile::tempdir().unwrap();
    local(async {
        let storage = MemoryStorage::new();
        let overlay_bytes = ByteCount(8192);
        let limits = MountLimits { overlays: 2, overlay_bytes, ..MountLimits::default() };
        let table = table_with(&storage, directory.path(), &limits);
        let mount = table.mount(wanted(true)).await.unwrap();
        assert_eq!(mount.overlay.unwrap().limit, overlay_bytes);
        let (guest, mut possible) = (client(&mount).await, Possible(vec![below()]));
        assert!(possible.write(&guest, 0, 8192, 1).await);
        let full = guest.write(ByteOffset(8192), Bytes::from(vec![1; 512]), false).await.unwrap_err();
        assert!(full.to_string().contains("no space"), "{full}");
        // What was written before can still be written.
        assert!(possible.write(&guest, 512, 512, 2).await);
        possible.check(&mount, "full").await;
        drop(guest);
        let code = |result: Result<AgentMount, ApiError>| result.unwrap_err().code;
        assert_eq!(code(table.unmount(&mount.id, PLAIN).await), ErrorCode::Usage);
        let plain = table.mount(wanted(false)).await.unwrap();
        assert_eq!(plain.overlay, None);
        assert_eq!(code(table.unmount(&plain.id, KEEP).await), ErrorCode::Usage);
        assert_eq!(code(table.remount(&plain.id, None).await), ErrorCode::NotFound);
        assert_eq!(table.discard(&plain.id).await.unwrap_err().code, ErrorCode::NotFound);
        assert_eq!(code(table.remount(&mount.id, None).await), ErrorCode::Busy);
        assert_eq!(table.discard(&mount.id).await.unwrap_err().code, ErrorCode::Busy);
        table.unmount(&plain.id, PLAIN).await.unwrap();

        table.unmount(&mount.id, KEEP).await.unwrap();
        assert_eq!(code(table.unmount(&mount.id, KEEP).await), ErrorCode::NotFound, "it is kept already");
        // What is kept counts.
        let other = table.mount(wanted(true)).await.unwrap();
        assert_eq!(code(table.mount(wanted(true)).await), ErrorCode::Busy);
        let listed = table.list().await;
        assert_eq!((listed.mounts.len(), listed.kept.len()), (1, 1));
        assert!(listed.kept[0].file_bytes > ByteCount(4096), "{listed:?}");
        assert_eq!(table.discard(&mount.id).await.unwrap().id, mount.id);
        assert_eq!(code(table.remount(&mount.id, None).await), ErrorCode::NotFound);
        table.unmount(&other.id, DISCARD).await.unwrap();
        assert_eq!(code(table.unmount(&other.id, DISCARD).await), ErrorCode::NotFound);
        assert_eq!(table.list().await, AgentMounts::default());
    });
}

#[test]
fn a_damaged_overlay_is_told_and_can_be_discarded() {
    let directory = tempfile::tempdir().unwrap();
    local(async {
        let storage = MemoryStorage::new();
        let first = table(&storage, directory.path());
        let mount = first.mount(wanted(true)).await.unwrap();
        assert!(Possible(vec![below()]).write(&client(&mount).await, 0, 4096, 1).await);
        drop(first);
        // Of a crash: nobody's record names it.
        let left = Path::new("overlays/vm1-7.data");
        backtide_storage::Storage::create_new(&storage, left).unwrap();
        let map = format!("overlays/{}.map", mount.id);
        storage.flip_bit(Path::new(&map), ByteOffset(1024 + 40), 1);
        let table = started(&storage, directory.path()).await;
        assert!(!storage.files().iter().any(|(path, _)| path == left));
        let listed = table.list().await;
        let why = listed.mounts[0].last_error.clone().unwrap();
        assert!(why.contains("is damaged at byte 1024"), "{why}");
        table.unmount(&mount.id, KEEP).await.unwrap();
        assert_eq!(table.remount(&mount.id, None).await.unwrap_err().code, ErrorCode::Damaged);
        assert_eq!(table.list().await.kept.len(), 1, "it stays until it is discarded");
        table.discard(&mount.id).await.unwrap();
        assert!(!storage.files().iter().any(|(path, _)| path.starts_with("overlays")));
    });
}

#[test]
fn what_was_written_to_a_mount_whose_record_is_lost_stays_until_the_record_is_back() {
    use backtide_storage::{Storage, read_file, replace_file};
    let directory = tempfile::tempdir().unwrap();
    local(async {
        let storage = MemoryStorage::new();
        let first = table(&storage, directory.path());
        let (written, untouched) =
            (first.mount(wanted(true)).await.unwrap(), first.mount(wanted(true)).await.unwrap());
        let mut possible = Possible(vec![below()]);
        let guest = client(&written).await;
        assert!(possible.write(&guest, 0, 4096, 1).await);
        drop((guest, first));
        let path = |id: &str| std::path::PathBuf::from(format!("{id}.mount"));
        let record = read_file(&storage, &path(&written.id), ByteCount(1 << 16)).unwrap();
        for id in [&written.id, &untouched.id] {
            storage.remove(&path(id)).unwrap();
        }
        let without = started(&storage, directory.path()).await;
        assert_eq!(without.list().await, AgentMounts::default());
        let left =
            |id: &str| storage.list(Path::new("overlays")).unwrap().iter().any(|name| name.starts_with(id));
        assert!(left(&written.id), "what was written is removed");
        assert!(!left(&untouched.id), "an overlay of nobody with nothing in it stays");
        drop(without);
        replace_file(&storage, &path(&written.id), &record).unwrap();
        let again = started(&storage, directory.path()).await;
        assert_eq!(again.list().await.mounts.len(), 1);
        possible.check(&written, "its record is back").await;
    });
}

#[test]
fn a_request_that_waits_for_the_receiver_changes_nothing_once_its_mount_has_ended() {
    let directory = tempfile::tempdir().unwrap();
    local(async {
        let storage = MemoryStorage::new();
        let table = table(&storage, directory.path());
        let mount = table.mount(wanted(true)).await.unwrap();
        let source = LAST.take().unwrap();
        source.close();
        let guest = client(&mount).await;
        // A part of a block: the rest of it is the point's.
        let writing = tokio::task::spawn_local(async move {
            guest.write(ByteOffset(512), Bytes::from(vec![1; 512]), false).await.is_ok()
        });
        while source.asked().is_empty() && source.maps().is_empty() {
            tokio::task::yield_now().await;
        }
        let written = {
            let mounted = table.mounted.borrow();
            let served = mounted[&mount.id].served.as_ref().unwrap();
            Rc::downgrade(served.written.as_ref().unwrap())
        };
        // Requests have a while to end in, and this one does not.
        tokio::time::pause();
        table.unmount(&mount.id, by_force(KEEP)).await.unwrap();
        tokio::time::resume();
        assert!(!writing.await.unwrap());
        assert!(written.upgrade().is_some(), "the request is there still");
        source.open();
        while written.upgrade().is_some() {
            tokio::task::yield_now().await;
        }
        let mount = table.remount(&mount.id, None).await.unwrap();
        Possible(vec![below()]).check(&mount, "after its end").await;
    });
}

#[test]
fn what_is_kept_and_cannot_be_made_durable_is_said_to_be_so() {
    let directory = tempfile::tempdir().unwrap();
    local(async {
        let storage = MemoryStorage::new();
        let table = table(&storage, directory.path());
        let mount = table.mount(wanted(true)).await.unwrap();
        let guest = client(&mount).await;
        guest.write(ByteOffset::ZERO, Bytes::from(vec![1; 4096]), false).await.unwrap();
        storage.fail_sync_after(0);
        let told = table.unmount(&mount.id, by_force(KEEP)).await.unwrap_err();
        assert!(told.message.contains("is kept, but not all that was written is durable"), "{told}");
        let listed = table.list().await;
        assert_eq!((listed.mounts.len(), listed.kept.len()), (0, 1));
        table.discard(&mount.id).await.unwrap();
    });
}

#[test]
fn a_mount_is_taken_from_who_has_it_open_only_by_force() {
    let directory = tempfile::tempdir().unwrap();
    local(async {
        let storage = MemoryStorage::new();
        let table = table(&storage, directory.path());
        let mount = table.mount(wanted(true)).await.unwrap();
        let (guest, mut possible) = (client(&mount).await, Possible(vec![below()]));
        assert!(possible.write(&guest, 0, 4096, 1).await);
        for (how, way_out) in [(KEEP, "--here --keep --force"), (DISCARD, "--here --discard --force")] {
            let refused = table.unmount(&mount.id, how).await.unwrap_err();
            assert_eq!(refused.code, ErrorCode::Busy, "{refused}");
            assert!(refused.message.contains("an NBD client has it open"), "{refused}");
            assert!(refused.hint.unwrap().contains(&format!("backtide unmount {} {way_out}", mount.id)));
        }
        assert!(possible.write(&guest, 8192, 4096, 2).await, "nothing has changed for it");
        let other = client(&mount).await;
        let refused = table.unmount(&mount.id, KEEP).await.unwrap_err();
        assert!(refused.message.contains("2 NBD connections have it open"), "{refused}");
        assert_eq!(table.list().await.mounts[0].clients, 2);
        drop((guest, other));
        // Who has gone is in nobody's way, however lately.
        table.unmount(&mount.id, KEEP).await.unwrap();

        let mount = table.remount(&mount.id, None).await.unwrap();
        possible.check(&mount, "kept").await;
        let guest = client(&mount).await;
        assert!(possible.write(&guest, 16_384, 4096, 3).await);
        table.unmount(&mount.id, by_force(KEEP)).await.unwrap();
        assert!(!possible.write(&guest, 0, 4096, 4).await, "it was taken from it");
        let mount = table.remount(&mount.id, None).await.unwrap();
        possible.check(&mount, "kept by force").await;
        let guest = client(&mount).await;
        table.unmount(&mount.id, by_force(DISCARD)).await.unwrap();
        assert!(guest.flush().await.is_err());
        assert_eq!(table.list().await, AgentMounts::default());

        let plain = table.mount(wanted(false)).await.unwrap();
        let reader = client(&plain).await;
        let refused = table.unmount(&plain.id, PLAIN).await.unwrap_err();
        assert_eq!(refused.code, ErrorCode::Busy, "{refused}");
        assert!(refused.hint.unwrap().contains(&format!("backtide unmount {} --here --force", plain.id)));
        assert_eq!(reader.read(ByteOffset::ZERO, ByteCount(512)).await.unwrap(), below()[..512]);
        table.unmount(&plain.id, by_force(PLAIN)).await.unwrap();
    });
}

#[test]
fn other_machines_are_served_no_mount_in_the_clear() {
    let directory = tempfile::tempdir().unwrap();
    local(async {
        let storage = MemoryStorage::new();
        let table = table(&storage, directory.path());
        let open: NbdUri = "nbd://0.0.0.0:10809/m".parse().unwrap();
        let refused = table.mount(Wanted { nbd: Some(open.clone()), ..wanted(false) }).await.unwrap_err();
        assert_eq!(refused.code, ErrorCode::Refused, "{refused}");
        let mount = table.mount(wanted(true)).await.unwrap();
        table.unmount(&mount.id, KEEP).await.unwrap();
        let refused = table.remount(&mount.id, Some(open)).await.unwrap_err();
        assert_eq!(refused.code, ErrorCode::Refused, "{refused}");
        table.remount(&mount.id, None).await.unwrap();
    });
}
