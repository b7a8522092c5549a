//! A disk behind an NBD server that goes away and comes back, over real sockets.

use std::path::{Path, PathBuf};

use backtide_export::{
    Command, Export, ExportInfo, ExportSummary, Exports, Limits, Listener, NbdAddress, NbdError, Reply,
    Server,
};
use tokio::task::LocalSet;

use super::{replay::REPLAY_ANSWER_MAX, *};
use crate::disk::medium::Medium;

const SIZE: ByteCount = ByteCount(1 << 20);

/// Of a disk that a guest can trim much of.
const LARGE: ByteCount = ByteCount(1 << 40);

/// Longer than anything takes here that comes to its end.
const AT_MOST: Duration = Duration::from_secs(60);

/// A server of zeroes that answers no write while it stands still.
#[derive(Default)]
struct Behind {
    stands_still: Cell<bool>,
    /// What it owes.
    unanswered: RefCell<Vec<Reply>>,
    /// A write has come.
    asked: Notify,
    /// It refuses writes.
    refuses: Cell<bool>,
    /// It is about to end, which it answers writes with.
    is_ending: Cell<bool>,
    /// It refuses the next flush.
    refuses_a_flush: Cell<bool>,
    /// It takes no writes at all, and says so.
    read_only: Cell<bool>,
    writes: Cell<usize>,
    /// Every change that came: where, and whether it was to be stable at once.
    changes: RefCell<Vec<(ByteRange, bool)>>,
    is_large: Cell<bool>,
    /// Requests for block status.
    looks: Cell<usize>,
    flushes: Cell<usize>,
}

impl Behind {
    /// From now on it answers, also what it owes.
    fn goes_on(&self) {
        self.stands_still.set(false);
        self.unanswered.take().into_iter().for_each(Reply::done);
    }
}

impl Export for Behind {
    fn info(&self) -> ExportInfo {
        let size = if self.is_large.get() { LARGE } else { SIZE };
        ExportInfo { read_only: self.read_only.get(), ..ExportInfo::new("behind", size) }
    }

    fn submit(&self, command: Command, reply: Reply) {
        if let Command::Write { fua, .. } | Command::WriteZeroes { fua, .. } = &command {
            self.changes.borrow_mut().push((command.range(), *fua));
        }
        match command {
            Command::Read { .. } => {
                let bytes = vec![0; usize::try_from(command.range().count().0).unwrap()];
                reply.data(bytes.into());
            }
            Command::Write { .. } | Command::WriteZeroes { .. } if self.stands_still.get() => {
                self.unanswered.borrow_mut().push(reply);
                self.asked.notify_one();
            }
            Command::Write { .. } if self.is_ending.get() => {
                self.asked.notify_one();
                reply.fail(NbdError::Shutdown);
            }
            Command::Write { .. } if self.refuses.get() => reply.fail(NbdError::Io),
            Command::Write { .. } => {
                self.writes.set(self.writes.get() + 1);
                reply.done();
                self.asked.notify_one();
            }
            Command::Flush => {
                self.flushes.set(self.flushes.get() + 1);
                match self.refuses_a_flush.take() {
                    true => reply.fail(NbdError::NoSpace),
                    false => reply.done(),
                }
            }
            Command::BlockStatus { .. } => {
                self.looks.set(self.looks.get() + 1);
                // A block at a time, of every other kind.
                let start = command.range().start().0 / 4096;
                let kind = if start.is_multiple_of(2) { Extent::data } else { Extent::hole };
                reply.extents(&[kind(ByteCount(4096))]);
            }
            Command::WriteZeroes { .. } | Command::Trim { .. } | Command::Cache { .. } => {
                reply.done();
            }
        }
    }
}

struct Only(Rc<Behind>);

impl Exports for Only {
    fn find(&self, _name: &str) -> Option<Rc<dyn Export>> {
        Some(Rc::clone(&self.0) as Rc<dyn Export>)
    }

    fn list(&self) -> Vec<ExportSummary> {
        Vec::new()
    }
}

async fn serve(behind: &Rc<Behind>, socket: &Path) -> Server {
    let listener = Listener::bind(&NbdAddress::Unix(socket.to_owned())).await.unwrap();
    listener.serve(Rc::new(Only(Rc::clone(behind))), Limits::default())
}

fn write() -> LocalOp {
    let range = ByteRange::new(ByteOffset(8192), ByteCount(4096)).unwrap();
    LocalOp::Change(Change::Write { range, data: Bytes::from(vec![7; 4096]), fua: false })
}

fn read() -> LocalOp {
    LocalOp::Read(ByteRange::new(ByteOffset(0), ByteCount(512)).unwrap())
}

fn flush() -> LocalOp {
    LocalOp::Change(Change::Flush)
}

/// A disk, and what is behind it.
struct Stage {
    behind: Rc<Behind>,
    socket: PathBuf,
    server: Server,
    disk: NbdDisk,
}

