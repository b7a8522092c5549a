//! The demo's guest: an NBD client that writes, and remembers what it wrote.
//!
//! Invariant: the model holds what the disk must hold after the last acknowledged write.

use backtide_control::{ApiError, ErrorCode};
use backtide_export::{Client, ClientError, NbdUri, ZeroOptions};
use backtide_units::{ByteCount, ByteOffset};
use blake3::Hash;
use bytes::Bytes;

use crate::ending::{Failure, failed};

/// Where the writes go is a fixed sequence: every demo tells the same story.
const SEED: u64 = 0x2545_f491_4f6c_dd1d;

const SECTOR: u64 = 512;

/// The longest write.
const WRITE_BYTES_MAX: u64 = 64 << 10;

/// How much it writes at most between two flushes. A flush waits for the receiver (see the story's
/// ack policy), so this keeps the small retained window from overflowing while the receiver is
/// there, however slow the machine is.
const FLUSH_EVERY: u64 = 256 << 10;

/// Every so many writes one is a zeroing.
const ZERO_EVERY: u64 = 16;

/// A guest at work.
pub(crate) struct Guest {
    client: Client,
    model: Vec<u8>,
    random: u64,
    writes: u64,
}

impl Guest {
    /// Connects to an empty disk.
    pub(crate) async fn boot(uri: &str) -> Result<Self, Failure> {
        let uri: NbdUri = uri.parse().map_err(|error| ApiError::from_error(ErrorCode::Failed, &error))?;
        let client = Client::connect(&uri).await.map_err(|error| io_error(&error))?;
        let size =
            client.size().as_usize().ok_or_else(|| failed("the scratch disk does not fit into memory"))?;
        Ok(Self { client, model: vec![0; size], random: SEED, writes: 0 })
    }

    /// Writes `bytes` in pieces of odd lengths at random places, one after the other, and
    /// flushes them as it goes.
    /// Gives the number of writes.
    pub(crate) async fn write(&mut self, bytes: ByteCount) -> Result<u64, Failure> {
        let before = self.writes;
        let (mut left, mut unflushed) = (bytes.0, 0);
        while left > 0 {
            let length = (SECTOR + self.next() % (WRITE_BYTES_MAX - SECTOR)) / SECTOR * SECTOR;
            let places = (self.model.len() as u64 - length) / SECTOR + 1;
            let at = self.next() % places * SECTOR;
            self.write_one(at, length).await?;
            left = left.saturating_sub(length);
            unflushed += length;
            if unflushed + WRITE_BYTES_MAX > FLUSH_EVERY {
                self.flush().await?;
                unflushed = 0;
            }
        }
        self.flush().await?;
        Ok(self.writes - before)
    }

    /// The content the disk must have now.
    pub(crate) fn hash(&self) -> Hash {
        blake3::hash(&self.model)
    }

    async fn flush(&self) -> Result<(), Failure> {
        self.client.flush().await.map_err(|error| io_error(&error))
    }

    async fn write_one(&mut self, at: u64, length: u64) -> Result<(), Failure> {
        self.writes += 1;
        let place = at as usize..(at + length) as usize;
        if self.writes.is_multiple_of(ZERO_EVERY) {
            self.model[place].fill(0);
            return self
                .client
                .write_zeroes(ByteOffset(at), ByteCount(length), ZeroOptions::default())
                .await
                .map_err(|error| io_error(&error));
        }
        for word in self.model[place.clone()].chunks_mut(8) {
            self.random = xorshift(self.random);
            word.copy_from_slice(&self.random.to_le_bytes()[..word.len()]);
        }
        let data = Bytes::copy_from_slice(&self.model[place]);
        self.client.write(ByteOffset(at), data, false).await.map_err(|error| io_error(&error))
    }

    fn next(&mut self) -> u64 {
        self.random = xorshift(self.random);
        self.random
    }
}

fn xorshift(mut state: u64) -> u64 {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    state
}

fn io_error(error: &ClientError) -> Failure {
    let cause = ApiError::from_error(ErrorCode::Failed, error);
    ApiError { message: format!("the demo's guest got an I/O error: {}", cause.message), ..cause }.into()
}
