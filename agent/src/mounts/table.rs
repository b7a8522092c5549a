//! The mounts' thread: what is served, how it begins ([`again`] after a restart, or of what was kept) and how it ends
//! ([`ending`]).

mod again;
mod ending;

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    rc::Rc,
    sync::Arc,
    time::{Duration, SystemTime},
};

use backtide_agent_api::{
    AgentCache, AgentChangedSince, AgentKeptOverlay, AgentMount, AgentMounts, AgentOverlay,
};
use backtide_control::{ApiError, ErrorCode};
use backtide_export::{
    BindError, ExportInfo, Limits, Listener, NbdAddress, NbdRule, NbdUri, Server, dirty_bitmap,
};
use backtide_units::{BlockRange, ByteCount, CaptureTime, Lsn};
use tokio::sync::mpsc;
use uuid::Uuid;

use super::{
    CACHE_BYTES, Leaving, Order, Wanted,
    cache::Cache,
    export::{OneExport, PointExport},
    overlays::{Opened, Overlays},
    reader::Reader,
    record::{MountRecord, MountRecords},
    writable::{WritableExport, Written},
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
    /// What is written to mounts.
    pub(super) overlays: Overlays,
    pub(super) overlays_max: usize,
    pub(super) run: PathBuf,
    pub(super) nbd: Limits,
    pub(super) nbd_rule: NbdRule,
    pub(super) sources: Arc<dyn Sources>,
}

/// Everything that is served, or kept.
pub(super) struct Table {
    serving: Serving,
    mounted: RefCell<BTreeMap<String, Mounted>>,
    /// Mounts that are being made ...
    begun: Cell<usize>,
    /// ... and overlays for them.
    begun_overlays: Cell<usize>,
    /// Mounts that can be written and begin or end just now.
    settling: RefCell<BTreeSet<String>>,
}

struct Mounted {
    record: MountRecord,
    source: Rc<dyn PointSource>,
    /// None as long as one of the last agent cannot be served again, and of one whose overlay is only kept.
    served: Option<Served>,
    /// What is wrong with it, beside what its reads say.
    trouble: Option<String>,
}

/// Where a mount is served.
struct Place {
    /// As it was asked for: what is remembered, for what is configured may be another when it is served again.
    asked: NbdUri,
    /// With TLS as configured, unless it was asked for with its own.
    served: NbdUri,
}

struct Served {
    uri: NbdUri,
    reader: Rc<Reader>,
    server: Server,
    written: Option<Rc<Written>>,
}

