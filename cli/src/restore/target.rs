//! Where a point is written: a file, a block device, or an NBD server.
//!
//! Invariant: opening a target changes nothing in what is there already; what cannot hold the
//! point is refused then.

use std::{fmt, os::unix::fs::FileTypeExt, path::Path};

use backtide_control::{ApiError, ErrorCode};
use backtide_export::{Client, Extent, NbdUri, ZeroOptions};
use backtide_units::{ByteCount, ByteOffset, ByteRange};
use bytes::Bytes;

use crate::{
    ending::{Failure, io_failure, wrong_usage},
    quantity::size_both,
    restore::{
        device::Device,
        file::{NewFile, Replacing},
        held::Held,
        leftovers::Leftover,
        notes::Goal,
        old_file::OldFile,
        pieces::PIECE,
    },
};

/// Bytes of which the block status is asked at once.
const STATUS_MAX: ByteCount = ByteCount(1 << 30);

/// File systems that compress nothing, as statfs(2) tells them.
const EXT: rustix::fs::FsWord = 0xef53;
const XFS: rustix::fs::FsWord = 0x5846_5342;
const TMPFS: rustix::fs::FsWord = 0x0102_1994;

/// Bytes that are read to find out whether an export holds data: some seconds.
const READ_MAX: ByteCount = ByteCount(1 << 30);

/// A target that is open.
#[derive(Clone)]
pub(crate) enum Target {
    /// A new file under a temporary name.
    File(NewFile),
    /// A file that exists, changed in place.
    OldFile(OldFile),
    /// A block device.
    Device(Device, Way),
    /// An export of an NBD server.
    Nbd {
        /// As it was given.
        uri: String,
        /// The connection.
        client: Client,
        /// How it is written.
        way: Way,
    },
}

/// How a target is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// All of it reads as zeroes: only data is written.
    Fresh,
    /// Nothing is known of it: data and zeroes are written.
    Over,
    /// It may be nearly the point already: what differs is written.
    Changed,
}

/// What is wanted of a target.
pub(crate) struct Wanted {
    /// The point.
    pub(crate) goal: Goal,
    /// To replace what is there.
    pub(crate) force: bool,
    /// To write only what differs from what is there.
    pub(crate) only_changed: bool,
    /// A partial file to go on with.
    pub(crate) leftover: Option<Leftover>,
}

/// Holds what is there, for as long as the restore goes on; refuses what is in use - an image that an agent
/// protects - and files of a daemon.
pub(super) fn hold_unless_live(path: &Path) -> Result<Held, Failure> {
    let real = std::fs::canonicalize(path).map_err(|error| io_failure(path.display(), &error))?;
    refuse_store(&real)?;
    let hint = "detach the disk first, or take another place";
    Held::take(&real).map_err(|why| why.failure(path, hint))
}

/// Refuses what lies in a receiver's store or an agent's state directory, whether it is there already or not.
pub(super) fn refuse_store(path: &Path) -> Result<(), Failure> {
    let Ok(real) = std::fs::canonicalize(path) else { return Ok(()) };
    if real.ancestors().any(|directory| directory.join("store.json").exists()) {
        let message = format!("{} lies in a receiver's store", path.display());
        return Err(ApiError::new(ErrorCode::Refused, message).with_hint("take a place outside it").into());
    }
    if real.ancestors().any(is_agent_state) {
        let message = format!("{} lies in an agent's state directory", path.display());
        return Err(ApiError::new(ErrorCode::Refused, message).with_hint("take a place outside it").into());
    }
    Ok(())
}

/// Whether an agent keeps its disks' tracking files here, under its lock.
pub(crate) fn is_agent_state(directory: &Path) -> bool {
    let tracking = |entry: std::io::Result<std::fs::DirEntry>| {
        entry.is_ok_and(|entry| entry.path().extension().is_some_and(|ending| ending == "tracking"))
    };
    directory.join("lock").is_file()
        && std::fs::read_dir(directory).is_ok_and(|mut entries| entries.any(tracking))
}

