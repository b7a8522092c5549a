//! TLS with x509 certificates, on either side: which files, and what is checked.
//!
//! A folder holds them under the names QEMU and libnbd use, see [`backtide_tls::folder`].
//!
//! Invariants: TLS 1.2 or 1.3 and nothing older; a server's certificate is always verified, also
//! its name, which has to be a subject alternative name; a client's is unless told otherwise.
//! Files are read when a server starts to listen or a client connects for the first time, and again when they have
//! changed, by another thread ([`Reloading`]).
//! A client whose certificate names disks is served no other where the server knows its disk; no session is
//! resumed, so that each connection's certificate is looked at.

use std::{
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
};

use backtide_nbd::server::TlsMode;
use backtide_nbd::{NbdAddress, NbdUri, ParseUriError, UriTls};
use backtide_tls::folder::{authorities, described, identity};
use backtide_tls::{Loaded, Reloading, Rights, Role, Shelf, TlsError, WhichDisks};
use backtide_units::DiskName;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{ClientConfig, ServerConfig, crypto::aws_lc_rs};
use serde::{Deserialize, Serialize};
use tokio_rustls::{TlsAcceptor, TlsConnector};

/// What is configured for NBD sockets whose URI says nothing of TLS.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NbdTls {
    /// Whether clients may go without.
    pub mode: TlsDemand,
    /// The folder of the server's certificate; clients have to be signed by its authority.
    pub certificates: PathBuf,
}

/// Whether clients have to use TLS where it is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TlsDemand {
    /// They may: whoever uses it needs a certificate, whoever does not is served in the clear.
    Optional,
    /// They must.
    Required,
}

impl NbdTls {
    /// Whether a server could start with it.
    ///
    /// # Errors
    /// When the certificates cannot be used.
    pub fn check(&self) -> Result<(), TlsError> {
        server_config(&self.certificates, ClientCertificates::Required).map(drop)
    }

    /// The same place to listen, with this TLS unless it names its own.
    pub fn unless_told(&self, uri: NbdUri) -> NbdUri {
        let configured = || UriTls {
            certificates: self.certificates.clone(),
            hostname: None,
            required: self.mode == TlsDemand::Required,
        };
        NbdUri { tls: uri.tls.or_else(|| Some(configured())), ..uri }
    }
}

/// A place at which nothing is served.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoPlace {
    /// Whoever reaches this machine would be served in the clear.
    #[error(
        "{0} is refused: whoever reaches it over a network would read and write what is served there, in the clear: use nbds:// with certificates, or a daemon with --nbd-tls required, or with --insecure on a network that only hosts you trust are on"
    )]
    Open(String),
    /// A socket's path that depends on where the daemon was started.
    #[error("the socket of {0} has a relative path: name it from / on")]
    Relative(String),
}

impl NoPlace {
    /// Whether it is refused for who would be served.
    pub fn is_open(&self) -> bool {
        matches!(self, Self::Open(_))
    }
}

/// Where a daemon serves NBD when it is told a place.
#[derive(Clone, Debug, Default)]
pub struct NbdRule {
    /// TLS of places that say nothing of it.
    pub tls: Option<NbdTls>,
    /// Whether other machines may be served in the clear.
    pub insecure: bool,
}

impl NbdRule {
    /// Whether exports may be served at `uri`.
    ///
    /// # Errors
    /// When the path of its socket is relative, or other machines would be served in the clear, and nobody said that they may.
    pub fn check(&self, uri: &NbdUri) -> Result<(), NoPlace> {
        if let NbdAddress::Unix(path) = &uri.address
            && !path.is_absolute()
        {
            return Err(NoPlace::Relative(uri.to_string()));
        }
        self.check_open(uri)
    }

    /// The same of a daemon's own settings, where a path may be relative to where it was started.
    ///
    /// # Errors
    /// When other machines would be served in the clear, and nobody said that they may.
    pub fn check_open(&self, uri: &NbdUri) -> Result<(), NoPlace> {
        let served = self.tls.as_ref().map_or_else(|| uri.clone(), |tls| tls.unless_told(uri.clone()));
        if served.is_open_to_others() && !self.insecure {
            return Err(NoPlace::Open(uri.to_string()));
        }
        Ok(())
    }

    /// Where the setting `nbd_listen` of a daemon says that exports are served together, with TLS as configured unless it
    /// names its own.
    ///
    /// # Errors
    /// When it is no NBD URI, or one at which other machines would be served in the clear; a sentence.
    pub fn shared_uri(&self, nbd_listen: &str) -> Result<NbdUri, String> {
        let uri: NbdUri =
            nbd_listen.parse().map_err(|error: ParseUriError| format!("nbd_listen: {error}"))?;
        self.check_open(&uri).map_err(|error| format!("nbd_listen: {error}"))?;
        Ok(self.tls.as_ref().map_or_else(|| uri.clone(), |tls| tls.unless_told(uri.clone())))
    }
}

/// What a server wants of its clients under TLS.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ClientCertificates {
    /// A certificate signed by an authority of `ca-cert.pem`.
    #[default]
    Required,
    /// Nothing: whoever reaches the socket is let in, encrypted.
    NotAsked,
}

static SERVERS: Shelf<Arc<ServerConfig>> = Shelf::new();
static OPEN_SERVERS: Shelf<Arc<ServerConfig>> = Shelf::new();
static CLIENTS: Shelf<Arc<ClientConfig>> = Shelf::new();

