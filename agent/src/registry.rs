//! The agent's disks: attached ones with their threads, and the names of all it remembers.
//!
//! Invariant: the name of a disk that is being attached or detached is claimed, so it is never
//! attached twice; every other disk goes on meanwhile, whatever that one waits for.

mod claimed;
mod detach;
mod errors;
mod failback;
mod failover;
mod image;
mod leave;
mod left;
mod origin;
mod place;
mod resize;
mod restore;
mod rewind;
mod room;
mod unlocked;

use std::{
    collections::BTreeMap,
    path::Path,
    sync::{Arc, Mutex},
    time::Duration,
};

use backtide_agent_api::{AttachRequest, CacheMode, DiskStatus, ImageFormat, Limits, StreamTls};
use backtide_control::{Address, ApiError, ErrorCode};
use backtide_export::{Directory, NbdAddress, NbdRule, NbdUri};
use backtide_socket::Sockets;
use backtide_units::{ByteCount, DiskId, DiskName};
use tokio::{
    sync::{RwLock, Semaphore},
    task::AbortHandle,
};

pub(crate) use self::{errors::refuse_taken_away, origin::fetch_error};
use self::{
    errors::{failed, refuse_adopted, refuse_fenced, refuse_implausible, refuse_other_format},
    left::Left,
    place::Place,
};
use crate::{
    claims::{Claim, Claimed, Claims, Identity, Standing},
    config::{Config, IoEngine, Places},
    disk::{
        self, DiskHandle, InPlace, Opened, PollSeats,
        source::{Remote, Sources},
    },
    qcow2::{Access, Qcow2Server, format_of},
    record::{DiskRecord, ImageStamp, Records},
};

/// All disks of an agent.
pub(crate) struct Registry {
    places: Places,
    records: Records,
    defaults: Limits,
    nbd_rule: NbdRule,
    local_io: LocalIo,
    stream_tls: Option<StreamTls>,
    nbd_limits: backtide_export::Limits,
    disks: RwLock<BTreeMap<DiskName, Attached>>,
    /// Held by whoever attaches or detaches, for the name he changes.
    claims: Arc<Claims>,
    /// Where missing blocks come from.
    sources: Arc<dyn Sources>,
    /// The disks' listening sockets.
    sockets: Sockets,
    /// What the socket offers that all of them share.
    directory: Directory,
    /// Disks opened at once at the start.
    opening: Semaphore,
    /// Disks that could not be attached again, as the status tells of them.
    failing: RwLock<BTreeMap<DiskName, DiskStatus>>,
    /// What goes on trying to attach disks that a resize left detached, each with this registry.
    restoring: Mutex<Vec<AbortHandle>>,
}

/// Disks opened at once at the start of the agent: each syncs some small files.
const OPENING_MAX: usize = 16;

/// How long whoever attaches or detaches waits for another change of the same disk.
const CLAIM_TIME: Duration = Duration::from_secs(10);

/// How long an image may be locked by an agent that is dying: what it had in flight is completed, or
/// cancelled, before the kernel gives up its lock.
const PREDECESSOR_TIME: Duration = Duration::from_secs(2);

/// How long an image may be another's that a disk is to have.
const fn patience_of(standing: Standing) -> Duration {
    match standing {
        Standing::New => Duration::ZERO,
        Standing::Had => PREDECESSOR_TIME,
    }
}

/// How often its lock is looked at.
const PREDECESSOR_POLL: Duration = Duration::from_millis(5);

/// How disks' images are read and written.
#[derive(Clone, Debug, Default)]
pub(crate) struct LocalIo {
    /// Of disks that do not say.
    pub(crate) cache: CacheMode,
    pub(crate) engine: IoEngine,
    poll_seats: Arc<PollSeats>,
}

struct Attached {
    uuid: DiskId,
    handle: DiskHandle,
    qcow2: Option<Qcow2Server>,
    /// With direct I/O, what its size has to be a multiple of, in bytes.
    direct_block: Option<u32>,
    /// Of the image's file, where it has one.
    place: Option<Place>,
    /// Whether single blocks of it can be written.
    takes_blocks: bool,
}

