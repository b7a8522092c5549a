//! `backtide points`: a disk's timeline.

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
    /// Prints the timeline.
    pub(crate) async fn run(self, context: &Context) -> Result<Ending, Failure> {
        let report = context.receiver(&self.api)?.points(&self.name).await?;
        context.print(&report, || timeline_text(&report))?;
        Ok(Ending::Done)
    }
}
