//! A spill in memory, and messages to put into it.

#![allow(dead_code, reason = "each test uses a part of it")]

use std::sync::Arc;

use backtide_protocol::{Data, Message, Record, RecordBody};
use backtide_spill::{FileHeader, Ring, RingLimits, SpillError, SpillFiles, frame_bytes};
use backtide_storage::MemoryStorage;
use backtide_units::{
    BlockIndex, ByteCount, ByteOffset, ByteRange, CaptureTime, DiskId, Epoch, HistoryId, Lsn,
};
use bytes::Bytes;
use uuid::Uuid;

pub(crate) const DISK: DiskId = DiskId(Uuid::from_bytes([1; 16]));

pub(crate) fn header() -> FileHeader {
    FileHeader {
        disk: DISK,
        history: HistoryId(Uuid::from_bytes([2; 16])),
        epoch: Epoch(3),
        number: 0,
        first: 0,
        base: Lsn(100),
    }
}

pub(crate) fn limits(bytes: u64) -> RingLimits {
    RingLimits::new(ByteCount(bytes), ByteCount(1 << 16), ByteCount(1 << 20), BlockIndex(1 << 20))
}

pub(crate) fn write(lsn: u64, previous: u64, length: usize) -> Message {
    let range = ByteRange::new(ByteOffset(lsn * 4096), ByteCount(length as u64)).unwrap();
    let body = RecordBody::Write(Data::capture(Bytes::from(vec![lsn as u8; length])));
    Message::Record(Record {
        lsn: Lsn(lsn),
        previous: Lsn(previous),
        time: CaptureTime(lsn * 10),
        range,
        body,
    })
}

/// A spill as the filter uses one, without a filter.
pub(crate) struct Spill {
    pub(crate) storage: MemoryStorage,
    pub(crate) files: SpillFiles,
    pub(crate) ring: Ring,
    /// Where the log stands.
    pub(crate) end: u64,
}

impl Spill {
    pub(crate) fn new(bytes: u64) -> Self {
        let storage = MemoryStorage::new();
        let files = SpillFiles::new(Arc::new(storage.clone()), DISK, ByteCount(bytes));
        Self { storage, files, ring: Ring::new(limits(bytes)), end: 100 }
    }

    /// Appends a batch; false when there is no room.
    pub(crate) fn append(&mut self, messages: &[Message]) -> Result<bool, SpillError> {
        let bytes = ByteCount(messages.iter().map(|message| frame_bytes(message).0).sum());
        let header = FileHeader { base: Lsn(self.end), ..header() };
        let Some(slot) = self.ring.slot(bytes, header) else { return Ok(false) };
        self.files.append(&slot, messages)?;
        self.ring.appended(&slot, messages);
        if let Some(Message::Record(record)) = messages.iter().rfind(|m| matches!(m, Message::Record(_))) {
            self.end = record.lsn.0;
        }
        Ok(true)
    }

    /// Appends a record of its own.
    pub(crate) fn write(&mut self, length: usize) -> bool {
        let message = write(self.end + 1, self.end, length);
        self.append(&[message]).unwrap()
    }

    /// Everything in the ring, read back.
    pub(crate) fn read_all(&self, ring: &Ring) -> Vec<Message> {
        let mut messages = Vec::new();
        let mut frame = ring.first();
        while let Some(place) = ring.place_of(frame) {
            let back = self.files.read(&place);
            assert!(back.failure.is_none(), "{:?}", back.failure);
            messages.extend(back.messages);
            frame = place.first + place.frames;
        }
        messages
    }
}
