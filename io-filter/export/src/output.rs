//! What a connection still has to send: headers that were encoded, and data that was handed over.
//!
//! Headers gather in one buffer that is used again and again; data stays in its own `Bytes`. Both
//! leave together in vectored writes, in the order they were queued.
//!
//! Invariant: each queued message is released, with its cost, when its last byte is written.

use std::{
    collections::VecDeque,
    io::{self, IoSlice},
    pin::Pin,
    task::{Context, Poll},
};

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::AsyncWrite;

/// Slices of one vectored write.
const SLICES: usize = 64;

/// A queue of messages to send.
#[derive(Debug, Default)]
pub(crate) struct Output {
    /// The bytes of every [`Piece::Head`], one after the other.
    heads: BytesMut,
    pieces: VecDeque<Piece>,
    /// Where in the stream each message ends, and its cost.
    ends: VecDeque<(u64, u64)>,
    queued: u64,
    written: u64,
}

#[derive(Debug)]
enum Piece {
    Head(usize),
    Data(Bytes),
}

/// What left the queue: how many messages, and their costs together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Released {
    pub(crate) messages: usize,
    pub(crate) cost: u64,
}

impl Output {
    /// Queues a message: what `encode` appends, then `data`.
    pub(crate) fn push(&mut self, cost: u64, data: Bytes, encode: impl FnOnce(&mut BytesMut)) {
        self.push_part(data, encode);
        self.ends.push_back((self.queued, cost));
    }

    /// Queues a part of a message; the last of it is queued with [`push`](Self::push).
    pub(crate) fn push_part(&mut self, data: Bytes, encode: impl FnOnce(&mut BytesMut)) {
        let before = self.heads.len();
        encode(&mut self.heads);
        let head = self.heads.len() - before;
        self.queued += (head + data.len()) as u64;
        match self.pieces.back_mut() {
            Some(Piece::Head(length)) => *length += head,
            Some(Piece::Data(_)) | None => self.pieces.push_back(Piece::Head(head)),
        }
        if !data.is_empty() {
            self.pieces.push_back(Piece::Data(data));
        }
    }

    /// Whether everything was written.
    pub(crate) fn is_empty(&self) -> bool {
        self.queued == self.written
    }

    /// How many bytes were ever written.
    pub(crate) fn written(&self) -> u64 {
        self.written
    }

    /// Writes what the stream takes. Ready when nothing is left.
    pub(crate) fn poll_write<S: AsyncWrite>(
        &mut self,
        cx: &mut Context<'_>,
        mut stream: Pin<&mut S>,
    ) -> (Poll<io::Result<()>>, Released) {
        let before = self.written;
        let result = loop {
            if self.is_empty() {
                break Poll::Ready(Ok(()));
            }
            let mut slices = [IoSlice::new(&[]); SLICES];
            let count = self.slices(&mut slices);
            match stream.as_mut().poll_write_vectored(cx, &slices[..count]) {
                Poll::Ready(Ok(0)) => break Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                Poll::Ready(Ok(written)) => self.advance(written),
                Poll::Ready(Err(error)) => break Poll::Ready(Err(error)),
                Poll::Pending => break Poll::Pending,
            }
        };
        let released = if self.written > before { self.release() } else { Released::default() };
        (result, released)
    }

    fn slices<'bytes>(&'bytes self, slices: &mut [IoSlice<'bytes>; SLICES]) -> usize {
        let mut heads = &self.heads[..];
        let mut count = 0;
        for (slice, piece) in slices.iter_mut().zip(&self.pieces) {
            *slice = match piece {
                Piece::Head(length) => {
                    let (head, rest) = heads.split_at(*length);
                    heads = rest;
                    IoSlice::new(head)
                }
                Piece::Data(data) => IoSlice::new(data),
            };
            count += 1;
        }
        count
    }

    fn advance(&mut self, written: usize) {
        self.written += written as u64;
        let mut left = written;
        while left > 0 {
            let piece = self.pieces.front_mut().expect("no more is written than was queued");
            let taken = match piece {
                Piece::Head(length) => {
                    let taken = left.min(*length);
                    *length -= taken;
                    self.heads.advance(taken);
                    (taken, *length == 0)
                }
                Piece::Data(data) => {
                    let taken = left.min(data.len());
                    data.advance(taken);
                    (taken, data.is_empty())
                }
            };
            left -= taken.0;
            if taken.1 {
                self.pieces.pop_front();
            }
        }
        if self.heads.is_empty() {
            // Back to the beginning of the buffer, so that it never grows by being used.
            self.heads.clear();
        }
    }

    fn release(&mut self) -> Released {
        let mut released = Released::default();
        while let Some((_, cost)) = self.ends.pop_front_if(|(end, _)| *end <= self.written) {
            released.messages += 1;
            released.cost += cost;
        }
        released
    }
}

#[cfg(test)]
mod tests {
    use std::task::Waker;

    use bytes::BufMut;

    use super::*;

    /// Takes a few bytes per write.
    struct Narrow {
        width: usize,
        taken: Vec<u8>,
    }

    impl AsyncWrite for Narrow {
        fn poll_write(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            bytes: &[u8],
        ) -> Poll<io::Result<usize>> {
            let count = bytes.len().min(self.width);
            self.taken.extend_from_slice(&bytes[..count]);
            Poll::Ready(Ok(count))
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    #[test]
    fn every_byte_leaves_once_and_in_order_however_narrow_the_stream() {
        for width in [1, 2, 3, 7, 100] {
            let mut output = Output::default();
            let mut expected = Vec::new();
            for message in 0..50_u8 {
                let data = vec![message; usize::from(message % 4) * 5];
                expected.extend_from_slice(&[0xff, message]);
                expected.extend_from_slice(&data);
                output.push(u64::from(message), data.into(), |out| out.put_slice(&[0xff, message]));
            }
            let mut stream = Narrow { width, taken: Vec::new() };
            let mut cx = Context::from_waker(Waker::noop());
            let (result, released) = output.poll_write(&mut cx, Pin::new(&mut stream));
            assert!(matches!(result, Poll::Ready(Ok(()))));
            assert_eq!(released, Released { messages: 50, cost: (0..50).sum() });
            assert_eq!(stream.taken, expected);
            assert!(output.is_empty());
        }
    }
}
