//! The places of a server's clients.
//!
//! A client has its place until it leaves. One that never asked for anything in the time a handshake may take gives
//! its place to a new one when all are taken: whoever only connects, however far, locks nobody out. One that has asked
//! for something keeps it, however long it is silent then: it may be a guest that rests.
//!
//! Invariant: there are never more clients than places.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::time::Instant;

/// The places. A shared socket's thread looks at them too. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Seats {
    taken: Arc<Mutex<BTreeMap<u64, Taken>>>,
    limit: usize,
    /// How long a client may be silent that never asked for anything.
    patience: Duration,
}

#[derive(Debug)]
struct Taken {
    since: Instant,
    asked: Arc<AtomicBool>,
}

/// The place of one client, until this is dropped.
#[derive(Debug)]
pub(crate) struct Seat {
    seats: Seats,
    id: u64,
    asked: Arc<AtomicBool>,
}

impl Seats {
    pub(crate) fn new(limit: usize, patience: Duration) -> Self {
        Self { taken: Arc::default(), limit, patience }
    }

    /// Whether one client more would get a place.
    pub(crate) fn has_room(&self) -> bool {
        let taken = self.taken();
        taken.len() < self.limit || self.idler(&taken).is_some()
    }

    /// Takes a place for connection `id`, and says whose it was if that one has to go. None when all are kept.
    pub(crate) fn take(&self, id: u64) -> Option<(Seat, Option<u64>)> {
        let mut taken = self.taken();
        let mut evicted = None;
        if taken.len() >= self.limit {
            let idler = self.idler(&taken)?;
            taken.remove(&idler);
            evicted = Some(idler);
        }
        let asked = Arc::<AtomicBool>::default();
        taken.insert(id, Taken { since: Instant::now(), asked: Arc::clone(&asked) });
        Some((Seat { seats: self.clone(), id, asked }, evicted))
    }

    /// Of those that only sit there, who came first.
    fn idler(&self, taken: &BTreeMap<u64, Taken>) -> Option<u64> {
        let idle =
            |seat: &Taken| !seat.asked.load(Ordering::Relaxed) && seat.since.elapsed() >= self.patience;
        taken.iter().filter(|(_, seat)| idle(seat)).min_by_key(|(_, seat)| seat.since).map(|(id, _)| *id)
    }

    fn taken(&self) -> MutexGuard<'_, BTreeMap<u64, Taken>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Seat {
    /// Its client has asked for something.
    pub(crate) fn asked(&self) {
        self.asked.store(true, Ordering::Relaxed);
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.seats.taken().remove(&self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(10);

    #[tokio::test(start_paused = true)]
    async fn who_never_asked_gives_way_and_who_did_never_does() {
        let seats = Seats::new(3, PATIENCE);
        let guest = seats.take(1).unwrap().0;
        guest.asked();
        let idlers = [seats.take(2).unwrap().0, seats.take(3).unwrap().0];
        assert!(!seats.has_room() && seats.take(4).is_none(), "nobody has been silent for long");
        tokio::time::advance(PATIENCE).await;
        assert!(seats.has_room());
        let (fourth, evicted) = seats.take(4).unwrap();
        assert_eq!(evicted, Some(2), "the one that came first");
        // The end of the one that had to go takes nothing from others.
        drop(idlers);
        let (fifth, evicted) = seats.take(5).unwrap();
        assert_eq!(evicted, None, "the third has left by itself");
        tokio::time::advance(PATIENCE * 1000).await;
        fourth.asked();
        fifth.asked();
        assert!(!seats.has_room() && seats.take(6).is_none(), "all of them have asked, whenever that was");
        drop(guest);
        assert!(seats.has_room());
    }
}
