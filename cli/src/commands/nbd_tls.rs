//! The flags that put NBD sockets under TLS, of every command that serves some.

use std::path::PathBuf;

use backtide_export::{NbdTls, TlsDemand};
use clap::{Args, ValueEnum};

use crate::{
    commands::daemon::Settings,
    ending::{Failure, wrong_usage},
};

/// `--nbd-tls` and what belongs to it.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct NbdTlsFlags {
    /// TLS of NBD sockets whose URI says nothing of it; clients need a certificate [default: off]
    #[arg(long, value_name = "MODE", value_enum)]
    nbd_tls: Option<Mode>,
    /// Where ca-cert.pem, server-cert.pem and server-key.pem are
    #[arg(long, value_name = "DIR", requires = "nbd_tls")]
    nbd_tls_certificates: Option<PathBuf>,
}

/// Whether clients use TLS.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Mode {
    /// Nobody does
    Off,
    /// Who wants to
    Optional,
    /// Everybody has to
    Required,
}

impl NbdTlsFlags {
    /// Puts what was given on top of the settings of a file, and checks what is there then.
    pub(crate) fn apply(self, settings: &mut Settings) -> Result<(), Failure> {
        if let Some(Mode::Off) = self.nbd_tls {
            settings.unset("nbd_tls");
        }
        let of_file = settings.find("nbd_tls")?;
        if let Some(tls) = self.over(of_file)? {
            settings.set("nbd_tls", Some(tls))?;
        }
        Ok(())
    }

    /// What was given, or else what is known, once it is known to work.
    pub(crate) fn over(self, known: Option<NbdTls>) -> Result<Option<NbdTls>, Failure> {
        let mode = match self.nbd_tls {
            None => known.as_ref().map(|known| known.mode),
            Some(Mode::Off) => None,
            Some(Mode::Optional) => Some(TlsDemand::Optional),
            Some(Mode::Required) => Some(TlsDemand::Required),
        };
        let Some(mode) = mode else { return Ok(None) };
        let Some(certificates) = self.nbd_tls_certificates.or(known.map(|known| known.certificates)) else {
            return Err(wrong_usage("--nbd-tls needs --nbd-tls-certificates DIR".to_owned()));
        };
        let given = certificates.display().to_string();
        let certificates = std::path::absolute(certificates)
            .map_err(|error| wrong_usage(format!("the path {given} cannot be used: {error}")))?;
        let tls = NbdTls { mode, certificates };
        tls.check().map_err(|error| {
            let cause = std::error::Error::source(&error).map(|cause| format!(": {cause}"));
            wrong_usage(format!("{error}{}", cause.unwrap_or_default()))
        })?;
        Ok(Some(tls))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flags(nbd_tls: Option<Mode>, folder: Option<&str>) -> NbdTlsFlags {
        NbdTlsFlags { nbd_tls, nbd_tls_certificates: folder.map(PathBuf::from) }
    }

    #[test]
    fn off_goes_before_what_a_file_says() {
        let known = NbdTls { mode: TlsDemand::Required, certificates: "/nowhere".into() };
        assert_eq!(flags(Some(Mode::Off), None).over(Some(known)).unwrap(), None);
        assert_eq!(flags(None, None).over(None).unwrap(), None);
    }

    #[test]
    fn what_cannot_work_is_refused_before_anything_starts() {
        assert!(flags(Some(Mode::Required), None).over(None).is_err(), "no certificates");
        assert!(flags(Some(Mode::Optional), Some("/nowhere")).over(None).is_err(), "none there");
        let known = NbdTls { mode: TlsDemand::Required, certificates: "/nowhere".into() };
        assert!(flags(None, None).over(Some(known)).is_err(), "nor where the file says");
    }
}
