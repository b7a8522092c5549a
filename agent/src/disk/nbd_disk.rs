//! An NBD server as the disk behind; connected again when it was lost.
//!
//! Invariants: an outage has one task that connects again and one deadline that all requests share,
//! however many wait; after the deadline they fail at once, until the server is back. A server that
//! comes back gets what the last one had not flushed, before anything else: while it answers, the deadline moves on;
//! one which takes connections and answers nothing is not waited for. What it refuses of that is not there, though
//! somebody was told so: the next flush fails, and the blocks are told ([`NbdDisk::forgotten`]). One of another size, or
//! that takes no writes, is not the disk: it is not used.

use std::{
    cell::{Cell, RefCell},
    rc::Rc,
    time::Duration,
};

use backtide_control::{ApiError, ErrorCode};
use backtide_export::{BlockSizes, Client, ClientError, ClientOptions, Extent, NbdUri, ZeroOptions};
use backtide_io_filter::{Change, IoFailure, LocalData, LocalOp};
use backtide_tracking::DirtyBitmap;
use backtide_units::{BlockRange, ByteCount, ByteOffset, ByteRange};
use bytes::Bytes;
use tokio::{sync::Notify, time::Instant};

use super::{flush_turns::FlushTurns, local::EIO, unflushed::Unflushed};

/// An NBD server as the disk behind.
pub(crate) struct NbdDisk {
    shared: Rc<Shared>,
}

/// What requests and the task that connects again have in common.
struct Shared {
    uri: NbdUri,
    size: ByteCount,
    client: RefCell<Client>,
    /// While the server is away: until when requests wait for it.
    outage: Cell<Option<Instant>>,
    /// Which outage it is.
    outages: Cell<u64>,
    /// The most answers that a server gave in it of what it was to make again.
    replayed: Cell<u64>,
    /// A server was waited for in it while it made that stable.
    flushed: Cell<bool>,
    /// How many changes had failed when it began.
    failures: Cell<u64>,
    /// Why it is away, for people.
    trouble: RefCell<Option<String>>,
    /// Whether this outage's failures were logged.
    told: Cell<bool>,
    /// An outage has ended.
    back: Notify,
    /// What a server that ended may have lost.
    unflushed: RefCell<Unflushed>,
    /// Whether a flush is on its way that nobody asked for.
    flushing: Cell<bool>,
    /// The server refused such a flush, and may refuse none that follows: nobody was told yet.
    untold: Cell<Option<IoFailure>>,
    /// The blocks of changes that were answered and are not there.
    forgotten: RefCell<DirtyBitmap>,
    has_forgotten: Notify,
    /// Flushes of changes that have to be stable before anything else is said of them.
    turns: FlushTurns,
}

/// Why an NBD server is not, or not any more, the disk behind.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BehindError {
    /// It cannot be reached, or refuses.
    #[error("cannot use {uri}: {source}")]
    Client { uri: NbdUri, source: ClientError },
    /// It takes connections, and nothing more.
    #[error("{uri} did not answer {what} for {} s", after.as_secs())]
    Silent { uri: NbdUri, what: &'static str, after: Duration },
    /// It takes connections, and does not tell what it has.
    #[error("{uri} has not told where it has data for {} s", LOOK_MAX.as_secs())]
    Untold { uri: NbdUri },
    /// It serves something of another size.
    #[error("{uri} has {found} bytes now, and the disk has {expected}")]
    Size { uri: NbdUri, expected: ByteCount, found: ByteCount },
    /// It takes no writes.
    #[error("{uri} is read-only, and a disk is written: serve it writable")]
    ReadOnly { uri: NbdUri },
}

/// What a linear search for block status asks for at once.
const STATUS_STEP: u64 = 1 << 30;

/// How long the flush of an attach may take: other attaches and detaches wait meanwhile.
const FIRST_FLUSH_MAX: Duration = Duration::from_secs(10);

/// How long a server may take to tell where it has data.
const LOOK_MAX: Duration = Duration::from_secs(60);

