//! The scrub: everything that is kept is read and checked while the receiver works, one disk after
//! the other, at a bounded rate, on a thread of its own. What can be mended is.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use backtide_receiver_api::{ApiError, DiskCheck, ErrorCode, ScrubStatus};
use backtide_recovery::Snapshot;
use backtide_units::{ByteCount, DiskId, DiskName};

use crate::{clock, findings::Findings, fsck::check_snapshot, overlays::Overlays};

/// The rate when nobody says another.
pub(crate) const RATE_DEFAULT: ByteCount = ByteCount(64 << 20);

/// It looks so often whether it is called off while it waits for its rate.
const WAIT_MAX: Duration = Duration::from_millis(100);

/// A disk to read.
pub(crate) struct Target {
    pub(crate) name: Option<DiskName>,
    pub(crate) uuid: DiskId,
    /// What can be read; or why nothing can.
    pub(crate) snapshot: Result<Snapshot, String>,
    /// What is known damaged of it already.
    pub(crate) damage: Vec<String>,
    /// Its log is in use: what can be mended is.
    pub(crate) mends: bool,
}

/// The scrub of a receiver: at most one runs. Dropped, it is called off.
pub(crate) struct Scrub {
    status: Arc<Mutex<Option<ScrubStatus>>>,
    unwanted: Mutex<Arc<AtomicBool>>,
    findings: Findings,
}

impl Scrub {
    /// None has run; what one finds goes to `findings`.
    pub(crate) fn new(findings: Findings) -> Self {
        Self { status: Arc::default(), unwanted: Mutex::default(), findings }
    }

    /// What runs, or ran last.
    pub(crate) fn status(&self) -> Option<ScrubStatus> {
        lock(&self.status).clone()
    }

    /// Starts one.
    pub(crate) fn start(
        &self,
        targets: Vec<Target>,
        overlays: Option<Overlays>,
        rate: ByteCount,
    ) -> Result<ScrubStatus, ApiError> {
        let total: u64 =
            targets.iter().filter_map(|target| target.snapshot.as_ref().ok()).map(|s| s.bytes().0).sum();
        let total = total + overlays.as_ref().map_or(0, |overlays| overlays.all_file_bytes().0);
        let begun = ScrubStatus {
            running: true,
            cancelled: false,
            started: clock::now(),
            ended: None,
            done_bytes: ByteCount::ZERO,
            total_bytes: ByteCount(total),
            bytes_per_second_max: rate,
            disks: Vec::new(),
            overlays: Vec::new(),
            sound: true,
        };
        let unwanted = Arc::new(AtomicBool::new(false));
        {
            let mut status = lock(&self.status);
            if status.as_ref().is_some_and(|status| status.running) {
                let busy = ApiError::new(ErrorCode::Busy, "a scrub is running already");
                return Err(busy.with_hint("wait for it, or call it off: backtide scrub --cancel"));
            }
            *status = Some(begun.clone());
        }
        *lock(&self.unwanted) = Arc::clone(&unwanted);
        let (status, findings) = (Arc::clone(&self.status), self.findings.clone());
        let work = Work { status, unwanted, findings, rate, begun: Instant::now(), done: 0 };
        let spawned =
            std::thread::Builder::new().name("scrub".to_owned()).spawn(move || work.run(targets, overlays));
        if let Err(error) = spawned {
            *lock(&self.status) = None;
            return Err(ApiError::new(ErrorCode::Failed, format!("start the scrub's thread: {error}")));
        }
        Ok(begun)
    }

    /// Calls it off; it ends soon.
    pub(crate) fn cancel(&self) {
        lock(&self.unwanted).store(true, Ordering::Relaxed);
    }
}

impl Drop for Scrub {
    fn drop(&mut self) {
        self.cancel();
    }
}

struct Work {
    status: Arc<Mutex<Option<ScrubStatus>>>,
    unwanted: Arc<AtomicBool>,
    findings: Findings,
    rate: ByteCount,
    begun: Instant,
    done: u64,
}

impl Work {
    fn run(mut self, targets: Vec<Target>, overlays: Option<Overlays>) {
        for target in targets {
            if self.unwanted.load(Ordering::Relaxed) {
                break;
            }
            let checked = self.check(target);
            if let Some(why) = checked.damage.first().or(checked.error.as_ref()) {
                tracing::error!(disk = %checked.uuid, damage = checked.damage.len(), why, "the scrub found damage");
            }
            for damage in &checked.mended {
                tracing::warn!(disk = %checked.uuid, damage, "the scrub has mended damage");
            }
            self.change(|status| {
                status.sound &= checked.sound;
                status.disks.push(checked);
            });
        }
        if let Some(overlays) = overlays.filter(|_| !self.unwanted.load(Ordering::Relaxed)) {
            let checked = overlays.check(&mut |bytes| self.step(bytes));
            self.change(|status| {
                status.sound &= checked.iter().all(|overlay| overlay.sound);
                status.overlays = checked;
            });
        }
        let cancelled = self.unwanted.load(Ordering::Relaxed);
        self.change(|status| {
            status.running = false;
            if !cancelled {
                status.done_bytes = status.total_bytes;
            }
            status.cancelled = cancelled;
            status.ended = Some(clock::now());
        });
    }

    fn check(&mut self, target: Target) -> DiskCheck {
        let Target { name, uuid, snapshot, damage, mends } = target;
        let (segments, entries, bytes) = (0, 0, ByteCount::ZERO);
        let (more_damage, error, sound) = (0, None, false);
        let mended = Vec::new();
        let report =
            DiskCheck { name, uuid, segments, entries, bytes, damage, more_damage, mended, error, sound };
        match snapshot {
            Ok(snapshot) => {
                let (known, noted) = (report.damage.clone(), self.findings.of(uuid));
                let checked = check_snapshot(report, &snapshot, mends, &mut |bytes| self.step(bytes));
                let all = checked.damage.iter().chain(&checked.error);
                let found: Vec<_> = all.filter(|place| !known.contains(place)).collect();
                found.iter().for_each(|why| self.findings.note(uuid, why));
                // One that was called off has seen a part of it, nor does all have a name in its report.
                if !self.unwanted.load(Ordering::Relaxed) && checked.error.is_none() {
                    let gone: Vec<_> = noted.into_iter().filter(|place| !found.contains(&place)).collect();
                    self.findings.forget(uuid, &gone);
                }
                checked
            }
            Err(why) => DiskCheck { error: Some(why), ..report },
        }
    }

    /// Counts what was read, and waits when that was faster than the rate allows.
    fn step(&mut self, bytes: ByteCount) -> bool {
        self.done += bytes.0;
        let done = self.done;
        // Images are counted by their files, and read as they were before they were compressed.
        self.change(|status| status.done_bytes = ByteCount(done.min(status.total_bytes.0)));
        if self.rate.is_zero() {
            return !self.unwanted.load(Ordering::Relaxed);
        }
        let due = Duration::from_secs_f64(self.done as f64 / self.rate.0 as f64);
        while !self.unwanted.load(Ordering::Relaxed) {
            let early = due.saturating_sub(self.begun.elapsed());
            if early.is_zero() {
                return true;
            }
            std::thread::sleep(early.min(WAIT_MAX));
        }
        false
    }

    fn change(&self, change: impl FnOnce(&mut ScrubStatus)) {
        if let Some(status) = lock(&self.status).as_mut() {
            change(status);
        }
    }
}

/// Nothing that could panic runs under these locks.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
