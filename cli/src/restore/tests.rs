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
use backtide_units::{ByteCount, ByteRange};
use bytes::Bytes;
use tokio::task::LocalSet;

use crate::{
    arguments::Arguments,
    context::Context,
    ending::Failure,
    output::progress::Progress,
    restore::{Target, copy, verify},
};

const MIB: usize = 1 << 20;

/// A disk in memory. Extents are told in blocks of 4 KiB.
struct Ram {
    bytes: RefCell<Vec<u8>>,
    read_only: bool,
    /// Flips one bit of what is written here.
    spoils: Cell<Option<usize>>,
    zeroed: RefCell<Vec<ByteRange>>,
}

impl Ram {
    fn of(bytes: Vec<u8>) -> Rc<Self> {
        Rc::new(Self {
            bytes: bytes.into(),
            read_only: false,
            spoils: Cell::new(None),
            zeroed: RefCell::default(),
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
            Command::Read { .. } => reply.data(Bytes::copy_from_slice(&self.bytes.borrow()[at])),
            Command::Write { data, .. } => {
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
    context: Context,
}

impl Fixture {
    async fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let (server, uri) = serve(&Ram::of(disk()), directory.path(), "source").await;
        let source = Client::connect(&uri.parse::<NbdUri>().unwrap()).await.unwrap();
        let arguments = <Arguments as clap::Parser>::parse_from(["backtide", "--json", "status"]);
        Self { directory, _server: server, source, context: Context::new(&arguments) }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    async fn restore(&self, output: &str, force: bool) -> Result<ByteCount, Failure> {
        let target = Target::open(output, self.source.size(), force).await?;
        let copied = copy(&self.source, &target, &mut Progress::new(&self.context, "restored")).await?;
        verify(&target, &copied, &mut Progress::new(&self.context, "verified")).await?;
        target.publish().await?;
        Ok(copied.data_bytes)
    }

    fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.directory.path()).unwrap();
        let mut names: Vec<String> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
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
fn an_image_that_an_agent_has_locked_is_not_replaced_even_by_force() {
    run(async {
        let fixture = Fixture::new().await;
        let output = fixture.path("live.img");
        std::fs::write(&output, "live").unwrap();
        let agents = std::fs::File::open(&output).unwrap();
        rustix::fs::flock(&agents, rustix::fs::FlockOperation::LockExclusive).unwrap();
        let refused = fixture.restore(output.to_str().unwrap(), true).await.unwrap_err();
        assert_eq!(code(refused), ErrorCode::Locked);
        assert_eq!(std::fs::read(&output).unwrap(), b"live");
    });
}

#[test]
fn a_target_that_is_full_of_other_data_ends_as_the_point() {
    run(async {
        let fixture = Fixture::new().await;
        let ram = Ram::of(vec![0xee; disk().len() + 8192]);
        let (server, uri) = serve(&ram, fixture.directory.path(), "target").await;
        fixture.restore(&uri, false).await.unwrap();
        server.shutdown(Duration::from_secs(1)).await;
        let bytes = ram.bytes.borrow();
        assert!(bytes[..disk().len()] == disk(), "the export differs from the disk");
        assert!(bytes[disk().len()..].iter().all(|&byte| byte == 0xee), "what lies behind the point is kept");
        let longest = ram.zeroed.borrow().iter().map(|range| range.count().0).max().unwrap();
        assert_eq!(longest, 2 * MIB as u64, "neighboring zero pieces are one request");
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
        let target = Target::open(output.to_str().unwrap(), fixture.source.size(), false).await.unwrap();
        copy(&fixture.source, &target, &mut Progress::new(&fixture.context, "restored")).await.unwrap();
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
    let (code, said) = message(Target::open(record.to_str().unwrap(), ByteCount(4096), true).await);
    assert_eq!(code, ErrorCode::Refused, "{said}");
    assert!(said.ends_with("lies in an agent's state directory"), "{said}");
    assert_eq!(std::fs::read(&record).unwrap(), b"kept");
    let nowhere = state.join("none/x.raw");
    std::fs::remove_file(state.join("lock")).unwrap();
    let (code, said) = message(Target::open(nowhere.to_str().unwrap(), ByteCount(4096), false).await);
    assert_eq!(
        (code, said),
        (ErrorCode::NotFound, format!("there is no directory {}/none", state.display()))
    );
}
