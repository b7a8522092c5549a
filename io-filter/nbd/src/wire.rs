//! The numbers of the NBD specification, under its names without the `NBD_` prefix.
//!
//! A table: used by both sides of the codec, and by tests that write bytes by hand.

/// The port of `nbd://` URIs that name none.
pub const DEFAULT_PORT: u16 = 10809;

/// The longest name, description or error text the specification allows, in bytes.
pub const MAX_STRING: usize = 4096;

/// The magic numbers that begin each message.
pub mod magic {
    /// First eight bytes of every server ("NBDMAGIC").
    pub const SERVER: u64 = 0x4e42_444d_4147_4943;
    /// Second eight bytes of a newstyle server, and the beginning of each option ("IHAVEOPT").
    pub const OPTION: u64 = 0x4948_4156_454f_5054;
    /// Second eight bytes of an oldstyle server.
    pub const OLDSTYLE: u64 = 0x0000_4202_8186_1253;
    /// Begin of the answer to an option.
    pub const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
    /// Begin of a request.
    pub const REQUEST: u32 = 0x2560_9513;
    /// Begin of a simple reply.
    pub const SIMPLE_REPLY: u32 = 0x6744_6698;
    /// Begin of a structured reply chunk.
    pub const STRUCTURED_REPLY: u32 = 0x668e_33ef;
    /// Begin of a request with extended headers.
    pub const EXTENDED_REQUEST: u32 = 0x21e4_1c71;
    /// Begin of a reply chunk with extended headers.
    pub const EXTENDED_REPLY: u32 = 0x6e8a_278c;
}

/// Handshake flags, of the server (16 bits) and of the client (32 bits).
pub mod handshake_flag {
    /// Options have answers, and unknown ones do not end the connection.
    pub const FIXED_NEWSTYLE: u16 = 1 << 0;
    /// The answer to EXPORT_NAME goes without its 124 zeroes.
    pub const NO_ZEROES: u16 = 1 << 1;
}

/// Options of the handshake.
pub mod option {
    /// Begin transmission on a named export; has no way to report an error.
    pub const EXPORT_NAME: u32 = 1;
    /// End the handshake.
    pub const ABORT: u32 = 2;
    /// Name the exports.
    pub const LIST: u32 = 3;
    /// Go on encrypted.
    pub const STARTTLS: u32 = 5;
    /// Describe an export.
    pub const INFO: u32 = 6;
    /// Describe an export and begin transmission.
    pub const GO: u32 = 7;
    /// Negotiate structured replies.
    pub const STRUCTURED_REPLY: u32 = 8;
    /// Name the metadata contexts of an export.
    pub const LIST_META_CONTEXT: u32 = 9;
    /// Choose metadata contexts for BLOCK_STATUS.
    pub const SET_META_CONTEXT: u32 = 10;
    /// Negotiate extended headers: 64-bit lengths, one shape for every reply.
    pub const EXTENDED_HEADERS: u32 = 11;
}

/// Types of an answer to an option.
pub mod option_reply {
    /// Done.
    pub const ACK: u32 = 1;
    /// One export of LIST.
    pub const SERVER: u32 = 2;
    /// One piece of information of INFO and GO.
    pub const INFO: u32 = 3;
    /// One metadata context.
    pub const META_CONTEXT: u32 = 4;
    /// Set in every error.
    pub const ERROR_BIT: u32 = 1 << 31;
    /// The option is unknown.
    pub const ERR_UNSUP: u32 = ERROR_BIT | 1;
    /// The server's policy forbids it.
    pub const ERR_POLICY: u32 = ERROR_BIT | 2;
    /// The option's data is malformed.
    pub const ERR_INVALID: u32 = ERROR_BIT | 3;
    /// The option needs encryption first.
    pub const ERR_TLS_REQD: u32 = ERROR_BIT | 5;
    /// No such export.
    pub const ERR_UNKNOWN: u32 = ERROR_BIT | 6;
    /// The server is going down.
    pub const ERR_SHUTDOWN: u32 = ERROR_BIT | 7;
    /// The client has to ask for the block size constraints.
    pub const ERR_BLOCK_SIZE_REQD: u32 = ERROR_BIT | 8;
    /// The option's data is too long.
    pub const ERR_TOO_BIG: u32 = ERROR_BIT | 9;
    /// Extended headers are needed, or are chosen already and cannot be taken back.
    pub const ERR_EXT_HEADER_REQD: u32 = ERROR_BIT | 10;
}

