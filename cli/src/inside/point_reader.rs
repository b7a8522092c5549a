//! A mounted point for code that reads as from a file: blocks the thread it runs on.
//!
//! Some stretches are remembered: file systems read their tables in small pieces, here and there.

use std::{
    cell::RefCell,
    collections::VecDeque,
    fmt, io,
    sync::{Arc, OnceLock},
};

use backtide_control::{ApiError, ErrorCode};
use backtide_export::{Client, ClientError, NbdError};
use backtide_filesystems::Source;
use backtide_units::{ByteCount, ByteOffset};
use bytes::Bytes;
use tokio::runtime::Handle;

/// What is read at once at least.
const STRETCH: u64 = 64 << 10;

/// The longest read: as long as one request may be.
const READ_MAX: u64 = 1 << 20;

/// How many stretches are remembered; they have a megabyte at most.
const STRETCHES: usize = 64;

/// Whether the connection to a point has ended: then nothing of it can be read any more, which is no file's fault.
#[derive(Clone, Debug, Default)]
pub(crate) struct Lost(Arc<OnceLock<ApiError>>);

/// Whether a point's server is gone, or about to go; what a server that goes on has refused is about some bytes alone.
pub(crate) fn is_gone(error: &ClientError) -> bool {
    error.is_lost() || matches!(error, ClientError::Refused { error: NbdError::Shutdown, .. })
}

impl Lost {
    fn note(&self, error: &ClientError) {
        if is_gone(error) {
            let _ = self.0.set(ApiError::from_error(ErrorCode::Unreachable, error));
        }
    }

    /// Why, when it has.
    pub(crate) fn why(&self) -> Option<&ApiError> {
        self.0.get()
    }
}

/// A point. Must not be used on a thread of the runtime.
pub(crate) struct PointReader {
    client: Client,
    runtime: Handle,
    /// Why nothing more comes of the point, once its connection has ended.
    lost: Lost,
    /// Stretches that were read, the last used first, and where they begin.
    stretches: RefCell<VecDeque<(u64, Bytes)>>,
}

impl PointReader {
    /// The point behind `client`, whose connection runs on `runtime`.
    pub(crate) fn new(client: Client, runtime: Handle) -> Self {
        Self { client, runtime, lost: Lost::default(), stretches: RefCell::default() }
    }

    /// What tells, also when the reader is gone, whether its connection ended before it did.
    pub(crate) fn lost(&self) -> Lost {
        self.lost.clone()
    }

    /// The stretch that has the byte `at`, of `wanted` bytes from there on if it is read anew.
    fn stretch_with(&self, at: u64, wanted: usize) -> io::Result<(u64, Bytes)> {
        let mut stretches = self.stretches.borrow_mut();
        let has = |(start, bytes): &(u64, Bytes)| (*start..start + bytes.len() as u64).contains(&at);
        if let Some(found) = stretches.iter().position(has) {
            let found = stretches.remove(found).expect("it is there");
            stretches.push_front(found.clone());
            return Ok(found);
        }
        let start = at / STRETCH * STRETCH;
        let end = at.saturating_add((wanted as u64).min(READ_MAX)).next_multiple_of(STRETCH);
        let count = ByteCount(end.min(self.client.size().0).min(start + READ_MAX) - start);
        let read = self.runtime.block_on(self.client.read(ByteOffset(start), count));
        let bytes = read.map_err(|error| {
            self.lost.note(&error);
            io::Error::other(error)
        })?;
        stretches.truncate(STRETCHES - 1);
        stretches.push_front((start, bytes.clone()));
        Ok((start, bytes))
    }
}

impl Source for PointReader {
    fn size(&self) -> ByteCount {
        self.client.size()
    }

    fn read_at(&self, offset: ByteOffset, buffer: &mut [u8]) -> io::Result<()> {
        let end = offset.checked_add(ByteCount::of(buffer)).filter(|end| end.0 <= self.size().0);
        if end.is_none() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let (mut at, mut done) = (offset.0, 0);
        while done < buffer.len() {
            let (start, stretch) = self.stretch_with(at, buffer.len() - done)?;
            let from = usize::try_from(at - start).expect("within a stretch");
            let count = (stretch.len() - from).min(buffer.len() - done);
            buffer[done..done + count].copy_from_slice(&stretch[from..from + count]);
            (at, done) = (at + count as u64, done + count);
        }
        Ok(())
    }
}

impl fmt::Debug for PointReader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PointReader({} bytes)", self.size())
    }
}
