//! NBD URIs, as the NBD URI specification has them: `nbd://host:port/export` and
//! `nbd+unix:///export?socket=/path`; `nbds://` and `nbds+unix://` with TLS, which need
//! `tls-certificates=DIR` and take `tls-hostname=NAME`.
//!
//! Unknown query parameters are refused, for they would change what the user means.

use std::{ffi::OsString, fmt, os::unix::ffi::OsStrExt, os::unix::ffi::OsStringExt, path::PathBuf};

use crate::wire::DEFAULT_PORT;

/// Where an NBD server listens.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum NbdAddress {
    /// A TCP port.
    Tcp {
        /// Name or address, IPv6 without brackets.
        host: String,
        /// The port.
        port: u16,
    },
    /// A unix socket.
    Unix(PathBuf),
}

/// A server and one of its exports.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct NbdUri {
    /// Where the server listens.
    pub address: NbdAddress,
    /// The export's name; "" is the default export.
    pub export: String,
    /// How to encrypt, if it shall be.
    pub tls: Option<UriTls>,
}

impl NbdUri {
    /// Whether who listens here serves other machines in the clear, as far as the address tells: TCP that is not on loopback,
    /// without TLS or with one that clients may go without.
    pub fn is_open_to_others(&self) -> bool {
        let NbdAddress::Tcp { host, .. } = &self.address else { return false };
        let loopback = host.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.to_canonical().is_loopback());
        !loopback && host != "localhost" && self.tls.as_ref().is_none_or(|tls| !tls.required)
    }
}

/// What a URI with TLS says about it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct UriTls {
    /// The folder of certificates and keys.
    pub certificates: PathBuf,
    /// The name the server's certificate must be for, where it is not the host's.
    pub hostname: Option<String>,
    /// Where it says where to listen: nobody is served without TLS. Always so in a URI as text.
    pub required: bool,
}

/// Text that is no NBD URI we can use.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseUriError {
    /// TLS is wanted, and nothing to check the peer with.
    #[error("{0:?} asks for TLS but names no certificates: add tls-certificates=DIR")]
    NoCertificates(String),
    /// Another scheme.
    #[error(
        "expected nbd://host:port/export or nbd+unix:///export?socket=/path (nbds with TLS), found {0:?}"
    )]
    Scheme(String),
    /// A unix URI without its socket.
    #[error("{0:?} names no socket: expected nbd+unix:///export?socket=/path")]
    NoSocket(String),
    /// Something in it cannot be understood.
    #[error("{uri:?} has {problem}")]
    Malformed {
        /// The text.
        uri: String,
        /// What is wrong with it.
        problem: &'static str,
    },
}

/// What the kernel takes (`sun_path` of unix(7), less the byte that ends it).
const SOCKET_PATH_BYTES_MAX: usize = 107;

impl std::str::FromStr for NbdUri {
    type Err = ParseUriError;

    fn from_str(text: &str) -> Result<Self, ParseUriError> {
        let malformed = |problem| ParseUriError::Malformed { uri: text.to_owned(), problem };
        let (scheme, rest) = text.split_once("://").ok_or_else(|| ParseUriError::Scheme(text.to_owned()))?;
        if rest.contains('#') {
            return Err(malformed("a fragment"));
        }
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        let export = decoded(path)
            .and_then(|name| String::from_utf8(name).ok())
            .ok_or_else(|| malformed("an export name that is not percent-encoded UTF-8"))?;
        let scheme = scheme.to_ascii_lowercase();
        let (secure, unix) = match scheme.as_str() {
            "nbd" => (false, false),
            "nbd+unix" => (false, true),
            "nbds" => (true, false),
            "nbds+unix" => (true, true),
            _ => return Err(ParseUriError::Scheme(text.to_owned())),
        };
        let mut query = Query::parse(query, secure, unix).map_err(malformed)?;
        let address = if unix {
            if !authority.is_empty() {
                return Err(malformed("a host, which a unix socket has not (three slashes)"));
            }
            let socket = query.socket.take().filter(|socket| !socket.is_empty());
            let socket = socket.ok_or_else(|| ParseUriError::NoSocket(text.to_owned()))?;
            if socket.len() > SOCKET_PATH_BYTES_MAX {
                return Err(malformed("a socket path of more than 107 bytes, which no unix socket can have"));
            }
            NbdAddress::Unix(path_of(socket))
        } else {
            tcp(authority).map_err(malformed)?
        };
        let tls = if secure {
            let folder = query.certificates.filter(|folder| !folder.is_empty());
            let folder = folder.ok_or_else(|| ParseUriError::NoCertificates(text.to_owned()))?;
            Some(UriTls { certificates: path_of(folder), hostname: query.hostname, required: true })
        } else {
            None
        };
        Ok(Self { address, export, tls })
    }
}

