//! `backtide forget`: a disk goes from its receiver, with all its history.

use backtide_control::{ApiError, ErrorCode};
use backtide_receiver_api::{ForgottenDisk, ReceiverDisk};
use backtide_units::DiskName;
use clap::Args;

use crate::{
    arguments::ReceiverApi,
    confirm::confirm_by_name,
    context::Context,
    ending::{Ending, Failure},
    quantity::{count_text, size_both, time_text},
};

/// `backtide forget`
#[derive(Args, Debug)]
pub(crate) struct Forget {
    /// The disk's name or UUID
    name: DiskName,
    /// Do not ask
    #[arg(long)]
    yes: bool,
    #[command(flatten)]
    api: ReceiverApi,
}

impl Forget {
    /// Shows what goes, asks for the disk's name, and has it forgotten.
    pub(crate) async fn run(self, context: &Context) -> Result<Ending, Failure> {
        let receiver = context.receiver(&self.api)?;
        let found = match receiver.disks(Some(&self.name)).await {
            // One that was confirmed before and stopped half way is no disk any more: it is gone on with.
            Err(unknown) if unknown.code == ErrorCode::NotFound && self.yes => {
                let forgotten = receiver.forget(&self.name).await?;
                context.print(&forgotten, || text(&forgotten))?;
                return Ok(Ending::Done);
            }
            found => found?.disks.into_iter().next(),
        };
        let disk = found.ok_or_else(|| {
            ApiError::new(ErrorCode::NotFound, format!("there is no disk {:?}", self.name.as_str()))
        })?;
        if !self.yes {
            let overlays = receiver.mounts().await?.kept;
            let kept =
                overlays.iter().filter(|kept| kept.disk.as_ref().is_some_and(|of| of.uuid == disk.uuid));
            confirm_by_name(context, disk.name.as_str(), &question(&disk, kept.count() as u64)).await?;
        }
        // By its identity: what was shown goes, whatever is called so by now.
        let uuid: DiskName = disk.uuid.to_string().parse().expect("a UUID is a good name");
        let forgotten = receiver.forget(&uuid).await?;
        context.print(&forgotten, || text(&forgotten))?;
        Ok(Ending::Done)
    }
}

fn question(disk: &ReceiverDisk, overlays: u64) -> String {
    let last = disk.last_time.map_or_else(String::new, |time| format!(", last written {}", time_text(time)));
    let mut lines = vec![format!(
        "disk {} ({}) of {}{last}: all its history goes, {} of log and the images of older points",
        disk.name,
        disk.uuid,
        size_both(disk.size),
        size_both(disk.log_bytes)
    )];
    if overlays > 0 {
        lines.push(format!("what was written to {} of it goes too", count_text(overlays, "kept mount")));
    }
    lines.push("this cannot be taken back".to_owned());
    lines.join("\n")
}

fn text(disk: &ForgottenDisk) -> String {
    let mut text =
        format!("disk {} is forgotten: {} of log are removed", disk.name, size_both(disk.log_bytes));
    if !disk.overlays.is_empty() {
        text.push_str(&format!(", and overlays {}", disk.overlays.join(", ")));
    }
    text
}
