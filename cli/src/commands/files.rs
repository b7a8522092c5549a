//! `backtide ls` and `cp`: files of a point.

use std::path::PathBuf;

use backtide_control::{ApiError, ErrorCode};
use backtide_export::{Client, NbdUri};
use backtide_receiver_api::{Mount, MountRequest, ReceiverClient};
use backtide_units::{DiskName, Lsn};
use clap::Args;
use serde::Serialize;
use tokio::runtime::Handle;

use crate::{
    arguments::ReceiverApi,
    context::Context,
    ending::{Ending, Failure, failed, wrong_usage},
    inside::{
        Content, Copied, Destination, Entry, Kind, Partition, PointReader, Volume, copy_out, partitions,
    },
    output::plain_table,
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
    /// The partition [default: the only one with a file system that can be read]
    #[arg(long, value_name = "NUMBER")]
    partition: Option<u32>,
    #[command(flatten)]
    api: ReceiverApi,
}

/// `backtide ls`
#[derive(Args, Debug)]
pub(crate) struct Ls {
    #[command(flatten)]
    place: Where,
    /// A file or directory [default: the root, and the partitions when there are several]
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
    partitions: Vec<Partition>,
    /// The one that was looked into.
    partition: Option<u32>,
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
}

impl Ls {
    /// Lists a directory, or the partitions.
    pub(crate) async fn run(self, context: &Context) -> Result<Ending, Failure> {
        let Self { place, path } = self;
        let (partition, only_table) = (place.partition, path.is_none() && place.partition.is_none());
        let path = path.unwrap_or_else(|| "/".to_owned());
        let listing = with_point(context, place, move |mount, mut disk| {
            let partitions = read_partitions(&mut disk)?;
            let readable = partitions.iter().filter(|part| part.content == Content::Ext4).count();
            let (disk_name, lsn) = (mount.disk.name.clone(), mount.lsn);
            if only_table && readable != 1 {
                let (partition, path, entries) = (None, None, None);
                return Ok(Listing { disk: disk_name, lsn, partitions, partition, path, entries });
            }
            let chosen = choose(&partitions, partition)?;
            let volume = Volume::open(&disk, chosen)?;
            let found = volume.look(&path)?;
            let entries = match found.kind {
                Kind::Directory => volume.list(&found)?,
                Kind::File | Kind::Symlink | Kind::Special => vec![found],
            };
            let partition = Some(chosen.number);
            let (path, entries) = (Some(path), Some(entries));
            Ok(Listing { disk: disk_name, lsn, partitions, partition, path, entries })
        })
        .await?;
        context.print(&listing, || listing_text(&listing))?;
        Ok(Ending::Done)
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
        let partition = place.partition;
        let report = with_point(context, place, move |mount, mut disk| {
            let partitions = read_partitions(&mut disk)?;
            let volume = Volume::open(&disk, choose(&partitions, partition)?)?;
            let entry = volume.look_through(&path)?;
            if entry.kind == Kind::Directory && !recursive {
                return Err(wrong_usage(format!("{path} is a directory: copy it with --recursive")));
            }
            let copied = copy_out(&volume, &entry, &to)?;
            let (disk, lsn) = (mount.disk.name.clone(), mount.lsn);
            Ok(CopyReport { disk, lsn, path, output, copied })
        })
        .await?;
        if to_stdout {
            // The file is what was printed.
            context.tell(&copy_text(&report));
        } else {
            context.print(&report, || copy_text(&report))?;
        }
        let skipped = report.copied.skipped;
        if skipped > 0 {
            context.warn(&format!("left out devices, sockets and pipes: {skipped}"));
            return Ok(Ending::Warnings);
        }
        Ok(Ending::Done)
    }
}