impl Table {
    pub(super) fn new(serving: Serving) -> Rc<Self> {
        Rc::new(Self {
            serving,
            mounted: RefCell::default(),
            begun: Cell::new(0),
            begun_overlays: Cell::new(0),
            settling: RefCell::default(),
        })
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
                Order::List(answer) => {
                    tokio::task::spawn_local(async move { drop(answer.send(table.list().await)) });
                }
                Order::Unmount(id, how, answer) => {
                    tokio::task::spawn_local(async move { drop(answer.send(table.unmount(&id, how).await)) });
                }
                Order::Remount(id, nbd, answer) => {
                    tokio::task::spawn_local(async move { drop(answer.send(table.remount(&id, nbd).await)) });
                }
                Order::Discard(id, answer) => {
                    tokio::task::spawn_local(async move { drop(answer.send(table.discard(&id).await)) });
                }
                Order::End(how) => {
                    leaving = how;
                    break;
                }
            }
        }
        let mounted = std::mem::take(&mut *self.mounted.borrow_mut());
        // Records stay as they are: what is served now is served by the next agent.
        let end = |one: Mounted| async move {
            match (leaving, one.served) {
                (_, None) => {}
                // Who did not flush was promised nothing.
                (Leaving::ForGood, Some(served)) => drop(served.leave(&one.record.id).await),
                // What was written is in the files, and nobody pulls a plug.
                (Leaving::HandedOver, Some(served)) => served.server.hand_over(HAND_OVER_GRACE).await,
            }
        };
        let ends: Vec<_> = mounted.into_values().map(|one| tokio::task::spawn_local(end(one))).collect();
        for end in ends {
            // An error is a task that panicked: its mount is gone too.
            let _ = end.await;
        }
    }

    async fn mount(self: &Rc<Self>, wanted: Wanted) -> Result<AgentMount, ApiError> {
        self.refuse_too_many()?;
        if wanted.writable {
            let kept = self.mounted.borrow().values().filter(|one| one.record.overlay.is_some()).count();
            let count = kept + self.settling.borrow().len() + self.begun_overlays.get();
            if count >= self.serving.overlays_max {
                let why = format!("the agent keeps its limit of {count} overlays");
                return Err(ApiError::new(ErrorCode::Busy, why).with_hint(
                    "discard one: `backtide mount --here` lists them, `backtide unmount ID --here --discard`",
                ));
            }
        }
        let overlays = usize::from(wanted.writable);
        self.begun.set(self.begun.get() + 1);
        self.begun_overlays.set(self.begun_overlays.get() + overlays);
        let mounted = self.begin(wanted).await;
        self.begun.set(self.begun.get() - 1);
        self.begun_overlays.set(self.begun_overlays.get() - overlays);
        mounted
    }

    fn refuse_too_many(&self) -> Result<(), ApiError> {
        let served = self.mounted.borrow().values().filter(|one| !one.record.kept).count();
        if served + self.begun.get() < MOUNTS_MAX {
            return Ok(());
        }
        let why = format!("the agent has its limit of {MOUNTS_MAX} mounts");
        Err(ApiError::new(ErrorCode::Busy, why).with_hint("end one: backtide unmount ID --here"))
    }

    async fn begin(self: &Rc<Self>, wanted: Wanted) -> Result<AgentMount, ApiError> {
        let Wanted { disk, lsn, receiver, stream_tls, changed_since, nbd, cache_bytes, writable } = wanted;
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
        record.overlay = writable.then(Uuid::new_v4);
        let (place, listener) = self.listen(&record.id, nbd).await?;
        record.uri = place.asked.to_string();
        let reader = self.reader(&record, &source).await;
        let opened = match writable {
            true => Some(self.on_storage(&record, Overlays::create).await?),
            false => None,
        };
        if let Err(error) = self.saved(&record).await {
            // What cannot be removed now is removed when the agent starts.
            let _ = self.on_storage(&record, |overlays, record| overlays.remove(&record.id)).await;
            return Err(error);
        }
        if let Err(error) = source.hold(&record.owner()).await {
            let why = fetch_error(&format!("the receiver does not keep LSN {lsn} of disk {disk}"), error);
            // It may have heard of it.
            self.end_record(record, source).await;
            return Err(why);
        }
        let served = self.serve_at(&record, reader, opened, listener, place);
        let mounted = Mounted { record, source, served: Some(served), trouble: None };
        let told = mounted.describe();
        self.mounted.borrow_mut().insert(told.id.clone(), mounted);
        Ok(told)
    }

    /// Listens where a mount is wanted, or at a place of its own.
    async fn listen(&self, id: &str, nbd: Option<NbdUri>) -> Result<(Place, Listener), ApiError> {
        let socket = self.serving.run.join(format!("{id}.nbd"));
        let own = || NbdUri { address: NbdAddress::Unix(socket), export: id.to_owned(), tls: None };
        self.listen_at(nbd.unwrap_or_else(own)).await
    }

    /// Listens at a place, with TLS as configured unless it names its own.
    ///
    /// # Errors
    /// Also where other machines would be served in the clear: what is allowed may be another than when the mount was made.
    async fn listen_at(&self, asked: NbdUri) -> Result<(Place, Listener), ApiError> {
        let rule = &self.serving.nbd_rule;
        rule.check_open(&asked).map_err(|error| ApiError::from_error(ErrorCode::Refused, &error))?;
        let served = match &rule.tls {
            Some(tls) => tls.unless_told(asked.clone()),
            None => asked.clone(),
        };
        let listener = Listener::bind_uri(&served, self.serving.nbd.socket_mode)
            .await
            .map_err(|error| bind_error(&error))?;
        let at = |uri| NbdUri { address: listener.address().clone(), ..uri };
        Ok((Place { asked: at(asked), served: at(served) }, listener))
    }

    fn serve_at(
        &self,
        record: &MountRecord,
        reader: Rc<Reader>,
        opened: Option<Opened>,
        listener: Listener,
        place: Place,
    ) -> Served {
        let uri = place.served;
        let listener = listener.for_disk(record.name.clone());
        let tells = record.changed_since.map(|_| record.name.to_string());
        let description = format!("{} at lsn:{}", record.name, record.lsn);
        let info =
            ExportInfo { description, dirty_bitmap: tells, ..ExportInfo::new(&uri.export, reader.size()) };
        let written = opened.map(|opened| Rc::new(Written::new(opened)));
        let export = match &written {
            None => OneExport(Rc::new(PointExport::new(info, Rc::clone(&reader)))),
            Some(written) => {
                OneExport(Rc::new(WritableExport::new(info, Rc::clone(&reader), Rc::clone(written))))
            }
        };
        let server = listener.serve(Rc::new(export), self.serving.nbd);
        tracing::info!(mount = record.id, disk = %record.name, lsn = %record.lsn, %uri, "mounted");
        Served { uri, reader, server, written }
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

    /// Does `work` with the overlays on a thread that may wait for storage.
    async fn on_storage<T: Send + 'static>(
        &self,
        record: &MountRecord,
        work: impl FnOnce(&Overlays, &MountRecord) -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        let (overlays, record) = (self.serving.overlays.clone(), record.clone());
        let done = tokio::task::spawn_blocking(move || work(&overlays, &record)).await;
        done.map_err(|error| ApiError::new(ErrorCode::Failed, error.to_string()))?
    }

    async fn list(&self) -> AgentMounts {
        let (mounts, kept) = {
            let mounted = self.mounted.borrow();
            let (kept, mounts): (Vec<_>, Vec<_>) = mounted.values().partition(|one| one.record.kept);
            let kept: Vec<_> = kept.iter().map(|one| (one.record.clone(), one.trouble.clone())).collect();
            (mounts.iter().map(|one| one.describe()).collect(), kept)
        };
        let mut described = Vec::new();
        for (record, problem) in kept {
            described.push(self.describe_kept(&record, problem).await);
        }
        AgentMounts { mounts, kept: described }
    }

    async fn describe_kept(&self, record: &MountRecord, problem: Option<String>) -> AgentKeptOverlay {
        let looked = self.on_storage(record, |overlays, record| Ok(overlays.file_bytes(&record.id))).await;
        let point = record.point();
        AgentKeptOverlay {
            id: record.id.clone(),
            disk: record.name.clone(),
            uuid: point.disk,
            receiver: record.receiver.to_string(),
            lsn: record.lsn,
            time: point.time,
            size: point.size,
            created: record.mounted,
            file_bytes: looked.unwrap_or(ByteCount::ZERO),
            problem,
        }
    }
}

