//! The exports of many servers by name, for a socket that all of them share.
//!
//! ```text
//! shared socket's thread: accept ─▶ handshake ─▶ find the export ─┐ the connection, whole
//! thread of the export:                        offered ─▶ adopt ◀─┘ ─▶ requests and replies
//! ```
//!
//! The shared socket's thread does handshakes only. A client that has chosen goes, with its socket and what was read of
//! it, to the thread that owns its disk: from there on it is a connection like those of the disk's own socket.
//!
//! Invariants: an export that is expected and not there lets its clients wait, for as long as a handshake may take;
//! a client is served what it was told of, or nothing.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use backtide_nbd::{ExportInfo, ExportSummary, Intake, server::Session};
use backtide_tls::Rights;
use backtide_units::DiskName;
use tokio::sync::{mpsc, watch};

use super::{negotiate::Negotiated, seats::Seats, stream::Parked};
use crate::ServeError;

/// Clients on their way to one export. More of them wait in the thread of the shared socket.
const ON_THEIR_WAY_MAX: usize = 16;

/// The exports that a [`Listener`](crate::Listener) offers for [servers](crate::Server) on several threads. Cheap to
/// clone.
#[derive(Clone)]
pub struct Directory {
    shared: Arc<Shared>,
}

struct Shared {
    /// The canonical name of the default export; "" where none is configured.
    default_export: String,
    entries: Mutex<Entries>,
    changed: watch::Sender<()>,
}

#[derive(Default)]
struct Entries {
    by_name: BTreeMap<String, Entry>,
    next: u64,
}

/// An export that is there or expected.
struct Entry {
    /// Which disk it is of: whose clients may use it.
    disk: DiskName,
    /// None while it is expected.
    offer: Option<Offer>,
}

/// What one server serves here.
#[derive(Clone)]
struct Offer {
    id: u64,
    info: ExportInfo,
    seats: Seats,
    inbox: mpsc::Sender<Passed>,
}

/// An export in a directory, until this is dropped. Then it is expected.
pub(crate) struct Offered {
    directory: Directory,
    name: String,
    id: u64,
}

/// A client on its way to its export.
pub(crate) struct Passed {
    pub(crate) stream: Parked,
    pub(crate) intake: Intake,
    pub(crate) session: Session,
}

impl Directory {
    /// An empty one. The default export is the one called `default_export` or, if that is "", the only one
    /// there is, or is expected, for the client.
    pub fn new(default_export: impl Into<String>) -> Self {
        let (entries, changed) = (Mutex::default(), watch::Sender::default());
        Self { shared: Arc::new(Shared { default_export: default_export.into(), entries, changed }) }
    }

    /// Lets clients of the export `name`, which is of `disk`, wait until a server offers it.
    pub fn expect(&self, name: &str, disk: &DiskName) {
        let expected = || Entry { disk: disk.clone(), offer: None };
        self.entries().by_name.entry(name.to_owned()).or_insert_with(expected);
        self.shared.changed.send_replace(());
    }

    /// There is no export `name` any more: its clients are told so.
    pub fn forget(&self, name: &str) {
        self.entries().by_name.remove(name);
        self.shared.changed.send_replace(());
    }

    /// Offers an export under the name in `info`, in place of another of that name. What comes of it are clients for it.
    pub(crate) fn offer(
        &self,
        info: ExportInfo,
        disk: DiskName,
        seats: Seats,
    ) -> (Offered, mpsc::Receiver<Passed>) {
        let (inbox, passed) = mpsc::channel(ON_THEIR_WAY_MAX);
        let name = info.name.clone();
        let mut entries = self.entries();
        let id = entries.next;
        entries.next += 1;
        let offer = Some(Offer { id, info, seats, inbox });
        entries.by_name.insert(name.clone(), Entry { disk, offer });
        drop(entries);
        self.shared.changed.send_replace(());
        (Offered { directory: self.clone(), name, id }, passed)
    }

