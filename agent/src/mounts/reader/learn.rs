//! What the receiver tells of blocks: for whoever asks what a range holds, and for reads to come.

use std::rc::Rc;

use backtide_tracking::DirtyBitmap;
use backtide_units::ByteOffset;
use tokio::time::Instant;

use super::{Answering, FetchError, Map, Of, Reader, Try};
use crate::mounts::map::{Asking, Told};

impl Reader {
    /// The blocks with data in the window that has `at`, and those that changed, if that is to be told: asked for if they
    /// are not here.
    ///
    /// # Errors
    /// When the receiver is away for too long; it may take its time while it is heard of. What it will never be able to tell is no error: everything may be data,
    /// and changed.
    pub(in crate::mounts) async fn told_of(
        &self,
        at: ByteOffset,
    ) -> Result<(Rc<DirtyBitmap>, Option<Rc<DirtyBitmap>>), FetchError> {
        let data = self.window(&self.data, at).await?;
        let changed = match &self.changed {
            Some(changed) => Some(self.window(changed, at).await?),
            None => None,
        };
        Ok((data, changed))
    }

    async fn window(&self, map: &Map, at: ByteOffset) -> Result<Rc<DirtyBitmap>, FetchError> {
        let begun = Instant::now();
        loop {
            match map.look(at) {
                Told::Known(blocks) => return Ok(blocks),
                Told::Asked(over) => over.notified().await,
                Told::Unknown => {
                    let asking = map.ask(at);
                    let told = self.patiently(begun, Try::WhileHeardOf, || self.question(map, &asking)).await;
                    return taken(&asking, told);
                }
            }
        }
    }

    /// Somebody has read at `at`, and may read on there: what is known to be zeroes is not fetched. One window at a time, and
    /// not before what was read is here.
    pub(super) fn learn_soon(self: &Rc<Self>, at: ByteOffset) {
        if !matches!(self.data.look(at), Told::Unknown) || self.data.is_asked() {
            return;
        }
        let reader = Rc::clone(self);
        tokio::task::spawn_local(async move {
            // Somebody may have asked meanwhile.
            if let Told::Unknown = reader.data.look(at) {
                let asking = reader.data.ask(at);
                let told = reader.question(&reader.data, &asking).await;
                // A receiver that is away is what the next read says.
                drop(taken(&asking, told));
            }
        });
    }

    fn question(&self, map: &Map, asking: &Asking<'_>) -> Answering<'_, DirtyBitmap> {
        match map.of {
            Of::Data => self.source.data_in(asking.blocks()),
            Of::Changed(since) => self.source.changed_in(since, asking.blocks()),
        }
    }
}

/// What came of a question for a window.
fn taken(asking: &Asking<'_>, told: Result<DirtyBitmap, FetchError>) -> Result<Rc<DirtyBitmap>, FetchError> {
    match told {
        Ok(blocks) => Ok(asking.learned(blocks)),
        Err(error @ FetchError::Unreachable(_)) => Err(error),
        Err(why @ (FetchError::Damaged(_) | FetchError::Refused(_))) => {
            tracing::warn!(%why, "the receiver cannot tell what blocks of a mounted point hold: all of them are read");
            Ok(asking.cannot_be_told())
        }
    }
}
