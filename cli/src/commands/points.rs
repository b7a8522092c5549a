//! `backtide points`: a disk's timeline.

use backtide_receiver_api::{DiskRef, ErrorCode, PointsReport, Touched};
use backtide_units::DiskName;
use clap::Args;

use crate::{
    arguments::ReceiverApi,
    context::Context,
    ending::{Ending, Failure},
    output::{
        checks::damage_text,
        points::{around_text, timeline_text},
    },
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
    /// Only the newest so many intervals with the holes between and after them, and so many marks
    #[arg(long, value_name = "COUNT", conflicts_with = "around", value_parser = clap::value_parser!(u32).range(1..))]
    last: Option<u32>,
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
            context.remark(report.warning.as_deref());
            return Ok(told(context, &report.disk, report.damage.as_deref(), &report.touched));
        }
        let mut report = receiver.points(&self.name).await?;
        if let Some(count) = self.last {
            keep_newest(&mut report, count as usize);
        }
        context.print(&report, || timeline_text(&report))?;
        Ok(told(context, &report.disk, report.damage.as_deref(), &report.touched))
    }
}

/// Tells of the damage of a disk's log, if there is any, and ends with that.
fn told(context: &Context, disk: &DiskRef, damage: Option<&str>, touched: &[Touched]) -> Ending {
    let Some(damage) = damage else { return Ending::Done };
    context.warn(&format!("the log of disk {} is damaged: {}", disk.name, damage_text(damage, touched)));
    // Other places, which a scrub or reads have found.
    let others = touched.iter().filter(|other| Touched::by(std::slice::from_ref(other), damage).is_none());
    for other in others {
        context.warn(&format!("{}; {}", other.place, other.text));
    }
    Ending::Found(ErrorCode::Damaged)
}

/// Leaves the newest `count` intervals, the holes after the first of them, and the newest `count` marks.
fn keep_newest(report: &mut PointsReport, count: usize) {
    let older = report.intervals.len().saturating_sub(count);
    report.intervals.drain(..older);
    if let Some(first) = report.intervals.first().filter(|_| older > 0) {
        let from = first.from_lsn;
        report.holes.retain(|hole| hole.before_lsn.is_none_or(|before| before > from));
    }
    let older = report.marks.len().saturating_sub(count);
    report.marks.drain(..older);
}
