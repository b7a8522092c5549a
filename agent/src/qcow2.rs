//! qcow2 files: opened by `qemu-nbd`, which the agent starts and ends, and used through NBD.
//!
//! The format stays QEMU's business. The child takes QEMU's own image lock, so that no virtual
//! machine has the file at the same time. One that ends by itself is started again: its disk waits
//! for it as for any NBD server. Starting and ending one takes a bounded time, whatever its storage does.

mod ending;
mod tool;

use std::{
    io::{self, Read},
    ops::ControlFlow,
    os::unix::fs::FileTypeExt,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use self::ending::{Patience, end_child, end_other};
pub(crate) use self::{
    ending::NotEnded,
    tool::{create, files_behind, grow, is_blank},
};
use backtide_agent_api::{CacheMode, ImageFormat};
use backtide_units::DiskName;
use rustix::{fs::FlockOperation, io::Errno};
use tokio::{
    io::AsyncReadExt,
    net::UnixStream,
    process::{Child, ChildStderr, Command},
    sync::oneshot,
    task::JoinHandle,
    time::Instant,
};

/// The first bytes of a qcow2 file ("QFI\xfb").
const MAGIC: [u8; 4] = [0x51, 0x46, 0x49, 0xfb];

/// How often a starting server is looked for.
const START_POLL: Duration = Duration::from_millis(5);

/// How long a server may take to start.
const START_MAX: Duration = Duration::from_secs(30);

/// Waits before a server that ended is started again, doubling.
const RESTART_FIRST: Duration = Duration::from_millis(100);
const RESTART_LAST: Duration = Duration::from_secs(5);

/// As much of what a server said last is kept for the error of its end.
const SAID_BYTES_MAX: usize = 4096;

/// A file opened by `qemu-nbd`. Ends with this value.
#[derive(Debug)]
pub(crate) struct Qcow2Server {
    uri: String,
    stop: oneshot::Sender<()>,
    keeping: JoinHandle<Result<(), NotEnded>>,
}

/// Why a qcow2 file cannot be opened.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Qcow2Error {
    /// `qemu-nbd` is missing.
    #[error("a qcow2 image needs qemu-nbd (Debian package qemu-utils): {0}")]
    Start(io::Error),
    /// `qemu-img` did not come to an end, and was killed.
    #[error("qemu-img has not ended with {} after {} s: its storage stands still", image.display(), after.as_secs())]
    Stuck {
        /// Of which file.
        image: PathBuf,
        /// How long it had.
        after: Duration,
    },
    /// The one of an agent that was killed still has the file.
    #[error("cannot end the qemu-nbd of an earlier agent: {0}")]
    Predecessor(NotEnded),
    /// Where it is to serve there is something else.
    #[error("cannot serve at {}: {source}", socket.display())]
    Socket {
        /// Where.
        socket: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It ended at once.
    #[error("QEMU cannot use {}: {message}", image.display())]
    Refused {
        /// Which file.
        image: PathBuf,
        /// What it wrote.
        message: String,
    },
}

/// What an image is: as known, else what it looks like; none of an NBD disk. A raw image is looked at only before its
/// first attach: a guest may write a header into it that names files of the host.
pub(crate) fn format_of(image: &str, known: Option<ImageFormat>) -> Option<ImageFormat> {
    let path = Path::new(image);
    if !path.is_absolute() {
        return None;
    }
    Some(known.unwrap_or_else(|| if is_qcow2(path) { ImageFormat::Qcow2 } else { ImageFormat::Raw }))
}

/// Whether a path is a qcow2 file. What cannot be read is left for its opener to complain about.
fn is_qcow2(path: &Path) -> bool {
    // To open a FIFO is to wait for who is at its other end, perhaps for ever.
    let kind = std::fs::metadata(path).map(|metadata| metadata.file_type());
    if !kind.is_ok_and(|kind| kind.is_file() || kind.is_block_device()) {
        return false;
    }
    let mut magic = [0; 4];
    std::fs::File::open(path).and_then(|mut file| file.read_exact(&mut magic)).is_ok() && magic == MAGIC
}

/// What a file is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    /// To be a disk.
    Disk,
    /// To be looked at. Not a byte of it changes; opened as a disk, one that was not closed in good order is mended.
    Look,
}

/// What is opened, and where it is served.
#[derive(Clone, Debug)]
struct Opening {
    /// `qemu-nbd`.
    program: PathBuf,
    image: PathBuf,
    disk: DiskName,
    socket: PathBuf,
    cache: CacheMode,
    access: Access,
}

/// A `qemu-nbd` that serves.
#[derive(Debug)]
struct Running {
    child: Child,
    /// Ends with what the child said last, when the child has ended.
    said: JoinHandle<String>,
    since: Instant,
}

