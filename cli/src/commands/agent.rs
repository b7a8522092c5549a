//! `backtide agent run`: the agent as a process.

use std::path::PathBuf;

use backtide_agent::{AgentError, Config};
use backtide_control::{Address, ApiError};
use clap::{Args, Subcommand};
use serde::Serialize;

use crate::{
    commands::{
        Stop,
        daemon::{Settings, prepare, serve},
        nbd_tls::NbdTlsFlags,
    },
    context::Context,
    ending::{Ending, Failure},
};

/// `backtide agent`
#[derive(Debug, Subcommand)]
pub(crate) enum Agent {
    /// Run the agent until SIGTERM or ctrl-c; logs go to stderr, filtered by RUST_LOG [default: info]
    Run(Run),
}

/// `backtide agent run`
#[derive(Args, Debug)]
pub(crate) struct Run {
    /// A TOML file, see docs/cli.md; flags and the environment go before it
    #[arg(long, value_name = "FILE", env = "BACKTIDE_AGENT_CONFIG", hide_env_values = true)]
    config: Option<PathBuf>,
    /// Where the agent remembers its disks [default: /var/lib/backtide/agent for root, else
    /// ~/.local/state/backtide/agent]
    #[arg(long, value_name = "DIR", env = "BACKTIDE_STATE", hide_env_values = true)]
    state: Option<PathBuf>,
    /// Where to serve the control API: a unix socket, or TCP on loopback [default:
    /// unix:/run/backtide/agent.sock for root, else $XDG_RUNTIME_DIR/backtide/agent.sock]
    #[arg(long, value_name = "ADDR")]
    api: Option<Address>,
    /// How local I/O is done that may wait for a device: by `io-uring`, by `threads`, or by io_uring
    /// where the host allows it (`auto`) [default: auto]
    #[arg(long, value_name = "ENGINE", value_parser = ["auto", "io-uring", "threads"])]
    io_engine: Option<String>,
    #[command(flatten)]
    nbd_tls: NbdTlsFlags,
}

/// What is printed when the agent is ready.
#[derive(Debug, Serialize)]
struct Ready {
    api: Address,
}

impl Agent {
    /// Runs the agent until a signal.
    pub(crate) async fn run(self, context: &Context, stop: Stop) -> Result<Ending, Failure> {
        let Self::Run(run) = self;
        let config = run.settings(context)?;
        prepare(context, "info");
        let agent = backtide_agent::Agent::start(config).await.map_err(start_failure)?;
        let ready = Ready { api: agent.api_address().clone() };
        let text = || format!("the agent answers at {}", ready.api);
        serve(context, stop, &ready, text, agent.shutdown()).await
    }
}

impl Run {
    fn settings(self, context: &Context) -> Result<Config, Failure> {
        let places = context.places();
        let mut settings = Settings::read(self.config.as_deref())?;
        settings.set("state", self.state)?;
        // --agent and BACKTIDE_AGENT say where the agent is: for the agent itself, where to be.
        let api = self.api.or_else(|| context.given_agent());
        settings.set_places(api, places.agent_api(), places)?;
        settings.set_default("state", places.agent_state())?;
        settings.set("io_engine", self.io_engine)?;
        settings.directory("state")?;
        settings.directory("run")?;
        self.nbd_tls.apply(&mut settings)?;
        settings.config()
    }
}

/// The error of an agent that did not start, with its exit code.
pub(crate) fn start_failure(error: AgentError) -> Failure {
    ApiError::from_error(error.code(), &error).into()
}
