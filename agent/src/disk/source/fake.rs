//! A source in memory, for tests: away, damaged or slow as told.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeSet,
};

use backtide_hydration::SourcePoint;
use backtide_io_filter::chunk_items;
use backtide_protocol::CompareItem;
use backtide_tracking::DirtyBitmap;
use backtide_units::{BlockRange, ByteRange, CaptureTime, DiskId, Epoch, HistoryId, LogPosition, Lsn};
use bytes::Bytes;
use tokio::sync::Notify;

use super::{FetchError, Fetching, Piece, PointSource};

/// A point whose content is known.
pub(crate) struct FakeSource {
    point: SourcePoint,
    content: Vec<u8>,
    /// So far the log goes, and so many entries it has.
    end: Cell<(Lsn, LogPosition)>,
    /// Nobody answers.
    away: Cell<bool>,
    /// It does not give what it has.
    refuses: Cell<bool>,
    /// Answers wait until this is open.
    closed: Cell<bool>,
    opened: Notify,
    damaged: RefCell<DirtyBitmap>,
    /// What was asked for.
    asked: RefCell<Vec<ByteRange>>,
    /// Of which parts it was asked what they hold, or what of them changed.
    maps: RefCell<Vec<BlockRange>>,
    /// Answers to that wait.
    maps_closed: Cell<bool>,
    /// How often it was asked what differs.
    compared: Cell<usize>,
    /// Who holds the point.
    owners: RefCell<BTreeSet<String>>,
    /// Somebody has asked.
    was_asked: Notify,
}

impl FakeSource {
    pub(crate) fn new(content: Vec<u8>) -> Self {
        let point = SourcePoint {
            receiver: "unix:/run/receiver.sock".to_owned(),
            disk: DiskId::random(),
            name: "vm1".parse().unwrap(),
            history: HistoryId::random(),
            lsn: Lsn(40),
            time: CaptureTime(7),
            size: backtide_units::ByteCount::of(&content),
        };
        Self {
            point,
            content,
            end: Cell::new((Lsn::MAX, LogPosition(u64::MAX))),
            away: Cell::new(false),
            refuses: Cell::new(false),
            closed: Cell::new(false),
            opened: Notify::new(),
            damaged: RefCell::default(),
            asked: RefCell::default(),
            maps: RefCell::default(),
            maps_closed: Cell::new(false),
            compared: Cell::new(0),
            owners: RefCell::default(),
            was_asked: Notify::new(),
        }
    }

    /// Its log goes so far only.
    pub(crate) fn ends_at(&self, lsn: Lsn, entries: LogPosition) {
        self.end.set((lsn, entries));
    }

    pub(crate) fn set_away(&self, away: bool) {
        self.away.set(away);
    }

    pub(crate) fn set_refuses(&self, refuses: bool) {
        self.refuses.set(refuses);
    }

    /// Answers wait from now on, until it is opened again.
    pub(crate) fn close(&self) {
        self.closed.set(true);
    }

    pub(crate) fn open(&self) {
        self.closed.set(false);
        self.opened.notify_waiters();
    }

    pub(crate) fn damage(&self, blocks: BlockRange) {
        self.damaged.borrow_mut().insert(blocks);
    }

    pub(crate) fn asked(&self) -> Vec<ByteRange> {
        self.asked.borrow().clone()
    }

    /// Answers about parts of the disk wait, or do no longer.
    pub(crate) fn close_maps(&self, closed: bool) {
        self.maps_closed.set(closed);
        self.opened.notify_waiters();
    }

    /// Of which parts it was asked what they hold, or what of them changed.
    pub(crate) fn maps(&self) -> Vec<BlockRange> {
        self.maps.borrow().clone()
    }

    /// Waits until somebody has asked for so much.
    pub(crate) async fn until_asked(&self, times: usize) {
        loop {
            let asked = self.was_asked.notified();
            if self.asked.borrow().len() >= times {
                return;
            }
            asked.await;
        }
    }
}

impl FakeSource {
    /// The blocks of `part` that hold something; damage of the first block of all is one of the map too.
    async fn map(&self, part: BlockRange) -> Result<DirtyBitmap, FetchError> {
        self.maps.borrow_mut().push(part);
        self.was_asked.notify_waiters();
        self.until(|| !self.closed.get() && !self.maps_closed.get()).await;
        self.not_away()?;
        if part.start().0 == 0 && self.damaged.borrow().touches(BlockRange::from(0..1)) {
            return Err(FetchError::Damaged("an index does not match".to_owned()));
        }
        let mut blocks = DirtyBitmap::new();
        for (index, bytes) in (0_u64..).zip(self.content.chunks(4096)) {
            if part.indices().contains(&index) && bytes.iter().any(|byte| *byte != 0) {
                blocks.insert(BlockRange::from(index..index + 1));
            }
        }
        Ok(blocks)
    }

    fn not_away(&self) -> Result<(), FetchError> {
        match self.away.get() {
            true => Err(FetchError::Unreachable("the receiver is away".to_owned())),
            false => Ok(()),
        }
    }

