//! What went of a disk for want of room although its ladder promises it: told until that is as long ago as was promised.

use backtide_recovery::time_text;
use backtide_units::{CaptureTime, DiskId};

use super::{Policies, Policy};
use crate::retention::Span;

impl Policies {
    /// What a person should know of a disk whose history went for want of room, as long as that is shorter than its ladder
    /// promises: how much was promised, and how much is left.
    pub(crate) fn shortened(&self, disk: DiskId, now: CaptureTime) -> Option<String> {
        let Policy { shrunk, dropped, .. } = self.of(disk);
        let since = shrunk?;
        let left = Span(now.0.saturating_sub(since.0));
        let ladder = self.ladder(disk);
        let promised = ladder.any;
        if promised.is_some_and(|promised| promised.0 <= left.0) {
            let dropped = dropped?;
            let longest = ladder.rungs.iter().map(|rung| rung.keep).max()?;
            let is_promised = now.0.saturating_sub(dropped.0) < longest.0;
            return is_promised.then(|| {
                format!(
                    "the store was nearly full, history that its retention promises is gone: single points were to be kept \
                     for {longest}, and of those up to {} not all are left",
                    time_text(dropped)
                )
            });
        }
        let promised = promised.map_or_else(|| "for ever".to_owned(), |promised| format!("for {promised}"));
        Some(format!(
            "the store was nearly full, history that its retention promises is gone: every change was to be kept \
             {promised}, and those since {} are left",
            time_text(since)
        ))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use backtide_storage::MemoryStorage;

    use super::*;

    const HOUR: u64 = 3_600_000_000;

    #[test]
    fn single_points_that_went_are_told_of_as_long_as_they_were_promised() {
        let (storage, disk) = (Arc::new(MemoryStorage::new()), DiskId::random());
        let policies = Policies::open(storage, "any=2h hourly=2d".parse().unwrap());
        let told = |hours: u64| policies.shortened(disk, CaptureTime(hours * HOUR));
        let went = |policy: &mut Policy| {
            policy.shrunk = Some(CaptureTime(99 * HOUR));
            policy.dropped = Some(CaptureTime(90 * HOUR));
        };
        policies.change(disk, went).unwrap();
        let every = told(100).unwrap();
        assert!(every.contains("every change was to be kept for 2h"), "{every}");
        for hours in [101, 137] {
            let single = told(hours).unwrap();
            let said = "single points were to be kept for 2d, and of those up to 1970-01-04T18:00:00";
            assert!(single.contains(said), "{single}");
        }
        assert_eq!(told(138), None);
    }
}
