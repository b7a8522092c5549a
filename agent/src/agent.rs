//! An agent from start to end.

use std::{io, sync::Arc, time::Duration};

use backtide_agent_api::router;
use backtide_control::{Address, BindError, ErrorCode, Server};
use backtide_export::{Directory, NbdUri};
use backtide_socket::Sockets;
use backtide_storage::{RealStorage, Storage};
use tokio::{sync::oneshot, task::JoinHandle};

use crate::{
    Config, Successor,
    mounts::{self, Leaving, Mounts},
    record::Records,
    registry::Registry,
    restart::Restart,
    service::Service,
    shared_socket::{Accepting, SHARED_PURPOSE, SharedSocket},
    watch,
};

/// What the API's socket is kept for.
const API_PURPOSE: &str = "api";

/// How long calls of the API may take that are under way when the agent hands over.
const LAST_CALLS: Duration = Duration::from_millis(100);

/// A running agent. Ends in good order by [`shutdown`](Self::shutdown) or
/// [`hand_over`](Self::hand_over); dropped, it leaves its
/// disks to be found as after a crash.
pub struct Agent {
    registry: Arc<Registry>,
    mounts: Arc<Mounts>,
    api: Address,
    stop: oneshot::Sender<()>,
    serving: JoinHandle<io::Result<()>>,
    /// Tries disks again that could not be attached at the start.
    restoring: Option<JoinHandle<()>>,
    restart: Arc<Restart>,
    sockets: Sockets,
    shared: Option<(SharedSocket, Accepting)>,
}

/// Why an agent does not start.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The state directory cannot be used.
    #[error("cannot use the state directory {directory}: {source}")]
    State {
        /// Which.
        directory: String,
        /// Why.
        source: io::Error,
    },
    /// Another agent has the state directory.
    #[error(
        "the state directory {directory} is locked: another agent uses it; end that one, or give this one a directory of its own with --state"
    )]
    Locked {
        /// Which.
        directory: String,
    },
    /// A setting cannot be.
    #[error("the configuration cannot be used: {0}")]
    Config(String),
    /// The run directory cannot be made.
    #[error("cannot make the run directory {directory}: {source}")]
    Run {
        /// Which.
        directory: String,
        /// Why.
        source: io::Error,
    },
    /// The control API cannot be served.
    #[error("cannot serve the control API: {0}")]
    Api(#[from] BindError),
    /// The socket that all disks share cannot be served.
    #[error("cannot serve every disk at {uri}")]
    Nbd {
        /// Where it is to be.
        uri: String,
        /// Why.
        source: backtide_export::BindError,
    },
}

impl AgentError {
    /// The kind of error a daemon ends with.
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::Config(_) => ErrorCode::Usage,
            Self::State { .. } | Self::Run { .. } => ErrorCode::Failed,
            Self::Locked { .. } => ErrorCode::Locked,
            Self::Api(error) => error.code(),
            Self::Nbd { source, .. } => match source {
                backtide_export::BindError::InUse(_) | backtide_export::BindError::NotASocket(_) => {
                    ErrorCode::Locked
                }
                backtide_export::BindError::Tls(_) => ErrorCode::Usage,
                backtide_export::BindError::Io { .. } => ErrorCode::Failed,
            },
        }
    }
}

/// What an agent has from the process it runs in. By default nothing: an agent inside of another
/// program.
#[derive(Clone, Debug, Default)]
pub struct Surroundings {
    /// Listening sockets of the process before, and who keeps them for the next.
    pub sockets: Sockets,
    /// What this process becomes at a restart; without it a restart is refused.
    pub successor: Option<Successor>,
    /// Why the last restart came to nothing, if this agent stands in for its successor.
    pub restart_failure: Option<String>,
}