/// The parameters after the question mark, decoded.
#[derive(Default)]
struct Query {
    socket: Option<Vec<u8>>,
    certificates: Option<Vec<u8>>,
    hostname: Option<String>,
}

impl Query {
    fn parse(text: &str, secure: bool, unix: bool) -> Result<Self, &'static str> {
        let mut query = Self::default();
        for parameter in text.split('&').filter(|parameter| !parameter.is_empty()) {
            let (key, value) = parameter.split_once('=').unwrap_or((parameter, ""));
            let value = decoded(value).ok_or("a bad percent encoding")?;
            let twice = match key {
                "socket" if unix => query.socket.replace(value).is_some(),
                "tls-certificates" if secure => query.certificates.replace(value).is_some(),
                "tls-hostname" if secure => {
                    let name = String::from_utf8(value).map_err(|_| "a host name that is not UTF-8")?;
                    query.hostname.replace(name).is_some()
                }
                _ => return Err("an unknown query parameter"),
            };
            if twice {
                return Err("a query parameter twice");
            }
        }
        Ok(query)
    }
}

fn path_of(bytes: Vec<u8>) -> PathBuf {
    PathBuf::from(OsString::from_vec(bytes))
}

fn tcp(authority: &str) -> Result<NbdAddress, &'static str> {
    if authority.contains('@') {
        return Err("a user name, which means nothing without TLS");
    }
    let (host, port) = if let Some(bracketed) = authority.strip_prefix('[') {
        let (host, rest) = bracketed.split_once(']').ok_or("a bracket that is not closed")?;
        if !rest.is_empty() && !rest.starts_with(':') {
            return Err("text after the bracket");
        }
        (host, rest.strip_prefix(':'))
    } else {
        match authority.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (authority, None),
        }
    };
    if host.is_empty() {
        return Err("no host");
    }
    let port = match port {
        None | Some("") => DEFAULT_PORT,
        Some(port) => port.parse().ok().filter(|&port| port > 0).ok_or("a bad port")?,
    };
    Ok(NbdAddress::Tcp { host: host.to_owned(), port })
}

/// The bytes of a percent-encoded text.
fn decoded(text: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let mut digit = || char::from(rest.next()?).to_digit(16);
        let (high, low) = (digit()?, digit()?);
        bytes.push((high * 16 + low) as u8);
    }
    Some(bytes)
}

/// Percent-encodes all but the characters every part of a URI may have.
fn encode(f: &mut fmt::Formatter<'_>, bytes: &[u8]) -> fmt::Result {
    for &byte in bytes {
        if byte.is_ascii_alphanumeric() || b"-._~/:".contains(&byte) {
            write!(f, "{}", char::from(byte))?;
        } else {
            write!(f, "%{byte:02X}")?;
        }
    }
    Ok(())
}

impl fmt::Display for NbdUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.tls.is_some() { "nbds" } else { "nbd" })?;
        let mut separator = '?';
        match &self.address {
            NbdAddress::Tcp { host, port } => {
                if host.contains(':') {
                    write!(f, "://[{host}]")?;
                } else {
                    write!(f, "://{host}")?;
                }
                if *port != DEFAULT_PORT {
                    write!(f, ":{port}")?;
                }
                f.write_str("/")?;
                encode(f, self.export.as_bytes())?;
            }
            NbdAddress::Unix(path) => {
                f.write_str("+unix:///")?;
                encode(f, self.export.as_bytes())?;
                f.write_str("?socket=")?;
                encode(f, path.as_os_str().as_bytes())?;
                separator = '&';
            }
        }
        let Some(tls) = &self.tls else { return Ok(()) };
        write!(f, "{separator}tls-certificates=")?;
        encode(f, tls.certificates.as_os_str().as_bytes())?;
        if let Some(hostname) = &tls.hostname {
            f.write_str("&tls-hostname=")?;
            encode(f, hostname.as_bytes())?;
        }
        Ok(())
    }
}