/// Tells a story of a disk that has written once, which its server may lose.
fn on_stage(story: impl AsyncFnOnce(Stage)) {
    on_stage_of(SIZE, story);
}

fn on_stage_of(size: ByteCount, story: impl AsyncFnOnce(Stage)) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let directory = tempfile::tempdir().unwrap();
    let story = async {
        let (behind, socket) = (Rc::new(Behind::default()), directory.path().join("s"));
        behind.is_large.set(size == LARGE);
        let server = serve(&behind, &socket).await;
        let uri: NbdUri = format!("nbd+unix:///?socket={}", socket.display()).parse().unwrap();
        let disk = NbdDisk::connect(uri, size).await.unwrap();
        disk.run(write()).await.unwrap();
        behind.asked.notified().await;
        story(Stage { behind, socket, server, disk }).await;
    };
    let ended = async { tokio::time::timeout(AT_MOST, story).await };
    LocalSet::new().block_on(&runtime, ended).expect("the disk behind is never back");
}

/// Waits until the disk behind is back.
async fn is_back(disk: &NbdDisk) {
    while disk.trouble().is_some() {
        disk.shared.back.notified().await;
    }
}

/// A second handle for a task.
fn same(disk: &NbdDisk) -> NbdDisk {
    NbdDisk { shared: Rc::clone(&disk.shared) }
}

#[test]
fn a_server_that_comes_back_and_answers_nothing_is_left_for_another_connection() {
    on_stage(async |Stage { behind, socket, server, disk }| {
        server.shutdown(Duration::ZERO).await;
        behind.stands_still.set(true);
        let _server = serve(&behind, &socket).await;
        let other = same(&disk);
        let reading = tokio::task::spawn_local(async move { other.run(read()).await.is_ok() });
        behind.asked.notified().await;
        behind.stands_still.set(false);
        // It has the write, and says nothing: the time of that goes by.
        tokio::time::pause();
        tokio::time::advance(REPLAY_ANSWER_MAX.max(OUTAGE_MAX)).await;
        tokio::time::resume();
        assert!(!reading.await.unwrap(), "no request waits for longer than an outage may last");
        behind.asked.notified().await;
        is_back(&disk).await;
        disk.run(read()).await.unwrap();
    });
}

#[test]
fn what_was_answered_before_a_change_that_failed_is_not_made_again_over_it() {
    on_stage(async |Stage { behind, socket, server, disk }| {
        assert_ne!(disk.shared.unflushed.borrow().changes(), []);
        behind.refuses.set(true);
        disk.run(write()).await.unwrap_err();
        assert_eq!(disk.shared.unflushed.borrow().changes(), [], "whoever reads it now reads what stays");
        assert!(behind.flushes.get() > 0);
        behind.refuses.set(false);
        server.shutdown(Duration::ZERO).await;
        let _server = serve(&behind, &socket).await;
        disk.run(read()).await.unwrap();
        assert_eq!(behind.writes.get(), 1);
    });
}

/// The server ends and another takes its place, for which `waits` does. While that one is given what the first may have
/// lost, the time of another change is over. What came of the waiting.
async fn fails_meanwhile<T: 'static>(
    (behind, socket, server): (&Rc<Behind>, &Path, Server),
    disk: &NbdDisk,
    waits: impl AsyncFnOnce(NbdDisk) -> T + 'static,
) -> (T, Server) {
    server.shutdown(Duration::ZERO).await;
    behind.stands_still.set(true);
    let server = serve(behind, socket).await;
    let waiting = tokio::task::spawn_local(waits(same(disk)));
    behind.asked.notified().await;
    disk.shared.outage.set(Some(Instant::now()));
    disk.run(write()).await.unwrap_err();
    behind.goes_on();
    (waiting.await.unwrap(), server)
}

#[test]
fn what_is_made_again_is_stable_at_once_where_a_change_has_failed_meanwhile() {
    on_stage(async |Stage { behind, socket, server, disk }| {
        let before = behind.flushes.get();
        let waits = async |disk: NbdDisk| disk.run(read()).await.map(drop);
        let (read, _server) = fails_meanwhile((&behind, &socket, server), &disk, waits).await;
        read.unwrap();
        assert_eq!(behind.flushes.get(), before + 1);
        assert_eq!(disk.shared.unflushed.borrow().changes(), [], "it is never made again");
        disk.run(flush()).await.unwrap();
    });
}

#[test]
fn and_where_it_failed_before_the_server_was_back() {
    on_stage(async |Stage { behind, socket, server, disk }| {
        let before = behind.flushes.get();
        server.shutdown(Duration::ZERO).await;
        let other = same(&disk);
        let waiting = tokio::task::spawn_local(async move { other.run(read()).await.map(drop) });
        while disk.shared.outage.get().is_none() {
            tokio::task::yield_now().await;
        }
        disk.shared.outage.set(Some(Instant::now()));
        disk.run(write()).await.unwrap_err();
        let _server = serve(&behind, &socket).await;
        while disk.shared.outage.get().is_some() {
            disk.shared.back.notified().await;
        }
        assert_eq!(behind.flushes.get(), before + 1);
        drop(waiting.await);
    });
}

