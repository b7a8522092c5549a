//! Memory for a disk's I/O: aligned for direct I/O, and used again and again.
//!
//! A megabyte that is allocated for every request is a megabyte of page faults for every request,
//! which costs more than filling it. A [`Buffer`] comes from its disk's [`BufferPool`] and goes back
//! when it, or the last slice of the [`Bytes`] made of it, is dropped.
//!
//! Invariants: a buffer begins at a multiple of [`BUFFER_ALIGNMENT`]; a pool keeps at most
//! [`KEPT_BYTES`] that nobody uses, and more only while its owner says so. What a buffer holds when it is taken is what was in it before,
//! of the same disk; whoever fills it hands out only what it filled.

use std::{
    fmt,
    ops::{Deref, DerefMut},
    sync::{Arc, Mutex, PoisonError},
};

use backtide_units::ByteCount;
use bytes::Bytes;

/// What the start of every [`Buffer`] in memory is a multiple of, in bytes: as much as any device or file
/// system asks for.
pub const BUFFER_ALIGNMENT: usize = 4096;

/// How much unused memory a pool keeps.
const KEPT_BYTES: usize = 8 << 20;

/// Capacities are powers of two from here on.
const CAPACITY_MIN: usize = 4096;

/// Longer buffers are not kept: they are rare, and would be most of what is.
const CAPACITY_KEPT_MAX: usize = 2 << 20;

/// The unused buffers of one disk. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct BufferPool {
    shelves: Arc<Mutex<Shelves>>,
}

struct Shelves {
    /// One for each capacity, see [`shelf`].
    unused: Vec<Vec<Memory>>,
    bytes: usize,
    /// How many may be kept.
    most: usize,
}

impl Default for Shelves {
    fn default() -> Self {
        Self { unused: Vec::new(), bytes: 0, most: KEPT_BYTES }
    }
}

/// Some memory and where its aligned part begins.
struct Memory {
    bytes: Vec<u8>,
    start: usize,
}

/// A place to do I/O in.
pub struct Buffer {
    /// None only while it is being dropped.
    memory: Option<Memory>,
    length: usize,
    pool: BufferPool,
}

fn shelf(capacity: usize) -> usize {
    (capacity / CAPACITY_MIN).trailing_zeros() as usize
}

impl Memory {
    fn new(capacity: usize) -> Self {
        let bytes = vec![0; capacity + BUFFER_ALIGNMENT];
        let beyond = bytes.as_ptr().addr() % BUFFER_ALIGNMENT;
        let start = if beyond == 0 { 0 } else { BUFFER_ALIGNMENT - beyond };
        Self { bytes, start }
    }

    fn capacity(&self) -> usize {
        self.bytes.len() - BUFFER_ALIGNMENT
    }
}

impl BufferPool {
    /// A buffer of `count` bytes, of whatever content.
    ///
    /// # Panics
    /// Beyond what a machine can address.
    pub fn take(&self, count: ByteCount) -> Buffer {
        let length = count.as_usize().expect("a request fits into memory");
        let capacity = length.next_power_of_two().max(CAPACITY_MIN);
        let unused = {
            let mut shelves = self.lock();
            let memory = shelves.unused.get_mut(shelf(capacity)).and_then(Vec::pop);
            if memory.is_some() {
                shelves.bytes -= capacity;
            }
            memory
        };
        let memory = unused.unwrap_or_else(|| Memory::new(capacity));
        Buffer { memory: Some(memory), length, pool: self.clone() }
    }

    /// A buffer that holds `data`.
    pub fn copy_of(&self, data: &[u8]) -> Buffer {
        let mut buffer = self.take(ByteCount::of(data));
        buffer.copy_from_slice(data);
        buffer
    }

