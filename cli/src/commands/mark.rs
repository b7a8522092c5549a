//! `backtide mark`: a name for an instant of one or several disks.

use std::time::Duration;

use backtide_agent_api::{DiskMark, MarkReport, MarkRequest, MarkState};
use backtide_units::DiskName;
use clap::Args;

use crate::{
    context::Context,
    ending::{Ending, Failure},
    quantity::{duration_text, parse_duration, time_text},
};

/// `backtide mark`
#[derive(Args, Debug)]
pub(crate) struct Mark {
    /// The name, at most 256 bytes; `mark:LABEL` is the point
    label: String,
    /// Names or UUIDs of the disks
    #[arg(required = true, value_name = "NAME")]
    disks: Vec<DiskName>,
    /// How long to wait for the receiver to have the mark durably, at most 30s; the guests do not wait. 0s:
    /// not at all, it ends with 3 then
    #[arg(long, value_name = "DURATION", default_value = "5s", value_parser = parse_duration)]
    wait: Duration,
}

impl Mark {
    /// Marks, and warns of disks on which the mark is no point.
    pub(crate) async fn run(self, context: &Context) -> Result<Ending, Failure> {
        let wait_ms = u32::try_from(self.wait.as_millis()).unwrap_or(u32::MAX);
        let request = MarkRequest { label: self.label, disks: self.disks, wait_ms };
        let report = context.agent()?.mark(&request).await?;
        context.print(&report, || report_text(&report))?;
        let mut ending = Ending::Done;
        for mark in &report.marks {
            if let Some(doubt) = doubt(mark, &report.label, self.wait) {
                context.warn(&doubt);
                ending = Ending::Warnings;
            }
        }
        Ok(ending)
    }
}

/// Why a mark may be none.
fn doubt(mark: &DiskMark, label: &str, wait: Duration) -> Option<String> {
    let name = mark.disk.as_str();
    let wait = duration_text(wait.as_secs_f64());
    let what = format!("the mark {label:?} of disk {name}");
    let lasts = "the retained window (64 MiB of writes by default), and the spill if there is one, is full, and before the \
                 disk is paused or detached or its agent restarts";
    match mark.state {
        MarkState::Kept => None,
        MarkState::Unconfirmed => Some(format!(
            "the receiver has not confirmed {what} within {wait}: that moment can be given back only if the \
             receiver takes it before {lasts}"
        )),
        MarkState::Away => Some(format!(
            "the receiver is away and does not have {what}: that moment can be given back only if the \
             receiver is back before {lasts}"
        )),
        MarkState::Refused => Some(format!(
            "the receiver refuses data and does not have {what}: that moment can be given back only if the \
             receiver takes it before {lasts}"
        )),
        MarkState::Resync => Some(format!(
            "{what} lies in a resync that is not complete: that moment can be given back only when the resync \
             has ended and has kept its point (`backtide status {name}`)"
        )),
        MarkState::Lost => Some(format!(
            "{what} was given up with the writes around it before the receiver confirmed it, and is sent no more: \
             that moment can be given back only if `backtide points {name}` lists it"
        )),
    }
}

fn report_text(report: &MarkReport) -> String {
    let line = |mark: &DiskMark| {
        format!("{}  mark:{}  lsn:{}  {}", mark.disk.as_str(), report.label, mark.lsn, time_text(mark.time))
    };
    report.marks.iter().map(line).collect::<Vec<_>>().join("\n")
}