/// How long a lost NBD server may take to come back before requests fail.
const OUTAGE_MAX: Duration = Duration::from_secs(10);

/// Waits between attempts to connect again, doubling.
const RETRY_FIRST: Duration = Duration::from_millis(50);
const RETRY_LAST: Duration = Duration::from_secs(1);

impl NbdDisk {
    /// Connects to the disk of this size.
    pub(crate) async fn connect(uri: NbdUri, size: ByteCount) -> Result<Self, BehindError> {
        let client = reach(&uri, size, super::open::attach_options()).await?;
        // What an agent that died wrote is not in our memory: it has to be stable before this one
        // begins, or nobody could make it again.
        match tokio::time::timeout(FIRST_FLUSH_MAX, client.flush()).await {
            Ok(stable) => stable.map_err(|source| BehindError::Client { uri: uri.clone(), source })?,
            Err(_) => return Err(BehindError::Silent { uri, what: "a flush", after: FIRST_FLUSH_MAX }),
        }
        let shared = Shared {
            uri,
            size,
            client: RefCell::new(client),
            outage: Cell::default(),
            outages: Cell::default(),
            replayed: Cell::default(),
            flushed: Cell::default(),
            failures: Cell::default(),
            trouble: RefCell::default(),
            told: Cell::default(),
            back: Notify::new(),
            unflushed: RefCell::default(),
            flushing: Cell::default(),
            untold: Cell::default(),
            forgotten: RefCell::default(),
            has_forgotten: Notify::new(),
            turns: FlushTurns::default(),
        };
        Ok(Self { shared: Rc::new(shared) })
    }

    pub(crate) fn size(&self) -> ByteCount {
        self.shared.size
    }

    /// What requests to the server have to be multiples of.
    pub(crate) fn block_sizes(&self) -> BlockSizes {
        self.shared.client.borrow().block_sizes()
    }

    /// Why the server is away, while it is.
    pub(crate) fn trouble(&self) -> Option<String> {
        self.shared.trouble.borrow().clone()
    }

    /// Sends a request; again on a new connection when the old one was lost. A change that is carried out
    /// twice is harmless: nothing else touches its range until it is answered, and what the server has not got by the old connection
    /// it never gets. What it has got of that, and carries out later than what it is told on the new one, nobody can take back.
    async fn request<T, F>(&self, send: impl Fn(Client) -> F) -> Result<T, IoFailure>
    where
        F: Future<Output = Result<T, ClientError>>,
    {
        let shared = &self.shared;
        // A server that is lost again and again keeps no request waiting for longer than one outage.
        let mut until = None;
        loop {
            let client = shared.client.borrow().clone();
            let error = match send(client).await {
                Err(error) if error.is_lost() => error,
                result => return result.map_err(|error| shared.refused(&error)),
            };
            let outage = (shared.lost(&error), shared.outages.get());
            if !shared.is_back(*until.get_or_insert(outage)).await {
                return Err(shared.failed(&error));
            }
        }
    }

    pub(crate) async fn run(&self, op: LocalOp) -> Result<LocalData, IoFailure> {
        match op {
            LocalOp::Read(range) => Ok(LocalData::Read(self.read(range).await?)),
            LocalOp::Change(Change::Flush) | LocalOp::Settle => {
                self.flush().await?;
                match self.shared.untold.take() {
                    Some(failure) => Err(failure),
                    None => Ok(LocalData::Changed),
                }
            }
            LocalOp::Change(change) => self.change(change).await.map(|()| LocalData::Changed),
        }
    }

