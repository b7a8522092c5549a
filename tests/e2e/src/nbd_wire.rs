//! A client of NBD by hand: it sends what the test wants, FUA too, and hears of the answers when the test
//! asks. Simple replies, one connection each.

use std::{
    io::{self, Read, Write},
    os::unix::net::UnixStream,
};

use rustix::event::{PollFd, PollFlags};

/// A connection to an export, past its handshake.
pub struct Connection {
    stream: UnixStream,
    sent: u64,
}

/// The command flag that makes a change stable before it is answered.
const FUA: u16 = 1;

const READ: u16 = 0;
const WRITE: u16 = 1;
const DISC: u16 = 2;
const FLUSH: u16 = 3;
const WRITE_ZEROES: u16 = 6;

const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;
const REPLY_BYTES: usize = 16;

impl Connection {
    /// Connects to an export on a unix socket.
    pub fn open(uri: &str) -> Self {
        let (export, socket) = uri
            .strip_prefix("nbd+unix:///")
            .and_then(|rest| rest.split_once("?socket="))
            .unwrap_or_else(|| panic!("{uri} is no URI of a unix socket"));
        let mut stream = UnixStream::connect(socket).expect("connect to an export");
        // Fixed newstyle without zeroes, then EXPORT_NAME.
        let mut hello = 3_u32.to_be_bytes().to_vec();
        hello.extend_from_slice(b"IHAVEOPT\0\0\0\x01");
        hello.extend_from_slice(&u32::try_from(export.len()).expect("a short name").to_be_bytes());
        hello.extend_from_slice(export.as_bytes());
        let mut greeting = [0; 18 + 10];
        stream.write_all(&hello).expect("greet a server");
        stream.read_exact(&mut greeting).expect("a greeting");
        assert_eq!(greeting[..8], *b"NBDMAGIC");
        Self { stream, sent: 0 }
    }

    /// Sends a write; its answer is the next that nobody has heard.
    pub fn send_write(&mut self, offset: u64, data: &[u8], fua: bool) -> io::Result<()> {
        self.send(WRITE, fua, offset, data.len(), data)
    }

    /// Writes and waits for the answer.
    pub fn write(&mut self, offset: u64, data: &[u8], fua: bool) -> io::Result<()> {
        self.send_write(offset, data, fua)?;
        self.answer()
    }

    /// Writes zeroes and waits for the answer.
    pub fn write_zeroes(&mut self, offset: u64, length: usize, fua: bool) -> io::Result<()> {
        self.send(WRITE_ZEROES, fua, offset, length, &[])?;
        self.answer()
    }

    /// Sends a read. Its answer has data, so that nobody can hear of what follows.
    pub fn send_read(&mut self, offset: u64, length: usize) -> io::Result<()> {
        self.send(READ, false, offset, length, &[])
    }

    /// Sends a flush.
    pub fn send_flush(&mut self) -> io::Result<()> {
        self.send(FLUSH, false, 0, 0, &[])
    }

    /// Flushes and waits for the answer.
    pub fn flush(&mut self) -> io::Result<()> {
        self.send_flush()?;
        self.answer()
    }

    /// Waits for an answer, which must be that of a success.
    ///
    /// # Errors
    /// When the connection has broken, or the export has failed the request.
    pub fn answer(&mut self) -> io::Result<()> {
        let mut reply = [0; REPLY_BYTES];
        self.stream.read_exact(&mut reply)?;
        assert_eq!(reply[..4], REPLY_MAGIC.to_be_bytes());
        let error = u32::from_be_bytes(reply[4..8].try_into().expect("four bytes"));
        if error == 0 { Ok(()) } else { Err(io::Error::other(format!("the export answers with {error}"))) }
    }

    /// How many answers are there, without waiting; each is a success.
    pub fn answers_there(&mut self) -> usize {
        self.stream.set_nonblocking(true).expect("a socket that does not wait");
        let mut count = 0;
        loop {
            // A reply is written at once, so one that has begun is there.
            match self.answer() {
                Ok(()) => count += 1,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => panic!("a connection has broken: {error}"),
            }
        }
        self.stream.set_nonblocking(false).expect("a socket that waits");
        count
    }

    fn send(&mut self, kind: u16, fua: bool, offset: u64, length: usize, data: &[u8]) -> io::Result<()> {
        self.sent += 1;
        let mut bytes = REQUEST_MAGIC.to_be_bytes().to_vec();
        bytes.extend_from_slice(&(if fua { FUA } else { 0 }).to_be_bytes());
        bytes.extend_from_slice(&kind.to_be_bytes());
        bytes.extend_from_slice(&self.sent.to_be_bytes());
        bytes.extend_from_slice(&offset.to_be_bytes());
        bytes.extend_from_slice(&u32::try_from(length).expect("a short request").to_be_bytes());
        bytes.extend_from_slice(data);
        self.stream.write_all(&bytes)
    }
}

/// Waits until there is an answer on some of these connections; which of them.
pub fn wait_for_answers<'a>(connections: impl Iterator<Item = &'a Connection>) -> Vec<usize> {
    let mut polled: Vec<PollFd<'_>> =
        connections.map(|one| PollFd::new(&one.stream, PollFlags::IN)).collect();
    rustix::event::poll(&mut polled, None).expect("wait for answers");
    let is_ready = |(place, fd): (usize, &PollFd<'_>)| (!fd.revents().is_empty()).then_some(place);
    polled.iter().enumerate().filter_map(is_ready).collect()
}

impl Drop for Connection {
    fn drop(&mut self) {
        // The other end may be gone.
        let _ = self.send(DISC, false, 0, 0, &[]);
    }
}
