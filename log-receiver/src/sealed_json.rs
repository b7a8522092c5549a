//! Small files of a store that are read whole and replaced whole: three lines of JSON. `FORMAT.md` beside this crate describes
//! them, and what each kind says.
//!
//! Invariants: a file of another version is told apart from one that is damaged, for it is somebody's; one that is cut anywhere,
//! or of which any bit is another one, is damaged.

use std::{io, path::Path};

use backtide_storage::{Storage, read_file, replace_file};
use backtide_units::ByteCount;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// Bytes of the last line.
const SEAL_LENGTH: usize = r#"{"crc32c":"00000000"}"#.len() + 1;

/// A kind of file.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SealedJson {
    /// The first word of every file of this kind.
    pub(crate) magic: &'static str,
    /// The version that is read and written.
    pub(crate) version: u32,
    /// One that is longer is not read: an error of the file system.
    pub(crate) bytes_max: ByteCount,
}

/// Why a file says nothing.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SealedError {
    /// The file system's.
    #[error("{file} cannot be read: {source}")]
    Io {
        /// The file.
        file: String,
        /// Why.
        source: io::Error,
    },
    /// It is not what somebody wrote.
    #[error("{file} is damaged: {why}")]
    Damaged {
        /// The file.
        file: String,
        /// What was expected and found.
        why: String,
    },
    /// A newer program wrote it: it is whole, and not ours to change.
    #[error(
        "{file} has version {found}, this build reads version {known}: use the backtide that wrote it, or a newer one"
    )]
    Version {
        /// The file.
        file: String,
        /// As it says.
        found: u32,
        /// Ours.
        known: u32,
    },
}

/// The first line.
#[derive(Serialize, Deserialize)]
struct Head {
    magic: String,
    version: u32,
}

impl SealedJson {
    /// What a file says; none when there is no such file.
    ///
    /// # Errors
    /// See [`SealedError`].
    pub(crate) fn read<T: DeserializeOwned>(
        &self,
        storage: &dyn Storage,
        path: &Path,
    ) -> Result<Option<T>, SealedError> {
        let file = || storage.display(path).display().to_string();
        match read_file(storage, path, self.bytes_max) {
            Ok(bytes) => self.decode(&bytes, &file).map(Some),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(SealedError::Io { file: file(), source }),
        }
    }

    /// How a file is damaged, a sentence; none when it is whole, is not there, or nobody can tell.
    pub(crate) fn damage_of<T: DeserializeOwned>(
        &self,
        storage: &dyn Storage,
        path: &Path,
    ) -> Option<String> {
        match self.read::<T>(storage, path) {
            Err(error @ SealedError::Damaged { .. }) => Some(error.to_string()),
            Ok(_) | Err(SealedError::Io { .. } | SealedError::Version { .. }) => None,
        }
    }

    fn decode<T: DeserializeOwned>(&self, bytes: &[u8], file: &dyn Fn() -> String) -> Result<T, SealedError> {
        let damaged = |why: String| SealedError::Damaged { file: file(), why };
        let (Head { magic, version }, rest) = unseal(bytes).map_err(damaged)?;
        if magic != self.magic {
            return Err(damaged(format!("expected magic {}, found {magic:?}", self.magic)));
        }
        if version != self.version {
            return Err(SealedError::Version { file: file(), found: version, known: self.version });
        }
        serde_json::from_slice(rest).map_err(|error| damaged(error.to_string()))
    }

    /// Replaces a file, durably and whole.
    ///
    /// # Errors
    /// The file system's: then the old file is there, or the new one.
    pub(crate) fn write<T: Serialize>(
        &self,
        storage: &dyn Storage,
        path: &Path,
        content: &T,
    ) -> io::Result<()> {
        replace_file(storage, path, &self.encode(content))
    }

    /// The bytes of a file.
    pub(crate) fn encode<T: Serialize>(&self, content: &T) -> Vec<u8> {
        let head = Head { magic: self.magic.to_owned(), version: self.version };
        let mut bytes = line(&head);
        bytes.extend(line(content));
        let seal = seal(&bytes);
        bytes.extend_from_slice(seal.as_bytes());
        bytes
    }
}

/// What any file says whose seal is whole: its magic, its version, and its content; or what is wrong with it.
pub(crate) fn open_any(bytes: &[u8]) -> Result<(String, u32, serde_json::Value), String> {
    let (Head { magic, version }, rest) = unseal(bytes)?;
    let content = serde_json::from_slice(rest).map_err(|error| error.to_string())?;
    Ok((magic, version, content))
}

/// The magic of any JSON, damaged or not; none when it tells none.
pub(crate) fn first_word(bytes: &[u8]) -> Option<String> {
    let value: serde_json::Value = serde_json::from_slice(bytes).ok()?;
    value.get("magic")?.as_str().map(str::to_owned)
}

