//! Threads that may block: one small pool syncs segment files, another reads for everybody else, a third writes overlays.
//!
//! They are apart, so that readers of old points never hold up an acknowledgement. Each is bounded; what
//! exceeds it waits in a queue that is bounded by what can ask (one sync per disk, so many
//! compares per connection, so many requests per NBD connection).

use std::time::Duration;

use backtide_control::Lasting;
use tokio::{
    runtime::{Builder, Handle, Runtime},
    task::JoinHandle,
};

/// A bounded pool of blocking threads.
#[derive(Clone, Debug)]
pub(crate) struct Pool {
    handle: Handle,
}

/// Keeps a pool's threads.
#[derive(Debug)]
pub(crate) struct PoolThreads {
    runtime: Option<Runtime>,
}

/// The work was given up because the receiver ends, or it panicked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum GivenUp {
    #[error("the work was given up: {0}")]
    Run(#[from] tokio::task::JoinError),
    #[error("the work was given up")]
    Unanswered,
}

/// A thread that is there is not given back: the system may have no other when there is work again.
const FOR_GOOD: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

impl Pool {
    /// Starts a pool of `threads` threads at most, called `name`.
    pub(crate) fn start(name: &str, threads: usize) -> std::io::Result<(Self, PoolThreads)> {
        // Nothing asynchronous ever runs on it: it only lends its blocking threads.
        let mut builder = Builder::new_current_thread();
        builder.thread_name(name).max_blocking_threads(threads.max(1)).thread_keep_alive(FOR_GOOD);
        let runtime = Lasting::from(builder.build()?);
        // An error, where tokio would panic. Once there is a thread, work waits for it where there can be no other.
        let probe = std::thread::Builder::new().name(name.to_owned()).spawn(|| ())?;
        probe.join().map_err(|_| std::io::Error::other("a thread that does nothing failed"))?;
        runtime.spawn_blocking(|| ());
        let pool = Self { handle: runtime.handle().clone() };
        Ok((pool, PoolThreads { runtime: Some(runtime.into_runtime()) }))
    }

    /// Runs `work` where it may block.
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, GivenUp> {
        Ok(self.spawn(work).await?)
    }

    /// Begins `work` where it may block.
    pub(crate) fn spawn<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> JoinHandle<T> {
        self.handle.spawn_blocking(work)
    }
}

impl Drop for PoolThreads {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            // Dropped inside another runtime's task it must not wait.
            runtime.shutdown_background();
        }
    }
}
