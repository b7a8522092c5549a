//! Runtimes of daemons.

use std::{io, time::Duration};

use tokio::runtime::{Builder, Runtime};

/// How often a runtime's thread for blocking work is used: well within the 10 s after which tokio ends one that is not.
const BEAT: Duration = Duration::from_secs(4);

/// Builds a runtime that always has a thread for work that blocks. Without one `spawn_blocking` panics where the system
/// gives no more threads (`pids.max`, `ulimit -u`): with one the work waits its turn.
///
/// # Errors
/// When there can be no runtime, or not even that thread.
pub fn build_lasting(builder: &mut Builder) -> io::Result<Runtime> {
    lasting(builder, BEAT)
}

fn lasting(builder: &mut Builder, beat: Duration) -> io::Result<Runtime> {
    let runtime = builder.enable_all().build()?;
    // An error, where tokio would panic.
    let probe = std::thread::Builder::new().name("probe".to_owned()).spawn(|| ())?;
    probe.join().map_err(|_| io::Error::other("a thread that does nothing failed"))?;
    runtime.spawn_blocking(|| ());
    runtime.spawn(async move {
        loop {
            tokio::time::sleep(beat).await;
            // It ends with the runtime only.
            let _ = tokio::task::spawn_blocking(|| ()).await;
        }
    });
    Ok(runtime)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    /// Makes the test play the process that may have no more threads.
    const PLAYED: &str = "BACKTIDE_TEST_HAS_NO_MORE_THREADS";

    #[test]
    fn work_that_blocks_can_begin_where_there_can_be_no_more_threads() {
        if std::env::var_os(PLAYED).is_some() {
            return without_more_threads();
        }
        let this =
            ["--exact", "runtime::tests::work_that_blocks_can_begin_where_there_can_be_no_more_threads"];
        let mut played = Command::new(std::env::current_exe().unwrap());
        let ended = played.args(this).arg("--nocapture").env(PLAYED, "1").output().unwrap();
        let said = String::from_utf8_lossy(&ended.stdout);
        assert!(ended.status.success() && said.contains("the work was done"), "{ended:?}");
    }

    fn without_more_threads() {
        let idle = Duration::from_millis(200);
        let mut builder = Builder::new_current_thread();
        let runtime = lasting(builder.thread_keep_alive(idle), idle / 10).unwrap();
        // No room for another stack; nothing here needs a timer of its own to be late.
        let used = std::fs::read_to_string("/proc/self/statm").unwrap();
        let pages: u64 = used.split(' ').next().unwrap().parse().unwrap();
        let limit = format!("--as={}", pages * 4096);
        let process = std::process::id().to_string();
        assert!(Command::new("prlimit").args(["--pid", &process, &limit]).status().unwrap().success());
        assert!(std::thread::Builder::new().spawn(|| ()).is_err(), "there can be no more threads");
        runtime.block_on(async {
            tokio::time::sleep(idle * 5).await;
            tokio::task::spawn_blocking(|| println!("the work was done")).await.unwrap();
        });
    }
}
