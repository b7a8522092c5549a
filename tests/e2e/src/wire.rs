//! The stream's frames, made by hand from the description in `log-receiver/protocol/FORMAT.md`, so that
//! a test's side of a stream does not share the mistakes of the other.

use std::{
    io::{self, Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::Path,
};

use serde_json::{Value, json};

/// The agent's first frame.
pub const HELLO: u8 = 1;
/// The receiver's answer that accepts it.
pub const WELCOME: u8 = 2;
/// The begin of a resync pass; its number is T.
pub const PASS_BEGIN: u8 = 7;
/// The end, and why.
pub const CLOSE: u8 = 15;

const HEADER: usize = 64;

/// A frame with this payload.
pub fn frame(kind: u8, sequence: u64, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![0; HEADER];
    frame[..4].copy_from_slice(b"BTS1");
    frame[4] = kind;
    frame[8..16].copy_from_slice(&sequence.to_le_bytes());
    frame[48..52].copy_from_slice(&u32::try_from(payload.len()).expect("a short payload").to_le_bytes());
    frame[52..56].copy_from_slice(&crc32c::crc32c(payload).to_le_bytes());
    let checksum = crc32c::crc32c(&frame[..60]);
    frame[60..64].copy_from_slice(&checksum.to_le_bytes());
    frame.extend_from_slice(payload);
    frame
}

/// The next frame's kind and payload.
pub fn read_frame(stream: &mut UnixStream) -> (u8, Vec<u8>) {
    let (kind, _, payload) = read_numbered(stream);
    (kind, payload)
}

/// The next frame's kind, first number and payload.
pub fn read_numbered(stream: &mut UnixStream) -> (u8, u64, Vec<u8>) {
    let mut header = [0; HEADER];
    stream.read_exact(&mut header).expect("read a frame's header");
    assert_eq!(&header[..4], b"BTS1");
    let length = u32::from_le_bytes(header[48..52].try_into().expect("four bytes"));
    let mut payload = vec![0; length as usize];
    stream.read_exact(&mut payload).expect("read a frame's payload");
    (header[4], u64::from_le_bytes(header[16..24].try_into().expect("eight bytes")), payload)
}

/// A receiver that a test plays: it does what the test says, when the test says it.
pub struct PlayedReceiver(UnixListener);

impl PlayedReceiver {
    /// Listens at this path.
    pub fn at(path: &Path) -> Self {
        Self(UnixListener::bind(path).expect("listen for streams"))
    }

    /// Waits for a connection and its hello.
    pub fn meet(&self) -> (UnixStream, Value) {
        let (mut stream, _) = self.0.accept().expect("accept a stream");
        let (kind, payload) = read_frame(&mut stream);
        assert_eq!(kind, HELLO);
        (stream, serde_json::from_slice(&payload).expect("a hello is JSON"))
    }
}

/// Accepts a hello as a receiver does that has nothing of the disk yet.
///
/// # Errors
/// When the agent has gone.
pub fn welcome(stream: &mut UnixStream, hello: &Value) -> io::Result<()> {
    welcome_above(stream, hello, 0)
}

/// The same as one that has seen LSNs up to `highest` all the same.
///
/// # Errors
/// When the agent has gone.
pub fn welcome_above(stream: &mut UnixStream, hello: &Value, highest: u64) -> io::Result<()> {
    let state = if hello["history"].is_null() { "new" } else { "known" };
    let welcome = json!({
        "version": 1, "history": "0c2ff4a2-3b7c-4d21-9d0b-5b6d0f1f8e10", "state": state, "durable": 0,
        "highest": highest, "in_pass": false,
    });
    stream.write_all(&frame(WELCOME, 1, welcome.to_string().as_bytes()))
}
