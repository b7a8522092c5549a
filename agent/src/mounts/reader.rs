//! Reads of a mounted point: from the cache, or from the receiver and into the cache.
//!
//! Runs on the mounts' thread, any number of reads at once. Whoever reads on from where somebody stopped gets more
//! fetched than he asked for.
//!
//! The thread serves every mount, so it never waits for a cache's storage: others read and write there
//! ([`kept`]). A cache that takes longer than [`CACHE_PATIENCE`] is given up, and everything is fetched then.
//!
//! Invariants: a chunk is fetched by one read at a time, the others wait for it; what a read has fetched it gives,
//! whether it can be kept or not, and without waiting for that; damage is an error of the reads that touch it, and of no
//! others; a receiver that is away for longer than [`PATIENCE`] is an error too, never other bytes.

mod kept;
mod learn;

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    rc::Rc,
    time::Duration,
};

use backtide_units::{ByteCount, ByteOffset, ByteRange, Lsn};
use bytes::{Bytes, BytesMut};
use tokio::{sync::Notify, time::Instant};

use super::{
    cache::{CHUNK, Cache},
    map::{Map, Of},
};
use crate::disk::source::{FetchError, Fetching as Answering, Piece, PointSource};

/// The most chunks of one fetch: 1 MiB, which is what a receiver gives at once.
const FETCH_CHUNKS: u64 = (1 << 20) / CHUNK;

/// How long a read waits for a receiver that is away.
const PATIENCE: Duration = Duration::from_secs(30);

/// Pauses between attempts grow from this ...
const PAUSE: Duration = Duration::from_millis(100);
/// ... to this.
const PAUSE_MAX: Duration = Duration::from_secs(2);

/// How long a cache's storage may take for one read or write. Then it stands still.
const CACHE_PATIENCE: Duration = Duration::from_secs(10);

/// The most chunks that are being written into a cache at once, 16 MiB: what comes faster than its storage takes it is not
/// kept.
const KEEPING_CHUNKS: usize = 256;

/// Reads one point.
pub(super) struct Reader {
    source: Rc<dyn PointSource>,
    cache: RefCell<Cache>,
    /// The blocks that may hold anything but zeroes, as far as the receiver has told.
    data: Map,
    /// Those that changed since another point, if somebody wants to know, likewise.
    changed: Option<Map>,
    /// Chunks that are being fetched, or written into the cache.
    coming: RefCell<HashMap<u64, Coming>>,
    /// Where the last read ended.
    expected: Cell<ByteOffset>,
    fetched: Cell<ByteCount>,
    last_error: RefCell<Option<String>>,
}

/// A chunk that is not in the cache yet.
struct Coming {
    /// Who waits for it hears of its end here.
    over: Rc<Notify>,
    /// Its content, from when it is here until the cache has it.
    bytes: Option<Bytes>,
}

/// How things are with a chunk.
enum Found {
    /// It was given.
    Given,
    /// The cache has it.
    Kept,
    /// Somebody fetches it.
    Coming(Rc<Notify>),
    Missing,
}

/// What a read still wants.
struct Rest {
    wanted: ByteRange,
    /// Where its buffer begins.
    base: ByteOffset,
    /// When it began.
    begun: Instant,
}

/// Chunks that one read fetches. They are no longer coming when this ends, however that is.
struct Fetching {
    reader: Rc<Reader>,
    chunks: std::ops::Range<u64>,
    over: Rc<Notify>,
}

impl Drop for Fetching {
    fn drop(&mut self) {
        let mut coming = self.reader.coming.borrow_mut();
        for chunk in self.chunks.clone() {
            coming.remove(&chunk);
        }
        self.over.notify_waiters();
    }
}

impl Reader {
    pub(super) fn new(source: Rc<dyn PointSource>, cache: Cache, changed_since: Option<Lsn>) -> Self {
        let size = source.point().size;
        Self {
            source,
            cache: RefCell::new(cache),
            data: Map::new(Of::Data, size),
            changed: changed_since.map(|since| Map::new(Of::Changed(since), size)),
            coming: RefCell::default(),
            expected: Cell::new(ByteOffset::ZERO),
            fetched: Cell::default(),
            last_error: RefCell::default(),
        }
    }

