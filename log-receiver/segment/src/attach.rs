//! What an attach says beside who it is: the payload of its entry.
//!
//! ```text
//! attach id 16   entries before it u64   ack u8   origin u8: 0 none, 1: disk id 16, LSN u64, time u64,
//! receiver (length u16, text), name (length u8, text)   disk name: the rest
//! ```
//! Little-endian. Decoding trusts no length.

use backtide_units::{CaptureTime, DiskId, DiskName, Lsn};
use bytes::{Buf, BufMut, Bytes};
use uuid::Uuid;

use crate::Seq;

/// The longest address of a receiver that is kept of an origin; a longer one is cut.
const RECEIVER_MAX: usize = 512;

/// What an attach says beside who it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AttachFacts {
    /// How many entries the log had before: what was acknowledged as durable until then was among them, or is lost.
    pub before: Seq,
    /// When the disk's guest is answered, also in an outage, as the stream's code; 0 when the agent did not say.
    pub ack: u8,
    /// The point of another disk that this one began as; none when it did not, or its agent does not know it any more.
    pub origin: Option<Box<AttachOrigin>>,
}

/// A point of another disk that a disk began as.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttachOrigin {
    /// Where the receiver listens that has the other disk's history.
    pub receiver: String,
    /// The other disk.
    pub disk: DiskId,
    /// Its name then.
    pub name: DiskName,
    /// The point.
    pub lsn: Lsn,
    /// When its last change was captured.
    pub time: CaptureTime,
}

impl AttachFacts {
    /// The payload of an attach with this id, of a disk of this name.
    pub(crate) fn encode(&self, attach: Uuid, name: &DiskName) -> Bytes {
        let mut out = Vec::with_capacity(64);
        out.put_slice(attach.as_bytes());
        out.put_u64_le(self.before.0);
        out.put_u8(self.ack);
        self.put_origin(&mut out);
        out.put_slice(name.as_str().as_bytes());
        out.into()
    }

    /// The origin's bytes, which [`get_origin`](Self::get_origin) reads.
    pub fn put_origin(&self, out: &mut Vec<u8>) {
        out.put_u8(u8::from(self.origin.is_some()));
        let Some(origin) = &self.origin else { return };
        let AttachOrigin { receiver, disk, name, lsn, time } = &**origin;
        let receiver = &receiver[..receiver.floor_char_boundary(RECEIVER_MAX)];
        out.put_slice(disk.0.as_bytes());
        out.put_u64_le(lsn.0);
        out.put_u64_le(time.0);
        out.put_u16_le(receiver.len() as u16);
        out.put_slice(receiver.as_bytes());
        out.put_u8(name.as_str().len() as u8);
        out.put_slice(name.as_str().as_bytes());
    }

    /// Reads an origin and leaves what follows; none when it is no origin.
    pub fn get_origin(input: &mut &[u8]) -> Option<Option<Box<AttachOrigin>>> {
        match input.try_get_u8().ok()? {
            0 => return Some(None),
            1 => {}
            2.. => return None,
        }
        let disk = DiskId(uuid(input)?);
        let lsn = Lsn(input.try_get_u64_le().ok()?);
        let time = CaptureTime(input.try_get_u64_le().ok()?);
        let length = usize::from(input.try_get_u16_le().ok()?);
        let receiver = text(input, length)?.to_owned();
        let length = usize::from(input.try_get_u8().ok()?);
        let name = text(input, length)?.parse().ok()?;
        Some(Some(Box::new(AttachOrigin { receiver, disk, name, lsn, time })))
    }

    /// Reads the payload of an attach; none when it is none.
    pub(crate) fn decode(mut payload: &[u8]) -> Option<(Uuid, Self, DiskName)> {
        let input = &mut payload;
        let attach = uuid(input)?;
        let (before, ack) = (Seq(input.try_get_u64_le().ok()?), input.try_get_u8().ok()?);
        let origin = Self::get_origin(input)?;
        let name = std::str::from_utf8(input).ok()?.parse().ok()?;
        Some((attach, Self { before, ack, origin }, name))
    }
}

fn uuid(input: &mut &[u8]) -> Option<Uuid> {
    let mut bytes = [0; 16];
    input.try_copy_to_slice(&mut bytes).ok()?;
    Some(Uuid::from_bytes(bytes))
}

fn text<'a>(input: &mut &'a [u8], length: usize) -> Option<&'a str> {
    let (text, rest) = input.split_at_checked(length)?;
    *input = rest;
    std::str::from_utf8(text).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn facts_come_back_and_no_part_of_them_passes_for_all() {
        let name: DiskName = "vm1".parse().unwrap();
        let origin = Box::new(AttachOrigin {
            receiver: "tcp://keeper:7400".to_owned(),
            disk: DiskId(Uuid::from_u128(7)),
            name: "golden".parse().unwrap(),
            lsn: Lsn(9),
            time: CaptureTime(11),
        });
        let attach = Uuid::from_u128(5);
        for origin in [None, Some(origin)] {
            let facts = AttachFacts { before: Seq(77), ack: 3, origin };
            let payload = facts.encode(attach, &name);
            assert_eq!(AttachFacts::decode(&payload), Some((attach, facts, name.clone())));
            for length in 0..payload.len() - name.as_str().len() {
                assert_eq!(AttachFacts::decode(&payload[..length]), None, "{length} bytes");
            }
        }
    }

    #[test]
    fn the_longest_facts_fit_an_entry() {
        let name: DiskName = "n".repeat(64).parse().unwrap();
        let (disk, lsn, time) = (DiskId(Uuid::nil()), Lsn(1), CaptureTime(1));
        let origin = AttachOrigin { receiver: "ä".repeat(4096), disk, name: name.clone(), lsn, time };
        let facts = AttachFacts { before: Seq(1), ack: 1, origin: Some(Box::new(origin)) };
        let payload = facts.encode(Uuid::nil(), &name);
        assert!(payload.len() as u64 <= crate::TEXT_MAX.0, "{} bytes", payload.len());
        let (_, read, again) = AttachFacts::decode(&payload).unwrap();
        assert_eq!((read.origin.unwrap().receiver.len(), again), (RECEIVER_MAX, name));
    }
}
