//! ext2, ext3 and ext4, by a library that finds files by their paths.

use std::rc::Rc;

use backtide_control::{ApiError, ErrorCode};
use backtide_filesystems::Source;
use backtide_units::{ByteCount, ByteOffset};
use ext4_view::{Ext4, Ext4Error, Ext4Read, File, FileType, Metadata, PathBuf};

use super::{Entry, Kind, OTHERWISE, Place};

/// A volume with one of them.
pub(crate) struct Ext4Volume {
    files: Ext4,
    inodes: u64,
}

/// A file of it that is read.
pub(crate) struct OpenExt4 {
    name: String,
    file: File,
}

struct Reader(Rc<dyn Source>);

/// Where the superblock has the number of inodes.
const INODES_AT: ByteOffset = ByteOffset(1024);

/// The least that an inode takes.
const INODE: u64 = 128;

impl Ext4Read for Reader {
    fn read(
        &mut self,
        start_byte: u64,
        dst: &mut [u8],
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync + 'static>> {
        self.0.read_at(ByteOffset(start_byte), dst).map_err(Into::into)
    }
}

impl OpenExt4 {
    pub(super) fn read(&mut self, buffer: &mut [u8]) -> Result<usize, ApiError> {
        self.file.read_bytes(buffer).map_err(|error| api_error(&self.name, &error))
    }

    pub(super) fn position(&self) -> ByteOffset {
        ByteOffset(self.file.position())
    }
}

impl Ext4Volume {
    pub(super) fn open(source: Rc<dyn Source>) -> Result<Self, ApiError> {
        let (mut inodes, size) = ([0; 4], source.size().0);
        let read = source.read_at(INODES_AT, &mut inodes);
        let files = Ext4::load(Box::new(Reader(source))).map_err(|error| api_error("/", &error))?;
        read.map_err(|error| api_error("/", &Ext4Error::Io(Box::new(error))))?;
        // The number is the guest's word, and they have to be somewhere.
        Ok(Self { files, inodes: u64::from(u32::from_le_bytes(inodes)).min(size / INODE) })
    }

    /// How many inodes it has, at most.
    pub(super) fn inodes(&self) -> u64 {
        self.inodes
    }

    pub(super) fn look(&self, path: &str) -> Result<Entry, ApiError> {
        let metadata = self.files.symlink_metadata(path).map_err(|error| api_error(path, &error))?;
        let name = last_part(path);
        let found = PathBuf::try_from(path).map_err(|_| not_a_path(path))?;
        self.entry(name, &metadata, found).map_err(|error| api_error(path, &error))
    }

    pub(super) fn look_through(&self, path: &str) -> Result<Entry, ApiError> {
        let metadata = self.files.metadata(path).map_err(|error| api_error(path, &error))?;
        let real = self.files.canonicalize(path).map_err(|error| api_error(path, &error))?;
        self.entry(last_part(path), &metadata, real).map_err(|error| api_error(path, &error))
    }

    pub(super) fn list(&self, name: &str, path: &PathBuf) -> Result<Vec<Entry>, ApiError> {
        let failed = |error: Ext4Error| api_error(name, &error);
        let mut entries = Vec::new();
        for found in self.files.read_dir(path).map_err(failed)? {
            let found = found.map_err(failed)?;
            let name = found.file_name().as_ref().to_vec();
            if name == b"." || name == b".." {
                continue;
            }
            let entry =
                found.metadata().and_then(|metadata| self.entry(name.clone(), &metadata, found.path()));
            entries.push(entry.unwrap_or_else(|error| {
                let why = api_error(&String::from_utf8_lossy(&name), &error);
                Entry::unreadable(name, Place::Ext4(found.path()), &why)
            }));
        }
        Ok(entries)
    }

    pub(super) fn open_file(&self, name: &str, path: &PathBuf) -> Result<OpenExt4, ApiError> {
        let file = self.files.open(path).map_err(|error| api_error(name, &error))?;
        Ok(OpenExt4 { name: name.to_owned(), file })
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
            Kind::Symlink => Some(self.files.read_link(&path)?),
            Kind::File | Kind::Directory | Kind::Special | Kind::Unreadable => None,
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
            modified_ns: i128::from(metadata.modified().seconds()) * 1_000_000_000
                + i128::from(metadata.modified().nanoseconds()),
            target: target.as_ref().map(|target| target.display().to_string()),
            raw_target: target.map_or_else(Vec::new, |target| target.as_ref().to_vec()),
            error: None,
            place: Place::Ext4(path),
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

fn api_error(path: &str, error: &Ext4Error) -> ApiError {
    let code = match error {
        Ext4Error::NotFound => ErrorCode::NotFound,
        Ext4Error::NotAbsolute | Ext4Error::MalformedPath | Ext4Error::PathTooLong => ErrorCode::Usage,
        Ext4Error::NotADirectory
        | Ext4Error::IsADirectory
        | Ext4Error::IsASpecialFile
        | Ext4Error::NotASymlink
        | Ext4Error::TooManySymlinks => ErrorCode::Usage,
        Ext4Error::Corrupt(_) | Ext4Error::Io(_) => ErrorCode::Damaged,
        Ext4Error::Encrypted | Ext4Error::Incompatible(_) | Ext4Error::FileTooLarge => ErrorCode::Refused,
        _ => ErrorCode::Failed,
    };
    let cause = ApiError::from_error(code, error);
    let error = ApiError { message: format!("{path} on the volume: {}", cause.message), ..cause };
    match code {
        ErrorCode::Refused => error.with_hint(OTHERWISE),
        _ => error,
    }
}
