//! Where a daemon listens, for its control API or for disks' streams.
//!
//! Text form, everywhere the same: `unix:/path`, `tcp://host:port` or, for streams, `tls://host:port`.

use std::{
    fmt,
    path::{Path, PathBuf},
    str::FromStr,
};

use serde::{Deserialize, Serialize};

/// A place to listen at or to connect to.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Address {
    /// A unix socket at this path.
    Unix(PathBuf),
    /// A TCP port. Port 0 listens on any free one.
    Tcp {
        /// Name or IP address, an IPv6 address without its brackets.
        host: String,
        /// Port number.
        port: u16,
    },
    /// A TCP port whose connections are under TLS. For disks' streams; a control API has none.
    Tls {
        /// Name or IP address, an IPv6 address without its brackets.
        host: String,
        /// Port number.
        port: u16,
    },
}

/// Text that is no address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{found:?} is no address: {problem} (write unix:/path, tcp://host:port or tls://host:port)")]
pub struct InvalidAddress {
    found: String,
    problem: &'static str,
}

/// The longest socket path the kernel takes (`sun_path` less its final zero).
pub(crate) const SOCKET_PATH_BYTES_MAX: usize = 107;

impl Address {
    /// The unix socket at `path`.
    pub fn unix(path: impl Into<PathBuf>) -> Self {
        Self::Unix(path.into())
    }

    /// The socket's path, when this is a unix socket.
    pub fn socket_path(&self) -> Option<&Path> {
        match self {
            Self::Unix(path) => Some(path),
            Self::Tcp { .. } | Self::Tls { .. } => None,
        }
    }

    fn parse(text: &str) -> Result<Self, &'static str> {
        if let Some(path) = text.strip_prefix("unix:") {
            return parse_unix(path);
        }
        if let Some(rest) = text.strip_prefix("tcp://") {
            return parse_tcp(rest).map(|(host, port)| Self::Tcp { host, port });
        }
        if let Some(rest) = text.strip_prefix("tls://") {
            return parse_tcp(rest).map(|(host, port)| Self::Tls { host, port });
        }
        if text.starts_with('/') {
            return Err("a path needs unix: before it");
        }
        Err("it begins with none of unix:, tcp:// and tls://")
    }
}

fn parse_unix(path: &str) -> Result<Address, &'static str> {
    // `unix:///path` is how curl and others write it; it means the same.
    let path = path.strip_prefix("//").unwrap_or(path);
    if !path.starts_with('/') {
        return Err("the path after unix: must begin with /");
    }
    if path.len() > SOCKET_PATH_BYTES_MAX {
        return Err("a unix socket's path has at most 107 bytes");
    }
    if path.contains('\0') {
        return Err("a path holds no zero byte");
    }
    Ok(Address::Unix(PathBuf::from(path)))
}

fn parse_tcp(rest: &str) -> Result<(String, u16), &'static str> {
    let rest = rest.strip_suffix('/').unwrap_or(rest);
    let (host, port) = rest.rsplit_once(':').ok_or("the port is missing")?;
    let host = match host.strip_prefix('[') {
        Some(inner) => inner.strip_suffix(']').ok_or("the bracket of the IPv6 address is open")?,
        None if host.contains(':') => return Err("an IPv6 address needs brackets"),
        None => host,
    };
    if host.is_empty() {
        return Err("the host is missing");
    }
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_' | ':' | '%');
    if !host.chars().all(plain) {
        return Err("the host holds characters that no host name has");
    }
    let port = port.parse().map_err(|_| "the port is no number from 0 to 65535")?;
    Ok((host.to_owned(), port))
}

impl FromStr for Address {
    type Err = InvalidAddress;

    fn from_str(text: &str) -> Result<Self, InvalidAddress> {
        Self::parse(text).map_err(|problem| InvalidAddress { found: text.to_owned(), problem })
    }
}

impl TryFrom<String> for Address {
    type Error = InvalidAddress;

    fn try_from(text: String) -> Result<Self, InvalidAddress> {
        text.parse()
    }
}

impl From<Address> for String {
    fn from(address: Address) -> Self {
        address.to_string()
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp { host, port } if host.contains(':') => write!(f, "tcp://[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "tcp://{host}:{port}"),
            Self::Tls { host, port } if host.contains(':') => write!(f, "tls://[{host}]:{port}"),
            Self::Tls { host, port } => write!(f, "tls://{host}:{port}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_come_back_as_written() {
        for text in [
            "unix:/run/backtide/agent.sock",
            "tcp://127.0.0.1:7300",
            "tcp://[::1]:0",
            "tcp://kvm-3:9",
            "tls://backup.example:7301",
            "tls://[::1]:7301",
        ] {
            assert_eq!(text.parse::<Address>().unwrap().to_string(), text);
        }
        assert_eq!("unix:///run/x".parse::<Address>().unwrap(), Address::unix("/run/x"));
    }

    #[test]
    fn every_refusal_says_what_is_wrong_and_how_to_write_it() {
        let long = format!("unix:/{}", "x".repeat(SOCKET_PATH_BYTES_MAX));
        for (text, problem) in [
            ("/run/agent.sock", "a path needs unix: before it"),
            ("unix:agent.sock", "must begin with /"),
            (long.as_str(), "at most 107 bytes"),
            ("tcp://host", "the port is missing"),
            ("tcp://host:99999", "no number from 0 to 65535"),
            ("tcp://:80", "the host is missing"),
            ("tcp://::1:80", "needs brackets"),
            ("tcp://a/b:80", "no host name has"),
            ("tls://host", "the port is missing"),
            ("http://host:80", "none of unix:, tcp:// and tls://"),
            ("", "none of unix:, tcp:// and tls://"),
        ] {
            let message = text.parse::<Address>().unwrap_err().to_string();
            assert!(message.contains(problem), "{text:?}: {message}");
            assert!(message.contains("write unix:/path, tcp://host:port or tls://host:port"), "{message}");
        }
    }
}
