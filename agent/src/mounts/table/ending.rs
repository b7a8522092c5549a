//! How mounts end, and what becomes of what was written to them.
//!
//! Invariants: what is to be kept is durable, and said to be kept, before that is answered; what is to be discarded is
//! said to be ended, durably, before a byte of it goes, so that nobody is ever served a part of it.

use std::rc::Rc;

use backtide_agent_api::{AgentKeptOverlay, AgentMount, AgentOverlayFate};
use backtide_control::{ApiError, ErrorCode};

use super::{Mounted, PAUSE, Table};
use crate::{
    disk::source::{FetchError, PointSource},
    mounts::record::MountRecord,
};

impl Table {
    pub(super) async fn unmount(
        self: &Rc<Self>,
        id: &str,
        fate: Option<AgentOverlayFate>,
    ) -> Result<AgentMount, ApiError> {
        let mounted = self.take(id, fate)?;
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
    fn take(&self, id: &str, fate: Option<AgentOverlayFate>) -> Result<Mounted, ApiError> {
        let mut mounts = self.mounted.borrow_mut();
        let served = mounts.get(id).filter(|one| !one.record.kept);
        match (served.map(|one| one.record.overlay.is_some()), fate) {
            (Some(true), None) => {
                let why = format!("mount {id} is writable: what was written to it is kept or discarded");
                let hint =
                    format!("backtide unmount {id} --here --keep, or backtide unmount {id} --here --discard");
                Err(ApiError::new(ErrorCode::Usage, why).with_hint(hint))
            }
            (Some(false), Some(_)) => {
                let why = format!("mount {id} is read-only: there is nothing to keep or discard");
                Err(ApiError::new(ErrorCode::Usage, why).with_hint(format!("backtide unmount {id} --here")))
            }
            (Some(writable), _) => {
                if writable {
                    self.settling.borrow_mut().insert(id.to_owned());
                }
                Ok(mounts.remove(id).expect("it is there"))
            }
            (None, _) => {
                Err(ApiError::new(ErrorCode::NotFound, format!("there is no mount {id:?} at the agent"))
                    .with_hint(
                        "`backtide mount --here` lists the agent's, `backtide mount` those of the receiver",
                    ))
            }
        }
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

/// There is nothing kept under this id.
pub(super) fn no_overlay(id: &str) -> ApiError {
    ApiError::new(ErrorCode::NotFound, format!("there is no overlay {id:?} at the agent"))
        .with_hint("`backtide mount --here` lists the mounts and overlays there are")
}
