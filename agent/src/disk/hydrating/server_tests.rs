//! A disk behind an NBD server that lacks blocks, when the server loses what it was not told to flush.

use std::path::PathBuf;

use backtide_export::{
    BlockSizes, Command, Export, ExportInfo, ExportSummary, Exports, Limits, Listener, NbdAddress, NbdError,
    NbdUri, Reply, Server,
};
use backtide_hydration::Header;
use backtide_storage::RealStorage;
use backtide_units::ByteCount;
use bytes::Bytes;
use tokio::task::{LocalSet, spawn_local};

use super::{
    tests::{BLOCK, BLOCKS, FILE, SIZE, at_point, boot, bytes, header, write},
    *,
};
use crate::disk::{nbd_disk::NbdDisk, source::fake::FakeSource};

/// What a server has, and what of it outlives the server.
struct Volatile {
    content: RefCell<Vec<u8>>,
    stable: RefCell<Vec<u8>>,
    /// So many flushes are refused from now on; what was written before one of them is not stable by the next.
    refuses: Cell<u64>,
    /// It shows what was written before such a flush, as a kernel does with what it could not write back.
    shows_unstable: Cell<bool>,
    /// The blocks that it shows so, until they are written again.
    unstable: RefCell<Vec<bool>>,
    /// Writes are done, and answered with an error.
    fails_writes: Cell<bool>,
}

impl Volatile {
    fn end(&self) {
        self.content.replace(self.stable.borrow().clone());
    }

    fn flush(&self, reply: Reply) {
        if let Some(left) = self.refuses.get().checked_sub(1) {
            self.refuses.set(left);
            if !self.shows_unstable.get() {
                self.end();
            }
            self.each(|content, stable, unstable| *unstable |= *content != *stable);
            return reply.fail(NbdError::Io);
        }
        self.each(|content, stable, unstable| {
            if !*unstable {
                stable.copy_from_slice(content);
            }
        });
        reply.done();
    }

    fn each(&self, act: impl Fn(&[u8], &mut [u8], &mut bool)) {
        let (content, mut stable) = (self.content.borrow(), self.stable.borrow_mut());
        let blocks = content.chunks(BLOCK as usize).zip(stable.chunks_mut(BLOCK as usize));
        for ((content, stable), unstable) in blocks.zip(self.unstable.borrow_mut().iter_mut()) {
            act(content, stable, unstable);
        }
    }
}

struct VolatileExport(Rc<Volatile>);

impl Export for VolatileExport {
    fn info(&self) -> ExportInfo {
        let sizes = BlockSizes { minimum: 512, ..BlockSizes::default() };
        ExportInfo { block_sizes: sizes, ..ExportInfo::new("", ByteCount(SIZE)) }
    }

    fn submit(&self, command: Command, reply: Reply) {
        let range = command.range();
        let place = range.start().0 as usize..range.end().0 as usize;
        if matches!(command, Command::Write { .. } | Command::Trim { .. } | Command::WriteZeroes { .. }) {
            let blocks = BlockRange::touched_by(range).indices();
            self.0.unstable.borrow_mut()[blocks.start as usize..blocks.end as usize].fill(false);
        }
        match command {
            Command::Read { .. } => reply.data(Bytes::copy_from_slice(&self.0.content.borrow()[place])),
            Command::Write { data, .. } => {
                self.0.content.borrow_mut()[place].copy_from_slice(&data);
                match self.0.fails_writes.get() {
                    true => reply.fail(NbdError::Io),
                    false => reply.done(),
                }
            }
            Command::Trim { .. } | Command::WriteZeroes { .. } => {
                self.0.content.borrow_mut()[place].fill(0);
                reply.done();
            }
            Command::Flush => self.0.flush(reply),
            Command::Cache { .. } => reply.done(),
            Command::BlockStatus { .. } => reply.extents(&[Extent::data(range.count())]),
        }
    }
}

impl Exports for VolatileExport {
    fn find(&self, _name: &str) -> Option<Rc<dyn Export>> {
        Some(Rc::new(Self(Rc::clone(&self.0))))
    }

    fn list(&self) -> Vec<ExportSummary> {
        Vec::new()
    }
}

