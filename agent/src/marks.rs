//! One label on several disks at one instant.
//!
//! Every disk holds its answers, then every disk is marked, then all answers are given. A write
//! that began after one disk's write was answered cannot lie before that disk's mark without the
//! answered one lying before its own: either the answer came before the hold, or after every mark.

use std::time::Duration;

use backtide_agent_api::{DiskMark, MarkState};
use backtide_io_filter::MarkError;
use backtide_units::DiskName;
use tokio::task::JoinSet;

use crate::disk::{Command, DiskHandle, NoAnswer};

/// Why nothing was marked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MarksError {
    #[error(transparent)]
    Mark(#[from] MarkError),
    #[error("disk {disk} does not forward its writes now ({why}): this moment will not be recoverable")]
    NotForwarding { disk: DiskName, why: String },
    #[error("disk {disk}: {source}")]
    NoAnswer { disk: DiskName, source: NoAnswer },
}

/// Marks all disks at one instant. When that fails, disks that were marked by then have the label each for itself.
pub(crate) async fn mark(label: &str, disks: &[(DiskName, DiskHandle)]) -> Result<Vec<DiskMark>, MarksError> {
    let marked = mark_held(label, disks).await;
    let mut gave_early = None;
    for (disk, handle) in disks {
        // A disk that has ended has given its answers.
        if !handle.ask(Command::Release).await.unwrap_or(false) {
            gave_early.get_or_insert(disk);
        }
    }
    // What a guest built upon such an answer may lie before a later mark.
    match gave_early {
        Some(disk) if disks.len() > 1 => {
            marked.and_then(|_| Err(MarksError::Mark(MarkError::HeldTooLong { disk: disk.to_string() })))
        }
        Some(_) | None => marked,
    }
}

async fn mark_held(label: &str, disks: &[(DiskName, DiskHandle)]) -> Result<Vec<DiskMark>, MarksError> {
    for (disk, handle) in disks {
        let no_answer = |source| MarksError::NoAnswer { disk: disk.clone(), source };
        if !handle.ask(Command::Hold).await.map_err(no_answer)? {
            let why = handle.status().await.map_err(no_answer)?.reason;
            return Err(MarksError::NotForwarding { disk: disk.clone(), why });
        }
    }
    let mut marks = Vec::with_capacity(disks.len());
    for (disk, handle) in disks {
        let no_answer = |source| MarksError::NoAnswer { disk: disk.clone(), source };
        let at = handle.ask(|answer| Command::Mark(label.to_owned(), answer)).await.map_err(no_answer)??;
        marks.push(DiskMark {
            disk: disk.clone(),
            lsn: at.lsn,
            time: at.time,
            recoverable: false,
            state: at.state,
        });
    }
    Ok(marks)
}

/// Waits for at most so long until the receiver has durably what was marked on disks that are in sync, or until that is
/// lost: only then nothing can change it any more.
pub(crate) async fn confirm(
    label: &str,
    disks: Vec<(DiskName, DiskHandle)>,
    marks: &mut [DiskMark],
    wait: Duration,
) {
    let mut asked = JoinSet::new();
    for (index, ((_, handle), mark)) in disks.into_iter().zip(marks.iter()).enumerate() {
        if mark.state != MarkState::Unconfirmed {
            continue;
        }
        let (lsn, label) = (mark.lsn, label.to_owned());
        asked.spawn(async move {
            let kept = handle.ask_at_length(|answer| Command::MarkKept(lsn, label, answer));
            // A disk that has ended meanwhile has nothing to tell.
            let state = tokio::time::timeout(wait, kept).await.ok().and_then(Result::ok);
            (index, state.unwrap_or(MarkState::Unconfirmed))
        });
    }
    for (index, state) in asked.join_all().await {
        (marks[index].recoverable, marks[index].state) = (state == MarkState::Kept, state);
    }
}
