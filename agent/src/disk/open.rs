//! What an attach does before the disk's thread starts: claims the epoch, opens the disk behind,
//! finds out what the filter may trust, and leaves a tracking file that says so.

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use backtide_agent_api::{AckPolicy, CacheMode, OnOutage, StreamTls};
use backtide_export::{Client, ClientError, ClientOptions, NbdUri, ParseUriError};
use backtide_io_filter::{Resume, Settings};
use backtide_storage::{Cache, ImageError, ImageFile, KillPoint, Opening};
use backtide_tracking::{ActivityLimits, SignOfLife, TrackingFile};
use backtide_units::{BlockCount, ByteCount, CaptureTime, DISK_SIZE_MAX, Lsn};
use uuid::Uuid;

use super::{
    PollSeats, doubt,
    in_place::InPlace,
    incomplete::{self, HydrationProblem, OpenedHydration},
    source::Sources,
    tracking::way_out,
    trust,
};
use crate::{
    claims::Beside,
    config::IoEngine,
    record::{DiskRecord, ImageStamp, LSN_STEP, Records},
    spill::OpenedSpill,
};

/// How exact timers are.
const TIMER_GRAIN: std::time::Duration = std::time::Duration::from_millis(1);

/// How long a block that could not be read is left alone.
const READ_RETRY: std::time::Duration = std::time::Duration::from_secs(1);

/// How often an idle disk tells the receiver that it has not changed: after a crash, so much at most of its idle time
/// is a hole. It costs 64 bytes in the log and a share of a sync.
const UNCHANGED_EVERY: std::time::Duration = std::time::Duration::from_secs(30);

/// How long an NBD server may take to answer at an attach: other attaches and detaches wait meanwhile.
const ATTACH_CONNECT: std::time::Duration = std::time::Duration::from_secs(3);

/// How an NBD server is connected at an attach.
pub(super) fn attach_options() -> ClientOptions {
    ClientOptions { connect_timeout: ATTACH_CONNECT, ..ClientOptions::default() }
}

/// The disk behind, before its thread has it.
pub(crate) enum Behind {
    Image(ImageFile),
    /// To be connected on the disk's thread; it had this size a moment ago, and took requests of multiples of so many bytes.
    Nbd(NbdUri, ByteCount, u32),
}

/// Everything a disk's thread starts with.
pub(crate) struct Opened {
    pub(crate) record: DiskRecord,
    pub(crate) behind: Behind,
    pub(crate) settings: Settings,
    pub(crate) resume: Resume,
    pub(crate) tracking: TrackingFile,
    /// The sign of life in it.
    pub(crate) alive: SignOfLife,
    pub(crate) io_engine: IoEngine,
    /// With whom its thread polls in turn; of none it polls not at all.
    pub(crate) poll_seats: Arc<PollSeats>,
    /// See [`trust::known_until`].
    pub(crate) known_until: Option<CaptureTime>,
    /// TLS of the stream, for a `tls://` receiver.
    pub(crate) tls: Option<StreamTls>,
    /// Bounds of its NBD server.
    pub(crate) nbd: backtide_export::Limits,
    /// None when the agent has no place for spills.
    pub(crate) spill: Option<OpenedSpill>,
    /// The image's file, where it has one.
    pub(crate) in_place: Option<InPlace>,
    /// What else uses its bytes.
    pub(crate) beside: Option<Beside>,
    /// What the disk lacks, if anything.
    pub(crate) hydration: Option<OpenedHydration>,
}

/// Why a disk cannot be attached.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OpenError {
    /// The image is missing, locked or no disk.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// Neither an absolute path nor the URI of an NBD export.
    #[error(transparent)]
    Uri(#[from] ParseUriError),
    /// The NBD server behind cannot be used.
    #[error("cannot use {uri} as the disk behind: {source}")]
    Nbd { uri: NbdUri, source: ClientError },
    /// It has a cache of its own, or none.
    #[error("{uri} is an NBD server: whether it uses the page cache is not for its client to say")]
    NbdCache { uri: NbdUri },
    /// Its size cannot be a disk's.
    #[error("{uri} has {size} bytes, which is not a positive multiple of 512")]
    NbdSize { uri: NbdUri, size: ByteCount },
    /// No receiver can keep it.
    #[error("{image} has {size} bytes ({} TiB), and a disk has {DISK_SIZE_MAX} at most (256 TiB)", size.0 >> 40)]
    TooLarge { image: String, size: ByteCount },
    /// Every write of the guest would fail.
    #[error("{uri} is read-only, and a disk is written: serve it writable")]
    NbdReadOnly { uri: NbdUri },
    /// The disk had more, and its points have.
    #[error("{image} has {size} bytes and disk {disk} had {before}: a disk cannot shrink")]
    Shrunk { disk: String, image: String, before: ByteCount, size: ByteCount },
    /// Nobody knows which blocks the image lacks, or it is another image.
    #[error(transparent)]
    Hydration(#[from] HydrationProblem),
    /// Another agent has had the disk since, and may have given the LSNs of its records again.
    #[error(
        "disk {disk} was taken over by another agent, and what this one's spill has of it cannot be removed: {why}"
    )]
    Spill { disk: String, why: String },
    /// The agent's own records failed.
    #[error("cannot keep the record of disk {disk} in {}: {source}; {}", directory.display(), way_out(source))]
    Record { disk: String, directory: PathBuf, source: io::Error },
}

