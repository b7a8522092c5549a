//! What an attach may believe of what the last one left.
//!
//! A tracking file speaks of the disk as the agent left it. Whoever wrote the disk since is unknown
//! to it, so every sign of such a write means that everything is compared:
//! - after a clean detach, a regular file must have the size and time it was left with; what tells
//!   no time (a device, an NBD server) is trusted only when the agent itself ended, since a disk
//!   that is attached is written by nobody else, and only if it told none before;
//! - after a crash, a regular file must be the one the agent had, written neither before the agent saw
//!   it last nor later than the agent lived. What tells no time is trusted: a device or server that
//!   somebody writes between the agent's death and its next start is not noticed;
//! - an image that was not in its place when the agent last looked is another one;
//! - one that somebody may have written past the agent that had it is not as that left it, as long as it has not been
//!   compared.

use std::{
    io,
    sync::OnceLock,
    time::{Duration, SystemTime},
};

use backtide_io_filter::Resume;
use backtide_tracking::{ImageSeen, LoadError, Loaded, SignOfLife};
use backtide_units::{BlockRange, ByteCount, ByteOffset, ByteRange, CaptureTime, Lsn, Reason};
use uuid::Uuid;

use crate::record::{DiskRecord, ImageStamp};

/// How much later than its last sign of life an agent that was killed may have written: signs come
/// each second, and the disk's thread may be late.
const SLACK: Duration = Duration::from_secs(5);

/// The same when the host went down with it: the last signs may not have reached the disk.
const SLACK_OF_A_POWER_LOSS: Duration = Duration::from_secs(60);

/// The sign of life of now, of an agent that has the disk, whose image looks like `image`.
pub(crate) fn alive_now(image: Option<ImageSeen>, captured: CaptureTime) -> SignOfLife {
    SignOfLife { at: SystemTime::now().into(), boot: boot_id(), image, captured }
}

/// The sign of life of an attach that begins with the image as `stamp` says and has written nothing:
/// whatever is written before the first sign of its own is by somebody else.
pub(crate) fn alive_since(stamp: Option<&ImageStamp>, captured: CaptureTime) -> SignOfLife {
    let at = CaptureTime(stamp.map_or(0, |stamp| seen(stamp).modified_ns / 1000));
    SignOfLife { at, boot: boot_id(), image: stamp.map(seen), captured }
}

/// What a sign of life tells of an image: with data files the newest time of all, and a number of all their inodes.
pub(crate) fn seen(stamp: &ImageStamp) -> ImageSeen {
    let ImageStamp { inode, modified_ns, .. } = *stamp;
    stamp.data.iter().fold(ImageSeen { inode, modified_ns }, |seen, file| ImageSeen {
        inode: seen.inode.rotate_left(7) ^ file.inode,
        modified_ns: seen.modified_ns.max(file.modified_ns),
    })
}

/// When this boot of the host began, by the clock of now; none when that is not known.
fn booted_at() -> Option<CaptureTime> {
    let text = std::fs::read_to_string("/proc/stat").ok()?;
    let seconds: u64 = text.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse().ok()?;
    Some(CaptureTime(seconds.saturating_mul(1_000_000)))
}

/// Which boot of the host this is; nil when that is not known.
pub(crate) fn boot_id() -> Uuid {
    static KNOWN: OnceLock<Uuid> = OnceLock::new();
    known_once(&KNOWN, || std::fs::read_to_string("/proc/sys/kernel/random/boot_id"))
}

/// It stays what it is for as long as this process lives. What could not be read is read again.
fn known_once(known: &OnceLock<Uuid>, read: impl FnOnce() -> io::Result<String>) -> Uuid {
    let found = || read().ok()?.trim().parse().ok();
    known.get().copied().or_else(found).map_or(Uuid::nil(), |id| *known.get_or_init(|| id))
}

/// Until when everything that was captured is known to what was left: a receiver with something later has
/// it from an attach that this state, then an older copy, knows nothing of. None where that is not told.
/// The record has the time of the last sign of life already.
pub(crate) fn known_until(record: &DiskRecord, left: Option<&Loaded>) -> Option<CaptureTime> {
    let left = left.filter(|_| record.last_time > CaptureTime::default() && !record.last_time_is_early)?;
    if record.ended_cleanly(left) {
        return Some(record.last_time);
    }
    // The agent lived on for a while after its last sign; that what is put back is younger is not worth an alarm.
    let micros = u64::try_from(SLACK_OF_A_POWER_LOSS.as_micros()).unwrap_or(u64::MAX);
    left.alive?;
    Some(CaptureTime(record.last_time.0.saturating_add(micros)))
}

