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

/// Ends the process when any of its threads or tasks panics: what is left of a disk then is half changed, and goes on
/// serving its guest with what it takes for known. After a crash that is found out by the next process.
pub(crate) fn end_on_panic() {
    let tell = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        tell(panic);
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
        end_on_panic();
        match place {
            "a thread" => drop(std::thread::spawn(|| panic!("on purpose")).join()),
            "a task" => {
                let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
                drop(runtime.block_on(async { tokio::spawn(async { panic!("on purpose") }).await }));
            }
            other => unreachable!("{other}"),
        }
    }

    #[test]
    fn a_panic_anywhere_ends_the_process() {
        if let Ok(place) = std::env::var(PLAYED) {
            return panic_in(&place);
        }
        let this = ["--exact", "process_wide::tests::a_panic_anywhere_ends_the_process"];
        for place in ["a thread", "a task"] {
            let mut played = Command::new(std::env::current_exe().unwrap());
            let ended = played.args(this).env(PLAYED, place).output().unwrap();
            assert_eq!(ended.status.signal(), Some(Signal::ABORT.as_raw()), "{place}: {ended:?}");
        }
    }
}
