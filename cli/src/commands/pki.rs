//! `backtide pki`: an authority and certificates for receivers, agents and NBD servers.
//!
//! For whoever has no authority of their own. Everything is a folder of PEM files under the names that
//! the daemons, QEMU and libnbd look for; keys are readable by their owner only.

use std::{
    fs, io,
    io::Write,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use backtide_control::{ApiError, ErrorCode};
use backtide_tls::Rights;
use clap::{Args, Subcommand};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, SanType,
};
use serde::Serialize;

use crate::{
    context::Context,
    ending::{Ending, Failure, failed, io_failure, wrong_usage},
};

/// How long an authority lasts, in days.
const AUTHORITY_DAYS: u32 = 3650;

/// The files of an authority.
const AUTHORITY: &str = "ca-cert.pem";
const AUTHORITY_KEY: &str = "ca-key.pem";

/// `backtide pki`
#[derive(Debug, Subcommand)]
pub(crate) enum Pki {
    /// Make an authority, and with --receiver the certificate of a receiver
    Init(Init),
    /// Make the certificate of an agent, or with --receiver of a receiver
    Issue(Issue),
}

/// `backtide pki init`
#[derive(Args, Debug)]
pub(crate) struct Init {
    /// Where to make it; ca-key.pem in there is what everybody trusts in the end: keep it to yourself
    directory: PathBuf,
    /// Make the certificate of a receiver with this host name or address as well, in DIRECTORY/NAME
    #[arg(long, value_name = "NAME")]
    receiver: Option<String>,
}

/// `backtide pki issue`
#[derive(Args, Debug)]
pub(crate) struct Issue {
    /// The authority, as `pki init` made it
    directory: PathBuf,
    /// Whose certificate: it is made in DIRECTORY/NAME, or replaced there
    name: String,
    /// It is a receiver's, or an NBD server's: NAME is the host name or address that clients connect to
    #[arg(long)]
    receiver: bool,
    /// With --receiver, one more host name or address
    #[arg(long, value_name = "HOST", requires = "receiver")]
    host: Vec<String>,
    /// The agent may speak for this disk, or with * at the end for all that begin so; again for more
    /// [default: every disk]
    #[arg(long, value_name = "NAME", conflicts_with = "receiver")]
    disk: Vec<String>,
    /// How long it is valid
    #[arg(long, value_name = "DAYS", default_value_t = 365, value_parser = clap::value_parser!(u32).range(1..=36500))]
    days: u32,
}

/// What was made.
#[derive(Debug, Serialize)]
struct Made {
    /// The folder to give to a daemon.
    #[serde(skip_serializing_if = "Option::is_none")]
    certificates: Option<PathBuf>,
    /// The authority's certificate.
    authority: PathBuf,
}

impl Pki {
    /// Makes what is asked for.
    pub(crate) fn run(self, context: &Context) -> Result<Ending, Failure> {
        match self {
            Self::Init(init) => init.run(context),
            Self::Issue(issue) => issue.run(context),
        }
    }
}

impl Init {
    fn run(self, context: &Context) -> Result<Ending, Failure> {
        let directory = absolute(&self.directory)?;
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&directory)
            .map_err(|error| io_failure(directory.display(), &error))?;
        let key = KeyPair::generate().map_err(|error| failed(format!("cannot make a key: {error}")))?;
        let certificate = authority_params(&key).self_signed(&key).map_err(|error| cannot_sign(&error))?;
        // The key first: one that is there already is never replaced.
        write_new(&directory.join(AUTHORITY_KEY), &key.serialize_pem())?;
        write_over(&directory.join(AUTHORITY), &certificate.pem(), 0o644)?;
        let Some(name) = self.receiver else {
            let made = Made { certificates: None, authority: directory.join(AUTHORITY) };
            context.print(&made, || format!("the authority is {}", made.authority.display()))?;
            return Ok(Ending::Done);
        };
        let issue = Issue { directory, name, receiver: true, host: vec![], disk: vec![], days: 365 };
        issue.run(context)
    }
}

