//! `overlays/ID.json`: what an overlay lies over, and where it is served. `FORMAT.md` beside this crate describes it.
//!
//! It is written after the overlay's files, and becomes `ID.going` before they are removed. So files that something was written to
//! have the one or the other beside them, unless that was lost.

use std::{
    collections::BTreeSet,
    io,
    path::{Path, PathBuf},
};

use backtide_overlay::{OverlayFiles, OverlayId};
use backtide_receiver_api::DiskRef;
use backtide_storage::Storage;
use backtide_units::{ByteCount, CaptureTime, Lsn};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::store_place::StorePlace;
use crate::sealed_json::SealedJson;

/// The directory of overlays in a store.
pub(crate) const DIR: &str = "overlays";
const KIND: SealedJson =
    SealedJson { magic: "backtide-overlay", version: 1, bytes_max: ByteCount(64 * 1024) };

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
    /// By which store; none when nobody knows.
    pub(crate) store: Option<StorePlace>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RecordFile {
    id: String,
    overlay: Uuid,
    disk: DiskRef,
    lsn: Lsn,
    time: CaptureTime,
    created: CaptureTime,
    uri: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    store: Option<StorePlace>,
}

/// Where a record is.
pub(crate) fn path(id: &str) -> PathBuf {
    Path::new(DIR).join(format!("{id}.json"))
}

/// What the name of a record ends with while its overlay is removed.
pub(crate) const GOING: &str = ".going";

/// Where the record of an overlay is while that is removed.
pub(crate) fn going(id: &str) -> PathBuf {
    Path::new(DIR).join(format!("{id}{GOING}"))
}

/// The overlays among the files with these names: those that have a record, and those that something was written to whose
/// record is lost. One that has only been made has none yet, and one that is removed has none any more.
pub(crate) fn ids(storage: &dyn Storage, names: &[String]) -> BTreeSet<String> {
    let with = |ending: &'static str| names.iter().filter_map(move |name| name.strip_suffix(ending));
    let is_going = |id: &str| names.iter().any(|name| name.strip_suffix(GOING) == Some(id));
    let written = |id: &&str| OverlayFiles::named(Path::new(DIR), id).may_hold_something(storage);
    let lost = with(".map").chain(with(".data")).filter(|id| !is_going(id)).filter(written);
    with(".json").chain(lost).map(str::to_owned).collect()
}

/// Writes a record so that a power cut leaves the old one or the new one.
///
/// # Errors
/// The file system's.
pub(crate) fn write(storage: &dyn Storage, record: &Record) -> io::Result<()> {
    let Record { id, overlay, disk, lsn, time, created, uri, store } = record.clone();
    let file = RecordFile { id, overlay: overlay.0, disk, lsn, time, created, uri, store };
    KIND.write(storage, &path(&record.id), &file)
}

/// Reads the record called `id`.
///
/// # Errors
/// A sentence with the file and what is wrong with it.
pub(crate) fn read(storage: &dyn Storage, id: &str) -> Result<Record, String> {
    let place = path(id);
    let file: Option<RecordFile> = KIND.read(storage, &place).map_err(|error| error.to_string())?;
    let place = storage.display(&place);
    let missing = || format!("cannot read {}: it is missing, and what was written is there", place.display());
    let RecordFile { id: found, overlay, disk, lsn, time, created, uri, store } = file.ok_or_else(missing)?;
    if found != id {
        return Err(format!("{} is damaged: it is of overlay {found}", place.display()));
    }
    Ok(Record { id: found, overlay: OverlayId(overlay), disk, lsn, time, created, uri, store })
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
        let store = Some(StorePlace::of(Path::new("/")).unwrap());
        let record = Record { id: "vm1-1".to_owned(), overlay, disk, lsn, time, created, uri, store };
        write(&storage, &record).unwrap();
        assert_eq!(read(&storage, "vm1-1"), Ok(record.clone()));
        let length = storage.open(&path("vm1-1")).unwrap().len().unwrap().0;
        for byte in 0..length {
            storage.flip_bit(&path("vm1-1"), ByteOffset(byte), 1);
            let found = read(&storage, "vm1-1");
            assert!(found.is_err(), "byte {byte}: {found:?}");
            storage.flip_bit(&path("vm1-1"), ByteOffset(byte), 1);
        }
        let other = Record { id: "vm1-2".to_owned(), ..record };
        write(&storage, &other).unwrap();
        storage.rename(&path("vm1-2"), &path("vm1-1")).unwrap();
        assert!(read(&storage, "vm1-1").is_err(), "a record of another overlay");
    }
}
