//! The thread that owns a disk: starts everything the disk needs, takes commands, ends it cleanly.

use std::{io, rc::Rc, sync::Arc, time::Duration};

use backtide_agent_api::{DiskStatus, Limits, LimitsChange, MarkState, VerifyStatus};
use backtide_control::build_lasting;
use backtide_export::{BindError, Directory, Listener, NbdUri, Server};
use backtide_io_filter::{Change, Filter, IoFailure, LocalOp, MarkError, Mode, ResyncKind, VerifyError};
use backtide_socket::Sockets;
use backtide_storage::KillPoint;
use backtide_units::{DiskName, Lsn};
use tokio::sync::{mpsc, oneshot};

use super::{
    DiskHandle, Terms,
    beside::UsedBeside,
    clientele::Clientele,
    dial::Dialer,
    engine::{Engine, Kick},
    export::{DiskExport, OneExport},
    hydrating::HydratingDisk,
    image_disk::{EngineError, ImageDisk},
    in_place::Displaced,
    incomplete::path_of,
    leaving::{DetachError, Leaving},
    life::{Life, Own},
    local::{EIO, Local},
    marking::{self, MarkAt},
    medium::Medium,
    nbd_disk::{BehindError, NbdDisk},
    open::{Behind, Opened},
    past_agent::PastAgent,
    polling::Polling,
    status::Verifies,
    stream::Stream,
    tracking::Tracking,
};
use crate::record::{DiskRecord, LSN_STEP, Records};

/// Commands waiting for a disk.
const COMMANDS_MAX: usize = 64;

/// How often the record is brought up to date.
const HOUSEKEEPING: Duration = Duration::from_secs(1);

/// What the rest of the agent can ask of a disk.
#[derive(Debug)]
pub(crate) enum Command {
    Status(oneshot::Sender<DiskStatus>),
    Pause(oneshot::Sender<DiskStatus>),
    Resume(oneshot::Sender<DiskStatus>),
    Resync(ResyncKind, oneshot::Sender<DiskStatus>),
    Limits(LimitsChange, oneshot::Sender<DiskStatus>),
    /// Holds all answers; whether the disk forwards now.
    Hold(oneshot::Sender<bool>),
    /// Marks, while answers are held.
    Mark(String, oneshot::Sender<Result<MarkAt, MarkError>>),
    /// Waits until the receiver has the mark durable, or it is lost; which of them.
    MarkKept(Lsn, String, oneshot::Sender<MarkState>),
    /// Gives the held answers.
    Release(oneshot::Sender<bool>),
    /// Begins a verify, which repairs what differs or not.
    StartVerify(bool, oneshot::Sender<Result<VerifyStatus, VerifyError>>),
    VerifyStatus(oneshot::Sender<Option<VerifyStatus>>),
    CancelVerify(oneshot::Sender<Option<VerifyStatus>>),
    /// Flushes the local disk while it is served, so that the flush of a detach soon after is short.
    /// Whether that succeeded.
    Flush(oneshot::Sender<bool>),
    /// Ends the disk.
    Detach {
        leaving: Leaving,
        answer: oneshot::Sender<Result<DiskStatus, DetachError>>,
    },
}

/// Why a disk's thread did not start.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StartError {
    #[error(transparent)]
    Bind(#[from] BindError),
    #[error("cannot use the disk behind: {0}")]
    Behind(#[from] BehindError),
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error("cannot start a thread: {0}")]
    Thread(io::Error),
}

/// A disk being served.
pub(super) struct Disk {
    pub(super) engine: Rc<Engine>,
    pub(super) stream: Rc<Stream>,
    pub(super) server: Server,
    nbd: NbdUri,
    pub(super) record: DiskRecord,
    /// What a person has asked for last; the record has it once that could be saved.
    limits: Limits,
    pub(super) records: Records,
    pub(super) image: Option<Arc<backtide_storage::ImageFile>>,
    verifies: Verifies,
    watch: super::status::Watch,
    pub(super) life: Life,
    /// Why the record could not be saved the last time.
    pub(super) unsaved: Option<String>,
    pub(super) past_agent: PastAgent,
    /// What else uses its bytes.
    beside: UsedBeside,
}

