use backtide_units::{
    BlockIndex, BlockRange, ByteCount, ByteOffset, ByteRange, CaptureTime, Epoch, LogPosition, Lsn, Reason,
};
use bytes::Bytes;
use proptest::prelude::*;

use super::*;
use crate::{
    CloseCode, Closed, Compare, CompareItem, CompareResult, Content, Data, FETCH_BYTES_MAX, Message,
    PAYLOAD_BYTES_MAX, PROTOCOL_VERSION, Ping, Record, RecordBody, encode,
    reading::{Blocks, FailureCode, OpenPoint, PointOpened, ReadFailure, Reading},
};

fn range(start: u64, count: u64) -> ByteRange {
    ByteRange::new(ByteOffset(start), ByteCount(count)).unwrap()
}

fn blocks(start: u64, end: u64) -> BlockRange {
    BlockRange::between(BlockIndex(start), BlockIndex(end))
}

fn record(lsn: u64, range: ByteRange, body: RecordBody) -> Message {
    Message::Record(Record { lsn: Lsn(lsn), previous: Lsn(lsn - 1), time: CaptureTime(77), range, body })
}

/// One of each kind, with every optional part both ways.
fn one_of_each() -> Vec<Message> {
    let data = Data::capture(Bytes::from_static(b"sixteen bytes!!!"));
    let time = CaptureTime(5);
    let mut messages = vec![
        record(1, range(4096, 16), RecordBody::Write(data.clone())),
        record(2, range(0, 1 << 40), RecordBody::Zero),
        record(3, range(512, 512), RecordBody::Trim),
        Message::Flush { lsn: Lsn(3), time },
        Message::Unchanged { lsn: Lsn(3), time },
        Message::PassBegin { at: Lsn(9), gap_from: Lsn(3), time, reason: Reason::ReceiverAway },
        Message::PassData { at: Lsn(9), range: range(8192, 16), data },
        Message::PassData { at: Lsn(9), range: range(0, 1 << 20), data: Data::capture(Bytes::new()) },
        Message::PassEnd { at: Lsn(9), valid_from: Some(Lsn(9)), time },
        Message::PassEnd { at: Lsn(9), valid_from: None, time },
        Message::Mark { lsn: Lsn(9), time, label: "before upgrade".into() },
        Message::Compare(Compare {
            id: 4,
            at: Lsn(9),
            items: vec![
                CompareItem { range: range(0, 65536), content: Content::Hash([7; 32]) },
                CompareItem { range: range(65536, 64 << 20), content: Content::Zeroes },
            ],
        }),
        Message::CompareResult(CompareResult { id: 4, differing: vec![0, 3] }),
        Message::Ack { received: 10, durable: 8, position: LogPosition(77) },
        Message::Hasten { durable: true },
        Message::Hasten { durable: false },
        Message::Ping(Ping::default()),
        Message::Ping(Ping { sent: Some(CaptureTime(9)), heard: Some(CaptureTime(7)) }),
        Message::Close(Closed {
            epoch: Some(backtide_units::Epoch(3)),
            ..Closed::new(CloseCode::Fenced, "epoch 3 owns the disk")
        }),
    ];
    messages.extend(one_of_each_reading().into_iter().map(Message::Reading));
    messages
}

fn one_of_each_reading() -> Vec<Reading> {
    let data = Data::capture(Bytes::from_static(b"sixteen bytes!!!"));
    let name: backtide_units::DiskName = "vm1".parse().unwrap();
    let history = backtide_units::HistoryId(uuid::Uuid::from_u128(7));
    let (version, lsn, size, time) = (PROTOCOL_VERSION, Lsn(9), ByteCount(1 << 30), CaptureTime(5));
    let (disk, latest) = (backtide_units::DiskId(uuid::Uuid::from_u128(8)), Lsn(11));
    vec![
        Reading::Open(OpenPoint {
            version,
            disk: name.clone(),
            history: Some(history),
            lsn: Some(lsn),
            reader: "vm1 on kvm-3".into(),
        }),
        Reading::Opened(PointOpened { version, disk, name, size, lsn, time, history, latest }),
        Reading::Fetch { id: 1, range: range(4096, FETCH_BYTES_MAX) },
        Reading::Piece { id: 1, range: range(4096, 16), data },
        Reading::Piece { id: 1, range: range(8192, 4096), data: Data::capture(Bytes::new()) },
        Reading::AskBlocks { id: 2, which: Blocks::Data },
        Reading::AskBlocks { id: 3, which: Blocks::Changed(Lsn(4)) },
        Reading::AskBlocks { id: 3, which: Blocks::DataIn(blocks(7, 1 << 20)) },
        Reading::AskBlocks { id: 3, which: Blocks::ChangedIn(Lsn(4), blocks(9, 9)) },
        Reading::AskBlocks { id: 3, which: Blocks::Damaged(None) },
        Reading::AskBlocks { id: 3, which: Blocks::Damaged(Some(Lsn(0))) },
        Reading::AskBlocks {
            id: 3,
            which: Blocks::Left { epoch: Epoch(5), durable: Lsn(4), entries: LogPosition(6) },
        },
        Reading::AskBlocks { id: 3, which: Blocks::After { durable: Lsn(4), entries: LogPosition(6) } },
        Reading::Blocks { id: 3, first: BlockIndex(1 << 22), blocks: [0, 70_000].into_iter().collect() },
        Reading::Hold { id: 4, owner: "rewind of vm1".into() },
        Reading::Release { id: 4, owner: "rewind of vm1".into() },
        Reading::Answered { id: 4 },
        Reading::Failed {
            id: 5,
            failure: ReadFailure { code: FailureCode::Damaged, message: "segment 3 is damaged".into() },
        },
    ]
}

