//! The disk behind the filter: a raw image, a block device, or any NBD server.
//!
//! Page-cache reads and writes are done at once on the disk's own thread: they cost less than
//! handing them over. What may wait for a device goes to the blocking pool.

use std::{cell::RefCell, io, rc::Rc, sync::Arc, time::Duration};

use backtide_export::{Client, ClientError, Extent, NbdUri, ZeroOptions};
use backtide_io_filter::{Change, IoFailure, LocalData, LocalOp};
use backtide_storage::ImageFile;
use backtide_tracking::DirtyBitmap;
use backtide_units::{BlockRange, ByteCount, ByteOffset, ByteRange};
use bytes::Bytes;

/// The disk behind.
pub(crate) enum Local {
    /// A raw file or block device.
    Image(Arc<ImageFile>),
    /// An NBD server.
    Nbd(NbdDisk),
}

/// An NBD server as the disk behind; connected again when it was lost.
pub(crate) struct NbdDisk {
    uri: NbdUri,
    client: RefCell<Client>,
    size: ByteCount,
    /// Only one task reconnects at a time.
    reconnecting: tokio::sync::Mutex<()>,
}

/// What a linear search for block status asks for at once.
const STATUS_STEP: u64 = 1 << 30;

/// How long a lost NBD server may take to come back before a request fails.
const RECONNECT_TIME: Duration = Duration::from_secs(10);

const EIO: i32 = 5;

impl Local {
    pub(crate) fn engine(&self) -> &'static str {
        match self {
            Self::Image(_) => "pread",
            Self::Nbd(_) => "nbd",
        }
    }

    pub(crate) fn size(&self) -> ByteCount {
        match self {
            Self::Image(image) => image.size(),
            Self::Nbd(disk) => disk.size,
        }
    }

    /// Does what can be done without waiting; gives the rest back.
    pub(crate) fn try_now(&self, op: LocalOp) -> Result<Result<LocalData, IoFailure>, LocalOp> {
        match (self, op) {
            (Self::Image(image), LocalOp::Change(Change::Write { range, data, fua: false })) => {
                Ok(image.write_at(range.start(), &data).map(|()| LocalData::Changed).map_err(failure))
            }
            (_, op) => Err(op),
        }
    }

    /// Does it, waiting as long as it takes.
    pub(crate) async fn run(&self, op: LocalOp) -> Result<LocalData, IoFailure> {
        match self {
            Self::Image(image) => {
                let image = Arc::clone(image);
                blocking(move || on_image(&image, op)).await.map_err(failure)
            }
            Self::Nbd(disk) => disk.run(op).await,
        }
    }

    /// Reads from the page cache at once, where all of it is there.
    pub(crate) fn try_read(&self, range: ByteRange) -> Option<io::Result<Bytes>> {
        match self {
            Self::Image(image) => {
                let mut buffer = vec![0; usize::try_from(range.count().0).ok()?];
                match image.try_read(range.start(), &mut buffer) {
                    Ok(true) => Some(Ok(buffer.into())),
                    Ok(false) => None,
                    Err(error) => Some(Err(error)),
                }
            }
            Self::Nbd(_) => None,
        }
    }

    /// The stretches of `range`, from its start: all of it, or only the first.
    pub(crate) async fn extents(&self, range: ByteRange, one: bool) -> Result<Vec<Extent>, IoFailure> {
        match self {
            Self::Image(image) => {
                let image = Arc::clone(image);
                blocking(move || image_extents(&image, range, one)).await.map_err(failure)
            }
            Self::Nbd(disk) => disk.extents(range).await,
        }
    }

    pub(crate) fn read_ahead(&self, range: ByteRange) {
        if let Self::Image(image) = self {
            image.read_ahead(range);
        }
    }

    /// The blocks that may hold data.
    pub(crate) async fn allocated(&self) -> Result<DirtyBitmap, IoFailure> {
        let whole = ByteRange::between(ByteOffset::ZERO, ByteOffset(self.size().0));
        match self {
            Self::Image(image) => {
                let image = Arc::clone(image);
                blocking(move || {
                    let mut blocks = DirtyBitmap::new();
                    for extent in image.allocated(whole)? {
                        blocks.insert(BlockRange::touched_by(extent));
                    }
                    Ok(blocks)
                })
                .await
                .map_err(failure)
            }
            Self::Nbd(disk) => disk.allocated(whole).await,
        }
    }
}

fn on_image(image: &ImageFile, op: LocalOp) -> io::Result<LocalData> {
    let stable = match op {
        LocalOp::Read(range) => {
            let mut buffer = vec![0; usize::try_from(range.count().0).expect("a read is small")];
            image.read_at(range.start(), &mut buffer)?;
            return Ok(LocalData::Read(buffer.into()));
        }
        LocalOp::Change(Change::Write { range, data, fua }) => {
            image.write_at(range.start(), &data)?;
            fua
        }
        LocalOp::Change(Change::Zero { range, trim, fua }) => {
            image.zero(range, trim)?;
            fua
        }
        LocalOp::Change(Change::Flush) => true,
    };
    if stable {
        image.sync()?;
    }
    Ok(LocalData::Changed)
}

