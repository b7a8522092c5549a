//! The end of a disk, step by step: its clients go, it comes to rest, the receiver gets what it can at once, and what the
//! next attach needs is saved.
//!
//! Invariants: no request follows what is saved of it; nobody else can have the image before it is flushed and its state
//! was looked at; what was not flushed, an image that is not in its place, and one that others may have written past the
//! agent, is not trusted at the next attach. No step but the local disk's own waits without
//! a bound.

use std::{rc::Rc, sync::Arc, time::Duration};

use backtide_agent_api::DiskStatus;
use backtide_io_filter::{Change, Filter, IoFailure, LocalOp, Mode};
use backtide_storage::{ImageFile, KillPoint};
use backtide_tracking::{DirtyBitmap, SavedTracking, Snapshot};
use backtide_units::{DiskId, DiskName};

use super::{
    engine::{Engine, Kick},
    leaving::{DetachError, Leaving, end_service},
    life::Own,
    local::blocking,
    past_agent::Compared,
    stream::Stream,
    thread::Disk,
};
use crate::record::{DiskRecord, Records};

/// How long a detach waits for its good-bye to be on its way.
const GOODBYE_TIME: Duration = Duration::from_millis(200);

impl Disk {
    /// Ends service, lets the receiver catch up if it can at once, saves what is left.
    pub(super) async fn detach(mut self, leaving: Leaving) -> Result<DiskStatus, DetachError> {
        let mut last = self.status();
        let told = self.past_agent.trouble(Compared::next(&self.record, last.mode));
        // It is another sentence from now on.
        last.local_error = last.local_error.filter(|error| Some(error) != told.as_ref());
        // Whoever comes from now on is not seen: neither refused for, nor awaited.
        self.server.stop_accepting();
        self.record = self.asked();
        let Self { engine, stream, server, mut record, records, image, mut life, mut past_agent, .. } = self;
        // Before anything of its own may be written that is not counted.
        let written = life.look_for_others(|| Own::now(&engine, &server), record.name.as_str()).await;
        last.guest_waits = end_service(&engine, server, leaving, last.guest_waits).await;
        let flushed = come_to_rest(&engine, &record.name).await;
        last.local_error = flushed.err().map(not_flushed).or(last.local_error);
        let flushed = flushed.is_ok();
        // Before anybody else can have the image; a qcow2's server writes it when it ends.
        record.image_at_detach = life.look(record.name.as_str()).await.filter(|_| flushed);
        record.image_displaced = life.has_lost_its_image();
        past_agent.look(image.as_ref(), written, record.name.as_str()).await;
        record.written_past_agent = past_agent.wrote();
        last.local_error = last.local_error.or_else(|| past_agent.trouble(Compared::AfterAttach));
        catch_up(&engine, leaving).await;
        (last.lsn, last.lag) = super::status::progress(&engine);
        let (saved, in_doubt) = give_up(&engine, &mut record, flushed).await;
        // Of what the path leads to nothing is known then, nor of what others wrote.
        let saved = saved.filter(|_| !record.image_displaced && !record.written_past_agent);
        end_stream(&engine, &stream, leaving).await;
        if let Some(epoch) = stream.fenced_by.take() {
            record.fence(epoch);
        }
        say_detached(&mut last, saved.as_ref());
        unlock(image, &record.name);
        let left = snapshot(record.uuid, saved, in_doubt);
        save(records, record, left).await?;
        tracing::info!(disk = %last.name, dirty_blocks = %last.dirty.blocks, "disk detached");
        Ok(last)
    }
}

/// Waits until nothing is under way, and flushes the local disk.
///
/// # Errors
/// When it did not take that.
async fn come_to_rest(engine: &Rc<Engine>, name: &DiskName) -> Result<(), IoFailure> {
    // What waits for a receiver that is away would wait for ever.
    engine.local.stop().await;
    // Requests of a client that was cut off may still be under way; none may follow the bitmap.
    engine.happen(|filter, _| filter.give_held_answers());
    engine.until(Filter::is_quiet).await;
    KillPoint::DetachQuiet.reached();
    let flushed = engine.local.run(LocalOp::Change(Change::Flush)).await;
    if let Err(failure) = &flushed {
        tracing::error!(disk = %name, errno = failure.errno, "cannot flush the local disk");
    }
    KillPoint::DetachFlushed.reached();
    flushed.map(drop)
}

fn not_flushed(failure: IoFailure) -> String {
    format!(
        "it was not flushed at the detach (errno {}): what was written last may not be on it",
        failure.errno
    )
}

