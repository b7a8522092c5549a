//! `backtide receiver run`: the log receiver as a process.

use std::path::PathBuf;

use backtide_control::{Address, ApiError, ErrorCode};
use backtide_export::BindError;
use backtide_log_receiver::{Config, Found, ListenError, StartError, StoreFileError, THREADS_APART, look};
use backtide_receiver_api::{ReceiverStatus, ScrubNext, StoreGrowth};
use backtide_units::DiskName;
use clap::{Args, Subcommand};
use serde::Serialize;

use crate::{
    arguments::ReceiverApi,
    commands::{
        Stop,
        daemon::{Settings, prepare, serve},
        nbd_mode::NbdModeFlag,
        nbd_tls::NbdTlsFlags,
        stream_tls::ReceiverTlsFlags,
    },
    context::Context,
    ending::{Ending, Failure, wrong_usage},
    output::facts,
    quantity::{duration_text, size_both, size_text, time_text},
};

/// `backtide receiver`
#[derive(Debug, Subcommand)]
pub(crate) enum Receiver {
    /// Run the receiver until SIGTERM or ctrl-c; logs go to stderr, filtered by RUST_LOG [default: info]
    Run(Run),
    /// Show what a receiver keeps, and what a person should look at
    Status(Status),
    /// Tell no more what a disk's store once had less of than was acknowledged; without this it is told for a week
    Dismiss(Dismiss),
}

/// `backtide receiver dismiss`
#[derive(Args, Debug)]
pub(crate) struct Dismiss {
    /// The disk's name or UUID
    name: DiskName,
    #[command(flatten)]
    api: ReceiverApi,
}

/// `backtide receiver status`
#[derive(Args, Debug)]
pub(crate) struct Status {
    #[command(flatten)]
    api: ReceiverApi,
}

/// `backtide receiver run`
#[derive(Args, Debug)]
pub(crate) struct Run {
    /// A TOML file, see docs/cli.md; flags and the environment go before it
    #[arg(long, value_name = "FILE", env = "BACKTIDE_RECEIVER_CONFIG", hide_env_values = true)]
    config: Option<PathBuf>,
    /// The store's directory [default: /var/lib/backtide/store for root, else
    /// ~/.local/state/backtide/store]
    #[arg(long, value_name = "DIR", env = "BACKTIDE_STORE", hide_env_values = true)]
    store: Option<PathBuf>,
    /// Where to take disks' streams, again for more places [default: stream.sock beside the control API]
    #[arg(long, value_name = "ADDR", env = "BACKTIDE_LISTEN", value_delimiter = ',', hide_env_values = true)]
    listen: Vec<Address>,
    /// Where to serve the control API: a unix socket, or TCP on loopback [default:
    /// unix:/run/backtide/receiver.sock for root, else $XDG_RUNTIME_DIR/backtide/receiver.sock]
    #[arg(long, value_name = "ADDR", env = "BACKTIDE_RECEIVER", hide_env_values = true)]
    api: Option<Address>,
    /// Serve every mount by its id on this socket too, an NBD URI; the export it names is the default
    /// there, else the only mount is [default: each on a socket of its own]
    #[arg(long, value_name = "URI", env = "BACKTIDE_RECEIVER_NBD_LISTEN", hide_env_values = true)]
    nbd_listen: Option<String>,
    #[command(flatten)]
    stream_tls: ReceiverTlsFlags,
    #[command(flatten)]
    nbd_mode: NbdModeFlag,
    #[command(flatten)]
    nbd_tls: NbdTlsFlags,
    /// Only say whether the settings and the store can be used
    #[arg(long)]
    check: bool,
}

/// What is printed of settings that can be used.
#[derive(Debug, Serialize)]
struct Checked {
    version: &'static str,
    store: PathBuf,
    /// None where it would be made.
    store_id: Option<String>,
    /// In the store.
    disks: usize,
}

