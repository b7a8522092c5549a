//! The stream between a disk's filter and the log receiver: messages, framing, versions.
//!
//! Pure: bytes in, messages out and back. One connection carries one disk, or reads one point of one. [`FORMAT.md`] beside
//! this crate is the description of the bytes; [`message`] says what they mean, [`frame`] how they
//! lie on the wire, [`decoder`] finds them in a byte stream.
//!
//! [`FORMAT.md`]: https://docs.rs/crate/backtide-protocol/source/FORMAT.md

pub mod decoder;
mod error;
pub mod frame;
pub mod hello;
pub mod message;
pub mod reading;

pub use decoder::Decoder;
pub use error::ProtocolError;
pub use frame::{FRAME_HEADER_BYTES, PAYLOAD_BYTES_MAX, encode};
pub use hello::{
    AckPolicy, CloseCode, Closed, Hello, OnOutage, OriginPoint, ReceiverState, Tracking, Welcome,
};
pub use message::{
    Compare, CompareItem, CompareResult, Content, Data, Message, Ping, Record, RecordBody, Sequenced,
};
pub use reading::{
    Blocks, FETCH_BYTES_MAX, FailureCode, OpenPoint, PointOpened, ReadFailure, Reading, collect_part,
};

/// The version this build speaks. A peer with another one is refused with [`CloseCode::Version`].
///
/// | version | what changed |
/// |---|---|
/// | 1 | first |
pub const PROTOCOL_VERSION: u32 = 1;