/// Gives the receiver, and then the spill, a moment to take what is left.
async fn catch_up(engine: &Rc<Engine>, leaving: Leaving) {
    // A receiver that takes longer gets the rest at the next attach.
    let caught_up =
        |filter: &Filter| filter.is_drained() || !filter.is_connected() || filter.mode() != Mode::Sync;
    engine.happen(|filter, _| filter.hasten());
    let _ = tokio::time::timeout(leaving.receiver(), engine.until(caught_up)).await;
    // What it still lacks may go to the spill, for the next attach to send.
    engine.happen(Filter::prepare_detach);
    let _ = tokio::time::timeout(leaving.receiver(), engine.until(Filter::is_spill_settled)).await;
}

/// Has the filter give the disk up, and notes in the record how far it was. What is to be saved of it, if that can be
/// trusted, and of which blocks a flush has failed.
async fn give_up(
    engine: &Rc<Engine>,
    record: &mut DiskRecord,
    flushed: bool,
) -> (Option<SavedTracking>, DirtyBitmap) {
    record.acked_durable = engine.look(Filter::acked_durable);
    record.history = engine.look(Filter::history);
    engine.look(|filter| record.note_welcome(filter));
    // The filter may have begun a flush of its own meanwhile.
    engine.until(Filter::is_quiet).await;
    let saved = engine.happen(|filter, now| filter.detach(now));
    record.flush_failed = !flushed || engine.look(Filter::untold_failure).is_some();
    record.lsn_bound = record.lsn_bound.max(engine.look(Filter::last_lsn));
    record.last_time = engine.look(|filter| filter.status().last_time);
    // What the device did not take is not on the disk: nothing is trusted then.
    (saved.filter(|_| flushed), engine.look(Filter::doubtful))
}

/// Says good-bye to the receiver, if there is one; nothing depends on it.
async fn end_stream(engine: &Rc<Engine>, stream: &Stream, leaving: Leaving) {
    let connected = engine.look(Filter::is_connected);
    engine.end_stream(Kick::Operator(leaving.reason()));
    if connected {
        let _ = tokio::time::timeout(GOODBYE_TIME, stream.ended.notified()).await;
    }
}

/// The last status of a disk, which is detached now.
fn say_detached(last: &mut DiskStatus, saved: Option<&SavedTracking>) {
    last.mode = backtide_agent_api::Mode::Detached;
    last.reason = backtide_units::Reason::Detached.to_string();
    last.reason_code = "detached".to_owned();
    last.connected = false;
    (last.clients, last.awaited_clients) = (0, 0);
    // Whether that can be saved shows now.
    let of_state = [last.unsaved.take(), last.untracked.take()];
    last.local_error.take_if(|error| of_state.iter().flatten().any(|told| told == error));
    // Of what is not trusted nothing is known: everything is compared at the next attach.
    last.resync_due = saved.is_none();
    if let Some(saved) = saved {
        last.dirty = super::status::dirty(saved.dirty.count(), Some(0));
    }
}

fn unlock(image: Option<Arc<ImageFile>>, name: &DiskName) {
    if let Some(image) = image
        && let Err(error) = image.unlock()
    {
        tracing::warn!(disk = %name, %error, "cannot unlock the image before it is closed");
    }
    KillPoint::DetachUnlocked.reached();
}

/// What the next attach finds of a disk: that what is `saved` is all there is to know, or nothing but of which blocks the page
/// cache is not to be believed when everything is compared.
fn snapshot(disk: DiskId, saved: Option<SavedTracking>, in_doubt: DirtyBitmap) -> Snapshot {
    match saved {
        Some(saved) => Snapshot::first(saved, true, false),
        None => {
            Snapshot::first(SavedTracking { dirty: in_doubt, ..SavedTracking::unknown(disk) }, false, true)
        }
    }
}

/// Makes durable what the next attach needs.
async fn save(records: Records, record: DiskRecord, snapshot: Snapshot) -> Result<(), DetachError> {
    let path = records.tracking_file(&record.name);
    let save = move || {
        let limits = super::activity_limits(&record, record.size);
        records.create_tracking(&record.name, limits, record.size, &snapshot)?;
        KillPoint::DetachTracking.reached();
        records.save(&record)?;
        KillPoint::DetachRecord.reached();
        Ok(())
    };
    blocking(save).await.map_err(|source| DetachError::Save { path, source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_disk_that_nothing_is_known_of_it_is_saved_what_a_failed_flush_was_about() {
        let (disk, in_doubt) = (DiskId::random(), DirtyBitmap::of((3..5).into()));
        let Snapshot { clean, everything, saved, .. } = snapshot(disk, None, in_doubt.clone());
        assert_eq!((clean, everything, saved.compare, saved.dirty), (false, true, true, in_doubt.clone()));
        let known = SavedTracking { dirty: DirtyBitmap::of((4..9).into()), ..SavedTracking::unknown(disk) };
        let Snapshot { clean, everything, saved, .. } = snapshot(disk, Some(known.clone()), in_doubt);
        assert_eq!((clean, everything, saved), (true, false, known), "it has them");
    }
}
