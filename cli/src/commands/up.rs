//! `backtide up`: protect one image with everything in this process.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use backtide_agent_api::{AgentClient, AttachRequest, DetachRequest, DiskStatus};
use backtide_control::{Address, ApiError, ErrorCode};
use backtide_units::{DiskId, DiskName};
use clap::Args;
use serde::{Deserialize, Serialize};

use crate::{
    commands::{
        Stop,
        attach::{POLL, Policy, absolute_image},
        daemon::prepare,
        nbd_tls::NbdTlsFlags,
    },
    context::Context,
    ending::{Ending, Failure, failed, io_failure, wrong_usage},
    local::Local,
    output::status::missing_at_receiver,
};

/// How long the end waits for the last writes to be durable at the receiver.
const LAST_WRITES: Duration = Duration::from_secs(10);

/// `backtide up`
#[derive(Args, Debug)]
pub(crate) struct Up {
    /// The disk to protect: a raw image, a block device, a qcow2 file or an NBD URI
    image: String,
    /// The disk's name [default: the image's file name without its ending]
    #[arg(long)]
    name: Option<DiskName>,
    /// Where history and sockets are kept; the same directory continues it [default:
    /// /var/lib/backtide/up/NAME for root, else ~/.local/state/backtide/up/NAME]
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Where to serve the disk [default: a unix socket in DIR]
    #[arg(long, value_name = "URI")]
    nbd: Option<String>,
    #[command(flatten)]
    nbd_tls: NbdTlsFlags,
    #[command(flatten)]
    policy: Policy,
}

/// What is printed when the disk is served.
#[derive(Debug, Serialize)]
struct Ready {
    name: DiskName,
    uuid: DiskId,
    nbd_uri: String,
    agent: Address,
    receiver: Address,
    dir: PathBuf,
}

/// Which image a directory belongs to, in `DIR/up.json`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Belongs {
    image: String,
}

impl Up {
    /// Protects the image until a signal.
    pub(crate) async fn run(self, context: &Context, mut stop: Stop) -> Result<Ending, Failure> {
        let image = absolute_image(&self.image)?;
        let nbd_tls = self.nbd_tls.over(None)?;
        let name = match self.name {
            Some(name) => name,
            None => name_of(&image)?,
        };
        let directory = self.dir.unwrap_or_else(|| context.places().up().join(name.as_str()));
        prepare(context, "warn");
        let is_new = !directory.exists();
        let mut local = Local::at(&directory)?.with_nbd_tls(nbd_tls);
        claim(local.directory(), &image)?;
        let request = self.policy.request(name, image, local.stream(), self.nbd);
        let result = match begin(&mut local, &request).await {
            Ok((agent, disk)) => serve(context, &local, &agent, disk, &request, &mut stop).await,
            Err(failure) => {
                local.stop().await;
                if is_new {
                    // Made just now, and nothing was ever protected in it.
                    let _ = std::fs::remove_dir_all(local.directory());
                }
                return Err(failure);
            }
        };
        local.stop().await;
        result
    }
}

/// Starts the daemons and attaches the disk.
async fn begin(local: &mut Local, request: &AttachRequest) -> Result<(AgentClient, DiskStatus), Failure> {
    local.start_receiver().await?;
    local.start_agent().await?;
    let agent = local.agent_client()?;
    let disk = attach(&agent, request).await?;
    Ok((agent, disk))
}

async fn serve(
    context: &Context,
    local: &Local,
    agent: &AgentClient,
    disk: DiskStatus,
    request: &AttachRequest,
    stop: &mut Stop,
) -> Result<Ending, Failure> {
    let ready = Ready {
        name: disk.name,
        uuid: disk.uuid,
        nbd_uri: disk.nbd_uri,
        agent: local.agent_api(),
        receiver: local.receiver_api(),
        dir: local.directory().to_owned(),
    };
    let printed = context.print(&ready, || ready_text(&ready, &request.image));
    if !matches!(printed, Err(Failure::Error(_))) {
        stop.asked().await;
    }
    context.tell("ending; ctrl-c again to end at once");
    tokio::select! {
        detached = detach(context, agent, &request.name) => detached,
        () = stop.asked() => Err(Failure::Interrupted),
    }
}

