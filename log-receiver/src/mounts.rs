//! Mounts: points of disks served over NBD, all on one thread of their own.
//!
//! Invariants: ids are never used twice in a receiver's life, so that a late unmount cannot end
//! somebody else's mount; a mount is ready for clients when it is answered; their number is bounded; an
//! overlay's record says where it is served before its mount is answered.

mod ending;

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, BTreeSet},
    io,
    path::PathBuf,
    rc::Rc,
    sync::Arc,
    thread::JoinHandle,
    time::Duration,
};

use backtide_control::build_lasting;
use backtide_export::{
    BindError, Directory, ExportInfo, Limits, Listener, NbdAddress, NbdTls, NbdUri, Server, SocketMode,
    dirty_bitmap,
};
use backtide_overlay::{Overlay, OverlayId};
use backtide_receiver_api::{
    ApiError, ChangedSince, DiskRef, ErrorCode, Mount, MountOverlay, Mounts, UnmountRequest,
};
use backtide_recovery::{TimedLsn, View, time_text};
use backtide_units::{ByteCount, CaptureTime, DiskName};
use roaring::RoaringTreemap;
use tokio::{
    runtime::Builder,
    sync::{mpsc, oneshot},
    task::LocalSet,
};

use uuid::Uuid;

use crate::{
    clock,
    findings::DiskFindings,
    mount_numbers::MountNumbers,
    overlay_export::OverlayExport,
    overlays::{Overlays, record::Record},
    point_export::{OneExport, PointExport, Reading},
    pool::Pool,
};

/// Orders waiting for the thread; who sends more waits.
const ORDERS_MAX: usize = 64;

/// How often a temporary mount is looked at ...
const LEASE_LOOK: Duration = Duration::from_millis(500);
/// ... and how long it waits for its first client.
const LEASE_FIRST_CLIENT: Duration = Duration::from_secs(30);

/// What others ask of the mounts' thread.
pub(crate) enum Order {
    /// Serve a point.
    Mount(Box<Plan>, oneshot::Sender<Result<Mount, ApiError>>),
    /// What is served?
    List(oneshot::Sender<Mounts>),
    /// Serve it no longer.
    Unmount(String, UnmountRequest, oneshot::Sender<Result<Mount, ApiError>>),
    /// End all mounts and the thread.
    Shutdown,
}

/// A point to serve.
pub(crate) struct Plan {
    pub(crate) disk: DiskRef,
    pub(crate) at: TimedLsn,
    pub(crate) view: View,
    /// Where damage of it is noted.
    pub(crate) findings: DiskFindings,
    /// Where; by default on a socket of its own.
    pub(crate) uri: Option<NbdUri>,
    /// It ends by itself with its last client.
    pub(crate) temporary: bool,
    /// What is written goes here.
    pub(crate) overlay: Option<PlanOverlay>,
    /// What changed since another point; not with an overlay.
    pub(crate) changed: Option<Changed>,
}

/// What changed since another point.
#[derive(Clone)]
pub(crate) struct Changed {
    pub(crate) since: TimedLsn,
    pub(crate) blocks: Arc<RoaringTreemap>,
}

/// An overlay to serve.
pub(crate) enum PlanOverlay {
    /// A new one.
    New,
    /// The one with this id.
    Kept(String),
}

/// The thread, from outside.
pub(crate) struct MountThread {
    pub(crate) orders: mpsc::Sender<Order>,
    pub(crate) thread: JoinHandle<()>,
    /// Where every mount is served.
    pub(crate) shared: Option<NbdUri>,
}

struct Mounted {
    id: String,
    disk: DiskRef,
    at: TimedLsn,
    /// The disk's size at that point.
    size: ByteCount,
    uri: NbdUri,
    since: CaptureTime,
    overlay: Option<Arc<Overlay>>,
    changed_since: Option<TimedLsn>,
    /// It ends by itself with its last client.
    temporary: bool,
    server: Server,
}

/// What all mounts have in common.
pub(crate) struct Serving {
    /// Bounds of each server.
    pub(crate) nbd: Limits,
    /// Sockets are made here.
    pub(crate) run_dir: PathBuf,
    pub(crate) mounts_max: usize,
    pub(crate) readers: Pool,
    pub(crate) nbd_tls: Option<NbdTls>,
    /// What is written to mounts.
    pub(crate) overlays: Overlays,
    /// Threads that write it.
    pub(crate) writers: Pool,
    /// Of which ids are made.
    pub(crate) numbers: MountNumbers,
    /// What the socket offers that all of them share.
    pub(crate) directory: Directory,
}

