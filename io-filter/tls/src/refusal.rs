//! Why one side of a stream does not accept the other, as a sentence that says what to look at.

use std::{io, path::Path};

use rustls::{AlertDescription, CertificateError, Error};

use crate::folder::{Role, authority_file};

/// Why a receiver refuses the peer that came `from`, at its address `at`.
pub fn refused_agent(error: &io::Error, from: &str, at: &str, folder: &Path) -> String {
    let authority = authority_file(folder);
    let authority = authority.display();
    let own = Role::Server.certificate(folder);
    let own = own.display();
    let Some(tls) = of(error) else {
        return format!("a peer{from} left {at} during the TLS handshake: {error}");
    };
    match tls {
        Error::InvalidCertificate(problem) => {
            format!(
                "an agent{from} is refused at {at}: its certificate {}",
                problem_text(problem, &authority)
            )
        }
        Error::NoCertificatesPresented => {
            format!("an agent{from} is refused at {at}: it shows no certificate")
        }
        Error::InvalidMessage(_) => {
            format!("a peer{from} does not speak TLS at {at}: an agent has to be told tls:// and not tcp://")
        }
        Error::AlertReceived(alert) => {
            format!(
                "an agent{from} does not accept this receiver's certificate {own}: {}",
                alert_text(*alert)
            )
        }
        other => format!("a peer{from} is refused at {at}: {other}"),
    }
}

/// Why an agent has no stream with the receiver at `at`; none when the error is not about TLS.
pub fn refused_receiver(error: &io::Error, at: &str, folder: &Path) -> Option<String> {
    let authority = authority_file(folder);
    let authority = authority.display();
    let own = Role::Client.certificate(folder);
    let own = own.display();
    Some(match of(error)? {
        Error::InvalidCertificate(problem) => format!(
            "the receiver at {at} is not trusted: its certificate {}",
            problem_text(problem, &authority)
        ),
        Error::InvalidMessage(_) => {
            format!("the receiver at {at} does not speak TLS there: is the address one of its tcp:// ones?")
        }
        Error::AlertReceived(alert) => {
            format!(
                "the receiver at {at} does not accept this agent's certificate {own}: {}",
                alert_text(*alert)
            )
        }
        other => format!("no TLS with the receiver at {at}: {other}"),
    })
}

/// What rustls says, when it is about TLS.
fn of(error: &io::Error) -> Option<&Error> {
    error.get_ref()?.downcast_ref::<Error>()
}

fn problem_text(problem: &CertificateError, authority: &impl std::fmt::Display) -> String {
    match problem {
        CertificateError::UnknownIssuer | CertificateError::BadSignature => {
            format!("is not signed by an authority of {authority}")
        }
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => "has expired".to_owned(),
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
            "is not valid yet: do the clocks agree?".to_owned()
        }
        CertificateError::NotValidForName => "is for another name".to_owned(),
        CertificateError::NotValidForNameContext { expected, presented } => {
            let names: Vec<_> = presented.iter().map(|name| plain_name(name)).collect();
            let names = names.join(", ");
            format!("is for {names} and not for {}", expected.to_str())
        }
        CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => {
            "is not meant for this side of a connection".to_owned()
        }
        other => format!("cannot be used: {other}"),
    }
}

/// A name as rustls lists it, `DnsName("a.example")`, without the frame.
fn plain_name(name: &str) -> &str {
    let inside = name.split_once('(').and_then(|(_, rest)| rest.strip_suffix(')'));
    inside.map_or(name, |inside| inside.trim_matches('"'))
}

/// What the other side says of our certificate.
fn alert_text(alert: AlertDescription) -> String {
    match alert {
        AlertDescription::UnknownCA | AlertDescription::DecryptError => {
            "its authorities have not signed it".to_owned()
        }
        AlertDescription::CertificateExpired => "it has expired, or is not valid yet".to_owned(),
        AlertDescription::CertificateRevoked => "it was revoked".to_owned(),
        AlertDescription::CertificateRequired => "none was shown".to_owned(),
        AlertDescription::UnsupportedCertificate => {
            "it is not meant for this side of a connection".to_owned()
        }
        AlertDescription::BadCertificate => "it cannot be used, or is for another name".to_owned(),
        other => format!("it says {other:?}"),
    }
}
