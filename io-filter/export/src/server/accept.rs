//! Accepting clients, and the orderly end of a server.
//!
//! Invariants: clients in their handshake and clients that are served have limits of their own,
//! so that whoever only connects takes no place from a client that is served; a new client takes
//! the place of the one that has been in its handshake for longest, never the other way round; who of those that are
//! served gives way is for `seats.rs` to say;
//! after [`Server::shutdown`] nothing of the server is left running.

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, BTreeSet},
    pin::pin,
    rc::Rc,
    time::Duration,
};

use backtide_nbd::NbdAddress;
use backtide_socket::Door;
use tokio::task::{AbortHandle, JoinHandle};

use super::adopt::Adopting;
use super::connection::serve_until;
use super::expected::{Expected, Peer, Returning};
use super::negotiate::{Choice, Gate, Negotiated, negotiate};
use super::seats::{Seat, Seats};
use super::stop::{Ending, Stop};
use super::stream::Stream;
use crate::{Export, Limits, Listener, ServeError, ServerTls};

pub(super) struct Shared {
    pub(super) choice: Choice,
    pub(super) limits: Limits,
    tls: ServerTls,
    connections: RefCell<Connections>,
    pub(super) expected: Expected,
    /// Nobody is let in any more.
    closed: Cell<bool>,
}

#[derive(Default)]
struct Connections {
    next: u64,
    open: BTreeMap<u64, Open>,
}

impl Shared {
    /// Begins a connection: `serve` is its task. Its export is known if it had its handshake somewhere else.
    pub(super) fn open<S: Future<Output = Result<(), ServeError>> + 'static>(
        self: &Rc<Self>,
        export: Option<String>,
        serve: impl FnOnce(Entry, Rc<Stop>) -> S,
    ) {
        let mut connections = self.connections.borrow_mut();
        if export.is_none() {
            let expected = match &self.choice {
                Choice::Own(..) => 0,
                Choice::Others(directory) => directory.expected(),
            };
            let waiting = expected.saturating_mul(self.limits.connections);
            connections.make_room(false, self.limits.handshakes);
            connections.make_room(true, waiting.max(self.limits.handshakes));
        }
        let id = connections.next;
        connections.next += 1;
        let stop = Rc::<Stop>::default();
        let serving = serve(Entry { shared: Rc::clone(self), id }, Rc::clone(&stop));
        let task = tokio::task::spawn_local(connection(serving));
        connections.open.insert(id, Open { export, stop, task: Some(task), peer: None });
    }

    pub(super) fn clients(&self) -> BTreeSet<Peer> {
        self.connections.borrow().present().filter_map(|open| open.peer.clone()).collect()
    }

    fn note_dropped(&self, peer: Option<Peer>) {
        peer.into_iter().for_each(|peer| self.expected.was_dropped(peer));
    }

    /// Ends a connection that nobody needs, if there is one: descriptors are short.
    fn give_way(&self) -> bool {
        let mut connections = self.connections.borrow_mut();
        let seats = match &self.choice {
            Choice::Own(_, seats) => seats.as_ref(),
            Choice::Others(_) => None,
        };
        let oldest = connections.handshakes().next();
        let Some(id) = oldest.or_else(|| seats.and_then(Seats::clear_one)) else { return false };
        tracing::debug!("an NBD client that does nothing gives way: few open files are left");
        self.note_dropped(connections.drop_one(id));
        true
    }
}

impl Connections {
    /// Those of them whose client is still there.
    fn present(&self) -> impl Iterator<Item = &Open> {
        self.open.values().filter(|open| open.export.is_some() && !open.stop.has_client_left())
    }

    /// Those in their handshake, the first that came first.
    fn handshakes(&self) -> impl Iterator<Item = u64> {
        self.open.iter().filter(|(_, open)| open.export.is_none()).map(|(id, _)| *id)
    }

    /// Makes room for one more handshake, if there are `limit`: of those that wait for an export that is expected, or of the
    /// others. When an agent is started all the clients of its disks wait.
    fn make_room(&mut self, waiting: bool, limit: usize) {
        let of_these = |id: &u64| self.open.get(id).is_some_and(|open| open.stop.is_awaiting() == waiting);
        let mut handshakes = self.handshakes().filter(of_these);
        let Some(oldest) = handshakes.next() else { return };
        if handshakes.count() + 1 < limit.max(1) {
            return;
        }
        tracing::debug!(limit, "too many NBD handshakes, dropping the oldest");
        self.drop_one(oldest);
    }

    /// Ends a connection for another. It is out of the list at once: its task ends only when it is its turn. Whose it was, if that
    /// was served.
    fn drop_one(&mut self, id: u64) -> Option<Peer> {
        let Open { task, peer, .. } = self.open.remove(&id)?;
        task.iter().for_each(JoinHandle::abort);
        peer
    }
}

