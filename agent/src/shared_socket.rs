//! The socket that all disks share: each is an export there, by its name.
//!
//! A thread of its own does the handshakes; who has chosen a disk goes to that disk's thread, as if he had come by its own
//! socket (`backtide_export::Directory`). So a disk that stands still holds up nobody else.
//!
//! Invariant: while the disks change hands nobody accepts here, and clients wait in the socket's queue.

use std::{io, time::Duration};

use backtide_control::build_lasting;
use backtide_export::{BindError, Directory, Limits, Listener, NbdUri};
use backtide_socket::Sockets;
use tokio::{runtime::Builder, sync::oneshot, task::LocalSet};

/// What the socket is kept for.
pub(crate) const SHARED_PURPOSE: &str = "nbd";

/// How long handshakes may take that are under way when nobody accepts any more: their clients come again.
const LAST_HANDSHAKES: Duration = Duration::from_millis(100);

/// Where it listens, for whom and within which bounds.
#[derive(Clone, Debug)]
pub(crate) struct SharedSocket {
    pub(crate) uri: NbdUri,
    pub(crate) limits: Limits,
    pub(crate) sockets: Sockets,
    pub(crate) directory: Directory,
}

/// The socket while clients are accepted on it. Dropped, it ends at once.
#[derive(Debug)]
pub(crate) struct Accepting {
    /// Where clients connect.
    pub(crate) uri: NbdUri,
    stop: oneshot::Sender<()>,
    ended: oneshot::Receiver<()>,
}

impl SharedSocket {
    /// Accepts clients from now on.
    ///
    /// # Errors
    /// When the address is in use or the certificates cannot be used.
    pub(crate) async fn accept(&self) -> Result<Accepting, BindError> {
        let (ready, is_ready) = oneshot::channel();
        let (stop, stopped) = oneshot::channel::<()>();
        let (end, ended) = oneshot::channel();
        let failed = |source| BindError::Io { address: self.uri.address.clone(), source };
        let (socket, runtime) = (self.clone(), build_lasting(&mut Builder::new_current_thread()));
        let runtime = runtime.map_err(failed)?;
        let serve = move || {
            LocalSet::new().block_on(&runtime, socket.serve(ready, stopped));
            // Nobody may be there to hear of it.
            let _ = end.send(());
        };
        std::thread::Builder::new().name("nbd".to_owned()).spawn(serve).map_err(failed)?;
        let uri = is_ready.await.map_err(|_| failed(io::Error::other("its thread ended at its start")))??;
        Ok(Accepting { uri, stop, ended })
    }

    async fn serve(self, ready: oneshot::Sender<Result<NbdUri, BindError>>, stopped: oneshot::Receiver<()>) {
        let Self { uri, limits, sockets, directory } = self;
        let bound = Listener::bind_kept(&uri, limits.socket_mode, &sockets, SHARED_PURPOSE).await;
        let listener = match bound {
            Ok(listener) => listener,
            Err(error) => return drop(ready.send(Err(error))),
        };
        let uri = NbdUri { address: listener.address().clone(), ..uri };
        tracing::info!(nbd = %uri, "every disk is served here too");
        let server = listener.serve_directory(directory, limits);
        if ready.send(Ok(uri)).is_ok() {
            // Dropped or sent: both mean the end.
            let _ = stopped.await;
        }
        server.hand_over(LAST_HANDSHAKES).await;
    }
}

impl Accepting {
    /// Accepts nobody any more; when this returns, no client of the socket comes to a disk.
    pub(crate) async fn end(self) {
        drop(self.stop);
        // An error is a thread that has ended.
        let _ = self.ended.await;
    }
}
