//! A disk whose host is gone goes on here: the same disk and the same history, at its latest point.
//!
//! The receiver is told of a higher epoch first. From then on whoever had the disk is fenced, and its history stands
//! still; so its latest point is the last, and a sparse image that lacks all data of it is the disk. The tracking file
//! says that it is in sync, but for what the receiver has of a pass that never ended.
//!
//! Invariant: the record is written last. Whoever dies before leaves an empty image and a hydration file of a disk
//! that no record knows, which nothing takes for a disk; a failover begins anew then, with a higher epoch. A failback
//! (`failback.rs`) ends in the same way, with an image that has most of it.

use std::{
    cell::OnceCell,
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use backtide_agent_api::Adopted;
use backtide_control::{ApiError, ErrorCode};
use backtide_export::Listener;
use backtide_hydration::{Header, Kind, SourcePoint};
use backtide_protocol::{Hello, PROTOCOL_VERSION, ReceiverState, Tracking, Welcome};
use backtide_storage::KillPoint;
use backtide_tracking::{DirtyBitmap, SavedTracking, Snapshot};
use backtide_units::{BlockRange, DiskName, Lsn, Reason};
use tokio::task::LocalSet;
use uuid::Uuid;

use super::{
    Registry,
    errors::failed,
    failback::{HeldImage, LeftBehind},
    image::{self, Before, empty_again, refuse_other_size},
    origin::fetch_error,
    rewind::{RELEASE_TIME, have_hydration},
    waiting,
};
use crate::{
    disk::{self, Dialer, claim, hydrating::owner, source::FetchError, trust},
    qcow2::Qcow2Server,
    record::{DiskRecord, ImageStamp, Records},
};

/// How long the receiver may take for all of it.
const TAKE_OVER_TIME: Duration = Duration::from_secs(120);

/// A disk that was taken over at its receiver.
pub(super) struct TakenOver {
    /// By which it was taken over.
    attach: Uuid,
    pub(super) welcome: Welcome,
    pub(super) source: SourcePoint,
    /// What the image lacks of the point.
    pub(super) missing: DirtyBitmap,
    /// Where the receiver has something newer that is no point.
    newer: DirtyBitmap,
    /// Nobody else has the image that the disk had here, until the record says what it is.
    image: Option<HeldImage>,
    /// What was found where the image is to be.
    before: Before,
}

/// In what a disk goes on that was taken over.
pub(super) enum Target {
    /// An image that is made for it, where this was found.
    New(Before),
    /// The one that it had here.
    Left(Box<LeftBehind>),
}

/// The image of a disk that was taken over, as nobody has it.
struct Made {
    /// 0 of a device or NBD export.
    inode: u64,
    /// As it was when it was known to be nobody else's; none where that cannot be told.
    stamp: Option<ImageStamp>,
}

/// A disk that was taken over at its receiver, and could not be begun here.
struct Unfinished {
    /// Whether something says nevertheless that it lacks blocks of the point.
    lacks: bool,
    error: ApiError,
}

impl Registry {
    /// The record of a disk that goes on here: `record` is what its receiver knows of it.
    pub(super) async fn begin_failover(
        &self,
        record: DiskRecord,
        adopted: Adopted,
    ) -> Result<DiskRecord, ApiError> {
        let (records, name, uuid) = (self.records.clone(), record.name.clone(), record.uuid);
        let begun = move || {
            let left = records.open_hydration(&name, trust::boot_id());
            // Of an attempt that somebody ended.
            left.is_ok_and(|left| left.is_some_and(|left| left.header().disk == uuid))
        };
        let begun = waiting(begun).await?;
        let format = image::find_format(&record).await?;
        let before = image::refuse_used(&record.image, format, begun).await?;
        self.refuse_unserved(&record).await?;
        // How much it will lack is known only when it is taken over.
        self.require_room(&record.name, None).await?;
        let record = DiskRecord { epoch: adopted.epoch.taken_over(), format, ..record };
        let taken = self.take_over(&record, adopted, Target::New(before)).await?;
        self.begin_taken(record, taken, None).await
    }

    /// Nobody is fenced for a disk that could not be served here.
    pub(super) async fn refuse_unserved(&self, record: &DiskRecord) -> Result<(), ApiError> {
        let (place, purpose) = (self.listen_uri(record)?, disk::nbd_purpose(&record.name));
        let mode = self.nbd_limits.socket_mode;
        let free = Listener::check_kept(&place, mode, &self.sockets, &purpose).await;
        free.map_err(|error| disk::start_error(&error.into()))
    }

    /// Makes the image, says what it lacks, and saves the record of a disk that was taken over. Ends what serves the image that it
    /// had here.
    pub(super) async fn begin_taken(
        &self,
        record: DiskRecord,
        taken: TakenOver,
        server: Option<Qcow2Server>,
    ) -> Result<DiskRecord, ApiError> {
        let (source, held) = (taken.source.clone(), record.clone());
        let made = self.make_taken(&record, &taken, server).await;
        let records = self.records.clone();
        let begun = match made {
            Ok(made) => waiting(move || begin(&records, record, taken, made)).await?,
            Err(error) => Err(Unfinished { lacks: false, error }),
        };
        match begun {
            Ok(record) => Ok(record),
            Err(Unfinished { lacks, error }) => {
                let keeper = owner(held.uuid, held.epoch);
                self.settle_hold(&held, source, keeper, lacks).await;
                Err(fenced_by_now(&held.name, error))
            }
        }
    }

    /// Has the image as it is to be, with nobody else.
    async fn make_taken(
        &self,
        record: &DiskRecord,
        taken: &TakenOver,
        server: Option<Qcow2Server>,
    ) -> Result<Made, ApiError> {
        let looked_at = taken.image.as_ref().map(|held| held.looked_at.clone());
        let look = move || looked_at.map_or(Ok(()), |looked_at| looked_at.refuse_changed());
        let unchanged = waiting(look).await;
        let was_served = server.is_some();
        if let Some(server) = server {
            server.stop().await.map_err(|error| ApiError::from_error(ErrorCode::Busy, &error))?;
        }
        unchanged??;
        // A qcow2 file is nobody's from here on: who writes it is noticed by the attach, which knows how it was left. A raw
        // one is locked.
        let left = match taken.image.as_ref().filter(|_| was_served).map(|held| held.looked_at.clone()) {
            Some(looked_at) => Some(waiting(move || looked_at.left()).await??),
            None => None,
        };
        if let Some(place) = self.records.spill().cloned() {
            // Of an earlier attach here, whose records the history has gone on without.
            let uuid = record.uuid;
            let discarded = waiting(move || place.discard(uuid)).await?;
            discarded.map_err(|why| ApiError::new(ErrorCode::Failed, why))?;
        }
        let grows = taken.before.is_shorter_than(taken.source.size);
        if let Some(left) = left.clone().filter(|_| grows) {
            waiting(move || left.refuse_changed()).await??;
        }
        let inode = image::make(&record.image, record.format, taken.source.size, taken.before).await?;
        if let Some(left) = left.filter(|_| !grows) {
            return Ok(Made { inode, stamp: left.stamp });
        }
        let (path, data) = (disk::path_of(&record.image), record.data_files.clone());
        let stamp = waiting(move || ImageStamp::with(path.as_deref()?, &data)).await?;
        Ok(Made { inode, stamp: stamp.filter(|stamp| stamp.inode == inode) })
    }

    /// Claims the disk at its receiver, and finds out what it was then.
    pub(super) async fn take_over(
        &self,
        record: &DiskRecord,
        adopted: Adopted,
        target: Target,
    ) -> Result<TakenOver, ApiError> {
        let tls = record.stream_tls.clone().or_else(|| self.stream_tls.clone());
        let (sources, runtime) = (Arc::clone(&self.sources), tokio::runtime::Handle::current());
        let known = record.clone();
        let fenced = Arc::new(AtomicBool::new(false));
        let claimed = Arc::clone(&fenced);
        let taking = move || {
            let (uuid, history) = (known.uuid, Some(adopted.history));
            let dialer = || Dialer::new(known.receiver.clone(), tls.clone());
            // A source belongs to one thread.
            let local = LocalSet::new();
            let (keeper, holding) = (owner(uuid, known.epoch), OnceCell::new());
            let take = async {
                // Nobody is fenced for a disk that has no point.
                let before = sources.find(dialer(), uuid, history, None).await?.point().clone();
                target.fits(&known.image, &before)?;
                let attach = Uuid::new_v4();
                let hello = Hello {
                    version: PROTOCOL_VERSION,
                    disk: uuid,
                    name: known.name.clone(),
                    size: before.size,
                    epoch: known.epoch,
                    attach,
                    history,
                    tracking: Tracking::Window { base: adopted.durable },
                    next_lsn: adopted.durable.next(),
                    acked_durable: adopted.durable,
                    ack: None,
                    on_outage: None,
                    origin: None,
                };
                let hello = disk::Terms::of(&known).tell(hello);
                let welcome = claim::claim(&dialer(), hello).await?;
                claimed.store(true, Ordering::Release);
                // A log that is in doubt or has lost its end is no other one: the attach that follows compares everything.
                let is_it = welcome.state != ReceiverState::New && welcome.history == adopted.history;
                if !is_it || welcome.durable < adopted.durable {
                    let why = "the receiver keeps another history than it has told".to_owned();
                    return Err(FetchError::Refused(why));
                }
                KillPoint::TakenOver.reached();
                // Whatever came until the claim is in it, and nothing follows.
                let source = sources.find(dialer(), uuid, history, None).await?;
                let all = BlockRange::whole_disk(source.point().size);
                let mut missing = match &target {
                    Target::Left(left) => left.missing(&*source).await?.0,
                    Target::New(_) => source.data().await?,
                };
                let mut newer = source.changed(Lsn::MAX).await?;
                missing.keep_only(all);
                newer.keep_only(all);
                if !missing.is_empty() {
                    let _ = holding.set(Rc::clone(&source));
                    source.hold(&keeper).await?;
                }
                Ok::<_, FetchError>((attach, welcome, source.point().clone(), missing, newer))
            };
            let taken = async {
                let taken = tokio::time::timeout(TAKE_OVER_TIME, take).await;
                // Nothing comes of the point then.
                if let (Some(source), false) = (holding.get(), matches!(taken, Ok(Ok(_)))) {
                    let _ = tokio::time::timeout(RELEASE_TIME, source.release(&keeper)).await;
                }
                taken
            };
            let taken = runtime.block_on(local.run_until(taken));
            let (image, before) = match target {
                Target::Left(left) => (Some(left.image), Before::Kept(left.size)),
                Target::New(before) => (None, before),
            };
            taken.map(|taken| {
                taken.map(|(attach, welcome, source, missing, newer)| TakenOver {
                    attach,
                    welcome,
                    source,
                    missing,
                    newer,
                    image,
                    before,
                })
            })
        };
        let silent = || FetchError::Unreachable("the receiver does not answer".to_owned());
        let taken = waiting(taking).await?.unwrap_or_else(|_| Err(silent()));
        taken.map_err(|error| {
            let error = fetch_error(&format!("disk {} cannot go on here", record.name), error);
            if fenced.load(Ordering::Acquire) { fenced_by_now(&record.name, error) } else { error }
        })
    }
}

/// What failed when the receiver had the higher epoch already, and the record nothing of it.
fn fenced_by_now(name: &DiskName, error: ApiError) -> ApiError {
    let what = error.message;
    let message = format!(
        "{what}; whoever had disk {name} is fenced by now, and the same command again goes on from here"
    );
    ApiError { message, ..error }
}

/// The same when the record says that the disk is here.
pub(super) fn not_served(record: &DiskRecord, error: ApiError) -> ApiError {
    let DiskRecord { name, image, receiver, .. } = record;
    let message = format!("{}; whoever had disk {name} is fenced by now", error.message);
    let way = format!("`backtide attach {name} {image} --receiver {receiver}` goes on with it here");
    let hint = error.hint.map_or(way.clone(), |hint| format!("{hint}; then {way}"));
    ApiError { message, hint: Some(hint), ..error }
}

impl Target {
    /// Refuses what cannot become the disk at this point.
    fn fits(&self, image: &str, point: &SourcePoint) -> Result<(), FetchError> {
        match self {
            Self::Left(left) => left.fits(point),
            Self::New(before) => refuse_other_size(image, point.size, *before)
                .map_err(|error| FetchError::Refused(error.message)),
        }
    }
}

/// In the order of the invariant, with the image that was made. Blocks.
fn begin(
    records: &Records,
    mut record: DiskRecord,
    taken: TakenOver,
    made: Made,
) -> Result<DiskRecord, Unfinished> {
    let TakenOver { attach, welcome, source, missing, newer, image: held, before: _ } = taken;
    let saved = in_sync(&record, &welcome, newer);
    let image = disk::path_of(&record.image);
    let Made { inode, stamp } = made;
    record.history = Some(welcome.history);
    record.lsn_bound = record.lsn_bound.max(welcome.highest);
    record.acked_durable = welcome.durable;
    record.attaches = Some(vec![attach]);
    record.last_time = record.last_time.max(welcome.last_time.unwrap_or_default());
    record.size = source.size;
    record.image_changed = false;
    record.image_displaced = false;
    // What it may hold of others was compared, or is missing.
    record.written_past_agent = false;
    // A device tells no time; nobody but this agent has it.
    record.stopped = stamp.is_none();
    record.image_at_detach = stamp;
    record.fenced = false;
    let header = Header {
        disk: record.uuid,
        kind: Kind::Failover,
        boot: trust::boot_id(),
        epoch: record.epoch,
        inode,
        before: Lsn::ZERO,
        total: missing.count(),
        compare: held.is_some(),
        source,
    };
    let before = records.open_hydration(&record.name, trust::boot_id());
    let (had_none, is_new) = (before.is_ok_and(|found| found.is_none()), held.is_none());
    let written = save(records, &record, header, missing, &saved);
    // By now whoever takes the image finds a record that says what it is.
    drop(held);
    written.map_err(|error| {
        // What the image lacked before is in the new file only.
        let undone = had_none && undo(records, &record);
        if let Some(image) = image.filter(|_| undone && is_new) {
            // It is one that the next attempt may use; it has no byte.
            empty_again(&image, record.image_at_detach.as_ref());
        }
        Unfinished { lacks: !undone, error }
    })?;
    Ok(record)
}

/// What the tracking file says of a disk that is what the receiver has, but for a pass that never ended.
fn in_sync(record: &DiskRecord, welcome: &Welcome, newer: DirtyBitmap) -> SavedTracking {
    let whole = newer.is_empty() && !welcome.in_pass;
    SavedTracking {
        history: Some(welcome.history),
        last_lsn: welcome.highest,
        gap_from: welcome.durable,
        acked_durable: welcome.durable,
        acked_position: welcome.position,
        reason: (!whole).then_some(Reason::ResyncInterrupted),
        dirty: newer,
        ..SavedTracking::unknown(record.uuid)
    }
}

fn save(
    records: &Records,
    record: &DiskRecord,
    header: Header,
    missing: DirtyBitmap,
    saved: &SavedTracking,
) -> Result<(), ApiError> {
    let name = &record.name;
    let lacks = |why: String| {
        let message = format!("cannot remember what disk {name} lacks: {why}");
        ApiError::new(ErrorCode::Failed, message)
    };
    if !missing.is_empty() {
        have_hydration(records, name, header, missing).map_err(lacks)?;
    }
    KillPoint::HydrationMade.reached();
    let snapshot = Snapshot::first(saved.clone(), true, false);
    let limits = disk::activity_limits(record, record.size);
    let tracking = records.create_tracking(name, limits, record.size, &snapshot);
    tracking.map_err(|error| lacks(error.to_string()))?;
    KillPoint::TakenTracking.reached();
    records.save(record).map_err(|error| failed(&error))
}

/// Leaves nothing that says the disk is here, if that is sure; else it lacks blocks.
fn undo(records: &Records, record: &DiskRecord) -> bool {
    let is_saved = |found: Option<DiskRecord>| found.is_some_and(|found| found.epoch == record.epoch);
    if records.load(&record.name).map_or(true, is_saved) {
        return false;
    }
    // In this order: a tracking file that says the image is the disk must not outlive what it lacks.
    let undone =
        records.discard_tracking(&record.name).and_then(|()| records.discard_hydration(&record.name));
    if let Err(error) = &undone {
        tracing::error!(disk = %record.name, %error, "cannot remove what was begun of the disk");
    }
    undone.is_ok()
}

#[cfg(test)]
mod tests {
    use backtide_io_filter::Resume;
    use backtide_storage::MemoryStorage;
    use backtide_units::{ByteCount, CaptureTime, DiskId, HistoryId, LogPosition};

    use super::*;

    #[test]
    fn a_disk_that_was_taken_over_and_cannot_be_served_names_the_way_on() {
        let (name, receiver) = ("vm1".parse().unwrap(), "unix:/run/r.sock".parse().unwrap());
        let record = DiskRecord::new(name, "/images/vm1".to_owned(), receiver);
        let way = "`backtide attach vm1 /images/vm1 --receiver unix:/run/r.sock` goes on with it here";
        let told = not_served(&record, ApiError::new(ErrorCode::Locked, "it is locked"));
        assert_eq!(told.message, "it is locked; whoever had disk vm1 is fenced by now");
        assert_eq!((told.code, told.hint.as_deref()), (ErrorCode::Locked, Some(way)));
        let told = not_served(&record, ApiError::new(ErrorCode::Locked, "").with_hint("unlock it"));
        assert_eq!(told.hint.unwrap(), format!("unlock it; then {way}"));
    }

    #[test]
    fn an_image_that_is_written_before_the_record_is_saved_is_not_believed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vm1.qcow2");
        std::fs::write(&path, "as its server left it").unwrap();
        let stamp = ImageStamp::of(&path);
        let receiver = "unix:/run/r.sock".parse().unwrap();
        let record = DiskRecord::new("vm1".parse().unwrap(), path.display().to_string(), receiver);
        let history = HistoryId::random();
        let welcome = Welcome {
            version: PROTOCOL_VERSION,
            history,
            state: ReceiverState::Known,
            durable: Lsn(7),
            highest: Lsn(7),
            position: LogPosition::default(),
            in_pass: false,
            last_time: None,
            last_attach: None,
        };
        let source = SourcePoint {
            receiver: "unix:/run/r.sock".to_owned(),
            disk: DiskId::random(),
            name: record.name.clone(),
            history,
            lsn: Lsn(7),
            time: CaptureTime(7),
            size: ByteCount(1 << 20),
        };
        let (missing, newer) = (DirtyBitmap::new(), DirtyBitmap::new());
        let attach = Uuid::new_v4();
        let taken =
            TakenOver { attach, welcome, source, missing, newer, image: None, before: Before::Nothing };
        std::fs::write(&path, "as somebody else wrote it").unwrap();
        let records = Records::new(Arc::new(MemoryStorage::new()));
        let made = Made { inode: stamp.as_ref().unwrap().inode, stamp: stamp.clone() };
        let begun =
            begin(&records, record, taken, made).unwrap_or_else(|unfinished| panic!("{}", unfinished.error));
        assert_eq!(begun.image_at_detach, stamp);
        assert_eq!(
            begun.attaches,
            Some(vec![attach]),
            "the receiver has it from the attach that took it over"
        );
        let (left, now) = (records.load_tracking(&begun.name), ImageStamp::of(&path));
        let resumed = trust::resume(&begun, left, now.as_ref(), ByteCount(1 << 20));
        assert!(matches!(resumed, Resume::Lost { .. }), "{resumed:?}");
    }
}
