//! `backtide mount --here` and `unmount --here`: a point that the agent of this host serves, as it is read.

use std::path::PathBuf;

use backtide_agent_api::{AgentMountRequest, AgentOverlayFate, AgentRemountRequest, ErrorCode, StreamTls};
use backtide_control::Address;
use backtide_receiver_api::OverlayFate;
use backtide_units::{ByteCount, DiskName};
use clap::Args;

use crate::{
    arguments::ReceiverApi,
    commands::{
        mount::{discarded_text, unmounted_text},
        stream_tls::absolute_folder,
    },
    context::Context,
    ending::{Ending, Failure},
    output::mounts::{agent_mount_text, agent_mounts_text},
    quantity::parse_size,
};

/// How the agent of this host reads a point.
#[derive(Args, Debug, Default)]
pub(crate) struct Here {
    /// Served by this host's agent, which reads from the receiver what is touched and keeps it in a cache; it is served
    /// again when the agent is restarted. What is written with --writable stays on this host; `backtide attach --from`
    /// makes a disk that is protected
    #[arg(long)]
    pub(crate) here: bool,
    /// With --here: where the receiver takes streams [default: as the agent has it for the disk]
    #[arg(long, value_name = "ADDR", requires = "here", requires = "name")]
    stream: Option<Address>,
    /// With --here: certificates for a tls:// receiver [default: as the agent has them for the disk, or of its
    /// configuration]
    #[arg(long, value_name = "DIR", requires = "here", requires = "name")]
    tls_certificates: Option<PathBuf>,
    /// With --here: the name the receiver's certificate is for, where that is not the host of its address
    #[arg(long, value_name = "NAME", requires = "tls_certificates")]
    tls_hostname: Option<String>,
    /// With --here: the most that is kept of what was read, in the agent's state directory; 0 for nothing [default:
    /// 1GiB]
    #[arg(long, value_name = "SIZE", requires = "here", requires = "name", value_parser = parse_size)]
    cache_size: Option<ByteCount>,
}

/// A point, in words.
pub(crate) struct Point {
    pub(crate) name: DiskName,
    pub(crate) at: String,
    pub(crate) writable: bool,
    pub(crate) changed_since: Option<String>,
    pub(crate) nbd: Option<String>,
}

impl Here {
    /// Mounts. The receiver's control API says which point it is; what is read comes over the stream.
    pub(crate) async fn mount(
        self,
        context: &Context,
        api: &ReceiverApi,
        point: Point,
    ) -> Result<Ending, Failure> {
        let Point { name, at, writable, changed_since, nbd } = point;
        let receiver = context.receiver(api)?;
        let at = receiver.resolve(&name, &at).await?;
        let changed_since = match changed_since {
            Some(since) => {
                let since = receiver.resolve(&name, &since).await?;
                context.remark(since.warning.as_deref());
                Some(since.lsn)
            }
            None => None,
        };
        let stream_tls = match self.tls_certificates {
            Some(folder) => {
                Some(StreamTls { certificates: absolute_folder(&folder)?, hostname: self.tls_hostname })
            }
            None => None,
        };
        let request = AgentMountRequest {
            disk: at.disk.uuid,
            lsn: at.lsn,
            receiver: self.stream,
            stream_tls,
            changed_since,
            nbd,
            cache_bytes: self.cache_size,
            writable,
        };
        let mount = context.agent()?.mount(&request).await?;
        context.print(&mount, || agent_mount_text(&mount))?;
        context.remark(at.warning.as_deref());
        Ok(Ending::Done)
    }
}

/// Prints what the agent serves.
pub(crate) async fn list(context: &Context) -> Result<Ending, Failure> {
    let mounts = context.agent()?.mounts().await?;
    context.print(&mounts, || agent_mounts_text(&mounts))?;
    Ok(Ending::Done)
}

/// Has the agent serve again what is kept.
pub(crate) async fn remount(context: &Context, id: &str, nbd: Option<String>) -> Result<Ending, Failure> {
    let mount = context.agent()?.remount(id, &AgentRemountRequest { nbd }).await?;
    context.print(&mount, || agent_mount_text(&mount))?;
    Ok(Ending::Done)
}

/// Ends a mount of the agent.
pub(crate) async fn unmount(
    context: &Context,
    id: &str,
    fate: Option<OverlayFate>,
    force: bool,
) -> Result<Ending, Failure> {
    let agent = context.agent()?;
    let overlay = fate.map(|fate| match fate {
        OverlayFate::Keep => AgentOverlayFate::Keep,
        OverlayFate::Discard => AgentOverlayFate::Discard,
    });
    let unmounted = match force {
        true => agent.unmount_by_force(id, overlay).await,
        false => agent.unmount(id, overlay).await,
    };
    match unmounted {
        Ok(mount) => context.print(&mount, || unmounted_text(&mount.id, fate))?,
        Err(error) if error.code == ErrorCode::NotFound && fate == Some(OverlayFate::Discard) => {
            // Perhaps it is only kept. Who has neither hears of the mount.
            let kept = match agent.discard(id).await {
                Err(other) if other.code == ErrorCode::NotFound => Err(error),
                discarded => discarded,
            }?;
            context.print(&kept, || discarded_text(&kept.id))?;
        }
        Err(error) => return Err(error.into()),
    }
    Ok(Ending::Done)
}
