//! A point that an agent reads: found, checked against the agent's rights, read in pieces, and held.
//!
//! The content comes through the same verified view as that of a mount.

use std::{
    collections::VecDeque,
    ops::Range,
    sync::{Arc, Mutex, PoisonError},
};

use backtide_protocol::{
    Blocks, CloseCode, Closed, Compare, CompareResult, Data, FailureCode, OpenPoint, PROTOCOL_VERSION,
    PointOpened, ReadFailure, Reading,
};
use backtide_receiver_api::{ApiError, DiskRef, ErrorCode};
use backtide_recovery::{Allocation, LogError, Snapshot, TimedLsn, View};
use backtide_tls::Rights;
use backtide_units::{
    BlockIndex, BlockRange, ByteOffset, ByteRange, DiskName, Epoch, HistoryId, LogPosition, Lsn,
};
use bytes::Bytes;
use roaring::RoaringTreemap;

use crate::{
    compare::CompareJob,
    differing::{self, Differing},
    disk::chain,
    disks::closed,
    findings::DiskFindings,
    reading::failed,
    retention::{NotChanged, Pin},
    service::{Found, Service},
};

/// Zeroes shorter than this travel as data: a frame of their own would cost as much.
const ZEROES_MIN: u64 = 4096;

/// So many blocks are read at once to see whether they can be.
const LOOKED_AT_BLOCKS: u64 = 256;

/// Extents are asked for in windows of this size: bounds memory, and shows how far it is.
const WINDOW_BYTES: u64 = 4 << 30;

/// A point that can be read as long as this is there.
pub(crate) struct OpenedPoint {
    pub(crate) disk: DiskRef,
    pub(crate) at: TimedLsn,
    /// Who reads it, for people.
    pub(crate) reader: String,
    history: HistoryId,
    view: View,
    /// The view's, with what came before and after it.
    snapshot: Snapshot,
    findings: DiskFindings,
    /// What changed, for whoever asks for it part by part: it is made as a whole. Of the point that was asked about last.
    changed: Mutex<Option<(Lsn, Arc<RoaringTreemap>)>>,
}

impl Service {
    /// Finds the point that an agent with these rights asks for.
    ///
    /// # Errors
    /// What the agent is told.
    pub(crate) async fn open_point(&self, open: &OpenPoint, rights: &Rights) -> Result<OpenedPoint, Closed> {
        // Whether there is such a disk is nothing to tell to whoever may not speak for it.
        let known = self.find(&open.disk).ok().and_then(|disk| self.names.name_of(disk));
        let denied = |why| closed(CloseCode::Denied, why);
        rights.check(known.as_ref().unwrap_or(&open.disk)).map_err(denied)?;
        let Found { disk, snapshot, findings, damage: _, came: _ } =
            self.look_at(&open.disk).await.map_err(refused)?;
        rights.check(&disk.name).map_err(denied)?;
        let asked = open.lsn.map_or_else(|| "latest".to_owned(), |lsn| format!("lsn:{lsn}"));
        let at = self.resolve_in(&snapshot, &asked).await.map_err(refused)?;
        let no_point = |error| refused(crate::points::unavailable(&asked, &error));
        let view = snapshot.view(at.lsn).map_err(no_point)?;
        let history = view.history().unwrap_or(HistoryId(uuid::Uuid::nil()));
        if let Some(wanted) = open.history.filter(|wanted| *wanted != history) {
            let why = format!(
                "lsn:{} of disk {} is of history {history} here, not of {wanted}: it is another point",
                at.lsn, disk.name
            );
            return Err(closed(CloseCode::Refused, why));
        }
        let reader = open.reader.clone();
        Ok(OpenedPoint { disk, at, reader, history, view, snapshot, findings, changed: Mutex::default() })
    }

    /// Keeps the point for `owner`, durably, until that releases it.
    pub(crate) async fn hold_point(&self, point: &OpenedPoint, owner: String) -> Result<(), ReadFailure> {
        let (disk, held) = (point.disk.uuid, Pin { lsn: point.at.lsn, time: point.at.time });
        let (policies, holder) = (self.policies.clone(), owner.clone());
        let hold = move || {
            policies.change(disk, |policy| {
                policy.holds.retain(|other, _| !succeeds(&holder, other));
                policy.holds.insert(holder, held);
            })
        };
        self.read(hold).await.map_err(|error| failed(error.message))?.map_err(|error| not_held(&error))?;
        // It may have gone while it was asked for, though this connection still has it; from now on it stays.
        let uuid: DiskName = disk.to_string().parse().expect("a UUID is a good name");
        let why = match self.look_at(&uuid).await {
            Ok(there) => match there.snapshot.view(held.lsn) {
                Ok(_) => {
                    tracing::info!(%disk, lsn = %held.lsn, owner, "a point is held");
                    return Ok(());
                }
                Err(gone) => {
                    let message = crate::points::unavailable(&format!("lsn:{}", held.lsn), &gone).message;
                    ReadFailure { code: FailureCode::Gone, message }
                }
            },
            Err(error) => failed(error.message),
        };
        // It hears that it has none, and will not release it.
        self.release_point(point, owner).await?;
        Err(why)
    }