fn wire(messages: &[Message]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (message, seq) in messages.iter().zip(1..) {
        let (header, payload) = encode(seq, message);
        bytes.extend_from_slice(&header);
        bytes.extend_from_slice(&payload);
    }
    bytes
}

fn decode_all(bytes: &[u8], step: usize) -> Result<Vec<Message>, ProtocolError> {
    let mut decoder = Decoder::new();
    let mut messages = Vec::new();
    for piece in bytes.chunks(step) {
        decoder.buffer().extend_from_slice(piece);
        while let Some(next) = decoder.next_message()? {
            messages.push(next.message);
        }
    }
    Ok(messages)
}

#[test]
fn every_message_comes_back_however_the_bytes_are_cut() {
    let messages = one_of_each();
    let bytes = wire(&messages);
    for step in [1, 7, 64, 65, bytes.len()] {
        assert_eq!(decode_all(&bytes, step).unwrap(), messages, "in steps of {step}");
    }
}

#[test]
fn what_is_looked_through_for_one_item_is_bounded() {
    let of = |content, length| {
        let items = vec![CompareItem { range: range(0, length), content }];
        decode_all(&wire(&[Message::Compare(Compare { id: 1, at: Lsn(2), items })]), 4096)
    };
    for (content, longest) in [(Content::Hash([7; 32]), 64 << 10), (Content::Zeroes, 64 << 20)] {
        assert!(of(content, longest).is_ok());
        let refused = of(content, longest + 4096).unwrap_err().to_string();
        assert!(refused.contains("a chunk of"), "{refused}");
    }
}

#[test]
fn every_flipped_bit_is_noticed() {
    let bytes = wire(&one_of_each());
    for position in 0..bytes.len() * 8 {
        let mut damaged = bytes.clone();
        damaged[position / 8] ^= 1 << (position % 8);
        assert!(decode_all(&damaged, damaged.len()).is_err(), "bit {position}");
    }
}

#[test]
fn a_repeated_frame_is_out_of_order() {
    let (header, _) = encode(1, &Message::Ping(Ping::default()));
    let bytes = [header, header].concat();
    assert!(matches!(decode_all(&bytes, 128), Err(ProtocolError::Sequence { expected: 2, found: 1 })));
}

#[test]
fn a_frame_over_the_limit_is_refused_by_its_header_alone() {
    let data = Data::capture(Bytes::from(vec![0; PAYLOAD_BYTES_MAX as usize + 1]));
    let message = record(1, range(0, PAYLOAD_BYTES_MAX + 1), RecordBody::Write(data));
    let (header, _) = encode(1, &message);
    assert!(matches!(decode_all(&header, 64), Err(ProtocolError::TooLarge { .. })));
}

#[test]
fn a_reader_that_asks_for_too_much_at_once_is_refused() {
    for reading in [
        Reading::Fetch { id: 1, range: range(0, FETCH_BYTES_MAX + 1) },
        Reading::Piece { id: 1, range: range(0, FETCH_BYTES_MAX + 1), data: Data::capture(Bytes::new()) },
        Reading::AskBlocks { id: 1, which: Blocks::DataIn(blocks(0, (1 << 22) + 1)) },
        Reading::AskBlocks { id: 1, which: Blocks::ChangedIn(Lsn(4), blocks((1 << 52) - 1, (1 << 52) + 1)) },
        Reading::Blocks { id: 1, first: BlockIndex(1), blocks: [0].into_iter().collect() },
        Reading::Blocks { id: 1, first: BlockIndex(0), blocks: [1 << 22].into_iter().collect() },
        Reading::Blocks { id: 1, first: BlockIndex(0), blocks: Default::default() },
    ] {
        let name = reading.name();
        let result = decode_all(&wire(&[Message::Reading(reading)]), 64);
        assert!(matches!(result, Err(ProtocolError::Invalid { what, .. }) if what == name), "{result:?}");
    }
}

#[test]
fn another_protocol_is_named_as_such() {
    let error = decode_all(&[b'G'; 64], 64).unwrap_err();
    assert!(error.to_string().starts_with("the peer does not speak the backtide stream protocol"), "{error}");
}

