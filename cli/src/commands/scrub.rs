//! `backtide scrub`: what a running receiver keeps, against its checksums.

use std::time::Duration;

use backtide_control::ErrorCode;
use backtide_receiver_api::{ScrubRequest, ScrubStatus};
use backtide_units::{ByteCount, DiskName};
use clap::Args;

use crate::{
    arguments::ReceiverApi,
    context::Context,
    ending::{Ending, Failure},
    output::{
        checks::{disks_text, overlays_text, problems_text},
        progress::Progress,
    },
    quantity::parse_size,
};

/// How often the receiver is asked how far it is.
const ASK_EVERY: Duration = Duration::from_millis(200);

/// `backtide scrub`
#[derive(Args, Debug)]
pub(crate) struct Scrub {
    /// One disk's name or UUID [default: all disks]
    name: Option<DiskName>,
    /// The most that is read in a second; 0 is without limit [default: as the receiver is configured, else 64MiB]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    rate: Option<ByteCount>,
    /// Start it and do not wait for its end; `backtide receiver status` shows how far it is
    #[arg(long)]
    no_wait: bool,
    /// Show the scrub that runs, or the last one, and start none
    #[arg(long, conflicts_with_all = ["name", "rate", "no_wait", "cancel"])]
    last: bool,
    /// Call off the scrub that runs
    #[arg(long, conflicts_with_all = ["name", "rate", "no_wait"])]
    cancel: bool,
    #[command(flatten)]
    api: ReceiverApi,
}

impl Scrub {
    /// Runs a scrub to its end, which ctrl-c does not change: it goes on at the receiver.
    pub(crate) async fn run(self, context: &Context) -> Result<Ending, Failure> {
        let receiver = context.receiver(&self.api)?;
        let mut status = if self.cancel {
            receiver.cancel_scrub().await?
        } else if self.last {
            receiver.scrub_status().await?
        } else {
            let request = ScrubRequest { name: self.name, bytes_per_second_max: self.rate };
            receiver.scrub(&request).await?
        };
        if !self.last && !self.no_wait {
            let receiver = receiver.at_length();
            let mut progress = Progress::new(context, "scrubbed");
            while status.running {
                progress.at(status.done_bytes, status.total_bytes);
                tokio::time::sleep(ASK_EVERY).await;
                status = receiver.scrub_status().await?;
            }
            progress.end();
        }
        context.print(&status, || text(&status))?;
        let mended = status.disks.iter().any(|disk| !disk.mended.is_empty());
        Ok(match (status.sound, mended || (status.cancelled && !self.cancel)) {
            (false, _) => Ending::Found(ErrorCode::Damaged),
            (true, true) => Ending::Warnings,
            (true, false) => Ending::Done,
        })
    }
}

fn text(status: &ScrubStatus) -> String {
    let mut lines = vec![disks_text(&status.disks)];
    lines.extend(problems_text(&status.damage, &status.disks));
    lines.extend(overlays_text(&status.overlays));
    lines.push(
        match (status.running, status.cancelled, status.sound) {
            (true, false, _) => "the scrub goes on",
            (true, true, _) => "the scrub is called off and ends soon",
            (false, true, true) => "the scrub was called off; what it read is sound",
            (false, false, true) => "everything is sound",
            (false, _, false) => "the store is DAMAGED",
        }
        .to_owned(),
    );
    lines.join("\n")
}
