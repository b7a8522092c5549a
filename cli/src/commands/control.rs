//! `backtide detach`, `pause` and `resume`: one call each.

use backtide_agent_api::{DetachRequest, DiskStatus};
use backtide_units::DiskName;
use clap::Args;

use crate::{
    context::Context,
    ending::{Ending, Failure},
    output::status::{disk_line, missing_at_receiver},
    quantity::count_text,
};

/// `backtide detach`
#[derive(Args, Debug)]
pub(crate) struct Detach {
    /// The disk's name or UUID
    name: DiskName,
    /// Detach it although its image lacks blocks, which are still at the receiver: only the same agent can go on
    /// with it
    #[arg(long)]
    incomplete: bool,
    /// Detach it although NBD clients have it open: they lose it, and their requests that wait for the receiver are
    /// answered with an error
    #[arg(long)]
    force: bool,
    /// Detach it although NBD clients that had it open when the agent was restarted or died have not come back: none does.
    /// Refused as ever while one is there
    #[arg(long)]
    nobody_returns: bool,
}

/// `backtide pause`
#[derive(Args, Debug)]
pub(crate) struct Pause {
    /// The disk's name or UUID
    name: DiskName,
}

/// `backtide resume`
#[derive(Args, Debug)]
pub(crate) struct Resume {
    /// The disk's name or UUID
    name: DiskName,
}

impl Detach {
    /// Detaches, and warns of what the receiver lacks.
    pub(crate) async fn run(self, context: &Context) -> Result<Ending, Failure> {
        let agent = context.agent()?;
        let Self { incomplete, force, nobody_returns, .. } = self;
        let request = DetachRequest { incomplete, force, nobody_returns };
        let disk = agent.detach_even(&self.name, request).await?;
        print(context, &disk)?;
        if let Some(given_up) = &disk.guest_waits {
            let requests = count_text(given_up.requests, "request");
            context.warn(&format!(
                "{requests} of the guest that waited for the receiver failed: what they wrote is in the image and was \
                 never acknowledged, as `--ack {}` has it",
                disk.ack
            ));
        }
        if let Some(trouble) = &disk.local_error {
            context.warn(&format!("the local disk of {}: {trouble}", disk.name.as_str()));
        }
        match missing_at_receiver(&disk) {
            Some(missing) => {
                let goes_on = after_detach(&disk);
                context
                    .warn(&format!("the receiver lacks {missing} of disk {}; {goes_on}", disk.name.as_str()));
                Ok(Ending::Warnings)
            }
            None if disk.guest_waits.is_some() || disk.local_error.is_some() => Ok(Ending::Warnings),
            None => Ok(Ending::Done),
        }
    }
}

/// What becomes of what the receiver lacks.
fn after_detach(disk: &DiskStatus) -> String {
    if disk.last_error.as_ref().is_none_or(|error| error.code != "fenced") {
        return "what it lacks is remembered and follows at the next attach".to_owned();
    }
    let (name, image) = (disk.name.as_str(), &disk.image);
    format!(
        "another agent has the disk, so that it does not get it from here: `backtide failback {name}` brings the latest point of that \
         one here, `backtide attach {name} {image} --receiver {} --take-over` makes what this image holds the latest content",
        disk.receiver
    )
}

impl Pause {
    /// Pauses.
    pub(crate) async fn run(self, context: &Context) -> Result<Ending, Failure> {
        let disk = context.agent()?.pause(&self.name).await?;
        print(context, &disk)?;
        Ok(unless_saved(context, &disk))
    }
}

impl Resume {
    /// Resumes.
    pub(crate) async fn run(self, context: &Context) -> Result<Ending, Failure> {
        let disk = context.agent()?.resume(&self.name).await?;
        print(context, &disk)?;
        Ok(unless_saved(context, &disk))
    }
}

/// What was asked for holds; a record that cannot be saved forgets it with the agent's end.
pub(super) fn unless_saved(context: &Context, disk: &DiskStatus) -> Ending {
    let Some(trouble) = &disk.unsaved else { return Ending::Done };
    context.warn(&format!("disk {}: {trouble}", disk.name.as_str()));
    Ending::Warnings
}

fn print(context: &Context, disk: &DiskStatus) -> Result<(), Failure> {
    context.print(disk, || disk_line(disk))
}
