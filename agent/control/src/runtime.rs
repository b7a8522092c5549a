//! Runtimes of daemons.

use std::{io, ops::Deref, time::Duration};

use tokio::runtime::{Builder, Handle, Runtime};

/// A runtime that may be dropped anywhere: inside another one, as when the thread that was to run it cannot be started, it
/// does not wait for its work.
#[derive(Debug)]
pub struct Lasting(Option<Runtime>);

impl Lasting {
    /// The runtime alone.
    ///
    /// # Panics
    /// Never: it is there until the end.
    pub fn into_runtime(mut self) -> Runtime {
        self.0.take().expect("it is there until it is dropped")
    }
}

impl From<Runtime> for Lasting {
    fn from(runtime: Runtime) -> Self {
        Self(Some(runtime))
    }
}

impl Deref for Lasting {
    type Target = Runtime;

    fn deref(&self) -> &Runtime {
        self.0.as_ref().expect("it is there until it is dropped")
    }
}

impl Drop for Lasting {
    fn drop(&mut self) {
        let Some(runtime) = self.0.take() else { return };
        // Tokio panics where it would have to wait.
        if Handle::try_current().is_ok() { runtime.shutdown_background() } else { drop(runtime) }
    }
}

/// How often a runtime's thread for blocking work is used: well within the 10 s after which tokio ends one that is not.
const BEAT: Duration = Duration::from_secs(4);

/// Builds a runtime that always has a thread for work that blocks. Without one `spawn_blocking` panics where the system
/// gives no more threads (`pids.max`, `ulimit -u`): with one the work waits its turn.
///
/// # Errors
/// When there can be no runtime, or not even that thread.
pub fn build_lasting(builder: &mut Builder) -> io::Result<Lasting> {
    lasting(builder, BEAT)
}

/// Tries whether there can be one more thread now.
fn require_thread() -> io::Result<()> {
    let probe = std::thread::Builder::new().name("probe".to_owned()).spawn(|| ())?;
    probe.join().map_err(|_| io::Error::other("a thread that does nothing failed"))
}

fn lasting(builder: &mut Builder, beat: Duration) -> io::Result<Lasting> {
    // Tokio panics where it cannot have a thread: the first one of several workers, or of work that blocks.
    require_thread()?;
    let runtime = Lasting::from(builder.enable_all().build()?);
    require_thread()?;
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

    #[tokio::test]
    async fn one_that_is_given_up_within_another_is_dropped() {
        let runtime = build_lasting(&mut Builder::new_current_thread()).unwrap();
        let (begun, has_begun) = std::sync::mpsc::channel();
        let (end, ended) = std::sync::mpsc::channel::<()>();
        runtime.spawn_blocking(move || begun.send(()).map(|()| ended.recv()));
        has_begun.recv().unwrap();
        drop(runtime);
        drop(end);
    }

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
        let refused = build_lasting(Builder::new_multi_thread().worker_threads(1));
        assert!(refused.is_err(), "it says so instead of a panic");
        runtime.block_on(async {
            tokio::time::sleep(idle * 5).await;
            tokio::task::spawn_blocking(|| println!("the work was done")).await.unwrap();
        });
    }
}
