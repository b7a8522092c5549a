//! The receiver's side of a stream under TLS: who is let in, and for which disks.

use std::{
    io,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
};

use rustls::{ServerConfig, crypto::aws_lc_rs, server::NoServerSessionStorage, server::WebPkiClientVerifier};
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;

use crate::{
    Certificate, Loaded, Reloading, Rights, Role, Secured, Session, Shelf, TlsError, WhichDisks,
    folder::{authorities, described, identity},
    refusal::refused_agent,
};

/// The longest time the last words to a refused peer may take.
const LAST_WORDS: std::time::Duration = std::time::Duration::from_secs(1);

/// Takes agents' streams under TLS.
pub struct StreamServer {
    folder: PathBuf,
    disks: WhichDisks,
    config: Reloading<Arc<ServerConfig>>,
}

static CERTIFICATES: Shelf<Arc<ServerConfig>> = Shelf::new();

/// A peer whose certificate was verified.
#[derive(Clone, Debug)]
pub struct Peer {
    /// What its certificate says.
    pub certificate: Certificate,
    /// The disks it speaks for.
    pub rights: Rights,
}

impl StreamServer {
    /// With `ca-cert.pem`, `server-cert.pem` and `server-key.pem` of `folder`, which are read again
    /// when they change, by another thread.
    ///
    /// # Errors
    /// When they cannot be used.
    pub async fn load(folder: &Path, disks: WhichDisks) -> Result<Self, TlsError> {
        let config = CERTIFICATES.follow(Role::Server, folder, load)?;
        config.current().await?;
        Ok(Self { folder: folder.to_path_buf(), disks, config })
    }

    /// Does the handshake with a peer that has connected at `at`.
    ///
    /// # Errors
    /// Why the peer is refused: a sentence. It has been told, as far as TLS has words for it.
    pub async fn accept(
        &self,
        stream: TcpStream,
        from: Option<IpAddr>,
        at: &str,
    ) -> Result<(Secured<TcpStream>, Peer), String> {
        let config = self.config.current().await.map_err(|error| error.chain())?;
        let acceptor = TlsAcceptor::from(Arc::clone(&*config));
        match acceptor.accept(stream).into_fallible().await {
            Ok(stream) => {
                let (io, session) = stream.into_inner();
                let certificate = session.peer_certificates().and_then(described);
                let Some(certificate) = certificate else {
                    return Err(format!("an agent{} has a certificate that cannot be read", text_of(from)));
                };
                let rights = Rights::of(&certificate, self.disks);
                Ok((Secured::new(io, Session::new(session)), Peer { certificate, rights }))
            }
            Err((error, stream)) => {
                last_words(stream).await;
                Err(refused_agent(&error, &text_of(from), at, &self.folder))
            }
        }
    }

    /// What a person should see to: a certificate that ends, files that cannot be used.
    pub fn warnings(&self) -> Vec<String> {
        self.config.warnings()
    }

    /// The receiver's own certificate.
    pub fn certificate(&self) -> Option<Certificate> {
        self.config.certificate()
    }

    /// Where its certificates are.
    pub fn folder(&self) -> &Path {
        &self.folder
    }
}

fn load(folder: &Path) -> Result<Loaded<Arc<ServerConfig>>, TlsError> {
    let unusable = |source| TlsError::unusable(folder, Role::Server, source);
    let provider = Arc::new(aws_lc_rs::default_provider());
    let verifier =
        WebPkiClientVerifier::builder_with_provider(Arc::new(authorities(folder)?), Arc::clone(&provider))
            .build()
            .map_err(|source| TlsError::Authorities {
                folder: folder.to_path_buf(),
                source: Arc::new(source),
            })?;
    let own = identity(folder, Role::Server)?;
    let chain = own.chain.clone();
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(unusable)?
        .with_client_cert_verifier(verifier)
        .with_single_cert(own.chain, own.key)
        .map_err(unusable)?;
    // A session that was resumed would not be asked for its certificate, which may have ended.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(Loaded { value: Arc::new(config), chain })
}

/// Lets the peer read why it is refused: a socket that is closed with unread bytes throws away what
/// was sent last.
async fn last_words(mut stream: TcpStream) {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let read_out = async {
        stream.shutdown().await?;
        let mut scrap = [0; 4096];
        while stream.read(&mut scrap).await? > 0 {}
        Ok::<(), io::Error>(())
    };
    // Whatever comes of it: the connection is over.
    let _ = tokio::time::timeout(LAST_WORDS, read_out).await;
}

fn text_of(from: Option<IpAddr>) -> String {
    from.map(|from| format!(" at {from}")).unwrap_or_default()
}
