//! `backtide diff`: what changed between two points.

use backtide_receiver_api::{DiffReport, DiffRequest};
use backtide_units::DiskName;
use clap::Args;

use crate::{
    arguments::ReceiverApi,
    context::Context,
    ending::{Ending, Failure},
    quantity::{count_text, size_both},
};

/// `backtide diff`
#[derive(Args, Debug)]
pub(crate) struct Diff {
    /// The disk's name or UUID
    name: DiskName,
    /// The one point
    #[arg(long, value_name = "POINT", allow_hyphen_values = true)]
    from: String,
    /// The other point
    #[arg(long, value_name = "POINT", default_value = "latest", allow_hyphen_values = true)]
    to: String,
    #[command(flatten)]
    api: ReceiverApi,
}

impl Diff {
    /// Prints the ranges, one `OFFSET LENGTH` a line.
    pub(crate) async fn run(self, context: &Context) -> Result<Ending, Failure> {
        let request = DiffRequest { from: self.from, to: self.to };
        let report = context.receiver(&self.api)?.diff(&self.name, &request).await?;
        context.tell(&summary(&report));
        if context.json() || !report.ranges.is_empty() {
            context.print(&report, || ranges_text(&report))?;
        }
        Ok(Ending::Done)
    }
}

fn summary(report: &DiffReport) -> String {
    let (name, from, to) = (report.from.disk.name.as_str(), report.from.lsn, report.to.lsn);
    if report.ranges.is_empty() {
        return format!("disk {name}: nothing changed between lsn:{from} and lsn:{to}");
    }
    format!(
        "disk {name}: changes between lsn:{from} and lsn:{to} lie in {}, {}, told in blocks of {} bytes",
        count_text(report.ranges.len() as u64, "range"),
        size_both(report.bytes),
        report.granularity
    )
}

fn ranges_text(report: &DiffReport) -> String {
    let line = |range: &backtide_receiver_api::ByteSpan| format!("{} {}", range.offset, range.length);
    report.ranges.iter().map(line).collect::<Vec<_>>().join("\n")
}
