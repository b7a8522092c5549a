//! A store with little room: what is said of it, and with `on_full = "shrink"` whose history goes.
//!
//! Single points go first, the oldest half of them; then the older half of the time of which every point is kept. One disk a
//! round, the one with the oldest history that may go: then the room is looked at again.

use std::collections::BTreeMap;

use backtide_units::{ByteCount, DiskId};

use super::{Ending, Thinned, Undone, Work, lock};
use crate::{
    config::OnFull,
    retention::{Pressure, every_change_from, oldest_that_goes},
};

/// What is said when no disk can give any history.
const NOTHING_GOES: &str =
    "no more history can go, for what is there is kept, locked, too new or cannot be read";

impl Work {
    /// Looks how much room there is, and says what is done about it.
    pub(super) fn look_at_the_room(&mut self) -> Pressure {
        let low = self.low();
        let free = match self.shelf.storage.free_space() {
            Ok(free) => free,
            // A store that has gone is told of elsewhere.
            Err(_) => return Pressure::None,
        };
        let growth = self.forecast.look(self.started.elapsed(), free, self.shelf.space_floor);
        if free.0 >= low {
            lock(&self.shared.status).stuck = false;
        }
        let why = self.told_of(free);
        let mut status = lock(&self.shared.status);
        if let (Some(why), None) = (&why, &status.low) {
            tracing::warn!(why, "little room");
        }
        status.low = why;
        status.growth = growth;
        if status.low.is_some() && self.settings.on_full == OnFull::Shrink {
            Pressure::Shrink
        } else {
            Pressure::None
        }
    }

    /// What is said of so little room.
    fn told_of(&self, free: ByteCount) -> Option<String> {
        let low = self.low();
        let then = match (self.settings.on_full, self.held()) {
            (OnFull::Refuse, _) => "new data is refused when it is full".to_owned(),
            (OnFull::Shrink, None) => {
                let locked = match self.policies.locked_disks() {
                    0 => String::new(),
                    1 => ": 1 disk is locked as a whole".to_owned(),
                    disks => format!(": {disks} disks are locked as a whole"),
                };
                match (lock(&self.shared.status).stuck, locked.is_empty()) {
                    (true, _) => format!("{NOTHING_GOES}{locked}; new data is refused when it is full"),
                    (false, true) => "the oldest history goes".to_owned(),
                    (false, false) => format!("the oldest history goes, where it may{locked}"),
                }
            }
            (OnFull::Shrink, Some(disk)) => format!(
                "history of disk {disk} that was given up is still there: mounts or other readers hold it \
                 (`backtide mount` lists the mounts); no more goes until it is gone"
            ),
        };
        (free.0 < low)
            .then(|| format!("the store is nearly full: {free} bytes are free, below {low}; {then}"))
    }

    /// Whether the store has come to have little room since the round began, and history goes for that.
    pub(super) fn is_short(&self) -> bool {
        self.settings.on_full == OnFull::Shrink
            && self.shelf.storage.free_space().is_ok_and(|free| free.0 < self.low())
    }

    /// Lets the oldest history of one disk go, if any can: then the room is looked at again.
    pub(super) fn shrink(
        &mut self,
        disks: Vec<DiskId>,
        doubtful: &BTreeMap<DiskId, bool>,
    ) -> Result<(), Ending> {
        // What went before must have given its room first, and more of such a disk would give none either.
        if self.left.is_none() || self.held().is_some() {
            return Ok(());
        }
        let mut all_told = true;
        for disk in self.oldest_first(disks)? {
            if self.left_of(disk).0 > 0 {
                all_told = false;
                continue;
            }
            self.dropped_last = None;
            let Thinned { done, why, .. } = self.thin_all(disk, Pressure::Shrink)?;
            self.tell(disk, why, doubtful);
            if done {
                let mut status = lock(&self.shared.status);
                *status.shrunk.entry(disk).or_default() += 1;
                status.stuck = false;
                drop(status);
                self.shrunk_last = Some(disk);
                return self.note_shrunk(disk);
            }
        }
        let known = lock(&self.shared.status).stuck;
        if all_told && !known {
            lock(&self.shared.status).stuck = true;
            let told = self.shelf.storage.free_space().ok().and_then(|free| self.told_of(free));
            if let Some(why) = &told {
                tracing::warn!(why, "little room");
            }
            lock(&self.shared.status).low = told;
        }
        Ok(())
    }

    /// Those of them that have history, the one first of which the oldest goes: a single point that may, or else a part of the
    /// time of which every point is kept.
    fn oldest_first(&self, disks: Vec<DiskId>) -> Result<Vec<DiskId>, Ending> {
        let mut oldest = Vec::new();
        for disk in disks {
            let Some(snapshot) = self.all_logs(disk)? else { continue };
            let pins = match self.wanted(disk, Pressure::Shrink) {
                Ok(wanted) => wanted.map(|wanted| wanted.pins).unwrap_or_default(),
                Err(Undone::Ending) => return Err(Ending),
                // It is told when the disk's turn comes.
                Err(Undone::Later | Undone::Why(_)) => BTreeMap::new(),
            };
            oldest.extend(oldest_that_goes(&snapshot, &pins).map(|time| (time, disk)));
        }
        oldest.sort();
        Ok(oldest.into_iter().map(|(_, disk)| disk).collect())
    }

    /// Remembers from when on every change of a disk is left, and which single points are not.
    fn note_shrunk(&self, disk: DiskId) -> Result<(), Ending> {
        let left = self.all_logs(disk)?.and_then(|snapshot| every_change_from(&snapshot));
        let Some(left) = left else { return Ok(()) };
        let dropped = self.dropped_last;
        let noted = self.policies.change(disk, |policy| {
            policy.shrunk = Some(left.time);
            policy.dropped = policy.dropped.max(dropped);
        });
        if let Err(why) = noted {
            tracing::warn!(%disk, %why, "it is not remembered that history went for want of room");
        }
        Ok(())
    }

    /// Less than this is little.
    fn low(&self) -> u64 {
        self.settings.low_bytes.0.max(self.shelf.space_floor.0)
    }

    /// Bytes of history of a disk that was given up and is still there.
    fn left_of(&self, disk: DiskId) -> ByteCount {
        self.left.as_ref().and_then(|left| left.get(&disk)).copied().unwrap_or_default()
    }

    /// The disk whose history went last for want of room, while that has not given its room.
    fn held(&self) -> Option<DiskId> {
        self.shrunk_last.filter(|disk| self.left_of(*disk).0 > 0)
    }

    /// Making images stops when less than this is free: new data goes first. A store with little room gives some of
    /// that, since images are what lets history go.
    pub(super) fn room_to_leave(&self, free: ByteCount) -> ByteCount {
        let (low, floor) = (self.low(), self.shelf.space_floor.0);
        ByteCount(if free.0 >= low { low } else { floor + (low - floor) / 4 })
    }
}
