//! What can be asked of `backtide`: the command and the arguments common to several commands.

use backtide_control::Address;
use clap::{Args, Parser, Subcommand};

use crate::commands::{
    agent, attach, completions, control, demo, diff, doctor, failback, failover, files, find_change, forget,
    fsck, inspect, limits, mark, mount, pki, points, receiver, resize, restore, resync, retention, rewind,
    scrub, status, support_bundle, up, verify, wait,
};

/// Continuous data protection for the virtual disks of KVM/QEMU.
#[derive(Debug, Parser)]
#[command(
    name = "backtide",
    version,
    propagate_version = true,
    after_help = "ADDR is unix:/path or tcp://host:port, for streams also tls://host:port. An NBD URI is nbd+unix:///EXPORT?socket=/path or \
                  nbd://host:port/EXPORT. A POINT is latest, lsn:N, an RFC 3339 time, a duration ago (-5m) \
                  or mark:NAME.\n\nExit codes: 0 done, 1 failed, 2 wrong usage, 3 done with warnings, \
                  4 not found, 5 refused (busy, fenced, locked), 6 peer unreachable, 8 damaged data, \
                  130 interrupted."
)]
pub(crate) struct Arguments {
    /// Print JSON, on stdout the result and on stderr an error; shapes are in docs/api.md
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// The agent's control API [default: unix:/run/backtide/agent.sock for root, else
    /// $XDG_RUNTIME_DIR/backtide/agent.sock]
    #[arg(long, global = true, value_name = "ADDR", env = "BACKTIDE_AGENT", hide_env_values = true)]
    pub(crate) agent: Option<Address>,
    /// What to do
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// The receiver's control API, for commands that ask it.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct ReceiverApi {
    /// The receiver's control API [default: unix:/run/backtide/receiver.sock for root, else
    /// $XDG_RUNTIME_DIR/backtide/receiver.sock]
    #[arg(long, value_name = "ADDR", env = "BACKTIDE_RECEIVER", hide_env_values = true)]
    pub(crate) receiver: Option<Address>,
}

/// One command.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Protect an image with everything in one process, until ctrl-c
    Up(Box<up::Up>),
    /// Show the whole story on a scratch disk, and prove it
    Demo(demo::Demo),
    /// The log receiver
    #[command(subcommand)]
    Receiver(receiver::Receiver),
    /// The agent
    #[command(subcommand)]
    Agent(agent::Agent),
    /// Protect a disk: serve it over NBD and forward its writes to a receiver
    Attach(Box<attach::Attach>),
    /// End the protection of a disk cleanly
    Detach(control::Detach),
    /// Show disks: mode, reason, lag, dirty blocks, resync progress
    Status(status::Status),
    /// Stop forwarding a disk's writes; changed blocks are tracked
    Pause(control::Pause),
    /// Forward again after a pause
    Resume(control::Resume),
    /// Force a resync
    Resync(resync::Resync),
    /// Take over the size that a disk has grown to
    Resize(resize::Resize),
    /// Show how fast a resync may be and what else bounds a disk, or change it while it is attached
    Limits(limits::LimitsOf),
    /// Give the present state of one or several disks a name, at one instant
    Mark(mark::Mark),
    /// Show what a disk can go back to, and what not and why
    Points(points::Points),
    /// Show which blocks changed between two points
    Diff(diff::Diff),
    /// Tell when a block last changed before a point
    FindChange(find_change::FindChange),
    /// Serve a point of a disk over NBD, read-only or with what is written kept beside it
    Mount(mount::Mount),
    /// List files of a point, without root and without mounting it here
    Ls(files::Ls),
    /// Copy a file or directory out of a point
    Cp(files::Cp),
    /// End a mount
    Unmount(mount::Unmount),
    /// Write a point of a disk to a file, a device or an NBD server
    Restore(restore::Restore),
    /// Have a disk go on here whose host is gone: at its latest point, with its history
    Failover(Box<failover::Failover>),
    /// Have a disk go on here again that another host has had since: only what differs is fetched
    Failback(failback::Failback),
    /// Set the live disk back to a point: it is used at once, what changed comes meanwhile
    Rewind(rewind::Rewind),
    /// Compare the live disk with the receiver, while the guest goes on
    Verify(verify::Verify),
    /// Wait for a disk to be in a state, for scripts
    Wait(wait::Wait),
    /// Look for what is wrong with the daemons, their disks and this machine
    Doctor(doctor::Doctor),
    /// Gather versions, status, points, configuration and logs in one file, for somebody who helps
    SupportBundle(support_bundle::SupportBundle),
    /// Show and change how long history is kept, and try it out
    Retention(retention::Retention),
    /// Remove a disk from its receiver, with all its history
    Forget(forget::Forget),
    /// Check what a running receiver keeps against its checksums
    Scrub(scrub::Scrub),
    /// Check every file of a store that no receiver uses against its checksums
    Fsck(fsck::Fsck),
    /// Make certificates for streams and NBD sockets under TLS
    #[command(subcommand)]
    Pki(pki::Pki),
    /// Print a file of the receiver's store in readable form
    Inspect(inspect::Inspect),
    /// Print completions for a shell
    Completions(completions::Completions),
}

impl Command {
    /// How many worker threads the command needs besides the one it runs on, if it needs any.
    pub(crate) fn threads(&self) -> Option<usize> {
        match self {
            // These hold daemons, which answer calls while the command itself asks them.
            Self::Up(_) | Self::Demo(_) | Self::Receiver(_) => Some(2),
            Self::Agent(agent) => agent.is_agent().then_some(2),
            // Hashing and copying at once.
            Self::Restore(_) => Some(2),
            Self::Attach(_)
            | Self::Detach(_)
            | Self::Status(_)
            | Self::Pause(_)
            | Self::Resume(_)
            | Self::Resync(_)
            | Self::Resize(_)
            | Self::Limits(_)
            | Self::Mark(_)
            | Self::Failover(_)
            | Self::Failback(_)
            | Self::Rewind(_)
            | Self::Points(_)
            | Self::Diff(_)
            | Self::FindChange(_)
            | Self::Ls(_)
            | Self::Cp(_)
            | Self::Mount(_)
            | Self::Unmount(_)
            | Self::Verify(_)
            | Self::Wait(_)
            | Self::Doctor(_)
            | Self::SupportBundle(_)
            | Self::Retention(_)
            | Self::Forget(_)
            | Self::Scrub(_)
            | Self::Fsck(_)
            | Self::Pki(_)
            | Self::Inspect(_)
            | Self::Completions(_) => None,
        }
    }
}
