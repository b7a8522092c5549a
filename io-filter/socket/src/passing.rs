//! Sockets on their way from one process to another: over a connected unix socket, with their names.
//!
//! Two ways use it. A process that becomes another one, or starts one, [packs](pack) its listening
//! sockets into the queue of a socket pair and gives the other end as standard input; the new
//! program [unpacks](unpack) them. And a process that wants its sockets kept sends them to its
//! service manager, see [`Notifier`](crate::Notifier).

use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};

/// What tells a program that its standard input is a pack of sockets.
pub const VARIABLE: &str = "BACKTIDE_SOCKETS";

/// The value of [`VARIABLE`].
pub const FROM_STDIN: &str = "stdin";

/// What tells a program that a holder keeps its sockets, and ends with it.
pub const HOLDER_VARIABLE: &str = "BACKTIDE_HOLDER";

/// The descriptors of one message; the kernel takes 253.
const DESCRIPTORS_MAX: usize = 200;

/// The text of one message.
const TEXT_BYTES_MAX: usize = 64 * 1024;

/// A socket and what it is called.
#[derive(Debug)]
pub struct Named {
    /// Its name: any text without a line's end.
    pub name: String,
    /// The socket.
    pub socket: OwnedFd,
}

/// Sends one message with descriptors. Returns when it is in the other side's queue.
///
/// # Errors
/// When the other side is gone or its queue is full.
pub fn send(to: impl AsFd, text: &str, sockets: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut rights = SendAncillaryBuffer::new(&mut space);
    if !sockets.is_empty() && !rights.push(SendAncillaryMessage::ScmRights(sockets)) {
        let why = format!("{} descriptors do not fit into one message", sockets.len());
        return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
    }
    let sent = sendmsg(to, &[IoSlice::new(text.as_bytes())], &mut rights, SendFlags::NOSIGNAL)?;
    if sent < text.len() { Err(io::ErrorKind::WriteZero.into()) } else { Ok(()) }
}

/// Receives one message; an empty one is the end.
///
/// # Errors
/// When there is none, or it is too long to be one of ours.
pub fn receive(from: impl AsFd) -> io::Result<(String, Vec<OwnedFd>)> {
    let mut text = vec![0; TEXT_BYTES_MAX];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut rights = RecvAncillaryBuffer::new(&mut space);
    let mut parts = [IoSliceMut::new(&mut text)];
    let received = recvmsg(from, &mut parts, &mut rights, RecvFlags::CMSG_CLOEXEC)?;
    let mut sockets = Vec::new();
    for message in rights.drain() {
        if let RecvAncillaryMessage::ScmRights(passed) = message {
            sockets.extend(passed);
        }
    }
    if received.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "a message with descriptors is cut off"));
    }
    text.truncate(received.bytes);
    let text = String::from_utf8(text).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
    Ok((text, sockets))
}

/// Packs sockets for another program: the result is to be its standard input. Whoever packs keeps
/// his own descriptors of them.
///
/// # Errors
/// When the system has no room for so many.
pub fn pack<'a>(sockets: impl IntoIterator<Item = (&'a str, BorrowedFd<'a>)>) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let (sender, receiver) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    let sockets: Vec<(&str, BorrowedFd<'_>)> = sockets.into_iter().collect();
    for some in sockets.chunks(DESCRIPTORS_MAX) {
        let names: Vec<&str> = some.iter().map(|(name, _)| *name).collect();
        let descriptors: Vec<BorrowedFd<'_>> = some.iter().map(|(_, socket)| *socket).collect();
        send(&sender, &names.join("\n"), &descriptors)?;
    }
    Ok(receiver)
}

/// Takes out what was [packed](pack), to the end.
///
/// # Errors
/// When it is no such pack.
pub fn unpack(pack: impl AsFd) -> io::Result<Vec<Named>> {
    let mut sockets = Vec::new();
    loop {
        let (names, descriptors) = receive(&pack)?;
        if names.is_empty() && descriptors.is_empty() {
            return Ok(sockets);
        }
        let names: Vec<&str> = names.split('\n').collect();
        if names.len() != descriptors.len() {
            let why = format!("{} names for {} sockets", names.len(), descriptors.len());
            return Err(io::Error::new(io::ErrorKind::InvalidData, why));
        }
        let named = names.into_iter().zip(descriptors);
        sockets.extend(named.map(|(name, socket)| Named { name: name.to_owned(), socket }));
    }
}

/// Nothing is to be read from standard input any more.
///
/// # Errors
/// When `/dev/null` cannot be opened.
pub fn close_stdin() -> io::Result<()> {
    Ok(rustix::stdio::dup2_stdin(std::fs::File::open("/dev/null")?)?)
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        os::unix::net::{UnixListener, UnixStream},
    };

    use super::*;

    #[test]
    fn a_packed_socket_is_the_same_socket() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let packed = pack([("disk", listener.as_fd())]).unwrap();
        drop(listener);
        // Nobody listens at this moment, and yet nobody is refused.
        let mut client = UnixStream::connect(&path).unwrap();
        client.write_all(b"before").unwrap();
        let mut unpacked = unpack(&packed).unwrap();
        let Named { name, socket } = unpacked.pop().unwrap();
        assert_eq!((name.as_str(), unpacked.len()), ("disk", 0));
        let (mut served, _) = UnixListener::from(socket).accept().unwrap();
        let mut said = [0; 6];
        served.read_exact(&mut said).unwrap();
        assert_eq!(&said, b"before");
    }

    #[test]
    fn more_sockets_than_fit_into_a_message_are_packed() {
        let directory = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(directory.path().join("s")).unwrap();
        let names: Vec<String> = (0..450).map(|nth| format!("disk-{nth}")).collect();
        let packed = pack(names.iter().map(|name| (name.as_str(), listener.as_fd()))).unwrap();
        let unpacked = unpack(&packed).unwrap();
        assert!(unpacked.iter().map(|named| &named.name).eq(&names));
    }

    #[test]
    fn an_empty_pack_is_one() {
        let packed = pack([]).unwrap();
        assert!(unpack(&packed).unwrap().is_empty());
    }

    #[test]
    fn what_is_no_pack_is_an_error() {
        assert!(unpack(std::fs::File::open("/dev/null").unwrap()).is_err());
        let (sender, receiver) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        send(&sender, "a name without a socket", &[]).unwrap();
        drop(sender);
        assert_eq!(unpack(&receiver).unwrap_err().kind(), io::ErrorKind::InvalidData);
    }
}
