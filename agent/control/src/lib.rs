//! HTTP plumbing shared by the control APIs: addresses, errors, serving, asking.
//!
//! The way of one call: the client asks at an [`Address`] ([`Client`]), the daemon serves there
//! ([`Server`]), the answer is JSON either way: what was asked for, or an [`ApiError`] whose
//! [`ErrorCode`] says what to do and which exit code the command line ends with. Nothing here
//! knows a disk.

mod address;
mod client;
mod error;
mod extract;
mod lines;
mod runtime;
mod serve;

pub use address::{Address, Address as ApiAddress, InvalidAddress};
pub use client::{Client, Peer, SILENT_TIME, Tell};
pub use error::{ApiError, ErrorCode};
pub use extract::ApiJson;
pub use runtime::{Lasting, build_lasting};
pub use serve::{BindError, Server, json_fallbacks};

#[cfg(test)]
mod tests;
