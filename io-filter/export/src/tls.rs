//! TLS with x509 certificates, on either side: which files, and what is checked.
//!
//! A folder holds them under the names QEMU and libnbd use: `ca-cert.pem` (who signed the peer's
//! certificate), `server-cert.pem` and `server-key.pem`, `client-cert.pem` and `client-key.pem`.
//!
//! Invariants: TLS 1.2 or 1.3 and nothing older; a server's certificate is always verified, also
//! its name, which has to be a subject alternative name; a client's is unless told otherwise.
//! Files are read when a server starts to listen and when a client connects.

use std::{
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
};

use backtide_nbd::server::TlsMode;
use backtide_nbd::{NbdAddress, NbdUri, UriTls};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem, pem::PemObject};
use rustls::{ClientConfig, RootCertStore, ServerConfig, crypto::aws_lc_rs, server::WebPkiClientVerifier};
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
        ServerTls::load(TlsMode::Required, &self.certificates, ClientCertificates::Required).map(drop)
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

/// Certificates and keys that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file is missing, unreadable or no PEM file.
    #[error("cannot read {path:?} for TLS")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: pem::Error,
    },
    /// A file without what it should hold.
    #[error("{path:?} holds no certificate")]
    Empty {
        /// Which.
        path: PathBuf,
    },
    /// The files are no usable identity together: a key of another certificate, for one.
    #[error("cannot use the certificates of {folder:?} for TLS")]
    Unusable {
        /// The folder.
        folder: PathBuf,
        /// Why.
        source: rustls::Error,
    },
    /// The authorities that sign clients cannot be used.
    #[error("cannot verify clients with the authorities of {folder:?}")]
    Authorities {
        /// The folder.
        folder: PathBuf,
        /// Why.
        source: rustls::server::VerifierBuilderError,
    },
    /// A server's name no certificate can be for.
    #[error("{0:?} is no name a server's certificate can be for: give tls-hostname=NAME")]
    Name(String),
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

/// Whether and how a server encrypts.
#[derive(Clone, Default)]
pub struct ServerTls {
    mode: TlsMode,
    acceptor: Option<TlsAcceptor>,
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
    pub fn load(mode: TlsMode, folder: &Path, clients: ClientCertificates) -> Result<Self, TlsError> {
        if mode == TlsMode::Off {
            return Ok(Self::off());
        }
        let unusable = |source| TlsError::Unusable { folder: folder.to_path_buf(), source };
        let provider = Arc::new(aws_lc_rs::default_provider());
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(unusable)?;
        let builder = match clients {
            ClientCertificates::Required => {
                let roots = Arc::new(authorities(folder)?);
                let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider)
                    .build()
                    .map_err(|source| TlsError::Authorities { folder: folder.to_path_buf(), source })?;
                builder.with_client_cert_verifier(verifier)
            }
            ClientCertificates::NotAsked => builder.with_no_client_auth(),
        };
        let (chain, key) = identity(folder, "server")?;
        let config = builder.with_single_cert(chain, key).map_err(unusable)?;
        Ok(Self { mode, acceptor: Some(TlsAcceptor::from(Arc::new(config))) })
    }

    /// What the handshake is told.
    pub fn mode(&self) -> TlsMode {
        self.mode
    }

    /// Who does the encryption.
    ///
    /// # Panics
    /// When TLS is off.
    pub(crate) fn acceptor(&self) -> &TlsAcceptor {
        self.acceptor.as_ref().expect("TLS is started only where it is on")
    }
}

impl fmt::Debug for ServerTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerTls").field("mode", &self.mode).finish_non_exhaustive()
    }
}

/// A client's side of TLS to one server.
pub(crate) struct ClientTls {
    pub(crate) connector: TlsConnector,
    pub(crate) name: ServerName<'static>,
}

impl ClientTls {
    /// What `tls` says, for a server at `address`. A unix socket's is `localhost` unless named.
    pub(crate) fn load(tls: &UriTls, address: &NbdAddress) -> Result<Self, TlsError> {
        let folder = &*tls.certificates;
        let unusable = |source| TlsError::Unusable { folder: folder.to_path_buf(), source };
        let builder = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_safe_default_protocol_versions()
            .map_err(unusable)?
            .with_root_certificates(authorities(folder)?);
        // A client shows who it is when it has something to show.
        let config = if folder.join("client-cert.pem").exists() {
            let (chain, key) = identity(folder, "client")?;
            builder.with_client_auth_cert(chain, key).map_err(unusable)?
        } else {
            builder.with_no_client_auth()
        };
        let name = match (&tls.hostname, address) {
            (Some(name), _) => name.clone(),
            (None, NbdAddress::Tcp { host, .. }) => host.clone(),
            (None, NbdAddress::Unix(_)) => "localhost".to_owned(),
        };
        let name = ServerName::try_from(name.clone()).map_err(|_| TlsError::Name(name))?;
        Ok(Self { connector: TlsConnector::from(Arc::new(config)), name })
    }
}

/// Who may sign the peer's certificate.
fn authorities(folder: &Path) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(folder.join("ca-cert.pem"))? {
        roots
            .add(certificate)
            .map_err(|source| TlsError::Unusable { folder: folder.to_path_buf(), source })?;
    }
    Ok(roots)
}

/// A certificate with those that lead to its authority, and its key.
type Identity = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

fn identity(folder: &Path, whose: &str) -> Result<Identity, TlsError> {
    let chain = certificates(folder.join(format!("{whose}-cert.pem")))?;
    let path = folder.join(format!("{whose}-key.pem"));
    let key = PrivateKeyDer::from_pem_file(&path).map_err(|source| TlsError::File { path, source })?;
    Ok((chain, key))
}

fn certificates(path: PathBuf) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let read = CertificateDer::pem_file_iter(&path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    match read {
        Ok(found) if found.is_empty() => Err(TlsError::Empty { path }),
        Ok(found) => Ok(found),
        Err(source) => Err(TlsError::File { path, source }),
    }
}
