//! An agent from start to end.

use std::{io, sync::Arc};

use backtide_agent_api::{Limits, router};
use backtide_control::{Address, BindError, ErrorCode, Server};
use backtide_storage::RealStorage;
use tokio::{sync::oneshot, task::JoinHandle};

use crate::{
    Config, Places,
    record::Records,
    registry::{LocalIo, Registry},
    service::Service,
};

/// A running agent. Ends in good order by [`shutdown`](Self::shutdown); dropped, it leaves its
/// disks to be found as after a crash.
pub struct Agent {
    registry: Arc<Registry>,
    api: Address,
    stop: oneshot::Sender<()>,
    serving: JoinHandle<io::Result<()>>,
    /// Tries disks again that could not be attached at the start.
    restoring: Option<JoinHandle<()>>,
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
    #[error("the state directory {directory} is locked: another agent uses it")]
    Locked {
        /// Which.
        directory: String,
    },
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
}

impl AgentError {
    /// The kind of error a daemon ends with.
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::State { .. } | Self::Run { .. } => ErrorCode::Failed,
            Self::Locked { .. } => ErrorCode::Locked,
            Self::Api(error) => error.code(),
        }
    }
}

impl Agent {
    /// Starts an agent: when this returns, its API answers and the disks it had are attached again.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub async fn start(config: Config) -> Result<Self, AgentError> {
        let directory = config.state.display().to_string();
        let state = |source| AgentError::State { directory: directory.clone(), source };
        std::fs::create_dir_all(&config.state).map_err(state)?;
        let storage = RealStorage::open_locked(&config.state).map_err(|source| match source.kind() {
            io::ErrorKind::WouldBlock => AgentError::Locked { directory: directory.clone() },
            _ => state(source),
        })?;
        std::fs::create_dir_all(&config.run)
            .map_err(|source| AgentError::Run { directory: config.run.display().to_string(), source })?;
        let server = Server::bind(&config.api).await?;
        let api = server.address().clone();
        let registry = Registry::new(
            Places::of(&config),
            Records::new(Arc::new(storage)),
            config.limits.or(Limits::default()),
            config.nbd_tls.clone(),
            LocalIo { cache: config.cache, engine: config.io_engine },
        );
        let restoring = match registry.restore().await.map_err(state)? {
            true => Some(tokio::spawn(Arc::clone(&registry).keep_restoring())),
            false => None,
        };
        let router = router(Service::new(Arc::clone(&registry)));
        let (stop, stopped) = oneshot::channel::<()>();
        let serving = tokio::spawn(server.run(router, async move {
            // Dropped or sent: both mean the end.
            let _ = stopped.await;
        }));
        tracing::info!(%api, state = directory, "agent started");
        Ok(Self { registry, api, stop, serving, restoring })
    }

    /// Where the control API is.
    pub fn api_address(&self) -> &Address {
        &self.api
    }

    /// Ends every disk in good order, then the API. The next agent with this state directory
    /// attaches them again.
    pub async fn shutdown(self) {
        if let Some(restoring) = self.restoring {
            restoring.abort();
        }
        self.registry.shut_down().await;
        let _ = self.stop.send(());
        if let Ok(Err(error)) = self.serving.await {
            tracing::warn!(%error, "control API");
        }
        tracing::info!("agent ended");
    }
}
