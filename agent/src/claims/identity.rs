//! What an image lies on, down to whatever else may lie on the same bytes: a loop device on its file, a partition on a
//! stretch of its disk, a volume on the devices it is made of.

use std::{
    fs::Metadata,
    os::unix::fs::{FileTypeExt, MetadataExt},
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
}

/// Behind every end.
pub(super) const OPEN_END: u64 = u64::MAX;

impl Identity {
    /// Of a path or URI. Waits for the file system.
    pub(crate) fn of(image: &str) -> Self {
        Self::on(&Host::this(), image)
    }

    /// The same on a host.
    pub(super) fn on(host: &Host, image: &str) -> Self {
        let itself = std::fs::metadata(image).ok().map(|found| Thing::of(&found));
        let parts = itself.map_or_else(Vec::new, |itself| host.parts_of(itself));
        Self { text: image.to_owned(), itself, parts }
    }

    /// That of a thing which need not be there.
    #[cfg(test)]
    pub(super) fn made_up(host: &Host, image: &str, itself: Thing) -> Self {
        Self { text: image.to_owned(), itself: Some(itself), parts: host.parts_of(itself) }
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

    /// Whether both are one image, by whatever names.
    pub(super) fn is_same(&self, other: &Self) -> bool {
        self.text == other.text || (self.itself.is_some() && self.itself == other.itself)
    }

    /// Whether what is written to the one may be read from the other.
    pub(super) fn overlaps(&self, other: &Self) -> bool {
        self.is_same(other) || overlap(&self.parts, &other.parts)
    }
}

/// Whether some byte is in both.
pub(super) fn overlap(some: &[Part], others: &[Part]) -> bool {
    some.iter().any(|part| others.iter().any(|other| part.overlaps(other)))
}

impl Part {
    fn overlaps(&self, other: &Self) -> bool {
        // The volumes of one device share it without sharing a byte: who made them sees to that.
        let of_one_device = self.through.is_some() && self.through == other.through;
        self.of == other.of && self.from < other.to && other.from < self.to && !of_one_device
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