/// Where a disk's clients come in.
pub(crate) struct Entrance {
    /// Its own socket ...
    pub(crate) nbd: NbdUri,
    /// ... which is kept here.
    pub(crate) sockets: Sockets,
    /// It is found here by clients of the socket that all disks share.
    pub(crate) shared: Directory,
}

/// Starts the thread of an opened disk, serving it at `entrance`. Returns when clients can connect.
pub(crate) async fn start(
    opened: Opened,
    records: Records,
    entrance: Entrance,
) -> Result<DiskHandle, StartError> {
    let (commands, inbox) = mpsc::channel(COMMANDS_MAX);
    let (ready, started) = oneshot::channel();
    std::thread::Builder::new()
        .name(format!("disk-{}", opened.record.name))
        .spawn(move || run(opened, records, entrance, inbox, ready))
        .map_err(StartError::Thread)?;
    match started.await {
        Ok(Ok(())) => Ok(DiskHandle::new(commands)),
        Ok(Err(error)) => Err(error),
        Err(_) => Err(StartError::Thread(io::Error::other("the disk's thread ended at its start"))),
    }
}

fn run(
    opened: Opened,
    records: Records,
    entrance: Entrance,
    inbox: mpsc::Receiver<Command>,
    ready: oneshot::Sender<Result<(), StartError>>,
) {
    let runtime = match build_lasting(&mut tokio::runtime::Builder::new_current_thread()) {
        Ok(runtime) => runtime,
        Err(error) => return drop(ready.send(Err(StartError::Thread(error)))),
    };
    let tasks = tokio::task::LocalSet::new();
    tasks.block_on(&runtime, async move {
        match Disk::begin(opened, records, entrance).await {
            Ok(disk) => {
                // Who started it may have given up; the disk is served until it is detached.
                let _ = ready.send(Ok(()));
                disk.serve(inbox).await;
            }
            Err(error) => drop(ready.send(Err(error))),
        }
    });
}

