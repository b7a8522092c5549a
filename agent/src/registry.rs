//! The agent's disks: attached ones with their threads, and the names of all it remembers.
//!
//! Invariant: attaches and detaches of one agent happen one after the other, so a name is never
//! attached twice; everything else goes on meanwhile.

use std::{collections::BTreeMap, path::Path, sync::Arc, time::Duration};

use backtide_agent_api::{AttachRequest, CacheMode, DiskStatus, Limits};
use backtide_control::{ApiError, ErrorCode};
use backtide_export::{NbdAddress, NbdTls, NbdUri};
use backtide_io_filter::Resume;
use backtide_tracking::Snapshot;
use backtide_units::DiskName;
use tokio::sync::{Mutex, RwLock};

use crate::{
    config::{IoEngine, Places},
    disk::{self, Command, DiskHandle, OpenError},
    qcow2::{Qcow2Server, is_qcow2},
    record::{DiskRecord, ImageStamp, Records},
};

/// All disks of an agent.
pub(crate) struct Registry {
    places: Places,
    records: Records,
    defaults: Limits,
    nbd_tls: Option<NbdTls>,
    local_io: LocalIo,
    disks: RwLock<BTreeMap<DiskName, Attached>>,
    /// Held by whoever attaches or detaches.
    changing: Mutex<()>,
    /// Disks that could not be attached again, as the status tells of them.
    failing: RwLock<BTreeMap<DiskName, DiskStatus>>,
}

/// How long after a failed start of the agent's disks the next attempt is made.
const RESTORE_AGAIN: Duration = Duration::from_secs(5);

/// How disks' images are read and written.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct LocalIo {
    /// Of disks that do not say.
    pub(crate) cache: CacheMode,
    pub(crate) engine: IoEngine,
}

struct Attached {
    handle: DiskHandle,
    qcow2: Option<Qcow2Server>,
}

impl Registry {
    pub(crate) fn new(
        places: Places,
        records: Records,
        defaults: Limits,
        nbd_tls: Option<NbdTls>,
        local_io: LocalIo,
    ) -> Arc<Self> {
        Arc::new(Self {
            places,
            records,
            defaults,
            nbd_tls,
            local_io,
            disks: RwLock::default(),
            changing: Mutex::new(()),
            failing: RwLock::default(),
        })
    }

    /// Attaches again every disk that was attached when the agent ended. One that cannot be is
    /// logged; whether there are such, to be tried again.
    pub(crate) async fn restore(&self) -> std::io::Result<bool> {
        let mut missing = false;
        for record in self.records.load_all()?.into_iter().filter(|record| record.attached) {
            let _only = self.changing.lock().await;
            let name = record.name.clone();
            if self.disks.read().await.contains_key(&name) {
                continue;
            }
            if let Err(error) = self.start(record.clone()).await {
                missing = true;
                tracing::error!(disk = %name, error = %error.message, "cannot attach the disk again: will try again");
                let status = disk::not_attached(&record, &error.message);
                self.failing.write().await.insert(name, status);
            }
        }
        Ok(missing)
    }

    /// Goes on trying: an image may lie on a file system that is mounted late.
    pub(crate) async fn keep_restoring(self: Arc<Self>) {
        loop {
            tokio::time::sleep(RESTORE_AGAIN).await;
            match self.restore().await {
                Ok(false) => return,
                Ok(true) => {}
                Err(error) => tracing::error!(%error, "cannot read the disks' records"),
            }
        }
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
        self.disks.write().await.insert(name, Attached { handle, qcow2: None });
    }

