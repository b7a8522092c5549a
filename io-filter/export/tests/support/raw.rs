//! A client that sends what the test wants and reads only when told to.

use backtide_export::NbdError;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

pub(crate) const READ: u16 = 0;
pub(crate) const WRITE: u16 = 1;
pub(crate) const DISC: u16 = 2;
pub(crate) const FLUSH: u16 = 3;

/// A client of simple replies, past its handshake.
pub(crate) struct Raw<S> {
    pub(crate) stream: S,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Raw<S> {
    /// Opens an export by EXPORT_NAME.
    pub(crate) async fn open(mut stream: S, export: &str) -> Self {
        let mut hello = 3_u32.to_be_bytes().to_vec();
        hello.extend_from_slice(b"IHAVEOPT\0\0\0\x01");
        hello.extend_from_slice(&(export.len() as u32).to_be_bytes());
        hello.extend_from_slice(export.as_bytes());
        let mut greeting = [0; 18 + 10];
        // Both at once: the stream may hold less than either.
        let (mut reader, mut writer) = tokio::io::split(&mut stream);
        let (sent, read) = tokio::join!(writer.write_all(&hello), reader.read_exact(&mut greeting));
        sent.unwrap();
        read.unwrap();
        assert_eq!(greeting[..8], *b"NBDMAGIC");
        Self { stream }
    }

    /// Sends a request; the data of a write is `length` times 7.
    pub(crate) async fn send(&mut self, kind: u16, cookie: u64, offset: u64, length: u32) {
        let mut bytes = 0x2560_9513_u32.to_be_bytes().to_vec();
        bytes.extend_from_slice(&[0, 0]);
        bytes.extend_from_slice(&kind.to_be_bytes());
        bytes.extend_from_slice(&cookie.to_be_bytes());
        bytes.extend_from_slice(&offset.to_be_bytes());
        bytes.extend_from_slice(&length.to_be_bytes());
        if kind == WRITE {
            bytes.resize(bytes.len() + length as usize, 7);
        }
        self.stream.write_all(&bytes).await.unwrap();
    }

    /// Reads a simple reply and `data` bytes after it if it is a success: cookie and outcome.
    pub(crate) async fn reply(&mut self, data: usize) -> (u64, Result<Vec<u8>, NbdError>) {
        let mut header = [0; 16];
        self.stream.read_exact(&mut header).await.unwrap();
        assert_eq!(header[..4], 0x6744_6698_u32.to_be_bytes());
        let error = u32::from_be_bytes(header[4..8].try_into().unwrap());
        let cookie = u64::from_be_bytes(header[8..].try_into().unwrap());
        if let Some(error) = NbdError::from_code(error) {
            return (cookie, Err(error));
        }
        let mut bytes = vec![0; data];
        self.stream.read_exact(&mut bytes).await.unwrap();
        (cookie, Ok(bytes))
    }

    /// Whether the server has closed, with nothing left to read.
    pub(crate) async fn is_closed(&mut self) -> bool {
        matches!(self.stream.read(&mut [0; 16]).await, Ok(0) | Err(_))
    }
}
