//! Whether an image's path still leads to the file that is open.
//!
//! While the agent has it, a file can be deleted, another one renamed over it, or cut short. The guest notices nothing of
//! the first two: what it writes goes to a file without a name, which is gone when the agent lets go of it.
//! So that is told at once, and a disk is not let go of as if nothing were the matter.
//!
//! Invariant: an image is trusted at the next attach only if it was in place at the end of the last.

use std::{
    fs,
    io::{self, ErrorKind},
    path::PathBuf,
};

use backtide_storage::ImageFile;
use backtide_units::ByteCount;

use crate::{claims::Identity, record::ImageStamp};

/// An image as it was opened.
#[derive(Clone, Debug)]
pub(crate) struct InPlace {
    path: PathBuf,
    identity: Identity,
    /// A raw file has at least the disk's size.
    bytes_min: ByteCount,
    /// The files that have its content besides.
    data_files: Vec<PathBuf>,
}

/// What became of it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Displaced {
    #[error("{} was deleted while it is in use: what the guest writes is in no file that can be opened", .0.display())]
    Gone(PathBuf),
    #[error("{} is another file than the one in use: what the guest writes is in the old one", .0.display())]
    Other(PathBuf),
    #[error("{} was cut to {now} bytes while it is in use, and the disk has {bytes_min}", path.display())]
    Shorter { path: PathBuf, now: ByteCount, bytes_min: ByteCount },
}

impl InPlace {
    /// The file at `path`, of which `identity` was taken before it was opened; none where there is no such file, as behind
    /// an NBD server. `bytes_min` is zero where the file's length says nothing.
    pub(crate) fn new(path: &str, identity: Identity, bytes_min: ByteCount) -> Option<Self> {
        let data_files = Vec::new();
        identity.is_file().then(|| Self { path: PathBuf::from(path), identity, bytes_min, data_files })
    }

    /// The same with data files, which are looked at for how the image looks.
    pub(crate) fn with_data(self, data_files: Vec<PathBuf>) -> Self {
        Self { data_files, ..self }
    }

    /// Looks, once; how the image looks, where that can be told. Waits for the file system.
    ///
    /// # Errors
    /// What became of it.
    pub(crate) fn look(&self) -> Result<Option<ImageStamp>, Displaced> {
        let path = || self.path.clone();
        let found = match fs::metadata(&self.path) {
            Ok(found) => found,
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
                return Err(Displaced::Gone(path()));
            }
            // Storage in trouble says nothing of where the file is.
            Err(_) => return Ok(None),
        };
        if !self.identity.is_of(&found) {
            return Err(Displaced::Other(path()));
        }
        match ImageStamp::found(&found) {
            Some(ImageStamp { size: now, .. }) if now < self.bytes_min => {
                Err(Displaced::Shorter { path: path(), now, bytes_min: self.bytes_min })
            }
            stamp => Ok(stamp.and_then(|stamp| stamp.and(&self.data_files))),
        }
    }
}

/// Looks whether an image, a file or a device, is as long as when it was opened.
///
/// # Errors
/// When it cannot be asked; within, that it was cut short.
pub(crate) fn look_at_length(open: &ImageFile) -> io::Result<Result<(), Displaced>> {
    let (now, bytes_min) = (open.size_now()?, open.size());
    Ok(match now < bytes_min {
        true => Err(Displaced::Shorter { path: open.path().to_owned(), now, bytes_min }),
        false => Ok(()),
    })
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink, path::Path};

    use super::*;

    #[test]
    fn what_becomes_of_an_image_is_told() {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("vm.img");
        let other = directory.path().join("other.img");
        let link = directory.path().join("link.img");
        fs::write(&image, [0; 8192]).unwrap();
        fs::write(&other, [0; 8192]).unwrap();
        symlink(&image, &link).unwrap();
        let of = |path: &Path| {
            let text = path.to_str().unwrap();
            InPlace::new(text, Identity::of(text), ByteCount(8192)).unwrap()
        };
        let (by_name, by_link) = (of(&image), of(&link));
        let stamp = ImageStamp::of(&image);
        assert_eq!((by_name.look(), by_link.look()), (Ok(stamp.clone()), Ok(stamp)));
        fs::remove_file(&link).unwrap();
        symlink(&other, &link).unwrap();
        assert_eq!(by_link.look(), Err(Displaced::Other(link)));
        fs::write(&image, [0; 4096]).unwrap();
        assert!(matches!(by_name.look(), Err(Displaced::Shorter { now: ByteCount(4096), .. })));
        fs::rename(&image, directory.path().join("kept")).unwrap();
        assert_eq!(by_name.look(), Err(Displaced::Gone(image.clone())));
        fs::rename(&other, &image).unwrap();
        assert_eq!(by_name.look(), Err(Displaced::Other(image)));
        // As of a device, which is looked at where it is open.
        let device = directory.path().join("device");
        fs::write(&device, [0; 8192]).unwrap();
        let open = ImageFile::open(&device).unwrap();
        assert_eq!(look_at_length(&open).unwrap(), Ok(()));
        fs::File::options().write(true).open(&device).unwrap().set_len(4096).unwrap();
        let cut = look_at_length(&open).unwrap();
        assert!(matches!(cut, Err(Displaced::Shorter { now: ByteCount(4096), .. })), "{cut:?}");
        assert!(InPlace::new("nbd://host/disk", Identity::of("nbd://host/disk"), ByteCount(0)).is_none());
    }
}