#[test]
fn another_version_is_known_by_its_number_whatever_its_shape() {
    let newer = Bytes::from_static(br#"{"version":2,"everything":"else"}"#);
    for kind in [1, 2, 16, 17] {
        let (mut header, _) = encode(1, &Message::Ping(Ping::default()));
        header[4] = kind;
        header[48..52].copy_from_slice(&(newer.len() as u32).to_le_bytes());
        header[52..56].copy_from_slice(&crc32c::crc32c(&newer).to_le_bytes());
        let crc = crc32c::crc32c(&header[..60]);
        header[60..].copy_from_slice(&crc.to_le_bytes());
        let bytes = [&header[..], &newer].concat();
        assert!(matches!(decode_all(&bytes, 64), Err(ProtocolError::Version { found: 2 })));
    }
}

proptest! {
    #[test]
    fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..512), step in 1usize..100) {
        let _ = decode_all(&bytes, step);
    }

    /// Headers that pass their checksum and are nonsense otherwise.
    #[test]
    fn arbitrary_checksummed_headers_never_panic(kind in 0u8..28, fields in any::<[u64; 4]>(), payload in proptest::collection::vec(any::<u8>(), 0..64)) {
        let (mut header, _) = encode(1, &Message::Ping(Ping::default()));
        header[4] = kind;
        for (index, field) in fields.iter().enumerate() {
            header[16 + index * 8..24 + index * 8].copy_from_slice(&field.to_le_bytes());
        }
        header[48..52].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        header[52..56].copy_from_slice(&crc32c::crc32c(&payload).to_le_bytes());
        let crc = crc32c::crc32c(&header[..60]);
        header[60..].copy_from_slice(&crc.to_le_bytes());
        let bytes = [&header[..], &payload].concat();
        let _ = decode_all(&bytes, bytes.len());
    }
}

fn taken(message: &Message) -> Result<Message, ProtocolError> {
    let mut decoder = Decoder::new();
    let (header, payload) = encode(1, message);
    decoder.buffer().extend_from_slice(&header);
    decoder.buffer().extend_from_slice(&payload);
    decoder.next_message().map(|found| found.unwrap().message)
}

#[test]
fn a_log_that_leaves_no_lsn_for_what_is_written_next_is_not_believed() {
    let welcome = |durable, highest| {
        Message::Welcome(crate::Welcome {
            version: PROTOCOL_VERSION,
            history: backtide_units::HistoryId(uuid::Uuid::from_u128(1)),
            state: crate::ReceiverState::Known,
            durable,
            highest,
            position: Default::default(),
            in_pass: false,
            last_time: None,
            last_attach: None,
        })
    };
    let most = Lsn::PLAUSIBLE_MAX;
    let beyond = [most.next(), Lsn(1 << 63), Lsn::MAX];
    for message in beyond.map(|lsn| welcome(Lsn(7), lsn)).iter().chain(&[welcome(Lsn(8), Lsn(7))]) {
        let refused = taken(message).unwrap_err();
        assert!(matches!(refused, ProtocolError::Invalid { what: "welcome", .. }), "{refused}");
    }
    for message in [welcome(Lsn::ZERO, Lsn::ZERO), welcome(most, most)] {
        assert_eq!(taken(&message).unwrap(), message);
    }
}

#[test]
fn an_epoch_that_leaves_none_for_the_next_attach_is_not_believed() {
    let hello = |epoch| {
        Message::Hello(crate::Hello {
            version: PROTOCOL_VERSION,
            disk: backtide_units::DiskId::random(),
            name: "vm1".parse().unwrap(),
            size: ByteCount(4096),
            epoch,
            attach: uuid::Uuid::from_u128(1),
            history: None,
            tracking: crate::Tracking::New,
            next_lsn: Lsn(1),
            acked_durable: Lsn::ZERO,
            ack: None,
            on_outage: None,
            origin: None,
        })
    };
    let close = |epoch| {
        let closed = Closed::new(CloseCode::Fenced, "another agent has it");
        Message::Close(Closed { epoch: Some(epoch), ..closed })
    };
    let beyond = |max: Epoch| [Epoch(max.0 + 1), Epoch(u64::MAX)];
    for message in beyond(Epoch::PLAUSIBLE_MAX).map(hello).iter().chain(&beyond(Epoch::OTHERS_MAX).map(close))
    {
        let refused = taken(message).unwrap_err();
        assert!(matches!(refused, ProtocolError::Invalid { .. }), "{refused}");
    }
    for message in [hello(Epoch::PLAUSIBLE_MAX), close(Epoch::OTHERS_MAX)] {
        assert_eq!(taken(&message).unwrap(), message);
    }
    let follows = Epoch::OTHERS_MAX.next().taken_over();
    assert!(follows < Epoch::PLAUSIBLE_MAX, "who hears of the highest goes on after it");
    assert_eq!(Epoch(u64::MAX).next().taken_over(), Epoch(u64::MAX));
}