impl Registry {
    pub(crate) fn new(
        config: &Config,
        records: Records,
        sockets: Sockets,
        directory: Directory,
    ) -> Arc<Self> {
        Arc::new(Self {
            places: Places::of(config),
            records,
            defaults: config.limits.or(Limits::default()),
            nbd_rule: config.nbd_rule(),
            stream_tls: config.stream_tls.clone(),
            nbd_limits: config.nbd,
            local_io: LocalIo {
                cache: config.cache,
                engine: config.io_engine,
                poll_seats: PollSeats::new(Duration::from_micros(config.poll_max_us.into())),
            },
            disks: RwLock::default(),
            claims: Arc::default(),
            sources: Arc::new(Remote),
            sockets,
            directory,
            opening: Semaphore::new(OPENING_MAX),
            failing: RwLock::default(),
            restoring: Mutex::default(),
        })
    }

    /// Where missing blocks and mounted points come from.
    pub(crate) fn sources(&self) -> Arc<dyn Sources> {
        Arc::clone(&self.sources)
    }

    /// The receiver of a disk this agent knows, and what its certificates are; without such a disk the latter
    /// are the agent's.
    pub(crate) async fn receiver_of(
        &self,
        disk: DiskId,
    ) -> Result<(Option<Address>, Option<StreamTls>), ApiError> {
        let known = self.records.load_all_aside().await.map_err(|error| failed(&error))?;
        let known = known.known.into_iter().find(|record| record.uuid == disk);
        let tls = known.as_ref().and_then(|record| record.stream_tls.clone());
        Ok((known.map(|record| record.receiver), tls.or_else(|| self.stream_tls.clone())))
    }

    pub(crate) async fn handles(&self) -> Vec<DiskHandle> {
        self.disks.read().await.values().map(|attached| attached.handle.clone()).collect()
    }

    /// Disks that the agent goes on trying to attach again.
    pub(crate) async fn failing(&self) -> Vec<DiskStatus> {
        self.failing.read().await.values().cloned().collect()
    }

    /// A disk that a test plays.
    #[cfg(test)]
    pub(crate) async fn insert(&self, name: DiskName, handle: DiskHandle) {
        let (uuid, place) = (DiskId::random(), None);
        let attached = Attached { uuid, handle, qcow2: None, direct_block: None, takes_blocks: true, place };
        self.disks.write().await.insert(name, attached);
    }

    /// The disk of this name or UUID.
    pub(crate) async fn find(&self, name: &DiskName) -> Result<(DiskName, DiskHandle), ApiError> {
        let disks = self.disks.read().await;
        if let Some(attached) = disks.get(name) {
            return Ok((name.clone(), attached.handle.clone()));
        }
        let of_uuid = disks.iter().find(|(_, attached)| attached.uuid.to_string() == name.as_str());
        if let Some((known, attached)) = of_uuid {
            return Ok((known.clone(), attached.handle.clone()));
        }
        let names: Vec<&str> = disks.keys().map(DiskName::as_str).collect();
        let known = if names.is_empty() {
            "none is attached".to_owned()
        } else {
            format!("attached: {}", names.join(", "))
        };
        Err(ApiError::new(ErrorCode::NotFound, format!("there is no disk {name}")).with_hint(known))
    }

    pub(crate) async fn attach(&self, request: AttachRequest) -> Result<DiskStatus, ApiError> {
        request.limits.check().map_err(|why| ApiError::new(ErrorCode::Usage, why))?;
        disk::check_tls(&request.receiver, request.stream_tls.as_ref().or(self.stream_tls.as_ref())).await?;
        let claim = self.claim(&request.name).await?;
        if self.disks.read().await.contains_key(&request.name) {
            let message = format!("disk {} is attached already", request.name);
            return Err(
                ApiError::new(ErrorCode::Exists, message).with_hint("detach it first, or use another name")
            );
        }
        let known = self.records.load_aside(&request.name).await.map_err(|error| {
            let hint = "then attach with --adopt: that continues its history";
            self.unreadable(&error, hint)
        })?;
        let (records, asked) = (self.records.clone(), request.clone());
        let known = waiting(move || origin::begun(&records, &asked, known)).await??;
        refuse_adopted(&request, known.as_ref())?;
        refuse_implausible(&request.name, request.adopt.as_ref())?;
        refuse_fenced(&request, known.as_ref())?;
        refuse_other_format(&request, known.as_ref()).await?;
        // From before anything of it is made: another disk may be about to begin in it.
        let format = request.format.or_else(|| known.as_ref().and_then(|record| record.format));
        self.take_image(&request.name, &request.image, format, Standing::New).await?;
        let name = request.name.clone();
        let attached = self.attach_claimed(&claim, request, known).await;
        if !self.disks.read().await.contains_key(&name) {
            self.leave_image(&name).await;
        }
        attached
    }

