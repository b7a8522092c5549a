//! What holds for a whole process, whichever command it carries out.

use rustix::process::Signal;
use tokio::signal::unix::{SignalKind, signal};

/// A file that may not grow any further is an error of its write, as a full file system is. Without this the system ends
/// the process where a limit of file sizes is set (`ulimit -f`, `LimitFSIZE=`).
///
/// Has to be called within a runtime.
pub(crate) fn survive_file_size_limits() {
    // Once there is a handler it stays, whoever listens. Without one it is as it was.
    if let Err(error) = signal(SignalKind::from_raw(Signal::XFSZ.as_raw())) {
        tracing::warn!(%error, "a limit of file sizes would end this process");
    }
}

/// Threads of a receiver whose panics are told by whoever waits for their work, and leave nothing that goes on being used: what
/// reads changes nothing, a scrub is called off, and a log that was being made durable counts as failed and is read from its
/// files again. So bytes of one disk that the program cannot bear end neither the streams of all others nor, again and again,
/// each receiver that comes to them.
pub(crate) const APART: &[&str] = &["read", "scrub", "commit"];

/// Ends the process when any of its threads or tasks panics, but for threads with a name of `apart`: what is left of a disk
/// then is half changed, and goes on serving its guest, or taking its log, with what it takes for known; or it stands still for
/// good, and nobody sees that. After a crash that is found out by the next process.
pub(crate) fn end_on_panic(apart: &'static [&'static str]) {
    let tell = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        tell(panic);
        if std::thread::current().name().is_some_and(|name| apart.contains(&name)) {
            return tracing::error!(%panic, "this is a fault of the program: what asked for it is told");
        }
        tracing::error!(%panic, "this is a fault of the program: it ends, to be started again as after a crash");
        std::process::abort();
    }));
}

#[cfg(test)]
mod tests {
    use std::{os::unix::process::ExitStatusExt, process::Command};

    use super::*;

    /// Makes the test play the process that panics.
    const PLAYED: &str = "BACKTIDE_TEST_PANICS_IN";

    fn panic_in(place: &str) {
        end_on_panic(APART);
        match place {
            "a thread" => drop(std::thread::spawn(|| panic!("on purpose")).join()),
            "a task" => {
                let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
                drop(runtime.block_on(async { tokio::spawn(async { panic!("on purpose") }).await }));
            }
            named => drop(
                std::thread::Builder::new()
                    .name(named.to_owned())
                    .spawn(|| panic!("on purpose"))
                    .unwrap()
                    .join(),
            ),
        }
    }

    #[test]
    fn a_panic_ends_the_process_but_where_it_leaves_nothing_behind() {
        if let Ok(place) = std::env::var(PLAYED) {
            return panic_in(&place);
        }
        let this =
            ["--exact", "process_wide::tests::a_panic_ends_the_process_but_where_it_leaves_nothing_behind"];
        let ended = |place: &str| {
            let mut played = Command::new(std::env::current_exe().unwrap());
            played.args(this).env(PLAYED, place).output().unwrap()
        };
        for place in ["a thread", "a task", "ingest-0", "retention", "mounts", "receiver-control"] {
            let ended = ended(place);
            assert_eq!(ended.status.signal(), Some(Signal::ABORT.as_raw()), "{place}: {ended:?}");
        }
        for place in APART {
            assert!(ended(place).status.success(), "{place} is alone with it");
        }
    }
}
