//! What the journal of a database takes, with each way to compress it, beside `zstd -1` of the bytes that were written.

use std::{fmt::Write, path::Path, process::Command, sync::Arc, time::Instant};

use anyhow::{Context, bail};
use backtide_e2e::{
    Bench,
    kernel_disk::{Mounted, Served, cannot_mount},
    postgres::{Postgres, cannot_serve},
};
use backtide_recovery::{
    CacheLimits, Compression, DiskLog, Entry, LogCache, LogIdentity, LogOptions, Snapshot,
};
use backtide_segment::{EntryReader, SealedSegment, SegmentFile, Seq, scan};
use backtide_storage::{RealStorage, Storage};
use backtide_units::{ByteOffset, ByteRange, Lsn};

use crate::{
    servers::succeed,
    tracking::{Setting, stand::Stand},
};

const SIZE: u64 = 512 << 20;

/// pgbench's transactions whose writes are measured.
const TRANSACTIONS: u64 = 4000;

/// Entries are synced when so many bytes have come, as a receiver does.
const SYNC_BYTES: usize = 4 << 20;

/// Random reads of 4 KiB of the newest point.
const READS: u64 = 20_000;

/// What one way to compress costs and brings.
struct Stored {
    bytes: u64,
    append_us_per_mib: f64,
    read_us: f64,
}

/// See the module's description.
pub(super) fn run(setting: &Setting<'_>) -> anyhow::Result<String> {
    if let Some(why) = cannot_mount().or_else(cannot_serve) {
        bail!("{why}");
    }
    let directory = setting.place.join("journal-size");
    let (identity, entries) = pgbench(setting, &directory)?;
    let payload: Vec<u8> =
        entries.iter().filter_map(Entry::data).flat_map(|(bytes, _)| bytes.to_vec()).collect();
    let together = zstd_of(&directory, &payload)?;
    let mib = payload.len() as f64 / f64::from(1 << 20);
    let mut text = format!(
        "PostgreSQL on ext4 on a disk behind Backtide: {} entries with {mib:.0} MiB of {TRANSACTIONS} transactions of pgbench and of its set-up. \
         `zstd -1` makes {:.1} MiB of all payloads as one file.\n\n\
         | journal_compression | journal, MiB | of the payloads | of `zstd -1` | append and sync, µs per MiB | read of 4 KiB, µs |\n|---|---|---|---|---|---|\n",
        entries.len(),
        together as f64 / f64::from(1 << 20),
    );
    for (name, compression) in
        [("none", Compression::None), ("lz4", Compression::Lz4), ("zstd", Compression::Zstd)]
    {
        let stored = store(&directory.join(name), identity, &entries, compression)?;
        eprintln!("journal-size: {name}: {} bytes of {}", stored.bytes, payload.len());
        writeln!(
            text,
            "| {name} | {:.1} | {:.2} | {:.2} | {:.0} | {:.1} |",
            stored.bytes as f64 / f64::from(1 << 20),
            stored.bytes as f64 / payload.len() as f64,
            stored.bytes as f64 / together as f64,
            stored.append_us_per_mib,
            stored.read_us,
        )?;
    }
    std::fs::remove_dir_all(&directory)?;
    Ok(text)
}

/// Runs the database; gives what the receiver has in its journal.
fn pgbench(setting: &Setting<'_>, directory: &Path) -> anyhow::Result<(LogIdentity, Vec<Entry>)> {
    std::fs::create_dir_all(directory)?;
    let image = directory.join("disk.raw");
    std::fs::File::create(&image)?.set_len(SIZE)?;
    let stand = Stand::start(setting.backtide, directory, true)?;
    stand.attach(&image, &[])?;
    stand.wait_for_sync()?;
    let bench = Bench::new();
    let served = Served::start(&bench, "disk", &stand.uri(), SIZE);
    succeed(Command::new("mkfs.ext4").args(["-q", "-F"]).arg(served.path()))?;
    let mounted = match Mounted::at(bench.path("mnt"), &served) {
        Ok(mounted) => mounted,
        Err(why) => bail!("no ext4 on a loop device here: {why}"),
    };
    Postgres::create(&bench, mounted.directory());
    let server = Postgres::start(&bench, "server", mounted.directory());
    server.prepare_pgbench();
    let load = server.pgbench(10_000);
    let done = || server.query("select count(*) from pgbench_history").parse::<u64>();
    while done().context("how many transactions")? < TRANSACTIONS {
        std::thread::sleep(std::time::Duration::from_millis(200));
    }
    drop(load);
    server.cut_off();
    mounted.unmount();
    drop(served);
    let store = stand.store();
    stand.end()?;
    journal(&store)
}