    /// The disk of this name or UUID.
    pub(crate) async fn find(&self, name: &DiskName) -> Result<(DiskName, DiskHandle), ApiError> {
        let disks = self.disks.read().await;
        if let Some(attached) = disks.get(name) {
            return Ok((name.clone(), attached.handle.clone()));
        }
        for (other, attached) in disks.iter() {
            let known = self.records.load(other).ok().flatten();
            if known.is_some_and(|record| record.uuid.to_string() == name.as_str()) {
                return Ok((other.clone(), attached.handle.clone()));
            }
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
        let _only = self.changing.lock().await;
        if self.disks.read().await.contains_key(&request.name) {
            let message = format!("disk {} is attached already", request.name);
            return Err(
                ApiError::new(ErrorCode::Exists, message).with_hint("detach it first, or use another name")
            );
        }
        self.refuse_protected(&request).await?;
        let known = self.records.load(&request.name).map_err(|error| match error.kind() {
            std::io::ErrorKind::InvalidData => failed(&error).with_hint(format!(
                "move it out of {}, then attach with --adopt: that continues its history",
                self.records.directory().display()
            )),
            _ => failed(&error),
        })?;
        refuse_adopted(&request, known.as_ref())?;
        let record = self.record_for(request, known);
        let name = record.name.clone();
        let handle = match self.start(record).await {
            Ok(handle) => handle,
            Err(error) => {
                self.forget_attached(&name).await;
                return Err(error);
            }
        };
        handle.status().await.map_err(|error| failed(&error))
    }

    /// One image is one disk: two would write past each other.
    async fn refuse_protected(&self, request: &AttachRequest) -> Result<(), ApiError> {
        for name in self.disks.read().await.keys() {
            let record = self.records.load(name).map_err(|error| failed(&error))?;
            if record.is_some_and(|record| is_same_image(&record.image, &request.image)) {
                let message =
                    format!("{} is protected already: it is disk {name} of this agent", request.image);
                return Err(ApiError::new(ErrorCode::Locked, message)
                    .with_hint(format!("use disk {name}, or detach it first")));
            }
        }
        Ok(())
    }

    /// The record of an attach: what is asked for now, on top of what the disk's life so far is.
    fn record_for(&self, request: AttachRequest, known: Option<DiskRecord>) -> DiskRecord {
        let AttachRequest { name, image, receiver, nbd, ack, on_outage, cache, limits, adopt } = request;
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
            nbd,
            ack,
            on_outage,
            cache: cache.unwrap_or(self.local_io.cache),
            limits: limits.or(self.defaults),
            paused: false,
            ..record
        }
    }

    async fn start(&self, record: DiskRecord) -> Result<DiskHandle, ApiError> {
        let name = record.name.clone();
        let nbd = self.listen_uri(&record)?;
        let image = Path::new(&record.image);
        // Before qemu-nbd opens it, which writes it already.
        let stamp = ImageStamp::of(image);
        let qcow2 = match is_qcow2(image) {
            true => Some(
                Qcow2Server::start(image, &name, self.places.qcow2_socket(&name), record.cache)
                    .await
                    .map_err(|error| ApiError::from_error(ErrorCode::Failed, &error))?,
            ),
            false => None,
        };
        let stopped = record.stopped;
        let behind = qcow2.as_ref().map_or(record.image.clone(), |server| server.uri().to_owned());
        let (record, mut opened) = disk::open(&self.records, record, &behind, stamp.clone())
            .await
            .map_err(|error| open_error(&error))?;
        opened.io_engine = self.local_io.engine;
        let resume = opened.resume.clone();
        match disk::start(opened, self.records.clone(), nbd).await {
            Ok(handle) => {
                // Known from now on, also when the disk stands still one day.
                let _ = handle.status().await;
                self.disks.write().await.insert(name.clone(), Attached { handle: handle.clone(), qcow2 });
                // In this order: whoever asks meanwhile finds it here or there.
                self.failing.write().await.remove(&name);
                Ok(handle)
            }
            Err(error) => {
                // What a qcow2's server writes when it starts and ends is no change of the disk.
                let as_left = match qcow2 {
                    Some(server) => {
                        server.stop().await;
                        ImageStamp::of(Path::new(&record.image))
                    }
                    None => stamp,
                };
                self.put_back(DiskRecord { image_at_detach: as_left, stopped, ..record }, &resume);
                Err(disk::start_error(&error))
            }
        }
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
        Ok(match &self.nbd_tls {
            Some(tls) => tls.unless_told(uri),
            None => uri,
        })
    }

