//! Restores over real NBD connections, from and to exports in memory.

use std::{
    cell::{Cell, RefCell},
    path::{Path, PathBuf},
    rc::Rc,
    time::Duration,
};

use backtide_control::ErrorCode;
use backtide_export::{
    Client, Command, Export, ExportInfo, ExportSummary, Exports, Extent, Limits, Listener, NbdAddress,
    NbdError, NbdUri, Reply, Server,
};
use backtide_units::{ByteCount, ByteRange, DiskId, Lsn};
use bytes::Bytes;
use tokio::task::LocalSet;

use crate::{
    arguments::Arguments,
    context::Context,
    ending::Failure,
    output::progress::Progress,
    restore::{Goal, Target, Wanted, copy, copy::Copied, take, verify},
};

mod damage;
mod leftovers;
mod locks;

const MIB: usize = 1 << 20;

/// A disk in memory. Extents are told in blocks of 4 KiB.
struct Ram {
    bytes: RefCell<Vec<u8>>,
    read_only: bool,
    /// Flips one bit of what is written here.
    spoils: Cell<Option<usize>>,
    zeroed: RefCell<Vec<ByteRange>>,
    /// From here on reads are refused.
    unreadable_from: Cell<u64>,
    /// From here on nobody can tell what holds data.
    untold_from: Cell<u64>,
    read: Cell<u64>,
    written: Cell<u64>,
}

impl Ram {
    fn of(bytes: Vec<u8>) -> Rc<Self> {
        Rc::new(Self {
            bytes: bytes.into(),
            read_only: false,
            spoils: Cell::new(None),
            zeroed: RefCell::default(),
            unreadable_from: Cell::new(u64::MAX),
            untold_from: Cell::new(u64::MAX),
            read: Cell::new(0),
            written: Cell::new(0),
        })
    }

    fn extents(&self, range: ByteRange) -> Vec<Extent> {
        let bytes = self.bytes.borrow();
        range
            .split_at_multiples(ByteCount(4096))
            .map(|block| {
                let zero =
                    bytes[block.start().0 as usize..block.end().0 as usize].iter().all(|&byte| byte == 0);
                if zero { Extent::hole(block.count()) } else { Extent::data(block.count()) }
            })
            .collect()
    }
}

impl Export for Ram {
    fn info(&self) -> ExportInfo {
        let mut info = ExportInfo::new("ram", ByteCount::of(&self.bytes.borrow()));
        info.read_only = self.read_only;
        info
    }

    fn submit(&self, command: Command, reply: Reply) {
        let range = command.range();
        let at = range.start().0 as usize..range.end().0 as usize;
        match command {
            Command::Read { .. } if range.end().0 > self.unreadable_from.get() => reply.fail(NbdError::Io),
            Command::Read { .. } => {
                self.read.set(self.read.get() + range.count().0);
                reply.data(Bytes::copy_from_slice(&self.bytes.borrow()[at]));
            }
            Command::Write { data, .. } => {
                self.written.set(self.written.get() + range.count().0);
                self.bytes.borrow_mut()[at.clone()].copy_from_slice(&data);
                if let Some(spoilt) = self.spoils.get().filter(|spoilt| at.contains(spoilt)) {
                    self.bytes.borrow_mut()[spoilt] ^= 1;
                }
                reply.done();
            }
            Command::WriteZeroes { .. } => {
                self.bytes.borrow_mut()[at].fill(0);
                self.zeroed.borrow_mut().push(range);
                reply.done();
            }
            Command::BlockStatus { .. } if range.end().0 > self.untold_from.get() => reply.fail(NbdError::Io),
            Command::BlockStatus { .. } => reply.extents(&self.extents(range)),
            Command::Flush | Command::Cache { .. } => reply.done(),
            Command::Trim { .. } => reply.fail(NbdError::NotSupported),
        }
    }
}

struct Only(Rc<Ram>);

impl Exports for Only {
    fn find(&self, _name: &str) -> Option<Rc<dyn Export>> {
        Some(Rc::clone(&self.0) as Rc<dyn Export>)
    }

