//! How payloads are made smaller, and bytes again.
//!
//! The contexts belong to the thread, for a receiver may have thousands of logs. Decoding trusts nothing: it is told the
//! exact length, which comes from a checked header, and gives nothing else.

use std::cell::RefCell;

use bytes::Bytes;

/// How the payloads of a log are stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Compression {
    /// As they came.
    #[default]
    None,
    /// LZ4 blocks: little processor time.
    Lz4,
    /// Zstandard at level 1: less space.
    Zstd,
}

/// How a batch is compressed, by its number in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Method {
    Lz4 = 1,
    Zstd = 2,
}

const ZSTD_LEVEL: i32 = 1;

thread_local! {
    static COMPRESSOR: RefCell<Option<zstd::bulk::Compressor<'static>>> = const { RefCell::new(None) };
    static DECOMPRESSOR: RefCell<Option<zstd::bulk::Decompressor<'static>>> = const { RefCell::new(None) };
}

impl Compression {
    pub(crate) fn method(self) -> Option<Method> {
        match self {
            Self::None => None,
            Self::Lz4 => Some(Method::Lz4),
            Self::Zstd => Some(Method::Zstd),
        }
    }
}

impl Method {
    pub(crate) fn from_number(number: u8) -> Option<Self> {
        match number {
            1 => Some(Self::Lz4),
            2 => Some(Self::Zstd),
            _ => None,
        }
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Lz4 => "lz4",
            Self::Zstd => "zstd",
        }
    }

    /// `bytes` compressed, when that is shorter. The same bytes give the same again, as long as the program is the same.
    pub(crate) fn compress(self, bytes: &[u8]) -> Option<Bytes> {
        let compressed = match self {
            Self::Lz4 => lz4_flex::block::compress(bytes),
            Self::Zstd => COMPRESSOR.with_borrow_mut(|slot| {
                // Without memory for a context the bytes are stored as they are.
                let fresh = || zstd::bulk::Compressor::new(ZSTD_LEVEL).ok();
                *slot = slot.take().or_else(fresh);
                slot.as_mut()?.compress(bytes).ok()
            })?,
        };
        (compressed.len() < bytes.len()).then(|| {
            // It is kept for a while; what was made for the worst case need not be.
            let mut compressed = compressed;
            compressed.shrink_to_fit();
            compressed.into()
        })
    }

    /// The `length` bytes that were compressed; `None` when they were not.
    pub(crate) fn decompress(self, stored: &[u8], length: usize) -> Option<Vec<u8>> {
        let bytes = match self {
            Self::Lz4 => {
                let mut bytes = vec![0; length];
                let filled = lz4_flex::block::decompress_into(stored, &mut bytes).ok()?;
                bytes.truncate(filled);
                bytes
            }
            Self::Zstd => DECOMPRESSOR.with_borrow_mut(|slot| {
                *slot = slot.take().or_else(|| zstd::bulk::Decompressor::new().ok());
                slot.as_mut()?.decompress(stored, length).ok()
            })?,
        };
        (bytes.len() == length).then_some(bytes)
    }
}
