//! What the agent remembers of a disk between attaches: a record in JSON, and the tracking file.
//!
//! Invariants: the record with the new epoch is durable, and before it the tracking file of the new
//! attach, before an attach lets its first write through; the LSN bound in the record is durable
//! before an LSN above it leaves this agent. So no LSN that anybody has seen is given twice, and a tracking file says at least
//! what its record needs.

mod aside;
mod reserve;
mod room;
mod stamp;

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use backtide_agent_api::{
    AckPolicy, Adopted, CacheMode, ImageFormat, Limits, OnOutage, Origin, Rewound, StreamTls,
};
use backtide_control::Address;
use backtide_hydration::{Header, HydrationError, HydrationFile};
use backtide_io_filter::Filter;
use backtide_storage::{Storage, read_file, replace_file};
use backtide_tracking::{ActivityLimits, DirtyBitmap, LoadError, Loaded, Snapshot, TrackingFile};
use backtide_units::{ByteCount, CaptureTime, DiskId, DiskName, Epoch, HistoryId, Lsn};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

pub(crate) use self::stamp::ImageStamp;
use crate::{disk::Clientele, spill::SpillPlace};

/// The version of the record's JSON.
const VERSION: u32 = 1;

/// No record is longer than this.
const RECORD_BYTES_MAX: ByteCount = ByteCount(1 << 20);

/// Attaches in a row that no receiver admitted. Of more the first is forgotten, and everything is compared should the
/// receiver name that.
const ATTACHES_MAX: usize = 64;

/// How far ahead of the last LSN the durable bound lies.
pub(crate) const LSN_STEP: u64 = 1 << 24;

/// Far above what a disk can come to, far below what numbers end at.
const LSN_BOUND_MAX: Lsn = Lsn(1 << 63);

/// One disk.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct DiskRecord {
    pub(crate) version: u32,
    pub(crate) name: DiskName,
    pub(crate) uuid: DiskId,
    /// Path or NBD URI of the disk behind.
    pub(crate) image: String,
    pub(crate) receiver: Address,
    /// TLS of the stream, where the attach named certificates.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) stream_tls: Option<StreamTls>,
    /// The NBD listen URI asked for, if one was.
    pub(crate) nbd: Option<String>,
    pub(crate) ack: AckPolicy,
    pub(crate) on_outage: OnOutage,
    #[serde(default)]
    pub(crate) cache: CacheMode,
    pub(crate) limits: Limits,
    /// Whether the agent attaches it when it starts.
    pub(crate) attached: bool,
    /// Whether a person paused it.
    pub(crate) paused: bool,
    /// The last attach.
    pub(crate) epoch: Epoch,
    /// Its history at the receiver, once known.
    pub(crate) history: Option<HistoryId>,
    /// No LSN above it has left this agent.
    pub(crate) lsn_bound: Lsn,
    /// The receiver acknowledged at least this much as durable.
    pub(crate) acked_durable: Lsn,
    /// The last capture time given, as of when the record was saved.
    #[serde(default)]
    pub(crate) last_time: CaptureTime,
    /// `last_time` is that of the last sign of life of an attach that was killed, or is older, and no receiver was heard
    /// since: it may have more.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) last_time_is_early: bool,
    /// The attach that a receiver admitted last, and those since; none where that is not known. See
    /// [`follows`](backtide_io_filter::Filter::follows).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) attaches: Option<Vec<Uuid>>,
    /// What the image looked like after the last clean detach; none where that cannot be told.
    pub(crate) image_at_detach: Option<ImageStamp>,
    /// The agent ended in good order with the disk attached, which nobody else is to write then.
    #[serde(default)]
    pub(crate) stopped: bool,
    /// The disk's size at the last attach; zero before the first.
    #[serde(default)]
    pub(crate) size: ByteCount,
    /// The disk behind is named otherwise than at the last attach: what the guest wrote need not be there.
    #[serde(default)]
    pub(crate) image_changed: bool,
    /// The disk behind was not in its place when the agent last looked: nor then. It may be back.
    #[serde(default)]
    pub(crate) image_displaced: bool,
    /// Somebody else may have written the image while the agent had it, and not everything was compared since.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) written_past_agent: bool,
    /// The receiver has refused the last attach: a later one, which this state knows nothing of, has had the disk.
    #[serde(default)]
    pub(crate) fenced: bool,
    /// With `fenced`: the last attach before, of which the receiver may know. `epoch` is as high as that of whoever has had the
    /// disk since.
    #[serde(default)]
    pub(crate) own_epoch: Epoch,
    /// Somebody wants this attach to have a disk that is fenced; of this attach only.
    #[serde(skip)]
    pub(crate) take_over: bool,
    /// What the image is, since the first attach: whatever a guest writes into a raw one, it stays raw. None of an NBD
    /// disk, and before the first attach.
    #[serde(default)]
    pub(crate) format: Option<ImageFormat>,
    /// The files besides `image` that have the disk's content, as a qcow2 file's external data file has: what is written there
    /// changes no time of the image. As the image named them at the last attach; it is written when it names others.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) data_files: Vec<PathBuf>,
    /// A flush of the disk behind failed and no guest was told: the next that flushes is.
    #[serde(default)]
    pub(crate) flush_failed: bool,
    /// The point of another disk that it began as.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) origin: Option<Origin>,
    /// The last rewind that changed anything.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) rewound: Option<Rewound>,
    /// Who has the disk open, or had it when its service was interrupted, and may come back.
    #[serde(default, skip_serializing_if = "Clientele::is_empty", deserialize_with = "Clientele::or_nobody")]
    pub(crate) clientele: Clientele,
}

