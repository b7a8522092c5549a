//! What the control API says of attaches and detaches that fail.

use backtide_agent_api::{Adopted, AttachRequest, DiskStatus};
use backtide_control::{ApiError, ErrorCode};
use backtide_units::{DiskName, Epoch, Lsn};

use crate::{
    disk::{DetachError, DiskHandle, HydrationProblem, OpenError},
    qcow2::format_of,
    record::DiskRecord,
};

/// Only what this agent has no history of can be adopted: it would forget its own. A disk that another agent has had
/// since has a newer one: it may come back by a failover.
pub(super) fn refuse_adopted(request: &AttachRequest, known: Option<&DiskRecord>) -> Result<(), ApiError> {
    let own = known.is_some_and(|record| record.history.is_some() && !(record.fenced && request.failover));
    if request.adopt.is_none() || !own {
        return Ok(());
    }
    let message = format!("this agent knows the history of disk {} itself", request.name);
    Err(ApiError::new(ErrorCode::Exists, message).with_hint("attach it without adopting one"))
}

/// What a receiver says nobody can have attached, or written, leaves no epoch or LSN for this agent.
pub(super) fn refuse_implausible(name: &DiskName, adopt: Option<&Adopted>) -> Result<(), ApiError> {
    let Some(Adopted { epoch, durable, .. }) = adopt else { return Ok(()) };
    let said = if *epoch > Epoch::OTHERS_MAX {
        format!("disk {name} was attached {epoch} times")
    } else if *durable > Lsn::PLAUSIBLE_MAX {
        format!("disk {name} has come to LSN {durable}")
    } else {
        return Ok(());
    };
    let message = format!("the receiver says that {said}, which is not believed");
    Err(ApiError::new(ErrorCode::Refused, message)
        .with_hint("attach it without its history, under another name: it is protected anew"))
}

/// Refuses what needs the receiver, of a disk that another agent has: its history stands still here.
pub(crate) fn refuse_taken_away(disk: &DiskStatus) -> Result<(), ApiError> {
    if disk.reason_code != "fenced" {
        return Ok(());
    }
    let name = &disk.name;
    let message = format!("disk {name} is fenced: {}", disk.reason);
    Err(ApiError::new(ErrorCode::Fenced, message)
        .with_hint(format!("`backtide status {name}` says how it comes back here")))
}

/// A disk that another agent has had since is taken back only knowingly.
pub(super) fn refuse_fenced(request: &AttachRequest, known: Option<&DiskRecord>) -> Result<(), ApiError> {
    let Some(known) = known.filter(|known| known.fenced && !request.take_over && !request.failover) else {
        return Ok(());
    };
    let name = &known.name;
    let message = format!("another agent has had disk {name} since this one");
    Err(ApiError::new(ErrorCode::Fenced, message).with_hint(format!(
        "`backtide failback {name}` brings its latest point here, and fetches only what differs; with --take-over the other agent is fenced, and what {} holds \
         becomes the latest content",
        request.image
    )))
}

/// Another image than the one a disk had is looked at anew: the guest of a raw disk may have made it look like another
/// format, by which it would reach files of the host.
pub(super) async fn refuse_other_format(
    request: &AttachRequest,
    known: Option<&DiskRecord>,
) -> Result<(), ApiError> {
    let Some(known) = known.filter(|known| known.image != request.image && request.format.is_none()) else {
        return Ok(());
    };
    let image = request.image.clone();
    let found = super::waiting(move || format_of(&image, None)).await?;
    match (known.format, found) {
        (Some(was), Some(is)) if was != is => {
            let message =
                format!("{} looks like {is}, and the image of disk {} was {was}", request.image, known.name);
            Err(ApiError::new(ErrorCode::Refused, message).with_hint(format!(
                "say what it is: --format {was} if the guest may have written its beginning, --format {is} if you made it so"
            )))
        }
        _ => Ok(()),
    }
}

/// A disk that clients have open is not detached.
pub(super) fn in_use(name: &DiskName, error: &DetachError) -> ApiError {
    let hint = match error {
        DetachError::Open { clients: 0, .. } => format!(
            "take the disk out of the virtual machine, or shut it down, then detach; where nobody comes back, `backtide detach {name} --nobody-returns`"
        ),
        DetachError::Open { waits: false, .. } | DetachError::Save { .. } => {
            "take the disk out of the virtual machine, or shut it down, then detach".to_owned()
        }
        DetachError::Open { waits: true, .. } => format!(
            "its machine may not come to an end while it waits: kill it, then detach; or `backtide detach {name} --force`, which answers what waits with an error"
        ),
    };
    ApiError::new(ErrorCode::Busy, format!("disk {name} is in use: {error}")).with_hint(hint)
}

pub(super) fn failed(error: &dyn std::error::Error) -> ApiError {
    ApiError::from_error(ErrorCode::Failed, error)
}

/// A detached disk of which something was not saved.
pub(super) fn not_saved(error: &dyn std::error::Error) -> ApiError {
    failed(error).with_hint("make room on the file system of the agent's state directory")
}

