//! `backtide retention`: how long history is kept.

use std::time::Duration;

use backtide_receiver_api::{
    DiskRetention, KeepRequest, LockRequest, MarkPoint, Point, ReceiverClient, RetentionPreview,
    RetentionReport, RetentionRequest,
};
use backtide_units::DiskName;
use clap::{Args, Subcommand};

use crate::{
    arguments::ReceiverApi,
    context::Context,
    ending::{Ending, Failure, wrong_usage},
    output::points::lock_text,
    quantity::{count_text, size_both, time_text},
};

/// `backtide retention`
#[derive(Args, Debug)]
pub(crate) struct Retention {
    #[command(subcommand)]
    what: What,
    #[command(flatten)]
    api: ReceiverApi,
}

#[derive(Subcommand, Debug)]
enum What {
    /// Show what is promised of each disk, and what there is
    Show {
        /// A disk's name or UUID [default: all disks]
        name: Option<DiskName>,
    },
    /// Give a disk another ladder: what that does not keep goes soon
    Set {
        /// The disk's name or UUID
        name: DiskName,
        /// Such as `any=24h hourly=7d daily=30d weekly=1y`, or `forever`
        #[arg(required_unless_present = "default", conflicts_with = "default", num_args = 1..)]
        ladder: Vec<String>,
        /// The receiver's default instead
        #[arg(long)]
        default: bool,
        /// Also when points go by it now
        #[arg(long)]
        yes: bool,
    },
    /// Show which points a ladder would keep and drop now, without doing it
    Preview {
        /// The disk's name or UUID
        name: DiskName,
        /// The ladder [default: the one that counts now]
        ladder: Vec<String>,
    },
    /// Keep a point, whatever the ladder says
    Keep {
        /// The disk's name or UUID
        name: DiskName,
        /// The point: latest, lsn:N, an RFC 3339 time, a duration ago such as -5m, or mark:LABEL
        #[arg(long, value_name = "POINT", allow_hyphen_values = true)]
        at: String,
    },
    /// Leave a point that was kept to the ladder again; what agents hold stays held
    Release {
        /// The disk's name or UUID
        name: DiskName,
        /// The point, as with `keep`
        #[arg(long, value_name = "POINT", allow_hyphen_values = true)]
        at: String,
        /// What this owner holds there instead, for an agent that never comes back; as `show` names it
        #[arg(long, value_name = "OWNER")]
        held: Option<String>,
    },
    /// Lock a point, or every point of a disk, until a time: nobody can let it go before, also when the store is full
    Lock {
        /// The disk's name or UUID
        name: DiskName,
        /// The point, as with `keep`
        #[arg(long, value_name = "POINT", allow_hyphen_values = true, required_unless_present = "all")]
        at: Option<String>,
        /// Every point: those that are there and those that come
        #[arg(long, conflicts_with = "at")]
        all: bool,
        /// An RFC 3339 time, or a duration from now on such as 30d; it can be made later, never earlier
        #[arg(long, value_name = "TIME")]
        until: String,
    },
}

/// A ladder that keeps every point for a shorter time than this is worth a warning.
const ANY_LIKELY_MIN: Duration = Duration::from_secs(600);

/// So many points are named for a person.
const SHOWN_MAX: usize = 10;