    /// Leaves the point to the disk's ladder again, if it is what `owner` holds: another one that it holds by now
    /// stays.
    pub(crate) async fn release_point(&self, point: &OpenedPoint, owner: String) -> Result<(), ReadFailure> {
        let (disk, lsn) = (point.disk.uuid, point.at.lsn);
        let is_it = move |held: Option<&Pin>| held.is_some_and(|held| held.lsn == lsn);
        if !is_it(self.policies.of(disk).holds.get(&owner)) {
            return Ok(());
        }
        tracing::info!(%disk, %lsn, owner, "a point is held no longer");
        let policies = self.policies.clone();
        let release = move || {
            policies.change(disk, |policy| {
                // Another may have come since.
                if is_it(policy.holds.get(&owner)) {
                    policy.holds.remove(&owner);
                }
            })
        };
        self.read(release).await.map_err(|error| failed(error.message))?.map_err(|error| not_held(&error))
    }
}

impl OpenedPoint {
    /// What the agent is told of it.
    pub(crate) fn describe(&self) -> PointOpened {
        PointOpened {
            version: PROTOCOL_VERSION,
            disk: self.disk.uuid,
            name: self.disk.name.clone(),
            size: self.view.disk_size(),
            lsn: self.at.lsn,
            time: self.at.time,
            history: self.history,
            latest: self.snapshot.timeline().latest().map_or(self.at.lsn, |latest| latest.lsn),
        }
    }

    /// The answer to a fetch: its parts. Blocks.
    pub(crate) fn pieces(&self, id: u64, range: ByteRange) -> Result<VecDeque<Reading>, ReadFailure> {
        let size = self.view.disk_size();
        if range.end().0 > size.0 {
            let message = format!("bytes {range} lie beyond the end of the disk at {size}");
            return Err(ReadFailure { code: FailureCode::Invalid, message });
        }
        let failure = |error| self.failure_at(range, &error);
        let stretches = joined(self.view.extents(range).map_err(failure)?);
        let holds_data = stretches.iter().any(|(_, allocation)| *allocation == Allocation::Data);
        let bytes = match holds_data {
            true => self.view.read(range).map_err(failure)?,
            false => Bytes::new(),
        };
        let piece = |(part, allocation): (ByteRange, Allocation)| {
            let data = match allocation {
                Allocation::Zero => Bytes::new(),
                Allocation::Data => {
                    let from = usize::try_from(part.start().0 - range.start().0).expect("a place in memory");
                    bytes.slice(from..from + part.count().as_usize().expect("a part of memory"))
                }
            };
            Reading::Piece { id, range: part, data: Data::capture(data) }
        };
        Ok(stretches.into_iter().map(piece).collect())
    }

    /// Which of the ranges hold something else than the agent says; damaged ones do. Blocks the thread, for as long as `wanted`
    /// says yes.
    pub(crate) fn compare(
        &self,
        question: Compare,
        wanted: &dyn Fn() -> bool,
    ) -> Result<CompareResult, ReadFailure> {
        let size = self.view.disk_size();
        if let Some(beyond) = question.items.iter().find(|item| item.range.end().0 > size.0) {
            let message = format!("bytes {} lie beyond the end of the disk at {size}", beyond.range);
            return Err(ReadFailure { code: FailureCode::Invalid, message });
        }
        let compared = CompareJob::new(question, self.view.clone()).run_while(wanted);
        let compared = compared.map_err(|error| self.failure(&error))?;
        compared.ok_or_else(|| failed("nobody waits for the answer any more".to_owned()))
    }

