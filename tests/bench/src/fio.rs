//! The client of all servers: `fio` with its nbd engine.

use std::process::Command;

use anyhow::{Context, bail};
use serde_json::Value;

/// One access pattern.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Row {
    pub(crate) name: &'static str,
    pattern: &'static str,
    block: &'static str,
    depth: u32,
    fsync: u32,
    /// Whether bytes a second tell more than operations.
    by_bytes: bool,
}

/// What is measured, in this order.
pub(crate) const ROWS: [Row; 7] = [
    row("4 KiB random write, QD 1", "randwrite", "4k", 1, 0, false),
    row("4 KiB random write, QD 32", "randwrite", "4k", 32, 0, false),
    row("4 KiB random read, QD 1", "randread", "4k", 1, 0, false),
    row("4 KiB random read, QD 32", "randread", "4k", 32, 0, false),
    row("1 MiB sequential write", "write", "1M", 4, 0, true),
    row("1 MiB sequential read", "read", "1M", 4, 0, true),
    row("4 KiB write + flush, QD 1", "randwrite", "4k", 1, 1, false),
];

const fn row(
    name: &'static str,
    pattern: &'static str,
    block: &'static str,
    depth: u32,
    fsync: u32,
    by_bytes: bool,
) -> Row {
    Row { name, pattern, block, depth, fsync, by_bytes }
}

/// What one measurement brought.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Figure {
    pub(crate) operations: f64,
    pub(crate) bytes: f64,
    pub(crate) p99_us: f64,
}

impl Figure {
    /// The figure that counts for this row.
    pub(crate) fn speed(&self, row: Row) -> f64 {
        if row.by_bytes { self.bytes } else { self.operations }
    }

    pub(crate) fn text(&self, row: Row) -> String {
        speed_text(self.speed(row), row)
    }
}

pub(crate) fn speed_text(speed: f64, row: Row) -> String {
    if row.by_bytes { format!("{:.0} MB/s", speed / 1e6) } else { format!("{speed:.0} IOPS") }
}

/// Runs one pattern against one server.
pub(crate) fn run(row: Row, uri: &str, seconds: u32, size_mib: u64) -> anyhow::Result<Figure> {
    let output = Command::new("fio")
        .args(["--name=row", "--ioengine=nbd", "--output-format=json", "--time_based", "--norandommap"])
        .arg(format!("--uri={uri}"))
        .arg(format!("--rw={}", row.pattern))
        .arg(format!("--bs={}", row.block))
        .arg(format!("--iodepth={}", row.depth))
        .arg(format!("--fsync={}", row.fsync))
        .arg(format!("--size={size_mib}M"))
        .arg(format!("--runtime={seconds}"))
        .output()
        .context("run fio")?;
    if !output.status.success() {
        bail!("fio {} on {uri}: {}", row.name, String::from_utf8_lossy(&output.stderr));
    }
    let text = String::from_utf8_lossy(&output.stdout);
    // fio may write notes before its JSON.
    let json = text.find('{').map_or("", |start| &text[start..]);
    let report: Value = serde_json::from_str(json).context("read fio's report")?;
    let side = if row.pattern.contains("read") { "read" } else { "write" };
    let side = &report["jobs"][0][side];
    let number = |value: &Value| value.as_f64().context("a number in fio's report");
    Ok(Figure {
        operations: number(&side["iops"])?,
        bytes: number(&side["bw_bytes"])?,
        p99_us: number(&side["clat_ns"]["percentile"]["99.000000"])? / 1000.0,
    })
}
