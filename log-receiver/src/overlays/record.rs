//! `overlays/ID.json`: what an overlay lies over, and where it is served.
//!
//! It is written after the overlay's files and removed before them: an overlay without it is none.

use std::{
    io,
    path::{Path, PathBuf},
};

use backtide_overlay::OverlayId;
use backtide_receiver_api::DiskRef;
use backtide_storage::{Storage, read_file, replace_file};
use backtide_units::{ByteCount, CaptureTime, Lsn};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// The directory of overlays in a store.
pub(crate) const DIR: &str = "overlays";
const MAGIC: &str = "backtide-overlay";
const VERSION: u32 = 1;
const FILE_BYTES_MAX: ByteCount = ByteCount(64 * 1024);

/// An overlay that is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Record {
    /// What the mount is called.
    pub(crate) id: String,
    pub(crate) overlay: OverlayId,
    /// The disk, with the size that is served.
    pub(crate) disk: DiskRef,
    /// The point below.
    pub(crate) lsn: Lsn,
    pub(crate) time: CaptureTime,
    pub(crate) created: CaptureTime,
    /// Where it is served, now and after a restart; none when it is only kept.
    pub(crate) uri: Option<String>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RecordFile {
    magic: String,
    version: u32,
    id: String,
    overlay: Uuid,
    disk: DiskRef,
    lsn: Lsn,
    time: CaptureTime,
    created: CaptureTime,
    uri: Option<String>,
    /// CRC32C of the JSON of this with an empty checksum, in hexadecimal.
    checksum: String,
}

impl RecordFile {
    fn of(record: &Record) -> Self {
        let Record { id, overlay, disk, lsn, time, created, uri } = record.clone();
        let (magic, version, checksum) = (MAGIC.to_owned(), VERSION, String::new());
        let mut file =
            Self { magic, version, id, overlay: overlay.0, disk, lsn, time, created, uri, checksum };
        let text = serde_json::to_vec(&file).expect("plain data becomes JSON");
        file.checksum = format!("{:08x}", crc32c::crc32c(&text));
        file
    }
}

/// Where a record is.
pub(crate) fn path(id: &str) -> PathBuf {
    Path::new(DIR).join(format!("{id}.json"))
}

/// Writes a record so that a power cut leaves the old one or the new one.
///
/// # Errors
/// The file system's.
pub(crate) fn write(storage: &dyn Storage, record: &Record) -> io::Result<()> {
    let content = serde_json::to_vec_pretty(&RecordFile::of(record)).expect("plain data becomes JSON");
    replace_file(storage, &path(&record.id), &content)
}

/// Reads the record called `id`.
///
/// # Errors
/// A sentence with the file and what is wrong with it.
pub(crate) fn read(storage: &dyn Storage, id: &str) -> Result<Record, String> {
    let place = storage.display(&path(id));
    let place = place.display();
    let content = read_file(storage, &path(id), FILE_BYTES_MAX)
        .map_err(|error| format!("cannot read {place}: {error}"))?;
    let file: RecordFile =
        serde_json::from_slice(&content).map_err(|error| format!("{place} is damaged: {error}"))?;
    if file.version != VERSION {
        return Err(format!("{place} has version {}, this program knows version {VERSION}", file.version));
    }
    let RecordFile { overlay, disk, lsn, time, created, uri, .. } = file;
    let record = Record { id: file.id, overlay: OverlayId(overlay), disk, lsn, time, created, uri };
    if file.magic != MAGIC || record.id != id || RecordFile::of(&record).checksum != file.checksum {
        return Err(format!("{place} is damaged: it does not match its checksum"));
    }
    Ok(record)
}

#[cfg(test)]
mod tests {
    use backtide_storage::MemoryStorage;
    use backtide_units::{ByteOffset, DiskId};

    use super::*;

    #[test]
    fn a_record_reads_back_and_every_flipped_bit_is_noticed() {
        let storage = MemoryStorage::new();
        storage.create_dir(Path::new(DIR)).unwrap();
        let disk =
            DiskRef { name: "vm1".parse().unwrap(), uuid: DiskId(Uuid::from_u128(1)), size: ByteCount(4096) };
        let uri = Some("nbd+unix:///vm1-1?socket=/run/a.sock".to_owned());
        let (overlay, lsn) = (OverlayId(Uuid::from_u128(2)), Lsn(3));
        let (time, created) = (CaptureTime(4), CaptureTime(5));
        let record = Record { id: "vm1-1".to_owned(), overlay, disk, lsn, time, created, uri };
        write(&storage, &record).unwrap();
        assert_eq!(read(&storage, "vm1-1"), Ok(record.clone()));
        let length = storage.open(&path("vm1-1")).unwrap().len().unwrap().0;
        for byte in 0..length {
            storage.flip_bit(&path("vm1-1"), ByteOffset(byte), 1);
            let found = read(&storage, "vm1-1");
            // White space may change into other white space.
            assert!(found.is_err() || found.as_ref() == Ok(&record), "byte {byte}");
            storage.flip_bit(&path("vm1-1"), ByteOffset(byte), 1);
        }
        let other = Record { id: "vm1-2".to_owned(), ..record };
        write(&storage, &other).unwrap();
        storage.rename(&path("vm1-2"), &path("vm1-1")).unwrap();
        assert!(read(&storage, "vm1-1").is_err(), "a record of another overlay");
    }
}