impl fmt::Display for NbdAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host, port } if host.contains(':') => write!(f, "tcp://[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "tcp://{host}:{port}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<NbdUri, ParseUriError> {
        text.parse()
    }

    fn unix(path: &str, export: &str) -> NbdUri {
        NbdUri { address: NbdAddress::Unix(path.into()), export: export.into(), tls: None }
    }

    fn tcp(host: &str, port: u16, export: &str) -> NbdUri {
        NbdUri { address: NbdAddress::Tcp { host: host.into(), port }, export: export.into(), tls: None }
    }

    #[test]
    fn the_specified_forms_parse() {
        assert_eq!(parse("nbd://localhost"), Ok(tcp("localhost", 10809, "")));
        assert_eq!(parse("nbd://h:1234/disk"), Ok(tcp("h", 1234, "disk")));
        assert_eq!(parse("nbd://[::1]:99//a"), Ok(tcp("::1", 99, "/a")));
        assert_eq!(parse("nbd+unix:///?socket=/run/x"), Ok(unix("/run/x", "")));
        assert_eq!(parse("NBD+UNIX:///a%20b?socket=/r%C3%A4"), Ok(unix("/rä", "a b")));
    }

    #[test]
    fn what_is_printed_parses_to_the_same() {
        for uri in [unix("/run/a b&c?.sock", "x/y z%"), tcp("::1", 10809, "ä#"), tcp("h", 1, "")] {
            assert_eq!(parse(&uri.to_string()), Ok(uri));
        }
    }

    #[test]
    fn tls_names_its_certificates() {
        let tls = |hostname: Option<&str>| {
            Some(UriTls {
                certificates: "/etc/pki".into(),
                hostname: hostname.map(str::to_owned),
                required: true,
            })
        };
        let parsed = parse("nbds://h:1/e?tls-certificates=/etc/pki");
        assert_eq!(parsed, Ok(NbdUri { tls: tls(None), ..tcp("h", 1, "e") }));
        let text = "nbds+unix:///e?tls-hostname=vm.example&socket=/s&tls-certificates=/etc%2Fpki";
        let uri = NbdUri { tls: tls(Some("vm.example")), ..unix("/s", "e") };
        assert_eq!(parse(text), Ok(uri.clone()));
        for uri in [uri, NbdUri { tls: tls(None), ..tcp("::1", 10809, "a b") }] {
            assert_eq!(parse(&uri.to_string()), Ok(uri));
        }
        for text in ["nbds://h/e", "nbds+unix:///?socket=/x", "nbds://h/e?tls-certificates="] {
            assert_eq!(parse(text), Err(ParseUriError::NoCertificates(text.to_owned())));
        }
    }

    #[test]
    fn a_socket_has_as_long_a_path_as_the_kernel_takes() {
        let of = |length: usize| parse(&format!("nbd+unix:///x?socket=/{}", "d".repeat(length - 1)));
        assert!(of(107).is_ok());
        let told = of(108).unwrap_err().to_string();
        assert!(told.contains("more than 107 bytes"), "{told}");
    }

    #[test]
    fn everything_else_is_refused() {
        for text in [
            "",
            "disk.img",
            "/dev/sda",
            "http://h/",
            "nbd://",
            "nbd://:1/x",
            "nbd://h:0/x",
            "nbd://h:70000/x",
            "nbd://u@h/x",
            "nbd://h/x?socket=/y",
            "nbd://h/x?tls-certificates=/y",
            "nbds://h/x?socket=/y&tls-certificates=/y",
            "nbds://h/x?tls-certificates=/y&tls-certificates=/z",
            "nbds://h/x?tls-certificates=/y&tls-verify-peer=0",
            "nbds://h/x?tls-certificates=/%z",
            "nbd://[::1/x",
            "nbd://h/%zz",
            "nbd://h/%f",
            "nbd://h/%ff",
            "nbd+unix:///x",
            "nbd+unix:///x?socket=",
            "nbd+unix://h/x?socket=/y",
            "nbd+unix:///x?socket=/y&tls=1",
            "nbd://h/x#frag",
        ] {
            assert!(parse(text).is_err(), "{text:?} was accepted");
        }
    }

    #[test]
    fn who_listens_off_loopback_in_the_clear_is_open_to_others() {
        let open = |text: &str| text.parse::<NbdUri>().unwrap().is_open_to_others();
        for text in ["nbd://0.0.0.0:1/d", "nbd://[::]:1/d", "nbd://10.0.0.5/d", "nbd://host/d"] {
            assert!(open(text), "{text}");
        }
        for text in [
            "nbd://127.0.0.1:1/d",
            "nbd://[::1]:1/d",
            "nbd://localhost/d",
            "nbds://0.0.0.0:1/d?tls-certificates=/c",
            "nbd+unix:///d?socket=/s",
        ] {
            assert!(!open(text), "{text}");
        }
        let mut optional: NbdUri = "nbds://0.0.0.0:1/d?tls-certificates=/c".parse().unwrap();
        optional.tls.as_mut().unwrap().required = false;
        assert!(optional.is_open_to_others());
    }
}