impl Retention {
    /// Asks the receiver; `set` asks for a preview first and refuses to let points go that nobody agreed to.
    pub(crate) async fn run(self, context: &Context) -> Result<Ending, Failure> {
        let receiver = context.receiver(&self.api)?;
        let report = match self.what {
            What::Show { name } => receiver.retention(name.as_ref()).await?,
            What::Preview { name, ladder } => {
                let request = RetentionRequest { ladder: joined(&ladder) };
                let preview = receiver.preview_retention(&name, &request).await?;
                context.print(&preview, || preview_text(&preview))?;
                return Ok(Ending::Done);
            }
            What::Set { name, ladder, default, yes } => {
                let mut request = RetentionRequest { ladder: joined(&ladder) };
                if default {
                    request.ladder = Some(receiver.retention(Some(&name)).await?.default);
                }
                let preview = receiver.preview_retention(&name, &request).await?;
                if preview.changes && !yes {
                    return Err(wrong_usage(format!(
                        "history would go; with --yes it does\n{}",
                        preview_text(&preview)
                    )));
                }
                // Nothing that is shown before says what goes of that when it is there again.
                context.remark(preview.away.as_deref());
                if default {
                    request.ladder = None;
                }
                let ladder = joined(&ladder);
                if let Some(any) = ladder.as_deref().and_then(tiny) {
                    context.warn(&format!(
                        "every single point of disk {name} is kept for {any} only: what is noticed later than that cannot be \
                         undone to the moment before it"
                    ));
                }
                receiver.set_retention(&name, &request).await?
            }
            What::Keep { name, at } => {
                let at = found(context, &receiver, &name, &at).await?;
                receiver.keep(&KeepRequest { name, at, release: false, held: None }).await?
            }
            What::Lock { name, at, all: _, until } => {
                let at = match at {
                    Some(at) => Some(found(context, &receiver, &name, &at).await?),
                    None => None,
                };
                receiver.lock(&LockRequest { name, at, until }).await?
            }
            What::Release { name, at, held } => {
                receiver.keep(&KeepRequest { name, at, release: true, held }).await?
            }
        };
        context.print(&report, || text(&report))?;
        Ok(if report.error.is_some() { Ending::Warnings } else { Ending::Done })
    }
}

/// The point that is meant, said if it may be another one than a person means by that.
async fn found(
    context: &Context,
    receiver: &ReceiverClient,
    name: &DiskName,
    at: &str,
) -> Result<String, Failure> {
    let point = receiver.resolve(name, at).await?;
    context.remark(point.warning.as_deref());
    Ok(format!("lsn:{}", point.lsn))
}

/// For how long a ladder keeps every point, when hardly anybody can mean that.
fn tiny(ladder: &str) -> Option<&str> {
    let any = ladder.split_whitespace().find_map(|rung| rung.strip_prefix("any="))?;
    let length = crate::quantity::parse_duration(any).ok()?;
    (length < ANY_LIKELY_MIN).then_some(any)
}

fn joined(ladder: &[String]) -> Option<String> {
    (!ladder.is_empty()).then(|| ladder.join(" "))
}

fn text(report: &RetentionReport) -> String {
    let mut lines =
        vec![format!("default {}; a store that is nearly full: {}", report.default, report.on_full)];
    lines.push(format!(
        "images {}, given back since the start {}",
        size_both(report.image_bytes),
        size_both(report.freed_bytes)
    ));
    lines.extend(report.low.iter().chain(&report.error).cloned());
    lines.extend(report.disks.iter().map(disk_text));
    lines.join("\n")
}

fn disk_text(disk: &DiskRetention) -> String {
    let own = if disk.own { "" } else { " (default)" };
    let mut lines = vec![format!("disk {}: {}{own}", disk.disk.name.as_str(), disk.ladder)];
    match (&disk.oldest, &disk.every_point_from) {
        (Some(oldest), Some(from)) => {
            lines.push(format!("  oldest point {}", point_text(oldest)));
            lines.push(format!("  every point from {}, log {}", point_text(from), size_both(disk.log_bytes)));
        }
        (Some(_), None) | (None, _) => lines.push("  no points yet".to_owned()),
    }
    if !disk.single_points.is_empty() {
        lines.push(format!("  {} before that", count_text(disk.single_points.len() as u64, "single point")));
    }
    lines.extend(disk.keep.iter().map(|point| format!("  kept until released: {}", point_text(point))));
    lines.extend(disk.locks.iter().map(lock_text));
    lines.extend(
        disk.held
            .iter()
            .map(|held| format!("  held for {}: lsn:{} ({})", held.owner, held.lsn, time_text(held.time))),
    );
    if disk.shrunk > 0 {
        lines.push("  GONE before its time: the store was nearly full".to_owned());
    }
    lines.extend(disk.error.iter().map(|why| format!("  cannot be thinned: {why}")));
    lines.join("\n")
}

