//! The copy: many pieces at once, window after window; and the proof that it arrived.

use std::sync::Arc;

use backtide_control::{ApiError, ErrorCode};
use backtide_export::{Client, Extent};
use backtide_units::{ByteCount, ByteOffset, ByteRange};
use blake3::Hash;
use bytes::Bytes;
use tokio::task::JoinSet;

use crate::{
    ending::{Failure, failed},
    inside::is_gone,
    output::progress::Progress,
    restore::{
        pieces::{PIECE, WindowDigest, digest, pieces, runs, windows},
        target::{Target, Way},
    },
};

/// Pieces in flight: with 1 MiB each also the memory of a restore in MiB, twice.
const IN_FLIGHT: usize = 16;

/// In so much is told apart what is damaged.
const BLOCK: ByteCount = ByteCount(4096);

/// What was copied.
#[derive(Debug)]
pub(crate) struct Copied {
    /// Whether each piece was read back and compared when it was written.
    read_back: bool,
    /// The digest of each window, in order.
    windows: Vec<Hash>,
    /// The point's size.
    size: ByteCount,
    /// How many bytes were written; the rest are zeroes, or were there.
    pub(crate) data_bytes: ByteCount,
    /// How many of the rest an earlier restore had written.
    pub(crate) resumed_bytes: ByteCount,
    /// What could not be read, in order, and are zeroes at the target.
    pub(crate) damaged: Vec<ByteRange>,
}

/// What became of one piece.
#[derive(Default)]
struct Piece {
    index: usize,
    digest: [u8; 32],
    written: u64,
    resumed: u64,
    read_back: bool,
    damaged: Vec<ByteRange>,
}

/// Copies all of `source` to `target` and makes it durable there. With `check`, what can be read from the device
/// at once is read back piece by piece, while others are written. With `around_damage`, what is damaged at the source is zeroes at the
/// target.
pub(crate) async fn copy(
    source: &Client,
    target: &Target,
    check: bool,
    around_damage: bool,
    progress: &mut Progress,
) -> Result<Copied, Failure> {
    let size = source.size();
    let (data_bytes, resumed_bytes) = (ByteCount(0), ByteCount(0));
    let read_back = check && target.reads_back();
    let (windows_done, damaged) = (Vec::new(), Vec::new());
    let mut copied = Copied { read_back, windows: windows_done, size, data_bytes, resumed_bytes, damaged };
    target.prepare().await?;
    for window in windows(size) {
        let extents = progress.wait(extents_of(source, window, around_damage)).await?;
        let mut work = pieces(window, &extents);
        let holds_data: Arc<[bool]> = work.iter().map(|(_, holds_data)| *holds_data).collect();
        match target.way() {
            Way::Fresh => {}
            Way::Over => zero_the_holes(target, window, &extents).await?,
            // What may hold data there and holds none here has to be looked at, too.
            Way::Changed => {
                let there = pieces(window, &target.extents(window).await?);
                work.iter_mut().zip(there).for_each(|(piece, (_, holds_data))| piece.1 |= holds_data);
            }
        }
        let (from, to) = (source.clone(), target.clone());
        let done = each_piece(work, size, progress, move |index, range| {
            let holds = Holds { data: holds_data[index], around_damage };
            copy_piece(from.clone(), to.clone(), index, range, holds, read_back)
        })
        .await?;
        if read_back {
            refuse_other_data(target, window, &done.read_back).await?;
        }
        copied.windows.push(done.hash);
        copied.data_bytes.0 += done.written;
        copied.resumed_bytes.0 += done.resumed;
        add_damage(&mut copied.damaged, done.damaged);
    }
    target.sync().await?;
    progress.end();
    Ok(copied)
}

/// Sees to it that the target holds nothing where nothing was read back.
async fn refuse_other_data(target: &Target, window: ByteRange, read_back: &[bool]) -> Result<(), Failure> {
    let there = pieces(window, &target.extents(window).await?);
    for ((piece, _), _) in there.into_iter().zip(read_back).filter(|((_, held), known)| *held && !**known) {
        if runs(&target.read(piece).await?, None).iter().any(|(_, zero)| !zero) {
            return Err(differs(target, piece));
        }
    }
    Ok(())
}