/// The entries of the only log of a store.
fn journal(store: &Path) -> anyhow::Result<(LogIdentity, Vec<Entry>)> {
    let found = Command::new("find").arg(store).args(["-name", "*.seg"]).output()?;
    let mut paths: Vec<_> = std::str::from_utf8(&found.stdout)?.lines().collect();
    paths.sort_unstable();
    let storage = RealStorage::open(store)?;
    let (mut identity, mut entries) = (None, Vec::new());
    for path in paths {
        let file = SegmentFile::new(storage.open(Path::new(path).strip_prefix(store)?)?, path.into());
        let header = file.header()?;
        identity = Some(LogIdentity { disk: header.disk, history: header.history });
        let end = match SealedSegment::open(&file, header)? {
            Some(sealed) => sealed.entries_end(),
            None => scan(&file, header, Seq(0), Seq(0))?.end,
        };
        let mut reader = EntryReader::new(&file, header);
        for item in file.headers(header, end) {
            let (header, payload) = reader.entry(item?.1)?;
            entries.push(header.entry(payload).map_err(anyhow::Error::msg)?);
        }
    }
    Ok((identity.context("a segment")?, entries))
}

/// Appends all of it to a log of its own, and reads its newest point.
fn store(
    place: &Path,
    identity: LogIdentity,
    entries: &[Entry],
    compression: Compression,
) -> anyhow::Result<Stored> {
    std::fs::create_dir_all(place)?;
    let storage: Arc<dyn Storage> = Arc::new(RealStorage::open(place)?);
    let cache = LogCache::new(CacheLimits::default());
    let options = LogOptions { compression, ..LogOptions::default() };
    let mut log = DiskLog::create(storage, Path::new("log"), identity, options, &cache)?;
    let (began, mut waiting, mut bytes) = (Instant::now(), 0, 0);
    for entry in entries {
        let length = entry.data().map_or(0, |(payload, _)| payload.len());
        (waiting, bytes) = (waiting + length, bytes + length);
        log.append(entry.clone())?;
        if waiting >= SYNC_BYTES {
            waiting = 0;
            sync(&mut log)?;
        }
    }
    sync(&mut log)?;
    let append = began.elapsed().as_secs_f64() * 1e6 / (bytes as f64 / f64::from(1 << 20));
    let read_us = read(&log.snapshot()?)?;
    Ok(Stored { bytes: log.size().0, append_us_per_mib: append, read_us })
}

fn sync(log: &mut DiskLog) -> anyhow::Result<()> {
    if let Some(ticket) = log.ticket()? {
        log.synced(ticket.sync())?;
    }
    Ok(())
}

/// Microseconds of a random read of the newest point, which is in the page cache.
fn read(snapshot: &Snapshot) -> anyhow::Result<f64> {
    let view = snapshot.latest_view();
    assert_eq!(view.at(), Lsn::MAX, "the newest of everything");
    let blocks = SIZE / 4096;
    let began = Instant::now();
    for nth in 0..READS {
        let at = nth.wrapping_mul(0x9e37_79b9_7f4a_7c15) % blocks * 4096;
        view.read(ByteRange::between(ByteOffset(at), ByteOffset(at + 4096)))?;
    }
    Ok(began.elapsed().as_secs_f64() * 1e6 / READS as f64)
}

/// Bytes that `zstd -1` makes of them.
fn zstd_of(directory: &Path, payload: &[u8]) -> anyhow::Result<u64> {
    let (plain, small) = (directory.join("payloads"), directory.join("payloads.zst"));
    std::fs::write(&plain, payload)?;
    succeed(Command::new("zstd").args(["-1", "-q", "-f", "-o"]).arg(&small).arg(&plain))?;
    Ok(std::fs::metadata(&small)?.len())
}
