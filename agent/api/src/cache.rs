//! Whether a disk's image is read and written through the page cache.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// How an image is read and written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CacheMode {
    /// Through the page cache of the host; a flush of the guest writes it out.
    #[default]
    Writeback,
    /// Directly to the device.
    Direct,
}

impl CacheMode {
    /// Both, the default first.
    pub const ALL: [Self; 2] = [Self::Writeback, Self::Direct];

    /// The name in JSON and on the command line.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Writeback => "writeback",
            Self::Direct => "direct",
        }
    }
}

impl fmt::Display for CacheMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for CacheMode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL
            .into_iter()
            .find(|mode| mode.as_str() == text)
            .ok_or_else(|| format!("{text:?} is neither writeback nor direct"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_on_the_command_line_are_those_of_the_json() {
        for mode in CacheMode::ALL {
            assert_eq!(serde_json::to_value(mode).unwrap(), mode.as_str());
            assert_eq!(mode.as_str().parse(), Ok(mode));
        }
        assert!("none".parse::<CacheMode>().unwrap_err().contains("direct"));
    }
}
