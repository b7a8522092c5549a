//! An image's I/O by io_uring: many requests in one system call, none of which makes the caller wait.
//!
//! A [`Ring`] belongs to one thread. Requests are [pushed](Ring::push), a [turn](Ring::turn) hands them
//! all to the kernel and brings back what is complete; [`Ring::as_fd`] becomes readable when there is
//! something to bring back. Who waits for that, and how, is the caller's business.
//!
//! This is the only file with `unsafe` for I/O. Its argument is one: **memory the kernel may touch is owned by
//! the [`Flight`] of its request, and a flight ends when the kernel has said that the request is
//! complete** - never by a future that is dropped, and not when the ring is: that cancels and waits.
//! [`write_out`] is here for that reason only: no safe crate has the call, and it is given no memory.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    sync::{
        Arc,
        atomic::{Ordering, fence},
    },
};

use backtide_units::{ByteOffset, ByteRange};
use bytes::Bytes;
use io_uring::{IoUring, Probe, cqueue, opcode, squeue, types};
use rustix::{
    event::EventfdFlags,
    io::{Errno, ReadWriteFlags},
};

use crate::{buffer::Buffer, image::ImageFile};

/// Requests that can be under way at once.
const FLIGHTS_MAX: u32 = 256;

/// How often a request is tried again that the kernel says it cannot take now.
const TRIES_MAX: u32 = 64;

/// The name of the request that cancels the others.
const CANCEL: u64 = u64::MAX;

/// What a ring can do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RingOp {
    /// Read a range.
    Read(ByteRange),
    /// Write a range.
    Write {
        /// Where.
        range: ByteRange,
        /// What; as long as the range.
        data: Bytes,
        /// To stable storage, this write at least.
        stable: bool,
    },
    /// Everything that was complete when this was pushed to stable storage.
    Sync,
}

/// A request that is complete.
#[derive(Debug)]
pub struct Completion<T> {
    /// As it was pushed.
    pub tag: T,
    /// The bytes of a read, none of others; or the operating system's error.
    pub result: io::Result<Option<Bytes>>,
}

/// An io_uring for one image.
pub struct Ring<T> {
    ring: IoUring,
    /// Requests under way, by the name the kernel knows them by.
    flights: Vec<Option<Flight<T>>>,
    free: Vec<u32>,
    image: Arc<ImageFile>,
    event: OwnedFd,
    /// Whether the kernel says that it has something before it tells so by the event: see [`build`].
    is_deferred: bool,
}

/// A request under way.
struct Flight<T> {
    tag: T,
    work: Work,
    /// Bytes done so far.
    done: usize,
    tries: u32,
}

/// What the kernel does, and the memory it does it with.
enum Work {
    Read { buffer: Buffer, at: ByteOffset, wanted: std::ops::Range<usize> },
    Write { data: Bytes, at: ByteOffset, stable: Stable },
    Sync,
}

/// How a write becomes stable.
#[derive(Clone, Copy, PartialEq)]
enum Stable {
    Not,
    ByFlag,
    /// By a sync that follows it: the flag would not do.
    BySync,
}

