//! What keeps a file from being read.

use std::io;

use thiserror::Error;

use crate::fields::Short;

/// Why something on a volume cannot be given.
#[derive(Debug, Error)]
pub enum Error {
    /// A structure says what cannot be.
    #[error("{what} is damaged: {why}")]
    Damaged {
        /// The structure, such as `inode 131`.
        what: String,
        /// What is wrong with it.
        why: String,
    },
    /// It is there and well, and this crate cannot read it.
    #[error("{what}, which is not read here")]
    Unsupported {
        /// What it is, and which.
        what: String,
    },
    /// More of something than is read.
    #[error("{what} has more {of} than the {limit} that are read here")]
    TooMany {
        /// The structure.
        what: String,
        /// What there is too much of.
        of: &'static str,
        /// How many are read.
        limit: u64,
    },
    /// No such file.
    #[error("there is no {path}")]
    NotFound {
        /// Its path.
        path: String,
    },
    /// A path leads through a file that is no directory.
    #[error("{path} is no directory")]
    NotADirectory {
        /// The path of that file.
        path: String,
    },
    /// Symbolic links that lead to each other, or too many of them.
    #[error("{path} leads through more than {limit} symbolic links")]
    TooManyLinks {
        /// The path that was asked for.
        path: String,
        /// How many are followed.
        limit: usize,
    },
    /// The bytes could not be had.
    #[error("read {what}")]
    Io {
        /// The structure.
        what: String,
        /// Why not.
        source: io::Error,
    },
}

impl Error {
    /// A damaged structure.
    pub(crate) fn damaged(what: impl Into<String>, why: impl Into<String>) -> Self {
        Self::Damaged { what: what.into(), why: why.into() }
    }

    /// The same, with the name of the structure when it has none yet.
    #[must_use]
    pub(crate) fn of(self, name: impl FnOnce() -> String) -> Self {
        match self {
            Self::Damaged { what, why } if what.is_empty() => Self::Damaged { what: name(), why },
            Self::Io { what, source } if what.is_empty() => Self::Io { what: name(), source },
            other => other,
        }
    }
}

/// To be named by whoever knows which structure it is, with [`Error::of`].
impl From<Short> for Error {
    fn from(Short: Short) -> Self {
        Self::damaged("", "it ends too early")
    }
}

/// To be named by whoever knows which structure it is, with `Error::of`.
impl From<io::Error> for Error {
    fn from(source: io::Error) -> Self {
        Self::Io { what: String::new(), source }
    }
}
