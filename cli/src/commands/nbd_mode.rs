//! The flag that says who may connect to NBD sockets, of every daemon that makes some.

use backtide_export::SocketMode;
use clap::Args;

use crate::{commands::daemon::Settings, ending::Failure};

/// `--nbd-mode`
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct NbdModeFlag {
    /// Who may connect to the NBD sockets it makes, as their files' mode: 0660 lets in the group of their
    /// directory, if that has the setgid bit [default: 0600]
    #[arg(long, value_name = "MODE")]
    nbd_mode: Option<SocketMode>,
}

impl NbdModeFlag {
    /// Puts what was given on top of the settings of a file.
    pub(crate) fn apply(self, settings: &mut Settings) -> Result<(), Failure> {
        let Some(mode) = self.nbd_mode else { return Ok(()) };
        let mut nbd: toml::Table = settings.find("nbd")?.unwrap_or_default();
        nbd.insert("socket_mode".to_owned(), mode.to_string().into());
        settings.set("nbd", Some(nbd))
    }
}
