//! Polling: for a moment after a guest's last request was answered its disk's thread looks again and again for the next
//! one, instead of going to sleep.
//!
//! A client that waits for each answer before it asks again finds the thread asleep each time, and waking it takes
//! longer than most requests do: a processor has to be woken as well, in a virtual machine by its host. How long the
//! thread looks adapts to how soon requests came lately, as it does for the I/O threads of QEMU (`poll-max-ns` and
//! `adjust_polling_time` in its `util/aio-posix.c`): short waits double the window, longer ones halve it, and no
//! window is left of a disk that is quiet, or of one whose client does not wait for answers.
//!
//! Only disks whose requests are answered out of the page cache poll. Where each waits for a device anyway, a guest was
//! slower with polling than without (docs/performance.md).
//!
//! It takes processor time that nobody else wants, and no more: between two looks the thread offers its processor to
//! others; when one takes it for long, this thread leaves off for a while. Of all the disks of an agent only a few poll
//! at once, see [`PollSeats`].
//!
//! Invariants: the thread looks for no longer than the bound after the last answer, and only while none is owed: neither
//! a device at work nor a guest that is held back is polled for.

use std::{
    cell::{Cell, RefCell},
    num::NonZero,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use tokio::sync::Notify;

use super::rest::Rests;

/// The window of a disk whose waits have become short.
const WINDOW_FIRST: Duration = Duration::from_micros(8);

/// Who comes sooner after an answer was there before it: its client has several requests under way, is served without
/// being waited for, and the more at once the longer this thread sleeps.
const AT_ONCE: Duration = Duration::from_micros(3);

/// Who was offered the processor and kept it for longer had use for it: this thread is in the way.
const TAKEN: Duration = Duration::from_micros(250);

/// How long is left off then, at first.
const REST_MIN: Duration = Duration::from_millis(10);

/// How long a thread keeps its seat that another wants.
const TURN: Duration = Duration::from_millis(10);

/// How many threads of this process poll at once: a quarter of the processors it may use, one where there are few, none
/// where there is but one.
#[derive(Debug, Default)]
pub(crate) struct PollSeats {
    /// The longest window; zero: nobody polls.
    max: Duration,
    free: AtomicUsize,
    /// Somebody found no seat.
    wanted: AtomicBool,
}

/// A thread's place among those that poll.
#[derive(Debug)]
struct Seat {
    of: Arc<PollSeats>,
    /// When the thread's turn began; it may have had none at times since.
    since: Instant,
}

impl PollSeats {
    pub(crate) fn new(max: Duration) -> Arc<Self> {
        let processors = thread::available_parallelism().map_or(1, NonZero::get);
        Self::of(max, if processors < 2 { 0 } else { (processors / 4).max(1) })
    }

    fn of(max: Duration, seats: usize) -> Arc<Self> {
        Arc::new(Self { max, free: AtomicUsize::new(seats), wanted: AtomicBool::new(false) })
    }

    /// A seat for a turn that began then, if one is free. A new turn takes the place of whoever wanted one: that was this
    /// thread, or one that comes again.
    fn take(self: &Arc<Self>, since: Instant, is_new: bool) -> Option<Seat> {
        let taken =
            self.free.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |free| free.checked_sub(1)).is_ok();
        if is_new || !taken {
            self.wanted.store(!taken, Ordering::Relaxed);
        }
        taken.then(|| Seat { of: Arc::clone(self), since })
    }
}

impl Seat {
    /// Whether it has been kept long enough for somebody else to have it.
    fn is_over(&self, now: Instant) -> bool {
        self.of.wanted.load(Ordering::Relaxed) && now >= self.since + TURN
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.of.free.fetch_add(1, Ordering::Relaxed);
    }
}

/// How long a thread looks for the next event, and when not at all.
#[derive(Debug)]
struct Window {
    max: Duration,
    now: Duration,
    rests: Rests,
}

impl Window {
    fn new(max: Duration) -> Self {
        Self { max, now: Duration::ZERO, rests: Rests::new(REST_MIN) }
    }

