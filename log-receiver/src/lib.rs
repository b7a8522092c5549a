//! The log receiver: takes streams, keeps timelines, serves points.
//!
//! The way of a frame, file by file: `accept` waits for the agent's hello and sends the connection
//! to the thread that owns the disk (`ingest`); `connection` reads; [`session`] decides what a
//! message means; `entries` puts it into the log's words; `disks` and `disk` hold the logs;
//! `commit` makes them durable. The way back: `service` answers the control API with `points`
//! and `changes`, `mounts` serves a `point_export` over NBD, or an `overlay_export` of one of `overlays`;
//! `reading` gives an agent the content of an `open_point` over the stream.
//!
//! [`session`], `disks`, `disk` and [`differing`] know no socket, no clock and no thread: a simulation drives
//! them over a storage in memory. Everything around is [`Receiver`].

mod accept;
mod admit;
mod asking;
mod connection;
mod ingest;
mod open_point;
mod reading;
mod socket;

mod commit;
mod commit_ticket;
mod committer;
mod compare;
mod cut;
pub mod differing;
mod disk;
mod disks;
pub mod entries;
mod log_mark;
mod logs;
mod look;
mod memo;
mod names;
pub mod session;

mod changes;
mod clock;
mod config;
mod facts;
mod findings;
mod forgotten;
mod fsck;
#[cfg(test)]
mod golden;
#[cfg(test)]
mod hostile;
mod inspect;
mod mount_numbers;
mod mounts;
mod overlay_export;
mod overlays;
mod past;
mod point_export;
mod points;
mod pool;
mod read_queue;
mod receiver;
mod removal;
mod reopening;
mod retention;
mod scrub;
mod sealed_json;
mod service;
mod shortfalls;
mod small_files;
mod space;
mod store_file;
mod threads;
mod touched;
mod watch;
mod watermark;

pub use asking::Recalled;
pub use backtide_tls::WhichDisks;
pub use commit_ticket::{CommitOutcome, CommitTicket};
pub use compare::CompareJob;
pub use config::{Config, Every, JournalCompression, Limits, OnFull, Retention, Scrubbing, StreamTls};
pub use disk::{Disk, DiskError, Failure};
pub use disks::{Claim, Disks, ListError, Shelf};
pub use findings::Findings;
pub use forgotten::Forgotten;
pub use fsck::{Repair, forget_retention, fsck, repair};
pub use inspect::{DURABLE_MAGIC, inspect_durable, inspect_json};
pub use look::{Found, look};
pub use names::Names;
pub use receiver::{Receiver, StartError};
pub use session::{ConnectionId, Effect, Session};
pub use socket::ListenError;
pub use store_file::{STORE_VERSION, StoreFileError, StoreId};
pub use threads::THREADS_APART;
pub use watch::StoreWatch;
