//! The files of one volume, in our words. It is where another file system would be added.

use backtide_control::{ApiError, ErrorCode};
use backtide_units::ByteCount;
use ext4_view::{Ext4, Ext4Error, File, FileType, Metadata, PathBuf};
use serde::Serialize;

use super::{Content, Partition, PointReader};

/// A volume whose files can be read.
pub(crate) struct Volume(Ext4);

/// What a directory says of one of its entries.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Entry {
    /// Its name; what is no UTF-8 of it is replaced.
    pub(crate) name: String,
    /// What it is.
    pub(crate) kind: Kind,
    /// How long it is.
    pub(crate) size: ByteCount,
    /// Its permission bits.
    pub(crate) mode: u16,
    /// Its owner.
    pub(crate) uid: u32,
    /// Its group.
    pub(crate) gid: u32,
    /// When it was changed last, in seconds since 1970.
    pub(crate) modified: i64,
    /// Where it leads, when it is a symbolic link.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) target: Option<String>,
    /// Its name as it stands there.
    #[serde(skip)]
    pub(super) raw_name: Vec<u8>,
    /// Where it is.
    #[serde(skip)]
    pub(super) path: Option<PathBuf>,
}

/// What a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Kind {
    /// A file with bytes in it.
    File,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
    /// A device, socket or pipe.
    Special,
}

impl Volume {
    /// The volume in a partition.
    ///
    /// # Errors
    /// When it is none that can be read here: the way that can is named.
    pub(crate) fn open(disk: &PointReader, partition: &Partition) -> Result<Self, ApiError> {
        match partition.content {
            Content::Ext4 => {}
            Content::Xfs
            | Content::Btrfs
            | Content::Ntfs
            | Content::Fat
            | Content::Lvm
            | Content::Luks
            | Content::Swap
            | Content::Unknown => {
                let what = match partition.content == Content::Unknown {
                    true => "no file system that is known here",
                    false => partition.content.name(),
                };
                let place = match partition.number {
                    0 => "the whole disk".to_owned(),
                    number => format!("partition {number}"),
                };
                let why = format!("{place} holds {what}, and only ext2/3/4 is read here");
                return Err(ApiError::new(ErrorCode::Refused, why).with_hint(
                    "mount the point and read it with guestfish: `backtide mount NAME --at POINT`, then \
                     `guestfish --ro --format=raw -a URI -i`",
                ));
            }
        }
        Ext4::load(Box::new(disk.part(partition.range()))).map(Self).map_err(|error| api_error("/", &error))
    }

    /// What `path` is.
    ///
    /// # Errors
    /// When it is not there, or cannot be read.
    pub(crate) fn look(&self, path: &str) -> Result<Entry, ApiError> {
        let metadata = self.0.symlink_metadata(path).map_err(|error| api_error(path, &error))?;
        let name = last_part(path);
        let found = PathBuf::try_from(path).map_err(|_| not_a_path(path))?;
        self.entry(name, &metadata, found).map_err(|error| api_error(path, &error))
    }

    /// What `path` is when symbolic links are followed.
    ///
    /// # Errors
    /// As [`Volume::look`].
    pub(crate) fn look_through(&self, path: &str) -> Result<Entry, ApiError> {
        let metadata = self.0.metadata(path).map_err(|error| api_error(path, &error))?;
        let real = self.0.canonicalize(path).map_err(|error| api_error(path, &error))?;
        self.entry(last_part(path), &metadata, real).map_err(|error| api_error(path, &error))
    }

    /// The entries of a directory, sorted by name, without itself and the one above.
    ///
    /// # Errors
    /// When it cannot be read.
    pub(crate) fn list(&self, directory: &Entry) -> Result<Vec<Entry>, ApiError> {
        let failed = |error: Ext4Error| api_error(&directory.name, &error);
        let path = directory.path.as_ref().expect("an entry of a volume has a path");
        let mut entries = Vec::new();
        for found in self.0.read_dir(path).map_err(failed)? {
            let found = found.map_err(failed)?;
            let name = found.file_name().as_ref().to_vec();
            if name == b"." || name == b".." {
                continue;
            }
            let metadata = found.metadata().map_err(failed)?;
            entries.push(self.entry(name, &metadata, found.path()).map_err(failed)?);
        }
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(entries)
    }

    /// Opens a file to read it.
    ///
    /// # Errors
    /// When it cannot be read.
    pub(super) fn open_file(&self, file: &Entry) -> Result<File, ApiError> {
        let path = file.path.as_ref().expect("an entry of a volume has a path");
        self.0.open(path).map_err(|error| api_error(&file.name, &error))
    }

    fn entry(&self, name: Vec<u8>, metadata: &Metadata, path: PathBuf) -> Result<Entry, Ext4Error> {
        let kind = match metadata.file_type() {
            FileType::Regular => Kind::File,
            FileType::Directory => Kind::Directory,
            FileType::Symlink => Kind::Symlink,
            FileType::BlockDevice | FileType::CharacterDevice | FileType::Fifo | FileType::Socket => {
                Kind::Special
            }
        };
        let target = match kind {
            Kind::Symlink => Some(self.0.read_link(&path)?.display().to_string()),
            Kind::File | Kind::Directory | Kind::Special => None,
        };
        Ok(Entry {
            name: String::from_utf8_lossy(&name).into_owned(),
            raw_name: name,
            kind,
            size: ByteCount(metadata.len()),
            mode: metadata.mode() & 0o7777,
            uid: metadata.uid(),
            gid: metadata.gid(),
            modified: metadata.modified().seconds(),
            target,
            path: Some(path),
        })
    }
}

/// The name that a path ends with.
fn last_part(path: &str) -> Vec<u8> {
    path.rsplit('/').find(|part| !part.is_empty()).unwrap_or("/").as_bytes().to_vec()
}

fn not_a_path(path: &str) -> ApiError {
    ApiError::new(ErrorCode::Usage, format!("{path:?} is no path"))
}

pub(super) fn api_error(path: &str, error: &Ext4Error) -> ApiError {
    let code = match error {
        Ext4Error::NotFound => ErrorCode::NotFound,
        Ext4Error::NotAbsolute | Ext4Error::MalformedPath | Ext4Error::PathTooLong => ErrorCode::Usage,
        Ext4Error::Corrupt(_) | Ext4Error::Io(_) => ErrorCode::Damaged,
        _ => ErrorCode::Failed,
    };
    let cause = ApiError::from_error(code, error);
    ApiError { message: format!("{path} on the volume: {}", cause.message), ..cause }
}
