//! A folder of certificates under the names QEMU and libnbd use: `ca-cert.pem` (who signed the
//! peer's certificate), `server-cert.pem` and `server-key.pem`, `client-cert.pem` and `client-key.pem`.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use rustls::RootCertStore;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem, pem::PemObject};

use crate::{Certificate, certificate::version};

/// Which side of a connection an identity is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Who listens.
    Server,
    /// Who connects.
    Client,
}

/// Certificates and keys that cannot be used.
#[derive(Clone, Debug, thiserror::Error)]
pub enum TlsError {
    /// A file is missing, unreadable or no PEM file.
    #[error("cannot read {path:?} for TLS, where {expected} in PEM is expected")]
    File {
        /// Which.
        path: PathBuf,
        /// What it should hold.
        expected: &'static str,
        /// Why.
        source: Arc<pem::Error>,
    },
    /// A file without what it should hold.
    #[error("{path:?} holds no certificate")]
    Empty {
        /// Which.
        path: PathBuf,
    },
    /// A certificate of an X.509 version that TLS does not take.
    #[error(
        "the certificate in {path:?} is of X.509 version {version}, where version 3 is needed: issue it with extensions, such as subject alternative names"
    )]
    Version {
        /// Which.
        path: PathBuf,
        /// Its version.
        version: u32,
    },
    /// A key of another certificate.
    #[error("the key in {key:?} is not that of the certificate in {certificate:?}")]
    Key {
        /// The key's file.
        key: PathBuf,
        /// The certificate's.
        certificate: PathBuf,
    },
    /// A certificate of the past.
    #[error("the certificate of {subject} in {path:?} has expired at {at}")]
    Expired {
        /// The file.
        path: PathBuf,
        /// Whose certificate.
        subject: String,
        /// When.
        at: String,
    },
    /// A certificate of the future.
    #[error("the certificate of {subject} in {path:?} is not valid before {at} by this host's clock")]
    NotYetValid {
        /// The file.
        path: PathBuf,
        /// Whose certificate.
        subject: String,
        /// When it will be.
        at: String,
    },
    /// The files are no usable identity together.
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
        source: Arc<rustls::server::VerifierBuilderError>,
    },
    /// The file system of the certificates stands still.
    #[error("{folder:?} has not answered for {seconds} s, while certificates were to be read there")]
    Silent {
        /// The folder.
        folder: PathBuf,
        /// For how long.
        seconds: u64,
    },
    /// There is no thread to read with.
    #[error("cannot start a thread that reads the certificates of {folder:?}")]
    NoThread {
        /// The folder.
        folder: PathBuf,
        /// Why.
        source: Arc<std::io::Error>,
    },
    /// A server's name no certificate can be for.
    #[error("{0:?} is no name a server's certificate can be for: give tls-hostname=NAME")]
    Name(String),
}

impl TlsError {
    /// It with its causes, in one sentence.
    pub fn chain(&self) -> String {
        let mut text = self.to_string();
        let mut cause = std::error::Error::source(self);
        while let Some(error) = cause {
            text.push_str(": ");
            text.push_str(&error.to_string());
            cause = error.source();
        }
        text
    }

    /// What a person can do about it.
    pub(crate) fn way_out(&self) -> &'static str {
        match self {
            Self::Expired { .. } | Self::NotYetValid { .. } => {
                "put a certificate there that is valid now (is the clock right?), with its key"
            }
            Self::File { .. }
            | Self::Empty { .. }
            | Self::Version { .. }
            | Self::Key { .. }
            | Self::Unusable { .. } => "put a certificate there with its own key, whole files both",
            Self::Authorities { .. } => "put the certificates of authorities into its ca-cert.pem",
            Self::Silent { .. } => "see to its file system",
            Self::NoThread { .. } => "raise the limit of threads",
            Self::Name(_) => "give tls-hostname=NAME",
        }
    }

    /// Of an identity that TLS does not take.
    pub fn unusable(folder: &Path, role: Role, source: rustls::Error) -> Self {
        match source {
            rustls::Error::InconsistentKeys(_) => {
                Self::Key { key: role.key(folder), certificate: role.certificate(folder) }
            }
            source => Self::Unusable { folder: folder.to_path_buf(), source },
        }
    }
}

/// A certificate with those that lead to its authority, and its key.
pub struct Identity {
    /// The certificates, its own first.
    pub chain: Vec<CertificateDer<'static>>,
    /// The key.
    pub key: PrivateKeyDer<'static>,
}

impl Role {
    fn word(self) -> &'static str {
        match self {
            Self::Server => "server",
            Self::Client => "client",
        }
    }

    /// Its certificate's file.
    pub fn certificate(self, folder: &Path) -> PathBuf {
        folder.join(format!("{}-cert.pem", self.word()))
    }

    /// Its key's file.
    pub fn key(self, folder: &Path) -> PathBuf {
        folder.join(format!("{}-key.pem", self.word()))
    }

    /// Everything this side reads.
    pub fn files(self, folder: &Path) -> Vec<PathBuf> {
        vec![authority_file(folder), self.certificate(folder), self.key(folder)]
    }
}

/// The file of the authorities.
pub fn authority_file(folder: &Path) -> PathBuf {
    folder.join("ca-cert.pem")
}

/// Who may sign the peer's certificate.
///
/// # Errors
/// When the file is missing or holds no certificates.
pub fn authorities(folder: &Path) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(authority_file(folder))? {
        roots
            .add(certificate)
            .map_err(|source| TlsError::Unusable { folder: folder.to_path_buf(), source })?;
    }
    Ok(roots)
}

/// Who this side is.
///
/// # Errors
/// When a file is missing or holds something else.
pub fn identity(folder: &Path, role: Role) -> Result<Identity, TlsError> {
    let path = role.certificate(folder);
    let chain = certificates(path.clone())?;
    if let Some(version) = chain.iter().find_map(|one| version(one).filter(|version| *version != 3)) {
        return Err(TlsError::Version { path, version });
    }
    let path = role.key(folder);
    let unreadable = |source| TlsError::File { path: path.clone(), expected: "a private key", source };
    let key = PrivateKeyDer::from_pem_file(&path).map_err(|source| unreadable(Arc::new(source)))?;
    Ok(Identity { chain, key })
}

/// What the certificate of an identity says of itself.
pub fn described(chain: &[CertificateDer<'_>]) -> Option<Certificate> {
    chain.first().and_then(|own| Certificate::read(own))
}

fn certificates(path: PathBuf) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let read = CertificateDer::pem_file_iter(&path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    match read {
        Ok(found) if found.is_empty() => Err(TlsError::Empty { path }),
        Ok(found) => Ok(found),
        Err(source) => Err(TlsError::File { path, expected: "certificates", source: Arc::new(source) }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_certificate_of_version_1_is_told_with_its_file() {
        let folder = tempfile::tempdir().unwrap();
        // A body that begins with its serial number: where a version would be, there is none.
        let old = "-----BEGIN CERTIFICATE-----\nMAUwAwIBAQ==\n-----END CERTIFICATE-----\n";
        let path = Role::Server.certificate(folder.path());
        std::fs::write(&path, old).unwrap();
        let why = identity(folder.path(), Role::Server).err().unwrap().to_string();
        assert!(why.contains("server-cert.pem\" is of X.509 version 1, where version 3 is needed"), "{why}");
    }
}