/// Attaches the disk, unless the agent remembers it from an end that was not in good order.
async fn attach(agent: &AgentClient, request: &AttachRequest) -> Result<DiskStatus, Failure> {
    let known = agent.status(None).await?.disks.into_iter().find(|disk| disk.name == request.name);
    match known {
        Some(disk) if disk.image == request.image && disk.mode != backtide_agent_api::Mode::Detached => {
            Ok(disk)
        }
        Some(_) | None => Ok(agent.attach(request).await?),
    }
}

/// Waits for the last writes, so that the next start has nothing to resynchronize, and detaches.
async fn detach(context: &Context, agent: &AgentClient, name: &DiskName) -> Result<Ending, Failure> {
    let durable = async {
        while missing_at_receiver(&agent.disk(name).await?).is_some() {
            tokio::time::sleep(POLL).await;
        }
        Ok::<(), Failure>(())
    };
    if let Ok(waited) = tokio::time::timeout(LAST_WRITES, durable).await {
        waited?;
    }
    // What its image lacks comes when it is up again: the agent's state stays in the same directory.
    let disk = agent.detach_even(name, DetachRequest { incomplete: true, force: false }).await?;
    let Some(missing) = missing_at_receiver(&disk) else { return Ok(Ending::Done) };
    context.warn(&format!("the history lacks {missing}: that follows when the disk is up again"));
    Ok(Ending::Warnings)
}

/// A directory keeps the history of one image.
fn claim(directory: &Path, image: &str) -> Result<(), Failure> {
    let path = directory.join("up.json");
    let text = match std::fs::read(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let belongs = serde_json::json!({ "image": image }).to_string();
            return std::fs::write(&path, belongs).map_err(|error| io_failure(path.display(), &error));
        }
        Err(error) => return Err(io_failure(path.display(), &error)),
    };
    let belongs: Belongs = serde_json::from_slice(&text)
        .map_err(|error| failed(format!("{} cannot be read: {error}", path.display())))?;
    if belongs.image == image {
        return Ok(());
    }
    let message = format!("{} keeps the history of {}, not of {image}", directory.display(), belongs.image);
    Err(ApiError::new(ErrorCode::Refused, message).with_hint("give another directory with --dir").into())
}

/// A name out of the image's file name.
fn name_of(image: &str) -> Result<DiskName, Failure> {
    let file = image.split(['?', '#']).next().unwrap_or_default();
    let stem = Path::new(file).file_stem().unwrap_or_default().to_string_lossy();
    let name: String =
        stem.chars().map(|c| if c.is_ascii_alphanumeric() || "-_.".contains(c) { c } else { '_' }).collect();
    let name = name.trim_start_matches(['.', '-']);
    let name = &name[..name.len().min(64)];
    name.parse().map_err(|_| wrong_usage(format!("{image} does not give the disk a name: use --name")))
}

fn ready_text(ready: &Ready, image: &str) -> String {
    let (name, agent, receiver) = (ready.name.as_str(), &ready.agent, &ready.receiver);
    format!(
        "{image} is protected as {name}\n\
         NBD      {}\n\
         history  {}\n\
         Use the disk through its NBD address, and try in another terminal:\n  \
         backtide --agent {agent} status {name}\n  \
         backtide --agent {agent} mark before-upgrade {name}\n  \
         backtide points {name} --receiver {receiver}\n  \
         backtide mount {name} --receiver {receiver} --at -1m\n  \
         backtide restore {name} --receiver {receiver} --at mark:before-upgrade --output restored.img\n\
         ctrl-c ends it.",
        ready.nbd_uri,
        ready.dir.display()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_comes_from_the_image() {
        let name = |image: &str| name_of(image).map(|name| name.as_str().to_owned()).ok();
        assert_eq!(name("/images/vm1.qcow2").as_deref(), Some("vm1"));
        assert_eq!(name("/images/my disk (2).img").as_deref(), Some("my_disk__2_"));
        assert_eq!(name("/dev/vg0/web").as_deref(), Some("web"));
        assert_eq!(name("nbd://host:10809/export").as_deref(), Some("export"));
        assert_eq!(name("/images/--.img"), None);
    }

    #[test]
    fn a_directory_belongs_to_one_image() {
        let directory = tempfile::tempdir().unwrap();
        claim(directory.path(), "/a.img").unwrap();
        claim(directory.path(), "/a.img").unwrap();
        let Err(Failure::Error(error)) = claim(directory.path(), "/b.img") else {
            panic!("another image was taken");
        };
        assert_eq!(error.code, ErrorCode::Refused);
        assert!(error.message.ends_with("keeps the history of /a.img, not of /b.img"), "{error}");
    }
}
