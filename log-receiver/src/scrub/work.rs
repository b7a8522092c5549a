//! The thread of a scrub.

use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use backtide_receiver_api::DiskCheck;
use backtide_recovery::{AskDisk, Snapshot, damaged_place};
use backtide_units::{ByteCount, DiskId};
use tokio::sync::{mpsc, oneshot};

use super::{Shared, Sources, attached::AttachedDisk, lock};
use crate::{
    accept::Door,
    facts::DiskFacts,
    findings::DiskFindings,
    fsck::check_snapshot,
    ingest::{Readable, Task},
    small_files,
};

/// It looks so often whether it is called off while it waits for its rate.
const WAIT_MAX: Duration = Duration::from_millis(100);

pub(super) struct Work {
    shared: Arc<Shared>,
    sources: Sources,
    rate: ByteCount,
    /// When it began, or went on.
    begun: Instant,
    /// Bytes read since then.
    read: u64,
    /// Bytes read before, of disks that are done.
    before: u64,
}

/// The receiver is shutting down.
struct Ending;

/// A disk whose turn has come.
struct Target {
    facts: DiskFacts,
    /// Where damage of it is noted, as long as it is the same disk.
    findings: DiskFindings,
    /// What can be read; or why nothing can.
    snapshot: Result<Snapshot, String>,
}

impl Work {
    pub(super) fn new(shared: Arc<Shared>, sources: Sources) -> Self {
        let (rate, before) = shared.progress.status().map_or((ByteCount::ZERO, 0), |status| {
            (status.bytes_per_second_max, status.disks.iter().map(|disk| disk.bytes.0).sum())
        });
        Self { shared, sources, rate, begun: Instant::now(), read: 0, before }
    }

    pub(super) fn run(mut self) {
        loop {
            let next = self.shared.progress.next();
            let Some((disk, after)) = next.filter(|_| !self.shared.is_unwanted()) else { break };
            *lock(&self.shared.reading) = Some(disk);
            let found = self.check_disk(disk, after);
            *lock(&self.shared.reading) = None;
            match found {
                Err(Ending) => return self.leave(),
                // It has seen a part of it.
                Ok(_) if self.shared.ending.load(Ordering::Relaxed) => return self.leave(),
                Ok(found) => {
                    let mended = found.as_ref().map(|found| found.mended.clone()).unwrap_or_default();
                    let too = self.shared.progress.read(disk, found);
                    too.into_iter().for_each(|disk| self.sources.findings.forget(disk, &mended));
                }
            }
        }
        if self.shared.progress.wants_overlays() && !self.shared.is_unwanted() {
            let overlays = self.sources.overlays.clone();
            let checked = overlays.check(&mut |bytes| self.step(bytes));
            if !self.shared.ending.load(Ordering::Relaxed) {
                self.shared.progress.change(|status| {
                    status.sound &= checked.iter().all(|overlay| overlay.sound);
                    status.overlays = checked;
                });
            }
        }
        if self.shared.ending.load(Ordering::Relaxed) {
            return self.leave();
        }
        self.shared.progress.end(false);
    }

    /// The receiver ends: the next start goes on with the disk that is read now, unless this was called off.
    fn leave(&self) {
        if self.shared.progress.is_cancelled() {
            self.shared.progress.end(true)
        } else {
            self.shared.progress.write()
        }
    }

    /// Reads a disk; none when there is none any more.
    fn check_disk(&mut self, disk: DiskId, after: ByteCount) -> Result<Option<DiskCheck>, Ending> {
        let Some(target) = self.target(disk)? else { return Ok(None) };
        if let Ok(snapshot) = &target.snapshot {
            // What others will read is known about, of this one by now exactly.
            let total = self.done().saturating_add(snapshot.bytes().0).saturating_add(after.0);
            self.shared.progress.change(|status| status.total_bytes = ByteCount(total));
        }
        let findings = target.findings.clone();
        let checked = self.check(target);
        let is_there = ask(self.owner(disk), |answer| Task::FactsOf(disk, answer))?.is_some();
        if !is_there || !findings.is_current() {
            // It was forgotten meanwhile: that files of it are missing is no damage, nor is it of one that came after it.
            return Ok(None);
        }
        if let Some(why) = checked.damage.first().or(checked.error.as_ref()) {
            tracing::error!(disk = %checked.uuid, damage = checked.damage.len(), why, "the scrub found damage");
        }
        for damage in &checked.mended {
            tracing::warn!(disk = %checked.uuid, damage, "the scrub has mended damage");
        }
        Ok(Some(checked))
    }