/// What the filter may trust: `left` is what the tracking file says, `stamp` the image as it is now,
/// `size` the disk's.
pub(crate) fn resume(
    record: &DiskRecord,
    left: Result<Option<Loaded>, LoadError>,
    stamp: Option<&ImageStamp>,
    size: ByteCount,
) -> Resume {
    let disk = &record.name;
    // All up to the bound may have been given, and the receiver may have all of them: without an LSN left out, what comes next would
    // follow on the last one, and what was captured in between and lost be no hole.
    let given = record.lsn_bound.next();
    let lost = |reason| Resume::Lost {
        reason,
        history: record.history,
        last_lsn: given,
        acked_durable: record.acked_durable,
    };
    let loaded = match left {
        Ok(Some(loaded)) => loaded,
        Ok(None) if record.history.is_none() && record.lsn_bound == Lsn::ZERO => return Resume::New,
        Ok(None) if record.history.is_none() => return lost(Reason::FirstAttach),
        Ok(None) => return lost(Reason::AgentCrashed),
        Err(error) => {
            tracing::error!(%disk, %error, "the tracking file cannot be trusted: everything is compared");
            return lost(Reason::BitmapUntrusted);
        }
    };
    if record.history.is_none() {
        return lost(Reason::FirstAttach);
    }
    // As long as it is not taken back it sends nothing, and what it knows may serve to go back to it.
    if record.fenced && record.take_over {
        tracing::warn!(%disk, "another attach has had the disk since: everything is compared");
        return lost(Reason::AgentRolledBack);
    }
    let foreign = foreign_write(record, &loaded, stamp, size);
    if let Some((reason, why)) = foreign {
        tracing::warn!(%disk, "{why}: everything is compared");
        return lost(reason);
    }
    if loaded.snapshot.everything || loaded.snapshot.saved.history != record.history {
        let reason = loaded.snapshot.saved.reason.unwrap_or(Reason::AgentCrashed);
        return lost(reason);
    }
    let clean = record.ended_cleanly(&loaded);
    // A hole that was there tells why it began, whatever ended the agent in it.
    let hole = loaded.snapshot.saved.reason.filter(|reason| *reason != Reason::Detached);
    let grown = grown(record.size, size);
    let saved = loaded.snapshot.saved;
    if clean && grown.is_none() {
        return Resume::Clean(saved);
    }
    let mut candidates = loaded.hot;
    candidates.union_with(&saved.dirty);
    candidates.union_with(&saved.zeroes);
    if let Some(grown) = grown {
        candidates.insert(grown);
    }
    if clean {
        tracing::info!(%disk, blocks = %candidates.count(), "the disk has grown: its new blocks are compared");
        let (history, last_lsn, acked_durable) = (saved.history, saved.last_lsn, saved.acked_durable);
        let acked_position = saved.acked_position;
        return Resume::Crashed {
            reason: hole.unwrap_or(Reason::Resized),
            history,
            last_lsn,
            acked_durable,
            acked_position,
            candidates,
        };
    }
    tracing::info!(%disk, blocks = %candidates.count(), "the agent ended without a clean detach: these blocks are compared");
    Resume::Crashed {
        reason: hole.unwrap_or(Reason::AgentCrashed),
        history: record.history,
        last_lsn: given.max(saved.last_lsn),
        acked_durable: record.acked_durable.max(saved.acked_durable),
        acked_position: saved.acked_position,
        candidates,
    }
}

/// The blocks that a disk has gained, the last one of before included when it was not whole.
fn grown(before: ByteCount, now: ByteCount) -> Option<BlockRange> {
    (before < now)
        .then(|| BlockRange::touched_by(ByteRange::between(ByteOffset(before.0), ByteOffset(now.0))))
}

/// Why the disk may have been written by somebody else.
fn foreign_write(
    record: &DiskRecord,
    loaded: &Loaded,
    stamp: Option<&ImageStamp>,
    size: ByteCount,
) -> Option<(Reason, &'static str)> {
    if loaded.snapshot.saved.disk != record.uuid {
        return Some((Reason::BitmapUntrusted, "the tracking file is of another disk"));
    }
    if record.image_changed || record.image_displaced {
        return Some((Reason::BitmapUntrusted, "the image is another one, or was not in its place"));
    }
    if record.written_past_agent {
        let past = "somebody else may have written the image while the agent had it, and not everything was compared since";
        return Some((Reason::WrittenPastAgent, past));
    }
    if record.size > size {
        return Some((Reason::Resized, "the disk is smaller than it was"));
    }
    let touched = Some((Reason::BitmapUntrusted, "the disk may have been changed while it was detached"));
    let detached = record.ended_cleanly(loaded);
    let was_a_file =
        record.image_at_detach.is_some() || loaded.alive.is_some_and(|sign| sign.image.is_some());
    match (detached, stamp) {
        (true, Some(stamp)) => touched.filter(|_| record.image_at_detach.as_ref() != Some(stamp)),
        (true, None) => touched.filter(|_| !record.stopped || was_a_file),
        // Detached on purpose, and nothing tells what happened then.
        (false, None) if loaded.clean || !record.attached => touched,
        // A file told when it was written, and what is there now does not.
        (false, None) => touched.filter(|_| was_a_file),
        (false, Some(stamp)) => {
            let late = "the image is not as the agent that had it last saw it";
            Some((Reason::BitmapUntrusted, late)).filter(|_| !lived_until(loaded.alive, stamp))
        }
    }
}

/// Whether it is the image the agent had, and the agent may have been alive when it was written last.
fn lived_until(alive: Option<SignOfLife>, stamp: &ImageStamp) -> bool {
    let Some(SignOfLife { at, boot, image: Some(seen), captured: _ }) = alive else { return false };
    // A power loss may take the last writes' times with it; the death of a process takes nothing.
    let is_this_boot = boot == boot_id();
    let (before, after) =
        if is_this_boot { (Duration::ZERO, SLACK) } else { (SLACK_OF_A_POWER_LOSS, SLACK_OF_A_POWER_LOSS) };
    let micros = |duration: Duration| u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
    let now = self::seen(stamp);
    let (written, seen_written) = (now.modified_ns / 1000, seen.modified_ns / 1000);
    // No agent of an earlier boot has written it in this one.
    let since_the_boot = !is_this_boot && booted_at().is_some_and(|booted| written >= booted.0);
    seen.inode == now.inode
        && !since_the_boot
        && written >= seen_written.saturating_sub(micros(before))
        && written <= at.0.max(seen_written).saturating_add(micros(after))
}

#[cfg(test)]
mod tests;