/// Refuses the name of a symbolic link that leads nowhere, before anything is copied for it.
fn refuse_dangling(path: &Path) -> Result<(), Failure> {
    let Ok(target) = std::fs::read_link(path) else { return Ok(()) };
    let message =
        format!("{} is a symbolic link to {}, which does not exist", path.display(), target.display());
    Err(ApiError::new(ErrorCode::Exists, message).with_hint("remove the link, or take another name").into())
}

/// Refuses a name of an output that means something else, before anything is asked.
pub(crate) fn refuse_no_name(output: &str) -> Result<(), Failure> {
    if output.is_empty() {
        return Err(wrong_usage("the output has no name: name a file, a block device or an NBD URI"));
    }
    if output == "-" {
        let hint = "name a file, or read the point with `backtide mount` and nbdcopy; a file called - is ./-";
        let error = ApiError::new(
            ErrorCode::Usage,
            "a point is not restored to standard output: it is sparse, and read back",
        );
        return Err(error.with_hint(hint).into());
    }
    Ok(())
}

impl Target {
    /// Opens `output` for a point.
    pub(crate) async fn open(output: &str, wanted: Wanted) -> Result<Self, Failure> {
        let size = wanted.goal.size;
        let way = if wanted.only_changed { Way::Changed } else { Way::Over };
        if output.contains("://") {
            return Self::connect(output, size, way, wanted.force).await;
        }
        let path = std::path::absolute(output).map_err(|error| io_failure(output, &error))?;
        match std::fs::metadata(&path) {
            Ok(found) if found.is_dir() => {
                let message = format!("{} is a directory", path.display());
                Err(ApiError::new(ErrorCode::Usage, message).with_hint("name a file in it").into())
            }
            Ok(_) if !wanted.force => {
                let message = format!("{} exists already", path.display());
                Err(ApiError::new(ErrorCode::Exists, message)
                    .with_hint("take another name, or --force to overwrite it")
                    .into())
            }
            Ok(found) if found.is_file() || found.file_type().is_block_device() => {
                let held = hold_unless_live(&path)?;
                Self::replace(&path, &found, held, way, wanted)
            }
            Ok(_) => Err(wrong_usage(format!("{} is neither a file nor a block device", path.display()))),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && output.ends_with('/') => {
                let message = format!("there is no directory {output}, and a file has another name");
                Err(ApiError::new(ErrorCode::Usage, message)
                    .with_hint("name a file, without / at its end")
                    .into())
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                refuse_store(path.parent().unwrap_or(Path::new("/")))?;
                refuse_dangling(&path)?;
                let replacing = Replacing::new(wanted.force, None);
                NewFile::create(&path, &wanted.goal, replacing, wanted.leftover).map(Self::File)
            }
            Err(error) => Err(io_failure(path.display(), &error)),
        }
    }

    fn replace(
        path: &Path,
        found: &std::fs::Metadata,
        held: Held,
        way: Way,
        wanted: Wanted,
    ) -> Result<Self, Failure> {
        if found.file_type().is_block_device() {
            return Device::open(path, held, wanted.goal.size).map(|device| Self::Device(device, way));
        }
        let real = std::fs::canonicalize(path).map_err(|error| io_failure(path.display(), &error))?;
        if wanted.only_changed {
            // It takes the lock for itself, on what it writes to.
            drop(held);
            return OldFile::open(&real, found, wanted.goal.size).map(Self::OldFile);
        }
        let replacing = Replacing::new(true, Some(held));
        NewFile::create(&real, &wanted.goal, replacing, wanted.leftover).map(Self::File)
    }

    async fn connect(output: &str, size: ByteCount, way: Way, force: bool) -> Result<Self, Failure> {
        let uri: NbdUri = output.parse().map_err(|error| ApiError::from_error(ErrorCode::Usage, &error))?;
        let client = Client::connect(&uri)
            .await
            .map_err(|error| ApiError::from_error(ErrorCode::Unreachable, &error))?;
        if client.flags().read_only() {
            return Err(ApiError::new(ErrorCode::Refused, format!("{output} is read-only")).into());
        }
        enough_room(output, client.size(), size)?;
        if !force && let Some(at) = first_data(output, &client, size).await? {
            let message = format!("{output} may hold data already, at byte {at}");
            return Err(ApiError::new(ErrorCode::Exists, message)
                .with_hint("take another export, or --force to overwrite it")
                .into());
        }
        Ok(Self::Nbd { uri: output.to_owned(), client, way })
    }