    /// Attaches a disk whose name and image are claimed.
    async fn attach_claimed(
        &self,
        claim: &Claim,
        request: AttachRequest,
        known: Option<DiskRecord>,
    ) -> Result<DiskStatus, ApiError> {
        // One that is adopted begins another life.
        let waits = known.clone().filter(|record| record.attached && request.adopt.is_none());
        let (from, failover) = (request.from, request.adopt.filter(|_| request.failover));
        let (record, takes_over) = (self.record_for(request, known), failover.is_some());
        let record = match (from, failover) {
            (Some(from), _) => self.begin_from(record, from).await?,
            (None, Some(adopted)) => self.begin_failover(record, adopted).await?,
            (None, None) => record,
        };
        let name = record.name.clone();
        let handle = match self.start(claim, record.clone(), Standing::New).await {
            Ok(handle) => handle,
            Err(error) => {
                let error = if takes_over { failover::not_served(&record, error) } else { error };
                match waits {
                    Some(as_it_was) => self.go_on_waiting(as_it_was).await,
                    None => self.forget_attached(&name).await,
                }
                return Err(error);
            }
        };
        handle.status().await.map_err(|error| failed(&error))
    }

    async fn claim(&self, name: &DiskName) -> Result<Claim, ApiError> {
        self.claims.claim(name, CLAIM_TIME).await.map_err(|claimed| {
            let message = match claimed {
                Claimed::Changing => format!("disk {name} cannot be changed now: {claimed}"),
                Claimed::Closed => claimed.to_string(),
            };
            ApiError::new(ErrorCode::Busy, message)
        })
    }

    /// The record of an attach: what is asked for now, on top of what the disk's life so far is.
    fn record_for(&self, request: AttachRequest, known: Option<DiskRecord>) -> DiskRecord {
        let AttachRequest {
            name,
            image,
            receiver,
            nbd,
            ack,
            on_outage,
            cache,
            limits,
            stream_tls,
            adopt,
            from: _,
            failover: _,
            take_over,
            format,
        } = request;
        let fresh = || DiskRecord::new(name.clone(), image.clone(), receiver.clone());
        let mut record = match adopt {
            Some(adopted) => DiskRecord::adopted(fresh(), adopted),
            None => known.unwrap_or_else(fresh),
        };
        if record.image != image {
            // Another place may hold another content: what was saved is about the old one.
            record.image_at_detach = None;
            record.image_changed = true;
        }
        DiskRecord {
            image,
            receiver,
            stream_tls,
            nbd,
            // What was promised to the guest is not given up by saying nothing of it.
            ack: ack.unwrap_or(record.ack),
            on_outage: on_outage.unwrap_or(record.on_outage),
            cache: cache.unwrap_or(self.local_io.cache),
            limits: limits.or(self.defaults),
            paused: false,
            take_over,
            format: format.or(record.format),
            ..record
        }
    }

    /// Attaches the disk of a record whose name is claimed; with patience for a predecessor, which may still have the
    /// image that the disk had.
    async fn start(
        &self,
        claim: &Claim,
        record: DiskRecord,
        standing: Standing,
    ) -> Result<DiskHandle, ApiError> {
        let name = record.name.clone();
        assert!(claim.is_of(&name), "whoever attaches {name} has claimed it");
        let behind = self.take_image(&name, &record.image, record.format, standing).await?;
        let data_files = behind.into_iter().filter(|behind| behind.is_written).map(|behind| behind.path);
        let record = DiskRecord { data_files: data_files.collect(), ..record };
        let started = self.start_on(record, patience_of(standing)).await;
        if started.is_err() {
            self.leave_image(&name).await;
        }
        started
    }