impl Disk {
    async fn begin(opened: Opened, records: Records, entrance: Entrance) -> Result<Self, StartError> {
        let Entrance { nbd, sockets, shared } = entrance;
        let (limits, spill) = (opened.nbd, opened.spill);
        let Opened { record, behind, settings, resume, tracking, io_engine, poll_seats, .. } = opened;
        let (known_until, tls) = (opened.known_until, opened.tls);
        let (medium, image) = match behind {
            Behind::Image(image) => {
                let image = Arc::new(image);
                let disk = ImageDisk::new(Arc::clone(&image), io_engine)?;
                (Medium::Image(Box::new(disk)), Some(image))
            }
            Behind::Nbd(uri, size, _) => (Medium::Nbd(NbdDisk::connect(uri, size).await?), None),
        };
        let local = match opened.hydration {
            None => Local::Whole(medium),
            Some(hydration) => {
                let (noted, (file, source)) = (path_of(&record.image), hydration.begin(tls.clone()));
                Local::Hydrating(HydratingDisk::new(record.name.clone(), medium, noted, file, source))
            }
        };
        let (signed, kind) = ((tracking, opened.alive), (settings.activity, settings.size));
        let (tracking, left) = Tracking::new(signed, kind, records.clone(), record.name.clone(), spill);
        let life = Life::new(Rc::clone(&tracking), opened.in_place, image.clone());
        let engine = Engine::new(
            |now| Filter::new(settings, resume, now),
            Rc::new(local),
            tracking,
            Polling::new(poll_seats),
        );
        super::engine::set_pace(&engine, &record.limits);
        engine.happen(|filter, now| {
            filter.lsns_reserved(now, record.lsn_bound);
            filter.not_before(record.last_time);
            if record.flush_failed {
                filter.owes_failure(IoFailure { errno: EIO });
            }
            filter.follows(record.attaches.clone());
            if let Some(until) = known_until {
                filter.knows_until(until);
            }
            if let Some(left) = left {
                filter.use_spill(left);
            }
        });
        if record.paused {
            engine.happen(|filter, now| filter.pause(now));
        }
        // Before anything is connected to which the image could be read.
        let mut past_agent = PastAgent::new(image.as_deref(), record.written_past_agent);
        past_agent.follow_up(&engine);
        let purpose = nbd_purpose(&record.name);
        let listener = Listener::bind_kept(&nbd, limits.socket_mode, &sockets, &purpose).await?;
        let listener = listener.for_disk(record.name.clone());
        let nbd = NbdUri { address: listener.address().clone(), ..nbd };
        let export = DiskExport::new(Rc::clone(&engine));
        let mut server = listener.serve(Rc::new(OneExport(export)), limits);
        server.offer_in(&shared, record.name.as_str(), &record.name);
        record.clientele.expected_by(&server);
        let stream =
            Stream::new(Rc::clone(&engine), Dialer::new(record.receiver.clone(), tls), Terms::of(&record));
        tokio::task::spawn_local(Rc::clone(&engine).keep_time());
        if record.fenced {
            stream.stay_fenced();
        } else {
            tokio::task::spawn_local(Rc::clone(&stream).keep());
        }
        tokio::task::spawn_local(Rc::clone(&engine).keep_ring());
        let polled = Rc::clone(&engine);
        tokio::task::spawn_local(async move { polled.polling.keep().await });
        tokio::task::spawn_local(super::forgotten::keep(Rc::clone(&engine)));
        engine.local.hydrate();
        KillPoint::AttachServed.reached();
        tracing::info!(disk = %record.name, epoch = %record.epoch, nbd = %nbd, "disk attached");
        let (verifies, watch) = (Verifies::default(), super::status::Watch::default());
        let unsaved = None;
        let beside = UsedBeside::found(opened.beside, record.name.as_str());
        Ok(Self {
            engine,
            stream,
            server,
            nbd,
            limits: record.limits,
            record,
            records,
            image,
            verifies,
            watch,
            life,
            unsaved,
            past_agent,
            beside,
        })
    }

    async fn serve(mut self, mut inbox: mpsc::Receiver<Command>) {
        let mut housekeeping = tokio::time::interval(HOUSEKEEPING);
        loop {
            tokio::select! {
                command = inbox.recv() => match command {
                    Some(Command::Detach { leaving, answer }) => {
                        if leaving == (Leaving::Asked { nobody_returns: true }) {
                            Clientele::default().expected_by(&self.server);
                        }
                        let clients = self.server.connections();
                        let awaited = Clientele::awaited(&self.server).count();
                        if leaving.spares(clients.saturating_add(awaited as usize)) {
                            let status = self.engine.look(Filter::status);
                            let watched = u32::try_from(clients).unwrap_or(u32::MAX);
                            let waits = self.watch.waits_on(&status, watched, self.record.on_outage);
                            let _ = answer.send(Err(DetachError::Open { clients, awaited, waits }));
                            continue;
                        }
                        inbox.close();
                        let result = self.detach(leaving).await;
                        // Who asked may have gone; the disk is detached all the same.
                        let _ = answer.send(result);
                        return;
                    }
                    Some(command) => self.obey(command).await,
                    // The agent is gone without a word: end as cleanly as possible.
                    None => {
                        if let Err(error) = self.detach(Leaving::Stopped).await {
                            tracing::error!(%error, "detach");
                        }
                        return;
                    }
                },
                _ = housekeeping.tick() => self.keep_house().await,
                // At once: an agent that dies now must know its history when it comes back.
                () = self.engine.acquainted.notified() => self.keep_house().await,
            }
        }
    }