impl<T> Ring<T> {
    /// A ring for this image and the calling thread.
    ///
    /// # Errors
    /// Where io_uring is forbidden or too old: the operating system's.
    pub fn new(image: Arc<ImageFile>) -> io::Result<Self> {
        let (ring, is_deferred) = build()?;
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        let needed =
            [opcode::Read::CODE, opcode::Write::CODE, opcode::Fsync::CODE, opcode::AsyncCancel::CODE];
        if !needed.into_iter().all(|code| probe.is_supported(code)) {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "the kernel's io_uring is too old"));
        }
        let event = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        ring.submitter().register_eventfd(event.as_raw_fd())?;
        let flights = (0..FLIGHTS_MAX).map(|_| None).collect();
        Ok(Self { ring, flights, free: (0..FLIGHTS_MAX).rev().collect(), image, event, is_deferred })
    }

    /// Whether it can do this at all: not what has to be widened to whole blocks of the device, and
    /// nothing beyond the image.
    pub fn takes(&self, op: &RingOp) -> bool {
        match op {
            RingOp::Read(range) => self.image.require_inside(range.start(), range.count()).is_ok(),
            RingOp::Write { range, data, .. } => {
                assert_eq!(data.len() as u64, range.count().0, "a write as long as its range");
                self.image.require_inside(range.start(), range.count()).is_ok()
                    && self.image.alignment().is_none_or(|alignment| alignment.takes(*range))
            }
            RingOp::Sync => true,
        }
    }

    /// Whether there is room for another request.
    pub fn has_room(&self) -> bool {
        !self.free.is_empty()
    }

    /// Requests that are not complete.
    pub fn under_way(&self) -> usize {
        self.flights.len() - self.free.len()
    }

    /// Takes a request; the next turn hands it to the kernel.
    ///
    /// # Panics
    /// Without room, or with one the ring does not take.
    pub fn push(&mut self, op: RingOp, tag: T) {
        assert!(self.takes(&op), "a request that this ring does not take");
        let work = self.prepare(op);
        let name = self.free.pop().expect("room for a request");
        self.flights[name as usize] = Some(Flight { tag, work, done: 0, tries: 0 });
        self.queue(name);
    }

    fn prepare(&self, op: RingOp) -> Work {
        let alignment = self.image.alignment();
        match op {
            RingOp::Read(range) => {
                let outer = alignment.map_or(range, |alignment| alignment.widen(range));
                let skipped = (range.start().0 - outer.start().0) as usize;
                let wanted = skipped..skipped + range.count().0 as usize;
                Work::Read { buffer: self.image.buffers().take(outer.count()), at: outer.start(), wanted }
            }
            RingOp::Write { range, data, stable } => {
                let as_it_is = alignment.is_none_or(|alignment| alignment.takes_memory(&data));
                let data = if as_it_is { data } else { self.image.buffers().copy_of(&data).freeze() };
                let stable = match (stable, self.image.keeps_flag()) {
                    (false, _) => Stable::Not,
                    (true, true) => Stable::ByFlag,
                    (true, false) => Stable::BySync,
                };
                Work::Write { data, at: range.start(), stable }
            }
            RingOp::Sync => Work::Sync,
        }
    }

    /// Puts what is left of a flight into the submission queue.
    #[expect(unsafe_code, reason = "the kernel is given addresses")]
    fn queue(&mut self, name: u32) {
        let image = types::Fd(self.image.as_fd().as_raw_fd());
        let flight = self.flights[name as usize].as_mut().expect("a flight that is under way");
        let entry = flight.entry(image).user_data(name.into());
        // SAFETY: the entry refers to the image's descriptor, which `self.image` keeps open, and to the
        // flight's memory. Both are there until the kernel has completed the request: a flight leaves
        // `self.flights` in `complete` only, after the completion that bears its name, and dropping the ring
        // waits for all of them. A flight's memory does not move (it is on the heap) and nobody else
        // has it: a read's `Buffer` is handed out only at the end, a write's `Bytes` cannot be changed.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        assert!(pushed.is_ok(), "the queue has a place for each flight");
    }

    /// Hands what was pushed to the kernel and appends what is complete to `done`.
    ///
    /// # Errors
    /// The operating system's, when it cannot take more at this moment: nothing is lost, and another
    /// turn has to follow by and by.
    pub fn turn(&mut self, done: &mut Vec<Completion<T>>) -> io::Result<()> {
        loop {
            // What this turn sees itself need not be told.
            if self.is_deferred {
                self.ring.completion().disable_eventfd();
            }
            let entered = self.enter();
            self.reap(done);
            if self.is_deferred {
                self.ring.completion().enable_eventfd();
                // What came meanwhile was not told. The kernel says that it has something, then looks
                // whether that is to be told; here it is the other way round, and nothing may overtake.
                fence(Ordering::SeqCst);
            }
            entered?;
            if !self.has_something() {
                return Ok(());
            }
        }
    }

    /// Whether a system call, or none, would bring something on.
    fn has_something(&mut self) -> bool {
        let submission = self.ring.submission();
        let kernel_has = submission.taskrun() || submission.cq_overflow();
        let ours = !submission.is_empty();
        drop(submission);
        kernel_has || ours || !self.ring.completion().is_empty()
    }

    fn enter(&mut self) -> io::Result<()> {
        loop {
            let submission = self.ring.submission();
            let kernel_has = submission.taskrun() || submission.cq_overflow();
            if submission.is_empty() && !kernel_has {
                return Ok(());
            }
            drop(submission);
            match self.ring.submit() {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
            if self.ring.submission().is_empty() {
                return Ok(());
            }
        }
    }

    fn reap(&mut self, done: &mut Vec<Completion<T>>) {
        loop {
            let next = self.ring.completion().next();
            let Some(entry) = next else { return };
            done.extend(self.complete(&entry));
        }
    }

    /// What a completion means; none when something of its request is left to do.
    fn complete(&mut self, entry: &cqueue::Entry) -> Option<Completion<T>> {
        if entry.user_data() == CANCEL {
            return None;
        }
        let name = u32::try_from(entry.user_data()).expect("a name that was given");
        let slot = &mut self.flights[name as usize];
        let flight = slot.as_mut().expect("a request completes once");
        let block = self.image.alignment().map_or(1, |alignment| alignment.block as usize);
        let Some(result) = flight.advance(entry.result(), block) else {
            self.queue(name);
            return None;
        };
        if result.is_ok() && matches!(flight.work, Work::Write { stable: Stable::BySync, .. }) {
            // The kernel is done with its memory.
            (flight.work, flight.tries) = (Work::Sync, 0);
            self.queue(name);
            return None;
        }
        let Flight { tag, work, .. } = slot.take().expect("seen just now");
        self.free.push(name);
        let result = result.map(|()| match work {
            Work::Read { buffer, wanted, .. } => Some(buffer.freeze().slice(wanted)),
            Work::Write { .. } | Work::Sync => None,
        });
        Some(Completion { tag, result })
    }

    /// Cancels what can be and waits for all of it.
    #[expect(unsafe_code, reason = "an entry is pushed, and flights may have to be leaked")]
    fn cancel_all(&mut self) {
        let mut ended = Vec::new();
        // Room for one more entry; trouble shows below.
        let _ = self.enter();
        let cancel = opcode::AsyncCancel2::new(types::CancelBuilder::any()).build().user_data(CANCEL);
        // SAFETY: the entry refers to no memory.
        let _ = unsafe { self.ring.submission().push(&cancel) };
        while self.under_way() > 0 {
            match self.ring.submit_and_wait(1) {
                Ok(_) => {}
                Err(error) if is_passing(&error) => std::thread::yield_now(),
                Err(_) => {
                    // The kernel may go on with them for ever: their memory must never be anybody else's.
                    std::mem::forget(std::mem::take(&mut self.flights));
                    return;
                }
            }
            self.reap(&mut ended);
            ended.clear();
        }
    }
}

