//! An image that lacks blocks is no disk by itself: what an attach looks at before it uses one, and the note
//! beside the image that says so to people and to other agents.
//!
//! A raw file has such a note, and a qcow2 file. Beside a block device or an NBD export there is no place for one: there only
//! this agent's state and the receiver, which keeps the point in the disk's name, say that it lacks blocks.
//!
//! Invariants: the note is there, durably, before the first byte of an image is changed for which there is a
//! hydration file; it goes when nothing is missing, before that file does. So a note without a hydration file
//! means that somebody else has it, or that it is lost.

use std::{
    fs::File,
    io::{self, Write},
    path::{Path, PathBuf},
    rc::Rc,
    sync::Arc,
};

use backtide_agent_api::{Rewound, StreamTls};
use backtide_control::Address;
use backtide_hydration::{Header, HydrationError, HydrationFile, Kind};
use backtide_io_filter::Resume;
use backtide_tracking::DirtyBitmap;
use backtide_units::{ByteCount, DiskName};

use super::{
    dial::Dialer,
    source::{PointSource, Sources},
    trust,
};
use crate::record::{DiskRecord, ImageStamp, Records};

/// What the note's name ends with, behind that of the image.
const SUFFIX: &str = ".backtide-incomplete";

/// Behind that, as long as it is being written.
const FRESH: &str = ".new";

/// So much has to fit beside an image: a note, and what a file system takes for its name.
const PROBED_BYTES: usize = 16 << 10;

/// What a disk lacks, and how to come by it.
pub(crate) struct OpenedHydration {
    file: HydrationFile,
    receiver: Address,
    sources: Arc<dyn Sources>,
}

/// Why an image cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HydrationProblem {
    /// What the agent knows of the missing blocks cannot be used.
    #[error("the image lacks blocks, and nobody knows which: {0}")]
    File(#[from] HydrationError),
    /// Somebody else knows.
    #[error("{} lacks blocks of its disk, and this agent does not know which: {} says whose it is", image.display(), note.display())]
    Unknown { image: PathBuf, note: PathBuf },
    /// Another image is in the place of the one that lacks blocks.
    #[error("disk {disk} lacks blocks of the image it had, and {image} is another one")]
    OtherImage { disk: String, image: String },
    /// By what is noted the image would become what the other host had, and that is not what was asked for.
    #[error(
        "a failback of disk {disk} was cut off: it is noted already what {image} lacks of what the other host had"
    )]
    CutOff { disk: String, image: String },
    /// Such a disk does not change its size.
    #[error("disk {disk} lacks blocks of its {expected} bytes, and {image} has {found}")]
    Size { disk: String, image: String, expected: ByteCount, found: ByteCount },
    /// The address in the file.
    #[error("disk {disk} lacks blocks that are at {receiver}, which is no address: {why}")]
    Receiver { disk: String, receiver: String, why: String },
    /// A power loss could take what says that it lacks blocks, and which.
    #[error("cannot make durable that the image lacks blocks: {0}")]
    Name(io::Error),
    /// The note cannot be written.
    #[error("cannot write {}, which says that the image lacks blocks: {source}", note.display())]
    Note { note: PathBuf, source: io::Error },
}

impl OpenedHydration {
    /// The rewind that it is of, if it is.
    pub(crate) fn rewound(&self) -> Option<Rewound> {
        let Header { kind, before: from, source, .. } = self.file.header();
        (*kind == Kind::Rewind).then_some(Rewound { from: *from, to: source.lsn, to_time: source.time })
    }

    /// What is compared with the point before it is fetched; none where the image has nothing to be compared.
    pub(super) fn compared(&self) -> Option<DirtyBitmap> {
        self.file.header().compare.then(|| self.file.missing())
    }

    /// On the disk's thread.
    pub(crate) fn begin(self, tls: Option<StreamTls>) -> (HydrationFile, Rc<dyn PointSource>) {
        let point = self.file.header().source.clone();
        let source = self.sources.open(point, Dialer::new(self.receiver, tls));
        (self.file, source)
    }
}