struct Open {
    /// The canonical name of its export, once the handshake has settled it.
    export: Option<String>,
    stop: Rc<Stop>,
    task: Option<JoinHandle<()>>,
    /// Its client, once that is served.
    peer: Option<Peer>,
}

/// A server that accepts clients. Dropping it stops everything at once; see
/// [`shutdown`](Self::shutdown) for the orderly way.
pub struct Server {
    address: NbdAddress,
    accepting: JoinHandle<()>,
    /// Clients that come by a shared socket.
    pub(super) adopting: Option<Adopting>,
    pub(super) shared: Rc<Shared>,
}

impl Server {
    pub(crate) fn start(listener: Listener, choice: Choice, limits: Limits, tls: ServerTls) -> Self {
        let (connections, expected) = (RefCell::default(), Expected::default());
        let shared = Shared { choice, limits, tls, connections, expected, closed: Cell::new(false) };
        let shared = Rc::new(shared);
        let address = listener.address().clone();
        let accepting = tokio::task::spawn_local(accept(listener, Rc::clone(&shared)));
        Self { address, accepting, adopting: None, shared }
    }

    /// Where clients connect.
    pub fn address(&self) -> &NbdAddress {
        &self.address
    }

    /// Connections that are served now, past their handshake. One whose client has left is none, though a request
    /// of it is not done yet.
    pub fn connections(&self) -> usize {
        self.shared.connections.borrow().present().count()
    }

    /// Connections that are in their handshake now.
    pub fn handshakes(&self) -> usize {
        self.shared.connections.borrow().handshakes().count()
    }

    /// Connections of one export, by its canonical name.
    pub fn connections_of(&self, export: &str) -> usize {
        let connections = self.shared.connections.borrow();
        connections.open.values().filter(|open| open.export.as_deref() == Some(export)).count()
    }

    /// Closes the connections of one export in good order, as [`shutdown`](Self::shutdown) does.
    /// Take it out of the [`Exports`](crate::Exports) first, or clients come back.
    pub async fn close_export(&self, export: &str, grace: Duration) {
        close(&self.shared, |open| open.export.as_deref() == Some(export), Ending::Final, grace).await;
    }

    /// Stops accepting, lets every connection finish what is in flight, answers what comes
    /// meanwhile with ESHUTDOWN, closes. Connections that are not done after `grace` are cut off.
    pub async fn shutdown(self, grace: Duration) {
        self.end(Ending::Final, grace).await;
    }

    /// The same where a successor is to serve these clients: what is not in flight yet is not
    /// answered. A client that reconnects sends it again, where an error would be its guest's.
    pub async fn hand_over(self, grace: Duration) {
        self.end(Ending::HandOver, grace).await;
    }

    /// Lets nobody in any more: who connects waits, for whoever listens there next, and who comes to the end of the handshake
    /// is hung up on. Those that are served are further on.
    pub fn stop_accepting(&mut self) {
        self.adopting = None;
        self.accepting.abort();
        self.shared.closed.set(true);
    }

    async fn end(mut self, ending: Ending, grace: Duration) {
        self.stop_accepting();
        // The loop's end closes the socket and removes its file.
        let _ = (&mut self.accepting).await;
        close(&self.shared, |_| true, ending, grace).await;
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.accepting.abort();
        for open in self.shared.connections.borrow().open.values() {
            if let Some(task) = &open.task {
                task.abort();
            }
        }
    }
}

async fn close(shared: &Shared, mut which: impl FnMut(&Open) -> bool, ending: Ending, grace: Duration) {
    let tasks: Vec<JoinHandle<()>> = shared
        .connections
        .borrow_mut()
        .open
        .values_mut()
        .filter(|open| which(open))
        .filter_map(|open| {
            open.stop.request(ending);
            open.task.take()
        })
        .collect();
    let cut_off: Vec<AbortHandle> = tasks.iter().map(JoinHandle::abort_handle).collect();
    let mut finished = pin!(async {
        for task in tasks {
            // An error is a task that was aborted or panicked: it is over.
            let _ = task.await;
        }
    });
    if tokio::time::timeout(grace, &mut finished).await.is_err() {
        tracing::warn!(?grace, "NBD connections did not finish in time, cutting them off");
        for task in cut_off {
            task.abort();
        }
        finished.await;
    }
}

async fn accept(listener: Listener, shared: Rc<Shared>) {
    let mut door = Door::new(format_args!("the NBD clients of {}", listener.address()));
    loop {
        let accepted = Door::accepted(listener.accept(), || shared.give_way()).await;
        let accepted = door.admit(accepted, || shared.give_way()).await;
        let Some(stream) = accepted else { continue };
        shared.open(None, |entry, stop| serve(stream, entry, stop));
    }
}

/// A connection's place in the list; leaves it when the task ends, however it ends.
pub(super) struct Entry {
    shared: Rc<Shared>,
    id: u64,
}