    /// Detaches a disk; its record stays, so that an attach under its name goes on.
    pub(crate) async fn detach(&self, name: &DiskName, force: bool) -> Result<DiskStatus, ApiError> {
        let _only = self.changing.lock().await;
        let (name, handle) = self.find(name).await?;
        let answer = handle.ask_at_length(|answer| Command::Detach { force, answer }).await;
        let result = match answer.map_err(|error| failed(&error)) {
            // Its thread has ended without us: what is left of it goes all the same.
            Err(ended) => Err(ended),
            Ok(Err(error @ disk::DetachError::Open { .. })) => {
                return Err(ApiError::new(ErrorCode::Busy, format!("disk {name} is in use: {error}"))
                    .with_hint("take the disk out of the virtual machine, or shut it down, then detach"));
            }
            Ok(Err(error @ disk::DetachError::Save { .. })) => Err(not_saved(&error)),
            Ok(Ok(status)) => Ok(status),
        };
        let attached = self.disks.write().await.remove(&name);
        let server = attached.and_then(|attached| attached.qcow2);
        let has_server = server.is_some();
        if let Some(server) = server {
            server.stop().await;
        }
        if let Ok(Some(mut record)) = self.records.load(&name) {
            record.attached = false;
            if has_server {
                record.image_at_detach = ImageStamp::of(Path::new(&record.image));
            }
            record.image_at_detach.take_if(|_| result.is_err());
            // What the disk's own thread could not save says more.
            if let Err(error) = self.records.save(&record)
                && result.is_ok()
            {
                let directory = self.records.directory();
                let error = disk::DetachError::Save { path: directory, source: error };
                return Err(not_saved(&error));
            }
        }
        result
    }

    /// A disk whose attach failed is not attached again at the next start.
    async fn forget_attached(&self, name: &DiskName) {
        self.failing.write().await.remove(name);
        let saved = self.records.load(name).and_then(|known| match known {
            Some(record) if record.attached => self.records.save(&DiskRecord { attached: false, ..record }),
            Some(_) | None => Ok(()),
        });
        if let Err(error) = saved {
            tracing::error!(disk = %name, %error, "cannot save the disk's record");
        }
    }

    /// Nothing was written since the tracking file was taken: it is as good as before.
    fn put_back(&self, record: DiskRecord, resume: &Resume) {
        let Resume::Clean(saved) = resume else { return };
        let snapshot = Snapshot::first(saved.clone(), true, false);
        let limits = disk::activity_limits(&record);
        let put_back = self
            .records
            .create_tracking(&record.name, limits, record.size, &snapshot)
            .and_then(|_| self.records.save(&record));
        if let Err(error) = put_back {
            tracing::error!(disk = %record.name, %error, "cannot put the tracking file back: everything will be compared");
        }
    }

    /// Ends every disk in good order, for the end of the agent: they are attached again by the next.
    pub(crate) async fn shut_down(&self) {
        let _only = self.changing.lock().await;
        let disks = std::mem::take(&mut *self.disks.write().await);
        let detaching: Vec<_> = disks
            .into_iter()
            .map(|(name, attached)| tokio::spawn(end(name, attached, self.records.clone())))
            .collect();
        for task in detaching {
            if let Err(error) = task.await {
                tracing::error!(%error, "detach");
            }
        }
    }
}

async fn end(name: DiskName, attached: Attached, records: Records) {
    let Attached { handle, qcow2 } = attached;
    match handle.ask_at_length(|answer| Command::Detach { force: true, answer }).await {
        Ok(Ok(_)) => {}
        Ok(Err(error)) => tracing::error!(disk = %name, %error, "detach"),
        Err(error) => tracing::error!(disk = %name, %error, "detach"),
    }
    let has_server = qcow2.is_some();
    if let Some(server) = qcow2 {
        server.stop().await;
    }
    let stamped = records.load(&name).and_then(|known| match known {
        Some(mut record) => {
            if has_server {
                record.image_at_detach = ImageStamp::of(Path::new(&record.image));
            }
            records.save(&DiskRecord { stopped: true, ..record })
        }
        None => Ok(()),
    });
    if let Err(error) = stamped {
        tracing::error!(disk = %name, %error, "cannot save the disk's record");
    }
}

