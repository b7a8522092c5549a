//! Mounts of the last agent, and those of overlays that were kept.

use std::rc::Rc;

use backtide_agent_api::AgentMount;
use backtide_control::{ApiError, ErrorCode};
use backtide_export::{Listener, NbdUri};

use super::{BIND_PAUSE, Mounted, PAUSE, Place, Table, can_tell_since, ending::no_overlay};
use crate::{
    disk::source::{FetchError, PointSource},
    mounts::{overlays::Overlays, record::MountRecord},
};

impl Table {
    /// Serves a mount of the last agent.
    pub(super) async fn serve_again(self: Rc<Self>, record: MountRecord) {
        let source = self.source_of(&record);
        let mounted =
            Mounted { record: record.clone(), source: Rc::clone(&source), served: None, trouble: None };
        self.mounted.borrow_mut().insert(record.id.clone(), mounted);
        if record.kept {
            return;
        }
        let Some((place, listener)) = self.listen_again(&record, &source).await else { return };
        let opened = match record.overlay {
            None => None,
            Some(_) => match self.on_storage(&record, Overlays::open).await {
                Ok(opened) => Some(opened),
                Err(error) => {
                    tracing::error!(mount = record.id, %error, "a mount cannot be served again");
                    self.with(&record.id, &source, |mounted| mounted.trouble = Some(error.message));
                    return;
                }
            },
        };
        let reader = self.reader(&record, &source).await;
        let served = self.serve_at(&record, reader, opened, listener, place);
        let begun = |mounted: &mut Mounted| (mounted.served, mounted.trouble) = (Some(served), None);
        if self.with(&record.id, &source, begun) {
            self.keep_holding(&record, &source).await;
        }
    }

    /// Serves an overlay that is kept.
    pub(super) async fn remount(
        self: &Rc<Self>,
        id: &str,
        nbd: Option<NbdUri>,
    ) -> Result<AgentMount, ApiError> {
        let already = || ApiError::new(ErrorCode::Busy, format!("overlay {id} is mounted already"));
        if self.settling.borrow().contains(id) {
            return Err(already());
        }
        let found = self.mounted.borrow().get(id).map(|one| one.record.clone());
        let record = match found {
            Some(record) if record.kept => record,
            Some(MountRecord { overlay: Some(_), .. }) => return Err(already()),
            Some(_) | None => return Err(no_overlay(id)),
        };
        self.refuse_too_many()?;
        self.settling.borrow_mut().insert(id.to_owned());
        self.begun.set(self.begun.get() + 1);
        let mounted = self.serve_kept(record, nbd).await;
        self.begun.set(self.begun.get() - 1);
        self.settling.borrow_mut().remove(id);
        mounted
    }

    async fn serve_kept(
        self: &Rc<Self>,
        record: MountRecord,
        nbd: Option<NbdUri>,
    ) -> Result<AgentMount, ApiError> {
        let (place, listener) = self.listen(&record.id, nbd).await?;
        let record = record.served_at(place.asked.to_string());
        let opened = self.on_storage(&record, Overlays::open).await?;
        self.saved(&record).await?;
        let source = self.source_of(&record);
        let reader = self.reader(&record, &source).await;
        let served = self.serve_at(&record, reader, Some(opened), listener, place);
        let mounted = Mounted {
            record: record.clone(),
            source: Rc::clone(&source),
            served: Some(served),
            trouble: None,
        };
        let told = mounted.describe();
        self.mounted.borrow_mut().insert(record.id.clone(), mounted);
        let table = Rc::clone(self);
        tokio::task::spawn_local(async move { table.keep_holding(&record, &source).await });
        Ok(told)
    }

    /// Has the receiver keep the point of a mount, at once or when it is there.
    async fn keep_holding(&self, record: &MountRecord, source: &Rc<dyn PointSource>) {
        let id = &record.id;
        loop {
            let (trouble, again) = match self.hold_again(source, record).await {
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
            if !self.with(id, source, |mounted| mounted.trouble = trouble) || !again {
                return;
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// Listens where a mount was, as soon as that is possible; none when nobody wants it any more, or it never is.
    async fn listen_again(
        &self,
        record: &MountRecord,
        source: &Rc<dyn PointSource>,
    ) -> Option<(Place, Listener)> {
        let id = &record.id;
        let cannot = |why: String| {
            tracing::error!(mount = id, why, "a mount cannot be served again yet");
            self.with(id, source, |mounted| mounted.trouble = Some(why))
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
            let why = match self.listen_at(uri.clone()).await {
                Ok(there) => return Some(there),
                Err(error) => error.message,
            };
            if told.as_ref() != Some(&why) {
                told = Some(why.clone());
                if !cannot(why) {
                    return None;
                }
            }
            tokio::time::sleep(BIND_PAUSE).await;
            if !self.with(id, source, |_| ()) {
                return None;
            }
        }
    }

    /// The agent before may have ended between remembering the mount and having its point kept.
    async fn hold_again(&self, source: &Rc<dyn PointSource>, record: &MountRecord) -> Result<(), FetchError> {
        source.hold(&record.owner()).await?;
        can_tell_since(&**source, record.changed_since).await
    }

    /// Changes the mount that reads `source`, unless it was ended.
    fn with(&self, id: &str, source: &Rc<dyn PointSource>, change: impl FnOnce(&mut Mounted)) -> bool {
        let mut mounted = self.mounted.borrow_mut();
        // Meanwhile it may have been kept, and even mounted once more.
        let same = mounted.get_mut(id).filter(|one| Rc::ptr_eq(&one.source, source));
        same.map(change).is_some()
    }
}
