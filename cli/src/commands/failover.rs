//! `backtide failover`: a disk whose host is gone goes on here.

use std::path::PathBuf;

use backtide_agent_api::{ImageFormat, StreamTls};
use backtide_control::{Address, ApiError, ErrorCode};
use backtide_receiver_api::{ReceiverDisk, ResolvedPoint};
use backtide_units::DiskName;
use clap::Args;

use crate::{
    arguments::ReceiverApi,
    commands::{
        attach::{
            Policy, absolute_image, adopted_of, attached_ending, first_contact, image_format, keep_ack,
        },
        failback::look_at,
        stream_tls::absolute_folder,
    },
    confirm::confirm,
    context::Context,
    ending::{Ending, Failure},
    output::status::disk_text,
    quantity::time_text,
};

/// `backtide failover`
#[derive(Args, Debug)]
pub(crate) struct Failover {
    /// The disk's name, as its receiver knows it
    pub(crate) name: DiskName,
    /// Its image here: a new file, which is made, or an NBD URI of the disk's size that reads as zeroes
    image: String,
    /// Where the receiver takes streams
    #[arg(long, value_name = "ADDR")]
    receiver: Address,
    /// Certificates for a tls:// receiver, as with `attach`
    #[arg(long, value_name = "DIR")]
    tls_certificates: Option<PathBuf>,
    /// The name the receiver's certificate is for, where that is not the host of its address
    #[arg(long, value_name = "NAME", requires = "tls_certificates")]
    tls_hostname: Option<String>,
    /// Where to serve the disk [default: a unix socket of the agent's choice]
    #[arg(long, value_name = "URI")]
    nbd: Option<String>,
    /// What the new file becomes, `raw` or `qcow2` [default: qcow2 where its name ends so, else raw]
    #[arg(long, value_name = "FORMAT", value_parser = image_format())]
    format: Option<ImageFormat>,
    /// Do it without asking
    #[arg(long)]
    yes: bool,
    /// The receiver's control API, which is asked for the disk [default:
    /// unix:/run/backtide/receiver.sock for root, else $XDG_RUNTIME_DIR/backtide/receiver.sock]
    #[arg(long, value_name = "ADDR", env = "BACKTIDE_RECEIVER", hide_env_values = true)]
    receiver_api: Option<Address>,
    #[command(flatten)]
    policy: Policy,
}

impl Failover {
    /// Finds the disk at its receiver, says what it means, and has the agent take it over.
    pub(crate) async fn run(self, context: &Context) -> Result<Ending, Failure> {
        let agent = context.agent()?;
        let receiver = context.receiver(&ReceiverApi { receiver: self.receiver_api.clone() })?;
        let disk = look_at(&receiver, &self.name).await?;
        let latest = receiver.resolve(&self.name, "latest").await?;
        context.remark(latest.warning.as_deref());
        let what = plan_text(&disk, &latest);
        if self.yes {
            context.tell(&what);
        } else {
            confirm(context, &what).await?;
        }
        // Nobody has agreed to fence whoever came since it was looked, nor was told that anybody is there.
        if !disk.connected && look_at(&receiver, &self.name).await?.connected {
            return Err(has_come(&disk));
        }
        let image = absolute_image(&self.image)?;
        let mut request = self.policy.request(disk.name.clone(), image, self.receiver, self.nbd);
        request.stream_tls = match self.tls_certificates {
            Some(folder) => {
                let certificates = absolute_folder(&folder)?;
                Some(StreamTls { certificates, hostname: self.tls_hostname })
            }
            None => None,
        };
        keep_ack(context, &mut request, &disk);
        request.adopt = Some(adopted_of(&disk));
        request.failover = true;
        request.format = self.format;
        context.goes_on_at_agent(&request.name);
        let attached = agent.attach(&request).await?;
        let attached = first_contact(&agent, attached).await?;
        context.print(&attached, || disk_text(&attached))?;
        Ok(attached_ending(context, &attached))
    }
}

fn has_come(disk: &ReceiverDisk) -> Failure {
    let message =
        format!("an agent is connected with disk {} now, and was not a moment ago", disk.name.as_str());
    let hint = "nothing was done: the same command, given again, shows it and fences that agent";
    ApiError::new(ErrorCode::Busy, message).with_hint(hint).into()
}

fn plan_text(disk: &ReceiverDisk, latest: &ResolvedPoint) -> String {
    let name = disk.name.as_str();
    let goes_on = format!(
        "disk {name} goes on here from its latest point, lsn:{} ({}), and whoever has had it is fenced",
        latest.lsn,
        time_text(latest.time)
    );
    match disk.connected {
        false => format!("{goes_on}: what that wrote since is not part of the disk any more"),
        true => format!(
            "{goes_on}: an agent is CONNECTED with it now, and whatever its guest writes from now on is lost"
        ),
    }
}

#[cfg(test)]
mod tests {
    use backtide_receiver_api::DiskRef;
    use backtide_units::{ByteCount, CaptureTime, DiskId, Lsn};
    use clap::Parser;

    use super::*;
    use crate::{
        commands::failback::tests::told,
        played_agent::{Answer, PlayedAgent},
    };

    #[derive(Parser)]
    struct Given {
        #[command(flatten)]
        failover: Failover,
    }

    fn failover(receiver: &PlayedAgent) -> Failover {
        let api = receiver.address().to_string();
        let given = ["failover", "vm1", "/vm1.img", "--receiver", "unix:/r", "--yes", "--receiver-api", &api];
        Given::parse_from(given).failover
    }

    /// The receiver's words about the disk's latest point.
    fn latest() -> Answer {
        let disk = DiskRef { name: "vm1".parse().unwrap(), uuid: DiskId::random(), size: ByteCount(1 << 20) };
        let asked = "latest".to_owned();
        let (lsn, time) = (Lsn(90), CaptureTime(5));
        let point = ResolvedPoint { disk, asked, lsn, time, warning: None, unheard: false };
        Some((200, serde_json::to_value(point).unwrap()))
    }

    #[tokio::test]
    async fn whoever_comes_while_it_is_asked_for_is_not_fenced() {
        for (before, then, begun) in [(false, true, 0), (false, false, 1), (true, true, 1)] {
            let receiver = PlayedAgent::answering(
                [told(before), latest()].into_iter().chain(std::iter::repeat(told(then))),
            );
            let refused = ApiError::new(ErrorCode::Refused, "no room");
            let refused = Some((409, serde_json::to_value(refused).unwrap()));
            let agent = PlayedAgent::answering([refused]);
            let context = agent.context();
            let ended = failover(&receiver).run(&context).await;
            let Err(Failure::Error(error)) = ended else { panic!("{ended:?}") };
            assert_eq!(agent.calls().len(), begun, "{error}");
            assert_eq!(
                (error.code == ErrorCode::Busy, context.at_agent().is_some()),
                (begun == 0, begun == 1)
            );
        }
    }
}
