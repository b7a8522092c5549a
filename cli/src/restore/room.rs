//! Whether a new file has room for a point, before anything is written.

use backtide_control::{ApiError, ErrorCode};
use backtide_export::{Client, ClientError};
use backtide_units::ByteCount;

use crate::{
    ending::Failure,
    quantity::size_both,
    restore::{pieces::windows, target::Target},
};

/// Refuses a new file on a file system that has less left than the point holds. What is asked for that is asked only where the
/// whole disk would not fit; what cannot be told is left to the writing.
pub(crate) async fn refuse_no_room(source: &Client, target: &Target) -> Result<(), Failure> {
    let Some(free) = target.free() else { return Ok(()) };
    if free >= source.size() {
        return Ok(());
    }
    let Ok(needed) = data_bytes(source).await else { return Ok(()) };
    refuse_less(target, free, needed)
}

fn refuse_less(target: impl std::fmt::Display, free: ByteCount, needed: ByteCount) -> Result<(), Failure> {
    if needed <= free {
        return Ok(());
    }
    let message =
        format!("{target} needs {}, and its file system has {} left", size_both(needed), size_both(free));
    Err(ApiError::new(ErrorCode::Refused, message)
        .with_hint("make room there, restore to another file system or an NBD server, or try all the same with --force")
        .into())
}

/// What the point holds, at most.
async fn data_bytes(source: &Client) -> Result<ByteCount, ClientError> {
    let mut bytes = 0;
    for window in windows(source.size()) {
        let extents = source.block_status(window.start(), window.count()).await?;
        bytes += extents.iter().filter(|extent| !extent.zero).map(|extent| extent.length.0).sum::<u64>();
    }
    Ok(ByteCount(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_fit_is_told_with_both_sizes() {
        assert!(refuse_less("/x", ByteCount(4096), ByteCount(4096)).is_ok());
        let Err(Failure::Error(error)) = refuse_less("/x", ByteCount(4096), ByteCount(8192)) else {
            panic!("it does not fit")
        };
        assert_eq!(error.code, ErrorCode::Refused);
        assert!(
            error.message.starts_with("/x needs 8.0 KiB (8192 bytes), and its file system has 4.0 KiB"),
            "{error}"
        );
    }
}
