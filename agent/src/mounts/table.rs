//! The mounts' thread: what is served, how it begins and how it ends.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    path::PathBuf,
    rc::Rc,
    sync::Arc,
    time::{Duration, SystemTime},
};

use backtide_agent_api::{AgentCache, AgentChangedSince, AgentMount, AgentMounts};
use backtide_control::{ApiError, ErrorCode};
use backtide_export::{
    BindError, ExportInfo, Limits, Listener, NbdAddress, NbdTls, NbdUri, Server, dirty_bitmap,
};
use backtide_units::{BlockRange, CaptureTime, Lsn};
use tokio::sync::mpsc;

use super::{
    CACHE_BYTES, Leaving, Order, Wanted,
    cache::Cache,
    export::{OneExport, PointExport},
    reader::Reader,
    record::{MountRecord, MountRecords},
};
use crate::{
    disk::{
        Dialer,
        source::{FetchError, PointSource, Sources},
    },
    registry::fetch_error,
};

/// Mounts of one agent.
const MOUNTS_MAX: usize = 64;

/// How long the receiver may take to find a point and what there is to know of it.
const FIND_TIME: Duration = Duration::from_secs(60);

/// How long an unmount waits for requests in flight.
const END_GRACE: Duration = Duration::from_secs(5);

/// How long a successor's clients do.
const HAND_OVER_GRACE: Duration = Duration::from_millis(100);

/// Between attempts of what has to succeed some time.
const PAUSE: Duration = Duration::from_secs(5);

/// Between attempts to listen where another process still does.
const BIND_PAUSE: Duration = Duration::from_millis(200);

/// What all mounts have in common.
pub(super) struct Serving {
    pub(super) records: MountRecords,
    pub(super) run: PathBuf,
    pub(super) nbd: Limits,
    pub(super) nbd_tls: Option<NbdTls>,
    pub(super) sources: Arc<dyn Sources>,
}

/// Everything that is served.
pub(super) struct Table {
    serving: Serving,
    mounted: RefCell<BTreeMap<String, Mounted>>,
    /// Mounts that are being made.
    begun: Cell<usize>,
}

struct Mounted {
    record: MountRecord,
    source: Rc<dyn PointSource>,
    /// None as long as one of the last agent cannot be served again.
    served: Option<Served>,
    /// What is wrong with it, beside what its reads say.
    trouble: Option<String>,
}

struct Served {
    reader: Rc<Reader>,
    server: Server,
}

impl Table {
    pub(super) fn new(serving: Serving) -> Rc<Self> {
        Rc::new(Self { serving, mounted: RefCell::default(), begun: Cell::new(0) })
    }

    /// Serves what is known and carries orders out, until one is to end.
    pub(super) async fn serve(self: Rc<Self>, known: Vec<MountRecord>, mut inbox: mpsc::Receiver<Order>) {
        for record in known {
            let table = Rc::clone(&self);
            tokio::task::spawn_local(async move {
                match record.ended {
                    true => table.give_up(&table.source_of(&record), record).await,
                    false => table.serve_again(record).await,
                }
            });
        }
        let mut leaving = Leaving::ForGood;
        while let Some(order) = inbox.recv().await {
            let table = Rc::clone(&self);
            // Each apart from the others: a receiver may take its time. Whoever asked may have gone.
            match order {
                Order::Mount(wanted, answer) => {
                    tokio::task::spawn_local(async move { drop(answer.send(table.mount(*wanted).await)) });
                }
                Order::List(answer) => drop(answer.send(table.list())),
                Order::Unmount(id, answer) => {
                    tokio::task::spawn_local(async move { drop(answer.send(table.unmount(&id).await)) });
                }
                Order::End(how) => {
                    leaving = how;
                    break;
                }
            }
        }
        let mounted = std::mem::take(&mut *self.mounted.borrow_mut());
        let end = |served: Served| async move {
            match leaving {
                Leaving::ForGood => served.server.shutdown(END_GRACE).await,
                Leaving::HandedOver => served.server.hand_over(HAND_OVER_GRACE).await,
            }
        };
        let served = mounted.into_values().filter_map(|one| one.served);
        let ends: Vec<_> = served.map(|one| tokio::task::spawn_local(end(one))).collect();
        for end in ends {
            // An error is a task that panicked: its mount is gone too.
            let _ = end.await;
        }
    }