#[test]
fn a_flush_that_is_refused_then_is_told_and_nothing_counts_as_stable_for_it() {
    on_stage(async |Stage { behind, socket, server, disk }| {
        behind.refuses_a_flush.set(true);
        let range = ByteRange::new(ByteOffset(65_536), ByteCount(4096)).unwrap();
        let change = Change::Write { range, data: Bytes::from(vec![9; 4096]), fua: false };
        let waits = async move |disk: NbdDisk| disk.change_stably([change]).await;
        let (stable, _server) = fails_meanwhile((&behind, &socket, server), &disk, waits).await;
        stable.unwrap_err();
        assert!(!behind.refuses_a_flush.get());
        disk.run(flush()).await.unwrap_err();
        disk.run(flush()).await.unwrap();
    });
}

#[test]
fn a_server_that_says_that_it_ends_is_left_and_what_it_did_not_take_is_given_to_the_next() {
    on_stage(async |Stage { behind, socket, server, disk }| {
        behind.is_ending.set(true);
        let other = same(&disk);
        let writing = tokio::task::spawn_local(async move { other.run(write()).await.map(drop) });
        behind.asked.notified().await;
        server.shutdown(AT_MOST).await;
        behind.is_ending.set(false);
        let _server = serve(&behind, &socket).await;
        writing.await.unwrap().expect("the guest hears nothing of it");
        assert!(behind.writes.get() > 1);
    });
}

#[test]
fn where_it_has_data_is_asked_for_once_for_each_answer() {
    on_stage(async |Stage { behind, disk, .. }| {
        let whole = ByteRange::between(ByteOffset(0), ByteOffset(SIZE.0));
        let medium = Medium::Nbd(same(&disk));
        for one in [true, false] {
            let before = behind.looks.get();
            let found = medium.extents(whole, one).await.unwrap();
            assert_eq!((found, behind.looks.get() - before), (vec![Extent::data(ByteCount(4096))], 1));
        }
        assert_eq!(medium.allocated().await.unwrap().count().0, SIZE.0 / 4096 / 2);
    });
}

#[test]
fn a_change_that_the_next_server_refuses_keeps_nobody_waiting_and_is_told_once() {
    on_stage(async |Stage { behind, socket, server, disk }| {
        server.shutdown(Duration::ZERO).await;
        behind.refuses.set(true);
        let _server = serve(&behind, &socket).await;
        disk.run(read()).await.expect("what is there can be read");
        assert_eq!(disk.shared.unflushed.borrow().changes(), []);
        let LocalOp::Change(refused) = write() else { unreachable!() };
        assert_eq!(disk.forgotten().await, DirtyBitmap::of(BlockRange::touched_by(refused.range().unwrap())));
        assert_eq!(
            disk.run(flush()).await.unwrap_err(),
            IoFailure { errno: EIO },
            "somebody was told it is there"
        );
        disk.run(flush()).await.unwrap();
    });
}

#[test]
fn a_change_that_waits_for_its_answer_hears_itself_what_the_next_server_says_of_it() {
    on_stage(async |Stage { behind, socket, server, disk }| {
        disk.run(flush()).await.unwrap();
        behind.stands_still.set(true);
        let other = same(&disk);
        let writing = tokio::task::spawn_local(async move { other.run(write()).await.map(drop) });
        behind.asked.notified().await;
        server.shutdown(Duration::ZERO).await;
        behind.unanswered.take();
        behind.stands_still.set(false);
        behind.refuses.set(true);
        let _server = serve(&behind, &socket).await;
        writing.await.unwrap().unwrap_err();
        assert!(disk.shared.forgotten.borrow().is_empty(), "nobody was told that it is there");
        disk.run(flush()).await.unwrap();
    });
}

#[test]
fn one_that_takes_no_writes_is_not_the_disk() {
    on_stage(async |Stage { behind, socket, server, disk }| {
        server.shutdown(Duration::ZERO).await;
        behind.read_only.set(true);
        let server = serve(&behind, &socket).await;
        let again = NbdDisk::connect(disk.shared.uri.clone(), SIZE).await.err();
        assert!(matches!(again, Some(BehindError::ReadOnly { .. })), "{again:?}");
        let other = same(&disk);
        let reading = tokio::task::spawn_local(async move { other.run(read()).await.map(drop) });
        while !disk.trouble().is_some_and(|trouble| trouble.contains("read-only")) {
            tokio::task::yield_now().await;
        }
        server.shutdown(Duration::ZERO).await;
        behind.read_only.set(false);
        let _server = serve(&behind, &socket).await;
        reading.await.unwrap().unwrap();
        assert_eq!(behind.writes.get(), 2, "nothing was forgotten meanwhile");
    });
}

mod making_again;
