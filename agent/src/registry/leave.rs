//! The end of the agent's disks: with the agent, or handed over to the one that follows at once.
//!
//! Invariant: what is handed over is let go of before the process becomes another program - the image
//! is flushed, unlocked and written by nobody here any more. When one disk does not let go, none is
//! handed over: the others are attached again.

use std::{sync::Arc, time::Duration};

use backtide_control::{ApiError, ErrorCode};
use backtide_units::DiskName;
use tokio::task::JoinSet;

use super::{
    Attached, Registry,
    left::Left,
    place::{Place, Seen},
};
use crate::{
    claims::Claim,
    disk::{Command, DetachError, DiskHandle, Leaving},
    record::{DiskRecord, Records},
};

/// How long the end of the agent waits for attaches and detaches that are under way.
const CHANGES_TIME: Duration = Duration::from_secs(10);

/// How long a disk may take to flush while it is served, before it is handed over.
const FLUSH_TIME: Duration = Duration::from_secs(20);

/// How often all disks are flushed so: the last time there is little left.
const FLUSHES: usize = 2;

/// How long a disk may take to let go of its image when it is handed over.
const LET_GO_TIME: Duration = Duration::from_secs(10);

impl Registry {
    /// Ends every disk in good order, for the end of the agent: they are attached again by the next.
    pub(crate) async fn shut_down(&self) {
        if let Err(names) = self.claims.close(CHANGES_TIME).await {
            tracing::warn!(
                disks = names_text(&names),
                "the agent ends while a disk is being attached or detached"
            );
        }
        self.end_restoring();
        let disks = std::mem::take(&mut *self.disks.write().await);
        let mut ending = JoinSet::new();
        for (name, attached) in disks {
            ending.spawn(end(name, attached, self.records.clone(), Leaving::Stopped));
        }
        while let Some(ended) = ending.join_next().await {
            if let Err(error) = ended {
                tracing::error!(%error, "detach");
            }
        }
    }

    /// Refuses to let go of a disk whose image is not where it was: what the guest wrote would be lost with the open file.
    ///
    /// # Errors
    /// `refused`, with what became of the image and the way out; `busy` when its file system does not tell.
    pub(super) async fn require_in_place(&self, name: &DiskName) -> Result<(), ApiError> {
        let place = self.disks.read().await.get(name).and_then(|attached| attached.place.clone());
        match place {
            Some(place) => in_place(name, &place).await,
            None => Ok(()),
        }
    }

    /// Brings every disk close to its end while it is served: afterwards there is little to flush.
    ///
    /// # Errors
    /// `busy` when a disk stands still: it would not let go; or is being attached or detached for long. `failed` when one lost what it had
    /// acknowledged, which its guest has to hear first. `refused` when an image is not where it was: the next
    /// program would open another file. `locked` when the host uses an image by now: the next program would not have it.
    pub(crate) async fn prepare_to_hand_over(&self) -> Result<(), ApiError> {
        self.claims.settled(CHANGES_TIME).await.map_err(|names| being_changed(&names))?;
        let mut looking = JoinSet::new();
        for (name, attached) in self.disks.read().await.iter() {
            let (name, place) = (name.clone(), attached.place.clone());
            looking.extend(place.map(|place| async move { in_place(&name, &place).await }));
        }
        all_well(looking).await?;
        self.require_unused().await?;
        for _ in 0..FLUSHES {
            let mut flushing = JoinSet::new();
            for (name, attached) in self.disks.read().await.iter() {
                let (name, handle) = (name.clone(), attached.handle.clone());
                flushing.spawn(async move { flush(&name, &handle).await });
            }
            all_well(flushing).await?;
        }
        Ok(())
    }

    /// Ends every disk for the program that follows. On an error the disks can be
    /// [restored](Self::restore), those that stand still once they have let go.
    ///
    /// # Errors
    /// `busy` when a disk does not let go, or is being attached or detached.
    pub(crate) async fn hand_over(self: &Arc<Self>) -> Result<(), ApiError> {
        if let Err(names) = self.claims.close(CHANGES_TIME).await {
            self.claims.open();
            return Err(being_changed(&names));
        }
        let disks = std::mem::take(&mut *self.disks.write().await);
        let mut ending = JoinSet::new();
        let mut left: Vec<DiskName> = Vec::new();
        for (name, attached) in disks {
            let claim = self.claims.claim_closed(&name);
            left.push(name.clone());
            ending.spawn(Arc::clone(self).let_go(claim, name, attached));
        }
        let all = async {
            while let Some(ended) = ending.join_next().await {
                if let Ok(name) = ended {
                    left.retain(|other| *other != name);
                }
            }
        };
        let _ = tokio::time::timeout(LET_GO_TIME, all).await;
        let Some(name) = left.first() else {
            self.end_restoring();
            return Ok(());
        };
        // Those that stand still end when they can, and are attached again then.
        ending.detach_all();
        self.claims.open();
        Err(stands_still(name))
    }

