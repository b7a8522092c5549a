//! `backtide mount` and `unmount`: a point of a disk over NBD.

use backtide_control::{ApiError, ErrorCode};
use backtide_receiver_api::MountRequest;
use backtide_units::DiskName;
use clap::Args;

use crate::{
    arguments::ReceiverApi,
    context::Context,
    ending::{Ending, Failure, wrong_usage},
    output::mounts::{mount_text, table},
};

/// `backtide mount`
#[derive(Args, Debug)]
pub(crate) struct Mount {
    /// The disk's name or UUID [default: list the mounts there are]
    #[arg(requires = "at")]
    name: Option<DiskName>,
    /// The point to serve
    #[arg(long, value_name = "POINT", allow_hyphen_values = true, requires = "name")]
    at: Option<String>,
    /// Where to serve it [default: a unix socket of the receiver's choice]
    #[arg(long, value_name = "URI", requires = "name")]
    nbd: Option<String>,
    #[command(flatten)]
    api: ReceiverApi,
}

/// `backtide unmount`
#[derive(Args, Debug)]
pub(crate) struct Unmount {
    /// What `backtide mount` printed as the mount's id
    id: String,
    #[command(flatten)]
    api: ReceiverApi,
}

impl Mount {
    /// Mounts and prints the URI, or lists mounts.
    pub(crate) async fn run(self, context: &Context) -> Result<Ending, Failure> {
        let receiver = context.receiver(&self.api)?;
        let Some(name) = self.name else {
            let mounts = receiver.mounts().await?;
            context.print(&mounts, || table(&mounts.mounts))?;
            return Ok(Ending::Done);
        };
        let at = self.at.ok_or_else(|| wrong_usage("a mount needs a point: --at POINT"))?;
        let mount = receiver.mount(&MountRequest { name, at, nbd: self.nbd, temporary: false }).await?;
        context.print(&mount, || mount_text(&mount))?;
        Ok(Ending::Done)
    }
}

impl Unmount {
    /// Unmounts.
    pub(crate) async fn run(self, context: &Context) -> Result<Ending, Failure> {
        // The receiver's own hint is for programs that ask it.
        let no_mount = |error: ApiError| {
            let unknown = error.code == ErrorCode::NotFound;
            if unknown { error.with_hint("`backtide mount` lists the mounts there are") } else { error }
        };
        let mount = context.receiver(&self.api)?.unmount(&self.id).await.map_err(no_mount)?;
        context.print(&mount, || format!("unmounted {}", mount.id))?;
        Ok(Ending::Done)
    }
}
