//! How an image looked: what tells whether somebody else has written it since.

use std::{
    fs::Metadata,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::UNIX_EPOCH,
};

use backtide_units::ByteCount;
use serde::{Deserialize, Serialize};

/// Enough of an image's state to notice that somebody else wrote it, or a file that has its content.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ImageStamp {
    pub(crate) size: ByteCount,
    pub(crate) modified_ns: u64,
    #[serde(default)]
    pub(crate) inode: u64,
    /// The same of its [data files](super::DiskRecord::data_files).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) data: Vec<Self>,
}

impl ImageStamp {
    /// Of an image with the data files it has. None where one of them does not tell.
    pub(crate) fn with(path: &Path, data: &[PathBuf]) -> Option<Self> {
        Self::of(path)?.and(data)
    }

    /// The same with data files. None where one of them does not tell.
    pub(crate) fn and(self, data: &[PathBuf]) -> Option<Self> {
        let data = data.iter().map(|file| Self::of(file)).collect::<Option<_>>()?;
        Some(Self { data, ..self })
    }

    /// Of the regular file at `path`. Devices and NBD servers do not tell when they were written.
    pub(crate) fn of(path: &Path) -> Option<Self> {
        Self::found(&std::fs::metadata(path).ok()?)
    }

    /// The same of what was found there.
    pub(crate) fn found(metadata: &Metadata) -> Option<Self> {
        if !metadata.is_file() {
            return None;
        }
        let since = metadata.modified().ok()?.duration_since(UNIX_EPOCH).ok()?;
        Some(Self {
            size: ByteCount(metadata.len()),
            modified_ns: u64::try_from(since.as_nanos()).ok()?,
            inode: metadata.ino(),
            data: Vec::new(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_looks_as_its_data_files_do() {
        let directory = tempfile::tempdir().unwrap();
        let [image, data] = ["vm1.qcow2", "vm1.raw"].map(|name| directory.path().join(name));
        std::fs::write(&image, "tables").unwrap();
        std::fs::write(&data, "content").unwrap();
        let look = || ImageStamp::with(&image, std::slice::from_ref(&data));
        let before = look().unwrap();
        assert_eq!(look().as_ref(), Some(&before));
        assert!(ImageStamp::of(&image) != Some(before.clone()));
        // As a copy that keeps the time.
        std::fs::copy(&data, directory.path().join("copy")).unwrap();
        let time = std::fs::metadata(&data).unwrap().modified().unwrap();
        let copy = std::fs::File::options().write(true).open(directory.path().join("copy")).unwrap();
        copy.set_modified(time).unwrap();
        std::fs::rename(directory.path().join("copy"), &data).unwrap();
        assert!(look().unwrap() != before);
        assert_eq!(serde_json::from_str::<ImageStamp>(&serde_json::to_string(&look()).unwrap()).ok(), look());
        std::fs::remove_file(&data).unwrap();
        assert_eq!(look(), None);
        // One of a record that knows of no such files.
        let plain = ImageStamp::of(&image).unwrap();
        let text = serde_json::to_value(&plain).unwrap();
        assert!(text.get("data").is_none(), "{text}");
        assert_eq!(serde_json::from_value::<ImageStamp>(text).unwrap(), plain);
    }
}