/// Types of information about an export.
pub mod info {
    /// Size and transmission flags.
    pub const EXPORT: u16 = 0;
    /// The export's canonical name.
    pub const NAME: u16 = 1;
    /// A text for people.
    pub const DESCRIPTION: u16 = 2;
    /// Minimum, preferred and maximum block size.
    pub const BLOCK_SIZE: u16 = 3;
}

/// Request types.
pub mod command {
    /// Read.
    pub const READ: u16 = 0;
    /// Write.
    pub const WRITE: u16 = 1;
    /// Disconnect.
    pub const DISC: u16 = 2;
    /// Make finished writes durable.
    pub const FLUSH: u16 = 3;
    /// Discard.
    pub const TRIM: u16 = 4;
    /// Read ahead.
    pub const CACHE: u16 = 5;
    /// Write zeroes.
    pub const WRITE_ZEROES: u16 = 6;
    /// Describe allocation.
    pub const BLOCK_STATUS: u16 = 7;
    /// Change the size: an extension that is refused here.
    pub const RESIZE: u16 = 8;
}

/// Request flags.
pub mod command_flag {
    /// Answer only when the data is durable.
    pub const FUA: u16 = 1 << 0;
    /// Zeroes must stay allocated.
    pub const NO_HOLE: u16 = 1 << 1;
    /// Answer a read in one chunk.
    pub const DF: u16 = 1 << 2;
    /// One extent is enough.
    pub const REQ_ONE: u16 = 1 << 3;
    /// Fail rather than write zeroes slowly.
    pub const FAST_ZERO: u16 = 1 << 4;
    /// The length in the header is that of a payload (extended headers only).
    pub const PAYLOAD_LEN: u16 = 1 << 5;
}

/// Structured reply chunks.
pub mod chunk {
    /// Flag: the last chunk of its reply.
    pub const FLAG_DONE: u16 = 1 << 0;
    /// No content.
    pub const NONE: u16 = 0;
    /// Offset and data.
    pub const OFFSET_DATA: u16 = 1;
    /// Offset and length of zeroes.
    pub const OFFSET_HOLE: u16 = 2;
    /// Context and extents.
    pub const BLOCK_STATUS: u16 = 5;
    /// Context, count and extents of 64 bits (extended headers only).
    pub const BLOCK_STATUS_EXT: u16 = 6;
    /// Set in every error type.
    pub const ERROR_BIT: u16 = 1 << 15;
    /// Error and text.
    pub const ERROR: u16 = ERROR_BIT | 1;
    /// Error, text and offset.
    pub const ERROR_OFFSET: u16 = ERROR_BIT | 2;
}

/// The metadata context that tells holes and zeroes.
pub mod base_allocation {
    /// Its name.
    pub const NAME: &str = "base:allocation";
    /// Extent flag: not allocated.
    pub const HOLE: u32 = 1 << 0;
    /// Extent flag: reads as zeroes.
    pub const ZERO: u32 = 1 << 1;
}

/// Metadata contexts that tell what changed since a point, as QEMU serves them.
pub mod dirty_bitmap {
    /// The name of their namespace.
    pub const NAMESPACE: &str = "qemu:";
    /// Begins the name of each.
    pub const PREFIX: &str = "qemu:dirty-bitmap:";
    /// Extent flag: changed.
    pub const DIRTY: u32 = 1 << 0;
}

/// Bytes of a request's header.
pub const REQUEST_HEADER: usize = 4 + 2 + 2 + 8 + 8 + 4;
/// Bytes of a request's header, and of a reply chunk's, with extended headers.
pub const EXTENDED_HEADER: usize = 32;
/// Bytes of a simple reply's header.
pub const SIMPLE_HEADER: usize = 4 + 4 + 8;
/// Bytes of a structured reply chunk's header.
pub const CHUNK_HEADER: usize = 4 + 2 + 2 + 8 + 4;
/// Bytes of an option's header.
pub const OPTION_HEADER: usize = 8 + 4 + 4;
/// Bytes of the header of an answer to an option.
pub const OPTION_REPLY_HEADER: usize = 8 + 4 + 4 + 4;
/// The zeroes after an answer to EXPORT_NAME.
pub const EXPORT_NAME_ZEROES: usize = 124;
