//! Which blocks may differ between a point and something else that somebody has: another point, or what was left
//! behind where the disk was taken over from.
//!
//! Invariant: what is not named holds the same. Where that is not known, nothing is named but an error given.

use backtide_recovery::{LogError, Snapshot};
use backtide_units::{Epoch, LogPosition, Lsn};
use roaring::RoaringTreemap;

/// Why it is not known what differs.
#[derive(Debug, thiserror::Error)]
pub enum Differing {
    /// Nobody knows (any more).
    #[error("{0}")]
    Gone(String),
    /// The log cannot be read.
    #[error(transparent)]
    Log(#[from] LogError),
}

/// The blocks whose content at the point `at` may differ from that at `other`, a later or earlier point;
/// [`Lsn::MAX`]: from any version above it.
///
/// # Errors
/// When `other` is no point or lies beyond the log's end, or the log cannot be read.
pub fn changed(snapshot: &Snapshot, at: Lsn, other: Lsn) -> Result<RoaringTreemap, Differing> {
    known(snapshot, other)?;
    Ok(snapshot.changed_blocks(at.min(other), at.max(other))?)
}

/// Whether [`changed`] can be told of `other`.
///
/// # Errors
/// When `other` is no point, or lies beyond the log's end.
pub fn known(snapshot: &Snapshot, other: Lsn) -> Result<(), Differing> {
    let highest = snapshot.timeline().highest_lsn();
    if other != Lsn::MAX && other > highest {
        return Err(Differing::Gone(format!(
            "lsn:{other} lies beyond the end of the log at LSN {highest}: nobody knows what changed until then"
        )));
    }
    if other != Lsn::MAX && !snapshot.knows_changes_at(other) {
        return Err(Differing::Gone(format!(
            "lsn:{other} is no point of the disk (any more): nobody knows what changed since"
        )));
    }
    Ok(())
}

/// The blocks whose content at the point `at` may differ from what an agent has that knew everything up to `durable`, and so many entries
/// of the log, to be durable here. What it has changed by itself is not among them.
///
/// # Errors
/// When not all of that is here, as in a store that was put back from a copy, or the log cannot be read.
pub fn after(
    snapshot: &Snapshot,
    at: Lsn,
    durable: Lsn,
    entries: LogPosition,
) -> Result<RoaringTreemap, Differing> {
    let (found, entry) = (snapshot.timeline().covered(), snapshot.through().0);
    if found < durable || entry < entries.0 {
        return Err(Differing::Gone(format!(
            "the log ends at LSN {found} (log entry {entry}), though everything up to LSN {durable} (log entry {}) had been durable here: nobody knows what changed since",
            entries.0
        )));
    }
    changed(snapshot, at, Lsn::MAX)
}

/// The blocks whose content at the point `at` may differ from what an agent was left with, whose last attach was of
/// `epoch` and which knew everything up to `durable`, and so many entries of the log, to be durable. What it has
/// changed by itself is not among them.
///
/// What that agent had is here in whole only when everything it knew to be durable was here when the disk was taken
/// from it: LSNs and entries of others, later, would hide that it was not. The LSN does not tell of a pass's blocks,
/// nor the entries of a log that was put back and went on.
///
/// # Errors
/// When it was not, or when nobody knows, or the log cannot be read.
pub fn left(
    snapshot: &Snapshot,
    at: Lsn,
    epoch: Epoch,
    durable: Lsn,
    entries: LogPosition,
) -> Result<RoaringTreemap, Differing> {
    let Some(takeover) = snapshot.timeline().takeover_from(epoch) else {
        return Err(Differing::Gone(format!(
            "nobody knows how the disk was taken from the attach of epoch {epoch}"
        )));
    };
    let (found, entry) = (takeover.covered, takeover.entries.0);
    if found < durable || entry < entries.0 {
        return Err(Differing::Gone(format!(
            "the disk was taken over at LSN {found} (log entry {entry}), though everything up to LSN {durable} (log entry {}) had been durable here",
            entries.0
        )));
    }
    // What the agent had may be newer than the point: that differs too.
    Ok(changed(snapshot, at, durable)? | changed(snapshot, at, Lsn::MAX)?)
}