/// What the image behind a disk, of `size`, lacks, if anything. When it lacks something the note beside it is there.
pub(crate) fn look(
    records: &Records,
    record: &DiskRecord,
    size: ByteCount,
    sources: &Arc<dyn Sources>,
) -> Result<Option<OpenedHydration>, HydrationProblem> {
    let found = records.open_hydration(&record.name, trust::boot_id())?;
    let image = path_of(&record.image);
    let note = image.as_deref().and_then(note_of);
    let disk = || record.name.to_string();
    let Some(file) = found else {
        return match note.filter(|note| note.exists()) {
            Some(note) => Err(HydrationProblem::Unknown { image: PathBuf::from(&record.image), note }),
            None => Ok(None),
        };
    };
    // Whoever made it may have failed before its name was durable.
    records.sync_names().map_err(HydrationProblem::Name)?;
    let (header, shown) = (file.header(), record.image.clone());
    let inode = image.as_deref().and_then(ImageStamp::of).map_or(0, |stamp| stamp.inode);
    // What has no inode is the same as long as it has the same name.
    let renamed = inode == 0 && record.image_changed;
    if header.disk != record.uuid || header.inode != inode || renamed {
        return Err(HydrationProblem::OtherImage { disk: disk(), image: shown });
    }
    if header.kind == Kind::Failover && header.epoch > record.last_own_epoch() {
        return Err(HydrationProblem::CutOff { disk: disk(), image: shown });
    }
    let (expected, found) = (header.source.size, size);
    if expected != found {
        return Err(HydrationProblem::Size { disk: disk(), image: shown, expected, found });
    }
    let receiver = header.source.receiver.clone();
    let receiver = match receiver.parse() {
        Ok(address) => address,
        Err(error) => {
            let why = format!("{error}");
            return Err(HydrationProblem::Receiver { disk: disk(), receiver, why });
        }
    };
    if let Some(note) = note {
        let text = text_of(record, header);
        have_note(note, &text)?;
    }
    Ok(Some(OpenedHydration { file, receiver, sources: Arc::clone(sources) }))
}

/// The first attach after a rewind takes what is missing for changed: it has to reach the receiver again, as the
/// newest content of these blocks.
pub(crate) fn dirty_too(resume: Resume, record: &DiskRecord, hydration: Option<&OpenedHydration>) -> Resume {
    match hydration {
        Some(OpenedHydration { file, .. }) if file.header().changes_the_disk(record.epoch) => {
            resume.set_back(&file.missing())
        }
        Some(_) | None => resume,
    }
}

/// The file or device of an image; none of an NBD URI.
pub(crate) fn path_of(image: &str) -> Option<PathBuf> {
    let path = PathBuf::from(image);
    path.is_absolute().then_some(path)
}

/// Where the note beside an image is; none beside a device.
fn note_of(image: &Path) -> Option<PathBuf> {
    let is_file = std::fs::metadata(image).is_ok_and(|found| found.is_file());
    // Of the file itself, by whatever link it is named.
    let image = std::fs::canonicalize(image).unwrap_or_else(|_| image.to_owned());
    let mut note = image.into_os_string();
    note.push(SUFFIX);
    is_file.then(|| PathBuf::from(note))
}

/// Whether a note beside an image says that it lacks blocks.
pub(crate) fn has_note(image: &Path) -> bool {
    note_of(image).is_some_and(|note| note.exists())
}

/// A note that is written and has another name until an attach needs it: then there is room for it. Without that attach it goes.
#[derive(Debug)]
pub(crate) struct ReservedNote(Option<PathBuf>);

impl Drop for ReservedNote {
    fn drop(&mut self) {
        // By now it may be the note.
        if let Some(fresh) = &self.0 {
            let _ = std::fs::remove_file(fresh);
        }
    }
}

/// Writes the note of a disk that is about to lack what `header` says, where no one takes it for that. Who dies here leaves no
/// image that seems to be incomplete.
pub(crate) fn reserve_note(record: &DiskRecord, header: &Header) -> io::Result<ReservedNote> {
    let Some(note) = path_of(&record.image).as_deref().and_then(note_of) else {
        return Ok(ReservedNote(None));
    };
    let fresh = fresh_of(&note);
    match write_fresh(&fresh, &text_of(record, header)) {
        Ok(()) => Ok(ReservedNote(Some(fresh))),
        // One that is there goes on.
        Err(_) if note.exists() => Ok(ReservedNote(None)),
        Err(error) => Err(error),
    }
}

/// Removes the note of a disk that does not lack what `header` says after all, if it is that one.
pub(crate) fn take_note_back(record: &DiskRecord, header: &Header) -> io::Result<()> {
    let Some(image) = path_of(&record.image) else { return Ok(()) };
    let found = note_of(&image).and_then(|note| std::fs::read(note).ok());
    match found {
        Some(found) if found == text_of(record, header).as_bytes() => remove_note(&image),
        Some(_) | None => Ok(()),
    }
}