    /// The blocks that are asked for. Blocks the thread, for as long as `wanted` says yes.
    pub(crate) fn blocks(
        &self,
        which: Blocks,
        wanted: &dyn Fn() -> bool,
    ) -> Result<RoaringTreemap, ReadFailure> {
        match which {
            Blocks::Changed(other) => self.changed(other),
            Blocks::Left { epoch, durable, entries } => self.left(epoch, durable, entries),
            Blocks::After { durable, entries } => {
                let after = differing::after(&self.snapshot, self.at.lsn, durable, entries);
                after.map_err(|error| self.unknown(error))
            }
            Blocks::Damaged(since) => self.damaged(since, wanted),
            Blocks::Data => self.data(BlockRange::whole_disk(self.view.disk_size()), wanted),
            Blocks::DataIn(part) => self.data(part, wanted),
            Blocks::ChangedIn(since, part) => self.changed_in(since, part),
        }
    }

    /// Those of [`changed`](Self::changed) in `part`: of none it only says whether they can be told.
    fn changed_in(&self, other: Lsn, part: BlockRange) -> Result<RoaringTreemap, ReadFailure> {
        let mut blocks = RoaringTreemap::new();
        if part.is_empty() {
            differing::known(&self.snapshot, other).map_err(|error| self.unknown(error))?;
            return Ok(blocks);
        }
        // Whoever asks at the same time waits, and then finds it.
        let mut known = self.changed.lock().unwrap_or_else(PoisonError::into_inner);
        let changed = match &*known {
            Some((since, changed)) if *since == other => Arc::clone(changed),
            Some(_) | None => {
                let changed = Arc::new(self.changed(other)?);
                *known = Some((other, Arc::clone(&changed)));
                changed
            }
        };
        drop(known);
        blocks.insert_range(part.indices());
        blocks &= &*changed;
        Ok(blocks)
    }

    fn changed(&self, other: Lsn) -> Result<RoaringTreemap, ReadFailure> {
        differing::changed(&self.snapshot, self.at.lsn, other).map_err(|error| self.unknown(error))
    }

    fn left(&self, epoch: Epoch, durable: Lsn, entries: LogPosition) -> Result<RoaringTreemap, ReadFailure> {
        let left = differing::left(&self.snapshot, self.at.lsn, epoch, durable, entries);
        left.map_err(|error| self.unknown(error))
    }

    fn unknown(&self, error: Differing) -> ReadFailure {
        match error {
            Differing::Gone(why) => {
                ReadFailure { code: FailureCode::Gone, message: format!("disk {}: {why}", self.disk.name) }
            }
            Differing::Log(error) => self.failure(&error),
        }
    }

    /// What of the point's content cannot be read, of the blocks that may differ from `since` or else of all data: read only where
    /// damage was found before, for it reads all of them.
    fn damaged(&self, since: Option<Lsn>, wanted: &dyn Fn() -> bool) -> Result<RoaringTreemap, ReadFailure> {
        let mut damaged = RoaringTreemap::new();
        if self.findings.known().is_empty() {
            return Ok(damaged);
        }
        let blocks = match since {
            Some(since) => self.changed(since)?,
            None => self.data(BlockRange::whole_disk(self.view.disk_size()), wanted)?,
        };
        let end = BlockRange::whole_disk(self.view.disk_size()).end().0;
        let mut rest = blocks.iter();
        let mut next = rest.next();
        while let Some(first) = next.filter(|first| *first < end && wanted()) {
            let mut run = first..first + 1;
            next = rest.next();
            while next == Some(run.end) && run.end < end && run.end - run.start < LOOKED_AT_BLOCKS {
                run.end += 1;
                next = rest.next();
            }
            self.add_damaged(run, &mut damaged)?;
        }
        Ok(damaged)
    }

    /// Reads blocks, half and half where that fails, down to the one that is lost.
    fn add_damaged(&self, run: Range<u64>, damaged: &mut RoaringTreemap) -> Result<(), ReadFailure> {
        let blocks = BlockRange::between(BlockIndex(run.start), BlockIndex(run.end));
        match self.view.read(blocks.bytes(self.view.disk_size())) {
            Ok(_) => Ok(()),
            Err(LogError::Damaged { .. }) if run.end - run.start == 1 => {
                damaged.insert(run.start);
                Ok(())
            }
            Err(LogError::Damaged { .. }) => {
                let middle = run.start + (run.end - run.start) / 2;
                self.add_damaged(run.start..middle, damaged)?;
                self.add_damaged(middle..run.end, damaged)
            }
            Err(error) => Err(self.failure(&error)),
        }
    }