/// The first line and the rest before the seal, which is checked.
fn unseal(bytes: &[u8]) -> Result<(Head, &[u8]), String> {
    let Some((said, found)) = bytes.split_at_checked(bytes.len().saturating_sub(SEAL_LENGTH)) else {
        return Err("it is empty".to_owned());
    };
    let expected = seal(said);
    if found != expected.as_bytes() {
        let (found, expected) = (String::from_utf8_lossy(found), expected.trim_end());
        return Err(format!("expected it to end with {expected}, found {:?}", found.trim_end()));
    }
    let first = said.iter().position(|byte| *byte == b'\n').map(|end| said.split_at(end));
    match first.map(|(first, rest)| (serde_json::from_slice(first), rest)) {
        Some((Ok(head), rest)) => Ok((head, rest)),
        Some((Err(_), _)) | None => Err("its first line does not say what it is".to_owned()),
    }
}

fn line(content: &impl Serialize) -> Vec<u8> {
    let mut bytes = serde_json::to_vec(content).expect("plain data becomes JSON");
    bytes.push(b'\n');
    bytes
}

fn seal(said: &[u8]) -> String {
    format!("{{\"crc32c\":\"{:08x}\"}}\n", crc32c::crc32c(said))
}

/// Puts the checksum right of bytes that somebody has changed, when they are long enough to have one.
#[cfg(test)]
pub(crate) fn reseal(bytes: &mut [u8]) {
    if let Some(at) = bytes.len().checked_sub(SEAL_LENGTH) {
        let seal = seal(&bytes[..at]);
        bytes[at..].copy_from_slice(seal.as_bytes());
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use backtide_storage::MemoryStorage;

    use super::*;

    type Content = BTreeMap<String, u64>;

    const KIND: SealedJson = SealedJson { magic: "backtide-test", version: 3, bytes_max: ByteCount(4096) };

    fn read_bytes(bytes: &[u8]) -> Result<Option<Content>, SealedError> {
        let storage = MemoryStorage::new();
        replace_file(&storage, Path::new("x.json"), bytes).expect("no fault");
        KIND.read(&storage, Path::new("x.json"))
    }

    #[test]
    fn what_was_written_is_read_and_its_layout_is_what_is_said() {
        let (storage, path) = (MemoryStorage::new(), Path::new("x.json"));
        assert!(KIND.read::<Content>(&storage, path).expect("there is none").is_none());
        let content = Content::from([("a\nb".to_owned(), 7)]);
        KIND.write(&storage, path, &content).expect("no fault");
        storage.crash(1);
        assert_eq!(KIND.read(&storage, path).expect("it is whole"), Some(content));
        let bytes = read_file(&storage, path, ByteCount(4096)).expect("a file");
        let (said, sum) = ("{\"magic\":\"backtide-test\",\"version\":3}\n{\"a\\nb\":7}\n", "{\"crc32c\":\"");
        assert!(bytes.starts_with(format!("{said}{sum}").as_bytes()), "{}", String::from_utf8_lossy(&bytes));
    }

    #[test]
    fn any_flipped_bit_any_cut_and_anything_added_is_damage_and_never_another_content() {
        let right = KIND.encode(&Content::from([("place".to_owned(), 7), ("x".to_owned(), 1)]));
        let is_damaged = |bytes: &[u8], how: &str| {
            let read = read_bytes(bytes);
            assert!(matches!(read, Err(SealedError::Damaged { .. })), "{how}: {read:?}");
        };
        for at in 0..right.len() * 8 {
            let mut bytes = right.clone();
            bytes[at / 8] ^= 1 << (at % 8);
            is_damaged(&bytes, &format!("bit {at}"));
        }
        for length in 0..right.len() {
            is_damaged(&right[..length], &format!("cut at {length}"));
            is_damaged(&right[right.len() - length..], &format!("the last {length} bytes"));
        }
        for more in [&b"\n"[..], b" ", b"{}\n", &right] {
            is_damaged(&[&right, more].concat(), "something behind it");
            is_damaged(&[more, &right].concat(), "something before it");
        }
        let other = SealedJson { magic: "backtide-other", ..KIND }.encode(&Content::new());
        is_damaged(&other, "another kind of file");
        is_damaged(&KIND.encode(&"no map"), "another content");
    }

    #[test]
    fn a_file_of_another_version_is_told_whatever_it_says() {
        let newer = SealedJson { version: 4, ..KIND }.encode(&["something", "else"]);
        match read_bytes(&newer) {
            Err(error @ SealedError::Version { found: 4, known: 3, .. }) => {
                assert!(error.to_string().starts_with("x.json has version 4, this build reads version 3"));
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn one_that_is_longer_than_any_can_be_is_not_read() {
        let long = KIND.encode(&Content::from([("x".repeat(5000), 1)]));
        assert!(matches!(read_bytes(&long), Err(SealedError::Io { .. })), "{:?}", read_bytes(&long));
    }
}