/// A disk behind a server whose every block is missing, but the first ten.
struct Bench {
    directory: tempfile::TempDir,
    volatile: Rc<Volatile>,
    server: Option<Server>,
    source: Rc<FakeSource>,
    disk: Rc<HydratingDisk>,
}

impl Bench {
    async fn new() -> Self {
        Self::of(stale(), header()).await
    }

    /// With this behind.
    async fn of(stale: Vec<u8>, header: Header) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let content = at_point();
        let volatile = Rc::new(Volatile {
            content: RefCell::new(stale.clone()),
            stable: RefCell::new(stale),
            refuses: Cell::new(0),
            shows_unstable: Cell::new(false),
            unstable: RefCell::new(vec![false; BLOCKS as usize]),
            fails_writes: Cell::new(false),
        });
        let source = Rc::new(FakeSource::new(content));
        let missing = DirtyBitmap::of((10..BLOCKS).into());
        let storage = Arc::new(RealStorage::open(directory.path()).unwrap());
        let file = HydrationFile::create(storage, FILE.as_ref(), header, missing).unwrap();
        let server = serve(&socket(&directory), &volatile).await;
        let disk = connect(&directory, &source, file).await;
        Self { directory, volatile, server: Some(server), source, disk }
    }

    /// The server ends and takes with it what it was not told to flush; another one is there.
    async fn server_ends(&mut self) {
        let server = self.server.take().unwrap();
        server.shutdown(std::time::Duration::ZERO).await;
        self.volatile.end();
        self.server = Some(serve(&socket(&self.directory), &self.volatile).await);
    }

    /// The disk as the next agent finds it, which has only the files of the last one, in the same boot.
    async fn agent_ends(&mut self) {
        self.disk.stop().await;
        let storage = Arc::new(RealStorage::open(self.directory.path()).unwrap());
        let file = HydrationFile::open(storage, FILE.as_ref(), boot()).unwrap().unwrap();
        self.disk = connect(&self.directory, &self.source, file).await;
    }

    /// Both end at once: the new agent finds a server that has lost something.
    async fn both_end(&mut self) {
        let server = self.server.take().unwrap();
        server.shutdown(std::time::Duration::ZERO).await;
        self.volatile.end();
        self.server = Some(serve(&socket(&self.directory), &self.volatile).await);
        self.agent_ends().await;
    }

    async fn read(&self, range: std::ops::Range<u64>) -> Result<Bytes, IoFailure> {
        match self.disk.run(LocalOp::Read(bytes(range))).await? {
            LocalData::Read(data) => Ok(data),
            LocalData::Changed | LocalData::Prepared(_) => unreachable!("a read brings bytes"),
        }
    }

    async fn is(&self, expected: &[u8]) {
        for block in 0..BLOCKS {
            let at = block * BLOCK..((block + 1) * BLOCK).min(SIZE);
            let found = self.read(at.clone()).await.unwrap();
            assert!(found == expected[at.start as usize..at.end as usize], "block {block}");
        }
    }
}

/// Nothing of what is missing.
fn stale() -> Vec<u8> {
    let mut stale = vec![255; SIZE as usize];
    stale[..10 * BLOCK as usize].copy_from_slice(&at_point()[..10 * BLOCK as usize]);
    stale
}

fn socket(directory: &tempfile::TempDir) -> PathBuf {
    directory.path().join("behind.sock")
}

async fn serve(socket: &std::path::Path, volatile: &Rc<Volatile>) -> Server {
    let listener = Listener::bind(&NbdAddress::Unix(socket.to_owned())).await.unwrap();
    listener.serve(Rc::new(VolatileExport(Rc::clone(volatile))), Limits::default())
}

async fn connect(
    directory: &tempfile::TempDir,
    source: &Rc<FakeSource>,
    file: HydrationFile,
) -> Rc<HydratingDisk> {
    let uri = NbdUri { address: NbdAddress::Unix(socket(directory)), export: String::new(), tls: None };
    let medium = Medium::Nbd(NbdDisk::connect(uri, ByteCount(SIZE)).await.unwrap());
    let source = Rc::clone(source) as Rc<dyn PointSource>;
    HydratingDisk::new("vm1".parse().unwrap(), medium, None, file, source)
}

