//! The whole receiver: started from a [`Config`], ready when it listens, ended in good order.
//!
//! Threads: some that own disks and their connections ([`crate::ingest`]), one for all mounts, one that thins
//! history, small pools for what blocks (syncs; reads; what is written to mounts), and a small runtime that accepts and answers
//! the control API. They end in the reverse order of the data's way.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use backtide_control::{Address, Server, build_lasting};
use backtide_export::Directory;
use backtide_overlay::{Budget, OverlayOptions};
use backtide_recovery::LogCache;
use backtide_storage::{RealStorage, Storage};
use backtide_tls::StreamServer;
use backtide_units::{DiskId, HistoryId};
use tokio::{
    runtime::{Builder, Runtime},
    sync::{oneshot, watch},
    task::JoinHandle,
};

use crate::{
    Config, Forgotten, Limits, ListError, ListenError, Names, Shelf, StoreFileError, StoreId, StoreWatch,
    StreamTls,
    accept::Door,
    clock,
    committer::{CommitThreads, Committer},
    config::Every,
    findings::Findings,
    ingest::{self, IngestThread, Task},
    mount_numbers::MountNumbers,
    mounts::{self, MountThread, Order},
    overlays::{Overlays, store_place::StorePlace},
    pool::{Pool, PoolThreads},
    removal::Removal,
    retention::{Keeper, Ladder, LadderError, Policies, begin_doubts},
    scrub::{self, Scrub},
    service::Service,
    socket::{Entrance, Listener},
    space::{Refusals, Space},
    store_file::{StoreLock, lock_store, open_store},
    threads,
};

/// Threads of the runtime that accepts and answers the control API.
const CONTROL_THREADS: usize = 2;

/// How long agents that read points may take to hear that the receiver ends.
const POINTS_GRACE: std::time::Duration = std::time::Duration::from_secs(2);

/// How often a store without traffic is looked at.
const STORE_LOOK: std::time::Duration = std::time::Duration::from_secs(5);

