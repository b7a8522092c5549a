//! When what a disk has for its receiver goes out.
//!
//! Each write to the stream wakes the receiver, and a guest that waits for each answer waits for that as well: this thread is still
//! at it when the guest's next request comes. So what nobody waits for
//! ([`Filter::may_gather`](backtide_io_filter::Filter::may_gather)) goes out at once when nothing has gone out for a
//! millisecond, and otherwise then, along with what has come by that time. The receiver is that much further behind.

use std::{pin::pin, time::Duration};

use tokio::{sync::Notify, time::Instant};

/// How often gathered frames go out: what the runtime's timers can tell apart.
pub(super) const GATHERED: Duration = Duration::from_millis(1);

/// Waits until `then`, or until what there is may not wait; `more` tells when to look again. Without anything to send it
/// may wait as well.
pub(super) async fn gather_until(then: Instant, more: &Notify, may_wait: impl Fn() -> bool) {
    if Instant::now() >= then {
        return;
    }
    let mut over = pin!(tokio::time::sleep_until(then));
    while may_wait() {
        tokio::select! {
            () = &mut over => return,
            () = more.notified() => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn what_may_wait_waits_until_then_and_no_longer() {
        let began = Instant::now();
        gather_until(began + GATHERED, &Notify::new(), || true).await;
        assert_eq!(began.elapsed(), GATHERED);
        gather_until(began + GATHERED, &Notify::new(), || true).await;
        assert_eq!(began.elapsed(), GATHERED, "the first after a pause goes out at once");
    }

    #[tokio::test(start_paused = true)]
    async fn what_may_not_wait_ends_it() {
        let (began, more, urgent) = (Instant::now(), Notify::new(), Cell::new(false));
        let looks = Cell::new(0);
        let may_wait = || {
            looks.set(looks.get() + 1);
            !urgent.get()
        };
        let other = async {
            more.notify_one();
            tokio::task::yield_now().await;
            assert_eq!(looks.get(), 2, "it looked again and went on waiting");
            urgent.set(true);
            more.notify_one();
        };
        tokio::join!(biased; gather_until(began + GATHERED, &more, may_wait), other);
        assert_eq!((looks.get(), began.elapsed()), (3, Duration::ZERO));
    }
}
