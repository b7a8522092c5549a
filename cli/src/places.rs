//! Where things are when nobody says: sockets, state, stores.
//!
//! Root has the system's places, so that daemon and command find each other without a word; other
//! users have their own.

use std::{env, path::PathBuf};

use backtide_control::Address;

/// The default places of one user.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Places {
    run: PathBuf,
    lib: PathBuf,
}

impl Places {
    /// Of the user who runs this process.
    pub(crate) fn of_this_user() -> Self {
        let directory =
            |variable: &str| env::var_os(variable).map(PathBuf::from).filter(|path| path.is_absolute());
        Self::of(
            rustix::process::geteuid().is_root(),
            directory("XDG_RUNTIME_DIR"),
            directory("XDG_STATE_HOME"),
            directory("HOME"),
        )
    }

    fn of(root: bool, runtime: Option<PathBuf>, state: Option<PathBuf>, home: Option<PathBuf>) -> Self {
        if root {
            return Self { run: "/run/backtide".into(), lib: "/var/lib/backtide".into() };
        }
        let lib = state
            .or_else(|| home.map(|home| home.join(".local/state")))
            .unwrap_or_else(env::temp_dir)
            .join("backtide");
        let run = runtime.map_or_else(|| lib.clone(), |runtime| runtime.join("backtide"));
        Self { run, lib }
    }

    /// Where sockets are.
    pub(crate) fn run_dir(&self) -> &PathBuf {
        &self.run
    }

    /// The agent's control API.
    pub(crate) fn agent_api(&self) -> Address {
        Address::unix(self.run.join("agent.sock"))
    }

    /// The receiver's control API.
    pub(crate) fn receiver_api(&self) -> Address {
        Address::unix(self.run.join("receiver.sock"))
    }

    /// The receiver's store.
    pub(crate) fn store(&self) -> PathBuf {
        self.lib.join("store")
    }

    /// What the agent remembers.
    pub(crate) fn agent_state(&self) -> PathBuf {
        self.lib.join("agent")
    }

    /// What `backtide up` keeps without `--dir`.
    pub(crate) fn up(&self) -> PathBuf {
        self.lib.join("up")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_has_the_systems_places() {
        let places = Places::of(true, Some("/run/user/0".into()), None, Some("/root".into()));
        assert_eq!(places.agent_api().to_string(), "unix:/run/backtide/agent.sock");
        assert_eq!(places.receiver_api().to_string(), "unix:/run/backtide/receiver.sock");
        assert_eq!(places.store(), PathBuf::from("/var/lib/backtide/store"));
    }

    #[test]
    fn others_have_their_own() {
        let places = Places::of(false, Some("/run/user/7".into()), None, Some("/home/a".into()));
        assert_eq!(places.agent_api().to_string(), "unix:/run/user/7/backtide/agent.sock");
        assert_eq!(places.agent_state(), PathBuf::from("/home/a/.local/state/backtide/agent"));
        let bare = Places::of(false, None, None, Some("/home/a".into()));
        assert_eq!(bare.agent_api().to_string(), "unix:/home/a/.local/state/backtide/agent.sock");
    }
}