/// What is known of all disks.
#[derive(Debug, Default)]
pub(crate) struct AllRecords {
    pub(crate) known: Vec<DiskRecord>,
    /// Disks of which nothing is known for the moment, and why.
    pub(crate) unreadable: Vec<(DiskName, io::Error)>,
}

/// All records of an agent.
#[derive(Clone)]
pub(crate) struct Records {
    storage: Arc<dyn Storage>,
    spill: Option<SpillPlace>,
}

impl DiskRecord {
    /// From now on the disk is anybody's: it is not attached again by itself, that the agent ended in good order with it says
    /// nothing any more, and nobody is expected back.
    pub(crate) fn given_up(self) -> Self {
        Self { attached: false, stopped: false, clientele: Clientele::default(), ..self }
    }

    pub(crate) fn new(name: DiskName, image: String, receiver: Address) -> Self {
        Self {
            version: VERSION,
            name,
            uuid: DiskId::random(),
            image,
            receiver,
            stream_tls: None,
            nbd: None,
            ack: AckPolicy::default(),
            on_outage: OnOutage::default(),
            cache: CacheMode::default(),
            limits: Limits::default(),
            attached: false,
            paused: false,
            epoch: Epoch(0),
            history: None,
            lsn_bound: Lsn::ZERO,
            acked_durable: Lsn::ZERO,
            last_time: CaptureTime::default(),
            last_time_is_early: false,
            attaches: None,
            image_at_detach: None,
            stopped: false,
            size: ByteCount::ZERO,
            image_changed: false,
            image_displaced: false,
            written_past_agent: false,
            format: None,
            data_files: Vec::new(),
            fenced: false,
            own_epoch: Epoch(0),
            take_over: false,
            flush_failed: false,
            origin: None,
            rewound: None,
            clientele: Clientele::default(),
        }
    }
}

impl DiskRecord {
    /// What there is to tell of a disk whose record cannot be read.
    pub(crate) fn unknown(name: DiskName) -> Self {
        let receiver = Address::unix("/unknown");
        Self { uuid: DiskId(Uuid::nil()), ..Self::new(name, String::new(), receiver) }
    }

    /// The record of a disk whose history another agent, or this one before it lost its state, has
    /// made: as after a crash, nothing is known of what differs, nor of what was written since the log's end, for which an LSN is
    /// left out. The disk changes hands, so that whoever had it before can tell.
    pub(crate) fn adopted(fresh: Self, adopted: Adopted) -> Self {
        let Adopted { uuid, history, epoch, durable, last_time } = adopted;
        Self {
            uuid,
            epoch: epoch.taken_over(),
            history: Some(history),
            lsn_bound: durable.next(),
            acked_durable: durable,
            last_time: last_time.unwrap_or_default(),
            ..fresh
        }
    }
}

impl DiskRecord {
    /// Another agent has had the disk since, with this epoch.
    pub(crate) fn fence(&mut self, by: Epoch) {
        if !self.fenced {
            // An attach with the same epoch was that of another agent with a copy of this one's state.
            let before = Epoch(by.0.saturating_sub(1));
            (self.fenced, self.own_epoch) = (true, self.epoch.min(before));
        }
        self.epoch = self.epoch.max(by);
    }

