//! For which disks a client's certificate speaks.
//!
//! A certificate names them by URIs among its subject alternative names: `backtide:disk/vm1` for one,
//! `backtide:disk/db-*` for all whose names begin so. One that names none speaks for every disk,
//! unless the receiver asks for names ([`WhichDisks::Named`]). So it is the authority that decides,
//! and nothing has to be kept in step with it.

use backtide_units::DiskName;
use serde::{Deserialize, Serialize};

use crate::Certificate;

/// What the URI of a disk begins with.
const DISK: &str = "backtide:disk/";

/// What a certificate without names of disks means.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WhichDisks {
    /// It speaks for every disk.
    #[default]
    Any,
    /// It speaks for none.
    Named,
}

/// The disks that a peer may speak for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rights {
    /// Names, or their beginnings with `*` at the end; none: every disk.
    disks: Option<Vec<String>>,
    /// Whose certificate says so.
    subject: String,
}

impl Rights {
    /// For every disk: of a peer that reached a socket nobody else can reach.
    pub fn all() -> Self {
        Self::default()
    }

    /// For no disk: of a peer whose certificate cannot be read.
    pub fn none() -> Self {
        Self { disks: Some(Vec::new()), subject: "somebody unknown".to_owned() }
    }

    /// What a verified certificate gives.
    pub fn of(certificate: &Certificate, otherwise: WhichDisks) -> Self {
        let named: Vec<String> =
            certificate.uris.iter().filter_map(|uri| uri.strip_prefix(DISK)).map(str::to_owned).collect();
        let disks = match (named.is_empty(), otherwise) {
            (true, WhichDisks::Any) => None,
            (true, WhichDisks::Named) | (false, _) => Some(named),
        };
        Self { disks, subject: certificate.subject.clone() }
    }

    /// Whether the peer may speak for `disk`.
    ///
    /// # Errors
    /// A sentence that names certificate and disk.
    pub fn check(&self, disk: &DiskName) -> Result<(), String> {
        let Some(disks) = &self.disks else { return Ok(()) };
        let name = disk.as_str();
        let fits = |pattern: &String| match pattern.strip_suffix('*') {
            Some(beginning) => name.starts_with(beginning),
            None => name == pattern,
        };
        if disks.iter().any(fits) {
            return Ok(());
        }
        let subject = &self.subject;
        Err(match disks.is_empty() {
            true => format!(
                "the certificate of {subject} names no disk, and this receiver asks for names: it may not speak for disk {name}"
            ),
            false => {
                format!("the certificate of {subject} speaks for {}, not for disk {name}", disks.join(", "))
            }
        })
    }

    /// The URI that gives a certificate the right to a disk, or to all that begin so with `*`.
    pub fn uri(pattern: &str) -> String {
        format!("{DISK}{pattern}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rights(patterns: &[&str], otherwise: WhichDisks) -> Rights {
        let certificate = Certificate {
            subject: "kvm-3".into(),
            hosts: vec![],
            uris: patterns
                .iter()
                .map(|pattern| Rights::uri(pattern))
                .chain(["spiffe://x/y".into()])
                .collect(),
            not_before: Default::default(),
            not_after: Default::default(),
        };
        Rights::of(&certificate, otherwise)
    }

    #[test]
    fn a_certificate_speaks_for_the_disks_it_names() {
        let allowed = |rights: &Rights, disk: &str| rights.check(&disk.parse().unwrap()).is_ok();
        let some = rights(&["vm1", "db-*"], WhichDisks::Any);
        for (disk, expected) in
            [("vm1", true), ("db-", true), ("db-7", true), ("vm11", false), ("xdb-7", false)]
        {
            assert_eq!(allowed(&some, disk), expected, "{disk}");
        }
        assert!(allowed(&rights(&["*"], WhichDisks::Named), "vm1"));
        assert!(allowed(&rights(&[], WhichDisks::Any), "vm1"));
        assert!(allowed(&Rights::all(), "vm1") && !allowed(&Rights::none(), "vm1"));
        let none = rights(&[], WhichDisks::Named).check(&"vm1".parse().unwrap()).unwrap_err();
        assert!(none.contains("kvm-3 names no disk"), "{none}");
        let other = some.check(&"web".parse().unwrap()).unwrap_err();
        assert_eq!(other, "the certificate of kvm-3 speaks for vm1, db-*, not for disk web");
    }
}