/// Whether two images, each a path or a URI, are the same file or device.
fn is_same_image(one: &str, other: &str) -> bool {
    use std::os::unix::fs::{FileTypeExt, MetadataExt};
    let identity = |image: &str| {
        let found = std::fs::metadata(image).ok()?;
        // A device has many names, and its number is not that of the file system it is named in.
        let device = found.file_type().is_block_device();
        Some((device, if device { (found.rdev(), 0) } else { (found.dev(), found.ino()) }))
    };
    one == other || identity(one).is_some_and(|found| identity(other) == Some(found))
}

/// Only what this agent has no history of can be adopted: it would forget its own.
fn refuse_adopted(request: &AttachRequest, known: Option<&DiskRecord>) -> Result<(), ApiError> {
    let own = known.is_some_and(|record| record.history.is_some());
    if request.adopt.is_none() || !own {
        return Ok(());
    }
    let message = format!("this agent knows the history of disk {} itself", request.name);
    Err(ApiError::new(ErrorCode::Exists, message).with_hint("attach it without adopting one"))
}

fn failed(error: &dyn std::error::Error) -> ApiError {
    ApiError::from_error(ErrorCode::Failed, error)
}

/// A detached disk of which something was not saved.
fn not_saved(error: &dyn std::error::Error) -> ApiError {
    failed(error).with_hint("make room on the file system of the agent's state directory")
}

fn open_error(error: &OpenError) -> ApiError {
    use backtide_storage::ImageError;
    if let OpenError::Image(ImageError::Missing { path }) = error
        && let Ok(target) = std::fs::read_link(path)
    {
        let message =
            format!("{} is a symbolic link to {}, which does not exist", path.display(), target.display());
        return ApiError::new(ErrorCode::NotFound, message)
            .with_hint("create or mount what the link points to");
    }
    let (code, hint) = match error {
        OpenError::Image(ImageError::Missing { .. }) => {
            (ErrorCode::NotFound, "create the image first, for example with truncate or qemu-img")
        }
        OpenError::Image(ImageError::Locked { .. }) => {
            (ErrorCode::Locked, "detach it from the other agent first")
        }
        OpenError::Image(ImageError::Size { .. }) => {
            (ErrorCode::Usage, "extend the image with truncate to a multiple of 512 bytes")
        }
        OpenError::Image(ImageError::Kind { .. }) => {
            (ErrorCode::Usage, "name a raw image, a block device, a qcow2 file or an NBD URI")
        }
        OpenError::Uri(_) => (ErrorCode::Usage, "name an absolute path or an NBD URI"),
        OpenError::NbdCache { .. } => {
            (ErrorCode::Usage, "choose the cache of the NBD server where it is started")
        }
        OpenError::Image(ImageError::NotDirect { .. } | ImageError::Alignment { .. }) => {
            (ErrorCode::Usage, "use the page cache: --cache writeback")
        }
        OpenError::Image(ImageError::Blocks { .. }) => {
            (ErrorCode::Usage, "extend the image with truncate, or use the page cache: --cache writeback")
        }
        OpenError::NbdSize { .. } => (ErrorCode::Usage, "disks have a multiple of 512 bytes"),
        OpenError::Nbd { .. } => (ErrorCode::Unreachable, "start the NBD server first"),
        OpenError::Record { .. } => {
            (ErrorCode::Failed, "the agent's state directory has to have room and be writable")
        }
        OpenError::Image(ImageError::Io { .. }) => return failed(error),
    };
    ApiError::new(code, error.to_string()).with_hint(hint)
}

#[cfg(test)]
mod tests;