impl Agent {
    /// Starts an agent: when this returns, its API answers and the disks it had are attached again,
    /// but for those that cannot be for the moment.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub async fn start(config: Config) -> Result<Self, AgentError> {
        Self::start_in(config, Surroundings::default()).await
    }

    /// The same in a process of its own.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub async fn start_in(config: Config, surroundings: Surroundings) -> Result<Self, AgentError> {
        config.check().map_err(AgentError::Config)?;
        let spill = config.spill().map_err(AgentError::Config)?;
        let directory = config.state.display().to_string();
        let state = |source| AgentError::State { directory: directory.clone(), source };
        let storage = RealStorage::open_locked(&config.state).map_err(|source| match source.kind() {
            io::ErrorKind::WouldBlock => AgentError::Locked { directory: directory.clone() },
            _ => state(source),
        })?;
        std::fs::create_dir_all(&config.run)
            .map_err(|source| AgentError::Run { directory: config.run.display().to_string(), source })?;
        let Surroundings { sockets, successor, restart_failure } = surroundings;
        let server = Server::bind_kept(&config.api, &sockets, API_PURPOSE).await?;
        let api = server.address().clone();
        let storage: Arc<dyn Storage> = Arc::new(storage);
        let records = Records::new(Arc::clone(&storage)).with_spill(spill);
        let shared_uri = config.shared_uri().map_err(AgentError::Config)?;
        let exports = Directory::new(shared_uri.as_ref().map_or("", |uri| &uri.export));
        let registry = Registry::new(&config, records, sockets.clone(), exports.clone());
        let purposes = [API_PURPOSE, SHARED_PURPOSE];
        registry
            .forget_other_sockets(&purposes[..1 + usize::from(shared_uri.is_some())])
            .await
            .map_err(state)?;
        // Before anything is served that its failure would end.
        let shared = match shared_uri {
            Some(uri) => Some(share(uri, &config, &sockets, exports).await?),
            None => None,
        };
        let settings = mounts::Settings {
            storage,
            run: config.run.clone(),
            nbd: config.nbd,
            nbd_rule: config.nbd_rule(),
            limits: config.mounts,
            sources: registry.sources(),
        };
        let mounts = Arc::new(Mounts::start(settings).map_err(state)?);
        let restoring = match registry.restore().await.map_err(state)? {
            true => Some(tokio::spawn(Arc::clone(&registry).keep_restoring())),
            false => None,
        };
        registry.keep_reserve();
        let restart = Arc::new(Restart::new(successor, restart_failure));
        let nbd_listen = shared.as_ref().map(|(_, accepting)| accepting.uri.to_string());
        let service =
            Service::new(Arc::clone(&registry), Arc::clone(&mounts), Arc::clone(&restart), nbd_listen);
        let router = router(service);
        let (stop, stopped) = oneshot::channel::<()>();
        let serving = tokio::spawn(server.run(router, async move {
            // Dropped or sent: both mean the end.
            let _ = stopped.await;
        }));
        tracing::info!(%api, state = directory, "agent started");
        Ok(Self { registry, mounts, api, stop, serving, restoring, restart, sockets, shared })
    }

    /// Where the control API is.
    pub fn api_address(&self) -> &Address {
        &self.api
    }

    /// Tells the service manager how it goes, if there is one; for as long as this is polled.
    pub async fn tell_service_manager(&self) {
        match self.sockets.notifier() {
            Some(notifier) => watch::tell(notifier, &self.registry).await,
            None => std::future::pending().await,
        }
    }

    /// Ready when somebody asks through the API that this process become its successor.
    pub async fn asked_to_restart(&self) {
        self.restart.asked.notified().await;
    }

    /// Lets go of every disk and of the API, with clients waiting at the sockets for whoever comes
    /// next. When a disk does not let go, the agent goes on with all of them, and says why in its
    /// status: that is `Err`, with the agent.
    ///
    /// # Errors
    /// When a disk stands still.
    pub async fn hand_over(mut self) -> Result<(), Box<Self>> {
        // Who comes from now on waits for the successor, instead of hearing that there is no such disk.
        let shared = self.end_shared().await;
        if let Err(error) = self.registry.hand_over().await {
            tracing::error!(error = error.message, "the agent is not restarted");
            self.restart.failed(&error.message);
            if let Some(restoring) = self.restoring.take() {
                restoring.abort();
            }
            self.restoring = Some(tokio::spawn(Arc::clone(&self.registry).restore_at_once()));
            self.shared = share_again(shared).await;
            return Err(Box::new(self));
        }
        if let Some(restoring) = self.restoring {
            restoring.abort();
        }
        self.mounts.end(Leaving::HandedOver).await;
        let _ = self.stop.send(());
        // Calls under way may take a moment, which every guest waits for.
        let _ = tokio::time::timeout(LAST_CALLS, self.serving).await;
        tracing::info!("agent hands over");
        Ok(())
    }

    /// Ends every disk in good order, then the API. The next agent with this state directory
    /// attaches them again.
    pub async fn shutdown(mut self) {
        if let Some(notifier) = self.sockets.notifier() {
            notifier.tell("STOPPING=1\nSTATUS=detaching the disks");
        }
        if let Some(restoring) = self.restoring.take() {
            restoring.abort();
        }
        self.end_shared().await;
        self.registry.shut_down().await;
        self.mounts.end(Leaving::ForGood).await;
        let _ = self.stop.send(());
        if let Ok(Err(error)) = self.serving.await {
            tracing::warn!(%error, "control API");
        }
        self.sockets.close();
        tracing::info!("agent ended");
    }
}

impl Agent {
    /// Accepts nobody any more at the socket that all disks share; what it takes to accept again.
    async fn end_shared(&mut self) -> Option<SharedSocket> {
        let (socket, accepting) = self.shared.take()?;
        accepting.end().await;
        Some(socket)
    }
}

/// Serves every disk at `uri`, those that are attached from now on.
async fn share(
    uri: NbdUri,
    config: &Config,
    sockets: &Sockets,
    directory: Directory,
) -> Result<(SharedSocket, Accepting), AgentError> {
    let (limits, sockets, named) = (config.nbd, sockets.clone(), uri.to_string());
    let socket = SharedSocket { uri, limits, sockets, directory };
    let accepting = socket.accept().await.map_err(|source| AgentError::Nbd { uri: named, source })?;
    Ok((socket, accepting))
}

/// Accepts again at a socket that was given up for a successor that did not come.
async fn share_again(socket: Option<SharedSocket>) -> Option<(SharedSocket, Accepting)> {
    let socket = socket?;
    match socket.accept().await {
        Ok(accepting) => Some((socket, accepting)),
        Err(error) => {
            tracing::error!(nbd = %socket.uri, %error, "the disks are served at their own sockets only");
            None
        }
    }
}
