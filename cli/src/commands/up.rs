//! `backtide up`: protect one image with everything in this process.

use std::{
    io::{self, Write},
    path::{Path, PathBuf},
    time::Duration,
};

use backtide_agent_api::{AgentClient, AttachRequest, DetachRequest, DiskStatus, LimitsRequest, Mode};
use backtide_control::{Address, ApiError, ErrorCode};
use backtide_export::NbdUri;
use backtide_log_receiver::THREADS_APART;
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
    /// The disk's name [default: the image's file name without its ending; disk-UUID where that is a UUID, which only
    /// names a disk that has it]
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
        let has_tls = nbd_tls.is_some();
        let name = match self.name {
            Some(name) => name,
            None => name_of(&image)?,
        };
        let directory = match self.dir {
            Some(directory) => directory,
            None => context.places().up()?.join(name.as_str()),
        };
        prepare(context, "warn", THREADS_APART);
        let mut local = Local::at(&directory)?.with_nbd_tls(nbd_tls);
        claim(local.directory(), &image)?;
        let request = self.policy.request(name, image, local.stream(), self.nbd);
        // An image on storage that stands still holds it up for as long as that does.
        let begun = tokio::select! {
            begun = begin(&mut local, &request, has_tls) => begun,
            () = stop.asked() => Err(Failure::Interrupted),
        };
        let result = match begun {
            Ok((agent, disk)) => serve(context, &local, &agent, disk, &request, &mut stop).await,
            Err(failure) => {
                local.stop().await;
                local.remove_unused();
                return Err(failure);
            }
        };
        local.stop().await;
        result
    }
}

/// Starts the daemons and attaches the disk.
async fn begin(
    local: &mut Local,
    request: &AttachRequest,
    nbd_tls: bool,
) -> Result<(AgentClient, DiskStatus), Failure> {
    local.start_receiver().await?;
    local.start_agent().await?;
    let agent = local.agent_client()?;
    let disk = attach(&agent, request, nbd_tls).await?;
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
    let ended = tokio::select! {
        detached = detach(context, agent, &request.name) => detached,
        () = stop.asked() => Err(Failure::Interrupted),
    };
    // Whoever cannot be told where the disk is has not got it protected.
    printed.and(ended)
}

/// Attaches the disk. One that the agent remembers from an end that was not in good order is attached already, and once
/// more if it was asked for otherwise now.
async fn attach(agent: &AgentClient, request: &AttachRequest, nbd_tls: bool) -> Result<DiskStatus, Failure> {
    let known = agent.status(None).await?.disks.into_iter().find(|disk| disk.name == request.name);
    match known {
        Some(disk) if disk.image == request.image && disk.mode != Mode::Detached => {
            if is_as_asked(&disk, request, nbd_tls) {
                return Ok(disk);
            }
            agent
                .detach_even(&disk.name, DetachRequest { incomplete: true, ..DetachRequest::default() })
                .await?;
        }
        Some(_) | None => {}
    }
    Ok(agent.attach(request).await?)
}

/// Whether a disk is attached as `request` wants it; what that leaves open is as it was.
fn is_as_asked(disk: &DiskStatus, request: &AttachRequest, nbd_tls: bool) -> bool {
    fn same<T: PartialEq>(asked: Option<T>, is: T) -> bool {
        asked.is_none_or(|asked| asked == is)
    }
    let LimitsRequest {
        window_bytes,
        resync_buffer_bytes,
        guest_delay_max_ms,
        resync_bytes_per_second_max,
        resync_latency_us_max,
        bitmap_bytes,
        outage_after_ms,
        activity_extents,
        activity_extent_bytes,
    } = request.limits;
    let is = &disk.limits;
    same(request.ack, disk.ack)
        && same(request.on_outage, disk.on_outage)
        && same(request.cache, disk.cache)
        && same(window_bytes, is.window_bytes)
        && same(resync_buffer_bytes, is.resync_buffer_bytes)
        && same(guest_delay_max_ms, is.guest_delay_max_ms)
        && same(resync_bytes_per_second_max, is.resync_bytes_per_second_max)
        && same(resync_latency_us_max, is.resync_latency_us_max)
        && same(bitmap_bytes, is.bitmap_bytes)
        && same(outage_after_ms, is.outage_after_ms)
        && same(activity_extents, is.activity_extents)
        && same(activity_extent_bytes, is.activity_extent_bytes)
        && is_served_as_asked(&disk.nbd_uri, request.nbd.as_deref(), nbd_tls)
}