    /// Carries out a command. Whoever asked may have given up waiting, so answers may go nowhere.
    async fn obey(&mut self, command: Command) {
        match command {
            Command::Status(answer) => drop(answer.send(self.status())),
            Command::Pause(answer) => {
                self.engine.happen(|filter, now| filter.pause(now));
                self.engine.end_stream(Kick::Operator("paused by an operator"));
                self.save_asked().await;
                drop(answer.send(self.status()));
            }
            Command::Resume(answer) => {
                self.engine.happen(|filter, now| filter.resume(now));
                self.engine.wanted.notify_one();
                self.save_asked().await;
                drop(answer.send(self.status()));
            }
            Command::Resync(kind, answer) => {
                self.engine.happen(|filter, now| filter.force_resync(now, kind));
                // What was promised is not forgotten by an agent that is killed.
                self.engine.until(|filter| !filter.is_saving_everything()).await;
                drop(answer.send(self.status()));
            }
            Command::Limits(change, answer) => {
                self.set_limits(change).await;
                drop(answer.send(self.status()));
            }
            Command::Hold(answer) => {
                let forwarding = self.engine.happen(|filter, now| {
                    filter.hold_answers(now);
                    filter.can_mark()
                });
                // Who asked is gone: nobody would ever release.
                if answer.send(forwarding).is_err() {
                    self.engine.happen(|filter, _| filter.give_held_answers());
                }
            }
            Command::Mark(label, answer) => {
                drop(answer.send(marking::mark(&self.engine, &label)));
            }
            Command::MarkKept(lsn, label, answer) => {
                self.engine.look(|filter| self.engine.marks.wait(filter, lsn, label, answer));
            }
            Command::Release(answer) => {
                let _ = answer.send(self.engine.happen(|filter, _| filter.give_held_answers()));
            }
            Command::StartVerify(repair, answer) => {
                let started = self.engine.happen(|filter, now| filter.start_verify(now, repair));
                let began = started.map(|()| {
                    self.verifies.begin(self.engine.now().wall);
                    self.verify_status().expect("it began just now")
                });
                drop(answer.send(began));
            }
            Command::VerifyStatus(answer) => drop(answer.send(self.verify_status())),
            Command::CancelVerify(answer) => {
                self.engine.happen(Filter::cancel_verify);
                drop(answer.send(self.verify_status()));
            }
            Command::Flush(answer) => {
                let engine = Rc::clone(&self.engine);
                tokio::task::spawn_local(async move {
                    let flushed = engine.local.run(LocalOp::Change(Change::Flush)).await;
                    // The system tells of lost pages once: neither a guest nor the detach hears again.
                    if let Err(failure) = &flushed {
                        engine.happen(|filter, now| filter.flush_failed(now, *failure));
                    }
                    let _ = answer.send(flushed.is_ok());
                });
            }
            Command::Detach { .. } => unreachable!("taken by the caller"),
        }
    }

    pub(super) fn status(&self) -> DiskStatus {
        let clients = u32::try_from(self.server.connections()).unwrap_or(u32::MAX);
        let (record, nbd) = (&self.asked(), &self.nbd);
        let mut status =
            super::status::disk_status(&self.engine, &self.stream, record, nbd, clients, &self.watch);
        status.awaited_clients = Clientele::awaited(&self.server).count();
        status.local_error =
            status.local_error.or_else(|| self.life.displaced.as_ref().map(Displaced::to_string));
        status.local_error = status.local_error.or_else(|| self.unsaved.clone());
        status.unsaved.clone_from(&self.unsaved);
        // Who it is goes before what came of it.
        status.local_error = status.local_error.or_else(|| self.beside.told());
        self.past_agent.tell(&mut status, &self.record);
        status
    }

    fn verify_status(&mut self) -> Option<VerifyStatus> {
        self.verifies.status(&self.engine)
    }

    async fn set_limits(&mut self, change: LimitsChange) {
        let limits = &mut self.limits;
        let rate = change.resync_bytes_per_second_max;
        limits.resync_bytes_per_second_max = rate.unwrap_or(limits.resync_bytes_per_second_max);
        limits.resync_latency_us_max = change.resync_latency_us_max.unwrap_or(limits.resync_latency_us_max);
        super::engine::set_pace(&self.engine, &self.limits);
        self.save_asked().await;
    }

