//! `backtide ls` and `cp`: files of a point.

use std::{path::PathBuf, rc::Rc};

use backtide_receiver_api::{Mount, MountRequest, ReceiverClient};
use backtide_units::{DiskName, Lsn};
use clap::Args;
use serde::Serialize;
use tokio::runtime::Handle;

use crate::{
    arguments::ReceiverApi,
    commands::mounted,
    context::Context,
    ending::{Ending, Failure, failed, wrong_usage},
    inside::{
        Copied, Destination, Entry, Kind, LogicalVolume, Lost, Part, Partition, Parts, PointReader, Volume,
        copy_out,
    },
    output::{plain_table, printable},
    quantity::{count_text, size_text, time_text},
};

/// Which file system of which point.
#[derive(Args, Debug)]
struct Where {
    /// The disk's name or UUID
    name: DiskName,
    /// The point to look into
    #[arg(long, value_name = "POINT", default_value = "latest", allow_hyphen_values = true)]
    at: String,
    /// The partition, or the logical volume as GROUP/NAME [default: the only one with files that can be read]
    #[arg(long, value_name = "NUMBER|GROUP/NAME")]
    partition: Option<String>,
    #[command(flatten)]
    api: ReceiverApi,
}

/// `backtide ls`
#[derive(Args, Debug)]
pub(crate) struct Ls {
    #[command(flatten)]
    place: Where,
    /// A file or directory [default: the root, or the partitions when there are several]
    path: Option<String>,
}

/// `backtide cp`
#[derive(Args, Debug)]
pub(crate) struct Cp {
    #[command(flatten)]
    place: Where,
    /// The file or directory to copy
    path: String,
    /// Where to: a new file or directory, or - for standard output
    output: String,
    /// Copy a directory with everything in it
    #[arg(long, short)]
    recursive: bool,
    /// Replace a file that exists
    #[arg(long)]
    force: bool,
}

/// What is there; the JSON of `ls`.
#[derive(Debug, Serialize)]
struct Listing {
    disk: DiskName,
    lsn: Lsn,
    #[serde(flatten)]
    parts: Parts,
    /// The partition that was looked into.
    partition: Option<u32>,
    /// The logical volume that was looked into.
    logical_volume: Option<String>,
    /// What to know before believing what was found.
    warnings: Vec<String>,
    path: Option<String>,
    /// None when only the partitions were looked for.
    entries: Option<Vec<Entry>>,
}

/// What was copied; the JSON of `cp`.
#[derive(Debug, Serialize)]
struct CopyReport {
    disk: DiskName,
    lsn: Lsn,
    path: String,
    output: String,
    #[serde(flatten)]
    copied: Copied,
    /// What to know before believing what was found.
    warnings: Vec<String>,
}

impl Ls {
    /// Lists a directory, or the partitions.
    pub(crate) async fn run(self, context: &Context) -> Result<Ending, Failure> {
        let Self { place, path } = self;
        let only_table = path.is_none() && place.partition.is_none();
        let partition = place.partition.clone();
        let path = path.unwrap_or_else(|| "/".to_owned());
        let listing = with_point(context, place.into_point(), move |mount, disk| {
            let (disk_name, lsn) = (mount.disk.name.clone(), mount.lsn);
            let parts = Parts::find(&disk)?;
            let mut listing = Listing {
                disk: disk_name,
                lsn,
                parts,
                partition: None,
                logical_volume: None,
                warnings: Vec::new(),
                path: None,
                entries: None,
            };
            listing.warnings = listing.parts.warnings();
            if only_table && listing.parts.readable().count() != 1 && !listing.parts.is_lost() {
                return Ok(listing);
            }
            let chosen = listing.parts.choose(partition.as_deref())?;
            let volume = chosen.open(&disk)?;
            let found = volume.look(&path)?;
            listing.entries = Some(match found.kind {
                Kind::Directory => volume.list(&found)?,
                Kind::File | Kind::Symlink | Kind::Special | Kind::Unreadable => vec![found],
            });
            let unreadable = listing.entries.iter().flatten().filter(|entry| entry.error.is_some()).count();
            if unreadable > 0 {
                listing.warnings.push(format!("of these entries {unreadable} cannot be read"));
            }
            (listing.partition, listing.logical_volume) = match chosen {
                Part::Partition(partition) => (Some(partition.number), None),
                Part::Logical(volume) => (None, Some(volume.name.clone())),
            };
            listing.warnings.extend_from_slice(volume.warnings());
            listing.path = Some(path);
            Ok(listing)
        })
        .await?;
        context.print(&listing, || listing_text(&listing))?;
        Ok(warn(context, &listing.warnings))
    }
}

