//! `backtide failback`: a disk that has gone on at another host comes back to this one.

use std::time::{Duration, Instant};

use backtide_agent_api::{AgentClient, FailbackReport, FailbackRequest};
use backtide_control::{Address, ApiError, ErrorCode};
use backtide_receiver_api::{ReceiverClient, ReceiverDisk};
use backtide_units::DiskName;
use clap::Args;

use crate::{
    arguments::ReceiverApi,
    commands::{
        attach::{adopted_of, attached_ending, first_contact, keep},
        until_complete::until_complete,
    },
    confirm::confirm,
    context::Context,
    ending::{Ending, Failure, failed},
    quantity::{size_both, time_text},
};

/// How long an agent that lets go of a disk may take to say so to the receiver.
const GOODBYE_TIME: Duration = Duration::from_secs(2);

/// `backtide failback`
#[derive(Args, Debug)]
pub(crate) struct Failback {
    /// The disk's name, which this agent has had it under
    name: DiskName,
    /// Where the receiver takes streams [default: where it did when the disk was here]
    #[arg(long, value_name = "ADDR")]
    receiver: Option<Address>,
    /// Also while another agent is connected with it: what its guest writes from then on is lost. And also over an
    /// image that is not the one the disk had here: all of it is replaced
    #[arg(long)]
    force: bool,
    /// Do it without asking
    #[arg(long)]
    yes: bool,
    /// Wait until everything that differs has been fetched and the image is complete
    #[arg(long)]
    wait: bool,
    /// The receiver's control API, which is asked for the disk [default:
    /// unix:/run/backtide/receiver.sock for root, else $XDG_RUNTIME_DIR/backtide/receiver.sock]
    #[arg(long, value_name = "ADDR", env = "BACKTIDE_RECEIVER", hide_env_values = true)]
    receiver_api: Option<Address>,
}

impl Failback {
    /// Finds the disk at its receiver, says what it means, and has the agent go back to it.
    pub(crate) async fn run(self, context: &Context) -> Result<Ending, Failure> {
        let agent = context.agent()?;
        let receiver = context.receiver(&ReceiverApi { receiver: self.receiver_api.clone() })?;
        let mut disk = look_at(&receiver, &self.name).await?;
        let mut request = FailbackRequest {
            adopt: adopted_of(&disk),
            receiver: self.receiver.clone(),
            dry_run: true,
            force: self.force,
            ack: None,
            on_outage: None,
        };
        let plan = agent.failback(&disk.name, &request).await?;
        if plan.here_already {
            return self.goes_on(context, &agent, plan).await;
        }
        // The plan may have taken minutes. An agent that has just detached the disk may not have said good-bye yet.
        disk = look_at(&receiver, &self.name).await?;
        let until = Instant::now() + GOODBYE_TIME;
        while disk.connected && !self.force {
            if Instant::now() >= until {
                return Err(still_there(&disk));
            }
            tokio::time::sleep(GOODBYE_TIME / 20).await;
            disk = look_at(&receiver, &self.name).await?;
        }
        let what = plan_text(&disk, &plan);
        if self.yes {
            context.tell(&what);
        } else {
            confirm(context, &what).await?;
        }
        // Nobody has agreed to fence whoever came while it was asked, nor was told that anybody is there.
        disk = look_at(&receiver, &self.name).await?;
        if disk.connected && !self.force {
            return Err(still_there(&disk));
        }
        request.dry_run = false;
        keep(context, &disk, "--ack", &mut request.ack, disk.ack.as_deref());
        keep(context, &disk, "--on-outage", &mut request.on_outage, disk.on_outage.as_deref());
        context.goes_on_at_agent(&disk.name);
        let mut report = agent.failback(&disk.name, &request).await?;
        let ending = self.settled(context, &agent, &mut report).await?;
        context.print(&report, || report_text(&disk, &report))?;
        Ok(ending)
    }
}

impl Failback {
    /// The disk is here: nothing is asked, and there is nothing to do but to wait.
    async fn goes_on(
        &self,
        context: &Context,
        agent: &AgentClient,
        mut report: FailbackReport,
    ) -> Result<Ending, Failure> {
        let ending = self.settled(context, agent, &mut report).await?;
        context.print(&report, || here_text(&self.name, &report))?;
        Ok(ending)
    }

