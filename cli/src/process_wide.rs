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
    use std::{
        os::unix::process::ExitStatusExt,
        pin::pin,
        process::{Command, Output},
        task::Poll,
    };

    use backtide_control::build_lasting;
    use backtide_log_receiver::THREADS_APART;
    use clap::Parser;

    use super::*;
    use crate::{arguments::Arguments, commands, context::Context};

    /// Makes the test play the process that panics.
    const PLAYED: &str = "BACKTIDE_TEST_PANICS_IN";

    /// Arguments of the command that a played process carries out, a line each.
    const ARGUMENTS: &str = "BACKTIDE_TEST_ARGUMENTS";

    /// How a process ends that plays `test`, with a panic in `place`.
    fn ended(test: &str, place: &str, arguments: &str) -> Output {
        let mut played = Command::new(std::env::current_exe().unwrap());
        played.args(["--exact", &format!("process_wide::tests::{test}")]);
        played.env(PLAYED, place).env(ARGUMENTS, arguments).output().unwrap()
    }

    fn is_aborted(ended: &Output) -> bool {
        ended.status.signal() == Some(Signal::ABORT.as_raw())
    }

    fn panic_in(place: &str) {
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
            end_on_panic(THREADS_APART);
            return panic_in(&place);
        }
        let test = "a_panic_ends_the_process_but_where_it_leaves_nothing_behind";
        for place in ["a thread", "a task", "ingest-0", "retention", "mounts", "receiver-control"] {
            let ended = ended(test, place, "");
            assert!(is_aborted(&ended), "{place}: {ended:?}");
        }
        for place in ["read", "scrub", "commit"] {
            assert!(ended(test, place, "").status.success(), "{place} is alone with it");
        }
    }

    /// Carries out a command that holds daemons, as far as it goes before it first waits, and panics beside it.
    fn panic_beside(arguments: &str, place: &str) -> ! {
        let arguments = Arguments::try_parse_from(arguments.lines()).unwrap();
        let context = Context::new(&arguments);
        let runtime = build_lasting(tokio::runtime::Builder::new_multi_thread().worker_threads(1)).unwrap();
        runtime.block_on(async {
            let mut command = pin!(commands::run(&context, arguments.command));
            std::future::poll_fn(|waker| match command.as_mut().poll(waker) {
                Poll::Pending => Poll::Ready(()),
                Poll::Ready(ended) => {
                    eprintln!("it did not begin: {ended:?}");
                    std::process::exit(1)
                }
            })
            .await;
            panic_in(place);
        });
        std::process::exit(0)
    }

    #[test]
    fn every_command_that_holds_daemons_ends_with_a_panic_of_theirs() {
        if let (Ok(place), Ok(arguments)) = (std::env::var(PLAYED), std::env::var(ARGUMENTS)) {
            panic_beside(&arguments, &place);
        }
        let ended_in = |command: &str, place: &str| {
            let directory = tempfile::tempdir().unwrap();
            let at = directory.path().display();
            std::fs::File::create(format!("{at}/vm1.img")).unwrap().set_len(1 << 20).unwrap();
            let test = "every_command_that_holds_daemons_ends_with_a_panic_of_theirs";
            ended(test, place, &command.replace(' ', "\n").replace("DIR", &at.to_string()))
        };
        let commands = [
            ("up DIR/vm1.img --dir DIR/up", true),
            ("demo --dir DIR/demo", true),
            ("receiver run --store DIR/store --api unix:DIR/api.sock", true),
            // It has no receiver's threads.
            ("agent run --state DIR/state --api unix:DIR/api.sock", false),
        ];
        for (command, holds_a_receiver) in commands {
            let command = format!("backtide {command}");
            let of_a_disk = ended_in(&command, "disk-vm1");
            assert!(is_aborted(&of_a_disk), "{command}: {of_a_disk:?}");
            let of_a_reader = ended_in(&command, "read");
            assert_eq!(of_a_reader.status.success(), holds_a_receiver, "{command}: {of_a_reader:?}");
        }
    }
}