impl Cp {
    /// Copies a file or directory.
    pub(crate) async fn run(self, context: &Context) -> Result<Ending, Failure> {
        let Self { place, path, output, recursive, force } = self;
        let to_stdout = output == "-";
        let to = match to_stdout {
            true => Destination::Stdout,
            false => Destination::Path { path: PathBuf::from(&output), replace: force },
        };
        let partition = place.partition.clone();
        let report = with_point(context, place.into_point(), move |mount, disk| {
            let lost = disk.lost();
            let parts = Parts::find(&disk)?;
            let volume: Volume = parts.choose(partition.as_deref())?.open(&disk)?;
            let entry = volume.look_through(&path)?;
            if entry.kind == Kind::Directory && !recursive {
                return Err(wrong_usage(format!("{path} is a directory: copy it with --recursive")));
            }
            let copied = copy_out(&volume, &entry, &to, &lost)?;
            let (disk, lsn) = (mount.disk.name.clone(), mount.lsn);
            let mut warnings = parts.warnings();
            warnings.extend_from_slice(volume.warnings());
            Ok(CopyReport { disk, lsn, path, output, copied, warnings })
        })
        .await?;
        if to_stdout {
            // The file is what was printed.
            context.tell(&copy_text(&report));
        } else {
            context.print(&report, || copy_text(&report))?;
        }
        let warnings = [report.copied.unreadable.sentences(), report.warnings].concat();
        let skipped = report.copied.skipped;
        if skipped > 0 {
            context.warn(&format!("left out devices, sockets and pipes: {skipped}"));
            warn(context, &warnings);
            return Ok(Ending::Warnings);
        }
        Ok(warn(context, &warnings))
    }
}

impl Where {
    fn into_point(self) -> Point {
        Point { name: self.name, at: self.at, api: self.api }
    }
}

/// Says what is to be known, and how that ends.
pub(super) fn warn(context: &Context, warnings: &[String]) -> Ending {
    for warning in warnings {
        context.warn(warning);
    }
    if warnings.is_empty() { Ending::Done } else { Ending::Warnings }
}

/// A point of a disk that is looked into.
pub(super) struct Point {
    pub(super) name: DiskName,
    pub(super) at: String,
    pub(super) api: ReceiverApi,
}

/// Mounts the point for as long as `work` takes, which runs where it may block.
async fn with_point<T: Send + 'static>(
    context: &Context,
    point: Point,
    work: impl FnOnce(&Mount, Rc<PointReader>) -> Result<T, Failure> + Send + 'static,
) -> Result<T, Failure> {
    let with_only = move |points: Vec<(Mount, PointReader)>| match points.into_iter().next() {
        Some((mount, reader)) => work(&mount, Rc::new(reader)),
        None => Err(failed("the point was not mounted")),
    };
    with_points(context, vec![point], with_only).await
}