    /// What a new file may take on its file system; none where that is not known, or does not count.
    pub(crate) fn free(&self) -> Option<ByteCount> {
        let Self::File(file) = self else { return None };
        let found = rustix::fs::statfs(file.path().parent()?).ok()?;
        // Others may store it in less.
        let stores_as_it_is = [EXT, XFS, TMPFS].contains(&found.f_type);
        // Ext keeps some for root alone.
        let blocks = if rustix::process::geteuid().is_root() { found.f_bfree } else { found.f_bavail };
        let bytes = blocks.saturating_mul(u64::try_from(found.f_bsize).ok()?);
        stores_as_it_is.then_some(ByteCount(bytes))
    }

    /// How it is written.
    pub(crate) fn way(&self) -> Way {
        match self {
            Self::File(_) => Way::Fresh,
            Self::OldFile(_) => Way::Changed,
            Self::Device(_, way) | Self::Nbd { way, .. } => *way,
        }
    }

    /// Whether a piece can be read back from where it is kept as soon as it is written, and is as sure then as at the
    /// end. A device or a server may be smaller than it says: what is written last may lie over the first.
    pub(crate) fn reads_back(&self) -> bool {
        match self {
            Self::File(file) => file.content().is_direct(),
            Self::OldFile(file) => file.content().is_direct(),
            Self::Device(..) | Self::Nbd { .. } => false,
        }
    }

    /// Makes it ready to be written: from here on it is changed.
    pub(crate) async fn prepare(&self) -> Result<(), Failure> {
        match self {
            Self::OldFile(file) => file.prepare().await,
            Self::File(_) | Self::Device(..) | Self::Nbd { .. } => Ok(()),
        }
    }

    /// The digest that an earlier restore has noted of a piece.
    pub(crate) fn noted(&self, piece: ByteRange) -> Option<[u8; 32]> {
        match self {
            Self::File(file) => file.noted(piece),
            Self::OldFile(_) | Self::Device(..) | Self::Nbd { .. } => None,
        }
    }

    /// Notes that a piece is there, for a later restore.
    pub(crate) fn note(&self, piece: ByteRange, digest: &[u8; 32]) -> Result<(), Failure> {
        match self {
            Self::File(file) => file.note(piece, digest),
            Self::OldFile(_) | Self::Device(..) | Self::Nbd { .. } => Ok(()),
        }
    }

