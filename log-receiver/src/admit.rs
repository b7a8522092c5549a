//! Lets a peer in: the TLS handshake where the address asks for it, then the first message.
//!
//! Invariants: the memory of a peer of whom nothing is known is small; one that is refused is told why
//! in a language it speaks, as far as there is one; the same refusal is logged as a warning once in
//! ten minutes, for an agent tries again every few seconds; what was read beyond the first message
//! travels along.

use std::{
    collections::BTreeMap,
    io,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use backtide_protocol::{
    CloseCode, Closed, Decoder, Message, PAYLOAD_BYTES_MAX, ProtocolError, Sequenced, encode,
};
use backtide_tls::Rights;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::{
    connection::undecodable,
    disks::closed,
    socket::{Accepted, Duplex, Stream},
};

/// The longest first message: memory of a peer of whom nothing is known yet. A hello has less than this.
const FIRST_PAYLOAD_BYTES_MAX: u64 = 64 * 1024;

/// A refusal is worth another warning after this time.
const WARN_AGAIN: Duration = Duration::from_secs(600);

/// So many refusals are remembered.
const REFUSALS_MAX: usize = 256;

/// What a TLS handshake begins with, and what a frame of a stream in the clear begins with.
const TLS_HANDSHAKE: u8 = 0x16;
const FRAME: u8 = b'B';

/// A peer that has said its first message.
pub(crate) struct Admitted {
    pub(crate) stream: Stream,
    pub(crate) decoder: Decoder,
    pub(crate) first: Sequenced,
    pub(crate) rights: Rights,
}

/// Who refuses, and remembers what was said of it.
#[derive(Default)]
pub(crate) struct Doorkeeper {
    told: Mutex<BTreeMap<String, Instant>>,
}

impl Doorkeeper {
    /// Gets a connection that was accepted `at` this address as far as its first message; none when the
    /// peer leaves before, or is refused and was told so.
    pub(crate) async fn admit(&self, accepted: Accepted, at: &str) -> io::Result<Option<Admitted>> {
        let Accepted { stream, from, tls } = accepted;
        let (mut stream, rights) = match (stream, tls) {
            (Stream::Tcp(stream), Some(tls)) => {
                match first_byte(&stream).await? {
                    None => return Ok(None),
                    Some(FRAME) => {
                        let why =
                            format!("{at} takes streams under TLS only: write tls:// instead of tcp://");
                        self.warn(format!("an agent{} came in the clear: {why}", shown(from)));
                        say_close(Stream::Tcp(stream).split(), closed(CloseCode::Denied, why)).await?;
                        return Ok(None);
                    }
                    // What is not TLS either is for TLS to refuse.
                    Some(_) => {}
                }
                match tls.accept(stream, from, at).await {
                    Ok((stream, peer)) => {
                        tracing::debug!(
                            subject = peer.certificate.subject,
                            "an agent has shown its certificate"
                        );
                        (Stream::Tls(stream), peer.rights)
                    }
                    Err(why) => {
                        self.warn(why);
                        return Ok(None);
                    }
                }
            }
            (stream, _) => (stream, Rights::all()),
        };
        let mut decoder = Decoder::limited(FIRST_PAYLOAD_BYTES_MAX);
        loop {
            match decoder.next_message() {
                Ok(Some(first)) => {
                    decoder.limit(PAYLOAD_BYTES_MAX);
                    return Ok(Some(Admitted { stream, decoder, first, rights }));
                }
                Ok(None) => {}
                Err(error) => {
                    self.warn(format!("a peer{} is refused at {at}: {}", shown(from), refusal(&error)));
                    say_close(stream.split(), undecodable(&error)).await?;
                    return Ok(None);
                }
            }
            if stream.read(decoder.buffer()).await? == 0 {
                return Ok(None);
            }
        }
    }

    /// Warns of a refusal, but not every time that the same comes again.
    fn warn(&self, why: String) {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        if told.get(&why).is_some_and(|when| when.elapsed() < WARN_AGAIN) {
            tracing::debug!(why, "a peer was refused");
            return;
        }
        tracing::warn!(why, "a peer was refused");
        if told.len() >= REFUSALS_MAX {
            told.clear();
        }
        told.insert(why, Instant::now());
    }
}

/// What is wrong with a first message, for whoever reads the log.
fn refusal(error: &ProtocolError) -> String {
    match error {
        ProtocolError::Magic { found, .. } if found.to_le_bytes()[0] == TLS_HANDSHAKE => {
            "it speaks TLS, and streams are in the clear there: its address has to begin with tcp://"
                .to_owned()
        }
        other => other.to_string(),
    }
}

/// What the peer is going to say first, left where it is; none when it leaves.
async fn first_byte(stream: &TcpStream) -> io::Result<Option<u8>> {
    let mut byte = [0];
    Ok((stream.peek(&mut byte).await? > 0).then_some(byte[0]))
}

fn shown(from: Option<std::net::IpAddr>) -> String {
    from.map(|from| format!(" at {from}")).unwrap_or_default()
}

/// Tells a peer that is not let in why.
async fn say_close(mut duplex: Duplex, close: Closed) -> io::Result<()> {
    let (header, payload) = encode(1, &Message::Close(close));
    duplex.writer.write_all(&header).await?;
    duplex.writer.write_all(&payload).await?;
    duplex.writer.shutdown().await?;
    drain(&mut duplex.reader).await;
    Ok(())
}

/// Reads and drops until the peer ends: closing with unread bytes would make the system throw away
/// what the peer has not read of our last words. The caller bounds how long.
pub(crate) async fn drain(reader: &mut (dyn AsyncRead + Send + Unpin)) {
    let mut scrap = [0; 4096];
    while let Ok(read) = AsyncReadExt::read(reader, &mut scrap).await
        && read > 0
    {}
}
