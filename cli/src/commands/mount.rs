//! `backtide mount` and `unmount`: a point of a disk over NBD, by default of the receiver.

use backtide_control::{ApiError, ErrorCode};
use backtide_receiver_api::{MountRequest, OverlayFate, RemountRequest};
use backtide_units::DiskName;
use clap::Args;

use crate::{
    arguments::ReceiverApi,
    commands::mount_here::{self, Here, Point},
    context::Context,
    ending::{Ending, Failure, wrong_usage},
    output::mounts::{mount_text, mounts_text},
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
    /// It can be written: what is written is kept beside the point, also when the receiver (with --here the agent) is
    /// started again, until `backtide unmount ID --discard`
    #[arg(long, requires = "name")]
    writable: bool,
    /// Tell what changed since another point in an NBD metadata context of the mount, as QEMU tells it
    #[arg(
        long,
        value_name = "POINT",
        allow_hyphen_values = true,
        requires = "name",
        conflicts_with = "writable"
    )]
    changed_since: Option<String>,
    /// Serve again what `backtide unmount ID --keep` has kept
    #[arg(long, value_name = "ID", conflicts_with_all = ["name", "at", "writable", "changed_since"])]
    kept: Option<String>,
    /// Where to serve it [default: a unix socket of the receiver's choice]
    #[arg(long, value_name = "URI")]
    nbd: Option<String>,
    #[command(flatten)]
    here: Here,
    #[command(flatten)]
    api: ReceiverApi,
}

/// `backtide unmount`
#[derive(Args, Debug)]
pub(crate) struct Unmount {
    /// What `backtide mount` printed as the mount's id
    id: String,
    /// Keep what was written to a writable mount, for `backtide mount --kept ID`
    #[arg(long, conflicts_with = "discard")]
    keep: bool,
    /// Remove for good what was written to a writable mount, or to one that is only kept
    #[arg(long)]
    discard: bool,
    /// Also while NBD clients have it open: it is taken from them, with --discard with all that they wrote
    #[arg(long)]
    force: bool,
    /// It is served, or kept, by this host's agent
    #[arg(long)]
    here: bool,
    #[command(flatten)]
    api: ReceiverApi,
}

impl Mount {
    /// Mounts and prints the URI, or lists mounts.
    pub(crate) async fn run(self, context: &Context) -> Result<Ending, Failure> {
        if self.here.here {
            let Self { name, at, writable, changed_since, kept, nbd, here, api } = self;
            return match (name, at, kept) {
                (Some(name), Some(at), _) => {
                    here.mount(context, &api, Point { name, at, writable, changed_since, nbd }).await
                }
                (Some(_), None, _) => Err(wrong_usage("a mount needs a point: --at POINT")),
                (None, _, Some(id)) => mount_here::remount(context, &id, nbd).await,
                (None, _, None) if nbd.is_some() => {
                    Err(wrong_usage("a mount needs a disk and a point: NAME --at POINT"))
                }
                (None, _, None) => mount_here::list(context).await,
            };
        }
        let receiver = context.receiver(&self.api)?;
        let (nbd, writable) = (self.nbd, self.writable);
        let mount = match (self.name, self.kept) {
            (Some(name), _) => {
                let at = self.at.ok_or_else(|| wrong_usage("a mount needs a point: --at POINT"))?;
                let (temporary, changed_since) = (false, self.changed_since);
                let request = MountRequest { name, at, nbd, temporary, writable, changed_since };
                receiver.mount(&request).await?
            }
            (None, Some(id)) => receiver.remount(&id, &RemountRequest { nbd }).await?,
            (None, None) if nbd.is_some() => {
                return Err(wrong_usage("a mount needs a disk and a point: NAME --at POINT"));
            }
            (None, None) => {
                let mounts = receiver.mounts().await?;
                context.print(&mounts, || mounts_text(&mounts))?;
                return Ok(Ending::Done);
            }
        };
        context.print(&mount, || mount_text(&mount))?;
        context.remark(mount.warning.as_deref());
        context.remark(mount.changed_since.as_ref().and_then(|since| since.warning.as_deref()));
        Ok(Ending::Done)
    }
}

impl Unmount {
    /// Unmounts.
    pub(crate) async fn run(self, context: &Context) -> Result<Ending, Failure> {
        let fate = match (self.keep, self.discard) {
            (true, _) => Some(OverlayFate::Keep),
            (false, true) => Some(OverlayFate::Discard),
            (false, false) => None,
        };
        if self.here {
            return mount_here::unmount(context, &self.id, fate, self.force).await;
        }
        // The receiver's own hint is for programs that ask it.
        let no_mount = |error: ApiError| {
            let unknown = error.code == ErrorCode::NotFound;
            let hint = "`backtide mount` lists the receiver's mounts, `backtide mount --here` the agent's";
            if unknown { error.with_hint(hint) } else { error }
        };
        let receiver = context.receiver(&self.api)?;
        let unmounted = match self.force {
            true => receiver.unmount_by_force(&self.id, fate).await,
            false => receiver.unmount(&self.id, fate).await,
        };
        match unmounted {
            Ok(mount) => {
                context.print(&mount, || unmounted_text(&mount.id, fate))?;
            }
            Err(error) if error.code == ErrorCode::NotFound && self.discard => {
                let kept = receiver.discard(&self.id).await.map_err(no_mount)?;
                context.print(&kept, || discarded_text(&kept.id))?;
            }
            Err(error) => return Err(no_mount(error).into()),
        }
        Ok(Ending::Done)
    }
}

/// What is said of a mount that has ended.
pub(crate) fn unmounted_text(id: &str, fate: Option<OverlayFate>) -> String {
    let overlay = match fate {
        None => "",
        Some(OverlayFate::Keep) => "; what was written to it is kept",
        Some(OverlayFate::Discard) => "; what was written to it is discarded",
    };
    format!("unmounted {id}{overlay}")
}

/// What is said of an overlay that was only kept, and is gone.
pub(crate) fn discarded_text(id: &str) -> String {
    format!("discarded what was written to {id}")
}
