//! What an export is, as the handshake describes it.

use backtide_units::ByteCount;

use crate::{MAX_PAYLOAD, ReplyStyle};

/// Block size constraints of an export, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockSizes {
    /// Offsets and lengths are multiples of this power of two.
    pub minimum: u32,
    /// Requests of this size are served well.
    pub preferred: u32,
    /// The longest READ and WRITE.
    pub maximum: u32,
}

impl BlockSizes {
    /// Whether the specification allows them.
    pub fn are_valid(self) -> bool {
        self.minimum.is_power_of_two()
            && self.minimum <= 64 << 10
            && self.preferred.is_power_of_two()
            && self.preferred >= self.minimum.max(512)
            && self.maximum >= self.preferred
    }
}

impl Default for BlockSizes {
    fn default() -> Self {
        Self { minimum: 1, preferred: 4096, maximum: MAX_PAYLOAD.0 as u32 }
    }
}

/// One entry of a list of exports.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExportSummary {
    /// The name clients ask for.
    pub name: String,
    /// A text for people; may be empty.
    pub description: String,
}

/// One export: its name, its size and what it can do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportInfo {
    /// Its canonical name.
    pub name: String,
    /// A text for people; may be empty.
    pub description: String,
    /// Its size in bytes.
    pub size: ByteCount,
    /// Writes are refused.
    pub read_only: bool,
    /// FLUSH is served.
    pub flush: bool,
    /// The FUA flag is served.
    pub fua: bool,
    /// The disk behind has a seek time.
    pub rotational: bool,
    /// TRIM is served.
    pub trim: bool,
    /// WRITE_ZEROES is served.
    pub write_zeroes: bool,
    /// WRITE_ZEROES with FAST_ZERO is served: it either is fast or fails at once.
    pub fast_zero: bool,
    /// CACHE is served.
    pub cache: bool,
    /// BLOCK_STATUS in `base:allocation` is served.
    pub block_status: bool,
    /// BLOCK_STATUS in `qemu:dirty-bitmap:` and this name is served, too.
    pub dirty_bitmap: Option<String>,
    /// Several connections see one disk: a flush on one covers the writes answered on all.
    pub multi_conn: bool,
    /// Block size constraints.
    pub block_sizes: BlockSizes,
    /// Requests that are no multiples of the minimum block size are served, though they may be slow:
    /// clients may not have asked for it.
    pub serves_any_range: bool,
}

impl ExportInfo {
    /// A writable export that serves every command, but promises no fast zeroes.
    pub fn new(name: impl Into<String>, size: ByteCount) -> Self {
        Self {
            name: name.into(),
            description: String::new(),
            size,
            read_only: false,
            flush: true,
            fua: true,
            rotational: false,
            trim: true,
            write_zeroes: true,
            fast_zero: false,
            cache: true,
            block_status: true,
            dirty_bitmap: None,
            multi_conn: true,
            block_sizes: BlockSizes::default(),
            serves_any_range: false,
        }
    }

    /// The transmission flags to announce; `context` tells that one was chosen for BLOCK_STATUS.
    pub fn transmission_flags(&self, style: ReplyStyle, context: bool) -> TransmissionFlags {
        let (chunks, payloads) = match style {
            ReplyStyle::Simple => (false, false),
            ReplyStyle::Structured => (true, false),
            ReplyStyle::Extended => (true, context),
        };
        let mut bits = TransmissionFlags::HAS_FLAGS;
        for (set, bit) in [
            (self.read_only, TransmissionFlags::READ_ONLY),
            (self.flush, TransmissionFlags::SEND_FLUSH),
            (self.fua, TransmissionFlags::SEND_FUA),
            (self.rotational, TransmissionFlags::ROTATIONAL),
            (self.trim && !self.read_only, TransmissionFlags::SEND_TRIM),
            (self.write_zeroes && !self.read_only, TransmissionFlags::SEND_WRITE_ZEROES),
            (chunks, TransmissionFlags::SEND_DF),
            (self.multi_conn, TransmissionFlags::CAN_MULTI_CONN),
            (self.cache, TransmissionFlags::SEND_CACHE),
            (self.fast_zero && self.write_zeroes && !self.read_only, TransmissionFlags::SEND_FAST_ZERO),
            (payloads, TransmissionFlags::BLOCK_STATUS_PAYLOAD),
        ] {
            if set {
                bits |= bit;
            }
        }
        TransmissionFlags(bits)
    }
}

/// What a server announces about an export's transmission phase.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TransmissionFlags(pub u16);

impl TransmissionFlags {
    const HAS_FLAGS: u16 = 1 << 0;
    const READ_ONLY: u16 = 1 << 1;
    const SEND_FLUSH: u16 = 1 << 2;
    const SEND_FUA: u16 = 1 << 3;
    const ROTATIONAL: u16 = 1 << 4;
    const SEND_TRIM: u16 = 1 << 5;
    const SEND_WRITE_ZEROES: u16 = 1 << 6;
    const SEND_DF: u16 = 1 << 7;
    const CAN_MULTI_CONN: u16 = 1 << 8;
    const SEND_CACHE: u16 = 1 << 10;
    const SEND_FAST_ZERO: u16 = 1 << 11;
    const BLOCK_STATUS_PAYLOAD: u16 = 1 << 12;

    /// The flags mean nothing when the server did not set the first of them.
    fn has(self, bit: u16) -> bool {
        self.0 & Self::HAS_FLAGS != 0 && self.0 & bit != 0
    }

    /// Writes are refused.
    pub fn read_only(self) -> bool {
        self.has(Self::READ_ONLY)
    }

    /// FLUSH is served.
    pub fn flush(self) -> bool {
        self.has(Self::SEND_FLUSH)
    }

    /// The FUA flag is served.
    pub fn fua(self) -> bool {
        self.has(Self::SEND_FUA)
    }

    /// The disk behind has a seek time.
    pub fn rotational(self) -> bool {
        self.has(Self::ROTATIONAL)
    }

    /// TRIM is served.
    pub fn trim(self) -> bool {
        self.has(Self::SEND_TRIM)
    }

    /// WRITE_ZEROES is served.
    pub fn write_zeroes(self) -> bool {
        self.has(Self::SEND_WRITE_ZEROES)
    }

    /// The DF flag is served.
    pub fn df(self) -> bool {
        self.has(Self::SEND_DF)
    }

    /// Several connections see one disk.
    pub fn multi_conn(self) -> bool {
        self.has(Self::CAN_MULTI_CONN)
    }

    /// CACHE is served.
    pub fn cache(self) -> bool {
        self.has(Self::SEND_CACHE)
    }

    /// The FAST_ZERO flag is served.
    pub fn fast_zero(self) -> bool {
        self.has(Self::SEND_FAST_ZERO)
    }

    /// BLOCK_STATUS may name the contexts it wants in a payload.
    pub fn block_status_payload(self) -> bool {
        self.has(Self::BLOCK_STATUS_PAYLOAD)
    }
}