    /// Waits for as much as was asked for, and has the report tell how the disk is then. That may not be protected.
    async fn settled(
        &self,
        context: &Context,
        agent: &AgentClient,
        report: &mut FailbackReport,
    ) -> Result<Ending, Failure> {
        if self.wait {
            report.disk = Some(until_complete(context, agent, &self.name).await?);
        }
        let Some(disk) = report.disk.take() else { return Ok(Ending::Done) };
        let disk = report.disk.insert(first_contact(agent, disk).await?);
        Ok(attached_ending(context, disk))
    }
}

fn here_text(name: &DiskName, report: &FailbackReport) -> String {
    let name = name.as_str();
    let Some(disk) = &report.disk else { return format!("{name} is here already") };
    let mut text = format!("{name} is here already\nserved at {}", disk.nbd_uri);
    if let Some(hydration) = &disk.hydration {
        text.push_str(&format!(
            "\nit came back at lsn:{}, and {} still come from the receiver; `backtide status {name}` shows how far it is",
            hydration.point,
            size_both(hydration.missing_bytes)
        ));
    }
    text
}

/// A disk, as its receiver has it now.
pub(crate) async fn look_at(receiver: &ReceiverClient, name: &DiskName) -> Result<ReceiverDisk, Failure> {
    let disk = receiver.disks(Some(name)).await?.disks.into_iter().next();
    disk.ok_or_else(|| failed("the receiver answered nothing"))
}

fn still_there(disk: &ReceiverDisk) -> Failure {
    let name = disk.name.as_str();
    let message = format!("an agent is connected with disk {name} now");
    ApiError::new(ErrorCode::Busy, message)
        .with_hint(format!(
            "shut the virtual machine down there and `backtide detach {name}`; with --force it is taken from that agent"
        ))
        .into()
}

fn plan_text(disk: &ReceiverDisk, plan: &FailbackReport) -> String {
    let name = disk.name.as_str();
    let mut text = format!(
        "disk {name} comes back here at its latest point, lsn:{} ({}), and whoever has had it is fenced: {} of the image stay, {} are compared, and what differs of that is fetched",
        plan.point,
        time_text(plan.point_time),
        size_both(plan.kept_bytes),
        size_both(plan.fetched_bytes),
    );
    text.push_str(&losses(plan));
    if disk.connected {
        text.push_str(
            "; an agent is CONNECTED with it now, and whatever its guest writes from now on is lost",
        );
    }
    text
}

/// What an operator has to know of the image before it is written.
fn losses(plan: &FailbackReport) -> String {
    let mut text = String::new();
    if let Some(why) = &plan.everything_because {
        text.push_str(&format!("; that is all of the image, because {why}"));
    }
    if !plan.lost_bytes.is_zero() {
        text.push_str(&format!(
            "; up to {} that may have been changed here and never reached the receiver are OVERWRITTEN",
            size_both(plan.lost_bytes)
        ));
    }
    text
}

fn report_text(disk: &ReceiverDisk, report: &FailbackReport) -> String {
    let name = disk.name.as_str();
    let mut text = format!(
        "{name} is back at lsn:{} ({}): {} of the image stayed, {} differ or may",
        report.point,
        time_text(report.point_time),
        size_both(report.kept_bytes),
        size_both(report.fetched_bytes),
    );
    let Some(attached) = &report.disk else { return text };
    text.push_str(&format!("\nserved at {}", attached.nbd_uri));
    if let Some(hydration) = &attached.hydration {
        text.push_str(&format!(
            "\n{} still come from the receiver, on first touch and in the background: until then the image alone is not the disk; `backtide status {name}` shows how far it is",
            size_both(hydration.missing_bytes)
        ));
    }
    text
}

#[cfg(test)]
pub(crate) mod tests {
    use backtide_agent_api::{DiskStatus, PeerError};
    use backtide_units::{ByteCount, CaptureTime, DiskId, HistoryId, Lsn};
    use serde_json::json;