    fn owner(&self, disk: DiskId) -> &mpsc::Sender<Task> {
        &self.sources.owners[Door::owner(disk, self.sources.owners.len())]
    }

    fn target(&self, disk: DiskId) -> Result<Option<Target>, Ending> {
        let owner = self.owner(disk);
        let findings = self.sources.findings.of_life(disk);
        let Some(facts) = ask(owner, |answer| Task::FactsOf(disk, answer))? else { return Ok(None) };
        let snapshot = match ask(owner, |answer| Task::Read(disk, answer))? {
            Some(Ok(Readable { snapshot, .. })) => Ok(snapshot),
            Some(Err(failure)) => Err(failure.why),
            None => return Ok(None),
        };
        Ok(Some(Target { facts: *facts, findings, snapshot }))
    }

    fn check(&mut self, target: Target) -> DiskCheck {
        let Target { facts: DiskFacts { id: uuid, name, damage, touched, error, .. }, findings, snapshot } =
            target;
        let mends = error.is_none();
        let (segments, entries, bytes) = (0, 0, ByteCount::ZERO);
        let (more_damage, error, sound) = (0, None, false);
        let (mended, cut) = (Vec::new(), Vec::new());
        let report = DiskCheck {
            name,
            uuid,
            segments,
            entries,
            bytes,
            damage,
            more_damage,
            touched,
            mended,
            cut,
            error,
            sound,
        };
        let snapshot = match snapshot {
            Ok(snapshot) => snapshot,
            Err(why) => return DiskCheck { error: Some(why), ..report },
        };
        let (known, noted) = (report.damage.clone(), findings.known());
        let disk = AttachedDisk::new(Arc::clone(&self.shared), self.owner(uuid).clone(), uuid);
        let ask = |range| disk.read(range);
        let mends = mends.then_some(&ask as AskDisk<'_>);
        let mut checked = check_snapshot(report, &snapshot, mends, &mut |bytes| self.step(bytes));
        checked.damage.extend(small_files::beside_logs_in_use(&self.sources.shelf, uuid));
        checked.sound &= checked.damage.is_empty();
        let all = checked.damage.iter().chain(&checked.error);
        let found: Vec<_> = all.filter(|place| !known.contains(place)).collect();
        for why in &found {
            let touched = checked.touched.iter().find(|touched| touched.place == damaged_place(why));
            findings.note_anew(why, touched.cloned());
        }
        // One that was called off has seen a part of it, and of places beyond those that have a name in its report nobody knows
        // which they are.
        if !self.shared.is_unwanted() && checked.error.is_none() && checked.more_damage == 0 {
            let is_there =
                |noted: &String| found.iter().any(|found| damaged_place(found) == damaged_place(noted));
            let gone: Vec<_> = noted.into_iter().filter(|noted| !is_there(noted)).collect();
            findings.forget(&gone);
        }
        checked
    }

    fn done(&self) -> u64 {
        self.before.saturating_add(self.read)
    }

    /// Counts what was read, and waits when that was faster than the rate allows.
    fn step(&mut self, bytes: ByteCount) -> bool {
        self.read += bytes.0;
        let done = self.done();
        // Images are counted by their files, and read as they were before they were compressed.
        let change = |status: &mut backtide_receiver_api::ScrubStatus| {
            status.done_bytes = ByteCount(done.min(status.total_bytes.0));
        };
        self.shared.progress.change(change);
        if self.rate.is_zero() {
            return !self.shared.is_unwanted();
        }
        let due = Duration::from_secs_f64(self.read as f64 / self.rate.0 as f64);
        while !self.shared.is_unwanted() {
            let early = due.saturating_sub(self.begun.elapsed());
            if early.is_zero() {
                return true;
            }
            std::thread::sleep(early.min(WAIT_MAX));
        }
        false
    }
}

/// Asks a thread that owns disks, and waits.
fn ask<T>(owner: &mpsc::Sender<Task>, task: impl FnOnce(oneshot::Sender<T>) -> Task) -> Result<T, Ending> {
    let (answer, answered) = oneshot::channel();
    owner.blocking_send(task(answer)).map_err(|_| Ending)?;
    answered.blocking_recv().map_err(|_| Ending)
}
