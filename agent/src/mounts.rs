//! Points of disks that the agent serves on its own host, read from a log receiver: all on one thread.
//!
//! What is read is kept in a [`cache`]; [`map`] has what the receiver told of its blocks; [`reader`] brings both together
//! and [`export`] puts it on NBD. What is written to a mount is in one of [`overlays`], and [`writable`] puts that with
//! the point on NBD. [`record`] is what outlives the agent: a mount is served again at the next start, under the same
//! URI.
//!
//! Invariants: the receiver keeps a mounted point until the mount was ended, also while nobody is connected; no mount
//! stands in the way of a disk, whose threads are others.

mod cache;
mod export;
mod map;
mod overlays;
mod reader;
mod record;
mod table;
mod writable;

use std::{io, path::PathBuf, sync::Arc, time::Duration};

use backtide_agent_api::{AgentKeptOverlay, AgentMount, AgentMounts, AgentUnmountRequest, StreamTls};
use backtide_control::{Address, ApiError, ErrorCode, build_lasting};
use backtide_export::{Limits, NbdRule, NbdUri};
use backtide_storage::Storage;
use backtide_units::{ByteCount, DiskId, Lsn};
use tokio::{
    runtime::Builder,
    sync::{Mutex, mpsc, oneshot},
    task::LocalSet,
};

use self::{
    overlays::Overlays,
    record::MountRecords,
    table::{Serving, Table},
};
use crate::{config::MountLimits, disk::source::Sources};

/// Orders waiting for the thread; who sends more waits.
const ORDERS_MAX: usize = 64;

/// How long the end of the thread is waited for, when a successor wants to serve ...
const HAND_OVER_TIME: Duration = Duration::from_millis(500);
/// ... and when nobody does. Storage or a resolver of names that stands still must hold up no disk.
const END_TIME: Duration = Duration::from_secs(10);

/// What a mount keeps here by default: 1 GiB.
const CACHE_BYTES: ByteCount = ByteCount(1 << 30);

/// Below so many free bytes of the file system neither caches nor overlays grow: the agent's own files lie there too.
const FREE_MIN: ByteCount = ByteCount(512 << 20);

/// What all mounts of an agent have in common.
pub(crate) struct Settings {
    /// Of the state directory.
    pub(crate) storage: Arc<dyn Storage>,
    /// Sockets are made here.
    pub(crate) run: PathBuf,
    pub(crate) nbd: Limits,
    pub(crate) nbd_rule: NbdRule,
    pub(crate) limits: MountLimits,
    pub(crate) sources: Arc<dyn Sources>,
}

/// A point to serve.
pub(crate) struct Wanted {
    pub(crate) disk: DiskId,
    pub(crate) lsn: Lsn,
    pub(crate) receiver: Address,
    pub(crate) stream_tls: Option<StreamTls>,
    pub(crate) changed_since: Option<Lsn>,
    pub(crate) nbd: Option<NbdUri>,
    pub(crate) cache_bytes: Option<ByteCount>,
    /// It gets an overlay of its own.
    pub(crate) writable: bool,
}

/// What others ask of the thread.
enum Order {
    Mount(Box<Wanted>, oneshot::Sender<Result<AgentMount, ApiError>>),
    List(oneshot::Sender<AgentMounts>),
    Unmount(String, AgentUnmountRequest, oneshot::Sender<Result<AgentMount, ApiError>>),
    /// Serve an overlay again that is kept.
    Remount(String, Option<NbdUri>, oneshot::Sender<Result<AgentMount, ApiError>>),
    /// Remove one.
    Discard(String, oneshot::Sender<Result<AgentKeptOverlay, ApiError>>),
    /// End, for a successor or for good. Records stay.
    End(Leaving),
}

/// Why the agent ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Leaving {
    /// The next one, whenever that is, serves these clients.
    ForGood,
    /// Another one serves these clients at once.
    HandedOver,
}

/// The mounts, from outside.
pub(crate) struct Mounts {
    orders: mpsc::Sender<Order>,
    /// Closed by the thread's end.
    ended: Mutex<oneshot::Receiver<()>>,
}

impl Mounts {
    /// Serves what was mounted when the last agent ended, and takes orders.
    ///
    /// # Errors
    /// When there can be no thread, or the state directory cannot be read.
    pub(crate) fn start(settings: Settings) -> io::Result<Self> {
        let Settings { storage, run, nbd, nbd_rule, limits, sources } = settings;
        let records = MountRecords::new(Arc::clone(&storage));
        let known = records.load_all()?;
        let overlays = Overlays::load(storage, &limits)?;
        let (orders, inbox) = mpsc::channel(ORDERS_MAX);
        let runtime = build_lasting(&mut Builder::new_current_thread())?;
        let serving =
            Serving { records, overlays, overlays_max: limits.overlays, run, nbd, nbd_rule, sources };
        let (over, ended) = oneshot::channel();
        let body = move || {
            LocalSet::new().block_on(&runtime, Table::new(serving).serve(known, inbox));
            // Not waiting for a name that is being looked up, or a file that is being written.
            runtime.into_runtime().shutdown_background();
            drop(over);
        };
        std::thread::Builder::new().name("mounts".to_owned()).spawn(body)?;
        Ok(Self { orders, ended: Mutex::new(ended) })
    }

    /// Serves a point: when this returns, clients can connect.
    pub(crate) async fn mount(&self, wanted: Wanted) -> Result<AgentMount, ApiError> {
        self.ask(|answer| Order::Mount(Box::new(wanted), answer)).await?
    }

    /// What is served.
    pub(crate) async fn list(&self) -> Result<AgentMounts, ApiError> {
        self.ask(Order::List).await
    }

    /// Serves a point no longer, and does with its overlay what is asked.
    pub(crate) async fn unmount(&self, id: String, how: AgentUnmountRequest) -> Result<AgentMount, ApiError> {
        self.ask(|answer| Order::Unmount(id, how, answer)).await?
    }

    /// Serves an overlay again that is kept.
    pub(crate) async fn remount(&self, id: String, nbd: Option<NbdUri>) -> Result<AgentMount, ApiError> {
        self.ask(|answer| Order::Remount(id, nbd, answer)).await?
    }

    /// Removes one for good.
    pub(crate) async fn discard(&self, id: String) -> Result<AgentKeptOverlay, ApiError> {
        self.ask(|answer| Order::Discard(id, answer)).await?
    }

    /// Ends the thread with its servers. One that does not end in time is left behind: it has nothing that anybody
    /// needs.
    pub(crate) async fn end(&self, leaving: Leaving) {
        let time = match leaving {
            Leaving::ForGood => END_TIME,
            Leaving::HandedOver => HAND_OVER_TIME,
        };
        let end = async {
            // It may have ended.
            let _ = self.orders.send(Order::End(leaving)).await;
            let _ = (&mut *self.ended.lock().await).await;
        };
        if tokio::time::timeout(time, end).await.is_err() {
            tracing::warn!("the thread of the mounts stands still");
        }
    }

    async fn ask<T>(&self, order: impl FnOnce(oneshot::Sender<T>) -> Order) -> Result<T, ApiError> {
        let ended = || ApiError::new(ErrorCode::Busy, "the agent is ending");
        let (answer, answered) = oneshot::channel();
        self.orders.send(order(answer)).await.map_err(|_| ended())?;
        answered.await.map_err(|_| ended())
    }
}
