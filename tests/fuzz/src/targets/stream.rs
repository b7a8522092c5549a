//! The stream between agent and receiver: frames of every type, whole and in pieces.

use backtide_protocol::{
    CloseCode, Closed, Compare, CompareItem, CompareResult, Content, Data, Decoder, FRAME_HEADER_BYTES,
    Message, Record, RecordBody, encode,
};
use backtide_units::{ByteCount, ByteOffset, ByteRange, CaptureTime, Lsn, Reason};
use bytes::{BufMut, Bytes};

use crate::Target;

pub(super) fn targets() -> Vec<Target> {
    let alone = |message: &Message| stream_of(std::slice::from_ref(message));
    let messages = messages();
    let mut samples: Vec<Vec<u8>> = messages.iter().map(alone).collect();
    samples.push(stream_of(&messages));
    vec![Target { name: "stream", seeds: 6000, samples, mend: mend_frames, take }]
}

fn range(start: u64, length: u64) -> ByteRange {
    ByteRange::new(ByteOffset(start), ByteCount(length)).expect("a range")
}

/// One of each that has fields of its own.
fn messages() -> Vec<Message> {
    let time = CaptureTime(1_000_000);
    let bytes = || Data::capture(Bytes::from(vec![7; 4096]));
    let record = |lsn, body| {
        Message::Record(Record {
            lsn: Lsn(lsn),
            previous: Lsn(lsn - 1),
            time,
            range: range(4096, 4096),
            body,
        })
    };
    let item = |content| CompareItem { range: range(0, 65_536), content };
    vec![
        record(7, RecordBody::Write(bytes())),
        record(8, RecordBody::Zero),
        record(9, RecordBody::Trim),
        Message::Flush { lsn: Lsn(9), time },
        Message::Unchanged { lsn: Lsn(9), time },
        Message::PassBegin { at: Lsn(10), gap_from: Lsn(9), time, reason: Reason::Forced },
        Message::PassData { at: Lsn(10), range: range(0, 4096), data: bytes() },
        Message::PassEnd { at: Lsn(10), valid_from: Some(Lsn(10)), time },
        Message::Mark { lsn: Lsn(10), time, label: "before-upgrade".to_owned() },
        Message::Compare(Compare {
            id: 1,
            at: Lsn(10),
            items: vec![item(Content::Zeroes), item(Content::Hash([9; 32]))],
        }),
        Message::CompareResult(CompareResult { id: 1, differing: vec![0, 1] }),
        Message::Close(Closed::new(CloseCode::Invalid, "no")),
    ]
}

fn stream_of(messages: &[Message]) -> Vec<u8> {
    let mut out = Vec::new();
    for (seq, message) in (1..).zip(messages) {
        let (header, payload) = encode(seq, message);
        out.extend_from_slice(&header);
        out.extend_from_slice(&payload);
    }
    out
}

/// Puts the checksums of one frame after the other right, as far as their lengths lead.
pub(super) fn mend_frames(bytes: &mut [u8]) {
    let mut rest = bytes;
    while rest.len() >= FRAME_HEADER_BYTES {
        let (header, behind) = rest.split_at_mut(FRAME_HEADER_BYTES);
        let length = u32::from_le_bytes(header[48..52].try_into().expect("four bytes")) as usize;
        let length = length.min(behind.len());
        let (payload, next) = behind.split_at_mut(length);
        header[52..56].copy_from_slice(&crc32c::crc32c(payload).to_le_bytes());
        let crc = crc32c::crc32c(&header[..60]);
        header[60..].copy_from_slice(&crc.to_le_bytes());
        rest = next;
    }
}

/// In two reads of which the second begins anywhere.
fn take(bytes: &[u8]) {
    let half = bytes.len() / 3;
    for mut decoder in [Decoder::new(), Decoder::limited(4096)] {
        for part in [&bytes[..half], &bytes[half..]] {
            decoder.buffer().put_slice(part);
            loop {
                match decoder.next_message() {
                    Ok(Some(_)) => {}
                    Ok(None) => break,
                    Err(_) => return,
                }
            }
        }
        assert!(decoder.unfinished() <= bytes.len() + FRAME_HEADER_BYTES);
    }
}