/// What is printed when the receiver is ready.
#[derive(Debug, Serialize)]
struct Ready {
    api: Address,
    listen: Vec<Address>,
    store_id: String,
}

impl Receiver {
    /// Runs the receiver until a signal, or asks one that runs.
    pub(crate) async fn run(self, context: &Context, stop: Stop) -> Result<Ending, Failure> {
        let run = match self {
            Self::Run(run) => run,
            Self::Status(status) => return stop.or(status.run(context)).await,
            Self::Dismiss(dismiss) => return stop.or(dismiss.run(context)).await,
        };
        let check = run.check;
        let config = run.settings(context)?;
        if check {
            return stop.or(tell_checked(context, config)).await;
        }
        prepare(context, "info", THREADS_APART);
        let receiver = backtide_log_receiver::Receiver::start(config).await.map_err(start_failure)?;
        let ready = Ready {
            api: receiver.api_address().clone(),
            listen: receiver.stream_addresses().to_vec(),
            store_id: receiver.store_id().0.to_string(),
        };
        serve(context, stop, &ready, || ready_text(&ready), receiver.shutdown()).await
    }
}

impl Status {
    /// Prints the status; alarms are warnings.
    async fn run(self, context: &Context) -> Result<Ending, Failure> {
        let status = context.receiver(&self.api)?.status().await?;
        context.print(&status, || status_text(&status))?;
        for alarm in &status.alarms {
            context.warn(alarm);
        }
        Ok(if status.alarms.is_empty() { Ending::Done } else { Ending::Warnings })
    }
}

impl Dismiss {
    /// Prints what is told no more.
    async fn run(self, context: &Context) -> Result<Ending, Failure> {
        let dismissed = context.receiver(&self.api)?.dismiss(&self.name).await?;
        let line = |what: &String| format!("of disk {} is told no more: {what}", self.name);
        context.print(&dismissed, || dismissed.shortfalls.iter().map(line).collect::<Vec<_>>().join("\n"))?;
        Ok(Ending::Done)
    }
}

impl Run {
    fn settings(self, context: &Context) -> Result<Config, Failure> {
        let places = context.places();
        let mut settings = Settings::read(self.config.as_deref())?;
        settings.set("store", self.store)?;
        settings.set("listen", (!self.listen.is_empty()).then_some(self.listen))?;
        settings.set_default("store", || places.store())?;
        settings.set_places(self.api, || places.receiver_api(), places)?;
        settings.directory("store")?;
        settings.directory("run")?;
        self.stream_tls.apply(&mut settings)?;
        settings.set("nbd_listen", self.nbd_listen)?;
        self.nbd_mode.apply(&mut settings)?;
        self.nbd_tls.apply(&mut settings)?;
        let config: Config = settings.config()?;
        config.nbd.check().map_err(wrong_usage)?;
        config.shared_uri().map_err(wrong_usage)?;
        Ok(config)
    }
}

/// Says what a receiver with these settings would find.
async fn tell_checked(context: &Context, config: Config) -> Result<Ending, Failure> {
    let Found { store, disks } = look(&config).await.map_err(start_failure)?;
    let checked = Checked {
        version: env!("CARGO_PKG_VERSION"),
        store: config.store,
        store_id: store.map(|store| store.0.to_string()),
        disks,
    };
    let text = || {
        let (version, at) = (checked.version, checked.store.display());
        let found = match &checked.store_id {
            Some(id) => format!("the store {at} ({id}, disks: {disks})"),
            None => format!("{at}, where a store is made at the first start"),
        };
        format!("version {version}: the settings can be used, and {found}")
    };
    context.print(&checked, text)?;
    Ok(Ending::Done)
}