/// Whether and how a server encrypts.
#[derive(Clone, Default)]
pub struct ServerTls {
    mode: TlsMode,
    config: Option<Reloading<Arc<ServerConfig>>>,
    /// What is served: a client's certificate has to speak for it.
    disk: Option<DiskName>,
}

impl ServerTls {
    /// In the clear.
    pub fn off() -> Self {
        Self::default()
    }

    /// With the server's certificate of `folder`.
    ///
    /// # Errors
    /// When the files are missing or do not fit; not when TLS is off, they are not looked at then.
    pub async fn load(mode: TlsMode, folder: &Path, clients: ClientCertificates) -> Result<Self, TlsError> {
        if mode == TlsMode::Off {
            return Ok(Self::off());
        }
        let shelf = match clients {
            ClientCertificates::Required => &SERVERS,
            ClientCertificates::NotAsked => &OPEN_SERVERS,
        };
        let config = shelf.follow(Role::Server, folder, move |folder| server_config(folder, clients))?;
        config.current().await?;
        Ok(Self { mode, config: Some(config), disk: None })
    }

    /// The same for clients whose certificate speaks for `disk`, or names no disks; see [`Rights`].
    #[must_use]
    pub fn for_disk(self, disk: DiskName) -> Self {
        Self { disk: Some(disk), ..self }
    }

    /// For which disks a client of this chain, which was verified, speaks. One that was not asked for a certificate
    /// speaks for all.
    pub(crate) fn rights_of(chain: Option<&[CertificateDer<'_>]>) -> Rights {
        let Some(chain) = chain else { return Rights::all() };
        // One that cannot be read names no disk.
        described(chain).map_or_else(Rights::none, |certificate| Rights::of(&certificate, WhichDisks::Any))
    }

    /// What is served, where that is one disk.
    pub(crate) fn disk(&self) -> Option<&DiskName> {
        self.disk.as_ref()
    }

    /// What the handshake is told.
    pub fn mode(&self) -> TlsMode {
        self.mode
    }

    /// Who does the encryption.
    ///
    /// # Panics
    /// When TLS is off.
    pub(crate) async fn acceptor(&self) -> Result<TlsAcceptor, TlsError> {
        let config = self.config.as_ref().expect("TLS is started only where it is on");
        Ok(TlsAcceptor::from(Arc::clone(&*config.current().await?)))
    }
}

impl fmt::Debug for ServerTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerTls").field("mode", &self.mode).finish_non_exhaustive()
    }
}

fn server_config(folder: &Path, clients: ClientCertificates) -> Result<Loaded<Arc<ServerConfig>>, TlsError> {
    let unusable = |source| TlsError::unusable(folder, Role::Server, source);
    let provider = Arc::new(aws_lc_rs::default_provider());
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(unusable)?;
    let builder = match clients {
        ClientCertificates::Required => {
            let roots = Arc::new(authorities(folder)?);
            let verifier =
                WebPkiClientVerifier::builder_with_provider(roots, provider).build().map_err(|source| {
                    TlsError::Authorities { folder: folder.to_path_buf(), source: Arc::new(source) }
                })?;
            builder.with_client_cert_verifier(verifier)
        }
        ClientCertificates::NotAsked => builder.with_no_client_auth(),
    };
    let own = identity(folder, Role::Server)?;
    let chain = own.chain.clone();
    let mut config = builder.with_single_cert(own.chain, own.key).map_err(unusable)?;
    // A session that was resumed would not be asked for its certificate, which may have ended.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(Loaded { value: Arc::new(config), chain })
}

fn client_config(folder: &Path) -> Result<Loaded<Arc<ClientConfig>>, TlsError> {
    let unusable = |source| TlsError::unusable(folder, Role::Client, source);
    let builder = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(unusable)?
        .with_root_certificates(authorities(folder)?);
    // A client shows who it is when it has something to show.
    if Role::Client.certificate(folder).exists() {
        let own = identity(folder, Role::Client)?;
        let chain = own.chain.clone();
        let config = builder.with_client_auth_cert(own.chain, own.key).map_err(unusable)?;
        Ok(Loaded { value: Arc::new(config), chain })
    } else {
        Ok(Loaded { value: Arc::new(builder.with_no_client_auth()), chain: Vec::new() })
    }
}

/// A client's certificates, for as long as it may connect again.
pub(crate) type ClientFiles = Reloading<Arc<ClientConfig>>;

/// A client's side of TLS to one server.
pub(crate) struct ClientTls {
    pub(crate) connector: TlsConnector,
    pub(crate) name: ServerName<'static>,
    pub(crate) files: ClientFiles,
}

impl ClientTls {
    /// What `tls` says, for a server at `address`. A unix socket's is `localhost` unless named.
    pub(crate) async fn load(tls: &UriTls, address: &NbdAddress) -> Result<Self, TlsError> {
        let files = CLIENTS.follow(Role::Client, &tls.certificates, client_config)?;
        let config = files.current().await?;
        let name = match (&tls.hostname, address) {
            (Some(name), _) => name.clone(),
            (None, NbdAddress::Tcp { host, .. }) => host.clone(),
            (None, NbdAddress::Unix(_)) => "localhost".to_owned(),
        };
        let name = ServerName::try_from(name.clone()).map_err(|_| TlsError::Name(name))?;
        Ok(Self { connector: TlsConnector::from(Arc::clone(&*config)), name, files })
    }
}
