use super::*;

const TARGET: Duration = Duration::from_micros(500);

/// A disk that takes `alone` for a request, and `beside` more for each 100 MB/s of reads.
struct Scene {
    courtesy: Courtesy,
    now: Duration,
    alone: Duration,
    beside: Duration,
    /// The disk reads no faster.
    fastest: u64,
    read_bytes: u64,
    next_read: Duration,
}

impl Scene {
    fn new(alone_us: u64, beside_us: u64) -> Self {
        let mut courtesy = Courtesy::default();
        courtesy.aim(TARGET);
        let (alone, beside) = (Duration::from_micros(alone_us), Duration::from_micros(beside_us));
        Self {
            courtesy,
            now: Duration::from_secs(1),
            alone,
            beside,
            fastest: 400_000_000,
            read_bytes: 0,
            next_read: Duration::ZERO,
        }
    }

    /// A request each millisecond if there is a guest, and reads as fast as they may.
    fn go_on(&mut self, milliseconds: u64, guest: bool, reads: bool) {
        for _ in 0..milliseconds {
            let watch = self.courtesy.watch(self.now);
            let rate = self.courtesy.rate().map_or(self.fastest, |rate| rate.0.min(self.fastest));
            let mut reading = false;
            if reads && self.now >= self.next_read && self.courtesy.hushed_until().is_none() {
                let bytes = (rate / 1000).max(1);
                self.courtesy.read_begins(self.now, ByteCount(bytes));
                self.read_bytes += bytes;
                self.next_read = self.now + Duration::from_millis(1);
                reading = true;
            }
            if guest {
                let added = self.beside.mul_f64(if reading { rate as f64 / 1e8 } else { 0.0 });
                let request = Request::Change(ByteCount(4096));
                self.courtesy.took(self.now + self.alone + added, watch, request);
            }
            self.now += Duration::from_millis(1);
            if reading {
                self.courtesy.read_ended(self.now);
            }
            self.courtesy.observe(self.now);
        }
    }

    fn rate_over(&mut self, milliseconds: u64, guest: bool) -> u64 {
        let before = self.read_bytes;
        self.go_on(milliseconds, guest, true);
        (self.read_bytes - before) * 1000 / milliseconds
    }
}

#[test]
fn reads_slow_down_to_what_the_guest_bears_and_no_further() {
    // 1 ms more for each 100 MB/s: the target of 500 us is kept at 50 MB/s.
    let mut scene = Scene::new(200, 1000);
    scene.go_on(100, true, false);
    scene.go_on(3000, true, true);
    let rate = scene.rate_over(10_000, true);
    assert!((30_000_000..70_000_000).contains(&rate), "{rate} bytes a second");
}

#[test]
fn a_guest_that_is_not_hurt_slows_nothing_down() {
    let mut scene = Scene::new(200, 20);
    scene.go_on(100, true, false);
    let rate = scene.rate_over(10_000, true);
    assert!(rate > 380_000_000, "{rate} bytes a second");
}

#[test]
fn a_guest_that_asks_for_nothing_holds_nothing_back() {
    let mut scene = Scene::new(200, 5000);
    scene.go_on(100, true, false);
    scene.go_on(3000, true, true);
    assert!(scene.rate_over(1000, true) < 50_000_000);
    scene.go_on(5000, false, true);
    assert_eq!(scene.courtesy.rate(), None);
    assert!(scene.rate_over(1000, false) > 380_000_000);
}

#[test]
fn a_resync_that_was_there_first_learns_what_the_guest_would_see_without() {
    let mut scene = Scene::new(200, 1000);
    scene.go_on(3000, true, true);
    let rate = scene.rate_over(10_000, true);
    assert!((30_000_000..70_000_000).contains(&rate), "{rate} bytes a second");
}

#[test]
fn a_disk_that_got_slower_by_itself_is_not_taken_for_one_that_the_reads_slow_down() {
    let mut scene = Scene::new(200, 20);
    scene.go_on(100, true, false);
    scene.go_on(3000, true, true);
    scene.alone = Duration::from_micros(5000);
    scene.go_on(8000, true, true);
    let rate = scene.rate_over(5000, true);
    assert!(rate > 300_000_000, "{rate} bytes a second");
}

#[test]
fn however_slow_the_disk_the_reads_go_on() {
    let mut scene = Scene::new(200, 1_000_000_000);
    scene.go_on(100, true, false);
    scene.go_on(10_000, true, true);
    let rate = scene.rate_over(10_000, true);
    assert!(rate > RATE_MIN / 2, "{rate} bytes a second");
}

#[test]
fn without_a_target_nothing_is_held_back() {
    let mut scene = Scene::new(200, 1_000_000);
    scene.courtesy.aim(Duration::ZERO);
    scene.go_on(5000, true, true);
    assert_eq!((scene.courtesy.rate(), scene.courtesy.hushed_until()), (None, None));
}

#[test]
fn what_is_under_way_follows_the_rate() {
    let mut courtesy = Courtesy::default();
    assert_eq!(courtesy.in_flight_max(), None);
    courtesy.rate = Some(RATE_MIN);
    assert_eq!(courtesy.in_flight_max(), Some(ByteCount(64 << 10)));
    courtesy.rate = Some(200_000_000);
    assert_eq!(courtesy.in_flight_max(), Some(ByteCount(1_000_000)));
}
