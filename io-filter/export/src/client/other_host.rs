//! What this host's kernel knows of the host at the other end of a TCP connection: asked over netlink, of one connection,
//! which anybody may ask. It answers at once, and nobody is asked over the network.
//!
//! The layouts are those of `linux/netlink.h`, `linux/inet_diag.h` and `linux/tcp.h`, in the order of this host's bytes but
//! for ports and addresses. Fields are only ever added behind those that are read here.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType,
    netlink::{SOCK_DIAG, SocketAddrNetlink},
    recv, sendto, socket_with,
};

/// What the kernel knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Heard {
    /// How long ago the other kernel acknowledged anything, be it that its window is still closed.
    pub(super) last: Duration,
    /// Whether it has been sent something since, or asked, that it has to acknowledge.
    pub(super) owes: bool,
    /// While it has room for something that was sent: how many bytes it has acknowledged of all.
    pub(super) taken: Option<u64>,
}

/// Both ends of a connection of this process.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ends {
    pub(super) here: SocketAddr,
    pub(super) there: SocketAddr,
}

// struct nlmsghdr
const HEADER: usize = 16;
const REQUEST: u16 = 1;
const ERROR: u16 = 2;
const BY_FAMILY: u16 = 20;
// struct inet_diag_req_v2, inet_diag_msg and the attribute that is asked for
const QUESTION: usize = HEADER + 56;
const ANSWER: usize = 72;
const INFO: u16 = 2;
const TCP: u8 = 6;
// struct tcp_info
const PROBES: usize = 3;
const UNACKNOWLEDGED: usize = 24;
const LAST_DATA_SENT: usize = 44;
const LAST_ACK_RECEIVED: usize = 56;
const BYTES_ACKNOWLEDGED: usize = 120;
const ITS_ROOM: usize = 228;

impl Ends {
    /// Asks the kernel.
    ///
    /// # Errors
    /// `NotFound` when there is no such connection any more; whatever else keeps this kernel from telling.
    pub(super) fn heard(&self) -> io::Result<Heard> {
        let socket =
            socket_with(AddressFamily::NETLINK, SocketType::DGRAM, SocketFlags::CLOEXEC, Some(SOCK_DIAG))?;
        sendto(&socket, &self.question(), SendFlags::empty(), &SocketAddrNetlink::new(0, 0))?;
        let mut answer = [0; 4096];
        // It was put in the queue while the question was sent.
        let (_, length) = recv(&socket, &mut answer[..], RecvFlags::DONTWAIT)?;
        parse(answer.get(..length).ok_or_else(strange)?)
    }

    fn question(&self) -> [u8; QUESTION] {
        let mut out = Vec::with_capacity(QUESTION);
        out.extend((QUESTION as u32).to_ne_bytes());
        out.extend(BY_FAMILY.to_ne_bytes());
        out.extend(REQUEST.to_ne_bytes());
        // The question's number and who asks: one socket asks once.
        out.extend([0; 8]);
        let family = match self.here {
            SocketAddr::V4(_) => AddressFamily::INET,
            SocketAddr::V6(_) => AddressFamily::INET6,
        };
        out.extend([family.as_raw() as u8, TCP, 1 << (INFO - 1), 0]);
        // In whatever state.
        out.extend(u32::MAX.to_ne_bytes());
        out.extend(self.here.port().to_be_bytes());
        out.extend(self.there.port().to_be_bytes());
        out.extend(address(self.here.ip()));
        out.extend(address(self.there.ip()));
        let interface = match self.here {
            SocketAddr::V4(_) => 0,
            SocketAddr::V6(here) => here.scope_id(),
        };
        out.extend(interface.to_ne_bytes());
        // No cookie: the addresses name it.
        out.extend([0xff; 8]);
        out.try_into().expect("a question has one length")
    }
}

fn address(ip: IpAddr) -> [u8; 16] {
    match ip {
        IpAddr::V6(ip) => ip.octets(),
        IpAddr::V4(ip) => {
            let mut out = [0; 16];
            out[..4].copy_from_slice(&ip.octets());
            out
        }
    }
}

fn parse(answer: &[u8]) -> io::Result<Heard> {
    let length = u32_at(answer, 0)? as usize;
    let answer = answer.get(..length).ok_or_else(strange)?;
    match u16_at(answer, 4)? {
        ERROR => {
            let code = u32_at(answer, HEADER)?.cast_signed().checked_neg().ok_or_else(strange)?;
            return Err(io::Error::from_raw_os_error(code));
        }
        BY_FAMILY => {}
        _ => return Err(strange()),
    }
    let mut attributes = answer.get(HEADER + ANSWER..).ok_or_else(strange)?;
    loop {
        let (length, kind) = (usize::from(u16_at(attributes, 0)?), u16_at(attributes, 2)?);
        let content = attributes.get(4..length).ok_or_else(strange)?;
        if kind == INFO {
            return of_info(content);
        }
        attributes = attributes.get(length.next_multiple_of(4)..).ok_or_else(strange)?;
    }
}

fn of_info(info: &[u8]) -> io::Result<Heard> {
    let time = |at| Ok::<_, io::Error>(Duration::from_millis(u32_at(info, at)?.into()));
    let last = time(LAST_ACK_RECEIVED)?;
    let probed = *info.get(PROBES).ok_or_else(strange)? > 0;
    let is_out = u32_at(info, UNACKNOWLEDGED)? > 0;
    // While it has no room some of what was sent may stay unacknowledged, though each question is answered.
    let unanswered = is_out && time(LAST_DATA_SENT)? < last;
    // Kernels before 5.4 do not tell its room.
    let has_room = u32_at(info, ITS_ROOM).is_ok_and(|room| room > 0);
    let taken = (is_out && has_room).then(|| u64_at(info, BYTES_ACKNOWLEDGED)).transpose()?;
    Ok(Heard { last, owes: probed || unanswered, taken })
}

