//! Zeroes are written ahead while syncs come after little, and nothing but zeroes is ever behind the end.

use std::{
    io::{self, IoSlice},
    path::Path,
    sync::{Arc, Mutex},
};

use backtide_segment::{
    Compression, Contents, Entry, SegmentFile, SegmentHeader, SegmentId, SegmentWriter, Seq, WriterOptions,
};
use backtide_storage::{MemoryStorage, Storage, StorageFile, read_file};
use backtide_units::{
    ByteCount, ByteOffset, ByteRange, CaptureTime, DiskId, HistoryId, Lsn, PayloadChecksum,
};
use uuid::Uuid;

const STEP: u64 = 2 << 20;

/// A file, and how far each write to it reached.
struct Watched {
    file: Arc<dyn StorageFile>,
    ends: Arc<Mutex<Vec<u64>>>,
}

impl StorageFile for Watched {
    fn read_at(&self, offset: ByteOffset, buffer: &mut [u8]) -> io::Result<usize> {
        self.file.read_at(offset, buffer)
    }

    fn write_vectored_at(&self, offset: ByteOffset, buffers: &[IoSlice<'_>]) -> io::Result<()> {
        let length: usize = buffers.iter().map(|buffer| buffer.len()).sum();
        self.ends.lock().unwrap().push(offset.0 + length as u64);
        self.file.write_vectored_at(offset, buffers)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn len(&self) -> io::Result<ByteCount> {
        self.file.len()
    }

    fn set_len(&self, len: ByteCount) -> io::Result<()> {
        self.file.set_len(len)
    }

    fn allocate(&self, range: ByteRange) -> io::Result<()> {
        self.file.allocate(range)
    }
}

struct Log {
    storage: MemoryStorage,
    ends: Arc<Mutex<Vec<u64>>>,
    writer: SegmentWriter,
    contents: Contents,
    lsn: u64,
}

impl Log {
    fn new() -> Self {
        let storage = MemoryStorage::new();
        let path = Path::new("1.seg");
        let ends = Arc::<Mutex<Vec<u64>>>::default();
        let file = Watched { file: storage.create_new(path).unwrap(), ends: Arc::clone(&ends) };
        let header = SegmentHeader {
            disk: DiskId(Uuid::from_u128(1)),
            history: HistoryId(Uuid::from_u128(2)),
            id: SegmentId(1),
            first_seq: Seq(1),
            synced: Seq(0),
        };
        let options = WriterOptions {
            buffer_bytes_max: ByteCount(1 << 20),
            allocation_step: ByteCount(STEP),
            compression: Compression::None,
        };
        let file = SegmentFile::new(Arc::new(file), path.to_owned());
        let writer = SegmentWriter::create(file, header, options, ByteCount::ZERO).unwrap();
        let contents = Contents::new(header.first_seq, header.synced);
        ends.lock().unwrap().clear();
        Self { storage, ends, writer, contents, lsn: 0 }
    }

    fn append(&mut self, length: usize) {
        self.lsn += 1;
        let payload = vec![0xee; length];
        let entry = Entry::Write {
            lsn: Lsn(self.lsn),
            time: CaptureTime(self.lsn),
            range: ByteRange::new(ByteOffset(0), ByteCount(length as u64)).unwrap(),
            checksum: PayloadChecksum::of(&payload),
            payload: payload.into(),
        };
        self.writer.append(entry, Seq(0), &mut self.contents).unwrap();
    }

    /// How far writes have reached beyond the entries since the last time this was asked.
    fn ahead(&mut self) -> Vec<u64> {
        let end = self.writer.end().0;
        self.ends.lock().unwrap().drain(..).map(|reached| reached.saturating_sub(end)).collect()
    }

    fn behind_the_end(&self) -> Vec<u8> {
        let all = read_file(&self.storage, Path::new("1.seg"), ByteCount(16 << 20)).unwrap();
        all[self.writer.end().0 as usize..].to_vec()
    }
}

#[test]
fn of_many_small_syncs_few_reach_beyond_what_was_written() {
    let mut log = Log::new();
    let mut reaching = 0;
    for sync in 0..600 {
        log.append(4096);
        log.writer.write_for_sync().unwrap();
        let ahead = log.ahead();
        assert_eq!(ahead.len(), 1, "sync {sync}: zeroes come in the write of the entry");
        reaching += usize::from(ahead[0] > 0);
        assert!(
            log.writer.end().0 + ahead[0] <= log.writer.allocated().unwrap().0,
            "within what is reserved"
        );
        if ahead[0] > 0 || sync % 100 == 99 {
            assert!(log.behind_the_end().iter().all(|&byte| byte == 0), "sync {sync}");
        }
    }
    // Once for each step in which space is reserved, and those grow with the segment.
    assert!((3..=10).contains(&reaching), "{reaching} of 600 syncs");
}

#[test]
fn nothing_is_written_ahead_of_much_or_of_nothing() {
    let mut log = Log::new();
    for _ in 0..10 {
        for _ in 0..100 {
            log.append(4096);
        }
        log.writer.write_for_sync().unwrap();
        assert_eq!(log.ahead(), [0]);
    }
    log.writer.write_for_sync().unwrap();
    assert_eq!(log.ahead(), [0; 0], "all of it is written");
    log.append(4096);
    log.writer.write_waiting().unwrap();
    assert_eq!(log.ahead(), [0], "without a sync it would save nothing");
}
