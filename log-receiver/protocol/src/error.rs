//! What can be wrong with bytes from a peer.

use crate::PROTOCOL_VERSION;

/// What a server of HTTP begins its answers with.
const HTTP: u32 = u32::from_le_bytes(*b"HTTP");

fn magic_text(expected: u32, found: u32) -> String {
    if found == HTTP {
        return "this is a control API, where no streams are taken: give an address that the receiver has as --listen".to_owned();
    }
    format!(
        "the peer does not speak the backtide stream protocol: expected magic {expected:#010x}, found {found:#010x}"
    )
}

/// Bytes from the peer that are no valid stream. The connection cannot go on after one.
#[derive(Debug, thiserror::Error)]
pub enum ProtocolError {
    /// The first bytes are not those of a frame of this protocol.
    #[error("{}", magic_text(*expected, *found))]
    Magic {
        /// The magic of this protocol.
        expected: u32,
        /// What came.
        found: u32,
    },
    /// The peer's first message is of another version of this protocol.
    #[error(
        "the peer speaks version {found} of the stream, this side version {PROTOCOL_VERSION}: upgrade the older one"
    )]
    Version {
        /// As the message says.
        found: u32,
    },
    /// The frame header's checksum is wrong.
    #[error("damaged frame header: checksum expected {expected:#010x}, found {found:#010x}")]
    HeaderChecksum {
        /// As the header says.
        expected: u32,
        /// As computed.
        found: u32,
    },
    /// The payload's checksum is wrong.
    #[error("damaged payload of frame {seq}: checksum expected {expected:#010x}, found {found:#010x}")]
    PayloadChecksum {
        /// The frame.
        seq: u64,
        /// As the header says.
        expected: u32,
        /// As computed.
        found: u32,
    },
    /// A type this version does not have.
    #[error("unknown frame type {found}")]
    UnknownType {
        /// The type byte.
        found: u8,
    },
    /// A payload above the limit.
    #[error("frame of {found} bytes is over the limit of {limit} bytes")]
    TooLarge {
        /// As the header says.
        found: u64,
        /// That of the frame's type, at most [`crate::PAYLOAD_BYTES_MAX`].
        limit: u64,
    },
    /// A frame whose fields contradict each other or the state of the connection.
    #[error("invalid {what} frame: {why}")]
    Invalid {
        /// The kind of frame.
        what: &'static str,
        /// What was expected and what was found.
        why: String,
    },
    /// A frame out of order.
    #[error("frame out of order: expected sequence number {expected}, found {found}")]
    Sequence {
        /// One after the last.
        expected: u64,
        /// As the header says.
        found: u64,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_control_api_is_told_from_another_stranger() {
        let text = |found: &[u8; 4]| {
            ProtocolError::Magic { expected: 1, found: u32::from_le_bytes(*found) }.to_string()
        };
        assert!(text(b"HTTP").starts_with("this is a control API"));
        assert!(text(b"SSH-").ends_with("expected magic 0x00000001, found 0x2d485353"));
    }
}