/// Begins to write out what a file has in the page cache, and with `wait` waits until all of it is written and says
/// what could not be. Nothing is durable by that.
#[expect(unsafe_code, reason = "a system call that rustix does not have")]
pub(crate) fn write_out(file: BorrowedFd<'_>, wait: bool) -> io::Result<()> {
    let flags = if wait {
        libc::SYNC_FILE_RANGE_WAIT_BEFORE | libc::SYNC_FILE_RANGE_WRITE | libc::SYNC_FILE_RANGE_WAIT_AFTER
    } else {
        libc::SYNC_FILE_RANGE_WRITE
    };
    loop {
        // SAFETY: the kernel is given no memory, and the descriptor is open as long as it is borrowed. A length of
        // 0 is everything up to the end.
        let written = unsafe { libc::sync_file_range(file.as_raw_fd(), 0, 0, flags) };
        if written == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            Some(libc::EINTR) => {}
            // What a sandbox answers: no device does.
            Some(libc::EPERM) => return Err(io::Error::new(io::ErrorKind::Unsupported, error)),
            Some(_) | None => return Err(error),
        }
    }
}

/// Whether another attempt at entering the kernel may go well.
fn is_passing(error: &io::Error) -> bool {
    let errno = error.raw_os_error().map(Errno::from_raw_os_error);
    matches!(errno, Some(Errno::INTR | Errno::AGAIN | Errno::BUSY))
}