fn u16_at(bytes: &[u8], at: usize) -> io::Result<u16> {
    let bytes = bytes.get(at..at + 2).ok_or_else(strange)?;
    Ok(u16::from_ne_bytes(bytes.try_into().expect("two bytes")))
}

fn u32_at(bytes: &[u8], at: usize) -> io::Result<u32> {
    let bytes = bytes.get(at..at + 4).ok_or_else(strange)?;
    Ok(u32::from_ne_bytes(bytes.try_into().expect("four bytes")))
}

fn u64_at(bytes: &[u8], at: usize) -> io::Result<u64> {
    let bytes = bytes.get(at..at + 8).ok_or_else(strange)?;
    Ok(u64::from_ne_bytes(bytes.try_into().expect("eight bytes")))
}

fn strange() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "the kernel's answer has another layout")
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};

    use super::*;

    /// An answer of the kernel with these attributes.
    fn answer(kind: u16, rest: &[u8]) -> Vec<u8> {
        let length = (HEADER + rest.len()) as u32;
        let mut out = length.to_ne_bytes().to_vec();
        out.extend(kind.to_ne_bytes());
        out.extend([0; 10]);
        out.extend(rest);
        out
    }

    fn info(probes: u8, unacknowledged: u32, last_sent: u32, last_ack: u32) -> [u8; 232] {
        let mut out = [0; 232];
        out[PROBES] = probes;
        for (at, value) in
            [(UNACKNOWLEDGED, unacknowledged), (LAST_DATA_SENT, last_sent), (LAST_ACK_RECEIVED, last_ack)]
        {
            out[at..at + 4].copy_from_slice(&value.to_ne_bytes());
        }
        out
    }

    #[test]
    fn who_owes_an_answer() {
        let owes = |info: [u8; 232]| of_info(&info).unwrap().owes;
        assert!(!owes(info(0, 0, 300, 304)), "nothing is out");
        assert!(owes(info(0, 1, 152, 1304)), "sent again, and not acknowledged");
        assert!(owes(info(3, 0, 14_748, 13_236)), "its window was asked for, and it says nothing");
        assert!(!owes(info(0, 0, 5352, 2144)), "the window is closed, and it says so");
        assert!(
            !owes(info(0, 2, 5352, 5350)),
            "what is sent beyond a closed window is answered, not acknowledged"
        );
        assert!(!owes(info(0, 3, 4, 4)), "just sent");
    }

    #[test]
    fn what_was_taken_counts_while_there_is_room_and_something_is_out() {
        let taken = |unacknowledged, room: u32, length: usize| {
            let mut info = info(0, unacknowledged, 0, 0);
            info[BYTES_ACKNOWLEDGED..BYTES_ACKNOWLEDGED + 8].copy_from_slice(&(7_u64 << 32).to_ne_bytes());
            info[ITS_ROOM..].copy_from_slice(&room.to_ne_bytes());
            of_info(&info[..length]).unwrap().taken
        };
        assert_eq!(taken(1, 65_536, 232), Some(7 << 32));
        assert_eq!(taken(1, 0, 232), None, "it has no room");
        assert_eq!(taken(0, 65_536, 232), None, "nothing is out");
        assert_eq!(taken(1, 65_536, 200), None, "an older kernel");
    }

    #[test]
    fn an_answer_of_another_layout_is_an_error() {
        let with = |attributes: &[u8]| answer(BY_FAMILY, &[&[0; ANSWER], attributes].concat());
        let other = [&8_u16.to_ne_bytes()[..], &5_u16.to_ne_bytes(), &[1; 4]].concat();
        let ours = [&236_u16.to_ne_bytes()[..], &INFO.to_ne_bytes(), &info(1, 0, 0, 7)].concat();
        let whole = with(&[other.clone(), ours].concat());
        assert_eq!(parse(&whole).unwrap(), Heard { last: Duration::from_millis(7), owes: true, taken: None });
        for cut in 0..whole.len() {
            parse(&whole[..cut]).unwrap_err();
            let mut told = whole[..cut].to_vec();
            if let Some(length) = told.get_mut(..4) {
                length.copy_from_slice(&(cut as u32).to_ne_bytes());
            }
            parse(&told).unwrap_err();
        }
        parse(&with(&other)).unwrap_err();
        parse(&with(&[0; 8])).unwrap_err();
        parse(&answer(3, &[0; 200])).unwrap_err();
        let refused = parse(&answer(ERROR, &(-2_i32).to_ne_bytes())).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::NotFound);
        parse(&answer(ERROR, &i32::MIN.to_ne_bytes())).unwrap_err();
    }

    #[test]
    fn the_kernel_tells_of_connections_over_both_protocols() {
        for listen in ["127.0.0.1:0", "[::1]:0"] {
            // A host may be without the newer one.
            let Ok(listener) = TcpListener::bind(listen) else { continue };
            let mut stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let (mut peer, _) = listener.accept().unwrap();
            stream.write_all(b"a").unwrap();
            peer.read_exact(&mut [0]).unwrap();
            let ends = Ends { here: stream.local_addr().unwrap(), there: stream.peer_addr().unwrap() };
            let heard = ends.heard().unwrap();
            assert!(heard.last < Duration::from_secs(3600), "{heard:?}");
            let gone = Ends { here: SocketAddr::new(ends.here.ip(), 1), ..ends };
            assert_eq!(gone.heard().unwrap_err().kind(), io::ErrorKind::NotFound);
        }
    }
}
