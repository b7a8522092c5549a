//! Reads of a mounted point on their way to the readers' pool, several at once.
//!
//! Handing one read to another thread and its bytes back costs more than most reads, so those that wait go together. A
//! few batches are under way at once: reads that take their time hold up those of their own batch only.
//!
//! Runs on the mounts' thread. What waits is bounded by what the connections' limits let in.

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    rc::Rc,
};

use backtide_export::{NbdError, Reply};
use backtide_recovery::{LogError, View};
use backtide_units::ByteRange;
use bytes::Bytes;

use crate::point_export::Reading;

/// Batches of one mount that are under way at once.
const BATCHES: usize = 4;

/// Reads of one batch at most ...
const BATCH_MAX: usize = 16;

/// ... and their bytes, unless one alone has more: a long read is worth a thread of its own.
const BATCH_BYTES_MAX: u64 = 128 << 10;

/// The reads of one mount. Clones share them.
#[derive(Clone)]
pub(crate) struct ReadQueue(Rc<Shared>);

struct Shared {
    view: View,
    reading: Rc<Reading>,
    waiting: RefCell<VecDeque<(ByteRange, Reply)>>,
    under_way: Cell<usize>,
}

impl ReadQueue {
    pub(crate) fn new(view: View, reading: Rc<Reading>) -> Self {
        Self(Rc::new(Shared { view, reading, waiting: RefCell::default(), under_way: Cell::new(0) }))
    }

    /// Answers `reply` with the bytes of `range`, soon.
    pub(crate) fn push(&self, range: ByteRange, reply: Reply) {
        self.0.waiting.borrow_mut().push_back((range, reply));
        if self.0.under_way.get() < BATCHES {
            self.0.under_way.set(self.0.under_way.get() + 1);
            tokio::task::spawn_local(Rc::clone(&self.0).read());
        }
    }
}

impl Shared {
    /// Reads batches as long as anything waits.
    async fn read(self: Rc<Self>) {
        loop {
            let (ranges, replies) = self.take();
            if ranges.is_empty() {
                break;
            }
            let (view, asked) = (self.view.clone(), ranges.clone());
            let read_all = move || -> Vec<Result<Bytes, LogError>> {
                ranges.into_iter().map(|range| view.read(range)).collect()
            };
            match self.reading.readers.run(read_all).await {
                Ok(read) => {
                    for ((reply, range), read) in replies.into_iter().zip(asked).zip(read) {
                        match read {
                            Ok(bytes) => reply.data(bytes),
                            Err(error) => {
                                self.reading.refuse(reply, (self.view.clone(), range), error).await;
                            }
                        }
                    }
                }
                Err(_) => replies
                    .into_iter()
                    .for_each(|reply| reply.fail_with(NbdError::Shutdown, "the receiver is shutting down")),
            }
        }
        self.under_way.set(self.under_way.get() - 1);
    }

    /// The next batch: a fair share of what waits, the oldest first.
    fn take(&self) -> (Vec<ByteRange>, Vec<Reply>) {
        let mut waiting = self.waiting.borrow_mut();
        let share = waiting.len().div_ceil(BATCHES).min(BATCH_MAX);
        let (mut ranges, mut replies, mut bytes) = (Vec::with_capacity(share), Vec::with_capacity(share), 0);
        while ranges.len() < share
            && let Some((range, _)) = waiting.front()
            && (ranges.is_empty() || bytes + range.count().0 <= BATCH_BYTES_MAX)
            && let Some((range, reply)) = waiting.pop_front()
        {
            bytes += range.count().0;
            ranges.push(range);
            replies.push(reply);
        }
        (ranges, replies)
    }
}
