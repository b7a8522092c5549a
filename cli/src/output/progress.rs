//! Progress of long work: a bar where a person watches, else a plain line every ten seconds. Both tell
//! the rate and how long it will take.

use std::{
    pin::pin,
    time::{Duration, Instant},
};

use backtide_control::SILENT_TIME;
use backtide_units::ByteCount;
use indicatif::{ProgressBar, ProgressStyle};

use crate::{
    context::{Context, say_waiting},
    quantity::{duration_text, size_text},
};

/// How often a plain line comes.
const LINE_EVERY: Duration = Duration::from_secs(10);

const BAR: &str = "{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}";

/// Progress on stderr. Dropped, it leaves no trace on a terminal.
pub(crate) struct Progress {
    what: &'static str,
    shown: Shown,
}

enum Shown {
    Bar(ProgressBar),
    Lines { begun: Instant, last: Instant, json: bool },
}

impl Progress {
    /// `what` is what happens to the bytes: `restored`.
    pub(crate) fn new(context: &Context, what: &'static str) -> Self {
        if !context.draws_progress() {
            let (begun, json) = (Instant::now(), context.json());
            return Self { what, shown: Shown::Lines { begun, last: begun, json } };
        }
        let bar = ProgressBar::new(0);
        if let Ok(style) = ProgressStyle::with_template(BAR) {
            bar.set_style(style);
        }
        bar.set_message(what);
        Self { what, shown: Shown::Bar(bar) }
    }

    /// Shows how far it has come.
    pub(crate) fn at(&mut self, done: ByteCount, total: ByteCount) {
        match &mut self.shown {
            Shown::Bar(bar) => {
                bar.set_length(total.0);
                bar.set_position(done.0);
            }
            Shown::Lines { begun, last, json } => {
                if last.elapsed() >= LINE_EVERY {
                    *last = Instant::now();
                    line(self.what, done, total, begun.elapsed(), *json);
                }
            }
        }
    }

    /// Waits for a part of the work, and says so when that takes long.
    pub(crate) async fn wait<T>(&self, part: impl Future<Output = T>) -> T {
        let mut part = pin!(part);
        if let Ok(done) = tokio::time::timeout(SILENT_TIME, &mut part).await {
            return done;
        }
        let what = self.what;
        let text = format!("nothing more was {what} for {} s, still waiting", SILENT_TIME.as_secs());
        match &self.shown {
            Shown::Bar(bar) => bar.println(text),
            Shown::Lines { json, .. } => say_waiting(&text, *json),
        }
        part.await
    }

    /// The work is done: the bar goes.
    pub(crate) fn end(&mut self) {
        match &self.shown {
            Shown::Bar(bar) => bar.finish_and_clear(),
            Shown::Lines { .. } => {}
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.end();
    }
}

/// Bytes a second so far, and the seconds that the rest takes at that rate; none before anything is done.
fn pace(done: ByteCount, total: ByteCount, elapsed: Duration) -> (u64, Option<u64>) {
    let rate = (done.0 as f64 / elapsed.as_secs_f64().max(0.001)) as u64;
    let left = total.0.saturating_sub(done.0);
    (rate, left.checked_div(rate))
}

fn line(what: &str, done: ByteCount, total: ByteCount, elapsed: Duration, json: bool) {
    use std::io::Write;
    let (rate, eta) = pace(done, total, elapsed);
    let text = if json {
        serde_json::json!({
            "progress": what, "done_bytes": done, "total_bytes": total,
            "bytes_per_second": rate, "eta_seconds": eta,
        })
        .to_string()
    } else {
        let left = eta.map_or_else(String::new, |eta| format!(", {} left", duration_text(eta as f64)));
        format!("{what} {} of {}, {}/s{left}", size_text(done), size_text(total), size_text(ByteCount(rate)))
    };
    // Nothing can be done when stderr is gone.
    let _ = writeln!(std::io::stderr(), "{text}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rest_takes_as_long_as_what_is_done_did() {
        let (mib, second) = (1 << 20, Duration::from_secs(1));
        assert_eq!(pace(ByteCount(mib), ByteCount(5 * mib), second), (mib, Some(4)));
        assert_eq!(pace(ByteCount(0), ByteCount(mib), second), (0, None));
        assert_eq!(pace(ByteCount(mib), ByteCount(mib), second).1, Some(0));
    }
}