    /// The disk's size at the point.
    pub(super) fn size(&self) -> ByteCount {
        self.source.point().size
    }

    /// What is kept, and what was fetched.
    pub(super) fn usage(&self) -> (ByteCount, ByteCount) {
        (self.cache.borrow().bytes(), self.fetched.get())
    }

    /// Why the last fetch came to nothing; none since one has come.
    pub(super) fn last_error(&self) -> Option<String> {
        self.last_error.borrow().clone()
    }

    /// The bytes of `range`, which lies within the disk.
    pub(super) async fn read(self: &Rc<Self>, range: ByteRange) -> Result<Bytes, FetchError> {
        let length = usize::try_from(range.count().0).expect("a request fits into memory");
        let mut out = BytesMut::zeroed(length);
        let begun = Instant::now();
        let reads_on = self.expected.replace(range.end()) == range.start();
        let mut at = range.start();
        while at < range.end() {
            let chunk = at.0 / CHUNK;
            let end = ByteOffset(((chunk + 1) * CHUNK).min(range.end().0));
            let span = (at.0 - range.start().0) as usize..(end.0 - range.start().0) as usize;
            match self.look(chunk, ByteRange::between(at, end), &mut out[span]) {
                Found::Given => at = end,
                // Nothing of it when it is not there after all: the next look tells.
                Found::Kept => at = self.read_kept(at, range, &mut out).await,
                Found::Coming(over) => over.notified().await,
                Found::Missing => {
                    let last = (range.end().0 - 1) / CHUNK + 1;
                    let wanted = if reads_on { chunk + FETCH_CHUNKS } else { last };
                    let chunks = self.missing_from(chunk, wanted);
                    let rest =
                        Rest { wanted: ByteRange::between(at, range.end()), base: range.start(), begun };
                    at = self.fetch(chunks, rest, &mut out).await?;
                }
            }
        }
        Ok(out.freeze())
    }

    /// Gives `part`, which lies in `chunk`, if it is here.
    fn look(&self, chunk: u64, part: ByteRange, out: &mut [u8]) -> Found {
        if self.is_zero(chunk) {
            // The buffer is zeroes.
            return Found::Given;
        }
        let start = (part.start().0 - chunk * CHUNK) as usize;
        match self.coming.borrow().get(&chunk) {
            Some(Coming { bytes: Some(bytes), .. }) => {
                out.copy_from_slice(&bytes[start..start + out.len()]);
                Found::Given
            }
            Some(Coming { over, bytes: None }) => Found::Coming(Rc::clone(over)),
            None if self.cache.borrow().contains(chunk) => Found::Kept,
            None => Found::Missing,
        }
    }

    /// Whether the chunk is known to be zeroes.
    fn is_zero(&self, chunk: u64) -> bool {
        self.data.is_without(self.bytes_of(chunk..chunk + 1))
    }

    /// Chunks from `first` on that are neither here nor on their way, at most up to `end`.
    fn missing_from(&self, first: u64, end: u64) -> std::ops::Range<u64> {
        let end = end.min(first + FETCH_CHUNKS).min(self.size().0.div_ceil(CHUNK));
        let (cache, coming) = (self.cache.borrow(), self.coming.borrow());
        let wanted =
            |chunk: &u64| !cache.contains(*chunk) && !coming.contains_key(chunk) && !self.is_zero(*chunk);
        let count = (first + 1..end).take_while(wanted).count() as u64;
        first..first + 1 + count
    }

    fn bytes_of(&self, chunks: std::ops::Range<u64>) -> ByteRange {
        let end = (chunks.end * CHUNK).min(self.size().0);
        ByteRange::between(ByteOffset(chunks.start * CHUNK), ByteOffset(end))
    }

