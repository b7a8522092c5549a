//! How mounts end, and what becomes of what was written to them.
//!
//! Invariant: nobody who has a mount open loses it by a person who does not know that.

use std::{sync::Arc, time::Duration};

use backtide_overlay::Overlay;
use backtide_receiver_api::{ApiError, ErrorCode, Mount, OverlayFate, UnmountRequest};
use tokio::time::Instant;

use super::{Mounted, Table};
use crate::{disk::chain, pool::Pool};

/// How long an unmount waits for requests in flight.
const UNMOUNT_GRACE: Duration = Duration::from_secs(5);

/// How long a client that has hung up may be taken for one that is there: its socket was not read yet ...
const LEAVING_TIME: Duration = Duration::from_millis(300);
/// ... and how often that is looked at.
const LEAVING_LOOK: Duration = Duration::from_millis(10);

impl Table {
    pub(super) async fn unmount(&self, id: &str, how: UnmountRequest) -> Result<Mount, ApiError> {
        let mounted = self.take(id, how).await?;
        let ended = self.end_and_settle(mounted, how.overlay).await;
        self.settling.borrow_mut().remove(id);
        ended
    }

    /// Takes a mount out of the table, when it can end so.
    async fn take(&self, id: &str, how: UnmountRequest) -> Result<Mounted, ApiError> {
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
        UnmountRequest { overlay, force }: UnmountRequest,
    ) -> Result<Mounted, ApiError> {
        let mut mounts = self.mounted.borrow_mut();
        let Some(mounted) = mounts.get(id) else {
            return Err(ApiError::new(ErrorCode::NotFound, format!("there is no mount {id:?}"))
                .with_hint("the control API's /v1/mounts lists them"));
        };
        let writable = mounted.overlay.is_some();
        match (writable, overlay) {
            (true, None) => {
                let why = format!("mount {id} is writable: what was written to it is kept or discarded");
                return Err(ApiError::new(ErrorCode::Usage, why)
                    .with_hint(format!("backtide unmount {id} --keep, or backtide unmount {id} --discard")));
            }
            (false, Some(_)) => {
                let why = format!("mount {id} is read-only: there is nothing to keep or discard");
                return Err(ApiError::new(ErrorCode::Usage, why).with_hint(format!("backtide unmount {id}")));
            }
            (true, Some(_)) | (false, None) => {}
        }
        // One that is temporary is the command's that asked for it, and ends it.
        if !force && !mounted.temporary {
            mounted.refuse_in_use(overlay)?;
        }
        if writable {
            self.settling.borrow_mut().insert(id.to_owned());
        }
        Ok(mounts.remove(id).expect("it is there"))
    }

    async fn end_and_settle(&self, mounted: Mounted, fate: Option<OverlayFate>) -> Result<Mount, ApiError> {
        let (overlays, id) = (self.serving.overlays.clone(), mounted.id.clone());
        self.serving.directory.forget(&id);
        let (ended, flushed) = mounted.end(self.serving.writers.clone()).await;
        let done = match fate {
            None => return Ok(ended),
            Some(OverlayFate::Keep) => {
                let kept = move || {
                    overlays.serve_at(&id, None)?;
                    flushed.map_err(|why| overlays.not_flushed(&id, &why))
                };
                self.serving.writers.run(kept).await
            }
            Some(OverlayFate::Discard) => self.serving.writers.run(move || overlays.discard(&id, true)).await,
        };
        done.map_err(|error| ApiError::new(ErrorCode::Failed, error.to_string()))?.map(|()| ended)
    }
}

impl Mounted {
    fn refuse_in_use(&self, fate: Option<OverlayFate>) -> Result<(), ApiError> {
        let id = &self.id;
        let who = match self.server.connections() {
            0 => return Ok(()),
            1 => "an NBD client has it open".to_owned(),
            clients => format!("{clients} NBD connections have it open"),
        };
        let (fate, what) = match fate {
            None => ("", "takes it from them"),
            Some(OverlayFate::Keep) => (" --keep", "takes it from them and keeps what was written"),
            Some(OverlayFate::Discard) => (" --discard", "takes it from them with all that was written"),
        };
        let hint = format!(
            "shut the virtual machine down, or end the program that uses it, then unmount; `backtide unmount {id}{fate} \
             --force` {what}"
        );
        Err(ApiError::new(ErrorCode::Busy, format!("mount {id} is in use: {who}")).with_hint(hint))
    }

    /// Ends it until the receiver is started again. What was written to is served again then, and to clients that connect
    /// again this is a pause and no error.
    pub(super) async fn leave(self, writers: Pool) {
        if self.overlay.is_some() {
            self.server.hand_over(UNMOUNT_GRACE).await;
        } else {
            self.server.shutdown(UNMOUNT_GRACE).await;
        }
        let _ = flush(&self.id, self.overlay, writers).await;
    }

    /// Ends it; with a sentence when what was written to it could not be made durable.
    pub(super) async fn end(self, writers: Pool) -> (Mount, Result<(), String>) {
        let description = self.describe();
        self.server.shutdown(UNMOUNT_GRACE).await;
        let flushed = flush(&self.id, self.overlay, writers).await;
        tracing::info!(mount = self.id, disk = %self.disk.uuid, "unmounted");
        (description, flushed)
    }
}

/// A client that did not flush was promised nothing; yet what can be kept is kept.
async fn flush(mount: &str, overlay: Option<Arc<Overlay>>, writers: Pool) -> Result<(), String> {
    let Some(overlay) = overlay else { return Ok(()) };
    let flushed = match writers.run(move || overlay.flush()).await {
        Ok(flushed) => flushed.map_err(|error| chain(&error)),
        Err(ended) => Err(ended.to_string()),
    };
    if let Err(why) = &flushed {
        tracing::warn!(mount, why, "cannot flush the mount's overlay");
    }
    flushed
}