    /// Tells of changes from now on.
    pub(crate) fn changes(&self) -> watch::Receiver<()> {
        self.shared.changed.subscribe()
    }

    /// The export that a client with these rights calls `name`, if it is there.
    pub(crate) fn find(&self, name: &str, rights: &Rights) -> Option<ExportInfo> {
        let entries = self.entries();
        let entry = self.entry(&entries, name, rights)?;
        if let Err(why) = rights.check(&entry.disk) {
            tracing::warn!(why, "an NBD client is not served");
            return None;
        }
        entry.offer.as_ref().map(|offer| offer.info.clone())
    }

    /// How many exports are expected that are not there.
    pub(crate) fn expected(&self) -> usize {
        self.entries().by_name.values().filter(|entry| entry.offer.is_none()).count()
    }

    /// Whether a client with these rights may use that export, and it is expected and not there.
    pub(crate) fn is_awaited(&self, name: &str, rights: &Rights) -> bool {
        let entries = self.entries();
        let entry = self.entry(&entries, name, rights).filter(|entry| entry.is_for(rights));
        entry.is_some_and(|entry| entry.offer.is_none())
    }

    /// Whether a client of `process` with these rights may use it, and it has as many clients as it may.
    pub(crate) fn is_full(&self, name: &str, process: Option<u32>, rights: &Rights) -> bool {
        let entries = self.entries();
        let entry = self.entry(&entries, name, rights).filter(|entry| entry.is_for(rights));
        entry.and_then(|entry| entry.offer.as_ref()).is_some_and(|offer| !offer.seats.has_room(process))
    }

    /// Those that are there.
    pub(crate) fn list(&self, rights: &Rights) -> Vec<ExportSummary> {
        let entries = self.entries();
        let allowed = entries.by_name.values().filter(|entry| entry.is_for(rights));
        allowed
            .filter_map(|entry| entry.offer.as_ref())
            .map(|offer| ExportSummary {
                name: offer.info.name.clone(),
                description: offer.info.description.clone(),
            })
            .collect()
    }

    /// Hands a client to the server of the export it has chosen; waits while others are on their way there.
    pub(crate) async fn pass(&self, negotiated: Negotiated) -> Result<(), ServeError> {
        let Negotiated { stream, intake, session } = negotiated;
        let name = &session.export.name;
        let offer = self.entries().by_name.get(name).and_then(|entry| entry.offer.clone());
        // Another disk may have the name by now, or the same one another size.
        let offer = offer.filter(|offer| offer.info == session.export);
        let gone = || ServeError::ExportGone(name.clone());
        let inbox = offer.ok_or_else(gone)?.inbox;
        let way = inbox.reserve().await.map_err(|_| gone())?;
        way.send(Passed { stream: stream.park()?, intake, session });
        Ok(())
    }

    /// The export that a client with these rights means by `name`; whether it may use it is not looked at where it says the
    /// name.
    fn entry<'entries>(
        &self,
        entries: &'entries Entries,
        name: &str,
        rights: &Rights,
    ) -> Option<&'entries Entry> {
        let default = &self.shared.default_export;
        let name = if name.is_empty() { default } else { name };
        if !name.is_empty() {
            return entries.by_name.get(name);
        }
        let mut allowed = entries.by_name.values().filter(|entry| entry.is_for(rights));
        allowed.next().filter(|_| allowed.next().is_none())
    }

    fn entries(&self) -> MutexGuard<'_, Entries> {
        self.shared.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Entry {
    fn is_for(&self, rights: &Rights) -> bool {
        rights.check(&self.disk).is_ok()
    }
}

impl Drop for Offered {
    fn drop(&mut self) {
        let mut entries = self.directory.entries();
        if let Some(entry) = entries.by_name.get_mut(&self.name) {
            entry.offer.take_if(|offer| offer.id == self.id);
        }
        drop(entries);
        self.directory.shared.changed.send_replace(());
    }
}

impl fmt::Debug for Directory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Directory").finish_non_exhaustive()
    }
}
