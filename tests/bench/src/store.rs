//! What the receiver's store costs: what is written to it, and what is read from it.

mod block_status;
mod ingest;
mod journal_size;
pub(crate) mod long_log;
mod mount_reads;
mod open_point;
mod peer;
mod receiver;
mod thousand;

use crate::tracking::Row;

/// All rows, in the order they run in.
pub(crate) const ROWS: &[Row] = &[
    Row { name: "thousand-disks", run: thousand::run },
    Row { name: "ingest", run: ingest::run },
    Row { name: "journal-size", run: journal_size::run },
    Row { name: "open-point", run: open_point::run },
    Row { name: "block-status", run: block_status::run },
    Row { name: "mount-reads", run: mount_reads::run },
];
