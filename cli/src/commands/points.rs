//! `backtide points`: a disk's timeline.

use backtide_receiver_api::ErrorCode;
use backtide_units::DiskName;
use clap::Args;

use crate::{
    arguments::ReceiverApi,
    context::Context,
    ending::{Ending, Failure},
    output::points::timeline_text,
};

/// `backtide points`
#[derive(Args, Debug)]
pub(crate) struct Points {
    /// The disk's name or UUID
    name: DiskName,
    #[command(flatten)]
    api: ReceiverApi,
}

impl Points {
    /// Prints the timeline: of a damaged log what is left of it, and ends with the code of damage.
    pub(crate) async fn run(self, context: &Context) -> Result<Ending, Failure> {
        let report = context.receiver(&self.api)?.points(&self.name).await?;
        context.print(&report, || timeline_text(&report))?;
        let Some(damage) = &report.damage else { return Ok(Ending::Done) };
        context.warn(&format!("the log of disk {} is damaged: {damage}", report.disk.name));
        Ok(Ending::Found(ErrorCode::Damaged))
    }
}