fn preview_text(preview: &RetentionPreview) -> String {
    let mut lines = vec![format!("disk {} with {}", preview.disk.name.as_str(), preview.ladder)];
    if let Some(until) = preview.locked_until {
        lines.push(format!("  every point is locked until {}", time_text(until)));
    }
    if !preview.changes {
        lines.push("  nothing goes now".to_owned());
    }
    if let Some(away) = &preview.away {
        lines.push(format!("  {away}"));
    }
    if let Some(from) = &preview.every_point_from {
        lines.push(format!("  every point from {}", point_text(from)));
    }
    list(&mut lines, "keeps", "single point", &preview.keep, point_text);
    list(&mut lines, "drops", "single point", &preview.drop, point_text);
    let mark =
        |mark: &MarkPoint| format!("mark:{} at lsn:{} ({})", mark.label, mark.lsn, time_text(mark.time));
    list(&mut lines, "drops", "mark", &preview.drop_marks, mark);
    if !preview.log_bytes_freed.is_zero() {
        let freed = size_both(preview.log_bytes_freed);
        lines.push(format!("  {freed} of the log go; the images of what is kept take a part of that"));
    }
    if !preview.fold_read_bytes.is_zero() {
        lines.push(format!(
            "  to make these images the receiver reads about {} and writes {} at most, at its own pace",
            size_both(preview.fold_read_bytes),
            size_both(preview.fold_write_bytes_max)
        ));
    }
    lines.join("\n")
}

/// How many there are, and the first of them.
fn list<T>(lines: &mut Vec<String>, what: &str, one: &str, all: &[T], text: impl Fn(&T) -> String) {
    lines.extend(all.iter().take(SHOWN_MAX).map(|one| format!("  {what}  {}", text(one))));
    if let Some(more) = all.len().checked_sub(SHOWN_MAX).filter(|more| *more > 0) {
        let total = count_text(all.len() as u64, one);
        lines.push(format!("  {what}  {more} more, {total} in all: --json names each"));
    }
}

fn point_text(point: &Point) -> String {
    format!("lsn:{} ({})", point.lsn, time_text(point.time))
}

#[cfg(test)]
mod tests {
    use backtide_control::ErrorCode;
    use backtide_receiver_api::DiskRef;
    use backtide_units::{ByteCount, DiskId};

    use super::*;
    use crate::played_agent::PlayedAgent;

    fn preview(changes: bool) -> RetentionPreview {
        RetentionPreview {
            disk: DiskRef { name: "vm1".parse().unwrap(), uuid: DiskId::random(), size: ByteCount(1 << 20) },
            ladder: "any=1h".to_owned(),
            every_point_from: None,
            keep: Vec::new(),
            drop: Vec::new(),
            drop_marks: Vec::new(),
            locked_until: None,
            log_bytes_freed: ByteCount::ZERO,
            fold_read_bytes: ByteCount::ZERO,
            fold_write_bytes_max: ByteCount::ZERO,
            changes,
            away: Some("a part of an older log of the disk is away".to_owned()),
        }
    }

    #[tokio::test]
    async fn a_part_that_is_away_is_said_before_and_after_a_ladder_is_set() {
        let report = RetentionReport {
            default: "forever".to_owned(),
            on_full: "refuse".to_owned(),
            low: None,
            error: None,
            image_bytes: ByteCount::ZERO,
            freed_bytes: ByteCount::ZERO,
            rounds: 1,
            disks: Vec::new(),
        };
        for changes in [true, false] {
            let answers = [
                Some((200, serde_json::to_value(preview(changes)).unwrap())),
                Some((200, serde_json::to_value(&report).unwrap())),
            ];
            let receiver = PlayedAgent::answering(answers);
            let context = receiver.context();
            let ladder = vec!["any=1h".to_owned()];
            let what = What::Set { name: "vm1".parse().unwrap(), ladder, default: false, yes: false };
            let api = ReceiverApi { receiver: Some(receiver.address()) };
            match (changes, Retention { what, api }.run(&context).await) {
                (true, Err(Failure::Error(error))) => {
                    assert_eq!(error.code, ErrorCode::Usage);
                    assert!(error.message.contains("a part of an older log"), "{error}");
                }
                (false, Ok(Ending::Done)) => assert!(context.has_remarked(), "it ends with 3"),
                (_, ended) => panic!("{ended:?}"),
            }
        }
    }
}
