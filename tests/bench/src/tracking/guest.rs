//! The guest of these rows: `fio`, for a time or until it is told to stop.

use std::process::{Child, Command, Stdio};

use anyhow::{Context, bail};
use serde_json::Value;

/// What a guest saw.
#[derive(Clone, Copy, Debug)]
pub(super) struct Seen {
    pub(super) operations: f64,
    pub(super) p50_us: f64,
    pub(super) p99_us: f64,
    pub(super) longest_us: f64,
}

/// A guest at work.
pub(super) struct Guest {
    child: Child,
    side: &'static str,
}

impl Guest {
    /// 4 KiB requests all over the first `size_mib` MiB, with more options of fio's.
    pub(super) fn start(
        uri: &str,
        pattern: &'static str,
        size_mib: u64,
        more: &[&str],
    ) -> anyhow::Result<Self> {
        let child = Command::new("fio")
            .args(["--name=row", "--ioengine=nbd", "--output-format=json", "--bs=4k"])
            .arg(format!("--uri={uri}"))
            .arg(format!("--rw={pattern}"))
            .arg(format!("--size={size_mib}M"))
            .args(more)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("run fio")?;
        let side = if pattern.contains("read") { "read" } else { "write" };
        Ok(Self { child, side })
    }

    /// Tells it to stop, and what it saw until then.
    pub(super) fn stop(self) -> anyhow::Result<Seen> {
        let told = Command::new("kill").args(["-INT", &self.child.id().to_string()]).status()?;
        if !told.success() {
            bail!("fio cannot be told to stop");
        }
        self.end()
    }

    /// Waits for its end.
    pub(super) fn end(self) -> anyhow::Result<Seen> {
        let output = self.child.wait_with_output()?;
        let text = String::from_utf8_lossy(&output.stdout);
        // fio may write notes before its JSON.
        let json = text.find('{').map_or("", |start| &text[start..]);
        let report: Value = serde_json::from_str(json)
            .with_context(|| format!("read fio's report: {}", String::from_utf8_lossy(&output.stderr)))?;
        let side = &report["jobs"][0][self.side];
        let number = |value: &Value| value.as_f64().context("a number in fio's report");
        let percentile = |which: &str| number(&side["clat_ns"]["percentile"][which]).map(|ns| ns / 1000.0);
        Ok(Seen {
            operations: number(&side["iops"])?,
            p50_us: percentile("50.000000")?,
            p99_us: percentile("99.000000")?,
            longest_us: number(&side["clat_ns"]["max"])? / 1000.0,
        })
    }
}
