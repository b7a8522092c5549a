//! What an attach does before the disk's thread starts: claims the epoch, opens the disk behind,
//! and finds out what the filter may trust.

use std::{io, path::Path};

use backtide_agent_api::{AckPolicy, OnOutage};
use backtide_export::{ClientError, NbdUri, ParseUriError};
use backtide_io_filter::{Resume, Settings};
use backtide_storage::{ImageError, ImageFile};
use backtide_tracking::SavedTracking;
use backtide_units::{ByteCount, Lsn, Reason};
use uuid::Uuid;

use crate::record::{DiskRecord, ImageStamp, LSN_STEP, Records};

/// The disk behind, before its thread has it.
pub(crate) enum Behind {
    Image(ImageFile),
    /// To be connected on the disk's thread; it had this size a moment ago.
    Nbd(NbdUri, ByteCount),
}

/// Everything a disk's thread starts with.
pub(crate) struct Opened {
    pub(crate) record: DiskRecord,
    pub(crate) behind: Behind,
    pub(crate) settings: Settings,
    pub(crate) resume: Resume,
}

/// Why a disk cannot be attached.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OpenError {
    /// The image is missing, locked or no disk.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// Neither an absolute path nor the URI of an NBD export.
    #[error(transparent)]
    Uri(#[from] ParseUriError),
    /// The NBD server behind cannot be used.
    #[error("cannot use {uri} as the disk behind: {source}")]
    Nbd { uri: NbdUri, source: ClientError },
    /// Its size cannot be a disk's.
    #[error("{uri} has {size} bytes, which is not a positive multiple of 512")]
    NbdSize { uri: NbdUri, size: ByteCount },
    /// The agent's own records failed.
    #[error("cannot keep the record of disk {disk}: {source}")]
    Record { disk: String, source: io::Error },
}

/// Opens the disk behind `record` and begins a new attach: when this returns, the new epoch is
/// durable and the tracking file of the last one is durably gone.
pub(crate) async fn open(
    records: &Records,
    mut record: DiskRecord,
    behind: &str,
    stamp: Option<ImageStamp>,
) -> Result<(DiskRecord, Opened), OpenError> {
    let behind = open_behind(behind).await?;
    let saved = records.take_tracking(&record.name).map_err(|source| record_error(&record, source))?;
    let resume = resume(&record, saved, stamp.as_ref());
    record.epoch = record.epoch.next();
    record.lsn_bound = Lsn(record.lsn_bound.0.max(last_lsn(&resume).0)).plus(LSN_STEP);
    record.image_at_detach = None;
    record.attached = true;
    records.save(&record).map_err(|source| record_error(&record, source))?;
    let settings = settings(&record, behind.size());
    Ok((record.clone(), Opened { record, behind, settings, resume }))
}

fn record_error(record: &DiskRecord, source: io::Error) -> OpenError {
    OpenError::Record { disk: record.name.to_string(), source }
}

async fn open_behind(behind: &str) -> Result<Behind, OpenError> {
    // A path given to the agent is absolute, so it cannot look like a URI.
    if Path::new(behind).is_absolute() {
        return Ok(Behind::Image(ImageFile::open(Path::new(behind))?));
    }
    let uri: NbdUri = behind.parse()?;
    let client = backtide_export::Client::connect(&uri).await;
    let size = client.map_err(|source| OpenError::Nbd { uri: uri.clone(), source })?.size();
    if size.is_zero() || !size.0.is_multiple_of(512) {
        return Err(OpenError::NbdSize { uri, size });
    }
    Ok(Behind::Nbd(uri, size))
}

impl Behind {
    fn size(&self) -> ByteCount {
        match self {
            Self::Image(image) => image.size(),
            Self::Nbd(_, size) => *size,
        }
    }
}