struct Table {
    /// Mounts that are being made.
    begun: Cell<usize>,
    /// Overlays whose mounts begin or end just now.
    settling: RefCell<BTreeSet<String>>,
    serving: Serving,
    mounted: RefCell<BTreeMap<String, Mounted>>,
}

/// Starts the mounts' thread, which serves all of them at `shared` too.
///
/// # Errors
/// When there can be no thread; within, when the shared socket cannot be had.
pub(crate) async fn start(
    serving: Serving,
    shared: Option<NbdUri>,
) -> io::Result<Result<MountThread, BindError>> {
    let (ready, is_ready) = oneshot::channel();
    let (orders, inbox) = mpsc::channel(ORDERS_MAX);
    let runtime = build_lasting(&mut Builder::new_current_thread())?;
    let body = move || {
        let table =
            Table { begun: Cell::new(0), settling: RefCell::default(), serving, mounted: RefCell::default() };
        LocalSet::new().block_on(&runtime, async move {
            // Ends with the thread: it has no clients of its own.
            let _shared = match share(&table.serving, shared).await {
                Ok(shared) => {
                    let uri = shared.as_ref().map(|(uri, _)| uri.clone());
                    drop(ready.send(Ok(uri)));
                    shared
                }
                Err(error) => return drop(ready.send(Err(error))),
            };
            Rc::new(table).serve(inbox).await;
        });
    };
    let thread = std::thread::Builder::new().name("mounts".to_owned()).spawn(body)?;
    let started = is_ready.await.map_err(|_| io::Error::other("the thread ended at its start"))?;
    Ok(started.map(|shared| MountThread { orders, thread, shared }))
}

/// Serves what the directory has at `uri`; where that is, with the port that was found for it.
async fn share(serving: &Serving, uri: Option<NbdUri>) -> Result<Option<(NbdUri, Server)>, BindError> {
    let Some(uri) = uri else { return Ok(None) };
    let listener = Listener::bind_uri(&uri, serving.nbd.socket_mode).await?;
    let uri = NbdUri { address: listener.address().clone(), ..uri };
    tracing::info!(nbd = %uri, "every mount is served here too");
    Ok(Some((uri, listener.serve_directory(serving.directory.clone(), serving.nbd))))
}

impl Table {
    async fn serve(self: Rc<Self>, mut inbox: mpsc::Receiver<Order>) {
        while let Some(order) = inbox.recv().await {
            match order {
                // Whoever asked may have gone: nobody misses the answer. A mount that nobody was
                // told of is in the list.
                Order::Mount(plan, answer) => {
                    // Apart from the others' orders: finding a host's address may take its time.
                    let table = Rc::clone(&self);
                    tokio::task::spawn_local(async move { drop(answer.send(table.mount(*plan).await)) });
                }
                Order::List(answer) => self.list(answer),
                Order::Unmount(id, how, answer) => {
                    // Apart from the others' orders: it may take its grace.
                    let table = Rc::clone(&self);
                    tokio::task::spawn_local(async move { drop(answer.send(table.unmount(&id, how).await)) });
                }
                Order::Shutdown => break,
            }
        }
        let mounted = std::mem::take(&mut *self.mounted.borrow_mut());
        // Overlays stay, and their records say that they are served: after a restart they are.
        let writers = &self.serving.writers;
        let ends: Vec<_> = mounted
            .into_values()
            .map(|mounted| tokio::task::spawn_local(mounted.leave(writers.clone())))
            .collect();
        for end in ends {
            // An error is a task that panicked: its mount is gone too.
            let _ = end.await;
        }
    }

    async fn mount(self: &Rc<Self>, plan: Plan) -> Result<Mount, ApiError> {
        if self.mounted.borrow().len() + self.begun.get() >= self.serving.mounts_max {
            let why = format!("the receiver has its limit of {} mounts", self.serving.mounts_max);
            return Err(ApiError::new(ErrorCode::Busy, why).with_hint("end one: backtide unmount ID"));
        }
        let kept = match &plan.overlay {
            Some(PlanOverlay::Kept(id)) => Some(id.clone()),
            Some(PlanOverlay::New) | None => None,
        };
        if let Some(id) = &kept
            && (self.mounted.borrow().contains_key(id) || !self.settling.borrow_mut().insert(id.clone()))
        {
            return Err(ApiError::new(ErrorCode::Busy, format!("overlay {id} is mounted already")));
        }
        self.begun.set(self.begun.get() + 1);
        let mounted = self.serve_point(plan).await;
        self.begun.set(self.begun.get() - 1);
        if let Some(id) = kept {
            self.settling.borrow_mut().remove(&id);
        }
        mounted
    }

