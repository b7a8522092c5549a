//! Reaching a disk's receiver: over a unix socket, TCP, or TCP under TLS.
//!
//! Certificates are looked at when a stream begins and not before, by another thread: a disk whose certificates are gone
//! is served and tracked all the same, and its status says what is missing.

use std::{cell::RefCell, io, rc::Rc};

use backtide_agent_api::{StreamTls, StreamTlsStatus};
use backtide_control::{Address, ApiError, ErrorCode};
use backtide_tls::{Certificate, ConnectError, StreamClient, TlsError, receiver_certificate};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpStream, UnixStream},
};

use super::stream::StreamError;

/// A stream in both directions.
pub(crate) trait Duplex: AsyncRead + AsyncWrite + Unpin {}
impl<S: AsyncRead + AsyncWrite + Unpin> Duplex for S {}

/// Connects to one receiver.
pub(crate) struct Dialer {
    receiver: Address,
    tls: Option<StreamTls>,
    /// There since the first stream under TLS; it follows its files from then on.
    client: RefCell<Option<Rc<StreamClient>>>,
    /// What the receiver has shown last.
    shown: RefCell<Option<Certificate>>,
}

/// Whether a receiver can be reached at all with this TLS.
///
/// # Errors
/// What is missing, to whoever attaches.
pub(crate) async fn check_tls(receiver: &Address, tls: Option<&StreamTls>) -> Result<(), ApiError> {
    let Address::Tls { .. } = receiver else { return Ok(()) };
    let Some(tls) = tls else {
        return Err(ApiError::new(ErrorCode::Usage, no_certificates(receiver))
            .with_hint("`backtide pki issue` makes some; docs/cli.md says how"));
    };
    let unusable = |error: TlsError| ApiError::new(ErrorCode::Usage, error.chain());
    StreamClient::of(&tls.certificates).map_err(unusable)?.ready().await.map_err(unusable)
}

fn no_certificates(receiver: &Address) -> String {
    format!(
        "{receiver} needs certificates: --tls-certificates DIR, or [stream_tls] in the agent's configuration"
    )
}

impl Dialer {
    pub(crate) fn new(receiver: Address, tls: Option<StreamTls>) -> Self {
        Self { receiver, tls, client: RefCell::default(), shown: RefCell::default() }
    }

    pub(crate) fn address(&self) -> &Address {
        &self.receiver
    }

    /// A stream on which nothing was said yet.
    pub(crate) async fn connect(&self) -> Result<Box<dyn Duplex>, StreamError> {
        let unreachable = |source| StreamError::Unreachable { address: self.receiver.clone(), source };
        Ok(match &self.receiver {
            Address::Unix(path) => Box::new(UnixStream::connect(path).await.map_err(unreachable)?),
            Address::Tcp { host, port } => Box::new(tcp(host, *port).await.map_err(unreachable)?),
            Address::Tls { host, port } => {
                let client = self.client()?;
                let stream = tcp(host, *port).await.map_err(unreachable)?;
                let name = self.tls.as_ref().and_then(|tls| tls.hostname.as_deref()).unwrap_or(host);
                let connected = client.connect(stream, name, &self.receiver.to_string()).await;
                let stream = connected.map_err(|error| match error {
                    ConnectError::Io(source) => unreachable(source),
                    ConnectError::Refused(why) => StreamError::Tls(why),
                })?;
                self.shown.replace(receiver_certificate(&stream));
                Box::new(stream)
            }
        })
    }

    fn client(&self) -> Result<Rc<StreamClient>, StreamError> {
        if let Some(client) = &*self.client.borrow() {
            return Ok(Rc::clone(client));
        }
        let tls = self.tls.as_ref().ok_or_else(|| StreamError::Tls(no_certificates(&self.receiver)))?;
        let client = StreamClient::of(&tls.certificates).map_err(|error| StreamError::Tls(error.chain()))?;
        Ok(Rc::clone(self.client.borrow_mut().insert(Rc::new(client))))
    }

    /// The same error, in the words of TLS where it is about that.
    pub(crate) fn explained(&self, error: StreamError) -> StreamError {
        let StreamError::Lost(source) = &error else { return error };
        let client = self.client.borrow();
        let why = client.as_ref().and_then(|client| client.explain(source, &self.receiver.to_string()));
        why.map_or(error, StreamError::Tls)
    }

    /// The certificates of both sides; none where streams are in the clear.
    pub(crate) fn status(&self) -> Option<StreamTlsStatus> {
        let Address::Tls { .. } = &self.receiver else { return None };
        let client = self.client.borrow();
        let own = client.as_ref().and_then(|client| client.certificate());
        let shown = self.shown.borrow();
        let mut warnings = client.as_ref().map(|client| client.warnings()).unwrap_or_default();
        let receiver = self.receiver.to_string();
        warnings.extend(shown.as_ref().and_then(|shown| shown.warning_now(&receiver)));
        Some(StreamTlsStatus {
            subject: own.as_ref().map(|own| own.subject.clone()),
            not_after: own.map(|own| own.not_after),
            receiver: shown.as_ref().map(|shown| shown.subject.clone()),
            receiver_not_after: shown.as_ref().map(|shown| shown.not_after),
            warnings,
        })
    }
}

async fn tcp(host: &str, port: u16) -> io::Result<TcpStream> {
    let stream = TcpStream::connect((host, port)).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}