/// Mounts the point for as long as `work` takes, which runs where it may block.
async fn with_point<T: Send + 'static>(
    context: &Context,
    place: Where,
    work: impl FnOnce(&Mount, PointReader) -> Result<T, Failure> + Send + 'static,
) -> Result<T, Failure> {
    let receiver: ReceiverClient = context.receiver(&place.api)?;
    let (name, at, nbd) = (place.name, place.at, None);
    let (temporary, writable, changed_since) = (true, false, None);
    let request = MountRequest { name, at, nbd, temporary, writable, changed_since };
    let mount = receiver.mount(&request).await?;
    let uri: NbdUri = mount.uri.parse().map_err(|error| ApiError::from_error(ErrorCode::Failed, &error))?;
    let connected = Client::connect(&uri).await;
    let client = connected.map_err(|error| ApiError::from_error(ErrorCode::Unreachable, &error))?;
    let runtime = Handle::current();
    let id = mount.id.clone();
    let done = tokio::task::spawn_blocking(move || work(&mount, PointReader::new(client, runtime))).await;
    // It ends by itself with its client, as a rule before this asks for it.
    let _ = receiver.unmount(&id, None).await;
    done.unwrap_or_else(|error| Err(failed(format!("the reader ended early: {error}"))))
}

fn read_partitions(disk: &mut PointReader) -> Result<Vec<Partition>, Failure> {
    partitions(disk).map_err(|error| {
        let why = format!("the partitions cannot be read: {error}");
        ApiError::new(ErrorCode::Failed, why).into()
    })
}

/// The partition that was named, or the only one that can be read.
fn choose(partitions: &[Partition], wanted: Option<u32>) -> Result<&Partition, Failure> {
    if let Some(number) = wanted {
        let found = partitions.iter().find(|partition| partition.number == number);
        return found.ok_or_else(|| {
            let why = format!("there is no partition {number}; what there is: {}", names(partitions));
            ApiError::new(ErrorCode::NotFound, why).into()
        });
    }
    let readable: Vec<&Partition> =
        partitions.iter().filter(|partition| partition.content == Content::Ext4).collect();
    match readable[..] {
        [only] => Ok(only),
        // Opening it says why it cannot be read, and what can.
        [] => Ok(partitions.iter().max_by_key(|partition| partition.length).expect("a disk has a part")),
        _ => Err(wrong_usage(format!("say which --partition: there are {}", names(partitions)))),
    }
}

fn names(partitions: &[Partition]) -> String {
    let name =
        |part: &Partition| format!("{} ({}, {})", part.number, part.content.name(), size_text(part.length));
    partitions.iter().map(name).collect::<Vec<_>>().join(", ")
}

fn listing_text(listing: &Listing) -> String {
    let Some(entries) = &listing.entries else {
        let row = |part: &Partition| {
            let (offset, length) = (part.offset.to_string(), size_text(part.length));
            vec![part.number.to_string(), offset, length, part.content.name().to_owned()]
        };
        return plain_table(&["PARTITION", "OFFSET", "SIZE", "CONTENT"], listing.partitions.iter().map(row));
    };
    let row = |entry: &Entry| {
        let kind = match entry.kind {
            Kind::File => '-',
            Kind::Directory => 'd',
            Kind::Symlink => 'l',
            Kind::Special => 's',
        };
        let modified = u64::try_from(entry.modified).unwrap_or(0).saturating_mul(1_000_000);
        let arrow = entry.target.as_ref().map_or_else(String::new, |target| format!(" -> {target}"));
        vec![
            format!("{kind}{:04o}", entry.mode),
            format!("{}:{}", entry.uid, entry.gid),
            entry.size.to_string(),
            time_text(backtide_units::CaptureTime(modified)),
            printable(&format!("{}{arrow}", entry.name)),
        ]
    };
    plain_table(&["MODE", "OWNER", "BYTES", "MODIFIED", "NAME"], entries.iter().map(row))
}

/// A guest's name without what a terminal would take for an order.
fn printable(name: &str) -> String {
    name.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
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