/// Whether a disk is served at `asked`, which may be anywhere, and under TLS unless that says otherwise.
fn is_served_as_asked(served: &str, asked: Option<&str>, nbd_tls: bool) -> bool {
    let Ok(served) = served.parse::<NbdUri>() else { return false };
    match asked.map(str::parse::<NbdUri>) {
        None => served.tls.is_some() == nbd_tls,
        Some(Ok(asked)) => {
            let tls = asked.tls.is_some() || nbd_tls;
            (served.address, served.export, served.tls.is_some()) == (asked.address, asked.export, tls)
        }
        // The attach says what is wrong with it.
        Some(Err(_)) => false,
    }
}

/// Waits for the last writes, so that the next start has nothing to resynchronize, and detaches.
async fn detach(context: &Context, agent: &AgentClient, name: &DiskName) -> Result<Ending, Failure> {
    let durable = async {
        loop {
            let disk = agent.disk(name).await?;
            if disk.is_of_now() && missing_at_receiver(&disk).is_none() {
                return Ok::<(), Failure>(());
            }
            tokio::time::sleep(POLL).await;
        }
    };
    if let Ok(waited) = tokio::time::timeout(LAST_WRITES, durable).await {
        waited?;
    }
    // What its image lacks comes when it is up again: the agent's state stays in the same directory.
    let disk =
        agent.detach_even(name, DetachRequest { incomplete: true, ..DetachRequest::default() }).await?;
    let Some(missing) = missing_at_receiver(&disk) else { return Ok(Ending::Done) };
    context.warn(&format!("the history lacks {missing}: that follows when the disk is up again"));
    Ok(Ending::Warnings)
}

/// A directory keeps the history of one image.
fn claim(directory: &Path, image: &str) -> Result<(), Failure> {
    let path = directory.join("up.json");
    if !path.exists() {
        claim_first(directory, &path, image).map_err(|error| io_failure(path.display(), &error))?;
    }
    let text = std::fs::read(&path).map_err(|error| io_failure(path.display(), &error))?;
    let belongs: Belongs = serde_json::from_slice(&text)
        .map_err(|error| failed(format!("{} cannot be read: {error}", path.display())))?;
    if belongs.image == image {
        return Ok(());
    }
    let message = format!("{} keeps the history of {}, not of {image}", directory.display(), belongs.image);
    Err(ApiError::new(ErrorCode::Refused, message).with_hint("give another directory with --dir").into())
}

/// Of several at once the first one has it, and nobody reads half of what that writes.
fn claim_first(directory: &Path, path: &Path, image: &str) -> io::Result<()> {
    let mut file = tempfile::NamedTempFile::new_in(directory)?;
    file.write_all(serde_json::json!({ "image": image }).to_string().as_bytes())?;
    match file.persist_noclobber(path) {
        Err(error) if error.error.kind() != io::ErrorKind::AlreadyExists => Err(error.error),
        Ok(_) | Err(_) => Ok(()),
    }
}

/// A name out of the image's file name.
fn name_of(image: &str) -> Result<DiskName, Failure> {
    let file = image.split(['?', '#']).next().unwrap_or_default();
    let stem = Path::new(file).file_stem().unwrap_or_default().to_string_lossy();
    let name: String =
        stem.chars().map(|c| if c.is_ascii_alphanumeric() || "-_.".contains(c) { c } else { '_' }).collect();
    let name = name.trim_start_matches(['.', '-']);
    let name = &name[..name.len().min(64)];
    let name: DiskName = name
        .parse()
        .map_err(|_| wrong_usage(format!("{image} does not give the disk a name: use --name")))?;
    if !name.is_written_as_id() {
        return Ok(name);
    }
    Ok(format!("disk-{name}").parse().expect("is a letter and few characters longer than a UUID"))
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
        // As an agent's disk none may have a UUID for its name.
        let uuid = "6f1c0a1e-9d56-4c8f-b1d3-0a52d4a51c11";
        assert_eq!(name(&format!("/images/{uuid}.img")), Some(format!("disk-{uuid}")));
    }

    #[test]
    fn where_a_disk_is_served_is_as_asked_or_not() {
        let here = "nbd+unix:///vm1?socket=/run/vm1";
        assert!(is_served_as_asked(here, None, false) && is_served_as_asked(here, Some(here), false));
        assert!(!is_served_as_asked(here, None, true) && !is_served_as_asked(here, Some(here), true));
        assert!(!is_served_as_asked(here, Some("nbd+unix:///vm1?socket=/run/other"), false));
        assert!(!is_served_as_asked(here, Some("nbd+unix:///other?socket=/run/vm1"), false));
        let secured = "nbds+unix:///vm1?socket=/run/vm1&tls-certificates=/pki";
        assert!(is_served_as_asked(secured, None, true) && is_served_as_asked(secured, Some(here), true));
        assert!(!is_served_as_asked(secured, None, false));
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
