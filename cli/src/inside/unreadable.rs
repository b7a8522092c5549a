//! What could not be read of a tree whose other files could.
//!
//! One damaged file keeps nobody from the others: it is left out, named and counted.

use backtide_control::ApiError;
use serde::Serialize;

use crate::output::printable;

/// Files that are named; more are counted.
const NAMED_MAX: usize = 1000;

/// A file that could not be read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct FileError {
    /// Its path.
    pub(crate) path: String,
    /// Why not.
    pub(crate) error: String,
}

/// All that could not be read.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Unreadable {
    /// How many files and directories.
    #[serde(rename = "unreadable")]
    pub(crate) count: u64,
    /// The first of them.
    pub(crate) errors: Vec<FileError>,
}

impl Unreadable {
    /// Notes one.
    pub(super) fn add(&mut self, path: impl ToString, why: &str) {
        self.count += 1;
        if self.errors.len() < NAMED_MAX {
            self.errors.push(FileError { path: path.to_string(), error: why.to_owned() });
        }
    }

    /// The same with what the volume said.
    pub(super) fn add_error(&mut self, path: impl ToString, error: &ApiError) {
        self.add(path, &error.message);
    }

    /// A sentence for each, and one for those that are not named.
    pub(crate) fn sentences(&self) -> Vec<String> {
        let sentence =
            |file: &FileError| format!("left out {}: {}", printable(&file.path), printable(&file.error));
        let mut sentences: Vec<_> = self.errors.iter().map(sentence).collect();
        let more = self.count - self.errors.len() as u64;
        if more > 0 {
            sentences.push(format!("left out {more} more that cannot be read"));
        }
        sentences
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_are_named_and_all_are_counted() {
        let mut unreadable = Unreadable::default();
        assert_eq!(unreadable.sentences(), [] as [String; 0]);
        for number in 0..1002 {
            unreadable.add(format!("/file {number}"), "it is damaged");
        }
        let sentences = unreadable.sentences();
        assert_eq!((unreadable.count, sentences.len()), (1002, 1001));
        assert_eq!(sentences[0], "left out /file 0: it is damaged");
        unreadable.errors[0].path = "/a\nwarning: b\u{1b}[2J".to_owned();
        assert_eq!(unreadable.sentences()[0], "left out /a\u{fffd}warning: b\u{fffd}[2J: it is damaged");
        assert_eq!(sentences[1000], "left out 2 more that cannot be read");
    }
}
