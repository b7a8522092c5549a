//! The commands, one file each, and how they are stopped.

pub(crate) mod agent;
pub(crate) mod attach;
pub(crate) mod completions;
pub(crate) mod control;
pub(crate) mod daemon;
pub(crate) mod demo;
pub(crate) mod diff;
pub(crate) mod doctor;
pub(crate) mod failback;
pub(crate) mod failover;
pub(crate) mod files;
pub(crate) mod find_change;
pub(crate) mod forget;
pub(crate) mod fsck;
pub(crate) mod inspect;
pub(crate) mod limits;
pub(crate) mod mark;
pub(crate) mod mount;
pub(crate) mod mount_here;
pub(crate) mod mounted;
pub(crate) mod nbd_mode;
pub(crate) mod nbd_tls;
pub(crate) mod pki;
pub(crate) mod points;
pub(crate) mod receiver;
pub(crate) mod resize;
pub(crate) mod restore;
pub(crate) mod resync;
pub(crate) mod retention;
pub(crate) mod rewind;
pub(crate) mod scrub;
pub(crate) mod status;
pub(crate) mod stream_tls;
pub(crate) mod support_bundle;
pub(crate) mod until_complete;
pub(crate) mod up;
pub(crate) mod verify;
pub(crate) mod wait;

use tokio::signal::unix::{SignalKind, signal};

use crate::{
    arguments::Command,
    context::Context,
    ending::{Ending, Failure, failed},
};

/// Does what was asked. SIGINT, SIGTERM and, but for daemons, SIGHUP end it with
/// [`Failure::Interrupted`].
pub(crate) async fn run(context: &Context, command: Command) -> Result<Ending, Failure> {
    let stop = Stop::listen()?;
    match command {
        // These have something to put in order when they are stopped.
        Command::Up(up) => up.run(context, stop).await,
        Command::Demo(demo) => demo.run(context, stop).await,
        Command::Agent(agent) => agent.run(context, stop).await,
        Command::Receiver(receiver) => receiver.run(context, stop.outliving_the_terminal()).await,
        Command::Restore(restore) => restore.run(context, stop).await,
        Command::Verify(verify) => verify.run(context, stop).await,
        Command::Rewind(rewind) => rewind.run(context, stop).await,
        other => {
            let ended = stop.or(run_stoppable(context, other)).await;
            if let (Some(name), Err(Failure::Interrupted)) = (context.at_agent(), &ended) {
                context.warn(&format!(
                    "the agent goes on with disk {name}: `backtide status {name}` tells how far it is"
                ));
            }
            ended
        }
    }
}

async fn run_stoppable(context: &Context, command: Command) -> Result<Ending, Failure> {
    match command {
        Command::Attach(attach) => attach.run(context).await,
        Command::Detach(detach) => detach.run(context).await,
        Command::Status(status) => status.run(context).await,
        Command::Pause(pause) => pause.run(context).await,
        Command::Resume(resume) => resume.run(context).await,
        Command::Resize(resize) => resize.run(context).await,
        Command::Resync(resync) => resync.run(context).await,
        Command::Limits(limits) => limits.run(context).await,
        Command::Mark(mark) => mark.run(context).await,
        Command::Failover(failover) => failover.run(context).await,
        Command::Failback(failback) => failback.run(context).await,
        Command::Points(points) => points.run(context).await,
        Command::Diff(diff) => diff.run(context).await,
        Command::Ls(ls) => ls.run(context).await,
        Command::Cp(cp) => cp.run(context).await,
        Command::FindChange(find) => find.run(context).await,
        Command::Mount(mount) => mount.run(context).await,
        Command::Unmount(unmount) => unmount.run(context).await,
        Command::Wait(wait) => wait.run(context).await,
        Command::Doctor(doctor) => doctor.run(context).await,
        Command::SupportBundle(bundle) => bundle.run(context).await,
        Command::Forget(forget) => forget.run(context).await,
        Command::Retention(retention) => retention.run(context).await,
        Command::Scrub(scrub) => scrub.run(context).await,
        Command::Fsck(fsck) => fsck.run(context).await,
        Command::Pki(pki) => pki.run(context),
        Command::Inspect(inspect) => inspect.run(context),
        Command::Completions(completions) => completions.run(context),
        Command::Up(_)
        | Command::Demo(_)
        | Command::Agent(_)
        | Command::Receiver(_)
        | Command::Restore(_)
        | Command::Rewind(_)
        | Command::Verify(_) => unreachable!("handled by the caller"),
    }
}

/// The signals that ask a command to stop.
pub(crate) struct Stop {
    interrupt: tokio::signal::unix::Signal,
    terminate: tokio::signal::unix::Signal,
    hang_up: tokio::signal::unix::Signal,
    outlives_terminal: bool,
}

impl Stop {
    fn listen() -> Result<Self, Failure> {
        let listen =
            |kind| signal(kind).map_err(|error| failed(format!("cannot listen for signals: {error}")));
        Ok(Self {
            interrupt: listen(SignalKind::interrupt())?,
            terminate: listen(SignalKind::terminate())?,
            hang_up: listen(SignalKind::hangup())?,
            outlives_terminal: false,
        })
    }

    /// For a daemon, which goes on when its terminal is closed.
    pub(crate) fn outliving_the_terminal(self) -> Self {
        Self { outlives_terminal: true, ..self }
    }

    /// Ready when a signal asks to stop.
    pub(crate) async fn asked(&mut self) {
        let outlives_terminal = self.outlives_terminal;
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
            _ = self.hang_up.recv(), if !outlives_terminal => {}
        }
    }

    /// Whether a signal has asked to stop already.
    pub(crate) async fn was_asked(&mut self) -> bool {
        tokio::select! {
            biased;
            () = self.asked() => true,
            () = std::future::ready(()) => false,
        }
    }

    /// What `work` gives or, when a signal comes first, [`Failure::Interrupted`] and no more work.
    pub(crate) async fn or<T>(
        mut self,
        work: impl Future<Output = Result<T, Failure>>,
    ) -> Result<T, Failure> {
        tokio::select! {
            result = work => result,
            () = self.asked() => Err(Failure::Interrupted),
        }
    }
}
