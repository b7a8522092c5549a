//! What a person should look at now, in the control API's answers.

use backtide_receiver_api::{ApiError, ErrorCode, StoreGrowth};
use backtide_recovery::{INTERVALS_MAX, time_text};
use backtide_units::{ByteCount, CaptureTime};

use super::Service;
use crate::{OnFull, clock, facts::DiskFacts, touched::told};

impl Service {
    /// How the store fills.
    pub(super) fn growth(&self) -> Option<StoreGrowth> {
        self.keeper.status().growth.map(|growth| StoreGrowth {
            bytes_per_second: growth.bytes_per_second,
            over_seconds: growth.over.as_secs(),
            full_in_seconds: growth.full_in.map(|left| left.as_secs()),
        })
    }

    /// What the store has left; nothing can be told of one that has `gone`.
    pub(super) fn free(&self, gone: bool) -> Result<Option<ByteCount>, ApiError> {
        match self.storage.free_space() {
            Ok(free) => Ok(Some(free)),
            // A store that has gone is an alarm, and the rest of the answer is worth having.
            Err(_) if gone => Ok(None),
            Err(error) => {
                let why = format!("read the free space of the store {}: {error}", self.store.display());
                Err(ApiError::new(ErrorCode::Failed, why))
            }
        }
    }

    /// Whether new data is refused.
    pub(super) fn is_full(&self, free: ByteCount) -> bool {
        free < self.space_floor || self.watch.refusals.hold_at(free)
    }

    /// Whether there is little room, or none: as it is now, not as it was when retention looked last.
    fn little_room(&self, free: ByteCount, looked_at: Option<String>, stuck: bool) -> Option<String> {
        let floor = self.space_floor;
        if self.is_full(free) {
            let until = match self.on_full {
                OnFull::Refuse => "there is room",
                OnFull::Shrink if stuck => "there is room, and no more history can go",
                OnFull::Shrink => "the oldest history has made room",
            };
            return Some(format!(
                "the store is full: data is refused until {until}; {free} bytes are free, {floor} are kept in reserve"
            ));
        }
        let low = self.low_bytes.max(floor);
        if free >= low {
            return None;
        }
        looked_at
            .or_else(|| {
                let then = match self.on_full {
                    OnFull::Refuse => "new data is refused when it is full",
                    OnFull::Shrink => "the oldest history goes",
                };
                Some(format!("the store is nearly full: {free} bytes are free, below {low}; {then}"))
            })
            .map(|why| format!("{why}{}", self.full_when()))
    }

    /// When there is no room left, at the rate of the last hour.
    fn full_when(&self) -> String {
        let full_in = self.keeper.status().growth.and_then(|growth| growth.full_in);
        full_in.map_or_else(String::new, |left| {
            let at =
                CaptureTime(clock::now().0.saturating_add(left.as_micros().try_into().unwrap_or(u64::MAX)));
            format!("; at the rate of the last hour there is no room left at {}", time_text(at))
        })
    }

    /// What a person should look at now; `free` is what the store has left, if that can be told.
    pub(super) fn alarms(&self, facts: &[DiskFacts], free: Option<ByteCount>) -> Vec<String> {
        let mut alarms: Vec<String> = self.watch.check().err().into_iter().collect();
        let keeper = self.keeper.status();
        let low = free.and_then(|free| self.little_room(free, keeper.low, keeper.stuck));
        alarms.extend(low.into_iter().chain(self.policies.damage()).chain(keeper.error).chain(keeper.apart));
        for facts in facts {
            let name = facts.name.as_ref().map_or_else(|| facts.id.to_string(), ToString::to_string);
            alarms.extend(facts.error.iter().map(|why| format!("disk {name}: {why}")));
            let undone = keeper.errors.get(&facts.id);
            alarms.extend(undone.map(|why| format!("disk {name}: old history cannot be thinned: {why}")));
            let shortened = self.policies.shortened(facts.id, clock::now());
            alarms.extend(shortened.map(|why| format!("disk {name}: {why}")));
            // Where somebody had it forgotten its agent does not know that.
            let forgotten = self.removal.shelf.forgotten.is_remembered(facts.id);
            let lacked = facts.lacked.iter().filter(|(has_left_some, _)| *has_left_some || !forgotten);
            alarms.extend(lacked.map(|(_, why)| format!("disk {name}: {why}")));
            if facts.forgotten_intervals > 0 {
                alarms.push(format!(
                    "disk {name}: its history has more than {INTERVALS_MAX} intervals; the points of the oldest {} are not \
                     offered, kept or locked ones neither",
                    facts.forgotten_intervals
                ));
            }
            alarms
                .extend(facts.damage.iter().map(|why| format!("disk {name}: {}", told(why, &facts.touched))));
        }
        alarms.extend(self.overlays.alarms());
        alarms.extend(self.removal.shelf.forgotten.alarms());
        // Some of it is told already, by who met it too.
        let scrubbed = self.scrub.found_outside();
        let found: Vec<_> =
            scrubbed.iter().filter(|why| !alarms.iter().any(|alarm| alarm.contains(*why))).collect();
        alarms.extend(
            found.iter().map(|why| format!("the last scrub has found, and the next one looks again: {why}")),
        );
        alarms.extend(backtide_tls::warnings());
        alarms.dedup();
        alarms
    }
}
