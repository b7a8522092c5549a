//! A receiver and an agent inside this process, with everything they keep in one directory: what
//! `up` and `demo` run on. They talk over unix sockets as separate processes do.
//!
//! ```text
//! DIR/store   the receiver's store
//! DIR/agent   what the agent remembers
//! DIR/run     sockets
//! ```

use std::{
    fs::File,
    io,
    path::{Path, PathBuf},
};

use backtide_agent::Agent;
use backtide_agent_api::AgentClient;
use backtide_control::{Address, ApiError, ErrorCode};
use backtide_export::NbdTls;
use backtide_log_receiver::Receiver;
use backtide_receiver_api::ReceiverClient;
use rustix::fs::{FlockOperation, flock};

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
    /// Whether this process made it.
    is_new: bool,
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
        let is_new = make(&directory)
            .map_err(|error| io_failure(format_args!("make {}", directory.display()), &error))?;
        Ok(Self { directory, is_new, nbd_tls: None, receiver: None, agent: None })
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
            poll_max_us: backtide_agent::POLL_MAX_US,
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

    /// Removes the directory, which is stopped, when this process made it, no disk was ever protected in it, and nobody else uses
    /// it. Another `up` may have come since it was made: as long as we have the lock of its store it has neither begun nor
    /// does it begin, and what has no directory any more has none to be removed under it.
    pub(crate) fn remove_unused(&self) {
        let store = self.directory.join("store");
        // It is not made anew.
        let lock = || File::options().read(true).write(true).open(store.join("lock"));
        let Some(Ok(lock)) = self.is_new.then(lock) else { return };
        if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() || has_disks(&store) {
            return;
        }
        let Some(name) = self.directory.file_name() else { return };
        let name = format!(".{}.{}.removed", name.to_string_lossy(), std::process::id());
        let removed = self.directory.with_file_name(name);
        // What stays of it is in nobody's way but for its room.
        if std::fs::rename(&self.directory, &removed).is_ok() {
            let _ = std::fs::remove_dir_all(&removed);
        }
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

/// Makes a directory, and says whether it was not there: of those who make it at once that is so for one.
fn make(directory: &Path) -> io::Result<bool> {
    if let Some(parent) = directory.parent() {
        std::fs::create_dir_all(parent)?;
    }
    match std::fs::create_dir(directory) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(error) => Err(error),
    }
}

/// Whether the store has a disk, or may have one.
fn has_disks(store: &Path) -> bool {
    match std::fs::read_dir(store.join("disks")) {
        Ok(mut disks) => disks.next().is_some(),
        Err(error) => error.kind() != io::ErrorKind::NotFound,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn locked(local: &mut Local) {
        let Err(Failure::Error(error)) = local.start_receiver().await else { panic!("two have one store") };
        assert_eq!(error.code, ErrorCode::Locked, "{error}");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_directory_of_which_nothing_came_is_removed() {
        let around = tempfile::tempdir().unwrap();
        let directory = around.path().join("made/vm1");
        let mut local = Local::at(&directory).unwrap();
        local.start_receiver().await.unwrap();
        local.stop().await;
        local.remove_unused();
        let left = std::fs::read_dir(around.path().join("made")).unwrap().count();
        assert_eq!((directory.exists(), left), (false, 0));
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_directory_that_another_one_uses_or_has_used_stays() {
        let around = tempfile::tempdir().unwrap();
        let directory = around.path().join("vm1");
        let mut late = Local::at(&directory).unwrap();
        let mut early = Local::at(&directory).unwrap();
        early.start_receiver().await.unwrap();
        locked(&mut late).await;
        late.stop().await;
        late.remove_unused();
        assert!(directory.join("store/store.json").exists(), "it is removed under a receiver that runs");
        // A disk that it has protected.
        std::fs::create_dir(directory.join("store/disks/6f1c0a1e-9d56-4c8f-b1d3-0a52d4a51c11")).unwrap();
        early.stop().await;
        early.remove_unused();
        late.remove_unused();
        assert!(directory.join("store/store.json").exists(), "its history is removed");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_directory_that_was_there_stays() {
        let around = tempfile::tempdir().unwrap();
        std::fs::write(around.path().join("notes.txt"), "mine").unwrap();
        let mut local = Local::at(around.path()).unwrap();
        local.start_receiver().await.unwrap();
        local.stop().await;
        local.remove_unused();
        assert!(around.path().join("notes.txt").exists());
    }
}