    /// Leaves what is done for a later restore; says how that goes on.
    pub(crate) fn leave(&self) -> &'static str {
        match self {
            Self::File(file) => {
                file.leave();
                "what is done stays: the same command with the same point goes on there"
            }
            Self::OldFile(_) | Self::Device(..) | Self::Nbd { .. } => {
                "the same command with --only-changed --force writes what is missing"
            }
        }
    }

    /// Writes `data` at the start of `range`, which has its length.
    pub(crate) async fn write(&self, range: ByteRange, data: Bytes) -> Result<(), Failure> {
        match self {
            Self::File(file) => file.content().write(range, data).await,
            Self::OldFile(file) => file.content().write(range, data).await,
            Self::Device(device, _) => device.content().write(range, data).await,
            Self::Nbd { uri, client, .. } => client
                .write(range.start(), data, false)
                .await
                .map_err(|error| nbd_failure("write", uri, &error)),
        }
    }

    /// Makes a range read as zeroes, without space where that can be.
    pub(crate) async fn zero(&self, range: ByteRange) -> Result<(), Failure> {
        match self {
            Self::File(_) => Ok(()),
            Self::OldFile(file) => file.zero(range).await,
            Self::Device(device, _) => device.zero(range).await,
            Self::Nbd { uri, client, .. } => client
                .write_zeroes(range.start(), range.count(), ZeroOptions::default())
                .await
                .map_err(|error| nbd_failure("write zeroes", uri, &error)),
        }
    }

    /// Makes everything written durable.
    pub(crate) async fn sync(&self) -> Result<(), Failure> {
        match self {
            Self::File(file) => file.content().sync().await,
            Self::OldFile(file) => file.content().sync().await,
            Self::Device(device, _) => device.content().sync().await,
            Self::Nbd { uri, client, .. } => {
                client.flush().await.map_err(|error| nbd_failure("flush", uri, &error))
            }
        }
    }

    /// Reads back.
    pub(crate) async fn read(&self, range: ByteRange) -> Result<Bytes, Failure> {
        match self {
            Self::File(file) => file.content().read(range).await,
            Self::OldFile(file) => file.content().read(range).await,
            Self::Device(device, _) => device.content().read(range).await,
            Self::Nbd { uri, client, .. } => client
                .read(range.start(), range.count())
                .await
                .map_err(|error| nbd_failure("read", uri, &error)),
        }
    }

    /// Which parts of a range may hold data.
    pub(crate) async fn extents(&self, range: ByteRange) -> Result<Vec<Extent>, Failure> {
        match self {
            Self::File(file) => file.extents(range).await,
            Self::OldFile(file) => file.extents(range).await,
            Self::Device(..) => Ok(vec![Extent::data(range.count())]),
            Self::Nbd { uri, client, .. } => client
                .block_status(range.start(), range.count())
                .await
                .map_err(|error| nbd_failure("read the block status of", uri, &error)),
        }
    }

    /// Gives a file its name; before that nobody sees it.
    pub(crate) async fn publish(&self) -> Result<(), Failure> {
        match self {
            Self::File(file) => file.publish().await,
            Self::OldFile(_) | Self::Device(..) | Self::Nbd { .. } => Ok(()),
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(file) => file.path().display().fmt(f),
            Self::OldFile(file) => file.path().display().fmt(f),
            Self::Device(device, _) => device.path().display().fmt(f),
            Self::Nbd { uri, .. } => uri.fmt(f),
        }
    }
}

/// Where the first byte is that is not 0, of those that a point of `size` would lie over. Beyond `READ_MAX` what the server
/// does not tell to be zeroes is taken for data.
async fn first_data(uri: &str, client: &Client, size: ByteCount) -> Result<Option<ByteOffset>, Failure> {
    let end = ByteOffset(size.0);
    let mut at = ByteOffset(0);
    let mut read_bytes = 0;
    while at < end {
        let rest = ByteRange::between(at, end);
        let extents = if client.has_block_status() {
            let asked = rest.count().min(STATUS_MAX);
            let told = client.block_status(at, asked).await;
            told.map_err(|error| nbd_failure("read the block status of", uri, &error))?
        } else {
            vec![Extent::data(rest.count())]
        };
        for extent in extents {
            let range = ByteRange::between(at, ByteOffset(at.0 + extent.length.0).min(end));
            at = range.end();
            if extent.zero {
                continue;
            }
            for piece in range.split_at_multiples(PIECE) {
                if read_bytes >= READ_MAX.0 {
                    return Ok(Some(piece.start()));
                }
                read_bytes += piece.count().0;
                let read = client.read(piece.start(), piece.count()).await;
                let read = read.map_err(|error| nbd_failure("read", uri, &error))?;
                if let Some(place) = read.iter().position(|&byte| byte != 0) {
                    return Ok(Some(ByteOffset(piece.start().0 + place as u64)));
                }
            }
        }
    }
    Ok(None)
}

/// Refuses a target of `has` bytes for a point of `needed`.
pub(crate) fn enough_room(
    target: impl fmt::Display,
    has: ByteCount,
    needed: ByteCount,
) -> Result<(), Failure> {
    if has >= needed {
        return Ok(());
    }
    let message = format!("{target} has {} and the point needs {}", size_both(has), size_both(needed));
    Err(ApiError::new(ErrorCode::Refused, message).into())
}

fn nbd_failure(what: &str, uri: &str, error: &backtide_export::ClientError) -> Failure {
    let code = if error.is_lost() { ErrorCode::Unreachable } else { ErrorCode::Failed };
    let cause = ApiError::from_error(code, error);
    ApiError { message: format!("{what} {uri}: {}", cause.message), ..cause }.into()
}
