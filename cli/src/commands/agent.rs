//! `backtide agent`: the agent as a process, the holder in front of it, and its restart.

mod holder;
mod restart;
mod run;

use clap::Subcommand;

use crate::{
    commands::Stop,
    context::Context,
    ending::{Ending, Failure},
};

pub(crate) use run::start_failure;

/// `backtide agent`
#[derive(Debug, Subcommand)]
pub(crate) enum Agent {
    /// Run the agent until SIGTERM or ctrl-c; logs go to stderr, filtered by RUST_LOG [default: info]
    Run(Box<run::Run>),
    /// Have the agent's program take over from the running agent, under running guests
    Restart(restart::Restart),
}

impl Agent {
    /// Whether this process becomes an agent.
    pub(crate) fn is_agent(&self) -> bool {
        match self {
            Self::Run(run) => run.is_agent(),
            Self::Restart(_) => false,
        }
    }

    /// Runs the agent until a signal, or asks one.
    pub(crate) async fn run(self, context: &Context, stop: Stop) -> Result<Ending, Failure> {
        match self {
            Self::Run(run) => run.run(context, stop.outliving_the_terminal()).await,
            Self::Restart(restart) => stop.or(restart.run(context)).await,
        }
    }
}
