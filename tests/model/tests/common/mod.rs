//! Walks that find nothing.

#![allow(dead_code, reason = "each test uses a part of it")]

use std::{fs::File, io::Write, time::Instant};

use backtide_model::{Budget, Config, walk};

/// Nothing goes wrong.
pub(crate) const NONE: Budget = Config::new("", &[]).budget;

/// Every promise holds in every state.
pub(crate) fn holds(config: &Config) {
    let started = Instant::now();
    let walked = walk(config);
    println!(
        "{}: {} states, {} transitions, {} deep, {} healed, in {:.1?}",
        config.name,
        walked.states,
        walked.transitions,
        walked.depth,
        walked.healed,
        started.elapsed()
    );
    if let Some(violation) = &walked.violation {
        panic!("{}: {violation}", config.name);
    }
    assert!(walked.states > 500, "{}: a walk that goes nowhere shows nothing", config.name);
}

/// Whether larger worlds are wanted; when they are not, the test that asks says that it does nothing.
pub(crate) fn walks_larger_worlds() -> bool {
    let wanted = std::env::var("MODEL").as_deref() == Ok("large");
    if !wanted {
        skip("only MODEL=large walks larger worlds, for half an hour");
    }
    wanted
}

/// Says that a test does nothing, where its output shows it, and in the file that `BACKTIDE_SKIPPED` names:
/// `tests/run` tells of it at its end.
fn skip(why: &str) {
    println!("SKIPPED: {why}");
    let Some(file) = std::env::var_os("BACKTIDE_SKIPPED") else { return };
    let test = std::thread::current().name().unwrap_or("a test").to_owned();
    let mut file =
        File::options().append(true).create(true).open(file).expect("open the list of skipped tests");
    file.write_all(format!("{test}: {why}\n").as_bytes()).expect("note a skipped test");
}
