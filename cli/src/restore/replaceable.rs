//! A place that one file of a point goes to.

use std::{fs, io, path::Path};

use backtide_control::{ApiError, ErrorCode};

use crate::{
    ending::{Failure, io_failure},
    restore::{
        held::Held,
        target::{hold_unless_live, refuse_store},
    },
};

/// What has the name until the copy gets it: nothing, or a file that is held.
#[derive(Debug)]
pub(crate) enum Replaceable {
    /// Nothing may have it.
    Free,
    /// A file may lose it; that which had it at the beginning is held.
    File(Option<Held>),
}

impl Replaceable {
    /// Looks at `path` before anything is copied to it.
    ///
    /// # Errors
    /// `exists` when there is something, unless it may be replaced; that may only a regular file, which no agent protects.
    /// `refused` for a place in a daemon's directory.
    pub(crate) fn at(path: &Path, replace: bool) -> Result<Self, Failure> {
        let failed = |error: io::Error| io_failure(path.display(), &error);
        let absolute = std::path::absolute(path).map_err(failed)?;
        refuse_store(absolute.parent().unwrap_or(Path::new("/")))?;
        let found = match fs::symlink_metadata(path) {
            Ok(found) => found,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Ok(if replace { Self::File(None) } else { Self::Free });
            }
            Err(error) => return Err(failed(error)),
        };
        let refused = match (replace, found.is_file()) {
            (true, true) => return hold_unless_live(path).map(Some).map(Self::File),
            (true, false) => ApiError::new(
                ErrorCode::Refused,
                format!("{} is no regular file, and --force replaces nothing else", path.display()),
            ),
            (false, _) => ApiError::new(ErrorCode::Exists, format!("{} exists already", path.display())),
        };
        let hint = if found.is_file() && !replace {
            "take another name, or --force to replace it"
        } else {
            "take another name"
        };
        Err(refused.with_hint(hint).into())
    }

    /// What has the name when the copy is whole, and is replaced by it; to be held until it is. None when nothing has.
    ///
    /// # Errors
    /// `locked` when it is not what was there, and somebody uses it.
    pub(crate) fn still(self, path: &Path) -> Result<Option<Held>, Failure> {
        match self {
            Self::Free => Ok(None),
            Self::File(held) => Held::now(held, path)
                .map_err(|why| why.failure(path, "detach the disk first, or take another name")),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn code(result: Result<Replaceable, Failure>) -> Option<ErrorCode> {
        match result {
            Ok(_) => None,
            Err(Failure::Error(error)) => Some(error.code),
            Err(other) => panic!("{other:?}"),
        }
    }

    #[test]
    fn only_a_file_that_nobody_uses_is_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let [file, link, inner, none] =
            ["file", "link", "inner", "none"].map(|name| directory.path().join(name));
        fs::write(&file, "old").unwrap();
        symlink(&file, &link).unwrap();
        fs::create_dir(&inner).unwrap();
        assert_eq!(code(Replaceable::at(&none, false)), None);
        assert_eq!(code(Replaceable::at(&none, true)), None);
        assert_eq!(code(Replaceable::at(&file, false)), Some(ErrorCode::Exists));
        for other in [link.as_path(), &inner, Path::new("/dev/null")] {
            assert_eq!(code(Replaceable::at(other, true)), Some(ErrorCode::Refused), "{}", other.display());
        }
        let held = Replaceable::at(&file, true).unwrap();
        // As an agent would be kept from it meanwhile, so is another copy.
        assert_eq!(code(Replaceable::at(&file, true)), Some(ErrorCode::Locked));
        assert!(held.still(&file).unwrap().is_some());
        assert_eq!(code(Replaceable::at(&file, true)), None, "let go of again");
    }

    #[test]
    fn nothing_goes_into_a_store() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("store.json"), "{}").unwrap();
        for replace in [false, true] {
            let inside = directory.path().join("segment");
            assert_eq!(code(Replaceable::at(&inside, replace)), Some(ErrorCode::Refused));
        }
    }
}
