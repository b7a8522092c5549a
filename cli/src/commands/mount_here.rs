//! `backtide mount --here` and `unmount --here`: a point that the agent of this host serves, as it is read.

use std::path::PathBuf;

use backtide_agent_api::{AgentMountRequest, StreamTls};
use backtide_control::Address;
use backtide_units::{ByteCount, DiskName};
use clap::Args;

use crate::{
    arguments::ReceiverApi,
    commands::stream_tls::absolute_folder,
    context::Context,
    ending::{Ending, Failure},
    output::mounts::{agent_mount_text, agent_mounts_text},
    quantity::parse_size,
};

/// How the agent of this host reads a point.
#[derive(Args, Debug, Default)]
pub(crate) struct Here {
    /// Served by this host's agent, which reads from the receiver what is touched and keeps it in a cache; it is served
    /// again when the agent is restarted. Read-only; `backtide attach --from` makes a disk that can be written
    #[arg(long, conflicts_with_all = ["writable", "kept"])]
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
        let Point { name, at, changed_since, nbd } = point;
        let receiver = context.receiver(api)?;
        let at = receiver.resolve(&name, &at).await?;
        let changed_since = match changed_since {
            Some(since) => Some(receiver.resolve(&name, &since).await?.lsn),
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
        };
        let mount = context.agent()?.mount(&request).await?;
        context.print(&mount, || agent_mount_text(&mount))?;
        Ok(Ending::Done)
    }
}

/// Prints what the agent serves.
pub(crate) async fn list(context: &Context) -> Result<Ending, Failure> {
    let mounts = context.agent()?.mounts().await?;
    context.print(&mounts, || agent_mounts_text(&mounts))?;
    Ok(Ending::Done)
}

/// Ends a mount of the agent.
pub(crate) async fn unmount(context: &Context, id: &str) -> Result<Ending, Failure> {
    let mount = context.agent()?.unmount(id).await?;
    context.print(&mount, || format!("unmounted {}", mount.id))?;
    Ok(Ending::Done)
}
