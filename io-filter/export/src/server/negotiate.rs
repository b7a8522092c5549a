//! The handshake, driven over a stream, with TLS where it is negotiated.
//!
//! Invariants: a client has one span of time for all of it, however it spreads its bytes; nothing
//! that came in the clear is read under TLS.

use std::{cell::Cell, io};

use backtide_nbd::server::{Catalog, Handshake, Session, Step, Unavailable};
use backtide_nbd::{ExportInfo, ExportSummary, Intake};
use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::stop::{Ending, Stop};
use crate::{Exports, Limits, ServeError, ServerTls};

/// A connection's stream: a socket of either kind, with or without TLS.
pub(crate) trait Duplex: AsyncRead + AsyncWrite + Unpin {}
impl<S: AsyncRead + AsyncWrite + Unpin> Duplex for S {}
pub(crate) type Stream = Box<dyn Duplex>;

/// A connection whose client has chosen its export.
pub(crate) struct Negotiated {
    pub(crate) stream: Stream,
    pub(crate) intake: Intake,
    pub(crate) session: Session,
}

/// What a server lets in.
pub(crate) struct Gate<'server> {
    pub(crate) exports: &'server dyn Exports,
    pub(crate) limits: &'server Limits,
    pub(crate) tls: &'server ServerTls,
    pub(crate) stop: &'server Stop,
    /// Whether one client more may begin transmission.
    pub(crate) has_room: &'server dyn Fn() -> bool,
    /// The client's certificate is for other disks: there is no export for it.
    pub(crate) denied: Cell<bool>,
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
                let secured = gate.tls.acceptor().accept(stream);
                let Some(secured) = gate.unless_stopped(secured).await else { return Ok(None) };
                let secured = secured.map_err(ServeError::Tls)?;
                if let Err(why) = gate.tls.admit(secured.get_ref().1.peer_certificates()) {
                    tracing::warn!(why, "an NBD client is served nothing");
                    gate.denied.set(true);
                }
                stream = Box::new(secured);
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

impl Gate<'_> {
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
    fn unavailable(&self) -> Option<Unavailable> {
        if self.stop.asked().is_some() {
            return Some(Unavailable::ShuttingDown);
        }
        (!(self.has_room)()).then_some(Unavailable::Full)
    }

    fn find(&self, name: &str) -> Option<ExportInfo> {
        if self.denied.get() {
            return None;
        }
        self.exports.find(name).map(|export| export.info())
    }

    fn list(&self) -> Vec<ExportSummary> {
        if self.denied.get() { Vec::new() } else { self.exports.list() }
    }
}
