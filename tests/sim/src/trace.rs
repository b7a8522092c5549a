//! What happened, step by step: a hash always, lines on request. Two runs of a seed have the same.

/// See the module's description.
pub struct Trace {
    hash: u64,
    printing: bool,
}

impl Trace {
    /// An empty trace.
    pub fn new(printing: bool) -> Self {
        Self { hash: 0xcbf2_9ce4_8422_2325, printing }
    }

    /// Notes that something happened, and the numbers that belong to it.
    pub fn note(&mut self, now_us: u64, what: &str, numbers: &[u64]) {
        self.mix(now_us);
        for byte in what.bytes() {
            self.mix(u64::from(byte));
        }
        for number in numbers {
            self.mix(*number);
        }
        if self.printing {
            println!("{:>12} {what} {numbers:?}", now_us);
        }
    }

    /// Says something that is no part of the hash.
    pub fn say(&self, now_us: u64, text: impl FnOnce() -> String) {
        if self.printing {
            println!("{now_us:>12}     {}", text());
        }
    }

    /// The hash so far.
    pub fn hash(&self) -> u64 {
        self.hash
    }

    fn mix(&mut self, number: u64) {
        self.hash = (self.hash ^ number).wrapping_mul(0x0000_0100_0000_01b3).rotate_left(23);
    }
}
