//! `backtide diff`: what changed between two points, in blocks and bytes, or in files.

use std::rc::Rc;

use backtide_receiver_api::{ByteSpan, DiffReport, DiffRequest};
use backtide_units::{ByteRange, DiskName, Lsn};
use clap::Args;
use serde::Serialize;

use crate::{
    arguments::ReceiverApi,
    commands::files::{Point, warn, with_points},
    context::Context,
    ending::{Ending, Failure},
    inside::{Change, Difference, Differences, Part, Parts, Sides, compare},
    output::printable,
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
    /// Tell which files were added, removed and changed
    #[arg(long)]
    files: bool,
    /// Compare the bytes of every file, also of those that look the same and in whose blocks nothing changed
    #[arg(long, requires = "files")]
    content: bool,
    /// The partition, or the logical volume as GROUP/NAME [default: the only one with files that can be read]
    #[arg(long, value_name = "NUMBER|GROUP/NAME", requires = "files")]
    partition: Option<String>,
    #[command(flatten)]
    api: ReceiverApi,
}

/// Which files differ; the JSON of `diff --files`.
#[derive(Debug, Serialize)]
struct FilesReport {
    disk: DiskName,
    from_lsn: Lsn,
    to_lsn: Lsn,
    /// The partition or logical volume that was looked into.
    part: String,
    #[serde(flatten)]
    differences: Differences,
    /// What to know before believing what was found.
    warnings: Vec<String>,
}

impl Diff {
    /// Prints the ranges, one `OFFSET LENGTH` a line, or the files.
    pub(crate) async fn run(self, context: &Context) -> Result<Ending, Failure> {
        let request = DiffRequest { from: self.from.clone(), to: self.to.clone() };
        let report = context.receiver(&self.api)?.diff(&self.name, &request).await?;
        context.remark(report.from.warning.as_deref());
        context.remark(report.to.warning.as_deref());
        context.tell(&summary(&report));
        if self.files {
            return self.files(context, report).await;
        }
        if context.json() || !report.ranges.is_empty() {
            context.print(&report, || ranges_text(&report))?;
        }
        Ok(Ending::Done)
    }

    async fn files(self, context: &Context, report: DiffReport) -> Result<Ending, Failure> {
        let (from_lsn, to_lsn) = (report.from.lsn, report.to.lsn);
        let point = |lsn: Lsn| {
            let (name, api) = (self.name.clone(), self.api.clone());
            Point { name, at: format!("lsn:{lsn}"), api }
        };
        let (disk, wanted) = (report.from.disk.name.clone(), self.partition.clone());
        // When nothing changed there is nothing to find.
        let reads_all = self.content && !report.ranges.is_empty();
        let found = with_points(context, vec![point(from_lsn), point(to_lsn)], move |points| {
            let [from, to] = <[_; 2]>::try_from(points).expect("a mount of each point");
            let (from, to) = (Rc::new(from.1), Rc::new(to.1));
            let (old_parts, new_parts) = (Parts::find(&from)?, Parts::find(&to)?);
            let new = new_parts.choose(wanted.as_deref())?;
            let old = old_parts.choose(Some(&new.name()))?;
            let (from, to) = (old.open(&from)?, new.open(&to)?);
            let is_changed = |range: ByteRange| touches(&report.ranges, &new, range);
            let sides = Sides { from: &from, to: &to, is_changed: &is_changed, reads_all };
            let differences = compare(&sides)?;
            let mut warnings: Vec<String> = Vec::new();
            let all = [old_parts.warnings(), new_parts.warnings()].concat();
            for warning in all.iter().chain(from.warnings()).chain(to.warnings()) {
                if !warnings.contains(warning) {
                    warnings.push(warning.clone());
                }
            }
            Ok(FilesReport { disk, from_lsn, to_lsn, part: new.name(), differences, warnings })
        })
        .await?;
        if context.json() || !found.differences.files.is_empty() {
            context.print(&found, || files_text(&found))?;
        }
        let Differences { added, removed, changed, omitted, .. } = &found.differences;
        context.tell(&format!("files: {added} added, {removed} removed, {changed} changed"));
        if *omitted > 0 {
            context.tell(&format!("{omitted} of them are not listed"));
        }
        let warnings = [found.differences.unreadable.sentences(), found.warnings].concat();
        Ok(warn(context, &warnings))
    }
}

/// Whether bytes of a part are in blocks that changed.
fn touches(changed: &[ByteSpan], part: &Part<'_>, range: ByteRange) -> bool {
    part.on_disk(range).into_iter().any(|range| {
        let next = changed.partition_point(|span| span.offset.0 + span.length.0 <= range.start().0);
        changed.get(next).is_some_and(|span| span.offset < range.end())
    })
}

fn files_text(report: &FilesReport) -> String {
    let line = |file: &Difference| {
        let mark = match file.change {
            Change::Added => '+',
            Change::Removed => '-',
            Change::Changed => 'M',
        };
        let what = if file.what.is_empty() { String::new() } else { format!("  ({})", file.what.join(", ")) };
        format!("{mark} {}{what}", printable(&file.path))
    };
    report.differences.files.iter().map(line).collect::<Vec<_>>().join("\n")
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
    let line = |range: &ByteSpan| format!("{} {}", range.offset, range.length);
    report.ranges.iter().map(line).collect::<Vec<_>>().join("\n")
}
