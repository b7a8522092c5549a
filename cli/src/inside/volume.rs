//! The files of one volume, as `backtide-filesystems` reads them, in our words.

use std::rc::Rc;

use backtide_control::{ApiError, ErrorCode};
use backtide_filesystems::{
    self as filesystems, Contents, FileId, FileSystem, Name, Node, Source, ext::Ext, fat::Fat, ntfs::Ntfs,
    path, xfs::Xfs,
};
use backtide_units::{ByteCount, ByteOffset};
use serde::Serialize;

use super::Content;

/// What can be done about a volume that cannot be read here.
pub(super) const OTHERWISE: &str = "mount the point and read it with guestfish (Debian package \
    libguestfs-tools): `backtide mount NAME --at POINT`, then `guestfish --ro --format=raw -a URI -i`";

/// A volume whose files can be read.
pub(crate) struct Volume(pub(super) Box<dyn FileSystem>);

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
    /// The same in nanoseconds.
    #[serde(skip)]
    pub(super) modified_ns: i128,
    /// Where it leads, when it is a symbolic link.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) target: Option<String>,
    /// The same as it stands there.
    #[serde(skip)]
    pub(super) raw_target: Vec<u8>,
    /// Why it cannot be read, when it cannot.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) error: Option<String>,
    /// Its name as it stands there.
    #[serde(skip)]
    pub(super) raw_name: Vec<u8>,
    /// The number by which its volume finds it.
    #[serde(skip)]
    pub(super) id: FileId,
}

impl Entry {
    /// A name behind which nothing can be read.
    fn unreadable(raw_name: Vec<u8>, id: FileId, error: &ApiError) -> Self {
        Self {
            name: String::from_utf8_lossy(&raw_name).into_owned(),
            kind: Kind::Unreadable,
            size: ByteCount::ZERO,
            mode: 0,
            uid: 0,
            gid: 0,
            modified: 0,
            modified_ns: 0,
            target: None,
            raw_target: Vec::new(),
            error: Some(error.message.clone()),
            raw_name,
            id,
        }
    }
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
    /// What cannot be told: its directory names it, and no more of it can be read.
    Unreadable,
}

impl From<filesystems::Kind> for Kind {
    fn from(kind: filesystems::Kind) -> Self {
        match kind {
            filesystems::Kind::File => Self::File,
            filesystems::Kind::Directory => Self::Directory,
            filesystems::Kind::Symlink => Self::Symlink,
            filesystems::Kind::Special => Self::Special,
        }
    }
}

/// A file that is read from its start to its end.
pub(super) struct OpenFile<'volume> {
    volume: &'volume dyn FileSystem,
    name: String,
    contents: Contents,
    at: ByteOffset,
}

impl OpenFile<'_> {
    /// The next bytes; none at the end.
    pub(super) fn read(&mut self, buffer: &mut [u8]) -> Result<usize, ApiError> {
        let read = self.volume.read(&self.contents, self.at, buffer);
        let count = read.map_err(|error| api_error(&self.name, &error))?;
        self.at.0 += count as u64;
        Ok(count)
    }

    /// The next byte that may be other than zero, or the end.
    pub(super) fn next_data(&self) -> ByteOffset {
        let end = || ByteOffset(self.contents.size().0.max(self.at.0));
        self.contents.next_data(self.at).unwrap_or_else(end)
    }

    /// Goes on from this byte.
    pub(super) fn seek(&mut self, at: ByteOffset) {
        self.at = at;
    }

    /// Goes to the next byte that may be other than zero, or to the end, and says where that is.
    pub(super) fn skip_hole(&mut self) -> ByteOffset {
        self.at = self.next_data();
        self.at
    }
}

impl Volume {
    /// The volume on `source`, which is called `name`.
    ///
    /// # Errors
    /// When it is none that can be read here: the way that can is named.
    pub(crate) fn open(source: Rc<dyn Source>, content: Content, name: &str) -> Result<Self, ApiError> {
        match content {
            Content::Ext4 => opened(name, Ext::open(source)),
            Content::Xfs => opened(name, Xfs::open(source)),
            Content::Ntfs => opened(name, Ntfs::open(source)),
            Content::Fat => opened(name, Fat::open(source)),
            Content::Btrfs | Content::Lvm | Content::Luks | Content::Swap | Content::Unknown => {
                let what = match content == Content::Unknown {
                    true => "no file system that is known here",
                    false => content.name(),
                };
                let why = format!("{name} holds {what}, and {} are read here", Content::readable_names());
                Err(ApiError::new(ErrorCode::Refused, why).with_hint(OTHERWISE))
            }
        }
    }