impl Entry {
    /// Takes a place among the clients that are served, of one that only sat there if there is no other.
    fn sit_down(&self, seats: &Seats, process: Option<u32>) -> Result<Seat, ServeError> {
        let full = ServeError::Full(self.shared.limits.connections);
        let (seat, evicted) = seats.take(self.id, process).ok_or(full)?;
        if let Some(evicted) = evicted {
            tracing::debug!("an NBD client that does nothing gives way");
            let peer = self.shared.connections.borrow_mut().drop_one(evicted);
            self.shared.note_dropped(peer);
        }
        Ok(seat)
    }

    /// Serves a client that has chosen `export`.
    pub(super) async fn serve(
        &self,
        negotiated: Negotiated,
        export: Rc<dyn Export>,
        seats: Option<&Seats>,
        stop: &Stop,
    ) -> Result<(), ServeError> {
        if self.shared.closed.get() {
            return Ok(());
        }
        let (process, peer) = (negotiated.stream.process(), negotiated.stream.peer());
        let seat = seats.map(|seats| self.sit_down(seats, process)).transpose()?;
        let returning = Returning::new(&self.shared, &peer);
        if let Some(open) = self.shared.connections.borrow_mut().open.get_mut(&self.id) {
            open.export = Some(negotiated.session.export.name.clone());
            open.peer = Some(peer.clone());
        }
        let ended = serve_until(negotiated, export, self.shared.limits, stop, seat, returning).await;
        if matches!(ended, Err(ServeError::Stalled(_))) {
            // It may only have been stopped for a while.
            self.shared.expected.was_dropped(peer);
        }
        ended
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        // Taken out before it is dropped: dropping must not find the list borrowed.
        let open = self.shared.connections.borrow_mut().open.remove(&self.id);
        drop(open);
    }
}

async fn connection(serving: impl Future<Output = Result<(), ServeError>>) {
    if let Err(error) = serving.await {
        let source = std::error::Error::source(&error);
        tracing::debug!(%error, source, "NBD connection ended");
    }
}

async fn serve(stream: Stream, entry: Entry, stop: Rc<Stop>) -> Result<(), ServeError> {
    let Shared { choice, limits, tls, .. } = &*entry.shared;
    let gate = Gate::new(choice, limits, tls, &stop, stream.process());
    let Some(negotiated) = negotiate(stream, &gate).await? else { return Ok(()) };
    match choice {
        Choice::Own(exports, seats) => {
            let name = &negotiated.session.requested;
            let export = exports.find(name).ok_or_else(|| ServeError::ExportGone(name.clone()))?;
            entry.serve(negotiated, export, seats.as_ref(), &stop).await
        }
        Choice::Others(directory) => {
            // One whose thread stands still takes nobody.
            let passed = tokio::time::timeout(limits.handshake, directory.pass(negotiated)).await;
            passed.map_err(|_| ServeError::HandshakeTimeout(limits.handshake))?
        }
    }
}

#[cfg(test)]
mod tests {
    use backtide_nbd::{Command, ExportInfo, ExportSummary};
    use backtide_units::ByteCount;
    use tokio::task::LocalSet;

    use super::*;
    use crate::{Client, Exports, NbdUri, Reply};

    struct Disk;

    impl Export for Disk {
        fn info(&self) -> ExportInfo {
            ExportInfo::new("disk", ByteCount(1 << 20))
        }

        fn submit(&self, _: Command, reply: Reply) {
            reply.done();
        }
    }

    impl Exports for Disk {
        fn find(&self, _: &str) -> Option<Rc<dyn Export>> {
            Some(Rc::new(Self))
        }

        fn list(&self) -> Vec<ExportSummary> {
            Vec::new()
        }
    }

    #[tokio::test]
    async fn a_process_that_had_to_give_its_descriptors_back_is_expected() {
        let story = async {
            let directory = tempfile::tempdir().unwrap();
            let address = NbdAddress::Unix(directory.path().join("socket"));
            let limits = Limits::default();
            let server = Listener::bind(&address).await.unwrap().serve(Rc::new(Disk), limits);
            let uri = NbdUri { address, export: "disk".into(), tls: None };
            let _idler = Client::connect(&uri).await.unwrap();
            while server.connections() == 0 {
                tokio::task::yield_now().await;
            }
            let own = server.clients();
            assert!(matches!(own.first(), Some(Peer::Process { .. })), "{own:?}");
            tokio::time::pause();
            assert!(!server.shared.give_way(), "it may only just have come");
            tokio::time::advance(limits.handshake).await;
            assert!(server.shared.give_way());
            assert_eq!((server.clients(), server.expected()), ([].into(), own));
            assert!(!server.shared.give_way(), "nobody is left");
        };
        LocalSet::new().run_until(story).await;
    }
}