    async fn mount(self: &Rc<Self>, wanted: Wanted) -> Result<AgentMount, ApiError> {
        if self.mounted.borrow().len() + self.begun.get() >= MOUNTS_MAX {
            let why = format!("the agent has its limit of {MOUNTS_MAX} mounts");
            return Err(ApiError::new(ErrorCode::Busy, why).with_hint("end one: backtide unmount ID --here"));
        }
        self.begun.set(self.begun.get() + 1);
        let mounted = self.begin(wanted).await;
        self.begun.set(self.begun.get() - 1);
        mounted
    }

    async fn begin(self: &Rc<Self>, wanted: Wanted) -> Result<AgentMount, ApiError> {
        let Wanted { disk, lsn, receiver, stream_tls, changed_since, nbd, cache_bytes } = wanted;
        let look = async {
            let dialer = Dialer::new(receiver.clone(), stream_tls.clone());
            let source = self.serving.sources.find(dialer, disk, None, Some(lsn)).await?;
            can_tell_since(&*source, changed_since).await?;
            Ok(source)
        };
        let looked = tokio::time::timeout(FIND_TIME, look).await;
        let silent = |_| FetchError::Unreachable("the receiver does not answer".to_owned());
        let source = looked
            .map_err(silent)
            .and_then(|looked| looked)
            .map_err(|error| fetch_error(&format!("cannot mount LSN {lsn} of disk {disk}"), error))?;
        let mut record = MountRecord::new(source.point(), receiver, stream_tls, now());
        record.changed_since = changed_since;
        record.cache_bytes = cache_bytes.unwrap_or(CACHE_BYTES);
        let socket = self.serving.run.join(format!("{}.nbd", record.id));
        let own = || NbdUri { address: NbdAddress::Unix(socket), export: record.id.clone(), tls: None };
        let uri = nbd.unwrap_or_else(own);
        let uri = self.serving.nbd_tls.as_ref().map_or(uri.clone(), |tls| tls.unless_told(uri));
        let listener = Listener::bind_uri(&uri, self.serving.nbd.socket_mode)
            .await
            .map_err(|error| bind_error(&error))?;
        let uri = NbdUri { address: listener.address().clone(), ..uri };
        record.uri = uri.to_string();
        let reader = self.reader(&record, &source).await;
        self.saved(&record).await?;
        if let Err(error) = source.hold(&record.owner()).await {
            let why = fetch_error(&format!("the receiver does not keep LSN {lsn} of disk {disk}"), error);
            // It may have heard of it.
            self.end_record(record, source).await;
            return Err(why);
        }
        let served = self.serve_at(&record, reader, listener, &uri);
        let mounted = Mounted { record, source, served: Some(served), trouble: None };
        let told = mounted.describe();
        self.mounted.borrow_mut().insert(told.id.clone(), mounted);
        Ok(told)
    }

