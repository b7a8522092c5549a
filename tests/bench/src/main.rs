//! Measures Backtide beside other NBD servers, in interleaved rounds of one run.
//!
//! Every server serves a file of its own, of one size, on one file system, over a unix socket, through
//! the page cache, those called direct around it; `fio` is the client of all. A row is one access pattern; what is printed is the
//! median over the rounds and its ratio to the peers.

mod fio;
mod going_back;
mod report;
mod servers;
mod store;
mod tracking;

use std::path::PathBuf;

use anyhow::Context;
use clap::Parser;

use crate::{
    fio::ROWS,
    report::Table,
    servers::{Kind, Server},
    tracking::Setting,
};

/// Measure Backtide beside qemu-nbd, nbdkit and a qemu-storage-daemon mirror.
#[derive(Parser)]
struct Arguments {
    /// The backtide binary, built for release.
    #[arg(long)]
    backtide: PathBuf,
    /// Where the images and the store lie while it runs [default: a new directory in the system's own].
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Rounds; each measures every row on every server.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Seconds of one measurement.
    #[arg(long, default_value_t = 2)]
    seconds: u32,
    /// Size of the disk in MiB.
    #[arg(long, default_value_t = 512)]
    size: u64,
    /// Only these, by a part of their name: servers of the tables, and rows of tracking and resync
    /// (al-hot, al-cold, resync-latency, resync-scattered, bitmap-memory, compare, many-disks, restart, instructions), of
    /// going back (mount-first-byte, mount-here-first-byte, restore, rewind, boot), and of the store (thousand-disks, ingest, journal-size,
    /// open-point, block-status, mount-reads).
    #[arg(long)]
    only: Vec<String>,
    /// Writes in the log of which mount-first-byte, mount-here-first-byte, open-point and block-status open points; ten million take 6 GB and minutes.
    #[arg(long, default_value_t = 1_000_000)]
    records: u64,
    /// A rewind of 64 MiB of 8 GiB instead of 1 GiB of 100.
    #[arg(long)]
    small: bool,
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let place = match &arguments.dir {
        Some(dir) => tempfile::tempdir_in(dir),
        None => tempfile::tempdir(),
    };
    let place = place.context("make a directory for the images")?;
    let kinds: Vec<Kind> = Kind::ALL.into_iter().filter(|kind| arguments.wants(kind.name())).collect();
    let mut table = Table::new(&kinds);
    for round in 1..=arguments.rounds {
        for &kind in &kinds {
            let directory = place.path().join(format!("{round}-{}", kind.name().replace(' ', "-")));
            let server = Server::start(kind, &directory, &arguments.backtide, arguments.size)
                .with_context(|| format!("start {}", kind.name()))?;
            for row in ROWS {
                server.settle()?;
                let figure = fio::run(row, server.uri(), arguments.seconds, arguments.size)?;
                eprintln!("round {round}: {:24} {:24} {}", kind.name(), row.name, figure.text(row));
                table.add(kind, row, figure);
            }
            table.note(kind, server.facts()?);
            server.stop()?;
            std::fs::remove_dir_all(&directory).context("remove the images")?;
        }
    }
    if !kinds.is_empty() {
        print!("{}", table.markdown(&arguments.sentence()));
    }
    let setting = Setting {
        backtide: &arguments.backtide,
        place: place.path(),
        rounds: arguments.rounds,
        seconds: arguments.seconds,
        records: arguments.records,
        small: arguments.small,
    };
    let rows = tracking::ROWS.iter().chain(&going_back::ROWS).chain(store::ROWS);
    for row in rows.filter(|row| arguments.wants(row.name)) {
        print!("{}", row.measure(&setting).with_context(|| format!("measure {}", row.name))?);
    }
    Ok(())
}

impl Arguments {
    fn wants(&self, name: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|part| name.contains(part))
    }

    fn sentence(&self) -> String {
        format!(
            "{} rounds of {} s, a disk of {} MiB, fio over a unix socket, page cache",
            self.rounds, self.seconds, self.size
        )
    }
}
