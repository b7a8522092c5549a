//! A whole receiver over real sockets, driven by a hand-written agent and judged by real NBD clients.

mod agent;
mod base_in_doubt;
mod checks;
mod commit;
mod damage;
mod ended_logs;
mod every_file;
mod faults;
mod fixture;
mod folding;
mod forget;
mod forget_failing;
mod going_back;
mod locks;
mod mending;
mod point_reader;
mod reading;
mod refusals;
mod reopening;
mod repair;
mod retention;
mod scrubbing;
mod store;
mod stream;
mod unlistable;
mod writable;