    async fn change(&self, change: Change) -> Result<(), IoFailure> {
        let shared = &self.shared;
        // One that is stable at once is kept as well: what is made again must not undo it.
        while shared.unflushed.borrow().is_full() {
            self.flush_unasked().await?;
        }
        let id = shared.unflushed.borrow_mut().submit(&change);
        let sent = |client| {
            shared.unflushed.borrow_mut().sent(id);
            send(client, change.clone())
        };
        let result = self.request(sent).await;
        match &result {
            Ok(()) => {
                shared.unflushed.borrow_mut().succeeded(id);
                // The server that answers may not be the one that serves now.
                shared.forget(None);
            }
            Err(_) => shared.unflushed.borrow_mut().failed(id),
        }
        let is_due = shared.unflushed.borrow().is_due();
        if result.is_err() && shared.outage.get().is_none() {
            // Nobody knows how much of it was made. Whoever hears of the failure reads what is there, and it stays: what
            // was answered before must not be made again over it. A flush that fails too is one of its own.
            let _ = self.flush_unasked().await;
        }
        if is_due && !shared.flushing.replace(true) {
            let disk = Self { shared: Rc::clone(shared) };
            tokio::task::spawn_local(async move {
                // One that fails is tried again with the next change.
                let _ = disk.flush_unasked().await;
                disk.shared.flushing.set(false);
            });
        }
        result
    }

    /// Makes changes, one after the other, that are stable when this has succeeded: whoever ends then, the server
    /// too, they are there.
    pub(crate) async fn change_stably(
        &self,
        changes: impl IntoIterator<Item = Change>,
    ) -> Result<(), IoFailure> {
        let before = self.shared.turns.refusals();
        for change in changes {
            self.change(change).await?;
        }
        // Guests hear of one that is refused, too: it may have cost what they wrote elsewhere.
        self.shared.turns.share(before, || self.flush_unasked()).await
    }

    async fn flush(&self) -> Result<(), IoFailure> {
        let mark = self.shared.unflushed.borrow().flush();
        let flushed = self.request(|client| send(client, Change::Flush)).await;
        // What a server that went away may have lost is made again when it is back.
        if flushed.is_err() && self.shared.outage.get().is_none() {
            self.shared.turns.is_refused();
        }
        flushed?;
        self.shared.unflushed.borrow_mut().flushed(mark);
        Ok(())
    }

    /// A flush that no guest asked for: the next that one asks for tells of its failure, and of what failed before.
    pub(crate) async fn flush_unasked(&self) -> Result<(), IoFailure> {
        let flushed = self.flush().await;
        // What a server that went away may have lost is made again when it is back.
        if let Err(failure) = flushed
            && self.shared.outage.get().is_none()
        {
            self.shared.untold.set(Some(failure));
        }
        flushed
    }

    /// Waits for changes that were answered and are not there; their blocks. One at a time may wait.
    pub(crate) async fn forgotten(&self) -> DirtyBitmap {
        loop {
            let forgotten = self.shared.forgotten.take();
            if !forgotten.is_empty() {
                return forgotten;
            }
            self.shared.has_forgotten.notified().await;
        }
    }

    async fn read(&self, range: ByteRange) -> Result<Bytes, IoFailure> {
        self.request(|client| async move { client.read(range.start(), range.count()).await }).await
    }

    /// The stretches of `range` from its start, as far as the server tells at once: at most so many.
    pub(crate) async fn extents(&self, range: ByteRange, max: usize) -> Result<Vec<Extent>, IoFailure> {
        let (start, length) = (range.start(), range.count());
        self.request(|client| async move { client.first_block_status(start, length, max).await }).await
    }

    pub(crate) async fn allocated(&self, whole: ByteRange) -> Result<DirtyBitmap, IoFailure> {
        let mut blocks = DirtyBitmap::new();
        for step in whole.split_at_multiples(ByteCount(STATUS_STEP)) {
            let (start, length) = (step.start(), step.count());
            let whole = self.request(|client| async move { client.block_status(start, length).await });
            insert_data(&mut blocks, step, whole.await?);
        }
        Ok(blocks)
    }
}

/// The blocks of `step` that may hold data.
fn insert_data(blocks: &mut DirtyBitmap, step: ByteRange, extents: Vec<Extent>) {
    let mut at = step.start();
    for extent in extents {
        let end = ByteOffset(at.0.saturating_add(extent.length.0)).min(step.end());
        if !extent.zero {
            blocks.insert(BlockRange::touched_by(ByteRange::between(at, end)));
        }
        at = end;
    }
}