    /// From now on keeps up to `more` unused bytes beyond what a pool always may: of a disk that is read
    /// whole, as many as are under way at once. What is too much goes.
    pub fn keep_beyond(&self, more: ByteCount) {
        let mut shelves = self.lock();
        shelves.most = KEPT_BYTES.saturating_add(more.as_usize().unwrap_or(usize::MAX));
        while shelves.bytes > shelves.most {
            let Some(memory) = shelves.unused.iter_mut().rev().find_map(Vec::pop) else { return };
            shelves.bytes -= memory.capacity();
        }
    }

    fn keep(&self, memory: Memory) {
        let capacity = memory.capacity();
        let mut shelves = self.lock();
        if capacity > CAPACITY_KEPT_MAX || shelves.bytes + capacity > shelves.most {
            return;
        }
        shelves.bytes += capacity;
        let shelf = shelf(capacity);
        if shelves.unused.len() <= shelf {
            shelves.unused.resize_with(shelf + 1, Vec::new);
        }
        shelves.unused[shelf].push(memory);
    }

    /// Bytes that nobody uses.
    #[cfg(test)]
    pub(crate) fn unused(&self) -> usize {
        self.lock().bytes
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Shelves> {
        // Nothing under the lock can leave the shelves half way.
        self.shelves.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Buffer {
    /// Its bytes, to be shared. The memory goes back to the pool with the last slice of them.
    pub fn freeze(self) -> Bytes {
        Bytes::from_owner(self)
    }

    fn memory(&self) -> &Memory {
        self.memory.as_ref().expect("there until it is dropped")
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        let memory = self.memory();
        &memory.bytes[memory.start..memory.start + self.length]
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        let length = self.length;
        let memory = self.memory.as_mut().expect("there until it is dropped");
        &mut memory.bytes[memory.start..memory.start + length]
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Some(memory) = self.memory.take() {
            self.pool.keep(memory);
        }
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buffer({} bytes)", self.length)
    }
}

impl fmt::Debug for Shelves {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Shelves({} bytes unused)", self.bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_begin_where_direct_io_may() {
        let pool = BufferPool::default();
        let kept: Vec<Buffer> = [0, 1, 512, 4096, 4097, 1 << 20].map(|n| pool.take(ByteCount(n))).into();
        for (buffer, length) in kept.iter().zip([0, 1, 512, 4096, 4097, 1 << 20]) {
            assert_eq!(buffer.len(), length);
            assert_eq!(buffer.as_ptr().addr() % BUFFER_ALIGNMENT, 0);
        }
    }

    #[test]
    fn memory_is_used_again_after_the_last_slice() {
        let pool = BufferPool::default();
        let mut buffer = pool.take(ByteCount(1 << 20));
        buffer.fill(7);
        let place = buffer.as_ptr();
        let bytes = buffer.freeze();
        let slice = bytes.slice(100..200);
        drop(bytes);
        assert_eq!(pool.unused(), 0, "a slice is out");
        assert_eq!(slice[..], [7; 100]);
        drop(slice);
        assert_eq!(pool.unused(), 1 << 20);
        assert_eq!(pool.take(ByteCount((1 << 20) - 5)).as_ptr(), place);
    }

    #[test]
    fn a_pool_keeps_no_more_than_its_limit() {
        let pool = BufferPool::default();
        let many: Vec<Buffer> = (0..100).map(|_| pool.take(ByteCount(1 << 20))).collect();
        drop(many);
        assert_eq!(pool.unused(), KEPT_BYTES);
        drop(pool.take(ByteCount(32 << 20)));
        assert_eq!(pool.unused(), KEPT_BYTES);
    }

    #[test]
    fn a_pool_keeps_more_while_it_is_told_to() {
        let pool = BufferPool::default();
        let use_many = || drop((0..100).map(|_| pool.take(ByteCount(1 << 20))).collect::<Vec<Buffer>>());
        pool.keep_beyond(ByteCount(4 << 20));
        use_many();
        assert_eq!(pool.unused(), KEPT_BYTES + (4 << 20));
        pool.keep_beyond(ByteCount(0));
        assert_eq!(pool.unused(), KEPT_BYTES);
        use_many();
        assert_eq!(pool.unused(), KEPT_BYTES);
    }
}
