//! The handshake, driven over a stream, with TLS where it is negotiated.
//!
//! Invariants: a client has one span of time for all of it, however it spreads its bytes; nothing
//! that came in the clear is read under TLS.

use std::{cell::RefCell, io, rc::Rc};

use backtide_nbd::server::{Catalog, Handshake, Session, Step};
use backtide_nbd::{ExportInfo, ExportSummary, Intake};
use backtide_tls::Rights;
use bytes::BytesMut;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::watch;

use super::directory::Directory;
use super::seats::Seats;
use super::stop::{Ending, Stop};
use super::stream::Stream;
use crate::{Exports, Limits, ServeError, ServerTls};

/// What clients choose from.
#[derive(Clone)]
pub(crate) enum Choice {
    /// Exports of this thread, for so many clients together; without bound for one alone.
    Own(Rc<dyn Exports>, Option<Seats>),
    /// Exports of other servers.
    Others(Directory),
}

/// A connection whose client has chosen its export.
pub(crate) struct Negotiated {
    pub(crate) stream: Stream,
    pub(crate) intake: Intake,
    pub(crate) session: Session,
}

/// What a server lets in.
pub(crate) struct Gate<'server> {
    pub(crate) choice: &'server Choice,
    pub(crate) limits: &'server Limits,
    pub(crate) tls: &'server ServerTls,
    pub(crate) stop: &'server Stop,
    /// Of the client, where its socket tells: who has most of the places gets no other.
    process: Option<u32>,
    /// For which disks the client's certificate speaks; who has none was let in without.
    rights: RefCell<Rights>,
}

/// Does the handshake with the client behind `stream`. `None` when the client wanted nothing
/// more than to look, or the server stops.
pub(crate) async fn negotiate(stream: Stream, gate: &Gate<'_>) -> Result<Option<Negotiated>, ServeError> {
    let after = gate.limits.handshake;
    tokio::time::timeout(after, handshake(stream, gate))
        .await
        .map_err(|_| ServeError::HandshakeTimeout(after))?
}

async fn handshake(mut stream: Stream, gate: &Gate<'_>) -> Result<Option<Negotiated>, ServeError> {
    let mut intake = Intake::new();
    let mut out = BytesMut::new();
    let mut machine = Handshake::start(gate.tls.mode(), &mut out);
    let mut changes = gate.changes();
    loop {
        if gate.stop.asked() == Some(Ending::HandOver) {
            return Ok(None);
        }
        let step = machine.step(&mut intake, gate, &mut out);
        if !out.is_empty() {
            let Some(sent) = gate.unless_stopped(send(&mut stream, &mut out)).await else { return Ok(None) };
            sent?;
        }
        match step? {
            Step::Answered => {}
            Step::Awaited => {
                gate.stop.client_awaits(true);
                let Some(()) = gate.unless_stopped(changed(&mut changes)).await else { return Ok(None) };
                gate.stop.client_awaits(false);
            }
            Step::NeedMore => {
                let mut space = intake.space();
                // What has arrived is answered before a stop is heeded.
                let Some(read) = gate.unless_stopped(stream.read_buf(&mut space)).await else {
                    return Ok(None);
                };
                if read? == 0 {
                    // Looking whether anybody listens is no offense.
                    let clean = intake.buffered().is_empty();
                    return if clean { Ok(None) } else { Err(ServeError::Truncated) };
                }
            }
            Step::StartTls => {
                let Some(acceptor) = gate.unless_stopped(gate.tls.acceptor()).await else { return Ok(None) };
                let acceptor = acceptor.map_err(|error| ServeError::Tls(io::Error::other(error.chain())))?;
                let secured = stream.secured(acceptor);
                let Some(secured) = gate.unless_stopped(secured).await else { return Ok(None) };
                stream = secured.map_err(ServeError::Tls)?;
                gate.rights.replace(ServerTls::rights_of(stream.client_certificates()));
                if let Err(why) = gate.admitted() {
                    tracing::warn!(why, "an NBD client is served nothing");
                }
                machine.tls_started();
            }
            Step::Transmission(session) => {
                return Ok(Some(Negotiated { stream, intake, session: *session }));
            }
            Step::Closed => {
                stream.shutdown().await?;
                return Ok(None);
            }
        }
    }
}

async fn send(stream: &mut Stream, out: &mut BytesMut) -> io::Result<()> {
    stream.write_all_buf(out).await?;
    stream.flush().await
}

/// Waits until exports have come or gone.
async fn changed(changes: &mut Option<watch::Receiver<()>>) {
    let told = match changes {
        Some(changes) => changes.changed().await.is_ok(),
        None => false,
    };
    // Nobody is left who could change them.
    if !told {
        std::future::pending().await
    }
}

impl<'server> Gate<'server> {
    pub(crate) fn new(
        choice: &'server Choice,
        limits: &'server Limits,
        tls: &'server ServerTls,
        stop: &'server Stop,
        process: Option<u32>,
    ) -> Self {
        Self { choice, limits, tls, stop, process, rights: RefCell::new(Rights::all()) }
    }

    fn changes(&self) -> Option<watch::Receiver<()>> {
        match self.choice {
            Choice::Own(..) => None,
            Choice::Others(directory) => Some(directory.changes()),
        }
    }

    /// Whether the client may have what this server is for, if that is one disk.
    fn admitted(&self) -> Result<(), String> {
        self.tls.disk().map_or(Ok(()), |disk| self.rights.borrow().check(disk))
    }

    /// Does `work` as far as it needs no waiting once the server stops.
    async fn unless_stopped<T>(&self, work: impl Future<Output = T>) -> Option<T> {
        tokio::select! {
            biased;
            done = work => Some(done),
            _ = self.stop.requested() => None,
        }
    }
}

impl Catalog for Gate<'_> {
    fn is_shutting_down(&self) -> bool {
        self.stop.asked().is_some()
    }

    fn is_full(&self, name: &str) -> bool {
        match self.choice {
            Choice::Own(_, seats) => seats.as_ref().is_some_and(|seats| !seats.has_room(self.process)),
            Choice::Others(directory) => directory.is_full(name, self.process, &self.rights.borrow()),
        }
    }

    fn is_awaited(&self, name: &str) -> bool {
        match self.choice {
            Choice::Own(..) => false,
            Choice::Others(directory) => directory.is_awaited(name, &self.rights.borrow()),
        }
    }

    fn find(&self, name: &str) -> Option<ExportInfo> {
        self.admitted().ok()?;
        match self.choice {
            Choice::Own(exports, _) => exports.find(name).map(|export| export.info()),
            Choice::Others(directory) => directory.find(name, &self.rights.borrow()),
        }
    }

    fn list(&self) -> Vec<ExportSummary> {
        if self.admitted().is_err() {
            return Vec::new();
        }
        match self.choice {
            Choice::Own(exports, _) => exports.list(),
            Choice::Others(directory) => directory.list(&self.rights.borrow()),
        }
    }
}
