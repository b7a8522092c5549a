//! What the agent remembers of a mount: `NAME.mount` in its state directory, in JSON.
//!
//! A mount that can be written has an overlay beside it ([`super::overlays`]).
//!
//! Invariant: a record is durable before the receiver is asked to keep the mount's point, and goes only after the
//! receiver keeps it no longer. So whoever dies in between leaves nothing kept for ever: the next agent serves the
//! mount again, or gives its point up.

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use backtide_agent_api::StreamTls;
use backtide_control::Address;
use backtide_hydration::SourcePoint;
use backtide_storage::{Storage, StorageFile, read_file, replace_file};
use backtide_units::{ByteCount, CaptureTime, DiskId, DiskName, HistoryId, Lsn};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

const VERSION: u32 = 1;
const SUFFIX: &str = ".mount";
/// Of a file that is there for a moment only, until it has no name.
const CACHE_SUFFIX: &str = ".mount-cache";
/// Of a record that is not in its place yet.
const UNWRITTEN_SUFFIX: &str = ".mount.new";
const RECORD_BYTES_MAX: ByteCount = ByteCount(1 << 16);

/// One mount.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct MountRecord {
    version: u32,
    pub(super) id: String,
    /// Of this mount and no other, at any agent.
    uuid: Uuid,
    pub(super) receiver: Address,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) stream_tls: Option<StreamTls>,
    disk: DiskId,
    pub(super) name: DiskName,
    history: HistoryId,
    pub(super) lsn: Lsn,
    time: CaptureTime,
    size: ByteCount,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) changed_since: Option<Lsn>,
    /// Where it is served.
    pub(super) uri: String,
    pub(super) cache_bytes: ByteCount,
    pub(super) mounted: CaptureTime,
    /// What is written goes to this overlay.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) overlay: Option<Uuid>,
    /// It is not served, and its overlay stays for another mount.
    #[serde(default)]
    pub(super) kept: bool,
    /// It was ended, and the receiver has not heard of it.
    #[serde(default)]
    pub(super) ended: bool,
}

impl MountRecord {
    /// Of a mount that begins at `now`.
    pub(super) fn new(
        point: &SourcePoint,
        receiver: Address,
        stream_tls: Option<StreamTls>,
        now: CaptureTime,
    ) -> Self {
        let uuid = Uuid::new_v4();
        Self {
            version: VERSION,
            id: format!("{}-{:08x}", point.name, uuid.as_fields().0),
            uuid,
            receiver,
            stream_tls,
            disk: point.disk,
            name: point.name.clone(),
            history: point.history,
            lsn: point.lsn,
            time: point.time,
            size: point.size,
            changed_since: None,
            uri: String::new(),
            cache_bytes: ByteCount::ZERO,
            mounted: now,
            overlay: None,
            kept: false,
            ended: false,
        }
    }

    /// The same, served at `uri`.
    pub(super) fn served_at(self, uri: String) -> Self {
        Self { kept: false, uri, ..self }
    }

    /// The same, not served, with what was written kept.
    pub(super) fn into_kept(self) -> Self {
        Self { kept: true, ..self }
    }

    /// The same, over for good.
    pub(super) fn into_ended(self) -> Self {
        Self { ended: true, ..self }
    }

    /// The point.
    pub(super) fn point(&self) -> SourcePoint {
        SourcePoint {
            receiver: self.receiver.to_string(),
            disk: self.disk,
            name: self.name.clone(),
            history: self.history,
            lsn: self.lsn,
            time: self.time,
            size: self.size,
        }
    }

    /// For whom the receiver keeps the point.
    pub(super) fn owner(&self) -> String {
        format!("mount {} of an agent ({})", self.id, self.uuid)
    }
}

/// The records of an agent's mounts.
#[derive(Clone)]
pub(super) struct MountRecords(Arc<dyn Storage>);

impl MountRecords {
    pub(super) fn new(storage: Arc<dyn Storage>) -> Self {
        Self(storage)
    }

    /// All of them. What an agent left that died while it made a cache, or wrote a record, is removed.
    pub(super) fn load_all(&self) -> io::Result<Vec<MountRecord>> {
        let mut records = Vec::new();
        for name in self.0.list(Path::new(""))? {
            if name.ends_with(CACHE_SUFFIX) || name.ends_with(UNWRITTEN_SUFFIX) {
                self.0.remove(Path::new(&name))?;
            }
            if !name.ends_with(SUFFIX) {
                continue;
            }
            match self.load(Path::new(&name)) {
                Ok(record) => records.push(record),
                Err(error) => {
                    tracing::error!(file = name, %error, "cannot use the record of a mount: its point stays at the receiver until `backtide retention release`")
                }
            }
        }
        Ok(records)
    }

    fn load(&self, path: &Path) -> io::Result<MountRecord> {
        let bytes = read_file(&*self.0, path, RECORD_BYTES_MAX)?;
        let record: MountRecord = serde_json::from_slice(&bytes)?;
        if record.version != VERSION {
            let why = format!("expected version {VERSION}, found {}", record.version);
            return Err(io::Error::new(io::ErrorKind::InvalidData, why));
        }
        Ok(record)
    }

    /// Makes a record durable.
    pub(super) fn save(&self, record: &MountRecord) -> io::Result<()> {
        replace_file(&*self.0, &path(&record.id), &serde_json::to_vec_pretty(record)?)
    }

    /// Removes one.
    pub(super) fn remove(&self, id: &str) -> io::Result<()> {
        self.0.remove(&path(id))?;
        self.0.sync_dir(Path::new(""))
    }

    /// Where all of it lies.
    pub(super) fn storage(&self) -> Arc<dyn Storage> {
        Arc::clone(&self.0)
    }

    /// A file without a name.
    pub(super) fn cache_file(&self, id: &str) -> io::Result<Arc<dyn StorageFile>> {
        let path = PathBuf::from(format!("{id}{CACHE_SUFFIX}"));
        let file = self.0.create_new(&path)?;
        self.0.remove(&path)?;
        Ok(file)
    }
}

/// What the file of the mount `id` is called.
pub(super) fn file_name(id: &str) -> String {
    format!("{id}{SUFFIX}")
}

fn path(id: &str) -> PathBuf {
    PathBuf::from(file_name(id))
}

#[cfg(test)]
mod hostile;

#[cfg(test)]
mod tests {
    use backtide_storage::MemoryStorage;

    use super::*;

    #[test]
    fn what_was_saved_is_there_after_a_power_cut_and_what_was_removed_is_not() {
        let storage = MemoryStorage::new();
        let records = MountRecords::new(Arc::new(storage.clone()));
        let receiver: Address = "unix:/run/stream.sock".parse().unwrap();
        let point = SourcePoint {
            receiver: receiver.to_string(),
            disk: DiskId::random(),
            name: "vm1".parse().unwrap(),
            history: HistoryId::random(),
            lsn: Lsn(40),
            time: CaptureTime(7),
            size: ByteCount(1 << 40),
        };
        let new = || MountRecord::new(&point, receiver.clone(), None, CaptureTime(9));
        let (kept, gone) = (new(), MountRecord { ended: true, ..new() });
        assert_ne!(kept.owner(), gone.owner());
        records.save(&kept).unwrap();
        records.save(&gone).unwrap();
        records.cache_file(&kept.id).unwrap();
        records.remove(&gone.id).unwrap();
        storage.crash(3);
        assert_eq!(records.load_all().unwrap(), std::slice::from_ref(&kept));
        assert_eq!(kept.point(), point);
    }
}