    async fn until_open(&self) {
        self.until(|| !self.closed.get()).await;
    }

    async fn until(&self, reached: impl Fn() -> bool) {
        loop {
            let opened = self.opened.notified();
            if reached() {
                return;
            }
            opened.await;
        }
    }

    /// Who holds the point now.
    pub(crate) fn owners(&self) -> BTreeSet<String> {
        self.owners.borrow().clone()
    }

    /// Waits until somebody holds the point.
    pub(crate) async fn until_held(&self) {
        loop {
            let asked = self.was_asked.notified();
            if !self.owners.borrow().is_empty() {
                return;
            }
            asked.await;
        }
    }

    /// Waits until it was asked so often what differs.
    pub(crate) async fn until_compared(&self, times: usize) {
        loop {
            let asked = self.was_asked.notified();
            if self.compared.get() >= times {
                return;
            }
            asked.await;
        }
    }
}

impl PointSource for FakeSource {
    fn point(&self) -> &SourcePoint {
        &self.point
    }

    fn fetch(&self, range: ByteRange) -> Fetching<'_, Vec<(ByteRange, Piece)>> {
        Box::pin(async move {
            self.asked.borrow_mut().push(range);
            self.was_asked.notify_waiters();
            self.until_open().await;
            if self.away.get() {
                return Err(FetchError::Unreachable("the receiver is away".to_owned()));
            }
            if self.refuses.get() {
                return Err(FetchError::Refused("the receiver has no such point".to_owned()));
            }
            if self.damaged.borrow().touches(BlockRange::touched_by(range)) {
                return Err(FetchError::Damaged("a checksum does not match".to_owned()));
            }
            let bytes = &self.content[range.start().0 as usize..range.end().0 as usize];
            // In two pieces, of which one may be zeroes.
            let middle = backtide_units::ByteOffset(range.start().0 + range.count().0 / 2);
            let (first, second) = bytes.split_at(bytes.len() / 2);
            let piece = |bytes: &[u8]| match bytes.iter().all(|byte| *byte == 0) {
                true => Piece::Zeroes,
                false => Piece::Data(Bytes::copy_from_slice(bytes)),
            };
            Ok(vec![
                (ByteRange::between(range.start(), middle), piece(first)),
                (ByteRange::between(middle, range.end()), piece(second)),
            ])
        })
    }

    fn differing(&self, items: Vec<CompareItem>) -> Fetching<'_, Vec<u32>> {
        Box::pin(async move {
            self.compared.set(self.compared.get() + 1);
            self.was_asked.notify_waiters();
            self.until_open().await;
            if self.away.get() {
                return Err(FetchError::Unreachable("the receiver is away".to_owned()));
            }
            let differs = |item: &CompareItem| {
                let place = item.range.start().0 as usize..item.range.end().0 as usize;
                let damaged = self.damaged.borrow().touches(BlockRange::touched_by(item.range));
                damaged || chunk_items(item.range, &self.content[place])[0] != *item
            };
            let positions = (0..).zip(&items).filter(|(_, item)| differs(item));
            Ok(positions.map(|(position, _)| position).collect())
        })
    }

    fn changed(&self, _since: Lsn) -> Fetching<'_, DirtyBitmap> {
        Box::pin(async { Ok(DirtyBitmap::of(BlockRange::whole_disk(self.point.size))) })
    }

    fn after(&self, durable: Lsn, entries: LogPosition) -> Fetching<'_, DirtyBitmap> {
        let (end, count) = self.end.get();
        if durable > end || entries > count {
            return Box::pin(async { Err(FetchError::Refused("the log has less than it had".to_owned())) });
        }
        self.changed(Lsn::ZERO)
    }

    fn left(&self, _epoch: Epoch, _durable: Lsn, _entries: LogPosition) -> Fetching<'_, DirtyBitmap> {
        self.changed(Lsn::ZERO)
    }

    fn damaged(&self, _since: Option<Lsn>) -> Fetching<'_, DirtyBitmap> {
        Box::pin(async { Ok(self.damaged.borrow().clone()) })
    }

    fn data(&self) -> Fetching<'_, DirtyBitmap> {
        self.changed(Lsn::ZERO)
    }

    fn data_in(&self, part: BlockRange) -> Fetching<'_, DirtyBitmap> {
        Box::pin(self.map(part))
    }

    fn changed_in(&self, _since: Lsn, part: BlockRange) -> Fetching<'_, DirtyBitmap> {
        Box::pin(self.map(part))
    }

    fn hold(&self, owner: &str) -> Fetching<'_, ()> {
        let owner = owner.to_owned();
        Box::pin(async move {
            self.not_away()?;
            self.owners.borrow_mut().insert(owner);
            self.was_asked.notify_waiters();
            Ok(())
        })
    }

    fn release(&self, owner: &str) -> Fetching<'_, ()> {
        let owner = owner.to_owned();
        Box::pin(async move {
            self.not_away()?;
            self.owners.borrow_mut().remove(&owner);
            Ok(())
        })
    }
}
