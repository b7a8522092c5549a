//! How an image is laid out.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// What the bytes of an image file or block device are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ImageFormat {
    /// The disk's own bytes: the guest decides about all of them, those at the beginning too.
    Raw,
    /// A container of QEMU's.
    Qcow2,
}

impl ImageFormat {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Raw, Self::Qcow2];

    /// The name in JSON and on the command line.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

impl fmt::Display for ImageFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for ImageFormat {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let known = Self::ALL.into_iter().find(|format| format.as_str() == text);
        known.ok_or_else(|| format!("{text:?} is neither raw nor qcow2"))
    }
}
