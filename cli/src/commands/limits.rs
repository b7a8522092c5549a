//! `backtide limits`: how fast a resync may be, while a disk is attached.

use backtide_agent_api::LimitsChange;
use backtide_units::{ByteCount, DiskName};
use clap::Args;

use crate::{
    commands::control::unless_saved,
    context::Context,
    ending::{Ending, Failure},
    output::status::limits_text,
    quantity::parse_size,
};

/// `backtide limits`
#[derive(Args, Debug)]
pub(crate) struct LimitsOf {
    /// The disk's name or UUID
    name: DiskName,
    /// The most bytes per second that a resync sends, 0 for as fast as it goes
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    resync_rate: Option<ByteCount>,
    /// The most that the reads of a resync or a verify shall add to the guest's latency, in microseconds;
    /// 0 for as much as it takes
    #[arg(long, value_name = "US")]
    resync_latency_max: Option<u32>,
}

impl LimitsOf {
    /// Changes what is asked for, and shows all.
    pub(crate) async fn run(self, context: &Context) -> Result<Ending, Failure> {
        let agent = context.agent()?;
        let change = LimitsChange {
            resync_bytes_per_second_max: self.resync_rate,
            resync_latency_us_max: self.resync_latency_max,
        };
        let disk = match change == LimitsChange::default() {
            true => agent.disk(&self.name).await?,
            false => agent.set_limits(&self.name, change).await?,
        };
        context.print(&disk, || limits_text(&disk))?;
        Ok(unless_saved(context, &disk))
    }
}