    fn list(&self) -> Vec<ExportSummary> {
        Vec::new()
    }
}

/// A served disk in memory and its URI.
async fn serve(ram: &Rc<Ram>, directory: &Path, name: &str) -> (Server, String) {
    let socket = directory.join(name);
    let listener = Listener::bind(&NbdAddress::Unix(socket.clone())).await.unwrap();
    let uri = format!("nbd+unix:///?socket={}", socket.display());
    (listener.serve(Rc::new(Only(Rc::clone(ram))), Limits::default()), uri)
}

/// Data of all kinds: a full piece, a hole, a piece with a little in it, an odd end.
fn disk() -> Vec<u8> {
    let mut bytes = vec![0; 5 * MIB + 4608];
    let mut state = 7_u64;
    let mut fill = |range: std::ops::Range<usize>, bytes: &mut Vec<u8>| {
        for byte in &mut bytes[range] {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            *byte = (state >> 56) as u8 | 1;
        }
    };
    fill(0..MIB, &mut bytes);
    fill(3 * MIB + 70_000..3 * MIB + 70_500, &mut bytes);
    fill(5 * MIB + 4096..5 * MIB + 4608, &mut bytes);
    bytes
}

/// A directory and a source that serves [`disk`].
struct Fixture {
    directory: tempfile::TempDir,
    _server: Server,
    source: Client,
    ram: Rc<Ram>,
    context: Context,
}

impl Fixture {
    async fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let ram = Ram::of(disk());
        let (server, uri) = serve(&ram, directory.path(), "source").await;
        let source = Client::connect(&uri.parse::<NbdUri>().unwrap()).await.unwrap();
        let arguments = <Arguments as clap::Parser>::parse_from(["backtide", "--json", "status"]);
        Self { directory, _server: server, source, ram, context: Context::new(&arguments) }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    async fn restore(&self, output: &str, force: bool) -> Result<ByteCount, Failure> {
        self.restore_way(output, force, false).await.map(|(written, _)| written)
    }

    /// How much was written, and how much was there from an earlier restore.
    async fn restore_way(
        &self,
        output: &str,
        force: bool,
        only_changed: bool,
    ) -> Result<(ByteCount, ByteCount), Failure> {
        let leftover = take(&self.context, output, &goal(self.source.size()))?;
        let wanted = Wanted { only_changed, leftover, ..wanted(self.source.size(), force) };
        let target = Target::open(output, wanted).await?;
        let copied = self.copy(&target, false).await?;
        verify(&target, &copied, &mut Progress::new(&self.context, "verified")).await?;
        target.publish().await?;
        Ok((copied.data_bytes, copied.resumed_bytes))
    }

    async fn copy(&self, target: &Target, around_damage: bool) -> Result<Copied, Failure> {
        let mut progress = Progress::new(&self.context, "restored");
        copy(&self.source, target, true, around_damage, &mut progress).await
    }

    async fn open(&self, output: &Path, force: bool) -> Result<Target, Failure> {
        Target::open(output.to_str().unwrap(), wanted(self.source.size(), force)).await
    }

    fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.directory.path()).unwrap();
        let mut names: Vec<String> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

fn goal(size: ByteCount) -> Goal {
    Goal { disk: DiskId("11111111-2222-3333-4444-555555555555".parse().unwrap()), lsn: Lsn(7), size }
}

fn wanted(size: ByteCount, force: bool) -> Wanted {
    Wanted { goal: goal(size), force, only_changed: false, leftover: None }
}

fn code(failure: Failure) -> ErrorCode {
    match failure {
        Failure::Error(error) => error.code,
        Failure::ClosedPipe | Failure::Interrupted => unreachable!("not of a restore"),
    }
}

fn run(story: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    LocalSet::new().block_on(&runtime, story);
}