    async fn start_on(&self, record: DiskRecord, patience: Duration) -> Result<DiskHandle, ApiError> {
        let name = record.name.clone();
        let nbd = self.listen_uri(&record)?;
        let known = record.clone();
        // The stamp before qemu-nbd opens it, which writes it already.
        let look =
            move || (Identity::of(&known.image), known.stamp_now(), format_of(&known.image, known.format));
        let (identity, stamp, format) = waiting(look).await?;
        let record = DiskRecord { format, ..record };
        let qcow2 = match format {
            Some(ImageFormat::Qcow2) => Some(
                Qcow2Server::start(
                    Path::new(&record.image),
                    &name,
                    self.places.qcow2_socket(&name),
                    record.cache,
                    Access::Disk,
                )
                .await
                .map_err(|error| ApiError::from_error(ErrorCode::Failed, &error))?,
            ),
            Some(ImageFormat::Raw) | None => None,
        };
        let stopped = record.stopped;
        let behind = qcow2.as_ref().map_or(record.image.clone(), |server| server.uri().to_owned());
        let (record, mut opened) = self.open(record, behind, stamp.clone(), patience).await?;
        opened.io_engine = self.local_io.engine;
        if opened.behind.uses_page_cache() {
            opened.poll_seats = Arc::clone(&self.local_io.poll_seats);
        }
        opened.tls = record.stream_tls.clone().or_else(|| self.stream_tls.clone());
        opened.nbd = self.nbd_limits;
        // Of a qcow2 file the length says nothing about the disk.
        let bytes_min = if qcow2.is_some() { ByteCount::ZERO } else { opened.record.size };
        let in_place = InPlace::new(&opened.record.image, identity, bytes_min);
        opened.in_place = in_place.map(|image| image.with_data(opened.record.data_files.clone()));
        opened.beside = self.claims.beside(&name);
        let in_place = opened.in_place.clone();
        let resume = opened.resume.clone();
        let (direct_block, takes_blocks) = (opened.behind.direct_block(), opened.behind.takes_blocks());
        let entrance = disk::Entrance { nbd, sockets: self.sockets.clone(), shared: self.directory.clone() };
        match disk::start(opened, self.records.clone(), entrance).await {
            Ok(handle) => {
                // Known from now on, also when the disk stands still one day.
                let _ = handle.status().await;
                let (uuid, of_disk, place) = (record.uuid, handle.clone(), in_place.map(Place::new));
                let attached = Attached { uuid, handle: of_disk, qcow2, direct_block, takes_blocks, place };
                self.disks.write().await.insert(name.clone(), attached);
                // In this order: whoever asks meanwhile finds it here or there.
                self.failing.write().await.remove(&name);
                Ok(handle)
            }
            Err(error) => {
                // What a qcow2's server writes when it starts and ends is no change of the disk.
                let left = Left::end(qcow2, in_place).await;
                if let Some(error) = left.still_open() {
                    tracing::error!(disk = %name, %error, "the disk's qcow2 file is still open");
                }
                let mut as_left = DiskRecord { image_at_detach: stamp, stopped, ..record };
                left.note(&mut as_left);
                self.put_back(as_left, &resume).await;
                Err(disk::start_error(&error))
            }
        }
    }

    /// Opens the disk behind where it may wait for its storage: on no thread that others need.
    async fn open(
        &self,
        record: DiskRecord,
        behind: String,
        stamp: Option<ImageStamp>,
        patience: Duration,
    ) -> Result<(DiskRecord, Opened), ApiError> {
        let open = || {
            let (records, record, behind, stamp) =
                (self.records.clone(), record.clone(), behind.clone(), stamp.clone());
            let sources = Arc::clone(&self.sources);
            let runtime = tokio::runtime::Handle::current();
            waiting(move || {
                let opened = runtime.block_on(disk::open(&records, record, &behind, stamp, &sources));
                opened.map_err(Box::new)
            })
        };
        unlocked::opened(patience, open).await
    }

    /// Refuses a relative place, and one at which other machines would be served in the clear.
    pub(crate) fn check_place(&self, nbd: Option<&NbdUri>) -> Result<(), ApiError> {
        let checked = nbd.map_or(Ok(()), |uri| self.nbd_rule.check(uri));
        checked.map_err(|error| {
            let code = if error.is_open() { ErrorCode::Refused } else { ErrorCode::Usage };
            ApiError::from_error(code, &error)
        })
    }

    fn listen_uri(&self, record: &DiskRecord) -> Result<NbdUri, ApiError> {
        let uri = match &record.nbd {
            Some(text) => text.parse().map_err(|error: backtide_export::ParseUriError| {
                ApiError::from_error(ErrorCode::Usage, &error)
            })?,
            None => {
                let address = NbdAddress::Unix(self.places.nbd_socket(&record.name));
                NbdUri { address, export: record.name.to_string(), tls: None }
            }
        };
        // What may be served so, and with which TLS, may be another than when the disk was attached.
        self.nbd_rule.check_open(&uri).map_err(|error| ApiError::from_error(ErrorCode::Refused, &error))?;
        Ok(match &self.nbd_rule.tls {
            Some(tls) => tls.unless_told(uri),
            None => uri,
        })
    }
}

/// Does what may wait for storage, which may stand still for ever: on no thread that others need.
async fn waiting<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, ApiError> {
    tokio::task::spawn_blocking(work).await.map_err(|error| failed(&error))
}

#[cfg(test)]
mod tests;