#[tokio::test]
async fn what_is_present_outlives_the_agent_and_its_server() {
    LocalSet::new()
        .run_until(async {
            let mut bench = Bench::new().await;
            let mut expected = at_point();
            // A guest overwrites missing blocks, and parts of some, and somebody reads others; nobody flushes.
            let guest = 20 * BLOCK..22 * BLOCK + 512;
            bench.disk.run(write(guest.clone(), 77)).await.unwrap();
            expected[guest.start as usize..guest.end as usize].fill(77);
            let zeroed = 40 * BLOCK..60 * BLOCK;
            let zero = Change::Zero { range: bytes(zeroed.clone()), trim: true, fua: false };
            bench.disk.run(LocalOp::Change(zero)).await.unwrap();
            expected[zeroed.start as usize..zeroed.end as usize].fill(0);
            bench.read(100 * BLOCK..101 * BLOCK).await.unwrap();
            bench.both_end().await;
            let missing = bench.disk.missing_blocks();
            assert!(!missing.touches((20..23).into()) && !missing.touches((100..101).into()));
            bench.is(&expected).await;
            Rc::clone(&bench.disk).hydrate().await;
            assert!(!bench.directory.path().join(FILE).exists() && bench.disk.status().is_none());
            // Without another flush.
            bench.volatile.end();
            assert!(*bench.volatile.content.borrow() == expected);
        })
        .await;
}

#[tokio::test]
async fn an_agent_that_ends_alone_forgets_no_write() {
    LocalSet::new()
        .run_until(async {
            let mut bench = Bench::new().await;
            let mut expected = at_point();
            for (at, byte) in [(20, 1), (20, 2), (5, 3), (300, 4)] {
                bench.disk.run(write(at * BLOCK..(at + 2) * BLOCK, byte)).await.unwrap();
                expected[(at * BLOCK) as usize..((at + 2) * BLOCK) as usize].fill(byte);
            }
            bench.agent_ends().await;
            bench.is(&expected).await;
        })
        .await;
}

#[tokio::test]
async fn a_server_that_ends_alone_is_given_again_what_it_lost() {
    LocalSet::new()
        .run_until(async {
            let mut bench = Bench::new().await;
            let hydrating = spawn_local(Rc::clone(&bench.disk).hydrate());
            let mut expected = at_point();
            for turn in 1..20_u8 {
                let at = u64::from(turn) * 29;
                bench.disk.run(write(at * BLOCK + 1024..(at + 3) * BLOCK, turn)).await.unwrap();
                expected[(at * BLOCK) as usize + 1024..((at + 3) * BLOCK) as usize].fill(turn);
                if turn % 5 == 0 {
                    bench.server_ends().await;
                }
            }
            hydrating.await.unwrap();
            bench.is(&expected).await;
            bench.disk.run(LocalOp::Change(Change::Flush)).await.unwrap();
            bench.volatile.end();
            assert!(*bench.volatile.content.borrow() == expected);
        })
        .await;
}

#[tokio::test]
async fn what_a_server_would_not_flush_is_missing_still() {
    LocalSet::new()
        .run_until(async {
            let mut bench = Bench::new().await;
            bench.volatile.refuses.set(1);
            let refused = bench.disk.run(write(20 * BLOCK..21 * BLOCK, 77)).await;
            assert!(refused.is_err(), "{refused:?}");
            assert!(bench.disk.missing_blocks().touches((20..21).into()));
            // It may have cost what was written elsewhere: the next flush of a guest says so.
            bench.disk.run(LocalOp::Change(Change::Flush)).await.unwrap_err();
            bench.disk.run(LocalOp::Change(Change::Flush)).await.unwrap();
            bench.volatile.refuses.set(1);
            bench.read(100 * BLOCK..101 * BLOCK).await.unwrap_err();
            assert!(bench.disk.missing_blocks().touches((100..101).into()));
            bench.read(100 * BLOCK..101 * BLOCK).await.unwrap();
            bench.both_end().await;
            assert!(!bench.disk.missing_blocks().touches((100..101).into()));
            bench.is(&at_point()).await;
        })
        .await;
}

