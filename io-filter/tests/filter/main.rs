//! The filter, story by story, without any I/O.

mod attaches;
mod common;
mod delay_bound;
mod failing_disk;
mod found_by_simulation;
mod hasten;
mod holes;
mod interruptions;
mod places;
mod questions;
mod read_use;
mod recall;
mod reserve;
mod spill;
mod stability;
