//! Asking a daemon: one HTTP call, one typed answer or one [`ApiError`].

use std::{fmt, os::unix::fs::MetadataExt, path::Path, pin::pin, sync::Arc, time::Duration};

use reqwest::{Method, RequestBuilder, Response};
use serde::{Serialize, de::DeserializeOwned};

use crate::{Address, ApiError, ErrorCode, serve::NO_SUCH_CALL};

/// How long a connection may take to be made.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a daemon may take until it begins to answer what needs no work. More than it waits itself for
/// a disk that stands still (10 s).
const ANSWER_TIME: Duration = Duration::from_secs(15);

/// How long a call may take as a whole. Attaching a disk opens it and may wait for an NBD server behind
/// it; nothing ordinary waits for a receiver.
const CALL_TIMEOUT: Duration = Duration::from_secs(60);

/// When whoever waits for a call that may take long hears that it still does.
pub const SILENT_TIME: Duration = Duration::from_secs(10);

/// Who hears that a daemon takes long.
#[derive(Clone)]
pub struct Tell(Arc<dyn Fn(&str) + Send + Sync>);

impl Tell {
    /// By this function, which gets one sentence.
    pub fn new(tell: impl Fn(&str) + Send + Sync + 'static) -> Self {
        Self(Arc::new(tell))
    }
}

impl fmt::Debug for Tell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Tell")
    }
}

/// Which daemon is asked: the words of the error when it does not answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    /// What it is called: `agent`.
    pub name: &'static str,
    /// How it is started: `backtide agent run`.
    pub start: &'static str,
    /// The flag that names another address: `--agent`.
    pub flag: &'static str,
    /// The environment variable that does: `BACKTIDE_AGENT`.
    pub variable: &'static str,
}

/// A daemon's control API, asked over a unix socket or TCP. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Client {
    http: reqwest::Client,
    base: String,
    address: Address,
    peer: Peer,
    at_length: bool,
    tell: Option<Tell>,
}

/// How long a connection is kept for the next call: shorter than the daemons keep it.
const IDLE_KEPT: Duration = Duration::from_secs(20);

impl Client {
    /// Of the `peer` at `address`. Connects with the first call, not now.
    ///
    /// # Errors
    /// When the HTTP client cannot be made (`failed`).
    pub fn new(address: &Address, peer: Peer) -> Result<Self, ApiError> {
        let mut builder = reqwest::Client::builder()
            .connect_timeout(CONNECT_TIMEOUT)
            .timeout(CALL_TIMEOUT)
            .pool_idle_timeout(IDLE_KEPT)
            // The environment's proxies are for the web; a control API is on this machine.
            .no_proxy();
        let base = match address {
            Address::Unix(path) => {
                builder = builder.unix_socket(path.as_path());
                "http://localhost".to_owned()
            }
            Address::Tcp { host, port } if host.contains(':') => format!("http://[{host}]:{port}"),
            Address::Tcp { host, port } => format!("http://{host}:{port}"),
            Address::Tls { .. } => {
                let message = format!("{address} cannot be asked: a control API is never under TLS");
                return Err(ApiError::new(ErrorCode::Usage, message)
                    .with_hint("it is served on a unix socket or on loopback; `ssh -L` brings it here"));
            }
        };
        let http = builder.build().map_err(|error| ApiError::from_error(ErrorCode::Failed, &error))?;
        Ok(Self { http, base, address: address.clone(), peer, at_length: false, tell: None })
    }

    /// The same, and `tell` hears of calls that take long.
    #[must_use]
    pub fn telling(self, tell: Tell) -> Self {
        Self { tell: Some(tell), ..self }
    }

    /// The same daemon, asked for what may take long: a minute, where 15 seconds are the most otherwise.
    #[must_use]
    pub fn at_length(&self) -> Self {
        Self { at_length: true, ..self.clone() }
    }

    /// Where the daemon is asked.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// `GET path`, where `query` becomes the query string.
    ///
    /// # Errors
    /// The daemon's own error, or `unreachable`.
    pub async fn get<Q, A>(&self, path: &str, query: &Q) -> Result<A, ApiError>
    where
        Q: Serialize + ?Sized,
        A: DeserializeOwned,
    {
        self.call(self.request(Method::GET, path).query(query)).await
    }

    /// `POST path` with a JSON body.
    ///
    /// # Errors
    /// The daemon's own error, or `unreachable`.
    pub async fn post<B, A>(&self, path: &str, body: &B) -> Result<A, ApiError>
    where
        B: Serialize + ?Sized,
        A: DeserializeOwned,
    {
        self.call(self.request(Method::POST, path).json(body)).await
    }

    /// `DELETE path`.
    ///
    /// # Errors
    /// The daemon's own error, or `unreachable`.
    pub async fn delete<A: DeserializeOwned>(&self, path: &str) -> Result<A, ApiError> {
        self.call(self.request(Method::DELETE, path)).await
    }

    fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.http.request(method, format!("{}{path}", self.base))
    }

    async fn call<A: DeserializeOwned>(&self, request: RequestBuilder) -> Result<A, ApiError> {
        let response = self.begun(request).await?;
        let status = response.status();
        let body = response.bytes().await.map_err(|error| self.no_answer(&error))?;
        if status.is_success() {
            return match serde_json::from_slice(&body) {
                Ok(answer) => Ok(answer),
                Err(error) => Err(self.unless_other(self.strange(&error.to_string())).await),
            };
        }
        match serde_json::from_slice::<ApiError>(&body) {
            Ok(error) if is_no_such_call(&error) => Err(self.unless_other(error).await),
            Ok(error) => Err(error),
            Err(_) => Err(self.unless_other(self.strange(&format!("HTTP status {status}"))).await),
        }
    }

    /// This error, unless it comes of the other daemon being asked.
    async fn unless_other(&self, error: ApiError) -> ApiError {
        let Peer { name, flag, variable, .. } = self.peer;
        match self.whose().await {
            Some(other) if other != name => {
                let message = format!(
                    "{} is the control API of the {other}, where that of the {name} is expected",
                    self.address
                );
                ApiError::new(ErrorCode::Usage, message)
                    .with_hint(format!("name the {name}'s with {flag} or {variable}"))
            }
            Some(_) | None => error,
        }
    }

    /// Which daemon this is, by what its status has.
    async fn whose(&self) -> Option<&'static str> {
        let answer = self.begun(self.request(Method::GET, "/v1/status")).await.ok()?;
        let body = answer.bytes().await.ok()?;
        let status: serde_json::Value = serde_json::from_slice(&body).ok()?;
        match (status.get("store_id"), status.get("instance")) {
            (Some(_), _) => Some("receiver"),
            (None, Some(_)) => Some("agent"),
            (None, None) => None,
        }
    }

    /// The answer's first bytes.
    async fn begun(&self, request: RequestBuilder) -> Result<Response, ApiError> {
        let mut answer = pin!(request.send());
        let first = if self.at_length { SILENT_TIME } else { ANSWER_TIME };
        let answer = match tokio::time::timeout(first, &mut answer).await {
            Ok(answer) => answer,
            Err(_) if !self.at_length => return Err(self.silent(ANSWER_TIME)),
            Err(_) => {
                if let Some(Tell(tell)) = &self.tell {
                    let (name, seconds) = (self.peer.name, SILENT_TIME.as_secs());
                    tell(&format!(
                        "the {name} at {} has not answered for {seconds} s, still waiting",
                        self.address
                    ));
                }
                answer.await
            }
        };
        answer.map_err(|error| self.no_answer(&error))
    }

    /// The daemon takes connections and says nothing.
    fn silent(&self, time: Duration) -> ApiError {
        let (name, seconds) = (self.peer.name, time.as_secs());
        let message = format!(
            "the {name} at {} has not answered for {seconds} s: its process or its storage stands still",
            self.address
        );
        ApiError::silence(message, seconds)
            .with_hint(format!("see whether the {name}'s process is stopped, and what its log says"))
    }

    /// The answer came from something else than our daemon, or from another version of it.
    fn strange(&self, found: &str) -> ApiError {
        let message =
            format!("the {} at {} gave an answer of another kind: {found}", self.peer.name, self.address);
        ApiError::new(ErrorCode::Failed, message)
            .with_hint("see that command and daemon have the same version")
    }

    fn no_answer(&self, error: &reqwest::Error) -> ApiError {
        let Peer { name, start, flag, variable } = self.peer;
        if error.is_timeout() && !error.is_connect() {
            return self.silent(CALL_TIMEOUT);
        }
        if let Some(path) = self.address.socket_path().filter(|_| is_denied(error)) {
            let message =
                format!("connect to the {name} at {}: permission denied: {}", self.address, owner(path));
            return ApiError::new(ErrorCode::Unreachable, message).with_hint(format!(
                "run the command as that user, or name another {name} with {flag} or {variable}"
            ));
        }
        let cause = root_cause(error);
        let streams = format!(
            "a receiver's --listen is where agents stream to; name the control API of the {name} with {flag} or {variable}"
        );
        // As the HTTP client says it of a first line that is none.
        if cause.starts_with("invalid HTTP") {
            let message = format!("{} is no control API: what answers there speaks no HTTP", self.address);
            return ApiError::new(ErrorCode::Unreachable, message).with_hint(streams);
        }
        if cause.starts_with("connection closed before message") {
            let message =
                format!("the {name} at {} has ended the connection and answered nothing", self.address);
            return ApiError::new(ErrorCode::Unreachable, message)
                .with_hint(format!("see whether it still runs, and whether it is one: {streams}"));
        }
        let message = format!("no {name} answers at {}: {cause}", self.address);
        ApiError::new(ErrorCode::Unreachable, message)
            .with_hint(format!("start it with `{start}`, or name its address with {flag} or {variable}"))
    }
}

fn is_no_such_call(error: &ApiError) -> bool {
    error.code == ErrorCode::NotFound && error.message.starts_with(NO_SUCH_CALL)
}

/// Whether this user may not connect.
fn is_denied(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(io) = error.downcast_ref::<std::io::Error>() {
            return io.kind() == std::io::ErrorKind::PermissionDenied;
        }
        cause = error.source();
    }
    false
}

/// Whose socket it is.
fn owner(path: &Path) -> String {
    match std::fs::metadata(path) {
        Ok(found) => format!("the socket belongs to user {}", found.uid()),
        Err(_) => "its directory is another user's".to_owned(),
    }
}

/// The innermost cause: the layers of an HTTP client say nothing to a person.
fn root_cause(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}