/// What an NBD server serves, before it is a disk here.
#[derive(Debug)]
pub(crate) struct Served {
    pub(crate) size: ByteCount,
    /// Whether single blocks of the granule can be written.
    pub(crate) takes_blocks: bool,
    /// The blocks that may hold data.
    pub(crate) allocated: DirtyBitmap,
}

/// Looks at what a server serves, on a connection of its own.
///
/// # Errors
/// When it cannot be reached, or does not tell.
pub(crate) async fn look_at(uri: &NbdUri) -> Result<Served, BehindError> {
    let looking = async {
        let client = Client::connect_with(uri, super::open::attach_options()).await?;
        let (size, mut allocated) = (client.size(), DirtyBitmap::new());
        let whole = ByteRange::between(ByteOffset::ZERO, ByteOffset(size.0));
        for step in whole.split_at_multiples(ByteCount(STATUS_STEP)) {
            insert_data(&mut allocated, step, client.block_status(step.start(), step.count()).await?);
        }
        let takes_blocks = super::open::takes_blocks(client.block_sizes().minimum);
        Ok::<_, ClientError>(Served { size, takes_blocks, allocated })
    };
    let looked = tokio::time::timeout(LOOK_MAX, looking).await;
    let client = |source| BehindError::Client { uri: uri.clone(), source };
    looked.map_err(|_| BehindError::Untold { uri: uri.clone() })?.map_err(client)
}

impl Shared {
    /// Notes that a connection was lost; until when requests wait for the next.
    fn lost(self: &Rc<Self>, error: &ClientError) -> Instant {
        if let Some(until) = self.outage.get() {
            return until;
        }
        let until = Instant::now() + OUTAGE_MAX;
        // A request of the old connection may hear of its end when there is a new one already.
        if self.client.borrow().lost().is_some() {
            tracing::warn!(uri = %self.uri, %error, "the disk behind is lost: connecting again");
            self.trouble.replace(Some(chain(error)));
            self.outage.set(Some(until));
            self.outages.set(self.outages.get() + 1);
            self.replayed.set(0);
            self.flushed.set(false);
            self.failures.set(self.unflushed.borrow().failures());
            tokio::task::spawn_local(Rc::clone(self).connect_again());
        }
        until
    }

    async fn connect_again(self: Rc<Self>) {
        let mut wait = RETRY_FIRST;
        loop {
            match self.reach_again().await {
                Ok(client) => {
                    tracing::info!(uri = %self.uri, "the disk behind is back");
                    self.client.replace(client);
                    self.trouble.replace(None);
                    self.told.set(false);
                    self.outage.set(None);
                    self.back.notify_waiters();
                    return;
                }
                Err(error) => self.note(chain(&error)),
            }
            tokio::time::sleep(wait).await;
            wait = (wait * 2).min(RETRY_LAST);
        }
    }

    /// A connection to a server that has everything the last one had answered. They are stable too where one of them was,
    /// and where one has failed meanwhile: it was made again, and must not be undone when the others are another time.
    async fn reach_again(&self) -> Result<Client, BehindError> {
        let client = reach(&self.uri, self.size, ClientOptions::default()).await?;
        let (mark, changes) = (self.unflushed.borrow().flush(), self.unflushed.borrow().to_make_again());
        if !changes.is_empty() {
            tracing::info!(uri = %self.uri, changes = changes.len(), "making again what was not flushed");
        }
        let is_stable = changes.iter().any(|(_, change)| change.wants_stable());
        let failure = self.make_again(&client, changes).await?;
        self.forget(failure);
        // No await from the last look to the caller's use of the connection.
        if is_stable || self.unflushed.borrow().failures() != self.failures.get() {
            match self.flush_again(&client).await? {
                Ok(()) => self.unflushed.borrow_mut().flushed(mark),
                Err(source) if client.lost().is_some() => {
                    return Err(BehindError::Client { uri: self.uri.clone(), source });
                }
                Err(source) => {
                    // The server may refuse none that follows: the next that a guest asks for tells.
                    self.turns.is_refused();
                    self.untold.set(Some(self.refused(&source)));
                }
            }
        }
        Ok(client)
    }