/// Why a receiver did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The directory is no store that can be used.
    #[error(transparent)]
    Store(#[from] StoreFileError),
    /// The store's disks cannot be listed.
    #[error(transparent)]
    List(#[from] ListError),
    /// A stream address cannot be listened at.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// The default retention is none.
    #[error("{0}")]
    Retention(String),
    /// Where every mount is to be served is no NBD URI, or open to others.
    #[error("{0}")]
    NbdUri(String),
    /// The socket that all mounts share cannot be served.
    #[error("cannot serve every mount at {uri}")]
    Nbd {
        /// Where it is to be.
        uri: String,
        /// Why.
        source: backtide_export::BindError,
    },
    /// The control API's address cannot be listened at.
    #[error(transparent)]
    Api(#[from] backtide_control::BindError),
    /// The operating system refused something else.
    #[error("cannot {what}")]
    Io {
        /// What was tried.
        what: String,
        /// Why.
        source: io::Error,
    },
}

/// A running receiver. Dropping it ends it without waiting for the end; see [`Receiver::shutdown`].
pub struct Receiver {
    store: StoreId,
    listen: Vec<Address>,
    api: Address,
    accepting: Vec<JoinHandle<()>>,
    /// Tells agents that read points.
    points_end: Arc<watch::Sender<bool>>,
    api_stop: oneshot::Sender<()>,
    api_task: JoinHandle<()>,
    ingest: Vec<IngestThread>,
    mounts: MountThread,
    keeper: Keeper,
    scrub: Arc<Scrub>,
    runtime: Background,
    commits: CommitThreads,
    pools: [PoolThreads; 2],
    lock: Option<StoreLock>,
}

/// A runtime that may be dropped inside another one.
struct Background(Option<Runtime>);

impl Receiver {
    /// Starts a receiver; ready when it listens. Its threads are its own: the caller's runtime only
    /// waits.
    ///
    /// # Errors
    /// See [`StartError`]; nothing is left running then.
    pub async fn start(config: Config) -> Result<Self, StartError> {
        // Made, if it is missing, for its owner only.
        let storage = RealStorage::open(&config.store)
            .map_err(|source| failed(format!("open the store {}", config.store.display()), source))?;
        let lock = lock_store(&config.store)?;
        Self::start_on(Arc::new(storage), Some(lock), config).await
    }

    /// Starts a receiver on a storage that is nobody else's, such as one in memory.
    ///
    /// # Errors
    /// As [`Receiver::start`].
    pub async fn start_on_storage(storage: Arc<dyn Storage>, config: Config) -> Result<Self, StartError> {
        Self::start_on(storage, None, config).await
    }

    async fn start_on(
        storage: Arc<dyn Storage>,
        lock: Option<StoreLock>,
        config: Config,
    ) -> Result<Self, StartError> {
        let store = open_store(&storage)?;
        let default = default_ladder(&config)?;
        let shared_uri = config.shared_uri().map_err(StartError::NbdUri)?;
        let limits = config.limits.clone();
        let run_dir = config.run_dir();
        make_dir(&run_dir)?;
        // Addresses first: they are what fails, and recovery may take its time.
        let mut builder = Builder::new_multi_thread();
        builder.worker_threads(CONTROL_THREADS).thread_name("receiver-control");
        let runtime =
            build_lasting(&mut builder).map_err(|source| failed("start the control threads", source))?;
        let runtime = Background(Some(runtime.into_runtime()));
        let entrance = entrance(&config).await?;
        let tls = entrance.tls.clone();
        let (listeners, api) =
            runtime.bind(config.listen_addresses(), entrance, config.api_address()).await?;

        let pool = |name, threads| Pool::start(name, threads).map_err(|e| failed("start a pool", e));
        let together_min = limits.commit_together;
        let (commits, commit_threads) =
            Committer::start(Arc::clone(&storage), limits.commit_threads, together_min)
                .map_err(|source| failed("start a pool", source))?;
        let (readers, read_threads) = pool(threads::READ, limits.read_threads)?;
        let (writers, write_threads) = pool("overlay", limits.read_threads)?;
        let watch = lock.as_ref().map(|lock| lock.watch.clone()).unwrap_or_default();
        let findings = Findings::open(Arc::clone(&storage));
        let shelf = Shelf {
            storage: Arc::clone(&storage),
            log: limits.log(),
            cache: LogCache::new(limits.cache()),
            names: Arc::new(Names::new()),
            forgotten: Forgotten::load(Arc::clone(&storage))
                .map_err(|source| failed("read which disks were forgotten", source))?,
            space_floor: limits.free_bytes_min,
            disks_max: limits.disks,
            watch: watch.clone(),
            findings: findings.clone(),
            new_history: Arc::new(HistoryId::random),
        };
        // A storage without a lock has no place.
        let place = lock.as_ref().map(|_| StorePlace::of(&config.store)).transpose();
        let place = place.map_err(|source| failed("look at the store's directory", source))?;
        let overlays = open_overlays(&storage, &limits, place)?;
        let policies = Policies::open(Arc::clone(&storage), default);
        let removal = Removal {
            shelf: shelf.clone(),
            overlays: overlays.clone(),
            policies: policies.clone(),
            findings: findings.clone(),
        };
        // Before anybody can ask for one of them.
        removal.finish_all();
        let ingest = start_ingest(&shelf, &config, &commits, &readers).await?;
        let serving = mounts::Serving {
            run_dir,
            mounts_max: limits.mounts,
            readers: readers.clone(),
            nbd_tls: config.nbd_tls.clone(),
            nbd: config.nbd,
            overlays: overlays.clone(),
            writers,
            numbers: MountNumbers::open(Arc::clone(&storage), clock::now()),
            directory: Directory::new(shared_uri.as_ref().map_or("", |uri| &uri.export)),
        };
        let nbd = shared_uri.as_ref().map(ToString::to_string).unwrap_or_default();
        let mounts = mounts::start(serving, shared_uri)
            .await
            .map_err(|source| failed("start the mounts' thread", source))?
            .map_err(|source| StartError::Nbd { uri: nbd, source })?;
        let tasks: Vec<_> = ingest.iter().map(|thread| thread.tasks.clone()).collect();
        let doubted = begin_doubts(&shelf, &policies, &tasks, &readers).await;
        doubted.map_err(|source| failed("look at logs that are not open", source))?;
        let keeper = Keeper::start(
            shelf.clone(),
            tasks.clone(),
            policies.clone(),
            overlays.clone(),
            config.retention.clone(),
        )
        .map_err(|source| failed("start the thread of retention", source))?;
        let every = config.scrub.every.map(Every::duration);
        let sources = scrub::Sources {
            owners: tasks.clone(),
            overlays: overlays.clone(),
            findings: findings.clone(),
            shelf: shelf.clone(),
        };
        let scrub = Arc::new(Scrub::new(Arc::clone(&shelf.storage), sources, every));
        let listen: Vec<Address> = listeners.iter().map(|listener| listener.address().clone()).collect();
        let service = Arc::new(Service {
            store: config.store.clone(),
            store_id: store,
            storage,
            space_floor: limits.free_bytes_min,
            watch: watch.clone(),
            scrub: Arc::clone(&scrub),
            scrub_rate: config.scrub.bytes_per_second_max,
            findings,
            listen: listen.clone(),
            nbd_listen: mounts.shared.as_ref().map(ToString::to_string),
            tls,
            images: shelf.cache.images(&shelf.storage),
            policies,
            promising: Arc::default(),
            keeper: keeper.watch(),
            on_full: config.retention.on_full,
            low_bytes: config.retention.low_bytes,
            names: shelf.names,
            threads: tasks.clone(),
            mounts: mounts.orders.clone(),
            nbd_rule: config.nbd_rule(),
            overlays,
            removal,
            readers,
            commits,
        });
        let api_address = api.address().clone();
        let (api_stop, stopped) = oneshot::channel();
        service.serve_again().await;
        scrub.resume();
        let api_task = runtime.spawn(serve_api(api, Arc::clone(&service), stopped));
        let mut accepting = vec![runtime.spawn(watch_store(watch))];
        let serving = Arc::clone(&service);
        accepting.push(runtime.spawn(async move { serving.keep_serving().await }));
        let scrubbing = Arc::clone(&service);
        accepting.push(runtime.spawn(async move { scrubbing.keep_scrubbing().await }));
        let points_end = Arc::new(watch::Sender::new(false));
        let door = Door::new(tasks, limits.connections, service, Arc::clone(&points_end));
        accepting.extend(listeners.into_iter().map(|listener| runtime.spawn(door.clone().accept(listener))));
        tracing::info!(store = %config.store.display(), store_id = %store.0, ?listen, api = %api_address, "the receiver is ready");
        Ok(Self {
            store,
            listen,
            api: api_address,
            accepting,
            points_end,
            api_stop,
            api_task,
            ingest,
            mounts,
            keeper,
            scrub,
            runtime,
            commits: commit_threads,
            pools: [read_threads, write_threads],
            lock,
        })
    }

    /// The store's identity.
    pub fn store_id(&self) -> StoreId {
        self.store
    }

    /// Where agents' streams are taken, with real ports.
    pub fn stream_addresses(&self) -> &[Address] {
        &self.listen
    }

    /// Where the control API is served, with the real port.
    pub fn api_address(&self) -> &Address {
        &self.api
    }

    /// Ends it in good order: no new agents, those connected are told, everything received is made
    /// durable, mounts finish what is in flight.
    pub async fn shutdown(self) {
        let Self {
            accepting,
            points_end,
            api_stop,
            api_task,
            ingest,
            mounts,
            keeper,
            scrub,
            runtime,
            commits,
            pools,
            lock,
            ..
        } = self;
        for task in accepting {
            task.abort();
            // Aborted is what it should be; its end closes the socket.
            let _ = task.await;
        }
        points_end.send_replace(true);
        // None is left when nobody listens any more; one that does not take its last words is not waited for.
        let _ = tokio::time::timeout(POINTS_GRACE, points_end.closed()).await;
        // Whoever has ended already need not be told.
        let _ = api_stop.send(());
        let _ = api_task.await;
        // They ask the others, so they end first.
        let _ = tokio::task::spawn_blocking(move || {
            scrub.end();
            keeper.end();
        })
        .await;
        for thread in &ingest {
            let _ = thread.tasks.send(Task::Shutdown).await;
        }
        let _ = mounts.orders.send(Order::Shutdown).await;
        let threads: Vec<_> = ingest.into_iter().map(|i| i.thread).chain([mounts.thread]).collect();
        let joined = tokio::task::spawn_blocking(move || {
            for thread in threads {
                if thread.join().is_err() {
                    tracing::error!("a thread of the receiver panicked");
                }
            }
        });
        let _ = joined.await;
        drop(runtime);
        drop(commits);
        drop(pools);
        drop(lock);
        tracing::info!("the receiver has ended");
    }
}

/// What is kept of a disk that has no ladder of its own.
pub(crate) fn default_ladder(config: &Config) -> Result<Ladder, StartError> {
    let ladder = config.retention.default.parse();
    ladder.map_err(|error: LadderError| StartError::Retention(error.to_string()))
}

/// Under which conditions streams are taken.
pub(crate) async fn entrance(config: &Config) -> Result<Entrance, StartError> {
    let tls = match &config.stream_tls {
        Some(StreamTls { certificates, disks }) => {
            Some(Arc::new(StreamServer::load(certificates, *disks).await.map_err(ListenError::Tls)?))
        }
        None => None,
    };
    Ok(Entrance { tls, insecure: config.insecure })
}

fn open_overlays(
    storage: &Arc<dyn Storage>,
    limits: &Limits,
    place: Option<StorePlace>,
) -> Result<Overlays, StartError> {
    let space = Space::new(Arc::clone(storage), limits.free_bytes_min, Refusals::default());
    if let Err(why) = space.look(backtide_units::ByteCount::ZERO) {
        tracing::warn!(why, "new data is refused until there is room");
    }
    let options = OverlayOptions {
        budget: Budget::new(limits.overlays_bytes),
        room: Arc::new(move |wanted| space.take(wanted)),
        ..OverlayOptions::alone(limits.overlay_bytes)
    };
    Overlays::load(Arc::clone(storage), options, limits.overlays, place)
        .map_err(|source| failed("read the overlays of mounts", source))
}

async fn start_ingest(
    shelf: &Shelf,
    config: &Config,
    commits: &Committer,
    readers: &Pool,
) -> Result<Vec<IngestThread>, StartError> {
    let count = config.limits.ingest_threads.max(1);
    let mut shares: Vec<Vec<DiskId>> = vec![Vec::new(); count];
    for disk in shelf.list()? {
        shares[Door::owner(disk, count)].push(disk);
    }
    let fail = |source| failed("start an ingest thread", source);
    let mut threads = Vec::new();
    for (number, share) in shares.into_iter().enumerate() {
        let (commits, readers) = (commits.clone(), readers.clone());
        let started = ingest::start(number, shelf.clone(), share, commits, readers, &config.limits);
        threads.push(started.map_err(fail)?);
    }
    // They open their disks side by side.
    let mut ready = Vec::new();
    for (thread, opened) in threads {
        let gone = |_| fail(io::Error::other("it ended while it opened its disks"));
        opened.await.map_err(gone)?;
        ready.push(thread);
    }
    Ok(ready)
}

/// Says once that the store has gone, and once that it is back, also while no disk is written.
async fn watch_store(watch: StoreWatch) {
    let mut look = tokio::time::interval(STORE_LOOK);
    let mut gone = false;
    loop {
        look.tick().await;
        match (watch.check(), gone) {
            (Err(why), false) => {
                gone = true;
                tracing::error!(why, "the store has gone");
            }
            (Ok(()), true) => {
                gone = false;
                tracing::info!("the store is back");
            }
            (Err(_), true) | (Ok(()), false) => {}
        }
    }
}

async fn serve_api(server: Server, service: Arc<Service>, stopped: oneshot::Receiver<()>) {
    let router = backtide_receiver_api::router(service);
    let stop = async move {
        // An error means that the receiver was dropped: stop all the same.
        let _ = stopped.await;
    };
    if let Err(error) = server.run(router, stop).await {
        tracing::error!(%error, "the control API ended");
    }
}

impl Background {
    fn spawn<T: Send + 'static>(&self, task: impl Future<Output = T> + Send + 'static) -> JoinHandle<T> {
        self.0.as_ref().expect("the runtime is there until it is dropped").spawn(task)
    }

    /// Binds on this runtime, whose event loop the sockets belong to from then on.
    async fn bind(
        &self,
        streams: Vec<Address>,
        entrance: Entrance,
        api: Address,
    ) -> Result<(Vec<Listener>, Server), StartError> {
        let bound = self.spawn(async move {
            let mut listeners = Vec::new();
            for address in &streams {
                listeners.push(Listener::bind(address, &entrance).await?);
            }
            Ok::<_, StartError>((listeners, Server::bind(&api).await?))
        });
        bound.await.map_err(|error| failed("listen", io::Error::other(error)))?
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

fn make_dir(path: &Path) -> Result<PathBuf, StartError> {
    fs::create_dir_all(path)
        .map_err(|source| failed(format!("make the directory {}", path.display()), source))?;
    Ok(path.to_owned())
}

pub(crate) fn failed(what: impl Into<String>, source: io::Error) -> StartError {
    StartError::Io { what: what.into(), source }
}