/// Mounts points for as long as `work` takes, which runs where it may block and gets them in their order.
pub(super) async fn with_points<T: Send + 'static>(
    context: &Context,
    points: Vec<Point>,
    work: impl FnOnce(Vec<(Mount, PointReader)>) -> Result<T, Failure> + Send + 'static,
) -> Result<T, Failure> {
    let (mut mounted, mut ids) = (Vec::new(), Vec::new());
    let mut result = Ok(());
    for point in points {
        match mount(context, point, &mut ids).await {
            Ok(point) => mounted.push(point),
            Err(error) => result = Err(error),
        }
        if result.is_err() {
            break;
        }
    }
    let done = match result {
        Ok(()) => {
            let lost: Vec<_> = mounted.iter().map(|(_, reader)| reader.lost()).collect();
            let done = tokio::task::spawn_blocking(move || work(mounted)).await;
            let done = done.unwrap_or_else(|error| Err(failed(format!("the reader ended early: {error}"))));
            // Whatever was left out then was not damaged, and what was not left out is not all there is.
            match lost.iter().find_map(Lost::why) {
                Some(why) => {
                    Err(why.clone().with_hint("what was copied so far is not all: begin again").into())
                }
                None => done,
            }
        }
        Err(error) => Err(error),
    };
    // They end by themselves with their clients, as a rule before this asks for it.
    for (receiver, id) in ids {
        let _ = receiver.unmount(&id, None).await;
    }
    done
}

async fn mount(
    context: &Context,
    point: Point,
    ids: &mut Vec<(ReceiverClient, String)>,
) -> Result<(Mount, PointReader), Failure> {
    let receiver: ReceiverClient = context.receiver(&point.api)?;
    let Point { name, at, .. } = point;
    let (temporary, writable, nbd, changed_since) = (true, false, None, None);
    let request = MountRequest { name, at, nbd, temporary, writable, changed_since };
    let mount = receiver.mount(&request).await?;
    ids.push((receiver, mount.id.clone()));
    context.remark(mount.warning.as_deref());
    let client = mounted::connect(&mount).await?;
    Ok((mount, PointReader::new(client, Handle::current())))
}

fn listing_text(listing: &Listing) -> String {
    let Some(entries) = &listing.entries else {
        let row = |part: &Partition| {
            let (offset, length) = (part.offset.to_string(), size_text(part.length));
            vec![part.number.to_string(), offset, length, part.content.name().to_owned()]
        };
        let logical = |volume: &LogicalVolume| {
            let content = match &volume.unreadable {
                Some(why) => format!("not readable: {why}"),
                None => volume.content.name().to_owned(),
            };
            vec![volume.name.clone(), "-".to_owned(), size_text(volume.length), content]
        };
        let rows = listing.parts.partitions.iter().map(row);
        let rows = rows.chain(listing.parts.logical_volumes.iter().map(logical));
        return plain_table(&["PARTITION", "OFFSET", "SIZE", "CONTENT"], rows);
    };
    let row = |entry: &Entry| {
        let kind = match entry.kind {
            Kind::File => '-',
            Kind::Directory => 'd',
            Kind::Symlink => 'l',
            Kind::Special => 's',
            Kind::Unreadable => '?',
        };
        let modified = u64::try_from(entry.modified).unwrap_or(0).saturating_mul(1_000_000);
        let arrow = entry.target.as_ref().map_or_else(String::new, |target| format!(" -> {target}"));
        let why = entry.error.as_ref().map_or_else(String::new, |why| format!(" (cannot be read: {why})"));
        vec![
            format!("{kind}{:04o}", entry.mode),
            format!("{}:{}", entry.uid, entry.gid),
            entry.size.to_string(),
            time_text(backtide_units::CaptureTime(modified)),
            printable(&format!("{}{arrow}{why}", entry.name)),
        ]
    };
    plain_table(&["MODE", "OWNER", "BYTES", "MODIFIED", "NAME"], entries.iter().map(row))
}

fn copy_text(report: &CopyReport) -> String {
    let Copied { files, directories, symlinks, bytes, .. } = report.copied;
    let size = size_text(backtide_units::ByteCount(bytes));
    let beside = match (directories, symlinks) {
        (0, 0) => String::new(),
        (1, _) => format!(", 1 directory, {}", count_text(symlinks, "link")),
        _ => format!(", {directories} directories, {}", count_text(symlinks, "link")),
    };
    format!(
        "copied {} of {} as of lsn:{} to {}: {}{beside}, {size}",
        report.path,
        report.disk,
        report.lsn,
        report.output,
        count_text(files, "file")
    )
}
