//! The start of the agent's disks: those that were attached when it ended are attached again.
//!
//! Invariants: they are opened side by side, and one whose storage stands still holds up the start
//! for a bounded time; every one that is missing is shown and tried again, until it is there or an operator
//! gives it up; so is one whose record cannot be read, which may have been attached.

use std::{
    sync::{Arc, PoisonError},
    time::Duration,
};

use backtide_agent_api::{DetachRequest, DiskStatus};
use backtide_control::{ApiError, ErrorCode};
use backtide_units::DiskName;
use tokio::task::JoinSet;

use super::{
    Registry,
    errors::{failed, in_use},
    waiting,
};
use crate::{
    claims::Standing,
    disk,
    record::{AllRecords, DiskRecord},
};

/// How long after a failed start of the agent's disks the next attempt is made.
const RESTORE_AGAIN: Duration = Duration::from_secs(5);

/// How often it is looked whether room can be reserved in the state directory.
const RESERVE_AGAIN: Duration = Duration::from_secs(60);

/// How long the start of the agent waits for its disks; those that take longer follow.
const RESTORE_TIME: Duration = Duration::from_secs(10);

impl Registry {
    /// Attaches again every disk that was attached when the agent ended. One that cannot be is
    /// logged; whether there are such, to be tried again. Where the state directory is full they get the room that is reserved there.
    pub(crate) async fn restore(self: &Arc<Self>) -> std::io::Result<bool> {
        let missing = self.restore_all().await?;
        if missing && self.use_reserve().await { self.restore_all().await } else { Ok(missing) }
    }

    /// Gives the missing disks the room that is reserved in the state directory, where that is full; whether it did.
    async fn use_reserve(&self) -> bool {
        let Some(name) = self.failing.read().await.keys().next().cloned() else { return false };
        match self.records.aside(move |records| records.use_reserve(&name)).await {
            Ok(true) => {
                let directory = self.records.directory();
                tracing::warn!(
                    state = %directory.display(),
                    "the state directory is full: disks are attached again with the room that was reserved there; make room"
                );
                true
            }
            Ok(false) => false,
            Err(error) => {
                tracing::warn!(%error, "cannot tell whether the state directory has room");
                false
            }
        }
    }

    /// Reserves room in the state directory for the next start, now and again and again: it is used up by a start without room, and
    /// there may be room later on.
    pub(crate) fn keep_reserve(self: &Arc<Self>) {
        let records = self.records.clone();
        self.beside(async move {
            loop {
                if let Err(error) = records.aside(|records| records.keep_reserve()).await {
                    tracing::debug!(%error, "no room is reserved in the state directory");
                }
                tokio::time::sleep(RESERVE_AGAIN).await;
            }
        });
    }

    /// [`restore`](Self::restore) without the reserve.
    async fn restore_all(self: &Arc<Self>) -> std::io::Result<bool> {
        let mut restoring = JoinSet::new();
        let mut wanted = Vec::new();
        let AllRecords { known, unreadable } = self.records.load_all_aside().await?;
        for record in known.into_iter().filter(|record| record.attached) {
            if !self.disks.read().await.contains_key(&record.name) {
                wanted.push(record.clone());
                restoring.spawn(Arc::clone(self).restore_one(record));
            }
        }
        let all = async { while restoring.join_next().await.is_some() {} };
        if tokio::time::timeout(RESTORE_TIME, all).await.is_err() {
            restoring.detach_all();
        }
        let mut missing = false;
        for record in wanted {
            missing |= self.show_missing(&record).await;
        }
        for (name, error) in unreadable {
            missing |= self.show_unreadable(&name, &error).await;
        }
        Ok(self.let_go_of_given_up().await || missing)
    }

    /// Shows a disk as missing whose record cannot be read, if it is missing; whether it is. It may have been attached.
    async fn show_unreadable(&self, name: &DiskName, error: &std::io::Error) -> bool {
        let (mut failing, disks) = (self.failing.write().await, self.disks.read().await);
        if disks.contains_key(name) {
            return false;
        }
        let shown = disk::not_attached(&DiskRecord::unknown(name.clone()), &error.to_string());
        // Of what was known before only the reason is another one.
        failing
            .entry(name.clone())
            .and_modify(|known| known.reason.clone_from(&shown.reason))
            .or_insert(shown);
        true
    }