impl Served {
    /// Ends it, with as much of what was written durable as can be; else why it is not.
    async fn end(self, id: &str) -> Result<(), String> {
        self.server.shutdown(END_GRACE).await;
        end_written(self.written, id).await
    }

    /// The same until the next agent serves it: to clients that connect again this is a pause and no error.
    async fn leave(self, id: &str) -> Result<(), String> {
        self.server.hand_over(END_GRACE).await;
        end_written(self.written, id).await
    }
}

async fn end_written(written: Option<Rc<Written>>, id: &str) -> Result<(), String> {
    match written {
        Some(written) => written.end(id).await,
        None => Ok(()),
    }
}

impl Mounted {
    /// NBD connections that have it open.
    fn clients(&self) -> usize {
        self.served.as_ref().map_or(0, |served| served.server.connections())
    }

    fn describe(&self) -> AgentMount {
        let (record, point) = (&self.record, self.source.point());
        let served = self.served.as_ref();
        let written = served.and_then(|served| served.written.as_ref());
        let (bytes, fetched) = served.map_or_else(Default::default, |served| served.reader.usage());
        AgentMount {
            id: record.id.clone(),
            disk: record.name.clone(),
            uuid: point.disk,
            receiver: record.receiver.to_string(),
            uri: served.map_or_else(|| record.uri.clone(), |served| served.uri.to_string()),
            lsn: record.lsn,
            time: point.time,
            size: point.size,
            mounted: record.mounted,
            clients: u32::try_from(self.clients()).unwrap_or(u32::MAX),
            changed_since: record.changed_since.map(|lsn| AgentChangedSince {
                lsn,
                context: format!("{}{}", dirty_bitmap::PREFIX, record.name),
            }),
            cache: AgentCache { bytes, limit: record.cache_bytes, fetched },
            overlay: written.map(|written| {
                let usage = written.usage();
                AgentOverlay { bytes: usage.bytes, limit: usage.limit, file_bytes: usage.file_bytes }
            }),
            last_error: self
                .trouble
                .clone()
                .or_else(|| written.and_then(|written| written.problem()))
                .or_else(|| served.and_then(|served| served.reader.last_error())),
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

#[cfg(test)]
mod tests;