/// What the image of a disk lacks that is not attached, as this agent has noted it.
///
/// # Errors
/// When that cannot be read, or is damaged.
pub(crate) fn lacked(records: &Records, disk: &DiskName) -> Result<ByteCount, HydrationProblem> {
    let file = records.open_hydration(disk, trust::boot_id())?;
    Ok(file.map_or(ByteCount::ZERO, |file| file.missing().count().bytes()))
}

/// Sees that the note is beside the image of a disk that is given up and lacks blocks; of one that is away nothing can be said
/// beside it.
///
/// # Errors
/// When it cannot be written.
pub(crate) fn leave_note(records: &Records, record: &DiskRecord) -> Result<(), HydrationProblem> {
    let note = path_of(&record.image).as_deref().and_then(note_of);
    let (Some(note), Some(file)) = (note, records.open_hydration(&record.name, trust::boot_id())?) else {
        return Ok(());
    };
    have_note(note, &text_of(record, file.header()))
}

/// Whether a note could be written beside an image; found out before anything depends on it.
pub(crate) fn try_note(image: &Path) -> io::Result<()> {
    let Some(note) = note_of(image) else { return Ok(()) };
    // Under another name: who dies here leaves no image that seems to be incomplete.
    let mut probe = note.into_os_string();
    probe.push(".probe");
    write_note(Path::new(&probe), &" ".repeat(PROBED_BYTES))?;
    std::fs::remove_file(probe)
}

/// Removes the note beside an image, which lacks nothing any more.
pub(super) fn remove_note(image: &Path) -> io::Result<()> {
    let Some(note) = note_of(image) else { return Ok(()) };
    match std::fs::remove_file(&note) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        Ok(()) | Err(_) => sync_directory(&note),
    }
}

/// Sees that the note is there. One that is there need not be right: a full file system keeps no disk away.
fn have_note(note: PathBuf, text: &str) -> Result<(), HydrationProblem> {
    let found = std::fs::read(&note).ok();
    let done = match &found {
        // Whoever wrote it may have died before it was durable.
        Some(found) if *found == text.as_bytes() => {
            File::open(&note).and_then(|file| file.sync_all()).and_then(|()| sync_directory(&note))
        }
        Some(_) | None => write_note(&note, text),
    };
    match done {
        Err(error) if found.is_some() => {
            tracing::warn!(note = %note.display(), %error, "the note beside the image cannot be brought up to date");
            Ok(())
        }
        done => done.map_err(|source| HydrationProblem::Note { note, source }),
    }
}

/// Puts a note in place: who dies or fails before leaves the one that was there.
fn write_note(note: &Path, text: &str) -> io::Result<()> {
    let fresh = fresh_of(note);
    match is_reserved(&fresh, text) {
        // Whoever wrote it may have died before it was durable.
        true => File::open(&fresh).and_then(|file| file.sync_all())?,
        false => write_fresh(&fresh, text)?,
    }
    if let Err(error) = std::fs::rename(&fresh, note) {
        let _ = std::fs::remove_file(&fresh);
        return Err(error);
    }
    sync_directory(note)
}

fn fresh_of(note: &Path) -> PathBuf {
    let mut fresh = note.as_os_str().to_owned();
    fresh.push(FRESH);
    PathBuf::from(fresh)
}

fn is_reserved(fresh: &Path, text: &str) -> bool {
    let long = |found: std::fs::Metadata| found.is_file() && found.len() == text.len() as u64;
    std::fs::symlink_metadata(fresh).is_ok_and(long)
        && std::fs::read(fresh).is_ok_and(|found| found == text.as_bytes())
}

fn write_fresh(fresh: &Path, text: &str) -> io::Result<()> {
    let written = File::create(fresh).and_then(|mut file| {
        file.write_all(text.as_bytes())?;
        file.sync_all()
    });
    if written.is_err() {
        let _ = std::fs::remove_file(fresh);
    }
    written
}

fn sync_directory(of: &Path) -> io::Result<()> {
    match of.parent() {
        Some(parent) => File::open(parent)?.sync_all(),
        None => Ok(()),
    }
}

