//! `backtide mark`: a name for an instant of one or several disks.

use backtide_agent_api::{MarkReport, MarkRequest};
use backtide_units::DiskName;
use clap::Args;

use crate::{
    context::Context,
    ending::{Ending, Failure},
    quantity::time_text,
};

/// `backtide mark`
#[derive(Args, Debug)]
pub(crate) struct Mark {
    /// The name, at most 256 bytes; `mark:LABEL` is the point
    label: String,
    /// Names or UUIDs of the disks
    #[arg(required = true, value_name = "NAME")]
    disks: Vec<DiskName>,
}

impl Mark {
    /// Marks, and warns of disks on which the mark is no point.
    pub(crate) async fn run(self, context: &Context) -> Result<Ending, Failure> {
        let request = MarkRequest { label: self.label, disks: self.disks };
        let report = context.agent()?.mark(&request).await?;
        context.print(&report, || report_text(&report))?;
        let mut ending = Ending::Done;
        for mark in report.marks.iter().filter(|mark| !mark.recoverable) {
            context.warn(&format!(
                "the receiver does not have the mark {:?} of disk {} yet: it is lost if the receiver \
                 stays away for longer than the retained window, and the spill if there is one, last",
                report.label,
                mark.disk.as_str()
            ));
            ending = Ending::Warnings;
        }
        Ok(ending)
    }
}

fn report_text(report: &MarkReport) -> String {
    let line = |mark: &backtide_agent_api::DiskMark| {
        format!("{}  mark:{}  lsn:{}  {}", mark.disk.as_str(), report.label, mark.lsn, time_text(mark.time))
    };
    report.marks.iter().map(line).collect::<Vec<_>>().join("\n")
}
