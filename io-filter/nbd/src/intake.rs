//! Where a connection's bytes arrive: one read brings many requests, and payloads are handed out
//! without a copy.
//!
//! The driver reads into [`Intake::space`]; the machines take from the front. Short payloads are
//! slices of the read buffer. A payload of [`DEDICATED`] bytes or more that is not wholly there
//! gets a buffer of its own, and the driver reads straight into it. What has been read of it before is
//! copied; where one long payload was, another is likely, and of that little more than the header is read
//! before. It begins at a multiple of
//! [`ALIGNMENT`], so that direct I/O takes it as it lies, and its memory is used again when nothing
//! refers to it: fresh memory of that size costs more than filling it.
//!
//! Invariants: the read buffer never holds more than its capacity, so a peer can make this
//! structure grow only by one announced payload, which the caller has checked against its limit, and
//! by [`KEPT_BYTES`].

use std::collections::VecDeque;

use bytes::{Buf, BufMut, Bytes, BytesMut, buf::Limit};

/// Capacity of the read buffer in bytes.
const CAPACITY: usize = 256 << 10;
/// A read is offered at least this much room; also the longest message a machine may wait for in
/// the read buffer, headers apart.
pub(crate) const MIN_ROOM: usize = 64 << 10;
/// Payloads from this length on get a buffer of their own.
const DEDICATED: usize = 64 << 10;
/// As much is read after a long payload, until it is known what follows.
const LEAD: usize = 512;
/// How many used-up read buffers are kept to be used again once nothing refers to them.
const SPENT_MAX: usize = 4;
/// What a payload's own buffer begins at a multiple of, in bytes: a page.
const ALIGNMENT: usize = 4096;
/// How much memory of payloads is kept to be used again.
const KEPT_BYTES: usize = 8 << 20;

/// A connection's input: bytes that were read and not yet understood.
#[derive(Debug, Default)]
pub struct Intake {
    buffer: BytesMut,
    /// Empty handles on earlier read buffers, oldest first; slices of them may still be out.
    spent: VecDeque<BytesMut>,
    /// Empty handles on buffers of earlier payloads and their capacities, oldest first.
    kept: VecDeque<(BytesMut, usize)>,
    kept_bytes: usize,
    payload: Option<Payload>,
    /// A long payload was taken last, and nothing since.
    after_long: bool,
}

#[derive(Debug)]
struct Payload {
    wanted: usize,
    filled: BytesMut,
    /// Of the whole buffer.
    capacity: usize,
}

impl Intake {
    /// An empty intake; it allocates when first read into.
    pub fn new() -> Self {
        Self::default()
    }

    /// The place to read into; never without room.
    ///
    /// # Panics
    /// When called again and again without asking a machine to take what is there: what no
    /// machine takes is never longer than one message.
    pub fn space(&mut self) -> Limit<&mut BytesMut> {
        if self.payload.is_none() && self.buffer.capacity() - self.buffer.len() < MIN_ROOM {
            self.renew();
        }
        if let Some(payload) = &mut self.payload {
            let missing = payload.wanted - payload.filled.len();
            assert!(missing > 0, "a full payload was not taken before the next read");
            return (&mut payload.filled).limit(missing);
        }
        let room = self.buffer.capacity() - self.buffer.len();
        assert!(room > 0, "more is read than the machines were asked to take");
        let lead = self.after_long && self.buffer.is_empty();
        (&mut self.buffer).limit(if lead { room.min(LEAD) } else { room })
    }

    /// The bytes that are there, outside a payload being collected.
    pub fn buffered(&self) -> &[u8] {
        &self.buffer
    }

    /// Drops the first `count` bytes.
    ///
    /// # Panics
    /// When there are fewer.
    pub fn consume(&mut self, count: usize) {
        self.after_long = false;
        self.buffer.advance(count);
    }

    /// Drops up to `count` bytes and says how many.
    pub(crate) fn discard(&mut self, count: usize) -> usize {
        let there = count.min(self.buffer.len());
        self.buffer.advance(there);
        there
    }

