use super::*;

const ID: OverlayId = OverlayId(Uuid::from_u128(7));

fn disk() -> BlockRange {
    BlockRange::from(0..100)
}

fn record() -> Record {
    let data = Change::Data { first: BlockIndex(5), slot: Slot(9), crcs: vec![1, 2, 3] };
    let changes = vec![data, Change::Zero(BlockRange::from(20..90))];
    Record { number: RecordNumber(4), durable: RecordNumber(2), changes }
}

fn decode(bytes: &[u8], id: OverlayId) -> Result<Record, String> {
    let (header, body) = bytes.split_first_chunk().ok_or("short")?;
    let header = RecordHeader::decode(header, id)?;
    let body = body.get(..header.body_length).ok_or("short")?;
    let changes = header.changes(body, disk())?;
    Ok(Record { number: header.number, durable: header.durable, changes })
}

#[test]
fn a_record_reads_back_and_every_flipped_bit_makes_it_none() {
    let good = record().encode(ID);
    assert_eq!(decode(&good, ID), Ok(record()));
    assert!(decode(&good, OverlayId(Uuid::from_u128(8))).is_err(), "a record of another overlay");
    for bit in 0..good.len() * 8 {
        let mut bytes = good.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        assert!(decode(&bytes, ID).is_err(), "bit {bit}");
    }
}

#[test]
fn changes_that_do_not_fit_the_disk_are_refused() {
    let of = |changes| Record { changes, ..record() }.encode(ID);
    for change in [
        Change::Zero(BlockRange::from(20..101)),
        Change::Data { first: BlockIndex(99), slot: Slot(0), crcs: vec![1, 2] },
        Change::Data { first: BlockIndex(u64::MAX), slot: Slot(0), crcs: vec![1] },
        Change::Data { first: BlockIndex(0), slot: Slot(u32::MAX), crcs: vec![1] },
        Change::Data { first: BlockIndex(0), slot: Slot(0), crcs: vec![] },
    ] {
        assert!(decode(&of(vec![change.clone()]), ID).is_err(), "{change:?}");
    }
}

#[test]
fn headers_and_marks_with_a_flipped_bit_are_refused() {
    let storage = backtide_storage::MemoryStorage::new();
    let check =
        |bytes: &[u8; HEADER_LENGTH]| decode_header(bytes, FileKind::Map, &storage, Path::new("a.map"));
    let good = encode_header(FileKind::Map, ID, ByteCount(4096));
    assert_eq!(check(&good).unwrap(), (ID, ByteCount(4096)));
    for bit in 0..HEADER_LENGTH * 8 {
        let mut bytes = good;
        bytes[bit / 8] ^= 1 << (bit % 8);
        assert!(matches!(check(&bytes), Err(OverlayError::Damaged { .. })), "bit {bit}");
    }
    let mut later = good;
    later[8] = 2;
    let crc = crc32c::crc32c(&later[..HEADER_LENGTH - 4]);
    later[HEADER_LENGTH - 4..].copy_from_slice(&crc.to_le_bytes());
    assert!(matches!(check(&later), Err(OverlayError::UnknownVersion { found: 2, .. })));
    assert!(check(&encode_header(FileKind::Data, ID, ByteCount(4096))).is_err());
    let mark = encode_mark(ID, RecordNumber(3));
    assert_eq!(decode_mark(&mark, ID), Some(RecordNumber(3)));
    for bit in 0..MARK_LENGTH * 8 {
        let mut bytes = mark;
        bytes[bit / 8] ^= 1 << (bit % 8);
        assert_eq!(decode_mark(&bytes, ID), None, "bit {bit}");
    }
}

#[test]
fn bytes_that_no_one_wrote_are_never_a_record() {
    let good = record().encode(ID);
    for length in 0..good.len() {
        assert!(decode(&good[..length], ID).is_err(), "cut to {length}");
    }
    assert!(decode(&vec![0; 4096], ID).is_err());
}
