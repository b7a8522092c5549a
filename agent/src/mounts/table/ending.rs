//! How mounts end, and what becomes of what was written to them.
//!
//! Invariants: what is to be kept is durable, and said to be kept, before that is answered; what is to be discarded is
//! said to be ended, durably, before a byte of it goes, so that nobody is ever served a part of it; nobody who has a
//! mount open loses it by a person who does not know that.

use std::{rc::Rc, time::Duration};

use backtide_agent_api::{AgentKeptOverlay, AgentMount, AgentOverlayFate, AgentUnmountRequest};
use backtide_control::{ApiError, ErrorCode};
use tokio::time::Instant;

use super::{Mounted, PAUSE, Table};
use crate::{
    disk::source::{FetchError, PointSource},
    mounts::record::MountRecord,
};

/// How long a client that has hung up may be taken for one that is there: its socket was not read yet ...
const LEAVING_TIME: Duration = Duration::from_millis(300);
/// ... and how often that is looked at.
const LEAVING_LOOK: Duration = Duration::from_millis(10);

impl Table {
    pub(super) async fn unmount(
        self: &Rc<Self>,
        id: &str,
        how: AgentUnmountRequest,
    ) -> Result<AgentMount, ApiError> {
        let fate = how.overlay;
        let mounted = self.take(id, how).await?;
        let told = mounted.describe();
        let Mounted { record, source, served, trouble: _ } = mounted;
        let ended = match served {
            Some(served) => served.end(id).await,
            None => Ok(()),
        };
        tracing::info!(mount = id, "unmounted");
        match fate {
            None => self.end_record(record, source).await,
            Some(fate) => {
                let settled = self.settle(record, fate).await;
                self.settling.borrow_mut().remove(id);
                settled?;
                if let (Err(why), AgentOverlayFate::Keep) = (ended, fate) {
                    let why = format!(
                        "mount {id} has ended and is kept, but not all that was written is durable: {why}"
                    );
                    return Err(ApiError::new(ErrorCode::Failed, why));
                }
            }
        }
        Ok(told)
    }

    /// Takes a mount out of the table, when it can end so.
    async fn take(&self, id: &str, how: AgentUnmountRequest) -> Result<Mounted, ApiError> {
        let begun = Instant::now();
        loop {
            match self.try_take(id, how) {
                Err(in_use) if in_use.code == ErrorCode::Busy && begun.elapsed() < LEAVING_TIME => {
                    tokio::time::sleep(LEAVING_LOOK).await;
                }
                taken => return taken,
            }
        }
    }

    fn try_take(
        &self,
        id: &str,
        AgentUnmountRequest { overlay, force }: AgentUnmountRequest,
    ) -> Result<Mounted, ApiError> {
        let mut mounts = self.mounted.borrow_mut();
        let Some(mounted) = mounts.get(id).filter(|one| !one.record.kept) else {
            return Err(ApiError::new(ErrorCode::NotFound, format!("there is no mount {id:?} at the agent"))
                .with_hint(
                    "`backtide mount --here` lists the agent's, `backtide mount` those of the receiver",
                ));
        };
        let writable = mounted.record.overlay.is_some();
        match (writable, overlay) {
            (true, None) => {
                let why = format!("mount {id} is writable: what was written to it is kept or discarded");
                let hint =
                    format!("backtide unmount {id} --here --keep, or backtide unmount {id} --here --discard");
                return Err(ApiError::new(ErrorCode::Usage, why).with_hint(hint));
            }
            (false, Some(_)) => {
                let why = format!("mount {id} is read-only: there is nothing to keep or discard");
                return Err(
                    ApiError::new(ErrorCode::Usage, why).with_hint(format!("backtide unmount {id} --here"))
                );
            }
            (true, Some(_)) | (false, None) => {}
        }
        if !force {
            mounted.refuse_in_use(overlay)?;
        }
        if writable {
            self.settling.borrow_mut().insert(id.to_owned());
        }
        Ok(mounts.remove(id).expect("it is there"))
    }