/// What the filter may trust. A tracking file that fits the image is trusted; a disk that was never
/// protected has nothing to trust; everything else is compared.
fn resume(
    record: &DiskRecord,
    saved: Option<Result<SavedTracking, String>>,
    stamp: Option<&ImageStamp>,
) -> Resume {
    let lost = |reason| Resume::Lost {
        reason,
        history: record.history,
        last_lsn: record.lsn_bound,
        acked_durable: record.acked_durable,
    };
    match saved {
        None if record.history.is_none() && record.lsn_bound == Lsn::ZERO => Resume::New,
        None if record.history.is_none() => lost(Reason::FirstAttach),
        None => lost(Reason::AgentCrashed),
        Some(Err(why)) => {
            tracing::error!(disk = %record.name, why, "the tracking file cannot be trusted: everything is compared");
            lost(Reason::BitmapUntrusted)
        }
        Some(Ok(saved))
            if saved.disk != record.uuid || stamp.is_none() || record.image_at_detach.as_ref() != stamp =>
        {
            tracing::warn!(disk = %record.name, "the disk may have been changed while it was detached: everything is compared");
            lost(Reason::BitmapUntrusted)
        }
        Some(Ok(saved)) => Resume::Clean(saved),
    }
}

fn last_lsn(resume: &Resume) -> Lsn {
    match resume {
        Resume::New => Lsn::ZERO,
        Resume::Clean(saved) => saved.last_lsn,
        Resume::Lost { last_lsn, .. } => *last_lsn,
    }
}

fn settings(record: &DiskRecord, size: ByteCount) -> Settings {
    let limits = record.limits;
    Settings {
        disk: record.uuid,
        name: record.name.clone(),
        size,
        epoch: record.epoch,
        attach: Uuid::new_v4(),
        ack: match record.ack {
            AckPolicy::Local => backtide_io_filter::AckPolicy::Local,
            AckPolicy::Received => backtide_io_filter::AckPolicy::Received,
            AckPolicy::Durable => backtide_io_filter::AckPolicy::Durable,
            AckPolicy::DurableEveryWrite => backtide_io_filter::AckPolicy::DurableEveryWrite,
        },
        on_outage: match record.on_outage {
            OnOutage::Continue => backtide_io_filter::OnOutage::Continue,
            OnOutage::Block => backtide_io_filter::OnOutage::Block,
        },
        window_bytes: limits.window_bytes,
        resync_buffer_bytes: limits.resync_buffer_bytes,
        guest_delay_max: std::time::Duration::from_millis(limits.guest_delay_max_ms.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use backtide_units::{DiskId, HistoryId};

    fn record() -> DiskRecord {
        let receiver = "unix:/r".parse().unwrap();
        let record = DiskRecord::new("vm1".parse().unwrap(), "/disk.raw".into(), receiver);
        let image_at_detach = Some(stamp());
        DiskRecord { history: Some(HistoryId::random()), image_at_detach, lsn_bound: Lsn(77), ..record }
    }

    fn stamp() -> ImageStamp {
        ImageStamp { size: ByteCount(1 << 20), modified_ns: 5 }
    }

    fn saved(disk: DiskId) -> SavedTracking {
        SavedTracking {
            disk,
            history: None,
            last_lsn: Lsn(5),
            gap_from: Lsn(5),
            acked_durable: Lsn(5),
            reason: None,
            compare: false,
            dirty: backtide_tracking::DirtyBitmap::new(),
            zeroes: backtide_tracking::DirtyBitmap::new(),
        }
    }

    #[test]
    fn only_a_fitting_tracking_file_is_trusted() {
        let record = record();
        let good = saved(record.uuid);
        assert_eq!(resume(&record, Some(Ok(good.clone())), Some(&stamp())), Resume::Clean(good.clone()));
        let touched = ImageStamp { modified_ns: 6, ..stamp() };
        for distrusted in [
            resume(&record, Some(Ok(good.clone())), Some(&touched)),
            resume(&record, Some(Ok(good)), None),
            resume(&record, Some(Ok(saved(DiskId::random()))), Some(&stamp())),
            resume(&record, Some(Err("damaged".into())), Some(&stamp())),
        ] {
            assert!(matches!(
                distrusted,
                Resume::Lost { reason: Reason::BitmapUntrusted, last_lsn: Lsn(77), .. }
            ));
        }
    }

    #[test]
    fn no_tracking_file_means_a_crash_unless_the_disk_is_new() {
        let known = record();
        assert!(matches!(resume(&known, None, None), Resume::Lost { reason: Reason::AgentCrashed, .. }));
        let fresh = DiskRecord { history: None, lsn_bound: Lsn::ZERO, ..known };
        assert_eq!(resume(&fresh, None, None), Resume::New);
    }
}
