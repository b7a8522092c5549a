//! The copy: many pieces at once, window after window; and the proof that it arrived.

use backtide_control::{ApiError, ErrorCode};
use backtide_export::{Client, Extent};
use backtide_units::{ByteCount, ByteRange};
use blake3::Hash;
use tokio::task::JoinSet;

use crate::{
    ending::{Failure, failed},
    output::progress::Progress,
    restore::{
        pieces::{WindowDigest, digest, pieces, runs, windows},
        target::Target,
    },
};

/// Pieces in flight: with 1 MiB each also the memory of a restore in MiB, twice.
const IN_FLIGHT: usize = 16;

/// What was copied.
#[derive(Debug)]
pub(crate) struct Copied {
    /// The digest of each window, in order.
    windows: Vec<Hash>,
    /// The point's size.
    size: ByteCount,
    /// How many bytes were written; the rest are zeroes.
    pub(crate) data_bytes: ByteCount,
}

/// What became of one piece.
struct Piece {
    index: usize,
    digest: [u8; 32],
    written: u64,
}

/// Copies all of `source` to `target` and makes it durable there.
pub(crate) async fn copy(
    source: &Client,
    target: &Target,
    progress: &mut Progress,
) -> Result<Copied, Failure> {
    let size = source.size();
    let mut copied = Copied { windows: Vec::new(), size, data_bytes: ByteCount(0) };
    for window in windows(size) {
        let extents = source
            .block_status(window.start(), window.count())
            .await
            .map_err(|error| read_failure(&error))?;
        if !target.is_fresh() {
            zero_the_holes(target, window, &extents).await?;
        }
        let (source, target) = (source.clone(), target.clone());
        let (hash, written) = each_piece(window, size, &extents, progress, move |index, range| {
            copy_piece(source.clone(), target.clone(), index, range)
        })
        .await?;
        copied.windows.push(hash);
        copied.data_bytes.0 += written;
    }
    target.sync().await?;
    progress.end();
    Ok(copied)
}

/// Reads `target` back and compares it with what was copied.
pub(crate) async fn verify(target: &Target, copied: &Copied, progress: &mut Progress) -> Result<(), Failure> {
    for (window, expected) in windows(copied.size).zip(&copied.windows) {
        let extents = target.extents(window).await?;
        let reader = target.clone();
        let (hash, _) = each_piece(window, copied.size, &extents, progress, move |index, range| {
            let target = reader.clone();
            async move {
                let data = target.read(range).await?;
                Ok(Piece { index, digest: digest(&data), written: 0 })
            }
        })
        .await?;
        if hash != *expected {
            let message =
                format!("what was read back from {target} differs from the point in bytes {window}");
            return Err(ApiError::new(ErrorCode::Damaged, message)
                .with_hint("the target does not keep what is written to it; do not use this restore")
                .into());
        }
    }
    progress.end();
    Ok(())
}

/// Works on all pieces of a window that may hold data, [`IN_FLIGHT`] at once.
async fn each_piece<W>(
    window: ByteRange,
    size: ByteCount,
    extents: &[Extent],
    progress: &mut Progress,
    work: impl Fn(usize, ByteRange) -> W,
) -> Result<(Hash, u64), Failure>
where
    W: Future<Output = Result<Piece, Failure>> + Send + 'static,
{
    let pieces = pieces(window, extents);
    let mut digests = WindowDigest::of(pieces.len());
    let mut running = JoinSet::new();
    let mut written = 0;
    let mut finish = |piece: Piece| {
        digests.set(piece.index, piece.digest);
        written += piece.written;
    };
    for (index, (range, holds_data)) in pieces.into_iter().enumerate() {
        if holds_data {
            if running.len() >= IN_FLIGHT
                && let Some(ended) = running.join_next().await
            {
                finish(unwrap(ended)?);
            }
            running.spawn(work(index, range));
        }
        progress.at(ByteCount(range.end().0), size);
    }
    while let Some(ended) = running.join_next().await {
        finish(unwrap(ended)?);
    }
    Ok((digests.finish(), written))
}

fn unwrap(ended: Result<Result<Piece, Failure>, tokio::task::JoinError>) -> Result<Piece, Failure> {
    ended.unwrap_or_else(|error| Err(failed(format!("a part of the copy ended early: {error}"))))
}

async fn copy_piece(
    source: Client,
    target: Target,
    index: usize,
    range: ByteRange,
) -> Result<Piece, Failure> {
    let data = source.read(range.start(), range.count()).await.map_err(|error| read_failure(&error))?;
    let mut written = 0;
    for (run, zero) in runs(&data) {
        let (start, end) = (range.start().0 + run.start as u64, range.start().0 + run.end as u64);
        let at = ByteRange::between(backtide_units::ByteOffset(start), backtide_units::ByteOffset(end));
        if !zero {
            written += at.count().0;
            target.write(at, data.slice(run)).await?;
        } else if !target.is_fresh() {
            target.zero(at).await?;
        }
    }
    Ok(Piece { index, digest: digest(&data), written })
}

/// Zeroes what no piece writes to. Each run of such pieces is one request.
async fn zero_the_holes(target: &Target, window: ByteRange, extents: &[Extent]) -> Result<(), Failure> {
    let mut run: Option<ByteRange> = None;
    for (range, holds_data) in pieces(window, extents) {
        match (holds_data, run) {
            (false, None) => run = Some(range),
            (false, Some(before)) => run = Some(ByteRange::between(before.start(), range.end())),
            (true, Some(before)) => {
                target.zero(before).await?;
                run = None;
            }
            (true, None) => {}
        }
    }
    match run {
        Some(last) => target.zero(last).await,
        None => Ok(()),
    }
}

fn read_failure(error: &backtide_export::ClientError) -> Failure {
    let code = if error.is_lost() { ErrorCode::Unreachable } else { ErrorCode::Damaged };
    let cause = ApiError::from_error(code, error);
    ApiError { message: format!("read the point: {}", cause.message), ..cause }.into()
}
