//! `backtide attach`: protect a disk.

use std::{path::Path, time::Duration};

use backtide_agent_api::{AckPolicy, AgentClient, AttachRequest, DiskStatus, LimitsRequest, OnOutage};
use backtide_control::Address;
use backtide_units::{ByteCount, DiskName};
use clap::{Args, builder::PossibleValuesParser, builder::TypedValueParser};

use crate::{
    context::Context,
    ending::{Ending, Failure, io_failure},
    output::status::disk_text,
    quantity::parse_size,
};

/// How long to look whether the receiver is there, only to say so if it is not.
const FIRST_CONTACT: Duration = Duration::from_secs(2);

/// How often status is asked while waiting.
pub(crate) const POLL: Duration = Duration::from_millis(100);

/// `backtide attach`
#[derive(Args, Debug)]
pub(crate) struct Attach {
    /// The disk's name, also of its NBD export: letters, digits, '-', '_' and '.'
    name: DiskName,
    /// The disk behind: a raw image, a block device, a qcow2 file or an NBD URI
    image: String,
    /// Where the receiver takes streams
    #[arg(long, value_name = "ADDR")]
    receiver: Address,
    /// Where to serve the disk [default: a unix socket of the agent's choice]
    #[arg(long, value_name = "URI")]
    nbd: Option<String>,
    #[command(flatten)]
    policy: Policy,
}

/// When the guest is acknowledged, and what is bounded how.
#[derive(Args, Clone, Debug)]
pub(crate) struct Policy {
    /// When the guest is acknowledged: when its write is `local`; when the receiver has `received`
    /// it; at once but for FLUSH and FUA, which wait until everything is `durable` at the receiver;
    /// or every write only when it is durable there
    #[arg(long, value_name = "POLICY", default_value = "local", value_parser = ack_policy())]
    ack: AckPolicy,
    /// What --ack means while the receiver is away: `continue` without it, or `block` the guest
    #[arg(long, value_name = "WHAT", default_value = "continue", value_parser = on_outage())]
    on_outage: OnOutage,
    /// The most bytes of records kept until they are durable at the receiver [default: 64MiB]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    window: Option<ByteCount>,
    /// The most bytes between a resync's local reads and the stream [default: 32MiB]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    resync_buffer: Option<ByteCount>,
    /// The most bytes per second that a resync sends, 0 for as fast as it goes [default: 0]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    resync_rate: Option<ByteCount>,
    /// The longest a guest request is delayed for the receiver's sake, in milliseconds, 0 for never
    /// [default: 10]
    #[arg(long, value_name = "MS")]
    guest_delay_max: Option<u32>,
}

fn ack_policy() -> impl TypedValueParser<Value = AckPolicy> {
    PossibleValuesParser::new(AckPolicy::ALL.map(AckPolicy::as_str)).try_map(|text| text.parse::<AckPolicy>())
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
        };
        AttachRequest { name, image, receiver, nbd, ack: self.ack, on_outage: self.on_outage, limits }
    }
}

impl Attach {
    /// Attaches, then looks for a moment whether the receiver is there.
    pub(crate) async fn run(self, context: &Context) -> Result<Ending, Failure> {
        let agent = context.agent()?;
        let image = absolute_image(&self.image)?;
        let request = self.policy.request(self.name, image, self.receiver, self.nbd);
        let attached = agent.attach(&request).await?;
        let disk = first_contact(&agent, attached).await?;
        context.print(&disk, || disk_text(&disk))?;
        match &disk.last_error {
            Some(error) if !disk.connected => {
                let what = if error.code == "unreachable" { "is not there" } else { "does not take it" };
                context.warn(&format!(
                    "disk {} is attached, but its receiver at {} {what}: {}; changed blocks are tracked until it does",
                    disk.name.as_str(),
                    disk.receiver,
                    error.message
                ));
                Ok(Ending::Warnings)
            }
            Some(_) | None => Ok(Ending::Done),
        }
    }
}

/// The disk's status when it is connected or the attempt has failed, but not later than
/// [`FIRST_CONTACT`].
pub(crate) async fn first_contact(agent: &AgentClient, attached: DiskStatus) -> Result<DiskStatus, Failure> {
    let deadline = tokio::time::Instant::now() + FIRST_CONTACT;
    let mut disk = attached;
    while !disk.connected && disk.last_error.is_none() && tokio::time::Instant::now() < deadline {
        tokio::time::sleep(POLL).await;
        disk = agent.disk(&disk.name).await?;
    }
    Ok(disk)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_become_absolute_and_uris_stay() {
        assert_eq!(absolute_image("nbd://host/vm1").unwrap(), "nbd://host/vm1");
        assert_eq!(absolute_image("/images/../images/vm1.img").unwrap(), "/images/../images/vm1.img");
        let relative = absolute_image("vm1.img").unwrap();
        assert_eq!(Path::new(&relative), std::env::current_dir().unwrap().join("vm1.img"));
    }
}
