//! What can be told of a hydration.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use backtide_agent_api::{HydrationKind, HydrationStatus};
use backtide_hydration::{Hydrator, Kind};
use backtide_units::{BlockCount, ByteCount};

use super::HydratingDisk;

/// The rate is that of so much time.
const RATE_TIME: Duration = Duration::from_secs(10);

/// How far samples are apart.
const SAMPLE_TIME: Duration = Duration::from_millis(250);

/// How fast missing blocks come.
pub(super) struct Progress {
    samples: VecDeque<(Instant, BlockCount)>,
    fetched: BlockCount,
}

impl Progress {
    pub(super) fn new(missing: BlockCount) -> Self {
        Self { samples: VecDeque::from([(Instant::now(), missing)]), fetched: BlockCount(0) }
    }

    fn sample(&mut self, now: Instant, missing: BlockCount) {
        let last = self.samples.back().expect("there is one since the beginning");
        if now.duration_since(last.0) >= SAMPLE_TIME {
            self.samples.push_back((now, missing));
        }
        while self.samples.len() > 2 && now.duration_since(self.samples[0].0) > RATE_TIME {
            self.samples.pop_front();
        }
    }

    /// Bytes a second, lately.
    fn rate(&self, now: Instant, missing: BlockCount) -> ByteCount {
        let (since, before) = self.samples[0];
        let seconds = now.duration_since(since).as_secs_f64().max(0.001);
        let came = BlockCount(before.0.saturating_sub(missing.0)).bytes();
        ByteCount((came.0 as f64 / seconds) as u64)
    }
}

impl HydratingDisk {
    /// Limits what is fetched without being asked for, in bytes a second; zero for no limit.
    pub(crate) fn limit(&self, rate: ByteCount) {
        self.rate_max.set(rate.0);
        self.changed.notify_waiters();
    }

    /// Lets something end, by which blocks may come, so many of them from the receiver.
    pub(super) fn brought<T>(&self, fetched: BlockCount, end: impl FnOnce(&mut Hydrator) -> T) -> T {
        let mut hydrator = self.hydrator.borrow_mut();
        let before = hydrator.missing().blocks().count();
        let ended = end(&mut hydrator);
        self.has_brought(before, hydrator.missing().blocks().count(), fetched);
        ended
    }

    fn has_brought(&self, before: BlockCount, missing: BlockCount, fetched: BlockCount) {
        let mut progress = self.progress.borrow_mut();
        let came = before.0.saturating_sub(missing.0);
        progress.fetched = BlockCount(progress.fetched.0 + fetched.0.min(came));
        progress.sample(Instant::now(), missing);
    }

    /// None when nothing is missing any more.
    pub(crate) fn status(&self) -> Option<HydrationStatus> {
        if self.complete.get() {
            return None;
        }
        let hydrator = self.hydrator.borrow();
        let (left, damaged) = (hydrator.missing().blocks().count(), hydrator.missing().damaged().count());
        let header = self.file.header();
        let progress = self.progress.borrow();
        let rate = progress.rate(Instant::now(), left);
        let trouble = self.trouble.borrow().clone().or(match damaged.0 {
            0 => None,
            1 => Some("1 missing block is damaged at the receiver".to_owned()),
            damaged => Some(format!("{damaged} missing blocks are damaged at the receiver")),
        });
        // What is damaged does not come, however fast the rest does.
        let ends = rate.0 > 0 && damaged.0 == 0 && !self.refused.get();
        Some(HydrationStatus {
            kind: match header.kind {
                Kind::Rewind => HydrationKind::Rewind,
                Kind::Origin => HydrationKind::Origin,
                Kind::Failover => HydrationKind::Failover,
            },
            receiver: header.source.receiver.clone(),
            disk: header.source.name.clone(),
            point: header.source.lsn,
            point_time: header.source.time,
            before: (header.kind == Kind::Rewind).then_some(header.before),
            total_bytes: header.total.bytes(),
            missing_bytes: left.bytes(),
            damaged_bytes: damaged.bytes(),
            fetched_bytes: progress.fetched.bytes(),
            rate,
            eta_seconds: ends.then(|| left.bytes().0.div_ceil(rate.0)),
            trouble,
            stuck: self.refused.get() || (left.0 > 0 && left == damaged),
            waiting_requests: hydrator.waiting(),
        })
    }
}