    /// Between an answer and the next request there was so much time.
    fn waited(&mut self, time: Duration) {
        if time > self.max || time < AT_ONCE {
            self.now /= 2;
            if self.now < WINDOW_FIRST {
                self.now = Duration::ZERO;
            }
        } else if time > self.now {
            self.now = (self.now * 2).max(WINDOW_FIRST).min(self.max);
        }
    }

    /// The processor was offered from `from` to `to`.
    fn offered(&mut self, from: Instant, to: Instant) {
        if to.saturating_duration_since(from) >= TAKEN {
            self.rests.begin(to);
        }
    }

    /// How long to look for the next event now.
    fn length(&self, now: Instant) -> Duration {
        if self.rests.is_over(now) { self.now } else { Duration::ZERO }
    }
}

/// The polling of one disk, on its thread.
#[derive(Debug)]
pub(crate) struct Polling {
    seats: Arc<PollSeats>,
    window: RefCell<Window>,
    /// Requests that are not answered.
    under_way: Cell<usize>,
    /// Since when there are none.
    idle: Cell<Option<Instant>>,
    /// There are none any more, and the next may come soon.
    soon: Notify,
    spent: Cell<Duration>,
}

impl Polling {
    /// In turn with the others that have these seats.
    pub(crate) fn new(seats: Arc<PollSeats>) -> Self {
        Self {
            window: RefCell::new(Window::new(seats.max)),
            seats,
            under_way: Cell::new(0),
            idle: Cell::new(None),
            soon: Notify::new(),
            spent: Cell::new(Duration::ZERO),
        }
    }

    /// A request has come.
    pub(crate) fn asked(&self) {
        self.under_way.set(self.under_way.get() + 1);
        if let Some(since) = self.idle.take() {
            self.window.borrow_mut().waited(since.elapsed());
        }
    }

    /// One was answered.
    pub(crate) fn answered(&self) {
        let left = self.under_way.get().saturating_sub(1);
        self.under_way.set(left);
        let window = self.window.borrow();
        if left == 0 && !window.max.is_zero() {
            self.idle.set(Some(Instant::now()));
            if !window.now.is_zero() {
                self.soon.notify_one();
            }
        }
    }

    /// Whether no more than one request is under way.
    pub(super) fn is_for_one(&self) -> bool {
        self.under_way.get() <= 1
    }

    /// How long the thread has looked in vain, instead of having slept.
    pub(crate) fn spent(&self) -> Duration {
        self.spent.get()
    }

    /// Polls, for ever.
    pub(crate) async fn keep(&self) {
        let mut not_before = Instant::now();
        // Since when it has had a seat whenever it wanted one.
        let mut turn: Option<Instant> = None;
        loop {
            self.soon.notified().await;
            let now = Instant::now();
            if now < not_before || !self.is_due(now) {
                continue;
            }
            let Some(seat) = self.seats.take(turn.unwrap_or(now), turn.is_none()) else {
                turn = None;
                continue;
            };
            turn = Some(seat.since);
            self.look(&seat, now).await;
            let now = Instant::now();
            if seat.is_over(now) {
                (turn, not_before) = (None, now + TURN);
            }
        }
    }

    /// Looks for requests until none came for too long, or one waits for something else.
    async fn look(&self, seat: &Seat, began: Instant) {
        let mut looked = began;
        loop {
            let idle = self.idle.get();
            // The runtime sees to what sockets, rings and timers have, and does not go to sleep.
            tokio::task::yield_now().await;
            let offered = Instant::now();
            if self.idle.get() == idle {
                self.spent.set(self.spent.get() + (offered - looked));
            }
            thread::yield_now();
            looked = Instant::now();
            self.window.borrow_mut().offered(offered, looked);
            if !self.is_due(looked) || seat.is_over(looked) {
                return;
            }
        }
    }