fn differs(target: &Target, range: ByteRange) -> Failure {
    let message = format!("what was read back from {target} differs from the point in bytes {range}");
    ApiError::new(ErrorCode::Damaged, message)
        .with_hint("the target does not keep what is written to it; do not use this restore")
        .into()
}

/// Reads `target` back and compares it with what was copied, unless that is done.
pub(crate) async fn verify(target: &Target, copied: &Copied, progress: &mut Progress) -> Result<(), Failure> {
    if copied.read_back {
        return Ok(());
    }
    for (window, expected) in windows(copied.size).zip(&copied.windows) {
        let extents = target.extents(window).await?;
        let reader = target.clone();
        let work = pieces(window, &extents);
        let read = each_piece(work, copied.size, progress, move |index, range| {
            let target = reader.clone();
            async move {
                let data = target.read(range).await?;
                Ok(Piece { index, digest: digest(&data), ..Piece::default() })
            }
        })
        .await?;
        if read.hash != *expected {
            return Err(differs(target, window));
        }
    }
    progress.end();
    Ok(())
}

/// What became of a window.
struct Window {
    hash: Hash,
    written: u64,
    resumed: u64,
    /// Which pieces were read back.
    read_back: Vec<bool>,
    /// What could not be read, in the order in which that was seen.
    damaged: Vec<ByteRange>,
}

/// Works on those pieces of a window that ask for it, [`IN_FLIGHT`] at once.
async fn each_piece<W>(
    pieces: Vec<(ByteRange, bool)>,
    size: ByteCount,
    progress: &mut Progress,
    work: impl Fn(usize, ByteRange) -> W,
) -> Result<Window, Failure>
where
    W: Future<Output = Result<Piece, Failure>> + Send + 'static,
{
    let mut digests = WindowDigest::of(pieces.len());
    let mut known = vec![false; pieces.len()];
    let mut running = JoinSet::new();
    let (mut written, mut resumed) = (0, 0);
    let (mut failure, mut damage) = (None, Vec::new());
    // After a failure what is in flight still comes to its end: what is done is noted then.
    let mut finish = |ended, failure: &mut Option<Failure>| match unwrap(ended) {
        Ok(Piece { index, digest, written: new, resumed: old, read_back, damaged }) => {
            damage.extend(damaged);
            digests.set(index, digest);
            known[index] = read_back;
            written += new;
            resumed += old;
        }
        Err(error) => drop(failure.get_or_insert(error)),
    };
    for (index, (range, wanted)) in pieces.into_iter().enumerate() {
        if wanted {
            if running.len() >= IN_FLIGHT
                && let Some(ended) = progress.wait(running.join_next()).await
            {
                finish(ended, &mut failure);
            }
            if failure.is_some() {
                break;
            }
            running.spawn(work(index, range));
        }
        progress.at(ByteCount(range.end().0), size);
    }
    while let Some(ended) = progress.wait(running.join_next()).await {
        finish(ended, &mut failure);
    }
    if let Some(error) = failure {
        return Err(error);
    }
    Ok(Window { hash: digests.finish(), written, resumed, read_back: known, damaged: damage })
}

fn unwrap(ended: Result<Result<Piece, Failure>, tokio::task::JoinError>) -> Result<Piece, Failure> {
    ended.unwrap_or_else(|error| Err(failed(format!("a part of the copy ended early: {error}"))))
}

/// Adds what one window lacks, and makes one of what adjoins.
fn add_damage(all: &mut Vec<ByteRange>, mut more: Vec<ByteRange>) {
    more.sort_by_key(|range| range.start());
    for range in more {
        match all.last_mut() {
            Some(last) if last.end() == range.start() => {
                *last = ByteRange::between(last.start(), range.end())
            }
            Some(_) | None => all.push(range),
        }
    }
}

/// What is known of a piece of the source.
#[derive(Clone, Copy)]
struct Holds {
    /// It may hold data.
    data: bool,
    /// Of what is damaged the rest is wanted.
    around_damage: bool,
}

