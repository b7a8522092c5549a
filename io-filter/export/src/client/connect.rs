//! Reaching a server and shaking hands.

use std::{io, sync::Arc, time::Duration};

use backtide_nbd::client::{Goal, Handshake, Session, Step};
use backtide_nbd::{ExportSummary, Intake, NbdAddress, NbdUri};
use bytes::BytesMut;
use rustix::net::sockopt;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::client::TlsStream;

use super::{request::ClientOptions, silence::Watch};
use crate::{
    ClientError,
    alive::Patience,
    tls::{ClientFiles, ClientTls},
};

/// Either kind of socket's stream.
///
/// Invariant: what a stream that is dropped has not got through to the server never gets there. A request that was given up
/// is made again on another connection, where newer ones follow it: the kernel would go on sending the old one for minutes.
pub(super) trait Duplex: AsyncRead + AsyncWrite + Unpin + Send {
    /// What was written still gets to the server after the drop: it was told good-bye.
    fn keep_what_was_sent(&self);
}

impl Duplex for TcpStream {
    fn keep_what_was_sent(&self) {
        // The server notices without the good-bye too.
        let _ = sockopt::set_socket_linger(self, None);
    }
}

/// On this host nothing is under way between the two.
impl Duplex for UnixStream {
    fn keep_what_was_sent(&self) {}
}

impl Duplex for TlsStream<Box<dyn Duplex>> {
    fn keep_what_was_sent(&self) {
        self.get_ref().0.keep_what_was_sent();
    }
}

/// A connection ready for requests.
pub(super) struct Connected {
    pub(super) stream: Box<dyn Duplex>,
    pub(super) intake: Intake,
    pub(super) session: Session,
    pub(super) watch: Option<Watch>,
    /// What it has shown, which is followed for as long as somebody may connect again.
    pub(super) files: Option<ClientFiles>,
}

enum Outcome {
    Connected(Box<Connected>),
    Listed(Vec<ExportSummary>),
}

/// The exports of a server, as it lists them; the export `uri` names does not matter.
///
/// # Errors
/// When the server cannot be reached, refuses, or does not answer in time.
pub async fn list_exports(uri: &NbdUri, options: &ClientOptions) -> Result<Vec<ExportSummary>, ClientError> {
    match reach(uri, Goal::List, options).await? {
        Outcome::Listed(exports) => Ok(exports),
        Outcome::Connected(_) => unreachable!("the goal was a list"),
    }
}

/// Connects to the export of `uri`.
pub(super) async fn open(uri: &NbdUri, options: &ClientOptions) -> Result<Connected, ClientError> {
    match reach(uri, Goal::Open(uri.export.clone()), options).await? {
        Outcome::Connected(connected) => Ok(*connected),
        Outcome::Listed(_) => unreachable!("the goal was an export"),
    }
}

async fn reach(uri: &NbdUri, goal: Goal, options: &ClientOptions) -> Result<Outcome, ClientError> {
    let (after, address) = (options.connect_timeout, &uri.address);
    let files = |error| ClientError::TlsFiles(Arc::new(error));
    let tls = match &uri.tls {
        Some(tls) => Some(ClientTls::load(tls, address).await.map_err(files)?),
        None => None,
    };
    let reached = async {
        let (stream, watch) = connect(address, options)
            .await
            .map_err(|source| ClientError::Connect { address: address.clone(), source: Arc::new(source) })?;
        shake_hands(stream, watch, goal, address, tls).await
    };
    tokio::time::timeout(after, reached)
        .await
        .map_err(|_| ClientError::HandshakeTimeout { address: address.clone(), after })?
}

async fn connect(
    address: &NbdAddress,
    options: &ClientOptions,
) -> io::Result<(Box<dyn Duplex>, Option<Watch>)> {
    match address {
        NbdAddress::Tcp { host, port } => {
            let stream = connect_tcp(host, *port).await?;
            let watch = Watch::new(&stream, options.host_silence)?;
            Ok((Box::new(stream), Some(watch)))
        }
        NbdAddress::Unix(path) => Ok((Box::new(UnixStream::connect(path).await?), None)),
    }
}

async fn connect_tcp(host: &str, port: u16) -> io::Result<TcpStream> {
    let stream = TcpStream::connect((host, port)).await?;
    stream.set_nodelay(true)?;
    sockopt::set_socket_linger(&stream, Some(Duration::ZERO))?;
    Patience::WITH_SERVERS.apply(&stream)?;
    Ok(stream)
}

async fn shake_hands(
    mut stream: Box<dyn Duplex>,
    watch: Option<Watch>,
    goal: Goal,
    address: &NbdAddress,
    tls: Option<ClientTls>,
) -> Result<Outcome, ClientError> {
    let mut intake = Intake::new();
    let mut out = BytesMut::new();
    let mut machine = if tls.is_some() { Handshake::with_tls(goal) } else { Handshake::new(goal) };
    loop {
        let step = machine.step(&mut intake, &mut out)?;
        if !out.is_empty() {
            stream.write_all_buf(&mut out).await?;
            stream.flush().await?;
        }
        match step {
            Step::NeedMore => {
                if stream.read_buf(&mut intake.space()).await? == 0 {
                    return Err(ClientError::Closed);
                }
            }
            Step::StartTls => {
                let ClientTls { connector, name, .. } = tls.as_ref().expect("it was asked for");
                let secured = connector.connect(name.clone(), stream).await.map_err(|source| {
                    ClientError::Tls { address: address.clone(), source: Arc::new(source) }
                })?;
                stream = Box::new(secured);
                machine.tls_started(&mut out);
            }
            Step::Transmission(session) => {
                let files = tls.map(|tls| tls.files);
                let connected = Connected { stream, intake, session, watch, files };
                return Ok(Outcome::Connected(Box::new(connected)));
            }
            Step::Listed(exports) => return Ok(Outcome::Listed(exports)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_server_whose_host_is_gone_is_given_up_in_seconds_and_one_without_room_is_not() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let stream = connect_tcp("127.0.0.1", port).await.unwrap();
        assert!(sockopt::socket_keepalive(&stream).unwrap());
        let probes = sockopt::tcp_keepcnt(&stream).unwrap();
        let asked =
            sockopt::tcp_keepidle(&stream).unwrap() + sockopt::tcp_keepintvl(&stream).unwrap() * probes;
        assert!(asked <= Duration::from_secs(20), "given up after {asked:?} of silence");
        assert_eq!(sockopt::tcp_user_timeout(&stream).unwrap(), 0, "a closed window counts as silence");
        assert_eq!(
            sockopt::socket_linger(&stream).unwrap(),
            Some(Duration::ZERO),
            "nothing is sent after a drop"
        );
        stream.keep_what_was_sent();
        assert_eq!(sockopt::socket_linger(&stream).unwrap(), None);
        let patience = ClientOptions::default().host_silence;
        assert!(patience <= Duration::from_secs(20), "given up {patience:?} after a request");
    }
}