    /// The same life with what was asked for at an earlier attach.
    pub(crate) fn on_terms_of(self, earlier: Self) -> Self {
        let same_image = self.image == earlier.image;
        let Self { image, receiver, stream_tls, nbd, ack, on_outage, cache, limits, paused, format, .. } =
            earlier;
        Self {
            // What is saved by now is about the other image.
            image_changed: self.image_changed || !same_image,
            size: if same_image { self.size } else { earlier.size },
            image,
            receiver,
            stream_tls,
            nbd,
            ack,
            on_outage,
            cache,
            limits,
            paused,
            format,
            ..self
        }
    }

    /// How its image looks now.
    pub(crate) fn stamp_now(&self) -> Option<ImageStamp> {
        ImageStamp::with(Path::new(&self.image), &self.data_files)
    }

    /// Whether what the tracking file says is from the end of a clean detach, or of the agent with the disk attached.
    pub(crate) fn ended_cleanly(&self, left: &Loaded) -> bool {
        left.clean && (self.stopped || self.image_at_detach.is_some())
    }

    /// An attach begins that the receiver may hear of.
    pub(crate) fn note_attach(&mut self, attach: Uuid) {
        if let Some(attaches) = &mut self.attaches {
            attaches.push(attach);
            // The first is the one that the receiver has heard of for certain.
            while attaches.len() > ATTACHES_MAX {
                attaches.remove(1);
            }
        }
    }

    /// What the filter has heard of the receiver.
    pub(crate) fn note_welcome(&mut self, filter: &Filter) {
        if filter.was_welcomed() {
            self.attaches = filter.attaches().map(<[Uuid]>::to_vec);
            self.last_time_is_early = false;
        }
    }

    /// The last attach by which this agent had the disk for itself.
    pub(crate) fn last_own_epoch(&self) -> Epoch {
        if self.fenced { self.own_epoch } else { self.epoch }
    }
}

impl Records {
    pub(crate) fn new(storage: Arc<dyn Storage>) -> Self {
        Self { storage, spill: None }
    }

    /// The same with a place for spills.
    pub(crate) fn with_spill(self, spill: Option<SpillPlace>) -> Self {
        Self { spill, ..self }
    }

    /// Where spills are, if anywhere.
    pub(crate) fn spill(&self) -> Option<&SpillPlace> {
        self.spill.as_ref()
    }

    /// Where the records are, for people.
    pub(crate) fn directory(&self) -> PathBuf {
        self.storage.display(Path::new(""))
    }

    /// Where a disk's tracking file is, for people.
    pub(crate) fn tracking_file(&self, disk: &DiskName) -> PathBuf {
        self.storage.display(&tracking_path(disk))
    }