fn text_of(record: &DiskRecord, header: &Header) -> String {
    let (name, uuid, image) = (&record.name, record.uuid, &record.image);
    let source = &header.source;
    format!(
        "{image} is not complete: do not use it by itself.\n\
         It is the image of disk {name} ({uuid}), which lacks blocks of it. They are at the log receiver\n\
         {}, in the history of disk {}, at LSN {}. The agent that has the disk fetches them;\n\
         `backtide status {name}` there says how far it is. This file goes when nothing is missing.\n\
         To use the image on another host or without the agent, wait for that.\n",
        source.receiver, source.name, source.lsn
    )
}

#[cfg(test)]
mod tests {
    use backtide_hydration::SourcePoint;
    use backtide_units::Lsn;

    use super::*;

    #[test]
    fn a_note_that_is_there_keeps_no_disk_away() {
        let directory = tempfile::tempdir().unwrap();
        let note = directory.path().join("vm1.img.backtide-incomplete");
        have_note(note.clone(), "first").unwrap();
        assert_eq!(std::fs::read(&note).unwrap(), b"first");
        have_note(note.clone(), "second").unwrap();
        assert_eq!(std::fs::read(&note).unwrap(), b"second");
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1, "nothing is left over");
        // Nothing can be written now.
        std::fs::create_dir(directory.path().join("vm1.img.backtide-incomplete.new")).unwrap();
        have_note(note.clone(), "second").unwrap();
        have_note(note.clone(), "third").unwrap();
        assert_eq!(std::fs::read(&note).unwrap(), b"second");
        std::fs::remove_file(&note).unwrap();
        have_note(note, "third").unwrap_err();
    }

    #[test]
    fn an_image_beside_which_there_is_no_room_is_found_out() {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("vm1.img");
        File::create(&image).unwrap();
        try_note(&image).unwrap();
        let full = directory.path().join("vm1.img.backtide-incomplete.probe.new");
        std::os::unix::fs::symlink("/dev/full", full).unwrap();
        assert_eq!(try_note(&image).unwrap_err().kind(), io::ErrorKind::StorageFull);
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1, "nothing is left over");
    }

    #[test]
    fn a_note_that_is_reserved_needs_no_more_room_and_goes_without_an_attach() {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("vm1.img");
        File::create(&image).unwrap();
        let receiver = "unix:/run/r.sock".parse().unwrap();
        let record = DiskRecord::new("vm1".parse().unwrap(), image.display().to_string(), receiver);
        let header = header(&record);
        let note = note_of(&image).unwrap();
        let fresh = fresh_of(&note);
        let long_ago = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1000);

        drop(reserve_note(&record, &header).unwrap());
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
        let reserved = reserve_note(&record, &header).unwrap();
        assert!(!has_note(&image), "nothing says that it lacks anything yet");
        File::options().write(true).open(&fresh).unwrap().set_modified(long_ago).unwrap();
        have_note(note.clone(), &text_of(&record, &header)).unwrap();
        let written = std::fs::metadata(&note).unwrap().modified().unwrap();
        assert_eq!(written, long_ago, "it is not written anew");
        drop(reserved);
        assert!(has_note(&image));

        let other = Header { source: SourcePoint { lsn: Lsn(7), ..header.source.clone() }, ..header.clone() };
        take_note_back(&record, &other).unwrap();
        assert!(has_note(&image), "it is somebody else's");
        take_note_back(&record, &header).unwrap();
        assert!(!has_note(&image));
        // What was reserved for another point is not it.
        let reserved = reserve_note(&record, &other).unwrap();
        have_note(note.clone(), &text_of(&record, &header)).unwrap();
        assert_eq!(std::fs::read(&note).unwrap(), text_of(&record, &header).into_bytes());
        drop(reserved);

        std::fs::remove_file(&note).unwrap();
        std::os::unix::fs::symlink("/dev/full", &fresh).unwrap();
        assert_eq!(reserve_note(&record, &header).unwrap_err().kind(), io::ErrorKind::StorageFull);
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1, "nothing is left over");
    }

    fn header(record: &DiskRecord) -> Header {
        let source = SourcePoint {
            receiver: "unix:/run/r.sock".to_owned(),
            disk: record.uuid,
            name: record.name.clone(),
            history: backtide_units::HistoryId::random(),
            lsn: Lsn(40),
            time: backtide_units::CaptureTime(7),
            size: ByteCount(1 << 20),
        };
        Header {
            disk: record.uuid,
            kind: Kind::Rewind,
            boot: trust::boot_id(),
            epoch: record.epoch,
            inode: 1,
            before: Lsn(90),
            total: backtide_units::BlockCount(4),
            compare: false,
            source,
        }
    }
}