#[test]
fn a_new_file_is_whole_and_sparse() {
    run(async {
        let fixture = Fixture::new().await;
        let output = fixture.path("out.img");
        let written = fixture.restore(output.to_str().unwrap(), false).await.unwrap();
        assert!(std::fs::read(&output).unwrap() == disk(), "the file differs from the disk");
        // A full piece, one grain of 64 KiB, and the odd end.
        assert_eq!(written, ByteCount((MIB + (64 << 10) + 4608) as u64));
        let blocks = std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(&output).unwrap());
        assert!(blocks * 512 < 2 * MIB as u64, "{blocks} sectors are allocated");
        assert_eq!(fixture.names(), ["out.img", "source"]);
    });
}

#[test]
fn an_existing_file_needs_force_and_is_then_replaced_whole() {
    run(async {
        let fixture = Fixture::new().await;
        let output = fixture.path("out.img");
        std::fs::write(&output, "precious").unwrap();
        let refused = fixture.restore(output.to_str().unwrap(), false).await.unwrap_err();
        assert_eq!(code(refused), ErrorCode::Exists);
        assert_eq!(std::fs::read(&output).unwrap(), b"precious");
        fixture.restore(output.to_str().unwrap(), true).await.unwrap();
        assert!(std::fs::read(&output).unwrap() == disk(), "the file differs from the disk");
    });
}

#[test]
fn a_target_that_is_full_of_other_data_ends_as_the_point() {
    run(async {
        let fixture = Fixture::new().await;
        let ram = Ram::of(vec![0xee; disk().len() + 8192]);
        let (server, uri) = serve(&ram, fixture.directory.path(), "target").await;
        assert_eq!(code(fixture.restore(&uri, false).await.unwrap_err()), ErrorCode::Exists);
        assert!(ram.bytes.borrow().iter().all(|&byte| byte == 0xee), "refused, and changed all the same");
        fixture.restore(&uri, true).await.unwrap();
        server.shutdown(Duration::from_secs(1)).await;
        let bytes = ram.bytes.borrow();
        assert!(bytes[..disk().len()] == disk(), "the export differs from the disk");
        assert!(bytes[disk().len()..].iter().all(|&byte| byte == 0xee), "what lies behind the point is kept");
        let longest = ram.zeroed.borrow().iter().map(|range| range.count().0).max().unwrap();
        assert_eq!(longest, 2 * MIB as u64, "neighboring zero pieces are one request");
    });
}

#[test]
fn an_export_that_holds_nothing_where_the_point_goes_needs_no_force() {
    run(async {
        let fixture = Fixture::new().await;
        let mut bytes = vec![0; disk().len() + 8192];
        bytes[disk().len()] = 1;
        let ram = Ram::of(bytes);
        let (_server, uri) = serve(&ram, fixture.directory.path(), "target").await;
        fixture.restore(&uri, false).await.unwrap();
        assert!(ram.bytes.borrow()[..disk().len()] == disk(), "the export differs from the disk");
        ram.bytes.borrow_mut()[..disk().len()].fill(0);
        let last = disk().len() - 1;
        ram.bytes.borrow_mut()[last] = 1;
        assert_eq!(code(fixture.restore(&uri, false).await.unwrap_err()), ErrorCode::Exists);
    });
}

#[test]
fn a_target_that_is_too_small_is_refused_untouched() {
    run(async {
        let fixture = Fixture::new().await;
        let ram = Ram::of(vec![0xee; MIB]);
        let (_server, uri) = serve(&ram, fixture.directory.path(), "target").await;
        let refused = fixture.restore(&uri, true).await.unwrap_err();
        assert_eq!(code(refused), ErrorCode::Refused);
        assert!(ram.bytes.borrow().iter().all(|&byte| byte == 0xee));
    });
}

#[test]
fn a_target_that_does_not_keep_what_is_written_is_found_out() {
    run(async {
        let fixture = Fixture::new().await;
        let ram = Ram::of(vec![0; disk().len()]);
        ram.spoils.set(Some(3 * MIB + 70_100));
        let (_server, uri) = serve(&ram, fixture.directory.path(), "target").await;
        assert_eq!(code(fixture.restore(&uri, false).await.unwrap_err()), ErrorCode::Damaged);
    });
}