    /// Serves a mount of the last agent.
    async fn serve_again(self: Rc<Self>, record: MountRecord) {
        let source = self.source_of(&record);
        let mounted =
            Mounted { record: record.clone(), source: Rc::clone(&source), served: None, trouble: None };
        self.mounted.borrow_mut().insert(record.id.clone(), mounted);
        let Some((uri, listener)) = self.listen_again(&record).await else { return };
        let reader = self.reader(&record, &source).await;
        let served = self.serve_at(&record, reader, listener, &uri);
        let id = &record.id;
        if !self.with(id, |mounted| (mounted.served, mounted.trouble) = (Some(served), None)) {
            return;
        }
        loop {
            let (trouble, again) = match self.hold_again(&source, &record).await {
                Ok(()) => (None, false),
                Err(error) => (Some(error.to_string()), matches!(error, FetchError::Unreachable(_))),
            };
            if let Some(why) = &trouble {
                tracing::warn!(
                    mount = id,
                    why,
                    "the receiver does not keep a mounted point, or cannot tell what changed in it"
                );
            }
            if !self.with(id, |mounted| mounted.trouble = trouble) || !again {
                return;
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// Listens where a mount was, as soon as that is possible; none when nobody wants it any more, or it never is.
    async fn listen_again(&self, record: &MountRecord) -> Option<(NbdUri, Listener)> {
        let id = &record.id;
        let cannot = |why: String| {
            tracing::error!(mount = id, why, "a mount cannot be served again yet");
            self.with(id, |mounted| mounted.trouble = Some(why))
        };
        let uri: NbdUri = match record.uri.parse() {
            Ok(uri) => uri,
            Err(error) => {
                cannot(format!("{}: {error}", record.uri));
                return None;
            }
        };
        let mut told = None;
        loop {
            let why = match Listener::bind_uri(&uri, self.serving.nbd.socket_mode).await {
                Ok(listener) => return Some((uri, listener)),
                Err(error) => ApiError::from_error(ErrorCode::Failed, &error).message,
            };
            if told.as_ref() != Some(&why) {
                told = Some(why.clone());
                if !cannot(why) {
                    return None;
                }
            }
            tokio::time::sleep(BIND_PAUSE).await;
            if !self.with(id, |_| ()) {
                return None;
            }
        }
    }

    /// Changes a mount, unless it was ended.
    fn with(&self, id: &str, change: impl FnOnce(&mut Mounted)) -> bool {
        self.mounted.borrow_mut().get_mut(id).map(change).is_some()
    }

    /// The agent before may have ended between remembering the mount and having its point kept.
    async fn hold_again(&self, source: &Rc<dyn PointSource>, record: &MountRecord) -> Result<(), FetchError> {
        source.hold(&record.owner()).await?;
        can_tell_since(&**source, record.changed_since).await
    }

    fn serve_at(&self, record: &MountRecord, reader: Rc<Reader>, listener: Listener, uri: &NbdUri) -> Served {
        let listener = listener.for_disk(record.name.clone());
        let tells = record.changed_since.map(|_| record.name.to_string());
        let description = format!("{} at lsn:{}", record.name, record.lsn);
        let info =
            ExportInfo { description, dirty_bitmap: tells, ..ExportInfo::new(&uri.export, reader.size()) };
        let export = PointExport::new(info, Rc::clone(&reader));
        let server = listener.serve(Rc::new(OneExport(Rc::new(export))), self.serving.nbd);
        tracing::info!(mount = record.id, disk = %record.name, lsn = %record.lsn, %uri, "mounted");
        Served { reader, server }
    }

    async fn unmount(self: &Rc<Self>, id: &str) -> Result<AgentMount, ApiError> {
        let mounted = self.mounted.borrow_mut().remove(id).ok_or_else(|| {
            ApiError::new(ErrorCode::NotFound, format!("there is no mount {id:?} at the agent")).with_hint(
                "`backtide mount --here` lists the agent's, `backtide mount` those of the receiver",
            )
        })?;
        let told = mounted.describe();
        let Mounted { record, source, served, trouble: _ } = mounted;
        if let Some(served) = served {
            served.server.shutdown(END_GRACE).await;
        }
        tracing::info!(mount = id, "unmounted");
        self.end_record(record, source).await;
        Ok(told)
    }

    /// Has the receiver give the point up, at once or when it is there again, also after a restart.
    async fn end_record(self: &Rc<Self>, mut record: MountRecord, source: Rc<dyn PointSource>) {
        record.ended = true;
        if let Err(error) = self.saved(&record).await {
            tracing::warn!(mount = record.id, %error, "an ended mount may be served again after a restart");
        }
        let table = Rc::clone(self);
        tokio::task::spawn_local(async move { table.give_up(&source, record).await });
    }

    async fn give_up(&self, source: &Rc<dyn PointSource>, record: MountRecord) {
        while let Err(FetchError::Unreachable(_)) = source.release(&record.owner()).await {
            tokio::time::sleep(PAUSE).await;
        }
        let (records, id) = (self.serving.records.clone(), record.id);
        let removed = tokio::task::spawn_blocking(move || records.remove(&id)).await;
        if let Ok(Err(error)) = removed {
            tracing::warn!(%error, "cannot remove the record of an ended mount");
        }
    }

    fn source_of(&self, record: &MountRecord) -> Rc<dyn PointSource> {
        let dialer = Dialer::new(record.receiver.clone(), record.stream_tls.clone());
        self.serving.sources.open(record.point(), dialer)
    }

    /// Without a place for its cache a mount is served without one.
    async fn reader(&self, record: &MountRecord, source: &Rc<dyn PointSource>) -> Rc<Reader> {
        let (records, id) = (self.serving.records.clone(), record.id.clone());
        let made = tokio::task::spawn_blocking(move || records.cache_file(&id)).await;
        let file = made
            .unwrap_or_else(|error| Err(std::io::Error::other(error)))
            .inspect_err(|error| tracing::warn!(mount = record.id, %error, "a mount goes without a cache"));
        let cache = Cache::new(self.serving.records.storage(), file.ok(), record.cache_bytes);
        Rc::new(Reader::new(Rc::clone(source), cache, record.changed_since))
    }

    async fn saved(&self, record: &MountRecord) -> Result<(), ApiError> {
        let (records, record) = (self.serving.records.clone(), record.clone());
        let saved = tokio::task::spawn_blocking(move || records.save(&record)).await;
        let failed =
            |why: String| ApiError::new(ErrorCode::Failed, format!("cannot remember a mount: {why}"));
        saved.map_err(|error| failed(error.to_string()))?.map_err(|error| failed(error.to_string()))
    }

    fn list(&self) -> AgentMounts {
        AgentMounts { mounts: self.mounted.borrow().values().map(Mounted::describe).collect() }
    }
}

impl Mounted {
    fn describe(&self) -> AgentMount {
        let (record, point) = (&self.record, self.source.point());
        let served = self.served.as_ref();
        let (bytes, fetched) = served.map_or_else(Default::default, |served| served.reader.usage());
        AgentMount {
            id: record.id.clone(),
            disk: record.name.clone(),
            uuid: point.disk,
            receiver: record.receiver.to_string(),
            uri: record.uri.clone(),
            lsn: record.lsn,
            time: point.time,
            size: point.size,
            mounted: record.mounted,
            clients: u32::try_from(served.map_or(0, |served| served.server.connections()))
                .unwrap_or(u32::MAX),
            changed_since: record.changed_since.map(|lsn| AgentChangedSince {
                lsn,
                context: format!("{}{}", dirty_bitmap::PREFIX, record.name),
            }),
            cache: AgentCache { bytes, limit: record.cache_bytes, fetched },
            last_error: self.trouble.clone().or_else(|| served.and_then(|served| served.reader.last_error())),
        }
    }
}

/// Whether the receiver can tell what changed since that point. It tells what when it is asked.
async fn can_tell_since(source: &dyn PointSource, since: Option<Lsn>) -> Result<(), FetchError> {
    match since {
        Some(since) => source.changed_in(since, BlockRange::from(0..0)).await.map(drop),
        None => Ok(()),
    }
}

fn now() -> CaptureTime {
    SystemTime::now().into()
}

fn bind_error(error: &BindError) -> ApiError {
    let code = match error {
        BindError::InUse(_) | BindError::NotASocket(_) => ErrorCode::Busy,
        BindError::Io { .. } | BindError::Tls(_) => ErrorCode::Failed,
    };
    ApiError::from_error(code, error)
}