    /// The next `wanted` bytes, once they are all there. A caller that got `None` asks again with
    /// the same `wanted` until it gets them, and takes nothing else in between.
    pub(crate) fn take(&mut self, wanted: usize) -> Option<Bytes> {
        if let Some(payload) = &self.payload {
            assert!(payload.wanted == wanted, "a payload changed its length half way");
            if payload.filled.len() < wanted {
                return None;
            }
            let Payload { mut filled, capacity, .. } = self.payload.take()?;
            let data = filled.split().freeze();
            self.keep(filled, capacity);
            self.after_long = true;
            return Some(data);
        }
        if self.buffer.len() >= wanted {
            return Some(self.buffer.split_to(wanted).freeze());
        }
        if wanted >= DEDICATED {
            let (mut filled, capacity) = self.dedicated(wanted);
            filled.extend_from_slice(&self.buffer);
            self.buffer.clear();
            self.payload = Some(Payload { wanted, filled, capacity });
        }
        None
    }

    /// An empty, aligned buffer with room for `wanted` bytes, and the capacity of all of it.
    fn dedicated(&mut self, wanted: usize) -> (BytesMut, usize) {
        let needed = wanted + ALIGNMENT;
        let reclaimed = self.kept.front_mut().is_some_and(|(oldest, _)| oldest.try_reclaim(needed));
        let (mut buffer, capacity) = match reclaimed.then(|| self.kept.pop_front()).flatten() {
            Some((buffer, capacity)) => {
                self.kept_bytes -= capacity;
                (buffer, capacity)
            }
            None => (BytesMut::with_capacity(needed), needed),
        };
        let beyond = buffer.as_ptr().addr() % ALIGNMENT;
        if beyond > 0 {
            buffer.resize(ALIGNMENT - beyond, 0);
            buffer.advance(ALIGNMENT - beyond);
        }
        (buffer, capacity)
    }

    /// Keeps what is left of a payload's buffer; one that is of no use now makes room for it.
    fn keep(&mut self, rest: BytesMut, capacity: usize) {
        self.kept.push_back((rest, capacity));
        self.kept_bytes += capacity;
        while self.kept_bytes > KEPT_BYTES
            && let Some((_, capacity)) = self.kept.pop_front()
        {
            self.kept_bytes -= capacity;
        }
    }

    /// How many bytes of a started payload are still to come; they will be held in memory.
    pub fn payload_missing(&self) -> usize {
        self.payload.as_ref().map_or(0, |payload| payload.wanted - payload.filled.len())
    }

    /// Continues in a buffer with room, taking the unread rest along.
    fn renew(&mut self) {
        let mut next = self.reclaim().unwrap_or_else(|| BytesMut::with_capacity(CAPACITY));
        next.extend_from_slice(&self.buffer);
        self.buffer.clear();
        let spent = std::mem::replace(&mut self.buffer, next);
        if spent.capacity() > 0 || !self.spent.is_empty() {
            self.spent.push_back(spent);
        }
        if self.spent.len() > SPENT_MAX {
            self.spent.pop_front();
        }
    }