    /// Disks whose records cannot be used, and that are not served either: the next agent can do no more than to show them
    /// too.
    ///
    /// # Errors
    /// When the records cannot be listed.
    pub(crate) async fn lost(&self) -> Result<Vec<DiskName>, ApiError> {
        let AllRecords { unreadable, .. } = self.records.load_all_aside().await.map_err(|error| {
            let directory = self.records.directory();
            let message = format!("cannot read the disks' records in {}: {error}", directory.display());
            ApiError::new(ErrorCode::Failed, message)
                .with_hint("bring the state directory back: the agent that follows would know no disk")
        })?;
        let disks = self.disks.read().await;
        Ok(unreadable.into_iter().map(|(name, _)| name).filter(|name| !disks.contains_key(name)).collect())
    }

    /// Shows no disk as missing any more that somebody has given up by taking its record away, or that turns out to have been
    /// detached; whether there may be more such.
    async fn let_go_of_given_up(&self) -> bool {
        let names: Vec<DiskName> = self.failing.read().await.keys().cloned().collect();
        let mut more = false;
        for name in names {
            let Ok(_claim) = self.claims.try_claim(&name) else {
                more = true;
                continue;
            };
            if !self.disks.read().await.contains_key(&name) && self.is_given_up(&name).await {
                self.failing.write().await.remove(&name);
                self.forget_sockets(&name);
            }
        }
        more
    }

    /// Shows a disk as missing, if it is; whether it is.
    async fn show_missing(&self, record: &DiskRecord) -> bool {
        let name = &record.name;
        if self.disks.read().await.contains_key(name) || self.is_given_up(name).await {
            return false;
        }
        {
            let (mut failing, disks) = (self.failing.write().await, self.disks.read().await);
            if disks.contains_key(name) {
                return false;
            }
            failing.entry(name.clone()).or_insert_with(|| {
                tracing::warn!(disk = %name, "the disk is still being opened");
                disk::not_attached(record, "its storage has not answered yet")
            });
        }
        // It may have been given up just before it was shown: whoever does that saves the record first.
        let given_up = self.is_given_up(name).await;
        if given_up {
            self.failing.write().await.remove(name);
        }
        !given_up
    }

    /// Why a disk's record cannot be used; `then` is what becomes of the disk when it is moved away.
    pub(super) fn unreadable(&self, error: &std::io::Error, then: &str) -> ApiError {
        let directory = self.records.directory();
        match error.kind() {
            std::io::ErrorKind::Unsupported => failed(error).with_hint(format!(
                "start the agent that wrote it; or move it out of {}, {then}",
                directory.display()
            )),
            std::io::ErrorKind::InvalidData => {
                failed(error).with_hint(format!("move it out of {}, {then}", directory.display()))
            }
            _ => failed(error).with_hint(format!("{} has to be readable and writable", directory.display())),
        }
    }

    async fn is_given_up(&self, name: &DiskName) -> bool {
        self.records.load_aside(name).await.is_ok_and(|now| now.is_none_or(|now| !now.attached))
    }

    async fn restore_one(self: Arc<Self>, record: DiskRecord) {
        let name = record.name.clone();
        // Somebody else attaches it now, or still tries to.
        let Ok(claim) = self.claims.try_claim(&name) else { return };
        // Those that stand still must not keep the others from being opened.
        let _turn = tokio::time::timeout(RESTORE_TIME, self.opening.acquire()).await;
        if self.disks.read().await.contains_key(&name) {
            return;
        }
        // As it is now: it may have been detached since it was read.
        let record = match self.records.load_aside(&name).await {
            Ok(Some(record)) if record.attached => record,
            Ok(_) => return,
            Err(error) => return tracing::error!(disk = %name, %error, "cannot use the disk's record"),
        };
        if let Err(error) = self.start(&claim, record.clone(), Standing::Had).await {
            tracing::error!(disk = %name, error = %error.message, "cannot attach the disk again: will try again");
            let status = disk::not_attached(&record, &error.message);
            self.failing.write().await.insert(name, status);
        }
    }

