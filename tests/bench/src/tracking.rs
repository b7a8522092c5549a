//! What tracking and resync cost: each row a measurement of its own, compared within one run only.

mod activity;
mod bitmap;
mod compare;
mod guest;
mod instructions;
mod latency;
mod many;
mod restart;
mod scattered;
pub(crate) mod stand;

use std::path::Path;

/// What every row is told.
pub(crate) struct Setting<'a> {
    pub(crate) backtide: &'a Path,
    pub(crate) place: &'a Path,
    pub(crate) rounds: usize,
    pub(crate) seconds: u32,
    pub(crate) records: u64,
    /// Whether rows that take long are cut short.
    pub(crate) small: bool,
}

/// One measurement.
pub(crate) struct Row {
    pub(crate) name: &'static str,
    pub(crate) run: fn(&Setting<'_>) -> anyhow::Result<String>,
}

impl Row {
    /// Measures; returns its part of docs/performance.md.
    pub(crate) fn measure(&self, setting: &Setting<'_>) -> anyhow::Result<String> {
        (self.run)(setting).map(|text| format!("\n### {}\n\n{text}", self.name))
    }
}

/// All rows, in the order they run in.
pub(crate) const ROWS: [Row; 9] = [
    Row { name: "al-hot", run: activity::hot },
    Row { name: "al-cold", run: activity::cold },
    Row { name: "resync-latency", run: latency::run },
    Row { name: "resync-scattered", run: scattered::run },
    Row { name: "bitmap-memory", run: bitmap::run },
    Row { name: "compare", run: compare::run },
    Row { name: "many-disks", run: many::run },
    Row { name: "restart", run: restart::run },
    Row { name: "instructions", run: instructions::run },
];

/// The middle of what the rounds brought.
pub(crate) fn middle(values: &[f64]) -> f64 {
    crate::report::median(values.to_vec()).unwrap_or(f64::NAN)
}