/// The best ring this kernel makes, and whether its flag for deferred work is to be relied on: elsewhere
/// than on x86 the kernel orders setting that flag and telling it too loosely for this.
fn build() -> io::Result<(IoUring, bool)> {
    // Completions are worked off when this thread asks for them and not in the middle of something else.
    let deferred = IoUring::builder()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_taskrun_flag()
        .dontfork()
        .build(FLIGHTS_MAX);
    match deferred {
        // Not before Linux 6.1.
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
            Ok((IoUring::builder().dontfork().build(FLIGHTS_MAX)?, false))
        }
        built => Ok((built?, cfg!(target_arch = "x86_64"))),
    }
}

impl<T> Flight<T> {
    /// The request for what is left of it.
    fn entry(&mut self, image: types::Fd) -> squeue::Entry {
        let done = self.done;
        let left = |length: usize| u32::try_from(length - done).expect("a request is small");
        let from = |at: ByteOffset| at.0 + done as u64;
        match &mut self.work {
            Work::Read { buffer, at, .. } => {
                let memory = &mut buffer[done..];
                opcode::Read::new(image, memory.as_mut_ptr(), left(done + memory.len()))
                    .offset(from(*at))
                    .build()
            }
            Work::Write { data, at, stable } => {
                let by_flag = *stable == Stable::ByFlag;
                let flags = if by_flag { ReadWriteFlags::DSYNC } else { ReadWriteFlags::empty() };
                opcode::Write::new(image, data[done..].as_ptr(), left(data.len()))
                    .offset(from(*at))
                    .rw_flags(flags.bits().cast_signed())
                    .build()
            }
            Work::Sync => opcode::Fsync::new(image).flags(types::FsyncFlags::DATASYNC).build(),
        }
    }

    /// What the kernel has done of it: none when something is left.
    fn advance(&mut self, result: i32, block: usize) -> Option<io::Result<()>> {
        let Ok(count) = usize::try_from(result) else {
            let errno = Errno::from_raw_os_error(-result);
            self.tries += 1;
            let again = matches!(errno, Errno::INTR | Errno::AGAIN) && self.tries < TRIES_MAX;
            return if again { None } else { Some(Err(errno.into())) };
        };
        let (length, ended) = match &self.work {
            Work::Read { buffer, .. } => (buffer.len(), io::ErrorKind::UnexpectedEof),
            Work::Write { data, .. } => (data.len(), io::ErrorKind::WriteZero),
            Work::Sync => return Some(Ok(())),
        };
        self.done += count;
        if self.done >= length {
            return Some(Ok(()));
        }
        // Direct I/O that ends inside a block has met the end of the file, and cannot go on from there.
        if count == 0 || !self.done.is_multiple_of(block) {
            return Some(Err(ended.into()));
        }
        None
    }
}

impl<T> AsFd for Ring<T> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

impl<T> Drop for Ring<T> {
    fn drop(&mut self) {
        self.cancel_all();
    }
}

#[cfg(test)]
mod tests;