    /// The oldest used-up buffer, if nothing refers to it any more.
    fn reclaim(&mut self) -> Option<BytesMut> {
        let oldest = self.spent.front_mut()?;
        if oldest.try_reclaim(CAPACITY) { self.spent.pop_front() } else { None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn feed(intake: &mut Intake, bytes: &[u8]) {
        let mut rest = bytes;
        while !rest.is_empty() {
            let mut space = intake.space();
            let count = space.remaining_mut().min(rest.len());
            space.put_slice(&rest[..count]);
            rest = &rest[count..];
        }
    }

    #[test]
    fn a_short_payload_is_a_slice_of_the_read_buffer() {
        let mut intake = Intake::new();
        feed(&mut intake, &[7; 4096]);
        let start = intake.buffered().as_ptr();
        let payload = intake.take(4000).expect("is there");
        assert_eq!(payload.as_ptr(), start);
        assert_eq!(intake.buffered().len(), 96);
    }

    #[test]
    fn a_long_payload_is_read_into_a_buffer_of_its_size() {
        let mut intake = Intake::new();
        feed(&mut intake, &[1; 100]);
        assert!(intake.take(1 << 20).is_none());
        assert_eq!(intake.payload_missing(), (1 << 20) - 100);
        assert_eq!(intake.space().remaining_mut(), (1 << 20) - 100);
        feed(&mut intake, &[2; (1 << 20) - 100]);
        let payload = intake.take(1 << 20).expect("is complete");
        assert_eq!((payload[99], payload[100], payload.len()), (1, 2, 1 << 20));
        assert_eq!(intake.payload_missing(), 0);
    }

    #[test]
    fn little_of_a_long_payload_is_read_before_its_own_buffer() {
        let mut intake = Intake::new();
        for _ in 0..3 {
            feed(&mut intake, &[1; 28]);
            intake.consume(28);
            assert!(intake.take(1 << 20).is_none());
            assert_eq!(intake.payload_missing(), 1 << 20);
            feed(&mut intake, &[2; 1 << 20]);
            assert!(intake.take(1 << 20).is_some_and(|payload| payload.len() == 1 << 20));
            assert_eq!(intake.space().remaining_mut(), LEAD);
        }
        feed(&mut intake, &[1; 28]);
        intake.consume(28);
        assert!(intake.space().remaining_mut() >= MIN_ROOM, "what follows is no long payload");
    }

    #[test]
    fn read_buffers_are_used_again_when_their_slices_are_gone() {
        let mut intake = Intake::new();
        let mut starts = std::collections::BTreeSet::new();
        for _ in 0..1000 {
            feed(&mut intake, &[3; 32 << 10]);
            let payload = intake.take(32 << 10).expect("is there");
            starts.insert(payload.as_ptr() as usize & !(CAPACITY - 1));
        }
        assert!(starts.len() < 16, "{} different buffers", starts.len());
    }

    #[test]
    fn long_payloads_are_aligned_and_their_memory_is_used_again() {
        let mut intake = Intake::new();
        let mut places = std::collections::BTreeSet::new();
        for round in 0..100_u8 {
            feed(&mut intake, &[round; 100]);
            assert!(intake.take(1 << 20).is_none());
            feed(&mut intake, &[round; (1 << 20) - 100]);
            let payload = intake.take(1 << 20).expect("is complete");
            assert_eq!(payload.as_ptr().addr() % ALIGNMENT, 0);
            assert!(payload.len() == 1 << 20 && payload.iter().all(|&byte| byte == round));
            places.insert(payload.as_ptr().addr());
        }
        assert_eq!(places.len(), 1, "one buffer is enough for one payload at a time");
    }

    #[test]
    fn payloads_that_are_kept_long_are_not_written_over() {
        let mut intake = Intake::new();
        let mut payloads = Vec::new();
        for round in 0..20_u8 {
            feed(&mut intake, &[round; 1]);
            assert!(intake.take(1 << 20).is_none());
            feed(&mut intake, &[round; (1 << 20) - 1]);
            payloads.push(intake.take(1 << 20).expect("is complete"));
            assert!(intake.kept_bytes <= KEPT_BYTES);
        }
        for (round, payload) in payloads.iter().enumerate() {
            assert!(payload.iter().all(|&byte| usize::from(byte) == round));
        }
    }

    #[test]
    fn slices_survive_what_is_read_later() {
        let mut intake = Intake::new();
        let mut kept = Vec::new();
        for round in 0..100_u8 {
            feed(&mut intake, &[round; 10_000]);
            kept.push(intake.take(10_000).expect("is there"));
        }
        for (round, payload) in kept.iter().enumerate() {
            assert!(payload.iter().all(|&byte| usize::from(byte) == round));
        }
    }
}