    /// What the server has refused of changes that were answered: they are not made again. What is there stays as it
    /// is read, and the next flush that is asked for fails.
    fn forget(&self, failure: Option<IoFailure>) {
        let forgotten = self.unflushed.borrow_mut().forgotten();
        if forgotten.is_empty() {
            return;
        }
        tracing::error!(uri = %self.uri, changes = forgotten.len(), "the disk behind refuses changes that were answered: the next flush fails");
        for range in forgotten.iter().filter_map(Change::range) {
            self.forgotten.borrow_mut().insert(BlockRange::touched_by(range));
        }
        self.turns.is_refused();
        self.untold.set(Some(failure.unwrap_or(IoFailure { errno: EIO })));
        self.has_forgotten.notify_one();
    }

    fn note(&self, trouble: String) {
        let known = self.trouble.borrow().as_ref() == Some(&trouble);
        if !known {
            tracing::warn!(uri = %self.uri, trouble, "no connection to the disk behind");
            self.trouble.replace(Some(trouble));
        }
    }

    /// Whether there is a connection, waiting for one until then; longer while a server makes again what the last one may
    /// have lost, in the outage that the wait began with.
    async fn is_back(&self, (mut until, outage): (Instant, u64)) -> bool {
        loop {
            let back = async {
                while self.outage.get().is_some() {
                    self.back.notified().await;
                }
            };
            if tokio::time::timeout_at(until, back).await.is_ok() {
                return true;
            }
            match self.outage.get().filter(|later| *later > until && self.outages.get() == outage) {
                Some(later) => until = later,
                None => return false,
            }
        }
    }

    /// The failure of a request whose time is over. Logged once per outage: a guest has many.
    fn failed(&self, error: &ClientError) -> IoFailure {
        if !self.told.replace(true) {
            let trouble = self.trouble.borrow().clone().unwrap_or_else(|| error.to_string());
            tracing::error!(uri = %self.uri, trouble, "the disk behind stays away: requests fail until it is back");
        }
        IoFailure { errno: EIO }
    }

    /// The failure of a request that the server refused.
    fn refused(&self, error: &ClientError) -> IoFailure {
        tracing::error!(uri = %self.uri, %error, "the disk behind failed");
        IoFailure { errno: i32::try_from(error.as_nbd().code()).unwrap_or(EIO) }
    }
}

/// An error and its causes as one sentence.
fn chain(error: &dyn std::error::Error) -> String {
    ApiError::from_error(ErrorCode::Failed, error).message
}

/// Makes a change at a server.
async fn send(client: Client, change: Change) -> Result<(), ClientError> {
    match change {
        Change::Write { range, data, fua } => client.write(range.start(), data, fua).await,
        Change::Zero { range, trim, fua } => {
            // Always as zeroes: a trim may leave anything, and the receiver is told of zeroes.
            let options = ZeroOptions { fua, no_hole: !trim, fast: false };
            client.write_zeroes(range.start(), range.count(), options).await
        }
        Change::Flush => client.flush().await,
    }
}

async fn reach(uri: &NbdUri, expected: ByteCount, options: ClientOptions) -> Result<Client, BehindError> {
    let client = Client::connect_with(uri, options)
        .await
        .map_err(|source| BehindError::Client { uri: uri.clone(), source })?;
    let found = client.size();
    if found != expected {
        return Err(BehindError::Size { uri: uri.clone(), expected, found });
    }
    if client.flags().read_only() {
        return Err(BehindError::ReadOnly { uri: uri.clone() });
    }
    Ok(client)
}

mod replay;

#[cfg(test)]
mod tests;
