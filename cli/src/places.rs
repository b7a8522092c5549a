//! Where things are when nobody says: sockets, state, stores.
//!
//! Root has the system's places, so that daemon and command find each other without a word; other
//! users have their own.

use std::{env, path::PathBuf};

use backtide_control::{Address, ApiError, ErrorCode};

use crate::ending::Failure;

/// The default places of one user. One without a home has none: what lies where everybody may write is nobody's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Places {
    run: Option<PathBuf>,
    lib: Option<PathBuf>,
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
            return Self { run: Some("/run/backtide".into()), lib: Some("/var/lib/backtide".into()) };
        }
        let lib = state.or_else(|| home.map(|home| home.join(".local/state")));
        let lib = lib.map(|lib| lib.join("backtide"));
        let run = runtime.map(|runtime| runtime.join("backtide")).or_else(|| lib.clone());
        Self { run, lib }
    }

    /// Where sockets are.
    ///
    /// # Errors
    /// `usage` when this user has no such place; so for every place here.
    pub(crate) fn run_dir(&self) -> Result<PathBuf, Failure> {
        self.run.clone().ok_or_else(|| no_place("sockets", "XDG_RUNTIME_DIR, XDG_STATE_HOME and HOME"))
    }

    /// The agent's control API.
    pub(crate) fn agent_api(&self) -> Result<Address, Failure> {
        Ok(Address::unix(self.run_dir()?.join("agent.sock")))
    }

    /// The receiver's control API.
    pub(crate) fn receiver_api(&self) -> Result<Address, Failure> {
        Ok(Address::unix(self.run_dir()?.join("receiver.sock")))
    }

    /// The receiver's store.
    pub(crate) fn store(&self) -> Result<PathBuf, Failure> {
        self.kept("store")
    }

    /// What the agent remembers.
    pub(crate) fn agent_state(&self) -> Result<PathBuf, Failure> {
        self.kept("agent")
    }

    /// What `backtide up` keeps without `--dir`.
    pub(crate) fn up(&self) -> Result<PathBuf, Failure> {
        self.kept("up")
    }

    fn kept(&self, name: &str) -> Result<PathBuf, Failure> {
        let lib = self.lib.as_ref().ok_or_else(|| no_place("what is kept", "XDG_STATE_HOME and HOME"))?;
        Ok(lib.join(name))
    }
}

fn no_place(what: &str, variables: &str) -> Failure {
    let message = format!("there is no default place for {what}: none of {variables} is set");
    ApiError::new(ErrorCode::Usage, message)
        .with_hint("set HOME, or say where with the command's options")
        .into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_has_the_systems_places() {
        let places = Places::of(true, Some("/run/user/0".into()), None, Some("/root".into()));
        assert_eq!(places.agent_api().unwrap().to_string(), "unix:/run/backtide/agent.sock");
        assert_eq!(places.receiver_api().unwrap().to_string(), "unix:/run/backtide/receiver.sock");
        assert_eq!(places.store().unwrap(), PathBuf::from("/var/lib/backtide/store"));
    }

    #[test]
    fn others_have_their_own() {
        let places = Places::of(false, Some("/run/user/7".into()), None, Some("/home/a".into()));
        assert_eq!(places.agent_api().unwrap().to_string(), "unix:/run/user/7/backtide/agent.sock");
        assert_eq!(places.agent_state().unwrap(), PathBuf::from("/home/a/.local/state/backtide/agent"));
        let bare = Places::of(false, None, None, Some("/home/a".into()));
        assert_eq!(bare.agent_api().unwrap().to_string(), "unix:/home/a/.local/state/backtide/agent.sock");
    }
    #[test]
    fn who_has_no_home_has_no_places_where_everybody_writes() {
        let none = Places::of(false, None, None, None);
        for refused in [none.store().err(), none.up().err(), none.agent_api().err()] {
            let Some(Failure::Error(error)) = refused else { panic!("{refused:?}") };
            assert_eq!(error.code, ErrorCode::Usage);
            assert!(error.message.ends_with("XDG_STATE_HOME and HOME is set"), "{error}");
        }
        let sockets = Places::of(false, Some("/run/user/7".into()), None, None);
        assert_eq!(sockets.receiver_api().unwrap().to_string(), "unix:/run/user/7/backtide/receiver.sock");
        assert!(sockets.agent_state().is_err());
    }
}
