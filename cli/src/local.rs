//! A receiver and an agent inside this process, with everything they keep in one directory: what
//! `up` and `demo` run on. They talk over unix sockets as separate processes do.
//!
//! ```text
//! DIR/store   the receiver's store
//! DIR/agent   what the agent remembers
//! DIR/run     sockets
//! ```

use std::path::{Path, PathBuf};

use backtide_agent::Agent;
use backtide_agent_api::AgentClient;
use backtide_control::{Address, ApiError, ErrorCode};
use backtide_export::NbdTls;
use backtide_log_receiver::Receiver;
use backtide_receiver_api::ReceiverClient;

use crate::{
    commands::{agent, daemon::refuse_no_directory, receiver},
    ending::{Failure, io_failure},
};

/// The longest path of a socket in `DIR/run`, without `DIR`: a disk's, with the longest name.
const SOCKET_NAME_BYTES: usize = "/run/".len() + 24;

/// The longest path of a unix socket.
const SOCKET_PATH_BYTES_MAX: usize = 107;

/// The daemons of one directory, as far as they run.
pub(crate) struct Local {
    directory: PathBuf,
    nbd_tls: Option<NbdTls>,
    receiver: Option<Receiver>,
    agent: Option<Agent>,
}

impl Local {
    /// In `directory`, which is made when it is missing. Starts nothing yet.
    pub(crate) fn at(directory: &Path) -> Result<Self, Failure> {
        let directory =
            std::path::absolute(directory).map_err(|error| io_failure(directory.display(), &error))?;
        let bytes = directory.as_os_str().len();
        if bytes + SOCKET_NAME_BYTES > SOCKET_PATH_BYTES_MAX {
            let message = format!(
                "the path {} has {bytes} bytes, and sockets in it allow {}",
                directory.display(),
                SOCKET_PATH_BYTES_MAX - SOCKET_NAME_BYTES
            );
            return Err(ApiError::new(ErrorCode::Usage, message)
                .with_hint("give a shorter one with --dir")
                .into());
        }
        refuse_no_directory(&directory)?;
        std::fs::create_dir_all(&directory)
            .map_err(|error| io_failure(format_args!("make {}", directory.display()), &error))?;
        Ok(Self { directory, nbd_tls: None, receiver: None, agent: None })
    }

    /// The same with NBD sockets under TLS.
    pub(crate) fn with_nbd_tls(self, nbd_tls: Option<NbdTls>) -> Self {
        Self { nbd_tls, ..self }
    }

    /// The directory.
    pub(crate) fn directory(&self) -> &Path {
        &self.directory
    }

    /// Starts the receiver.
    pub(crate) async fn start_receiver(&mut self) -> Result<(), Failure> {
        let config = backtide_log_receiver::Config {
            run: Some(self.directory.join("run")),
            nbd_tls: self.nbd_tls.clone(),
            ..backtide_log_receiver::Config::new(self.directory.join("store"))
        };
        self.receiver = Some(Receiver::start(config).await.map_err(receiver::start_failure)?);
        Ok(())
    }

    /// Ends the receiver in good order, which cuts every stream.
    pub(crate) async fn stop_receiver(&mut self) {
        if let Some(receiver) = self.receiver.take() {
            receiver.shutdown().await;
        }
    }

    /// Starts the agent.
    pub(crate) async fn start_agent(&mut self) -> Result<(), Failure> {
        let config = backtide_agent::Config {
            state: self.directory.join("agent"),
            run: self.directory.join("run"),
            api: self.agent_api(),
            limits: backtide_agent_api::LimitsRequest::default(),
            cache: backtide_agent_api::CacheMode::default(),
            io_engine: backtide_agent::IoEngine::default(),
            spill_dir: None,
            spill_size: None,
            nbd_listen: None,
            nbd_tls: self.nbd_tls.clone(),
            insecure: false,
            stream_tls: None,
            nbd: Default::default(),
            mounts: Default::default(),
        };
        self.agent = Some(Agent::start(config).await.map_err(agent::start_failure)?);
        Ok(())
    }

    /// Ends what runs, the agent first: what it still has to send has somewhere to go.
    pub(crate) async fn stop(&mut self) {
        if let Some(agent) = self.agent.take() {
            agent.shutdown().await;
        }
        self.stop_receiver().await;
    }

    /// Where the receiver takes streams, also while it is stopped.
    pub(crate) fn stream(&self) -> Address {
        self.socket("stream.sock")
    }

    /// Where the receiver answers.
    pub(crate) fn receiver_api(&self) -> Address {
        self.socket("receiver.sock")
    }

    /// Where the agent answers.
    pub(crate) fn agent_api(&self) -> Address {
        self.socket("agent.sock")
    }

    /// Asks the receiver.
    pub(crate) fn receiver_client(&self) -> Result<ReceiverClient, Failure> {
        Ok(ReceiverClient::new(&self.receiver_api())?)
    }

    /// Asks the agent.
    pub(crate) fn agent_client(&self) -> Result<AgentClient, Failure> {
        Ok(AgentClient::new(&self.agent_api())?)
    }

    fn socket(&self, name: &str) -> Address {
        Address::unix(self.directory.join("run").join(name))
    }
}
