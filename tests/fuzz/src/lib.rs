//! Every parser of foreign bytes against mutations of what is right: files of the store and of an agent, the
//! stream, NBD, and volumes as guests write them.
//!
//! A *target* has samples, takes bytes, and must end with data or an error: never with a panic, nor with more memory than this
//! process is allowed. What is done to a sample follows from one number, so that a failure is found again: it is printed, and
//! `SEED=N` runs that one alone. Where a format has checksums a target may put them right after a mutation (*mend*): else
//! nothing behind them would ever be reached. A short run has a fixed number of seeds; `BACKTIDE_FUZZ_SECONDS=N` goes on from there for so long.

mod mutate;
pub mod targets;

pub use mutate::{Random, mutate};

use std::time::{Duration, Instant};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// A parser.
pub struct Target {
    /// Names it.
    pub name: &'static str,
    /// How many seeds a short run has.
    pub seeds: u64,
    /// What is right.
    pub samples: Vec<Vec<u8>>,
    /// Puts checksums right, as far as the format lets it.
    pub mend: fn(&mut [u8]),
    /// Takes bytes.
    pub take: fn(&[u8]),
}

/// Memory that this process may map: far below what a length field can ask for.
const ADDRESS_SPACE_BYTES: u64 = 3 << 30;

/// Says which seed it was when a target panics.
struct SayOnPanic(&'static str, u64);

impl Drop for SayOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("target {} failed with SEED={}", self.0, self.1);
        }
    }
}

impl Target {
    /// Runs it: the samples as they are, then seed by seed.
    ///
    /// # Panics
    /// When the target does, and when the environment has no numbers.
    pub fn run(&self) {
        bound_memory();
        let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().expect("a number"));
        if let Some(seed) = number("SEED") {
            return self.one(seed);
        }
        for sample in &self.samples {
            (self.take)(sample);
        }
        (0..self.seeds).for_each(|seed| self.one(seed));
        let Some(seconds) = number("BACKTIDE_FUZZ_SECONDS") else { return };
        let begun = Instant::now();
        let mut seed = self.seeds;
        while begun.elapsed() < Duration::from_secs(seconds) {
            self.one(seed);
            seed += 1;
        }
        println!("target {}: {seed} seeds", self.name);
    }

    fn one(&self, seed: u64) {
        let _say = SayOnPanic(self.name, seed);
        let bytes = self.bytes(seed);
        (self.take)(&bytes);
    }

    /// What a seed stands for.
    pub fn bytes(&self, seed: u64) -> Vec<u8> {
        let mut random = Random(seed);
        let mut bytes = mutate(&self.samples, &mut random);
        // One in four stays with wrong checksums.
        if random.below(4) > 0 {
            (self.mend)(&mut bytes);
        }
        bytes
    }
}

/// A parser that believes a length ends the process here.
fn bound_memory() {
    let Rlimit { maximum, .. } = getrlimit(Resource::As);
    let current = Some(maximum.map_or(ADDRESS_SPACE_BYTES, |maximum| maximum.min(ADDRESS_SPACE_BYTES)));
    setrlimit(Resource::As, Rlimit { current, maximum }).expect("a lower limit of memory");
}