    /// Gives up a disk that could not be attached again, by its name or UUID; none where there is no such.
    /// What is known of it stays as it is, so an attach under its name goes on with it.
    ///
    /// # Errors
    /// `busy` while who had it open before may come back, unless it is forced or nobody returns. `refused` while the image lacks
    /// blocks, unless it is to be given up incomplete.
    pub(super) async fn detach_failing(
        &self,
        disk: &DiskName,
        request: DetachRequest,
    ) -> Result<Option<DiskStatus>, ApiError> {
        let is_meant = |known: &DiskStatus| known.name == *disk || known.uuid.to_string() == disk.as_str();
        let Some(known) = self.failing.read().await.values().find(|known| is_meant(known)).cloned() else {
            return Ok(None);
        };
        // An attempt may be under way.
        let _claim = self.claim(&known.name).await?;
        if self.disks.read().await.contains_key(&known.name) {
            let message = format!("disk {} has just been attached again", known.name);
            return Err(ApiError::new(ErrorCode::Busy, message).with_hint("detach it once more"));
        }
        let record = self.records.load_aside(&known.name).await.ok().flatten();
        let awaited = record.as_ref().map_or(0, |record| record.clientele.left().count());
        if awaited > 0 && !request.force && !request.nobody_returns {
            return Err(in_use(&known.name, &disk::DetachError::Open { clients: 0, awaited, waits: false }));
        }
        let lacks = self.give_up_incomplete(&known.name, record, request).await?;
        self.records
            .change_aside(&known.name, |record| Some(record.given_up()))
            .await
            .map_err(|error| self.unreadable(&error, "that gives the disk up"))?;
        self.failing.write().await.remove(&known.name);
        self.forget_sockets(&known.name);
        tracing::info!(disk = %known.name, "disk given up: it could not be attached again");
        Ok(Some(DiskStatus { local_error: lacks, ..disk::given_up(known) }))
    }

    /// Refuses to give up a disk that lacks blocks, unless it is to be given up so; then the note is beside the image, and it is said what
    /// is missing.
    async fn give_up_incomplete(
        &self,
        name: &DiskName,
        record: Option<DiskRecord>,
        request: DetachRequest,
    ) -> Result<Option<String>, ApiError> {
        let (records, disk) = (self.records.clone(), name.clone());
        let (lacks, is_known) = match waiting(move || disk::lacked(&records, &disk)).await? {
            Ok(nothing) if nothing.is_zero() => return Ok(None),
            Ok(missing) => (format!("it lacks {missing} bytes, which are still at the receiver"), true),
            Err(problem) => (problem.to_string(), false),
        };
        if !request.incomplete {
            let message =
                format!("the image of disk {name}, which is not attached, is not complete: {lacks}");
            return Err(ApiError::new(ErrorCode::Refused, message).with_hint(
                "detach it when it is attached again and nothing is missing; with --incomplete only this agent can go on with it",
            ));
        }
        if let Some(record) = record.filter(|_| is_known) {
            let records = self.records.clone();
            let left = waiting(move || disk::leave_note(&records, &record)).await?;
            // Who forces it knows that nothing beside the image says so.
            left.or_else(|problem| if request.force { Ok(()) } else { Err(failed(&problem)) })?;
        }
        Ok(Some(lacks))
    }

    /// [`restore`](Self::restore) at once, and then until every disk is there.
    pub(crate) async fn restore_at_once(self: Arc<Self>) {
        match self.restore().await {
            Ok(false) => {}
            Ok(true) | Err(_) => self.keep_restoring().await,
        }
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

    /// The same beside whatever else tries, until [`end_restoring`](Self::end_restoring): none that may
    /// be in the middle of an attach is ended for another.
    pub(super) fn restore_beside(self: &Arc<Self>) {
        self.beside(Arc::clone(self).keep_restoring());
    }

    fn beside(&self, work: impl Future<Output = ()> + Send + 'static) {
        let task = tokio::spawn(work).abort_handle();
        let mut restoring = self.restoring.lock().unwrap_or_else(PoisonError::into_inner);
        restoring.retain(|other| !other.is_finished());
        restoring.push(task);
    }

    /// Ends what goes on trying, which has this registry, and with it the lock on the state directory.
    pub(super) fn end_restoring(&self) {
        for task in self.restoring.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            task.abort();
        }
    }

    /// Lets go of what clients reach a disk by that is attached no more.
    pub(super) fn forget_sockets(&self, name: &DiskName) {
        self.sockets.forget(&disk::nbd_purpose(name));
        self.directory.forget(name.as_str());
    }

    /// Lets clients of disks wait that were attached when the agent ended, at the socket that all share. Lets go of
    /// listening sockets that were kept for disks which are attached no more: an agent may
    /// have died between the end of a disk and that of its socket.
    pub(crate) async fn forget_other_sockets(&self, others: &[&str]) -> std::io::Result<()> {
        let AllRecords { known, unreadable } = self.records.load_all_aside().await?;
        let attached = known.into_iter().filter(|record| record.attached).map(|record| record.name);
        // Those of which nothing is known may have been attached too.
        let expected = attached.chain(unreadable.into_iter().map(|(name, _)| name));
        let expected = expected.inspect(|name| self.directory.expect(name.as_str(), name));
        let mut purposes: Vec<String> = expected.map(|name| disk::nbd_purpose(&name)).collect();
        purposes.extend(others.iter().map(|purpose| (*purpose).to_owned()));
        self.sockets.forget_others(&purposes);
        Ok(())
    }
}
