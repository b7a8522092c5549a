//! Accepts agents and sends each to the thread that owns its disk, or has its questions about a point answered.
//!
//! Invariants: an agent that says nothing has a few seconds, and less when descriptors or places are short and another one
//! comes; the number of connections, greeted or not, is bounded.

use std::{
    collections::BTreeMap,
    hash::{DefaultHasher, Hash, Hasher},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use backtide_protocol::{Decoder, Message, Sequenced};
use backtide_socket::{Door as SocketDoor, Outage};
use backtide_tls::Rights;
use backtide_units::DiskId;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};

use crate::{
    admit::{Admitted, Doorkeeper},
    ingest::Task,
    reading,
    service::Service,
    session::ConnectionId,
    socket::{Listener, Socket},
};

/// How long an agent may take for its first message.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);

/// How long the place of somebody who was told to leave is waited for. His first message may have come at this very moment.
const LEAVING_TIME: Duration = Duration::from_millis(100);

/// A connection whose first message has come.
pub(crate) struct Arrival {
    pub(crate) id: ConnectionId,
    pub(crate) socket: Socket,
    pub(crate) decoder: Decoder,
    pub(crate) first: Sequenced,
    /// The disks the agent may speak for.
    pub(crate) rights: Rights,
    pub(crate) _permit: OwnedSemaphorePermit,
}

/// Connections whose first message has not come, in the order in which they came.
#[derive(Clone, Default)]
struct Silent(Arc<Mutex<BTreeMap<u64, oneshot::Sender<()>>>>);

/// The silence of one of them, until this is dropped.
struct Silence(Silent, ConnectionId);

impl Silent {
    /// Of a connection, and what tells that it is to end.
    fn begin(&self, id: ConnectionId) -> (Silence, oneshot::Receiver<()>) {
        let (end, ended) = oneshot::channel();
        self.waiting().insert(id.0, end);
        (Silence(self.clone(), id), ended)
    }

    /// Ends the one that is silent for longest, if there is one.
    fn end_oldest(&self) -> bool {
        self.waiting().pop_first().is_some()
    }

    fn waiting(&self) -> MutexGuard<'_, BTreeMap<u64, oneshot::Sender<()>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Silence {
    fn drop(&mut self) {
        let Self(silent, id) = self;
        silent.waiting().remove(&id.0);
    }
}

/// Sends connections where they belong.
#[derive(Clone)]
pub(crate) struct Door {
    threads: Arc<[mpsc::Sender<Task>]>,
    connections: Arc<Semaphore>,
    connections_max: usize,
    silent: Silent,
    next: Arc<AtomicU64>,
    keeper: Arc<Doorkeeper>,
    /// Answers who reads a point.
    service: Arc<Service>,
    /// Says when that ends.
    ending: Arc<watch::Sender<bool>>,
}

impl Door {
    pub(crate) fn new(
        threads: Vec<mpsc::Sender<Task>>,
        connections_max: usize,
        service: Arc<Service>,
        ending: Arc<watch::Sender<bool>>,
    ) -> Self {
        Self {
            service,
            ending,
            threads: threads.into(),
            connections: Arc::new(Semaphore::new(connections_max)),
            connections_max,
            silent: Silent::default(),
            next: Arc::default(),
            keeper: Arc::default(),
        }
    }

    /// Which of `threads` threads owns a disk: the same one for the receiver's whole life.
    pub(crate) fn owner(disk: DiskId, threads: usize) -> usize {
        let mut hasher = DefaultHasher::new();
        disk.hash(&mut hasher);
        usize::try_from(hasher.finish() % threads as u64).expect("less than the number of threads")
    }

    /// Accepts agents until dropped.
    pub(crate) async fn accept(self, listener: Listener) {
        let at: Arc<str> = listener.address().to_string().into();
        let mut entry = SocketDoor::new(format_args!("the agents at {at}"));
        let silent = &self.silent;
        let mut crowded = Outage::default();
        loop {
            let accepted = SocketDoor::accepted(listener.accept(), || silent.end_oldest()).await;
            let accepted = entry.admit(accepted, || silent.end_oldest()).await;
            let Some(accepted) = accepted else { continue };
            let Some(permit) = self.place().await else {
                if crowded.begins() {
                    tracing::warn!(
                        connections = self.connections_max,
                        "not all of the agents at {at} can be served: every place is taken; those that are there stay, new ones \
                         are refused and come again; raise `connections` of the receiver's [limits] if that lasts"
                    );
                }
                continue;
            };
            let id = ConnectionId(self.next.fetch_add(1, Ordering::Relaxed));
            let (door, at) = (self.clone(), Arc::clone(&at));
            let (silence, ended) = silent.begin(id);
            tokio::spawn(async move {
                let admitted = tokio::time::timeout(HELLO_TIMEOUT, door.keeper.admit(accepted, &at));
                let admitted = tokio::select! { admitted = admitted => admitted, _ = ended => return };
                // Whoever has said who it is gives way to nobody.
                drop(silence);
                match admitted {
                    Ok(Ok(Some(admitted))) => door.pass_on(id, admitted, permit).await,
                    Ok(Ok(None)) => {}
                    Ok(Err(error)) => {
                        tracing::debug!(connection = id.0, %error, "connection lost before its hello")
                    }
                    Err(_) => tracing::warn!(
                        connection = id.0,
                        "no hello within {HELLO_TIMEOUT:?}, connection closed"
                    ),
                }
            });
        }
    }

    /// A place for one connection more: when all are taken, that of the one that is silent for longest.
    async fn place(&self) -> Option<OwnedSemaphorePermit> {
        if let Ok(permit) = Arc::clone(&self.connections).try_acquire_owned() {
            return Some(permit);
        }
        if !self.silent.end_oldest() {
            return None;
        }
        let left = tokio::time::timeout(LEAVING_TIME, Arc::clone(&self.connections).acquire_owned()).await;
        // Nobody closes it.
        left.ok()?.ok()
    }

    /// An agent that reads a point stays here: it has nothing to do with whoever owns the disk's log.
    async fn give_a_point(self, id: ConnectionId, admitted: Admitted, permit: OwnedSemaphorePermit) {
        let ending = self.ending.subscribe();
        tokio::spawn(async move {
            reading::run(id, self.service, admitted, ending).await;
            drop(permit);
        });
    }

    async fn pass_on(self, id: ConnectionId, admitted: Admitted, permit: OwnedSemaphorePermit) {
        let thread = match &admitted.first.message {
            Message::Hello(hello) => Self::owner(hello.disk, self.threads.len()),
            Message::Reading(_) => return self.give_a_point(id, admitted, permit).await,
            // Any thread's session refuses it in the right words.
            Message::Welcome(_)
            | Message::Record(_)
            | Message::Flush { .. }
            | Message::Unchanged { .. }
            | Message::PassBegin { .. }
            | Message::PassData { .. }
            | Message::PassEnd { .. }
            | Message::Mark { .. }
            | Message::Compare(_)
            | Message::CompareResult(_)
            | Message::Ack { .. }
            | Message::Hasten { .. }
            | Message::Ping(_)
            | Message::Close(_) => 0,
        };
        let Admitted { stream, decoder, first, rights } = admitted;
        match stream.detach() {
            Ok(socket) => {
                let arrival = Arrival { id, socket, decoder, first, rights, _permit: permit };
                // It fails only while the receiver ends; then the connection ends too.
                let _ = self.threads[thread].send(Task::Connect(Box::new(arrival))).await;
            }
            Err(error) => tracing::warn!(connection = id.0, %error, "cannot hand a connection on"),
        }
    }
}