    /// The blocks of `part` that may hold data.
    fn data(&self, part: BlockRange, wanted: &dyn Fn() -> bool) -> Result<RoaringTreemap, ReadFailure> {
        let (mut blocks, size) = (RoaringTreemap::new(), self.view.disk_size());
        let Some(part) = part.intersection(BlockRange::whole_disk(size)) else { return Ok(blocks) };
        let part = part.bytes(size);
        let (mut at, last) = (part.start().0, part.end().0);
        while at < last && wanted() {
            let end = at.saturating_add(WINDOW_BYTES).min(last);
            let window = ByteRange::between(ByteOffset(at), ByteOffset(end));
            let extents = self.view.extents(window).map_err(|error| self.failure(&error))?;
            for (part, allocation) in extents {
                if allocation == Allocation::Data {
                    blocks.insert_range(BlockRange::touched_by(part).indices());
                }
            }
            at = end;
        }
        Ok(blocks)
    }

    fn failure(&self, error: &LogError) -> ReadFailure {
        self.failure_at(ByteRange::default(), error)
    }

    /// What the agent is told of a range that cannot be read; damage is noted, with the points that it touches.
    fn failure_at(&self, range: ByteRange, error: &LogError) -> ReadFailure {
        let mut message = chain(error);
        let code = match error {
            LogError::Damaged { .. } => {
                message = self.findings.note_of_read(&message, &self.view, range);
                FailureCode::Damaged
            }
            LogError::NoLog { .. }
            | LogError::LogExists { .. }
            | LogError::UnknownVersion { .. }
            | LogError::Poisoned
            | LogError::Full { .. }
            | LogError::Io { .. } => FailureCode::Failed,
        };
        let message = format!("cannot read {} at {}: {message}", self.disk.name, self.at);
        tracing::error!(disk = %self.disk.uuid, lsn = %self.at.lsn, why = message, "cannot read a point for an agent");
        ReadFailure { code, message }
    }
}

fn not_held(error: &NotChanged) -> ReadFailure {
    let code = match error {
        NotChanged::InDoubt(_) => FailureCode::Refused,
        NotChanged::Full(_) | NotChanged::Failed(_) => FailureCode::Failed,
    };
    ReadFailure { code, message: error.to_string() }
}

/// Whether an owner of holds takes the place of another: the same at an earlier attach of the disk it speaks of, which ends
/// with ` (attach N)`.
fn succeeds(owner: &str, other: &str) -> bool {
    let parts = |owner: &'_ str| {
        let (name, number) = owner.strip_suffix(')')?.rsplit_once(" (attach ")?;
        Some((name.to_owned(), number.parse::<u64>().ok()?))
    };
    match (parts(owner), parts(other)) {
        (Some((name, number)), Some((other, before))) => name == other && before < number,
        (Some(_) | None, _) => false,
    }
}

/// The same stretches, short zeroes counted as the data that they are.
fn joined(extents: Vec<(ByteRange, Allocation)>) -> Vec<(ByteRange, Allocation)> {
    let mut stretches: Vec<(ByteRange, Allocation)> = Vec::with_capacity(extents.len());
    for (part, allocation) in extents {
        let short = allocation == Allocation::Zero && part.count().0 < ZEROES_MIN;
        let kind = if short { Allocation::Data } else { allocation };
        match stretches.last_mut() {
            Some((last, same)) if *same == kind => *last = ByteRange::between(last.start(), part.end()),
            Some(_) | None => stretches.push((part, kind)),
        }
    }
    stretches
}

/// A refusal of the control API in the stream's words.
fn refused(error: ApiError) -> Closed {
    let code = match error.code {
        ErrorCode::Failed | ErrorCode::Unreachable | ErrorCode::Damaged => CloseCode::Store,
        ErrorCode::Usage
        | ErrorCode::NotFound
        | ErrorCode::PointNotFound
        | ErrorCode::PointInHole
        | ErrorCode::Exists
        | ErrorCode::Busy
        | ErrorCode::Fenced
        | ErrorCode::Locked
        | ErrorCode::Refused
        | ErrorCode::Interrupted => CloseCode::Refused,
    };
    closed(code, error.message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_owner_takes_the_place_of_its_earlier_attaches_only() {
        assert!(succeeds("blocks of a (attach 12)", "blocks of a (attach 9)"));
        for other in [
            "blocks of a (attach 12)",
            "blocks of a (attach 13)",
            "blocks of b (attach 9)",
            "blocks of a",
            "blocks of a (attach x)",
            "blocks of a (attach 9) ",
        ] {
            assert!(!succeeds("blocks of a (attach 12)", other), "{other}");
            assert!(!succeeds("blocks of a", other), "{other}");
        }
    }
}