/// The error of a receiver that did not start, with its exit code.
pub(crate) fn start_failure(error: StartError) -> Failure {
    let code = match &error {
        StartError::Api(bind) => bind.code(),
        StartError::Listen(ListenError::InUse(_) | ListenError::NoSocket(_)) => ErrorCode::Locked,
        StartError::Listen(ListenError::Insecure(_)) => ErrorCode::Refused,
        StartError::Listen(ListenError::NoCertificates(_) | ListenError::Tls(_)) => ErrorCode::Usage,
        StartError::Store(error) => store_failure_code(error),
        StartError::Retention(_) | StartError::NbdUri(_) => ErrorCode::Usage,
        StartError::Nbd { source, .. } => match source {
            BindError::InUse(_) | BindError::NotASocket(_) => ErrorCode::Locked,
            BindError::Tls(_) => ErrorCode::Usage,
            BindError::Io { .. } => ErrorCode::Failed,
        },
        StartError::Listen(ListenError::Io { .. }) | StartError::List(_) | StartError::Io { .. } => {
            ErrorCode::Failed
        }
    };
    ApiError::from_error(code, &error).into()
}

/// The code of a store that cannot be used.
pub(crate) fn store_failure_code(error: &StoreFileError) -> ErrorCode {
    match error {
        StoreFileError::Locked { .. } => ErrorCode::Locked,
        StoreFileError::NotAStore { .. } | StoreFileError::Version { .. } => ErrorCode::Refused,
        StoreFileError::NoStore { .. } => ErrorCode::NotFound,
        StoreFileError::Damaged { .. } => ErrorCode::Damaged,
        StoreFileError::Io { source, .. } if source.kind() == std::io::ErrorKind::NotFound => {
            ErrorCode::NotFound
        }
        StoreFileError::Io { .. } => ErrorCode::Failed,
    }
}

/// How the store fills, and when it is full if that goes on.
fn growth_text(growth: &StoreGrowth) -> String {
    let over = duration_text(growth.over_seconds as f64);
    match growth.full_in_seconds {
        Some(left) => format!(
            "{} a second in the last {over}: full in {} at that rate",
            size_text(growth.bytes_per_second),
            duration_text(left as f64)
        ),
        None => format!("none in the last {over}"),
    }
}

fn free_text(status: &ReceiverStatus) -> String {
    match &status.store_error {
        Some(_) => "cannot be looked at: the store is not where it was".to_owned(),
        None => format!("{}, {} in reserve", size_both(status.free_bytes), size_both(status.free_bytes_min)),
    }
}

fn status_text(status: &ReceiverStatus) -> String {
    let mut lines = vec![
        ("store", format!("{} ({})", status.store, status.store_id)),
        ("disks", format!("{}, {} connected", status.disks, status.connected)),
        ("logs", size_both(status.log_bytes)),
        ("free", free_text(status)),
        ("mounts", status.mounts.to_string()),
    ];
    if let Some(growth) = &status.growth {
        lines.push(("growth", growth_text(growth)));
    }
    if let Some(certificate) = &status.certificate {
        let until = time_text(certificate.not_after);
        lines.push(("certificate", format!("{}, valid until {until}", certificate.subject)));
    }
    if let Some(scrub) = &status.scrub {
        let state = match (scrub.running, scrub.cancelled, scrub.sound) {
            (true, ..) => "running",
            (false, true, true) => "called off, what was read is sound",
            (false, false, true) => "ended, sound",
            (false, _, false) => "ended, DAMAGE FOUND",
        };
        let (done, total) = (size_both(scrub.done_bytes), size_both(scrub.total_bytes));
        lines.push(("scrub", format!("{state}, {done} of {total}")));
    }
    if let Some(ScrubNext { at, waits }) = &status.scrub_next {
        let since = waits.as_ref().map_or_else(String::new, |why| format!(" or later: {why}"));
        lines.push(("next scrub", format!("{}{since}", time_text(*at))));
    }
    facts(&lines)
}

fn ready_text(ready: &Ready) -> String {
    let listen: Vec<String> = ready.listen.iter().map(Address::to_string).collect();
    format!("the receiver takes streams at {} and answers at {}", listen.join(" and "), ready.api)
}
