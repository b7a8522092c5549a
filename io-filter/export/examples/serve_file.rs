//! Serves a raw file over NBD, inline through the page cache, until SIGINT or SIGTERM:
//! `serve_file FILE ADDRESS [read-only]`, where ADDRESS is a unix socket's path or HOST:PORT.
//!
//! It measures the driver alone, and lets foreign clients judge it.

#[path = "../tests/support/file_export.rs"]
mod file_export;

use std::{error::Error, path::Path, time::Duration};

use backtide_export::{Limits, Listener, NbdAddress};
use file_export::{FileExport, Fixed};
use tokio::signal::unix::{SignalKind, signal};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (file, address, read_only) = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [file, address] => (file, address, false),
        [file, address, "read-only"] => (file, address, true),
        _ => return Err("usage: serve_file FILE SOCKET|HOST:PORT [read-only]".into()),
    };
    let address = match address.rsplit_once(':') {
        Some((host, port)) => NbdAddress::Tcp { host: host.to_owned(), port: port.parse()? },
        None => NbdAddress::Unix(address.into()),
    };
    let export = FileExport::open("disk", Path::new(file), read_only)?;
    let local = tokio::task::LocalSet::new();
    local
        .run_until(async {
            let server = Listener::bind(&address).await?.serve(Fixed::one(export), Limits::default());
            println!("listening on {}", server.address());
            let mut terminate = signal(SignalKind::terminate())?;
            let mut interrupt = signal(SignalKind::interrupt())?;
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            server.shutdown(Duration::from_secs(5)).await;
            Ok(())
        })
        .await
}