    use super::*;
    use crate::{
        output::status::tests::in_sync,
        played_agent::{Answer, PlayedAgent},
    };

    fn plan() -> FailbackReport {
        FailbackReport {
            point: Lsn(90),
            point_time: CaptureTime(5),
            fetched_bytes: ByteCount(8192),
            kept_bytes: ByteCount(4096),
            lost_bytes: ByteCount::ZERO,
            everything_because: None,
            here_already: false,
            disk: None,
        }
    }

    #[test]
    fn what_is_lost_is_said_whatever_else_is() {
        let why = "this agent does not know what was changed here";
        for everything_because in [None, Some(why.to_owned())] {
            let told = everything_because.is_some();
            let text = losses(&FailbackReport { everything_because: everything_because.clone(), ..plan() });
            assert_eq!((text.contains(why), text.contains("OVERWRITTEN")), (told, false), "{text}");
            let lost_bytes = ByteCount(1 << 20);
            let text = losses(&FailbackReport { everything_because, lost_bytes, ..plan() });
            assert_eq!((text.contains(why), text.contains("OVERWRITTEN")), (told, true), "{text}");
            assert!(text.contains("1048576 bytes"), "{text}");
        }
    }

    /// The receiver's words about the disk.
    pub(crate) fn told(connected: bool) -> Answer {
        let disk = json!({
            "name": "vm1", "uuid": DiskId::random(), "size": 1 << 20, "history": HistoryId::random(), "epoch": 9,
            "connected": connected, "in_pass": false, "received": 90, "durable": 90, "last_time": null,
            "log_bytes": 0, "segments": 1, "error": null,
        });
        Some((200, json!({ "disks": [disk] })))
    }

    fn failback(receiver: &PlayedAgent) -> Failback {
        let receiver_api = Some(receiver.address());
        Failback {
            name: "vm1".parse().unwrap(),
            receiver: None,
            force: false,
            yes: true,
            wait: false,
            receiver_api,
        }
    }

    fn answer(report: &FailbackReport) -> Answer {
        Some((200, serde_json::to_value(report).unwrap()))
    }

    #[tokio::test]
    async fn whoever_comes_while_it_is_planned_or_asked_for_is_not_fenced() {
        for looks_before in [1, 2] {
            let looks = std::iter::repeat_n(told(false), looks_before);
            let receiver = PlayedAgent::answering(looks.chain(std::iter::repeat(told(true))));
            // It would go on with the second one.
            let agent = PlayedAgent::answering([answer(&plan()), answer(&plan())]);
            let context = agent.context();
            let ended = failback(&receiver).run(&context).await;
            let Err(Failure::Error(error)) = ended else { panic!("{ended:?}") };
            assert_eq!((error.code, agent.calls().len()), (ErrorCode::Busy, 1), "{error}");
            assert!(error.message.contains("an agent is connected with disk vm1"), "{error}");
            assert_eq!(context.at_agent(), None, "nothing was begun");
        }
    }

    #[tokio::test]
    async fn a_disk_that_is_back_and_not_protected_is_a_warning() {
        let away = DiskStatus {
            connected: false,
            last_error: Some(PeerError {
                code: "unreachable".to_owned(),
                message: "connection refused".to_owned(),
                time: CaptureTime(5),
            }),
            ..in_sync()
        };
        for (disk, ending) in [(away, Ending::Warnings), (in_sync(), Ending::Done)] {
            let receiver = PlayedAgent::answering([told(false), told(false), told(false)]);
            let done = FailbackReport { disk: Some(disk.clone()), ..plan() };
            let agent = PlayedAgent::answering([answer(&plan()), answer(&done)]);
            let context = agent.context();
            assert_eq!(failback(&receiver).run(&context).await.unwrap(), ending);
            assert!(context.at_agent().is_some(), "an interrupted one says that the agent goes on");
            let receiver = PlayedAgent::answering([told(false)]);
            let agent = PlayedAgent::answering([answer(&FailbackReport { here_already: true, ..done })]);
            assert_eq!(failback(&receiver).run(&agent.context()).await.unwrap(), ending);
        }
    }
}