    /// Whether the next request may be here any moment.
    fn is_due(&self, now: Instant) -> bool {
        let length = self.window.borrow().length(now);
        self.idle.get().is_some_and(|since| now.saturating_duration_since(since) < length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAX: Duration = Duration::from_micros(100);

    fn us(us: u64) -> Duration {
        Duration::from_micros(us)
    }

    #[test]
    fn short_waits_open_the_window_and_long_ones_close_it() {
        let mut window = Window::new(MAX);
        let now = Instant::now();
        let mut lengths = Vec::new();
        for wait in [30, 30, 30, 30, 30, 90, 90, 90, 101, 101, 5000, 90, 5000, 5000, 5000, 5000, 5000] {
            window.waited(us(wait));
            lengths.push(window.length(now).as_micros());
        }
        assert_eq!(lengths, [8, 16, 32, 32, 32, 64, 100, 100, 50, 25, 12, 25, 12, 0, 0, 0, 0]);
    }

    #[test]
    fn a_write_and_a_flush_in_turn_keep_it_open() {
        let mut window = Window::new(MAX);
        let now = Instant::now();
        for _ in 0..10 {
            window.waited(us(40));
            window.waited(us(80));
        }
        assert_eq!(window.length(now), MAX.min(us(128)));
    }

    #[test]
    fn a_client_with_several_requests_under_way_opens_none() {
        let mut window = Window::new(MAX);
        let now = Instant::now();
        for _ in 0..10 {
            window.waited(us(20));
            (0..2).for_each(|_| window.waited(us(1)));
            assert_eq!(window.length(now), Duration::ZERO);
        }
    }

    #[test]
    fn a_request_now_and_then_opens_none() {
        let mut window = Window::new(MAX);
        let now = Instant::now();
        for _ in 0..10 {
            window.waited(us(101));
            assert_eq!(window.length(now), Duration::ZERO);
        }
    }

    #[test]
    fn who_has_use_for_the_processor_is_left_alone() {
        let mut window = Window::new(MAX);
        let start = Instant::now();
        (0..9).for_each(|_| window.waited(us(40)));
        let before = window.length(start);
        assert!(before >= us(40));
        window.offered(start, start + TAKEN - us(1));
        assert_eq!(window.length(start), before, "that was nobody");
        window.offered(start, start + TAKEN);
        let left_off = start + TAKEN;
        assert!(window.length(left_off + REST_MIN - us(1)).is_zero());
        assert_eq!(window.length(left_off + REST_MIN), before);
    }

    #[test]
    fn a_seat_is_given_up_when_another_wants_it() {
        let seats = PollSeats::of(MAX, 1);
        let now = Instant::now();
        let seat = seats.take(now, true).expect("a free seat");
        assert!(!seat.is_over(now + 10 * TURN), "nobody wants it");
        assert!(seats.take(now, true).is_none());
        assert!(!seat.is_over(now));
        assert!(seat.is_over(now + TURN));
        drop(seat);
        let seat = seats.take(now, false).expect("its turn goes on");
        assert!(seat.is_over(now + TURN), "and is as long as any");
        drop(seat);
        let seat = seats.take(now + TURN, true).expect("the seat is free again");
        assert!(!seat.is_over(now + 10 * TURN), "who wanted it has it");
    }

    #[tokio::test]
    async fn it_polls_while_requests_come_soon_and_not_while_one_is_under_way() {
        let seats = PollSeats::of(Duration::from_secs(3600), 1);
        let polling = Polling::new(Arc::clone(&seats));
        let busy = async {
            while polling.spent().is_zero() {
                polling.asked();
                polling.answered();
                // The first time around it sees that it is to look, the second time it does.
                tokio::task::yield_now().await;
                tokio::task::yield_now().await;
                // The next one is not there at once.
                std::thread::sleep(AT_ONCE);
            }
            polling.asked();
            while seats.free.load(Ordering::Relaxed) == 0 {
                tokio::task::yield_now().await;
            }
            let spent = polling.spent();
            for _ in 0..10 {
                tokio::task::yield_now().await;
            }
            assert_eq!(polling.spent(), spent, "a device is waited for");
        };
        tokio::select! {
            () = polling.keep() => unreachable!("for ever"),
            () = busy => {}
        }
    }

    #[test]
    fn it_can_be_forbidden() {
        let polling = Polling::new(PollSeats::of(Duration::ZERO, 1));
        for _ in 0..10 {
            polling.asked();
            polling.answered();
        }
        assert!(!polling.is_due(Instant::now()));
    }
}