    async fn let_go(self: Arc<Self>, _claim: Claim, name: DiskName, attached: Attached) -> DiskName {
        end(name.clone(), attached, self.records.clone(), Leaving::HandedOver).await;
        self.leave_image(&name).await;
        name
    }
}

/// Of disks that an attach or detach holds for so long that something must stand still.
fn being_changed(names: &[DiskName]) -> ApiError {
    let (disks, verb) = match names {
        [_] => ("disk", "is"),
        _ => ("disks", "are"),
    };
    let message = format!(
        "{disks} {} {verb} being attached or detached for more than {} s, and only what has ended can be handed over: what it \
         waits for, the image's storage or its NBD server, has to answer first",
        names_text(names),
        CHANGES_TIME.as_secs()
    );
    ApiError::new(ErrorCode::Busy, message).with_hint(
        "see to that storage, then restart again; the storage that never comes back is left behind by ending the agent's process \
         (kill -9), which --hold or systemd starts again under the guests",
    )
}

fn names_text(names: &[DiskName]) -> String {
    names.iter().map(DiskName::as_str).collect::<Vec<_>>().join(", ")
}

/// Until all have ended, or one has failed: a task that ends otherwise leaves nothing to hand over.
async fn all_well(mut tasks: JoinSet<Result<(), ApiError>>) -> Result<(), ApiError> {
    while let Some(ended) = tasks.join_next().await {
        ended.map_err(|error| ApiError::from_error(ErrorCode::Failed, &error))??;
    }
    Ok(())
}

async fn in_place(name: &DiskName, place: &Place) -> Result<(), ApiError> {
    match place.look().await? {
        Seen::InPlace => Ok(()),
        Seen::StandsStill => Err(stands_still(name)),
        Seen::Displaced(displaced) => {
            let message = format!("disk {name} cannot be let go of: {displaced}");
            Err(ApiError::new(ErrorCode::Refused, message).with_hint(format!(
                "copy the disk through its NBD export first, for instance with nbdcopy; `backtide detach {name} --force` then gives up the open file"
            )))
        }
    }
}

fn stands_still(disk: &DiskName) -> ApiError {
    let message = format!("disk {disk} does not let go: its image or server stands still");
    ApiError::new(ErrorCode::Busy, message)
        .with_hint("every disk goes on as before; bring its storage back and try again, or let go of it with `backtide detach --force`")
}

async fn flush(disk: &DiskName, handle: &DiskHandle) -> Result<(), ApiError> {
    let flushed = tokio::time::timeout(FLUSH_TIME, handle.ask_at_length(Command::Flush)).await;
    match flushed {
        Err(_) => Err(stands_still(disk)),
        Ok(Ok(false)) => {
            let message = format!("disk {disk} cannot be flushed: what was written last may be lost");
            Err(ApiError::new(ErrorCode::Failed, message)
                .with_hint("its guest is told at its next flush; look at the storage, then try again"))
        }
        // A disk that has ended meanwhile has flushed.
        Ok(Ok(true) | Err(_)) => Ok(()),
    }
}

pub(super) async fn end(name: DiskName, attached: Attached, records: Records, leaving: Leaving) {
    // None of the ways of an agent that ends spares a client.
    drop(end_unless_open(name, attached, records, leaving).await);
}

/// The same of a disk that stays while clients have it open, where it is to be left so: then it goes on, and is given back.
pub(super) async fn end_unless_open(
    name: DiskName,
    attached: Attached,
    records: Records,
    leaving: Leaving,
) -> Option<(Attached, DetachError)> {
    match attached.handle.ask_at_length(|answer| Command::Detach { leaving, answer }).await {
        Ok(Ok(_)) => {}
        Ok(Err(open @ DetachError::Open { .. })) => return Some((attached, open)),
        Ok(Err(error)) => tracing::error!(disk = %name, %error, "detach"),
        Err(error) => tracing::error!(disk = %name, %error, "detach"),
    }
    let left = Left::end(attached.qcow2, attached.place.map(Place::into_image)).await;
    if let Some(error) = left.still_open() {
        tracing::error!(disk = %name, %error, "the disk's qcow2 file is still open");
    }
    let note = move |record: DiskRecord| {
        let mut record = DiskRecord { stopped: true, ..record };
        left.note(&mut record);
        Some(record)
    };
    if let Err(error) = records.change_aside(&name, note).await {
        tracing::error!(disk = %name, %error, "cannot save the disk's record");
    }
    None
}
