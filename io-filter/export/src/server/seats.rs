//! The places of a server's clients.
//!
//! A client has its place until it leaves. When all are taken one that does not use it gives it to a new one: first who never
//! asked for anything, or for next to nothing and is no writer - no guest does with so little - then, of a process that
//! has more than half of all places, the client that was silent for longest. Nobody gives way whose request is in flight, or
//! whose last one was answered a moment ago. All others keep their places, however long they are silent: one may be a guest that
//! rests, whose disk would be gone with it. Before all of these goes whose client left a while ago, and whose requests do not end: a
//! device that stands still, or a receiver that is waited for, would be given one place after the other by clients that try again.
//!
//! Invariant: there are never more clients than places.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::time::Instant;

/// Who has asked for more than this may be a guest. A program that looks at a disk asks for less, an operating system that
/// finds one reads more of it.
const ASKED_FOR_NOTHING: u64 = 8;

/// The places. A shared socket's thread looks at them too. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Seats {
    taken: Arc<Mutex<BTreeMap<u64, Arc<Taken>>>>,
    limit: usize,
    /// How long a client may be silent that asked for next to nothing.
    patience: Duration,
    began: Instant,
}

#[derive(Debug)]
struct Taken {
    /// The process of the client, where that is known.
    process: Option<u32>,
    asked: AtomicU64,
    is_writer: AtomicBool,
    is_busy: AtomicBool,
    /// Its client has hung up, or said good-bye, though something it asked for is not done.
    has_left: AtomicBool,
    /// When it came to rest or left last, or was taken, in milliseconds of [`Seats::began`]. Of one that is busy and there it says
    /// nothing.
    used: AtomicU64,
}

/// The place of one client, until this is dropped.
#[derive(Debug)]
pub(crate) struct Seat {
    seats: Seats,
    id: u64,
    taken: Arc<Taken>,
}

/// What a client is doing.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Use {
    /// So many requests came so far.
    pub(crate) asked: u64,
    /// One of them was to change the disk, or to keep what was changed.
    pub(crate) is_writer: bool,
    /// One of them is not answered yet.
    pub(crate) is_busy: bool,
}

impl Seats {
    pub(crate) fn new(limit: usize, patience: Duration) -> Self {
        Self { taken: Arc::default(), limit, patience, began: Instant::now() }
    }

    /// Whether one client more, of that process, would get a place now: what [`take`](Self::take) would say.
    pub(crate) fn has_room(&self, process: Option<u32>) -> bool {
        let taken = self.taken();
        taken.len() < self.limit || self.leaver(&taken, process).is_some()
    }

    /// Takes a place for connection `id` of a process, and says whose it was if that one has to go. None when all are kept.
    pub(crate) fn take(&self, id: u64, process: Option<u32>) -> Option<(Seat, Option<u64>)> {
        let mut taken = self.taken();
        let mut evicted = None;
        if taken.len() >= self.limit {
            let leaver = self.leaver(&taken, process)?;
            taken.remove(&leaver);
            evicted = Some(leaver);
        }
        let new = Arc::new(Taken {
            process,
            asked: AtomicU64::new(0),
            is_writer: AtomicBool::new(false),
            is_busy: AtomicBool::new(false),
            has_left: AtomicBool::new(false),
            used: AtomicU64::new(self.now()),
        });
        taken.insert(id, Arc::clone(&new));
        Some((Seat { seats: self.clone(), id, taken: new }, evicted))
    }

    /// Takes the place of whoever asked for next to nothing, if there is somebody, for something else than a client.
    pub(crate) fn clear_one(&self) -> Option<u64> {
        let mut taken = self.taken();
        let idler = self.idler(&taken)?;
        taken.remove(&idler);
        Some(idler)
    }

    /// Who gives way to a client of `process`.
    fn leaver(&self, taken: &BTreeMap<u64, Arc<Taken>>, process: Option<u32>) -> Option<u64> {
        let gone = || self.longest(taken, |seat| seat.has_left.load(Ordering::Relaxed));
        gone().or_else(|| self.idler(taken)).or_else(|| self.of_many(taken, process))
    }

    /// Of those that only sit there, who did so for longest.
    fn idler(&self, taken: &BTreeMap<u64, Arc<Taken>>) -> Option<u64> {
        let asked_little = |seat: &Taken| {
            !seat.is_writer.load(Ordering::Relaxed) && seat.asked.load(Ordering::Relaxed) <= ASKED_FOR_NOTHING
        };
        self.longest(taken, asked_little)
    }

    /// Of a process that has more than half of all places, and is not the one that wants another, the one that was silent
    /// for longest. No client of NBD needs as many.
    fn of_many(&self, taken: &BTreeMap<u64, Arc<Taken>>, process: Option<u32>) -> Option<u64> {
        let mut counts = BTreeMap::<u32, usize>::new();
        for owner in taken.values().filter_map(|seat| seat.process) {
            *counts.entry(owner).or_default() += 1;
        }
        let (owner, _) = counts.into_iter().find(|(_, count)| *count > self.limit / 2)?;
        if process == Some(owner) {
            return None;
        }
        self.longest(taken, |seat| seat.process == Some(owner))
    }

    fn longest(&self, taken: &BTreeMap<u64, Arc<Taken>>, which: impl Fn(&Taken) -> bool) -> Option<u64> {
        let before = self.now().checked_sub(millis(self.patience))?;
        let gives_way = |seat: &Taken| {
            (!seat.is_busy.load(Ordering::Acquire) || seat.has_left.load(Ordering::Acquire))
                && seat.used.load(Ordering::Relaxed) <= before
                && which(seat)
        };
        let idle = taken.iter().filter(|(_, seat)| gives_way(seat));
        idle.min_by_key(|(_, seat)| seat.used.load(Ordering::Relaxed)).map(|(id, _)| *id)
    }

