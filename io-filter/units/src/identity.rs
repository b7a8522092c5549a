//! Who is who: disks, their names, and the histories receivers keep of them.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// A disk's identity for life; its name may change, this does not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct DiskId(pub Uuid);

/// Identity of one disk's log at one receiver: tells a continued log from a foreign one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct HistoryId(pub Uuid);

/// A disk's name: what people type and the name of its NBD export.
///
/// 1 to 64 characters out of letters, digits, `-`, `_` and `.`, not starting with `.` or `-`: it is
/// used in paths and URIs as it stands.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct DiskName(String);

/// Text that cannot be a disk's name.
#[derive(Debug, thiserror::Error)]
#[error(
    "{found:?} cannot be a disk name: use 1 to 64 letters, digits, '-', '_' or '.', beginning with a letter, digit or '_'"
)]
pub struct InvalidDiskName {
    found: String,
}

const NAME_LENGTH_MAX: usize = 64;

impl DiskId {
    /// A new random identity.
    pub fn random() -> Self {
        Self(Uuid::new_v4())
    }
}

impl HistoryId {
    /// A new random identity.
    pub fn random() -> Self {
        Self(Uuid::new_v4())
    }
}

impl DiskName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether it is written as a [`DiskId`] is. Where a disk may be named by either, it would name another disk.
    pub fn is_written_as_id(&self) -> bool {
        Uuid::try_parse(&self.0).is_ok_and(|id| id.to_string() == self.0)
    }
}

impl FromStr for DiskName {
    type Err = InvalidDiskName;

    fn from_str(text: &str) -> Result<Self, InvalidDiskName> {
        let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        let good = !text.is_empty()
            && text.len() <= NAME_LENGTH_MAX
            && text.chars().all(allowed)
            && !text.starts_with(['.', '-']);
        if good { Ok(Self(text.to_owned())) } else { Err(InvalidDiskName { found: text.to_owned() }) }
    }
}

impl TryFrom<String> for DiskName {
    type Error = InvalidDiskName;

    fn try_from(text: String) -> Result<Self, InvalidDiskName> {
        text.parse()
    }
}

impl From<DiskName> for String {
    fn from(name: DiskName) -> Self {
        name.0
    }
}

impl fmt::Display for DiskId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for HistoryId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for DiskName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_safe_in_paths_and_uris() {
        for good in ["vm1", "vm-1.root", "_x", "a".repeat(64).as_str()] {
            assert!(good.parse::<DiskName>().is_ok(), "{good}");
        }
        for bad in ["", ".", "..", "a/b", "-x", "a b", "ü", "a".repeat(65).as_str()] {
            assert!(bad.parse::<DiskName>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_name_is_an_id_as_ids_are_written_only() {
        let is_id = |text: &str| text.parse::<DiskName>().unwrap().is_written_as_id();
        assert!(is_id(&DiskId::random().to_string()) && is_id("6f1c0a1e-9d56-4c8f-b1d3-0a52d4a51c11"));
        assert!(!is_id("6F1C0A1E-9D56-4C8F-B1D3-0A52D4A51C11") && !is_id("6f1c0a1e9d564c8fb1d30a52d4a51c11"));
        assert!(!is_id("disk-6f1c0a1e-9d56-4c8f-b1d3-0a52d4a51c11") && !is_id("vm1"));
    }

    #[test]
    fn a_bad_name_is_refused_in_json_too() {
        assert!(serde_json::from_str::<DiskName>("\"../etc\"").is_err());
    }
}