/// Where a window of the source may hold data. With `around_damage`, a piece of which that cannot be told is taken for one
/// that does, and read.
async fn extents_of(source: &Client, window: ByteRange, around_damage: bool) -> Result<Vec<Extent>, Failure> {
    let (mut extents, mut parts) = (Vec::new(), vec![window]);
    while let Some(part) = parts.pop() {
        match source.block_status(part.start(), part.count()).await {
            Ok(told) => extents.extend(told),
            Err(error) if !around_damage || is_gone(&error) => return Err(read_failure(&error)),
            Err(_) if part.count() <= PIECE => extents.push(Extent::data(part.count())),
            Err(_) => {
                let half = ByteCount((part.count().0 / 2).next_multiple_of(PIECE.0));
                let middle = ByteOffset(part.start().0 + half.0);
                // The first one is next.
                parts.push(ByteRange::between(middle, part.end()));
                parts.push(ByteRange::between(part.start(), middle));
            }
        }
    }
    Ok(extents)
}

/// A piece of the source, and what of it could not be read, which are zeroes then.
async fn read_piece(
    source: &Client,
    range: ByteRange,
    around_damage: bool,
) -> Result<(Bytes, Vec<ByteRange>), Failure> {
    let whole = source.read(range.start(), range.count()).await;
    match whole {
        Ok(data) => return Ok((data, Vec::new())),
        Err(error) if !around_damage || is_gone(&error) => return Err(read_failure(&error)),
        Err(_) => {}
    }
    let mut bytes = vec![0; range.count().0 as usize];
    let mut damaged = Vec::new();
    for block in range.split_at_multiples(BLOCK) {
        match source.read(block.start(), block.count()).await {
            Ok(data) => {
                let at = (block.start().0 - range.start().0) as usize;
                bytes[at..at + data.len()].copy_from_slice(&data);
            }
            Err(error) if is_gone(&error) => return Err(read_failure(&error)),
            Err(_) => damaged.push(block),
        }
    }
    Ok((Bytes::from(bytes), damaged))
}

async fn copy_piece(
    source: Client,
    target: Target,
    index: usize,
    range: ByteRange,
    holds: Holds,
    read_back: bool,
) -> Result<Piece, Failure> {
    if let Some(noted) = target.noted(range)
        && digest(&target.read(range).await?) == noted
    {
        let (resumed, damaged) = (range.count().0, Vec::new());
        return Ok(Piece { index, digest: noted, written: 0, resumed, read_back, damaged });
    }
    let (data, damaged) = match holds.data {
        true => read_piece(&source, range, holds.around_damage).await?,
        false => (Bytes::from(vec![0; range.count().0 as usize]), Vec::new()),
    };
    let there = match target.way() {
        Way::Changed => Some(target.read(range).await?),
        Way::Fresh | Way::Over => None,
    };
    let (mut written, mut same) = (0, there.is_some());
    for (run, zero) in runs(&data, there.as_deref()) {
        same = false;
        let (start, end) = (range.start().0 + run.start as u64, range.start().0 + run.end as u64);
        let at = ByteRange::between(backtide_units::ByteOffset(start), backtide_units::ByteOffset(end));
        if !zero {
            written += at.count().0;
            target.write(at, data.slice(run)).await?;
        } else if target.way() != Way::Fresh {
            target.zero(at).await?;
        }
    }
    if read_back && !same && target.read(range).await? != data {
        return Err(differs(&target, range));
    }
    let digest = digest(&data);
    // Who goes on with it later asks again for what is damaged now.
    if damaged.is_empty() {
        target.note(range, &digest)?;
    }
    Ok(Piece { index, digest, written, resumed: 0, read_back, damaged })
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
    let code = if is_gone(error) { ErrorCode::Unreachable } else { ErrorCode::Damaged };
    let cause = ApiError::from_error(code, error);
    ApiError { message: format!("read the point: {}", cause.message), ..cause }.into()
}

#[cfg(test)]
mod tests {
    use backtide_export::{ClientError, CommandKind, NbdError};
    use backtide_units::ByteOffset;

    use super::*;

    #[test]
    fn a_server_that_ends_is_no_damage() {
        let refused = |error: NbdError| {
            let range = ByteRange::between(ByteOffset(0), ByteOffset(4096));
            let (kind, text) = (CommandKind::Read, String::new());
            match read_failure(&ClientError::Refused { kind, range, error, text }) {
                Failure::Error(error) => error.code,
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(refused(NbdError::Shutdown), ErrorCode::Unreachable);
        assert_eq!(refused(NbdError::Io), ErrorCode::Damaged);
    }
}