    /// The record with what a person has asked for.
    pub(super) fn asked(&self) -> DiskRecord {
        let paused = self.engine.look(Filter::mode) == Mode::Paused;
        let clientele = Clientele::now(&self.server);
        DiskRecord { paused, limits: self.limits, clientele, ..self.record.clone() }
    }

    /// Brings the record up to date, ahead of what the filter needs of it.
    async fn keep_house(&mut self) {
        let status = self.engine.look(Filter::status);
        self.watch.sample(&status);
        // What a resync has in memory it reads into again.
        let reads = self.engine.look(Filter::read_use).map(|_| self.limits.resync_buffer_bytes);
        self.engine.local.medium().keep_buffers(reads.unwrap_or_default());
        self.look_for_others().await;
        self.beside.look(self.record.name.as_str()).await;
        self.save_asked().await;
        if let Some(epoch) = self.stream.fenced_by.get() {
            let mut fenced = self.record.clone();
            fenced.fence(epoch);
            self.save_record(fenced).await;
            // Only what is saved is forgotten here.
            if self.record.fenced && self.stream.fenced_by.get() <= Some(self.record.epoch) {
                self.stream.fenced_by.set(None);
            }
        }
        // Also should the agent die before the image is where it was again.
        let image_displaced = self.life.has_lost_its_image();
        if image_displaced != self.record.image_displaced {
            self.save_record(DiskRecord { image_displaced, ..self.record.clone() }).await;
        }
        // Also should the agent die before a guest was told.
        let flush_failed = self.engine.look(Filter::untold_failure).is_some();
        if flush_failed != self.record.flush_failed {
            self.save_record(DiskRecord { flush_failed, ..self.record.clone() }).await;
        }
        let acked = self.engine.look(Filter::acked_durable);
        let bound_is_near = status.last_lsn.0 + LSN_STEP / 2 > self.record.lsn_bound.0;
        // With the attach by which the receiver knows it.
        let mut welcomed = self.record.clone();
        self.engine.look(|filter| welcomed.note_welcome(filter));
        let is_news = welcomed != self.record || status.history != self.record.history;
        // A bound of what was acknowledged, so it need not follow every acknowledgement.
        let acked_is_stale = acked > self.record.acked_durable && status.mode == Mode::Sync;
        if bound_is_near || is_news || (acked_is_stale && self.watch.is_minute_over()) {
            let record = DiskRecord {
                lsn_bound: status.last_lsn.plus(LSN_STEP).max(self.record.lsn_bound),
                history: status.history,
                acked_durable: acked,
                last_time: status.last_time,
                ..welcomed
            };
            self.save_record(record).await;
        }
    }

    /// Looks at the image, and who else writes it, and keeps what the next attach has to know of that.
    async fn look_for_others(&mut self) {
        let (engine, server, name) = (&self.engine, &self.server, self.record.name.clone());
        let written = self.life.look_for_others(|| Own::now(engine, server), name.as_str()).await;
        self.past_agent.look(self.image.as_ref(), written, name.as_str()).await;
        if self.past_agent.follow_up(engine) {
            self.life.renew();
        }
        // Also should the agent die before everything was compared.
        let written_past_agent = self.past_agent.wrote();
        if !written_past_agent {
            self.life.was_compared();
        }
        if written_past_agent != self.record.written_past_agent {
            self.save_record(DiskRecord { written_past_agent, ..self.record.clone() }).await;
        }
        // The sign vouches for the image: not before the record says who else wrote it.
        if written_past_agent == self.record.written_past_agent {
            let captured = self.engine.look(Filter::status).last_time;
            self.life.keep(captured, name.as_str()).await;
        }
    }
}

/// What the socket of a disk is kept for.
pub(crate) fn nbd_purpose(disk: &DiskName) -> String {
    format!("disk-{disk}")
}