    fn now(&self) -> u64 {
        millis(self.began.elapsed())
    }

    fn taken(&self) -> MutexGuard<'_, BTreeMap<u64, Arc<Taken>>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Seat {
    /// Its client is not there any more: what it asked for is done all the same, and nobody hears of it.
    pub(crate) fn client_left(&self) {
        if !self.taken.has_left.load(Ordering::Relaxed) {
            self.taken.used.store(self.seats.now(), Ordering::Relaxed);
            self.taken.has_left.store(true, Ordering::Release);
        }
    }

    /// Its client has asked for something, or has been answered.
    pub(crate) fn note(&self, used: Use) {
        let Use { asked, is_writer, is_busy } = used;
        // On every request's way: the clock is asked where it counts only.
        if !is_busy {
            self.taken.used.store(self.seats.now(), Ordering::Relaxed);
        }
        self.taken.asked.store(asked, Ordering::Relaxed);
        self.taken.is_writer.store(is_writer, Ordering::Relaxed);
        // Last: who finds it at rest finds since when.
        self.taken.is_busy.store(is_busy, Ordering::Release);
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.seats.taken().remove(&self.id);
    }
}

fn millis(duration: Duration) -> u64 {
    duration.as_millis().try_into().unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(10);

    fn asked(asked: u64) -> Use {
        Use { asked, ..Use::default() }
    }

    #[tokio::test(start_paused = true)]
    async fn who_asks_for_next_to_nothing_gives_way_and_a_guest_never_does() {
        let seats = Seats::new(4, PATIENCE);
        let writer = seats.take(1, None).unwrap().0;
        writer.note(Use { asked: 1, is_writer: true, is_busy: false });
        let reader = seats.take(2, None).unwrap().0;
        reader.note(asked(ASKED_FOR_NOTHING + 1));
        let idlers = [seats.take(3, None).unwrap().0, seats.take(4, None).unwrap().0];
        assert!(!seats.has_room(None) && seats.take(5, None).is_none(), "nobody has been silent for long");
        tokio::time::advance(PATIENCE / 2).await;
        idlers[0].note(asked(ASKED_FOR_NOTHING));
        tokio::time::advance(PATIENCE / 2).await;
        assert!(seats.has_room(None));
        let (fifth, evicted) = seats.take(5, None).unwrap();
        assert_eq!(evicted, Some(4), "the one that was silent for longest");
        tokio::time::advance(PATIENCE / 2).await;
        let (sixth, evicted) = seats.take(6, None).unwrap();
        assert_eq!(evicted, Some(3), "it has asked a few times, long ago");
        // The end of those that had to go takes nothing from others.
        drop(idlers);
        assert!(!seats.has_room(None));
        tokio::time::advance(PATIENCE * 1000).await;
        fifth.note(Use { asked: 1, is_writer: false, is_busy: true });
        sixth.note(Use { asked: 1, is_writer: true, is_busy: false });
        tokio::time::advance(PATIENCE * 1000).await;
        assert!(
            !seats.has_room(None) && seats.take(7, None).is_none() && seats.clear_one().is_none(),
            "none is idle"
        );
        fifth.note(asked(1));
        assert_eq!(seats.clear_one(), None, "it was answered just now");
        tokio::time::advance(PATIENCE).await;
        assert_eq!(seats.clear_one(), Some(5));
        drop((writer, fifth));
        assert!(seats.has_room(None));
    }

    #[tokio::test(start_paused = true)]
    async fn who_has_left_gives_way_though_something_it_asked_for_does_not_end() {
        let seats = Seats::new(2, PATIENCE);
        let busy = Use { asked: 1000, is_writer: true, is_busy: true };
        let [gone, there] = [1, 2].map(|id| seats.take(id, None).unwrap().0);
        gone.note(busy);
        there.note(busy);
        tokio::time::advance(PATIENCE * 2).await;
        assert!(!seats.has_room(None));
        gone.client_left();
        assert!(!seats.has_room(None), "it may hear of it yet");
        tokio::time::advance(PATIENCE / 2).await;
        gone.client_left();
        tokio::time::advance(PATIENCE / 2).await;
        let (third, evicted) = seats.take(3, None).unwrap();
        assert_eq!(evicted, Some(1));
        third.note(busy);
        assert!(seats.take(4, None).is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn a_process_with_most_of_the_places_gives_one_to_another_that_has_none() {
        let seats = Seats::new(4, PATIENCE);
        let (many, one, guest) = (Some(77), Some(8), Some(9));
        let resting = seats.take(1, guest).unwrap().0;
        resting.note(asked(1000));
        let hoarded: Vec<_> = (2..5).map(|id| seats.take(id, many).unwrap().0).collect();
        for (age, seat) in hoarded.iter().enumerate() {
            seat.note(Use { asked: 1000, is_writer: true, is_busy: false });
            tokio::time::advance(Duration::from_secs(age as u64)).await;
        }
        assert!(seats.take(5, one).is_none(), "they were used a moment ago");
        tokio::time::advance(PATIENCE).await;
        assert!(!seats.has_room(many) && seats.take(5, many).is_none(), "it has enough");
        assert!(seats.has_room(one) && seats.has_room(None));
        hoarded[0].note(Use { asked: 1001, is_writer: false, is_busy: true });
        let (_fifth, evicted) = seats.take(5, one).unwrap();
        assert_eq!(evicted, Some(3), "the first is at work");
        tokio::time::advance(PATIENCE).await;
        _fifth.note(asked(1000));
        assert!(seats.take(6, one).is_none(), "half of them is not most");
        drop(resting);
    }
}