pub(super) fn open_error(error: &OpenError) -> ApiError {
    use backtide_storage::ImageError;
    if let OpenError::Image(ImageError::Missing { path }) = error
        && let Ok(target) = std::fs::read_link(path)
    {
        let message =
            format!("{} is a symbolic link to {}, which does not exist", path.display(), target.display());
        return ApiError::new(ErrorCode::NotFound, message)
            .with_hint("create or mount what the link points to");
    }
    let (code, hint) = match error {
        OpenError::Image(ImageError::Missing { .. }) => {
            (ErrorCode::NotFound, "create the image first, for example with truncate or qemu-img")
        }
        OpenError::Image(ImageError::Locked { is_shared: false, .. }) => {
            (ErrorCode::Locked, "detach it from the other agent first")
        }
        OpenError::Image(ImageError::Locked { is_shared: true, .. }) => {
            (ErrorCode::Locked, "try again when it is done with it, or end it first")
        }
        OpenError::Image(ImageError::Size { .. }) => {
            (ErrorCode::Usage, "extend the image with truncate to a multiple of 512 bytes")
        }
        OpenError::Image(ImageError::Kind { .. }) => {
            (ErrorCode::Usage, "name a raw image, a block device, a qcow2 file or an NBD URI")
        }
        OpenError::Uri(_) => (ErrorCode::Usage, "name an absolute path or an NBD URI"),
        OpenError::NbdCache { .. } => {
            (ErrorCode::Usage, "choose the cache of the NBD server where it is started")
        }
        OpenError::Image(ImageError::NotDirect { .. } | ImageError::Alignment { .. }) => {
            (ErrorCode::Usage, "use the page cache: --cache writeback")
        }
        OpenError::Image(ImageError::Blocks { .. }) => {
            (ErrorCode::Usage, "extend the image with truncate, or use the page cache: --cache writeback")
        }
        OpenError::Hydration(HydrationProblem::File(_)) => (
            ErrorCode::Damaged,
            "restore the disk from its receiver into a new image, and attach that under another name",
        ),
        OpenError::Hydration(HydrationProblem::Unknown { .. }) => (
            ErrorCode::Refused,
            "attach it to that agent under that name until nothing is missing, or restore the disk from its receiver",
        ),
        OpenError::Hydration(HydrationProblem::OtherImage { .. }) => {
            (ErrorCode::Refused, "attach the disk with the image it had, or this image under another name")
        }
        OpenError::Hydration(HydrationProblem::CutOff { .. }) => (
            ErrorCode::Refused,
            "`backtide failback` begins it anew; what the image holds itself can be attached under another name",
        ),
        OpenError::Hydration(HydrationProblem::Size { .. }) => {
            (ErrorCode::Refused, "give the image back the size it had")
        }
        OpenError::Hydration(
            HydrationProblem::Receiver { .. } | HydrationProblem::Note { .. } | HydrationProblem::Name(_),
        ) => {
            return failed(error);
        }
        OpenError::Shrunk { .. } => {
            (ErrorCode::Refused, "attach the smaller image under another name: it is a new disk")
        }
        OpenError::NbdSize { .. } => (ErrorCode::Usage, "disks have a multiple of 512 bytes"),
        OpenError::TooLarge { .. } => {
            (ErrorCode::Usage, "make several smaller disks of it, and let the guest join them (LVM, RAID 0)")
        }
        OpenError::NbdReadOnly { .. } => {
            (ErrorCode::Refused, "start the NBD server without its option for read-only exports")
        }
        OpenError::Nbd { .. } => (ErrorCode::Unreachable, "start the NBD server first"),
        OpenError::Spill { .. } => (ErrorCode::Failed, "remove it by hand: nothing needs it any more"),
        OpenError::Record { .. } => {
            (ErrorCode::Failed, "the agent's state directory has to have room and be writable")
        }
        OpenError::Image(ImageError::Io { .. }) => return failed(error),
    };
    ApiError::new(code, error.to_string()).with_hint(hint)
}

/// A disk whose image lacks blocks is of no use without the agent.
pub(super) async fn refuse_incomplete(handle: &DiskHandle) -> Result<(), ApiError> {
    // One that stands still has its own answer.
    let Ok(status) = handle.status().await else { return Ok(()) };
    let Some(hydration) = status.hydration else { return Ok(()) };
    let (disk, missing) = (&status.name, hydration.missing_bytes);
    if missing.is_zero() {
        let message =
            format!("the image of disk {disk} lacks nothing any more, which is still being made durable");
        return Err(ApiError::new(ErrorCode::Refused, message).with_hint("detach it again in a moment"));
    }
    let message = format!("the image of disk {disk} lacks {missing} bytes, which are still at the receiver");
    Err(ApiError::new(ErrorCode::Refused, message).with_hint(
        "detach it when nothing is missing; with --incomplete only the same agent can go on with it",
    ))
}