impl Qcow2Server {
    /// Opens `image` on a socket of its own.
    pub(crate) async fn start(
        image: &Path,
        disk: &DiskName,
        socket: PathBuf,
        cache: CacheMode,
        access: Access,
    ) -> Result<Self, Qcow2Error> {
        let uri = format!("nbd+unix:///{disk}?socket={}", socket.display());
        let (program, image, disk) = ("qemu-nbd".into(), image.to_owned(), disk.clone());
        let opening = Opening { program, image, disk, socket, cache, access };
        let running = opening.start().await?;
        let (stop, stopped) = oneshot::channel();
        let keeping = tokio::spawn(opening.keep(running, stopped));
        Ok(Self { uri, stop, keeping })
    }

    /// Where it serves the disk.
    pub(crate) fn uri(&self) -> &str {
        &self.uri
    }

    /// Ends it in good order: it flushes and gives up its lock. One that does not hear is killed.
    ///
    /// # Errors
    /// When it has the file even then.
    pub(crate) async fn stop(self) -> Result<(), NotEnded> {
        // Dropped or sent: both mean the end.
        let _ = self.stop.send(());
        match self.keeping.await {
            Ok(ended) => ended,
            Err(error) => {
                tracing::warn!(%error, "qemu-nbd");
                Ok(())
            }
        }
    }
}

#[cfg(test)]
impl Qcow2Server {
    /// One that ends like this.
    pub(crate) fn played(ended: Result<(), NotEnded>) -> Self {
        let (stop, stopped) = oneshot::channel();
        let keeping = tokio::spawn(async move {
            let _ = stopped.await;
            ended
        });
        Self { uri: "nbd+unix:///played".to_owned(), stop, keeping }
    }
}

impl Qcow2Server {
    /// The same for whoever can do nothing about one that does not end.
    pub(crate) async fn stop_anyway(self) {
        let uri = self.uri.clone();
        if let Err(error) = self.stop().await {
            tracing::error!(uri, %error, "a qcow2 file is still open");
        }
    }
}

impl Opening {
    /// Starts the server and waits until it serves.
    async fn start(&self) -> Result<Running, Qcow2Error> {
        let mut begun = None;
        self.start_in(&mut begun).await?;
        Ok(begun.expect("it serves"))
    }

    /// The same with the server in `begun` from when it is there, for whoever does not wait until it serves.
    async fn start_in(&self, begun: &mut Option<Running>) -> Result<(), Qcow2Error> {
        end_predecessor(&self.socket, Patience::USUAL).await.map_err(Qcow2Error::Predecessor)?;
        let unusable = |source| Qcow2Error::Socket { socket: self.socket.clone(), source };
        released(&self.socket).await.map_err(unusable)?;
        clear_socket(&self.socket).map_err(unusable)?;
        let mut child = Command::new(&self.program)
            .args(["--format=qcow2", "--persistent", "--shared=0", "--discard=unmap"])
            .arg(match self.cache {
                CacheMode::Writeback => "--cache=writeback",
                CacheMode::Direct => "--cache=none",
            })
            .args((self.access == Access::Look).then_some("--read-only"))
            .arg(format!("--export-name={}", self.disk))
            .arg("--socket")
            .arg(&self.socket)
            .arg("--pid-file")
            .arg(pid_file(&self.socket))
            .arg(&self.image)
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(Qcow2Error::Start)?;
        let stderr = child.stderr.take().expect("stderr is a pipe");
        let said = tokio::spawn(listen_to(stderr, self.disk.clone()));
        let running = begun.insert(Running { child, said, since: Instant::now() });
        let refused = |message| Qcow2Error::Refused { image: self.image.clone(), message };
        let until = Instant::now() + START_MAX;
        loop {
            if UnixStream::connect(&self.socket).await.is_ok() {
                running.since = Instant::now();
                return Ok(());
            }
            if running.child.try_wait().map_err(Qcow2Error::Start)?.is_some() {
                return Err(refused((&mut running.said).await.unwrap_or_default()));
            }
            if Instant::now() > until {
                return Err(refused(format!("it does not serve after {} s", START_MAX.as_secs())));
            }
            tokio::time::sleep(START_POLL).await;
        }
    }

    /// Keeps a server running until it is to stop.
    async fn keep(self, mut running: Running, mut stop: oneshot::Receiver<()>) -> Result<(), NotEnded> {
        let mut wait = RESTART_FIRST;
        loop {
            tokio::select! {
                _ = &mut stop => break self.end(running).await,
                status = running.child.wait() => {
                    let said = running.said.await.unwrap_or_default();
                    let status = status.map_or_else(|error| error.to_string(), |status| status.to_string());
                    tracing::warn!(disk = %self.disk, status, said, "qemu-nbd has ended: starting it again");
                }
            }
            if running.since.elapsed() > RESTART_LAST {
                wait = RESTART_FIRST;
            }
            running = match self.start_again(&mut wait, &mut stop).await {
                ControlFlow::Continue(running) => running,
                ControlFlow::Break(ended) => return ended,
            };
            tracing::info!(disk = %self.disk, "qemu-nbd serves again");
        }
    }