fn image_extents(image: &ImageFile, range: ByteRange, one: bool) -> io::Result<Vec<Extent>> {
    let mut extents = Vec::new();
    let mut rest = range;
    while let Some((extent, is_data)) = image.first_extent(rest)? {
        let length = extent.count();
        extents.push(if is_data { Extent::data(length) } else { Extent::hole(length) });
        rest = ByteRange::between(extent.end(), range.end());
        if one || extents.len() >= EXTENTS_MAX {
            break;
        }
    }
    Ok(extents)
}

/// The longest answer to a block status request.
const EXTENTS_MAX: usize = 4096;

impl NbdDisk {
    pub(crate) async fn connect(uri: NbdUri) -> Result<Self, ClientError> {
        let client = Client::connect(&uri).await?;
        let size = client.size();
        Ok(Self { uri, client: RefCell::new(client), size, reconnecting: tokio::sync::Mutex::new(()) })
    }

    /// Sends a request; once more on a new connection when the old one was lost. A change that
    /// arrives twice is harmless: nothing else touches its range until it is answered.
    async fn request<T, F>(&self, send: impl Fn(Client) -> F) -> Result<T, IoFailure>
    where
        F: Future<Output = Result<T, ClientError>>,
    {
        let client = self.client.borrow().clone();
        match send(client.clone()).await {
            Err(error) if error.is_lost() => {
                tracing::warn!(uri = %self.uri, %error, "the disk behind is lost: connecting again");
                self.reconnect().await.map_err(|error| self.failed(&error))?;
                let client = self.client.borrow().clone();
                send(client).await.map_err(|error| self.failed(&error))
            }
            result => result.map_err(|error| self.failed(&error)),
        }
    }

    async fn reconnect(&self) -> Result<(), ClientError> {
        let _only = self.reconnecting.lock().await;
        if self.client.borrow().lost().is_none() {
            return Ok(());
        }
        let until = tokio::time::Instant::now() + RECONNECT_TIME;
        loop {
            match Client::connect(&self.uri).await {
                Ok(client) => {
                    self.client.replace(client);
                    return Ok(());
                }
                Err(error) if tokio::time::Instant::now() >= until => return Err(error),
                Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
            }
        }
    }

    fn failed(&self, error: &ClientError) -> IoFailure {
        tracing::error!(uri = %self.uri, %error, "the disk behind failed");
        IoFailure { errno: i32::try_from(error.as_nbd().code()).unwrap_or(EIO) }
    }

    async fn run(&self, op: LocalOp) -> Result<LocalData, IoFailure> {
        match op {
            LocalOp::Read(range) => Ok(LocalData::Read(self.read(range).await?)),
            LocalOp::Change(Change::Write { range, data, fua }) => {
                let send = |client: Client| {
                    let data = data.clone();
                    async move { client.write(range.start(), data, fua).await }
                };
                self.request(send).await.map(|()| LocalData::Changed)
            }
            LocalOp::Change(Change::Zero { range, trim, fua }) => {
                // Always as zeroes: a trim may leave anything, and the receiver is told of zeroes.
                let options = ZeroOptions { fua, no_hole: !trim, fast: false };
                let send = |client: Client| async move {
                    client.write_zeroes(range.start(), range.count(), options).await
                };
                self.request(send).await.map(|()| LocalData::Changed)
            }
            LocalOp::Change(Change::Flush) => {
                self.request(|client| async move { client.flush().await }).await.map(|()| LocalData::Changed)
            }
        }
    }

    pub(crate) async fn read(&self, range: ByteRange) -> Result<Bytes, IoFailure> {
        self.request(|client| async move { client.read(range.start(), range.count()).await }).await
    }

    async fn extents(&self, range: ByteRange) -> Result<Vec<Extent>, IoFailure> {
        self.request(|client| async move { client.block_status(range.start(), range.count()).await }).await
    }

    async fn allocated(&self, whole: ByteRange) -> Result<DirtyBitmap, IoFailure> {
        let mut blocks = DirtyBitmap::new();
        for step in whole.split_at_multiples(ByteCount(STATUS_STEP)) {
            let mut at = step.start();
            for extent in self.extents(step).await? {
                let end = ByteOffset(at.0 + extent.length.0).min(step.end());
                if !extent.zero {
                    blocks.insert(BlockRange::touched_by(ByteRange::between(at, end)));
                }
                at = end;
            }
        }
        Ok(blocks)
    }
}

/// Runs on the blocking pool of this thread's runtime.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
}

pub(crate) fn failure(error: io::Error) -> IoFailure {
    IoFailure { errno: error.raw_os_error().unwrap_or(EIO) }
}

/// A disk behind that its thread shares among its tasks.
pub(crate) type SharedLocal = Rc<Local>;