#[test]
fn a_restore_that_is_given_up_leaves_nothing() {
    run(async {
        let fixture = Fixture::new().await;
        let output = fixture.path("out.img");
        let target =
            Target::open(output.to_str().unwrap(), wanted(fixture.source.size(), false)).await.unwrap();
        fixture.copy(&target, false).await.unwrap();
        drop(target);
        assert_eq!(fixture.names(), ["source"]);
    });
}

#[test]
fn a_read_only_or_missing_server_is_refused() {
    run(async {
        let fixture = Fixture::new().await;
        let mut ram = Ram::of(vec![0; 8 * MIB]);
        Rc::get_mut(&mut ram).unwrap().read_only = true;
        let (_server, uri) = serve(&ram, fixture.directory.path(), "target").await;
        assert_eq!(code(fixture.restore(&uri, false).await.unwrap_err()), ErrorCode::Refused);
        let nobody = format!("nbd+unix:///?socket={}", fixture.path("nobody").display());
        assert_eq!(code(fixture.restore(&nobody, false).await.unwrap_err()), ErrorCode::Unreachable);
        assert_eq!(code(fixture.restore("nbds://host/x", false).await.unwrap_err()), ErrorCode::Usage);
    });
}

#[tokio::test]
async fn what_an_agent_keeps_is_not_overwritten_and_a_missing_directory_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let state = directory.path();
    let record = state.join("vm1.json");
    for name in ["lock", "vm1.json", "vm1.tracking"] {
        std::fs::write(state.join(name), "kept").unwrap();
    }
    let message = |opened: Result<Target, Failure>| match opened {
        Err(Failure::Error(error)) => (error.code, error.message),
        Err(other) => panic!("{other:?}"),
        Ok(target) => panic!("{target} is taken"),
    };
    let (code, said) = message(Target::open(record.to_str().unwrap(), wanted(ByteCount(4096), true)).await);
    assert_eq!(code, ErrorCode::Refused, "{said}");
    assert!(said.ends_with("lies in an agent's state directory"), "{said}");
    assert_eq!(std::fs::read(&record).unwrap(), b"kept");
    let nowhere = state.join("none/x.raw");
    std::fs::remove_file(state.join("lock")).unwrap();
    let (code, said) = message(Target::open(nowhere.to_str().unwrap(), wanted(ByteCount(4096), false)).await);
    assert_eq!(
        (code, said),
        (ErrorCode::NotFound, format!("there is no directory {}/none", state.display()))
    );
}

#[test]
fn onto_an_old_copy_only_the_difference_is_written() {
    run(async {
        let fixture = Fixture::new().await;
        let mut old = disk();
        old[100] ^= 1;
        old[2 * MIB + 5] = 9;
        let output = fixture.path("old.img");
        let name = output.to_str().unwrap();
        for length in [old.len(), old.len() - 512, old.len() + 9000] {
            let mut copy = old.clone();
            copy.resize(length, 0xee);
            std::fs::write(&output, &copy).unwrap();
            assert_eq!(code(fixture.restore_way(name, false, true).await.unwrap_err()), ErrorCode::Exists);
            assert!(std::fs::read(&output).unwrap() == copy, "untouched");
            let (written, _) = fixture.restore_way(name, true, true).await.unwrap();
            assert!(std::fs::read(&output).unwrap() == disk(), "the file differs from the disk");
            let end = if length < old.len() { 4608 } else { 0 };
            assert_eq!(written, ByteCount((64 << 10) + end), "{length}");
        }
        let ram = Ram::of(old);
        let (_server, uri) = serve(&ram, fixture.directory.path(), "target").await;
        assert_eq!(code(fixture.restore_way(&uri, false, true).await.unwrap_err()), ErrorCode::Exists);
        fixture.restore_way(&uri, true, true).await.unwrap();
        assert!(*ram.bytes.borrow() == disk(), "the export differs from the disk");
        assert_eq!(ram.written.get(), 64 << 10);
        assert_eq!(ram.zeroed.borrow().len(), 1);
    });
}
