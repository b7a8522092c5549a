//! Mounts: points of disks served over NBD, all on one thread of their own.
//!
//! Invariants: ids are never used twice in a receiver's life, so that a late unmount cannot end
//! somebody else's mount; a mount is ready for clients when it is answered; their number is bounded.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    io,
    path::PathBuf,
    rc::Rc,
    thread::JoinHandle,
    time::Duration,
};

use backtide_export::{BindError, Limits, Listener, NbdAddress, NbdTls, NbdUri, Server};
use backtide_receiver_api::{ApiError, DiskRef, ErrorCode, Mount, Mounts};
use backtide_recovery::{TimedLsn, View, time_text};
use backtide_units::{ByteCount, CaptureTime, DiskName};
use tokio::{
    runtime::Builder,
    sync::{mpsc, oneshot},
    task::LocalSet,
};

use crate::{
    clock,
    findings::Findings,
    point_export::{OneExport, PointExport, Reading},
    pool::Pool,
};

/// Orders waiting for the thread; who sends more waits.
const ORDERS_MAX: usize = 64;

/// How long an unmount waits for requests in flight.
const UNMOUNT_GRACE: Duration = Duration::from_secs(5);

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
    /// Serve it no longer; none when there is no such mount.
    Unmount(String, oneshot::Sender<Option<Mount>>),
    /// End all mounts and the thread.
    Shutdown,
}

/// A point to serve.
pub(crate) struct Plan {
    pub(crate) disk: DiskRef,
    pub(crate) at: TimedLsn,
    pub(crate) view: View,
    /// Where; by default on a socket of its own.
    pub(crate) uri: Option<NbdUri>,
    /// It ends by itself with its last client.
    pub(crate) temporary: bool,
}

/// The thread, from outside.
pub(crate) struct MountThread {
    pub(crate) orders: mpsc::Sender<Order>,
    pub(crate) thread: JoinHandle<()>,
}

struct Mounted {
    id: String,
    disk: DiskRef,
    at: TimedLsn,
    /// The disk's size at that point.
    size: ByteCount,
    uri: NbdUri,
    since: CaptureTime,
    server: Server,
}

/// What all mounts have in common.
pub(crate) struct Serving {
    /// Sockets are made here.
    pub(crate) run_dir: PathBuf,
    pub(crate) mounts_max: usize,
    pub(crate) readers: Pool,
    pub(crate) nbd_tls: Option<NbdTls>,
    /// Where damage is noted that a read meets.
    pub(crate) findings: Findings,
}

struct Table {
    /// Mounts that are being made.
    begun: Cell<usize>,
    serving: Serving,
    mounted: RefCell<BTreeMap<String, Mounted>>,
    /// The last number used for each disk's name.
    numbers: RefCell<BTreeMap<DiskName, u64>>,
}

/// Starts the mounts' thread.
pub(crate) fn start(serving: Serving) -> io::Result<MountThread> {
    let (orders, inbox) = mpsc::channel(ORDERS_MAX);
    let runtime = Builder::new_current_thread().enable_all().build()?;
    let body = move || {
        let table =
            Table { begun: Cell::new(0), serving, mounted: RefCell::default(), numbers: RefCell::default() };
        LocalSet::new().block_on(&runtime, Rc::new(table).serve(inbox));
    };
    let thread = std::thread::Builder::new().name("mounts".to_owned()).spawn(body)?;
    Ok(MountThread { orders, thread })
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
                Order::List(answer) => drop(answer.send(self.list())),
                Order::Unmount(id, answer) => {
                    let mounted = self.mounted.borrow_mut().remove(&id);
                    // Apart from the others' orders: it may take its grace.
                    tokio::task::spawn_local(async move {
                        let ended = match mounted {
                            Some(mounted) => Some(mounted.end().await),
                            None => None,
                        };
                        drop(answer.send(ended));
                    });
                }
                Order::Shutdown => break,
            }
        }
        let mounted = std::mem::take(&mut *self.mounted.borrow_mut());
        let ends: Vec<_> =
            mounted.into_values().map(|mounted| tokio::task::spawn_local(mounted.end())).collect();
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
        self.begun.set(self.begun.get() + 1);
        let mounted = self.serve_point(plan).await;
        self.begun.set(self.begun.get() - 1);
        mounted
    }

    async fn serve_point(self: &Rc<Self>, plan: Plan) -> Result<Mount, ApiError> {
        let id = self.next_id(&plan.disk.name);
        let wanted = plan.uri.unwrap_or_else(|| NbdUri {
            address: NbdAddress::Unix(self.serving.run_dir.join(format!("{id}.sock"))),
            export: id.clone(),
            tls: None,
        });
        let wanted = match &self.serving.nbd_tls {
            Some(tls) => tls.unless_told(wanted),
            None => wanted,
        };
        let listener = Listener::bind_uri(&wanted).await.map_err(|error| bind_error(&error))?;
        let uri = NbdUri { address: listener.address().clone(), ..wanted };
        let size = plan.view.disk_size();
        let description = format!("{} at lsn:{} ({})", plan.disk.name, plan.at.lsn, time_text(plan.at.time));
        let Serving { readers, findings, .. } = &self.serving;
        let reading = Reading { disk: plan.disk.uuid, readers: readers.clone(), findings: findings.clone() };
        let export = PointExport::new(&uri.export, description, plan.view, reading);
        let server = listener.serve(Rc::new(OneExport(Rc::new(export))), Limits::default());
        tracing::info!(mount = id, disk = %plan.disk.uuid, lsn = %plan.at.lsn, %uri, "mounted");
        let mounted =
            Mounted { id: id.clone(), disk: plan.disk, at: plan.at, size, uri, since: clock::now(), server };
        let answer = mounted.describe();
        self.mounted.borrow_mut().insert(id.clone(), mounted);
        if plan.temporary {
            tokio::task::spawn_local(Rc::clone(self).end_with_its_client(id));
        }
        Ok(answer)
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
            mounted.end().await;
        }
    }

    fn list(&self) -> Mounts {
        Mounts { mounts: self.mounted.borrow().values().map(Mounted::describe).collect() }
    }

    fn next_id(&self, name: &DiskName) -> String {
        let mut numbers = self.numbers.borrow_mut();
        let number = numbers.entry(name.clone()).or_default();
        *number += 1;
        format!("{name}-{number}")
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
        }
    }

    async fn end(self) -> Mount {
        let description = self.describe();
        self.server.shutdown(UNMOUNT_GRACE).await;
        tracing::info!(mount = self.id, disk = %self.disk.uuid, "unmounted");
        description
    }
}

fn bind_error(error: &BindError) -> ApiError {
    let code = match error {
        BindError::InUse(_) | BindError::NotASocket(_) => ErrorCode::Busy,
        BindError::Io { .. } | BindError::Tls(_) => ErrorCode::Failed,
    };
    ApiError::from_error(code, error)
}