    /// Starts a server in the place of one that has ended, until it serves or is to stop; then it ends what was begun.
    async fn start_again(
        &self,
        wait: &mut Duration,
        stop: &mut oneshot::Receiver<()>,
    ) -> ControlFlow<Result<(), NotEnded>, Running> {
        let mut begun: Option<Running> = None;
        loop {
            let starting = async {
                tokio::time::sleep(*wait).await;
                *wait = (*wait * 2).min(RESTART_LAST);
                // One that does not serve may have the file all the same.
                if let Some(idle) = &mut begun {
                    end_child(&mut idle.child, Patience::USUAL).await.map_err(Qcow2Error::Predecessor)?;
                }
                self.start_in(&mut begun).await
            };
            let started = tokio::select! {
                _ = &mut *stop => None,
                started = starting => Some(started),
            };
            match started {
                Some(Ok(())) => return ControlFlow::Continue(begun.expect("what serves was begun")),
                Some(Err(error)) => {
                    tracing::warn!(disk = %self.disk, %error, "cannot start qemu-nbd again: will try again");
                }
                None => {
                    return ControlFlow::Break(match begun {
                        Some(begun) => self.end(begun).await,
                        None => self.end_left(Patience::USUAL).await,
                    });
                }
            }
        }
    }

    /// Ends what another start has left, if that has not come to its end.
    async fn end_left(&self, patience: Patience) -> Result<(), NotEnded> {
        // What is left says to the next start that it is still there.
        end_predecessor(&self.socket, patience).await?;
        self.clear();
        Ok(())
    }

    async fn end(&self, mut running: Running) -> Result<(), NotEnded> {
        match end_child(&mut running.child, Patience::USUAL).await {
            Ok(false) => {}
            // Everything was flushed before.
            Ok(true) => {
                tracing::warn!(disk = %self.disk, "qemu-nbd did not end when it was asked to: it was killed")
            }
            // What is left says to the next start that it is still there.
            Err(error) => return Err(error),
        }
        self.clear();
        Ok(())
    }

    /// What is left of a server that ended.
    fn clear(&self) {
        // It has removed them itself, unless it was killed.
        let _ = std::fs::remove_file(&self.socket);
        let _ = std::fs::remove_file(pid_file(&self.socket));
    }
}

/// Reads what a server says to its end: one that nobody listens to would stand still once its pipe
/// is full. The last of it is the result.
async fn listen_to(mut stderr: ChildStderr, disk: DiskName) -> String {
    let mut kept = Vec::new();
    let mut piece = [0; SAID_BYTES_MAX];
    while let Ok(read @ 1..) = stderr.read(&mut piece).await {
        tracing::warn!(%disk, said = %String::from_utf8_lossy(&piece[..read]).trim(), "qemu-nbd");
        kept.extend_from_slice(&piece[..read]);
        kept.drain(..kept.len().saturating_sub(SAID_BYTES_MAX));
    }
    String::from_utf8_lossy(&kept).trim().replace('\n', "; ")
}

fn pid_file(socket: &Path) -> PathBuf {
    let mut name = socket.as_os_str().to_owned();
    name.push(".pid");
    name.into()
}

/// Ends the server that an agent left behind when it was killed, which still has the image locked. Nothing of
/// anybody else is touched.
async fn end_predecessor(socket: &Path, patience: Patience) -> Result<(), NotEnded> {
    match std::fs::read_to_string(pid_file(socket)).ok().and_then(|text| text.trim().parse::<u32>().ok()) {
        Some(process) => end_other(process, || serves(process, socket), patience).await,
        None => Ok(()),
    }
}

/// Waits until nobody has the pid file: a server that ends has no name any more before it has let go of its files.
async fn released(socket: &Path) -> io::Result<()> {
    let (file, until) = (pid_file(socket), Instant::now() + START_MAX);
    while is_held(&file)? {
        if Instant::now() > until {
            return Err(io::Error::other(format!("{} is still locked", file.display())));
        }
        tokio::time::sleep(START_POLL).await;
    }
    Ok(())
}

/// Removes the socket of a server that is gone.
fn clear_socket(socket: &Path) -> io::Result<()> {
    match std::fs::symlink_metadata(socket) {
        Ok(found) if found.file_type().is_socket() => std::fs::remove_file(socket),
        Ok(_) => Err(io::Error::other("there is a file of that name that is no socket")),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

/// Whether a `qemu-nbd` still has its pid file locked.
fn is_held(pid_file: &Path) -> io::Result<bool> {
    let file = match std::fs::File::options().read(true).write(true).open(pid_file) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error),
    };
    // Given up again when the file is closed.
    match rustix::fs::fcntl_lock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(false),
        Err(Errno::AGAIN | Errno::ACCESS) => Ok(true),
        Err(errno) => Err(errno.into()),
    }
}

/// Whether the process is a `qemu-nbd` on this socket: ids are used again.
fn serves(id: u32, socket: &Path) -> bool {
    let Ok(line) = std::fs::read(format!("/proc/{id}/cmdline")) else { return false };
    let mut words = line.split(|&byte| byte == 0);
    words.next().is_some_and(|program| program.ends_with(b"qemu-nbd"))
        && words.any(|word| word == socket.as_os_str().as_encoded_bytes())
}

#[cfg(test)]
mod tests;
