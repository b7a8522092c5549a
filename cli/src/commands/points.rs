//! `backtide points`: a disk's timeline.

use backtide_receiver_api::ErrorCode;
use backtide_units::DiskName;
use clap::Args;

use crate::{
    arguments::ReceiverApi,
    context::Context,
    ending::{Ending, Failure},
    output::points::{around_text, timeline_text},
};

/// `backtide points`
#[derive(Args, Debug)]
pub(crate) struct Points {
    /// The disk's name or UUID
    name: DiskName,
    /// The points around a time instead, and why it is none itself if it is none: `2026-03-01T12:00:00Z`,
    /// `-5m`, or another point
    #[arg(long, value_name = "TIME", allow_hyphen_values = true)]
    around: Option<String>,
    #[command(flatten)]
    api: ReceiverApi,
}

impl Points {
    /// Prints the timeline: of a damaged log what is left of it, and ends with the code of damage.
    pub(crate) async fn run(self, context: &Context) -> Result<Ending, Failure> {
        let receiver = context.receiver(&self.api)?;
        if let Some(time) = &self.around {
            let report = receiver.around(&self.name, time).await?;
            context.print(&report, || around_text(&report))?;
            return Ok(Ending::Done);
        }
        let report = receiver.points(&self.name).await?;
        context.print(&report, || timeline_text(&report))?;
        let Some(damage) = &report.damage else { return Ok(Ending::Done) };
        context.warn(&format!("the log of disk {} is damaged: {damage}", report.disk.name));
        Ok(Ending::Found(ErrorCode::Damaged))
    }
}
