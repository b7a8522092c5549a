//! What the bitmap of a 16 TiB disk takes, what its bound makes a resync send beside, and how long a mark holds up its guest.

use std::{
    fmt::Write,
    time::{Duration, Instant},
};

use backtide_tracking::DirtyBitmap;
use backtide_units::{BlockIndex, ByteCount};

use super::Setting;

/// Blocks of 16 TiB.
const END: u64 = 1 << 32;

/// So many marks are looked at together.
const BATCH: u64 = 64;

const BOUND: ByteCount = ByteCount(64 << 20);

/// Marks blocks at random in an agent's bitmap and looks at it.
pub(super) fn run(_: &Setting<'_>) -> anyhow::Result<String> {
    let mut text = String::from(
        "A disk of 16 TiB, the default bound of 64 MiB.\n\n| dirty | memory | saved | time a mark | the longest 64 marks, processor | the resync sends |\n|---|---|---|---|---|---|\n",
    );
    let mut full = DirtyBitmap::bounded(BOUND, BlockIndex(END));
    full.insert((0..END).into());
    line(&mut text, "everything", &mut full, END, Marks::default())?;
    for (name, one_in) in [("0.1 % at random", 1000), ("1 % at random", 100), ("10 % at random", 10)] {
        let mut bitmap = DirtyBitmap::bounded(BOUND, BlockIndex(END));
        let mut state = 0x9e37_79b9_7f4a_7c15u64;
        let (mut marked, mut longest) = (0u64, Duration::ZERO);
        let began = Instant::now();
        let mut last = processor_time();
        // Regions in no order, as a guest marks them, and few enough at once to be done soon.
        for region in 0..END >> 16 {
            let region = region.wrapping_mul(40_503) & 0xffff;
            for _ in 0..(1 << 16) / one_in {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                let block = region << 16 | state >> 48;
                bitmap.insert((block..block + 1).into());
                marked += 1;
                if marked % BATCH == 0 {
                    let now = processor_time();
                    longest = longest.max(now.saturating_sub(last));
                    last = now;
                }
            }
        }
        let marks = Marks { nanos: began.elapsed().as_nanos() as f64 / marked as f64, longest };
        // A block may have been marked twice.
        let share = 1.0 - (-1.0 / one_in as f64).exp();
        line(&mut text, name, &mut bitmap, (END as f64 * share) as u64, marks)?;
    }
    Ok(text)
}

/// What this thread has had of a processor: others may have it in between.
fn processor_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// What marks took: each, and the longest [`BATCH`] of the processor.
#[derive(Default)]
struct Marks {
    nanos: f64,
    longest: Duration,
}

fn line(
    text: &mut String,
    name: &str,
    bitmap: &mut DirtyBitmap,
    exact: u64,
    Marks { nanos, longest }: Marks,
) -> std::fmt::Result {
    // As the filter does when it merges what it knows.
    bitmap.union_with(&DirtyBitmap::new());
    let memory = bitmap.memory().0 as f64 / f64::from(1 << 20);
    let saved = bitmap.to_bytes().len() as f64 / f64::from(1 << 20);
    let times = bitmap.count().0 as f64 / exact as f64;
    let longest = longest.as_secs_f64() * 1e3;
    eprintln!(
        "bitmap-memory {name}: {memory:.3} MiB, {times:.2} times, longest 64 marks {longest:.1} ms of a processor"
    );
    writeln!(
        text,
        "| {name} | {memory:.3} MiB | {saved:.3} MiB | {nanos:.0} ns | {longest:.1} ms | {times:.2} times the dirty bytes |"
    )
}