/// Opens the disk behind `record` and begins a new attach: when this returns, the new epoch is
/// durable, and before it a tracking file that says what this attach begins with.
pub(crate) async fn open(
    records: &Records,
    mut record: DiskRecord,
    behind: &str,
    stamp: Option<ImageStamp>,
    sources: &Arc<dyn Sources>,
) -> Result<(DiskRecord, Opened), OpenError> {
    let behind = open_behind(behind, &record).await?;
    KillPoint::AttachOpened.reached();
    let size = behind.size();
    // One that an earlier version has attached goes on: its guest needs it.
    if size > DISK_SIZE_MAX && !record.attached {
        return Err(OpenError::TooLarge { image: record.image.clone(), size });
    }
    let hydration = incomplete::look(records, &record, size, sources)?;
    if size < record.size && record.history.is_some() {
        let (disk, image) = (record.name.to_string(), record.image.clone());
        return Err(OpenError::Shrunk { disk, image, before: record.size, size });
    }
    let left = records.load_tracking(&record.name);
    let whole = left.as_ref().ok().and_then(Option::as_ref);
    if let Some(alive) = whole.and_then(|loaded| loaded.alive) {
        record.last_time = record.last_time.max(alive.captured);
    }
    let known_until = trust::known_until(&record, whole);
    record.last_time_is_early |= !whole.is_some_and(|left| record.ended_cleanly(left));
    if let Behind::Image(image) = &behind {
        doubt::look_at_the_device(image, &doubt::left(&record, whole, hydration.as_ref(), size));
    }
    let resume = trust::resume(&record, left, stamp.as_ref(), size);
    let resume = incomplete::dirty_too(resume, &record, hydration.as_ref());
    // Before the record, by which the next attach would take the old file for that of a crash.
    let activity = activity_limits(&record, size);
    let snapshot = resume.first_snapshot(record.uuid, activity);
    let alive = trust::alive_since(stamp.as_ref(), record.last_time);
    let tracking = records
        .create_tracking(&record.name, activity, size, &snapshot)
        .and_then(|file| file.sign(alive).map(|()| file))
        .map_err(|source| record_error(records, &record, source))?;
    KillPoint::AttachTracking.reached();
    record.epoch = record.epoch.next();
    record.lsn_bound = Lsn(record.lsn_bound.0.max(last_lsn(&resume).0)).plus(LSN_STEP);
    record.image_at_detach = None;
    record.stopped = false;
    record.image_changed = false;
    record.image_displaced = false;
    let fenced = record.fenced;
    if std::mem::take(&mut record.take_over) {
        if let Some(place) = records.spill().filter(|_| fenced) {
            let disk = record.name.to_string();
            place.discard(record.uuid).map_err(|why| OpenError::Spill { disk, why })?;
        }
        // From here on the tracking file says that everything may differ. The disk changes hands: whoever had it can tell.
        if std::mem::take(&mut record.fenced) {
            record.epoch = record.epoch.taken_over();
        }
    }
    record.size = size;
    record.attached = true;
    let attach = Uuid::new_v4();
    record.note_attach(attach);
    // From now on it is known also when nothing is missing any more.
    record.rewound = hydration.as_ref().and_then(OpenedHydration::rewound).or(record.rewound);
    records.save(&record).map_err(|source| record_error(records, &record, source))?;
    KillPoint::AttachRecord.reached();
    let settings = settings(&record, attach, behind.size());
    // A fenced disk sends nothing; what it has left in the spill is of another history than the receiver's by now.
    let spill = records.spill().filter(|_| !record.fenced).map(|place| place.open(&settings));
    let (io_engine, poll_seats) = (IoEngine::default(), Arc::default());
    let (tls, nbd, in_place, beside) = (None, Default::default(), None, None);
    let opened = Opened {
        record,
        behind,
        settings,
        resume,
        tracking,
        alive,
        io_engine,
        poll_seats,
        known_until,
        tls,
        nbd,
        spill,
        in_place,
        beside,
        hydration,
    };
    Ok((opened.record.clone(), opened))
}

/// Whether requests of multiples of `minimum` bytes can be single blocks of the granule.
pub(crate) fn takes_blocks(minimum: u32) -> bool {
    u64::from(minimum) <= BlockCount(1).bytes().0
}

fn record_error(records: &Records, record: &DiskRecord, source: io::Error) -> OpenError {
    OpenError::Record { disk: record.name.to_string(), directory: records.directory(), source }
}