    async fn serve_point(self: &Rc<Self>, plan: Plan) -> Result<Mount, ApiError> {
        let id = match &plan.overlay {
            Some(PlanOverlay::Kept(id)) => id.clone(),
            Some(PlanOverlay::New) | None => self.next_id(&plan.disk.name).await?,
        };
        let told_tls = plan.uri.as_ref().and_then(|uri| uri.tls.clone());
        let (wanted, mode) = self.place(plan.uri, plan.temporary, &id);
        let listener = Listener::bind_uri(&wanted, mode).await.map_err(|error| bind_error(&error))?;
        let listener = listener.for_disk(plan.disk.name.clone());
        let uri = NbdUri { address: listener.address().clone(), ..wanted };
        let size = plan.view.disk_size();
        let description = format!("{} at lsn:{} ({})", plan.disk.name, plan.at.lsn, time_text(plan.at.time));
        let Serving { readers, overlays, writers, .. } = &self.serving;
        let (name, point) = (uri.export.clone(), description.clone());
        let reading = Reading { name, point, readers: readers.clone(), findings: plan.findings };
        let changed_since = plan.changed.as_ref().map(|changed| changed.since);
        let dirty_bitmap = plan.changed.as_ref().map(|_| plan.disk.name.to_string());
        let info = ExportInfo { description, dirty_bitmap, ..ExportInfo::new(&uri.export, size) };
        let (overlay, export) = match &plan.overlay {
            None => {
                let changed = plan.changed.map(|changed| changed.blocks);
                (None, OneExport(Rc::new(PointExport::new(info, plan.view, reading, changed))))
            }
            Some(wanted) => {
                // As it was asked for: what is configured may be another by the time it is served again, and is not all in the text.
                let again = NbdUri { tls: told_tls, ..uri.clone() };
                let overlay = self.overlay(wanted, &id, &plan.disk, plan.at, size, &again).await?;
                let (whose, writers) = ((overlays.clone(), id.clone()), writers.clone());
                let shared = Arc::clone(&overlay);
                let export = OverlayExport::new(info, plan.view, shared, reading, writers, whose);
                (Some(overlay), OneExport(Rc::new(export)))
            }
        };
        let mut server = listener.serve(Rc::new(export), self.serving.nbd);
        server.offer_in(&self.serving.directory, &id, &plan.disk.name);
        tracing::info!(mount = id, disk = %plan.disk.uuid, lsn = %plan.at.lsn, %uri, "mounted");
        let (disk, at, temporary, since) = (plan.disk, plan.at, plan.temporary, clock::now());
        let mounted =
            Mounted { id: id.clone(), disk, at, size, uri, since, overlay, changed_since, temporary, server };
        let answer = mounted.describe();
        self.mounted.borrow_mut().insert(id.clone(), mounted);
        if temporary {
            tokio::task::spawn_local(Rc::clone(self).end_with_its_client(id));
        }
        Ok(answer)
    }

    /// Where a mount is served, and who may connect there. One that is temporary and names no place is for the command
    /// that asked for it, which need not have a certificate: it is in the clear on a socket of this user alone. The name
    /// of its export cannot be guessed, so that the command finds this mount there, or none.
    fn place(&self, told: Option<NbdUri>, temporary: bool, id: &str) -> (NbdUri, SocketMode) {
        let alone = temporary && told.is_none();
        let uri = told.unwrap_or_else(|| NbdUri {
            address: NbdAddress::Unix(self.serving.run_dir.join(format!("{id}.sock"))),
            export: if alone { format!("{id}-{}", Uuid::new_v4().simple()) } else { id.to_owned() },
            tls: None,
        });
        match &self.serving.nbd_tls {
            _ if alone => (uri, SocketMode::PRIVATE),
            Some(tls) => (tls.unless_told(uri), self.serving.nbd.socket_mode),
            None => (uri, self.serving.nbd.socket_mode),
        }
    }

