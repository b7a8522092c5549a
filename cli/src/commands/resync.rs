//! `backtide resync`: force one.

use backtide_agent_api::{ResyncExtent, ResyncRequest};
use backtide_units::DiskName;
use clap::Args;

use crate::{
    commands::wait,
    context::Context,
    ending::{Ending, Failure},
    output::status::disk_line,
};

/// `backtide resync`
#[derive(Args, Debug)]
pub(crate) struct Resync {
    /// The disk's name or UUID
    name: DiskName,
    /// Compare hashes of every allocated block, and send what differs
    #[arg(long, conflicts_with = "full")]
    compare: bool,
    /// Send every allocated block
    #[arg(long)]
    full: bool,
    /// Wait until the disk is in sync
    #[arg(long)]
    wait: bool,
}

impl Resync {
    fn extent(&self) -> ResyncExtent {
        match (self.compare, self.full) {
            (true, _) => ResyncExtent::Compare,
            (false, true) => ResyncExtent::Full,
            (false, false) => ResyncExtent::Changed,
        }
    }

    /// Forces a resync and, if asked to, waits for its end.
    pub(crate) async fn run(self, context: &Context) -> Result<Ending, Failure> {
        let agent = context.agent()?;
        let mut disk = agent.resync(&self.name, ResyncRequest { extent: self.extent() }).await?;
        if self.wait {
            disk = wait::until(context, &agent, &self.name, wait::caught_up, None).await?;
        }
        context.print(&disk, || disk_line(&disk))?;
        Ok(Ending::Done)
    }
}