async fn open_behind(behind: &str, record: &DiskRecord) -> Result<Behind, OpenError> {
    // A path given to the agent is absolute, so it cannot look like a URI.
    if Path::new(behind).is_absolute() {
        let cache = match record.cache {
            CacheMode::Writeback => Cache::Writeback,
            CacheMode::Direct => Cache::Direct,
        };
        let opening = Opening { cache, ..Opening::default() };
        return Ok(Behind::Image(ImageFile::open_with(Path::new(behind), opening)?));
    }
    let uri: NbdUri = behind.parse()?;
    // A qcow2 file has a server of the agent's own, which is told.
    if record.cache == CacheMode::Direct && record.image == behind {
        return Err(OpenError::NbdCache { uri });
    }
    let client = Client::connect_with(&uri, attach_options()).await;
    let client = client.map_err(|source| OpenError::Nbd { uri: uri.clone(), source })?;
    let size = client.size();
    if size.is_zero() || !size.0.is_multiple_of(512) {
        return Err(OpenError::NbdSize { uri, size });
    }
    if client.flags().read_only() {
        return Err(OpenError::NbdReadOnly { uri });
    }
    Ok(Behind::Nbd(uri, size, client.block_sizes().minimum))
}

impl Behind {
    fn size(&self) -> ByteCount {
        match self {
            Self::Image(image) => image.size(),
            Self::Nbd(_, size, _) => *size,
        }
    }

    /// With direct I/O, what its size has to be a multiple of, in bytes.
    pub(crate) fn direct_block(&self) -> Option<u32> {
        match self {
            Self::Image(image) => image.alignment().map(|alignment| alignment.block),
            Self::Nbd(..) => None,
        }
    }

    /// Whether most requests are answered out of the page cache, and none waits for a device or another server.
    pub(crate) fn uses_page_cache(&self) -> bool {
        match self {
            Self::Image(image) => image.alignment().is_none(),
            Self::Nbd(..) => false,
        }
    }

    /// Whether single blocks of the granule can be written, which is what a disk that lacks some needs.
    pub(crate) fn takes_blocks(&self) -> bool {
        match self {
            Self::Image(_) => true,
            Self::Nbd(_, _, minimum) => takes_blocks(*minimum),
        }
    }
}

fn last_lsn(resume: &Resume) -> Lsn {
    match resume {
        Resume::New => Lsn::ZERO,
        Resume::Clean(saved) => saved.last_lsn,
        Resume::Lost { last_lsn, .. } | Resume::Crashed { last_lsn, .. } => *last_lsn,
    }
}

fn settings(record: &DiskRecord, attach: Uuid, size: ByteCount) -> Settings {
    let limits = record.limits;
    Settings {
        disk: record.uuid,
        name: record.name.clone(),
        size,
        epoch: record.epoch,
        attach,
        ack: match record.ack {
            AckPolicy::Local => backtide_io_filter::AckPolicy::Local,
            AckPolicy::Received => backtide_io_filter::AckPolicy::Received,
            AckPolicy::Durable => backtide_io_filter::AckPolicy::Durable,
            AckPolicy::DurableEveryWrite => backtide_io_filter::AckPolicy::DurableEveryWrite,
        },
        on_outage: match record.on_outage {
            OnOutage::Continue => backtide_io_filter::OnOutage::Continue,
            OnOutage::Block => backtide_io_filter::OnOutage::Block,
        },
        window_bytes: limits.window_bytes,
        resync_buffer_bytes: limits.resync_buffer_bytes,
        guest_delay_max: delay_bound(limits.guest_delay_max_ms),
        outage_after: std::time::Duration::from_millis(limits.outage_after_ms.max(1).into()),
        bitmap_bytes: limits.bitmap_bytes,
        read_retry: READ_RETRY,
        unchanged_every: UNCHANGED_EVERY,
        activity: activity_limits(record, size),
    }
}

/// A timer is late by up to a millisecond, and the bound is for what the guest waits.
fn delay_bound(max_ms: u32) -> std::time::Duration {
    let bound = std::time::Duration::from_millis(max_ms.into());
    bound.saturating_sub(TIMER_GRAIN.min(bound / 2))
}

/// How the disk's activity log is kept.
pub(crate) fn activity_limits(record: &DiskRecord, size: ByteCount) -> ActivityLimits {
    let (limits, block) = (record.limits, BlockCount(1).bytes().0);
    // Extents are counted with 32 bits.
    let fits = size.0 / block / u64::from(u32::MAX) + 1;
    let extent = BlockCount((limits.activity_extent_bytes.0 / block).max(16).max(fits));
    ActivityLimits { extent, hot: limits.activity_extents, ..ActivityLimits::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_extent_of_every_disk_has_a_number() {
        let receiver = "unix:/run/r.sock".parse().unwrap();
        let mut record = DiskRecord::new("vm1".parse().unwrap(), "/vm1.img".to_owned(), receiver);
        record.limits.activity_extent_bytes = ByteCount(64 << 10);
        let largest = activity_limits(&record, DISK_SIZE_MAX);
        assert!(DISK_SIZE_MAX.0.div_ceil(largest.extent.bytes().0) < u64::from(u32::MAX), "{largest:?}");
        assert_eq!(activity_limits(&record, ByteCount(200 << 40)).extent, BlockCount(16));
    }
}