    /// Fetches `chunks`, keeps them, and gives what of them is wanted. How far it came.
    async fn fetch(
        self: &Rc<Self>,
        chunks: std::ops::Range<u64>,
        rest: Rest,
        out: &mut [u8],
    ) -> Result<ByteOffset, FetchError> {
        let Rest { wanted, base, begun } = rest;
        let over = Rc::new(Notify::new());
        for chunk in chunks.clone() {
            self.coming.borrow_mut().insert(chunk, Coming { over: Rc::clone(&over), bytes: None });
        }
        let fetching = Fetching { reader: Rc::clone(self), chunks: chunks.clone(), over };
        let range = self.bytes_of(chunks.clone());
        let given = range.intersection(wanted).expect("the first chunk is wanted");
        match self.fetched(range, begun).await {
            Ok(bytes) => {
                self.learn_soon(range.start());
                copy(range.start(), &bytes, given, base, out);
                self.keep(fetching, bytes.into());
            }
            // Perhaps it is not what was wanted that is damaged.
            Err(FetchError::Damaged(_)) if given != range => {
                drop(fetching);
                let bytes = self.fetched(given, begun).await?;
                copy(given.start(), &bytes, given, base, out);
            }
            Err(error) => return Err(error),
        }
        Ok(given.end())
    }

    /// Fetches `range` for a read that began at `begun`.
    async fn fetched(&self, range: ByteRange, begun: Instant) -> Result<Vec<u8>, FetchError> {
        let pieces = self.patiently(begun, Try::Bounded, || self.source.fetch(range)).await?;
        self.fetched.set(ByteCount(self.fetched.get().0 + range.count().0));
        Ok(join(&pieces, range))
    }

    /// Asks the receiver for whoever began to want it at `begun`, again and again while it is away.
    async fn patiently<'source, T>(
        &self,
        begun: Instant,
        each: Try,
        ask: impl Fn() -> Answering<'source, T>,
    ) -> Result<T, FetchError> {
        let (mut pause, until) = (PAUSE, begun + PATIENCE);
        loop {
            let silent = |_| {
                let why = format!("the receiver has not answered for {} s", PATIENCE.as_secs());
                Err(FetchError::Unreachable(why))
            };
            // Also for one that has waited in vain for another's fetch.
            let answered = match each {
                Try::Bounded => tokio::time::timeout_at(until, ask()).await.unwrap_or_else(silent),
                Try::WhileHeardOf => ask().await,
            };
            match answered {
                Ok(answer) => {
                    self.last_error.replace(None);
                    return Ok(answer);
                }
                Err(error) => {
                    self.last_error.replace(Some(error.to_string()));
                    let away = matches!(error, FetchError::Unreachable(_));
                    if !away || Instant::now() + pause >= until {
                        return Err(error);
                    }
                }
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(PAUSE_MAX);
        }
    }
}

/// How long one try may take.
#[derive(Clone, Copy)]
enum Try {
    /// Until [`PATIENCE`] is over.
    Bounded,
    /// As long as the receiver is heard of: what it answers may need all of a long log. The stream notices when it is not.
    WhileHeardOf,
}

/// The bytes of pieces that are `range` together.
fn join(pieces: &[(ByteRange, Piece)], range: ByteRange) -> Vec<u8> {
    let mut bytes = vec![0; range.count().0 as usize];
    for (part, piece) in pieces {
        if let Piece::Data(data) = piece {
            let start = (part.start().0 - range.start().0) as usize;
            bytes[start..start + data.len()].copy_from_slice(data);
        }
    }
    bytes
}

/// Puts `part` of `bytes`, which begin at `from`, where it belongs in `out`, which begins at `base`.
fn copy(from: ByteOffset, bytes: &[u8], part: ByteRange, base: ByteOffset, out: &mut [u8]) {
    let length = part.count().0 as usize;
    let (source, target) = ((part.start().0 - from.0) as usize, (part.start().0 - base.0) as usize);
    out[target..target + length].copy_from_slice(&bytes[source..source + length]);
}

#[cfg(test)]
mod tests;
