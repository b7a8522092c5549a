//! What a server that is back is given first: what the last one had answered and may have lost.
//!
//! Invariants: of changes that overlap each is made when those before it are answered, all others side by side; none is
//! stable before the flush at the end, if one of them was to be. One that is large goes in pieces, so that a server that
//! works gives an answer now and then, whatever a guest had it do at once. As long as more is answered than ever in this outage
//! requests wait on, and once for as long as that flush may take; a server that answers nothing is left for another connection.

use std::time::Duration;

use backtide_export::{Client, ClientError};
use backtide_io_filter::{Change, IoFailure};
use backtide_units::{ByteCount, ByteRange};
use tokio::{task::JoinSet, time::Instant};

use super::{BehindError, OUTAGE_MAX, Shared, send};
use crate::disk::unflushed::ChangeId;

/// How long a server that is back may answer nothing. One that stands still is left for another connection: it, or what
/// serves in its place, may do better.
pub(super) const REPLAY_ANSWER_MAX: Duration = Duration::from_secs(10);

/// How long the flush at the end may take, which may be of all that a server can keep in memory.
const REPLAY_FLUSH_MAX: Duration = Duration::from_secs(60);

/// The longest pieces of data, and of zeroes.
const DATA_PIECE: ByteCount = ByteCount(1 << 20);
const ZEROES_PIECE: ByteCount = ByteCount(64 << 20);

/// So much is under way at once, unless one piece is more.
const PIECES_MAX: usize = 64;
const BYTES_MAX: u64 = 16 << 20;

/// Changes on their way to a server once more.
struct Replay<'shared> {
    shared: &'shared Shared,
    client: &'shared Client,
    under_way: JoinSet<(ChangeId, ByteRange, Result<(), ClientError>)>,
    ranges: Vec<ByteRange>,
    answered: u64,
    /// Why the server refused the last one that it refused.
    failure: Option<IoFailure>,
}

impl Shared {
    /// Has a new server make these changes, which is noted of those that it refuses. Gives one of its refusals.
    ///
    /// # Errors
    /// When the connection has ended with it.
    pub(super) async fn make_again(
        &self,
        client: &Client,
        changes: Vec<(ChangeId, Change)>,
    ) -> Result<Option<IoFailure>, BehindError> {
        let (under_way, ranges) = (JoinSet::new(), Vec::new());
        let mut replay = Replay { shared: self, client, under_way, ranges, answered: 0, failure: None };
        for (id, change) in changes {
            for (range, piece) in pieces(&change) {
                while !replay.may_begin(range) {
                    replay.take_answer().await?;
                }
                replay.begin(id, range, piece);
            }
        }
        while !replay.ranges.is_empty() {
            replay.take_answer().await?;
        }
        Ok(replay.failure)
    }

    /// Has a new server make stable what it was given; what it says.
    ///
    /// # Errors
    /// When the connection has ended with it.
    pub(super) async fn flush_again(&self, client: &Client) -> Result<Result<(), ClientError>, BehindError> {
        // Once: one that never answers is not waited for again and again.
        if !self.flushed.replace(true) {
            self.outage.set(Some(Instant::now() + REPLAY_FLUSH_MAX));
        }
        let flushed = tokio::time::timeout(REPLAY_FLUSH_MAX, client.flush()).await;
        let what = "a flush of changes that were made again";
        flushed.map_err(|_| self.left(client, what, REPLAY_FLUSH_MAX))
    }

    /// A server that stands still is given up.
    fn left(&self, client: &Client, what: &'static str, after: Duration) -> BehindError {
        // Nothing of it must come behind what is written on the next connection.
        client.give_up();
        BehindError::Silent { uri: self.uri.clone(), what, after }
    }
}

impl Replay<'_> {
    fn may_begin(&self, range: ByteRange) -> bool {
        let bytes: u64 = self.ranges.iter().map(|range| range.count().0).sum();
        let has_room = self.ranges.len() < PIECES_MAX && bytes + range.count().0 <= BYTES_MAX;
        let is_apart =
            self.ranges.iter().all(|other| other.end() <= range.start() || range.end() <= other.start());
        self.ranges.is_empty() || has_room && is_apart
    }

    fn begin(&mut self, id: ChangeId, range: ByteRange, piece: Change) {
        let client = self.client.clone();
        self.ranges.push(range);
        self.under_way.spawn_local(async move { (id, range, send(client, piece).await) });
    }

    async fn take_answer(&mut self) -> Result<(), BehindError> {
        let answer = tokio::time::timeout(REPLAY_ANSWER_MAX, self.under_way.join_next()).await;
        let what = "a change that is made again";
        let answer = answer.map_err(|_| self.shared.left(self.client, what, REPLAY_ANSWER_MAX))?;
        let answer = answer.expect("a change is under way");
        let (id, range, result) = answer.expect("sending a change comes to its end");
        self.ranges.retain(|other| *other != range);
        match result {
            Ok(()) => {}
            Err(source) if source.is_lost() => {
                return Err(BehindError::Client { uri: self.shared.uri.clone(), source });
            }
            Err(source) => {
                self.failure = Some(self.shared.refused(&source));
                self.shared.unflushed.borrow_mut().refused(id);
            }
        }
        self.answered += 1;
        if self.answered > self.shared.replayed.get() {
            self.shared.replayed.set(self.answered);
            self.shared.outage.set(Some(Instant::now() + OUTAGE_MAX));
        }
        Ok(())
    }
}

/// What a change is made of, none of it stable at once.
fn pieces(change: &Change) -> Vec<(ByteRange, Change)> {
    match change {
        Change::Write { range, data, .. } => {
            let mut rest = data.clone();
            let piece = |range: ByteRange| {
                let data = rest.split_to(range.count().as_usize().expect("a piece is small"));
                (range, Change::Write { range, data, fua: false })
            };
            range.split_at_multiples(DATA_PIECE).map(piece).collect()
        }
        Change::Zero { range, trim, .. } => {
            let piece = |range| (range, Change::Zero { range, trim: *trim, fua: false });
            range.split_at_multiples(ZEROES_PIECE).map(piece).collect()
        }
        Change::Flush => Vec::new(),
    }
}