impl Issue {
    fn run(self, context: &Context) -> Result<Ending, Failure> {
        let directory = absolute(&self.directory)?;
        if self.name.is_empty() || self.name.starts_with('.') || self.name.contains(['/', '\0']) {
            return Err(wrong_usage(format!("{:?} is no name of a folder", self.name)));
        }
        let key_file = directory.join(AUTHORITY_KEY);
        let pem = fs::read_to_string(&key_file).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => failed(format!(
                "{} is missing: `backtide pki init {}` makes an authority",
                key_file.display(),
                directory.display()
            )),
            _ => io_failure(key_file.display(), &error),
        })?;
        let unusable = |error| failed(format!("{} cannot be used: {error}", key_file.display()));
        let authority = KeyPair::from_pem(&pem).map_err(unusable)?;
        let params = self.params()?;
        let key = KeyPair::generate().map_err(|error| failed(format!("cannot make a key: {error}")))?;
        let issuer = Issuer::new(authority_params(&authority), &authority);
        let certificate = params.signed_by(&key, &issuer).map_err(|error| cannot_sign(&error))?;
        let folder = directory.join(&self.name);
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&folder)
            .map_err(|error| io_failure(folder.display(), &error))?;
        let whose = if self.receiver { "server" } else { "client" };
        let authority = fs::read_to_string(directory.join(AUTHORITY))
            .map_err(|error| io_failure(directory.join(AUTHORITY).display(), &error))?;
        write_over(&folder.join(AUTHORITY), &authority, 0o644)?;
        write_over(&folder.join(format!("{whose}-key.pem")), &key.serialize_pem(), 0o600)?;
        write_over(&folder.join(format!("{whose}-cert.pem")), &certificate.pem(), 0o644)?;
        let made = Made { certificates: Some(folder.clone()), authority: directory.join(AUTHORITY) };
        context.print(&made, || self.text(&folder))?;
        Ok(Ending::Done)
    }

    fn params(&self) -> Result<CertificateParams, Failure> {
        let hosts =
            if self.receiver { [std::slice::from_ref(&self.name), &self.host[..]].concat() } else { vec![] };
        let mut params = CertificateParams::new(hosts)
            .map_err(|error| wrong_usage(format!("a host's name cannot be used: {error}")))?;
        params.distinguished_name = named(&self.name);
        params.use_authority_key_identifier_extension = true;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![match self.receiver {
            true => ExtendedKeyUsagePurpose::ServerAuth,
            false => ExtendedKeyUsagePurpose::ClientAuth,
        }];
        for disk in &self.disk {
            let plain = disk.strip_suffix('*').unwrap_or(disk);
            let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
            if disk.is_empty() || !plain.chars().all(good) {
                return Err(wrong_usage(format!(
                    "{disk:?} is neither a disk's name nor the beginning of one with *"
                )));
            }
            let uri =
                Rights::uri(disk).try_into().map_err(|error| wrong_usage(format!("{disk:?}: {error}")))?;
            params.subject_alt_names.push(SanType::URI(uri));
        }
        set_validity(&mut params, self.days);
        Ok(params)
    }

    fn text(&self, folder: &Path) -> String {
        let folder = folder.display();
        if self.receiver {
            let name = &self.name;
            return format!(
                "the receiver {name} has its certificate in {folder}\n  \
                 backtide receiver run --listen tls://0.0.0.0:7301 --tls-certificates {folder}\n\
                 and for each host with disks\n  \
                 backtide pki issue {} HOST",
                self.directory.display()
            );
        }
        let disks = if self.disk.is_empty() { "every disk".to_owned() } else { self.disk.join(", ") };
        format!(
            "{} has its certificate in {folder}, for {disks}\n  \
             backtide attach NAME IMAGE --receiver tls://RECEIVER:7301 --tls-certificates {folder}",
            self.name
        )
    }
}

/// What an authority is, told by its key alone: so the same when it is made and when it signs.
fn authority_params(key: &KeyPair) -> CertificateParams {
    let mut params = CertificateParams::default();
    let hash = blake3::hash(key.public_key_raw()).to_hex();
    params.distinguished_name = named(&format!("Backtide authority {}", &hash[..8]));
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    set_validity(&mut params, AUTHORITY_DAYS);
    params
}

fn named(name: &str) -> DistinguishedName {
    let mut distinguished = DistinguishedName::new();
    distinguished.push(DnType::CommonName, name);
    distinguished
}

/// From yesterday, for clocks that are behind, for so many days from today.
fn set_validity(params: &mut CertificateParams, days: u32) {
    let today = jiff::Timestamp::now().to_zoned(jiff::tz::TimeZone::UTC).date();
    let at = |days: i64| {
        let date = today.saturating_add(jiff::Span::new().days(days));
        let part = |number: i8| u8::try_from(number).expect("a date's parts are positive");
        rcgen::date_time_ymd(date.year().into(), part(date.month()), part(date.day()))
    };
    (params.not_before, params.not_after) = (at(-1), at(i64::from(days)));
}

fn cannot_sign(error: &rcgen::Error) -> Failure {
    failed(format!("cannot make a certificate: {error}"))
}

fn absolute(path: &Path) -> Result<PathBuf, Failure> {
    std::path::absolute(path).map_err(|error| io_failure(path.display(), &error))
}

/// Writes a secret that must not be there yet.
fn write_new(path: &Path, text: &str) -> Result<(), Failure> {
    let mut file =
        fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map_err(|error| {
            match error.kind() {
                io::ErrorKind::AlreadyExists => refused(format!(
                    "{} exists: everything it signed would be lost with it; use another directory",
                    path.display()
                )),
                _ => io_failure(path.display(), &error),
            }
        })?;
    file.write_all(text.as_bytes())
        .and_then(|()| file.sync_all())
        .map_err(|error| io_failure(path.display(), &error))
}

/// Puts a file in place as a whole: a daemon that looks meanwhile sees the old one or the new.
fn write_over(path: &Path, text: &str, mode: u32) -> Result<(), Failure> {
    let failure = |error: io::Error| io_failure(path.display(), &error);
    let directory = path.parent().expect("a file in a directory");
    let mut file = tempfile::NamedTempFile::new_in(directory).map_err(failure)?;
    file.write_all(text.as_bytes()).map_err(failure)?;
    file.as_file().set_permissions(std::os::unix::fs::PermissionsExt::from_mode(mode)).map_err(failure)?;
    file.as_file().sync_all().map_err(failure)?;
    file.persist(path).map_err(|error| failure(error.error))?;
    Ok(())
}

fn refused(message: String) -> Failure {
    ApiError::new(ErrorCode::Refused, message).into()
}