    /// Removes an overlay that is kept.
    pub(super) async fn discard(self: &Rc<Self>, id: &str) -> Result<AgentKeptOverlay, ApiError> {
        let found = self.mounted.borrow().get(id).map(|one| one.record.clone());
        let settling = self.settling.borrow().contains(id);
        let record = match found {
            Some(record) if record.kept && !settling => record,
            Some(MountRecord { overlay: None, .. }) | None if !settling => return Err(no_overlay(id)),
            Some(_) | None => {
                return Err(ApiError::new(ErrorCode::Busy, format!("overlay {id} is mounted"))
                    .with_hint(format!("backtide unmount {id} --here --discard")));
            }
        };
        self.settling.borrow_mut().insert(id.to_owned());
        let trouble = self.mounted.borrow_mut().remove(id).and_then(|one| one.trouble);
        let told = self.describe_kept(&record, trouble).await;
        let settled = self.settle(record, AgentOverlayFate::Discard).await;
        self.settling.borrow_mut().remove(id);
        settled.map(|()| told)
    }

    /// Does with the overlay of a mount that has ended what is wanted.
    async fn settle(self: &Rc<Self>, record: MountRecord, fate: AgentOverlayFate) -> Result<(), ApiError> {
        let kept = record.clone().into_kept();
        let wanted = match fate {
            AgentOverlayFate::Keep => kept.clone(),
            AgentOverlayFate::Discard => record.into_ended(),
        };
        if let Err(error) = self.saved(&wanted).await {
            // Nobody knows which of the two the next agent finds; this one can be told again.
            self.keep(kept, Some(error.message.clone()));
            return Err(error);
        }
        if fate == AgentOverlayFate::Keep {
            self.keep(kept, None);
            return Ok(());
        }
        // What cannot be removed now is removed when the agent starts.
        self.on_storage(&wanted, |overlays, record| overlays.remove(&record.id)).await?;
        let (table, source) = (Rc::clone(self), self.source_of(&wanted));
        tokio::task::spawn_local(async move { table.give_up(&source, wanted).await });
        Ok(())
    }

    fn keep(&self, record: MountRecord, trouble: Option<String>) {
        // A source of its own: whoever still tries to serve the mount sees by it that it has ended.
        let source = self.source_of(&record);
        let id = record.id.clone();
        self.mounted.borrow_mut().insert(id, Mounted { record, source, served: None, trouble });
    }

    /// Has the receiver give the point up, at once or when it is there again, also after a restart.
    pub(super) async fn end_record(self: &Rc<Self>, mut record: MountRecord, source: Rc<dyn PointSource>) {
        record.ended = true;
        if let Err(error) = self.saved(&record).await {
            tracing::warn!(mount = record.id, %error, "an ended mount may be served again after a restart");
        }
        let table = Rc::clone(self);
        tokio::task::spawn_local(async move { table.give_up(&source, record).await });
    }

    /// The same for one whose record says that it has ended.
    pub(super) async fn give_up(&self, source: &Rc<dyn PointSource>, record: MountRecord) {
        if record.overlay.is_some()
            && let Err(error) = self.on_storage(&record, |overlays, record| overlays.remove(&record.id)).await
        {
            tracing::warn!(mount = record.id, %error, "cannot remove what was written to an ended mount: the next start of the agent tries again");
            return;
        }
        while let Err(FetchError::Unreachable(_)) = source.release(&record.owner()).await {
            tokio::time::sleep(PAUSE).await;
        }
        let (records, id) = (self.serving.records.clone(), record.id);
        let removed = tokio::task::spawn_blocking(move || records.remove(&id)).await;
        if let Ok(Err(error)) = removed {
            tracing::warn!(%error, "cannot remove the record of an ended mount");
        }
    }
}

impl Mounted {
    fn refuse_in_use(&self, fate: Option<AgentOverlayFate>) -> Result<(), ApiError> {
        let id = &self.record.id;
        let who = match self.clients() {
            0 => return Ok(()),
            1 => "an NBD client has it open".to_owned(),
            clients => format!("{clients} NBD connections have it open"),
        };
        let (fate, what) = match fate {
            None => ("", "takes it from them"),
            Some(AgentOverlayFate::Keep) => (" --keep", "takes it from them and keeps what was written"),
            Some(AgentOverlayFate::Discard) => (" --discard", "takes it from them with all that was written"),
        };
        let hint = format!(
            "shut the virtual machine down, or end the program that uses it, then unmount; `backtide unmount {id} --here{fate} \
             --force` {what}"
        );
        Err(ApiError::new(ErrorCode::Busy, format!("mount {id} is in use: {who}")).with_hint(hint))
    }
}

/// There is nothing kept under this id.
pub(super) fn no_overlay(id: &str) -> ApiError {
    ApiError::new(ErrorCode::NotFound, format!("there is no overlay {id:?} at the agent"))
        .with_hint("`backtide mount --here` lists the mounts and overlays there are")
}
