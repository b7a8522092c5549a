//! The sockets a holder keeps, and what its agent says of them.

use std::{
    collections::BTreeMap,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

/// No agent has so many disks.
const KEPT_MAX: usize = 4096;

/// Kept sockets by name.
#[derive(Debug, Default)]
pub(super) struct Kept {
    sockets: BTreeMap<String, OwnedFd>,
}

/// What a message was about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Said {
    /// Kept sockets.
    Sockets,
    /// Anything else; whether the agent is ready.
    Other { ready: bool },
}

impl Kept {
    /// All of them, with their names.
    pub(super) fn sockets(&self) -> impl Iterator<Item = (&str, BorrowedFd<'_>)> {
        self.sockets.iter().map(|(name, socket)| (name.as_str(), socket.as_fd()))
    }

    /// Does what a message asks for.
    pub(super) fn note(&mut self, text: &str, sockets: Vec<OwnedFd>) -> Said {
        let has = |line: &str| text.lines().any(|other| other == line);
        let name = text.lines().find_map(|line| line.strip_prefix("FDNAME=")).filter(|name| !name.is_empty());
        if has("FDSTOREREMOVE=1") {
            if let Some(name) = name {
                self.sockets.remove(name);
            }
            return Said::Sockets;
        }
        if has("FDSTORE=1") {
            match (name, sockets.into_iter().next()) {
                (Some(name), Some(socket)) if self.sockets.len() < KEPT_MAX => {
                    self.sockets.insert(name.to_owned(), socket);
                }
                (Some(name), Some(_)) => tracing::error!(name, "too many sockets: this one is not kept"),
                (_, None) | (None, _) => tracing::warn!(text, "a socket to keep that is not there"),
            }
            return Said::Sockets;
        }
        Said::Other { ready: has("READY=1") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn socket() -> OwnedFd {
        std::os::unix::net::UnixDatagram::unbound().unwrap().into()
    }

    #[test]
    fn sockets_are_kept_until_they_are_not_wanted() {
        let mut kept = Kept::default();
        let names = |kept: &Kept| kept.sockets().map(|(name, _)| name.to_owned()).collect::<Vec<_>>();
        assert_eq!(kept.note("FDSTORE=1\nFDNAME=a", vec![socket()]), Said::Sockets);
        kept.note("FDSTORE=1\nFDNAME=b", vec![socket()]);
        kept.note("FDSTORE=1\nFDNAME=a", vec![socket()]);
        assert_eq!(names(&kept), ["a", "b"]);
        kept.note("FDSTOREREMOVE=1\nFDNAME=a", vec![]);
        kept.note("FDSTOREREMOVE=1\nFDNAME=unknown", vec![]);
        assert_eq!(names(&kept), ["b"]);
    }

    #[test]
    fn other_words_are_told_apart() {
        let mut kept = Kept::default();
        assert_eq!(kept.note("READY=1\nSTATUS=1 disk", vec![]), Said::Other { ready: true });
        assert_eq!(kept.note("STATUS=READY=1", vec![]), Said::Other { ready: false });
        assert_eq!(kept.note("FDSTORE=1\nFDNAME=a", vec![]), Said::Sockets);
        assert_eq!(kept.note("FDSTORE=1", vec![socket()]), Said::Sockets);
        assert_eq!(kept.sockets().count(), 0);
    }
}
