//! The agent's side of a stream under TLS.

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use rustls::pki_types::ServerName;
use rustls::{ClientConfig, client::Resumption, crypto::aws_lc_rs};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::{
    Certificate, Loaded, Reloading, Role, Shelf, TlsError,
    folder::{authorities, described, identity},
    refusal::refused_receiver,
};

/// An encrypted stream, at the agent.
pub type ClientStream = tokio_rustls::client::TlsStream<TcpStream>;

/// Connects to receivers under TLS.
pub struct StreamClient {
    folder: PathBuf,
    config: Reloading<Arc<ClientConfig>>,
}

static CERTIFICATES: Shelf<Arc<ClientConfig>> = Shelf::new();

/// Why there is no encrypted stream.
#[derive(Debug)]
pub enum ConnectError {
    /// The socket failed.
    Io(io::Error),
    /// One side does not accept the other: a sentence.
    Refused(String),
}

impl StreamClient {
    /// With `ca-cert.pem`, `client-cert.pem` and `client-key.pem` of `folder`, which are read by another thread, now and
    /// when they change. Nothing is waited for here.
    ///
    /// # Errors
    /// When there is no thread to be had.
    pub fn of(folder: &Path) -> Result<Self, TlsError> {
        let config = CERTIFICATES.follow(Role::Client, folder, load)?;
        Ok(Self { folder: folder.to_path_buf(), config })
    }

    /// Whether there are certificates to begin with.
    ///
    /// # Errors
    /// When they cannot be used.
    pub async fn ready(&self) -> Result<(), TlsError> {
        self.config.current().await.map(drop)
    }

    /// Does the handshake with the receiver that `stream` reaches at `at`, whose certificate has to be
    /// for `name`. That the receiver refuses this side's certificate shows only when it is read from:
    /// [`StreamClient::explain`] tells then.
    ///
    /// # Errors
    /// See [`ConnectError`].
    pub async fn connect(
        &self,
        stream: TcpStream,
        name: &str,
        at: &str,
    ) -> Result<ClientStream, ConnectError> {
        let server = ServerName::try_from(name.to_owned())
            .map_err(|_| ConnectError::Refused(TlsError::Name(name.to_owned()).to_string()))?;
        let config = self.config.current().await.map_err(|error| ConnectError::Refused(error.chain()))?;
        let connector = TlsConnector::from(Arc::clone(&*config));
        connector.connect(server, stream).await.map_err(|error| match self.explain(&error, at) {
            Some(why) => ConnectError::Refused(why),
            None => ConnectError::Io(error),
        })
    }

    /// What an error of a stream means when it is about TLS: a sentence.
    pub fn explain(&self, error: &io::Error, at: &str) -> Option<String> {
        refused_receiver(error, at, &self.folder)
    }

    /// What a person should see to: a certificate that ends, files that cannot be used.
    pub fn warnings(&self) -> Vec<String> {
        self.config.warnings()
    }

    /// The agent's own certificate.
    pub fn certificate(&self) -> Option<Certificate> {
        self.config.certificate()
    }
}

/// What the receiver's certificate says, of an established stream.
pub fn receiver_certificate(stream: &ClientStream) -> Option<Certificate> {
    stream.get_ref().1.peer_certificates().and_then(described)
}

fn load(folder: &Path) -> Result<Loaded<Arc<ClientConfig>>, TlsError> {
    let unusable = |source| TlsError::unusable(folder, Role::Client, source);
    let own = identity(folder, Role::Client)?;
    let chain = own.chain.clone();
    let mut config = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(unusable)?
        .with_root_certificates(authorities(folder)?)
        .with_client_auth_cert(own.chain, own.key)
        .map_err(unusable)?;
    config.resumption = Resumption::disabled();
    Ok(Loaded { value: Arc::new(config), chain })
}