#[tokio::test]
async fn what_a_failed_write_left_is_not_taken_for_what_was_compared() {
    LocalSet::new()
        .run_until(async {
            let bench = Bench::of(at_point(), Header { compare: true, ..header() }).await;
            bench.source.close();
            let disk = Rc::clone(&bench.disk);
            let place = 20 * BLOCK..21 * BLOCK;
            let reading = place.clone();
            let read = spawn_local(async move { disk.run(LocalOp::Read(bytes(reading))).await });
            // The image was looked at, and is written before the answer comes.
            bench.source.until_compared(1).await;
            bench.volatile.fails_writes.set(true);
            bench.disk.run(write(place.clone(), 77)).await.unwrap_err();
            bench.volatile.fails_writes.set(false);
            bench.source.open();
            let expected = Bytes::copy_from_slice(&at_point()[place.start as usize..place.end as usize]);
            assert_eq!(read.await.unwrap(), Ok(LocalData::Read(expected)));
        })
        .await;
}

#[tokio::test]
async fn what_can_be_read_after_a_refused_flush_is_not_taken_for_stable() {
    LocalSet::new()
        .run_until(async {
            let mut image = stale();
            let held = (320 * BLOCK) as usize..(352 * BLOCK) as usize;
            image[held.clone()].copy_from_slice(&at_point()[held.clone()]);
            let mut bench = Bench::of(image, Header { compare: true, ..header() }).await;
            bench.volatile.shows_unstable.set(true);
            // What was fetched, and what a guest wrote, which is by chance what the point has there.
            bench.volatile.refuses.set(1);
            bench.read(100 * BLOCK..101 * BLOCK).await.unwrap_err();
            bench.volatile.refuses.set(1);
            let place = 20 * BLOCK..21 * BLOCK;
            bench.disk.run(write(place.clone(), at_point()[place.start as usize])).await.unwrap_err();
            for block in [100, 20] {
                bench.read(block * BLOCK..(block + 1) * BLOCK).await.unwrap();
                assert!(!bench.disk.missing_blocks().touches((block..block + 1).into()));
            }
            // What nobody wrote is compared all the same.
            let before = bench.source.asked().len();
            bench.read(330 * BLOCK..331 * BLOCK).await.unwrap();
            assert_eq!(bench.source.asked().len(), before);
            bench.both_end().await;
            assert!(!bench.disk.missing_blocks().touches((100..101).into()));
            bench.is(&at_point()).await;
        })
        .await;
}

#[tokio::test]
async fn what_a_flush_was_refused_of_is_not_taken_for_stable_by_the_next_agent() {
    LocalSet::new()
        .run_until(async {
            let mut bench = Bench::of(stale(), Header { compare: true, ..header() }).await;
            bench.volatile.shows_unstable.set(true);
            let place = 100 * BLOCK..101 * BLOCK;
            bench.volatile.refuses.set(1);
            bench.read(place.clone()).await.unwrap_err();
            // What it shows is what the point has, and a flush of it succeeds.
            let shown = place.start as usize..place.end as usize;
            assert!(bench.volatile.content.borrow()[shown.clone()] == at_point()[shown]);
            bench.agent_ends().await;
            bench.read(place.clone()).await.unwrap();
            bench.both_end().await;
            assert!(!bench.disk.missing_blocks().touches((100..101).into()));
            bench.is(&at_point()).await;
        })
        .await;
}

#[tokio::test]
async fn what_a_server_refuses_of_answered_changes_fails_the_next_flush_of_a_guest_and_no_other() {
    LocalSet::new()
        .run_until(async {
            let mut bench = Bench::new().await;
            bench.disk.run(write(5 * BLOCK..6 * BLOCK, 77)).await.unwrap();
            bench.volatile.fails_writes.set(true);
            bench.server_ends().await;
            // It is given the change again before anything else.
            bench.read(0..BLOCK).await.unwrap();
            bench.volatile.fails_writes.set(false);
            // What lacks blocks flushes by itself, with what is stable at once and at its end.
            let stable = Change::Write {
                range: bytes(20 * BLOCK..21 * BLOCK),
                data: vec![7; BLOCK as usize].into(),
                fua: true,
            };
            bench.disk.run(LocalOp::Change(stable)).await.unwrap();
            Rc::clone(&bench.disk).hydrate().await;
            assert!(bench.disk.status().is_none());
            bench.disk.run(LocalOp::Change(Change::Flush)).await.unwrap_err();
            bench.disk.run(LocalOp::Change(Change::Flush)).await.unwrap();
        })
        .await;
}