    /// Every record, by name.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub(crate) fn load_all(&self) -> io::Result<AllRecords> {
        let names = self.storage.list(&PathBuf::new())?;
        let mut all = AllRecords::default();
        for name in names {
            let Some(disk) = name.strip_suffix(".json").and_then(|stem| stem.parse().ok()) else { continue };
            match self.load(&disk) {
                Ok(record) => all.known.extend(record),
                // The other disks are protected all the same.
                Err(error) => {
                    tracing::error!(%disk, %error, "cannot use the disk's record");
                    all.unreadable.push((disk, error));
                }
            }
        }
        Ok(all)
    }

    /// The record of one disk, if there is one.
    pub(crate) fn load(&self, disk: &DiskName) -> io::Result<Option<DiskRecord>> {
        let path = record_path(disk);
        let bytes = match read_file(&*self.storage, &path, RECORD_BYTES_MAX) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let shown = self.storage.display(&path);
        let invalid = |why: String| {
            let why = format!("the record {} is damaged: {why}", shown.display());
            io::Error::new(io::ErrorKind::InvalidData, why)
        };
        let version: serde_json::Value =
            serde_json::from_slice(&bytes).map_err(|error| invalid(error.to_string()))?;
        match version.get("version").and_then(serde_json::Value::as_u64) {
            Some(found) if found == u64::from(VERSION) => {}
            Some(found) => {
                let why = format!(
                    "the record {} is of version {found}, and this program knows version {VERSION} only",
                    shown.display()
                );
                return Err(io::Error::new(io::ErrorKind::Unsupported, why));
            }
            None => return Err(invalid("it has no version".to_owned())),
        }
        let mut record: DiskRecord =
            serde_json::from_value(version).map_err(|error| invalid(error.to_string()))?;
        if record.lsn_bound > LSN_BOUND_MAX {
            return Err(invalid(format!("no disk has come to LSN {}", record.lsn_bound)));
        }
        // No attach is asked for that: the guest would wait for no receiver, whatever its policy promises.
        if record.limits.outage_after_ms == 0 {
            record.limits.outage_after_ms = Limits::default().outage_after_ms;
        }
        Ok(Some(record))
    }

    /// Makes the record durable.
    pub(crate) fn save(&self, record: &DiskRecord) -> io::Result<()> {
        let bytes = serde_json::to_vec_pretty(record)?;
        replace_file(&*self.storage, &record_path(&record.name), &bytes)
    }

    /// What the disk's tracking file says; none when there is none.
    pub(crate) fn load_tracking(&self, disk: &DiskName) -> Result<Option<Loaded>, LoadError> {
        Loaded::from_file(&*self.storage, &tracking_path(disk))
    }

    /// Puts a new tracking file in place, durably.
    pub(crate) fn create_tracking(
        &self,
        disk: &DiskName,
        limits: ActivityLimits,
        size: ByteCount,
        snapshot: &Snapshot,
    ) -> io::Result<TrackingFile> {
        TrackingFile::create(&*self.storage, &tracking_path(disk), limits, size, snapshot)
    }

    /// The same for a file that could not be written, with room for what comes first.
    pub(crate) fn begin_tracking_anew(
        &self,
        disk: &DiskName,
        limits: ActivityLimits,
        size: ByteCount,
        snapshot: &Snapshot,
    ) -> io::Result<TrackingFile> {
        TrackingFile::create_with_room(&*self.storage, &tracking_path(disk), limits, size, snapshot)
    }

    /// What the disk lacks, if its hydration file is there, in the boot `boot` of the host.
    pub(crate) fn open_hydration(
        &self,
        disk: &DiskName,
        boot: Uuid,
    ) -> Result<Option<HydrationFile>, HydrationError> {
        HydrationFile::open(Arc::clone(&self.storage), &hydration_path(disk), boot)
    }

    /// Makes durable which files there are: one that was put in place may not be.
    pub(crate) fn sync_names(&self) -> io::Result<()> {
        self.storage.sync_dir(&PathBuf::new())
    }

    /// From when this has succeeded the disk lacks `missing`.
    pub(crate) fn create_hydration(
        &self,
        disk: &DiskName,
        header: Header,
        missing: DirtyBitmap,
    ) -> io::Result<()> {
        HydrationFile::create(Arc::clone(&self.storage), &hydration_path(disk), header, missing).map(drop)
    }

    /// Removes what says that the disk lacks blocks, durably: for whoever knows that its image is as before.
    pub(crate) fn discard_hydration(&self, disk: &DiskName) -> io::Result<()> {
        match self.storage.remove(&hydration_path(disk)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            Ok(()) | Err(_) => {}
        }
        self.sync_names()
    }

    /// Removes the tracking file, durably: everything will be compared. Where somebody has removed the
    /// whole state directory there is nothing left to remove.
    pub(crate) fn discard_tracking(&self, disk: &DiskName) -> io::Result<()> {
        let gone = |error: &io::Error| error.kind() == io::ErrorKind::NotFound;
        match self.storage.remove(&tracking_path(disk)) {
            Err(error) if !gone(&error) => return Err(error),
            Ok(()) | Err(_) => {}
        }
        match self.storage.sync_dir(&PathBuf::new()) {
            Err(error) if gone(&error) => Ok(()),
            result => result,
        }
    }
}

fn record_path(disk: &DiskName) -> PathBuf {
    PathBuf::from(format!("{disk}.json"))
}

fn hydration_path(disk: &DiskName) -> PathBuf {
    PathBuf::from(format!("{disk}.hydration"))
}

fn tracking_path(disk: &DiskName) -> PathBuf {
    PathBuf::from(format!("{disk}.tracking"))
}

#[cfg(test)]
mod hostile;

#[cfg(test)]
mod tests;
