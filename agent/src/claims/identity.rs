//! What an image lies on, down to whatever else may lie on the same bytes: a loop device on its file, a partition on a
//! stretch of its disk, a volume on the devices it is made of, a qcow2 file on its backing files.

use std::{
    fs::Metadata,
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::PathBuf,
};

use super::host::Host;

/// The number of a block device, as in the metadata of files.
pub(super) type DeviceNumber = u64;

/// What makes an image the same, by whatever name it goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    text: String,
    /// The file or device itself.
    itself: Option<Thing>,
    /// It, and everything it lies on.
    parts: Vec<Part>,
    /// The files that it names as parts of its content.
    files_behind: Vec<(PathBuf, Thing)>,
}

/// A file that an image names as a part of its content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Behind {
    pub(crate) path: PathBuf,
    /// Not only read.
    pub(crate) is_written: bool,
}

/// A file or a block device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Thing {
    /// By its file system and its inode there.
    File(u64, u64),
    /// A device has many names, and its number is not that of the file system it is named in.
    Device(DeviceNumber),
}

/// A stretch of a thing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Part {
    pub(super) of: Thing,
    /// In bytes.
    pub(super) from: u64,
    /// In bytes, behind the last; [`OPEN_END`] when it goes on to the end, wherever that is.
    pub(super) to: u64,
    /// It is reached through a volume (device-mapper, md) that has this device for itself, and uses who knows what of it.
    pub(super) through: Option<DeviceNumber>,
    /// Whoever has it may write to it.
    pub(super) is_written: bool,
}

/// Behind every end.
pub(super) const OPEN_END: u64 = u64::MAX;

impl Identity {
    /// Of a path or URI. Waits for the file system.
    pub(crate) fn of(image: &str) -> Self {
        Self::with(image, &[])
    }

    /// Of an image that names other files as parts of its content. Waits for their file systems.
    pub(crate) fn with(image: &str, behind: &[Behind]) -> Self {
        Self::on(&Host::this(), image, behind)
    }

    /// The same on a host.
    pub(super) fn on(host: &Host, image: &str, behind: &[Behind]) -> Self {
        let itself = std::fs::metadata(image).ok().map(|found| Thing::of(&found));
        let mut parts = itself.map_or_else(Vec::new, |itself| host.parts_of(itself));
        let mut files_behind = Vec::new();
        for Behind { path, is_written } in behind {
            let Ok(found) = std::fs::metadata(path) else { continue };
            let thing = Thing::of(&found);
            parts.extend(
                host.parts_of(thing).into_iter().map(|part| Part { is_written: *is_written, ..part }),
            );
            files_behind.push((path.clone(), thing));
        }
        Self { text: image.to_owned(), itself, parts, files_behind }
    }

    /// That of a thing which need not be there.
    #[cfg(test)]
    pub(super) fn made_up(host: &Host, image: &str, itself: Thing) -> Self {
        let (text, parts) = (image.to_owned(), host.parts_of(itself));
        Self { text, itself: Some(itself), parts, files_behind: Vec::new() }
    }

    /// As it was named.
    pub(super) fn image(&self) -> &str {
        &self.text
    }

    /// Whether there was a file or device.
    pub(crate) fn is_file(&self) -> bool {
        self.itself.is_some()
    }

    /// Whether it is the file or device that was found.
    pub(crate) fn is_of(&self, found: &Metadata) -> bool {
        self.itself == Some(Thing::of(found))
    }

    /// The file or device itself, if there was one.
    pub(super) fn itself(&self) -> Option<Thing> {
        self.itself
    }

    /// It, and everything it lies on.
    pub(super) fn parts(&self) -> &[Part] {
        &self.parts
    }

    /// The files that it names as parts of its content, and where they are.
    pub(super) fn files_behind(&self) -> &[(PathBuf, Thing)] {
        &self.files_behind
    }

    /// Whether both are one image, by whatever names.
    pub(super) fn is_same(&self, other: &Self) -> bool {
        self.text == other.text || (self.itself.is_some() && self.itself == other.itself)
    }

    /// Whether what is written to the one may be read from the other.
    pub(super) fn overlaps(&self, other: &Self) -> bool {
        self.is_same(other) || overlap(&self.parts, &other.parts)
    }
}

/// Whether some byte is in both that somebody may write.
pub(super) fn overlap(some: &[Part], others: &[Part]) -> bool {
    some.iter().any(|part| others.iter().any(|other| part.overlaps(other)))
}

impl Part {
    fn overlaps(&self, other: &Self) -> bool {
        // The volumes of one device share it without sharing a byte: who made them sees to that.
        let of_one_device = self.through.is_some() && self.through == other.through;
        let is_written = self.is_written || other.is_written;
        is_written && self.of == other.of && self.from < other.to && other.from < self.to && !of_one_device
    }
}

impl Thing {
    /// What was found.
    pub(super) fn of(found: &Metadata) -> Self {
        match found.file_type().is_block_device() {
            true => Self::Device(found.rdev()),
            false => Self::File(found.dev(), found.ino()),
        }
    }
}
