//! What a log needs done beside its writes, where blocking is fine: sealing segments that are full, reserving
//! space ahead, making the next segment's file, joining the directory's nodes.
//!
//! Chores travel with a ticket and are done before it syncs, so a footer is as durable as the ticket says.
//! Only one set is under way at a time: no two of them ever touch one file. Who drops a ticket gives its
//! chores back: the log sees that their token is gone and hands them out again. When the log itself is dropped its
//! gate closes, for the files may belong to a log that is opened again: later chores do nothing, and those under way
//! are waited for, unless the log was [abandoned](crate::DiskLog::abandon); then whoever opens it again sees to that.

use std::{
    io,
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, TryLockError, Weak,
        atomic::{AtomicBool, Ordering},
    },
};

use backtide_segment::{SealedSegment, SegmentError, SegmentFile, SegmentHeader, SegmentId, Seq};
use backtide_storage::{KillPoint, Storage, StorageFile};
use backtide_units::{ByteCount, ByteOffset, ByteRange};

use crate::{
    directory::{Leaf, Upkeep, Upkept, Versions},
    segment::Segment,
};

/// Name of the file that is to become the next segment. It is no segment's, so nobody reads it; opening the log
/// removes it.
pub(crate) const SPARE: &str = "spare.new";

/// Held by chores that are under way.
#[derive(Debug, Default)]
pub(crate) struct Token;

/// Says whether chores are under way.
#[derive(Debug, Default)]
pub(crate) struct Away(Weak<Token>);

/// Whether a log still owns its files. Closes when it is dropped, or before.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    owned: Arc<Owned>,
    /// Dropping it does not wait.
    abandoned: bool,
}

/// What a gate and the work behind it share.
#[derive(Debug, Default)]
pub(crate) struct Owned {
    closed: AtomicBool,
    /// Held by work on the log's files.
    working: Mutex<()>,
}

/// The work on an abandoned log's files that was under way.
#[derive(Clone, Debug)]
pub struct LastWork(Arc<Owned>);

impl LastWork {
    /// Whether it is still under way: nobody may open the log again before it has ended. None begins any more.
    pub fn is_under_way(&self) -> bool {
        matches!(self.0.working.try_lock(), Err(TryLockError::WouldBlock))
    }
}

impl Owned {
    /// Keeps the files in hand; none when they are not the log's any more.
    pub(crate) fn work(&self) -> Option<MutexGuard<'_, ()>> {
        let working = self.working.lock().unwrap_or_else(PoisonError::into_inner);
        (!self.closed.load(Ordering::Acquire)).then_some(working)
    }
}

/// See the module's description.
pub(crate) struct Chores {
    token: Arc<Token>,
    owned: Arc<Owned>,
    pub(crate) seal: Vec<SealJob>,
    pub(crate) allocate: Option<AllocateJob>,
    pub(crate) spare: Option<SpareJob>,
    pub(crate) upkeep: Option<Upkeep<Arc<Segment>>>,
}

/// Chores that are done.
pub(crate) struct Done {
    _token: Arc<Token>,
    pub(crate) sealed: Vec<Sealed>,
    pub(crate) allocated: Option<(SegmentId, ByteOffset)>,
    pub(crate) spare: Option<Spare>,
    pub(crate) upkept: Option<Upkept<Arc<Segment>>>,
}

/// A segment that is full, to be sealed.
pub(crate) struct SealJob {
    pub(crate) segment: Arc<Segment>,
    pub(crate) file: SegmentFile,
    pub(crate) header: SegmentHeader,
}

/// A segment whose footer is in the file.
pub(crate) struct Sealed {
    segment: Arc<Segment>,
    footer: SealedSegment,
    pub(crate) leaf: Leaf<Arc<Segment>>,
}

/// Space to reserve in the segment that is written.
pub(crate) struct AllocateJob {
    pub(crate) segment: SegmentId,
    pub(crate) file: Arc<dyn StorageFile>,
    pub(crate) range: ByteRange,
}

/// A file to make for the next segment.
pub(crate) struct SpareJob {
    pub(crate) storage: Arc<dyn Storage>,
    pub(crate) path: PathBuf,
    pub(crate) bytes: ByteCount,
}

/// A file for the next segment, under [`SPARE`], with space.
pub(crate) struct Spare {
    pub(crate) file: Arc<dyn StorageFile>,
    pub(crate) allocated: ByteCount,
}

impl Away {
    /// Whether chores are under way.
    pub(crate) fn is_so(&self) -> bool {
        self.0.strong_count() > 0
    }

    /// A token for chores that are handed out now.
    pub(crate) fn begin(&mut self) -> Arc<Token> {
        assert!(!self.is_so(), "one set of chores is under way at a time");
        let token = Arc::new(Token);
        self.0 = Arc::downgrade(&token);
        token
    }
}

