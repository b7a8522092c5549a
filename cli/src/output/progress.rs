//! Progress of long work: a bar where a person watches, else a plain line every ten seconds.

use std::time::{Duration, Instant};

use backtide_units::ByteCount;
use indicatif::{ProgressBar, ProgressStyle};

use crate::{context::Context, quantity::size_text};

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
    Lines { last: Instant, json: bool },
}

impl Progress {
    /// `what` is what happens to the bytes: `restored`.
    pub(crate) fn new(context: &Context, what: &'static str) -> Self {
        if !context.draws_progress() {
            return Self { what, shown: Shown::Lines { last: Instant::now(), json: context.json() } };
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
            Shown::Lines { last, json } => {
                if last.elapsed() >= LINE_EVERY {
                    *last = Instant::now();
                    line(self.what, done, total, *json);
                }
            }
        }
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

fn line(what: &str, done: ByteCount, total: ByteCount, json: bool) {
    use std::io::Write;
    let text = if json {
        serde_json::json!({ "progress": what, "done_bytes": done, "total_bytes": total }).to_string()
    } else {
        format!("{what} {} of {}", size_text(done), size_text(total))
    };
    // Nothing can be done when stderr is gone.
    let _ = writeln!(std::io::stderr(), "{text}");
}
