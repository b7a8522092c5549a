//! `backtide status`: what the disks are doing, and why.

use std::{io::IsTerminal, time::Duration};

use backtide_units::DiskName;
use clap::Args;

use crate::{
    context::Context,
    ending::{Ending, Failure},
    output::status::{disk_text, needs_a_person, table},
    quantity::parse_duration,
};

/// `backtide status`
#[derive(Args, Debug)]
pub(crate) struct Status {
    /// One disk's name or UUID, shown in full [default: all disks, a line each]
    name: Option<DiskName>,
    /// Show it again and again, until ctrl-c
    #[arg(long)]
    watch: bool,
    /// How often with --watch, at most every 100ms
    #[arg(long, value_name = "DURATION", default_value = "1s", value_parser = parse_duration, requires = "watch")]
    every: Duration,
}

/// More often nobody can read it, and the agent has other things to do.
const EVERY_MIN: Duration = Duration::from_millis(100);

/// Clears the screen and goes to its first line.
const CLEAR: &str = "\x1b[H\x1b[2J";

impl Status {
    /// Prints the status, once or until stopped.
    pub(crate) async fn run(self, context: &Context) -> Result<Ending, Failure> {
        let agent = context.agent()?;
        let clear = self.watch && !context.json() && std::io::stdout().is_terminal();
        loop {
            let status = agent.status(self.name.as_ref()).await?;
            let text = || {
                let text = match (&self.name, status.disks.as_slice()) {
                    (Some(_), [disk]) => disk_text(disk),
                    (Some(_) | None, disks) => table(disks),
                };
                let warnings = status.certificate_warnings.iter().filter(|_| self.name.is_none());
                let text = std::iter::once(text).chain(warnings.cloned()).collect::<Vec<_>>().join("\n");
                if clear { format!("{CLEAR}{text}") } else { text }
            };
            if self.watch {
                context.print_next(&status, text)?;
            } else {
                context.print(&status, text)?;
                let alarm = status.disks.iter().any(needs_a_person);
                return Ok(if alarm { Ending::Warnings } else { Ending::Done });
            }
            tokio::time::sleep(self.every.max(EVERY_MIN)).await;
        }
    }
}
