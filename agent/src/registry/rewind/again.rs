//! A disk that was let go of for a rewind is had again: set back, or as it was.
//!
//! Invariant: what is said of a rewind that failed is what happens later. As long as nobody was served with it, what says
//! that the disk lacks blocks is taken back; where that fails too, it is said that the disk is set back when it can be attached.

use std::{io, sync::Arc};

use backtide_agent_api::DiskStatus;
use backtide_control::ApiError;
use backtide_units::DiskName;

use super::{
    super::{Registry, waiting},
    Made, Noted,
};
use crate::{
    claims::Claim,
    disk,
    record::{DiskRecord, Records},
};

impl Registry {
    /// Has the disk again, and says what became of it when it was not to be set back, or cannot be; `lacks`, also then, whether it lacks
    /// blocks of the point.
    pub(super) async fn has_again(
        self: &Arc<Self>,
        claim: &Claim,
        name: &DiskName,
        set_back: Result<Made, ApiError>,
        lacks: &mut bool,
    ) -> Result<(Made, DiskStatus), ApiError> {
        let attached = self.attach_again(claim, name).await;
        let mut made = match (set_back, &attached) {
            (Ok(made), _) => made,
            (Err(why), Ok(_)) => return Err(why),
            (Err(why), Err(error)) => return Err(not_served(why, error)),
        };
        *lacks = made.noted.is_some();
        let error = match attached {
            Ok(disk) => return Ok((made, disk)),
            Err(error) => error,
        };
        // From when it was served its guest may have seen the point, and written to it.
        let served = self.disks.read().await.contains_key(name);
        let Some(noted) = made.noted.take().filter(|_| !served) else { return Err(error) };
        let records = self.records.clone();
        if let Err(kept) = waiting(move || take_back(&records, noted)).await? {
            let message = format!(
                "disk {name} cannot be attached, which goes on being tried, and IS SET BACK when it can be: {}; that cannot be taken back: {kept}",
                error.message
            );
            return Err(ApiError { message, ..error });
        }
        *lacks = false;
        tracing::warn!(disk = %name, "the rewind is taken back");
        let message = format!("disk {name} is not set back, and as it was: {}", error.message);
        let failed = ApiError { message, ..error };
        match self.attach_again(claim, name).await {
            Ok(_) => Err(failed),
            Err(error) => Err(not_served(failed, &error)),
        }
    }
}

/// Of a disk that is as it was, and not served.
fn not_served(why: ApiError, error: &ApiError) -> ApiError {
    let message = format!(
        "{}; and it is not served: it cannot be attached again, which goes on being tried: {}",
        why.message, error.message
    );
    ApiError { message, ..why }
}

/// Has the disk lack what it lacked before, durably. On an error it lacks blocks of the point.
fn take_back(records: &Records, noted: Noted) -> io::Result<()> {
    let Noted { record, header, as_it_was, _reserved } = noted;
    let disk = &record.name;
    match as_it_was {
        None => {
            // In this order: a note without that file would keep the image from its disk.
            disk::take_note_back(&record, &header)?;
            records.discard_hydration(disk)?;
        }
        Some((earlier, missing, true)) => records.create_hydration(disk, earlier, missing)?,
        Some((_, _, false)) => {
            let why = "what it lacked before is not all noted";
            return Err(io::Error::other(why));
        }
    }
    // An attach that failed late has noted it.
    let again = records.load(disk).and_then(|now| match now.filter(|now| now.rewound != record.rewound) {
        Some(now) => records.save(&DiskRecord { rewound: record.rewound, ..now }),
        None => Ok(()),
    });
    if let Err(error) = again {
        tracing::error!(%disk, %error, "cannot save the disk's record: its last rewind is one that was taken back");
    }
    Ok(())
}

#[cfg(test)]
mod tests;