    /// What a reader has to know of the volume before believing what is seen, a sentence each.
    pub(crate) fn warnings(&self) -> &[String] {
        self.0.warnings()
    }

    /// What `path` is.
    ///
    /// # Errors
    /// When it is not there, or cannot be read.
    pub(crate) fn look(&self, path: &str) -> Result<Entry, ApiError> {
        find(self.0.as_ref(), path, false)
    }

    /// What `path` is when symbolic links are followed.
    ///
    /// # Errors
    /// As [`Volume::look`].
    pub(crate) fn look_through(&self, path: &str) -> Result<Entry, ApiError> {
        find(self.0.as_ref(), path, true)
    }

    /// The entries of a directory, sorted by name, without itself and the one above; one that cannot be read says so.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub(crate) fn list(&self, directory: &Entry) -> Result<Vec<Entry>, ApiError> {
        let names = self.0.names(directory.id).map_err(|error| api_error(&directory.name, &error))?;
        let names = names.into_iter();
        let mut entries: Vec<_> = names.map(|name| entry_or_why(self.0.as_ref(), name)).collect();
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(entries)
    }

    /// Where the bytes of a file are on the volume.
    ///
    /// # Errors
    /// When that cannot be read.
    pub(super) fn contents(&self, file: &Entry) -> Result<Contents, ApiError> {
        self.0.contents(file.id).map_err(|error| api_error(&file.name, &error))
    }

    /// Opens a file to read it.
    ///
    /// # Errors
    /// When it cannot be read.
    pub(super) fn open_file(&self, file: &Entry) -> Result<OpenFile<'_>, ApiError> {
        let (volume, name) = (self.0.as_ref(), file.name.clone());
        Ok(OpenFile { volume, name, contents: self.contents(file)?, at: ByteOffset::ZERO })
    }
}

fn opened<Opened: FileSystem + 'static>(
    name: &str,
    opened: Result<Opened, filesystems::Error>,
) -> Result<Volume, ApiError> {
    opened.map(|volume| Volume(Box::new(volume))).map_err(|error| api_error(name, &error))
}

fn find(volume: &dyn FileSystem, path: &str, through: bool) -> Result<Entry, ApiError> {
    let found = path::find(volume, path, through).map_err(|error| api_error(path, &error))?;
    let bytes = if found.name.is_empty() { b"/".to_vec() } else { found.name };
    entry(volume, Name { bytes, id: found.id })
}

fn entry_or_why(volume: &dyn FileSystem, name: Name) -> Entry {
    let (bytes, id) = (name.bytes.clone(), name.id);
    entry(volume, name).unwrap_or_else(|error| Entry::unreadable(bytes, id, &error))
}

fn entry(volume: &dyn FileSystem, name: Name) -> Result<Entry, ApiError> {
    let text = String::from_utf8_lossy(&name.bytes).into_owned();
    let failed = |error: filesystems::Error| api_error(&text, &error);
    let Node { kind, size, mode, uid, gid, modified_ns, .. } = volume.node(name.id).map_err(failed)?;
    let kind = Kind::from(kind);
    let is_link = kind == Kind::Symlink;
    let raw_target = if is_link { volume.link_target(name.id).map_err(failed)? } else { Vec::new() };
    let target = is_link.then(|| String::from_utf8_lossy(&raw_target).into_owned());
    let modified = i64::try_from(modified_ns.div_euclid(1_000_000_000)).unwrap_or(i64::MAX);
    let (raw_name, id) = (name.bytes, name.id);
    Ok(Entry {
        name: text,
        kind,
        size,
        mode,
        uid,
        gid,
        modified,
        modified_ns,
        target,
        raw_target,
        error: None,
        raw_name,
        id,
    })
}

fn api_error(path: &str, error: &filesystems::Error) -> ApiError {
    use filesystems::Error as Found;
    let code = match error {
        Found::NotFound { .. } => ErrorCode::NotFound,
        Found::NotADirectory { .. } | Found::TooManyLinks { .. } => ErrorCode::Usage,
        Found::Damaged { .. } | Found::Io { .. } => ErrorCode::Damaged,
        Found::Unsupported { .. } | Found::TooMany { .. } => ErrorCode::Refused,
    };
    let cause = ApiError::from_error(code, error);
    let error = ApiError { message: format!("{path} on the volume: {}", cause.message), ..cause };
    match code {
        ErrorCode::Refused => error.with_hint(OTHERWISE),
        _ => error,
    }
}