    /// Ends a mount when its clients have gone, or when none ever comes: whoever asked for it may have
    /// been killed and cannot unmount it.
    async fn end_with_its_client(self: Rc<Self>, id: String) {
        let mut look = tokio::time::interval(LEASE_LOOK);
        let begun = tokio::time::Instant::now();
        let mut had_client = false;
        loop {
            look.tick().await;
            let clients = self.mounted.borrow().get(&id).map(|mounted| mounted.server.connections());
            let Some(clients) = clients else { return };
            had_client |= clients > 0;
            if clients == 0 && (had_client || begun.elapsed() > LEASE_FIRST_CLIENT) {
                break;
            }
        }
        let mounted = self.mounted.borrow_mut().remove(&id);
        if let Some(mounted) = mounted {
            tracing::info!(mount = id, "the mount's client has gone");
            self.serving.directory.forget(&id);
            // It has no overlay.
            let _ = mounted.end(self.serving.writers.clone()).await;
        }
    }

    /// Makes or opens an overlay, with a record that says where it is served.
    async fn overlay(
        &self,
        wanted: &PlanOverlay,
        id: &str,
        disk: &DiskRef,
        at: TimedLsn,
        size: ByteCount,
        uri: &NbdUri,
    ) -> Result<Arc<Overlay>, ApiError> {
        let (overlays, id) = (self.serving.overlays.clone(), id.to_owned());
        let uri = Some(uri.to_string());
        let opened = match wanted {
            PlanOverlay::New => {
                let disk = DiskRef { size, ..disk.clone() };
                let overlay = OverlayId(Uuid::new_v4());
                let (lsn, time, created) = (at.lsn, at.time, clock::now());
                let record = Record { id, overlay, disk, lsn, time, created, uri, store: None };
                self.serving.writers.run(move || overlays.create(record)).await
            }
            PlanOverlay::Kept(_) => {
                let open = move || {
                    let overlay = overlays.open(&id)?;
                    overlays.serve_at(&id, uri)?;
                    Ok(overlay)
                };
                self.serving.writers.run(open).await
            }
        };
        opened.map_err(|error| ApiError::new(ErrorCode::Failed, error.to_string()))?
    }

    /// Answers on a thread that may look at files.
    fn list(&self, answer: oneshot::Sender<Mounts>) {
        let mounts: Vec<Mount> = self.mounted.borrow().values().map(Mounted::describe).collect();
        let served: Vec<String> = mounts.iter().map(|mount| mount.id.clone()).collect();
        let (overlays, writers) = (self.serving.overlays.clone(), self.serving.writers.clone());
        tokio::task::spawn_local(async move {
            let looked = writers.run(move || Mounts { mounts, kept: overlays.kept(&served) }).await;
            looked.map(|mounts| answer.send(mounts))
        });
    }

    async fn next_id(&self, name: &DiskName) -> Result<String, ApiError> {
        loop {
            let (numbers, of) = (self.serving.numbers.clone(), name.clone());
            let number = self.serving.writers.run(move || numbers.next(&of)).await;
            let number = number.map_err(|error| ApiError::new(ErrorCode::Failed, error.to_string()))?;
            let id = format!("{name}-{number}");
            // Nothing has it, unless the store's file of numbers was taken away.
            if !self.serving.overlays.contains(&id) && !self.mounted.borrow().contains_key(&id) {
                return Ok(id);
            }
        }
    }
}

impl Mounted {
    fn describe(&self) -> Mount {
        Mount {
            id: self.id.clone(),
            disk: self.disk.clone(),
            uri: self.uri.to_string(),
            lsn: self.at.lsn,
            time: self.at.time,
            size: self.size,
            mounted: self.since,
            clients: u32::try_from(self.server.connections()).unwrap_or(u32::MAX),
            warning: None,
            changed_since: self.changed_since.map(|since| ChangedSince {
                lsn: since.lsn,
                time: since.time,
                context: format!("{}{}", dirty_bitmap::PREFIX, self.disk.name),
                warning: None,
            }),
            overlay: self.overlay.as_ref().map(|overlay| {
                let usage = overlay.usage();
                MountOverlay { bytes: usage.bytes, limit: usage.limit, file_bytes: usage.file_bytes }
            }),
        }
    }
}

fn bind_error(error: &BindError) -> ApiError {
    let code = match error {
        BindError::InUse(_) | BindError::NotASocket(_) => ErrorCode::Busy,
        BindError::Io { .. } | BindError::Tls(_) => ErrorCode::Failed,
    };
    ApiError::from_error(code, error)
}
