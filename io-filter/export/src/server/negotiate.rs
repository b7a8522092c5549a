//! The handshake, driven over a stream.

use backtide_nbd::server::{Catalog, Handshake, Session, Step};
use backtide_nbd::{ExportInfo, ExportSummary, Intake};
use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::{Exports, Limits, ServeError};

/// A connection whose client has chosen its export.
///
/// It can be handed to the thread that owns the disk when its stream can be.
#[derive(Debug)]
pub struct Negotiated<S> {
    pub(crate) stream: S,
    pub(crate) intake: Intake,
    pub(crate) session: Session,
}

impl<S> Negotiated<S> {
    /// What was settled, among it the export's name.
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// The same connection over another form of its stream.
    ///
    /// # Errors
    /// Those of `convert`.
    pub fn try_map<T, E>(self, convert: impl FnOnce(S) -> Result<T, E>) -> Result<Negotiated<T>, E> {
        let stream = convert(self.stream)?;
        Ok(Negotiated { stream, intake: self.intake, session: self.session })
    }
}

/// Does the handshake with the client behind `stream`. `None` when the client wanted nothing
/// more than to look.
///
/// # Errors
/// When the client breaks the protocol, goes away half way or takes too long.
pub async fn negotiate<S: AsyncRead + AsyncWrite + Unpin>(
    stream: S,
    exports: &dyn Exports,
    limits: &Limits,
) -> Result<Option<Negotiated<S>>, ServeError> {
    tokio::time::timeout(limits.handshake, handshake(stream, exports))
        .await
        .map_err(|_| ServeError::HandshakeTimeout(limits.handshake))?
}

async fn handshake<S: AsyncRead + AsyncWrite + Unpin>(
    mut stream: S,
    exports: &dyn Exports,
) -> Result<Option<Negotiated<S>>, ServeError> {
    let catalog = Described(exports);
    let mut intake = Intake::new();
    let mut out = BytesMut::new();
    let mut machine = Handshake::start(&mut out);
    loop {
        let step = machine.step(&mut intake, &catalog, &mut out)?;
        if !out.is_empty() {
            stream.write_all_buf(&mut out).await?;
        }
        match step {
            Step::Answered => {}
            Step::NeedMore => {
                if stream.read_buf(&mut intake.space()).await? == 0 {
                    // Looking whether anybody listens is no offense.
                    let clean = intake.buffered().is_empty();
                    return if clean { Ok(None) } else { Err(ServeError::Truncated) };
                }
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

struct Described<'exports>(&'exports dyn Exports);

impl Catalog for Described<'_> {
    fn find(&self, name: &str) -> Option<ExportInfo> {
        self.0.find(name).map(|export| export.info())
    }

    fn list(&self) -> Vec<ExportSummary> {
        self.0.list()
    }
}
