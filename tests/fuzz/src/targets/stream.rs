//! The stream between agent and receiver: frames of every type, whole and in pieces.

use backtide_protocol::{
    AckPolicy, Blocks, CloseCode, Closed, Compare, CompareItem, CompareResult, Content, Data, Decoder,
    FRAME_HEADER_BYTES, FailureCode, Hello, Message, OnOutage, OpenPoint, OriginPoint, PROTOCOL_VERSION,
    Ping, PointOpened, ReadFailure, Reading, ReceiverState, Record, RecordBody, Tracking, Welcome, encode,
};
use backtide_units::{
    BlockIndex, BlockRange, ByteCount, ByteOffset, ByteRange, CaptureTime, DiskId, DiskName, Epoch,
    HistoryId, LogPosition, Lsn, Reason,
};
use bytes::{BufMut, Bytes};
use uuid::Uuid;

use crate::Target;

pub(super) fn targets() -> Vec<Target> {
    let alone = |message: &Message| stream_of(std::slice::from_ref(message));
    let mut messages = greetings();
    messages.extend(changes());
    messages.extend(readings().into_iter().map(Message::Reading));
    let mut samples: Vec<Vec<u8>> = messages.iter().map(alone).collect();
    samples.push(stream_of(&messages));
    vec![Target { name: "stream", seeds: 6000, samples, mend: mend_frames, take }]
}

fn range(start: u64, length: u64) -> ByteRange {
    ByteRange::new(ByteOffset(start), ByteCount(length)).expect("a range")
}

const TIME: CaptureTime = CaptureTime(1_000_000);
const DISK: DiskId = DiskId(Uuid::from_u128(8));
const HISTORY: HistoryId = HistoryId(Uuid::from_u128(7));

fn name() -> DiskName {
    "vm1".parse().expect("a name")
}

/// What both sides say of themselves, and of what has come.
fn greetings() -> Vec<Message> {
    let hello = |tracking| Hello {
        version: PROTOCOL_VERSION,
        disk: DISK,
        name: name(),
        size: ByteCount(1 << 30),
        epoch: Epoch(3),
        attach: Uuid::from_u128(1),
        history: Some(HISTORY),
        tracking,
        next_lsn: Lsn(9),
        acked_durable: Lsn(7),
        ack: Some(AckPolicy::DurableEveryWrite),
        on_outage: Some(OnOutage::Block),
        origin: Some(OriginPoint {
            receiver: "tcp://keeper:7400".to_owned(),
            disk: DISK,
            name: name(),
            lsn: Lsn(70),
            time: TIME,
        }),
    };
    let known = [
        Tracking::New,
        Tracking::Window { base: Lsn(5) },
        Tracking::Bitmap { gap_from: Lsn(5), reason: Reason::Forced },
        Tracking::Lost { reason: Reason::Damaged },
    ];
    let mut all: Vec<Message> = known.map(|tracking| Message::Hello(hello(tracking))).to_vec();
    let nothing = Hello { history: None, ack: None, on_outage: None, origin: None, ..hello(Tracking::New) };
    all.push(Message::Hello(nothing));
    let welcome = |state, last_attach| Welcome {
        version: PROTOCOL_VERSION,
        history: HISTORY,
        state,
        durable: Lsn(7),
        highest: Lsn(9),
        position: LogPosition(12),
        in_pass: true,
        last_time: Some(TIME),
        last_attach,
    };
    all.push(Message::Welcome(welcome(ReceiverState::Known, Some(Uuid::from_u128(1)))));
    all.push(Message::Welcome(welcome(ReceiverState::Foreign, None)));
    all.extend([
        Message::Ack { received: 5, durable: 3, position: LogPosition(12) },
        Message::Hasten { durable: true },
        Message::Hasten { durable: false },
        Message::Ping(Ping::default()),
        Message::Ping(Ping { sent: Some(TIME), heard: Some(TIME) }),
        Message::Close(Closed::new(CloseCode::Invalid, "no")),
    ]);
    all
}

/// What an agent asks of a point, and what it is told.
fn readings() -> Vec<Reading> {
    let (version, owner) = (PROTOCOL_VERSION, || "rewind of vm1".to_owned());
    let blocks = || BlockRange::between(BlockIndex(7), BlockIndex(1 << 20));
    let ask = |which| Reading::AskBlocks { id: 3, which };
    let (durable, entries) = (Lsn(4), LogPosition(6));
    vec![
        Reading::Open(OpenPoint {
            version,
            disk: name(),
            history: Some(HISTORY),
            lsn: Some(Lsn(9)),
            reader: owner(),
        }),
        Reading::Opened(PointOpened {
            version,
            disk: DISK,
            name: name(),
            size: ByteCount(1 << 30),
            lsn: Lsn(9),
            time: TIME,
            history: HISTORY,
            latest: Lsn(11),
        }),
        Reading::Fetch { id: 1, range: range(4096, 65_536) },
        Reading::Piece { id: 1, range: range(4096, 16), data: Data::capture(Bytes::from(vec![7; 16])) },
        Reading::Piece { id: 1, range: range(8192, 4096), data: Data::capture(Bytes::new()) },
        ask(Blocks::Data),
        ask(Blocks::Changed(Lsn(4))),
        ask(Blocks::DataIn(blocks())),
        ask(Blocks::ChangedIn(Lsn(4), blocks())),
        ask(Blocks::Damaged(None)),
        ask(Blocks::Damaged(Some(Lsn(4)))),
        ask(Blocks::Left { epoch: Epoch(5), durable, entries }),
        ask(Blocks::After { durable, entries }),
        Reading::Blocks { id: 3, first: BlockIndex(1 << 22), blocks: [0, 70_000].into_iter().collect() },
        Reading::Hold { id: 4, owner: owner() },
        Reading::Release { id: 4, owner: owner() },
        Reading::Answered { id: 4 },
        Reading::Failed { id: 5, failure: ReadFailure { code: FailureCode::Damaged, message: owner() } },
    ]
}

/// What follows a disk, and what is compared.
fn changes() -> Vec<Message> {
    let time = TIME;
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// Else what is done to samples would hardly reach how the others are read.
    #[test]
    fn every_kind_of_message_is_a_sample_that_is_read() {
        let mut names = BTreeSet::new();
        for sample in targets().remove(0).samples {
            let mut decoder = Decoder::new();
            decoder.buffer().put_slice(&sample);
            while let Some(next) = decoder.next_message().expect("it is right") {
                names.insert(next.message.name());
            }
            assert_eq!(decoder.unfinished(), 0);
        }
        let kinds = "ack answered ask-blocks blocks close compare compare-result failed fetch flush hasten hello hold mark \
                     open-point pass-begin pass-data pass-end piece ping point-opened record release unchanged welcome";
        assert_eq!(names, kinds.split_whitespace().collect());
    }
}
