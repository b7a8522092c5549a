//! The flags that put disks' streams under TLS, of the daemons.

use std::path::{Path, PathBuf};

use backtide_agent_api::StreamTls as AgentTls;
use backtide_log_receiver::{StreamTls as ReceiverTls, WhichDisks};
use clap::{Args, ValueEnum};

use crate::{
    commands::daemon::Settings,
    ending::{Failure, wrong_usage},
};

/// `--tls-certificates` of an agent.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct AgentTlsFlags {
    /// Certificates for tls:// receivers: the folder of ca-cert.pem, client-cert.pem and client-key.pem
    #[arg(long, value_name = "DIR")]
    tls_certificates: Option<PathBuf>,
}

/// `--tls-certificates` of a receiver, and what belongs to it.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct ReceiverTlsFlags {
    /// Certificates for tls:// addresses: the folder of ca-cert.pem, server-cert.pem and server-key.pem
    #[arg(long, value_name = "DIR")]
    tls_certificates: Option<PathBuf>,
    /// What an agent's certificate that names no disks speaks for [default: any]
    #[arg(long, value_name = "WHICH", value_enum)]
    tls_disks: Option<Disks>,
    /// Take streams and serve mounts in the clear, whoever comes, over TCP that is not loopback
    #[arg(long)]
    insecure: bool,
}

/// What a certificate without names of disks speaks for.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Disks {
    /// Every disk
    Any,
    /// None: certificates have to name disks
    Named,
}

impl AgentTlsFlags {
    /// Puts what was given on top of the settings of a file.
    pub(crate) fn apply(self, settings: &mut Settings) -> Result<(), Failure> {
        let known: Option<AgentTls> = settings.find("stream_tls")?;
        let hostname = known.as_ref().and_then(|known| known.hostname.clone());
        let Some(given) = self.tls_certificates.or(known.map(|known| known.certificates)) else {
            return Ok(());
        };
        let certificates = absolute_folder(&given)?;
        settings.set("stream_tls", Some(AgentTls { certificates, hostname }))
    }
}

impl ReceiverTlsFlags {
    /// Puts what was given on top of the settings of a file.
    pub(crate) fn apply(self, settings: &mut Settings) -> Result<(), Failure> {
        settings.set("insecure", self.insecure.then_some(true))?;
        let known: Option<ReceiverTls> = settings.find("stream_tls")?;
        let disks = match self.tls_disks {
            Some(Disks::Any) => WhichDisks::Any,
            Some(Disks::Named) => WhichDisks::Named,
            None => known.as_ref().map(|known| known.disks).unwrap_or_default(),
        };
        let Some(given) = self.tls_certificates.or(known.map(|known| known.certificates)) else {
            return match self.tls_disks {
                Some(_) => Err(wrong_usage("--tls-disks needs --tls-certificates DIR".to_owned())),
                None => Ok(()),
            };
        };
        let certificates = absolute_folder(&given)?;
        settings.set("stream_tls", Some(ReceiverTls { certificates, disks }))
    }
}

/// The same folder for whoever has another working directory.
pub(crate) fn absolute_folder(folder: &Path) -> Result<PathBuf, Failure> {
    std::path::absolute(folder)
        .map_err(|error| wrong_usage(format!("the path {} cannot be used: {error}", folder.display())))
}
