//! Serving clients of a shared socket: they come with their handshake done.

use std::rc::Rc;

use backtide_nbd::ExportInfo;
use backtide_units::DiskName;
use tokio::{sync::mpsc, task::JoinHandle};

use super::accept::Shared;
use super::directory::{Directory, Offered, Passed};
use super::negotiate::{Choice, Negotiated};
use super::seats::Seats;
use crate::{Export, Server};

/// What a server offers in a directory, until this is dropped.
pub(super) struct Adopting {
    task: JoinHandle<()>,
    _offered: Offered,
}

impl Server {
    /// Offers its default export in `directory` too, as `name`: clients of it come to this thread, and count as if they had
    /// come by the server's own socket. Who shows a certificate needs one that speaks for `disk`. With the server's end the
    /// export is [expected](Directory::expect) again.
    ///
    /// # Panics
    /// When the server has no default export.
    pub fn offer_in(&mut self, directory: &Directory, name: &str, disk: &DiskName) {
        let Choice::Own(exports, Some(seats)) = &self.shared.choice else {
            panic!("a server of a directory has no exports of its own");
        };
        let export = exports.find("").expect("a server that is offered has a default export");
        let info = ExportInfo { name: name.to_owned(), ..export.info() };
        let (offered, passed) = directory.offer(info, disk.clone(), seats.clone());
        let task = adopt(passed, Rc::clone(&self.shared), export, seats.clone());
        self.adopting = Some(Adopting { task: tokio::task::spawn_local(task), _offered: offered });
    }
}

impl Drop for Adopting {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn adopt(
    mut clients: mpsc::Receiver<Passed>,
    shared: Rc<Shared>,
    export: Rc<dyn Export>,
    seats: Seats,
) {
    while let Some(Passed { stream, intake, session }) = clients.recv().await {
        let (export, seats) = (Rc::clone(&export), seats.clone());
        shared.open(Some(session.export.name.clone()), async move |entry, stop| {
            let stream = stream.unpark()?;
            entry.serve(Negotiated { stream, intake, session }, export, Some(&seats), &stop).await
        });
    }
}