impl Gate {
    /// What the work behind it asks.
    pub(crate) fn owned(&self) -> Arc<Owned> {
        Arc::clone(&self.owned)
    }

    /// No chores yet, of this log and this moment.
    pub(crate) fn chores(&self, away: &mut Away) -> Chores {
        let (token, owned) = (away.begin(), self.owned());
        Chores { token, owned, seal: Vec::new(), allocate: None, spare: None, upkeep: None }
    }

    /// Closes without waiting for work that is under way.
    pub(crate) fn abandon(&mut self) -> LastWork {
        self.abandoned = true;
        self.owned.closed.store(true, Ordering::Release);
        LastWork(self.owned())
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.owned.closed.store(true, Ordering::Release);
        if !self.abandoned {
            drop(self.owned.working.lock());
        }
    }
}

impl Chores {
    /// Does them. What only saves time later may fail without a word: it is done when it is needed, and
    /// fails there.
    pub(crate) fn run(self) -> io::Result<Done> {
        let Self { token, owned, seal, allocate, spare, upkeep } = self;
        let Some(_working) = owned.work() else {
            return Err(io::Error::other("the log was closed meanwhile"));
        };
        let mut done = Done { _token: token, sealed: Vec::new(), allocated: None, spare: None, upkept: None };
        for job in seal {
            done.sealed.push(job.run().map_err(into_io)?);
        }
        done.allocated = allocate.and_then(AllocateJob::run);
        done.spare = spare.and_then(SpareJob::run);
        done.upkept = upkeep.map(Upkeep::run);
        Ok(done)
    }
}

impl Done {
    /// Of one segment sealed on the spot.
    pub(crate) fn of(sealed: Sealed) -> Self {
        let _token = Arc::default();
        Self { _token, sealed: vec![sealed], allocated: None, spare: None, upkept: None }
    }

    /// Lets readers use the footers; to be called when they are durable. The memory of the open indexes is given
    /// back here and not on the thread that owns the log.
    pub(crate) fn publish(&self) {
        for sealed in &self.sealed {
            sealed.segment.become_sealed(sealed.footer.clone());
        }
    }
}

impl SealJob {
    /// Writes the footer and reads it back. Another try at one that was published gives the same again.
    pub(crate) fn run(self) -> Result<Sealed, SegmentError> {
        let Self { segment, file, header } = self;
        let written = segment.while_open(|open| {
            backtide_segment::seal(&file, &header, &open.contents, open.end)?;
            Ok(open.contents.index().buckets())
        });
        KillPoint::FooterWritten.reached();
        let footer = SealedSegment::open(&file, header)?.ok_or_else(|| SegmentError::Damaged {
            file: file.name().clone(),
            offset: segment.entries_end(),
            what: "the footer that was just written cannot be read".to_owned(),
        })?;
        let buckets = match written {
            Some(buckets) => buckets?,
            None => footer.summary(&file)?.buckets,
        };
        let leaf = Leaf::new(Arc::clone(&segment), Versions::of(footer.stats()), &buckets);
        Ok(Sealed { segment, footer, leaf })
    }
}

impl Sealed {
    /// Which segment.
    pub(crate) fn id(&self) -> SegmentId {
        self.footer.header().id
    }

    /// Its last entry.
    pub(crate) fn last(&self) -> Seq {
        Seq(self.footer.stats().next_seq.0 - 1)
    }

    /// The file's length.
    pub(crate) fn length(&self) -> ByteCount {
        self.footer.length()
    }
}

impl AllocateJob {
    fn run(self) -> Option<(SegmentId, ByteOffset)> {
        self.file.allocate(self.range).ok()?;
        Some((self.segment, self.range.end()))
    }
}

impl SpareJob {
    fn run(self) -> Option<Spare> {
        let Self { storage, path, bytes } = self;
        let create = || {
            let file = storage.create_new(&path)?;
            let allocated = match file.allocate(ByteRange::between(ByteOffset::ZERO, ByteOffset(bytes.0))) {
                Ok(()) => bytes,
                Err(error) if error.kind() == io::ErrorKind::Unsupported => ByteCount::ZERO,
                Err(error) => return Err(error),
            };
            Ok(Spare { file, allocated })
        };
        // One that is there was left by a try whose ticket was dropped, or by this one.
        let removed = |_: io::Error| storage.remove(&path).ok();
        let spare = create().map_err(removed).ok();
        KillPoint::SpareMade.reached();
        spare
    }
}

fn into_io(error: SegmentError) -> io::Error {
    match error {
        SegmentError::Io { source, .. } | SegmentError::Full { source, .. } => source,
        SegmentError::Damaged { .. } | SegmentError::UnknownVersion { .. } | SegmentError::Poisoned => {
            io::Error::other(error)
        }
    }
}
