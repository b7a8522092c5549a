//! `backtide agent run`: the agent as a process, which becomes its successor at a restart.

use std::{path::PathBuf, time::Duration};

use backtide_agent::{Agent, AgentError, Config, Sockets, Successor, Surroundings, look, lost};
use backtide_control::{Address, ApiError};
use backtide_units::ByteCount;
use clap::Args;
use serde::Serialize;

use super::holder;
use crate::{
    commands::{
        Stop,
        daemon::{Settings, prepare, tell_ready},
        nbd_mode::NbdModeFlag,
        nbd_tls::NbdTlsFlags,
        stream_tls::AgentTlsFlags,
    },
    context::Context,
    ending::{Ending, Failure, io_failure, wrong_usage},
    quantity::parse_size,
};

/// How long the state directory may stay locked by what was let go of in this process.
const UNLOCK_TIME: Duration = Duration::from_secs(5);

/// How often that is looked at.
const UNLOCK_POLL: Duration = Duration::from_millis(10);

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
    /// For how long a disk's thread looks for a guest's next request before it goes to sleep, in microseconds, as long as
    /// requests come so soon and nobody else wants the processor; 0 for not at all [default: 100]
    #[arg(long, value_name = "US")]
    poll_max: Option<u32>,
    /// Where disks keep what the receiver lacks and memory has no room for, so that an outage of
    /// minutes leaves no hole [default: nowhere]
    #[arg(long, value_name = "DIR", env = "BACKTIDE_SPILL_DIR", hide_env_values = true)]
    spill_dir: Option<PathBuf>,
    /// What each disk may keep there [default: 4GiB]
    #[arg(long, value_name = "BYTES", value_parser = parse_size)]
    spill_size: Option<ByteCount>,
    #[command(flatten)]
    stream_tls: AgentTlsFlags,
    /// Serve every disk by its name on this socket too, an NBD URI; the export it names is the default
    /// there, else the only disk is [default: each on a socket of its own]
    #[arg(long, value_name = "URI", env = "BACKTIDE_NBD_LISTEN", hide_env_values = true)]
    nbd_listen: Option<String>,
    /// Serve disks and mounts in the clear, to whoever comes, where --nbd or --nbd-listen names TCP that is not loopback
    #[arg(long)]
    insecure: bool,
    #[command(flatten)]
    nbd_mode: NbdModeFlag,
    #[command(flatten)]
    nbd_tls: NbdTlsFlags,
    /// Run the agent in a process of its own, keep its listening sockets open, and start it again
    /// when it dies
    #[arg(long)]
    hold: bool,
    /// Only say whether the settings can be used
    #[arg(long)]
    check: bool,
}

/// What is printed when the agent is ready.
#[derive(Debug, Serialize)]
struct Ready {
    api: Address,
}

/// What is printed of settings that can be used.
#[derive(Debug, Serialize)]
struct Checked {
    version: &'static str,
    /// Whose records can be used.
    disks: usize,
}

impl Run {
    /// Whether this process becomes an agent, and not only looks after one.
    pub(crate) fn is_agent(&self) -> bool {
        !self.hold && !self.check
    }

    /// Runs the agent until a signal.
    pub(crate) async fn run(self, context: &Context, stop: Stop) -> Result<Ending, Failure> {
        let (hold, check) = (self.hold, self.check);
        let config = self.settings(context)?;
        if check {
            let checked = Checked { version: env!("CARGO_PKG_VERSION"), disks: look(&config, &lost())? };
            let text = || {
                let Checked { version, disks } = checked;
                format!(
                    "version {version}: the settings can be used, and what is remembered of disks ({disks})"
                )
            };
            context.print(&checked, text)?;
            return Ok(Ending::Done);
        }
        prepare(context, "info", &[]);
        if hold {
            return holder::hold(&config, stop).await;
        }
        serve(context, config, stop).await
    }

    fn settings(self, context: &Context) -> Result<Config, Failure> {
        let places = context.places();
        let mut settings = Settings::read(self.config.as_deref())?;
        settings.set("state", self.state)?;
        // --agent and BACKTIDE_AGENT say where the agent is: for the agent itself, where to be.
        let api = self.api.or_else(|| context.given_agent());
        settings.set_places(api, || places.agent_api(), places)?;
        settings.set_default("state", || places.agent_state())?;
        settings.set("io_engine", self.io_engine)?;
        settings.set("poll_max_us", self.poll_max)?;
        settings.directory("state")?;
        settings.directory("run")?;
        settings.set("spill_dir", self.spill_dir)?;
        settings.set("spill_size", self.spill_size)?;
        if settings.find::<PathBuf>("spill_dir")?.is_some() {
            settings.directory("spill_dir")?;
        }
        self.stream_tls.apply(&mut settings)?;
        settings.set("nbd_listen", self.nbd_listen)?;
        settings.set("insecure", self.insecure.then_some(true))?;
        self.nbd_mode.apply(&mut settings)?;
        self.nbd_tls.apply(&mut settings)?;
        let config: Config = settings.config()?;
        config.nbd.check().map_err(wrong_usage)?;
        config.check().map_err(wrong_usage)?;
        Ok(config)
    }
}

async fn serve(context: &Context, config: Config, mut stop: Stop) -> Result<Ending, Failure> {
    let sockets = Sockets::inherited().map_err(|error| io_failure("take over listening sockets", &error))?;
    let successor = Successor::of_this_process().map_err(|error| io_failure("find this program", &error))?;
    let mut surroundings =
        Surroundings { sockets, successor: Some(successor.clone()), restart_failure: None };
    let mut agent = Agent::start_in(config.clone(), surroundings.clone()).await.map_err(start_failure)?;
    let ready = Ready { api: agent.api_address().clone() };
    tell_ready(context, &ready, || format!("the agent answers at {}", ready.api));
    loop {
        let restart = tokio::select! {
            () = stop.asked() => false,
            () = agent.asked_to_restart() => true,
            () = agent.tell_service_manager() => unreachable!("it is told for ever"),
        };
        if !restart {
            agent.shutdown().await;
            return Ok(Ending::Done);
        }
        if let Some(notifier) = surroundings.sockets.notifier() {
            notifier.tell("RELOADING=1\nSTATUS=handing over to the next program");
        }
        agent = match agent.hand_over().await {
            Err(goes_on) => *goes_on,
            Ok(()) => {
                // A signal that comes later than this is lost, unless it is sent again.
                if stop.was_asked().await {
                    surroundings.sockets.close();
                    return Ok(Ending::Done);
                }
                let error = successor.follow(&surroundings.sockets);
                tracing::error!(program = %successor.program().display(), %error, "cannot start: this agent goes on");
                let why = format!("cannot start {}: {error}", successor.program().display());
                surroundings.restart_failure = Some(why);
                start_again(&config, &surroundings).await.map_err(start_failure)?
            }
        };
    }
}

/// Starts an agent where one has let go of everything just now.
async fn start_again(config: &Config, surroundings: &Surroundings) -> Result<Agent, AgentError> {
    let until = tokio::time::Instant::now() + UNLOCK_TIME;
    loop {
        match Agent::start_in(config.clone(), surroundings.clone()).await {
            Err(AgentError::Locked { .. }) if tokio::time::Instant::now() < until => {
                tokio::time::sleep(UNLOCK_POLL).await;
            }
            result => return result,
        }
    }
}

/// The error of an agent that did not start, with its exit code.
pub(crate) fn start_failure(error: AgentError) -> Failure {
    ApiError::from_error(error.code(), &error).into()
}
