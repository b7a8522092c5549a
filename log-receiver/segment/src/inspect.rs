//! A segment file for people: header, entries, footer, and what is wrong with them.

use std::{io, path::Path};

use backtide_storage::Storage;
use backtide_units::{ByteCount, PayloadChecksum};

use crate::{
    EntryHeader, EntryReader, Position, SealedSegment, SegmentError, SegmentFile, SegmentHeader, Seq, scan,
};

/// Writes a readable listing of one segment file, one entry a line; damage is a line of the listing. Whether
/// there is none.
///
/// # Errors
/// Of opening the file and of writing to `out`.
pub fn inspect(storage: &dyn Storage, path: &Path, out: &mut dyn io::Write) -> io::Result<bool> {
    let file = SegmentFile::new(storage.open(path)?, storage.display(path));
    writeln!(out, "{}", file.name().display())?;
    let header = match file.header() {
        Ok(header) => header,
        Err(error) => return writeln!(out, "no header: {error}").map(|()| false),
    };
    writeln!(out, "segment {} of disk {}, history {}", header.id, header.disk, header.history)?;
    writeln!(out, "first entry {}, created when {} was durable", header.first_seq, header.synced)?;
    match SealedSegment::open(&file, header) {
        Ok(Some(sealed)) => {
            let whole = entries(&file, header, sealed.entries_end(), out)?;
            Ok(footer(&file, &sealed, out)? && whole)
        }
        Ok(None) => match scan(&file, header, Seq(0), Seq(0)) {
            Ok(scanned) => {
                let whole = entries(&file, header, scanned.end, out)? && scanned.damaged.is_empty();
                writeln!(
                    out,
                    "not sealed; ends at byte {}, then {} stray bytes",
                    scanned.end, scanned.trailing
                )?;
                for (seq, position) in scanned.damaged {
                    writeln!(out, "entry {seq} at byte {position} has a damaged payload")?;
                }
                Ok(whole)
            }
            Err(error) => writeln!(out, "not sealed: {error}").map(|()| false),
        },
        Err(error) => writeln!(out, "no footer: {error}").map(|()| false),
    }
}

fn entries(
    file: &SegmentFile,
    header: SegmentHeader,
    end: backtide_units::ByteOffset,
    out: &mut dyn io::Write,
) -> io::Result<bool> {
    let mut whole = true;
    let mut reader = EntryReader::new(file, header);
    for item in file.headers(header, end) {
        let (entry, position) = match item {
            Ok(item) => item,
            Err(error) => return writeln!(out, "{error}").map(|()| false),
        };
        write!(
            out,
            "{:>10}  #{} {:?} lsn {} time {}",
            position.0, entry.seq, entry.kind, entry.lsn, entry.time.0
        )?;
        if let Some(range) = entry.range() {
            write!(out, " bytes {range}")?;
        }
        let content = reader.entry(position).and_then(|(entry, payload)| {
            let payload_length = payload.len();
            let text =
                entry.entry(payload).map_err(|what| file.damaged(position.offset().0, what.to_owned()))?;
            Ok((payload_length, text))
        });
        whole &= content.is_ok();
        match content {
            Ok((length, _)) if entry.kind.is_data() => {
                let pieces = PayloadChecksum::pieces_in(ByteCount(length as u64));
                let pieces = if pieces > 1 { format!(" in {pieces} pieces") } else { String::new() };
                let batch =
                    entry.body_ahead().filter(|_| length > 0).map(|on| format!(" in the batch {on} on"));
                writeln!(out, " payload {length}{pieces}{}", batch.unwrap_or_default())?;
            }
            Ok((_, control)) => writeln!(out, " {control:?}")?,
            Err(SegmentError::Damaged { what, .. }) => writeln!(out, " DAMAGED: {what}")?,
            Err(error) => writeln!(out, " {error}")?,
        }
        if entry.body_ahead() == Some(1) {
            body(file, &header, (&entry, position), out)?;
        }
    }
    Ok(whole)
}

/// What stands behind the last header of a batch. Whether it is whole is known of its entries.
fn body(
    file: &SegmentFile,
    header: &SegmentHeader,
    (last, position): (&EntryHeader, Position),
    out: &mut dyn io::Write,
) -> io::Result<()> {
    match file.body_of(header, last, position.offset().0) {
        Ok(body) => writeln!(out, "{:>10}  batch of {}", body.at(), body.header()),
        Err(error) => writeln!(out, "{error}"),
    }
}

fn footer(file: &SegmentFile, sealed: &SealedSegment, out: &mut dyn io::Write) -> io::Result<bool> {
    let stats = sealed.stats();
    writeln!(
        out,
        "sealed: {} extents in {} blocks; {} records, {} payload bytes",
        sealed.extent_count(),
        sealed.block_count(),
        stats.records,
        stats.payload_bytes
    )?;
    writeln!(
        out,
        "next entry {}, versions {} to {}, times {} to {}, file of {} bytes",
        stats.next_seq,
        stats.version_min,
        stats.version_max,
        stats.time_min.0,
        stats.time_max.0,
        sealed.length()
    )?;
    match sealed.summary(file) {
        Ok(summary) => {
            for step in summary.steps {
                writeln!(out, "  {step:?}")?;
            }
        }
        Err(error) => writeln!(out, "{error}")?,
    }
    // It reads the summary too.
    match sealed.verify(file) {
        Ok(()) => Ok(true),
        Err(error) => writeln!(out, "DAMAGED: {error}").map(|()| false),
    }
}
