//! Taking a disk over at its receiver before anything is known of it here: with a higher epoch, so that whoever had it
//! is fenced and its history stands still.

use std::time::Duration;

use backtide_protocol::{Closed, Decoder, Hello, Message, Welcome, encode};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::{dial::Dialer, source::FetchError, stream::StreamError};

/// How long it may take: the claim is made durable.
const CLAIM_TIME: Duration = Duration::from_secs(20);

/// The longest payload of an answer.
const PAYLOAD_MAX: u64 = 64 * 1024;

/// Claims the disk of `hello`, and leaves again: the claim stays.
///
/// # Errors
/// When the receiver is away, or refuses.
pub(crate) async fn claim(dialer: &Dialer, hello: Hello) -> Result<Welcome, FetchError> {
    let claimed = tokio::time::timeout(CLAIM_TIME, shake_hands(dialer, hello)).await;
    let silent = |_| StreamError::Silent { address: dialer.address().clone() };
    claimed.map_err(silent).and_then(|claimed| claimed).map_err(|error| match dialer.explained(error) {
        StreamError::Closed(Closed { message, .. }) => FetchError::Refused(message),
        other => FetchError::Unreachable(other.to_string()),
    })
}

async fn shake_hands(dialer: &Dialer, hello: Hello) -> Result<Welcome, StreamError> {
    let mut socket = dialer.connect().await?;
    let (header, payload) = encode(1, &Message::Hello(hello));
    socket.write_all(&header).await.map_err(StreamError::Lost)?;
    socket.write_all(&payload).await.map_err(StreamError::Lost)?;
    socket.flush().await.map_err(StreamError::Lost)?;
    let mut decoder = Decoder::limited(PAYLOAD_MAX);
    loop {
        if let Some(first) = decoder.next_message()? {
            return match first.message {
                Message::Welcome(welcome) => Ok(welcome),
                Message::Close(closed) => Err(StreamError::Closed(closed)),
                other => Err(StreamError::Unexpected(format!(
                    "expected a welcome from the receiver, found {}",
                    other.name()
                ))),
            };
        }
        if socket.read_buf(decoder.buffer()).await.map_err(StreamError::Lost)? == 0 {
            let ended = std::io::Error::from(std::io::ErrorKind::UnexpectedEof);
            return Err(StreamError::Lost(ended));
        }
    }
}
