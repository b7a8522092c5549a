//! `backtide attach`: protect a disk.

use std::{
    fmt::Display,
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use backtide_agent_api::{
    AckPolicy, Adopted, AgentClient, AttachRequest, CacheMode, DiskStatus, FromPoint, ImageFormat,
    LimitsRequest, Mode, OnOutage, StreamTls,
};
use backtide_control::{Address, ApiError, ErrorCode};
use backtide_receiver_api::ReceiverDisk;
use backtide_units::{ByteCount, DiskName};
use clap::{Args, builder::PossibleValuesParser, builder::TypedValueParser};

use crate::{
    arguments::ReceiverApi,
    commands::stream_tls::absolute_folder,
    context::Context,
    ending::{Ending, Failure, failed, io_failure},
    output::status::disk_text,
    quantity::parse_size,
};

/// How long to look whether the receiver is there, only to say so if it is not.
const FIRST_CONTACT: Duration = Duration::from_secs(5);

/// How often status is asked while waiting.
pub(crate) const POLL: Duration = Duration::from_millis(100);

/// `backtide attach`
#[derive(Args, Debug)]
pub(crate) struct Attach {
    /// The disk's name, also of its NBD export: letters, digits, '-', '_' and '.'
    pub(crate) name: DiskName,
    /// The disk behind: a raw image, a block device, a qcow2 file or an NBD URI
    image: String,
    /// Where the receiver takes streams
    #[arg(long, value_name = "ADDR")]
    receiver: Address,
    /// Certificates for a tls:// receiver: the folder of ca-cert.pem, client-cert.pem and client-key.pem
    /// [default: those of the agent's configuration]
    #[arg(long, value_name = "DIR")]
    tls_certificates: Option<PathBuf>,
    /// The name the receiver's certificate is for, where that is not the host of its address
    #[arg(long, value_name = "NAME", requires = "tls_certificates")]
    tls_hostname: Option<String>,
    /// Where to serve the disk [default: a unix socket of the agent's choice]
    #[arg(long, value_name = "URI")]
    nbd: Option<String>,
    /// What IMAGE is, `raw` or `qcow2` [default: what it was at the disk's first attach, at the first what it looks like;
    /// with --from, qcow2 where the new file's name ends so]
    #[arg(long, value_name = "FORMAT", value_parser = image_format())]
    format: Option<ImageFormat>,
    /// Continue the history that the receiver keeps of a disk of this name, after this agent has
    /// lost what it knew: everything is compared. The receiver's control API is asked for it
    #[arg(long)]
    adopt: bool,
    /// Take a disk back that another agent has had since: that one is fenced, and what IMAGE holds becomes the
    /// latest content, after a comparison of everything
    #[arg(long, conflicts_with_all = ["adopt", "from"])]
    take_over: bool,
    /// Begin as a point of another disk of that receiver, as DISK@POINT: the image is made, and what it lacks
    /// comes on first touch and in the background. The receiver's control API is asked for the point
    #[arg(long, value_name = "DISK@POINT", conflicts_with = "adopt", value_parser = from_point)]
    from: Option<(DiskName, String)>,
    /// With --from: also a point of which blocks are damaged at the receiver, which cannot be read until they are
    /// written
    #[arg(long, requires = "from")]
    force: bool,
    /// The receiver's control API, with --adopt or --from [default: unix:/run/backtide/receiver.sock for root,
    /// else $XDG_RUNTIME_DIR/backtide/receiver.sock]
    #[arg(long, value_name = "ADDR", env = "BACKTIDE_RECEIVER", hide_env_values = true)]
    receiver_api: Option<Address>,
    #[command(flatten)]
    policy: Policy,
}

/// When the guest is acknowledged, and what is bounded how.
#[derive(Args, Clone, Debug)]
pub(crate) struct Policy {
    /// When the guest is acknowledged: when its write is `local`; when the receiver has `received`
    /// it; at once but for FLUSH and FUA, which wait until everything is `durable` at the receiver;
    /// or every write only when it is durable there [default: as before, at the first attach local]
    #[arg(long, value_name = "POLICY", value_parser = ack_policy())]
    ack: Option<AckPolicy>,
    /// What --ack means while the receiver is away: `continue` without it, or `block` the guest [default: as before,
    /// at the first attach continue]
    #[arg(long, value_name = "WHAT", value_parser = on_outage())]
    on_outage: Option<OnOutage>,
    /// Whether the image is read and written through the page cache (`writeback`) or directly to its
    /// device (`direct`) [default: writeback, or as the agent's configuration says]
    #[arg(long, value_name = "HOW", value_parser = cache_mode())]
    cache: Option<CacheMode>,
    /// The most bytes of records kept until they are durable at the receiver [default: 64MiB]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    window: Option<ByteCount>,
    /// The most bytes between a resync's local reads and the stream [default: 32MiB]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    resync_buffer: Option<ByteCount>,
    /// The most bytes per second that a resync sends, 0 for as fast as it goes [default: 0]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    resync_rate: Option<ByteCount>,
    /// The most that the reads of a resync or a verify shall add to the guest's latency, in microseconds:
    /// they slow down until they do; 0 for as much as it takes [default: 500]
    #[arg(long, value_name = "US")]
    resync_latency_max: Option<u32>,
    /// The longest a guest request is delayed for the receiver's sake, in milliseconds, 0 for never
    /// [default: 10]
    #[arg(long, value_name = "MS")]
    guest_delay_max: Option<u32>,
    /// The most memory for the bitmap of changed blocks; above it, it becomes coarser [default: 64MiB]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    bitmap: Option<ByteCount>,
    /// With --on-outage continue, how long the guest waits for a receiver that is silent before that
    /// counts as an outage, in milliseconds, 1 or more [default: 5000]
    #[arg(long, value_name = "MS")]
    outage_after: Option<u32>,
    /// The extents of the activity log that stay hot: about so many have to be compared after a
    /// crash; 0 to keep none, and compare the whole disk [default: 1024]
    #[arg(long, value_name = "COUNT")]
    activity_extents: Option<u32>,
    /// The size of such an extent [default: 4MiB]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    activity_extent_size: Option<ByteCount>,
}

fn ack_policy() -> impl TypedValueParser<Value = AckPolicy> {
    PossibleValuesParser::new(AckPolicy::ALL.map(AckPolicy::as_str)).try_map(|text| text.parse::<AckPolicy>())
}

pub(crate) fn image_format() -> impl TypedValueParser<Value = ImageFormat> {
    PossibleValuesParser::new(ImageFormat::ALL.map(ImageFormat::as_str))
        .try_map(|text| text.parse::<ImageFormat>())
}

fn cache_mode() -> impl TypedValueParser<Value = CacheMode> {
    PossibleValuesParser::new(CacheMode::ALL.map(CacheMode::as_str)).try_map(|text| text.parse::<CacheMode>())
}

fn on_outage() -> impl TypedValueParser<Value = OnOutage> {
    PossibleValuesParser::new(OnOutage::ALL.map(OnOutage::as_str)).try_map(|text| text.parse::<OnOutage>())
}

impl Policy {
    /// The request to protect `image` so.
    pub(crate) fn request(
        &self,
        name: DiskName,
        image: String,
        receiver: Address,
        nbd: Option<String>,
    ) -> AttachRequest {
        let limits = LimitsRequest {
            window_bytes: self.window,
            resync_buffer_bytes: self.resync_buffer,
            guest_delay_max_ms: self.guest_delay_max,
            resync_bytes_per_second_max: self.resync_rate,
            resync_latency_us_max: self.resync_latency_max,
            bitmap_bytes: self.bitmap,
            outage_after_ms: self.outage_after,
            activity_extents: self.activity_extents,
            activity_extent_bytes: self.activity_extent_size,
        };
        let (ack, on_outage, cache) = (self.ack, self.on_outage, self.cache);
        let (stream_tls, adopt, from, failover, take_over) = (None, None, None, false, false);
        AttachRequest {
            name,
            image,
            receiver,
            nbd,
            ack,
            on_outage,
            cache,
            limits,
            stream_tls,
            adopt,
            from,
            failover,
            take_over,
            format: None,
        }
    }
}

impl Attach {
    /// Attaches, then looks for a moment whether the receiver is there.
    pub(crate) async fn run(self, context: &Context) -> Result<Ending, Failure> {
        let agent = context.agent()?;
        let image = absolute_image(&self.image)?;
        let mut request = self.policy.request(self.name, image, self.receiver, self.nbd);
        request.stream_tls = match self.tls_certificates {
            Some(folder) => {
                let certificates = absolute_folder(&folder)?;
                Some(StreamTls { certificates, hostname: self.tls_hostname })
            }
            None => None,
        };
        request.take_over = self.take_over;
        request.format = self.format;
        if self.adopt {
            let api = ReceiverApi { receiver: self.receiver_api.clone() };
            let disk = adopted(context, &api, &request.name).await?;
            keep_ack(context, &mut request, &disk);
            request.adopt = Some(adopted_of(&disk));
        }
        if let Some((disk, point)) = &self.from {
            let receiver = context.receiver(&ReceiverApi { receiver: self.receiver_api.clone() })?;
            let point = receiver.resolve(disk, point).await?;
            context.remark(point.warning.as_deref());
            request.from = Some(FromPoint { disk: point.disk.uuid, lsn: point.lsn, force: self.force });
        }
        context.goes_on_at_agent(&request.name);
        let attached =
            agent.attach(&request).await.map_err(|error| named(self.from.as_ref(), &request, error))?;
        let disk = first_contact(&agent, attached).await?;
        refuse_strange(&agent, &disk).await?;
        context.print(&disk, || disk_text(&disk))?;
        Ok(attached_ending(context, &disk))
    }
}

/// The agent knows the disk of `--from` by its UUID only; whoever gave a name is told of that.
fn named(asked: Option<&(DiskName, String)>, request: &AttachRequest, error: ApiError) -> ApiError {
    let (Some((name, point)), Some(from)) = (asked, &request.from) else { return error };
    let known = format!("LSN {} of {}", from.lsn, from.disk);
    let message = error.message.replace(&known, &format!("{name}@{point}"));
    ApiError { message, ..error }
}

/// A disk and one of its points, as `DISK@POINT`.
fn from_point(text: &str) -> Result<(DiskName, String), String> {
    let wrong = || format!("{text:?} is no point of a disk: write DISK@POINT, such as vm1@-5m or vm1@latest");
    let (disk, point) = text.split_once('@').filter(|(_, point)| !point.is_empty()).ok_or_else(wrong)?;
    let disk = disk.parse().map_err(|_| wrong())?;
    Ok((disk, point.to_owned()))
}

/// What the receiver knows of a disk that this agent has lost.
async fn adopted(context: &Context, api: &ReceiverApi, name: &DiskName) -> Result<ReceiverDisk, Failure> {
    let disks = context.receiver(api)?.disks(Some(name)).await?.disks;
    let disk = disks.into_iter().next().ok_or_else(|| failed("the receiver answered nothing"))?;
    if disk.connected {
        let message = format!("an agent is connected with disk {} now", name.as_str());
        return Err(ApiError::new(ErrorCode::Busy, message)
            .with_hint("detach it there first, or attach this image under another name")
            .into());
    }
    Ok(disk)
}

/// A disk that is not told otherwise answers its guest as it did where it was before, and says so.
pub(crate) fn keep_ack(context: &Context, request: &mut AttachRequest, disk: &ReceiverDisk) {
    keep(context, disk, "--ack", &mut request.ack, disk.ack.as_deref());
    keep(context, disk, "--on-outage", &mut request.on_outage, disk.on_outage.as_deref());
}

/// The same of one option, which the disk had `before` as far as its receiver knows.
pub(crate) fn keep<T: Copy + Default + PartialEq + Display + FromStr>(
    context: &Context,
    disk: &ReceiverDisk,
    option: &str,
    asked: &mut Option<T>,
    before: Option<&str>,
) {
    let Some(before) = before else { return };
    let name = disk.name.as_str();
    match (*asked, before.parse::<T>()) {
        (None, Ok(kept)) => {
            *asked = Some(kept);
            if kept != T::default() {
                context.tell(&format!("disk {name} had {option} {kept} before, and keeps it"));
            }
        }
        (Some(asked), Ok(before)) if asked != before => context
            .tell(&format!("disk {name} had {option} {before} before, and has {option} {asked} from now on")),
        (None, Err(_)) => {
            context.warn(&format!("disk {name} had {option} {before} before, which is not known here"))
        }
        (Some(_), _) => {}
    }
}

/// The same of a disk that the receiver has told of.
pub(crate) fn adopted_of(disk: &ReceiverDisk) -> Adopted {
    Adopted {
        uuid: disk.uuid,
        history: disk.history,
        epoch: disk.epoch,
        durable: disk.durable,
        last_time: disk.last_time,
    }
}

/// A receiver refuses a disk it never met because it keeps another one of that name: most likely the
/// same one, of an agent that has lost its state. What was attached for nothing is detached again.
async fn refuse_strange(agent: &AgentClient, disk: &DiskStatus) -> Result<(), Failure> {
    let Some(error) = disk.last_error.as_ref().filter(|error| error.code == "refused") else { return Ok(()) };
    if disk.connected || disk.history.is_some() {
        return Ok(());
    }
    agent.detach(&disk.name).await?;
    let name = disk.name.as_str();
    let message = format!("the receiver does not take disk {name}: {}", error.message);
    Err(ApiError::new(ErrorCode::Refused, message)
        .with_hint(format!(
            "if the image is that disk and this agent has lost its state, --adopt continues its history; \
             `backtide points {name}` shows it"
        ))
        .into())
}

/// The disk's status when it is connected or the attempt has failed, but not later than
/// [`FIRST_CONTACT`].
pub(crate) async fn first_contact(agent: &AgentClient, attached: DiskStatus) -> Result<DiskStatus, Failure> {
    let agent = agent.at_length();
    let deadline = tokio::time::Instant::now() + FIRST_CONTACT;
    let mut disk = attached;
    let may_come =
        |disk: &DiskStatus| !disk.connected && disk.last_error.is_none() && disk.mode != Mode::Paused;
    while may_come(&disk) && tokio::time::Instant::now() < deadline {
        tokio::time::sleep(POLL).await;
        disk = agent.disk(&disk.name).await?;
    }
    Ok(disk)
}

/// How a command ends that has a disk attached: with warnings, which it gives, when that is not protected yet or its image is
/// in trouble.
pub(crate) fn attached_ending(context: &Context, disk: &DiskStatus) -> Ending {
    if disk.mode == Mode::Detached {
        context.warn(&format!("disk {} is not attached: {}", disk.name.as_str(), disk.reason));
        return Ending::Warnings;
    }
    if let Some(trouble) = &disk.local_error {
        context.warn(&format!("the image of disk {}: {trouble}", disk.name.as_str()));
    }
    match &disk.last_error {
        Some(error) if !disk.connected => {
            let (what, until) = match error.code == "unreachable" {
                true => ("is not there", "is"),
                false => ("does not take it", "does"),
            };
            context.warn(&format!(
                "disk {} is attached, but its receiver at {} {what}: {}; {} until it {until}",
                disk.name.as_str(),
                disk.receiver,
                error.message,
                meanwhile(disk)
            ));
            Ending::Warnings
        }
        None if !disk.connected && disk.mode != Mode::Paused => {
            context.warn(&format!(
                "disk {} is attached, but its receiver at {} has not answered for {} s; {} until it does",
                disk.name.as_str(),
                disk.receiver,
                FIRST_CONTACT.as_secs(),
                meanwhile(disk)
            ));
            Ending::Warnings
        }
        Some(_) | None if disk.local_error.is_some() => Ending::Warnings,
        Some(_) | None => Ending::Done,
    }
}

/// The agent has another working directory than this command, so paths go to it absolute.
pub(crate) fn absolute_image(image: &str) -> Result<String, Failure> {
    if image.starts_with("nbd") && image.contains("://") {
        return Ok(image.to_owned());
    }
    let path = std::path::absolute(Path::new(image)).map_err(|error| io_failure(image, &error))?;
    path.into_os_string().into_string().map_err(|path| {
        crate::ending::wrong_usage(format!("the path {} is not UTF-8, which the API needs", path.display()))
    })
}

/// What becomes of the guest's writes, as the disk's reason has it.
fn meanwhile(disk: &DiskStatus) -> &'static str {
    // The only mode without a stream in which there are records.
    if disk.mode == Mode::Sync { "writes are retained" } else { "changed blocks are tracked" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_point_of_a_disk_has_both() {
        let (disk, point) = from_point("vm1@mark:a@b").unwrap();
        assert_eq!((disk.as_str(), point.as_str()), ("vm1", "mark:a@b"));
        for wrong in ["vm1", "vm1@", "@latest", "a b@latest"] {
            assert!(from_point(wrong).unwrap_err().contains("DISK@POINT"), "{wrong}");
        }
    }

    #[test]
    fn images_become_absolute_and_uris_stay() {
        assert_eq!(absolute_image("nbd://host/vm1").unwrap(), "nbd://host/vm1");
        assert_eq!(absolute_image("/images/../images/vm1.img").unwrap(), "/images/../images/vm1.img");
        let relative = absolute_image("vm1.img").unwrap();
        assert_eq!(Path::new(&relative), std::env::current_dir().unwrap().join("vm1.img"));
    }
}
